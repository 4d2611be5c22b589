"""What the package offers: every public name, which `import unbatch` has as its own.

It stands apart from `__init__.py` so that importing the package does not import torch. Nothing is defined here.
"""

from unbatch.columns import DiagGGN
from unbatch.compression import Compression
from unbatch.crosstalk import Crosstalk
from unbatch.diagnostics import (
    ClippedSum,
    EarlyStopping,
    InnerProductTest,
    NoiseScale,
    NormTest,
    OrthogonalityTest,
    SignalToNoise,
)
from unbatch.errors import (
    CaptureError,
    ConvergenceError,
    InputError,
    MixedSamplesWarning,
    MonitorWarning,
    StaleError,
    StructureError,
    UnbatchError,
    UnregisteredParameterWarning,
    VanishingCurvatureWarning,
)
from unbatch.ggn import GGN
from unbatch.monitor import Monitor
from unbatch.page import write_report
from unbatch.problem import Problem
from unbatch.quantities import Dots, Gradients, Histogram, Norms, SecondMoment, SumOfSquares, Variance
from unbatch.recording import assume_independent
from unbatch.results import Rows
from unbatch.rules import register_rule
from unbatch.verdicts import Culprit, Structure, Verdict
from unbatch.verify import Verification

__all__ = [
    "CaptureError",
    "ClippedSum",
    "Compression",
    "ConvergenceError",
    "Crosstalk",
    "Culprit",
    "DiagGGN",
    "Dots",
    "EarlyStopping",
    "GGN",
    "Gradients",
    "Histogram",
    "InnerProductTest",
    "InputError",
    "MixedSamplesWarning",
    "Monitor",
    "MonitorWarning",
    "NoiseScale",
    "NormTest",
    "Norms",
    "OrthogonalityTest",
    "Problem",
    "Rows",
    "SecondMoment",
    "SignalToNoise",
    "StaleError",
    "Structure",
    "StructureError",
    "SumOfSquares",
    "UnbatchError",
    "UnregisteredParameterWarning",
    "VanishingCurvatureWarning",
    "Variance",
    "Verdict",
    "Verification",
    "assume_independent",
    "register_rule",
    "write_report",
]
