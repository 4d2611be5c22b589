"""unbatch: proves which structure a loss has, and computes what that structure allows."""

from unbatch.crosstalk import Crosstalk
from unbatch.errors import CaptureError, InputError, UnbatchError
from unbatch.problem import Problem, assume_independent
from unbatch.rules import register_rule
from unbatch.verdicts import Culprit, Structure, Verdict
from unbatch.verify import Verification

__version__ = "0.1.0"

__all__ = [
    "CaptureError",
    "Crosstalk",
    "Culprit",
    "InputError",
    "Problem",
    "Structure",
    "UnbatchError",
    "Verdict",
    "Verification",
    "assume_independent",
    "register_rule",
]
