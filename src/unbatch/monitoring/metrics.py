"""What a monitor can measure on a batch, as plain data: a value, its kind, its samples and a note.

Everything is computed by ``Problem``; when to measure is decided in ``account.py``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from unbatch.analysis.structure import Structure
from unbatch.curvature.ggn import GGN
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


CROSSTALK_SAMPLES = 8  # rows of the crosstalk, unless samples= says otherwise


LARGEST_GRAM = 4096  # columns up to which trace and eigenvalues are those of the Gram matrix


# Of a matrix whose Gram matrix is too large: products for its trace, and the relative residual at
# which an eigenvalue counts as found.
TRACE_PRODUCTS = 20
EIGENVALUE_RTOL = 1e-2


MATRICES = {"component": "GGN", "frozen": "GGN with frozen statistics"}


Entry = dict[str, Any]  # one metric in a line: "value" with "kind" and "samples", or "error"


# --- one batch ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measurement:
    """One batch, and how it is measured.

    ``by`` and ``parameters`` as for ``Problem``; ``samples``: at most so many components, the first
    ones, enter curvature and crosstalk; None for all.
    """

    problem: Problem
    by: str
    samples: int | None
    parameters: Selection

    # Cached: metrics ask one after the other, and each of them may be the one that fails.
    @cached_property
    def structure(self) -> Structure:
        """The verdicts on this batch."""
        return self.problem.structure

    @cached_property
    def ggn(self) -> GGN:
        """The Gauss-Newton matrix, made once for all metrics that need it."""
        check_by_of_columns(self.by)
        samples = None
        if self.samples is not None:
            # The last batch of an epoch may be smaller than samples=.
            samples = range(min(self.samples, self.problem.samples))
        return self.problem.ggn(self.parameters, by=self.by, samples=samples)

    @property
    def columns(self) -> int:
        """Columns of the factor of the matrix, at most: one for each entry of the predictions."""
        entries = 0
        for shape in self.structure.predictions:
            entries += math.prod(shape)
        if self.samples is None or self.samples >= self.problem.samples:
            return entries
        return entries * self.samples // self.problem.samples

    def rows(self, metrics: Mapping[str, Quantity]) -> dict[str, Entry]:
        """Return quantities of the rows of the gradient, from one sweep over the whole batch."""
        results = self.problem.compute(*metrics.values(), by=self.by, parameters=self.parameters)
        if len(metrics) == 1:  # compute returns a tuple for several quantities only
            results = (results,)
        entries = {}
        for (name, quantity), result in zip(metrics.items(), results, strict=True):
            entries[name] = {"value": plain(result)} | self._origin(quantity)
        return entries

    def _origin(self, quantity: Quantity) -> Entry:
        """Return which rows a number is taken of, with a note where their name needs one."""
        if isinstance(quantity, ColumnQuantity):
            return {"kind": MATRICES[self.by], "samples": self.problem.samples}
        label = label_of(self.structure, self.by)
        origin: Entry = {"kind": label.kind, "samples": self.problem.samples}
        if label.note:
            origin["note"] = label.note
        return origin

    def trace(self) -> Entry:
        """Return the trace of the Gauss-Newton matrix, exact where its columns fit."""
        # A Gram matrix of more columns costs more than the products that estimate the trace.
        if self.columns <= LARGEST_GRAM:
            return {"value": plain(self.ggn.trace())} | self._matrix_origin("exact")
        estimate = spectra.trace(self.ggn, min(TRACE_PRODUCTS, self.ggn.shape[0]))
        entry = {
            "value": plain(estimate.values),
            "standard_error": plain(estimate.standard_errors),
        }
        return entry | self._matrix_origin(f"estimated, {estimate.method}")

    def top_eigenvalues(self) -> Entry:
        """Return the largest eigenvalues, ascending, exact where the columns of the matrix fit."""
        if self.columns <= LARGEST_GRAM:
            values = self.ggn.eigvalsh()[-TOP:]
            return {"value": values.tolist()} | self._matrix_origin("exact")
        pairs = spectra.eigh(self.ggn, min(TOP, self.ggn.shape[0]), rtol=EIGENVALUE_RTOL)
        note = f"by products, residuals within {EIGENVALUE_RTOL:g}"
        return {"value": pairs.values.tolist()} | self._matrix_origin(note)

    def _matrix_origin(self, note: str) -> Entry:
        samples = min(self.samples or self.problem.samples, self.problem.samples)
        return {"kind": MATRICES[self.by], "samples": samples, "note": note}

    def crosstalk(self) -> Entry:
        """Return the part of the squares of the crosstalk that stands off its diagonal."""
        # One random backward pass for a row, in place of one for each entry of its prediction.
        rows = min(self.samples or CROSSTALK_SAMPLES, self.problem.samples)
        result = self.problem.crosstalk(probes=1, samples=range(rows))
        note = "exact" if result.exact else "estimated, one random probe"
        return {"value": result.strength, "kind": result.by, "samples": rows, "note": note}


# --- metrics by name ------------------------------------------------------------------------------


def name_of_quantity(cls: type) -> str:
    """Return the name by which a quantity is selected: ``NoiseScale`` is "noise_scale"."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", cls.__name__).lower()


ROW_QUANTITIES = (
    quantities.SquaredNorms,
    diagnostics.NoiseScale,
    diagnostics.NormTest,
    diagnostics.InnerProductTest,
    diagnostics.OrthogonalityTest,
    diagnostics.EarlyStopping,
    quantities.Variance,
    diagnostics.SignalToNoise,
)


# Measured together, in one sweep.
ROW_METRICS: dict[str, Quantity] = {name_of_quantity(cls): cls() for cls in ROW_QUANTITIES}


# Each measured on its own.
BATCH_METRICS: dict[str, Callable[[Measurement], Entry]] = {
    "trace": Measurement.trace,
    "top_eigenvalues": Measurement.top_eigenvalues,
    "crosstalk": Measurement.crosstalk,
}


OF_GGN = ("trace", "top_eigenvalues")


DEFAULT_METRICS = ("squared_norms", "noise_scale", *BATCH_METRICS)


def metrics_by_name(
    selection: str | Quantity | Sequence[str | Quantity],
) -> dict[str, Quantity | None]:
    """Return what is measured, by name; None for what is measured on its own, by ``BATCH_METRICS``.

    Raises ``InputError`` for a name that does not exist or stands twice.
    """
    if isinstance(selection, str | Quantity):
        selection = [selection]
    metrics: dict[str, Quantity | None] = {}
    for choice in selection:
        if isinstance(choice, Quantity):
            name, quantity = name_of_quantity(type(choice)), choice
        elif isinstance(choice, str) and choice in ROW_METRICS:
            name, quantity = choice, ROW_METRICS[choice]
        elif isinstance(choice, str) and choice in BATCH_METRICS:
            name, quantity = choice, None
        else:
            raise _no_metric(choice)
        if name in metrics:
            raise _no_metric(choice)
        metrics[name] = quantity
    return metrics


def _no_metric(choice: Any) -> InputError:
    names = ", ".join([*ROW_METRICS, *BATCH_METRICS])
    return InputError(MSG_MONITOR_QUANTITY.format(names=names, value=choice))


def needs_predictions(name: str, quantity: Quantity | None) -> bool:
    """Return whether a metric is built from derivatives of predictions, which no copy has."""
    if quantity is None:
        return name in OF_GGN
    return isinstance(quantity, ColumnQuantity)


# --- results as plain data ------------------------------------------------------------------------

# A line has to stay readable for models of any size, so tensors are summarised.


def plain(result: Any) -> Any:
    """Return a number as it is, and of many numbers their mean, median, least and largest.

    Squared norms are those over all parameters; histograms keep their counts.
    """
    # Subclasses of ByParameter before ByParameter.
    if isinstance(result, SquaredNormsByParameter):
        return _summary(result.total)
    if isinstance(result, Histograms):
        return {name: counts.tolist() for name, counts in result.items()}
    if isinstance(result, ByParameter):
        return {name: _summary(tensor) for name, tensor in result.items()}
    if isinstance(result, Tensor):
        if result.ndim == 0:
            return result.item()
        return _summary(result)
    if isinstance(result, int | float | str):
        return result
    return repr(result)


def _summary(values: Tensor) -> dict[str, float]:
    """Return statistics of all entries, of their magnitudes where they are complex."""
    values = values.detach().flatten()
    if values.is_complex():
        values = values.abs()
    values = values.double()
    if not len(values):
        return {}
    return {
        "mean": float(values.mean()),
        "median": float(values.median()),
        "min": float(values.min()),
        "max": float(values.max()),
    }
