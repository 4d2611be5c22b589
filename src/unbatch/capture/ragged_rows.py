"""Rows that belong to samples by an index, as nodes belong to graphs and words to sentences.

Outside, samples are one axis and the rows of each another, filled up with zeros. The model and the
loss get the rows as they know them. Nothing here knows about graphs of ops.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves

from unbatch.capture.opened import is_packed
from unbatch.errors import MSG_ROWS_CHANGED, MSG_ROWS_OF, InputError


@dataclass(frozen=True)
class Places:
    """Where rows lie among those of all samples, ``[N, length]``, one behind the other.

    ``of_rows``: the place of each row. ``sources``: the row at each place; that behind the last
    where there is none.
    """

    of_rows: Tensor
    sources: Tensor
    length: int


@dataclass(frozen=True, eq=False)
class RowsOf:
    """An entry of ``in_dims`` or ``out_dims``, as ``rows_of`` returns it.

    ``owners``: the sample of each row along axis ``dim``. ``samples``: N if it was stated, else one
    more than the last owner, or what other entries say.
    """

    owners: Tensor
    samples: int | None
    dim: int
    _places: dict[int, Places] = field(default_factory=dict, repr=False)

    def __repr__(self) -> str:
        return f"rows_of({len(self.owners)} rows, dim={self.dim})"

    @cached_property
    def least(self) -> int:
        """How many samples there are at least."""
        if self.samples is not None:
            return self.samples
        return int(self.owners.max()) + 1 if len(self.owners) else 0

    def fits(self, t: Tensor, samples: int) -> bool:
        """Tell whether a tensor has these rows, and no row is one of a sample that is not there."""
        if not -t.ndim <= self.dim < t.ndim or t.shape[self.dim] != len(self.owners):
            return False
        return self.samples in (None, samples) and self.least <= samples

    def names_rows_of(self, rows: RowsOf, t: Tensor) -> bool:
        """Tell whether entries are numbers of rows of the same sample, for two samples at least."""
        if t.dtype not in (torch.int64, torch.int32) or len(self.owners.unique()) < 2:
            return False
        numbers = t.detach().cpu().long().movedim(self.dim, 0)
        numbers = numbers.reshape(len(numbers), -1)
        if not numbers.numel() or int(numbers.min()) < 0 or int(numbers.max()) >= len(rows.owners):
            return False
        return bool((rows.owners[numbers] == self.owners[:, None]).all())

    def shape(self, samples: int) -> tuple[int, int]:
        """Return N, and how many rows the longest sample has."""
        return samples, self._placed(samples).length

    def is_told_by(self, leaf: Any) -> bool:
        """Tell whether a tensor says which rows a sample has: the index, its ends, or counts."""
        is_index = isinstance(leaf, Tensor) and leaf.ndim == 1
        if not is_index or leaf.dtype not in (torch.int64, torch.int32):
            return False
        counts = torch.bincount(self.owners, minlength=self.least)
        ends = counts.cumsum(0)
        pointers = torch.cat([ends.new_zeros(1), ends])
        numbers = leaf.detach().cpu().long()
        return any(
            torch.equal(numbers, known) for known in (self.owners, counts, ends - counts, pointers)
        )

    def folded(self, t: Tensor, samples: int) -> Tensor:
        """Return rows as ``[N, length, ..]``, those of each sample in their order, then zeros."""
        places = self._placed(samples)
        rows = t.movedim(self.dim, 0)
        filled = torch.cat([rows, rows.new_zeros(1, *rows.shape[1:])])
        chosen = filled.index_select(0, _beside(places.sources, t))
        return chosen.unflatten(0, (samples, places.length))

    def unfolded(self, t: Tensor, samples: int) -> Tensor:
        """Return ``[N, length, ..]`` as rows again, in the order in which they came."""
        places = self._placed(samples)
        rows = t.flatten(0, 1).index_select(0, _beside(places.of_rows, t))
        # In memory as other batches are, wherever the axis is.
        return rows.movedim(0, self.dim).contiguous()

    def place(self, samples: int) -> None:
        """Find the places of the rows before a run does, in which that would be recorded."""
        if self.least <= samples:
            self._placed(samples)

    def _placed(self, samples: int) -> Places:
        # Kept, so that each run of the program reads the same constants.
        if samples not in self._places:
            self._places[samples] = _places(self.owners, samples)
        return self._places[samples]


def _beside(index: Tensor, t: Tensor) -> Tensor:
    """Return an index on the device of a tensor; its numbers are wanted beside one without, too."""
    return index if t.is_meta else index.to(t.device)


def _places(owners: Tensor, samples: int) -> Places:
    counts = torch.bincount(owners, minlength=samples)
    length = max(int(counts.max()), 1) if samples else 1
    order = owners.argsort(stable=True)
    before = counts.cumsum(0) - counts  # rows of samples that come before
    within = torch.empty_like(owners)
    within[order] = torch.arange(len(owners)) - before[owners[order]]
    of_rows = owners * length + within
    sources = torch.full((samples * length,), len(owners))
    sources[of_rows] = torch.arange(len(owners))
    return Places(of_rows, sources, length)


def rows_of(
    index: Tensor | PackedSequence | None = None,
    *,
    ptr: Tensor | None = None,
    samples: int | None = None,
    dim: int = 0,
) -> RowsOf:
    """Return an entry of ``in_dims`` or ``out_dims`` for rows that belong to samples by an index.

    ``index``: the sample of each row along axis ``dim``, ``[R]``, such as the batch vector of
    stacked graphs or the image that a box is in; for sequences that are packed, the
    ``PackedSequence``. ``ptr``: in its place ``[N + 1]``, where the rows of each sample begin, and
    where the last ones end. ``samples``: N, where samples at the end may have no rows and no other
    input says so.

    A sample may have any number of rows, anywhere. Predictions are then ``[N, length, ..]``, zeros
    behind the rows of a sample. Raises ``InputError`` for anything else.
    """
    given = ptr if index is None else index
    if (index is None) == (ptr is None) or not isinstance(dim, int):
        raise InputError(MSG_ROWS_OF.format(value=_shown(given)))
    if isinstance(index, PackedSequence):
        owners = _of_packed(index)
    elif ptr is not None:
        owners = _of_pointers(ptr)
    else:
        owners = _numbers(index)
    if ptr is not None and samples is None:
        samples = len(ptr) - 1
    if bool((owners < 0).any()) or not _is_count(samples, owners):
        raise InputError(MSG_ROWS_OF.format(value=_shown(given)))
    return RowsOf(owners, samples, dim)


def _is_count(samples: Any, owners: Tensor) -> bool:
    """Tell whether there may be so many samples; None where that is left open."""
    if samples is None:
        return True
    return isinstance(samples, int) and bool((owners < samples).all())


def of_data(entries: list[Any], tree: Any) -> list[Any]:
    """Return entries of the leaves of a tree, None for how sequences are packed: only data is."""
    entries, i = list(entries), 0
    for part in tree_leaves(tree, is_leaf=is_packed):
        if is_packed(part):
            count = len(PackedSequence._fields)
            entries[i + 1 : i + count] = [None] * (count - 1)
            i += count
        else:
            i += 1
    return entries


def check_packed(what: str, entries: list[Any], tree: Any) -> None:
    """Raise ``InputError`` where sequences that are packed have other rows than was declared."""
    i = 0
    for part in tree_leaves(tree, is_leaf=is_packed):
        if not is_packed(part):
            i += 1
            continue
        entry = entries[i]
        if isinstance(entry, RowsOf) and not torch.equal(entry.owners, _of_packed(part)):
            raise InputError(MSG_ROWS_CHANGED.format(what=f"{what}[{i}]", entry=entry))
        i += len(part)


def _numbers(index: Any) -> Tensor:
    """Return whole numbers along one axis, on the CPU and as they are at this moment."""
    is_index = isinstance(index, Tensor) and index.ndim == 1
    if not is_index or index.dtype not in (torch.int64, torch.int32):
        raise InputError(MSG_ROWS_OF.format(value=_shown(index)))
    owners: Tensor = index.detach().cpu().long().clone()
    return owners


def _of_pointers(ptr: Any) -> Tensor:
    pointers = _numbers(ptr)
    counts = pointers.diff()
    if not len(pointers) or int(pointers[0]) or bool((counts < 0).any()):
        raise InputError(MSG_ROWS_OF.format(value=_shown(ptr)))
    return torch.arange(len(counts)).repeat_interleave(counts)


def _of_packed(packed: PackedSequence) -> Tensor:
    """Return the sample of each row: step by step, the sequences that have not ended."""
    sizes = packed.batch_sizes.tolist()
    order = torch.arange(sizes[0])
    if packed.sorted_indices is not None:
        order = packed.sorted_indices.cpu()
    return torch.cat([order[:size] for size in sizes])


def _shown(value: Any) -> str:
    """Return what was passed, in few words."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return type(value).__name__
