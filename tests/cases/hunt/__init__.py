"""Programs of the hunts from the second on, each with its truth; `known.py` has those still wrong.

`MODELS` are entered when their modules are imported.
"""

from importlib import import_module

from cases.hunt.losses import LOSSES
from cases.hunt.table import MODELS

__all__ = ["LOSSES", "MODELS"]

SECOND = ("arguments", "escapes", "ops", "noise", "numbers", "reductions", "sets", "ways")
THIRD = ("third_models", "third_noise", "third_sizes", "third_statistics", "third_losses")
FOURTH = (
    "fourth_models",
    "fourth_models_flat",
    "fourth_models_source",
    "fourth_models_library",
    "fourth_models_objects",
    "fourth_kinds",
    "fourth_losses",
    "fourth_state",
)
FIFTH = ("fifth_models", "fifth_losses")

for part in (*SECOND, *THIRD, *FOURTH, *FIFTH):
    import_module(f"cases.hunt.{part}")
