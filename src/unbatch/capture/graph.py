"""A recorded computation as data, and its replay.

Values, steps in order, what Python learned on the way, and the parts that have a meaning. Nothing here knows how a
recording is made, or about samples.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from unbatch.capture import ops
from unbatch.capture.isolation import random_state, set_random_state
from unbatch.linalg.precision import double_dtype, in_double

# The grammar of a recording; ``check_graph`` at the end of this file holds it.
#
#   graph   ::=  value*  step*  escape*  call*  inputs  targets  predictions  loss?  after_cut
#   value   ::=  shape dtype window kind        kind "step" exactly where a step makes it, and then ``step`` says which
#   step    ::=  op args kwargs -> outs writes  its index is its place; args refer to values that are made before it
#   writes  ::=  (old, new)*                    the op writes to ``old``, one of its arguments, and ``new`` is the
#                                               version of it from there on; one for every write in the op's schema
#   outs    ::=  (ref | none)*                  what the op returns; where it returns what it wrote to, that is ``new``
#   escape  ::=  ref step                       a value read by Python, which was there before that step
#   call    ::=  start stop inputs outputs      the steps of one run of a module
#
# Every value is made once. The steps in ``after_cut`` belong to the loss: no other step reads what they make, and the
# predictions are made outside of them.


@dataclass(frozen=True)
class Ref:
    """The ``index``-th value of a graph."""

    index: int


@dataclass
class Value:
    """One version of a tensor. ``storage``, ``stride``, ``offset`` say which memory it is a window on."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    storage: int
    stride: tuple[int, ...]
    offset: int
    kind: str = "step"  # or "inputs", "targets", "parameters", "buffers", "constants"
    name: str = ""
    step: int = -1
    requires_grad: bool = False
    concrete: Tensor | None = (
        None  # integers and booleans, constants and noise: the values seen at capture
    )


@dataclass
class Step:
    """One op of the computation. ``args`` hold ``Ref``s in place of tensors."""

    index: int
    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outs: tuple[Ref | None, ...]
    writes: tuple[tuple[Ref, Ref], ...]
    grad: bool
    module: str
    where: str
    noise: bool = False

    @property
    def name(self) -> str:
        return ops.full_name(self.op)

    @property
    def written_results(self) -> tuple[tuple[Ref, Ref], ...]:
        """The writes through which derivatives go: none where the op only keeps running statistics."""
        return self.writes if ops.writes_results(self.op) else ()

    def refs(self) -> list[Ref]:
        return list(self._refs)

    @property
    def place(self) -> str:
        """Where it stands, in words: its module, its op and, where that is known, file and line."""
        parts = [self.module or "the model", self.name, self.where]
        return ", ".join(part for part in parts if part)

    @cached_property
    def parameters(self) -> tuple[str, ...]:
        """The names of the op's arguments, in order."""
        return tuple(a.name for a in self.op._schema.arguments)

    @cached_property
    def named(self) -> dict[str, Any]:
        """The arguments that were given, by name."""
        return dict(zip(self.parameters, self.args, strict=False)) | self.kwargs

    @cached_property
    def plain(self) -> bool:
        """Tensors are arguments of their own, none of them in a list or named."""
        nested = [*(a for a in self.args if isinstance(a, list | tuple | dict)), self.kwargs]
        found: list[Ref] = []
        filled(nested, found.append)
        return not found

    @property
    def defaults(self) -> dict[str, Any]:
        """What the op takes where nothing is given, by name."""
        return {a.name: a.default_value for a in self.op._schema.arguments if a.has_default_value()}

    @cached_property
    def _refs(self) -> tuple[Ref, ...]:
        found: list[Ref] = []
        filled((self.args, self.kwargs), found.append)
        return tuple(found)


@dataclass
class ExecutedOp:
    """An op as it ran: the arguments that were given, by name, and of its outputs what is needed later."""

    step: Step
    arguments: dict[str, Any]
    outputs: tuple[Any, ...]

    @property
    def op(self) -> Any:
        return self.step.op

    def __getitem__(self, name: str) -> Any:
        return self.arguments.get(name)

    def with_(self, changes: Mapping[str, Any]) -> Any:
        """Return the result of the op with some other arguments."""
        return self.op(**{**self.arguments, **changes})


@dataclass(frozen=True)
class HostRead:
    """A tensor whose value was read by Python in a way that cannot be followed, before step ``step``."""

    ref: Ref
    how: str
    step: int
    module: str
    where: str
    answer: bool | None = None  # what Python was told, if it was a boolean
    in_loss: bool = False
    blind: bool = False  # what it tells is not known: it may tell anything


@dataclass(frozen=True)
class ModuleCall:
    """One run of a module: steps ``start`` to ``stop``, what went in and what came out."""

    module: str
    start: int
    stop: int
    inputs: tuple[Ref, ...]
    outputs: tuple[Ref, ...]


@dataclass
class Graph:
    """A recorded computation: values, steps in order, escapes, and the parts of it that have a meaning."""

    values: list[Value] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    escapes: list[HostRead] = field(default_factory=list)
    calls: list[ModuleCall] = field(default_factory=list)
    inputs: list[Ref | None] = field(default_factory=list)
    targets: list[Ref | None] = field(default_factory=list)
    predictions: list[Ref] = field(default_factory=list)
    loss: Ref | None = None
    after_cut: frozenset[int] = (
        frozenset()
    )  # the steps that belong to the loss; all others belong to the model
    own_loss: bool = False  # the model computes the loss itself
    model_steps: int = 0  # how many steps were recorded when the model returned
    rng: tuple[Any, ...] = ()
    dynamic: frozenset[int] = frozenset()  # values whose shape depends on what is in other values
    foreign: tuple[int, ...] = ()  # constants met in the middle of the run
    stale: bool = False  # what is known of values that are computed is of other numbers
    stopped: Exception | None = None  # what ended the run before its end
    folded: dict[int, int] = field(
        default_factory=dict
    )  # prediction -> what it is in the model, where that differs

    @property
    def forward_steps(self) -> list[Step]:
        return [s for s in self.steps if s.index not in self.after_cut]

    @property
    def used_predictions(self) -> list[Ref]:
        """The predictions that the loss reads; all of them where there is no loss, or it reads none."""
        if self.loss is None:
            return self.predictions
        read = {self.loss.index}
        for step in self.loss_steps:
            read.update(r.index for r in step.refs())
        used = [p for p in self.predictions if p.index in read]
        return used or self.predictions

    @property
    def unregistered(self) -> list[tuple[Value, Step]]:
        """Tensors that require a gradient and are no parameters of the program, with the step that first uses each."""
        users: dict[int, Step] = {}
        for step in self.steps:
            for ref in step.refs() if step.grad else ():
                value = self.values[ref.index]
                if value.kind in ("constants", "buffers") and value.requires_grad:
                    users.setdefault(ref.index, step)
        return [(self.values[i], step) for i, step in users.items()]

    @property
    def loss_steps(self) -> list[Step]:
        return [s for s in self.steps if s.index in self.after_cut]

    def moved(self, numbers: Mapping[int, Tensor], rng: tuple[Any, ...]) -> Graph:
        """The same computation on other ``numbers`` at its beginning, and with other noise.

        The integers it computes, and noise, are worked out only if somebody asks (``known``).
        """
        values = list(self.values)
        for i, tensor in numbers.items():
            values[i] = replace(values[i], concrete=tensor.detach())
        return replace(self, values=values, rng=rng, stale=True)

    def known(self, i: int) -> Tensor | None:
        """The integers, booleans, constants or noise that a value holds, where they are known."""
        value = self.values[i]
        if self.stale and value.kind == "step" and value.concrete is not None:
            self._work_out()
        return value.concrete

    def _work_out(self) -> None:
        self.stale = False

        def keep(i: int, tensor: Tensor) -> None:
            if self.values[i].concrete is not None:
                self.values[i] = replace(self.values[i], concrete=tensor.detach().clone())

        with torch.no_grad():
            wanted = [self.loss] if self.loss else self.predictions
            self.run({}, [w.index for w in wanted], visit=keep)

    def inserted(self, part: Graph, at: Ref, out: Ref, cut: int) -> tuple[Graph, list[Ref]]:
        """With the steps of ``part``, whose first value stands for ``at``, right behind the step that makes that.

        From step ``cut`` of it on they belong to the loss, which reads its value ``out`` in place of ``at``. Returns
        the refs of all its values as well.
        """
        place, count = self.values[at.index].step + 1, len(part.steps)
        maker, first = self.steps[place - 1], len(self.values)
        names = [at, *(Ref(first + i) for i in range(len(part.values) - 1))]
        fresh = max(v.storage for v in self.values) + 1
        mine = part.values[0].storage
        later = lambda i: i + count if i >= place else i  # noqa: E731
        named = lambda tree: filled(tree, lambda r: names[r.index])  # noqa: E731
        read = lambda tree: filled(tree, lambda r: names[out.index] if r == at else r)  # noqa: E731
        new = [
            replace(
                s, index=place + i, args=named(s.args), kwargs=named(s.kwargs), outs=named(s.outs), grad=maker.grad,
                module=maker.module, where=maker.where,
            )
            for i, s in enumerate(part.steps)
        ]  # fmt: skip
        steps = []
        for s in self.steps:
            seen = read if s.index in self.after_cut else lambda tree: tree
            changed = {"args": seen(s.args), "kwargs": seen(s.kwargs), "writes": seen(s.writes)}
            steps.append(replace(s, index=later(s.index), **changed))
        values = [replace(v, step=later(v.step)) for v in self.values]
        for v in part.values[1:]:
            memory = self.values[at.index].storage if v.storage == mine else fresh + v.storage
            values.append(replace(v, step=place + v.step, storage=memory))
        return replace(
            self,
            values=values,
            steps=[*steps[:place], *new, *steps[place:]],
            escapes=[replace(e, step=later(e.step)) for e in self.escapes],
            calls=[
                replace(c, start=later(c.start), stop=later(c.stop - 1) + 1) for c in self.calls
            ],
            model_steps=later(self.model_steps),
            after_cut=frozenset([*map(later, self.after_cut), *range(place + cut, place + count)]),
        ), names

    def in_double(self) -> Graph:
        """The same computation in float64, from the numbers at its beginning on."""
        values = [
            replace(v, dtype=double_dtype(v.dtype), concrete=in_double(v.concrete))
            for v in self.values
        ]
        steps = []
        for s in self.steps:
            args, kwargs = filled((s.args, s.kwargs), double_dtype, torch.dtype)
            steps.append(replace(s, args=args, kwargs=kwargs))
        return replace(self, values=values, steps=steps)

    def run(
        self,
        feed: Mapping[int, Tensor],
        wanted: Sequence[int],
        keep: Mapping[int, Tensor] | None = None,
        visit: Callable[[int, Tensor], None] | None = None,
        instead: Mapping[int, Callable[..., Any]] | None = None,
        steps: Sequence[Step] | None = None,
    ) -> list[Tensor]:
        """Replay (``steps``, by default the model or, where a loss is wanted, everything) on other values, ``feed``.

        ``keep``: values pinned to given tensors (frozen statistics); ``instead``: other functions for some steps;
        ``visit`` sees every value. Noise is drawn from the random state of the capture, so it is what it was then.
        """
        if steps is None:
            inside = all(self.values[w].step not in self.after_cut for w in wanted)
            steps = self.forward_steps if inside else self.steps
        draws = bool(self.rng) and any(s.noise for s in steps)
        before = random_state() if draws else ()
        try:
            if draws:
                set_random_state(self.rng)
            return self._run(feed, wanted, keep or {}, visit, instead or {}, steps)
        finally:
            if draws:
                set_random_state(before)

    def _run(
        self,
        feed: Mapping[int, Tensor],
        wanted: Sequence[int],
        keep: Mapping[int, Tensor],
        visit: Callable[[int, Tensor], None] | None,
        instead: Mapping[int, Callable[..., Any]],
        steps: Sequence[Step],
    ) -> list[Tensor]:
        env: dict[int, Tensor] = {}
        last, written = self._last_uses, self._written
        alive = set(wanted)

        def get(ref: Ref) -> Tensor:
            found = env.get(ref.index)
            if found is None:
                value = feed.get(ref.index, self.values[ref.index].concrete)
                assert value is not None, (
                    f"value {ref.index} ({self.values[ref.index]}) was not computed"
                )
                found = env[ref.index] = (
                    value.clone() if self.values[ref.index].storage in written else value
                )
            return found

        for step in steps:
            if step.plain:
                args: Any = [get(a) if type(a) is Ref else a for a in step.args]
                kwargs = step.kwargs
            else:
                args, kwargs = filled(step.args, get), filled(step.kwargs, get)
            op = instead.get(step.index, step.op)
            if step.grad or not torch.is_grad_enabled():
                outs = flat(op(*args, **kwargs))
            else:
                with torch.no_grad():
                    outs = flat(op(*args, **kwargs))
            for ref, out in zip(step.outs, outs, strict=False):
                if ref is not None and isinstance(out, Tensor):
                    env[ref.index] = self._pinned(ref.index, keep) if ref.index in keep else out
                    if visit:
                        visit(ref.index, env[ref.index])
            for old, new in step.writes:
                if new.index in keep:
                    env[old.index].copy_(keep[new.index])
                if new.index in env:  # what the op returned, which may not be what it was given
                    env[old.index] = env[new.index]
                else:
                    env[new.index] = env[old.index]
            for dead in last.get(step.index, ()):
                if dead not in alive:
                    env.pop(dead, None)
        return [get(Ref(w)) for w in wanted]

    def _pinned(self, i: int, keep: Mapping[int, Tensor]) -> Tensor:
        """The given value, or a copy of it where the program will write to it."""
        return keep[i].clone() if self.written(i) else keep[i]

    @cached_property
    def makers(self) -> dict[int, Step]:
        """Value -> the step that makes it."""
        made = [(r, s) for s in self.steps for r in [*s.outs, *(new for _, new in s.writes)]]
        return {r.index: s for r, s in made if r is not None}

    def written(self, value: int) -> bool:
        """Its memory is written to."""
        return self.values[value].storage in self._written

    def read_by_loss(self, but: Collection[int]) -> list[int]:
        """Values that the model makes and the loss reads, beside ``but``."""
        made = {
            r.index
            for s in self.forward_steps
            for r in [*s.outs, *(new for _, new in s.writes)]
            if r
        }
        return sorted({r.index for s in self.loss_steps for r in s.refs()} & made - set(but))

    @cached_property
    def _written(self) -> frozenset[int]:
        """Memories that are written to."""
        return frozenset(self.values[old.index].storage for s in self.steps for old, _ in s.writes)

    @cached_property
    def _last_uses(self) -> dict[int, list[int]]:
        """Step -> the values that no later one needs."""
        last: dict[int, int] = {}
        for step in self.steps:
            for ref in [*step.refs(), *(r for r in step.outs if r)]:
                last[ref.index] = step.index
        out: dict[int, list[int]] = {}
        for value, step_index in last.items():
            if self.values[value].kind == "step":
                out.setdefault(step_index, []).append(value)
        return out


def filled(tree: Any, get: Callable[[Any], Any], kind: type = Ref) -> Any:
    """Arguments with values in place of references (or of what else is of a ``kind``)."""
    if isinstance(tree, kind):
        return get(tree)
    if isinstance(tree, list | tuple):
        return type(tree)(filled(t, get, kind) for t in tree)
    return {k: filled(v, get, kind) for k, v in tree.items()} if isinstance(tree, dict) else tree


def is_ref(x: Any) -> bool:
    return isinstance(x, Ref)


def flat(out: Any) -> list[Any]:
    return [x for o in out for x in flat(o)] if isinstance(out, tuple | list) else [out]


# --- the checker ----------------------------------------------------------------------------------


class GraphError(AssertionError):
    """A recording that breaks the grammar: a fault of this package."""


def check_graph(graph: Graph) -> None:
    """Raise ``GraphError``, with the step and what is wrong, where a recording is not as the grammar says."""
    made: dict[int, int] = {}  # value -> the step that makes it
    for place, step in enumerate(graph.steps):
        if step.index != place:
            raise GraphError(f"Step {place} ({step.name}) says that it is step {step.index}.")
        _check_reads(graph, step, made)
        _check_writes(step)
        for i in _made_by(step):
            if i in made:
                raise GraphError(
                    f"Step {place} ({step.name}) makes value {i}, which step {made[i]} has made."
                )
            made[i] = place
    _check_values(graph, made)
    _check_cut(graph, made)
    _check_ends(graph, made)


def _made_by(step: Step) -> list[int]:
    """The values that a step makes; what it returns may be what it wrote to."""
    refs = [*step.outs, *(new for _, new in step.writes)]
    return list(dict.fromkeys(r.index for r in refs if r is not None))


def _check_reads(graph: Graph, step: Step, made: Mapping[int, int]) -> None:
    """What a step reads is there before it."""
    for ref in [*step.refs(), *(old for old, _ in step.writes)]:
        if not 0 <= ref.index < len(graph.values):
            raise GraphError(
                f"Step {step.index} ({step.name}) reads value {ref.index} of {len(graph.values)}."
            )
        if graph.values[ref.index].kind == "step" and ref.index not in made:
            raise GraphError(
                f"Step {step.index} ({step.name}) reads value {ref.index} before it is made."
            )


def _check_writes(step: Step) -> None:
    """What the schema of an op says that it writes to has a new version, and what has one is an argument."""
    olds = [old for old, _ in step.writes]
    for old in olds:
        if old not in step.refs():
            raise GraphError(
                f"Step {step.index} ({step.name}) writes to value {old.index}, which it does not read."
            )
    for argument in step.op._schema.arguments:
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        for ref in flat(step.named.get(argument.name)):
            if isinstance(ref, Ref) and ref not in olds:
                raise GraphError(
                    f"Step {step.index} ({step.name}) writes to {argument.name!r}, which is not recorded."
                )


def _check_values(graph: Graph, made: Mapping[int, int]) -> None:
    """Values know the step that makes them, and have a window on a memory that fits their shape."""
    for i, value in enumerate(graph.values):
        maker = made.get(i, -1)
        if value.step != maker:
            raise GraphError(
                f"Value {i} says that step {value.step} makes it, and step {maker} does."
            )
        if (value.kind == "step") != (maker >= 0):
            raise GraphError(f"Value {i} is of the kind {value.kind!r}, and step {maker} makes it.")
        if value.stride and len(value.stride) != len(value.shape):
            raise GraphError(f"Value {i} of shape {value.shape} has the strides {value.stride}.")


def _check_cut(graph: Graph, made: Mapping[int, int]) -> None:
    """The model does without the loss: nothing that the loss makes is read by other steps, or is a prediction."""
    outside = graph.after_cut - set(range(len(graph.steps)))
    if outside:
        raise GraphError(
            f"The steps {sorted(outside)} of the loss are none of the {len(graph.steps)} steps."
        )
    of_loss = {i for i, step in made.items() if step in graph.after_cut}
    for step in graph.forward_steps:
        early = [r.index for r in step.refs() if r.index in of_loss]
        if early:
            raise GraphError(
                f"Step {step.index} ({step.name}) of the model reads {early}, which the loss makes."
            )
    for ref in graph.predictions:
        if ref.index in of_loss:
            raise GraphError(
                f"The prediction {ref.index} is made by step {made[ref.index]}, of the loss."
            )


def _check_ends(graph: Graph, made: Mapping[int, int]) -> None:
    """Escapes, calls, inputs, predictions and the loss refer to steps and values that are there."""
    count = len(graph.steps)
    for escape in graph.escapes:
        if not made.get(escape.ref.index, -1) < escape.step <= count:
            raise GraphError(
                f"Value {escape.ref.index} was read by Python before step {escape.step} has made it."
            )
    for call in graph.calls:
        if not 0 <= call.start <= call.stop <= count:
            raise GraphError(
                f"The module {call.module!r} ran from step {call.start} to {call.stop} of {count}."
            )
    loss = [graph.loss] if graph.loss is not None else []
    ends = [*graph.inputs, *graph.targets, *graph.predictions, *loss]
    for ref in ends:
        if ref is not None and not 0 <= ref.index < len(graph.values):
            raise GraphError(
                f"Value {ref.index} of {len(graph.values)} is said to be an end of the computation."
            )
