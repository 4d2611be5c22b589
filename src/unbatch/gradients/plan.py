"""What a question about rows will do, and why: sites, backward passes, memory.

Frozen data and its text. Nothing is decided here.
"""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Group
from rich.table import Table
from rich.text import Text

from unbatch.rendering import as_text, in_bytes, in_time

# Where a site can stand, and what that costs.
WAYS = {
    "local": "samples are separate: one backward pass for all of them",
    "projected": "right below the topmost batch norm: its closed form",
    "pooled": "below the mixing frontier: one column a sample, contracted without autograd",
    "columns": "below the mixing frontier: one column a sample, pulled back by autograd",
    "model": "one column a sample, pulled back through the whole model by autograd",
}


@dataclass(frozen=True)
class SitePlan:
    """A parameter use site: ``kind`` is how it is contracted, ``way`` a key of ``WAYS``."""

    parameters: tuple[str, ...]
    module: str
    op: str
    kind: str
    way: str


@dataclass(frozen=True)
class Plan:
    """What will be done: ``pullbacks`` backward passes, ``at_once`` of which share one call.

    ``results``, ``temporary``, ``budget``: bytes, predicted, of what is returned, of rows and
    columns beside it, and of what these may take. ``reason``: why this plan, in words.
    ``seconds``: that all backward passes take, by one that was timed; None where none could be.
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
    seconds: float | None = None

    @property
    def memory(self) -> int:
        """Return the bytes that are predicted in all."""
        return self.results + self.temporary

    def __rich__(self) -> Group:
        parts: list[Table | Text] = [Text(self._headline()), self._table()]
        # The legend has only the ways that occur, in the order from cheap to expensive.
        ways = {site.way for site in self.sites}
        for way, meaning in WAYS.items():
            if way in ways:
                parts.append(Text(f"{way}: {meaning}"))
        parts.append(Text(self._memory_line()))
        if self.seconds is not None:
            parts.append(
                Text(f"time: some {in_time(self.seconds)}, by a backward pass that was timed")
            )
        return Group(*parts)

    def _headline(self) -> str:
        count = f"{self.pullbacks} pullback"
        if self.pullbacks > 1:
            count += f"s, {self.at_once} at a time"
        return f"{self.what} by {self.by} of {self.samples} samples: {count}. {self.reason}"

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False)
        for column in ("parameters", "module", "op", "contraction", "way"):
            table.add_column(column, overflow="fold")
        for site in self.sites:
            parameters, module = ", ".join(site.parameters), site.module or "-"
            table.add_row(parameters, module, site.op, site.kind, site.way)
        return table

    def _memory_line(self) -> str:
        results, temporary = in_bytes(self.results), in_bytes(self.temporary)
        return f"memory: {results} results, {temporary} temporary, budget {in_bytes(self.budget)}"

    def __str__(self) -> str:
        return as_text(self.__rich__())
