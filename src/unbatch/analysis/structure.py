"""The answer to a structure question: six verdicts, their culprits, and the batch statistics.

Frozen data. Nothing is inferred here, see ``inference.py``; the texts that explain a culprit stand
in ``explanations.py``, and the printed report in ``structure_tables.py``.
"""

from __future__ import annotations

import html
from dataclasses import dataclass, replace
from typing import Any, overload

from rich.console import Group

from unbatch.analysis import consequence_facts, consequences
from unbatch.analysis.consequence_facts import Consequence
from unbatch.analysis.structure_tables import (
    MARKS,
    culprit_part,
    follows_part,
    heading,
    joined_part,
    remarks,
    verdict_table,
)
from unbatch.analysis.verdict import TITLES, Verdict
from unbatch.errors import InputError
from unbatch.rendering import as_html, as_text

# The order of the report: the split, then the forward pass, then the loss.
NAMES = consequence_facts.STRUCTURES


@dataclass(frozen=True)
class BatchStatistic:
    """Numbers through which samples interact: ``size`` of them, each over ``samples`` samples.

    ``grouped``: these are not the whole batch.
    """

    module: str
    op: str
    where: str
    size: int
    samples: int
    grouped: bool


@dataclass(frozen=True, repr=False)
class Structure:
    """The structure of one loss on one batch.

    ``predictions``: their shapes. ``joined``: in words, those that parameters move and that have no
    axis of samples; ``divides``: some output has one. ``assumptions``: modules and ops that the
    user declared to act on each sample alone. ``custom_rules``: ops whose rule was registered from
    outside. ``unknown_ops``: ops without a rule. ``joined_backward``: what lets other samples into
    the derivatives of a sample, though no prediction depends on them; empty where nothing does.
    """

    canonical_split: Verdict
    independent_forward: Verdict
    simd_forward: Verdict
    simd_given_statistics: Verdict
    reduction: Verdict
    simd_loss: Verdict
    samples: int
    predictions: tuple[tuple[int, ...], ...]
    statistics: tuple[BatchStatistic, ...] = ()
    joined: tuple[str, ...] = ()
    divides: bool = True
    assumptions: tuple[str, ...] = ()
    custom_rules: tuple[str, ...] = ()
    unknown_ops: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    joined_backward: str = ""

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """All six, in the order of the report."""
        return tuple(getattr(self, name) for name in NAMES)

    @property
    def statistics_size(self) -> int:
        """R: how many numbers the batch statistics are in all."""
        size = 0
        for statistic in self.statistics:
            size += statistic.size
        return size

    @property
    def joined_in_words(self) -> str:
        """The outputs without an axis of samples, one after the other."""
        return " and ".join(self.joined)

    @property
    def statuses(self) -> dict[str, str]:
        """The verdicts as the table of consequences takes them."""
        statuses = {v.name: v.status for v in self.verdicts}
        # The one fact of the table that is no verdict: what of other samples enters weights or
        # terms.
        weights = self.reduction.weights_depend_on or self.simd_loss.weights_depend_on
        depends = bool(weights) or bool(self.joined_backward)
        statuses["own_weights"] = "fails" if depends else "holds"
        return statuses

    @overload
    def follows(self, quantity: None = None) -> tuple[Consequence, ...]: ...

    @overload
    def follows(self, quantity: str) -> Consequence: ...

    def follows(self, quantity: str | None = None) -> Any:
        """Return which quantities exist, under which name, exact or not, and why.

        With ``quantity`` only that one. ``print(structure)`` has them as a table. Raises
        ``InputError`` where no quantity has this name.
        """
        # Worked out anew each time: the table is small, and a structure stays plain data.
        if quantity is None:
            return tuple(map(self._beside_joined, consequences.follows(self.statuses)))
        try:
            return self._beside_joined(consequences.consequence(quantity, self.statuses))
        except KeyError as error:
            # ``str`` of a KeyError is the repr of its message: quotation marks around a sentence.
            raise InputError(error.args[0]) from None

    def _beside_joined(self, consequence: Consequence) -> Consequence:
        if not self.joined:
            return consequence
        words = self.joined_in_words
        return consequences.beside_joined_outputs(consequence, words, self.divides)

    def with_verdicts(self, *verdicts: Verdict) -> Structure:
        """Return the structure with these verdicts in place of those of the same name."""
        changes: dict[str, Any] = {v.name: v for v in verdicts}
        return replace(self, **changes)

    def no_more_than(self, other: Structure) -> Structure:
        """Return the structure with only those verdicts holding that hold in ``other``, too.

        ``other`` is of a recording that stands for this one as well, on another execution path.
        """
        # The verdict of the other path as it stands, with its culprits: there they are true.
        weaker: list[Verdict] = []
        for verdict, theirs in zip(self.verdicts, other.verdicts, strict=True):
            if verdict and not theirs:
                weaker.append(theirs)
        return self.with_verdicts(*weaker)

    def located(self, where: str) -> Structure:
        """Return the structure with ``where`` as the place of culprits that have none.

        A model that is made of library modules only has no line of the user's code.
        """
        verdicts = [verdict.located(where) for verdict in self.verdicts]
        return self.with_verdicts(*verdicts)

    def __rich__(self) -> Group:
        return Group(
            heading(self.samples, self.predictions),
            verdict_table(self.verdicts),
            *culprit_part(self.verdicts),
            *joined_part(self.joined),
            *remarks(self.assumptions, self.custom_rules, self.unknown_ops, self.notes),
            follows_part(self.follows()),
        )

    def __repr__(self) -> str:
        # One line, for lists and tracebacks: the whole report is what ``print`` shows.
        marks = [f"{TITLES[v.name]} {MARKS[v.status]}" for v in self.verdicts]
        return f"Structure({self.samples} samples: {', '.join(marks)}; print it for the report)"

    def __str__(self) -> str:
        return as_text(self.__rich__())

    def _repr_html_(self) -> str:
        """The printed report, in a notebook."""
        label = html.escape("; ".join(map(str, self.verdicts)), quote=True)
        return as_html(self.__rich__(), f"Structure of the loss: {label}")

    def to_dict(self) -> dict[str, Any]:
        """Return the structure as plain data, for JSON."""
        return {
            "samples": self.samples,
            "predictions": [list(shape) for shape in self.predictions],
            "joined": list(self.joined),
            "verdicts": {v.name: v.to_dict() for v in self.verdicts},
            "statistics": [vars(s) for s in self.statistics],
            "statistics_size": self.statistics_size,
            "assumptions": list(self.assumptions),
            "custom_rules": list(self.custom_rules),
            "unknown_ops": list(self.unknown_ops),
            "notes": list(self.notes),
            "joined_backward": self.joined_backward,
            "follows": [_consequence_dict(c) for c in self.follows()],
        }


def _consequence_dict(consequence: Consequence) -> dict[str, Any]:
    return {
        "quantity": consequence.quantity,
        "outcome": consequence.outcome,
        "name": consequence.name,
        "reason": consequence.reason,
        "peers": list(consequence.peers),
        "available": consequence.available,
        "depends_on": list(consequence.depends_on),
    }
