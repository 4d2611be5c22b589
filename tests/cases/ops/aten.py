"""Ops of ATen called directly, with arguments made from their schemas.

For ops that PyTorch's table does not reach, and to compare the keys of different ops.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from cases.ops.roles import Call
from cases.ops.warned import quietly

DRAWS = 3
SHAPES = ((4, 4), (3, 4, 4), (2, 4, 3, 4), (4,), (2, 4, 3, 4, 4))
INDICES = ("index", "indices", "mask", "target", "offsets", "repeats", "condition", "count")


@dataclass(frozen=True)
class Attempt:
    """A call of an op: its arguments by name, where ``Ellipsis`` stands for the next tensor."""

    op: Any
    arguments: dict[str, Any]
    draws: Sequence[Sequence[Tensor]]
    names: Sequence[str]

    @property
    def call(self) -> Call:
        def run(*tensors: Tensor) -> Any:
            given = iter(tensors)
            arguments = {}
            for name, value in self.arguments.items():
                if value is ...:
                    value = next(given)
                elif isinstance(value, list) and ... in value:
                    value = [next(given) for _ in value]
                arguments[name] = value
            return self.op(**arguments)

        return Call(run, self.draws, self.names)

    @property
    def title(self) -> str:
        """The arguments in short."""
        shapes = [f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for t in self.draws[0]]
        others = {name: v for name, v in self.arguments.items() if v is not ...}
        return f"({', '.join(shapes)}) {others}"

    @property
    def runs(self) -> bool:
        """Tell whether the op accepts the arguments."""
        try:
            with quietly():
                self.call.function(*[t.clone() for t in self.draws[0]])
        except Exception:
            return False
        return True


def overloads(name: str) -> list[Any]:
    """Return all overloads of an op of ATen that write nothing."""
    packet = getattr(torch.ops.aten, name)
    found = []
    for overload in packet.overloads():
        op = getattr(packet, overload)
        if not op._schema.is_mutable:
            found.append(op)
    return found


def tensor(shape: Sequence[int], kind: str, seed: int) -> Tensor:
    """Return numbers between 0.1 and 0.9, integers from 0 to 2, or a positive definite matrix."""
    chance = torch.Generator().manual_seed(seed)
    if kind == "int":
        return torch.randint(0, 3, tuple(shape), generator=chance)
    if kind == "bool":
        return torch.rand(tuple(shape), generator=chance) > 0.5
    numbers = 0.1 + 0.8 * torch.rand(tuple(shape), generator=chance, dtype=torch.float64)
    if kind == "complex":
        return torch.complex(numbers, numbers.flip(0))
    if kind == "definite" and shape[-1:] == shape[-2:-1]:
        return numbers @ numbers.mT + torch.eye(shape[-1])
    return numbers


def number_of(argument: Any, ndim: int) -> Any:
    """Return a required argument that is no tensor; raises KeyError if there is none."""
    name, kind = argument.name, str(argument.type)
    if "SymInt[]" in kind or "List[int]" in kind:
        count = argument.N or {"dim": 1, "dims": 1}.get(name, ndim)
        return [1] * count
    values = {"int": 1, "SymInt": 1, "number": 0.7, "Scalar": 0.7, "float": 0.7, "bool": True}
    values |= {"List[number]": [0.7, 0.7], "Optional[int]": None}
    if name == "dim":
        return 0
    if kind == "List[bool]":
        return [True] * (argument.N or 3)
    return values[kind]


def attempts(op: Any, most: int = 3) -> Iterator[Attempt]:
    """Return calls of an op that run, in a few shapes."""
    found = 0
    for shape in SHAPES:
        for kinds in product(("float", "int", "definite", "complex"), repeat=2):
            attempt = attempt_of(op, shape, kinds)
            if attempt is not None and attempt.runs:
                yield attempt
                found += 1
                break
        if found == most:
            return


def attempt_of(op: Any, shape: Sequence[int], kinds: Sequence[str]) -> Attempt | None:
    """Return a call of an op with tensors of one shape; None where an argument is unknown."""
    arguments: dict[str, Any] = {}
    made: list[tuple[str, str]] = []
    for argument in op._schema.arguments:
        kind = str(argument.type)
        if kind in ("Tensor", "Optional[Tensor]") and not argument.has_default_value():
            chosen = kinds[min(len(made), 1)]
            if argument.name in INDICES:
                chosen = "int"
            arguments[argument.name] = ...
            made.append((argument.name, chosen))
        elif kind in ("List[Tensor]", "List[Optional[Tensor]]"):
            arguments[argument.name] = [..., ...]
            made += [(f"{argument.name}{i}", kinds[0]) for i in range(2)]
        elif not argument.has_default_value():
            try:
                arguments[argument.name] = number_of(argument, len(shape))
            except KeyError:
                return None
    if not made:
        return None
    draws = []
    for draw in range(DRAWS):
        draws.append([tensor(shape, k, 10 * draw + i) for i, (_, k) in enumerate(made)])
    return Attempt(op, arguments, draws, [name for name, _ in made])
