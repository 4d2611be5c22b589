"""Samples that lie along several axes, as tokens do: for whoever asks they are one axis, the first.

The model and the loss get tensors as they know them; what they return is folded again. Nothing here knows about graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from unbatch.errors import MSG_FOLD, MSG_FOLD_OUTPUT, MSG_FOLD_SHAPE, InputError

Axes = tuple[int, ...]


@dataclass(frozen=True)
class SampleAxes:
    """``dims``: the axes that together tell samples apart, of ``sizes``; a tensor with too few has them in front.

    ``inputs``, ``targets``, ``outputs``: these axes of every leaf, None where a leaf has none; those of outputs are
    known once the model has run.
    """

    dims: Axes
    sizes: Axes
    inputs: list[Axes | None] = field(default_factory=list)
    targets: list[Axes | None] = field(default_factory=list)
    outputs: list[Axes | None] = field(default_factory=list, compare=False)

    @staticmethod
    def of(dims: Any, inputs: Any, targets: Any) -> SampleAxes:
        """Raises ``InputError`` where the axes are none, or a tensor does not have them."""
        if (
            not isinstance(dims, Sequence)
            or not all(isinstance(d, int) for d in dims)
            or len(set(dims)) < 2
        ):
            raise InputError(MSG_FOLD.format(value=dims))
        first = next((t for t in tree_leaves(inputs) if isinstance(t, Tensor)), None)
        axes = None if first is None else _axes(tuple(dims), first)
        if axes is not None and len(set(axes)) < len(dims):
            raise InputError(MSG_FOLD.format(value=dims))
        if (
            first is None
            or axes is None
            or not any(_has(tuple(dims), t) for t in tree_leaves(inputs))
        ):
            raise InputError(
                MSG_FOLD_SHAPE.format(what="X", shape=_shape(first), dims=tuple(dims), sizes="any")
            )
        fold = SampleAxes(tuple(dims), tuple(first.shape[d] for d in axes))
        for what, tree, found in (("X", inputs, fold.inputs), ("y", targets, fold.targets)):
            for leaf in tree_leaves(tree):
                found.append(fold.axes(leaf))
                if isinstance(leaf, Tensor) and found[-1] is None:
                    text = MSG_FOLD_SHAPE.format(
                        what=what, shape=_shape(leaf), dims=fold.dims, sizes=fold.sizes
                    )
                    raise InputError(text)
        return fold

    def axes(self, leaf: Any) -> Axes | None:
        """Where the samples lie in a tensor, if they do."""
        found = _axes(self.dims, leaf) if isinstance(leaf, Tensor) else None
        return (
            found
            if found is not None and tuple(leaf.shape[d] for d in found) == self.sizes
            else None
        )

    def folded(self, tree: Any, axes: Sequence[Axes | None]) -> Any:
        """With one axis of samples in front."""
        return _mapped(
            tree, axes, lambda t, at: t.movedim(at, tuple(range(len(at)))).flatten(0, len(at) - 1)
        )

    def unfolded(self, tree: Any, axes: Sequence[Axes | None]) -> Any:
        """As the model knows it."""
        return _mapped(
            tree, axes, lambda t, at: t.unflatten(0, self.sizes).movedim(tuple(range(len(at))), at)
        )

    def returned(self, output: Any) -> Any:
        """What the model returned, folded; its leaves without samples stay as they are."""
        self.outputs[:] = [self.axes(leaf) for leaf in tree_leaves(output)]
        if not any(self.outputs):
            shapes = [_shape(t) for t in tree_leaves(output) if isinstance(t, Tensor)]
            raise InputError(
                MSG_FOLD_OUTPUT.format(shapes=shapes, dims=self.dims, sizes=self.sizes)
            )
        return self.folded(output, self.outputs)


def _axes(dims: Axes, t: Tensor) -> Axes | None:
    if _has(dims, t):
        return tuple(d % t.ndim for d in dims)
    return tuple(range(len(dims))) if t.ndim >= len(dims) else None


def _has(dims: Axes, t: Any) -> bool:
    return isinstance(t, Tensor) and -t.ndim <= min(dims) and max(dims) < t.ndim


def _mapped(tree: Any, axes: Sequence[Axes | None], move: Any) -> Any:
    leaves, spec = tree_flatten(tree)
    return tree_unflatten(
        [t if at is None else move(t, at) for t, at in zip(leaves, axes, strict=True)], spec
    )


def _shape(t: Tensor | None) -> Any:
    return None if t is None else tuple(t.shape)
