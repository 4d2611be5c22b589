"""From quantities to answers: which rows are formed when, in what chunks, and what they are called.

Quantities are fed with the parts of a source and never see networks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from unbatch.autodiff.contractions.row_block import RowBlock
from unbatch.curvature.ggn_quantities import ColumnQuantity, feed_quantities
from unbatch.curvature.strategy import Curvature
from unbatch.gradients.plan import Plan
from unbatch.gradients.quantities import (
    About,
    Basic,
    Collector,
    Derived,
    Gradients,
    Label,
    Quantity,
    about_of,
)
from unbatch.gradients.request import Request, source_of
from unbatch.gradients.sources import CHUNK, Chunking

# --- answering ------------------------------------------------------------------------------------


def answer(
    request: Request, quantities: Sequence[Quantity], label: Label, out: Mapping[str, Tensor]
) -> list[Any]:
    """Feed all quantities from one source; return the results in their order."""
    source, curvature = source_of(request), Curvature(request)
    about = about_of(request, source, label, out)
    asked = [_Asked.of(q) for q in quantities]
    basics = _basics(asked)
    columns = _of_columns(basics)
    if columns:
        compressed = any(q.tolerance is not None for q in columns)
        curvature.share_forward(source, len(columns) < len(basics), compressed)
    for quantity in columns:
        quantity.check(curvature)
    collectors = {q: q.start(about) for q in basics}
    rows = {q: c for q, c in collectors.items() if not isinstance(q, ColumnQuantity)}
    if rows:
        chunks = _chunks(asked, request.memory)
        _feed(about, list(rows.values()), chunks, request.parameters, last=not columns)
    fed = {q: collectors[q] for q in columns}
    feed_quantities(curvature, source, fed, request.parameters)
    results: dict[Quantity, Any] = {q: c.finish() for q, c in collectors.items()}
    return [a.value(results, about) for a in asked]


def _of_columns(basics: Sequence[Basic]) -> list[ColumnQuantity]:
    return [q for q in basics if isinstance(q, ColumnQuantity)]


@dataclass
class _Asked:
    """A quantity, and those it is made from, as they were at the start of the question."""

    quantity: Quantity
    bases: list[_Asked]

    @staticmethod
    def of(quantity: Quantity) -> _Asked:
        below = quantity.bases() if isinstance(quantity, Derived) else ()
        return _Asked(quantity, [_Asked.of(b) for b in below])

    @property
    def is_late(self) -> bool:
        return self.quantity.late or any(b.is_late for b in self.bases)

    def basics(self) -> list[Basic]:
        if isinstance(self.quantity, Basic):
            return [self.quantity]
        return [b for asked in self.bases for b in asked.basics()]

    def value(self, found: dict[Quantity, Any], about: About) -> Any:
        if self.quantity not in found:
            assert isinstance(self.quantity, Derived)
            found[self.quantity] = self.quantity.combine(
                about, *(b.value(found, about) for b in self.bases)
            )
        return found[self.quantity]


def _basics(asked: Sequence[_Asked]) -> list[Basic]:
    """The basic quantities behind all that is asked, each once; rows first, so that others find them formed."""
    found = dict.fromkeys(b for a in asked for b in a.basics())
    return sorted(found, key=lambda b: b.needs != "rows")


def _feed(
    about: About,
    collectors: Sequence[Collector],
    chunks: Chunking,
    parameters: Mapping[str, Tensor],
    last: bool,
) -> None:
    """Feed all rows; those of parameters that no prediction depends on are zero."""
    fed = set()

    def take(name: str, part: RowBlock) -> None:
        fed.add(name)
        for collector in collectors:
            collector.take(name, part)

    about.source.feed(chunks, take, about.out, last=last)
    for name, p in parameters.items():
        if name in fed:
            continue
        zero = p.detach().new_zeros(1, *p.shape).expand(about.samples, *p.shape)
        take(name, RowBlock(slice(0, about.samples), zero.clone() if chunks.keep else zero))


def planned(request: Request, quantities: Sequence[Quantity]) -> Plan:
    """Return what ``answer`` would do, in numbers and words."""
    source, curvature = source_of(request), Curvature(request)
    parameters, samples, memory = request.parameters, request.samples, request.memory
    asked = [_Asked.of(q) for q in quantities]
    chunks, basics = _chunks(asked, memory), _basics(asked)
    curved = _of_columns(basics)
    if curved:
        curvature.share_forward(source, rows=True)  # the plan needs the sites of the source
    passes, at_once = source.pullbacks(chunks) if len(curved) < len(basics) else (0, 1)
    reasons = [source.reason] if passes else []
    for root in dict.fromkeys(q.root_in(curvature) for q in curved):
        more, why = curvature.plan(root, source, chunks)
        passes, reasons = passes + more, [*reasons, why]
    row = sum(p.numel() * p.element_size() for p in parameters.values())
    largest = max(p.numel() * p.element_size() for p in parameters.values())
    sizes = {
        "rows": samples * row,
        "squared_norms": samples * len(parameters) * 4,
        "dots": samples**2 * 4,
    }
    results = sum(
        sizes["rows"] if isinstance(q, Gradients) else sizes.get(q.needs, row) for q in basics
    )
    formed = (
        samples * row
        if chunks.pairs
        else at_once * row
        if passes > 1
        else min(samples * largest, memory, CHUNK)
    )
    temporary = 0 if chunks.keep and passes == 1 else formed
    what = "Rows" if len(curved) < len(basics) else "Columns of the Gauss-Newton factor"
    sites = tuple(source.sites())
    return Plan(
        request.by,
        samples,
        sites,
        passes,
        at_once,
        results,
        temporary,
        memory,
        " ".join(reasons),
        what,
    )


def _chunks(asked: Sequence[_Asked], memory: int) -> Chunking:
    basics = [b for b in _basics(asked) if not isinstance(b, ColumnQuantity)]
    keep = any(isinstance(q, Gradients) for q in basics)
    late = any(a.is_late for a in asked)
    return Chunking(
        frozenset(q.needs for q in basics), memory, keep, any(q.pairs for q in basics), late
    )
