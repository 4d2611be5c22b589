"""Pictures of results, as ``unbatch.plot`` offers them. Nothing is defined here."""

from __future__ import annotations

from unbatch.diagram.figure import save
from unbatch.report.curvature_plot import directions
from unbatch.report.plot import crosstalk, density, gradient_norms, plan, spectrum, structure

__all__ = [
    "crosstalk",
    "density",
    "directions",
    "gradient_norms",
    "plan",
    "save",
    "spectrum",
    "structure",
]
