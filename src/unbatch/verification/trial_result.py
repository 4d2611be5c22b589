"""What a trial of proved verdicts returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from unbatch.verification.counterexample import Counterexample

PASSED = "passed"


@dataclass(frozen=True)
class Contradiction:
    """What a trial found against a verdict.

    ``detail``: in words. ``witness``: a counterexample, where the tests of ``verify`` have one.
    ``weights``: what the weights of a reduction depend on beside what was proved; it holds then.
    ``expected``: what was proved rests on a fact of this batch (no label is ignored), and the trial
    was to find that out: no bug.
    """

    detail: str
    witness: Counterexample | None = None
    weights: frozenset[str] = frozenset()
    expected: bool = False


# By verdict; empty where all passed. Or in words, why nothing could be tried.
Outcome = Mapping[str, Contradiction] | str
