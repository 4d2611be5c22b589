"""The second derivative of the loss by the predictions: which form it has, and a root of it.

``H = ∇²_F L`` is block diagonal by samples for a sum of losses of single predictions; often it is
sparser still. Which form it has is not read off the code of the loss. Forms are guessed, from the
sparsest on, and each guess is validated with fresh random Hessian-vector products, which tell two
matrices apart with probability one.

Whether H is block diagonal by samples is not decided here: that is a verdict of the structure.
Columns that are drawn at random are made in ``sampled_root.py``. Legend as in ``hessian_root.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from unbatch.autodiff.loss import LossAt
from unbatch.curvature.hessian_root import SINGLE_ENTRIES, Factor, Grid, Joint, Named
from unbatch.errors import MSG_HESSIAN_NOT_FINITE, StructureError
from unbatch.linalg.precision import DOUBLE, SINGLE, largest
from unbatch.linalg.probes import gaussian_like, seeded

SOFTMAX = "of a softmax"
NO_SAMPLES = "of no samples"

LARGEST_BLOCK = 1024  # entries of a block that is decomposed

LARGEST_JOINT = 4096  # entries of all predictions whose Hessian is formed

AXES_TRIED = 2  # along which entries of a sample may be coupled

# Relative to the gradient: a smaller second derivative may be rounding alone, which is then tried.
DOUBTFUL = 1e-12

CANCELLED = 100  # units in the last place that are left over where large terms cancel

# Odd numbers, by which a vector is divided and its product multiplied again: what is a derivative
# stays as it is, and what is left over by rounding comes out otherwise.
SCALINGS = range(3, 33, 2)

# --- the whole Hessian ----------------------------------------------------------------------------


def joint(loss: LossAt, dims: Mapping[int, int]) -> Joint | None:
    """Return a root from the whole Hessian, ``[M, M]`` with M entries of all predictions.

    None where that is too large.
    """
    # In float64 where the loss allows it: small eigenvalues differ from rounding there.
    at = loss.in_double() or loss
    shapes = {i: at.predictions[i].shape for i in dims}
    total = sum(math.prod(s) for s in shapes.values())
    if total > LARGEST_JOINT:
        return None
    _check_finite(at, dims)
    like = next(iter(at.predictions.values()))
    rows = []
    for unit in torch.eye(total, dtype=like.dtype, device=like.device):
        product = at.hessian_times(_cut(unit, shapes))
        rows.append(torch.cat([product[i].reshape(-1) for i in shapes]))
    hessian = torch.stack(rows)  # symmetric, up to rounding
    values, vectors = torch.linalg.eigh((hessian + hessian.mT) / 2)
    size = values.abs()
    nonzero = size > total * torch.finfo(values.dtype).eps * size.max()
    columns = (vectors[:, nonzero] * values[nonzero].abs().sqrt()).T
    dtype = next(iter(loss.predictions.values())).dtype
    return Joint(_by_prediction(columns.to(dtype), shapes), _sign(values[nonzero]).to(dtype))


def _check_finite(loss: LossAt, dims: Mapping[int, int]) -> None:
    """Raise ``StructureError`` where the loss joins all samples, and one of them is not finite."""
    slope = {i: g for i, g in loss.slope.items() if i in dims}
    if not all(bool(g.isfinite().all()) for g in slope.values()):
        raise StructureError(MSG_HESSIAN_NOT_FINITE.format(which="of the predictions"))


def _cut(flat: Tensor, shapes: Mapping[int, Sequence[int]]) -> dict[int, Tensor]:
    """Return the predictions of a flat vector ``[M]``."""
    predictions, start = {}, 0
    for i, shape in shapes.items():
        stop = start + math.prod(shape)
        predictions[i] = flat[start:stop].view(*shape)
        start = stop
    return predictions


def _by_prediction(columns: Tensor, shapes: Mapping[int, Sequence[int]]) -> dict[int, Tensor]:
    """Return ``[size, *prediction]`` of each prediction from ``[size, M]``."""
    predictions, start = {}, 0
    for i, shape in shapes.items():
        stop = start + math.prod(shape)
        predictions[i] = columns[:, start:stop].reshape(len(columns), *shape).contiguous()
        start = stop
    return predictions


# --- blocks by samples ----------------------------------------------------------------------------


def factor(loss: LossAt, dims: Mapping[int, int]) -> Factor | None:
    """Return a root by the sparsest form that stands the test.

    ``dims``: the sample axis of each prediction. None where blocks are too large to be decomposed.
    The form is kept with the context of the loss, and is tried first on the next batch. Where the
    second derivative is not finite for some samples, their columns are not either, and it is the
    others that a form has to stand the test of. Raises ``StructureError`` where it is for none.
    """
    if not any(loss.predictions[i].shape[dim] for i, dim in dims.items()):
        return _of_no_samples(loss, dims)
    search = _Search(loss.in_double() or loss, dims)
    if not len(search.finite):
        raise StructureError(MSG_HESSIAN_NOT_FINITE.format(which="of any sample"))
    form, root = search.run(loss.context.last_form)
    loss.context.last_form = form
    if root is None:
        return None
    return root.to(next(iter(loss.predictions.values())).dtype)


def _of_no_samples(loss: LossAt, dims: Mapping[int, int]) -> Factor:
    """Return the root of an empty batch, which has no columns."""
    grid = Grid({i: tuple(loss.predictions[i].shape) for i in dims}, dims, None)
    like = next(iter(loss.predictions.values()))
    entries = grid.split({i: loss.predictions[i] for i in dims}).shape[2]
    return Factor(grid, like.new_zeros(0, 1, entries, 0), like.new_zeros(0, 1, 0), NO_SAMPLES)


Form = tuple[str, int | None]  # name of a guess, and the axis along which entries are coupled

Probe = tuple[dict[int, Tensor], dict[int, Tensor]]  # a random vector, and its product with H


class _Search:
    """Guesses of the form of H at one point, and the products that validate them."""

    def __init__(self, loss: LossAt, dims: Mapping[int, int]) -> None:
        self.loss, self.dims = loss, dims
        self.shapes = {i: tuple(loss.predictions[i].shape) for i in dims}
        self.generator = seeded(0)
        # Guesses are made from the first probe and validated by the second, which is drawn late:
        # a vanishing H needs one only.
        self.probes = [self._probe()]

    def run(self, last: Form | None) -> tuple[Form | None, Factor | None]:
        """Return the first guess that holds, with its name; ``last``: what held the last time."""
        guesses: Mapping[str, Callable[[int | None], Factor | None]] = {
            "zero": self._zero,
            "entries": self._of_entries,
            "softmax": self._softmax,
            "blocks": self._blocks,
        }
        for name, axis in self._forms(last):
            root = guesses[name](axis)
            if root is not None:
                return (name, axis), root
        return None, None

    def _forms(self, last: Form | None) -> list[Form]:
        """Return the forms to try, each once: zero costs nothing, then the last, then by size."""
        forms: list[Form] = [("zero", None)]
        if last is not None:
            forms.append(last)
        forms.append(("entries", None))
        for axis in self._axes():
            forms += [("softmax", axis), ("blocks", axis)]
        forms.append(("blocks", None))
        return list(dict.fromkeys(forms))

    def _axes(self) -> list[int]:
        """Return the axes along which entries may be coupled: classes come second or last."""
        if len(self.shapes) > 1:
            return []  # a grid along an axis is one of a single prediction
        ((i, shape),) = self.shapes.items()
        axes: list[int] = []
        for axis in (1, len(shape) - 1, 0):
            if axis < len(shape) and axis != self.dims[i] and axis not in axes:
                axes.append(axis)
        return axes[:AXES_TRIED]

    def _grid(self, axis: int | None) -> Grid:
        return Grid(self.shapes, self.dims, axis)

    # -- validation --

    def _probe(self) -> Probe:
        v = {i: gaussian_like(self.loss.predictions[i], self.generator) for i in self.dims}
        return v, self.loss.hessian_times(v)

    @cached_property
    def finite(self) -> Tensor:
        """The samples whose second derivative is finite; each has one of its own."""
        product = self.probes[0][1]
        finite: Tensor | None = None
        for i, t in product.items():
            of_samples = t.movedim(self.dims[i], 0).flatten(1) if t.ndim > 1 else t[:, None]
            here = of_samples.isfinite().all(1)
            finite = here if finite is None else finite & here
        assert finite is not None
        return finite.nonzero()[:, 0]

    @cached_property
    def _all_finite(self) -> bool:
        product = next(iter(self.probes[0][1].items()))
        return len(self.finite) == product[1].shape[self.dims[product[0]]]

    def _sizes(self, named: Named) -> Tensor:
        """Return the largest entry in size of each sample that is finite, ``[n]``."""
        sizes: Tensor | None = None
        for i in self.dims:
            t = named[i].abs().movedim(self.dims[i], 0)
            if not t.numel():  # predictions without entries
                here = t.new_zeros(len(t))
            elif t.ndim == 1:
                here = t
            else:
                here = t.flatten(1).amax(1)
            sizes = here if sizes is None else torch.maximum(sizes, here)
        assert sizes is not None
        return sizes if self._all_finite else sizes[self.finite]

    def _holds(self, guess: Factor) -> Factor | None:
        """Return a guess that agrees with the loss on a probe that it was not made from."""
        if len(self.probes) == 1:
            self.probes.append(self._probe())
        for v, product in self.probes[1:]:  # not the first: guesses are made from it
            guessed = guess.hessian_times(v)
            # Every sample in its own scale: one with a steep loss does not hide the others.
            error = self._sizes(_plus(guessed, -1.0, product))
            size = self._sizes(product)
            # From the cheapest bound on: the others take products of their own, once each.
            if _within(error, DOUBLE * size) or _within(error, self.rounding * size):
                continue
            allowed = self.rounding * size + 10 * self._noise
            if not _within(error, allowed) and not _within(error, allowed + self._cancelled):
                return None
        return guess

    @cached_property
    def rounding(self) -> Tensor:
        """The relative error of products that rounding explains, from how far H is from linear.

        Of each sample, ``[n]``. A loss that casts its predictions rounds more coarsely than their
        type says.
        """
        v, product = self.probes[0]
        size = self._sizes(product)
        if next(iter(self.loss.predictions.values())).dtype != torch.float64:
            return torch.full_like(size, SINGLE)  # the loss could not be evaluated in float64
        # A third has no exact binary form: in a narrower type it rounds differently.
        third = self.loss.hessian_times({i: x / 3 for i, x in v.items()})
        error = self._sizes({i: 3 * h - product[i] for i, h in third.items()})
        # Where the product is zero, so is the error, or it is no relative one.
        relative = 1e3 * error / size.clamp_min(torch.finfo(size.dtype).tiny)
        return relative.clamp(DOUBLE, SINGLE)

    @cached_property
    def _noise(self) -> Tensor:
        """How far products are from additive: much, where a softmax is saturated. ``[n]``."""
        (v, of_v), (w, of_w) = self.probes[:2]
        largest = torch.zeros_like(self._sizes(of_v))
        for a in (1.0, -1.0, 0.3):
            both = self.loss.hessian_times(_plus(v, a, w))
            differences = {i: h - of_v[i] - a * of_w[i] for i, h in both.items()}
            largest = torch.maximum(largest, self._sizes(differences))
        return largest

    @cached_property
    def _cancelled(self) -> Tensor:
        """What rounding leaves over where terms of the size of other places cancel, ``[n]``.

        A saturated softmax has next to no curvature, and PyTorch has it as the difference of terms
        as large as where it is not: at predictions of zero.
        """
        zeros = {i: torch.zeros_like(t) for i, t in self.loss.predictions.items()}
        v, product = self.probes[1]
        elsewhere = self._sizes(replace(self.loss, predictions=zeros).hessian_times(v))
        terms = torch.maximum(self._sizes(product), elsewhere.nan_to_num(0, 0, 0))
        return CANCELLED * torch.finfo(terms.dtype).eps * terms

    # -- the guesses, from the sparsest on --

    def _zero(self, _: int | None) -> Factor | None:
        """Guess that the loss is linear in the predictions."""
        if not self._all_finite:
            return None
        vanishes = not any(bool(self._sizes(product).any()) for _, product in self.probes)
        if not vanishes and not self._is_rounding():
            return None
        grid = self._grid(SINGLE_ENTRIES)
        split = grid.split(self.probes[0][0])
        empty = split.new_zeros(*split.shape, 0)  # no columns
        return Factor(grid, empty, empty.sum(2), "zero")

    def _is_rounding(self) -> bool:
        """Tell whether all of a product is what rounding leaves over where terms cancel.

        How steep the loss is says nothing of that: the slope at a far target is as large as one
        likes, and the curvature there what it is elsewhere.
        """
        v, product = self.probes[0]
        slope = _largest(self.loss.slope)
        if not _largest(product) <= DOUBTFUL * slope:
            return False
        spread = {i: torch.zeros_like(t) for i, t in product.items()}
        for s in SCALINGS:
            scaled = self.loss.hessian_times({i: x / s for i, x in v.items()})
            for i, h in scaled.items():
                spread[i] = torch.maximum(spread[i], (s * h - product[i]).abs())
        # A derivative comes out the same but for its last digits, entry by entry.
        return all(bool((t.abs() <= 4 * spread[i]).all()) for i, t in product.items())

    def _of_entries(self, _: int | None) -> Factor | None:
        """Guess that H is diagonal: then ``H 1`` is the diagonal."""
        grid = self._grid(SINGLE_ENTRIES)
        ones = {i: torch.ones_like(self.loss.predictions[i]) for i in self.shapes}
        # A diagonal only if the guess is right, which the second probe tells.
        h = grid.split(self.loss.hessian_times(ones))
        return self._holds(Factor(grid, h.abs().sqrt()[..., None], _sign(h), "of single entries"))

    def _softmax(self, axis: int | None) -> Factor | None:
        """Guess ``Q (diag p − ppᵀ)`` at each position, with ``p`` the softmax: any cross-entropy.

        With ``u = √p`` the projector ``I − uuᵀ`` is ``BBᵀ``, B the columns of the reflection that
        takes the last unit vector to u; so ``S = √Q diag(u) B`` has a column less than there are
        classes. ``Q`` follows from one product, as ``vᵀHv = Q (Σ p v² − (Σ p v)²)``.
        """
        grid = self._grid(axis)
        p = grid.split(self.loss.predictions).softmax(-1)
        v, product = grid.split(self.probes[0][0]), grid.split(self.probes[0][1])
        variance = (p * v * v).sum(-1) - (p * v).sum(-1).square()
        Q = (v * product).sum(-1) / variance.clamp_min(torch.finfo(p.dtype).tiny)
        u, classes = p.sqrt(), p.shape[-1]
        if classes < 2 or not Q[self.finite].isfinite().all():
            return None
        # The reflection is I − w wᵀ / w_c with w = u + e_c, of which the last column is left out.
        w = u.clone()
        w[..., -1] += 1
        reflected = w[..., :, None] * (u[..., :-1] / w[..., -1:])[..., None, :]
        B = torch.eye(classes, dtype=p.dtype, device=p.device)[:, :-1] - reflected
        S = Q.abs().sqrt()[..., None, None] * u[..., None] * B
        signs = _sign(Q)[..., None].expand(*S.shape[:2], S.shape[3])
        return self._holds(Factor(grid, S, signs, SOFTMAX, to_entries=B))

    def _blocks(self, axis: int | None) -> Factor | None:
        """Take any symmetric block at each position, by its eigenvectors."""
        grid = self._grid(axis)
        n, t, c = grid.split(self.loss.predictions).shape
        # One block has to be decomposed, and all of them kept: half a gigabyte.
        if c > LARGEST_BLOCK or n * t * c * c > LARGEST_BLOCK**2 * 64:
            return None
        block = self.probes[0][0][next(iter(self.shapes))].new_zeros(n, t, c, c)
        for j in range(c):
            # One product gives the j-th column of all blocks: they do not overlap.
            unit = block.new_zeros(n, t, c)
            unit[..., j] = 1
            block[..., j] = grid.split(self.loss.hessian_times(grid.join(unit)))
        lost = torch.ones(n, dtype=torch.bool, device=block.device)
        lost[self.finite] = False
        block[lost] = 0  # there are no eigenvalues of what is not finite
        values, vectors = _largest_first(*torch.linalg.eigh((block + block.mT) / 2))
        # Relative to each block: a sample with a small loss has small eigenvalues.
        size = values.abs()
        nonzero = size > c * torch.finfo(values.dtype).eps * size.amax(-1, keepdim=True)
        values = values * nonzero
        # Blocks of lower rank than the others are filled up with columns of zeros.
        rank = 0
        if nonzero.numel():
            rank = int(nonzero.sum(-1).max())
        S = (vectors * values.abs().sqrt()[..., None, :])[..., :rank]
        S[lost] = torch.nan
        form = "of blocks of all entries of a sample"
        if axis is not None:
            form = f"of blocks along axis {axis}"
        return self._holds(Factor(grid, S, _sign(values)[..., :rank], form))


def _largest_first(values: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenpairs ``[.., c]``, ``[.., c, c]`` in the order of the size of their values."""
    order = values.abs().argsort(-1, descending=True)
    return values.gather(-1, order), vectors.gather(-1, order[..., None, :].expand_as(vectors))


def _plus(v: Named, a: float, w: Named) -> dict[int, Tensor]:
    """Return ``v + a w``."""
    return {i: t + a * w[i] for i, t in v.items()}


def _within(error: Tensor, allowed: Tensor) -> bool:
    """Tell whether no sample has an error that is larger than allowed, or not a number."""
    return bool((error <= allowed).all())


def _largest(named: Named) -> float:
    """Return the largest entry in size; not a number where an entry is not."""
    return largest(named.values())


def _sign(t: Tensor) -> Tensor:
    return torch.where(t < 0, -1.0, 1.0).to(t)
