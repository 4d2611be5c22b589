"""What the package offers: every public name, which `import unbatch` has as its own.

It stands apart from `__init__.py` so that importing the package does not import torch. Nothing is
defined here.
"""

from unbatch.analysis.rules.registry import assume_independent, register_rule
from unbatch.analysis.structure import Structure
from unbatch.analysis.verdict import Culprit, Verdict
from unbatch.capture.ragged_rows import rows_of
from unbatch.capture.stacked_views import Views
from unbatch.curvature.ggn import GGN
from unbatch.curvature.ggn_quantities import DiagGGN
from unbatch.curvature.low_rank import Compression
from unbatch.errors import (
    BudgetError,
    CaptureError,
    ContradictedProofWarning,
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
from unbatch.gradients.diagnostics import (
    ClippedSum,
    EarlyStopping,
    InnerProductTest,
    NoiseScale,
    NormTest,
    OrthogonalityTest,
    SignalToNoise,
)
from unbatch.gradients.quantities import (
    Dots,
    Gradients,
    Histogram,
    SecondMoment,
    SquaredNorms,
    SumOfSquares,
    Variance,
)
from unbatch.gradients.results import Rows
from unbatch.monitoring.monitor import Monitor
from unbatch.problem.problem import Problem
from unbatch.report.page import write_report
from unbatch.running.records import Progress
from unbatch.running.tasks import progress
from unbatch.verification.crosstalk import Crosstalk
from unbatch.verification.verify import Verification

__all__ = [
    "BudgetError",
    "CaptureError",
    "ClippedSum",
    "Compression",
    "ContradictedProofWarning",
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
    "SquaredNorms",
    "OrthogonalityTest",
    "Problem",
    "Progress",
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
    "Views",
    "assume_independent",
    "progress",
    "register_rule",
    "rows_of",
    "write_report",
]
