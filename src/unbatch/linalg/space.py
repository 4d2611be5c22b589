"""Several named tensors as one vector, and back. No networks; names and tensors only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from unbatch import errors
from unbatch.errors import InputError


def names_of(parameters: Mapping[str, object], most: int = 6) -> str:
    """Return the first names in quotes, and how many more there are, as messages list them."""
    names = [repr(name) for name in parameters]
    text = ", ".join(names[:most])
    if len(names) > most:
        text += f" and {len(names) - most} more"
    return text


@dataclass(frozen=True)
class Space:
    """Vectors whose entries are those of named tensors, one tensor after the other, each in
    row-major order.
    """

    shapes: Mapping[str, tuple[int, ...]]

    @cached_property
    def slices(self) -> dict[str, slice]:
        """Return where the entries of each tensor are."""
        slices, start = {}, 0
        for name, shape in self.shapes.items():
            stop = start + math.prod(shape)
            slices[name] = slice(start, stop)
            start = stop
        return slices

    @property
    def size(self) -> int:
        """Return ``D``, the length of a vector."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def flat(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return ``[D]`` from a tensor ``[*shape]`` for every name.

        Raises ``InputError`` where one is missing, has another shape, or is not of this space.
        """
        for name, shape in self.shapes.items():
            _check_shape(name, tensors.get(name), shape)
        for name in tensors:
            if name not in self.shapes:
                names = names_of(self.shapes)
                text = errors.MSG_NO_SUCH_PARAMETER.format(value=repr(name), names=names)
                raise InputError(text)
        return torch.cat([tensors[name].reshape(-1) for name in self.shapes])

    def named(self, vector: Tensor) -> dict[str, Tensor]:
        """Return ``[*shape]`` for every name from ``[D]``, or ``[*shape, K]`` from ``[D, K]``;
        views.
        """
        # Columns, if there are any, stay behind the dims of a tensor.
        rest = tuple(vector.shape[1:])
        tensors = {}
        for name, entries in self.slices.items():
            tensors[name] = vector[entries].reshape(tuple(self.shapes[name]) + rest)
        return tensors


def _check_shape(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    """Raise ``InputError`` where a tensor is missing or has another shape."""
    if tensor is None:
        raise InputError(errors.MSG_VECTOR.format(name=name, got="nothing", shape=shape))
    if tuple(tensor.shape) != shape:
        got = tuple(tensor.shape)
        raise InputError(errors.MSG_VECTOR.format(name=name, got=got, shape=shape))
