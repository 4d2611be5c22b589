"""Pictures of results, as ``unbatch.plot`` offers them. Nothing is defined here."""

from unbatch.report.plot import (
    crosstalk,
    density,
    directions,
    gradient_norms,
    plan,
    save,
    spectrum,
    structure,
)

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
