"""Why a structure does not hold, and what to do about it, in words.

One entry for each kind of culprit: how samples are mixed at a step (as the rules call it), or what
else stands in the way. Which step is a culprit is decided where verdicts are judged.
"""

from __future__ import annotations

from unbatch.analysis.rules.registry import NO_RULE
from unbatch.analysis.verdict import Culprit
from unbatch.capture.graph import HostRead
from unbatch.capture.steps import Step

# The keys are the words with which rules say how samples became mixed, and a few kinds that only
# the verdicts know: "statistic", "group", "long", "broadcast", "uneven", "place", "nothing",
# "hidden", "escape" and "unfaithful". A rule from outside may use words of its own; they are shown
# as they are.
WHY = {
    "statistic": "a statistic over all samples ({size} numbers) flows back into every sample",
    "group": "statistics over groups of {samples} samples ({size} numbers) flow back into the "
    "samples of the group",
    "long": "a statistic with as many entries as there are samples flows back into every sample",
    "pairwise": "values of different samples are combined with each other",
    "unsymmetric": "values of different samples are combined with weights that depend on their "
    "position in the batch",
    "ordered": "a computation runs along the axis that carries the samples",
    "broadcast": "tensors of the shapes {shapes} are broadcast, which combines every sample with "
    "every other",
    "looked up": "an index that depends on data picks values from other samples",
    "position": "the position of an extreme value in the batch is used",
    "order": "the order of the samples by their values is used",
    "scattered": "values of different samples are written to the same place",
    "written through a view": "values of different samples are written to the same memory",
    "joined": "values of different samples are joined",
    "data-dependent shape": "how many values there are depends on the data",
    "resized": "memory is reinterpreted in another size",
    "assumed": "the output of something declared independent has no sample axis",
    NO_RULE: "the op has no rule and no known decomposition, so nothing is known about what it "
    "does to samples",
    "uneven": "what is done to a sample depends on its index in the batch",
    "own terms": "the loss is a sum with one term for each sample, and these are not one function: "
    "something in them goes by the index in the batch",
    "place": "slice n of the prediction belongs to another sample than n",
    "nothing": "the model returns no tensor that the loss could read",
    "hidden": "the loss reads what is in an object that the model returns ({what}), and PyTorch "
    "does not open it: which of its tensors are predictions is not known",
    "escape": "Python reads a value that depends on the batch ({how}); what follows may depend on "
    "it",
    "unfaithful": "on another batch the recorded computation gives other values than the model: "
    "something steers it that was not seen",
}


# What to do about each kind; for kinds that are not listed the default.
REMEDY = {
    "statistic": "Evaluate with fixed statistics (`.eval()`), or normalise within a sample "
    "(GroupNorm, LayerNorm); sums and the GGN stay exact as they are.",
    "group": "Same as for batch norm: `.eval()` or a norm within the sample; within a group sums "
    "stay exact.",
    "nothing": "Return the predictions as tensors.",
    "hidden": "Return tensors, in a tuple, list or dict, and make the object of them in the loss; "
    "or register its class (`torch.utils._pytree.register_dataclass`).",
    "escape": "Keep it a tensor (`torch.where` in place of `if`), or declare that the module which "
    "reads it is harmless: `unbatch.assume_independent(module)`.",
    NO_RULE: "Register a rule (`unbatch.register_rule(op, rule)`) or declare it: "
    "`unbatch.assume_independent(op)`.",
    "own terms": "Hand over what differs between samples (labels, weights, masks) as a part of the "
    "batch: `Problem(model, loss, (X, y))`, where y may be a dict or a tuple.",
    "uneven": "Draw what differs between samples from the inputs, not from the index.",
    "place": "Return predictions in the order of the inputs, samples on axis 0.",
    "unfaithful": "Look for Python state, numpy or a branch in the forward pass and keep it in "
    "tensors.",
    "ordered": "Check which axis carries the samples (batch_first, dim=, sample_dims): what reads "
    "neighbours along it, as convolutions, recurrences and attention do, makes the whole of them "
    "one sample.",
    "broadcast": "If each prediction is meant for its own target, give both the same shape, for "
    "instance by `y.unsqueeze(1)` or `predictions.squeeze(1)`.",
    "data-dependent shape": "Use a mask of fixed shape in place of a selection, or "
    "`unbatch.assume_independent(...)`.",
}


DEFAULT_REMEDY = (
    "Check the axes and the order of `view` and `reshape`; if it is meant, ask for per-component "
    "quantities."
)


def culprit(step: Step, kind: str, **facts: object) -> Culprit:
    """Return a step as a culprit; ``facts`` fill in what the text leaves open.

    ``kind``: a key of ``WHY``, or a reason in the words of a rule from outside.
    """
    # A reason without braces takes any facts, so that all kinds can be called alike.
    why = WHY.get(kind, kind).format(**facts)
    return Culprit(step.module, step.name, step.where, why, REMEDY.get(kind, DEFAULT_REMEDY))


def host_read_culprit(read: HostRead) -> Culprit:
    """Return a host read as a culprit."""
    why = WHY["escape"].format(how=read.how)
    return Culprit(read.module, "escape", read.where, why, REMEDY["escape"])
