"""Rows of the gradient by running the model itself, where no backward plan of its recording can be
trusted.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from unbatch.analysis.domain.sample_layout import Layout
from unbatch.autodiff import eager
from unbatch.autodiff.autograd import leaves_of
from unbatch.autodiff.context import Context
from unbatch.autodiff.contractions.row_block import RowBlock
from unbatch.autodiff.loss import LossAt, loss_of, nonzero_gradients, without_zeros
from unbatch.autodiff.other_batches import filled_with, is_finite
from unbatch.gradients.plan import SitePlan
from unbatch.gradients.replayed_rows import ReplayedRows, add_into
from unbatch.gradients.sources import Chunking, Source, Take
from unbatch.linalg.rows import real
from unbatch.running.tasks import task


class EagerRows(Source):
    """Rows by one backward pass through the whole model for every sample.

    The model is run once; or its recording is, if ``replayed``: then its derivatives are right, and
    only the plan was not. ``independent``: no sample depends on another.
    """

    def __init__(
        self,
        context: Context,
        parameters: Mapping[str, Tensor],
        replayed: bool = False,
        why: str = "",
        independent: bool = False,
    ) -> None:
        self.context, self.parameters, self.replayed = context, parameters, replayed
        self.independent = independent
        why = why or "there is only one"
        self.reason = f"Every sample is pulled back through the whole model: {why}."
        self._totals: dict[str, Tensor] = {}
        if replayed:
            # The replay is connected to leaves of its own, by which it is differentiated.
            self.parameters = leaves_of(parameters)
        self.ran = self._run(context)
        self.predictions = self.ran.predictions
        self.at = self.ran.loss
        self.cotangents = self.at.slope_of_samples

    def _run(self, context: Context) -> eager.EagerModel:
        if self.replayed:
            return _replay(context, self.parameters)
        return eager.run(context, self.parameters)

    @property
    def loss(self) -> LossAt:
        return self.at

    def feed(
        self,
        chunks: Chunking,
        take: Take,
        outs: Mapping[str, Tensor],
        cotangents: Mapping[int, Tensor] | None = None,
        last: bool = True,
    ) -> None:
        if cotangents is None:
            cotangents = self.cotangents
        # The cotangents of all other samples are zero: exact, at the price of N backward passes.
        with task("Rows by the whole model, one by one", self.context.samples) as passes:
            for n in passes.over(range(self.context.samples)):
                of_sample = {}
                for i, g in cotangents.items():
                    if i in self.predictions:  # it depends on parameters
                        of_sample[i] = self._layout(i).only(g, n, n + 1)[0]
                for name, g in self._row(n, of_sample).items():
                    block = RowBlock(slice(n, n + 1), g[None])
                    take(name, block.with_total(partial(self._total, name)))

    def _row(self, n: int, of_sample: Mapping[int, Tensor]) -> dict[str, Tensor]:
        """Return the row of sample n, for cotangents that are zero for all others."""
        row = self._pull(of_sample)
        # Zero times what is not finite is not a number: another sample may be in this row. Where
        # it has no part in it, there is a batch without it.
        if self.independent and not is_finite(row):
            alone = filled_with(self.context, n)
            if alone is not None:
                row = self._run(alone).pull(of_sample, self.parameters)
        return row

    def _total(self, name: str) -> Tensor:
        """Return the sum of all rows of a parameter; the first call computes those of all
        parameters.
        """
        # Kept, as every block of a sample asks for the same sum.
        if not self._totals:
            like = next(iter(self.parameters.values()))
            ones = like.new_ones(self.context.samples, dtype=real(like.dtype))
            self._totals = self.weighted_sum(ones)
        return self._totals[name]

    def _layout(self, i: int) -> Layout:
        """Return where the samples lie in prediction ``i``."""
        return Layout(self.context.axes[i], self.context.samples)

    def _pull(self, cotangents: Mapping[int, Tensor]) -> dict[str, Tensor]:
        return self.ran.pull(cotangents, self.parameters)

    def weighted_sum(self, weights: Tensor) -> dict[str, Tensor]:
        scaled = {}
        for i, g in self.cotangents.items():
            scaled[i] = self._layout(i).scaled(g, weights)
        return self._pull(scaled)

    def sites(self) -> list[SitePlan]:
        return [SitePlan((name,), "", "", "by autograd", "model") for name in self.parameters]

    def pullbacks(self, chunks: Chunking) -> tuple[int, int]:
        return self.context.samples, 1

    def rest(self) -> dict[str, Tensor]:
        # The rest does not depend on the plan, so that a replay gives it where one is faithful.
        if self.replayed:
            return ReplayedRows(self.context, self.parameters, "component").rest()
        rest: dict[str, Tensor] = {}
        joined = self.at.slope_of_joined
        if joined:
            rest = without_zeros(self._pull(joined))
        if not self.context.split:
            output = self._with_constant_outputs()
            with self.context.program.untouched(after=self.ran.after):
                value = loss_of(self.context, output)
                history = self.context.graph.has_history
                add_into(rest, nonzero_gradients(value, self.parameters, history))
        return rest

    def _with_constant_outputs(self) -> Any:
        """Return the model's output with all detached by which the loss is differentiated."""
        # The loss sees the same structure; what is no such output stays connected.
        leaves, spec = tree_flatten(self.ran.output)
        # The graph lists the predictions in the order of the tensors among the leaves.
        indices = iter(ref.index for ref in self.context.graph.predictions)
        detached = []
        for leaf in leaves:
            if isinstance(leaf, Tensor) and next(indices) in self.context.outputs.smooth:
                leaf = leaf.detach()
            detached.append(leaf)
        return tree_unflatten(detached, spec)


def _replay(context: Context, leaves: Mapping[str, Tensor]) -> eager.EagerModel:
    """Return the recorded model after a forward pass, connected to ``leaves``."""
    graph = context.graph
    feed = dict(context.data)
    for i, value in enumerate(graph.values):
        if value.kind == "parameters" and value.name in leaves:
            feed[i] = leaves[value.name]
    # The outputs of the loss, what it reads beside them, and all that is returned.
    read = graph.read_by_loss(context.outputs.smooth)
    predictions = [ref.index for ref in graph.predictions]
    indices = list(dict.fromkeys([*context.outputs.smooth, *read, *predictions]))
    with torch.enable_grad():
        outputs = graph.run(feed, indices, steps=graph.forward_steps)
    values = dict(zip(indices, outputs, strict=True))
    return eager.EagerModel(context, None, values, {i: values[i] for i in read}, None)
