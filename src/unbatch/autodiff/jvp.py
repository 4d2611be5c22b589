"""The predictions as a linear map of the parameters, ``J``: pushed through, and pulled back.

One forward pass is kept, and used as often as one likes. A tangent goes through the recorded steps
with what each op had as its arguments, so that no value is computed again but those of elementwise
ops; how it passes through one op is in ``jvp_rules.py``. Where the recording has other derivatives
than the model, the model itself is linearised (``model_jvp.py``).

Legend: ``v`` a tangent of the parameters, ``u`` a cotangent of the predictions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, final

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_map

from unbatch.autodiff.adjoint import AdjointTest, Columns
from unbatch.autodiff.autograd import (
    batched_grad,
    detached,
    forward_mode,
    gradients,
    leaves_of,
    or_zeros,
    pick,
    subset,
)
from unbatch.autodiff.compositions import COMPOSITIONS
from unbatch.autodiff.context import Context
from unbatch.autodiff.dependence import values_read, values_returned
from unbatch.autodiff.forward_mode import through_op
from unbatch.autodiff.jvp_rules import NEED_OUTPUTS, push_through
from unbatch.autodiff.other_batches import finite_batches
from unbatch.autodiff.planner import BackwardPlan
from unbatch.autodiff.schedule import Schedule
from unbatch.autodiff.tangent_store import TangentStore
from unbatch.capture.aliasing import Window, seen_through_older_windows
from unbatch.capture.graph import Graph
from unbatch.capture.isolation import random_state, set_random_state
from unbatch.capture.steps import ExecutedOp, Step
from unbatch.capture.substitutes import held, laid_out, norm_with_constant_statistics, unmoved
from unbatch.capture.trees import flat
from unbatch.errors import MSG_NO_TANGENT, MSG_TANGENT_NOT_FINITE, StructureError

# How tangents are pushed: through one op after the other, by forward mode of the whole graph, by
# double backward, or by the rows of J.
BY_STEPS, AT_ONCE, TWICE = "by steps", "at once", "twice"
COLUMNS, ONE_BY_ONE = "columns", "columns, one by one"

NO_WAY = "no way of pushing tangents belongs to its backward pass"


class Linearised(ABC):
    """``J`` at the parameters of this moment, after one forward pass that is kept."""

    context: Context
    leaves: dict[str, Tensor]  # parameters, by name
    outputs: dict[int, Tensor]  # those that the loss reads, connected to the leaves
    inner: dict[int, Tensor]  # values beside the outputs that the loss reads
    all_outputs: dict[int, Tensor]  # all that the model returned, detached

    @property
    def predictions(self) -> dict[int, Tensor]:
        """Return the values of the outputs, by number in the graph."""
        return detached(self.outputs)

    @abstractmethod
    def push(self, tangents: Mapping[str, Tensor]) -> dict[int, Tensor]:
        """Return ``J v``, by prediction."""

    @abstractmethod
    def pull(
        self, cotangents: Mapping[int, Tensor], names: Iterable[str] | None = None
    ) -> dict[str, Tensor]:
        """Return ``Jᵀ u``, by parameter (some of them, by name)."""

    # -- which way --

    @property
    def way(self) -> str:
        """How tangents are pushed: the first way that belongs to the backward pass.

        Tried out once for each choice of parameters.
        """
        ways = self.context.tested.ways
        if self._key not in ways:
            ways[self._key] = self._find_way()
        return ways[self._key]

    def _find_way(self) -> str:
        way = self._way()
        if way is not None:
            return way
        # A sample that is not finite is in every product: the ways are tried without it.
        for other in finite_batches(self.context, self.predictions):
            way = self._on(other)._way()
            if way is not None:
                return way
        raise StructureError(MSG_TANGENT_NOT_FINITE)

    @property
    @abstractmethod
    def _key(self) -> Hashable:
        """What the way depends on."""

    @abstractmethod
    def _on(self, other: Context) -> Linearised:
        """Return the same on another batch."""

    @abstractmethod
    def _way(self) -> str | None:
        """Return the first way that belongs to the backward pass on this batch.

        None where nothing can be compared; raises ``StructureError`` where none does.
        """

    def _typed(self, tangents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tangents in the types of the parameters, of which there may be several."""
        return {name: t.to(self.leaves[name].dtype) for name, t in tangents.items()}

    def _pulled(
        self, cotangents: Mapping[int, Tensor], names: Iterable[str] | None
    ) -> dict[str, Tensor]:
        ends = pick(self.outputs, cotangents)
        leaves = self.leaves
        if names is not None:
            leaves = subset(self.leaves, names)
        return gradients(ends, leaves, list(cotangents.values()), retain=True)


# --- of the recording -----------------------------------------------------------------------------


def moves(step: Step, plan: BackwardPlan) -> bool:
    """Tell whether a tangent passes through a step on its way to the predictions.

    What only decides (distances that a nearest neighbour is found by) needs none.
    """
    if plan.theta.isdisjoint(values_read(step)):
        return False
    results = values_returned(step)
    for _, new in step.writes:
        results.append(new.index)
    return not plan.flowing.isdisjoint(results)


def written_tangents(step: Step, outs: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return the tangents of what a step has written to, from those of its results.

    None of what it writes to beside its results: no derivative goes through that.
    """
    if not step.outs:
        return list(outs)
    of_results = dict(zip(step.outs, outs, strict=False))
    return [of_results.get(new) for _, new in step.written_results]


def differentiated(graph: Graph, schedule: Schedule) -> list[Step]:
    """Return the steps of the forward pass that tangents go through."""
    plan, steps = schedule.plan, []
    for step in graph.forward_steps:
        # A batch norm with constant statistics is cut off from these alone.
        cut = step.index in schedule.cut_numbers and step.index not in plan.frozen_norms
        if step.grad and not cut and moves(step, plan):
            steps.append(step)
    return steps


@final
class LinearisedGraph(Linearised):
    """The recorded computation, run when this is made.

    ``frozen``: with batch statistics held constant. ``watched``: values in the middle of it, whose
    edges in the autograd graph are kept in ``edges``. ``steps``: the ops that tangents go through,
    as they ran.
    """

    def __init__(
        self,
        context: Context,
        parameters: Mapping[str, Tensor],
        frozen: bool = False,
        watched: Sequence[int] = (),
    ) -> None:
        self.context, self.parameters, self.frozen = context, parameters, frozen
        self.watched = watched
        self.schedule = context.schedule(parameters, "frozen" if frozen else "component")
        self.plan = self.schedule.plan
        self.leaves = leaves_of(parameters)
        self.edges: dict[int, GradientEdge] = {}
        self.steps: list[ExecutedOp] = []
        # Of values whose memory is written to through others, and of these memories, in entries.
        self.windows: dict[int, Window] = {}
        self.sizes: dict[int, int] = {}
        # J by its rows, by the values that these are of.
        self._columns_of: dict[tuple[tuple[int, ...], bool], Columns] = {}
        self._run()

    def _run(self) -> None:
        graph = self.context.graph
        with torch.enable_grad():
            tensors = graph.run(
                self.context.data | self.plan.by_number(self.leaves),
                self.schedule.read_afterwards,
                visit=self._visit,
                instead=self._recording_substitutes(),
                steps=graph.forward_steps,
            )
        values = dict(zip(self.schedule.read_afterwards, tensors, strict=True))
        self.outputs = subset(values, self.context.outputs.smooth)
        self.inner = detached(subset(values, self.schedule.inner))
        self.all_outputs = {}
        for ref in graph.predictions:
            self.all_outputs[ref.index] = values[ref.index].detach()

    def _visit(self, i: int, value: Tensor) -> None:
        storage = self.context.graph.values[i].storage
        # The window is that of the tensor at hand: a replay may lay values out otherwise.
        if storage in self._shared:
            self.windows[i] = Window.of_tensor(value)
            size = value.untyped_storage().nbytes() // value.element_size()
            self.sizes[storage] = max(size, self.sizes.get(storage, 0))
        if i in self.watched and i not in self.edges and value.requires_grad:
            self.edges[i] = get_gradient_edge(value)

    @cached_property
    def _shared(self) -> frozenset[int]:
        """Memories that are written to and seen through several windows."""
        return seen_through_older_windows(self.context.graph, self.context.outputs.smooth)

    def _recording_substitutes(self) -> dict[int, Callable[..., Any]]:
        """Return what keeps the arguments of every step that derivatives go through."""
        graph = self.context.graph
        instead: dict[int, Callable[..., Any]] = {}
        for step in graph.forward_steps:
            if step.index in self.plan.frozen_norms:
                if step.grad and moves(step, self.plan):
                    instead[step.index] = partial(
                        self._record, step, norm_with_constant_statistics(step)
                    )
            elif step.index in self.schedule.cut_numbers:
                instead[step.index] = held(step.op)
            elif step.grad and moves(step, self.plan):
                instead[step.index] = partial(self._record, step, step.op)
        return instead

    def _record(self, step: Step, op: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a step and keep its arguments, as copies if one of them is ever written to."""
        graph = self.context.graph
        keep = _detached
        if any(map(graph.written, values_read(step))):
            keep = _copied
        kept_args, kept_kwargs = tree_map(keep, (args, kwargs))
        result = op(*args, **kwargs)
        arguments = dict(zip(step.parameters, kept_args, strict=False)) | kept_kwargs
        outs: tuple[Any, ...] = ()
        if step.name in NEED_OUTPUTS:
            outs = tuple(map(_detached, flat(result)))
        self.steps.append(ExecutedOp(step, arguments, outs))
        return result

    # -- Jᵀ u --

    def pull(
        self, cotangents: Mapping[int, Tensor], names: Iterable[str] | None = None
    ) -> dict[str, Tensor]:
        """Return ``Jᵀ u``, by parameter (some of them, by name)."""
        return self._pulled(cotangents, names)

    # -- J v --

    def push(self, tangents: Mapping[str, Tensor], at: Sequence[int] = ()) -> dict[int, Tensor]:
        """Return ``J v``, by prediction; or the tangents of the values ``at``, all of them watched.

        Raises ``StructureError`` where the backward pass is not finite on any batch.
        """
        return self._push(self.way, self._typed(tangents), at)

    def _push(
        self, way: str, tangents: Mapping[str, Tensor], at: Sequence[int] = ()
    ) -> dict[int, Tensor]:
        if way in (COLUMNS, ONE_BY_ONE):
            return self._columns(tuple(at), way == COLUMNS).push(tangents)
        if way == AT_ONCE:
            return self._push_at_once(tangents, at)
        if not any(call.step.noise for call in self.steps):
            return self._push_by_steps(tangents, at)
        # An op that draws is run again on tangents, and draws again.
        before = random_state()
        try:
            return self._push_by_steps(tangents, at)
        finally:
            set_random_state(before)

    @property
    def _key(self) -> Hashable:
        return tuple(self.parameters), self.frozen

    def _on(self, other: Context) -> LinearisedGraph:
        return LinearisedGraph(other, self.parameters, self.frozen)

    def _way(self) -> str | None:
        moving = {i: t for i, t in self.outputs.items() if t.requires_grad}
        test = AdjointTest.of(self.pull, self.parameters, moving, self.context.rounding)
        if test is None:
            return None
        compared = False
        # By steps first: it computes no value again.
        for way in (BY_STEPS, AT_ONCE, COLUMNS, ONE_BY_ONE):
            try:
                agrees = test.agrees(self._push(way, test.v))
            except StructureError:
                agrees = False  # some op has no tangent
            if agrees:
                return way
            compared |= agrees is not None
        if not compared:
            return None
        raise StructureError(MSG_NO_TANGENT.format(place="the model", error=NO_WAY))

    def _columns(self, at: tuple[int, ...], together: bool) -> Columns:
        """Return ``J`` by its rows; or the derivatives of the values ``at``, which are watched.

        ``together``: several rows are pulled back in one call.
        """
        if (at, together) not in self._columns_of:
            ends: dict[int, Any] = {i: self.edges[i] for i in at if i in self.edges}
            if not at:
                ends = dict(self.outputs)
            like = {i: self._zero(i) for i in at or self.outputs}

            def pull(i: int, units: Tensor) -> dict[str, Tensor]:
                if i not in ends:
                    return {}
                leaves = list(self.leaves.values())
                rows = batched_grad([ends[i]], leaves, [units], len(units), together)
                by_name = zip(self.leaves, rows, strict=True)
                return {name: r.detach() for name, r in by_name if r is not None}

            self._columns_of[at, together] = Columns(like, pull, bytes_of(self.leaves))
        return self._columns_of[at, together]

    def _push_by_steps(
        self, tangents: Mapping[str, Tensor], at: Sequence[int] = ()
    ) -> dict[int, Tensor]:
        """Push tangents through one recorded op after the other."""
        moving = TangentStore(self.context.graph, self.windows, self.sizes)
        for i, name in self.plan.parameters.items():
            if name in tangents:
                moving.values[i] = tangents[name]
        wanted = set(at or self.outputs)
        with torch.no_grad():
            for call, read in zip(self.steps, self._last_reads, strict=True):
                step = call.step
                of_arguments = moving.of_arguments(step)
                # Memory that is let go of is used again, which is quicker than new memory.
                for value in read - wanted:
                    moving.values.pop(value, None)
                if not of_arguments:
                    continue
                if step.index in self.plan.frozen_norms:
                    outs = through_op(call, norm_with_constant_statistics(step), of_arguments)
                else:
                    outs = push_through(call, of_arguments)
                # Rules may leave out outputs at the end that never move.
                for ref, tangent in zip(step.outs, outs, strict=False):
                    moving.put(ref, ref, tangent)
                written = written_tangents(step, outs)
                for (old, new), tangent in zip(step.written_results, written, strict=False):
                    moving.put(new, old, tangent)
        pushed: dict[int, Tensor] = {}
        for i in at or self.outputs:
            tangent = moving.get(i)
            pushed[i] = self._zero(i) if tangent is None else tangent
        return pushed

    @cached_property
    def _last_reads(self) -> list[set[int]]:
        """The values that each step is the last to read."""
        # Later steps overwrite the places of earlier ones.
        last: dict[int, int] = {}
        for place, call in enumerate(self.steps):
            for value in values_read(call.step):
                last[value] = place
        reads: list[set[int]] = [set() for _ in self.steps]
        for value, place in last.items():
            reads[place].add(value)
        return reads

    def _zero(self, i: int) -> Tensor:
        """Return the tangent of a prediction that does not move."""
        value = self.context.graph.values[i]
        like = next(iter(self.outputs.values())).detach()
        return like.new_zeros(value.shape, dtype=value.dtype)

    def _push_at_once(
        self, tangents: Mapping[str, Tensor], at: Sequence[int] = ()
    ) -> dict[int, Tensor]:
        """Push tangents by forward mode of the whole computation.

        It runs again, and knows about memory by itself.
        """
        context, graph = self.context, self.context.graph
        wanted = list(at or self.outputs)
        # Tangents go along in forward mode even where no gradients are recorded.
        with torch.no_grad(), forward_mode():
            live = detached(self.plan.by_number(self.parameters))
            for i, name in self.plan.parameters.items():
                if name in tangents:
                    live[i] = forward_ad.make_dual(live[i], tangents[name].contiguous())
            instead = self._forward_mode_substitutes()
            try:
                duals = graph.run(
                    context.data | live, wanted, instead=instead, steps=graph.forward_steps
                )
            except (NotImplementedError, RuntimeError) as error:
                message = MSG_NO_TANGENT.format(place="the model", error=error)
                raise StructureError(message) from error
            outs = [forward_ad.unpack_dual(dual).tangent for dual in duals]
        return dict(zip(wanted, or_zeros(outs, duals), strict=True))

    def _forward_mode_substitutes(self) -> dict[int, Callable[..., Any]]:
        """Return what runs in place of steps in forward mode; later entries take precedence."""
        graph = self.context.graph
        instead: dict[int, Callable[..., Any]] = {}
        for step in graph.forward_steps:
            depends = not self.plan.theta.isdisjoint(values_read(step))
            if not step.grad or (depends and not moves(step, self.plan)):
                instead[step.index] = unmoved(step.op)
            elif step.name in COMPOSITIONS:
                instead[step.index] = self._composition(step)
        for step in self.schedule.cut_off:
            instead[step.index] = held(step.op)
        for i in self.plan.frozen_norms:
            instead[i] = norm_with_constant_statistics(graph.steps[i])
        return instead

    def _composition(self, step: Step) -> Callable[..., Any]:
        """Return an op without forward mode as a composition of ops that have one.

        Its result lies in memory as before.
        """
        out = step.outs[0]
        assert out is not None

        def run(*args: Any, **kwargs: Any) -> Any:
            arguments = dict(zip(step.parameters, args, strict=False)) | kwargs
            first, *others = flat(COMPOSITIONS[step.name](arguments))
            return laid_out(first, self.context.graph.values[out.index].stride), *others

        return run


def bytes_of(tensors: Mapping[str, Tensor]) -> int:
    """Return the bytes that some tensors take."""
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _detached(t: Any) -> Any:
    if isinstance(t, Tensor):
        return t.detach()
    return t


def _copied(t: Any) -> Any:
    if isinstance(t, Tensor):
        return t.detach().clone()
    return t
