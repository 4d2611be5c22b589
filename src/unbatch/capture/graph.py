"""A recorded computation as data: values, steps in order, and the parts that have a meaning.

Nothing here knows how a recording is made (``tracer.py``), or about samples.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from unbatch.capture.isolation import generators_in, random_state, set_random_state
from unbatch.capture.replay import Replay, Visit
from unbatch.capture.steps import Ref, Step, Value, filled, indices
from unbatch.capture.uses import read_memories
from unbatch.linalg.precision import double_dtype, in_double

# The grammar of a recording; ``check_graph`` in ``check.py`` holds it.
#
#   graph   ::=  value*  step*  escape*  call*  inputs  targets  predictions  loss?  after_cut
#   value   ::=  shape dtype window kind        kind "step" exactly if a step makes it, and then
#                                               ``step`` says which
#   step    ::=  op args kwargs -> outs writes  its index is its place; args refer to values that
#                                               are made before it
#   writes  ::=  (old, new)*                    the op writes to ``old``, one of its arguments, and
#                                               ``new`` is the version of it from there on; one for
#                                               every write in the op's schema
#   outs    ::=  (ref | none)*                  what the op returns; if it returns what it wrote
#                                               to, that is ``new``
#   escape  ::=  ref step                       a value read by Python, which was there before that
#                                               step
#   call    ::=  start stop inputs outputs      the steps of one run of a module
#
# Every value is made once. The steps in ``after_cut`` belong to the loss: no other step reads what
# they make, and the predictions are made outside of them.


# How Python reads a size.
SIZE_READ = "its size read by Python, which depends on data"


@dataclass(frozen=True)
class HostRead:
    """A tensor value that Python read in a way that cannot be followed, before step ``step``.

    ``answer``: the value, if it is a boolean. ``blind``: whatever was read is not known, so that
    anything may follow from it. ``seen``: a copy of what was read, unless it is large.
    """

    ref: Ref
    how: str
    step: int
    module: str
    where: str
    answer: bool | None = None
    in_loss: bool = False
    blind: bool = False
    # Two reads are one whatever they have seen.
    seen: Tensor | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class ModuleCall:
    """One run of a module: steps ``start`` to ``stop``, its inputs and its outputs."""

    module: str
    start: int
    stop: int
    inputs: tuple[Ref, ...]
    outputs: tuple[Ref, ...]


@dataclass
class Graph:
    """A recorded computation.

    ``host_reads``: what Python read. ``sizings``: what ops took sizes from. ``after_cut``: the
    steps of the loss; all others are the model's. ``own_loss``: whether the model computes the loss
    itself. ``model_steps``: how many steps there were when the model returned. ``rng``: the random
    state at the beginning.
    """

    values: list[Value] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    host_reads: list[HostRead] = field(default_factory=list)
    sizings: list[HostRead] = field(default_factory=list)
    calls: list[ModuleCall] = field(default_factory=list)
    inputs: list[Ref | None] = field(default_factory=list)
    targets: list[Ref | None] = field(default_factory=list)
    predictions: list[Ref] = field(default_factory=list)
    loss: Ref | None = None
    after_cut: frozenset[int] = frozenset()
    own_loss: bool = False
    model_steps: int = 0
    rng: tuple[Any, ...] = ()
    # Values whose shape depends on what is in other values.
    dynamic: frozenset[int] = frozenset()
    # Constants that the run came across after its beginning.
    foreign: tuple[int, ...] = ()
    # The data has changed since ``concrete`` was recorded for what steps compute.
    stale: bool = False
    # What ended the run before its end.
    stopped: Exception | None = None
    # Whether the program was seen to keep something in a place of its own.
    keeps: bool = False
    # What the run hooked into backward passes, with file and line.
    hooks: tuple[str, ...] = ()
    # Whether the loss did.
    hooks_loss: bool = False
    # The types of what the model returned that PyTorch does not open: tensors may be in it.
    closed: tuple[str, ...] = ()
    # Prediction -> the value that it is in the model, where samples were flattened behind that.
    folded: dict[int, int] = field(default_factory=dict)

    # -- parts --

    @property
    def forward_steps(self) -> list[Step]:
        """The steps of the model."""
        return [s for s in self.steps if s.index not in self.after_cut]

    @property
    def loss_steps(self) -> list[Step]:
        """The steps of the loss."""
        return [s for s in self.steps if s.index in self.after_cut]

    @property
    def ops(self) -> int:
        """How many ops the program runs, about."""
        return sum(step.ops for step in self.steps)

    @property
    def used_predictions(self) -> list[Ref]:
        """The predictions that the loss reads; all if there is no loss, or it reads none."""
        if self.loss is None:
            return self.predictions
        # A prediction may be the loss, with nothing computed in between.
        read = {self.loss.index}
        for step in self.loss_steps:
            read.update(indices(step.refs()))
        used = [p for p in self.predictions if p.index in read]
        return used or self.predictions

    @property
    def hides_predictions(self) -> bool:
        """Whether the loss gets values of the model by way of an object that nobody opens."""
        if not self.closed or self.own_loss:
            return False
        returned = {p.index for p in self.predictions}
        for step in self.loss_steps:
            for ref in step.refs():
                value = self.values[ref.index]
                if value.step in self.after_cut or value.kind in ("targets", "constants"):
                    continue
                if ref.index not in returned:
                    return True
        return False

    @property
    def unregistered(self) -> list[tuple[Value, Step]]:
        """Tensors that take a gradient and are no parameters, and the step that first uses each."""
        users: dict[int, Step] = {}
        for step in self.steps:
            if not step.grad:
                continue
            for ref in step.refs():
                value = self.values[ref.index]
                if value.kind in ("constants", "buffers") and value.requires_grad:
                    users.setdefault(ref.index, step)
        return [(self.values[i], step) for i, step in users.items()]

    @property
    def loss_writes(self) -> bool:
        """Whether the loss writes to what it is given, or to what it makes."""
        return any(step.writes for step in self.loss_steps)

    @property
    def has_history(self) -> bool:
        """Whether a backward pass may lead on into what others have computed, and still need."""
        for value in self.values:
            if value.requires_grad and value.kind in ("constants", "buffers"):
                return True
        return False

    def read_by_loss(self, but: Collection[int]) -> list[int]:
        """Return values that the model makes and the loss reads, except ``but``."""
        made: set[int] = set()
        for step in self.forward_steps:
            made.update(indices(step.made()))
        read: set[int] = set()
        for step in self.loss_steps:
            read.update(indices(step.refs()))
        return sorted((read & made).difference(but))

    @cached_property
    def makers(self) -> dict[int, Step]:
        """Value -> the step that makes it."""
        makers: dict[int, Step] = {}
        for step in self.steps:
            makers.update(dict.fromkeys(indices(step.made()), step))
        return makers

    def last_reads(self) -> dict[int, int]:
        """Return the last step that reads each value; what the program returns is read at the end.

        Python reads before the step of its read, and sees what the steps before that have written.
        """
        last: dict[int, int] = {}
        for step in self.steps:
            for ref in step.refs():
                last[ref.index] = step.index
        for read in self.host_reads:
            last[read.ref.index] = max(last.get(read.ref.index, -1), read.step)
        for end in (*self.predictions, self.loss):
            if end is not None:
                last[end.index] = len(self.steps)
        return last

    @cached_property
    def memories_read(self) -> frozenset[int]:
        """The memories that the predictions, the loss or Python depend on."""
        if any(read.blind for read in self.host_reads):
            return frozenset(value.storage for value in self.values)  # whatever was read
        results = [*self.predictions, *[read.ref for read in self.host_reads]]
        if self.loss is not None:
            results.append(self.loss)
        return read_memories(self.values, self.steps, results)

    def written(self, value: int) -> bool:
        """Tell whether a step writes to the memory of a value."""
        return self.values[value].storage in self._overwritten

    def writes_to(self, value: int) -> Sequence[tuple[int, int]]:
        """Return the writes to the memory of a value, in order: the step, and what it has made."""
        return self._overwritten.get(self.values[value].storage, ())

    # -- other data --

    def moved(self, numbers: Mapping[int, Tensor], rng: tuple[Any, ...]) -> Graph:
        """Return the same computation on other ``numbers`` at its beginning, and with other noise.

        The integers and the noise that it computes are worked out when ``known`` asks for them.
        """
        values = list(self.values)
        for i, tensor in numbers.items():
            values[i] = replace(values[i], concrete=tensor.detach())
        # What steps compute is stale now. Most questions never ask for it.
        return replace(self, values=values, rng=rng, stale=True)

    def known(self, i: int) -> Tensor | None:
        """Return the integers, booleans, constants or noise that a value holds; else None."""
        value = self.values[i]
        if self.stale and value.kind == "step" and value.concrete is not None:
            self._work_out()
        return self.values[i].concrete

    def _work_out(self) -> None:
        """Bring what is known of computed values up to the present data, by one replay."""
        # First, as the replay asks for values, too.
        self.stale = False

        def update(i: int, tensor: Tensor) -> None:
            value = self.values[i]
            if value.concrete is not None:
                self.values[i] = replace(value, concrete=tensor.detach().clone())

        ends = self.predictions
        if self.loss is not None:
            ends = [self.loss]
        with torch.no_grad():
            self.run({}, indices(ends), visit=update)

    def in_double(self) -> Graph:
        """Return the same computation in float64, from the numbers at its beginning on."""
        values = []
        for v in self.values:
            dtype, concrete = double_dtype(v.dtype), in_double(v.concrete)
            values.append(replace(v, dtype=dtype, concrete=concrete))
        steps = []
        for s in self.steps:
            # Types among the arguments (``to(torch.float32)``) would round again.
            args, kwargs = filled((s.args, s.kwargs), double_dtype, torch.dtype)
            steps.append(replace(s, args=args, kwargs=kwargs))
        return replace(self, values=values, steps=steps)

    # -- replay --

    def run(
        self,
        feed: Mapping[int, Tensor],
        wanted: Sequence[int],
        keep: Mapping[int, Tensor] | None = None,
        visit: Visit | None = None,
        instead: Mapping[int, Callable[..., Any]] | None = None,
        steps: Sequence[Step] | None = None,
    ) -> list[Tensor]:
        """Replay ``steps`` on other values, ``feed``, and return the values ``wanted``.

        By default the steps of the model, or all if a value of the loss is wanted. ``keep``: values
        pinned to other tensors (frozen statistics); ``instead``: other functions for some steps;
        ``visit`` sees every value. Noise is drawn from the random state of the recording, so that
        it is what it was then. Raises ``ValueError`` for a value that nothing makes.
        """
        if steps is None:
            steps = self._steps_for(wanted)
        replay = Replay(self.values, self._overwritten, feed, keep or {}, instead or {}, visit)
        if not self.rng or not any(s.noise for s in steps):
            return replay.run(steps, wanted, self._last_uses)
        before = random_state(generators_in(self.rng))
        try:
            set_random_state(self.rng)
            return replay.run(steps, wanted, self._last_uses)
        finally:
            set_random_state(before)

    def _steps_for(self, wanted: Sequence[int]) -> list[Step]:
        for i in wanted:
            if self.values[i].step in self.after_cut:
                return self.steps
        return self.forward_steps

    @cached_property
    def _overwritten(self) -> dict[int, list[tuple[int, int]]]:
        """The memories that are written to, with the writes: the step, and what it has made."""
        writes: dict[int, list[tuple[int, int]]] = {}
        for step in self.steps:
            for old, new in step.writes:
                memory = self.values[old.index].storage
                writes.setdefault(memory, []).append((step.index, new.index))
        return writes

    @cached_property
    def _last_uses(self) -> dict[int, list[int]]:
        """Step -> the values that it makes or reads, and no later one reads."""
        last: dict[int, int] = {}
        for step in self.steps:
            for ref in step.refs():
                last[ref.index] = step.index
            for result in step.outs:
                if result is not None:
                    last[result.index] = step.index
        out: dict[int, list[int]] = {}
        for value, step_index in last.items():
            if self.values[value].kind == "step":
                out.setdefault(step_index, []).append(value)
        return out

    # -- insertion --

    def inserted(self, part: Graph, at: Ref, out: Ref, cut: int) -> tuple[Graph, list[Ref]]:
        """Return the graph with the steps of ``part`` right behind the step that makes ``at``.

        The first value of ``part`` stands for ``at``. Its steps from ``cut`` on belong to the loss,
        which reads the value ``out`` of ``part`` in place of ``at``. Returned as well: the refs
        that all values of ``part`` have in the new graph.
        """
        insertion = _Insertion(self, part, at, out)
        steps, place = insertion.steps(), insertion.place
        after_cut = set(map(insertion.later, self.after_cut))
        after_cut.update(range(place + cut, place + len(part.steps)))
        graph = replace(
            self,
            values=insertion.values(),
            steps=steps,
            host_reads=[replace(e, step=insertion.later(e.step)) for e in self.host_reads],
            sizings=[replace(e, step=insertion.later(e.step)) for e in self.sizings],
            calls=[insertion.shifted(call) for call in self.calls],
            model_steps=insertion.later(self.model_steps),
            after_cut=frozenset(after_cut),
        )
        return graph, insertion.names


class _Insertion:
    """New numbers for steps, values and memories when the steps of ``part`` are put into a graph.

    Values of the graph keep their numbers, and those of ``part`` follow them. Steps of the graph
    from ``place`` on move up by as many as ``part`` has.
    """

    def __init__(self, graph: Graph, part: Graph, at: Ref, out: Ref) -> None:
        self.graph, self.part, self.at = graph, part, at
        self.place = graph.values[at.index].step + 1
        self.maker = graph.steps[self.place - 1]
        first = len(graph.values)
        self.names = [at]
        for i in range(len(part.values) - 1):
            self.names.append(Ref(first + i))
        self.out = self.names[out.index]

    def later(self, step: int) -> int:
        """Return the new number of a step of the graph."""
        if step >= self.place:
            return step + len(self.part.steps)
        return step

    def shifted(self, call: ModuleCall) -> ModuleCall:
        """Return the run of a module with new numbers of steps.

        Its last step moves, and not the one behind it: what is inserted there ran after it.
        """
        return replace(call, start=self.later(call.start), stop=self.later(call.stop - 1) + 1)

    def steps(self) -> list[Step]:
        """Return all steps in their new order."""
        steps = [self._of_graph(s) for s in self.graph.steps]
        steps[self.place : self.place] = [self._of_part(s) for s in self.part.steps]
        return steps

    def _of_graph(self, step: Step) -> Step:
        index = self.later(step.index)
        if step.index not in self.graph.after_cut:
            return replace(step, index=index)
        args, kwargs, writes = filled((step.args, step.kwargs, step.writes), self._read_by_loss)
        return replace(step, index=index, args=args, kwargs=kwargs, writes=writes)

    def _read_by_loss(self, ref: Ref) -> Ref:
        if ref == self.at:
            return self.out
        return ref

    def _of_part(self, step: Step) -> Step:
        parts = (step.args, step.kwargs, step.outs)
        args, kwargs, outs = filled(parts, lambda ref: self.names[ref.index])
        return replace(
            step,
            index=self.place + step.index,
            args=args,
            kwargs=kwargs,
            outs=outs,
            grad=self.maker.grad,
            module=self.maker.module,
            where=self.maker.where,
        )

    def values(self) -> list[Value]:
        """Return the values of the graph, and behind them those of ``part`` but the first."""
        old = self.graph.values
        fresh = max(v.storage for v in old) + 1
        shared = self.part.values[0].storage  # a view of the first value is one of ``at``
        values = [replace(v, step=self.later(v.step)) for v in old]
        for v in self.part.values[1:]:
            memory = fresh + v.storage
            if v.storage == shared:
                memory = old[self.at.index].storage
            # Constants are there from the start.
            step = self.place + v.step if v.kind == "step" else -1
            values.append(replace(v, step=step, storage=memory))
        return values
