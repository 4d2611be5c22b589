"""What the command line and the demo print and hand on: verifications as a table, everything as plain data.

How a structure looks is decided in `verdicts.py`. Nothing is computed here.
"""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from unbatch.verdicts import MARKS, NAMES, STYLES, TITLES, Structure
from unbatch.verify import Check, Verification

WIDTH = 110  # of what is written to a file or a pipe, where there is no terminal to ask

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
    return check.detail if check.witness is not None or not check.test else f"{check.test}: {check.detail}"


def outcome(check: Check) -> str:
    """Passed, not tested, or contradicted, in words."""
    return OUTCOMES[check.passed].plain.partition(" ")[2]


def untested(structure: Structure, name: str) -> Check:
    """The check of a verdict for which there is no numerical test, with the reason."""
    forward = name in ("independent_forward", "simd_forward", "simd_given_statistics")
    reason = NO_TEST.get(name) or NO_TEST["one sample" if forward and structure.samples == 1 else "loss"]
    return Check(name, getattr(structure, name).status, "", None, reason)


def as_dict(structure: Structure, verification: Verification | None) -> dict[str, Any]:
    """``structure.to_dict()``, with the checks under "verification" (None where there was none), for JSON."""
    checks = None if verification is None else [_check_dict(check) for check in verification.checks]
    return structure.to_dict() | {"verification": checks}


def _check_dict(check: Check) -> dict[str, Any]:
    return vars(check) | {"witness": None if check.witness is None else dict(vars(check.witness))}
