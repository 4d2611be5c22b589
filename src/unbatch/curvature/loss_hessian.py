"""The second derivative of the loss by the predictions: which form it has, and a root of it.

``H = ∇²_F L`` is block diagonal by samples for a sum of losses of single predictions; often it is sparser still. Which
form it has is not read off the code of the loss: forms are guessed, from the sparsest on, and each guess is put to the
test by products with random vectors, which tell two matrices apart with probability one.

Legend as in ``roots.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from unbatch.autodiff.loss import LossAt
from unbatch.curvature.hessian_root import Factor, Grid, Joint
from unbatch.linalg.precision import DOUBLE, SINGLE
from unbatch.linalg.probes import gaussian_like, seeded

SOFTMAX = "of a softmax"


LARGEST_BLOCK = 1024  # entries of a block that is decomposed


LARGEST_JOINT = 4096  # entries of all predictions whose Hessian is formed


def joint(loss: LossAt, dims: Mapping[int, int]) -> Joint | None:
    """From the whole Hessian, ``[M, M]`` with M entries of all predictions; None where that is too large."""
    at = loss.in_double() or loss
    shapes = {i: at.predictions[i].shape for i in dims}
    total = sum(math.prod(s) for s in shapes.values())
    if total > LARGEST_JOINT:
        return None
    like = next(iter(at.predictions.values()))
    rows = []
    for unit in torch.eye(total, dtype=like.dtype, device=like.device):
        found = at.hessian_times(_cut(unit, shapes))
        rows.append(torch.cat([found[i].reshape(-1) for i in shapes]))
    whole = torch.stack(rows)
    values, vectors = torch.linalg.eigh((whole + whole.mT) / 2)
    felt = values.abs() > total * torch.finfo(values.dtype).eps * values.abs().max()
    columns = (vectors[:, felt] * values[felt].abs().sqrt()).T
    dtype = next(iter(loss.predictions.values())).dtype
    stacked = [_cut(c.to(dtype), shapes) for c in columns]
    empty = {i: like.new_zeros(0, *s, dtype=dtype) for i, s in shapes.items()}
    named = {i: torch.stack([c[i] for c in stacked]) for i in shapes} if stacked else empty
    return Joint(named, _sign(values[felt]).to(dtype))


def _cut(flat: Tensor, shapes: Mapping[int, Sequence[int]]) -> dict[int, Tensor]:
    pieces = flat.split([math.prod(s) for s in shapes.values()])
    return {i: piece.view(*shape) for (i, shape), piece in zip(shapes.items(), pieces, strict=True)}


def factor(loss: LossAt, dims: Mapping[int, int]) -> Factor | None:
    """The sparsest form that stands the test; None where blocks are too large to be decomposed.

    ``dims``: the sample axis of each prediction. That H is block diagonal by samples is for the structure to say. What
    was found is kept with the loss's setting, and is what is tried first on the next batch.
    """
    search = _Search(loss.in_double() or loss, dims)
    found = search.run(loss.setting.last_form)
    loss.setting.last_form = search.found
    dtype = next(iter(loss.predictions.values())).dtype
    return found.to(dtype) if found is not None else None


class _Search:
    def __init__(self, loss: LossAt, dims: Mapping[int, int]) -> None:
        self.loss, self.dims = loss, dims
        self.shapes = {i: tuple(loss.predictions[i].shape) for i in dims}
        self.generator = seeded(0)
        self.found: tuple[str, int | None] | None = None
        self.tests = [self._test()]

    def _test(self) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        v = {i: self._random(self.loss.predictions[i]) for i in self.dims}
        return v, self.loss.hessian_times(v)

    @cached_property
    def rounding(self) -> float:
        """By how far H is from linear: a loss that casts its predictions rounds more coarsely than these do."""
        if next(iter(self.loss.predictions.values())).dtype != torch.float64:
            return SINGLE
        v, product = self.tests[0]
        third = self.loss.hessian_times({i: x / 3 for i, x in v.items()})
        size = max(float(h.abs().max()) for h in product.values())
        off = max(float((3 * third[i] - product[i]).abs().max()) for i in third)
        return DOUBLE if off <= DOUBLE / 1e3 * size else min(SINGLE, 1e3 * off / size)

    def run(self, known: tuple[str, int | None] | None) -> Factor | None:
        guesses = [("_zero", None), *([known] if known is not None else []), ("_of_entries", None)]
        guesses += [(kind, axis) for axis in self._axes() for kind in ("_softmax", "_blocks")]
        for kind, axis in dict.fromkeys([*guesses, ("_blocks", None)]):
            factor_ = getattr(self, kind)(axis)
            if factor_ is not None:
                self.found = (kind, axis)
                return factor_
        return None

    def _random(self, like: Tensor) -> Tensor:
        return gaussian_like(like, self.generator)

    def _axes(self) -> list[int]:
        """Along which entries may meet: classes come second or last."""
        if len(self.shapes) > 1:
            return []
        ((i, shape),) = self.shapes.items()
        return [
            a for a in dict.fromkeys([1, len(shape) - 1, 0]) if a < len(shape) and a != self.dims[i]
        ][:2]

    def _grid(self, axis: int | None) -> Grid:
        return Grid(self.shapes, self.dims, axis)

    def _holds(self, guess: Factor) -> Factor | None:
        """A guess that gives what the loss gives, for random vectors that it was not made from."""
        self.tests += [self._test()] if len(self.tests) == 1 else []
        for v, product in self.tests[1:]:
            found = guess.hessian_times(v)
            off, size = _largest({i: found[i] - product[i] for i in found}), _largest(product)
            explained = (
                off <= DOUBLE * size or off <= self.rounding * size
            )  # each costs more than the one before
            if not explained and not off <= self.rounding * size + 10 * self._noise:
                return None
        return guess

    @cached_property
    def _noise(self) -> float:
        """What products lose to rounding: so far are they from being linear. Much, where a softmax is saturated."""
        (v, of_v), (w, of_w) = self.tests[:2]
        off = 0.0
        for a in (1.0, -1.0, 0.3):
            both = self.loss.hessian_times({i: v[i] + a * w[i] for i in v})
            off = max(
                off, _largest({i: h - of_v[i] - a * of_w[i] for i, h in both.items() if i in of_v})
            )
        return off

    # -- the guesses, from the sparsest on --

    def _zero(self, _: int | None) -> Factor | None:
        largest = max(
            (float(h.abs().max()) for _, product in self.tests for h in product.values()),
            default=0.0,
        )
        slope = max((float(g.abs().max()) for g in self.loss.slope.values()), default=0.0)
        if largest > 1e-12 * slope:
            return None
        grid = self._grid(-1)
        empty = grid.split(self.tests[0][0]).new_zeros(*grid.split(self.tests[0][0]).shape, 0)
        return Factor(grid, empty, empty.sum(2), "zero")

    def _of_entries(self, _: int | None) -> Factor | None:
        grid = self._grid(-1)
        ones = {i: torch.ones_like(self.loss.predictions[i]) for i in self.shapes}
        h = grid.split(self.loss.hessian_times(ones))
        return self._holds(Factor(grid, h.abs().sqrt()[..., None], _sign(h), "of single entries"))

    def _softmax(self, axis: int | None) -> Factor | None:
        """``Q (diag p − ppᵀ)`` at each position, with ``p`` the softmax of the predictions: any cross-entropy.

        With ``u = √p`` the projector ``I − uuᵀ`` is ``BBᵀ``, B the columns of the reflection that takes the last unit
        vector to u; so ``S = √Q diag(u) B`` has a column less than there are classes.
        """
        grid = self._grid(axis)
        p = grid.split(self.loss.predictions).softmax(-1)
        v, product = (grid.split(x) for x in self.tests[0])
        spread = (p * v * v).sum(-1) - (p * v).sum(-1).square()
        amount = (v * product).sum(-1) / spread.clamp_min(torch.finfo(p.dtype).tiny)
        u, classes = p.sqrt(), p.shape[-1]
        if classes < 2 or not amount.isfinite().all():
            return None
        last = u.clone()
        last[..., -1] += 1
        basis = torch.eye(classes, dtype=p.dtype, device=p.device)[:, :-1] - (
            last[..., :, None] * (u[..., :-1] / last[..., -1:])[..., None, :]
        )
        root = amount.abs().sqrt()[..., None, None] * u[..., None] * basis
        signs = _sign(amount)[..., None].expand(*root.shape[:2], root.shape[3])
        return self._holds(Factor(grid, root, signs, SOFTMAX, whole=basis))

    def _blocks(self, axis: int | None) -> Factor | None:
        """Any symmetric block at each position, by its eigenvectors."""
        grid = self._grid(axis)
        n, t, c = grid.split(self.loss.predictions).shape
        if c > LARGEST_BLOCK or n * t * c * c > LARGEST_BLOCK**2 * 64:
            return None
        block = self.tests[0][0][next(iter(self.shapes))].new_zeros(n, t, c, c)
        for j in range(c):
            unit = block.new_zeros(n, t, c)
            unit[..., j] = 1
            block[..., j] = grid.split(self.loss.hessian_times(grid.join(unit)))
        values, vectors = torch.linalg.eigh((block + block.mT) / 2)
        order = values.abs().argsort(-1, descending=True)
        values, vectors = (
            values.gather(-1, order),
            vectors.gather(-1, order[..., None, :].expand_as(vectors)),
        )
        felt = values.abs() > c * torch.finfo(values.dtype).eps * values.abs().amax(
            -1, keepdim=True
        )
        values, rank = values * felt, int(felt.sum(-1).max()) if felt.numel() else 0
        root = (vectors * values.abs().sqrt()[..., None, :])[..., :rank]
        form = (
            "of blocks of all entries of a sample"
            if axis is None
            else f"of blocks along axis {axis}"
        )
        return self._holds(Factor(grid, root, _sign(values)[..., :rank], form))


def _largest(named: Mapping[int, Tensor]) -> float:
    return max((float(t.abs().max()) for t in named.values()), default=0.0)


def _sign(t: Tensor) -> Tensor:
    return torch.where(t < 0, -1.0, 1.0).to(t)


# --- factors that are drawn -----------------------------------------------------------------------


def likelihood(exact: Factor, loss: LossAt) -> Tensor | None:
    """``p``, ``[n, t, c]``, of which H is ``Q (diag p − ppᵀ)``: labels can be drawn. None for any other form."""
    if exact.form != SOFTMAX:
        return None
    return exact.grid.split(loss.predictions).double().softmax(-1).to(exact.root)


def sampled(exact: Factor, probabilities: Tensor | None, count: int, seed: int) -> Factor:
    """``count`` columns for each sample whose mean square is H: unbiased, for H that is positive semi-definite.

    For a softmax (``probabilities`` ``[n, t, c]``) labels are drawn, so the columns are gradients of the likelihood
    (Kunstner, Balles, Hennig 2019); otherwise they are Gaussian, which for squared errors is the same.
    """
    generator = torch.Generator(exact.root.device).manual_seed(seed)
    n, t, c, k = exact.root.shape
    if probabilities is None:
        draws = torch.randn(
            n, t, k, count, generator=generator, dtype=torch.float64, device=exact.root.device
        )
        columns = exact.root @ draws.to(exact.root)
    else:
        labels = torch.multinomial(
            probabilities.double().flatten(0, 1), count, True, generator=generator
        )
        hits = torch.nn.functional.one_hot(labels, c).mT.view(n, t, c, count).to(exact.root)
        amount = exact.root.square().sum((2, 3)) / (1 - probabilities.square().sum(-1)).clamp_min(
            1e-30
        )
        columns = (probabilities[..., None] - hits) * amount.sqrt()[..., None, None]
    columns = columns / count**0.5
    whole = replace(exact.grid, axis=None)
    flat = torch.stack(
        [whole.split(exact.grid.join(column))[:, 0] for column in columns.unbind(-1)], -1
    )
    ones = torch.ones(n, 1, count, dtype=flat.dtype, device=flat.device)
    return Factor(
        whole, flat[:, None], ones, exact.form, sampled=f"{count} draws a sample, seed {seed}"
    )
