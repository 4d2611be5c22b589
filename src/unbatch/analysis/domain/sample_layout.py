"""Where the samples of a mini-batch lie in a value, and how to bring them to the front.

Read off the owners of a value's elements (``labels.py``); knows nothing about ops or derivatives. The questions, from
the narrowest to the widest: ``Marks.sample_dim`` (an axis whose slice n belongs to sample n), ``prediction_dim`` (the
same by the conventions for predictions), ``contiguous_blocks`` (samples one after the other along the first axis),
``layout_of`` (one axis, in any even pattern) and ``in_order`` (samples follow on each other, in whatever number).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from unbatch.analysis.domain.ownership import SHARED, Ownership, follow_samples, is_sample


@dataclass(frozen=True)
class Layout:
    """Along axis ``dim`` lie ``samples`` samples of ``block`` entries each.

    ``order``: "nt", one sample after the other; "tn", interleaved; or, for anything else, the positions of the
    entries of sample 0, of sample 1, and so on.
    """

    dim: int
    samples: int
    block: int = 1
    order: str | tuple[int, ...] = "nt"

    def split(self, t: Tensor) -> Tensor:
        """``[n, *shape]``, where ``dim`` of ``shape`` has been left with the entries of one sample."""
        if self.dim == 0 and self.order == "nt":
            return (
                t.view(self.samples, self.block, *t.shape[1:])
                if t.is_contiguous()
                else t.unflatten(0, (-1, self.block))
            )
        if self.order == "tn":
            return t.unflatten(self.dim, (self.block, self.samples)).movedim(self.dim + 1, 0)
        if isinstance(self.order, tuple):
            t = t.index_select(self.dim, torch.tensor(self.order, device=t.device))
        return t.unflatten(self.dim, (self.samples, self.block)).movedim(self.dim, 0)

    def join(self, rows: Tensor) -> Tensor:
        """The inverse of ``split``."""
        if self.order == "tn":
            return rows.movedim(0, self.dim + 1).flatten(self.dim, self.dim + 1)
        out = rows.movedim(0, self.dim).flatten(self.dim, self.dim + 1)
        if isinstance(self.order, tuple):
            back = torch.argsort(torch.tensor(self.order, device=out.device))
            out = out.index_select(self.dim, back)
        return out

    def scaled(self, t: Tensor, weights: Tensor) -> Tensor:
        """The entries of sample n times ``weights[n]``."""
        rows = self.split(t)
        return self.join(rows * weights.to(rows.dtype).reshape(-1, *[1] * (rows.ndim - 1)))

    def only(self, t: Tensor, first: int, last: int) -> Tensor:
        """``[k, *t.shape]``: copy k keeps the entries of sample ``first + k`` and is zero elsewhere."""
        count = last - first
        out = t.new_zeros(count, self.samples, *self.split(t).shape[1:])
        here = torch.arange(count, device=t.device)
        out[here, here + first] = self.split(t)[first:last]
        return replace(self, dim=self.dim + 1).join(out.movedim(1, 0))


@dataclass(frozen=True)
class Scattered:
    """Samples lie in no even pattern: ``owner`` says of every entry whose it is."""

    owner: Tensor
    samples: int
    dim: int = -1

    def scaled(self, t: Tensor, weights: Tensor) -> Tensor:
        return t * weights.to(t)[self.owner.to(t.device)]

    def only(self, t: Tensor, first: int, last: int) -> Tensor:
        """As for a layout: copy k keeps the entries of sample ``first + k``."""
        owner = self.owner.to(t.device)
        return torch.stack([torch.where(owner == n, t, 0) for n in range(first, last)])


def layout_of(marks: Ownership, samples: int) -> Layout | None:
    """Where the samples lie in a value; None where they share an axis unevenly, or several axes, or met."""
    if not marks.separate:
        return None
    dims = [d for d in range(len(marks.shape)) if marks.owner_varies(d)]
    if samples == 1:
        dims = [d for d, s in enumerate(marks.shape) if s == 1][:1]
    if len(dims) != 1:
        return None
    (dim,) = dims
    size = marks.shape[dim]
    line = np.moveaxis(np.broadcast_to(marks.owner, marks.owner.shape), dim, 0).reshape(
        marks.owner.shape[dim], -1
    )
    if size == samples and follow_samples(line, 0, samples):
        return Layout(dim, samples)
    owner = line[:, 0]
    if size % samples or not is_sample(owner).all() or (line != owner[:, None]).any():
        return None
    block = size // samples
    if (owner == np.repeat(np.arange(samples), block)).all():
        return Layout(dim, samples, block)
    if (owner == np.tile(np.arange(samples), block)).all():
        return Layout(dim, samples, block, "tn")
    order = np.argsort(owner, kind="stable")
    even = (owner[order].reshape(samples, block) == np.arange(samples)[:, None]).all()
    return Layout(dim, samples, block, tuple(int(i) for i in order)) if even else None


# --- of predictions -------------------------------------------------------------------------------


def prediction_dim(marks: Ownership, samples: int, leading: bool = True) -> int | None:
    """The sample axis of a prediction: the first, unless the inputs carry samples elsewhere (not ``leading``)."""
    if leading and marks.shape[:1] == (samples,):
        return 0
    dim = marks.sample_dim()
    if dim is not None and marks.shape[dim] == samples:
        return dim
    return (
        None
        if leading or marks.owned
        else next((d for d, s in enumerate(marks.shape) if s == samples), None)
    )


def holds_its_place(marks: Ownership, samples: int, leading: bool) -> bool:
    """Slice n of a prediction belongs to sample n (or to none)."""
    if marks.coupled:
        return False
    if not marks.owned:
        return True
    dim = prediction_dim(marks, samples, leading)
    if dim is not None:
        return follow_samples(marks.owner, dim, samples)
    return contiguous_blocks(marks, samples) is not None


def contiguous_blocks(marks: Ownership, samples: int) -> np.ndarray | None:
    """Keys as ``[samples, ..]`` if samples lie in contiguous, equal blocks along the leading dim."""
    if not marks.shape or marks.shape[0] % samples or marks.key.shape[0] == 1:
        return None
    if not follow_samples(marks.owner.reshape(samples, -1), 0, samples):
        return None
    return marks.key.reshape(samples, -1)


def uniform(marks: Ownership, samples: int, leading: bool) -> bool:
    """Slice n is the same function for every n."""
    dim = prediction_dim(marks, samples, leading)
    if dim is not None:
        key = np.moveaxis(marks.key, dim, 0)
        return not marks.plain(dim) and bool((key == key[:1]).all())
    blocks = contiguous_blocks(marks, samples)
    return blocks is not None and bool((blocks == blocks[:1]).all())


def in_order(marks: Ownership, samples: int) -> bool:
    """Along some axis samples follow on each other, once or (interleaved with something else) again and again."""
    owner = np.atleast_1d(marks.owner)
    for dim in range(owner.ndim):
        line = np.moveaxis(owner, dim, 0).reshape(-1)
        owned = line[line != SHARED]
        ascending = (np.diff(owned) >= 0).all()
        if ascending:
            return True
        if len(owned) % samples == 0 and (owned.reshape(-1, samples) == np.arange(samples)).all():
            return True
    return False
