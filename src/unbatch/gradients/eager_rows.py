"""Rows of the gradient by running the model itself, where the recorded graph has other derivatives."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from unbatch.analysis.domain.sample_layout import Layout
from unbatch.autodiff import eager
from unbatch.autodiff.autograd import gradients
from unbatch.autodiff.context import Context
from unbatch.autodiff.contractions.row_block import RowBlock
from unbatch.autodiff.loss import LossAt, loss_of, nonzero_gradients
from unbatch.capture.isolation import untouched
from unbatch.gradients.plan import SitePlan
from unbatch.gradients.replayed_rows import ReplayedRows
from unbatch.gradients.sources import Chunking, Source, Take
from unbatch.linalg.rows import real


class EagerRows(Source):
    """The model itself (or its recording, ``replayed``), run once; every sample is a column of its own."""

    def __init__(
        self,
        setting: Context,
        parameters: Mapping[str, Tensor],
        replayed: bool = False,
        why: str = "",
    ) -> None:
        self.setting, self.parameters, self.replayed = setting, parameters, replayed
        self.reason = (
            f"Every sample is pulled back through the whole model: {why or 'there is only one'}."
        )
        self._totals: dict[str, Tensor] = {}
        ran = self._replay() if replayed else eager.run(setting, parameters)
        self.output, self.predictions, self.at, self._draws = (
            ran.output,
            ran.predictions,
            ran.loss,
            ran.state,
        )
        self.cotangents = self.at.slope

    @property
    def loss(self) -> LossAt:
        return self.at

    def _replay(self) -> eager.EagerModel:
        graph = self.setting.graph
        self.leaves = {n: p.detach().requires_grad_() for n, p in self.parameters.items()}
        self.parameters = self.leaves
        alive = {i: self.leaves[v.name] for i, v in enumerate(graph.values)
                if v.kind == "parameters" and v.name in self.leaves}  # fmt: skip
        read = graph.read_by_loss(self.setting.axes)
        wanted = list(
            dict.fromkeys([*self.setting.axes, *read, *(r.index for r in graph.predictions)])
        )
        with torch.enable_grad():
            outs = graph.run(self.setting.data | alive, wanted, steps=graph.forward_steps)
        at = dict(zip(wanted, outs, strict=True))
        return eager.EagerModel(self.setting, None, at, {i: at[i] for i in read}, None)

    def feed(
        self, plan: Chunking, take: Take, outs: Mapping[str, Tensor], given: Mapping[int, Tensor] | None = None,
        last: bool = True,
    ) -> None:  # fmt: skip
        given = (
            self.cotangents
            if given is None
            else {i: g for i, g in given.items() if i in self.predictions}
        )
        for n in range(self.setting.samples):
            alone = {i: self._axis(i).only(g, n, n + 1)[0] for i, g in given.items()}
            for name, g in self._pull(alone).items():
                part = RowBlock(slice(n, n + 1), g[None])
                take(name, part.with_total(partial(self._total, name)))

    def _total(self, name: str) -> Tensor:
        if not self._totals:
            like = next(iter(self.parameters.values()))
            self._totals = self.weighted_sum(
                like.new_ones(self.setting.samples, dtype=real(like.dtype))
            )
        return self._totals[name]

    def _axis(self, i: int) -> Layout:
        return Layout(self.setting.axes[i], self.setting.samples)

    def _pull(self, cotangents: Mapping[int, Tensor]) -> dict[str, Tensor]:
        outputs = [self.predictions[i] for i in cotangents]
        with (
            nullcontext()
            if self._draws is None
            else untouched(self.setting.program.modules, self._draws)
        ):
            return gradients(outputs, self.parameters, list(cotangents.values()), retain=True)

    def weighted_sum(self, weights: Tensor) -> dict[str, Tensor]:
        return self._pull({i: self._axis(i).scaled(g, weights) for i, g in self.cotangents.items()})

    def sites(self) -> list[SitePlan]:
        return [SitePlan((n,), "", "", "by autograd", "model") for n in self.parameters]

    def pullbacks(self, plan: Chunking) -> tuple[int, int]:
        return self.setting.samples, 1

    def rest(self) -> dict[str, Tensor]:
        if self.setting.split:
            return {}
        if self.replayed:
            return ReplayedRows(self.setting, self.parameters, "component").rest()
        leaves, spec = tree_flatten(self.output)
        at = iter([r.index for r in self.setting.graph.predictions])
        cut = [
            t.detach() if isinstance(t, Tensor) and next(at) in self.setting.axes else t
            for t in leaves
        ]
        with untouched(self.setting.program.modules):
            return nonzero_gradients(
                loss_of(self.setting, tree_unflatten(cut, spec)), self.parameters
            )
