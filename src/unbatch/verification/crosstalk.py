"""How strongly each prediction listens to each sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from unbatch.verification.experiment import Experiment

SHADES = " ░▒▓█"


@dataclass(frozen=True)
class Crosstalk:
    """``matrix[n, m]``: ``‖∂F_n/∂x_m‖`` (Frobenius).

    For ``by="replacement"`` the change of ``F_n`` when x_m is replaced. ``exact`` is False for an estimate from random
    probes (unbiased in the squares). Rows of predictions that were not asked for are zero, and no part of ``strength``.
    """

    matrix: Tensor
    by: str
    exact: bool

    @property
    def strength(self) -> float:
        """The share of the off-diagonal part in the whole, by squares: 0 when predictions are independent."""
        squares = self.matrix.double() ** 2
        return (
            float(1 - squares.diagonal().sum() / squares.sum()) if float(squares.sum()) > 0 else 0.0
        )

    def __str__(self) -> str:
        """A picture: row n is a prediction, column m a sample, darker is stronger (on a log scale of 4 decades)."""
        top = float(self.matrix.max()) or 1.0
        level = ((self.matrix / top).clamp_min(1e-30).log10() / 4 + 1).clamp(0, 1)
        shade = (
            torch.where(
                self.matrix > 0, 1 + (level * (len(SHADES) - 1.001)).floor(), torch.zeros(())
            )
            .clamp_max(len(SHADES) - 1)
            .long()
        )
        lines = ["  ".join(["F\\x", " ".join(f"{m % 100:2d}" for m in range(len(self.matrix)))])]
        lines += [
            f"{n:3d}  " + " ".join(SHADES[int(s)] * 2 for s in row) for n, row in enumerate(shade)
        ]
        kind = "" if self.exact else ", estimated"
        return "\n".join(
            [*lines, f"off-diagonal share {self.strength:.1%} of the squares (by {self.by}{kind})"]
        )


def crosstalk(
    oracle: Experiment, probes: int | None = None, samples: Sequence[int] | None = None
) -> Crosstalk:
    """The ``[N, N]`` matrix; see ``Problem.crosstalk``."""
    asked = list(range(oracle.samples)) if samples is None else list(samples)
    leaves, spec = tree_flatten(oracle.inputs)
    smooth = [
        i
        for i, (t, d) in enumerate(zip(leaves, oracle.dims, strict=True))
        if d is not None and isinstance(t, Tensor) and t.is_floating_point()
    ]
    if not smooth:
        return Crosstalk(_by_replacement(oracle, asked), "replacement", True)
    moving = {i: leaves[i].detach().clone().requires_grad_() for i in smooth}
    inputs = tree_unflatten([moving.get(i, t) for i, t in enumerate(leaves)], spec)
    predictions = _rows(oracle, oracle.forward(inputs))
    squares = torch.zeros(oracle.samples, oracle.samples, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    entries = predictions.shape[1]
    directions = (
        torch.eye(entries)
        if probes is None
        else torch.randn(probes, entries, generator=generator) / probes**0.5
    )
    if not predictions.requires_grad:
        return Crosstalk(squares, "derivative", True)
    for n in asked:
        for u in directions.to(predictions):
            with oracle.backward():
                value, xs = predictions[n] @ u, list(moving.values())
                grads = torch.autograd.grad(value, xs, retain_graph=True, allow_unused=True)
            for i, g in zip(moving, grads, strict=True):
                if g is not None:
                    squares[n] += (
                        g.movedim(oracle.dims[i] or 0, 0)
                        .reshape(oracle.samples, -1)
                        .double()
                        .pow(2)
                        .sum(1)
                        .cpu()
                    )
    return Crosstalk(squares.sqrt(), "derivative", probes is None)


def _rows(oracle: Experiment, predictions: list[Tensor]) -> Tensor:
    rows: list[Any] = [
        p.movedim(d, 0).reshape(oracle.samples, -1)
        for p, d in zip(predictions, oracle.out_dims, strict=True)
        if d is not None and p.is_floating_point()
    ]
    return torch.cat(rows, 1) if rows else torch.zeros(oracle.samples, 0)


def _by_replacement(oracle: Experiment, asked: Sequence[int]) -> Tensor:
    base = oracle.rows(oracle.base)
    out = torch.zeros(oracle.samples, oracle.samples, dtype=torch.float64)
    for m in range(oracle.samples):
        keep = torch.arange(oracle.samples) != m
        new = oracle.rows(oracle.predict(oracle.changed(keep, "rolled", m)))
        out[asked, m] = (new - base)[asked].norm(dim=1).to(out)
    return out
