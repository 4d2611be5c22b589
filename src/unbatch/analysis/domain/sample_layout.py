"""Where the samples of a mini-batch lie in a value, and how to bring them to the front.

Read off the owners of a value's elements (``ownership.py``); knows nothing about ops or
derivatives. The questions, from the narrowest to the widest: ``Ownership.sample_dim`` (an axis
whose slice n belongs to sample n), ``prediction_dim`` (the same by the conventions for
predictions), ``contiguous_blocks`` (samples one after the other along the first axis),
``layout_of`` (one axis, in any even pattern), ``any_layout_of`` (in any pattern) and ``in_order``
(samples follow on each other, in whatever number).

Index letters: n sample, t position inside a sample.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unbatch.analysis.domain.ownership import SHARED, Array, Ownership, follow_samples, is_sample
from unbatch.analysis.domain.sample_sets import SampleSets


@dataclass(frozen=True)
class Layout:
    """Along axis ``dim`` lie ``samples`` samples of ``block`` entries each.

    ``order``: "nt", one sample after the other; "tn", interleaved; or, for anything else, the
    positions of the entries of sample 0, of sample 1, and so on.
    """

    dim: int
    samples: int
    block: int = 1
    order: str | tuple[int, ...] = "nt"
    padded = False  # whether ``split`` fills up shorter samples

    @property
    def dims(self) -> tuple[int, ...]:
        """The axes along which samples lie."""
        return (self.dim,)

    @property
    def form(self) -> Any:
        """What is left of it without sizes, to compare; None where that does not say all."""
        if not isinstance(self.order, str):
            return None
        return (self.dim, self.order, min(self.block, 2))

    def split(self, t: Tensor) -> Tensor:
        """Return ``[n, *shape]``, where ``dim`` of ``shape`` has the entries of one sample."""
        if self.dim == 0 and self.order == "nt":
            # The usual case. A view of a contiguous tensor costs least, and this runs at every
            # site.
            if t.is_contiguous():
                return t.view(self.samples, self.block, *t.shape[1:])
            return t.unflatten(0, (-1, self.block))
        if self.order == "tn":
            return t.unflatten(self.dim, (self.block, self.samples)).movedim(self.dim + 1, 0)
        if isinstance(self.order, tuple):
            t = t.index_select(self.dim, torch.tensor(self.order, device=t.device))
        return t.unflatten(self.dim, (self.samples, self.block)).movedim(self.dim, 0)

    def join(self, rows: Tensor) -> Tensor:
        """Return what ``split`` was given: its inverse."""
        if self.order == "tn":
            return rows.movedim(0, self.dim + 1).flatten(self.dim, self.dim + 1)
        out = rows.movedim(0, self.dim).flatten(self.dim, self.dim + 1)
        if isinstance(self.order, tuple):
            inverse = torch.argsort(torch.tensor(self.order, device=out.device))
            out = out.index_select(self.dim, inverse)
        return out

    def scaled(self, t: Tensor, weights: Tensor) -> Tensor:
        """Return ``t`` with the entries of sample n multiplied by ``weights[n]``."""
        rows = self.split(t)
        by_row = weights.to(rows.dtype).reshape(-1, *[1] * (rows.ndim - 1))
        return self.join(rows * by_row)

    def only(self, t: Tensor, first: int, last: int) -> Tensor:
        """Return ``[k, *t.shape]``: copy k has the entries of sample ``first + k``, and zeros."""
        count = last - first
        rows = self.split(t)
        copies = t.new_zeros(count, self.samples, *rows.shape[1:])
        k = torch.arange(count, device=t.device)
        copies[k, k + first] = rows[first:last]
        # Each copy is joined by itself: behind the axis of copies every axis is one further on.
        return replace(self, dim=self.dim + 1).join(copies.movedim(1, 0))


@dataclass(frozen=True)
class Scattered:
    """Samples lie in no even pattern: ``owner`` says of every entry to which sample it belongs."""

    owner: Tensor
    samples: int
    form = None

    @property
    def dims(self) -> tuple[int, ...]:
        """The axes along which samples lie: all."""
        return tuple(range(self.owner.ndim))

    def scaled(self, t: Tensor, weights: Tensor) -> Tensor:
        """Return ``t`` with the entries of sample n multiplied by ``weights[n]``."""
        return t * weights.to(t)[self.owner.to(t.device)]

    def only(self, t: Tensor, first: int, last: int) -> Tensor:
        """Return ``[k, *t.shape]``: copy k has the entries of sample ``first + k``, and zeros."""
        owner = self.owner.to(t.device)
        return torch.stack([torch.where(owner == n, t, 0) for n in range(first, last)])


@dataclass(frozen=True)
class Ragged:
    """Along axis ``dim`` lie ``samples`` samples of different lengths.

    ``places`` ``[n, t]``: where entry t of sample n lies; behind the last entry of the axis where
    the sample is over.
    """

    dim: int
    samples: int
    places: Tensor
    form = None
    padded = True

    @property
    def dims(self) -> tuple[int, ...]:
        """The axes along which samples lie."""
        return (self.dim,)

    def split(self, t: Tensor) -> Tensor:
        """Return ``[n, *shape]``, where ``dim`` of ``shape`` is as long as the longest sample.

        Zero where a sample is over.
        """
        nothing = t.new_zeros([*t.shape[: self.dim], 1, *t.shape[self.dim + 1 :]])
        places = self.places.to(t.device)
        entries = torch.cat([t, nothing], self.dim).index_select(self.dim, places.flatten())
        return entries.unflatten(self.dim, places.shape).movedim(self.dim, 0)

    def scaled(self, t: Tensor, weights: Tensor) -> Tensor:
        """Return ``t`` with the entries of sample n multiplied by ``weights[n]``."""
        by_entry = weights.to(t)[self._owner(t)]
        return t * by_entry.reshape([-1] + [1] * (t.ndim - 1 - self.dim))

    def only(self, t: Tensor, first: int, last: int) -> Tensor:
        """Return ``[k, *t.shape]``: copy k has the entries of sample ``first + k``, and zeros."""
        samples = torch.arange(first, last, device=t.device)
        own = self._owner(t) == samples[:, None]
        after = [1] * (t.ndim - 1 - self.dim)
        return torch.where(own.reshape(len(own), *[1] * self.dim, -1, *after), t, 0)

    def _owner(self, t: Tensor) -> Tensor:
        """Return the sample of every entry of the axis."""
        places = self.places.to(t.device)
        owner = torch.zeros(t.shape[self.dim] + 1, dtype=torch.long, device=t.device)
        samples = torch.arange(self.samples, device=t.device)
        owner[places.flatten()] = samples.repeat_interleave(places.shape[1])
        return owner[:-1]


@dataclass(frozen=True)
class SeveralAxes:
    """Samples lie along the axes ``dims`` together, as pixels do.

    Taken as one axis in this order, in front of all others, they lie along it as ``line`` says.
    ``sizes``: of these axes.
    """

    dims: tuple[int, ...]
    sizes: tuple[int, ...]
    line: Layout | Ragged

    @property
    def samples(self) -> int:
        """How many samples there are."""
        return self.line.samples

    @property
    def padded(self) -> bool:
        """Whether ``split`` fills up shorter samples."""
        return self.line.padded

    @property
    def form(self) -> Any:
        """What is left of it without sizes, to compare; None where that does not say all."""
        if self.line.form is None:
            return None
        return (self.dims, self.line.form)

    def split(self, t: Tensor) -> Tensor:
        """Return ``[n, *shape]``, where the first of ``dims`` has the entries of one sample.

        The others have one entry.
        """
        rows = self.line.split(self._together(t))
        first, *others = sorted(self.dims)
        rows = rows.movedim(1, 1 + first)
        for dim in others:
            rows = rows.unsqueeze(1 + dim)
        return rows

    def scaled(self, t: Tensor, weights: Tensor) -> Tensor:
        """Return ``t`` with the entries of sample n multiplied by ``weights[n]``."""
        return self._apart(self.line.scaled(self._together(t), weights))

    def only(self, t: Tensor, first: int, last: int) -> Tensor:
        """Return ``[k, *t.shape]``: copy k has the entries of sample ``first + k``, and zeros."""
        copies = self.line.only(self._together(t), first, last)
        # Each copy is taken apart by itself: behind the axis of copies every axis is one further
        # on.
        return self._apart(copies, 1)

    def places(self, dims: Iterable[int]) -> dict[int, Tensor] | None:
        """Return for some of the axes where along them each sample lies: ``[n]``.

        None where a sample has several entries.
        """
        numbers = torch.arange(math.prod(self.sizes))
        numbers = self.line.split(numbers)
        if numbers.shape[1] != 1:
            return None
        along = torch.unravel_index(numbers[:, 0], self.sizes)
        by_dim = dict(zip(self.dims, along, strict=True))
        return {dim: by_dim[dim] for dim in dims}

    def _together(self, t: Tensor) -> Tensor:
        """Return a tensor with the axes of samples as one, in front."""
        return t.movedim(self.dims, tuple(range(len(self.dims)))).flatten(0, len(self.dims) - 1)

    def _apart(self, t: Tensor, before: int = 0) -> Tensor:
        """Return what ``_together`` was given, behind ``before`` further axes."""
        places = tuple(range(before, before + len(self.dims)))
        dims = tuple(before + d for d in self.dims)
        # As a cotangent usually lies in memory: kernels for images are tried with few other ways.
        return t.unflatten(before, self.sizes).movedim(places, dims).contiguous()


# Where the samples lie in a value that belongs to them alone.
AnyLayout = Layout | Ragged | SeveralAxes | Scattered

# The longest sample times their number may be so many times what there is, as all are padded.
PADDED = 8


def any_layout_of(value: Ownership, samples: int) -> AnyLayout | None:
    """Return where the samples lie in a value; None where an element belongs to no single one."""
    layout = layout_of(value, samples)
    if layout is not None or not value.owned or not value.all_owned:
        return layout
    uneven = _ragged_layout(value, samples) or _several_axes(value, samples)
    if uneven is not None:
        return uneven
    owner = np.broadcast_to(value.owner, value.shape).astype(np.int64)
    return Scattered(torch.from_numpy(owner.copy()), samples)


def _ragged_layout(value: Ownership, samples: int) -> Ragged | None:
    """Return where the samples lie along one axis in different numbers; None if they do not."""
    dims = _sample_dims(value, samples)
    if not value.separate or len(dims) != 1:
        return None
    (dim,) = dims
    lines = np.moveaxis(value.owner, dim, 0).reshape(value.owner.shape[dim], -1)
    owner, size = lines[:, 0], value.shape[dim]
    if (lines != owner[:, None]).any() or not is_sample(owner).all():
        return None
    lengths = np.bincount(owner.astype(np.int64), minlength=samples)
    longest = int(lengths.max())
    if longest * samples > PADDED * size:
        return None
    places = np.full((samples, longest), size)
    places[np.arange(longest) < lengths[:, None]] = np.argsort(owner, kind="stable")
    return Ragged(dim, samples, torch.from_numpy(places))


def _several_axes(value: Ownership, samples: int) -> SeveralAxes | None:
    """Return where the samples lie along several axes; None if something else matters, too."""
    dims = _sample_dims(value, samples)
    if not value.separate or len(dims) < 2:
        return None
    sizes = [value.shape[d] for d in dims]
    others = [d for d in range(len(value.shape)) if d not in dims]
    owner = value.owner.transpose(*dims, *others)
    owner = owner.reshape(*sizes, -1)[..., 0]
    # Pixels may be numbered along columns: then another order of the axes is the regular one.
    best: SeveralAxes | None = None
    for order in permutations(range(len(dims))):
        line = _along_a_line(owner.transpose(order).reshape(-1), samples)
        if line is None:
            return None
        layout = SeveralAxes(tuple(dims[k] for k in order), tuple(sizes[k] for k in order), line)
        if layout.form is not None:
            return layout
        best = best or layout
    return best


def _along_a_line(owner: Array, samples: int) -> Layout | Ragged | None:
    """Return how the entries of a single axis belong to the samples."""
    value = Ownership(owner.shape, owner, np.zeros(owner.shape, dtype=np.uint64))
    return layout_of(value, samples) or _ragged_layout(value, samples)


def layout_of(value: Ownership, samples: int) -> Layout | None:
    """Return where the samples lie in a value.

    None where they share an axis unevenly, lie along several axes, or depend on each other.
    """
    if not value.separate:
        return None
    dims = _sample_dims(value, samples)
    if len(dims) != 1:
        return None
    (dim,) = dims
    size, stored = value.shape[dim], value.owner.shape[dim]
    # Owners as [entries along dim, everything else]: a line of owners, if it is one and the same.
    lines = np.moveaxis(value.owner, dim, 0).reshape(stored, -1)
    if size == samples and follow_samples(lines, 0, samples):
        return Layout(dim, samples)
    # Each line has one owner, or the samples lie along another axis as well.
    owner = lines[:, 0]
    if size % samples or not is_sample(owner).all() or (lines != owner[:, None]).any():
        return None
    return _even_layout(owner, dim, samples)


def _sample_dims(value: Ownership, samples: int) -> list[int]:
    """The axes on which samples lie. With one sample in the batch, the first that has its size."""
    ndim = len(value.shape)
    if samples == 1:
        return [d for d in range(ndim) if value.shape[d] == 1][:1]
    return [d for d in range(ndim) if value.owner_varies(d)]


def _even_layout(owner: Array, dim: int, samples: int) -> Layout | None:
    """Where samples lie along an axis, given the sample of every entry; None if unevenly."""
    # For two samples 0 0 1 1 is "nt", 0 1 0 1 is "tn", and 0 1 1 0 has the order (0, 3, 1, 2).
    block = len(owner) // samples
    sample = np.arange(samples)
    if (owner == np.repeat(sample, block)).all():
        return Layout(dim, samples, block)
    if (owner == np.tile(sample, block)).all():
        return Layout(dim, samples, block, "tn")
    order = np.argsort(owner, kind="stable")
    if (owner[order].reshape(samples, block) != sample[:, None]).any():
        return None
    return Layout(dim, samples, block, tuple(order.tolist()))


# --- of predictions -------------------------------------------------------------------------------


def prediction_dim(value: Ownership, samples: int, leading: bool = True) -> int | None:
    """Return the sample axis of a prediction.

    It is the first, unless the inputs carry samples elsewhere (not ``leading``). Then the owners
    say which, and for a prediction that no sample owns, the first axis of the right size.
    """
    if leading and value.shape[:1] == (samples,):
        return 0
    # Elsewhere slice n is sample n's by its owners alone, so these have to say so.
    dim = value.sample_dim()
    if dim is not None and value.shape[dim] == samples:
        return dim
    if leading or value.owned or samples not in value.shape:
        return None
    return value.shape.index(samples)


def in_its_place(value: Ownership, samples: int, leading: bool) -> bool:
    """Tell whether slice n of a prediction belongs to sample n (or to none)."""
    if value.coupled:
        return False  # an element of several samples has no place among them
    if not value.owned:
        return True
    dim = prediction_dim(value, samples, leading)
    if dim is not None:
        return follow_samples(value.owner, dim, samples)
    return contiguous_blocks(value, samples) is not None


def in_its_group(value: Ownership, sets: SampleSets, leading: bool) -> bool:
    """Tell whether slice n of a prediction belongs to sample n, to a set that it is in, or to none.

    As a prediction does that is the mean of the sample's group.
    """
    if value.mixed:
        return False
    if not value.grouped:
        return in_its_place(value, sets.samples, leading)
    dim = prediction_dim(value, sets.samples, leading)
    # One owner for all slices is no set that all of them are in: that would be the whole batch.
    if dim is None or value.owner.shape[dim] != sets.samples:
        return False
    slices = np.moveaxis(value.owner, dim, 0)
    for n in range(sets.samples):
        for owner in np.unique(slices[n]):
            if owner != SHARED and not sets.members(owner)[n]:
                return False
    return True


def contiguous_blocks(value: Ownership, samples: int) -> Array | None:
    """Return keys as ``[samples, ..]`` if samples lie in equal blocks along the first axis."""
    if not value.shape or value.shape[0] % samples or value.key.shape[0] == 1:
        return None
    # The first dim is stored in full here, so each row of the reshaped owners is one block.
    if not follow_samples(value.owner.reshape(samples, -1), 0, samples):
        return None
    return value.key.reshape(samples, -1)


def uniform(value: Ownership, samples: int, leading: bool) -> bool:
    """Tell whether slice n is the same function for every n."""
    dim = prediction_dim(value, samples, leading)
    if dim is not None:
        key = np.moveaxis(value.key, dim, 0)
        # Along a plain axis the index takes part in the keys, so the functions are different.
        return not value.plain(dim) and bool((key == key[:1]).all())
    blocks = contiguous_blocks(value, samples)
    return blocks is not None and bool((blocks == blocks[:1]).all())


def in_order(value: Ownership, samples: int) -> bool:
    """Tell whether samples follow on each other along some axis.

    They may do so once, each as often as it likes, or (interleaved with something else) again and
    again, each once.
    """
    owner = np.atleast_1d(value.owner)
    for dim in range(owner.ndim):
        # Read with this axis slowest; what no sample owns may stand anywhere.
        line = np.moveaxis(owner, dim, 0).reshape(-1)
        owned = line[line != SHARED]
        if (np.diff(owned) >= 0).all():
            return True
        if len(owned) % samples:
            continue
        if (owned.reshape(-1, samples) == np.arange(samples)).all():
            return True
    return False
