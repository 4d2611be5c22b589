"""Estimates of cost that force columns one way, for ``strategy.estimate_cost``."""

from typing import Any

from unbatch.curvature.low_rank import CostEstimate


def by_statistics(*_: Any) -> CostEstimate:
    """Return an estimate under which all statistics are pulled back, and for nothing."""
    return CostEstimate(1, 1, 0.0, by_columns=1.0, by_statistics=0.0, fits=True)


def by_columns(*_: Any) -> CostEstimate:
    """Return an estimate under which columns are pulled back one by one, for nothing."""
    return CostEstimate(1, 1, 0.0, by_columns=0.0, by_statistics=1.0, fits=True)
