"""The loss as a function of the predictions, on predictions and targets of other samples.

In float64 where the loss takes it. What rounding does to values and gradients is measured here,
too; what follows from a difference is decided by the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from unbatch.capture.after_run import AfterRun, lasting
from unbatch.capture.own_nodes import own_nodes
from unbatch.capture.steps import Ref
from unbatch.capture.trees import copied
from unbatch.linalg.precision import (
    LOSS_IN_DOUBLE,
    LOSS_WITH_CASTS,
    NARROW,
    LossTolerances,
    in_double,
)
from unbatch.verification.draw import Draw
from unbatch.verification.experiment import Experiment

# The step of the central differences of ``slope``: values in float64 lose six digits to it.
STEP = 1e-5

# By how much predictions are nudged, relatively, to see what is rounding in a gradient.
NUDGE = 1e-7

# In place of the size of what may be zero.
TINY = 1e-300


@dataclass(frozen=True, eq=False)
class LossExperiment:
    """The loss as a function of the rows of the predictions.

    ``leaves``, ``spec``: what the model returned, flattened, and how to put it together again.
    ``at``: which leaves the loss reads as predictions. ``boundary``: where the loss lies inside the
    model, the values that its steps read. ``double``: whether it is evaluated in float64.
    """

    experiment: Experiment
    leaves: Sequence[Any]
    spec: Any
    at: Sequence[int]
    targets: Any
    boundary: Mapping[int, Tensor]
    double: bool

    @property
    def draw(self) -> Draw:
        """How much is tried."""
        return self.experiment.draw

    # -- values --

    def value(self, predictions: Sequence[Tensor], after: AfterRun | None = None) -> Tensor:
        """Return the loss at other predictions, connected to them.

        ``after``: notes what the run leaves.
        """
        program = self.experiment.program
        if program.loss is None:
            return self._value_inside_model(predictions)
        # All that the model returned, as a loss may read more than the predictions.
        leaves = list(self._cast_leaves)
        for i, p in zip(self.at, predictions, strict=True):
            leaves[i] = p
            if self.double and p.is_floating_point():
                leaves[i] = p.to(torch.float64)
        output = tree_unflatten(leaves, self.spec)
        targets = tree_map(self._cast, self.targets)
        if program.loss_is_of_library:
            after = None  # no backward pass of a library's reads it
        with program.untouched(self.experiment.graph.rng, after=after), torch.enable_grad():
            writes = self.experiment.graph.loss_writes
            if writes:
                targets = tree_map(copied, targets)  # what it writes lasts for the derivatives
            with lasting() if writes else nullcontext():
                value: Tensor = program.evaluate(output, targets)
        return value

    def _value_inside_model(self, predictions: Sequence[Tensor]) -> Tensor:
        """Return the loss by its recorded steps: there is no function to call."""
        graph = self.experiment.graph
        feed = dict(self.boundary)
        feed.update(zip(self.experiment.prediction_refs, predictions, strict=True))
        return graph.run(feed, [_loss_ref(self.experiment)], steps=graph.loss_steps)[0]

    def _cast(self, leaf: Any) -> Any:
        """Return a leaf of predictions or targets in the precision of the test."""
        if self.double and isinstance(leaf, Tensor):
            return in_double(leaf.detach())
        return leaf

    @cached_property
    def _cast_leaves(self) -> list[Any]:
        """What the model returned, in the precision of the test."""
        return [self._cast(leaf) for leaf in self.leaves]

    # -- other predictions and targets --

    def predictions(self) -> list[Tensor]:
        """Return the predictions of the batch, as new tensors in the precision of the test."""
        return self.swapped({})

    def swapped(self, rows: Mapping[int, int]) -> list[Tensor]:
        """Return the predictions with row n taken from sample ``rows[n]``."""
        predictions = []
        for i, dim in zip(self.at, self.experiment.out_dims, strict=True):
            leaf = self._cast_leaves[i].detach()
            # Rows are written to in place, and the model may return an expanded tensor.
            t = leaf.clone(memory_format=torch.contiguous_format)
            if dim is not None:
                # Read from the original: samples may be swapped in a circle.
                for n, m in rows.items():
                    t.select(dim, n).copy_(leaf.select(dim, m))
            predictions.append(t)
        return predictions

    def scaled(self, rows: Sequence[int], factor: float) -> list[Tensor]:
        """Return the predictions with some rows multiplied by ``factor``."""
        predictions = self.predictions()
        for t, dim in zip(predictions, self.experiment.out_dims, strict=True):
            if dim is None or not t.is_floating_point():
                continue
            for n in rows:
                t.select(dim, n).mul_(factor)
        return predictions

    def with_targets(self, change: Callable[[Tensor], Tensor]) -> LossExperiment:
        """Return the same with ``change`` made to each target, its samples along the first axis."""
        leaves, spec = tree_flatten(self.targets)
        for i, dim in enumerate(self._target_dims(leaves)):
            if dim is not None:
                leaves[i] = change(leaves[i].movedim(dim, 0)).movedim(0, dim)
        return replace(self, targets=tree_unflatten(leaves, spec))

    def _target_dims(self, leaves: Sequence[Any]) -> Sequence[int | None]:
        """Return the sample axis of each target; the first where that is not known and fits."""
        if self.experiment.target_dims is not None:
            return self.experiment.target_dims
        samples = self.experiment.samples
        dims: list[int | None] = []
        for leaf in leaves:
            fits = isinstance(leaf, Tensor) and leaf.shape[:1] == (samples,)
            dims.append(0 if fits else None)
        return dims

    # -- derivatives --

    def gradient(self, predictions: Sequence[Tensor]) -> Tensor:
        """Return the gradient by the predictions, ``[N, entries]``; zero where nothing flows."""
        samples = self.experiment.samples
        leaves = [_as_leaf(p) for p in predictions]
        after = AfterRun()
        value = self.value(leaves, after)
        smooth, dims = [], []
        for p, dim in zip(leaves, self.experiment.out_dims, strict=True):
            if p.requires_grad:
                smooth.append(p)
                dims.append(dim)
        grads: Sequence[Tensor | None] = [None] * len(smooth)
        if value.requires_grad:
            with self._differentiated(value, after):
                grads = torch.autograd.grad(value, smooth, allow_unused=True)
        rows = []
        for p, grad, dim in zip(smooth, grads, dims, strict=True):
            if dim is None:
                continue
            if grad is None:
                grad = torch.zeros_like(p)
            rows.append(grad.movedim(dim, 0).reshape(samples, -1))
        return torch.cat(rows, 1) if rows else torch.zeros(samples, 0)

    def _differentiated(self, value: Tensor, after: AfterRun) -> AbstractContextManager[object]:
        """Return a context for a backward pass through the loss: as one right after its run."""
        # Where all of it is PyTorch's, nothing can be changed.
        if self.experiment.graph.hooks_loss or own_nodes([value]):
            return self.experiment.program.untouched(after=after)
        return nullcontext()

    def slope(self, predictions: Sequence[Tensor], n: int, entries: int = 6) -> Tensor:
        """Return the first entries of the gradient by prediction n, by central differences.

        Differences of values see through ``detach``, which hides a dependence from autograd.
        """
        # Few entries, as each takes two evaluations of the loss.
        slopes = []
        for i, dim in enumerate(self.experiment.out_dims):
            if dim is None or not predictions[i].is_floating_point():
                continue
            row = predictions[i].select(dim, n)
            first = range(min(entries, row.numel()))
            for entry in self.draw.some(first, 1, "first entries of a row"):
                place = np.unravel_index(entry, row.shape)
                above = self._value_beside(predictions, i, (dim, n), place, STEP)
                below = self._value_beside(predictions, i, (dim, n), place, -STEP)
                slopes.append((above - below) / (2 * STEP))
        if not slopes:
            return torch.zeros(0, dtype=torch.float64)
        return torch.stack(slopes).to(torch.float64)

    def _value_beside(
        self, predictions: Sequence[Tensor], i: int, row: tuple[int, int], place: Any, step: float
    ) -> Tensor:
        """Return the loss with one entry of the i-th prediction moved; ``row``: axis and sample."""
        moved = [p.clone() for p in predictions]
        moved[i].select(*row)[place] += step
        return self.value(moved).detach()

    # -- how much is rounding --

    @cached_property
    def rounding(self) -> float:
        """How much the loss changes, relative to its size, when predictions move by a rounding.

        The largest change of three trials: where values cancel, it is far more than a rounding of
        the result.
        """
        generator = torch.Generator().manual_seed(0)
        predictions = self.predictions()
        value = self.value(predictions).detach()
        size = float(value.abs()) + TINY
        worst = 0.0
        for _ in self.draw.some(range(3), 1, "trials of rounding"):
            nudged_value = self.value([_nudged(p, generator) for p in predictions]).detach()
            worst = max(worst, float((nudged_value - value).abs()) / size)
        return worst

    @cached_property
    def fine(self) -> bool:
        """Whether values are good to float64: nothing on the way is cast to a coarser type."""
        if not self.double:
            return False
        for step in self.experiment.graph.loss_steps:
            if step.name == "_to_copy" and step.kwargs.get("dtype") in NARROW:
                return False
        # A program may cast where the recording, made in another precision, did not have to.
        return self.value(self.predictions()).dtype == torch.float64

    @property
    def tolerances(self) -> LossTolerances:
        """What a difference has to exceed to count as a counterexample."""
        return LOSS_IN_DOUBLE if self.fine else LOSS_WITH_CASTS

    def floor(self, gradient: Tensor) -> float:
        """Return the norm below which a row of the gradient is rounding, and has no direction.

        Relative to the largest row; by the size of loss and predictions, for gradients that vanish
        as a whole; and by a trial, as rounding grows inside some losses.
        """
        allowed = self.tolerances
        predictions = self.predictions()
        # A typical slope: the loss over the size of what it is a function of.
        slope = float(self.value(predictions).detach().abs()) / (_largest(predictions) + TINY)
        nudged = self.gradient(scaled_by(predictions, 1 + NUDGE))
        noise = 10 * float((nudged - self.gradient(predictions)).norm(dim=1).max())
        relative = allowed.norm * float(gradient.norm(dim=1).max())
        return max(relative, allowed.size * slope, noise) + TINY


def _nudged(p: Tensor, generator: torch.Generator) -> Tensor:
    """Return the values moved by up to half a rounding; integers stay."""
    if not p.is_floating_point():
        return p
    offset = torch.rand(p.shape, generator=generator).to(p) - 0.5
    return p * (1 + torch.finfo(p.dtype).eps * offset)


def scaled_by(predictions: Sequence[Tensor], factor: float) -> list[Tensor]:
    """Return the predictions times a number; integers stay."""
    return [_times(p, factor) for p in predictions]


def _times(p: Tensor, factor: float) -> Tensor:
    return p * factor if p.is_floating_point() else p


def _as_leaf(p: Tensor) -> Tensor:
    """Return a variable of autograd with the same values; integers stay."""
    if not p.is_floating_point():
        return p
    return p.detach().clone().requires_grad_()


def _largest(predictions: Sequence[Tensor]) -> float:
    """Return the largest magnitude of an entry, 1 where there is none."""
    sizes = []
    for p in predictions:
        if not p.is_floating_point() or not p.numel():
            continue
        sizes.append(float(p.abs().max()))
    return max(sizes, default=1.0)


# --- from an experiment ---------------------------------------------------------------------------


def loss_experiment(experiment: Experiment, output: Any) -> LossExperiment:
    """Return the loss of an experiment as a function of predictions; ``output``: of the model."""
    if experiment.program.loss is None:
        return _inside_model(experiment)
    leaves, spec = tree_flatten(output)
    # Places count tensors, and a model may return other things as well.
    tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    at = [tensors[i] for i in experiment.places]
    targets = experiment.targets
    wide = LossExperiment(experiment, leaves, spec, at, targets, boundary={}, double=True)
    if _is_finite(wide):
        return wide
    return replace(wide, double=False)


def _is_finite(loss: LossExperiment) -> bool:
    """Return whether the loss can be evaluated in this precision, and is finite there."""
    try:
        return bool(torch.isfinite(loss.value([loss.leaves[i] for i in loss.at])))
    except Exception:
        return False


def _inside_model(experiment: Experiment) -> LossExperiment:
    """Return the loss that a model computes: its steps alone, from the values that they read."""
    graph = experiment.graph
    read: set[Ref] = set()
    for step in graph.loss_steps:
        read.update(step.refs())
    boundary: dict[int, Tensor] = {}

    def keep(i: int, t: Tensor) -> None:
        if Ref(i) in read:
            # Later steps may write to it.
            boundary[i] = t.detach().clone()

    graph.run({}, [_loss_ref(experiment)], visit=keep)
    leaves = [boundary[ref] for ref in experiment.prediction_refs]
    double = all(leaf.dtype == torch.float64 for leaf in leaves)
    at = range(len(leaves))
    return LossExperiment(experiment, leaves, None, at, experiment.targets, boundary, double)


def _loss_ref(experiment: Experiment) -> int:
    """Return the value of the graph that is the loss; experiments on the loss are made of one."""
    loss = experiment.graph.loss
    assert loss is not None
    return loss.index
