"""Named parameters: which of them are meant, and several of them as one vector.

No networks; names and tensors only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cached_property

import torch
from torch import Tensor

from unbatch import errors
from unbatch.errors import InputError

Selection = str | Tensor | Iterable[str | Tensor] | None


def select(parameters: Mapping[str, Tensor], wanted: Selection) -> dict[str, Tensor]:
    """The parameters meant by names, globs (``"layers.*.weight"``) or tensors; all that require gradients by default.

    In the order of ``parameters``. Raises ``InputError`` for what is no parameter or does not require a gradient.
    """
    trained = {n: p for n, p in parameters.items() if p.requires_grad}
    if not trained:
        raise InputError(errors.MSG_NO_PARAMETERS if parameters else errors.MSG_NO_PARAMETERS_KNOWN)
    if wanted is None:
        return trained
    asked: Sequence[str | Tensor] = [wanted] if isinstance(wanted, str | Tensor) else _listed(wanted, parameters)
    chosen = {n for w in asked for n in _meant(w, parameters)}
    fixed = [n for n in parameters if n in chosen and n not in trained]
    if fixed:
        raise InputError(errors.MSG_FIXED_PARAMETER.format(name=fixed[0]))
    return {n: p for n, p in trained.items() if n in chosen}


def _listed(wanted: Iterable[str | Tensor], parameters: Mapping[str, Tensor]) -> list[str | Tensor]:
    asked = list(wanted) if isinstance(wanted, Iterable) else []
    if not asked or not all(isinstance(w, str | Tensor) for w in asked):
        raise InputError(errors.MSG_NO_SELECTION.format(value=wanted, names=names_of(parameters)))
    return asked


def _meant(wanted: str | Tensor, parameters: Mapping[str, Tensor]) -> list[str]:
    if isinstance(wanted, Tensor):
        found = [n for n, p in parameters.items() if p is wanted]
        what = f"a tensor of shape {tuple(wanted.shape)}"
    else:
        found = [n for n in parameters if n == wanted or fnmatchcase(n, wanted)]
        what = repr(wanted)
    if not found:
        close = get_close_matches(str(wanted), parameters, 3) if isinstance(wanted, str) else []
        hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise InputError(errors.MSG_NO_SUCH_PARAMETER.format(value=what, names=names_of(parameters)) + hint)
    return found


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
                errors.MSG_NO_SUCH_PARAMETER.format(value=repr(unknown[0]), names=names_of(dict(self.shapes)))
            )
        return torch.cat([tensors[n].reshape(-1) for n in self.shapes])

    def named(self, vector: Tensor) -> dict[str, Tensor]:
        """``[*shape]`` for every name from ``[D]``, or ``[*shape, K]`` from ``[D, K]``; views."""
        rest = vector.shape[1:]
        return {n: vector[s].reshape(self.shapes[n] + tuple(rest)) for n, s in self.slices.items()}
