"""Spectra of any linear operator, as ``unbatch.spectra`` offers them. Nothing is defined here."""

from __future__ import annotations

from unbatch.linalg.spectra import (
    Density,
    Eigenpairs,
    Estimate,
    Search,
    density,
    diagonal,
    eigh,
    trace,
)

__all__ = [
    "Density",
    "Eigenpairs",
    "Estimate",
    "Search",
    "density",
    "diagonal",
    "eigh",
    "trace",
]
