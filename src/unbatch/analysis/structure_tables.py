"""The printed report of a structure: its parts as tables, and the words and marks in them.

The report in a notebook, the command line and the HTML report are made of these parts. What they
show is the frozen data of ``verdict.py`` and ``consequence_facts.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from unbatch.analysis import consequence_table
from unbatch.analysis.consequence_facts import PART, Consequence
from unbatch.analysis.verdict import TITLES, Culprit, Verdict

STYLES = {
    "holds": "green",
    "fails": "red",
    "unknown": "yellow",
    "exact": "green",
    "renamed": "cyan",
    "estimate": "yellow",
    "none": "red",
}

NAMED = 4  # modules in a row of culprits; more are counted

JOINED = (
    "The Gauss-Newton matrix of the whole loss includes them: H joins what has no sample axis. "
    "Rows of the gradient leave their part to `rest`."
)

MARKS = {"holds": "✓", "fails": "✗", "unknown": "?"}


def heading(samples: int, predictions: Iterable[tuple[int, ...]]) -> Text:
    """Return what a structure is of: the batch, and the shapes of the predictions."""
    shapes = ", ".join(str(list(shape)) for shape in predictions)
    return Text(f"Structure of the loss on a batch of {samples}; predictions {shapes}")


def verdict_table(verdicts: Iterable[Verdict]) -> Table:
    """Return one row for each of the six verdicts."""
    # Mark and word both: colours are lost in a file, and marks alone have to be learned.
    table = _plain_table("structure", "verdict", "basis", "note")
    for verdict in verdicts:
        status = Text(f"{MARKS[verdict.status]} {verdict.status}", STYLES[verdict.status])
        table.add_row(TITLES[verdict.name], status, verdict.shown_basis, verdict.note)
    return table


def _plain_table(*columns: str, title: str | None = None) -> Table:
    table = Table(box=None, pad_edge=False, title=title, title_justify="left")
    # Folded, not cut off: a reason without its end is none.
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def by_kind(verdicts: Iterable[Verdict]) -> list[tuple[list[Culprit], list[str]]]:
    """Return culprits of one kind together, and the titles of the structures that they are against.

    Of one kind are culprits that differ in where they stand and in the numbers of their text.
    """
    # An example: a net with twenty batch norms has twenty culprits against the same structures.
    # They are one row, with the places in it.
    kinds: dict[tuple[str, str, str], tuple[list[Culprit], list[str]]] = {}
    for verdict in verdicts:
        title = TITLES[verdict.name]
        for culprit in verdict.culprits:
            # How many statistics there are, say, is no reason for a row of its own.
            kind = (culprit.op, re.sub(r"\d+", "", culprit.why), culprit.remedy)
            culprits, against = kinds.setdefault(kind, ([], []))
            if culprit not in culprits:
                culprits.append(culprit)
            if title not in against:
                against.append(title)
    return list(kinds.values())


def culprit_part(verdicts: Iterable[Verdict], most: int = 12) -> list[Any]:
    """Return a table with each kind of culprit once; nothing where there is none.

    A row has the places of its kind, and the structures that it stands in the way of.
    """
    kinds = by_kind(verdicts)
    if not kinds:
        return []
    table = _plain_table(
        "module", "op", "where", "why, and what to do", "against", title="culprits"
    )
    for culprits, against in kinds[:most]:
        first = culprits[0]
        explanation = f"{first.why}. {first.remedy}"
        table.add_row(
            _module_names(culprits), first.op, first.short or "-", explanation, ", ".join(against)
        )
    if len(kinds) > most:
        more = f"and {len(kinds) - most} more kinds, see the verdicts' `.culprits`"
        table.add_row("…", "", "", more, "")
    return [table]


def _module_names(culprits: Sequence[Culprit]) -> str:
    """Return the first modules of the culprits, one a line, and how many culprits are left out."""
    # Culprits are counted, not modules: several may stand in one module.
    modules = list(dict.fromkeys(c.module or "-" for c in culprits))[:NAMED]
    more = len(culprits) - len(modules)
    if more:
        modules.append(f"+{more} more")
    return "\n".join(modules)


def joined_part(joined: Sequence[str]) -> list[Text]:
    """Return which outputs have no axis of samples, and what that means; nothing for none."""
    if not joined:
        return []
    return [Text(f"without a sample axis: {', '.join(joined)}. {JOINED}")]


def remarks(
    assumptions: Sequence[str],
    custom_rules: Sequence[str],
    unknown_ops: Sequence[str],
    notes: Iterable[str],
) -> list[Text]:
    """Return what the verdicts rest on beside the rules of this package, and their notes."""
    entries = {
        "assumed": assumptions,
        "rules of your own": custom_rules,
        "ops without a rule": unknown_ops,
    }
    lines = []
    for title, names in entries.items():
        # Nothing is said of what there is not: most reports have none of these lines.
        if names:
            lines.append(Text(f"{title}: {', '.join(names)}"))
    lines.extend(Text(f"note: {note}") for note in notes)
    return lines


def follows_part(consequences: Sequence[Consequence]) -> Table:
    """Return the quantities by what becomes of them; the star marks what this release computes."""
    table = Table(
        box=None,
        pad_edge=False,
        title="what follows (* computed by this release)",
        title_justify="left",
    )
    table.add_column("", overflow="fold", min_width=24)
    table.add_column("", overflow="fold")
    for outcome, words in consequence_table.OUTCOMES.items():
        # In the order of the outcomes, the best first; one that no quantity has gets no row.
        style = STYLES.get(outcome, "yellow")
        whole, parts = _by_part(consequences, outcome)
        if whole:
            table.add_row(Text(words, style), ", ".join(_starred_name(c) for c in whole))
        if parts:
            # Their long name stands in front of the row, once for all of them.
            if outcome == "renamed":
                words = "exact"
            names = ", ".join(_starred(c) for c in parts)
            table.add_row(Text(words + PART, style), names)
    return table


def _by_part(
    consequences: Iterable[Consequence], outcome: str
) -> tuple[list[Consequence], list[Consequence]]:
    """Return those with one outcome: of whole quantities, and of parts through the predictions."""
    whole, parts = [], []
    for consequence in consequences:
        if consequence.outcome != outcome:
            continue
        if consequence.name == consequence.quantity + PART:
            parts.append(consequence)
        else:
            whole.append(consequence)
    return whole, parts


def _starred(consequence: Consequence) -> str:
    return consequence.quantity + "*" * consequence.available


def _starred_name(consequence: Consequence) -> str:
    """Return the quantity with the name that its result carries where that is another."""
    if consequence.outcome == "renamed":
        return f"{_starred(consequence)} (as {consequence.name})"
    return _starred(consequence)
