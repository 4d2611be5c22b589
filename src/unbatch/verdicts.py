"""The answer to a structure question: six verdicts, culprits with a reason and a remedy, and batch statistics.

Frozen data only, and the texts that explain a culprit. Nothing is computed here.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from unbatch import consequences
from unbatch.capture import Escape, Step
from unbatch.rules import NO_RULE

NAMES = consequences.STRUCTURES


@dataclass(frozen=True)
class Culprit:
    """One place in the user's program that stands in the way of a structure, and what to do about it."""

    module: str
    op: str
    where: str
    why: str
    remedy: str

    @property
    def short(self) -> str:
        """File and line without the folders in front."""
        file, _, line = self.where.rpartition(":")
        return f"{os.path.basename(file)}:{line}" if file else ""


@dataclass(frozen=True)
class Verdict:
    """``status`` is "holds", "fails" or "unknown"; ``basis`` "proved", "witness" or "assumed" ("" where unknown).

    True in a boolean context only when it holds.
    """

    name: str
    status: str
    basis: str = ""
    culprits: tuple[Culprit, ...] = ()
    note: str = ""
    weights_depend_on: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return self.status == "holds"


@dataclass(frozen=True)
class BatchStatistic:
    """Numbers through which samples listen to each other: ``size`` of them, each over ``samples`` samples."""

    module: str
    op: str
    where: str
    size: int
    samples: int
    grouped: bool


@dataclass(frozen=True)
class Structure:
    """Everything known about the structure of one loss on one batch."""

    canonical_split: Verdict
    independent_forward: Verdict
    simd_forward: Verdict
    simd_given_statistics: Verdict
    reduction: Verdict
    simd_loss: Verdict
    samples: int
    predictions: tuple[tuple[int, ...], ...]
    statistics: tuple[BatchStatistic, ...] = ()
    assumptions: tuple[str, ...] = ()
    custom_rules: tuple[str, ...] = ()
    unknown_ops: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        return tuple(getattr(self, name) for name in NAMES)

    @property
    def statistics_size(self) -> int:
        """R: how many batch statistics there are in all."""
        return sum(s.size for s in self.statistics)

    @property
    def statuses(self) -> dict[str, str]:
        """The verdicts as the table of consequences takes them."""
        out = {v.name: v.status for v in self.verdicts}
        weights = self.reduction.weights_depend_on
        return out | {"own_weights": "fails" if weights else "holds"}

    def follows(self) -> tuple[consequences.Consequence, ...]:
        """Which quantities exist, under which name, exact or not."""
        return consequences.follows(self.statuses)

    def with_verdicts(self, *verdicts: Verdict) -> Structure:
        return replace(self, **{v.name: v for v in verdicts})


# --- why, and what to do ----------------------------------------------------------------------------------------------------

WHY = {
    "statistic": "a statistic over all samples ({size} numbers) flows back into every sample",
    "group": "statistics over groups of {samples} samples ({size} numbers) flow back into the samples of the group",
    "long": "a statistic with as many entries as there are samples flows back into every sample",
    "pairwise": "values of different samples are combined with each other",
    "unsymmetric": "values of different samples are combined with weights that depend on their position in the batch",
    "ordered": "a computation runs along the axis that carries the samples",
    "looked up": "an index that depends on data picks values from other samples",
    "position": "the position of an extreme value in the batch is used",
    "order": "the order of the samples by their values is used",
    "scattered": "values of different samples are written to the same place",
    "written through a view": "values of different samples meet in memory that is written in place",
    "joined": "values of different samples are joined",
    "data-dependent shape": "how many values there are depends on the data",
    "resized": "memory is reinterpreted in another size",
    "assumed": "the output of something declared independent has no sample axis",
    NO_RULE: "the op has no rule and no known decomposition, so nothing is known about what it does to samples",
    "uneven": "what is done to a sample depends on its index in the batch",
    "place": "slice n of the prediction belongs to another sample than n",
    "escape": "Python reads a value that depends on the batch ({how}); what follows may depend on it",
    "unfaithful": "on another batch the recorded computation gives other values than the model, so something steers it that was not seen",
}
REMEDY = {
    "statistic": "Evaluate with fixed statistics (`.eval()`), or normalise within a sample (GroupNorm, LayerNorm); "
    "sums and the GGN stay exact as they are.",
    "group": "Same as for batch norm: `.eval()` or a norm within the sample; within a group sums stay exact.",
    "escape": "Keep it a tensor (`torch.where` in place of `if`), or declare it harmless: `unbatch.assume_independent(...)`.",
    NO_RULE: "Register a rule (`unbatch.register_rule(op, rule)`) or declare it: `unbatch.assume_independent(op)`.",
    "uneven": "Draw what differs between samples from the inputs, not from the index.",
    "place": "Return predictions in the order of the inputs, samples on axis 0.",
    "unfaithful": "Look for Python state, numpy or a branch in the forward pass and keep it in tensors.",
    "ordered": "Check which axis carries the samples (batch_first, dim=).",
    "data-dependent shape": "Use a mask of fixed shape in place of a selection, or `unbatch.assume_independent(...)`.",
}
DEFAULT_REMEDY = "Check the axes and the order of `view` and `reshape`; if it is meant, ask for per-component quantities."


def culprit(step: Step, kind: str, **facts: object) -> Culprit:
    why = WHY.get(kind, kind).format(**facts)
    return Culprit(step.module, step.name, step.where, why, REMEDY.get(kind, DEFAULT_REMEDY))


def escape_culprit(escape: Escape) -> Culprit:
    return Culprit(escape.module, "escape", escape.where, WHY["escape"].format(how=escape.how), REMEDY["escape"])
