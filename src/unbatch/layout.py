"""How the samples of a mini-batch lie in a tensor, and how to bring them to the front.

Read off the owners of a value's elements (``labels.py``); knows nothing about ops or derivatives.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from unbatch.labels import SHARED, Marks, is_sample


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


def layout_of(marks: Marks, samples: int) -> Layout | None:
    """Where the samples lie in a value; None where they share an axis unevenly, or several axes, or met."""
    if not marks.owned or marks.coupled:
        return None
    dims = [d for d in range(len(marks.shape)) if marks.owner_varies(d)]
    if samples == 1:
        dims = [d for d, s in enumerate(marks.shape) if s == 1][:1]
    if len(dims) != 1:
        return None
    (dim,) = dims
    size = marks.shape[dim]
    line = np.moveaxis(np.broadcast_to(marks.owner, marks.owner.shape), dim, 0).reshape(marks.owner.shape[dim], -1)
    if size == samples and ((line == np.arange(samples)[:, None]) | (line == SHARED)).all():
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
