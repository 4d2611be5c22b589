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
from unbatch.curvature.pace import Pace
from unbatch.curvature.sizes import pulls_of
from unbatch.curvature.strategy import Curvature
from unbatch.errors import UnbatchError
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
from unbatch.gradients.sources import CHUNK, Chunking, Source

FLOAT32 = 4  # bytes

# --- answering ------------------------------------------------------------------------------------


def answer(
    request: Request, quantities: Sequence[Quantity], label: Label, out: Mapping[str, Tensor]
) -> list[Any]:
    """Feed all quantities from one source; return the results in their order."""
    curvature, demand = Curvature(request), Demand.of(quantities)
    columns = demand.of_columns
    # Nothing has run yet but the self-check of a plan: both are lazy, and the forward pass shared.
    source = _source(request, curvature, demand)
    about = about_of(request, source, label, out)
    if columns:
        # Before any check: what a check needs of H comes from the forward pass shared here.
        compressed = any(quantity.tolerance is not None for quantity in columns)
        curvature.share_forward(source, bool(demand.of_rows), compressed)
    for quantity in columns:
        quantity.check(curvature)
    collectors = {basic: basic.start(about) for basic in demand.basics}
    fed_by_rows, fed_by_columns = [], {}
    for basic, collector in collectors.items():
        if isinstance(basic, ColumnQuantity):
            fed_by_columns[basic] = collector
        else:
            fed_by_rows.append(collector)
    if fed_by_rows:
        # Rows first: the source may let go of its graph with the last thing it is asked.
        chunks = demand.chunking(request.memory)
        _feed_rows(about, fed_by_rows, chunks, request.parameters, last=not columns)
    feed_quantities(curvature, source, fed_by_columns, request.parameters)
    # Finished when all are fed: a collector that is late asks the source for weighted sums.
    results: dict[Quantity, Any] = {}
    for basic, collector in collectors.items():
        results[basic] = collector.finish()
    return [tree.value(results, about) for tree in demand.trees]


def _source(request: Request, curvature: Curvature, demand: Demand) -> Source:
    """Return where rows come from; columns alone need them only where they are of samples."""
    if demand.of_columns and not demand.of_rows:
        return curvature.source(request)
    return source_of(request)


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
    # Expanded from a single zero, as most quantities only read them.
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
        # A base may be shared by several, and is then combined once.
        if quantity not in results and isinstance(quantity, Derived):
            bases = [base.value(results, about) for base in self.bases]
            results[quantity] = quantity.combine(about, *bases)
        return results[quantity]


@dataclass(frozen=True)
class Demand:
    """What several quantities need together.

    ``basics``: the basic ones behind them, each once; ``of_rows`` and ``of_columns``: those that
    are fed with rows of the gradient, and with columns of the Gauss-Newton factor.
    """

    trees: list[_QuantityTree]
    basics: list[Basic]
    of_rows: list[Basic]
    of_columns: list[ColumnQuantity]

    @staticmethod
    def of(quantities: Sequence[Quantity]) -> Demand:
        trees = [_QuantityTree.of(quantity) for quantity in quantities]
        # Equal quantities are one, whoever asks for them; in the order in which they come up.
        distinct: dict[Basic, None] = {}
        for tree in trees:
            distinct |= dict.fromkeys(tree.basics())
        # Rows first: a block that has formed its rows serves all others from them.
        basics = sorted(distinct, key=lambda basic: basic.needs != "rows")
        of_rows: list[Basic] = []
        of_columns: list[ColumnQuantity] = []
        for basic in basics:
            if isinstance(basic, ColumnQuantity):
                of_columns.append(basic)
            else:
                of_rows.append(basic)
        return Demand(trees, basics, of_rows, of_columns)

    def chunking(self, memory: int) -> Chunking:
        """Return in what portions rows are formed."""
        # Columns do not count: they are fed apart, in chunks of their own.
        needs: set[str] = set()
        keep, pairs = False, False
        for basic in self.of_rows:
            needs.add(basic.needs)
            keep |= isinstance(basic, Gradients)
            pairs |= basic.pairs
        late = any(tree.is_late for tree in self.trees)
        return Chunking(frozenset(needs), memory, keep, pairs, late)


# --- planning -------------------------------------------------------------------------------------


def planned(request: Request, quantities: Sequence[Quantity]) -> Plan:
    """Return what ``answer`` would do, in numbers and words."""
    curvature, demand = Curvature(request), Demand.of(quantities)
    source = _source(request, curvature, demand)
    chunks, columns = demand.chunking(request.memory), demand.of_columns
    if columns:
        curvature.share_forward(source, rows=True)  # the plan needs the sites of the source
    passes, at_once, reasons = 0, 1, []
    # Columns count for themselves, by their roots.
    if demand.of_rows:
        passes, at_once = source.pullbacks(chunks)
    if passes:
        reasons.append(source.reason)
    pulls = pulls_of(curvature, request, request.samples) if demand.of_rows else 0.0
    # Quantities of the same root share their columns, so each root counts once.
    for root in dict.fromkeys(quantity.root_in(curvature) for quantity in columns):
        pulls += pulls_of(curvature, request, root.size)
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
        _seconds_of(pulls, curvature, request),
    )


def _seconds_of(pulls: float, curvature: Curvature, request: Request) -> float | None:
    """Return how long so many whole backward passes take, by one of them."""
    try:
        pace = Pace.measured(curvature.linearised, request.parameters)
    except UnbatchError:  # a plan is shown all the same
        return None
    return pulls * pace.pull


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
        total += sizes.get(basic.needs, row)
    return total


def _temporary_bytes(request: Request, chunks: Chunking, passes: int, at_once: int) -> int:
    """Return about how much memory rows take while they are contracted."""
    sizes = _parameter_bytes(request)
    if chunks.keep and passes == 1:
        return 0  # rows are formed where they stay
    if chunks.pairs:  # all rows beside each other
        return request.samples * sum(sizes)
    if passes > 1:  # the cotangents of so many samples are pulled back together
        return at_once * sum(sizes)
    return min(request.samples * max(sizes), request.memory, CHUNK)
