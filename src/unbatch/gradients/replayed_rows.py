"""Rows of the gradient from a planned backward pass over the recorded graph.

The plan (which sites, which columns) is made in ``autodiff``; here the recorded model is run
forward, the cotangents are pulled back, and groups of sites become row blocks. Whether the plan is
right is found out in ``self_check.py``, by ``ReplayedRows.trial``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from unbatch.autodiff.autograd import leaves_of, subset
from unbatch.autodiff.context import Context
from unbatch.autodiff.contractions.row_block import RowBlock
from unbatch.autodiff.jvp import LinearisedGraph
from unbatch.autodiff.loss import (
    LossAt,
    by_graph,
    noise,
    nonzero_gradients,
    rest_of_loss,
    without_zeros,
)
from unbatch.autodiff.planner import Site
from unbatch.autodiff.vjp import Group, Sweep
from unbatch.gradients.plan import SitePlan
from unbatch.gradients.sources import CHUNK, Chunking, Source, Take, slices_of
from unbatch.linalg.rows import real
from unbatch.running.tasks import task

BY_PLACE = (
    "where samples depend on each other in no symmetric way, slice n of the result counts as "
    "sample n's own"
)

REASON_COLUMNS = "Below the mixing frontier each sample is a column of its own."
REASON_PROJECTED = "Samples depend on each other in one place only, which has a closed form."


class TrialRun:
    """What a backward pass gave on trial, by parameter.

    ``weighted``: a weighted sum of all rows; ``of_sample``: one sample's row, as the sum in which
    all others weigh nothing; ``row``, ``squares``, ``norm``: the same row from its block, by
    methods that may do without rows; ``beside``: the same row, pulled back with another one.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self.weighted: dict[str, Tensor] = {}
        self.of_sample: dict[str, Tensor] = {}
        self.row: dict[str, Tensor] = {}
        self.squares: dict[str, Tensor] = {}
        self.norm: dict[str, Tensor] = {}
        self.beside: dict[str, Tensor] = {}
        # Parameters that no prediction depends on get no block: all of theirs is zero.
        for name, parameter in parameters.items():
            for tensors in (self.weighted, self.of_sample, self.row, self.squares):
                tensors[name] = torch.zeros_like(parameter)
            self.norm[name] = parameter.new_zeros(1)

    def add(self, weighted: Mapping[str, Tensor], of_sample: Mapping[str, Tensor]) -> None:
        """Add a group's share of both sums."""
        for name, share in weighted.items():
            self.weighted[name] += share
        for name, share in of_sample.items():
            self.of_sample[name] += share

    def add_block(self, name: str, block: RowBlock) -> None:
        """Take the block of the one sample."""
        # Rows last: once they are formed, norms and squares would be taken from them.
        self.norm[name] = block.squared_norms().sqrt()
        self.squares[name] = block.sum_of_squares()
        self.row[name] = block.rows()[0].clone()


class _Totals:
    """Sums of all rows by parameter; computed when the first of them is asked for."""

    def __init__(self, compute: Callable[[], dict[str, Tensor]]) -> None:
        self._compute = compute

    @cached_property
    def _sums(self) -> dict[str, Tensor]:
        return self._compute()

    def of(self, name: str) -> Tensor:
        return self._sums[name]


@dataclass(frozen=True)
class _Delivery:
    """Who takes row blocks, how many samples at a time, and where rows are wanted."""

    chunks: Chunking
    take: Take
    outs: Mapping[str, Tensor]

    def hand_out(self, name: str, block: RowBlock, totals: _Totals) -> None:
        self.take(name, block.with_total(partial(totals.of, name)))


class ReplayedRows(Source):
    """Rows from the recorded computation, by a plan; also for other cotangents than those of the
    loss.
    """

    def __init__(
        self,
        context: Context,
        parameters: Mapping[str, Tensor],
        by: str,
        cotangents: Mapping[int, Tensor] | None = None,
    ) -> None:
        """``cotangents``: those of the predictions; by default those of the loss."""
        self.context, self.parameters = context, parameters
        self.schedule = context.schedule(parameters, by)
        self.plan = self.schedule.plan
        self._chosen_cotangents = cotangents
        self._sweep: Sweep | None = None
        if self.plan.by_place:
            self.note = BY_PLACE
        if self.plan.columns:
            self.reason = REASON_COLUMNS
        elif self.plan.projections:
            self.reason = REASON_PROJECTED

    # -- the forward pass, and cotangents --

    @property
    def sweep(self) -> Sweep:
        """Return the last sweep, after its forward pass at least."""
        if self._sweep is None:
            sweep = Sweep(self.schedule, self.context.graph, self.parameters, self.context.data)
            sweep.forward()
            self._sweep = sweep  # not before: half a forward pass would be kept
        return self._sweep

    @cached_property
    def full_sweep(self) -> Sweep:
        """Return a sweep after a backward pass that has kept everything."""
        return self._pull(None)

    def _pull(
        self,
        take: Callable[[Group], None] | None,
        cotangents: Mapping[int, Tensor] | None = None,
        last: bool = True,
    ) -> Sweep:
        """Return the sweep after a backward pass that hands each complete group to ``take``."""
        # A sweep is spent once a pass was the last: then everything that it held has been
        # contracted.
        if self.sweep.spent:  # its graph is freed: run forward again
            self._sweep = None
        sweep = self.sweep
        if cotangents is None:
            cotangents = self.cotangents
        sweep.pull(cotangents, take, last)
        return sweep

    @cached_property
    def cotangents(self) -> Mapping[int, Tensor]:
        """Return ``∂L/∂F``, or the cotangents in its place."""
        # The loss is evaluated only if its cotangents are used: a self-check has random ones.
        if self._chosen_cotangents is not None:
            return self._chosen_cotangents
        return self.loss.slope_of_samples

    @property
    def loss(self) -> LossAt:
        return LossAt(self.context, self._fixed_outputs(), self.sweep.inner, self.sweep.outputs)

    def _fixed_outputs(self) -> dict[int, Tensor]:
        """Return the outputs by which the loss is differentiated, as constants."""
        return subset(self.sweep.outputs, self.context.outputs.smooth)

    def _ones(self) -> Tensor:
        """Return weights that count every sample once, ``[N]``."""
        like = next(iter(self.parameters.values()))
        dtype = real(like.dtype)
        return torch.full((self.context.samples,), 1, dtype=dtype, device=like.device)

    # -- row blocks --

    def feed(
        self,
        chunks: Chunking,
        take: Take,
        outs: Mapping[str, Tensor],
        cotangents: Mapping[int, Tensor] | None = None,
        last: bool = True,
    ) -> None:
        delivery = _Delivery(chunks, take, outs)
        if chunks.late and cotangents is None:
            # Weighted sums follow and need every group: nothing is freed on the way.
            for group in self.full_sweep.groups:
                if group.contractions and not group.members.reached_by_columns:
                    self._deliver(delivery, group)
        else:
            self._pull(partial(self._deliver, delivery), cotangents, last)
        # Parameters of tied groups get contributions from columns as well, and wait for them.
        tied = self._tied_groups()
        if self._has_columns(self.sweep):
            self._deliver_columns(delivery, tied)
            return
        for group in tied:
            self._deliver(delivery, group)

    def _tied_groups(self) -> list[Group]:
        """Return groups whose parameters have columns as well, which have to be added."""
        groups = self.sweep.groups
        return [
            group for group in groups if group.contractions and group.members.reached_by_columns
        ]

    def _has_columns(self, sweep: Sweep) -> bool:
        """Return whether anything is left to be pulled back column by column."""
        return bool(sweep.seeds) and bool(self.plan.columns)

    def _deliver(self, delivery: _Delivery, group: Group) -> None:
        """Hand out the blocks of a group whose cotangents are all there."""
        chunks = delivery.chunks
        # No total is computed unless a quantity asks for it, and then once for all slices.
        totals = _Totals(partial(self._sum_of_group, group))
        # Rows are formed in portions that suit the contraction, unless the blocks do without them.
        size, portion = self._row_bytes(group.members.names), CHUNK
        forms_rows = not chunks.needs <= group.lean
        if group.single is None:
            size *= 2  # rows of operands are formed first, and those of parameters from them
        elif forms_rows:
            portion = group.single[0].portion
        for where in chunks.of(self.context.samples, size, group.lean, portion):
            out = None
            if group.single is not None and forms_rows:
                out = self._row_memory(delivery, group.members.names[0], where)
            for name, block in self.sweep.blocks(group, where, out):
                delivery.hand_out(name, block, totals)

    def _sum_of_group(self, group: Group) -> dict[str, Tensor]:
        return self.sweep.group_sum(group, self._ones())

    def _row_memory(self, delivery: _Delivery, name: str, where: slice) -> Tensor | None:
        """Return where the rows of a parameter are to be formed; None for memory of their own.

        Where the caller wants them, or in scratch memory if nobody keeps them.
        """
        # Scratch memory is overwritten by the next slice, which is no harm if rows are not kept.
        if name in delivery.outs:
            return delivery.outs[name][where]
        if delivery.chunks.keep or delivery.chunks.pairs:
            return None
        like = self.parameters[name].detach()
        return self.context.scratch((where.stop - where.start, *like.shape), like)

    # -- columns --

    def _deliver_columns(self, delivery: _Delivery, tied: Sequence[Group]) -> None:
        """Hand out the blocks of parameters below the mixing frontier, some samples at a time."""
        at_once = self.columns_at_once(delivery.chunks)
        totals = _Totals(partial(self._sum_with_columns, tied))
        slices = slices_of(self.context.samples, at_once)
        with task("Samples pulled back below the mixing frontier", len(slices)) as passes:
            for where in passes.over(slices):
                outs = {name: out[where] for name, out in delivery.outs.items()}
                local = self._local_rows(tied, where)
                for name, block in self._columns_and_local(where, local, outs):
                    delivery.hand_out(name, block, totals)

    def _sum_with_columns(self, tied: Sequence[Group]) -> dict[str, Tensor]:
        """Return the sum of all rows of every parameter that has columns or is tied to one."""
        sums: dict[str, Tensor] = {}
        for group in tied:
            add_into(sums, self._sum_of_group(group))
        add_into(sums, self.sweep.sum_of_columns(self._ones()))
        return sums

    def _local_rows(self, groups: Sequence[Group], where: slice) -> dict[str, Tensor]:
        """Return rows from above the mixing frontier, by parameter."""
        rows: dict[str, Tensor] = {}
        for group in groups:
            rows.update(self.sweep.rows(group, where))
        return rows

    def _columns_and_local(
        self, where: slice, local: dict[str, Tensor], outs: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, RowBlock]]:
        """Yield blocks of columns, with what their parameters get above the mixing frontier added.

        Then those of parameters that have no columns; ``local`` is consumed.
        """
        if self._has_columns(self.sweep):
            for name, block in self.sweep.columns(where.start, where.stop, outs):
                if name in local:
                    block = RowBlock(where, block.rows() + local.pop(name))
                yield name, block
        for name, rows in local.items():
            yield name, RowBlock(where, rows)

    def columns_at_once(self, chunks: Chunking) -> int:
        """Return how many columns share a backward pass: as many as memory allows.

        One where convolutions are pulled through, as nothing is gained there by more.
        """
        if self.schedule.convolves:
            return 1
        column = self._row_bytes(self.schedule.by_autograd) + self.schedule.column_bytes
        fitting = min(chunks.memory, CHUNK) // max(column, 1)
        return int(max(1, min(self.context.samples, fitting)))

    def _row_bytes(self, names: Sequence[str]) -> int:
        """Return the bytes of one row of some parameters, in float32 at least."""
        size = 0
        for name in names:
            parameter = self.parameters[name]
            size += parameter.numel() * max(parameter.element_size(), 4)
        return size

    # -- the self-check --

    def trial(self, weights: Tensor, n: int) -> TrialRun:
        """Return a weighted sum, and in several ways the row of sample ``n``.

        All of it for little more than a backward pass.
        """
        sweep, where = self.sweep, slice(n, n + 1)
        # The same sweep throughout: groups are taken while its cotangents are there.
        pair = self._pair_with(n)
        trial = TrialRun(self.parameters)
        only_n = torch.zeros_like(weights)
        only_n[n] = 1

        def take(group: Group) -> None:
            trial.add(sweep.group_sum(group, weights), sweep.group_sum(group, only_n))
            if not group.members.reached_by_columns:
                for name, block in sweep.blocks(group, where, None):
                    trial.add_block(name, block)
                if group.single is None:
                    for name, rows in sweep.rows(group, pair).items():
                        trial.beside[name] = rows[n - pair.start]

        # Groups above the mixing frontier are taken on the way, the others afterwards, as in
        # ``feed``.
        self._pull(take)
        tied = [group for group in sweep.groups if group.contractions]
        # Tied groups have no blocks of their own: their rows are added to those of columns.
        local = self._local_rows(tied, where)
        for group in tied:
            take(group)
        # What comes from below the mixing frontier is missing in the sums over groups.
        if self._has_columns(sweep):
            trial.add(sweep.sum_of_columns(weights), sweep.sum_of_columns(only_n))
        for name, block in self._columns_and_local(where, local, {}):
            trial.add_block(name, block)
        # PyTorch pulls several cotangents back by ``vmap``, whose rules may be wrong.
        local = self._local_rows(tied, pair)
        for name, block in self._columns_and_local(pair, local, {}):
            trial.beside[name] = block.rows()[n - pair.start]
        return trial

    def _pair_with(self, n: int) -> slice:
        """Return sample n with the one before or behind it."""
        first = max(0, min(n, self.context.samples - 2))
        return slice(first, min(first + 2, self.context.samples))

    # -- sums, and what a plan prints --

    def weighted_sum(self, weights: Tensor) -> dict[str, Tensor]:
        return self.full_sweep.weighted_sum(weights)

    def sites(self) -> list[SitePlan]:
        return [self._site_plan(site) for site in self.plan.sites]

    def _site_plan(self, site: Site) -> SitePlan:
        step = self.context.graph.steps[site.step]
        parameters = tuple(self.schedule.operands.parameters_of(site.operand))
        kind, way = self._kind_and_way(site)
        return SitePlan(parameters, step.module, step.name, kind, way)

    def _kind_and_way(self, site: Site) -> tuple[str, str]:
        """Return how a site is contracted, and where it stands (a key of ``plan.WAYS``)."""
        if site in self.schedule.pooled_sites:
            return "linear", "pooled"
        # How a site is contracted is known once its cotangent has come.
        kinds = self.full_sweep.kinds
        if site in kinds:
            return kinds[site], site.way
        if site.way == "columns":
            return "by autograd", site.way
        return "no cotangent", site.way

    def pullbacks(self, chunks: Chunking) -> tuple[int, int]:
        # One pass carries all samples down to the mixing frontier, and one more each column.
        columns = 0
        if self._has_columns(self.full_sweep):
            columns = self.context.samples
        return 1 + columns, min(self.columns_at_once(chunks), max(columns, 1))

    # -- the rest of the gradient --

    def rest(self) -> dict[str, Tensor]:
        """Return what of ``∇L`` does not go through predictions of samples.

        That is the part through outputs without an axis of samples, and, of parameters that stand
        in the loss itself and what else it reads of the model, the part with all outputs constant.
        """
        rest = self._through_joined_outputs()
        if not self.context.split:
            add_into(rest, self._beside_outputs())
        return rest

    def _through_joined_outputs(self) -> dict[str, Tensor]:
        # Nothing is evaluated where there are none, as is usual.
        cotangents = self.loss.slope_of_joined if self.context.outputs.joined else {}
        if not cotangents:
            return {}
        return without_zeros(LinearisedGraph(self.context, self.parameters).pull(cotangents))

    def _beside_outputs(self) -> dict[str, Tensor]:
        context = self.context
        # The loss is called if outputs are all that it needs, and replayed otherwise.
        if not by_graph(context, self.sweep.inner):
            return rest_of_loss(context, self.sweep.outputs, self.parameters)
        leaves = leaves_of(self.parameters)
        with torch.enable_grad():
            value = self._loss_with_fixed_outputs(leaves)
        return nonzero_gradients(value, leaves)

    def _loss_with_fixed_outputs(self, leaves: Mapping[str, Tensor]) -> Tensor:
        """Return the loss as a function of ``leaves`` alone; there has to be one in the graph."""
        context, graph, sweep = self.context, self.context.graph, self.sweep
        if graph.loss is None:
            raise ValueError("The recorded graph has no loss.")
        feed = context.data | self.plan.by_number(leaves)
        # What the loss reads beside outputs depends on parameters, also by way of outputs: only
        # what it reads of these themselves is constant.
        inner = list(sweep.inner)
        read = graph.run(feed, inner, steps=graph.forward_steps) if inner else []
        feed = feed | dict(zip(inner, read, strict=True)) | self._fixed_outputs()
        (value,) = graph.run(feed, [graph.loss.index], keep=noise(graph), steps=graph.loss_steps)
        return value


def add_into(sums: dict[str, Tensor], share: Mapping[str, Tensor]) -> None:
    """Add a share by name; not in place, as a first share may belong to somebody else."""
    for name, t in share.items():
        if name in sums:
            sums[name] = sums[name] + t
        else:
            sums[name] = t
