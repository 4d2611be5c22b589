"""The answer to a structure question: six verdicts, culprits with a reason and a remedy, and batch statistics.

Frozen data only, and the texts that explain a culprit. Nothing is computed here.
"""

from __future__ import annotations

import html
import os
import re
from dataclasses import dataclass, replace
from typing import Any, overload

from rich.console import Group
from rich.table import Table
from rich.text import Text

from unbatch.analysis import consequence_table, consequences
from unbatch.errors import InputError
from unbatch.rendering import as_html, as_text

NAMES = consequence_table.STRUCTURES


@dataclass(frozen=True)
class Culprit:
    """One place in the user's program that stands in the way of a structure, and what to do about it."""

    module: str
    op: str
    where: str
    why: str
    remedy: str

    @property
    def short(self) -> str:
        """File and line without the folders in front."""
        file, _, line = self.where.rpartition(":")
        return f"{os.path.basename(file)}:{line}" if file else ""


@dataclass(frozen=True)
class Verdict:
    """``status`` is "holds", "fails" or "unknown"; ``basis`` "proved", "witness" or "assumed" ("" where unknown).

    ``weights_depend_on``: what of other samples ("targets", "inputs") enters the weights of a reduction; in SIMD loss,
    the terms. True in a boolean context only when it holds.
    """

    name: str
    status: str
    basis: str = ""
    culprits: tuple[Culprit, ...] = ()
    note: str = ""
    weights_depend_on: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return self.status == "holds"

    def __str__(self) -> str:
        said = f"{TITLES.get(self.name, self.name.replace('_', ' '))}: {self.status}"
        return (
            said
            + (f" ({self.basis})" if self.basis else "")
            + (f", {self.note}" if self.note else "")
        )


@dataclass(frozen=True)
class BatchStatistic:
    """Numbers through which samples listen to each other: ``size`` of them, each over ``samples`` samples."""

    module: str
    op: str
    where: str
    size: int
    samples: int
    grouped: bool


@dataclass(frozen=True, repr=False)
class Structure:
    """Everything known about the structure of one loss on one batch."""

    canonical_split: Verdict
    independent_forward: Verdict
    simd_forward: Verdict
    simd_given_statistics: Verdict
    reduction: Verdict
    simd_loss: Verdict
    samples: int
    predictions: tuple[tuple[int, ...], ...]
    statistics: tuple[BatchStatistic, ...] = ()
    assumptions: tuple[str, ...] = ()
    custom_rules: tuple[str, ...] = ()
    unknown_ops: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """All six, in the order of the report."""
        return tuple(getattr(self, name) for name in NAMES)

    @property
    def statistics_size(self) -> int:
        """R: how many batch statistics there are in all."""
        return sum(s.size for s in self.statistics)

    @property
    def statuses(self) -> dict[str, str]:
        """The verdicts as the table of consequences takes them."""
        out = {v.name: v.status for v in self.verdicts}
        others = self.reduction.weights_depend_on | self.simd_loss.weights_depend_on
        return out | {"own_weights": "fails" if others else "holds"}

    @overload
    def follows(self, quantity: None = None) -> tuple[consequence_table.Consequence, ...]: ...

    @overload
    def follows(self, quantity: str) -> consequence_table.Consequence: ...

    def follows(self, quantity: str | None = None) -> Any:
        """Which quantities exist, under which name, exact or not, and why; or that for the one called ``quantity``.

        ``print(structure)`` has them as a table. Raises ``InputError`` where no quantity has this name.
        """
        if quantity is None:
            return consequences.follows(self.statuses)
        try:
            return consequences.consequence(quantity, self.statuses)
        except KeyError as error:
            raise InputError(error.args[0]) from None

    def with_verdicts(self, *verdicts: Verdict) -> Structure:
        changes: dict[str, Any] = {v.name: v for v in verdicts}
        return replace(self, **changes)

    def no_more_than(self, other: Structure) -> Structure:
        """Where ``other``, of a recording that stands for this one too, shows less, so much and no more."""
        theirs = {v.name: v for v in other.verdicts}
        return self.with_verdicts(
            *(theirs[v.name] for v in self.verdicts if v and not theirs[v.name])
        )

    def located(self, where: str) -> Structure:
        """Culprits without a line of the user's code (a model made of library modules only) point to ``where``."""
        found = (
            replace(
                v, culprits=tuple(c if c.where else replace(c, where=where) for c in v.culprits)
            )
            for v in self.verdicts
        )
        return self.with_verdicts(*found)

    def __rich__(self) -> Group:
        return Group(*render(self))

    def __repr__(self) -> str:
        said = ", ".join(f"{TITLES[v.name]} {MARKS[v.status]}" for v in self.verdicts)
        return f"Structure({self.samples} samples: {said}; print it for the report)"

    def __str__(self) -> str:
        return as_text(self.__rich__())

    def _repr_html_(self) -> str:
        """The printed report, in a notebook."""
        said = html.escape("; ".join(map(str, self.verdicts)), quote=True)
        return as_html(self.__rich__(), f"Structure of the loss: {said}")

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data, for JSON."""
        return {
            "samples": self.samples,
            "predictions": [list(p) for p in self.predictions],
            "verdicts": {v.name: _verdict_dict(v) for v in self.verdicts},
            "statistics": [vars(s) for s in self.statistics],
            "statistics_size": self.statistics_size,
            "assumptions": list(self.assumptions),
            "custom_rules": list(self.custom_rules),
            "unknown_ops": list(self.unknown_ops),
            "notes": list(self.notes),
            "follows": [
                {
                    "quantity": c.quantity,
                    "outcome": c.outcome,
                    "name": c.name,
                    "reason": c.reason,
                    "peers": list(c.peers),
                    "available": c.available,
                    "depends_on": list(c.depends_on),
                }
                for c in self.follows()
            ],
        }


def _verdict_dict(v: Verdict) -> dict[str, Any]:
    return {
        "status": v.status,
        "basis": v.basis,
        "note": v.note,
        "culprits": [vars(c) for c in v.culprits],
        "weights_depend_on": sorted(v.weights_depend_on),
    }


# --- as text --------------------------------------------------------------------------------------


STYLES = {
    "holds": "green",
    "fails": "red",
    "unknown": "yellow",
    "exact": "green",
    "renamed": "cyan",
    "estimate": "yellow",
    "none": "red",
}


NAMED = 4  # modules in a row of culprits


MARKS = {"holds": "✓", "fails": "✗", "unknown": "?"}


TITLES = {
    "canonical_split": "canonical split",
    "independent_forward": "independent forward",
    "simd_forward": "SIMD forward",
    "simd_given_statistics": "SIMD given statistics",
    "reduction": "reduction",
    "simd_loss": "SIMD loss",
}


def render(structure: Structure) -> list[Any]:
    """The parts of the printed report: heading, verdicts, culprits, assumptions and notes, what follows."""
    return [
        heading(structure),
        verdict_table(structure),
        *culprit_part(structure),
        *remarks(structure),
        follows_part(structure),
    ]


def heading(structure: Structure) -> Text:
    shapes = ", ".join(str(list(p)) for p in structure.predictions)
    return Text(f"Structure of the loss on a batch of {structure.samples}; predictions {shapes}")


def verdict_table(structure: Structure) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("structure", "verdict", "basis", "note"):
        table.add_column(column, overflow="fold")
    for v in structure.verdicts:
        table.add_row(
            TITLES[v.name], Text(f"{MARKS[v.status]} {v.status}", STYLES[v.status]), v.basis, v.note
        )
    return table


def by_kind(structure: Structure) -> list[tuple[list[Culprit], list[str]]]:
    """Culprits that are alike but for where they stand, and the titles of the structures that they are against."""
    kinds: dict[tuple[str, str, str], tuple[list[Culprit], list[str]]] = {}
    for v in structure.verdicts:
        for c in v.culprits:
            found, against = kinds.setdefault((c.op, re.sub(r"\d+", "", c.why), c.remedy), ([], []))
            found.append(c) if c not in found else None
            against.append(TITLES[v.name]) if TITLES[v.name] not in against else None
    return list(kinds.values())


def culprit_part(structure: Structure, most: int = 12) -> list[Any]:
    """Each kind of culprit once, with the places where it stands and the structures it stands in the way of."""
    kinds = by_kind(structure)
    if not kinds:
        return []
    table = Table(box=None, pad_edge=False, title="culprits", title_justify="left")
    for column in ("module", "op", "where", "why, and what to do", "against"):
        table.add_column(column, overflow="fold")
    for found, against in kinds[:most]:
        first, modules = found[0], list(dict.fromkeys(c.module or "-" for c in found))
        more = len(found) - len(modules[:NAMED])
        named = modules[:NAMED] + ([f"+{more} more"] if more else [])
        table.add_row(
            "\n".join(named),
            first.op,
            first.short or "-",
            f"{first.why}. {first.remedy}",
            ", ".join(against),
        )
    if len(kinds) > most:
        table.add_row(
            "…", "", "", f"and {len(kinds) - most} more kinds, see the verdicts' `.culprits`", ""
        )
    return [table]


def remarks(structure: Structure) -> list[Text]:
    entries = {
        "assumed": structure.assumptions,
        "rules of your own": structure.custom_rules,
        "ops without a rule": structure.unknown_ops,
    }
    listed = [Text(f"{title}: {', '.join(found)}") for title, found in entries.items() if found]
    return listed + [Text(f"note: {note}") for note in structure.notes]


def follows_part(structure: Structure) -> Table:
    """Quantities by what becomes of them; the star marks what this release computes."""
    table = Table(
        box=None,
        pad_edge=False,
        title="what follows (* computed by this release)",
        title_justify="left",
    )
    table.add_column("", overflow="fold", min_width=24)
    table.add_column("", overflow="fold")
    for outcome, words in consequence_table.OUTCOMES.items():
        found = [c for c in structure.follows() if c.outcome == outcome]
        parts = [c for c in found if c.name == c.quantity + consequence_table.PART]
        names = [
            _named(c) + (f" (as {c.name})" if outcome == "renamed" else "")
            for c in found
            if c not in parts
        ]
        style = STYLES.get(outcome, "yellow")
        if names:
            table.add_row(Text(words, style), ", ".join(names))
        if parts:
            words = "exact" if outcome == "renamed" else words
            table.add_row(
                Text(words + consequence_table.PART, style), ", ".join(map(_named, parts))
            )
    return table


def _named(c: consequence_table.Consequence) -> str:
    return c.quantity + "*" * c.available


# --- why, and what to do --------------------------------------------------------------------------
