"""Recordings that were judged, by their form: what came of the trials is not asked again.

Verdicts are proved for every recording by itself. Beside that, what is proved is tried on changed
batches, what is open is tested, and the recording is compared with the model. A recording of
another size that has the same form, and about which the rules prove the same, takes these answers
over: sizes have other names in it and nothing else differs, so that the same proof was tried. Only
counterexamples are looked for anew, as they belong to a batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from unbatch.analysis.structure import Structure
from unbatch.analysis.verdict import Verdict
from unbatch.autodiff.context import Tested
from unbatch.capture.guards import Guard
from unbatch.capture.same_form import Counted, Form, Renamed
from unbatch.problem.recording import state_of_program
from unbatch.verification.trial_result import PASSED

# A single sample has no others to be compared with: it takes what is known of more.
FEW = 2

ELSEWHERE = "on a batch of {samples} samples, {note}"


@dataclass(frozen=True, eq=False)
class Judged:
    """A recording whose proofs were tried.

    ``guard``, ``state``: what the program was then. ``proved``: what the rules say; ``settled``:
    what tests and trials left of it. ``tested``: what was tested of its derivatives.
    """

    form: Form
    guard: Guard
    state: tuple[Any, ...]
    proved: Structure
    settled: Structure
    tested: Tested

    def is_current(self) -> bool:
        """Return whether the program is what it was then, whatever batch it is asked about."""
        return state_of_program(self.guard) == self.state

    def for_few(self, structure: Structure) -> Structure:
        """Return the structure of less than two samples, with the verdicts on more."""
        verdicts = []
        for verdict in self.settled.verdicts:
            if verdict.basis == "witness":
                note = ELSEWHERE.format(samples=self.settled.samples, note=verdict.note)
                verdict = replace(verdict, note=note)
            verdicts.append(verdict)
        return structure.with_verdicts(*verdicts)


@dataclass
class KnownForms:
    """Those of one problem: ``most`` of them, the one used last in front."""

    most: int
    judged: list[Judged] = field(default_factory=list)

    def of_other_sizes(self, form: Form, proved: Structure) -> Judged | None:
        """Return one with the same proofs, in which sizes have other names."""
        for judged in self.judged:
            if _proofs(judged.proved) == _proofs(proved) and judged.form.is_like(form, Renamed()):
                return self._used(judged)
        return None

    def of_more_samples(self, form: Form, samples: int) -> Judged | None:
        """Return one of the same computation on more samples.

        Without any sample a program may leave out steps: then one of the same program.
        """
        for judged in self.judged:
            if judged.form.is_like(form, Counted(judged.settled.samples, samples)):
                return self._used(judged)
        if not samples:
            return next((judged for judged in self.judged if judged.is_current()), None)
        return None

    def _used(self, judged: Judged) -> Judged:
        self.judged.remove(judged)
        self.judged.insert(0, judged)
        return judged

    def add(self, judged: Judged) -> None:
        """Keep one whose proofs have all passed their trial."""
        pairs = zip(judged.proved.verdicts, judged.settled.verdicts, strict=True)
        if judged.settled.samples < FEW or not all(_has_passed(*pair) for pair in pairs):
            return
        self.judged.insert(0, judged)
        del self.judged[self.most :]


def _has_passed(proved: Verdict, settled: Verdict) -> bool:
    """Return whether what was proved has passed its trial; nothing else is tried."""
    if not proved or proved.basis != "proved":
        return True
    return bool(settled) and settled.trial == PASSED


def _proofs(structure: Structure) -> tuple[Any, ...]:
    """Return what the rules say, and for which reasons."""
    verdicts = []
    for v in structure.verdicts:
        # What a culprit says may name sizes.
        culprits = [(c.module, c.op, c.where) for c in v.culprits]
        verdicts.append((v.name, v.status, v.basis, v.weights_depend_on, culprits))
    premises = structure.assumptions, structure.custom_rules, structure.unknown_ops
    return verdicts, premises
