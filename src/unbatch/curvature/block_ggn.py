"""The block diagonal of the Gauss-Newton matrix: a matrix for each group of parameters, asked block by block."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from unbatch.curvature.ggn import GGN, Point
from unbatch.curvature.strategy import Draws
from unbatch.linalg.operators import Operator
from unbatch.linalg.solvers import Solved
from unbatch.linalg.space import Space


class BlockGGN(Operator):
    """The block diagonal of G: ``blocks`` are the matrices of the groups of parameters, in the order of the groups."""

    symmetric = True
    space: Space

    def __init__(self, blocks: Sequence[GGN], space: Space) -> None:
        self.blocks, self.space = list(blocks), space
        self.shape = (space.size, space.size)
        self.dtype, self.device = blocks[0].dtype, blocks[0].device

    def _each(self, v: Tensor, apply: Callable[[GGN, Tensor], Tensor]) -> Tensor:
        """``[D, ..]`` to the same, block by block."""
        out = torch.zeros_like(v)
        for block in self.blocks:
            index = torch.cat(
                [
                    torch.arange(s.start, s.stop)
                    for s in (self.space.slices[n] for n in block.space.shapes)
                ]
            )
            out[index] = apply(block, v[index])
        return out

    def _apply(self, v: Tensor) -> Tensor:
        return self._each(v, lambda block, part: block._apply(part))

    def diag(self) -> Tensor:
        """The diagonal, which is that of G: ``[D]``."""
        nothing = torch.zeros(self.shape[0], dtype=self.dtype, device=self.device)
        return self._each(nothing, lambda block, _: block.diag())

    def trace(self) -> Tensor:
        return torch.stack([b.trace() for b in self.blocks]).sum()

    def eigvalsh(self) -> Tensor:
        """Those of all blocks, ascending."""
        return torch.cat([b.eigvalsh() for b in self.blocks]).sort().values

    def logdet(self, damping: float) -> Tensor:
        return torch.stack([b.logdet(damping) for b in self.blocks]).sum()

    def solve(self, b: Any, damping: float, *, info: bool = False, **options: Any) -> Any:
        """As for ``GGN``, block by block; with ``info`` also how well each block was solved, in their order."""
        told: list[Solved] = []

        def one(block: GGN, part: Tensor) -> Tensor:
            x, solved = block.solve(part, damping, info=True, **options)
            told.append(solved)
            if not info:
                solved.check()
            found: Tensor = x
            return found

        x = self._each(self._fitting(self.space.flat(b) if isinstance(b, Mapping) else b), one)
        found = self.space.named(x) if isinstance(b, Mapping) else x
        return (found, told) if info else found

    def __repr__(self) -> str:
        return f"<block diagonal of a Gauss-Newton matrix {tuple(self.shape)}, {len(self.blocks)} blocks>"


def matrix_of(
    point: Point, groups: Sequence[Sequence[str]] | None, draws: Draws, samples: Tensor | None
) -> GGN | BlockGGN:
    """The matrix, or its block diagonal by groups of parameters."""
    whole = GGN(point, draws, samples)
    if groups is None:
        return whole
    return BlockGGN([GGN(point.restricted(names), draws, samples) for names in groups], whole.space)
