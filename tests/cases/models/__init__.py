"""Models whose forward structure is known, by family; `MODELS` has the cases of all families, in
this order.
"""

from importlib import import_module

from cases.models.table import MODELS, ModelCase, Net

__all__ = ["FAMILIES", "MODELS", "ModelCase", "Net"]

FAMILIES = (
    "norms",
    "statistics",
    "sample_axis",
    "writes",
    "attention",
    "positions",
    "permutations",
    "indexing",
    "experts",
    "convolutions",
    "programs",
)

# Each registers its cases when it is imported; the order of the cases is that of the families.
for family in FAMILIES:
    import_module(f"cases.models.{family}")
