"""One walk over the recorded computation: graph x rules to marks.

Here lives what a walk starts from (inputs, predictions), the order of steps, ops that are taken apart, and memory:
writes in place that are seen through other views. What the marks mean for the loss is read off in ``structure.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from unbatch import errors
from unbatch.analysis.domain.ownership import (
    MIXED,
    Ownership,
    batched,
    code,
    compress,
    mix,
    moved,
    shared,
    spell_out,
)
from unbatch.analysis.domain.propagation import Propagation
from unbatch.analysis.rules import registry
from unbatch.analysis.rules.permutations import Arranged, Ends, follow
from unbatch.analysis.rules.reductions import running_statistics
from unbatch.capture import ops
from unbatch.capture.aliasing import Window, places
from unbatch.capture.graph import Graph, HostRead, Ref, Step
from unbatch.capture.tracer import Recorder

# --- the walk -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fact:
    """What a walk has seen in the numbers of a value, and relies on."""

    value: int
    look: Callable[[Tensor | None], Any]
    seen: Any

    def holds(self, graph: Graph) -> bool:
        return _equal(self.look(graph.known(self.value)), self.seen)


class Numbers(Mapping[str, Any]):
    """The integers and booleans of the arguments of a step, where they are known; to look at one is to rely on it."""

    def __init__(self, walk: Interpretation, arguments: Mapping[str, Any]) -> None:
        self.walk, self.arguments = walk, {n: a for n, a in arguments.items() if _has_ref(a)}

    def __getitem__(self, name: str) -> Any:
        return self.look(name, lambda numbers: numbers)

    def __iter__(self) -> Iterator[str]:
        return iter(self.arguments)

    def __len__(self) -> int:
        return len(self.arguments)

    def look(self, name: str, function: Callable[[Any], Any]) -> Any:
        """At a function of an argument's numbers."""
        one = lambda a: self.walk.rely(a.index, function) if isinstance(a, Ref) else None  # noqa: E731
        return tree_map(one, self.arguments.get(name), is_leaf=lambda a: isinstance(a, Ref))


@dataclass
class Interpretation:
    """Marks of every value of a graph, and the algebra that made them."""

    graph: Graph
    algebra: Propagation
    marks: dict[int, Ownership]
    unknown: dict[int, str] = field(default_factory=dict)  # step -> op without a rule
    assumed: set[str] = field(default_factory=set)
    custom: set[str] = field(default_factory=set)
    arranged: dict[int, Arranged | Ends] = field(default_factory=dict)
    belong: Mapping[int, int] = field(default_factory=dict)
    by_place: bool = False
    afresh: bool = False
    facts: list[Fact] = field(default_factory=list)
    asked: dict[HostRead, Ownership] = field(
        default_factory=dict
    )  # what Python was told, at the moment when it asked
    above: tuple[Interpretation, Mapping[int, int]] | None = (
        None  # the walk that this is part of, and its names of values
    )

    def rely(self, i: int, function: Callable[[Any], Any]) -> Any:
        """A function of the integers or booleans that a value holds (of None if they are not known)."""
        if self.above is not None and i in self.above[1]:
            return self.above[0].rely(self.above[1][i], function)
        look = lambda t: function(_exact(t))  # noqa: E731
        seen = look(self.graph.known(i))
        if self.above is None:  # copied: the memory may be written to later
            self.facts.append(Fact(i, look, seen.copy() if isinstance(seen, np.ndarray) else seen))
        return seen

    def __getitem__(self, ref: Ref) -> Ownership:
        return self.marks[ref.index]

    def made_at(self, step: Step, value: int) -> frozenset[int]:
        """The statistics that a step makes, as far as one of its results rests on them; what it read had none of them.

        A window on memory that samples were written to makes none, even if it shows what belongs to nobody.
        """
        read: frozenset[int] = frozenset().union(*(self[r].given for r in step.refs()))
        return self.marks[value].given - read

    def ancestors(self, refs: Iterable[Ref]) -> set[int]:
        """Steps that the values in ``refs`` depend on, through data and through memory."""
        wanted = {r.index for r in refs}
        steps: set[int] = set()
        storages = {self.graph.values[w].storage for w in wanted}
        for step in reversed(self.graph.steps):
            made = {r.index for r in step.outs if r} | {new.index for _, new in step.writes}
            written = {self.graph.values[new.index].storage for _, new in step.writes}
            if made & wanted or written & storages:
                steps.add(step.index)
                read = [r.index for r in step.refs()]
                wanted.update(read)
                storages.update(
                    self.graph.values[r].storage
                    for r in read
                    if self.graph.values[r].kind == "step"
                )
        return steps


def interpret(
    graph: Graph,
    samples: int,
    given: Mapping[int, Ownership],
    steps: Sequence[Step],
    assumed: Sequence[str] = (),
    constant: Iterable[str] = (),
    belong: Mapping[int, int] | None = None,
    by_place: bool = False,
    afresh: bool = False,
) -> Interpretation:
    """Propagate marks through ``steps``; ``given`` are the marks of what they start from.

    ``belong``: shared values, and the axis along which their entries are to count as those of the samples.
    ``by_place``: where samples meet in no symmetric way, slice n of the result counts as sample n's all the same.
    ``afresh``: likewise, but only where it is beyond doubt which axis has such slices.
    """
    algebra = Propagation(samples, constant=frozenset(constant))
    out = Interpretation(
        graph, algebra, dict(given), belong=belong or {}, by_place=by_place, afresh=afresh
    )
    outside = [i for i in given if graph.values[i].kind in ("buffers", "constants")]
    out.facts += [
        Fact(i, alike, seen) for i in outside if (seen := alike(graph.values[i].concrete))
    ]
    last, waiting = _last_uses(graph), sorted(graph.escapes, key=lambda e: e.step)
    for step in steps:
        _ask(out, waiting, step.index)
        out.algebra.step = step.index
        _step(out, step, last)
        for call in graph.calls:
            if call.stop == step.index + 1 and call.module in assumed:
                _assume(out, call)
    _ask(out, waiting, len(graph.steps))
    return out


def _ask(out: Interpretation, waiting: list[HostRead], step: int) -> None:
    """Before a step: its memory may be written to."""
    while waiting and waiting[0].step <= step:
        escape = waiting.pop(0)
        if escape.ref.index in out.marks:
            out.asked[escape] = out.marks[escape.ref.index]


def _assume(out: Interpretation, call: Any) -> None:
    out.assumed.add(call.module)
    inputs = [out.marks[r.index] for r in call.inputs if r.index in out.marks]
    for ref in call.outputs:
        shape = out.graph.values[ref.index].shape
        out.marks[ref.index] = registry.assumed(
            out.algebra, inputs, shape, ("assumed", call.module)
        )


def _last_uses(graph: Graph) -> dict[int, int]:
    last = {r.index: step.index for step in graph.steps for r in step.refs()}
    outputs = [*graph.predictions, *([graph.loss] if graph.loss else [])]
    return last | {r.index: len(graph.steps) for r in outputs}


def _step(out: Interpretation, step: Step, last: Mapping[int, int]) -> None:
    graph = out.graph
    call = _call(out, step)
    results = _apply(out, call, step)
    new = {n.index: o for o, n in step.writes}
    for ref, marks in zip(step.outs, results, strict=False):
        if ref is not None and marks is not None:
            shape = graph.values[ref.index].shape
            if marks.shape != shape:
                marks = registry.mixed(call, shape, registry.NO_RULE)
                out.unknown.setdefault(step.index, f"{step.name} (its rule gave another shape)")
            if out.belong and not marks.depends_on_batch:
                marks = _counted(out, ref, marks, step)
            if out.by_place and marks.mixed:
                marks = _by_place(call, marks, ref)
            if out.afresh and marks.mixed:
                marks = _afresh(call, marks, ref)
            out.marks[ref.index] = marks
    _follow_order(out, call, step)
    hidden = (
        running_statistics(call)
        if step.writes
        and not any(r and r.index in new for r in step.outs)
        and call["running_mean"] is not None
        else {}
    )
    for old, fresh in step.writes:
        if fresh.index not in out.marks:
            matching = [m for m in hidden.values() if m.shape == graph.values[fresh.index].shape]
            out.marks[fresh.index] = (
                matching[0]
                if matching
                else registry.mixed(call, graph.values[fresh.index].shape, registry.NO_RULE)
            )
        _through_views(out, old, fresh, step.index, last)


def _counted(out: Interpretation, ref: Ref, marks: Ownership, step: Step) -> Ownership:
    """A shared value that is to count as the samples', or is written into one that does."""
    if ref.index in out.belong:
        return batched(marks.shape, out.belong[ref.index], ("spread", ref.index), marks.sources)
    old = next((o for o, n in step.writes if n.index == ref.index), None)
    if old is None or not out.marks[old.index].owned or not _belongs(out, ref):
        return marks
    there = out.marks[old.index]
    return replace(
        there, key=mix(there.key, code("written", ref.index)), sources=there.sources | marks.sources
    )


def _belongs(out: Interpretation, ref: Ref) -> bool:
    storage = out.graph.values[ref.index].storage
    return any(out.graph.values[i].storage == storage for i in out.belong)


def _by_place(call: registry.RuleContext, marks: Ownership, ref: Ref) -> Ownership:
    """Each sample's slice of a result is its own, along the axis of the first operand's samples or the first that fits.

    As if every rank gathered the other operands: what it computes from them is its own use of the parameters.
    """
    n = call.algebra.samples
    axes = [x.sample_dim() for x in call.marks if x.owned]
    fitting = [
        d
        for d in [*axes[:1], *range(len(marks.shape))]
        if d is not None and marks.shape[d : d + 1] == (n,)
    ]
    return (
        batched(marks.shape, fitting[0], ("place", ref.index), marks.sources) if fitting else marks
    )


def _afresh(call: registry.RuleContext, marks: Ownership, ref: Ref) -> Ownership:
    """A result in which samples have met as one of new samples, along the axis that was that of the first operand's.

    Not if that is its last axis, which most operations take for features; of a view of what is mixed, the first.
    """
    first = next((x for x in call.marks if x.owned), None)
    views = ops.is_view(call.op)
    axis = first.sample_dim() if first is not None else 0 if views else None
    last = len(marks.shape if first is None else first.shape) - 1
    kept = (
        axis is not None and axis < last and marks.shape[axis : axis + 1] == (call.algebra.samples,)
    )
    return (
        batched(marks.shape, axis, ("afresh", ref.index), marks.sources)
        if axis is not None and kept
        else marks
    )


def _follow_order(out: Interpretation, call: registry.RuleContext, step: Step) -> None:
    """Keep track of rows that the batch has put into an order of its own, and of their return."""
    known = {
        n: out.arranged[r.index]
        for n, a in step.named.items()
        if (r := _only_ref(a)) is not None and r.index in out.arranged
    }
    try:
        outcomes = follow(call, step.index, known, registry.lookup(call.op))
    except Exception:
        if errors.STRICT:
            raise
        return
    if outcomes:
        out.unknown.pop(step.index, None)
    for outcome in outcomes:
        refs = [r for r in step.outs if r is not None]
        if outcome.slot < len(refs):
            ref = refs[outcome.slot]
            made, shape = outcome.arranged, out.graph.values[ref.index].shape
            if made is not None and (isinstance(made, Ends) or made.under.shape == shape):
                out.arranged[ref.index] = made
            if (
                outcome.marks is not None
                and outcome.marks.shape == out.graph.values[ref.index].shape
            ):
                out.marks[ref.index] = outcome.marks


def _only_ref(a: Any) -> Ref | None:
    refs = [r for r in (a if isinstance(a, list | tuple) else [a]) if r is not None]
    return (
        refs[0]
        if len(refs) == 1
        and isinstance(refs[0], Ref)
        and (not isinstance(a, list | tuple) or a[0] is refs[0])
        else None
    )


def _call(out: Interpretation, step: Step) -> registry.RuleContext:
    arguments = dict.fromkeys(step.parameters) | step.defaults | step.named
    is_ref = {"is_leaf": lambda a: isinstance(a, Ref)}
    numbers = Numbers(out, arguments)
    marked = {
        n: tree_map(lambda a: out.marks[a.index] if isinstance(a, Ref) else a, a, **is_ref)
        for n, a in arguments.items()
    }
    shapes = [out.graph.values[r.index].shape for r in step.outs if r]
    return registry.RuleContext(out.algebra, step.op, marked, shapes, numbers, numbers.look)


def _has_ref(a: Any) -> bool:
    return any(
        isinstance(leaf, Ref) for leaf in tree_leaves(a, is_leaf=lambda x: isinstance(x, Ref))
    )


def _exact(t: Tensor | None) -> Any:
    """Integers and booleans as an array."""
    if t is None or t.is_floating_point() or t.is_complex() or t.device.type == "meta":
        return None
    return t.detach().cpu().numpy()


def _equal(a: Any, b: Any) -> bool:
    arrays = isinstance(a, np.ndarray) and isinstance(b, np.ndarray)
    return bool(np.array_equal(a, b)) if arrays else type(a) is type(b) and bool(a == b)


def alike(t: Tensor | None) -> tuple[int, ...]:
    """The dims along which all entries are equal."""
    if t is None or not t.numel() or t.device.type == "meta":
        return ()
    return tuple(
        d for d in range(t.ndim) if t.shape[d] > 1 and bool((t == t.narrow(d, 0, 1)).all())
    )


def _apply(out: Interpretation, call: registry.RuleContext, step: Step) -> list[Ownership | None]:
    if call.name == "as_strided":
        return [_restrided(out, call, step)]
    if call.op in registry.CUSTOM:
        out.custom.add(str(call.op))
    if call.op in registry.ASSUMED and call.op not in registry.CUSTOM:
        out.assumed.add(str(call.op))
    function = registry.lookup(call.op)
    if function is None:
        taken_apart = _decompose(out, call, step)
        if taken_apart is not None:
            return taken_apart
        if any(r is not None for r in step.outs) and any(m.depends_on_batch for m in call.marks):
            out.unknown[step.index] = step.name
        function = registry.unknown
    try:
        result = function(call)
    except Exception as error:
        if errors.STRICT:
            raise
        out.unknown[step.index] = f"{step.name} (its rule raised {type(error).__name__})"
        result = registry.unknown(call)
    results = list(result) if isinstance(result, list | tuple) else [result]
    placed = iter(results)
    return [next(placed, None) if ref is not None else None for ref in step.outs]


def _decompose(
    out: Interpretation, call: registry.RuleContext, step: Step
) -> list[Ownership | None] | None:
    """Run PyTorch's own definition of the op on tensors without contents and walk over what it does."""
    body = registry.decomposition(call.op)
    if body is None:
        return None
    recorder = Recorder({})
    stand_ins = {r.index: registry.stand_in(out.graph.values[r.index]) for r in step.refs()}
    swap = lambda a: stand_ins[a.index] if isinstance(a, Ref) else a  # noqa: E731
    args, kwargs = tree_map(swap, (step.args, step.kwargs), is_leaf=lambda a: isinstance(a, Ref))
    try:
        with recorder:
            refs = {i: recorder.declare(t, "inputs", str(i)) for i, t in stand_ins.items()}
            result = body(*args, **kwargs)
        if any(s.op is step.op for s in recorder.graph.steps):
            return None
        outputs = [
            recorder.ref(t) if isinstance(t, torch.Tensor) else None
            for t in (result if isinstance(result, tuple | list) else [result])
        ]
    except Exception:
        return None
    names = {ref.index: i for i, ref in refs.items()}
    inner = Interpretation(
        recorder.graph,
        out.algebra,
        {ref.index: out.marks[i] for i, ref in refs.items()},
        above=(out, names),
    )
    for value, v in enumerate(recorder.graph.values):
        if v.kind == "constants":
            inner.marks[value] = shared(v.shape, ("constant", step.index, value))
    last = _last_uses(recorder.graph)
    for s in recorder.graph.steps:
        _step(inner, s, last)
        if inner.unknown:
            return None
    return [inner.marks[r.index] if r else None for r in outputs]


# --- memory: a write through one view is seen through the others ----------------------------------


def _through_views(
    out: Interpretation, old: Ref, fresh: Ref, step: int, last: Mapping[int, int]
) -> None:
    graph = out.graph
    storage = graph.values[fresh.index].storage
    others = [
        i
        for i, v in enumerate(graph.values[: fresh.index])
        if v.storage == storage and i in out.marks and i != old.index and last.get(i, -1) > step
    ]
    if not others:
        return
    new = spell_out(out.marks[fresh.index])
    windows = [Window.of(graph.values[i]) for i in others]
    hits = places(Window.of(graph.values[fresh.index]), windows)
    new_owner, new_key = (np.broadcast_to(a, new.shape).reshape(-1) for a in (new.owner, new.key))
    for i, hit in zip(others, hits, strict=True):
        if graph.values[i].dtype.itemsize != graph.values[fresh.index].dtype.itemsize:
            out.arranged.pop(i, None)
            view = [1] * len(graph.values[i].shape)
            owner, key = np.full(view, MIXED, dtype=np.int32), np.broadcast_to(code("bytes"), view)
            out.marks[i] = out.algebra.result(
                graph.values[i].shape, owner, key, [out.marks[i], new], "written through a view"
            )
            continue
        if (hit < 0).all():
            continue
        out.arranged.pop(i, None)
        was = out.marks[i]
        if was.shape == new.shape and np.array_equal(hit.reshape(-1), np.arange(hit.size)):
            out.marks[i] = out.marks[fresh.index]
            continue
        full = spell_out(was)
        owner = np.where(hit >= 0, new_owner[hit], np.broadcast_to(full.owner, was.shape)).astype(
            np.int32
        )
        key = np.where(hit >= 0, new_key[hit], np.broadcast_to(full.key, was.shape))
        out.marks[i] = compress(
            out.algebra.result(was.shape, owner, key, [was, new], "written through a view")
        )


def _restrided(out: Interpretation, call: registry.RuleContext, step: Step) -> Ownership:
    """A window on the memory of a value, element by element."""
    source, target = (
        out.graph.values[step.refs()[0].index],
        out.graph.values[step.outs[0].index if step.outs[0] else 0],
    )
    (place,) = places(Window.of(source), [Window.of(target)])
    if (place < 0).any() or source.dtype.itemsize != target.dtype.itemsize:
        return registry.mixed(call, target.shape, "resized")
    return moved(call["self"], lambda _: place, target.shape)
