"""The second derivative of the loss by the predictions: its products, its form, and factors of it.

``H = ∇²_F L`` is block diagonal by samples for a sum of losses of single predictions; often it is sparser still. Which
form it has is not read off the code of the loss: forms are guessed, from the sparsest on, and each guess is put to the
test by products with random vectors, which tell two matrices apart with probability one. A factor ``S`` with signs
``Σ`` has ``H = S Σ Sᵀ``; its columns are what the Gauss-Newton matrix is made of.

Legend: ``n`` sample, ``t`` position (entries at different positions do not meet in H), ``c`` entry at a position, ``k``
column of the factor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from unbatch.cotangents import LossAt, Named

LARGEST_BLOCK = 1024  # entries of a block that is decomposed
EXACT, COARSE = 1e-8, 2e-3  # relative errors that rounding explains, in float64 and in float32

# --- forms ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """How the entries of the predictions are laid out as ``[n, t, c]``.

    ``axis``: of the only prediction, along which entries meet; -1: an entry meets none but itself; None: all entries
    of a sample, over all predictions, may meet.
    """

    shapes: Mapping[int, tuple[int, ...]]
    dims: Mapping[int, int]  # the axes of the samples
    axis: int | None

    def split(self, v: Named) -> Tensor:
        """``[n, t, c]``."""
        rows = {i: v[i].movedim(self.dims[i], 0) for i in self.shapes}
        if self.axis is not None and self.axis >= 0:
            (only,) = rows.values()
            return only.movedim(self.axis, -1).flatten(1, -2) if only.ndim > 2 else only[:, None, :]
        flat = torch.cat([r.reshape(len(r), -1) for r in rows.values()], 1)
        return flat[:, :, None] if self.axis == -1 else flat[:, None, :]

    def join(self, t: Tensor) -> dict[int, Tensor]:
        """The inverse of ``split``."""
        if self.axis is not None and self.axis >= 0:
            ((i, shape),) = self.shapes.items()
            moved = list(torch.empty(shape, device="meta").movedim(self.dims[i], 0).movedim(self.axis, -1).shape)
            return {i: t.reshape(moved).movedim(-1, self.axis).movedim(0, self.dims[i])}
        flat, out, start = t.reshape(len(t), -1), {}, 0
        for i, shape in self.shapes.items():
            front = list(torch.empty(shape, device="meta").movedim(self.dims[i], 0).shape)
            size = torch.Size(front[1:]).numel()
            out[i] = flat[:, start : start + size].reshape(front).movedim(0, self.dims[i])
            start += size
        return out


@dataclass(frozen=True)
class Factor:
    """``H = S Σ Sᵀ``, sample by sample: ``root`` is S, ``[n, t, c, k]``, ``signs`` the diagonal of Σ, ``[n, t, k]``.

    ``whole``: ``[n, t, c, k]`` with ``S wholeᵀ`` the symmetric choice of S that has as many columns as entries, where
    that is another one. ``form`` names what H was found to be; ``sampled`` that S was drawn, with the seed.
    """

    grid: Grid
    root: Tensor
    signs: Tensor
    form: str
    whole: Tensor | None = None
    sampled: str = ""

    @property
    def columns(self) -> int:
        """How many columns a sample has: ``t·k``."""
        return self.root.shape[1] * self.root.shape[3]

    @property
    def entries(self) -> int:
        """``C``: entries of the prediction of one sample."""
        return self.root.shape[1] * self.root.shape[2]

    @property
    def ranks(self) -> Tensor:
        """``[n]``: how many columns of each sample are not zero."""
        return (self.root.abs().amax(2) > 0).sum((1, 2))

    @cached_property
    def lowest(self) -> float:
        """The lowest eigenvalue of a block; not below zero where H is positive semi-definite."""
        squares = self.root.square().sum(2) * self.signs
        return min(float(squares.min()), 0.0) if squares.numel() else 0.0

    def column(self, j: int) -> dict[int, Tensor]:
        """The ``j``-th column of all samples: cotangents of the predictions."""
        t, k = divmod(j, self.root.shape[3])
        out = self.root.new_zeros(self.root.shape[:3])
        out[:, t] = self.root[:, t, :, k]
        return self.grid.join(out)

    def sign(self, j: int) -> Tensor:
        """``[n]``: the signs of the ``j``-th column."""
        t, k = divmod(j, self.root.shape[3])
        return self.signs[:, t, k]

    def each(self) -> Iterator[tuple[int, float, dict[int, Tensor]]]:
        """Number, sign and cotangents of every column that is not zero; a column of both signs comes in two parts."""
        for j in range(self.columns):
            column, sign = self.column(j), self.sign(j)
            for value in (1.0, -1.0):
                here = sign == value
                if here.any() and any(g.any() for g in column.values()):
                    part = column if here.all() else self._only(column, here)
                    if here.all() or any(g.any() for g in part.values()):
                        yield j, value, part

    def _only(self, column: Named, here: Tensor) -> dict[int, Tensor]:
        split = self.grid.split(column)
        return self.grid.join(split * here.to(split.dtype)[:, None, None])

    def transposed_times(self, v: Named) -> Tensor:
        """``Sᵀ v``, ``[n, t·k]``."""
        return torch.einsum("ntck,ntc->ntk", self.root, self.grid.split(v)).flatten(1)

    def times(self, coefficients: Tensor) -> dict[int, Tensor]:
        """``S a`` for ``a`` ``[n, t·k]``."""
        a = coefficients.unflatten(1, (self.root.shape[1], self.root.shape[3]))
        return self.grid.join(torch.einsum("ntck,ntk->ntc", self.root, a))

    def hessian_times(self, v: Named) -> dict[int, Tensor]:
        """``H v``."""
        return self.times(self.transposed_times(v) * self.signs.flatten(1))

    def to(self, dtype: torch.dtype) -> Factor:
        whole = self.whole if self.whole is None else self.whole.to(dtype)
        return replace(self, root=self.root.to(dtype), signs=self.signs.to(dtype), whole=whole)


def factor(loss: LossAt, dims: Mapping[int, int]) -> Factor | None:
    """The sparsest form that stands the test; None where blocks are too large to be decomposed.

    ``dims``: the sample axis of each prediction. That H is block diagonal by samples is for the structure to say.
    """
    found = _Search(loss.in_double() or loss, dims).run()
    dtype = next(iter(loss.predictions.values())).dtype
    return found.to(dtype) if found is not None else None


class _Search:
    def __init__(self, loss: LossAt, dims: Mapping[int, int]) -> None:
        self.loss, self.dims = loss, dims
        self.shapes = {i: tuple(loss.predictions[i].shape) for i in dims}
        self.generator = torch.Generator().manual_seed(0)
        like = next(iter(loss.predictions.values()))
        self.rounding = EXACT if like.dtype == torch.float64 else COARSE
        vectors = [{i: self._random(loss.predictions[i]) for i in dims} for _ in range(2)]
        self.tests = [(v, loss.hessian_times(v)) for v in vectors]

    def run(self) -> Factor | None:
        found = self._zero() or self._of_entries()
        for axis in self._axes():
            found = found or self._softmax(axis) or self._blocks(axis)
        return found or self._blocks(None)

    def _random(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.generator, dtype=torch.float64).to(like)

    def _axes(self) -> list[int]:
        """Along which entries may meet: classes come second or last."""
        if len(self.shapes) > 1:
            return []
        ((i, shape),) = self.shapes.items()
        return [a for a in dict.fromkeys([1, len(shape) - 1, 0]) if a < len(shape) and a != self.dims[i]][:2]

    def _grid(self, axis: int | None) -> Grid:
        return Grid(self.shapes, self.dims, axis)

    def _holds(self, guess: Factor) -> Factor | None:
        """A guess that gives what the loss gives, for random vectors."""
        for v, product in self.tests:
            found = guess.hessian_times(v)
            size = max(float(h.abs().max()) for h in product.values())
            if not all(float((found[i] - product[i]).abs().max()) <= self.rounding * size for i in found):
                return None
        return guess

    # -- the guesses, from the sparsest on --

    def _zero(self) -> Factor | None:
        largest = max((float(h.abs().max()) for _, product in self.tests for h in product.values()), default=0.0)
        slope = max((float(g.abs().max()) for g in self.loss.slope.values()), default=0.0)
        if largest > 1e-12 * slope:
            return None
        grid = self._grid(-1)
        empty = grid.split(self.tests[0][0]).new_zeros(*grid.split(self.tests[0][0]).shape, 0)
        return Factor(grid, empty, empty.sum(2), "zero")

    def _of_entries(self) -> Factor | None:
        grid = self._grid(-1)
        ones = {i: torch.ones_like(self.loss.predictions[i]) for i in self.shapes}
        h = grid.split(self.loss.hessian_times(ones))
        return self._holds(Factor(grid, h.abs().sqrt()[..., None], _sign(h), "of single entries"))

    def _softmax(self, axis: int) -> Factor | None:
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
        return self._holds(Factor(grid, root, signs, "of a softmax", whole=basis))

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
        values, vectors = values.gather(-1, order), vectors.gather(-1, order[..., None, :].expand_as(vectors))
        felt = values.abs() > c * torch.finfo(values.dtype).eps * values.abs().amax(-1, keepdim=True)
        values, rank = values * felt, int(felt.sum(-1).max()) if felt.numel() else 0
        root = (vectors * values.abs().sqrt()[..., None, :])[..., :rank]
        form = "of blocks of all entries of a sample" if axis is None else f"of blocks along axis {axis}"
        return self._holds(Factor(grid, root, _sign(values)[..., :rank], form))


def _sign(t: Tensor) -> Tensor:
    return torch.where(t < 0, -1.0, 1.0).to(t)


# --- factors that are drawn -----------------------------------------------------------------------


def sampled(exact: Factor, probabilities: Tensor | None, count: int, seed: int) -> Factor:
    """``count`` columns for each sample whose mean square is H: unbiased, for H that is positive semi-definite.

    For a softmax (``probabilities`` ``[n, t, c]``) labels are drawn, so the columns are gradients of the likelihood
    (Kunstner, Balles, Hennig 2019); otherwise they are Gaussian, which for squared errors is the same.
    """
    generator = torch.Generator(exact.root.device).manual_seed(seed)
    n, t, c, k = exact.root.shape
    if probabilities is None:
        draws = torch.randn(n, t, k, count, generator=generator, dtype=torch.float64, device=exact.root.device)
        columns = exact.root @ draws.to(exact.root)
    else:
        labels = torch.multinomial(probabilities.double().flatten(0, 1), count, True, generator=generator)
        hits = torch.nn.functional.one_hot(labels, c).mT.view(n, t, c, count).to(exact.root)
        amount = exact.root.square().sum((2, 3)) / (1 - probabilities.square().sum(-1)).clamp_min(1e-30)
        columns = (probabilities[..., None] - hits) * amount.sqrt()[..., None, None]
    columns = columns / count**0.5
    whole = replace(exact.grid, axis=None)
    flat = torch.stack([whole.split(exact.grid.join(column))[:, 0] for column in columns.unbind(-1)], -1)
    ones = torch.ones(n, 1, count, dtype=flat.dtype, device=flat.device)
    return Factor(whole, flat[:, None], ones, exact.form, sampled=f"{count} draws a sample, seed {seed}")
