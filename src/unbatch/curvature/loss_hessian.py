"""The second derivative of the loss by the predictions: which form it has, and a root of it.

``H = ∇²_F L`` is block diagonal by samples for a sum of losses of single predictions; often it is
sparser still. Which form it has is not read off the code of the loss. Forms are guessed, from the
sparsest on, and each guess is validated with fresh random Hessian-vector products, which tell two
matrices apart with probability one.

Whether H is block diagonal by samples is not decided here: that is a verdict of the structure.
Where it is not, the same forms are tried of the whole batch as if it were one sample.
Columns that are drawn at random are made in ``sampled_root.py``. Legend as in ``hessian_root.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from unbatch.autodiff.loss import LossAt
from unbatch.curvature.hessian_root import (
    SINGLE_ENTRIES,
    Factor,
    Grid,
    Named,
    SampleRoot,
    SoftmaxRoot,
    samples_first,
    sign_of,
)
from unbatch.errors import MSG_HESSIAN_NOT_FINITE, StructureError
from unbatch.linalg.precision import DOUBLE, SINGLE, largest
from unbatch.linalg.probes import gaussian_like, seeded
from unbatch.running.tasks import task

NO_SAMPLES = "of no samples"

LARGEST_BLOCK = 1024  # entries of a block that is decomposed

LARGEST_JOINT = 4096  # entries of all predictions whose Hessian is formed

AXES_TRIED = 2  # along which entries of a sample may be coupled

# Relative to the gradient: a smaller second derivative may be rounding alone, which is then tried.
DOUBTFUL = 1e-12

OTHER_SIGN = 1e-11  # relative to the largest eigenvalue of a block: rounding, if of another sign

CANCELLED = 100  # units in the last place that are left over where large terms cancel

# Odd numbers, by which a vector is divided and its product multiplied again: what is a derivative
# stays as it is, and what is left over by rounding comes out otherwise.
SCALINGS = range(3, 33, 2)

# --- a root --------------------------------------------------------------------------------------


def factor(
    loss: LossAt, outputs: Sequence[int], dims: Mapping[int, int] | None
) -> SampleRoot | None:
    """Return a root by the sparsest form that stands the test.

    ``outputs``: by which the loss is differentiated. ``dims``: the sample axis of each of them, by
    which H is block diagonal; None where it may be any: the whole batch is then one sample. The
    result is None where blocks are too large to be decomposed. The form is kept with the context of
    the loss, and is tried first on the next batch. Where the second derivative is not finite for
    some samples, their columns are not either, and it is the others that a form has to stand the
    test of. Raises ``StructureError`` where it is for none.
    """
    if dims is not None and not any(loss.predictions[i].shape[dim] for i, dim in dims.items()):
        return _of_no_samples(loss, dims)
    # In float64 where the loss allows it: small eigenvalues differ from rounding there.
    search = _Search(loss.in_double() or loss, outputs, dims)
    if not len(search.finite):
        which = "of the predictions" if dims is None else "of any sample"
        raise StructureError(MSG_HESSIAN_NOT_FINITE.format(which=which))
    form, root = search.run(loss.context.last_form)
    loss.context.last_form = form
    if root is None:
        return None
    return root.to(next(iter(loss.predictions.values())).dtype)


def is_linear_in(loss: LossAt, outputs: Sequence[int]) -> bool:
    """Tell whether no second derivative of the loss involves these outputs."""
    generator = seeded(0)
    v = {i: gaussian_like(loss.predictions[i], generator) for i in outputs if i in loss.predictions}
    # Exactly: where terms cancel up to rounding, nothing is left out.
    return not any(bool((h != 0).any()) for h in loss.hessian_times(v).values())


def _of_no_samples(loss: LossAt, dims: Mapping[int, int]) -> Factor:
    """Return the root of an empty batch, which has no columns."""
    grid = Grid({i: tuple(loss.predictions[i].shape) for i in dims}, dims, None)
    like = next(iter(loss.predictions.values()))
    entries = grid.split({i: loss.predictions[i] for i in dims}).shape[2]
    return Factor(grid, like.new_zeros(0, 1, entries, 0), like.new_zeros(0, 1, 0), NO_SAMPLES)


Root = TypeVar("Root", bound=SampleRoot)

Form = tuple[str, int | None]  # name of a guess, and the axis along which entries are coupled

Probe = tuple[dict[int, Tensor], dict[int, Tensor]]  # a random vector, and its product with H


class _Search:
    """Guesses of the form of H at one point, and the products that validate them."""

    def __init__(
        self, loss: LossAt, outputs: Sequence[int], dims: Mapping[int, int] | None
    ) -> None:
        self.loss, self.dims = loss, dims
        self.shapes = {i: tuple(loss.predictions[i].shape) for i in outputs}
        self.generator = seeded(0)
        # Guesses are made from the first probe and validated by the second, which is drawn late:
        # a vanishing H needs one only.
        self.probes = [self._probe()]

    def run(self, last: Form | None) -> tuple[Form | None, SampleRoot | None]:
        """Return the first guess that holds, with its name; ``last``: what held the last time."""
        guesses: Mapping[str, Callable[[int | None], SampleRoot | None]] = {
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
        forms: list[Form] = [("entries", None)]
        for axis in self._axes():
            forms += [("softmax", axis), ("blocks", axis)]
        forms.append(("blocks", None))
        first: list[Form] = [("zero", None)]
        if last in forms:  # on another batch there may be other axes
            first.append(last)
        return list(dict.fromkeys([*first, *forms]))

    def _axes(self) -> list[int]:
        """Return the axes along which entries may be coupled: classes come second or last."""
        if len(self.shapes) > 1:
            return []  # a grid along an axis is one of a single prediction
        (shape,) = self.shapes.values()
        first, last = 1, len(shape) - 1
        if self.dims is None:  # the one sample has an axis of its own, in front
            first, last = 2, len(shape)
        axes: list[int] = []
        for axis in (first, last, 1):
            if 0 < axis <= last and axis not in axes:
                axes.append(axis)
        return axes[:AXES_TRIED]

    def _grid(self, axis: int | None) -> Grid:
        return Grid(self.shapes, self.dims, axis)

    # -- validation --

    def _probe(self) -> Probe:
        v = {i: gaussian_like(self.loss.predictions[i], self.generator) for i in self.shapes}
        return v, self.loss.hessian_times(v)

    @cached_property
    def finite(self) -> Tensor:
        """The samples whose second derivative is finite; each has one of its own."""
        product = self.probes[0][1]
        finite: list[Tensor] = []
        for i in self.shapes:
            rows = samples_first(product[i], i, self.dims)
            finite.append(rows.reshape(len(rows), -1).isfinite().all(1))
        # A loss that joins all samples has no part of which it matters that another is not finite.
        if self.dims is None and not _is_finite(self.loss.slope, self.shapes):
            finite.append(torch.zeros_like(finite[0]))
        return torch.stack(finite).all(0).nonzero()[:, 0]

    @cached_property
    def _all_finite(self) -> bool:
        i = next(iter(self.shapes))
        return len(self.finite) == len(samples_first(self.probes[0][1][i], i, self.dims))

    def _sizes(self, named: Named) -> Tensor:
        """Return the largest entry in size of each sample that is finite, ``[n]``.

        Where the batch is one sample: of each row of the outputs, as they may differ in scale.
        """
        sizes: list[Tensor] = []
        for i in self.shapes:
            t = named[i].abs()
            rows = samples_first(t, i, self.dims)
            if self.dims is None and t.ndim:
                rows = t
            sizes.append(_largest_of_rows(rows))
        if self.dims is None:
            return torch.cat(sizes)
        largest = torch.stack(sizes).amax(0)
        return largest if self._all_finite else largest[self.finite]

    def _holds(self, guess: Root) -> Root | None:
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
        v, product = self.probes[1]
        if self.dims is None:  # what joins samples need not exist elsewhere, as a determinant
            return torch.zeros_like(self._sizes(product))
        zeros = {i: torch.zeros_like(t) for i, t in self.loss.predictions.items()}
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
        return self._holds(Factor(grid, h.abs().sqrt()[..., None], sign_of(h), "of single entries"))

    def _softmax(self, axis: int | None) -> SoftmaxRoot | None:
        """Guess ``Q (diag p − ppᵀ)`` at each position, with ``p`` the softmax: any cross-entropy.

        ``Q`` follows from one product, as ``vᵀHv = Q (Σ p v² − (Σ p v)²)``.
        """
        grid = self._grid(axis)
        p = grid.split(self.loss.predictions).softmax(-1)
        v, product = grid.split(self.probes[0][0]), grid.split(self.probes[0][1])
        variance = (p * v * v).sum(-1) - (p * v).sum(-1).square()
        Q = (v * product).sum(-1) / variance.clamp_min(torch.finfo(p.dtype).tiny)
        if p.shape[-1] < 2 or not Q[self.finite].isfinite().all():
            return None
        return self._holds(SoftmaxRoot(grid, p.sqrt(), Q))

    def _blocks(self, axis: int | None) -> Factor | None:
        """Take any symmetric block at each position, by its eigenvectors."""
        grid = self._grid(axis)
        n, t, c = grid.split(self.loss.predictions).shape
        # What joins everything has one block, of any symmetric matrix: there is nothing to guess.
        is_whole = self.dims is None and axis is None
        # One block has to be decomposed, and all of them kept: half a gigabyte.
        most = LARGEST_JOINT if is_whole else LARGEST_BLOCK
        if c > most or n * t * c * c > LARGEST_BLOCK**2 * 64:
            return None
        if self.dims is None and axis is not None and self._couples_positions(grid):
            return None
        block = self.probes[0][0][next(iter(self.shapes))].new_zeros(n, t, c, c)
        with task("Second derivative of the loss", c, "products") as products:
            for j in products.over(range(c)):
                # One product gives the j-th column of all blocks: they do not overlap.
                unit = block.new_zeros(n, t, c)
                unit[..., j] = 1
                block[..., j] = grid.split(self.loss.hessian_times(grid.join(unit)))
        lost = torch.ones(n, dtype=torch.bool, device=block.device)
        lost[self.finite] = False
        block[lost] = 0  # there are no eigenvalues of what is not finite
        values, vectors = _largest_first(*torch.linalg.eigh((block + block.mT) / 2))
        # Relative to each block: a sample with a small loss has small eigenvalues.
        size, entries, largest = values.abs(), c, values.abs().amax(-1, keepdim=True)
        if self.dims is None:  # blocks of one sample, the batch
            entries, largest = t * c, size.amax()
        nonzero = size > entries * torch.finfo(values.dtype).eps * largest
        # Those of the other sign than the largest are what is left over where terms cancel, sooner.
        other_sign = values.sign() != values[..., :1].sign()
        nonzero &= ~other_sign | (size > OTHER_SIGN * largest)
        values = values * nonzero
        # Blocks of lower rank than the others are filled up with columns of zeros.
        rank = 0
        if nonzero.numel():
            rank = int(nonzero.sum(-1).max())
        S = (vectors * values.abs().sqrt()[..., None, :])[..., :rank]
        S[lost] = torch.nan
        root = Factor(grid, S, sign_of(values)[..., :rank], self._blocks_in_words(axis))
        return root if is_whole else self._holds(root)

    def _couples_positions(self, grid: Grid) -> bool:
        """Tell by one product whether positions are coupled: blocks take one for each entry."""
        alone = torch.zeros_like(grid.split(self.probes[0][0]))
        alone[:, 0] = grid.split(self.probes[0][0])[:, 0]
        product = grid.split(self.loss.hessian_times(grid.join(alone))).abs()
        if product.shape[1] == 1 or not product.numel():
            return False
        # Far above rounding: what is doubtful is decided by the blocks.
        return bool(product[:, 1:].amax() > SINGLE * product[:, 0].amax())

    def _blocks_in_words(self, axis: int | None) -> str:
        if axis is None and self.dims is None:
            return "of all predictions together"
        if axis is None:
            return "of blocks of all entries of a sample"
        return f"of blocks along axis {axis - (self.dims is None)}"


def _largest_first(values: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenpairs ``[.., c]``, ``[.., c, c]`` in the order of the size of their values."""
    order = values.abs().argsort(-1, descending=True)
    return values.gather(-1, order), vectors.gather(-1, order[..., None, :].expand_as(vectors))


def _plus(v: Named, a: float, w: Named) -> dict[int, Tensor]:
    """Return ``v + a w``."""
    return {i: t + a * w[i] for i, t in v.items()}


def _largest_of_rows(rows: Tensor) -> Tensor:
    """Return the largest entry of each row, ``[n]``; zero where rows have none."""
    if not rows.numel():
        return rows.new_zeros(len(rows))
    return rows.reshape(len(rows), -1).amax(1)


def _is_finite(slope: Named, outputs: Iterable[int]) -> bool:
    return all(bool(slope[i].isfinite().all()) for i in outputs if i in slope)


def _within(error: Tensor, allowed: Tensor) -> bool:
    """Tell whether no sample has an error that is larger than allowed, or not a number."""
    return bool((error <= allowed).all())


def _largest(named: Named) -> float:
    """Return the largest entry in size; not a number where an entry is not."""
    return largest(named.values())
