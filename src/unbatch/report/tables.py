"""What the command line, the demo and the page say about results: as tables, as cells in the same words and digits.

How a structure looks is decided in `verdicts.py`. Results come from the problem; here they are summed and compared.
"""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from unbatch.analysis.structure import MARKS, NAMES, STYLES, TITLES, Structure
from unbatch.curvature.spectrum import Directions
from unbatch.gradients.results import Rows
from unbatch.verification.verify import Check, Verification

WIDTH = 110  # of what is written to a file or a pipe, where there is no terminal to ask


MEANINGS = {
    "canonical_split": "after the predictions no parameter enters the loss",
    "independent_forward": "no prediction listens to another sample",
    "simd_forward": "... and every sample is treated by the same function",
    "simd_given_statistics": "... once a few numbers about the batch (its statistics) are given",
    "reduction": "the loss is a weighted sum of one term per sample",
    "simd_loss": "each prediction enters the loss through one number, the same function for all",
}


OUTCOMES = {
    True: Text("✓ passed", "green"),
    None: Text("– not tested", "yellow"),
    False: Text("✗ CONTRADICTED", "bold red"),
}


NO_TEST = {
    "canonical_split": "there is no experiment for it: it is read off the computation",
    "one sample": "one sample has no others to listen to",
    "loss": "the loss does not depend on predictions that could be varied",
}


def console() -> Console:
    """Standard output: as wide as the terminal, or `WIDTH` where there is none."""
    plain = Console(highlight=False)
    return plain if plain.is_terminal else Console(highlight=False, width=WIDTH)


def verification_table(structure: Structure, verification: Verification) -> Table:
    """One row per verdict: passed, not tested and why, or contradicted and by what."""
    checks = {check.name: check for check in verification.checks}
    table = Table(box=None, pad_edge=False)
    for column in ("structure", "verdict", "test", "what was done and seen"):
        table.add_column(column, overflow="fold")
    for name in NAMES:
        check = checks.get(name) or untested(structure, name)
        verdict = Text(f"{MARKS[check.status]} {check.status}", STYLES[check.status])
        table.add_row(TITLES[name], verdict, OUTCOMES[check.passed], seen(check))
    return table


def seen(check: Check) -> str:
    """A witness says itself what was done."""
    return (
        check.detail
        if check.witness is not None or not check.test
        else f"{check.test}: {check.detail}"
    )


def outcome(check: Check) -> str:
    """Passed, not tested, or contradicted, in words."""
    return OUTCOMES[check.passed].plain.partition(" ")[2]


def untested(structure: Structure, name: str) -> Check:
    """The check of a verdict for which there is no numerical test, with the reason."""
    forward = name in ("independent_forward", "simd_forward", "simd_given_statistics")
    reason = (
        NO_TEST.get(name) or NO_TEST["one sample" if forward and structure.samples == 1 else "loss"]
    )
    return Check(name, getattr(structure, name).status, "", None, reason)


def as_dict(structure: Structure, verification: Verification | None) -> dict[str, Any]:
    """``structure.to_dict()``, with the checks under "verification" (None where there was none), for JSON."""
    checks = None if verification is None else [_check_dict(check) for check in verification.checks]
    return structure.to_dict() | {"verification": checks}


def _check_dict(check: Check) -> dict[str, Any]:
    return vars(check) | {"witness": None if check.witness is None else dict(vars(check.witness))}


# --- numbers --------------------------------------------------------------------------------------


NORMS = ("rows by", "called", "mean norm", "smallest", "largest", "sum against the gradient")


LARGEST = 3  # curvatures that are held against all


SHARES = (
    "eigenvalue", "slope", "γ_n smallest", "γ_n largest", "λ_n smallest", "λ_n mean", "λ_n largest",
    f"largest {LARGEST} hold",
)  # fmt: skip


def number(x: Tensor | float) -> str:
    return f"{float(x):.3g}"


def share(x: Tensor | float) -> str:
    """A relative difference: in per cent, or by its power of ten where that would be zero."""
    return f"{float(x):.0%}" if float(x) >= 0.01 else f"{float(x):.0e}" if float(x) else "0"


def norms(by: str, rows: Rows, gradient: Tensor) -> tuple[str, ...]:
    """How large rows are, and how far their sum is from the gradient; under ``NORMS``."""
    sizes, off = rows.flat().norm(dim=1), (rows.flat().sum(0) - gradient).norm() / gradient.norm()
    return (
        by,
        rows.kind,
        *map(number, (sizes.mean(), sizes.min(), sizes.max())),
        f"{share(off)} off",
    )


def distance(a: Rows, b: Rows) -> float:
    """Relative, by the Frobenius norm."""
    return float((a.flat() - b.flat()).norm() / a.flat().norm())


def shares(found: Directions, i: int) -> tuple[str, ...]:
    """What samples have of slope and curvature along the i-th eigenvector; under ``SHARES``."""
    slopes, curved = found.slopes[:, i], found.curvatures[:, i]
    held = curved.topk(min(LARGEST, len(curved))).values.sum() / curved.sum()
    sizes = (
        found.values[i],
        slopes.sum(),
        slopes.min(),
        slopes.max(),
        curved.min(),
        curved.mean(),
        curved.max(),
    )
    return *map(number, sizes), f"{float(held):.0%}"
