"""Errors of the package, and the long messages that teach.

A message states the rule, the offending value, and the remedy. Nothing is raised from here.
"""


class UnbatchError(Exception):
    """Base class of everything this package raises on purpose."""


class InputError(UnbatchError, ValueError):
    """The call itself is wrong: shapes, dtypes, devices, names."""


class CaptureError(UnbatchError, RuntimeError):
    """The computation could not be recorded."""


MSG_NOT_SCALAR = (
    "The loss must be a scalar tensor, because its gradient is what gets split over samples; it returned {value}. "
    "Reduce it, e.g. `lambda p, y: loss(p, y).mean()`, or pass reduction='mean' to the loss."
)
MSG_NOT_TENSOR = "{what} must be a tensor or a pytree of tensors; got {value}. Convert it with torch.as_tensor first."
MSG_SIZES = (
    "Every per-sample input and target needs the same number of samples; {first} has {n} along axis {axis}, "
    "{other} has {m} along axis {other_axis}. If one of them is not per-sample, say so: in_dims=(0, None)."
)
MSG_NO_AXIS = (
    "{what} has shape {shape} and no axis {axis} to hold samples. Give it a batch axis, or pass an `in_dims` pytree "
    "with None for tensors that are not per-sample."
)
MSG_NO_BATCH = "No input is per-sample: every entry of in_dims is None. At least one input must carry the sample axis."
MSG_EMPTY = "{what} holds no samples (shape {shape}). Statements about samples need at least one."
MSG_NAN = (
    "{what} contains {count} values that are NaN. Comparing runs cannot work with them; drop or impute these samples "
    "(first at sample {sample})."
)
MSG_DEVICE = "{what} is on {device}, the model's parameters are on {model}. Move one of them: x.to({model!r})."
MSG_NO_LOSS = (
    "Neither a loss nor a model that returns one: the model's output {value} has no scalar `loss`. "
    "Pass Problem(model, loss, (X, y)), or inputs (such as labels) with which the model returns its own loss."
)
MSG_NO_PARAMETERS = (
    "No parameter requires a gradient, so there is nothing to take the gradient by. "
    "Set `p.requires_grad_(True)` for the parameters you mean. Structure questions still work."
)
MSG_MODEL_FAILED = (
    "The model or the loss raised {kind} on this batch: {value}. Nothing was changed. The call was {call}."
)
MSG_META = (
    "Parameter {name!r} is on the meta device and has no values. Materialise the model first, e.g. "
    "`model.to_empty(device='cpu')` followed by loading or initialising the weights."
)
MSG_UNKNOWN_RULE = (
    "There is no op named {value!r} to register a rule for; pass an OpOverload such as torch.ops.my.op.default."
)
MSG_RULE_TAKEN = "{value} already has a rule; pass replace=True to override it."
