"""What ownership proves about the forward pass: three verdicts, and the statistics behind them.

``judge_forward`` says *holds* where the ownership of the predictions proves it, and leaves the rest
open, with culprits. Nothing is refuted here: that takes a counterexample, see ``verification/``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from unbatch.analysis.domain.dependence import StatisticUse
from unbatch.analysis.domain.ownership import Ownership
from unbatch.analysis.domain.propagation import Propagation
from unbatch.analysis.domain.sample_layout import in_its_place, uniform
from unbatch.analysis.explanations import (
    DEFAULT_REMEDY,
    REMEDY,
    WHY,
    culprit,
    host_read_culprit,
)
from unbatch.analysis.interpreter import Interpretation
from unbatch.analysis.structure import BatchStatistic, Structure
from unbatch.analysis.verdict import TITLES, Culprit, Verdict
from unbatch.capture.graph import Graph, HostRead
from unbatch.capture.steps import Step

COMPARISONS = ("gt", "ge", "lt", "le")


ORDERINGS = ("sort", "argsort")


@dataclass(frozen=True)
class ForwardEvidence:
    """What the interpretation of a forward pass shows about its predictions.

    ``steps``: those that the predictions depend on, and ``uses`` the batch statistics used in them.
    ``in_place``: slice n of every prediction belongs to sample n. ``uniform``: it is the same
    function for every n. ``bounded``: no statistic grows with the batch. ``nonlinear``: steps that
    are no polynomial in values in which samples are mixed already. ``ranks``: there are such steps,
    and all of them compare or order samples, so that what follows is linear in ranks.
    """

    marks: tuple[Ownership, ...]
    steps: frozenset[int]
    uses: tuple[StatisticUse, ...]
    reads: tuple[HostRead, ...]
    in_place: bool
    uniform: bool
    bounded: bool
    nonlinear: bool
    ranks: bool

    @property
    def uses_statistics(self) -> bool:
        """Some prediction depends on other samples through a statistic."""
        return any(m.statistics for m in self.marks)


def forward_evidence(
    graph: Graph, forward: Interpretation, leading: bool, reads: Sequence[HostRead]
) -> ForwardEvidence:
    """Return what the interpretation shows; ``reads``: host reads that may steer the forward pass.

    ``leading``: samples lie along the first axis of every input.
    """
    algebra, samples = forward.algebra, forward.algebra.samples
    # Predictions that the loss does not read prove nothing about it, and refute nothing.
    predictions = [forward[r] for r in graph.used_predictions]
    # A prediction that is a statistic itself is a use of it, which the algebra has to know before
    # its uses are read.
    for marks in predictions:
        algebra.note_use(marks)
    steps = forward.ancestors(graph.used_predictions)
    # A read that may steer the program proves nothing of the other paths: no structure holds then,
    # not even given the statistics.
    # Nor does anything hold of no predictions at all.
    in_place, alike = bool(predictions) and not reads, True
    for marks in predictions:
        in_place = in_place and in_its_place(marks, samples, leading)
        alike = alike and uniform(marks, samples, leading)
    uses = _uses_in(algebra, steps)
    # Of sets that overlap, as neighbourhoods do, there may be as many as there are samples.
    bounded = not algebra.uses_overlapping_sets()
    for use in uses:
        bounded = bounded and not use.long
    nonlinear = algebra.record.nonlinear & steps
    return ForwardEvidence(
        marks=tuple(predictions),
        steps=frozenset(steps),
        uses=tuple(uses),
        reads=tuple(reads),
        in_place=in_place,
        uniform=alike,
        bounded=bounded,
        nonlinear=bool(nonlinear),
        ranks=bool(nonlinear) and _only_ranks(graph, algebra, nonlinear),
    )


def _uses_in(algebra: Propagation, steps: set[int]) -> list[StatisticUse]:
    """Return the uses of statistics that are made in ``steps``."""
    return [use for use in algebra.record.uses.values() if _is_made_in(steps, algebra, use)]


def _is_made_in(steps: set[int], algebra: Propagation, use: StatisticUse) -> bool:
    # Of several statistics one suffices: what is made of them depends on it.
    for definition in use.definitions:
        if algebra.record.definitions[definition].step in steps:
            return True
    return False


def _only_ranks(graph: Graph, algebra: Propagation, steps: set[int]) -> bool:
    """Tell whether all of the steps do no more than compare or order samples."""
    for index in steps:
        if not _compares_samples(graph.steps[index], algebra.record.mixing.get(index)):
            return False
    return True


def _compares_samples(step: Step, birth: str | None) -> bool:
    """Tell whether the step compares each sample with every other, or orders samples.

    ``birth``: how it mixes samples, None where they were mixed before.
    """
    # Sorting what is mixed already gives ranks as well, as the argsort of an argsort does. A
    # comparison counts only where it is the one that sets samples beside each other.
    if step.name in ORDERINGS:
        return True
    return step.name in COMPARISONS and birth == "pairwise"


# --- the verdicts ---------------------------------------------------------------------------------


def judge_forward(
    graph: Graph, forward: Interpretation, evidence: ForwardEvidence, leading: bool
) -> Structure:
    """Return the structure with its verdicts on the forward pass; those on the loss are open."""
    samples = forward.algebra.samples
    statistics = batch_statistics(graph, forward.algebra, evidence.uses)
    through_statistics = tuple(_culprits_of(statistics))
    others = _other_culprits(graph, forward, evidence, leading)
    independent = evidence.in_place and not evidence.uses_statistics
    simd = independent and evidence.uniform
    simd_given = evidence.in_place and evidence.uniform and evidence.bounded
    # An index-dependent function is no dependence on other samples, and statistics of bounded size
    # are no obstacle to the third verdict.
    against_independence = [c for c in others if c.why != WHY["uneven"]]
    against_simd_given = others
    if not evidence.bounded:
        against_simd_given = others + through_statistics
    # One declaration anywhere is enough, whether the predictions depend on its module or not.
    basis = "assumed" if forward.assumed else "proved"

    def verdict(name: str, holds: bool, culprits: tuple[Culprit, ...], note: str = "") -> Verdict:
        # Trivially true of one sample, but the question is about batches of this program.
        if samples == 1:
            return Verdict(name, "unknown", note="one sample cannot show whether samples interact")
        if holds:
            return Verdict(name, "holds", basis, note=note)
        return Verdict(name, "unknown", culprits=culprits)

    def no_loss(name: str) -> Verdict:
        return Verdict(name, "unknown", note="there is no loss to judge")

    return Structure(
        canonical_split=no_loss("canonical_split"),
        independent_forward=verdict(
            "independent_forward", independent, (*through_statistics, *against_independence)
        ),
        simd_forward=verdict("simd_forward", simd, through_statistics + others),
        simd_given_statistics=verdict(
            "simd_given_statistics", simd_given, against_simd_given, _size_note(statistics)
        ),
        reduction=no_loss("reduction"),
        simd_loss=no_loss("simd_loss"),
        samples=samples,
        predictions=tuple(graph.values[r.index].shape for r in graph.used_predictions),
        statistics=tuple(statistics),
    )


def _size_note(statistics: Iterable[BatchStatistic]) -> str:
    """Return how many numbers the statistics are, in words."""
    size, grouped = 0, False
    for statistic in statistics:
        size += statistic.size
        grouped = grouped or statistic.grouped
    if not size:
        return "no statistics are needed"
    note = f"R = {size} batch statistics"
    if grouped:
        note += ", of groups: s_g(n)"
    return note


def hidden(graph: Graph) -> list[Verdict]:
    """Return the verdicts where the loss reads what nobody has seen the model return: all open."""
    why = WHY["hidden"].format(what=", ".join(graph.closed))
    culprit_of_all = Culprit("", "return", "", why, REMEDY["hidden"])
    return [Verdict(name, "unknown", culprits=(culprit_of_all,)) for name in TITLES]


# --- the culprits ---------------------------------------------------------------------------------


def batch_statistics(
    graph: Graph, algebra: Propagation, uses: Sequence[StatisticUse]
) -> dict[BatchStatistic, bool]:
    """Return one entry for each place in the program that makes statistics.

    The value says whether statistics of this place grow with the batch.
    """
    places: dict[tuple[str, str, str], list[StatisticUse]] = {}
    for use in uses:
        # What is made of several statistics is counted where the last of them is made.
        step = graph.steps[algebra.record.definitions[max(use.definitions)].step]
        places.setdefault((step.module, step.name, step.where), []).append(use)
    statistics: dict[BatchStatistic, bool] = {}
    for place, there in places.items():
        statistic = _statistic_at(place, algebra, there)
        # One long statistic is enough for the numbers of this place to grow with the batch.
        statistics[statistic] = any(use.long for use in there)
    return statistics


def _statistic_at(
    place: tuple[str, str, str], algebra: Propagation, uses: Sequence[StatisticUse]
) -> BatchStatistic:
    """Return the statistics of one place (module, op, file and line) as one."""
    size, grouped = 0, False
    samples: list[int] = []
    for use in uses:
        size += use.size
        for root in use.definitions:
            samples.append(algebra.record.definitions[root].samples)
            grouped = grouped or bool(algebra.record.definitions[root].groups)
    return BatchStatistic(*place, size=size, samples=min(samples), grouped=grouped)


def statistic_culprits(
    graph: Graph, algebra: Propagation, uses: Sequence[StatisticUse]
) -> list[Culprit]:
    """Return a culprit for each place where statistics are made."""
    return _culprits_of(batch_statistics(graph, algebra, uses))


def _culprits_of(statistics: Mapping[BatchStatistic, bool]) -> list[Culprit]:
    return [_statistic_culprit(statistic, long) for statistic, long in statistics.items()]


def _statistic_culprit(statistic: BatchStatistic, long: bool) -> Culprit:
    # A long statistic comes first: that it grows is what stands in the way, grouped or not.
    kind = "statistic"
    if long:
        kind = "long"
    elif statistic.grouped:
        kind = "group"
    return Culprit(
        statistic.module,
        statistic.op,
        statistic.where,
        WHY[kind].format(size=statistic.size, samples=statistic.samples),
        REMEDY.get(kind, DEFAULT_REMEDY),
    )


def _other_culprits(
    graph: Graph, forward: Interpretation, evidence: ForwardEvidence, leading: bool
) -> tuple[Culprit, ...]:
    """Return where samples interact other than through statistics."""
    algebra = forward.algebra
    mixers: set[int] = set()
    in_place = True
    for marks in evidence.marks:
        mixers |= marks.mixers
        in_place = in_place and in_its_place(marks, algebra.samples, leading)
    if not evidence.marks:
        return (_last_step_culprit(graph, "nothing"),)
    culprits: list[Culprit] = []
    # By index, which is the order of the program: the first culprit is where it begins.
    for index in sorted(mixers & evidence.steps & algebra.record.mixing.keys()):
        how = algebra.record.mixing[index]
        culprits.append(culprit(graph.steps[index], how))
    culprits.extend(map(host_read_culprit, evidence.reads))
    for index in sorted(algebra.record.uneven & evidence.steps):
        step = graph.steps[index]
        culprits.append(culprit(step, "uneven"))
    if culprits or in_place:
        return tuple(culprits)
    # No step mixes samples, and still slice n is not sample n's: the order is to blame.
    return (_last_step_culprit(graph, "place"),)


def _last_step_culprit(graph: Graph, kind: str) -> Culprit:
    steps = graph.forward_steps
    if not steps:
        return Culprit("", "", "", WHY[kind], REMEDY[kind])
    return culprit(steps[-1], kind)
