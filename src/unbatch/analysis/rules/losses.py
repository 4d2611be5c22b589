"""Rules for loss ops: a loss for each sample, reduced as the op says.

Losses that PyTorch composes of simpler ops (cross-entropy, for one) need no rule here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from unbatch.analysis.domain.ownership import (
    MIXED,
    SHARED,
    Array,
    Ownership,
    code,
    collapse,
    index_along,
    mix,
    shared,
    spell_out,
    total,
)
from unbatch.analysis.rules.layers import with_new_dims
from unbatch.analysis.rules.registry import (
    EVERY,
    NO_RULE,
    RuleContext,
    all_mixed,
    filled,
    known_for_every_batch,
    rule,
    summary,
)
from unbatch.analysis.rules.windows import window_result

# What PyTorch's function is called, with Python's part of it and without.
CROSS_ENTROPY = ("cross_entropy", "cross_entropy_loss")

NONE, MEAN = 0, 1  # of PyTorch's numbers for reductions


def reduced(call: RuleContext, loss: Ownership, reduction: int) -> Ownership:
    """Return a loss per element, reduced as its ``reduction`` argument says."""
    if reduction == NONE or not loss.shape:
        return loss
    if reduction == MEAN:
        return call.algebra.reduce("mean", loss)
    return call.algebra.reduce("sum", loss)


@rule(
    "mse_loss smooth_l1_loss huber_loss binary_cross_entropy soft_margin_loss l1_loss "
    "poisson_nll_loss hinge_embedding_loss",
    counted="reduction beta delta",
)
def elementwise_loss(call: RuleContext) -> Ownership:
    """One loss per entry of the predictions."""
    name = (call.name, repr(call["beta"] or call["delta"]))
    loss = call.algebra.pointwise(name, *call.named("self", "input", "target"))
    return reduced(call, _weighted(call, loss, call.named("weight")), call["reduction"])


def _weighted(call: RuleContext, loss: Ownership, weights: Sequence[Ownership]) -> Ownership:
    """Return losses times their weight, if there is one: a factor, as one outside of the op is."""
    for weight in weights:
        loss = call.algebra.pointwise((call.name, "weight"), loss, weight, kind="scale")
    return loss


@rule(
    "nll_loss_forward",
    "nll_loss2d_forward",
    "nll_loss_nd",
    counted="ignore_index reduction",
    apart={1: EVERY},
)
def nll_loss(call: RuleContext) -> Any:
    """Pick the target's entry; the mean divides by the weights of the targets.

    With a weight for each class, or with ignored labels, that sum depends on the targets.
    """
    a, p, y, weight = call.algebra, call["self"], call["target"], call["weight"]
    classes = 1 if len(p.shape) > 1 else 0  # [n, c, ..], or [c] for one sample
    # Plain classes need no scan: the label picks one of them, whichever, and all are the sample's.
    if p.explicit([classes]):
        p = a.scan("classes", p, [classes])
    picked = collapse(p.with_key("pick"), [classes], False)
    weights = []
    if weight is not None:
        weights.append(summary(call, "classes", weight, [0]))
    ignored = call["ignore_index"]
    loss = a.pointwise(("nll", ignored), picked, y)
    # The weight of the target's class, and none for a label that is ignored.
    amounts = a.pointwise(("weight", ignored), y, *weights)
    if weights:
        loss = _weighted(call, loss, [amounts])
    depends = weight is not None or ignored >= 0 or _ignored_unevenly(call, ignored)
    # PyTorch's default label to ignore is negative: it is no class, and may not occur at all.
    amount = shared((), "count")
    if depends and amounts.shape:
        amount = a.reduce("sum", amounts)
    if call["reduction"] == NONE or not loss.shape:
        return [loss, amount]
    # The mean of PyTorch divides by the sum of weights, and not by the number of samples.
    out = a.reduce("sum", loss)
    if call["reduction"] == MEAN:
        out = a.pointwise("div", out, amount, kind="scale")
    return [out, amount]


def _ignored_unevenly(call: RuleContext, number: int) -> bool:
    """Tell whether more labels are ignored in one sample than in another.

    A language model ignores the last of each, and then every sample has equally many.
    """
    y, samples = call["target"], call.algebra.samples

    def uneven(values: Any) -> bool:
        if values is None:
            return True
        owners = np.broadcast_to(y.owner, y.shape)[np.asarray(values) == number]
        if not ((owners >= 0) & (owners < samples)).all():
            return True  # not each of one sample
        return np.unique(np.bincount(owners, minlength=samples)).size > 1

    return call.sees("target", uneven)


@rule(
    "multi_margin_loss",
    "multilabel_margin_loss_forward",
    "multilabel_margin_loss",
    counted="p margin reduction",
    apart={1: "self"},
)
def margin_loss(call: RuleContext) -> Any:
    """All classes of a sample are compared with its target, or with each of its targets."""
    p, y = call["self"], call["target"]
    last = [len(p.shape) - 1]
    classes = summary(call, "classes", p, last)
    if len(y.shape) != len(classes.shape):
        y = summary(call, "classes", y, last)
    name = (call.name, repr(call["p"]), repr(call["margin"]))
    loss = call.algebra.pointwise(name, classes, y)
    if call["weight"] is not None:
        # Of the target's class.
        weight = summary(call, "classes", call["weight"], [0])
        loss = _weighted(call, loss, [call.algebra.pointwise("weight", y, weight)])
    # Which classes are targets, of the forms that return it.
    is_target = [with_new_dims(y, shape, len(y.shape), "target") for shape in call.shapes[1:]]
    return [reduced(call, loss, call["reduction"]), *is_target]


@rule("_ctc_loss", counted="blank zero_infinity")
def ctc_loss(call: RuleContext) -> Any:
    """Log-probabilities are [time, n, class]; the op gives every sample its labels and lengths."""
    paths = summary(call, "path", call["log_probs"], [0, 2])
    labels = []
    for m in call.tensors[1:]:
        own = _own_labels(call, _by_sample(call, m), paths.shape)
        if own is None:
            return all_mixed(call, NO_RULE)
        labels.append(own)
    for lengths in ("input_lengths", "target_lengths"):
        # In a loss, targets count as constants, and lengths with them.
        if not isinstance(call[lengths], Ownership) and not call.algebra.constant:
            labels.append(_listed(call[lengths]))
    name = (call.name, call["blank"], call["zero_infinity"])
    loss = call.algebra.pointwise(name, paths, *labels)
    return [loss, *(window_result(loss, shape, 1) for shape in call.shapes[1:])]


def _by_sample(call: RuleContext, m: Ownership) -> Ownership:
    """Return labels that are joined in one vector, [n t], with those of a sample as one: [n].

    Others are returned as they are, and so are those of which lengths do not say whose they are.
    """
    lengths = call["target_lengths"]
    if isinstance(lengths, Ownership):
        lengths = call.values.get("target_lengths")
    if m is not call["targets"] or len(m.shape) != 1 or lengths is None or not _has_places(m):
        return m
    flat = spell_out(m)
    owner, key = np.broadcast_to(flat.owner, m.shape), np.broadcast_to(flat.key, m.shape)
    owners = []
    keys = []
    start = 0
    for length in lengths:
        run = slice(start, start + length)
        owners.append(_one_owner(owner[run]))
        keys.append(key[run])
        start += length
    # Fewer labels than others have are no other function: how many there are is an argument, too.
    whole = max(keys, key=len)
    is_argument = isinstance(call["target_lengths"], Ownership)
    if is_argument and all(np.array_equal(k, whole[: len(k)]) for k in keys):
        keys = [whole] * len(keys)
    by_sample = [total(mix(k, index_along(len(k), 0, 1)), 0) for k in keys]
    return replace(flat, shape=(len(keys),), owner=np.array(owners), key=np.array(by_sample))


def _one_owner(owners: Array) -> int:
    """Return whose all labels of a run are; nobody's where there are none, or nobody owns them."""
    names = np.unique(owners)
    if len(names) > 1:
        return MIXED
    return int(names[0]) if len(names) else SHARED


def _has_places(m: Ownership) -> bool:
    """Tell whether labels are those of samples, or of a batch, by their places in it."""
    return m.owned or bool(m.statistics) or "targets" in m.sources


def _own_labels(call: RuleContext, m: Ownership, shape: tuple[int, ...]) -> Ownership | None:
    """Return all labels of each sample as one, or a constant in place of what no sample owns.

    None where they may be those of others.
    """
    if "predictions" in m.sources:
        return None
    # In a loss, lengths are constants as targets are, whatever their numbers.
    is_loss = bool(call.algebra.constant)
    known = known_for_every_batch(m) and not is_loss
    if m.sample_dim() == 0 or known or (_has_places(m) and not m.owned and not m.coupled):
        return summary(call, "labels", m, range(1, len(m.shape)))
    if m.owned or m.coupled or (m.depends_on_batch and not call.algebra.is_constant(m)):
        return None
    # Targets, which count as constants: of which kind is the same for all samples.
    return replace(shared(shape, "labels", (), [0]), sources=m.sources, statistics=m.statistics)


def _listed(lengths: Sequence[int]) -> Ownership:
    """Numbers of a list as a shared vector, of which equal entries are one function."""
    keys = np.stack([code("length", length) for length in lengths])
    return replace(shared(keys.shape, "lengths", (), [0]), key=keys)


@rule("eq", "ne", counted=EVERY, ignored="self")
def comparison(call: RuleContext) -> Ownership:
    """Inside PyTorch's cross-entropy, whether a label is the one to ignore.

    None is, where that number does not occur. What a program asks itself is no such default.
    """
    other = call["other"]
    is_number = not isinstance(other, Ownership)
    if call.function in CROSS_ENTROPY and is_number and not call.occurs("self", other):
        return filled(call.shape, "nothing ignored")
    return call.algebra.pointwise(call.title, *call.tensors)
