"""Rows of the gradient from a planned sweep over the recorded graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial

import torch
from torch import Tensor

from unbatch.autodiff.context import Context
from unbatch.autodiff.contractions.row_block import RowBlock
from unbatch.autodiff.loss import LossAt, by_graph, noise, nonzero_gradients, rest_of_loss
from unbatch.autodiff.vjp import Group, Sweep
from unbatch.gradients.plan import SitePlan
from unbatch.gradients.sources import CHUNK, Chunking, Source, Take
from unbatch.linalg.rows import real

BY_PLACE = "where samples meet in no symmetric way, slice n of the result counts as sample n's own"


class TrialRun:
    """What trying out a sweep gives: all by parameter, from a weighted sum and from the row of one sample."""

    def __init__(self, zeros: Mapping[str, Tensor]) -> None:
        self.weighted, self.alone = ({n: t.clone() for n, t in zeros.items()} for _ in range(2))
        self.row, self.squares = dict(zeros), dict(zeros)
        self.norm = {n: t.new_zeros(1) for n, t in zeros.items()}

    def add(self, weighted: Mapping[str, Tensor], alone: Mapping[str, Tensor]) -> None:
        for into, shares in ((self.weighted, weighted), (self.alone, alone)):
            for name, t in shares.items():
                into[name] += t

    def see(self, name: str, part: RowBlock) -> None:
        """The norm and the squares first, by ways that do without the row."""
        self.norm[name], self.squares[name] = part.squared_norms().sqrt(), part.sum_of_squares()
        self.row[name] = part.rows()[0].clone()


class ReplayedRows(Source):
    """The planned sweep over the recorded computation; with other ``given`` cotangents than the loss has, if any."""

    def __init__(
        self,
        setting: Context,
        parameters: Mapping[str, Tensor],
        by: str,
        given: Mapping[int, Tensor] | None = None,
    ) -> None:
        self.setting, self.parameters = setting, parameters
        self.route = setting.route(parameters, by)
        self.flow = self.route.flow
        self.given = given
        self.note = BY_PLACE if self.flow.by_place else ""
        if self.flow.columns:
            self.reason = "Below the last place where samples listen to each other, each is a column of its own."
        elif self.flow.projections:
            self.reason = "Samples meet in one place only, of which the closed form is known."

    # -- the forward pass, and cotangents --

    @cached_property
    def sweep(self) -> Sweep:
        """After the forward pass, before any other."""
        sweep = Sweep(self.route, self.setting.graph, self.parameters, self.setting.data)
        sweep.forward()
        return sweep

    @cached_property
    def whole(self) -> Sweep:
        """After a backward pass that has kept everything."""
        return self._pulled(None)

    def _pulled(
        self,
        emit: Callable[[Group], None] | None,
        given: Mapping[int, Tensor] | None = None,
        last: bool = True,
    ) -> Sweep:
        if self.sweep.spent:
            del self.sweep
        sweep = self.sweep
        sweep.pull(self.cotangents if given is None else given, emit, last)
        return sweep

    @cached_property
    def cotangents(self) -> Mapping[int, Tensor]:
        """``∂L/∂F``."""
        return self.loss.slope if self.given is None else self.given

    @property
    def loss(self) -> LossAt:
        sweep = self.sweep
        return LossAt(
            self.setting,
            {i: t.detach() for i, t in sweep.predictions.items()},
            sweep.inner,
            sweep.outputs,
        )

    def _all(self, weight: float = 1) -> Tensor:
        like = next(iter(self.parameters.values()))
        return torch.full(
            (self.setting.samples,), weight, dtype=real(like.dtype), device=like.device
        )

    # -- parts --

    def feed(
        self, plan: Chunking, take: Take, outs: Mapping[str, Tensor], given: Mapping[int, Tensor] | None = None,
        last: bool = True,
    ) -> None:  # fmt: skip
        emit = partial(self._emit, plan, take, outs)
        if plan.late and given is None:
            for group in self.whole.groups:
                if group.meetings and not group.together.tied:
                    emit(group)
        else:
            self._pulled(emit, given, last)
        tied = [g for g in self.sweep.groups if g.meetings and g.together.tied]
        if self.sweep.seeds and self.flow.columns:
            self._columns(plan, take, tied, outs)
        else:
            for group in tied:
                emit(group)

    def _emit(self, plan: Chunking, take: Take, outs: Mapping[str, Tensor], group: Group) -> None:
        """Hand out a group whose cotangents are all there."""
        n, size = self.setting.samples, self._bytes(group.together.names) * (1 if group.only else 2)
        sums: dict[str, Tensor] = {}

        def total(name: str) -> Tensor:
            if not sums:
                sums.update(self.sweep.group_sum(group, self._all()))
            return sums[name]

        lean = group.lean
        bare = plan.needs <= lean
        portion = group.only[0].portion if group.only is not None and not bare else CHUNK
        for where in plan.of(n, size, lean, portion):
            out = (
                self._room(plan, group.together.names[0], where, outs)
                if group.only and not bare
                else None
            )
            for name, part in self.sweep.parts(group, where, out):
                take(name, part.with_total(partial(total, name)))

    def _room(
        self, plan: Chunking, name: str, where: slice, outs: Mapping[str, Tensor]
    ) -> Tensor | None:
        """Where the rows of a parameter are to be formed: where the caller wants them, or in scratch memory."""
        if name in outs:
            return outs[name][where]
        like = self.parameters[name].detach()
        kept = plan.keep or plan.pairs
        return None if kept else self.setting.scratch((where.stop - where.start, *like.shape), like)

    def tried(self, weights: Tensor, n: int) -> TrialRun:
        """A weighted sum, and in several ways the row of sample ``n``, for little more than a backward pass."""
        sweep, where = self.sweep, slice(n, n + 1)
        found = TrialRun({name: torch.zeros_like(p) for name, p in self.parameters.items()})
        alone = torch.zeros_like(weights)
        alone[n] = 1

        def take(group: Group) -> None:
            found.add(sweep.group_sum(group, weights), sweep.group_sum(group, alone))
            if not group.together.tied:
                for name, part in sweep.parts(group, where, None):
                    found.see(name, part)

        self._pulled(take)
        tied = [g for g in sweep.groups if g.meetings]
        local = {name: rows for group in tied for name, rows in sweep.rows(group, where).items()}
        for group in tied:
            take(group)
        if sweep.seeds and self.flow.columns:
            found.add(sweep.sum_of_columns(weights), sweep.sum_of_columns(alone))
        for name, part in self._with_columns(where, local, {}):
            found.see(name, part)
        return found

    def _with_columns(
        self, where: slice, local: dict[str, Tensor], outs: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, RowBlock]]:
        """The columns of some samples, together with what their parameters get above the last mixing."""
        if self.sweep.seeds and self.flow.columns:
            for name, part in self.sweep.columns(where.start, where.stop, outs):
                yield (
                    name,
                    RowBlock(where, part.rows() + local.pop(name)) if name in local else part,
                )
        yield from ((name, RowBlock(where, rows)) for name, rows in local.items())

    def _columns(
        self, plan: Chunking, take: Take, tied: Sequence[Group], outs: Mapping[str, Tensor]
    ) -> None:
        sweep, n = self.sweep, self.setting.samples
        size = self.columns_at_once(plan)
        sums: dict[str, Tensor] = {}

        def total(name: str) -> Tensor:
            if not sums:
                for found in [
                    *(sweep.group_sum(g, self._all()) for g in tied),
                    sweep.sum_of_columns(self._all()),
                ]:
                    sums.update({k: sums[k] + t if k in sums else t for k, t in found.items()})
            return sums[name]

        for first in range(0, n, size):
            where = slice(first, min(first + size, n))
            local = {
                name: rows for group in tied for name, rows in sweep.rows(group, where).items()
            }
            for name, part in self._with_columns(
                where, local, {name: out[where] for name, out in outs.items()}
            ):
                take(name, part.with_total(partial(total, name)))

    def columns_at_once(self, plan: Chunking) -> int:
        """One where convolutions are pulled through (nothing is gained by more), else as many as memory allows."""
        column = self._bytes(self.route.below) + self.route.column_bytes
        if self.route.convolves:
            return 1
        return int(max(1, min(self.setting.samples, min(plan.memory, CHUNK) // max(column, 1))))

    def _bytes(self, names: Sequence[str]) -> int:
        return sum(
            self.parameters[n].numel() * max(self.parameters[n].element_size(), 4) for n in names
        )

    def weighted_sum(self, weights: Tensor) -> dict[str, Tensor]:
        return self.whole.weighted_sum(weights)

    def sites(self) -> list[SitePlan]:
        steps, kinds, out = self.setting.graph.steps, self.whole.kinds, []
        for site in self.flow.sites:
            step, pooled = steps[site.step], site in self.route.pools
            kind = (
                "linear"
                if pooled
                else kinds.get(site, "by autograd" if site.way == "columns" else "no cotangent")
            )
            way = "pooled" if pooled else site.way
            out.append(
                SitePlan(
                    tuple(self.route.operands.made_from(site.operand)),
                    step.module,
                    step.name,
                    kind,
                    way,
                )
            )
        return out

    def pullbacks(self, plan: Chunking) -> tuple[int, int]:
        columns = self.setting.samples if self.whole.seeds and self.flow.columns else 0
        return 1 + columns, min(self.columns_at_once(plan), max(columns, 1))

    def rest(self) -> dict[str, Tensor]:
        """The loss alone, with the predictions held constant: parameters in it, and what else it reads of the model."""
        setting, graph = self.setting, self.setting.graph
        if setting.split and all(r.index in self.flow.predictions for r in graph.used_predictions):
            return {}
        if not by_graph(setting, self.sweep.inner):
            return rest_of_loss(setting, self.sweep.outputs, self.parameters)
        leaves = {n: p.detach().requires_grad_() for n, p in self.parameters.items()}
        live = {i: leaves[name] for i, name in self.flow.parameters.items()}
        fixed = {i: t.detach() for i, t in self.sweep.predictions.items()}
        pinned = {i: t for i, t in fixed.items() if not graph.written(i)}
        inner = list(self.sweep.inner)
        assert graph.loss is not None
        with torch.enable_grad():
            read = (
                graph.run(setting.data | live, inner, keep=pinned, steps=graph.forward_steps)
                if inner
                else []
            )
            feed = setting.data | live | dict(zip(inner, read, strict=True)) | fixed
            (value,) = graph.run(
                feed, [graph.loss.index], keep=noise(graph), steps=graph.loss_steps
            )
        return nonzero_gradients(value, leaves)
