"""The block diagonal of the Gauss-Newton matrix: a matrix for each group of parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from unbatch.curvature.ggn import GGN
from unbatch.curvature.point import Point
from unbatch.curvature.strategy import Draws
from unbatch.linalg.operators import Operator
from unbatch.linalg.solvers import Solved
from unbatch.linalg.space import Space
from unbatch.running.tasks import task


class BlockGGN(Operator):
    """The block diagonal of G, asked block by block.

    ``blocks``: the matrices of the groups of parameters, in the order of the groups. ``whole``: G,
    of which diagonal and trace are the same, and take one forward pass in place of one a block.
    """

    symmetric = True
    space: Space

    def __init__(self, whole: GGN, blocks: Sequence[GGN]) -> None:
        self.whole, self.blocks = whole, list(blocks)
        self.space, self.shape = whole.space, whole.shape
        self.dtype, self.device = whole.dtype, whole.device

    def __repr__(self) -> str:
        count = len(self.blocks)
        of = "a snapshot of a" if self.whole.point.is_snapshot else "a"
        return f"<block diagonal of {of} Gauss-Newton matrix {tuple(self.shape)}, {count} blocks>"

    def snapshot(self) -> BlockGGN:
        """Return the matrix as it is now, never stale; as ``GGN.snapshot``, one copy for all."""
        whole = self.whole.snapshot()
        blocks = []
        for block in self.blocks:
            point = whole.point.restricted(list(block.space.shapes))
            blocks.append(GGN(point, block.draws, block.subset))
        return BlockGGN(whole, blocks)

    def _indexed(self) -> Iterator[tuple[GGN, Tensor]]:
        """Yield every block with the places of its entries in a vector of all."""
        for block in self.blocks:
            # The parameters of a group need not be next to each other.
            places = []
            for name in block.space.shapes:
                where = self.space.slices[name]
                places.append(torch.arange(where.start, where.stop))
            yield block, torch.cat(places)

    def _apply(self, v: Tensor) -> Tensor:
        product = torch.zeros_like(v)
        with task("Products block by block", len(self.blocks), "blocks") as blocks:
            for block, index in blocks.over(self._indexed()):
                product[index] = (block @ v[index]).to(v.dtype)
        return product

    def diag(self) -> Tensor:
        """Return the diagonal, ``[D]``."""
        diagonal: Tensor = self.whole.diag()
        return diagonal

    def trace(self) -> Tensor:
        """Return the trace, a number."""
        return self.whole.trace()

    def eigvalsh(self) -> Tensor:
        """Return the eigenvalues of all blocks, ascending."""
        values = []
        with task("Eigenvalues block by block", len(self.blocks), "blocks") as blocks:
            for block in blocks.over(self.blocks):
                values.append(block.eigvalsh())
        return torch.cat(values).sort().values

    def logdet(self, damping: float) -> Tensor:
        """Return ``log det(G + δI)``, the sum over blocks."""
        logarithms = []
        with task("Determinants block by block", len(self.blocks), "blocks") as blocks:
            for block in blocks.over(self.blocks):
                logarithms.append(block.logdet(damping))
        return torch.stack(logarithms).sum()

    def solve(self, b: Any, damping: float, *, info: bool = False, **options: Any) -> Any:
        """Return ``(G + δI)⁻¹ b``, block by block; arguments as for ``GGN.solve``.

        ``info``: also how well each block was solved, in their order.
        """
        named = isinstance(b, Mapping)
        right = self._converted(self.space.flat(b) if named else b)
        x, reports = self._solve(right, damping, not info, options)
        solution = self.space.named(x) if named else x
        if not info:
            return solution
        return solution, reports

    def _solve(
        self, right: Tensor, damping: float, checked: bool, options: Mapping[str, Any]
    ) -> tuple[Tensor, list[Solved]]:
        """Return the solution for a flat vector; ``checked``: raise where a block fails."""
        solution, reports = torch.zeros_like(right), []
        with task("Solving block by block", len(self.blocks), "blocks") as blocks:
            for block, index in blocks.over(self._indexed()):
                x, report = block.solve(right[index], damping, info=True, **options)
                solution[index] = x.to(solution.dtype)
                if checked:
                    report.check()  # before the next block, which would be solved for nothing
                reports.append(report)
        return solution, reports


def matrix_of(
    point: Point, groups: Sequence[Sequence[str]] | None, draws: Draws, samples: Tensor | None
) -> GGN | BlockGGN:
    """Return the matrix, or its block diagonal by groups of parameters."""
    whole = GGN(point, draws, samples)
    if groups is None:
        return whole
    blocks = [GGN(point.restricted(names), draws, samples) for names in groups]
    return BlockGGN(whole, blocks)
