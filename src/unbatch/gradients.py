"""From quantities to answers: which rows are formed when, in what chunks, and what they are called.

Quantities are fed with the parts of a source and never see networks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unbatch.columns import OfColumns, feed_columns
from unbatch.curvature import Curvature
from unbatch.parts import Part
from unbatch.plan import Plan
from unbatch.quantities import About, Basic, Collector, Derived, Gradients, Quantity
from unbatch.rows import real
from unbatch.sources import CHUNK, Chunks, Source

# --- answering ------------------------------------------------------------------------------------


@dataclass
class Label:
    """What the rows are called."""

    by: str
    kind: str
    note: str
    weights: Callable[[], Tensor | None]


def answer(
    source: Source, quantities: Sequence[Quantity], parameters: Mapping[str, Tensor], samples: int, label: Label,
    memory: int, out: Mapping[str, Tensor], curvature: Callable[[], Curvature],
) -> list[Any]:  # fmt: skip
    """Feed all quantities from one source; the results in their order."""
    sums: dict[str, Mapping[str, Tensor]] = {}
    like = next(iter(parameters.values())).detach()

    def gradient() -> Mapping[str, Tensor]:
        if "one" not in sums:
            sums["one"] = source.weighted_sum(like.new_ones(samples, dtype=torch.float64).to(real(like.dtype)))
        return sums["one"]

    note = "; ".join(filter(None, (label.note, source.note)))
    about = About(
        samples, {n: tuple(p.shape) for n, p in parameters.items()}, label.by, label.kind, note, label.weights,
        like, gradient, source.weighted_sum, source.rest, out, memory,
    )  # fmt: skip
    asked = [_Asked.of(q) for q in quantities]
    basic = _basics(asked)
    curved = [q for q in basic if isinstance(q, OfColumns)]
    for q in curved:
        q.check(curvature())
    collectors: dict[Basic, Collector] = {q: q.start(about) for q in basic}
    rows = {q: c for q, c in collectors.items() if not isinstance(q, OfColumns)}
    if rows:
        _feed(source, rows, _chunks(asked, memory), parameters, samples, out, last=not curved)
    ways = {q: (q.root_in(curvature()), q.basis_in(curvature())) for q in curved}
    for root, basis in dict.fromkeys(ways.values()):
        of = {q: collectors[q] for q in curved if ways[q] == (root, basis)}
        chunks = Chunks(frozenset(q.needs for q in of), memory, keep=False, pairs=any(q.pairs for q in of))
        columns = curvature().columns_of(source, basis, parameters)
        feed_columns(columns, curvature(), root, list(of.values()), chunks, parameters)
    found: dict[Quantity, Any] = {q: c.finish() for q, c in collectors.items()}
    return [a.value(found, about) for a in asked]


def is_moment(quantity: Quantity) -> bool:
    """It, or something it is made from, is a statistic over samples."""
    below = quantity.bases() if isinstance(quantity, Derived) else ()
    return quantity.moment or any(is_moment(b) for b in below)


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
            found[self.quantity] = self.quantity.combine(about, *(b.value(found, about) for b in self.bases))
        return found[self.quantity]


def _basics(asked: Sequence[_Asked]) -> list[Basic]:
    """The basic quantities behind all that is asked, each once; rows first, so that others find them formed."""
    found = dict.fromkeys(b for a in asked for b in a.basics())
    return sorted(found, key=lambda b: b.needs != "rows")


def _feed(
    source: Source, collectors: Mapping[Basic, Collector], chunks: Chunks, parameters: Mapping[str, Tensor],
    samples: int, out: Mapping[str, Tensor], last: bool,
) -> None:  # fmt: skip
    seen = set()

    def take(name: str, part: Part) -> None:
        seen.add(name)
        for collector in collectors.values():
            collector.take(name, part)

    source.feed(chunks, take, out, last=last)
    for name in [n for n in parameters if n not in seen]:
        zero = parameters[name].detach().new_zeros(1, *parameters[name].shape).expand(samples, *parameters[name].shape)
        take(name, Part(slice(0, samples), zero.clone() if chunks.keep else zero))


def planned(
    source: Source, quantities: Sequence[Quantity], parameters: Mapping[str, Tensor], samples: int, by: str,
    memory: int, curvature: Callable[[], Curvature],
) -> Plan:  # fmt: skip
    """What ``answer`` would do, in numbers and words."""
    asked = [_Asked.of(q) for q in quantities]
    chunks, basics = _chunks(asked, memory), _basics(asked)
    curved = [q for q in basics if isinstance(q, OfColumns)]
    passes, at_once = source.pullbacks(chunks) if len(curved) < len(basics) else (0, 1)
    reasons = [source.reason] if passes else []
    for root in dict.fromkeys(q.root_in(curvature()) for q in curved):
        more, why = curvature().plan(root, source, chunks)
        passes, reasons = passes + more, [*reasons, why]
    row = sum(p.numel() * p.element_size() for p in parameters.values())
    largest = max(p.numel() * p.element_size() for p in parameters.values())
    sizes = {"rows": samples * row, "squared_norms": samples * len(parameters) * 4, "dots": samples**2 * 4}
    results = sum(sizes["rows"] if isinstance(q, Gradients) else sizes.get(q.needs, row) for q in basics)
    formed = samples * row if chunks.pairs else at_once * row if passes > 1 else min(samples * largest, memory, CHUNK)
    temporary = 0 if chunks.keep and passes == 1 else formed
    what = "Rows" if len(curved) < len(basics) else "Columns of the Gauss-Newton factor"
    sites = tuple(source.sites())
    return Plan(by, samples, sites, passes, at_once, results, temporary, memory, " ".join(reasons), what)


def _chunks(asked: Sequence[_Asked], memory: int) -> Chunks:
    basics = [b for b in _basics(asked) if not isinstance(b, OfColumns)]
    keep = any(isinstance(q, Gradients) for q in basics)
    late = any(a.is_late for a in asked)
    return Chunks(frozenset(q.needs for q in basics), memory, keep, any(q.pairs for q in basics), late)
