"""What the marks prove about the loss.

``judge`` says *holds* where the marks of predictions and loss prove it, and leaves the rest open ("unknown") with the
culprits. Whether an open one *fails* takes a witness, see ``verify.py``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from unbatch.analysis.domain.ownership import Ownership
from unbatch.analysis.domain.propagation import Propagation, StatisticUse
from unbatch.analysis.domain.sample_layout import holds_its_place, uniform
from unbatch.analysis.explanations import DEFAULT_REMEDY, REMEDY, WHY, culprit, escape_culprit
from unbatch.analysis.initial import forward_marks, loss_marks, scrambled
from unbatch.analysis.interpreter import Interpretation, interpret
from unbatch.analysis.loss_boundary import folded, placed, split
from unbatch.analysis.rules import registry
from unbatch.analysis.structure import BatchStatistic, Culprit, Structure, Verdict
from unbatch.capture import ops
from unbatch.capture.graph import Graph, HostRead, Ref, Step
from unbatch.capture.sample_axes import SampleAxes


def sees(marks: Ownership) -> bool:
    """The value tells something about the batch."""
    return marks.depends_on_batch or bool(
        marks.sources & {"inputs", "targets", "predictions", "internals"}
    )


# --- judging --------------------------------------------------------------------------------------


@dataclass
class AnalysisState:
    """The walks behind a structure; what the witnesses need to know beside it."""

    forward: Interpretation
    loss: Interpretation | None
    leading: bool
    bent: bool = False
    ranks: bool = False
    escapes: list[HostRead] = field(default_factory=list)
    loss_escapes: list[HostRead] = field(default_factory=list)
    told: frozenset[str] = (
        frozenset()
    )  # constants of which the loss looks at more than one sample's at a time


def infer_structure(
    graph: Graph,
    samples: int,
    dims: Sequence[int | None],
    target_dims: Sequence[int | None],
    assumed: Sequence[str] = (),
    harmless: Callable[[HostRead], bool] = lambda e: False,
    fold: SampleAxes | None = None,
) -> tuple[Structure, AnalysisState]:
    """Walk over model and loss and say what is proved. Where the model computes its own loss, find the cut first.

    The graph of the findings is the one that the verdicts are about: cut, and with its predictions folded.
    """
    own = graph.own_loss and not graph.after_cut
    leading = all(d in (0, None) for d in dims)
    forward = interpret(
        graph,
        samples,
        forward_marks(graph, dims),
        graph.steps if own else graph.forward_steps,
        assumed,
    )
    entering: list[Step] = []
    if own:
        graph, entering = split(graph, forward)
        forward = replace(forward, graph=graph)
    if own and fold is not None:
        graph = folded(graph, forward, fold)
        forward = interpret(
            graph, samples, forward_marks(graph, dims), graph.forward_steps, assumed
        )
    found = AnalysisState(forward, None, leading)
    before, after = _asked(graph, forward, own)
    matters = lambda e, w: _tells(e, w) and not _declared(graph, e, assumed) and not harmless(e)  # noqa: E731
    found.escapes = [e for e in before if matters(e, forward)]
    structure = _judge_forward(graph, forward, found, samples)
    if graph.loss is not None:
        start = loss_marks(graph, forward, target_dims, samples, leading)
        found.loss = _walk_loss(
            graph, forward, start, assumed, statistics_of_data(graph, forward) if own else []
        )
        read = [e for e in after if matters(e, found.loss)]
        found.loss_escapes = [e for e in read if e.blind or not constant(e, found.loss)]
        found.told = frozenset().union(
            *(found.loss.asked[e].sources for e in read if e not in found.loss_escapes),
            *(found.loss.marks[i].sources for i in scrambled(graph, forward)),
        )
        structure = _judge_loss(graph, found.loss, found, structure)
        if entering:
            structure = structure.with_verdicts(_entering(entering))
        if own:
            structure = replace(structure, notes=structure.notes + _cut(graph))
    walks = [forward] + ([found.loss] if found.loss else [])
    return replace(
        structure,
        assumptions=tuple(sorted(set().union(*(w.assumed for w in walks)))),
        custom_rules=tuple(sorted(set().union(*(w.custom for w in walks)))),
        unknown_ops=tuple(sorted({op for w in walks for op in w.unknown.values()})),
    ), found


def _walk_loss(
    graph: Graph,
    forward: Interpretation,
    start: dict[int, Ownership],
    assumed: Sequence[str],
    before: Sequence[Step],
) -> Interpretation:
    steps, samples = [*before, *graph.loss_steps], forward.algebra.samples
    loss = interpret(graph, samples, start, steps, assumed, ("targets", "inputs"))
    moved: dict[int, Ownership] = {}
    while more := {i: m for i, m in placed(graph, forward, start, loss).items() if i not in moved}:
        moved |= more
        loss = interpret(graph, samples, start | moved, steps, assumed, ("targets", "inputs"))
    return loss


def statistics_of_data(graph: Graph, forward: Interpretation) -> list[Step]:
    """Where a model makes statistics of its inputs alone (how many words a mask leaves), which its loss may use."""

    def is_one(ref: Ref | None) -> bool:
        return (
            ref is not None
            and bool(forward[ref].given)
            and "parameters" not in forward[ref].sources
        )

    return [
        s for s in graph.forward_steps if any(map(is_one, [*s.outs, *(new for _, new in s.writes)]))
    ]


def _asked(
    graph: Graph, forward: Interpretation, own: bool
) -> tuple[list[HostRead], list[HostRead]]:
    """What Python reads on the way to the predictions, and what it reads later, which does not lead to them."""
    last = max(forward.ancestors(graph.used_predictions), default=-1) if own else -1
    late = lambda e: e.step > last if own else e.in_loss  # noqa: E731
    return [e for e in graph.escapes if not late(e)], [e for e in graph.escapes if late(e)]


def _tells(escape: HostRead, walk_: Interpretation) -> bool:
    """It may tell something about the batch."""
    return escape.blind or escape not in walk_.asked or sees(walk_.asked[escape])


def _declared(graph: Graph, escape: HostRead, assumed: Sequence[str]) -> bool:
    """The user has declared the module that asks harmless, or the op whose result is told."""
    maker = graph.values[escape.ref.index].step
    by_op = maker >= 0 and graph.steps[maker].op in registry.ASSUMED
    return by_op or any(escape.module == m or escape.module.startswith(m + ".") for m in assumed)


def constant(escape: HostRead, loss: Interpretation) -> bool:
    """What is told is made of targets and inputs alone, which are constants in the loss."""
    return escape in loss.asked and loss.asked[escape].sources <= {"targets", "inputs"}


def _judge_forward(
    graph: Graph, forward: Interpretation, found: AnalysisState, samples: int
) -> Structure:
    algebra, leading = forward.algebra, found.leading
    used = graph.used_predictions
    marks = [forward[r] for r in used]
    steps = forward.ancestors(used)
    for m in marks:
        algebra.consume_alone(m)
    uses = [
        u for u in algebra.uses.values() if any(algebra.roots[r].step in steps for r in u.roots)
    ]
    bent = algebra.bent & steps
    found.bent = bool(bent)
    found.ranks = bool(bent) and all(_compares(graph.steps[s], algebra.births.get(s)) for s in bent)
    in_place = all(holds_its_place(m, samples, leading) for m in marks) and not found.escapes
    alike = all(uniform(m, samples, leading) for m in marks)
    bounded = not any(u.long for u in uses) and not algebra.overlapping()
    independent = in_place and not any(m.given for m in marks)
    basis = "assumed" if forward.assumed else "proved"
    statistics = _statistics(graph, algebra, uses)
    listening = tuple(_statistic_culprit(s, long) for s, long in statistics.items())
    others = _other_culprits(graph, forward, steps, marks, found)
    size = sum(s.size for s in statistics)
    note = (
        f"R = {size} batch statistics"
        + (", of groups: s_g(n)" if any(s.grouped for s in statistics) else "")
        if size
        else "no statistics are needed"
    )

    def verdict(name: str, holds: bool, culprits: tuple[Culprit, ...], note: str = "") -> Verdict:
        if samples == 1:
            return Verdict(
                name, "unknown", note="one sample cannot show whether samples listen to each other"
            )
        return (
            Verdict(name, "holds", basis, note=note)
            if holds
            else Verdict(name, "unknown", culprits=culprits)
        )

    open_ = Verdict("", "unknown", note="there is no loss to judge")
    return Structure(
        canonical_split=replace(open_, name="canonical_split"),
        independent_forward=verdict(
            "independent_forward",
            independent,
            tuple(c for c in listening + others if c.why != WHY["uneven"]),
        ),
        simd_forward=verdict("simd_forward", independent and alike, listening + others),
        simd_given_statistics=verdict(
            "simd_given_statistics",
            in_place and alike and bounded,
            others + (() if bounded else listening),
            note,
        ),
        reduction=replace(open_, name="reduction"),
        simd_loss=replace(open_, name="simd_loss"),
        samples=samples,
        predictions=tuple(graph.values[r.index].shape for r in used),
        statistics=tuple(statistics),
    )


def _compares(step: Step, birth: str | None) -> bool:
    """Each sample is compared with every other, or ordered twice: what follows is linear in ranks."""
    return (step.name in ("gt", "ge", "lt", "le") and birth == "pairwise") or step.name in (
        "sort",
        "argsort",
    )


def _statistics(
    graph: Graph, algebra: Propagation, uses: Sequence[StatisticUse]
) -> dict[BatchStatistic, bool]:
    """One entry per place in the program where statistics are made; whether they are as long as the batch."""
    places: dict[tuple[str, str, str], list[StatisticUse]] = {}
    for use in uses:
        step = graph.steps[algebra.roots[max(use.roots)].step]
        places.setdefault((step.module, step.name, step.where), []).append(use)
    out = {}
    for (module, op, where), there in places.items():
        roots = [algebra.roots[r] for u in there for r in u.roots]
        size, least = sum(u.size for u in there), min(r.samples for r in roots)
        out[BatchStatistic(module, op, where, size, least, any(r.groups for r in roots))] = any(
            u.long for u in there
        )
    return out


def _statistic_culprit(s: BatchStatistic, long: bool) -> Culprit:
    kind = "long" if long else "group" if s.grouped else "statistic"
    why = WHY[kind].format(size=s.size, samples=s.samples)
    return Culprit(s.module, s.op, s.where, why, REMEDY.get(kind, DEFAULT_REMEDY))


def _other_culprits(
    graph: Graph,
    forward: Interpretation,
    steps: set[int],
    marks: Sequence[Ownership],
    found: AnalysisState,
) -> tuple[Culprit, ...]:
    algebra = forward.algebra
    mixing = [
        culprit(graph.steps[s], algebra.births[s])
        for s in sorted(frozenset().union(*(m.mixers for m in marks)) & steps)
        if s in algebra.births
    ]
    uneven = [culprit(graph.steps[s], "uneven") for s in sorted(algebra.uneven & steps)]
    escaped = [escape_culprit(e) for e in found.escapes]
    if not mixing + escaped + uneven and not all(
        holds_its_place(m, algebra.samples, found.leading) for m in marks
    ):
        return (_last(graph, "place"),)
    return tuple(mixing + escaped + uneven)


def _last(graph: Graph, kind: str) -> Culprit:
    steps = graph.forward_steps
    return culprit(steps[-1], kind) if steps else Culprit("", "", "", WHY[kind], REMEDY[kind])


# --- the loss -------------------------------------------------------------------------------------


def _judge_loss(
    graph: Graph, loss: Interpretation, found: AnalysisState, structure: Structure
) -> Structure:
    assert graph.loss is not None
    marks, algebra = loss[graph.loss], loss.algebra
    steps = loss.ancestors([graph.loss])
    split_ = _judge_split(graph, loss, steps, found)
    clean = not found.loss_escapes
    separate = "predictions" in marks.sources or not marks.depends_on_batch
    additive = (
        clean and (marks.additive or (structure.samples == 1 and not marks.mixed)) and separate
    )
    symmetric = not marks.mixed and (marks.additive or not marks.grouped)
    one_scalar = (
        clean
        and symmetric
        and len(marks.atoms) <= 1
        and (not algebra.given_predictions(marks) or len(marks.atoms) == 1)
    )
    basis = "assumed" if loss.assumed else "proved"
    blame = _loss_culprits(graph, loss, steps, marks, found)
    depends, listens = (
        _constants(algebra, marks, True) | found.told,
        _constants(algebra, marks, False),
    )
    note = f"weights depend on {' and '.join(sorted(depends))}" if depends else ""
    given = (
        f"given statistics of the {' and '.join(sorted(listens))} of all samples" if listens else ""
    )
    return structure.with_verdicts(
        split_,
        Verdict("reduction", "holds", basis, note=note, weights_depend_on=depends)
        if additive and one_scalar
        else Verdict("reduction", "unknown", culprits=blame, weights_depend_on=depends),
        Verdict("simd_loss", "holds", basis, note=given, weights_depend_on=listens)
        if one_scalar
        else Verdict("simd_loss", "unknown", culprits=blame),
    )


def _constants(algebra: Propagation, marks: Ownership, factors: bool) -> frozenset[str]:
    """Which constants of the whole batch enter the loss beside predictions: as factors of terms, or inside of them."""
    roots = [algebra.roots[r] for r in marks.given if (r in algebra.factors) == factors]
    sources = [r.sources for r in roots if "predictions" not in r.sources]
    return frozenset().union(*sources) & {"targets", "inputs"}


def _judge_split(
    graph: Graph, loss: Interpretation, steps: set[int], found: AnalysisState
) -> Verdict:
    """No parameter, and nothing of the model but its predictions, may enter after the cut."""
    predicted = {p.index for p in graph.predictions}
    culprits = []
    for step in (graph.steps[s] for s in sorted(steps & graph.after_cut)):
        for ref in step.refs():
            value = graph.values[ref.index]
            if ops.reads_shape_only(step.op):
                continue
            if value.kind == "parameters":
                culprits.append(_split_culprit(step, f"the parameter {value.name!r}"))
            inner = (
                value.kind == "step"
                and value.step not in graph.after_cut
                and ref.index not in predicted
            )
            if inner and found.forward.marks[ref.index].sources & {"parameters"}:
                culprits.append(_split_culprit(step, "an inner value of the model"))
    if culprits:
        return Verdict(
            "canonical_split",
            "fails",
            "proved",
            tuple(dict.fromkeys(culprits)),
            "that part of the gradient is carried as `rest`",
        )
    told = [e for e in graph.escapes if e.in_loss and _tells_parameters(graph, loss, found, e)]
    if told:
        return Verdict(
            "canonical_split", "unknown", culprits=tuple(escape_culprit(e) for e in told)
        )
    return Verdict("canonical_split", "holds", "proved")


def _tells_parameters(
    graph: Graph, loss: Interpretation, found: AnalysisState, escape: HostRead
) -> bool:
    """Python learns a parameter, or something made from one, and may use it in the loss."""
    if escape.blind or graph.values[escape.ref.index].kind == "parameters":
        return True
    marks = loss.marks.get(escape.ref.index) or found.forward.marks.get(escape.ref.index)
    return marks is None or bool(marks.sources & {"parameters", "internals"})


def _cut(graph: Graph) -> tuple[str, ...]:
    """Where a model that computes its own loss was cut, in words."""
    out = []
    for ref in graph.used_predictions:
        value = graph.values[ref.index]
        step = graph.steps[value.step]
        place = f"{step.module or 'the model'}, {os.path.basename(step.where) or step.name}"
        out.append(f"cut into model and loss at a value of shape {list(value.shape)} ({place})")
    return tuple(out)


def _entering(steps: Sequence[Step]) -> Verdict:
    culprits = tuple(_split_culprit(s, "a parameter") for s in steps)
    return Verdict(
        "canonical_split",
        "fails",
        "proved",
        culprits,
        "that part of the gradient is carried as `rest`",
    )


def _split_culprit(step: Step, what: str) -> Culprit:
    why = f"{what} enters the loss beside the predictions"
    return Culprit(
        step.module,
        step.name,
        step.where,
        why,
        "Move it into the model, or keep it: its part of the gradient is reported as `rest`.",
    )


def _loss_culprits(
    graph: Graph, loss: Interpretation, steps: set[int], marks: Ownership, found: AnalysisState
) -> tuple[Culprit, ...]:
    algebra = loss.algebra
    births = found.forward.algebra.births | algebra.births
    mixing = [
        _meeting(graph, graph.steps[s], births[s]) for s in sorted(marks.mixers) if s in births
    ]
    escaped = [escape_culprit(e) for e in found.loss_escapes]
    among = [
        u
        for u in algebra.uses.values()
        if any("predictions" in algebra.roots[r].sources for r in u.roots)
    ]
    uses = [_statistic_culprit(s, long) for s, long in _statistics(graph, algebra, among).items()]
    given = {r for r in marks.given if "predictions" in algebra.roots[r].sources}
    bent = given & _bent_totals(graph, loss, steps) or given
    totals = [] if mixing or uses else [_total_culprit(graph, algebra, r) for r in sorted(bent)]
    return tuple(mixing + escaped + uses + totals)


def _meeting(graph: Graph, step: Step, how: str) -> Culprit:
    """Where samples meet; predictions ``[N, 1]`` beside targets ``[N]`` are what happens most often."""
    shapes = list(
        dict.fromkeys(str(list(graph.values[_unspread(graph, r).index].shape)) for r in step.refs())
    )
    spread = (
        how == "pairwise"
        and len(shapes) > 1
        and (ops.is_pointwise(step.op) or "_loss" in step.name)
    )
    return culprit(step, "broadcast", shapes=" and ".join(shapes)) if spread else culprit(step, how)


def _unspread(graph: Graph, ref: Ref) -> Ref:
    """What a loss has broadcast before it compares."""
    maker = graph.makers.get(ref.index)
    return maker.refs()[0] if maker is not None and maker.name == "expand" else ref


def _bent_totals(graph: Graph, loss: Interpretation, steps: set[int]) -> frozenset[int]:
    """The totals over samples from which something is made that is no sum over samples any more.

    A total that is only added to such a thing, as a cross-entropy to a dice loss, is none of them.
    """
    bent: set[int] = set()
    for step in (graph.steps[s] for s in steps & graph.after_cut):
        made = [loss.marks[r.index] for r in step.outs if r is not None and r.index in loss.marks]
        if any(m.given and not m.additive for m in made):
            totals = [
                m for r in step.refs() if (m := loss.marks.get(r.index)) is not None and m.given
            ]
            adds = ops.base_name(step.op) in ("add", "sub", "rsub", "cat", "stack", "sum", "mean")
            if not adds or all(m.additive for m in totals):
                bent.update(*(m.given for m in totals if m.additive))
    return frozenset(bent)


def _total_culprit(graph: Graph, algebra: Propagation, root: int) -> Culprit:
    step = graph.steps[algebra.roots[root].step]
    why = "a total over the samples enters the loss in more than a linear way"
    return Culprit(
        step.module,
        step.name,
        step.where,
        why,
        "Reduce the losses of the samples by a (weighted) sum or mean.",
    )
