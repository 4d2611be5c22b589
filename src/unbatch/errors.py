"""Errors of the package, and the long messages that teach.

A message states the rule, the offending value, and the remedy. Nothing is raised from here.
"""

from __future__ import annotations

import os
import sys
import warnings
from types import FrameType

HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep


STRICT = False  # let errors inside rules through instead of treating the op as unknown (for tests)


class UnbatchError(Exception):
    """Base class of everything this package raises on purpose."""


class InputError(UnbatchError, ValueError):
    """The call itself is wrong: shapes, dtypes, devices, names."""


class StructureError(UnbatchError, RuntimeError):
    """What is asked for does not exist, because the loss lacks the structure that it rests on."""


class CaptureError(UnbatchError, RuntimeError):
    """The computation could not be recorded."""


class StaleError(UnbatchError, RuntimeError):
    """Parameters or data have changed under something that was made from them."""


class ConvergenceError(UnbatchError, RuntimeError):
    """An iteration did not reach the accuracy that was asked for."""


class MixedSamplesWarning(UserWarning):
    """A number is exact, but it is no statistic over samples, because samples mix or the loss is no sum over them.

    To make it an error: ``warnings.simplefilter("error", unbatch.MixedSamplesWarning)``.
    """


class VanishingCurvatureWarning(UserWarning):
    """The Gauss-Newton matrix is zero, because the loss is linear in its predictions, or in what was taken for them."""


class UnregisteredParameterWarning(UserWarning):
    """Tensors that require a gradient take part in the loss, but are no parameters of the problem."""


def warn(message: str, category: type[Warning]) -> None:
    """Warn at the line from which the package was called."""
    frame: FrameType | None = sys._getframe(1)
    level = 2
    while frame is not None and frame.f_code.co_filename.startswith(HERE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


class MonitorWarning(UserWarning):
    """A monitor could not answer a question, or could not write the answer down; the training goes on.

    To stop there instead: ``warnings.simplefilter("error", unbatch.MonitorWarning)``.
    """


MSG_NOT_SCALAR = (
    "The loss must be a scalar tensor, because its gradient is what gets split over samples; it returned {value}. "
    "Reduce it, e.g. `lambda p, y: loss(p, y).mean()`, or pass reduction='mean' to the loss."
)


MSG_NOT_TENSOR = "{what} must be a tensor or a pytree of tensors; got {value}. Convert it with torch.as_tensor first."


MSG_SIZES = (
    "Every per-sample input and target needs the same number of samples; {first} has {n} along axis {axis}, "
    "{other} has {m} along axis {other_axis}. If one of them is not per-sample, say so by None in its place: "
    "in_dims=(0, None) where it is y, in_dims=((0, None), 0) where it is the second of two inputs."
)


MSG_NO_AXIS = (
    "{what} has shape {shape} and no axis {axis} to hold samples. Give it a batch axis, or pass an `in_dims` pytree "
    "with None for tensors that are not per-sample."
)


MSG_FOLD = (
    "sample_dims takes two or more different axes that together tell samples apart, such as (0, 1) for the tokens of "
    "sentences or (0, -2, -1) for pixels; got {value!r}. For samples along one axis there is in_dims."
)


MSG_FOLD_SHAPE = (
    "sample_dims={dims} with sizes {sizes} says where samples lie in every tensor of X and y (in front, where one has "
    "fewer axes), but {what} has a tensor of shape {shape}."
)


MSG_FOLD_OUTPUT = (
    "The model returns tensors of shapes {shapes}, of which none has the samples that sample_dims={dims} tells apart, "
    "of sizes {sizes}. Predictions need an entry for every sample."
)


MSG_FOLD_CUT = (
    "The model computes its own loss, which is cut at values of shapes {shapes}; they do not have the samples that "
    "sample_dims={dims} tells apart, of sizes {sizes}, or not in a known order. Let the model return its predictions "
    "and pass the loss: Problem(model, loss, (X, y), sample_dims={dims})."
)


MSG_FOLD_BOTH = "sample_dims={dims} says where all samples lie; leave out in_dims={in_dims!r}."


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


MSG_NO_PARAMETERS_KNOWN = (
    "The model has no parameters that it knows of, so there is nothing to take the gradient by. A function as model "
    "takes them as parameters={name: tensor} and is called as f(parameters, X); pass the module itself where there is "
    "one. Modules in a plain list are not registered: use nn.ModuleList. Structure questions still work."
)


MSG_UNREGISTERED = (
    "{count} that require a gradient take part without being parameters of this problem: {places}. What of the "
    "gradient is theirs is in no row and no matrix. Register them with the model (nn.ModuleList in place of a list, an "
    "nn.Module as loss), pass a function f(parameters, X) with parameters={{name: tensor}}, or `requires_grad_(False)`."
)


MSG_DETACHED = (
    "The loss is connected to no parameter, so backward() would raise, and there is no gradient to take apart: its "
    "predictions were cut off by detach(), .data, numpy or torch.no_grad(){place}. Keep the way to the loss attached."
)


MSG_NO_PARAMETERS = (
    "No parameter requires a gradient, so there is nothing to take the gradient by. "
    "Set `p.requires_grad_(True)` for the parameters you mean. Structure questions still work."
)


MSG_MODEL_FAILED = "The model or the loss raised {kind} on this batch: {value}. Nothing was changed. It was {call}."


MSG_SWAPPED = "Are model and loss swapped? Problem takes the model first; here it is the loss that has parameters."


MSG_META = (
    "{what} {name!r} is on the meta device and has no values. Materialise the model first, e.g. "
    "`model.to_empty(device='cpu')` followed by loading or initialising the weights."
)


MSG_UNKNOWN_RULE = "There is no op named {value!r} to register a rule for; pass an OpOverload such as torch.ops.my.op.default."


MSG_RULE_TAKEN = "{value} already has a rule; pass replace=True to override it."


MSG_NOT_COPY = (
    "There are no rows by copy here: at {place} samples meet in a way that gives each of them no use of the parameters "
    "of its own. Ask for by='component', which exists for every loss with a sample axis on its predictions."
)


MSG_NOT_FROZEN = (
    "There are no rows with frozen statistics here: at {place} samples listen to each other by more than statistics, "
    "so holding those constant does not separate them. Ask for by='component'."
)


MSG_NO_SUCH_PARAMETER = (
    "{value} matches no parameter of this problem. parameters= takes names, globs such as 'layers.*.weight', or the "
    "tensors themselves; there are {names}."
)


MSG_FIXED_PARAMETER = "Parameter {name!r} does not require a gradient. Set `requires_grad_(True)` on it, or leave it out of parameters=."


MSG_BY = "by is 'component', 'copy' or 'frozen'; got {value!r}."


MSG_NO_ROWS = (
    "No prediction has a sample axis, so there is nothing to take rows of: the predictions have shapes {shapes} for "
    "{n} samples. Return one prediction per sample; `problem.gradient()` gives the sum."
)


MSG_NOT_REPLAYED = (
    "Rows by {by!r} need the derivatives of the recorded computation, which cannot stand for the model ({why}); where "
    "samples mix they cannot be had by running the model. Ask for by='component'."
)


MSG_INNER_LOSS = (
    "The model computes its own loss, and the derivatives of the recorded computation cannot stand for it; where the "
    "model itself ran, its predictions could not be told ({why}). Return the predictions and pass the loss: "
    "Problem(model, loss, (X, y))."
)


MSG_OUT = (
    "out= does not fit: {what}. It takes an earlier result of the same question, or a mapping from parameter name to a "
    "tensor of shape [N, *param] of the parameter's dtype and device."
)


MSG_MEMORY = "memory= is a number of bytes greater than zero; got {value!r}."


MSG_QUANTITY = (
    "compute takes quantities such as unbatch.SquaredNorms() or unbatch.Variance(), at least one; got {value!r}. "
    "For the rows themselves call gradients()."
)


MSG_MIXED_MOMENT = (
    "{what}: the number is exact for the {kind} rows of this batch of {n}, but it is no statistic over samples. For "
    "that the loss lacks {lost}; see problem.structure. The rows are parts of one sum: in another batch the same "
    "samples would have others."
)


MSG_HISTOGRAM = (
    "A histogram takes at least one bin and low < high; got bins={bins}, low={low}, high={high}."
)


MSG_MAX_NORM = "max_norm is a number greater than zero, in the scale of the rows; got {value!r}."


MSG_NO_SELECTION = (
    "parameters= names nothing; got {value!r}. It takes names, globs such as 'layers.*.weight', or the tensors "
    "themselves; there are {names}. Leave it out for all that require a gradient."
)


MSG_VECTOR = "A vector of parameters by name needs {name!r} in shape {shape}; got {got}. Pass one tensor for each parameter."


MSG_OPERATOR_VECTOR = "This operator takes a vector of length {size}, or a matrix with so many rows; got {got}, and {what}."


MSG_OPERATOR_SHAPES = (
    "Operators of the shapes {shapes} cannot be used together: to {what} them they have to fit."
)


MSG_NO_SECOND_DERIVATIVE = (
    "The loss has no second derivative by the predictions in PyTorch ({error}), so there is no Gauss-Newton matrix to "
    "be had from it. Use a loss that can be differentiated twice, or one written in terms of such functions."
)


MSG_BACKWARD_INSIDE = (
    "The loss takes derivatives ({op}, {where}), and it draws noise or reads more of the model than its predictions. "
    "So it would have to be replayed, but a recorded backward pass does not have the derivatives of the one that ran. "
    "Take the derivatives in the model and return them beside the predictions, or hand over the noise with the data."
)


MSG_NO_GRAPH = (
    "{names} comes with a backward pass of its own, whose derivative in PyTorch is not how the gradient changes with "
    "the predictions"
)


MSG_RECURRENT_DROPOUT = (
    "{place} drops entries between its layers (dropout={dropout}) in a kernel of the GPU whose random state cannot be "
    "set, so nothing that it draws can be drawn again. Give it dropout=0, or build it of layers of its own with "
    "nn.Dropout between them; or disable the kernel: torch.backends.cudnn.flags(enabled=False)."
)


MSG_RECURRENT_EVAL = (
    "{place} runs in eval mode in a kernel of the GPU that has no backward pass there, in PyTorch as well. Keep this "
    "module in train mode, which changes nothing where its dropout is 0; or disable the kernel: "
    "torch.backends.cudnn.flags(enabled=False)."
)


MSG_NO_TANGENT = (
    "Tangents cannot be pushed through {place}: PyTorch has no forward mode and no second derivative for it ({error}). "
    "Products with the Gauss-Newton matrix need one of them; factors, diagonals and Gram matrices do not."
)


MSG_VANISHING = (
    "On this batch the loss is linear in {cut} ({shapes}), so the Gauss-Newton matrix is zero: it is J^T H J, "
    "and H, the second derivative of the loss, vanishes there. {remedy}"
)


VANISHING_INSIDE = (
    "the values that were taken for its predictions, the last ones that parameters made",
    "To cut the model elsewhere, let it return its logits and pass the loss beside it: Problem(model, loss, (X, y)).",
)


VANISHING = (
    "its predictions, as absolute, hinge and, far out, Huber losses are, and nll_loss in log-probabilities",
    "For curvature take a loss that bends there, or cut elsewhere: cross_entropy in logits has what nll_loss has not.",
)


MSG_NO_BLOCKS = (
    "The second derivative of the loss by predictions of the shapes {shapes} is too large to be taken apart, or the "
    "loss rounds it too coarsely (bfloat16) for its form to be seen, so its columns are not to be had. Products "
    "(G @ v) and what is made of them are: see unbatch.spectra."
)


MSG_NO_COMPONENTS = (
    "{what} would need a loss that is a sum over the samples (reduction: {why}, see problem.structure): the second "
    "derivative of this one does not fall into parts that belong to samples. What belongs to the whole batch exists."
)


MSG_NOT_POSITIVE = (
    "{what} need a second derivative of the loss that is positive semi-definite; its lowest eigenvalue here is "
    "{lowest:.3g}. Ask for the exact quantity, which has signs."
)


MSG_GGN_STALE = (
    "Parameters, buffers or data have changed since this matrix was made from them, and products would mix the two. "
    "Ask for it again: `problem.ggn()`."
)


MSG_DAMPING = (
    "The damping has to make every eigenvalue that is used positive: one number, or one for each of the {count} "
    "directions, greater than {lowest:.3g} below zero; got {value}."
)


MSG_NO_DAMPING = (
    "By the Gram matrix a system is solved with damping only: (G + δI) has no inverse at δ = 0 unless G has full rank. "
    "Pass damping= other than zero, or method='cg'."
)


MSG_SINGULAR = (
    " At damping=0 there is a solution only where b is in the range of G, whose rank is at most {rank} of {size}: pass "
    "damping= greater than zero."
)


MSG_METHOD = "method is 'woodbury' or 'cg', or left out; got {value!r}."


MSG_NOT_DEFINITE = (
    "Conjugate gradients need a positive definite matrix; with damping={value} this is none."
)


MSG_NOT_CONVERGED = (
    "The linear system was not solved: after {iterations} iterations of {method} the relative residual is "
    "{residual:.2e} where rtol={rtol:.2e} was asked for. Raise max_iterations, rtol or the damping, or pass info=True "
    "to take the result as it is, with its residual."
)


MSG_WHICH = (
    "{value!r} is none of the ways: eigenpairs come by 'largest' or 'magnitude', traces by 'xtrace', 'hutch++' or "
    "'hutchinson'."
)


MSG_BLOCKS = "blocks is 'parameter', 'module', or a list of groups of parameters, each of them in one group; got {value!r}."


MSG_SAMPLES = "samples= takes numbers of samples from 0 to {last}, at least one; got {value!r}."


MSG_BY_OF_COLUMNS = (
    "A Gauss-Newton matrix is made of derivatives of predictions: by={value!r} has none. Ask for by='component', or "
    "for by='frozen', with batch statistics held constant, which is another matrix."
)


MSG_COMPLEX = (
    "Parameter {name!r} is complex ({dtype}), and the Gauss-Newton matrix is that of real parameters. Leave it out "
    "with parameters=, or make its real and imaginary parts (torch.view_as_real) the parameter; gradients take it as "
    "it is."
)


MSG_UNBIASED = (
    "What random signs say is missing is known for the whole diagonal, not for every component. Ask for one of "
    "per_component=True and unbiased=True."
)


MSG_DRAWS = "{what} is a whole number of at least {least}; got {value!r}."


MSG_SQUARE = (
    "Spectra are those of a symmetric operator of shape [D, D] with D > 0 and real floating-point entries; this one "
    "has shape {shape} and dtype {dtype}. For a factor V of other shape pass the operator V @ V.T."
)


MSG_NOT_SYMMETRIC = (
    "This operator is not symmetric: two products disagree by {gap:.1e} of its norm. Pass a symmetric one, such as "
    "0.5 * (A + A.T)."
)


MSG_NOT_FINITE = (
    "A product with this operator has entries that are not finite. Look for NaN or infinite values in parameters and "
    "data, or for an overflow: products in float64 have more room."
)


MSG_POSITIVE = "{what} is a finite number greater than zero; got {value!r}."


MSG_EIGENPAIRS = (
    "The eigenpairs were not found: after {products} products {near} of {k} have a residual within rtol={rtol:.2e} of "
    "the norm (the largest is {worst:.2e}), and the search for overlooked ones {found}. Raise max_products, basis or "
    "rtol, or pass info=True to take the result as it is, with its residuals."
)


MSG_GIVEN = "{call} takes {takes}; got {value}. Pass the problem itself: {call}({arguments})."


MSG_REPORT_FILE = (
    "The report cannot be written to {path}: {reason}. Name a file that can be written (`--output FILE` in a shell); "
    "folders above it are made where they are missing."
)


MSG_MONITOR_FILE = (
    "The monitor cannot write to {path}: {reason}. Pass path= a file that can be written and that holds nothing, or "
    "what a monitor wrote before; the folders above it are made where they are missing."
)


MSG_MONITOR_QUANTITY = "A monitor takes quantities such as unbatch.SquaredNorms(), each once, or their names, out of {names}; got {value!r}."


MSG_MONITOR_COPY = (
    "{names} of a Gauss-Newton matrix, which is made of derivatives of predictions: by='copy' has none. Ask for "
    "by='component', or without, quantities={rest!r}."
)


MSG_MONITOR_EVERY = (
    "every= is 'auto', or how many calls there are from one question to the next, a whole number of at least 1; got "
    "{value!r}."
)


MSG_MONITOR_STEP = "step= is a whole number, such as that of the optimizer step; got {value!r}."


MSG_MONITOR_TARGETS = (
    "The loss {loss} takes targets beside the predictions, and step was given {given} alone. Pass them apart, "
    "monitor.step(X, y), of a pair monitor.step(*batch). A model that computes its own loss from all of it goes "
    "without one: Monitor(model)."
)


MSG_MONITOR_NO_TARGETS = (
    "The loss {loss} takes predictions alone, and step was given targets: {given}. Leave them out."
)


MSG_MONITOR_OWN_LOSS = (
    "A monitor without a loss takes what a model needs to compute its own, targets among it: monitor.step(inputs); got "
    "targets apart: {given}. For a loss beside the model pass it, Monitor(model, loss)."
)


MSG_MONITOR_FAILED = (
    "The monitor could not tell {what} at step {step} (training goes on; monitor.failed counts, this is said once): "
    "{error}"
)


MSG_MONITOR_WRITE = "The monitor could not write down step {step} (training goes on): {error}"


MSG_MONITOR_SPLIT = (
    "With a loss a monitor takes a pair (X, y), and this batch is {given}. Say how to make one of it: "
    "monitor_callback(monitor, split=lambda batch: (batch['x'], batch['y'])), for instance."
)


MSG_MONITOR_TRAINER = (
    "With Transformers' Trainer a monitor watches a model that computes its own loss, and this one was made with "
    "{loss}: leave it out, Monitor(model)."
)


MSG_MONITOR_UNSEEN = (
    "Training goes on without the monitor's model being called, so there is nothing to ask about. Make the monitor "
    "with the model that the Trainer is given: Monitor(model)."
)


MSG_EXTRA = "{what} needs {package}, which is not installed. Install it with `pip install 'unbatch[{extra}]'`."


MSG_PROCESSES = (
    "The model or the loss talks to other processes, of which there are {others} ({op}{place}). Nothing says that "
    "they ask the same, and they would be waited for forever, so it was stopped there. SyncBatchNorm talks in train "
    "mode and not after .eval(); losses over all processes and parameters spread over them always do. Ask in a process "
    "of its own, or about a model that keeps to one: with BatchNorm in place of SyncBatchNorm, for instance."
)
