"""What a monitor can ask about a batch, and the answers as plain data, with their names and how exact they are."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from unbatch.analysis.structure import Structure
from unbatch.curvature.ggn import GGN, LARGEST_GRAM
from unbatch.curvature.ggn_quantities import ColumnQuantity
from unbatch.errors import MSG_MONITOR_QUANTITY, InputError
from unbatch.gradients import diagnostics, quantities
from unbatch.gradients.quantities import Quantity
from unbatch.gradients.results import ByParameter, Histograms, SquaredNormsByParameter
from unbatch.linalg import spectra
from unbatch.problem.parameters import Selection
from unbatch.problem.problem import Problem
from unbatch.problem.question import label_of
from unbatch.problem.validation import check_by_of_columns

TOP = 3  # eigenvalues


LISTENERS = 8  # samples whose crosstalk is looked at, unless samples= says otherwise


PRODUCTS = 20  # for a trace that is estimated


RTOL = 1e-2  # of eigenvalues that are searched for by products


MATRICES = {"component": "GGN", "frozen": "GGN with frozen statistics"}


Answer = dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """One batch, and how it is asked about."""

    problem: Problem
    by: str
    samples: int | None
    parameters: Selection

    @cached_property
    def structure(self) -> Structure:
        return self.problem.structure

    @cached_property
    def ggn(self) -> GGN:
        check_by_of_columns(self.by)
        chosen = None if self.samples is None else range(min(self.samples, self.problem.samples))
        return self.problem.ggn(self.parameters, by=self.by, samples=chosen)

    @property
    def columns(self) -> int:
        """Of the factor of the Gauss-Newton matrix, at most: entries of the predictions of the samples asked about."""
        entries = sum(math.prod(shape) for shape in self.structure.predictions)
        some = self.samples is not None and self.samples < self.problem.samples
        return entries * self.samples // self.problem.samples if some and self.samples else entries

    def rows(self, wanted: Mapping[str, Quantity]) -> dict[str, Answer]:
        """Quantities of gradients taken apart, from one sweep over the whole batch."""
        found = self.problem.compute(*wanted.values(), by=self.by, parameters=self.parameters)
        results = found if len(wanted) > 1 else (found,)
        return {
            n: {"value": summed_up(r)} | self._about(q)
            for (n, q), r in zip(wanted.items(), results, strict=True)
        }

    def _about(self, quantity: Quantity) -> Answer:
        if isinstance(quantity, ColumnQuantity):
            return {"kind": MATRICES[self.by], "samples": self.problem.samples}
        label = label_of(self.structure, self.by)
        return {"kind": label.kind, "samples": self.problem.samples} | (
            {"note": label.note} if label.note else {}
        )

    def trace(self) -> Answer:
        if self.columns <= LARGEST_GRAM:
            return {"value": summed_up(self.ggn.trace())} | self._of_ggn("exact")
        found = spectra.trace(self.ggn, min(PRODUCTS, self.ggn.shape[0]))
        error = {"standard_error": summed_up(found.standard_errors)}
        return (
            {"value": summed_up(found.values)} | error | self._of_ggn(f"estimated, {found.method}")
        )

    def top_eigenvalues(self) -> Answer:
        if self.columns <= LARGEST_GRAM:
            return {"value": numbers(self.ggn.eigvalsh()[-TOP:])} | self._of_ggn("exact")
        found = spectra.eigh(self.ggn, min(TOP, self.ggn.shape[0]), rtol=RTOL)
        return {"value": numbers(found.values)} | self._of_ggn(
            f"by products, residuals within {RTOL:g}"
        )

    def _of_ggn(self, how: str) -> Answer:
        taken = min(self.samples or self.problem.samples, self.problem.samples)
        return {"kind": MATRICES[self.by], "samples": taken, "note": how}

    def crosstalk(self) -> Answer:
        rows = min(self.samples or LISTENERS, self.problem.samples)
        found = self.problem.crosstalk(probes=1, samples=range(rows))
        how = "exact" if found.exact else "estimated, one random probe"
        return {"value": found.strength, "kind": found.by, "samples": rows, "note": how}


def spelled(cls: type) -> str:
    """Return the name by which a quantity is asked for: ``NoiseScale`` is "noise_scale"."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", cls.__name__).lower()


OF_ROWS: dict[str, Quantity] = {
    spelled(cls): cls()
    for cls in (
        quantities.SquaredNorms, diagnostics.NoiseScale, diagnostics.NormTest, diagnostics.InnerProductTest,
        diagnostics.OrthogonalityTest, diagnostics.EarlyStopping, quantities.Variance, diagnostics.SignalToNoise,
    )
}  # fmt: skip


ALONE: dict[str, Callable[[Asked], Answer]] = {
    "trace": Asked.trace,
    "top_eigenvalues": Asked.top_eigenvalues,
    "crosstalk": Asked.crosstalk,
}


OF_GGN = ("trace", "top_eigenvalues")


USUAL = ("squared_norms", "noise_scale", *ALONE)


def chosen(wanted: Sequence[str | Quantity]) -> dict[str, Quantity | None]:
    """By name; None where a question of its own stands behind the name."""
    out: dict[str, Quantity | None] = {}
    for w in [wanted] if isinstance(wanted, str | Quantity) else wanted:
        name = w if isinstance(w, str) else spelled(type(w))
        if name in out or not (isinstance(w, Quantity) or w in OF_ROWS or w in ALONE):
            raise InputError(
                MSG_MONITOR_QUANTITY.format(names=", ".join([*OF_ROWS, *ALONE]), value=w)
            )
        out[name] = w if isinstance(w, Quantity) else OF_ROWS.get(w)
    return out


def of_columns(name: str, quantity: Quantity | None) -> bool:
    """Whether it is made of derivatives of predictions, which no copy has for itself."""
    return isinstance(quantity, ColumnQuantity) if quantity is not None else name in OF_GGN


# --- answers as plain data ------------------------------------------------------------------------


def summed_up(result: Any) -> Any:
    """A number as it is; of many their mean, median, least and largest, squared norms over all parameters."""
    if isinstance(result, SquaredNormsByParameter):
        return _summary(result.total)
    if isinstance(result, Histograms):
        return {name: counts.tolist() for name, counts in result.items()}
    if isinstance(result, ByParameter):
        return {name: _summary(t) for name, t in result.items()}
    if isinstance(result, Tensor):
        return result.item() if result.ndim == 0 else _summary(result)
    return result if isinstance(result, int | float | str) else repr(result)


def numbers(values: Tensor) -> list[float]:
    found: list[float] = values.tolist()
    return found


def _summary(t: Tensor) -> dict[str, float]:
    t = t.detach().flatten().abs() if t.is_complex() else t.detach().flatten()
    t = t.double()
    found = (
        {"mean": t.mean(), "median": t.median(), "min": t.min(), "max": t.max()} if len(t) else {}
    )
    return {name: float(x) for name, x in found.items()}


def scalars(line: Mapping[str, Any], prefix: str = "unbatch") -> Iterator[tuple[str, float]]:
    """The numbers of a line, with a path for each."""
    for name, answer in line.get("quantities", {}).items():
        yield from _numbers(f"{prefix}/{name}", answer.get("value"))
    if line["overhead"] is not None:
        yield f"{prefix}/overhead", line["overhead"]


def _numbers(path: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _numbers(f"{path}/{name}", inner)
    elif isinstance(value, int | float):
        yield path, value
    elif isinstance(value, list) and len(value) <= TOP:
        for i, inner in enumerate(reversed(value), 1):
            yield from _numbers(f"{path}/{i}", inner)
