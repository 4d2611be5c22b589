"""BackPACK's names: the same extensions, saved under the same attributes, shapes and scales.

BackPACK itself is not needed. Any model will do, not only layers that it knows, and a loss in any
scale: ``0.5 * loss`` halves what it should. What it refuses under batch norm in train mode exists
here, as the table of consequences says.

Legend: N samples, M draws, C entries of a prediction, ``*p`` the shape of a parameter; a mean loss
has its 1/N in it.
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
from unbatch.curvature.hessian_root import HessianRoot, SampleRoot
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


Saved = dict[str, dict[str, Any]]  # by attribute, then by name of the parameter


def attach(problem: Problem, *extensions: Extension, by: str = "component") -> Saved:
    """Save on every parameter what the extensions compute, as ``with backpack(*extensions)`` does.

    ``param.grad_batch`` for ``BatchGrad()``, and so on; also returned, by attribute and name.
    ``.grad`` stays as it is. ``by``: the rows that extensions of first order are made of. Under
    batch norm in train mode BackPACK's ``grad_batch`` has ``by="copy"``; the default, rows by
    component, are the gradients of the terms of the loss. Without mixing they are the same.

    Raises ``InputError`` for what is no extension, ``StructureError`` with the reason for what does
    not exist, ``NotImplementedError`` for what does but is not computed yet.
    """
    _check_extensions(extensions)
    computed = [e for e in extensions if isinstance(e, _Computed)]
    results = _results(problem, computed, by)
    saved: Saved = {}
    for extension in extensions:
        if isinstance(extension, _Computed):
            saved[extension.savefield] = extension.saved(results[extension])
        else:
            saved[extension.savefield] = extension.direct(problem, by)
    # Only now: if one of them is refused, no parameter is changed.
    for attribute, by_name in saved.items():
        for name, value in by_name.items():
            setattr(problem.program.parameters[name], attribute, value)
    return saved


def _check_extensions(extensions: Sequence[Any]) -> None:
    for extension in extensions:
        if not isinstance(extension, Extension):
            raise InputError(MSG_EXTENSION.format(value=extension))
    if not extensions:
        raise InputError(MSG_EXTENSION.format(value=None))


def _results(problem: Problem, extensions: Sequence[_Computed], by: str) -> dict[_Computed, Any]:
    """Compute what is made of gradients in one pass, and what is made of columns in another."""
    of_rows: dict[_Computed, Quantity] = {}
    of_columns: dict[_Computed, Quantity] = {}
    for extension in extensions:
        quantity = extension.quantity(problem)
        group = of_columns if isinstance(quantity, ColumnQuantity) else of_rows
        group[extension] = quantity
    return _compute(problem, of_rows, by) | _compute(problem, of_columns, _by_of_columns(by))


def _compute(problem: Problem, group: dict[_Computed, Quantity], by: str) -> dict[_Computed, Any]:
    if not group:
        return {}
    answer = problem.compute(*group.values(), by=by)
    # Of a single quantity the answer is no tuple.
    answers = answer if len(group) > 1 else (answer,)
    return dict(zip(group, answers, strict=True))


def _by_of_columns(by: str) -> str:
    """Return the kind of columns: there are no copies of them."""
    return "frozen" if by == "frozen" else "component"


class Extension:
    """Something to save on parameters; ``savefield`` is the attribute."""

    savefield: ClassVar[str]

    def direct(self, problem: Problem, by: str) -> dict[str, Any]:
        """Return what is saved by name of the parameter, where it is no quantity of ``compute``."""
        raise NotImplementedError


class _Computed(Extension, ABC):
    """What ``Problem.compute`` answers."""

    @abstractmethod
    def quantity(self, problem: Problem) -> Quantity:
        """Return the quantity to compute."""

    def saved(self, result: ByParameter) -> dict[str, Any]:
        """Return what is saved by name of the parameter, from the result."""
        return dict(result)


# --- first order ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class BatchGrad(_Computed):
    """``grad_batch``, ``[N, *p]``: rows of the gradient.

    ``subsampling``: the indices of some samples, for ``[len(subsampling), *p]``.
    """

    subsampling: tuple[int, ...] | None = None
    savefield: ClassVar[str] = "grad_batch"

    def __post_init__(self) -> None:
        _make_hashable(self)

    def quantity(self, problem: Problem) -> Quantity:
        return quantities.Gradients()

    def saved(self, result: ByParameter) -> dict[str, Any]:
        return _subsampled(result, self.subsampling, axis=0)


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


# --- second order ---------------------------------------------------------------------------------


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
    """``diag_ggn_mc``, ``[*p]``, from ``mc_samples`` draws for each sample.

    The same for the same ``seed``.
    """

    mc_samples: int = 1
    seed: int = 0
    savefield: ClassVar[str] = "diag_ggn_mc"

    def quantity(self, problem: Problem) -> Quantity:
        return DiagGGN(mc_samples=self.mc_samples, seed=self.seed)


@dataclass(frozen=True)
class BatchDiagGGNMC(_Computed):
    """``diag_ggn_mc_batch``, ``[N, *p]``, from ``mc_samples`` draws for each sample.

    The same for the same ``seed``.
    """

    mc_samples: int = 1
    seed: int = 0
    savefield: ClassVar[str] = "diag_ggn_mc_batch"

    def quantity(self, problem: Problem) -> Quantity:
        return DiagGGN(per_component=True, mc_samples=self.mc_samples, seed=self.seed)


@dataclass(frozen=True)
class SqrtGGNExact(_Computed):
    """``sqrt_ggn_exact``, ``[C, N, *p]``: columns ``V`` of ``G = V Vᵀ``, C for each sample.

    Raises ``StructureError`` where the second derivative of the loss is not positive semi-definite.
    """

    subsampling: tuple[int, ...] | None = None
    savefield: ClassVar[str] = "sqrt_ggn_exact"

    def __post_init__(self) -> None:
        _make_hashable(self)

    def quantity(self, problem: Problem) -> Quantity:
        root = problem.ggn().root
        if root.lowest < 0:
            # With signs, G = V Σ Vᵀ.
            what = f"The columns of {type(self).__name__}"
            raise StructureError(MSG_NOT_POSITIVE.format(what=what, lowest=root.lowest))
        return _Columns(root)

    def saved(self, result: ByParameter) -> dict[str, Any]:
        return _subsampled(result, self.subsampling, axis=1)


@dataclass(frozen=True)
class SqrtGGNMC(_Computed):
    """``sqrt_ggn_mc``, ``[M, N, *p]``: columns drawn for each sample.

    The same for the same ``seed``.
    """

    mc_samples: int = 1
    subsampling: tuple[int, ...] | None = None
    seed: int = 0
    savefield: ClassVar[str] = "sqrt_ggn_mc"

    def __post_init__(self) -> None:
        _make_hashable(self)

    def quantity(self, problem: Problem) -> Quantity:
        return _Columns(problem.ggn(mc_samples=self.mc_samples, seed=self.seed).root)

    def saved(self, result: ByParameter) -> dict[str, Any]:
        return _subsampled(result, self.subsampling, axis=1)


@dataclass(frozen=True)
class GGNMP(Extension):
    """``ggnmp``: a function from ``[V, *p]`` to ``[V, *p]``.

    It multiplies V vectors by the parameter's block of G.
    """

    savefield: ClassVar[str] = "ggnmp"

    def direct(self, problem: Problem, by: str) -> dict[str, Any]:
        products = {}
        for block in problem.ggn(blocks="parameter", by=_by_of_columns(by)).blocks:
            if block.space is not None:
                # One parameter in each block, which has its name.
                products.update(dict.fromkeys(block.space.shapes, _product_with(block)))
        return products


def _product_with(block: Operator) -> Callable[[Tensor], Tensor]:
    def ggnmp(vectors: Tensor) -> Tensor:
        # Operators take vectors as columns.
        product: Tensor = block @ vectors.reshape(len(vectors), -1).T
        return product.T.reshape(vectors.shape)

    return ggnmp


def _make_hashable(extension: Any) -> None:
    """Turn a list of samples, which BackPACK takes, into a tuple: extensions are keys."""
    if extension.subsampling is not None:
        object.__setattr__(extension, "subsampling", tuple(extension.subsampling))


def _subsampled(result: ByParameter, samples: Sequence[int] | None, axis: int) -> dict[str, Tensor]:
    """Return the entries of some samples along an axis; all of them if ``samples`` is None."""
    if samples is None:
        return dict(result)
    of_samples = {}
    for name, t in result.items():
        index = torch.tensor(samples, device=t.device)
        of_samples[name] = t.index_select(axis, index)
    return of_samples


# --- columns --------------------------------------------------------------------------------------


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
        assert isinstance(self.root, SampleRoot)
        return _ColumnCollector(about, self.root)


class _ColumnCollector(Collector):
    """Writes the blocks of columns into one tensor for each parameter."""

    def __init__(self, about: About, root: SampleRoot) -> None:
        super().__init__(about)
        self.root = root
        samples, columns = root.layout
        self.columns: dict[str, Tensor] = {}
        for name, shape in about.shapes.items():
            self.columns[name] = wide(about.like.new_zeros(columns, samples, *shape))

    def take(self, name: str, block: RowBlock) -> None:
        if self.root.columns:
            self.columns[name][block.column, block.where] += block.rows()

    def finish(self) -> ByParameter:
        by_name = {name: self._entrywise(t) for name, t in self.columns.items()}
        result: ByParameter = self.about.result(by_name)
        return result

    def _entrywise(self, columns: Tensor) -> Tensor:
        """Return a column for every entry of the predictions, as for ``GGN.gram``.

        The root has fewer columns where the Hessian is of lower rank (C - 1 for a softmax).
        ``to_entries`` takes them to those of the symmetric root, which has the C that BackPACK has.
        """
        root, to_entries = self.root, self.root.to_entries
        if to_entries is None or root.sampled:
            return columns
        # Legend of the einsum: t position inside a sample, c entry, k column of the root.
        _, t, _, k = root.shape
        split = columns.unflatten(0, (t, k))
        return torch.einsum("ntck,tkn...->tcn...", to_entries.to(split), split).flatten(0, 1)


# --- refused --------------------------------------------------------------------------------------


class _Refused(Extension):
    """Not computed, for the reason in the table of consequences, where ``row`` is its name."""

    row: ClassVar[str]

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def direct(self, problem: Problem, by: str) -> dict[str, Any]:
        name = type(self).__name__
        follows = consequence(self.row, problem.structure.statuses)
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
