"""Verdicts put to the test: open ones are settled by witnesses, proved ones are checked against them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from unbatch.analysis.explanations import REMEDY, WHY
from unbatch.analysis.structure import Culprit, Structure, Verdict
from unbatch.verification.experiment import Experiment
from unbatch.verification.forward_tests import (
    Counterexample,
    frozen_change,
    listening,
    unbounded,
    uneven,
)
from unbatch.verification.loss_tests import (
    LossExperiment,
    entangled,
    foreign_targets,
    index_matters,
    not_a_sum,
    parameters_matter,
)


@dataclass(frozen=True)
class Check:
    """One verdict put to the test: ``passed`` is None where no test applies, with the reason in ``detail``."""

    name: str
    status: str
    test: str
    passed: bool | None
    detail: str
    witness: Counterexample | None = None


@dataclass(frozen=True)
class Verification:
    """The checks of all verdicts. True in a boolean context when none of them contradicts its verdict."""

    checks: tuple[Check, ...]

    def __bool__(self) -> bool:
        return all(c.passed is not False for c in self.checks)

    def __str__(self) -> str:
        words = {True: "passed", None: "not tested", False: "CONTRADICTED"}
        return "\n".join(
            f"{c.name} {c.status}: {words[c.passed]} ({c.test}: {c.detail})" for c in self.checks
        )


# --- settling and verifying -----------------------------------------------------------------------


def settle(structure: Structure, oracle: Experiment, output: Any, faithful: str = "") -> Structure:
    """Open verdicts become "fails" where a witness is found; a replay that strays takes back what was proved."""
    if faithful:
        structure = _distrust(structure, faithful)
    if structure.samples > 1:
        structure = _settle_forward(structure, oracle)
    if oracle.graph.loss is not None and oracle.graph.after_cut:
        structure = _settle_loss(structure, LossExperiment(oracle, output), oracle)
    return structure


def _distrust(structure: Structure, why: str) -> Structure:
    blame = Culprit("", "replay", "", WHY["unfaithful"] + f" ({why})", REMEDY["unfaithful"])
    names = ("independent_forward", "simd_forward", "simd_given_statistics")
    return structure.with_verdicts(
        *(Verdict(n, "unknown", culprits=(*getattr(structure, n).culprits, blame)) for n in names)
    )


def _fails(verdict: Verdict, witness: Counterexample | None) -> Verdict:
    if witness is None or verdict.status == "holds":
        return verdict
    return replace(verdict, status="fails", basis="witness", note=str(witness))


def _settle_forward(structure: Structure, oracle: Experiment) -> Structure:
    independent, simd, given = (
        structure.independent_forward,
        structure.simd_forward,
        structure.simd_given_statistics,
    )
    witness = None if independent else listening(oracle)
    independent, simd = _fails(independent, witness), _fails(simd, witness)
    if given and (simd or simd.status == "fails"):
        return structure.with_verdicts(independent, simd, given)
    bent = uneven(oracle)
    simd, given = _fails(simd, bent), _fails(given, bent)
    if (
        given.status == "unknown"
        and independent.status == "fails"
        and _all_known(structure, oracle)
    ):
        given = _unbounded(given, oracle)
    return structure.with_verdicts(independent, simd, given)


def _unbounded(given: Verdict, oracle: Experiment) -> Verdict:
    """Samples meet in pairs: no number of statistics that does not grow with the batch can carry that."""
    if oracle.findings.ranks:
        return replace(
            given,
            status="fails",
            basis="proved",
            note="each sample is compared with every other: a rank needs the whole batch",
        )
    return _fails(given, unbounded(oracle)) if oracle.findings.bent else given


def _all_known(structure: Structure, oracle: Experiment) -> bool:
    """Nothing unknown stands behind the mixing: every culprit is an op whose rule says how it mixes."""
    vague = {"no rule", "data-dependent shape", "scattered", "resized", "position"}
    births = oracle.findings.forward.algebra.births.values()
    return not structure.unknown_ops and not oracle.findings.escapes and not vague & set(births)


def _settle_loss(structure: Structure, loss: LossExperiment, oracle: Experiment) -> Structure:
    split, reduction, simd_loss = (
        structure.canonical_split,
        structure.reduction,
        structure.simd_loss,
    )
    try:
        split = (
            split
            if split
            else _fails(split, parameters_matter(loss))
            if split.status == "unknown"
            else split
        )
        reduction = reduction if reduction else _fails(reduction, not_a_sum(loss))
        simd_loss = simd_loss if simd_loss else _fails(simd_loss, entangled(loss))
        if simd_loss.status == "unknown" and oracle.program.loss is not None:
            simd_loss = _fails(simd_loss, index_matters(loss) or foreign_targets(loss))
    except Exception as error:
        note = f"the loss could not be tested: {type(error).__name__}: {error}"
        reduction, simd_loss = (
            v if v.status != "unknown" else replace(v, note=note) for v in (reduction, simd_loss)
        )
    if simd_loss.status == "fails" and reduction.status != "fails":
        note = (
            "a sum over samples, but not of one function of each sample's own prediction and target"
            if reduction
            else str(simd_loss.note)
        )
        reduction = replace(
            reduction,
            status="fails",
            basis=simd_loss.basis,
            note=note,
            culprits=reduction.culprits or simd_loss.culprits,
        )
    return structure.with_verdicts(split, reduction, simd_loss)


def verify(structure: Structure, oracle: Experiment, output: Any) -> Verification:
    """Put every verdict to a numerical test."""
    checks: list[Check] = []
    if structure.samples > 1:
        witness = listening(oracle)
        checks.append(_check(structure.independent_forward, "replace all other samples", witness))
        checks.append(
            _check(structure.simd_forward, "replace and permute samples", witness or uneven(oracle))
        )
        checks.append(_check_given(structure, oracle))
    if oracle.graph.loss is not None and oracle.graph.after_cut:
        loss = LossExperiment(oracle, output)
        for verdict, test, run in (
            (
                structure.canonical_split,
                "change parameters, predictions held fixed",
                parameters_matter,
            ),
            (structure.reduction, "second difference over two samples", not_a_sum),
            (structure.simd_loss, "direction of one row when the others change", entangled),
        ):
            try:
                checks.append(_check(verdict, test, run(loss)))
            except Exception as error:
                checks.append(
                    Check(verdict.name, verdict.status, test, None, f"could not be run: {error}")
                )
    return Verification(tuple(checks))


def _check(verdict: Verdict, test: str, witness: Counterexample | None) -> Check:
    if verdict.status == "unknown":
        return Check(
            verdict.name,
            verdict.status,
            test,
            None,
            str(witness) if witness else "no witness against it",
            witness,
        )
    if verdict.status == "holds":
        return Check(
            verdict.name,
            verdict.status,
            test,
            witness is None,
            str(witness or "no change beyond rounding"),
            witness,
        )
    if witness is None:
        return Check(
            verdict.name, verdict.status, test, None, verdict.note or "no witness in this test"
        )
    return Check(verdict.name, verdict.status, test, True, str(witness), witness)


def _check_given(structure: Structure, oracle: Experiment) -> Check:
    verdict = structure.simd_given_statistics
    test = "replace all other samples, statistics frozen"
    if verdict.status != "holds":
        return _check(verdict, "permute samples", uneven(oracle))
    bent = None if any(s.grouped for s in structure.statistics) else uneven(oracle)
    if bent is not None:
        return _check(verdict, "permute samples", bent)
    if structure.simd_forward:
        return Check(verdict.name, verdict.status, test, True, "no statistics are needed")
    off = frozen_change(oracle)
    if isinstance(off, str):
        return Check(verdict.name, verdict.status, test, None, off)
    return Check(
        verdict.name,
        verdict.status,
        test,
        off == 0.0,
        "bitwise equal" if off == 0.0 else f"moved by {off:.2g}",
    )
