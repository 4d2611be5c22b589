"""BackPACK's names: the same extensions, saved under the same attributes, in the same shapes and scales.

BackPACK itself is not needed. Any model will do, not only layers that it knows, and a loss in any scale: ``0.5 * loss``
halves what it should. What it refuses under batch norm in train mode exists here, as the table of consequences says.

Legend: N samples, M draws, C entries of a prediction, ``*p`` the shape of a parameter; a mean loss has its 1/N in it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from unbatch.analysis.consequences import consequence
from unbatch.autodiff.contractions.row_block import RowBlock
from unbatch.curvature.ggn_quantities import ColumnQuantity, DiagGGN
from unbatch.curvature.hessian_root import Factor, HessianRoot
from unbatch.curvature.strategy import Curvature
from unbatch.errors import MSG_NOT_POSITIVE, InputError, StructureError
from unbatch.gradients import quantities
from unbatch.gradients.quantities import About, Collector, Quantity
from unbatch.gradients.results import ByParameter
from unbatch.linalg.operators import Operator
from unbatch.linalg.rows import wide
from unbatch.problem.problem import Problem

MSG_EXTENSION = (
    "attach takes extensions such as BatchGrad() or DiagGGNExact(), at least one; got {value!r}."
)


MSG_DOES_NOT_EXIST = "{name} does not exist for this loss. {reason} See problem.structure."


MSG_NOT_YET = "{name} exists for this loss, but this release does not compute it. {reason}"


Saved = dict[str, dict[str, Any]]


def attach(problem: Problem, *extensions: Extension, by: str = "component") -> Saved:
    """Save on every parameter what the extensions find, as ``with backpack(*extensions): loss.backward()`` does.

    ``param.grad_batch`` for ``BatchGrad()``, and so on; also returned, by attribute and name. ``.grad`` stays as it is.
    ``by``: which rows those extensions take that are made of gradients. Under batch norm in train mode BackPACK's
    ``grad_batch`` has ``by="copy"``; the default, rows by component, are the gradients of the terms of the loss.
    Without mixing they are the same. Raises ``InputError`` for what is no extension, ``StructureError`` with the reason
    for what does not exist, ``NotImplementedError`` for what does but is not computed yet.
    """
    if not extensions or not all(isinstance(e, Extension) for e in extensions):
        wrong = next((e for e in extensions if not isinstance(e, Extension)), None)
        raise InputError(MSG_EXTENSION.format(value=wrong))
    results = _computed(problem, [e for e in extensions if isinstance(e, _Computed)], by)
    found: Saved = {}
    for e in extensions:
        found[e.savefield] = (
            e.saved(results[e]) if isinstance(e, _Computed) else e.found(problem, by)
        )
    for field, by_name in found.items():
        for name, value in by_name.items():
            setattr(problem.program.parameters[name], field, value)
    return found


def _computed(problem: Problem, extensions: Sequence[_Computed], by: str) -> dict[_Computed, Any]:
    """One question for all that is made of gradients, another for what is made of columns: these know no copies."""
    asked = {e: e.quantity(problem) for e in extensions}
    out: dict[_Computed, Any] = {}
    for of_columns, way in ((False, by), (True, _way_of_columns(by))):
        group = {e: q for e, q in asked.items() if isinstance(q, ColumnQuantity) == of_columns}
        if group:
            answer = problem.compute(*group.values(), by=way)
            out |= dict(zip(group, answer if len(group) > 1 else (answer,), strict=True))
    return out


def _way_of_columns(by: str) -> str:
    return "frozen" if by == "frozen" else "component"


class Extension:
    """Something to save on parameters; ``savefield`` is the attribute."""

    savefield: ClassVar[str]

    def found(self, problem: Problem, by: str) -> dict[str, Any]:
        """By name of the parameter."""
        raise NotImplementedError


class _Computed(Extension, ABC):
    """What ``Problem.compute`` answers."""

    @abstractmethod
    def quantity(self, problem: Problem) -> Quantity:
        """What is asked."""

    def saved(self, result: ByParameter) -> dict[str, Any]:
        """By name of the parameter, from the answer."""
        return dict(result)


# --- first order ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BatchGrad(_Computed):
    """``grad_batch``, ``[N, *p]``: rows of the gradient; ``subsampling``: numbers of samples, ``[len, *p]``."""

    subsampling: tuple[int, ...] | None = None
    savefield: ClassVar[str] = "grad_batch"

    def __post_init__(self) -> None:
        _fixed(self)

    def quantity(self, problem: Problem) -> Quantity:
        return quantities.Gradients()

    def saved(self, result: ByParameter) -> dict[str, Any]:
        return {n: _picked(rows, self.subsampling, 0) for n, rows in result.items()}


@dataclass(frozen=True)
class BatchL2Grad(_Computed):
    """``batch_l2``, ``[N]``: squared norms of the rows of a parameter."""

    savefield: ClassVar[str] = "batch_l2"

    def quantity(self, problem: Problem) -> Quantity:
        return quantities.SquaredNorms()


@dataclass(frozen=True)
class SumGradSquared(_Computed):
    """``sum_grad_squared``, ``[*p]``: the sum of the squares of the rows."""

    savefield: ClassVar[str] = "sum_grad_squared"

    def quantity(self, problem: Problem) -> Quantity:
        return quantities.SumOfSquares()


@dataclass(frozen=True)
class Variance(_Computed):
    """``variance``, ``[*p]``: of the rows, biased; never negative, in single precision either."""

    savefield: ClassVar[str] = "variance"

    def quantity(self, problem: Problem) -> Quantity:
        return quantities.Variance()


# --- second order ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DiagGGNExact(_Computed):
    """``diag_ggn_exact``, ``[*p]``."""

    savefield: ClassVar[str] = "diag_ggn_exact"

    def quantity(self, problem: Problem) -> Quantity:
        return DiagGGN()


@dataclass(frozen=True)
class BatchDiagGGNExact(_Computed):
    """``diag_ggn_exact_batch``, ``[N, *p]``: one for every component of the loss."""

    savefield: ClassVar[str] = "diag_ggn_exact_batch"

    def quantity(self, problem: Problem) -> Quantity:
        return DiagGGN(per_component=True)


@dataclass(frozen=True)
class DiagGGNMC(_Computed):
    """``diag_ggn_mc``, ``[*p]``, from ``mc_samples`` draws for each sample; the same for the same ``seed``."""

    mc_samples: int = 1
    seed: int = 0
    savefield: ClassVar[str] = "diag_ggn_mc"

    def quantity(self, problem: Problem) -> Quantity:
        return DiagGGN(mc_samples=self.mc_samples, seed=self.seed)


@dataclass(frozen=True)
class BatchDiagGGNMC(_Computed):
    """``diag_ggn_mc_batch``, ``[N, *p]``, from ``mc_samples`` draws for each sample; the same for the same ``seed``."""

    mc_samples: int = 1
    seed: int = 0
    savefield: ClassVar[str] = "diag_ggn_mc_batch"

    def quantity(self, problem: Problem) -> Quantity:
        return DiagGGN(per_component=True, mc_samples=self.mc_samples, seed=self.seed)


@dataclass(frozen=True)
class SqrtGGNExact(_Computed):
    """``sqrt_ggn_exact``, ``[C, N, *p]``: columns ``V`` of ``G = V Vᵀ``, one for each entry of a prediction.

    Raises ``StructureError`` where the second derivative of the loss is not positive semi-definite.
    """

    subsampling: tuple[int, ...] | None = None
    savefield: ClassVar[str] = "sqrt_ggn_exact"

    def __post_init__(self) -> None:
        _fixed(self)

    def quantity(self, problem: Problem) -> Quantity:
        return _Columns(_positive(problem.ggn().root, type(self).__name__))

    def saved(self, result: ByParameter) -> dict[str, Any]:
        return {n: _picked(columns, self.subsampling, 1) for n, columns in result.items()}


@dataclass(frozen=True)
class SqrtGGNMC(_Computed):
    """``sqrt_ggn_mc``, ``[M, N, *p]``: columns drawn for each sample; the same for the same ``seed``."""

    mc_samples: int = 1
    subsampling: tuple[int, ...] | None = None
    seed: int = 0
    savefield: ClassVar[str] = "sqrt_ggn_mc"

    def __post_init__(self) -> None:
        _fixed(self)

    def quantity(self, problem: Problem) -> Quantity:
        return _Columns(problem.ggn(mc_samples=self.mc_samples, seed=self.seed).root)

    def saved(self, result: ByParameter) -> dict[str, Any]:
        return {n: _picked(columns, self.subsampling, 1) for n, columns in result.items()}


@dataclass(frozen=True)
class GGNMP(Extension):
    """``ggnmp``: a function from ``[V, *p]`` to ``[V, *p]``, the product with the parameter's block of G."""

    savefield: ClassVar[str] = "ggnmp"

    def found(self, problem: Problem, by: str) -> dict[str, Any]:
        blocks = problem.ggn(blocks="parameter", by=_way_of_columns(by)).blocks
        return {
            name: _product(block)
            for block in blocks
            if block.space is not None
            for name in block.space.shapes
        }


def _product(block: Operator) -> Callable[[Tensor], Tensor]:
    def ggnmp(vectors: Tensor) -> Tensor:
        product: Tensor = block @ vectors.reshape(len(vectors), -1).T
        return product.T.reshape(vectors.shape)

    return ggnmp


def _fixed(extension: Any) -> None:
    """Lists of numbers, as BackPACK takes them, made into what can be a key."""
    if extension.subsampling is not None:
        object.__setattr__(extension, "subsampling", tuple(extension.subsampling))


def _picked(t: Tensor, samples: Sequence[int] | None, axis: int) -> Tensor:
    return t if samples is None else t.index_select(axis, torch.tensor(samples, device=t.device))


# --- columns --------------------------------------------------------------------------------------------


def _positive(root: HessianRoot, what: str) -> HessianRoot:
    if root.lowest < 0:
        raise StructureError(
            MSG_NOT_POSITIVE.format(what=f"The columns of {what}", lowest=root.lowest)
        )
    return root


@dataclass(frozen=True)
class _Columns(ColumnQuantity):
    """``[C, N, *p]``, or ``[M, N, *p]`` where they are drawn."""

    root: HessianRoot
    needs = "rows"

    def root_in(self, curvature: Curvature) -> HessianRoot:
        return self.root

    def check(self, curvature: Curvature) -> None:
        curvature.components("A square root with columns for every sample")

    def start(self, about: About) -> Collector:
        assert isinstance(self.root, Factor)
        return _Stacked(about, self.root)


class _Stacked(Collector):
    def __init__(self, about: About, root: Factor) -> None:
        super().__init__(about)
        self.root = root
        samples, columns = root.table
        self.found = {
            n: wide(about.like.new_zeros(columns, samples, *s)) for n, s in about.shapes.items()
        }

    def take(self, name: str, part: RowBlock) -> None:
        if self.root.columns:
            self.found[name][part.column, part.where] += part.rows()

    def finish(self) -> ByParameter:
        result: ByParameter = self.about.result(
            {n: self._entrywise(t) for n, t in self.found.items()}
        )
        return result

    def _entrywise(self, columns: Tensor) -> Tensor:
        """From the columns of the root to one for every entry of the predictions, as for ``GGN.gram``."""
        root, whole = self.root, self.root.whole
        if whole is None or root.sampled:
            return columns
        _, t, _, k = root.root.shape
        split = columns.unflatten(0, (t, k))
        return torch.einsum("ntck,tkn...->tcn...", whole.to(split), split).flatten(0, 1)


# --- refused --------------------------------------------------------------------------------------------


class _Refused(Extension):
    """Not computed: the reason is that of the table of consequences."""

    row: ClassVar[str]

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def found(self, problem: Problem, by: str) -> dict[str, Any]:
        name, follows = type(self).__name__, consequence(self.row, problem.structure.statuses)
        if follows.outcome == "none":
            raise StructureError(MSG_DOES_NOT_EXIST.format(name=name, reason=follows.reason))
        raise NotImplementedError(MSG_NOT_YET.format(name=name, reason=follows.reason))


class KFAC(_Refused):
    savefield, row = "kfac", "KFAC"


class KFLR(_Refused):
    savefield, row = "kflr", "KFLR"


class KFRA(_Refused):
    savefield, row = "kfra", "KFRA"


class DiagHessian(_Refused):
    savefield, row = "diag_h", "Hessian diagonal"


class BatchDiagHessian(_Refused):
    savefield, row = "diag_h_batch", "per-sample Hessian diagonals"


class HMP(_Refused):
    savefield, row = "hmp", "block-diagonal Hessian product"


class PCHMP(_Refused):
    savefield, row = "pchmp", "block-diagonal positive-curvature Hessian product"
