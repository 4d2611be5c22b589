"""Whether a way of pushing forward belongs to a way of pulling back, and ``J`` by its rows.

``⟨u, J v⟩ = ⟨Jᵀu, v⟩`` has to hold for random ``u`` and ``v``, or the one that pushes is not
believed. What always belongs to a backward pass is the matrix of its rows, one pullback for every
entry of what is predicted (``Columns``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from unbatch.autodiff.autograd import Key
from unbatch.autodiff.other_batches import is_finite
from unbatch.linalg.probes import gaussians_like, seeded

# Bytes of rows that are kept from one product to the next.
KEPT = 2**28

# Bytes of rows that are pulled back in one call.
AT_ONCE = 2**25

# Parameters are weighed up to this factor, so that one with a small gradient counts as others do.
MOST_WEIGHT = 1e3

Pull = Callable[[Mapping[int, Tensor]], Mapping[str, Tensor]]


# --- the test -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AdjointTest:
    """A random cotangent ``u``, a random tangent ``v``, and ``⟨Jᵀu, v⟩``.

    ``least``: what rounding leaves where the product is zero; ``rounding``: its relative error.
    """

    u: Mapping[int, Tensor]
    v: Mapping[str, Tensor]
    product: float
    least: float
    rounding: float

    @staticmethod
    def of(
        pull: Pull,
        parameters: Mapping[str, Tensor],
        outputs: Mapping[int, Tensor],
        rounding: float,
    ) -> AdjointTest | None:
        """Return the test after one backward pass; None where nothing is finite.

        ``outputs``: those that depend on a parameter.
        """
        generator = seeded(0)
        v = gaussians_like(parameters, generator)
        u = gaussians_like(outputs, generator)
        pulled = pull(u)
        if not is_finite(pulled):
            return None
        v = _weighed(v, pulled)
        # Where J is zero (a bias below a batch norm), both are what rounding leaves of larger
        # numbers.
        least = 0.0
        for i, t in outputs.items():
            least += 1e3 * torch.finfo(t.dtype).eps * float(u[i].norm() * t.detach().norm())
        if not math.isfinite(least):
            return None
        return AdjointTest(u, v, inner_product(v, pulled), least, rounding)

    def agrees(self, pushed: Mapping[int, Tensor]) -> bool | None:
        """Return whether ``J v`` belongs to the backward pass; None where it is not finite."""
        if not is_finite(pushed):
            return None
        size = 0.0
        for i, cotangent in self.u.items():
            size += float(cotangent.norm() * pushed[i].norm())
        error = abs(inner_product(self.u, pushed) - self.product)
        return error <= self.rounding * size + self.least


def _weighed(v: Mapping[str, Tensor], pulled: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a tangent in which all parameters have about the same part in ``⟨Jᵀu, v⟩``."""
    sizes = {name: float(g.norm()) for name, g in pulled.items()}
    largest = max(sizes.values(), default=0.0)
    weighed: dict[str, Tensor] = {}
    for name, tangent in v.items():
        weight = 1.0
        # What is smaller than that may be rounding alone, which is not to be enlarged.
        if sizes[name] * MOST_WEIGHT > largest:
            weight = largest / sizes[name]
        weighed[name] = weight * tangent
    return weighed


def inner_product(a: Mapping[Key, Tensor], b: Mapping[Key, Tensor]) -> float:
    """Return ``⟨a, b⟩``, over all tensors together."""
    return sum(float((a[key] * b[key]).sum()) for key in a)


# --- J by its rows --------------------------------------------------------------------------------


# Pulls cotangents ``[k, *shape]`` of one output back, and returns rows ``[k, *param]`` by name;
# a parameter that it does not depend on may be left out.
PullRows = Callable[[int, Tensor], Mapping[str, Tensor]]


@dataclass
class Columns:
    """``J``, one row for every entry of some outputs.

    ``outputs``: what is pulled back, by number: tensors of their shapes and types.
    ``size``: bytes of one row. Rows are kept where they fit.
    """

    outputs: Mapping[int, Tensor]
    pull: PullRows
    size: int
    _rows: dict[int, list[tuple[int, Mapping[str, Tensor]]]] = field(default_factory=dict)

    def push(self, v: Mapping[str, Tensor]) -> dict[int, Tensor]:
        """Return ``J v``, by output."""
        pushed: dict[int, Tensor] = {}
        for i, output in self.outputs.items():
            entries = output.new_zeros(output.numel())
            for first, rows in self._of(i):
                product = _times(rows, v)
                if product is not None:
                    entries[first : first + len(product)] = product.to(output.dtype)
            pushed[i] = entries.reshape(output.shape)
        return pushed

    def _of(self, i: int) -> Iterable[tuple[int, Mapping[str, Tensor]]]:
        """Return the rows of one output in portions, each with the number of its first entry."""
        if i in self._rows:
            return self._rows[i]
        entries = sum(t.numel() for t in self.outputs.values())
        if entries * self.size > KEPT:
            return self._pulled(i)
        self._rows[i] = list(self._pulled(i))
        return self._rows[i]

    def _pulled(self, i: int) -> Iterator[tuple[int, Mapping[str, Tensor]]]:
        output = self.outputs[i]
        entries, portion = output.numel(), max(1, min(64, AT_ONCE // max(self.size, 1)))
        for first in range(0, entries, portion):
            count = min(portion, entries - first)
            units = output.new_zeros(count, entries)
            places = torch.arange(count, device=output.device)
            units[places, first + places] = 1
            yield first, self.pull(i, units.reshape(count, *output.shape))


def _times(rows: Mapping[str, Tensor], v: Mapping[str, Tensor]) -> Tensor | None:
    """Return the products of some rows with a tangent; None where no row is there."""
    total: Tensor | None = None
    for name, of_parameter in rows.items():
        if name in v:
            product = of_parameter.reshape(len(of_parameter), v[name].numel()) @ v[name].flatten()
            total = product if total is None else total + product
    return total
