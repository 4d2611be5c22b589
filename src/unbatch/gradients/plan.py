"""What a question about rows will do, and why: which sites go which way, how many pullbacks, how much memory.

Frozen data and its text. Nothing is decided here.
"""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Group
from rich.table import Table
from rich.text import Text

from unbatch.rendering import as_text

WAYS = {
    "local": "samples are separate: one sweep for all of them",
    "projected": "right below the topmost batch norm: its closed form",
    "pooled": "below the last mixing: one column a sample, contracted without autograd",
    "columns": "below the last mixing: one column a sample, pulled back by autograd",
    "model": "one column a sample, pulled back through the whole model by autograd",
}


@dataclass(frozen=True)
class SitePlan:
    """One place where parameters meet samples: ``kind`` is how it is contracted, ``way`` a key of ``WAYS``."""

    parameters: tuple[str, ...]
    module: str
    op: str
    kind: str
    way: str


@dataclass(frozen=True)
class Plan:
    """``pullbacks``: backward passes in all, columns counted one by one; ``at_once`` columns share one call.

    ``memory``: predicted bytes, of the ``results`` and of temporary ``rows`` and columns beside them.
    """

    by: str
    samples: int
    sites: tuple[SitePlan, ...]
    pullbacks: int
    at_once: int
    results: int
    temporary: int
    budget: int
    reason: str
    what: str = "Rows"

    @property
    def memory(self) -> int:
        return self.results + self.temporary

    def __rich__(self) -> Group:
        table = Table(box=None, pad_edge=False)
        for column in ("parameters", "module", "op", "contraction", "way"):
            table.add_column(column, overflow="fold")
        for site in self.sites:
            table.add_row(
                ", ".join(site.parameters), site.module or "-", site.op, site.kind, site.way
            )
        legend = [
            Text(f"{way}: {WAYS[way]}") for way in WAYS if any(s.way == way for s in self.sites)
        ]
        plural = "s" if self.pullbacks > 1 else ""
        together = f", {self.at_once} at a time" if self.pullbacks > 1 else ""
        count = f"{self.pullbacks} pullback{plural}{together}"
        return Group(
            Text(f"{self.what} by {self.by} of {self.samples} samples: {count}. {self.reason}"),
            table,
            *legend,
            Text(
                f"memory: {_size(self.results)} results, {_size(self.temporary)} temporary, budget {_size(self.budget)}"
            ),
        )

    def __str__(self) -> str:
        return as_text(self.__rich__())


def _size(count: int) -> str:
    size, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
