"""At which ops between inputs and predictions samples interact, in agreement with the verdicts.

What the interpretation shows for each op is collected first. The verdict on the forward pass then
says how much of it stands: a picture says neither more nor less than the verdicts. How ops become
the stages of a picture is in ``stages.py``.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeGuard

from unbatch.analysis.domain.dependence import StatisticUse
from unbatch.analysis.domain.sample_layout import in_its_place, in_order
from unbatch.analysis.explanations import culprit
from unbatch.analysis.inference import AnalysisState
from unbatch.analysis.interpreter import Interpretation, interpret
from unbatch.analysis.policy import Mixed, Policy
from unbatch.analysis.rules.registry import NO_RULE
from unbatch.analysis.structure import Structure
from unbatch.analysis.verdict import Culprit, Verdict
from unbatch.capture import ops
from unbatch.capture.graph import Graph, HostRead
from unbatch.capture.steps import Ref, Step

# What an op or a stage can be, the gravest last: that of a stage is the gravest of its ops.
KINDS = {
    "separate": "each sample on its own",
    "uneven": "each sample on its own, but what is done depends on its place in the batch",
    "statistics": "samples interact, through a few numbers",
    "moved": "samples change places: slice n belongs to another sample than n",
    "unknown": "not established",
    "mixed": "samples mix",
}


GRAVITY = list(KINDS)  # "mixed" after "unknown": a doubt adds nothing where samples mix anyway


APART = ("separate", "uneven")


ONE_SAMPLE = "one sample: nothing to tell apart; give a batch of several"


SOMEWHERE = "samples mix somewhere here: shown by a witness"


HERE_OR_THERE = "samples mix here or at another “?”: shown by a witness"


STRAYED = "not established: the recording is not all of the model"


@dataclass(frozen=True)
class PathOp:
    """One op between inputs and predictions; ``path``: of its module.

    ``kind``: a key of ``KINDS``. ``note``: what to say in place of "not established". ``numbers``
    and ``group`` as in ``Stage``.
    """

    path: tuple[str, ...]
    op: str
    kind: str = "separate"
    numbers: int = 0
    group: int = 0
    culprits: tuple[Culprit, ...] = ()
    note: str = ""

    @property
    def apart(self) -> bool:
        """Whether every sample is on its own here."""
        return self.kind in APART

    def unsettled(self, note: str, culprits: tuple[Culprit, ...] = ()) -> PathOp:
        """Return the op as one about which it is not established what it does to samples.

        Counts of statistics are dropped: a number that is not established is none.
        """
        return PathOp(self.path, self.op, "unknown", culprits=culprits, note=note)


def path_ops(
    graph: Graph, findings: AnalysisState, structure: Structure, classes: Mapping[str, str]
) -> list[PathOp]:
    """Return the ops that samples go through, in the order in which they run.

    ``findings``: of the interpretation behind ``structure``. ``classes``: module path -> its class.
    Ops outside of these modules belong to the model itself and have the path ``()``.
    """
    recorded = _recorded_ops(graph, findings, structure, classes)
    return _within_verdict(recorded, structure)


# --- what the recording shows ---------------------------------------------------------------------


@dataclass(frozen=True)
class Interaction:
    """How samples interact at one step; ``reads``: what Python reads right before it."""

    kind: str = "separate"
    numbers: int = 0
    group: int = 0
    reads: tuple[HostRead, ...] = ()

    def __or__(self, other: Interaction) -> Interaction:
        """Both at the same step: the graver kind, and all numbers."""
        return Interaction(
            kind=max(self.kind, other.kind, key=GRAVITY.index),
            numbers=self.numbers + other.numbers,
            group=max(self.group, other.group),
            reads=self.reads + other.reads,
        )


Interactions = dict[int, Interaction]  # by step


def _add(interactions: Interactions, step: int, interaction: Interaction) -> None:
    """Add an interaction to those of a step."""
    interactions[step] = interactions.get(step, Interaction()) | interaction


def _recorded_ops(
    graph: Graph, findings: AnalysisState, structure: Structure, classes: Mapping[str, str]
) -> list[PathOp]:
    """Return the ops with what the interpretation shows, whatever the verdict on it."""
    forward = findings.forward
    steps = forward.ancestors(graph.used_predictions) - graph.after_cut
    carrying: set[int] = set()
    for index in steps:
        if _carries_samples(forward, graph.steps[index]):
            carrying.add(index)
    interactions = _interactions(graph, findings, steps, carrying)
    verdicts = (
        structure.independent_forward,
        structure.simd_forward,
        structure.simd_given_statistics,
    )
    culprits: dict[Culprit, None] = {}
    for verdict in verdicts:
        culprits |= dict.fromkeys(verdict.culprits)
    # Steps that carry samples, and those that only Python reads or statistics are made at.
    path_ops_ = []
    for index in sorted(carrying | interactions.keys()):
        step = graph.steps[index]
        interaction = interactions.get(index, Interaction())
        blame = _culprits_at(culprits, step, interaction)
        if not blame:
            blame = _own_culprit(step, interaction, index in forward.unknown)
        path: tuple[str, ...] = ()
        if step.module and step.module in classes:
            path = tuple(step.module.split("."))
        path_ops_.append(
            PathOp(path, step.name, interaction.kind, interaction.numbers, interaction.group, blame)
        )
    return path_ops_


def _carries_samples(forward: Interpretation, step: Step) -> bool:
    """Tell whether something that a step returns depends on the batch."""
    return any(_interpreted(r, forward) and forward[r].depends_on_batch for r in step.outs)


def _interpreted(ref: Ref | None, forward: Interpretation) -> TypeGuard[Ref]:
    """Tell whether there is an abstract value of that tensor."""
    return ref is not None and ref.index in forward.ownership


def _culprits_at(
    culprits: Iterable[Culprit], step: Step, interaction: Interaction
) -> tuple[Culprit, ...]:
    """Return those culprits of the verdicts that this step is.

    No verdict says of a step that it moves samples, only that predictions are not in their places.
    """
    if interaction.kind in ("separate", "moved"):
        return ()
    return tuple(c for c in culprits if _is_at(c, step, interaction))


def _is_at(culprit: Culprit, step: Step, interaction: Interaction) -> bool:
    """Tell whether a culprit is this step; without a line of its own it has that of the problem."""
    if culprit.op == "escape":
        for read in interaction.reads:
            if (read.module, read.where or culprit.where) == (culprit.module, culprit.where):
                return True
        return False
    same_place = culprit.module == step.module and culprit.where == (step.where or culprit.where)
    return same_place and culprit.op == step.name


def _own_culprit(step: Step, interaction: Interaction, no_rule: bool) -> tuple[Culprit, ...]:
    """Return a culprit for a step that the verdicts do not name.

    They name where samples interact first, and where predictions end.
    """
    if interaction.kind == "statistics":
        why = "statistic"
        if interaction.group:
            why = "group"
    elif interaction.kind == "moved":
        why = "place"
    elif interaction.kind == "mixed":
        why = "joined"
    elif no_rule:
        why = NO_RULE
    else:
        return ()
    return (culprit(step, why, size=interaction.numbers, samples=interaction.group),)


def _interactions(
    graph: Graph, findings: AnalysisState, steps: set[int], carrying: set[int]
) -> Interactions:
    """Return the steps at which samples are not simply separate.

    ``steps``: those that predictions are computed by; ``carrying``: the ones of them whose results
    depend on the batch.
    """
    forward = findings.forward
    predictions = [r for r in graph.used_predictions if _interpreted(r, forward)]
    # One step can be several of these; what it is then, ``Interaction`` decides.
    displacing = _displacing(graph, forward, predictions, findings.leading)
    sources = (
        _through_statistics(forward, steps),
        dict.fromkeys(steps & _mixing(forward, predictions), Interaction("mixed")),
        dict.fromkeys(steps & forward.unknown.keys(), Interaction("unknown")),
        _after_reads(findings.host_reads, sorted(carrying) or sorted(steps)),
        dict.fromkeys(steps & displacing, Interaction("moved")),
        _after_mixing(graph, forward, steps),
    )
    interactions: Interactions = {}
    for source in sources:
        for step, interaction in source.items():
            _add(interactions, step, interaction)
    return interactions


def _through_statistics(forward: Interpretation, steps: set[int]) -> Interactions:
    """Return where statistics are made that samples use, or where the place of a sample matters."""
    interactions = dict.fromkeys(forward.algebra.record.uneven & steps, Interaction("uneven"))
    for use in forward.algebra.record.uses.values():
        _add_use(interactions, forward, use, steps)
    return interactions


def _add_use(
    interactions: Interactions, forward: Interpretation, use: StatisticUse, steps: set[int]
) -> None:
    """Count what is made of several statistics where the last of them is made."""
    roots = forward.algebra.record.definitions
    if not any(roots[r].step in steps for r in use.definitions):
        return
    last = roots[max(use.definitions)]
    kind, group = "statistics", 0
    if use.long:
        # With an entry for every sample it can hand on all of them: nothing is bounded.
        kind = "mixed"
    if last.groups:
        group = last.samples
    _add(interactions, last.step, Interaction(kind, use.size, group))


def _mixing(forward: Interpretation, predictions: Sequence[Ref]) -> set[int]:
    """Return the steps that mix samples on their way to predictions.

    Some predictions contain totals over samples as they are, which nothing else uses: where these
    are made counts, too. A step without a rule is unknown, not mixing.
    """
    algebra = forward.algebra
    mixers: set[int] = set()
    statistics: set[int] = set()
    for ref in predictions:
        mixers |= forward[ref].mixers
        statistics |= forward[ref].statistics
    # What samples use is counted as statistics, with its numbers, by ``_through_statistics``.
    for use in algebra.record.uses.values():
        statistics -= use.definitions
    mixing = (mixers & algebra.record.mixing.keys()) - forward.unknown.keys()
    for root in statistics:
        mixing.add(algebra.record.definitions[root].step)
    return mixing


def _after_reads(reads: Sequence[HostRead], steps: Sequence[int]) -> Interactions:
    """Count what Python reads at the first step after it that samples go through.

    ``steps``: ascending. What Python does with a value is not recorded, so any sample may have
    decided what comes next.
    """
    interactions: Interactions = {}
    if not steps:
        return interactions
    for read in reads:
        # After the last step there is none later: then what was read may have chosen the output.
        place = min(bisect_left(steps, read.step), len(steps) - 1)
        _add(interactions, steps[place], Interaction("unknown", reads=(read,)))
    return interactions


def _displacing(
    graph: Graph, forward: Interpretation, predictions: Sequence[Ref], leading: bool
) -> set[int]:
    """Return the steps at which samples lose their places for good: what they read is in order.

    Followed from the predictions upwards, as long as there is an operand that is out of order.
    """
    samples = forward.algebra.samples
    waiting = []
    for ref in predictions:
        marks = forward[ref]
        if marks.separate and not in_its_place(marks, samples, leading):
            waiting.append(ref)
    visited: set[int] = set()
    displacing: set[int] = set()
    while waiting:
        ref = waiting.pop()
        # Several paths may lead to a value; inputs have no step that could have moved them.
        if ref.index in visited or ref.index not in graph.makers:
            continue
        visited.add(ref.index)
        step = _last_writer(graph, ref)
        out_of_order = []
        for operand in step.refs():
            if operand.index in visited or operand.index not in forward.ownership:
                continue
            if forward[operand].separate and not in_order(forward[operand], samples):
                out_of_order.append(operand)
        waiting += out_of_order
        # All operands are in order and the result is not: here it happens.
        if not out_of_order:
            displacing.add(step.index)
    return displacing


def _last_writer(graph: Graph, ref: Ref) -> Step:
    """Return the last step that writes to a value, through another view, or else its maker."""
    # A view is made by one step, and filled by others, which write to the memory it looks at.
    maker = graph.makers[ref.index]
    writer = maker
    if graph.written(ref.index):
        memory = graph.values[ref.index].storage
        for step in graph.steps[maker.index + 1 :]:
            for old, _ in step.writes:
                if old != ref and graph.values[old.index].storage == memory:
                    writer = step
    return writer


def _after_mixing(graph: Graph, forward: Interpretation, steps: set[int]) -> Interactions:
    """Return where samples that are mixed already interact again.

    Found by a second interpretation in which each slice counts as a sample's own after the mixing.
    """
    # The first interpretation shows only that samples are mixed from there on. A picture that ends
    # there would be silent about a batch norm after an attention across samples.
    mixed: set[int] = set()
    for index in steps:
        if _reads_mixed(forward, graph.steps[index]):
            mixed.add(index)
    if not mixed:
        return {}
    # Inputs and parameters begin with the same marks as before; what steps make is found anew.
    start = {i: m for i, m in forward.ownership.items() if graph.values[i].kind != "step"}
    again = interpret(
        graph,
        forward.algebra.samples,
        start,
        graph.forward_steps,
        sorted(forward.assumed),
        policy=Policy(Mixed.AFRESH),
    )
    interactions: Interactions = {}
    for step, interaction in _through_statistics(again, steps).items():
        if step in mixed and interaction.kind != "uneven":
            interactions[step] = interaction
    for step in (mixed & again.algebra.record.mixing.keys()) - forward.unknown.keys():
        # Elementwise ops only bring in what is mixed before.
        if not ops.is_pointwise(graph.steps[step].op):
            interactions[step] = Interaction("mixed")
    return interactions


def _reads_mixed(forward: Interpretation, step: Step) -> bool:
    """Tell whether an operand of a step has mixed samples in it."""
    return any(_interpreted(r, forward) and forward[r].mixed for r in step.refs())


# --- what the verdicts say ------------------------------------------------------------------------


def _within_verdict(recorded: list[PathOp], structure: Structure) -> list[PathOp]:
    """Return as much of what the recording shows as the verdict on the forward pass says."""
    verdict = structure.independent_forward
    if verdict:
        return [_as_separate(op) for op in recorded]
    if structure.samples == 1:
        return [op.unsettled(ONE_SAMPLE) for op in recorded]
    strayed = _replay_culprits(recorded, verdict.culprits)
    if not _suspects(recorded):
        return _anywhere(recorded, verdict, bool(strayed))
    fails = verdict.status == "fails"
    if fails:
        recorded = _witnessed(recorded)
    return [_within_doubt(op, fails, strayed) for op in recorded]


def _suspects(recorded: Sequence[PathOp]) -> list[PathOp]:
    """Return the ops at which samples interact or may interact."""
    return [op for op in recorded if not op.apart]


def _as_separate(op: PathOp) -> PathOp:
    """Return an op of a computation whose samples are proved to be separate.

    The place in the batch may still matter, which is no dependence on another sample.
    """
    if op.kind == "uneven":
        return op
    return PathOp(op.path, op.op)


def _within_doubt(op: PathOp, fails: bool, strayed: tuple[Culprit, ...]) -> PathOp:
    """Return an op where the verdict does not hold.

    ``fails``: it is refuted, not only unproved. ``strayed``: culprits for what the recording lacks.
    """
    if op.apart:
        # What is not in the recording may interact at any of its ops.
        if strayed:
            return op.unsettled(STRAYED, strayed)
        return op
    if fails:
        return op
    # The verdict is unknown: an interaction that the recording shows may cancel.
    return replace(op, kind="unknown")


def _anywhere(recorded: list[PathOp], verdict: Verdict, strayed: bool) -> list[PathOp]:
    """Return the ops where nothing in the recording explains why the verdict does not hold."""
    note = STRAYED if strayed else ""
    if verdict.status == "fails":
        note = SOMEWHERE
    return [op.unsettled(note, verdict.culprits) for op in recorded]


def _replay_culprits(
    recorded: Sequence[PathOp], culprits: Iterable[Culprit]
) -> tuple[Culprit, ...]:
    """Return the culprits that say that the recording does not follow the model on other batches.

    None where an op is known to be unknown: that may well be why.
    """
    for op in recorded:
        if op.kind == "unknown":
            return ()
    return tuple(c for c in culprits if c.op == "replay")


def _witnessed(recorded: list[PathOp]) -> list[PathOp]:
    """Return the ops where a witness shows that samples mix.

    Where they can do so in one place only, that is where; of several nobody knows which.
    """
    places: set[tuple[Culprit, ...]] = set()
    count = 0
    for op in _suspects(recorded):
        if op.kind != "unknown":
            # There is an interaction that the recording shows, which explains the witness.
            return recorded
        places.add(op.culprits)
        count += 1
    # Several ops with the same culprits are one place; ops without any may be anywhere.
    one_place = count == 1 or (len(places) == 1 and () not in places)
    settled = []
    for op in recorded:
        if op.apart:
            settled.append(op)
        elif one_place:
            settled.append(replace(op, kind="mixed"))
        else:
            settled.append(replace(op, note=SOMEWHERE))
    return settled
