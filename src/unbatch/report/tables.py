"""Results in words and numbers, for the command line, the tour and the page alike.

The table of the verification, and the cells of tables of norms and of curvatures. How a structure
looks is decided in ``analysis/structure.py``, how a table looks in ``rendering.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from unbatch import rendering
from unbatch.analysis.structure import NAMES, Structure
from unbatch.analysis.structure_tables import MARKS, STYLES
from unbatch.analysis.verdict import TITLES
from unbatch.curvature.spectrum import Directions
from unbatch.gradients.results import Rows
from unbatch.verification.verify import Check, Verification

# What each verdict says, for who reads the word for the first time.
MEANINGS = {
    "canonical_split": "after the predictions no parameter enters the loss",
    "independent_forward": "no prediction depends on another sample",
    "simd_forward": "... and every sample is treated by the same function",
    "simd_given_statistics": "... once a few numbers about the batch (its statistics) are given",
    "reduction": "the loss is a weighted sum of one term per sample",
    "simd_loss": "each prediction enters the loss through one number, the same function for all",
}


# The signs of verdicts, so that colour is not all that tells outcomes apart.
OUTCOMES = {
    True: Text("✓ passed", "green"),
    None: Text("– not tested", "yellow"),
    False: Text("✗ CONTRADICTED", "bold red"),
}


FORWARD = ("independent_forward", "simd_forward", "simd_given_statistics")


# Why there is no numerical test of a verdict.
NO_TEST_OF_SPLIT = "there is no experiment for it: it is read off the computation"
NO_TEST_OF_ONE_SAMPLE = "one sample has no others to depend on"
NO_TEST_OF_LOSS = "the loss does not depend on predictions that could be varied"


def console() -> Console:
    """Return standard output: as wide as the terminal, or ``rendering.WIDTH`` without one."""
    plain = Console(highlight=False)
    if plain.is_terminal:
        return plain
    return Console(highlight=False, width=rendering.WIDTH)


# --- verification ---------------------------------------------------------------------------------


VERIFICATION_COLUMNS = ("structure", "verdict", "test", "what was done and seen")


def checks_of_all(structure: Structure, verification: Verification) -> list[Check]:
    """Return a check for each verdict, in the order of the verdicts, tested or not."""
    # A verification has checks of what could be tested only; a table has a row for every verdict.
    tested = {check.name: check for check in verification.checks}
    checks = []
    for name in NAMES:
        check = tested.get(name)
        if check is None:
            check = untested(structure, name)
        checks.append(check)
    return checks


def verification_table(structure: Structure, verification: Verification) -> Table:
    """Return one row per verdict: passed, not tested and why, or contradicted and by what."""
    rows = []
    for check in checks_of_all(structure, verification):
        verdict = Text(f"{MARKS[check.status]} {check.status}", STYLES[check.status])
        rows.append((TITLES[check.name], verdict, OUTCOMES[check.passed], experiment(check)))
    return rendering.table(VERIFICATION_COLUMNS, rows)


def experiment(check: Check) -> str:
    """Return what was done and seen; a witness says both itself."""
    if check.witness is not None or not check.test:
        return check.detail
    return f"{check.test}: {check.detail}"


def outcome(check: Check) -> str:
    """Return "passed", "not tested" or "CONTRADICTED"."""
    return OUTCOMES[check.passed].plain.partition(" ")[2]


def untested(structure: Structure, name: str) -> Check:
    """Return the check of a verdict for which there is no numerical test, with the reason."""
    reason = NO_TEST_OF_LOSS
    if name == "canonical_split":
        reason = NO_TEST_OF_SPLIT
    elif name in FORWARD and structure.samples == 1:
        reason = NO_TEST_OF_ONE_SAMPLE
    return Check(name, getattr(structure, name).status, "", None, reason)


def as_dict(structure: Structure, verification: Verification | None) -> dict[str, Any]:
    """Return ``structure.to_dict()`` with the checks under "verification", for JSON.

    None in place of the checks where there was no verification.
    """
    checks = None
    if verification is not None:
        checks = [_check_as_dict(check) for check in verification.checks]
    return structure.to_dict() | {"verification": checks}


def _check_as_dict(check: Check) -> dict[str, Any]:
    witness = None
    if check.witness is not None:
        witness = dict(vars(check.witness))
    return vars(check) | {"witness": witness}


# --- numbers as cells -----------------------------------------------------------------------------


NORM_COLUMNS = ("rows by", "called", "mean norm", "smallest", "largest", "sum against the gradient")


LARGEST = 3  # curvatures whose sum is compared with that of all


SHARE_COLUMNS = (
    "eigenvalue",
    "slope",
    "γ_n smallest",
    "γ_n largest",
    "λ_n smallest",
    "λ_n mean",
    "λ_n largest",
    f"largest {LARGEST} hold",
)


def number(x: Tensor | float) -> str:
    """Return a number in three digits."""
    return f"{float(x):.3g}"


def share(x: Tensor | float) -> str:
    """Return a relative difference in per cent, or by its power of ten where that would be 0 %."""
    x = float(x)
    if x >= 0.01:
        return f"{x:.0%}"
    if x:
        return f"{x:.0e}"
    return "0"


def norm_cells(by: str, rows: Rows, gradient: Tensor) -> tuple[str, ...]:
    """Return how large rows are, and how far their sum is from the gradient."""
    # Relative to the gradient: frozen rows are off by what flows through statistics, others by
    # rounding.
    flat = rows.flat()
    sizes = flat.norm(dim=1)
    difference = (flat.sum(0) - gradient).norm() / gradient.norm()
    return (
        by,
        rows.kind,
        number(sizes.mean()),
        number(sizes.min()),
        number(sizes.max()),
        f"{share(difference)} off",
    )


def distance(a: Rows, b: Rows) -> float:
    """Return the relative distance of two sets of rows in the Frobenius norm."""
    return float((a.flat() - b.flat()).norm() / a.flat().norm())


def share_cells(directions: Directions, i: int) -> tuple[str, ...]:
    """Return the samples' shares in slope and curvature along the i-th eigenvector."""
    slopes, curvatures = directions.slopes[:, i], directions.curvatures[:, i]
    largest = curvatures.topk(min(LARGEST, len(curvatures))).values
    return (
        number(directions.values[i]),
        number(slopes.sum()),
        number(slopes.min()),
        number(slopes.max()),
        number(curvatures.min()),
        number(curvatures.mean()),
        number(curvatures.max()),
        f"{float(largest.sum() / curvatures.sum()):.0%}",
    )


def share_rows(directions: Directions) -> list[tuple[str, ...]]:
    """Return the cells of all eigenvectors, those with the largest eigenvalue first."""
    count = len(directions.values)
    # Eigenvalues of directions ascend.
    return [share_cells(directions, i) for i in reversed(range(count))]


def nonzero(values: Tensor) -> Tensor:
    """Return the eigenvalues that are not zero up to rounding, from the largest down, in float64.

    An eigenvalue of D is rounded by about D times the machine precision, relative to the largest.
    """
    # Nothing is the largest of no eigenvalues.
    if not len(values):
        return values.detach().double().cpu()
    rounding = len(values) * torch.finfo(values.dtype).eps * values.abs().max()
    significant = values[values.abs() > rounding]
    return significant.detach().double().cpu().sort(descending=True).values
