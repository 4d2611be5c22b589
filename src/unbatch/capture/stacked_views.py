"""Several entries of each sample along one axis, as of views that were stacked; declared by users.

Outside, samples are one axis, the first, and their views another. The model and the loss get
tensors as they know them. Nothing here knows about graphs.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map

from unbatch.capture.opened import open_packed
from unbatch.capture.ragged_rows import RowsOf, check_packed, of_data
from unbatch.capture.sample_axes import Fold, mapped
from unbatch.errors import (
    MSG_OUT_DIMS,
    MSG_OUT_DIMS_TREE,
    MSG_ROW_NUMBERS,
    MSG_ROWS_CHANGED,
    MSG_ROWS_SIZE,
    MSG_ROWS_UNCLEAR,
    MSG_VIEWS,
    MSG_VIEWS_SIZE,
    InputError,
)


@dataclass(frozen=True)
class Views:
    """``count`` views of each of N samples, stacked along axis ``dim`` as ``torch.cat`` does it.

    An entry of ``in_dims`` or ``out_dims``, as an axis is: entries n, N + n, 2N + n, .. along the
    axis are sample n's, so that ``[2N, d]`` are N pairs. ``adjacent``: its entries are next to each
    other instead, as ``repeat_interleave`` or ``flatten`` puts them. Raises ``InputError`` for a
    count that is no whole number of at least 1, or an axis that is none.
    """

    count: int
    dim: int = 0
    adjacent: bool = False

    def __post_init__(self) -> None:
        numbers = isinstance(self.count, int) and isinstance(self.dim, int)
        if not numbers or isinstance(self.count, bool) or self.count < 1:
            raise InputError(MSG_VIEWS.format(value=self))


Moved = Views | RowsOf  # what is no axis of samples before it is moved

Entry = int | Views | RowsOf | None  # where the samples lie in a leaf


def has_views(dims: Any) -> bool:
    """Tell whether any entry of a tree of axes is more than an axis."""
    return any(isinstance(entry, Moved) for entry in leaves_of_dims(dims))


def leaves_of_dims(dims: Any) -> list[Any]:
    return tree_leaves(dims, is_leaf=lambda entry: entry is None)


def without_views(dims: Any) -> Any:
    """Return a tree of axes as they are once the samples have been moved to the front."""

    def plain(entry: Any) -> Any:
        return 0 if isinstance(entry, Moved) else entry

    return tree_map(plain, dims, is_leaf=lambda entry: entry is None)


@dataclass(frozen=True)
class StackedViews(Fold):
    """Where the samples lie by ``in_dims`` (of X, and of y) and ``out_dims``, as users declared it.

    ``samples``: N. Only entries of ``in_dims`` that are views are moved: axes are known as they
    are. Entries of ``out_dims`` are all moved to the front; None is left to the analysis.
    """

    dims: tuple[Any, Any]
    out_dims: Any
    samples: int
    inputs: list[Entry] = field(default_factory=list)
    targets: list[Entry] = field(default_factory=list)
    outputs: list[Entry] = field(default_factory=list, compare=False)
    # Rows, and a leaf of the data (all of X, then of y) that said the same when they were declared.
    told: list[tuple[RowsOf, int]] = field(default_factory=list, compare=False)

    @staticmethod
    def of(dims: tuple[Any, Any], out_dims: Any, inputs: Any, targets: Any) -> StackedViews:
        """Raise ``InputError`` where an entry does not fit a tensor, or N is not told."""
        x_entries, y_entries = entries_of("in_dims", dims[0], inputs), []
        # A model with a loss of its own has no targets, and nothing is said of them.
        if targets is not None and (has_views(dims[0]) or has_views(dims[1])):
            y_entries = entries_of("in_dims", dims[1], targets)
        samples = _samples(x_entries, tree_leaves(inputs))
        if samples is None:
            samples = _samples(y_entries, tree_leaves(targets))
        if samples is None:  # what is wrong with the data is said where they are counted
            samples = _stated(x_entries, y_entries)
        for entry in leaves_of_dims((dims, out_dims)):
            if isinstance(entry, RowsOf):
                entry.place(samples)
        bare = StackedViews(dims, out_dims, samples)
        moved = replace(
            bare,
            inputs=bare._only_views("X", x_entries, tree_leaves(inputs)),
            targets=bare._only_views("y", y_entries, tree_leaves(targets)),
        )
        moved._check_names(moved.inputs, tree_leaves(inputs))
        check_packed("X", x_entries, inputs)
        check_packed("y", y_entries, targets)
        without_samples = [e is None for e in (*x_entries, *y_entries)]
        return replace(moved, told=moved._told_by(without_samples, tree_leaves((inputs, targets))))

    def _told_by(self, without_samples: list[bool], leaves: list[Any]) -> list[tuple[RowsOf, int]]:
        """Return the rows of data with the leaves that say the same, of those without samples."""
        told = []
        for rows in {id(e): e for e in (*self.inputs, *self.targets)}.values():
            if not isinstance(rows, RowsOf):
                continue
            for i, (is_plain, leaf) in enumerate(zip(without_samples, leaves, strict=False)):
                if is_plain and rows.is_told_by(leaf):
                    told.append((rows, i))
        return told

    def check(self, inputs: Any, targets: Any) -> None:
        if not self.told:
            return
        leaves = tree_leaves((inputs, targets))
        for rows, i in self.told:
            # Data of another structure are refused elsewhere.
            if i < len(leaves) and not rows.is_told_by(leaves[i]):
                raise InputError(MSG_ROWS_CHANGED.format(what=f"Leaf {i} of the data", entry=rows))

    def renewed(self, inputs: Any, targets: Any) -> StackedViews:
        self.check(inputs, targets)
        fold = StackedViews.of(self.dims, self.out_dims, inputs, targets)
        # A recording may be moved to the new data, and then no model is run that says these anew.
        return replace(fold, outputs=list(self.outputs), told=self.told)

    def _only_views(self, what: str, entries: list[Entry], leaves: list[Any]) -> list[Entry]:
        """Return the entries of leaves that are moved; all of these have to fit."""
        moved: list[Entry] = [None] * len(leaves)
        for i, (entry, leaf) in enumerate(zip(entries, leaves, strict=False)):
            if isinstance(entry, Moved):
                self._check(f"{what}[{i}]", entry, leaf)
                moved[i] = entry
        return moved

    def _check_names(self, entries: list[Entry], leaves: list[Any]) -> None:
        """Raise ``InputError`` for whole numbers that are those of rows: they have no other ones.

        The ends of an edge belong to a graph, and with other numbers they would be in another one.
        """
        ragged = [entry for entry in entries if isinstance(entry, RowsOf)]
        for i, (entry, leaf) in enumerate(zip(entries, leaves, strict=True)):
            if isinstance(entry, RowsOf) and any(
                entry.names_rows_of(rows, leaf) for rows in ragged
            ):
                raise InputError(MSG_ROW_NUMBERS.format(what=f"X[{i}]", entry=entry))

    def _check(self, what: str, entry: int | Moved, leaf: Any) -> None:
        if not _fits(entry, leaf, self.samples):
            shape = tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__
            text = MSG_ROWS_SIZE if isinstance(entry, RowsOf) else MSG_VIEWS_SIZE
            raise InputError(text.format(what=what, entry=entry, n=self.samples, shape=shape))

    @property
    def is_ragged(self) -> bool:
        return any(
            isinstance(entry, RowsOf) for entry in leaves_of_dims((self.dims, self.out_dims))
        )

    # -- moving --

    def folded(self, tree: Any, axes: Any) -> Any:
        return mapped(tree, axes, self._fold)

    def unfolded(self, tree: Any, axes: Any) -> Any:
        return mapped(tree, axes, self._unfold)

    def _fold(self, t: Tensor, entry: int | Moved) -> Tensor:
        if isinstance(entry, RowsOf):
            return entry.folded(t, self.samples)
        if isinstance(entry, int):
            return t.movedim(entry, 0)
        dim = entry.dim % t.ndim
        sizes, at = (entry.count, self.samples), dim + 1
        if entry.adjacent:
            sizes, at = (self.samples, entry.count), dim
        # In memory as other batches are: otherwise the way back is a view on this one alone.
        return t.unflatten(dim, sizes).movedim(at, 0).contiguous()

    def _unfold(self, t: Tensor, entry: int | Moved) -> Tensor:
        if isinstance(entry, RowsOf):
            return entry.unfolded(t, self.samples)
        if isinstance(entry, int):
            return t.movedim(0, entry)
        dim = entry.dim % (t.ndim - 1)  # views and samples are one axis there
        at = dim if entry.adjacent else dim + 1
        return t.movedim(0, at).contiguous().flatten(dim, dim + 1)

    # -- outputs --

    @property
    def of_outputs(self) -> bool:
        return self.out_dims is not None or any(isinstance(e, RowsOf) for e in self.inputs)

    def _entries_of_output(self, output: Any) -> list[Entry]:
        if self.out_dims is not None:
            return entries_of("out_dims", self.out_dims, output)
        return [self._as_an_input(leaf) for leaf in tree_leaves(output)]

    def _as_an_input(self, leaf: Any) -> Entry:
        """Return the rows of an input that an output has as well, as predictions of nodes do.

        Raises ``InputError`` where rows of other data have as many and other samples.
        """
        fitting = [entry for entry in self.inputs if self._has_rows(entry, leaf)]
        if not fitting:
            return None
        rows = fitting[0]
        for other in (*fitting, *self.targets):
            if self._has_rows(other, leaf) and not torch.equal(other.owners, rows.owners):
                why = "other data have as many rows, of other samples"
                raise InputError(MSG_ROWS_UNCLEAR.format(rows=f"{len(rows.owners)} rows", why=why))
        return rows

    @property
    def guessed(self) -> list[tuple[int, ...]]:
        if self.out_dims is not None:
            return []
        return [e.shape(self.samples) for e in self.inputs if isinstance(e, RowsOf)]

    def _has_rows(self, entry: Entry, leaf: Any) -> TypeGuard[RowsOf]:
        """Tell whether an output has the rows of an entry, and no row for each sample."""
        if not isinstance(entry, RowsOf) or len(entry.owners) == self.samples:
            return False
        return _fits(entry, leaf, self.samples)

    def returned(self, output: Any) -> Any:
        entries = self._entries_of_output(output)
        for i, (entry, leaf) in enumerate(zip(entries, tree_leaves(output), strict=True)):
            if entry is not None:
                self._check(f"output[{i}]", entry, leaf)
        # In place, as ``Program`` is frozen: the loss needs the axes that are gone here.
        self.outputs[:] = entries
        return self.folded(output, entries)

    def axes(self, leaf: Any) -> Entry:
        entry = self.out_dims
        if entry is None:
            return self._as_an_input(leaf)
        if not isinstance(entry, int | Moved):
            raise InputError(MSG_OUT_DIMS_TREE.format(value=entry))
        return entry if _fits(entry, leaf, self.samples) else None

    def misfit(self, shapes: list[tuple[int, ...]]) -> InputError:
        return InputError(MSG_OUT_DIMS.format(shapes=shapes, entry=self.out_dims, n=self.samples))


def entries_of(what: str, dims: Any, tree: Any) -> list[Entry]:
    """Return an entry for each leaf, from a tree of entries that may end above the leaves."""
    leaves, spec = tree_flatten(open_packed(tree))
    entries = _broadcast(dims, spec)
    bad = [e for e in leaves_of_dims(dims) if e is not None and not isinstance(e, int | Moved)]
    if entries is None or bad:
        raise InputError(
            f"{what} is {dims!r}; it takes an int, None, Views, rows_of(..), or a nesting of them "
            f"like {spec}."
        )
    for i, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor):
            entries[i] = None  # a number among tensors has no axes, whatever its neighbours have
    return of_data(entries, tree)


def _broadcast(dims: Any, spec: TreeSpec) -> list[Entry] | None:
    if dims is None or isinstance(dims, int | Moved):
        return [dims] * spec.num_leaves
    return torch.utils._pytree._broadcast_to_and_flatten(
        dims, spec, is_leaf=lambda entry: entry is None
    )


def _samples(entries: list[Entry], leaves: list[Any]) -> int | None:
    """Return N, from the first tensor that has samples along an axis; None where none has."""
    for entry, leaf in zip(entries, leaves, strict=False):
        if isinstance(entry, Views) and -leaf.ndim <= entry.dim < leaf.ndim:
            return int(leaf.shape[entry.dim]) // entry.count
        if isinstance(entry, int) and -leaf.ndim <= entry < leaf.ndim:
            return int(leaf.shape[entry])
    return None


def _stated(*entries: list[Entry]) -> int:
    """Return N where it is told by indices of rows alone: the most that any of them knows of."""
    ragged = [entry for of_leaves in entries for entry in of_leaves if isinstance(entry, RowsOf)]
    return max((entry.least for entry in ragged), default=0)


def _fits(entry: int | Moved, leaf: Any, samples: int) -> bool:
    """Tell whether a tensor has the samples where an entry says."""
    if not isinstance(leaf, Tensor):
        return False
    if isinstance(entry, RowsOf):
        return entry.fits(leaf, samples)
    dim, count = (entry, 1) if isinstance(entry, int) else (entry.dim, entry.count)
    return -leaf.ndim <= dim < leaf.ndim and leaf.shape[dim] == count * samples
