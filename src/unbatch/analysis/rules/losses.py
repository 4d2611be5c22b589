"""Rules for loss ops: a loss for each sample, reduced as the op says."""

from __future__ import annotations

from typing import Any

import numpy as np

from unbatch.analysis.domain.ownership import Ownership, collapse, shared
from unbatch.analysis.rules.layers import window_result
from unbatch.analysis.rules.registry import RuleContext, mixed, rule

NONE, MEAN = 0, 1


def reduced(call: RuleContext, loss: Ownership, reduction: int) -> Ownership:
    """A loss per element, reduced as its ``reduction`` argument says."""
    if reduction == NONE:
        return loss
    return call.algebra.reduce("mean" if reduction == MEAN else "sum", loss) if loss.shape else loss


@rule(
    "mse_loss smooth_l1_loss huber_loss binary_cross_entropy soft_margin_loss l1_loss poisson_nll_loss "
    "hinge_embedding_loss"
)
def elementwise_loss(call: RuleContext) -> Ownership:
    marks = [m for m in (call["self"], call["target"], call["weight"]) if m is not None]
    loss = call.algebra.pointwise((call.name, repr(call["beta"] or call["delta"])), *marks)
    return reduced(call, loss, call["reduction"])


@rule("nll_loss_forward", "nll_loss2d_forward", "nll_loss_nd")
def nll_loss(call: RuleContext) -> Any:
    """Pick the target's entry; the mean divides by the weights of the targets, which depends on the targets."""
    a, p, y = call.algebra, call["self"], call["target"]
    classes = 1 if len(p.shape) > 1 else 0
    picked = a.scan("classes", p, [classes]) if p.key.shape[classes] > 1 else p
    picked = collapse(picked.with_key("pick"), [classes], False)
    weight = call["weight"]
    weigh = [collapse(a.scan("classes", weight, [0]), [0], False)] if weight is not None else []
    ignored = call["ignore_index"]
    loss = a.pointwise(("nll", ignored), picked, y, *weigh)
    counts = a.pointwise(("weight", ignored), y, *weigh)
    depends = weight is not None or ignored >= 0 or _ignored_unevenly(call, ignored)
    amount = a.reduce("sum", counts) if depends and counts.shape else shared((), "count")
    if call["reduction"] == NONE or not loss.shape:
        return [loss, amount]
    out = a.reduce("sum", loss)
    return [
        a.pointwise("div", out, amount, kind="scale") if call["reduction"] == MEAN else out,
        amount,
    ]


def _ignored_unevenly(call: RuleContext, number: int) -> bool:
    """Whether more labels are ignored in one sample than in another. A language model ignores the last of each."""
    y, samples = call["target"], call.algebra.samples

    def uneven(values: Any) -> bool:
        hits = np.asarray(values) == number
        owners = np.broadcast_to(y.owner, y.shape)[hits]
        known = ((owners >= 0) & (owners < samples)).all()  # to belong to one sample each
        return not known or bool(np.ptp(np.bincount(owners, minlength=samples)))

    return call.sees("target", lambda values: values is None or uneven(values))


@rule("multi_margin_loss", "multilabel_margin_loss_forward", "multilabel_margin_loss")
def margin_loss(call: RuleContext) -> Any:
    a, p, y = call.algebra, call["self"], call["target"]
    last = len(p.shape) - 1
    seen = collapse(a.scan("classes", p, [last]), [last], False)
    y = (
        y
        if len(y.shape) == len(seen.shape)
        else collapse(a.scan("classes", y, [last]), [last], False)
    )
    loss = a.pointwise((call.name, repr(call["p"]), repr(call["margin"])), seen, y)
    return [reduced(call, loss, call["reduction"]), *(shared(s, "unused") for s in call.shapes[1:])]


@rule("_ctc_loss")
def ctc_loss(call: RuleContext) -> Any:
    """Log-probabilities are [time, n, class]; the op itself gives every sample its labels and its lengths."""
    a, p = call.algebra, call["log_probs"]
    seen = collapse(a.scan("path", p, [0, 2]), [0, 2], False)
    if any(
        "predictions" in m.sources
        or (m.depends_on_batch and m.sample_dim() != 0 and not m.sources <= a.constant)
        for m in call.marks[1:]
    ):
        return [mixed(call, s, "no rule") for s in call.shapes]
    own = shared(seen.shape, "labels", (), [0])
    loss = a.pointwise((call.name, call["blank"], call["zero_infinity"]), seen, own)
    return [loss, *(window_result(loss, s, 1) for s in call.shapes[1:])]
