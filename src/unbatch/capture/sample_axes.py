"""Samples that lie along several axes, as tokens do: outside they are one axis, the first.

The model and the loss get tensors as they know them; what they return is flattened again. Nothing
here knows about graphs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from unbatch.capture.trees import tensors_in
from unbatch.errors import (
    MSG_FOLD,
    MSG_FOLD_CUT,
    MSG_FOLD_OUTPUT,
    MSG_FOLD_SHAPE,
    InputError,
)

Axes = tuple[int, ...]


class Fold(ABC):
    """What brings the samples of data and outputs to the first axis, and back.

    ``inputs``, ``targets``, ``outputs``: where they lie in every leaf, None if a leaf is left as it
    is. Those of outputs are those of the latest run of the model: ``returned`` fills them in.
    """

    inputs: list[Any]
    targets: list[Any]
    outputs: list[Any]

    @property
    def of_outputs(self) -> bool:
        """Whether outputs are folded, too."""
        return True

    @property
    def is_ragged(self) -> bool:
        """Whether samples have different numbers of rows, so that they cannot change places."""
        return False

    @property
    def guessed(self) -> list[tuple[int, ...]]:
        """How the shapes of outputs begin whose samples are guessed to be those of an input."""
        return []

    def check(self, inputs: Any, targets: Any) -> None:  # noqa: B027
        """Raise ``InputError`` where the data say otherwise whose rows these are."""

    @abstractmethod
    def renewed(self, inputs: Any, targets: Any) -> Fold:
        """Return the same for other data, which may be of other sizes."""

    @abstractmethod
    def axes(self, leaf: Any) -> Any:
        """Return where the samples lie in an output, or None."""

    @abstractmethod
    def folded(self, tree: Any, axes: Sequence[Any]) -> Any:
        """Return tensors with the samples along the first axis."""

    @abstractmethod
    def unfolded(self, tree: Any, axes: Sequence[Any]) -> Any:
        """Return tensors with the samples where the model has them."""

    @abstractmethod
    def returned(self, output: Any) -> Any:
        """Return what the model returned, folded; leaves without samples stay as they are."""

    @abstractmethod
    def misfit(self, shapes: list[tuple[int, ...]]) -> InputError:
        """Return the error where a loss inside a model is cut at values without these axes."""


@dataclass(frozen=True)
class SampleAxes(Fold):
    """The axes ``dims`` that together tell samples apart, of ``sizes``.

    A tensor with too few axes for ``dims`` has them in front. ``inputs``, ``targets``, ``outputs``:
    these axes in every leaf, None if a leaf has none. Those of outputs are those of the latest run
    of the model: ``returned`` fills them in.
    """

    dims: Axes
    sizes: Axes
    inputs: list[Axes | None] = field(default_factory=list)
    targets: list[Axes | None] = field(default_factory=list)
    outputs: list[Axes | None] = field(default_factory=list, compare=False)

    @staticmethod
    def of(dims: Any, inputs: Any, targets: Any) -> SampleAxes:
        """Raise ``InputError`` if ``dims`` are no axes, or a tensor does not have them."""
        _check_dims(dims)
        dims = tuple(dims)
        sizes = _sizes(dims, inputs)
        bare = SampleAxes(dims, sizes)
        return SampleAxes(
            dims, sizes, bare._checked_axes("X", inputs), bare._checked_axes("y", targets)
        )

    def renewed(self, inputs: Any, targets: Any) -> SampleAxes:
        fold = SampleAxes.of(self.dims, inputs, targets)
        # A recording may be moved to the new data, and then no model is run that says these anew.
        return replace(fold, outputs=list(self.outputs))

    def misfit(self, shapes: list[tuple[int, ...]]) -> InputError:
        return InputError(MSG_FOLD_CUT.format(shapes=shapes, dims=self.dims, sizes=self.sizes))

    def axes(self, leaf: Any) -> Axes | None:
        """Return where the samples lie in a tensor, or None."""
        if not isinstance(leaf, Tensor):
            return None
        # By size as well: a leaf with enough axes need not have samples along them.
        axes = _axes(self.dims, leaf)
        if axes is None or _sizes_along(axes, leaf) != self.sizes:
            return None
        return axes

    def _checked_axes(self, what: str, tree: Any) -> list[Axes | None]:
        """Return the axes in every leaf; ``InputError`` for a tensor without samples."""
        axes = []
        for leaf in tree_leaves(tree):
            axes.append(self.axes(leaf))
            if isinstance(leaf, Tensor) and axes[-1] is None:
                raise InputError(_shape_message(what, leaf, self.dims, self.sizes))
        return axes

    def folded(self, tree: Any, axes: Sequence[Axes | None]) -> Any:
        """Return tensors with the sample axes flattened into one, in front."""

        def flattened(t: Tensor, at: Axes) -> Tensor:
            return t.movedim(at, tuple(range(len(at)))).flatten(0, len(at) - 1)

        return mapped(tree, axes, flattened)

    def unfolded(self, tree: Any, axes: Sequence[Axes | None]) -> Any:
        """Return tensors with the sample axes where the model has them."""

        def unflattened(t: Tensor, at: Axes) -> Tensor:
            # Laid out as a tensor of this shape usually is: a view of it may be asked for, and
            # PyTorch crashes where a group norm gets channels last.
            return t.unflatten(0, self.sizes).movedim(tuple(range(len(at))), at).contiguous()

        return mapped(tree, axes, unflattened)

    def returned(self, output: Any) -> Any:
        """Return what the model returned, flattened; leaves without samples stay as they are."""
        # In place, as ``Program`` is frozen: ``evaluate`` needs the axes that are gone here.
        self.outputs[:] = [self.axes(leaf) for leaf in tree_leaves(output)]
        if not any(self.outputs):
            shapes = list(map(_shape, tensors_in(output)))
            raise InputError(
                MSG_FOLD_OUTPUT.format(shapes=shapes, dims=self.dims, sizes=self.sizes)
            )
        return self.folded(output, self.outputs)


def _check_dims(dims: Any) -> None:
    """Raise ``InputError`` if ``dims`` are not two or more different whole numbers."""
    if not isinstance(dims, Sequence) or not all(isinstance(d, int) for d in dims):
        raise InputError(MSG_FOLD.format(value=dims))
    if len(set(dims)) < 2:
        raise InputError(MSG_FOLD.format(value=dims))


def _sizes(dims: Axes, inputs: Any) -> Axes:
    """Return the sizes of the sample axes, as the first of the inputs has them."""
    tensors = tensors_in(inputs)
    if not tensors:
        raise InputError(_shape_message("X", None, dims, "any"))
    first = tensors[0]
    axes = _axes(dims, first)
    if axes is not None and len(set(axes)) < len(dims):  # (1, -1) may be one axis
        raise InputError(MSG_FOLD.format(value=dims))
    # ``dims`` that no tensor has are a mistake, even if all have enough axes in front.
    if axes is None or not any(_has(dims, t) for t in tensors):
        raise InputError(_shape_message("X", first, dims, "any"))
    return _sizes_along(axes, first)


def _sizes_along(axes: Axes, t: Tensor) -> Axes:
    return tuple(t.shape[d] for d in axes)


def _shape_message(what: str, t: Tensor | None, dims: Axes, sizes: Any) -> str:
    return MSG_FOLD_SHAPE.format(what=what, shape=_shape(t), dims=dims, sizes=sizes)


def _axes(dims: Axes, t: Tensor) -> Axes | None:
    """Return ``dims`` counted from the front; the first axes if a tensor has too few for them."""
    if _has(dims, t):
        return tuple(d % t.ndim for d in dims)
    if t.ndim < len(dims):
        return None
    return tuple(range(len(dims)))


def _has(dims: Axes, t: Tensor) -> bool:
    """Tell whether a tensor has axes of these numbers, negative ones counted from behind."""
    return -t.ndim <= min(dims) and max(dims) < t.ndim


def mapped(tree: Any, axes: Sequence[Any], move: Callable[[Tensor, Any], Tensor]) -> Any:
    """Return a tree with ``move`` applied to the leaves that have samples."""
    leaves, spec = tree_flatten(tree)
    moved = []
    for leaf, at in zip(leaves, axes, strict=True):
        moved.append(leaf if at is None else move(leaf, at))
    return tree_unflatten(moved, spec)


def _shape(t: Tensor | None) -> Any:
    return None if t is None else tuple(t.shape)
