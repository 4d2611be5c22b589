"""Named parameters: which of them are meant, and several of them as one vector.

No networks; names and tensors only.
"""

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
    names = [repr(n) for n in parameters]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


@dataclass(frozen=True)
class Space:
    """Vectors whose entries are those of named tensors, one tensor after the other, each in row-major order."""

    shapes: Mapping[str, tuple[int, ...]]

    @cached_property
    def slices(self) -> dict[str, slice]:
        """Where the entries of each tensor are."""
        out, start = {}, 0
        for name, shape in self.shapes.items():
            out[name] = slice(start, start := start + math.prod(shape))
        return out

    @property
    def size(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())

    def flat(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """``[D]`` from a tensor ``[*shape]`` for every name; raises ``InputError`` where one does not fit."""
        for name, shape in self.shapes.items():
            if name not in tensors or tuple(tensors[name].shape) != shape:
                got = tuple(tensors[name].shape) if name in tensors else "nothing"
                raise InputError(errors.MSG_VECTOR.format(name=name, got=got, shape=shape))
        unknown = [n for n in tensors if n not in self.shapes]
        if unknown:
            raise InputError(
                errors.MSG_NO_SUCH_PARAMETER.format(
                    value=repr(unknown[0]), names=names_of(dict(self.shapes))
                )
            )
        return torch.cat([tensors[n].reshape(-1) for n in self.shapes])

    def named(self, vector: Tensor) -> dict[str, Tensor]:
        """``[*shape]`` for every name from ``[D]``, or ``[*shape, K]`` from ``[D, K]``; views."""
        rest = vector.shape[1:]
        return {n: vector[s].reshape(self.shapes[n] + tuple(rest)) for n, s in self.slices.items()}
