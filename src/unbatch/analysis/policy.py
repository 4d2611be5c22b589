"""To which samples a result is counted beyond what the rules prove.

The verdicts use ``PROVED_ONLY``. The other policies answer questions that come after the verdicts,
where a convention is agreed on: rows by copy count slice n of a mixed value to sample n, and a
picture goes on past the first place of mixing. No policy touches a value of separate samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from unbatch.analysis.domain.ownership import Ownership, batched
from unbatch.analysis.rules.registry import RuleContext
from unbatch.capture import ops
from unbatch.capture.steps import Ref


class Mixed(Enum):
    """What becomes of a result in which samples are mixed in no symmetric way.

    ``KEEP``: it stays mixed. ``BY_PLACE``: slice n counts as sample n's, wherever an axis fits, as
    if every rank gathered the other operands: what it computes from them is its own use of the
    parameters. ``AFRESH``: likewise, but only where it is beyond doubt which axis has such slices.
    """

    KEEP = "keep"
    BY_PLACE = "by place"
    AFRESH = "afresh"


@dataclass(frozen=True)
class Policy:
    """``counted``: shared values whose entries along this axis count as those of the samples.

    ``held``: values that have this ownership, whatever the rules say: noise that belongs to samples
    from the moment on when it is drawn. ``read_by``: what results count as that no rule can count
    to single samples; where they do, the interpretation notes it as a fresh start.
    """

    mixed: Mixed = Mixed.KEEP
    counted: Mapping[int, int] = field(default_factory=dict)
    held: Mapping[int, Ownership] = field(default_factory=dict)
    read_by: Mapping[int, Ownership] = field(default_factory=dict)

    def of_mixed(self, call: RuleContext, marks: Ownership, ref: Ref) -> Ownership:
        """Return the ownership of a mixed result of an op under this policy."""
        if self.mixed is Mixed.BY_PLACE:
            return _by_place(call, marks, ref)
        if self.mixed is Mixed.AFRESH:
            return _afresh(call, marks, ref)
        return marks


# What all verdicts rest on. The others may count wrongly without a verdict being wrong.
PROVED_ONLY = Policy()


def _by_place(call: RuleContext, marks: Ownership, ref: Ref) -> Ownership:
    """Count slices to samples along the axis of the first operand's, or the first that fits."""
    # The first operand's axis first: where several axes have N entries, it is the likeliest.
    candidates: list[int | None] = [x.sample_dim() for x in call.tensors if x.owned][:1]
    candidates += range(len(marks.shape))
    for axis in candidates:
        if axis is not None and _has_slices(marks, axis, call.algebra.samples):
            return batched(marks.shape, axis, ("place", ref.index), marks.sources)
    return marks


def _afresh(call: RuleContext, marks: Ownership, ref: Ref) -> Ownership:
    """Count slices to samples along the axis that was that of the first operand's samples.

    Not if that is its last axis, which most operations take for features. A view of what is mixed
    has no such operand: there it is the first axis.
    """
    operand = next((x for x in call.tensors if x.owned), None)
    if operand is not None:
        axis, features = operand.sample_dim(), len(operand.shape) - 1
    elif ops.is_view(call.op):
        axis, features = 0, len(marks.shape) - 1
    else:
        return marks
    # Without doubt means: known from an operand, not the features, and of the right size.
    if axis is None or axis >= features or not _has_slices(marks, axis, call.algebra.samples):
        return marks
    return batched(marks.shape, axis, ("afresh", ref.index), marks.sources)


def _has_slices(marks: Ownership, axis: int, samples: int) -> bool:
    """Tell whether the value has an axis of this number with one slice for each sample."""
    return marks.shape[axis : axis + 1] == (samples,)
