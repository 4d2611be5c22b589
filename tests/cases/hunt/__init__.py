"""Programs of a second hunt, each with its truth; those of `known.py` are wrong yet.

`MODELS` are entered when their modules are imported.
"""

from importlib import import_module

from cases.hunt.losses import LOSSES
from cases.hunt.table import MODELS

__all__ = ["LOSSES", "MODELS"]

for part in ("arguments", "escapes", "ops", "noise", "numbers", "reductions", "sets", "ways"):
    import_module(f"cases.hunt.{part}")
