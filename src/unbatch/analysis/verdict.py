"""One answer about a structure, and the places in a program that stand in its way: frozen data.

All six answers together are in ``structure.py``; who judges is in ``inference.py``.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

# The names of the six structures, as people read them.
TITLES = {
    "canonical_split": "canonical split",
    "independent_forward": "independent forward",
    "simd_forward": "SIMD forward",
    "simd_given_statistics": "SIMD given statistics",
    "reduction": "reduction",
    "simd_loss": "SIMD loss",
}


@dataclass(frozen=True)
class Culprit:
    """One place in the user's program that stands in the way of a structure, and the remedy.

    ``module``: its path in the model. ``where``: file and line, "" where the user has none there.
    """

    module: str
    op: str
    where: str
    why: str
    remedy: str

    @property
    def short(self) -> str:
        """File and line without the folders in front."""
        file, _, line = self.where.rpartition(":")
        if not file:
            return ""
        return f"{os.path.basename(file)}:{line}"


@dataclass(frozen=True)
class Verdict:
    """The answer about one structure; true in a boolean context only where it holds.

    ``status``: "holds", "fails" or "unknown". ``basis``: "proved", "witness" or "assumed", "" where
    the status is unknown. ``weights_depend_on``: what of other samples ("targets", "inputs") enters
    the weights of a reduction; in the verdict on the SIMD loss, its terms. ``trial``: "passed"
    where what is proved was tried on another batch, else why that was not possible; "" where
    nothing is proved.
    """

    name: str
    status: str
    basis: str = ""
    culprits: tuple[Culprit, ...] = ()
    note: str = ""
    weights_depend_on: frozenset[str] = frozenset()
    trial: str = ""

    # "unknown" is false as "fails" is: code that asks ``if structure.reduction`` is safe without
    # knowing that there are three answers.
    def __bool__(self) -> bool:
        return self.status == "holds"

    def __str__(self) -> str:
        title = TITLES.get(self.name, self.name.replace("_", " "))
        text = f"{title}: {self.status}"
        if self.basis:
            text += f" ({self.shown_basis})"
        if self.note:
            text += f", {self.note}"
        return text

    @property
    def shown_basis(self) -> str:
        """The basis as people read it: with the reason why it was not tried, if it was not."""
        if self.trial in ("", "passed"):
            return self.basis
        return f"{self.basis}, not tried: {self.trial}"

    def located(self, where: str) -> Verdict:
        """Return the verdict with ``where`` as the place of culprits that have none."""
        # A place that is known is nearer to the fault than the one that all would get.
        culprits = []
        for culprit in self.culprits:
            if not culprit.where:
                culprit = replace(culprit, where=where)
            culprits.append(culprit)
        return replace(self, culprits=tuple(culprits))

    def to_dict(self) -> dict[str, Any]:
        """Return the verdict as plain data, for JSON."""
        return {
            "status": self.status,
            "basis": self.basis,
            "trial": self.trial,
            "note": self.note,
            "culprits": [vars(c) for c in self.culprits],
            "weights_depend_on": sorted(self.weights_depend_on),
        }
