"""How strongly each prediction depends on each sample: the matrix behind ``Problem.crosstalk``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from unbatch.capture.after_run import AfterRun
from unbatch.capture.trees import dense
from unbatch.errors import MSG_HIDDEN, MSG_NOT_REPLACED, StructureError
from unbatch.running.tasks import task
from unbatch.verification.experiment import Experiment

SHADES = " ░▒▓█"
DECADES = 4  # from the darkest shade to the lightest that is not blank


@dataclass(frozen=True)
class Crosstalk:
    """``matrix[n, m]``: ``‖∂F_n/∂x_m‖`` (Frobenius norm).

    For ``by="replacement"`` the change of ``F_n`` when x_m is replaced. ``exact`` is False for an
    estimate from random probes (unbiased in the squares). Rows of predictions that were not asked
    for are zero, and no part of ``strength``.
    """

    matrix: Tensor
    by: str
    exact: bool

    @property
    def strength(self) -> float:
        """The share of the off-diagonal part, by squares: 0 when predictions are independent."""
        squares = self.matrix.double() ** 2
        total = squares.sum()
        if not float(total) > 0:
            return 0.0
        return float(1 - squares.diagonal().sum() / total)

    def __str__(self) -> str:
        """Return a picture: a row per prediction, a column per sample, darker is stronger (log)."""
        samples = " ".join(f"{m % 100:2d}" for m in range(len(self.matrix)))
        lines = [f"F\\x  {samples}"]
        for n, row in enumerate(_shades(self.matrix).tolist()):
            cells = " ".join(SHADES[shade] * 2 for shade in row)
            lines.append(f"{n:3d}  {cells}")
        kind = "" if self.exact else ", estimated"
        share = f"off-diagonal share {self.strength:.1%} of the squares (by {self.by}{kind})"
        return "\n".join([*lines, share])


def _shades(matrix: Tensor) -> Tensor:
    """Return the index of each entry's shade; only what is zero is blank."""
    largest = float(matrix.max()) or 1.0
    # 1 for the largest entry, 0 for what is four decades below it and less.
    level = ((matrix / largest).clamp_min(1e-30).log10() / DECADES + 1).clamp(0, 1)
    shade = 1 + (level * (len(SHADES) - 1.001)).floor()
    shade = torch.where(matrix > 0, shade, torch.zeros(()))
    return shade.clamp_max(len(SHADES) - 1).long()


def crosstalk(
    experiment: Experiment, probes: int | None = None, samples: Sequence[int] | None = None
) -> Crosstalk:
    """Return the ``[N, N]`` matrix by derivatives; by replacement where inputs are integers.

    ``probes``: random directions of the predictions; by default every entry. ``samples``: the rows
    to compute. Raises ``StructureError`` where the predictions are not known.
    """
    graph = experiment.graph
    if graph.hides_predictions:
        raise StructureError(MSG_HIDDEN.format(what=", ".join(graph.closed)))
    rows = list(range(experiment.samples)) if samples is None else list(samples)
    smooth = _smooth_inputs(experiment)
    if not experiment.samples:
        return Crosstalk(torch.zeros(0, 0, dtype=torch.float64), "derivative", True)
    if not smooth:
        # Tokens have no derivatives.
        return Crosstalk(_by_replacement(experiment, rows), "replacement", True)
    squares = torch.zeros(experiment.samples, experiment.samples, dtype=torch.float64)
    after = AfterRun()
    predictions = _predictions_at(experiment, smooth, after)
    if not predictions.requires_grad:
        # No input has an effect that autograd knows.
        return Crosstalk(squares, "derivative", True)
    directions = _directions(predictions.shape[1], probes).to(predictions)
    leaves = list(smooth.values())
    # ‖∂F_n/∂x_m‖² = Σ_u ‖∂(uᵀF_n)/∂x_m‖²: one backward pass for each u and all samples m.
    pulled = [(n, u) for n in rows for u in directions]
    with task("Derivatives of the predictions by the inputs", len(pulled)) as passes:
        for n, u in passes.over(pulled):
            with experiment.backward(after):
                grads = torch.autograd.grad(
                    predictions[n] @ u, leaves, retain_graph=True, allow_unused=True
                )
            for i, grad in zip(smooth, grads, strict=True):
                if grad is not None:
                    squares[n] += _squares_by_sample(grad, experiment.dims[i] or 0)
    return Crosstalk(squares.sqrt(), "derivative", probes is None)


def _smooth_inputs(experiment: Experiment) -> dict[int, Tensor]:
    """Return the floating-point inputs with a sample axis, by leaf, as new leaves of autograd."""
    leaves, _ = tree_flatten(experiment.inputs)
    smooth = {}
    for i, (leaf, dim) in enumerate(zip(leaves, experiment.dims, strict=True)):
        if dim is not None and isinstance(leaf, Tensor) and leaf.is_floating_point():
            smooth[i] = leaf.detach().clone().requires_grad_()
    return smooth


def _predictions_at(
    experiment: Experiment, smooth: Mapping[int, Tensor], after: AfterRun
) -> Tensor:
    """Return the predictions as ``[N, entries]``, connected to the inputs in ``smooth``."""
    leaves, spec = tree_flatten(experiment.inputs)
    for i, leaf in smooth.items():
        leaves[i] = leaf
    predictions = experiment.forward(tree_unflatten(leaves, spec), after)
    rows = []
    for p, dim in zip(predictions, experiment.out_dims, strict=True):
        if dim is not None and p.is_floating_point():
            rows.append(dense(p).movedim(dim, 0).reshape(experiment.samples, -1))
    if not rows:
        return torch.zeros(experiment.samples, 0)
    return torch.cat(rows, 1)


def _directions(entries: int, probes: int | None) -> Tensor:
    """Return directions ``u`` of a prediction with ``Σ uuᵀ = I``; of probes, in expectation."""
    if probes is None:
        return torch.eye(entries)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(probes, entries, generator=generator) / probes**0.5


def _squares_by_sample(grad: Tensor, dim: int) -> Tensor:
    """Return the squared norm of each sample's part of a gradient, ``[N]``."""
    rows = grad.movedim(dim, 0)
    return rows.reshape(len(rows), -1).double().pow(2).sum(1).cpu()


def _by_replacement(experiment: Experiment, rows: Sequence[int]) -> Tensor:
    """Return how far each prediction moves when one sample after the other is replaced."""
    base = experiment.rows(experiment.base)
    matrix = torch.zeros(experiment.samples, experiment.samples, dtype=torch.float64)
    with task("Replacing sample after sample", experiment.samples) as passes:
        for m in passes.over(range(experiment.samples)):
            others = torch.arange(experiment.samples) != m
            try:
                new = experiment.rows(experiment.predict(experiment.changed(others, "rolled", m)))
            except Exception as error:
                reason = str(error).partition("\n")[0]
                raise StructureError(MSG_NOT_REPLACED.format(sample=m, error=reason)) from error
            matrix[rows, m] = (new - base)[rows].norm(dim=1).to(matrix)
    return matrix
