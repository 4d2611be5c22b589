"""What each operation does to ownership: importing this package registers every rule.

``registry.py`` has the table, what a rule sees, and words that many rules use. Then come, one
family each: ``elementwise.py``, ``reductions.py``, ``layers.py``, ``windows.py``,
``recurrences.py`` and ``losses.py`` (values are computed), ``views.py``, ``indexing.py`` and
``writes.py`` (they change place). ``permutations.py`` follows rows through an order that depends
on the batch.
"""

# Each import registers the rules of its file; the order makes no difference, as no op has two.
from unbatch.analysis.rules import (
    elementwise,
    indexing,
    layers,
    losses,
    permutations,
    recurrences,
    reductions,
    views,
    windows,
    writes,
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
    "windows",
    "writes",
]
