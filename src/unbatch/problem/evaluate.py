"""From quantities to answers: which rows are formed when, in what chunks, and what they are called.

Quantities are fed with row blocks of a source and never see networks. Where rows come from is
decided in ``gradients/request.py``; where columns come from, in ``curvature/strategy.py``.
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

FLOAT32 = 4  # bytes

# --- answering ------------------------------------------------------------------------------------


def answer(
    request: Request, quantities: Sequence[Quantity], label: Label, out: Mapping[str, Tensor]
) -> list[Any]:
    """Feed all quantities from one source; return the results in their order."""
    source, curvature = source_of(request), Curvature(request)
    about = about_of(request, source, label, out)
    demand = Demand.of(quantities)
    columns = demand.of_columns
    if columns:
        # Before any check: what a check needs of H comes from the forward pass shared here.
        compressed = any(quantity.tolerance is not None for quantity in columns)
        curvature.share_forward(source, bool(demand.of_rows), compressed)
    for quantity in columns:
        quantity.check(curvature)
    collectors = {basic: basic.start(about) for basic in demand.basics}
    if demand.of_rows:
        rows = [collectors[basic] for basic in demand.of_rows]
        chunks = demand.chunking(request.memory)
        _feed_rows(about, rows, chunks, request.parameters, last=not columns)
    of_columns = {quantity: collectors[quantity] for quantity in columns}
    feed_quantities(curvature, source, of_columns, request.parameters)
    results: dict[Quantity, Any] = {}
    for basic, collector in collectors.items():
        results[basic] = collector.finish()
    return [tree.value(results, about) for tree in demand.trees]


def _feed_rows(
    about: About,
    collectors: Sequence[Collector],
    chunks: Chunking,
    parameters: Mapping[str, Tensor],
    last: bool,
) -> None:
    """Feed all rows; those of parameters that no prediction depends on are zero."""
    fed = set()

    def take(name: str, block: RowBlock) -> None:
        fed.add(name)
        for collector in collectors:
            collector.take(name, block)

    about.source.feed(chunks, take, about.out, last=last)
    for name, p in parameters.items():
        if name in fed:
            continue
        zeros = p.detach().new_zeros(1, *p.shape).expand(about.samples, *p.shape)
        if chunks.keep:
            zeros = zeros.clone()  # rows that are kept belong to the user, who may write to them
        take(name, RowBlock(slice(0, about.samples), zeros))


# --- what quantities need -------------------------------------------------------------------------


@dataclass
class _QuantityTree:
    """A quantity with those it is derived from, as they were at the start of the question.

    ``bases()`` of a derived quantity may make new objects at each call, so it is called once.
    """

    quantity: Quantity
    bases: list[_QuantityTree]

    @staticmethod
    def of(quantity: Quantity) -> _QuantityTree:
        if not isinstance(quantity, Derived):
            return _QuantityTree(quantity, [])
        return _QuantityTree(quantity, [_QuantityTree.of(base) for base in quantity.bases()])

    @property
    def is_late(self) -> bool:
        """Return whether weighted sums are needed after all rows have been seen."""
        return self.quantity.late or any(base.is_late for base in self.bases)

    def basics(self) -> list[Basic]:
        """Return the basic quantities at the leaves, from left to right."""
        if isinstance(self.quantity, Basic):
            return [self.quantity]
        leaves: list[Basic] = []
        for base in self.bases:
            leaves += base.basics()
        return leaves

    def value(self, results: dict[Quantity, Any], about: About) -> Any:
        """Return the result, combined from those of the bases; ``results`` holds what is ready."""
        quantity = self.quantity
        if quantity not in results and isinstance(quantity, Derived):
            bases = [base.value(results, about) for base in self.bases]
            results[quantity] = quantity.combine(about, *bases)
        return results[quantity]


@dataclass(frozen=True)
class Demand:
    """What several quantities need together. ``basics``: the basic ones behind them, each once."""

    trees: list[_QuantityTree]
    basics: list[Basic]

    @staticmethod
    def of(quantities: Sequence[Quantity]) -> Demand:
        trees = [_QuantityTree.of(quantity) for quantity in quantities]
        distinct: dict[Basic, None] = {}
        for tree in trees:
            distinct |= dict.fromkeys(tree.basics())
        # Rows first: a block that has formed its rows serves all others from them.
        return Demand(trees, sorted(distinct, key=lambda basic: basic.needs != "rows"))

    @property
    def of_columns(self) -> list[ColumnQuantity]:
        """Return the quantities of columns of the Gauss-Newton factor."""
        return [basic for basic in self.basics if isinstance(basic, ColumnQuantity)]

    @property
    def of_rows(self) -> list[Basic]:
        """Return the quantities of rows of the gradient."""
        return [basic for basic in self.basics if not isinstance(basic, ColumnQuantity)]

    def chunking(self, memory: int) -> Chunking:
        """Return in what portions rows are formed."""
        basics = self.of_rows
        needs = frozenset(basic.needs for basic in basics)
        keep = any(isinstance(basic, Gradients) for basic in basics)
        pairs = any(basic.pairs for basic in basics)
        late = any(tree.is_late for tree in self.trees)
        return Chunking(needs, memory, keep, pairs, late)


# --- planning -------------------------------------------------------------------------------------


def planned(request: Request, quantities: Sequence[Quantity]) -> Plan:
    """Return what ``answer`` would do, in numbers and words."""
    source, curvature = source_of(request), Curvature(request)
    demand = Demand.of(quantities)
    chunks, columns = demand.chunking(request.memory), demand.of_columns
    if columns:
        curvature.share_forward(source, rows=True)  # the plan needs the sites of the source
    passes, at_once, reasons = 0, 1, []
    if demand.of_rows:
        passes, at_once = source.pullbacks(chunks)
    if passes:
        reasons.append(source.reason)
    for root in dict.fromkeys(quantity.root_in(curvature) for quantity in columns):
        more, reason = curvature.plan(root, source, chunks)
        passes += more
        reasons.append(reason)
    what = "Rows" if demand.of_rows else "Columns of the Gauss-Newton factor"
    return Plan(
        request.by,
        request.samples,
        tuple(source.sites()),
        passes,
        at_once,
        _result_bytes(request, demand.basics),
        _temporary_bytes(request, chunks, passes, at_once),
        request.memory,
        " ".join(reasons),
        what,
    )


def _parameter_bytes(request: Request) -> list[int]:
    """Return the size of each parameter."""
    return [p.numel() * p.element_size() for p in request.parameters.values()]


def _result_bytes(request: Request, basics: Sequence[Basic]) -> int:
    """Return about how much memory the results take."""
    samples, row = request.samples, sum(_parameter_bytes(request))
    # What is not listed has an entry for each of the parameters.
    sizes = {
        "rows": samples * row,
        "squared_norms": samples * len(request.parameters) * FLOAT32,
        "dots": samples**2 * FLOAT32,
    }
    total = 0
    for basic in basics:
        total += sizes["rows"] if isinstance(basic, Gradients) else sizes.get(basic.needs, row)
    return total


def _temporary_bytes(request: Request, chunks: Chunking, passes: int, at_once: int) -> int:
    """Return about how much memory rows take while they are contracted."""
    sizes = _parameter_bytes(request)
    if chunks.keep and passes == 1:
        return 0  # rows are formed where they stay
    if chunks.pairs:
        return request.samples * sum(sizes)
    if passes > 1:
        return at_once * sum(sizes)
    return min(request.samples * max(sizes), request.memory, CHUNK)
