"""What is proved, tried on another batch before it is handed out.

A cheap half of ``verify``, of one or two forward passes. It proves nothing: it is a net under the
rules of the analysis, and what it catches is a bug of theirs. The verdict is then what the tests
leave of it, and a warning asks for a report. Forward pass: ``forward_trial.py``; loss:
``loss_trial.py``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from unbatch import errors
from unbatch.analysis.structure import Structure
from unbatch.analysis.verdict import TITLES, Verdict
from unbatch.capture.effort import is_spent
from unbatch.errors import ContradictedProofWarning
from unbatch.verification.experiment import Experiment
from unbatch.verification.forward_trial import try_independent, try_statistics
from unbatch.verification.loss_experiment import LossExperiment
from unbatch.verification.loss_trial import try_loss, try_split
from unbatch.verification.trial_result import PASSED, Contradiction, Outcome

FORWARD = ("independent_forward", "simd_forward", "simd_given_statistics")
LOSS = ("reduction", "simd_loss")

NOTE = "it was proved, and a trial on another batch contradicts that ({detail})"
ALONE = "a single sample"
NO_EFFORT = "experiments had taken all of their effort before"


def tried(structure: Structure, experiment: Experiment, loss: LossExperiment | None) -> Structure:
    """Return the structure with what is proved tried on another batch.

    Warns where a trial contradicts a proof. What the user has declared is not tried.
    """
    if structure.samples < 2:
        return _with_outcome(structure, (*FORWARD, *LOSS), ALONE)
    outcome = _try_forward(structure, experiment, loss)
    if outcome is not None:
        structure = _with_outcome(structure, FORWARD, outcome)
    if loss is None:
        return structure
    if _proved(structure.reduction) or _proved(structure.simd_loss):
        structure = _with_outcome(structure, LOSS, try_loss(structure, loss))
    if _proved(structure.canonical_split):
        structure = _with_outcome(structure, ["canonical_split"], try_split(loss))
    return structure


def _proved(verdict: Verdict) -> bool:
    return bool(verdict) and verdict.basis == "proved"


def _try_forward(
    structure: Structure, experiment: Experiment, loss: LossExperiment | None
) -> Outcome | None:
    """Return what came of the trial of the verdicts on the model; None without any to try."""
    predictions = None
    if loss is not None:
        # They are there already.
        predictions = [loss.leaves[i].detach() for i in loss.at]
    if _proved(structure.independent_forward):
        return try_independent(experiment, predictions, bool(structure.simd_forward))
    if not _proved(structure.simd_given_statistics):
        return None
    grouped = any(statistic.grouped for statistic in structure.statistics)
    return try_statistics(experiment, predictions, grouped)


# --- what is left of the verdicts -----------------------------------------------------------------


def _with_outcome(structure: Structure, names: Iterable[str], outcome: Outcome) -> Structure:
    """Return the structure with the outcome of a trial in those verdicts that are proved."""
    verdicts = []
    for name in names:
        verdict = getattr(structure, name)
        if not _proved(verdict):
            continue
        new = _after_trial(verdict, outcome)
        if not isinstance(outcome, str) and name in outcome and not outcome[name].expected:
            _warn(structure, new)
        verdicts.append(new)
    return structure.with_verdicts(*verdicts)


def _after_trial(verdict: Verdict, outcome: Outcome) -> Verdict:
    """Return a proved verdict with its trial: passed, not possible, or contradicted."""
    if isinstance(outcome, str):
        if is_spent():
            outcome = NO_EFFORT
        return replace(verdict, trial=outcome)
    contradiction = outcome.get(verdict.name)
    if contradiction is None:
        return replace(verdict, trial=PASSED)
    if contradiction.weights:
        # It is a sum all the same, and its weights depend on more than was proved.
        depends = verdict.weights_depend_on | contradiction.weights
        note = f"weights depend on {' and '.join(sorted(depends))}"
        return replace(verdict, weights_depend_on=depends, note=note, trial=PASSED)
    return _refuted(verdict, contradiction)


def _refuted(verdict: Verdict, contradiction: Contradiction) -> Verdict:
    """Return what a contradiction leaves of a verdict."""
    if contradiction.witness is not None:
        note = str(contradiction.witness)
        return replace(verdict, status="fails", basis="witness", note=note)
    note = NOTE.format(detail=contradiction.detail)
    return replace(verdict, status="unknown", basis="", note=note)


def _warn(structure: Structure, verdict: Verdict) -> None:
    """Warn of a verdict that was proved, and that the trial has changed."""
    custom = ""
    if structure.custom_rules:
        custom = f", or of a registered rule ({', '.join(structure.custom_rules)})"
    text = errors.MSG_CONTRADICTED.format(
        what=TITLES[verdict.name],
        detail=verdict.note,
        verdict=f"It is now {verdict.status}",
        custom=custom,
    )
    errors.warn(text, ContradictedProofWarning)
