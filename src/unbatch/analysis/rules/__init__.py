"""What each operation does to ownership: importing this package registers every rule.

``registry.py`` has the table and the words in which rules are written; the others are one family each.
"""

from unbatch.analysis.rules import (
    elementwise,
    indexing,
    layers,
    losses,
    permutations,
    recurrences,
    reductions,
    views,
)

__all__ = [
    "elementwise",
    "indexing",
    "layers",
    "losses",
    "permutations",
    "recurrences",
    "reductions",
    "views",
]
