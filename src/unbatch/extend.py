"""Everything that an extension of unbatch imports. Nothing is defined here.

- a rule for an operation: ``register_rule``, with ``RuleContext`` in and ``Ownership`` out; or
  ``assume_independent`` where the operation is known to act on each sample alone
- a quantity of gradients: ``Derived`` over others, or ``Basic`` with a ``Collector`` that takes
  ``RowBlock``
- a contraction for an operation: ``Contraction`` and ``contraction_kind``
"""

from unbatch.analysis.domain.ownership import Ownership
from unbatch.analysis.rules.registry import RuleContext, assume_independent, register_rule
from unbatch.autodiff.contractions.contraction import Contraction
from unbatch.autodiff.contractions.registry import contraction_kind
from unbatch.autodiff.contractions.row_block import RowBlock
from unbatch.capture.steps import ExecutedOp
from unbatch.gradients.quantities import About, Basic, Collector, Derived, Quantity

__all__ = [
    "About",
    "Basic",
    "Collector",
    "Contraction",
    "Derived",
    "ExecutedOp",
    "Ownership",
    "Quantity",
    "RowBlock",
    "RuleContext",
    "assume_independent",
    "contraction_kind",
    "register_rule",
]
