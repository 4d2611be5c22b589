"""Verdicts put to the test, before and after they are given.

``settle``: what the analysis left open is tested, and *fails* where there is a counterexample.
``verify``: every verdict is tested, those that were proved as well; a counterexample to one that
*holds* contradicts the analysis.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from unbatch.analysis.domain.sample_layout import in_its_group
from unbatch.analysis.explanations import REMEDY, WHY
from unbatch.analysis.structure import Structure
from unbatch.analysis.verdict import Culprit, Verdict
from unbatch.running.tasks import Task, task
from unbatch.verification.counterexample import Counterexample
from unbatch.verification.draw import ALL, Draw
from unbatch.verification.experiment import Experiment, Untestable
from unbatch.verification.forward_tests import cross_sample_dependence, not_equivariant
from unbatch.verification.frozen_statistics import change_with_frozen_statistics
from unbatch.verification.groups import not_by_statistics
from unbatch.verification.loss_experiment import LossExperiment, loss_experiment
from unbatch.verification.loss_tests import (
    direction_depends_on_index,
    direction_depends_on_predictions,
    direction_depends_on_targets,
    not_a_sum,
    parameter_enters,
)
from unbatch.verification.noise import stream_depends_on_data
from unbatch.verification.ranks import growing_rank
from unbatch.verification.trial import FORWARD, LOSS, tried

# Reasons for mixing that do not say how samples are combined.
VAGUE = {"no rule", "data-dependent shape", "scattered", "resized", "position"}

NOTE_PAIRS = "each sample is compared with every other: a rank needs the whole batch"
NOTE_DRAWN = "drawn with a seed, as predictions are large: {drawn}; give `effort=` for more"
NOTE_RAGGED = "samples have rows of their own number: that one function treats them is not tried"
NOTE_UNTESTED = "the loss could not be tested: {error}: {text}"

OF_MODEL, OF_LOSS = 3, 3  # verdicts that are tested

LossTest = Callable[[LossExperiment], Counterexample | None]


@dataclass(frozen=True)
class Check:
    """One verdict put to the test.

    ``passed`` is None where no test applies, or nothing follows from it; ``detail`` says why.
    """

    name: str
    status: str
    test: str
    passed: bool | None
    detail: str
    witness: Counterexample | None = None


@dataclass(frozen=True)
class Verification:
    """The checks of all verdicts. True in a boolean context when none contradicts its verdict.

    ``drawn``: how much was tried where predictions are so large that not all is. ``stopped``: why
    experiments were stopped before their end, if they were.
    """

    checks: tuple[Check, ...]
    drawn: str = ""
    stopped: str = ""

    def __bool__(self) -> bool:
        return all(check.passed is not False for check in self.checks)

    def __str__(self) -> str:
        words = {True: "passed", None: "not tested", False: "CONTRADICTED"}
        lines = []
        for c in self.checks:
            lines.append(f"{c.name} {c.status}: {words[c.passed]} ({c.test}: {c.detail})")
        if self.drawn:
            lines.append(NOTE_DRAWN.format(drawn=self.drawn))
        if self.stopped:
            lines.append(self.stopped)
        return "\n".join(lines)


# --- what is open is settled ----------------------------------------------------------------------


def settle(
    structure: Structure, experiment: Experiment, output: Any, difference: str = ""
) -> Structure:
    """Return the structure with counterexamples to what it does not prove.

    ``output``: what the model returns. ``difference``: how the recording differs from the model on
    another batch; what was proved about the forward pass is unknown then, as another computation
    may run there.
    """
    # With objects that hold other tensors than those of the batch, a loss says nothing.
    if experiment.graph.hides_predictions:
        return structure
    if difference:
        structure = _withdrawn(structure, difference)
    # Noise that other samples would change is replayed; a replay that differs from the model says
    # nothing about it.
    is_testable = not (difference and stream_depends_on_data(experiment.graph))
    # A single sample has no others to depend on.
    if structure.samples > 1 and is_testable:
        structure = _settle_forward(structure, experiment)
    loss: LossExperiment | None = None
    if _has_loss(experiment):
        loss = loss_experiment(experiment, output)
        structure = _settle_loss(structure, loss)
    # What is proved is not handed out untried.
    return tried(structure, experiment, loss)


def settle_as(
    settled: Structure, structure: Structure, experiment: Experiment, output: Any
) -> Structure:
    """Return the structure with what came of the same proofs on a batch of other sizes.

    ``settled``: that. Counterexamples belong to a batch, and are looked for anew; where there is
    none on this one, the verdict is open.
    """
    taken = []
    for mine, theirs in zip(structure.verdicts, settled.verdicts, strict=True):
        if theirs.basis == "witness":
            taken.append(mine)
            continue
        # Where they were taken from the recording, they may name its sizes.
        taken.append(replace(theirs, culprits=mine.culprits or theirs.culprits))
    structure = structure.with_verdicts(*taken)
    if any(_was_refuted(settled, name) for name in FORWARD):
        structure = _refuted_forward(settled, structure, experiment)
    if any(_was_refuted(settled, name) for name in ("canonical_split", *LOSS)):
        structure = _settle_loss(structure, loss_experiment(experiment, output))
    return structure


def _was_refuted(settled: Structure, name: str) -> bool:
    return bool(getattr(settled, name).basis == "witness")


def _refuted_forward(settled: Structure, structure: Structure, experiment: Experiment) -> Structure:
    """Return the structure with counterexamples to what ``settled`` has some against.

    By the tests that have found them there, and by all where these find none here.
    """
    independent, simd = structure.independent_forward, structure.simd_forward
    given_statistics = structure.simd_given_statistics
    if _was_refuted(settled, "independent_forward"):
        dependence = cross_sample_dependence(experiment)
        independent, simd = _refuted(independent, dependence), _refuted(simd, dependence)
    refuted = [name for name in FORWARD if _was_refuted(settled, name)]
    if simd.status == "unknown" and simd.name in refuted:
        difference = not_equivariant(experiment)
        simd = _refuted(simd, difference)
        if settled.simd_given_statistics.note == settled.simd_forward.note:
            # One counterexample to both, as there are no groups of samples.
            given_statistics = _refuted(given_statistics, difference)
    structure = structure.with_verdicts(independent, simd, given_statistics)
    if all(getattr(structure, name).status == "fails" for name in refuted):
        return structure
    return _settle_forward(structure, experiment)


def _has_loss(experiment: Experiment) -> bool:
    """Return whether there is a loss, and a place that separates it from the model."""
    return experiment.graph.loss is not None and bool(experiment.graph.after_cut)


def _withdrawn(structure: Structure, difference: str) -> Structure:
    """Return the structure with nothing proved about the forward pass."""
    why = WHY["unfaithful"] + f" ({difference})"
    replay = Culprit("", "replay", "", why, REMEDY["unfaithful"])
    verdicts = []
    for verdict in (
        structure.independent_forward,
        structure.simd_forward,
        structure.simd_given_statistics,
    ):
        culprits = (*verdict.culprits, replay)
        verdicts.append(Verdict(verdict.name, "unknown", culprits=culprits))
    return structure.with_verdicts(*verdicts)


def _refuted(verdict: Verdict, witness: Counterexample | None) -> Verdict:
    """Return the verdict as failing where there is a counterexample; one that holds is proved."""
    if witness is None or verdict:
        return verdict
    return replace(verdict, status="fails", basis="witness", note=str(witness))


def _settle_forward(structure: Structure, experiment: Experiment) -> Structure:
    """Return the structure with counterexamples to the verdicts on the model.

    The tests are costly (some dozens of forward passes), so that one is left out which could not
    change a verdict any more.
    """
    independent = structure.independent_forward
    simd = structure.simd_forward
    given_statistics = structure.simd_given_statistics
    if not independent:
        # Samples that depend on each other are not SIMD either.
        dependence = cross_sample_dependence(experiment)
        independent = _refuted(independent, dependence)
        simd = _refuted(simd, dependence)
    if given_statistics and simd.status != "unknown":
        # Nothing that permuting the samples could refute is open.
        return structure.with_verdicts(independent, simd, given_statistics)
    if not experiment.samples_are_alike:
        simd = _noted(simd, NOTE_RAGGED)
        given_statistics = _noted(given_statistics, NOTE_RAGGED)
        return structure.with_verdicts(independent, simd, given_statistics)
    difference = not_equivariant(experiment)
    simd = _refuted(simd, difference)
    if not given_statistics and not _is_grouped(structure, experiment):
        beyond = not_by_statistics(experiment, difference, bool(independent))
        given_statistics = _refuted(given_statistics, beyond)
    # Ranks say something only about dependence that is known to be there.
    is_open = given_statistics.status == "unknown" and independent.status == "fails"
    if is_open and _mixing_is_understood(structure, experiment):
        given_statistics = _settle_given_statistics(given_statistics, experiment)
    return structure.with_verdicts(independent, simd, given_statistics)


def _is_grouped(structure: Structure, experiment: Experiment) -> bool:
    """Return whether predictions depend on statistics of the groups that their samples are in.

    Samples that change places may then change groups, which says nothing against statistics.
    """
    if not any(statistic.grouped for statistic in structure.statistics):
        return False
    forward, leading = experiment.findings.forward, experiment.findings.leading
    algebra = forward.algebra
    if algebra.uses_overlapping_sets():
        return False
    predictions = [forward[ref] for ref in experiment.graph.used_predictions]
    return all(in_its_group(marks, algebra.sets, leading) for marks in predictions)


def _settle_given_statistics(verdict: Verdict, experiment: Experiment) -> Verdict:
    """Return that no number of statistics carries the dependence unless it grows with the batch."""
    if experiment.findings.ranks:
        return replace(verdict, status="fails", basis="proved", note=NOTE_PAIRS)
    if not experiment.findings.nonlinear:
        # Linear in what was mixed: a matrix of fixed size may well carry it.
        return verdict
    return _refuted(verdict, growing_rank(experiment))


def _mixing_is_understood(structure: Structure, experiment: Experiment) -> bool:
    """Return whether every op that mixes samples has a rule that says how."""
    if structure.unknown_ops or experiment.findings.host_reads:
        return False
    reasons = experiment.findings.forward.algebra.record.mixing.values()
    return VAGUE.isdisjoint(reasons)


def _settle_loss(structure: Structure, loss: LossExperiment) -> Structure:
    """Return the structure with counterexamples to the verdicts on the loss."""
    split = structure.canonical_split
    reduction = structure.reduction
    simd_loss = structure.simd_loss
    if not loss.experiment.samples_are_alike:
        simd_loss = _noted(simd_loss, NOTE_RAGGED)
    # One after the other, so that what was found before a test fails to run is kept.
    try:
        if split.status == "unknown":
            split = _refuted(split, parameter_enters(loss))
        if not reduction:
            reduction = _refuted(reduction, not_a_sum(loss))
        if not simd_loss:
            simd_loss = _refuted(simd_loss, direction_depends_on_predictions(loss))
            # A row that turns with the predictions of others is that of no sum over samples.
            reduction = _no_reduction(reduction, simd_loss)
        # Targets can be changed only where they are arguments of the loss.
        # Rows of others may name their sample, and would then be nobody's.
        is_apart = loss.experiment.program.loss is not None
        if is_apart and loss.experiment.samples_are_alike:
            reduction, simd_loss = _settle_by_targets(reduction, simd_loss, loss)
    except Exception as error:
        note = NOTE_UNTESTED.format(error=type(error).__name__, text=error)
        reduction = _noted(reduction, note)
        simd_loss = _noted(simd_loss, note)
    return structure.with_verdicts(split, reduction, simd_loss)


def _settle_by_targets(
    reduction: Verdict, simd_loss: Verdict, loss: LossExperiment
) -> tuple[Verdict, Verdict]:
    """Return both with what samples with equal or other targets show.

    Where samples enter by different functions it is a sum all the same. One that reads targets of
    other samples is no term of its sample alone.
    """
    if simd_loss.status == "unknown":
        simd_loss = _refuted(simd_loss, direction_depends_on_index(loss))
    if "unknown" in (reduction.status, simd_loss.status):
        by_targets = direction_depends_on_targets(loss)
        if simd_loss.status == "unknown":
            simd_loss = _refuted(simd_loss, by_targets)
        if reduction.status == "unknown":
            reduction = _refuted(reduction, by_targets)
    return reduction, simd_loss


def _noted(verdict: Verdict, note: str) -> Verdict:
    """Return an open verdict with a note; one that is given says its own reason."""
    if verdict.status != "unknown":
        return verdict
    return replace(verdict, note=note)


def _no_reduction(reduction: Verdict, simd_loss: Verdict) -> Verdict:
    """Return an open reduction as failing for the reason for which a SIMD loss does, if it does."""
    if reduction.status != "unknown" or simd_loss.status != "fails":
        return reduction
    return replace(
        reduction,
        status="fails",
        basis=simd_loss.basis,
        note=simd_loss.note,
        culprits=reduction.culprits or simd_loss.culprits,
    )


# --- every verdict is tested ----------------------------------------------------------------------


def verify(structure: Structure, experiment: Experiment, output: Any) -> Verification:
    """Return a numerical test of every verdict; ``output``: what the model returns.

    Of large predictions a sample is tried, which the effort of the program is the size of.
    """
    draw = Draw.of(experiment.size, experiment.program.effort)
    if draw is not ALL:
        experiment = replace(experiment, draw=draw)
    checks = []
    of_model, of_loss = structure.samples > 1, _has_loss(experiment)
    total = OF_MODEL * of_model + OF_LOSS * of_loss
    with task("Testing the verdicts", total, "verdicts") as verdicts:
        if of_model:
            checks += _forward_checks(structure, experiment, verdicts)
        if of_loss:
            checks += _loss_checks(structure, loss_experiment(experiment, output), verdicts)
    return Verification(tuple(checks), str(draw))


def _forward_checks(structure: Structure, experiment: Experiment, verdicts: Task) -> list[Check]:
    """Return the checks of the verdicts on the model; of a single sample there are none."""
    dependence = cross_sample_dependence(experiment)
    independent = _check(structure.independent_forward, "replace all other samples", dependence)
    verdicts.advance()
    # The second test is run only if the first has not refuted the verdict already.
    witness = dependence or not_equivariant(experiment)
    simd = _check(structure.simd_forward, "replace and permute samples", witness)
    verdicts.advance()
    given_statistics = _check_given_statistics(structure, experiment)
    verdicts.advance()
    return [independent, simd, given_statistics]


def _loss_checks(structure: Structure, loss: LossExperiment, verdicts: Task) -> list[Check]:
    """Return the checks of the verdicts on the loss; one that cannot be run says why."""
    tests: list[tuple[Verdict, str, LossTest]] = [
        (
            structure.canonical_split,
            "change parameters, predictions held fixed",
            parameter_enters,
        ),
        (
            structure.reduction,
            "second difference over two samples",
            not_a_sum,
        ),
        (
            structure.simd_loss,
            "direction of one row when the others change",
            direction_depends_on_predictions,
        ),
    ]
    checks = []
    for verdict, words, test in verdicts.over(tests):
        try:
            checks.append(_check(verdict, words, test(loss)))
        except Exception as error:
            detail = f"could not be run: {error}"
            checks.append(Check(verdict.name, verdict.status, words, None, detail))
    return checks


def _check(verdict: Verdict, test: str, witness: Counterexample | None) -> Check:
    """Return what a test says about a verdict.

    Without a counterexample a verdict that holds has passed; of one that fails, nothing follows.
    """
    if verdict:
        passed: bool | None = witness is None
        silence = "no change beyond rounding"
    elif verdict.status == "unknown":
        passed = None
        silence = "no witness against it"
    else:
        # That this test is silent does not contradict what another one, or a proof, refuted.
        passed = None if witness is None else True
        silence = verdict.note or "no witness in this test"
    detail = silence if witness is None else str(witness)
    return Check(verdict.name, verdict.status, test, passed, detail, witness)


def _check_given_statistics(structure: Structure, experiment: Experiment) -> Check:
    """Return the check of SIMD given statistics.

    With the statistics held constant, other samples must not change a prediction in a single bit.
    """
    verdict = structure.simd_given_statistics
    difference = None
    if not _is_grouped(structure, experiment):
        difference = not_equivariant(experiment)
        independent = bool(structure.independent_forward)
        difference = not_by_statistics(experiment, difference, independent)
    if not verdict or difference is not None:
        return _check(verdict, "permute samples", difference)
    test = "replace all other samples, statistics frozen"
    if structure.simd_forward:
        return Check(verdict.name, verdict.status, test, True, "no statistics are needed")
    try:
        change = change_with_frozen_statistics(experiment)
    except Untestable as reason:
        return Check(verdict.name, verdict.status, test, None, str(reason))
    detail = "bitwise equal" if change == 0.0 else f"moved by {change:.2g}"
    return Check(verdict.name, verdict.status, test, change == 0.0, detail)
