"""The predictions as a linear map of the parameters: one forward pass, kept; tangents pushed forward, cotangents pulled
back through it as often as one likes.

A tangent goes through the recorded steps with what each op had as its arguments: through an op that is linear in one of
them by the op itself, through any other by forward mode of that op alone. So no value is computed twice but those of
elementwise ops.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, final

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_map

from unbatch.autodiff import eager
from unbatch.autodiff.autograd import forward_mode, gradients, solid
from unbatch.autodiff.compositions import SPELLED_OUT
from unbatch.autodiff.context import Context
from unbatch.autodiff.jvp_rules import NEED_OUTPUTS, RULES, Tangents, through_op
from unbatch.autodiff.planner import BackwardPlan
from unbatch.autodiff.schedule import Schedule
from unbatch.capture.aliasing import Window, seen_through_older_windows
from unbatch.capture.graph import ExecutedOp, Graph, Ref, Step, flat, is_ref
from unbatch.capture.isolation import untouched
from unbatch.capture.substitutes import held, laid_out, norm_held, unmoved
from unbatch.errors import MSG_NO_TANGENT, StructureError
from unbatch.linalg.probes import gaussians_like, seeded


@dataclass
class _Tangents:
    """By value; those that share a memory which is written to share that of their tangents as well."""

    graph: Graph
    windows: Mapping[int, Window]
    sizes: Mapping[int, int]  # of the memories, in entries
    values: dict[int, Tensor] = field(default_factory=dict)
    memories: dict[int, Tensor] = field(default_factory=dict)

    def get(self, i: int) -> Tensor | None:
        if i not in self.windows:
            return self.values.get(i)
        memory = self.memories.get(self.graph.values[i].storage)
        return None if memory is None else self.windows[i](memory).clone()

    def put(self, new: Ref | None, old: Ref | None, t: Tensor | None) -> None:
        """``old``: what lies where ``new`` does, if that was written to."""
        if new is None or old is None:
            return
        window, storage = (
            self.windows.get(new.index, self.windows.get(old.index)),
            self.graph.values[new.index].storage,
        )
        if window is not None and storage in self.memories:
            window(self.memories[storage]).copy_(t if t is not None else torch.zeros(()))
        elif window is not None and t is not None:
            self.memories[storage] = t.new_zeros(self.sizes[storage])
            window(self.memories[storage]).copy_(t)
        elif t is not None:
            self.values[new.index] = t


def moves(step: Step, flow: BackwardPlan) -> bool:
    """Whether a step makes something that depends on the parameters of something that does."""
    made = [r.index for r in [*step.outs, *(new for _, new in step.writes)] if r is not None]
    return any(i in flow.theta for i in made) and any(r.index in flow.theta for r in step.refs())


def differentiated(graph: Graph, route: Schedule) -> list[Step]:
    """Return the steps of the forward pass that tangents go through."""
    cut = {step.index for step in route.cut_off} - set(route.flow.frozen_norms)
    steps = [step for step in graph.forward_steps if step.grad and step.index not in cut]
    return [step for step in steps if moves(step, route.flow)]


class Linearised(ABC):
    """``J`` at the parameters of this moment, after one forward pass that is kept."""

    leaves: dict[str, Tensor]  # parameters, by name
    outputs: dict[int, Tensor]  # predictions, connected to the leaves
    inner: dict[int, Tensor]  # values beside the predictions that the loss reads
    all_outputs: dict[int, Tensor]  # all that the model returned, detached

    @property
    def predictions(self) -> dict[int, Tensor]:
        """Return values by number in the graph."""
        return {i: t.detach() for i, t in self.outputs.items()}

    @abstractmethod
    def push(self, tangents: Mapping[str, Tensor]) -> dict[int, Tensor]:
        """Return ``J v``, by prediction."""

    @abstractmethod
    def pull(
        self, cotangents: Mapping[int, Tensor], names: Iterable[str] | None = None
    ) -> dict[str, Tensor]:
        """Return ``Jᵀ u``, by parameter (some of them, by name)."""

    def _pulled(
        self, cotangents: Mapping[int, Tensor], names: Iterable[str] | None
    ) -> dict[str, Tensor]:
        ends = [self.outputs[i] for i in cotangents]
        leaves = self.leaves if names is None else {n: self.leaves[n] for n in names}
        return gradients(ends, leaves, list(cotangents.values()), retain=True)


@final
@dataclass
class LinearisedGraph(Linearised):
    """The recorded computation; ``frozen``: with batch statistics held constant.

    ``watched``: values in the middle, whose places in the graph of derivatives are kept in ``edges``.
    """

    setting: Context
    parameters: Mapping[str, Tensor]
    frozen: bool = False
    watched: Sequence[int] = ()
    edges: dict[int, GradientEdge] = field(default_factory=dict)
    leaves: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[int, Tensor] = field(default_factory=dict)
    inner: dict[int, Tensor] = field(default_factory=dict)
    all_outputs: dict[int, Tensor] = field(default_factory=dict)
    steps: list[ExecutedOp] = field(default_factory=list)
    windows: dict[int, Window] = field(
        default_factory=dict
    )  # of values whose memory is written through others
    sizes: dict[int, int] = field(default_factory=dict)  # of these memories, in entries
    _at_once: bool = False

    def __post_init__(self) -> None:
        setting, graph = self.setting, self.setting.graph
        self.route: Schedule = setting.route(
            self.parameters, "frozen" if self.frozen else "component"
        )
        self.flow = self.route.flow
        self.leaves = {n: p.detach().requires_grad_() for n, p in self.parameters.items()}
        live = {i: self.leaves[name] for i, name in self.flow.parameters.items()}
        read = graph.read_by_loss(self.flow.predictions)
        wanted = list(
            dict.fromkeys([*self.flow.predictions, *read, *(r.index for r in graph.predictions)])
        )
        with torch.enable_grad():
            found = graph.run(
                setting.data | live,
                wanted,
                visit=self._visit,
                instead=self._instead(),
                steps=graph.forward_steps,
            )
        at = dict(zip(wanted, found, strict=True))
        self.outputs = {i: t for i, t in at.items() if i in self.flow.predictions}
        self.inner = {i: at[i].detach() for i in read}
        self.all_outputs = {r.index: at[r.index].detach() for r in graph.predictions}

    def _visit(self, i: int, value: Tensor) -> None:
        storage = self.setting.graph.values[i].storage
        if storage in self._shared:
            self.windows[i] = Window.of_tensor(value)
            size = value.untyped_storage().nbytes() // value.element_size()
            self.sizes[storage] = max(size, self.sizes.get(storage, 0))
        if i in self.watched and i not in self.edges and value.requires_grad:
            self.edges[i] = get_gradient_edge(value)

    def _instead(self) -> dict[int, Callable[..., Any]]:
        """Every step through which derivatives go keeps its arguments."""
        graph = self.setting.graph
        cut = {s.index for s in self.route.cut_off}
        out: dict[int, Callable[..., Any]] = {}
        for step in graph.forward_steps:
            frozen_norm = step.index in self.flow.frozen_norms
            if step.index in cut and not frozen_norm:
                out[step.index] = held(step.op)
            elif step.grad and moves(step, self.flow):
                out[step.index] = partial(
                    self._kept, step, norm_held(step) if frozen_norm else step.op
                )
        return out

    def _kept(self, step: Step, op: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        spoiled = {r.index for r in step.refs() if self.setting.graph.written(r.index)}

        def one(a: Any) -> Any:
            return (a.detach().clone() if spoiled else a.detach()) if isinstance(a, Tensor) else a

        kept_args, kept_kwargs = tree_map(one, (args, kwargs))
        result = op(*args, **kwargs)
        outs = tuple(o.detach() if isinstance(o, Tensor) else o for o in flat(result))
        arguments = dict(zip(step.parameters, kept_args, strict=False)) | kept_kwargs
        self.steps.append(ExecutedOp(step, arguments, outs if step.name in NEED_OUTPUTS else ()))
        return result

    # -- Jᵀ u --

    def pull(
        self, cotangents: Mapping[int, Tensor], names: Iterable[str] | None = None
    ) -> dict[str, Tensor]:
        return self._pulled(cotangents, names)

    def push(self, tangents: Mapping[str, Tensor], at: Sequence[int] = ()) -> dict[int, Tensor]:
        """``J v``, by prediction; or the tangents of the values ``at``, all of them watched.

        Raises ``StructureError`` where an op has neither a forward mode nor a second derivative.
        """
        key = tuple(self.parameters), self.frozen
        if key not in self.setting.forward_modes:
            self._try()
            self.setting.forward_modes[key] = self._at_once
        self._at_once = self.setting.forward_modes[key]
        return (self._push_at_once if self._at_once else self._push_by_steps)(tangents, at)

    def _try(self) -> None:
        """``⟨u, J v⟩ = ⟨Jᵀu, v⟩`` for random u and v, or the rules for single ops are not believed."""
        generator = seeded(0)
        v = gaussians_like(self.parameters, generator)
        u = gaussians_like({i: t for i, t in self.outputs.items() if t.requires_grad}, generator)
        pulled = self.pull(u)
        expected = sum(float((pulled[n] * v[n]).sum()) for n in v)
        # Where J is zero (a bias below a batch norm), both are what is left of larger numbers.
        least = sum(1e3 * torch.finfo(t.dtype).eps * float(u[i].norm() * t.norm()) for i, t in self.predictions.items()
                    if i in u)  # fmt: skip
        for at_once in (False, True):
            pushed = self._push_at_once(v) if at_once else self._push_by_steps(v)
            size = sum(float(u[i].norm() * pushed[i].norm()) for i in u)
            found = sum(float((u[i] * pushed[i]).sum()) for i in u)
            if abs(found - expected) <= self.setting.rounding * size + least:
                self._at_once = at_once
                return
        raise StructureError(
            MSG_NO_TANGENT.format(place="the model", error="its rules contradict its backward pass")
        )

    def _push_by_steps(
        self, tangents: Mapping[str, Tensor], wanted: Sequence[int] = ()
    ) -> dict[int, Tensor]:
        at = _Tangents(self.setting.graph, self.windows, self.sizes)
        at.values |= {
            i: tangents[name] for i, name in self.flow.parameters.items() if name in tangents
        }
        with torch.no_grad():
            for call in self.steps:
                step = call.step
                here = {r.index: t for r in step.refs() if (t := at.get(r.index)) is not None}
                if here:
                    outs = self._through(call, here)
                    for ref, t in zip(step.outs, outs, strict=False):
                        at.put(ref, ref, t)
                    for old, new in step.written_results:
                        at.put(new, old, outs[0])
        return {i: self._zero(i) if (t := at.get(i)) is None else t for i in wanted or self.outputs}

    def _zero(self, i: int) -> Tensor:
        value, like = self.setting.graph.values[i], next(iter(self.outputs.values())).detach()
        return like.new_zeros(value.shape, dtype=value.dtype)

    def _through(self, call: ExecutedOp, here: Mapping[int, Tensor]) -> Tangents:
        step, held_ = call.step, call.step.index in self.flow.frozen_norms
        if step.name in RULES and not held_:
            moving = {n: tree_map(lambda r: here.get(r.index) if is_ref(r) else None, a, is_leaf=is_ref)
                      for n, a in step.named.items()}  # fmt: skip
            outs = RULES[step.name](call, moving)
            if outs is not None:
                return outs
        return through_op(call, norm_held(step) if held_ else step.op, here)

    @cached_property
    def _shared(self) -> frozenset[int]:
        return seen_through_older_windows(self.setting.graph, self.flow.predictions)

    def _push_at_once(
        self, tangents: Mapping[str, Tensor], wanted: Sequence[int] = ()
    ) -> dict[int, Tensor]:
        """Forward mode of the whole computation, which knows about memory."""
        setting, graph = self.setting, self.setting.graph
        instead: dict[int, Callable[..., Any]] = {
            s.index: unmoved(s.op) for s in graph.forward_steps if not s.grad
        }
        instead |= {
            s.index: self._spelled_out(s) for s in graph.forward_steps if s.name in SPELLED_OUT
        }
        instead |= {s.index: held(s.op) for s in self.route.cut_off}
        instead |= {i: norm_held(graph.steps[i]) for i in self.flow.frozen_norms}
        with torch.no_grad(), forward_mode():
            values = {i: self.parameters[n].detach() for i, n in self.flow.parameters.items()}
            names = self.flow.parameters
            live = {i: forward_ad.make_dual(p, tangents[names[i]].contiguous()) if names[i] in tangents else p
                    for i, p in values.items()}  # fmt: skip
            try:
                feed, which = setting.data | live, list(wanted or self.outputs)
                found = graph.run(feed, which, instead=instead, steps=graph.forward_steps)
            except (NotImplementedError, RuntimeError) as error:
                raise StructureError(
                    MSG_NO_TANGENT.format(place="the model", error=error)
                ) from error
            pushed = [forward_ad.unpack_dual(t).tangent for t in found]
        return {
            i: torch.zeros_like(t) if v is None else solid(v)
            for i, t, v in zip(which, found, pushed, strict=True)
        }

    def _spelled_out(self, step: Step) -> Callable[..., Any]:
        """An op without forward mode by ops that have one; its result lies in memory as before."""
        (out, *_), values = step.outs, self.setting.graph.values
        assert out is not None

        def run(*args: Any, **kwargs: Any) -> Any:
            first, *others = flat(SPELLED_OUT[step.name](*args, **kwargs))
            return laid_out(first, values[out.index].stride), *others

        return run


@final
class LinearisedModel(Linearised):
    """The model itself, where its recording has other derivatives: double backward pushes tangents."""

    def __init__(self, setting: Context, parameters: Mapping[str, Tensor]) -> None:
        ran = eager.run(setting, parameters, twice=True)
        self.setting = setting
        self.leaves, self.outputs, self.inner = dict(parameters), ran.predictions, ran.inner
        self.all_outputs, self._draws = {i: t.detach() for i, t in ran.values.items()}, ran.state

    def _untouched(self) -> Any:
        """Hooks in the model may do anything, and backward passes may draw random numbers."""
        return untouched(self.setting.program.modules, self._draws)

    def pull(
        self, cotangents: Mapping[int, Tensor], names: Iterable[str] | None = None
    ) -> dict[str, Tensor]:
        with self._untouched():
            return self._pulled(cotangents, names)

    @cached_property
    def _backward(self) -> tuple[list[Tensor], list[Tensor]]:
        """``Jᵀ w`` as a function of ``w``, at zero."""
        ws = [torch.zeros_like(t, requires_grad=True) for t in self.outputs.values()]
        with self._untouched(), torch.enable_grad():
            ends, by = list(self.outputs.values()), list(self.leaves.values())
            found = torch.autograd.grad(ends, by, ws, create_graph=True, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for g, p in zip(found, by, strict=True)], ws

    def push(self, tangents: Mapping[str, Tensor]) -> dict[int, Tensor]:
        try:
            back, ws = self._backward
            pairs = [
                (g, tangents[n])
                for g, n in zip(back, self.leaves, strict=True)
                if g.requires_grad and n in tangents
            ]
            ends, vs = [g for g, _ in pairs], [v for _, v in pairs]
            with self._untouched():
                found = (
                    torch.autograd.grad(ends, ws, vs, retain_graph=True, allow_unused=True)
                    if pairs
                    else [None] * len(ws)
                )
        except (NotImplementedError, RuntimeError) as error:
            raise StructureError(MSG_NO_TANGENT.format(place="the model", error=error)) from error
        return {
            i: torch.zeros_like(t.detach()) if v is None else v
            for (i, t), v in zip(self.outputs.items(), found, strict=True)
        }
