"""What the marks say about the loss: six verdicts, their culprits, and the statistics samples listen to.

``judge`` says *holds* where the marks prove it and leaves the rest open ("unknown"), with the reasons why. Whether an
open one *fails* takes a witness, see ``verify.py``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from unbatch import consequences
from unbatch.capture import Escape, Graph, Step
from unbatch.labels import MIXED, SHARED, Algebra, Marks
from unbatch.rules import NO_RULE
from unbatch.walk import Walk, forward_marks, loss_marks, prediction_dim, walk

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


# --- reading marks -------------------------------------------------------------------------------------------------------------


def holds_its_place(marks: Marks, samples: int, leading: bool) -> bool:
    """Slice n of a prediction belongs to sample n (or to none)."""
    if marks.mixed or (marks.owner < MIXED).any():
        return False
    if not marks.owned:
        return True
    dim = prediction_dim(marks, samples, leading)
    if dim is not None:
        want = np.arange(samples).reshape([-1 if d == dim else 1 for d in range(len(marks.shape))])
        return bool(((marks.owner == want) | (marks.owner == SHARED)).all())
    return _blocks(marks, samples) is not None


def _blocks(marks: Marks, samples: int) -> np.ndarray | None:
    """Keys as ``[samples, ..]`` if samples lie in contiguous, equal blocks along the leading dim."""
    if not marks.shape or marks.shape[0] % samples or marks.key.shape[0] == 1:
        return None
    owner = marks.owner.reshape(samples, -1)
    right = (owner == np.arange(samples)[:, None]) | (owner == SHARED)
    return marks.key.reshape(samples, -1) if right.all() else None


def uniform(marks: Marks, samples: int, leading: bool) -> bool:
    """Slice n is the same function for every n."""
    dim = prediction_dim(marks, samples, leading)
    if dim is not None:
        key = np.moveaxis(marks.key, dim, 0)
        return not marks.plain(dim) and bool((key == key[:1]).all())
    blocks = _blocks(marks, samples)
    return blocks is not None and bool((blocks == blocks[:1]).all())


def sees(marks: Marks) -> bool:
    """The value tells something about the batch."""
    return marks.depends_on_batch or bool(marks.sources & {"inputs", "targets", "predictions", "internals"})


def sample_sizes(structures: Iterable[BatchStatistic]) -> int:
    return sum(s.size for s in structures)


# --- judging ------------------------------------------------------------------------------------------------------------------------


@dataclass
class Findings:
    """The walks behind a structure; what the witnesses need to know beside it."""

    forward: Walk
    loss: Walk | None
    leading: bool
    bent: bool = False
    escapes: list[Escape] = field(default_factory=list)
    loss_escapes: list[Escape] = field(default_factory=list)


def judge(
    graph: Graph, samples: int, dims: Sequence[int | None], target_dims: Sequence[int | None], assumed: Sequence[str] = (),
    harmless: Callable[[Escape], bool] = lambda e: False,
) -> tuple[Structure, Findings]:  # fmt: skip
    """Walk over model and loss and say what is proved."""
    leading = all(d in (0, None) for d in dims)
    forward = walk(graph, samples, forward_marks(graph, dims), 0, graph.model_steps, assumed)
    found = Findings(forward, None, leading)
    seen = lambda e, w: e.ref.index not in w.marks or sees(w[e.ref])  # noqa: E731
    found.escapes = [e for e in graph.escapes if e.step <= graph.model_steps and seen(e, forward) and not harmless(e)]
    structure = _judge_forward(graph, forward, found, samples)
    if graph.loss is not None:
        start = loss_marks(graph, forward, target_dims, samples, leading)
        found.loss = walk(graph, samples, start, graph.model_steps, len(graph.steps), assumed)
        found.loss_escapes = [e for e in graph.escapes if e.step > graph.model_steps and seen(e, found.loss) and not harmless(e)]
        structure = _judge_loss(graph, found.loss, found, structure)
    walks = [forward] + ([found.loss] if found.loss else [])
    return replace(
        structure,
        assumptions=tuple(sorted(set().union(*(w.assumed for w in walks)))),
        custom_rules=tuple(sorted(set().union(*(w.custom for w in walks)))),
        unknown_ops=tuple(sorted({op for w in walks for op in w.unknown.values()})),
    ), found


def _judge_forward(graph: Graph, forward: Walk, found: Findings, samples: int) -> Structure:
    algebra, leading = forward.algebra, found.leading
    used = used_predictions(graph)
    marks = [forward[r] for r in used]
    steps = forward.ancestors(used)
    statistics = _statistics(graph, algebra, steps)
    blame = _blame(graph, forward, steps, marks, found)
    found.bent = bool(algebra.bent & steps) or any(algebra.births.get(s) in ("order", "position") for s in steps)
    in_place = all(holds_its_place(m, samples, leading) for m in marks) and not found.escapes
    alike = all(uniform(m, samples, leading) for m in marks)
    independent = in_place and not any(m.given for m in marks)
    simd = independent and alike
    long = any(u.long and _reaches(u.roots, algebra, steps) for u in algebra.uses.values())
    given = in_place and alike and not long and not algebra.overlapping()
    basis = "assumed" if forward.assumed else "proved"
    none = Verdict("", "unknown")

    def verdict(name: str, holds: bool, culprits: tuple[Culprit, ...], note: str = "") -> Verdict:
        if samples == 1:
            return Verdict(name, "unknown", note="A batch of one sample cannot show whether samples listen to each other.")
        return Verdict(name, "holds", basis, note=note) if holds else Verdict(name, "unknown", culprits=culprits)

    size = sum(s.size for s in statistics)
    note = f"R = {size} batch statistics" if size else "no statistics are needed"
    if any(s.grouped for s in statistics):
        note += ", of groups of samples: s_{g(n)}"
    return Structure(
        canonical_split=none, reduction=none, simd_loss=none,
        independent_forward=verdict("independent_forward", independent, blame),
        simd_forward=verdict("simd_forward", simd, blame),
        simd_given_statistics=verdict("simd_given_statistics", given, tuple(c for c in blame if c.why not in _harmless_given(statistics, long))),
        note_given=note,
        samples=samples, predictions=tuple(graph.values[r.index].shape for r in used), statistics=statistics,
    )  # fmt: skip
