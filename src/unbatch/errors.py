"""Classes of errors and warnings, and the messages that several wings share or that run long.

A message states the rule, the offending value and the remedy, in this order where it can. Messages
are format strings that the caller fills in. Nothing is raised from here.
"""

from __future__ import annotations

import os
import sys
import warnings
from types import FrameType

# The folder of the package, by which a warning tells our frames from those of the user.
HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep


# Tests set this: an error inside a rule then propagates. Users get "unknown" for the op instead.
STRICT = False


# --- classes --------------------------------------------------------------------------------------


class UnbatchError(Exception):
    """Base class of everything this package raises on purpose."""


class InputError(UnbatchError, ValueError):
    """The call itself is wrong: shapes, dtypes, devices, names."""


class StructureError(UnbatchError, RuntimeError):
    """The requested quantity does not exist, because the loss lacks the structure it relies on."""


class CaptureError(UnbatchError, RuntimeError):
    """The computation could not be recorded."""


class BudgetError(UnbatchError, RuntimeError):
    """A question would take more memory or time than it may, or more memory than there is."""


class StaleError(UnbatchError, RuntimeError):
    """Parameters or data have changed since an object was made from them."""


class ConvergenceError(UnbatchError, RuntimeError):
    """An iterative method did not reach the requested accuracy."""


class MixedSamplesWarning(UserWarning):
    """A number is exact, but not a statistic over samples: samples mix, or the loss is not a sum.

    To make it an error: ``warnings.simplefilter("error", unbatch.MixedSamplesWarning)``.
    """


class VanishingCurvatureWarning(UserWarning):
    """The Gauss-Newton matrix is zero, because the loss is linear in its predictions.

    Of a model that computes its own loss: linear in the values that were taken for predictions.
    """


class UnregisteredParameterWarning(UserWarning):
    """Tensors that require a gradient take part in the loss, but are no parameters of the model."""


class ContradictedProofWarning(UserWarning):
    """A structure was proved, and a trial on another batch contradicts it: a bug of this package.

    The verdict is then what the trial leaves of it, "fails" or "unknown".
    """


class MonitorWarning(UserWarning):
    """A monitor could not compute a quantity, or could not write it down; the training goes on.

    To stop there instead: ``warnings.simplefilter("error", unbatch.MonitorWarning)``.
    """


def warn(message: str, category: type[Warning]) -> None:
    """Warn at the line of the user's code that called the package."""
    frame: FrameType | None = sys._getframe(1)
    level = 2
    while frame is not None and frame.f_code.co_filename.startswith(HERE):
        frame = frame.f_back
        level += 1
    warnings.warn(message, category, stacklevel=level)


# --- structures -----------------------------------------------------------------------------------


MSG_CONTRADICTED = (
    "{what} was proved, and a trial on another batch contradicts it ({detail}). {verdict}. "
    "This is a bug of unbatch{custom}: please report it, with the program."
)


# --- the batch: tensors, sample axes, devices -----------------------------------------------------


MSG_NOT_TENSOR = (
    "{what} must be a tensor or a pytree of tensors; got {value}. "
    "Convert it with torch.as_tensor first."
)


MSG_NO_INPUT = (
    "There is no tensor in X, so that nothing says how many samples there are; got {value}. For a "
    "model that draws its input, pass a tensor with a row for each sample, which may be of any "
    "numbers, and draw noise like it: `torch.randn(len(x), 8)`."
)


MSG_CLOSED_DATA = (
    "{what} is a {value} that holds an array or tensors, and its samples cannot be exchanged for "
    "others. Pass tensors, in a tuple, list or dict, and make the object of them in the model (in "
    "the loss, for y). If it is not per-sample, put None in its place: in_dims=((0, None), 0) for "
    "the second of two inputs."
)


MSG_SIZES = (
    "Every per-sample input and target needs the same number of samples; {first} has {n} along "
    "axis {axis}, {other} has {m} along axis {other_axis}. If one of them is not per-sample, put "
    "None in its place: in_dims=(0, None) for y, in_dims=((0, None), 0) for the second of two "
    "inputs; and unbatch.rows_of(index) if an index says whose its rows are."
)


MSG_NO_AXIS = (
    "{what} has shape {shape} and no axis {axis} to hold samples. Give it a batch axis, or pass an "
    "`in_dims` pytree with None for tensors that are not per-sample."
)


MSG_NO_BATCH = (
    "No input is per-sample: every entry of in_dims is None. At least one input must have a sample "
    "axis; pass its number in in_dims."
)


MSG_EMPTY = "{what} holds no samples (shape {shape}). Pass a batch of at least one sample."


MSG_NAN = (
    "{what} contains {count} values that are NaN (first at sample {sample}), so runs cannot be "
    "compared. Drop or impute these samples."
)


MSG_COMPOSITION = (
    "what an operation of a GPU is the same as has a result of shape {ours}, and the operation one "
    "of {own}; mend its function in capture/device_ops.py."
)


MSG_DEVICE = (
    "{what} is on {device}, the model's parameters are on {model}. "
    "Move one of them: x.to({model!r})."
)


# `fold`: several axes that together count samples, flattened into one.

MSG_FOLD = (
    "sample_dims takes two or more different axes that together count samples, such as (0, 1) for "
    "the tokens of sentences or (0, -2, -1) for pixels; got {value!r}. For samples along one axis "
    "use in_dims."
)


MSG_FOLD_SHAPE = (
    "sample_dims={dims} with sizes {sizes} must fit every tensor of X and y (in tensors with fewer "
    "axes, the leading ones), but {what} has a tensor of shape {shape}."
)


MSG_FOLD_OUTPUT = (
    "Predictions need an entry for every sample, but the model returns tensors of shapes {shapes}, "
    "none of which has the sample axes of sample_dims={dims}, of sizes {sizes}."
)


MSG_FOLD_CUT = (
    "The model computes its own loss, which is cut at values of shapes {shapes}; they do not have "
    "the sample axes of sample_dims={dims}, of sizes {sizes}, or not in a known order. Let the "
    "model return its predictions and pass the loss: "
    "Problem(model, loss, (X, y), sample_dims={dims})."
)


MSG_FOLD_BOTH = "sample_dims={dims} already names all sample axes; leave out in_dims={in_dims!r}."


# `views`: several entries of each sample along one axis.

MSG_VIEWS = (
    "Views takes how many views of each sample there are, at least 1, and the axis along which "
    "they are stacked: Views(2) or Views(2, dim=1); got {value!r}."
)


MSG_VIEWS_SIZE = (
    "{what} was declared to have its samples along {entry}, and there are {n} of them, but its "
    "shape is {shape}. Declare the axis that has them; None leaves that to the analysis."
)


MSG_ROWS_OF = (
    "rows_of takes the sample of each row, a vector of whole numbers from 0 on (below samples=, if "
    "that is stated), a PackedSequence, or ptr=, the [N + 1] places where the rows of samples "
    "begin and the last ones end; got {value}."
)


MSG_ROWS_SIZE = (
    "{what} was declared as {entry} of {n} samples, but its shape is {shape}. An index has an "
    "entry for each row, and belongs to one batch: make a problem for each batch. X and y may have "
    "entries of their own: in_dims=(for X, for y)."
)


MSG_ROWS_CHANGED = (
    "{what} gives rows to other samples than {entry}, which is declared for its rows. An index "
    "belongs to one batch: make a problem for each batch, with rows_of of its own index."
)


MSG_ROWS_UNCLEAR = (
    "The model returns {rows}, as many as an input has, but {why}. Say to which samples they "
    "belong: out_dims=unbatch.rows_of(..)."
)


MSG_ROW_NUMBERS = (
    "{what} was declared as {entry}, and its entries are numbers of rows (of nodes, as the ends of "
    "edges are), each of its own sample. Others in their place would join samples: put None in "
    "its place, and they are constants of this batch."
)


MSG_VIEWS_BOTH = "sample_dims={dims} already names all sample axes; leave out out_dims and Views."


MSG_OUT_DIMS = (
    "The model computes its own loss, which is cut at values of shapes {shapes}; none of them has "
    "the {n} samples along {entry}, or not in a known order. Let the model return its predictions "
    "and pass the loss: Problem(model, loss, (X, y), out_dims=..)."
)


MSG_OUT_DIMS_TREE = (
    "A model that computes its own loss takes a single entry for out_dims, an int or Views, as the "
    "values that its loss is cut at have no names; got {value!r}."
)


# --- model and loss -------------------------------------------------------------------------------


MSG_NOT_SCALAR = (
    "The loss must be a scalar tensor, because its gradient is split over samples; it returned "
    "{value}. Reduce it, e.g. `lambda p, y: loss(p, y).mean()`, or pass reduction='mean' to the "
    "loss."
)


MSG_NO_LOSS = (
    "Neither a loss nor a model that returns one: the model's output {value} has no scalar `loss`. "
    "Pass Problem(model, loss, (X, y)), or inputs (such as labels) with which the model returns "
    "its own loss."
)


MSG_MODEL_FAILED = (
    "The model or the loss raised {kind} on this batch: {value}. Raised by {call}. "
    "Your model is unmodified."
)


MSG_INNER_DERIVATIVE = (
    "Model and loss are given tensors of their own, and none of a closure. A derivative by the "
    "data is taken in the model, by the input that it was called with: `x = x.requires_grad_()`, "
    "then `torch.autograd.grad(u.sum(), x, create_graph=True)`; return it beside the predictions."
)


MSG_ITERATOR = (
    "The program takes the next item of {name!r}, an iterator of type {kind}, which cannot be put "
    "back afterwards. Keep what it yields in a list and step through that by index, or pass the "
    "item as part of the batch."
)


MSG_SYSTEM_RANDOM = (
    "The program draws random numbers of the system ({name!r}, a random.SystemRandom), and nobody "
    "can draw the same ones twice. Use torch's, or a random.Random with a seed."
)


MSG_LARGE_ARRAY = (
    "The program writes to an array of {size} bytes, which is too large to be copied beforehand: "
    "what was written to it has not been put back. Keep what forward writes in smaller arrays, or "
    "in tensors."
)


MSG_LAYOUT = (
    "The program writes to a tensor of layout {layout}, which cannot be put back afterwards. "
    "Write to a dense copy of it: `x.to_dense()`."
)


MSG_NOT_PUT_BACK = (
    "Something that the program changed could not be put back, as putting it back raised {kind}: "
    "{value}. All else is as it was."
)


MSG_SPARSE = (
    "{what} is a tensor of layout {layout}, whose samples cannot be exchanged for others. Pass a "
    "dense one: `x.to_dense()`; or one that is not per-sample, with None in its place: "
    "in_dims=((0, None), 0)."
)


MSG_SWAPPED = (
    "Are model and loss swapped? Problem takes the model first; "
    "here it is the loss that has parameters."
)


MSG_INNER_LOSS = (
    "The model computes its own loss, and the derivatives of the recorded computation do not agree "
    "with the model's; in a run of the model itself its predictions could not be identified "
    "({why}). Return the predictions and pass the loss: Problem(model, loss, (X, y))."
)


MSG_PROCESSES = (
    "The model or the loss communicates with other processes, {others} of them ({op}{place}). "
    "They may not issue the same collective, which would deadlock; refused. SyncBatchNorm "
    "communicates in train mode and not after .eval(); losses over all processes and sharded "
    "parameters always do. Run in a process of its own, or with a model that stays in one "
    "process: BatchNorm in place of SyncBatchNorm, for instance."
)


MSG_RECURRENT_DROPOUT = (
    "{place} drops entries between its layers (dropout={dropout}) in a GPU kernel whose random "
    "state cannot be set, so its noise cannot be drawn again. Set dropout=0, or stack single "
    "layers with nn.Dropout between them; or disable the kernel: "
    "torch.backends.cudnn.flags(enabled=False)."
)


MSG_RECURRENT_EVAL = (
    "{place} runs in eval mode in a GPU kernel that has no backward pass there, in PyTorch as "
    "well. Keep this module in train mode, which changes nothing where its dropout is 0; or "
    "disable the kernel: torch.backends.cudnn.flags(enabled=False)."
)


# --- parameters -----------------------------------------------------------------------------------


MSG_NO_PARAMETERS_KNOWN = (
    "The model has no registered parameters, so there is nothing to take the gradient by. For a "
    "function as model pass parameters={name: tensor}; it is called as f(parameters, X). Where "
    "there is a module, pass the module itself. Modules in a plain list are not registered: use "
    "nn.ModuleList. Structure questions still work."
)


MSG_NO_PARAMETERS = (
    "No parameter requires a gradient, so there is nothing to take the gradient by. "
    "Set `p.requires_grad_(True)` for the parameters you mean. Structure questions still work."
)


MSG_UNREGISTERED = (
    "{count} that require a gradient take part without being parameters of this problem: {places}. "
    "Their part of the gradient is in no row and no matrix. Register them with the model "
    "(nn.ModuleList in place of a list, an nn.Module as loss), pass a function f(parameters, X) "
    "with parameters={{name: tensor}}, or `requires_grad_(False)`."
)


MSG_DETACHED = (
    "The loss is connected to no parameter, so backward() would raise and there is no gradient: "
    "its predictions were cut off by detach(), .data, numpy or torch.no_grad(){place}. Remove the "
    "cut between parameters and loss."
)


MSG_META = (
    "{what} {name!r} is on the meta device and has no values. Materialise the model first, e.g. "
    "`model.to_empty(device='cpu')` followed by loading or initialising the weights."
)


MSG_LAZY = (
    "{what} {name!r} has no shape yet, as its layer is lazy. Run the model once on a batch first."
)


MSG_NESTED = (
    "{what} is a nested tensor, whose samples lie along no axis. Pass a padded tensor and a mask: "
    "`x.to_padded_tensor(0.0)`; or the rows of all samples, `x.values()`, and in in_dims to whom "
    "they belong: `unbatch.rows_of(ptr=x.offsets())`."
)


MSG_NESTED_INSIDE = (
    "The program makes a nested tensor of strided layout, which has no sizes and cannot be "
    "recorded. Make it jagged (`layout=torch.jagged`), or use a padded tensor and a mask."
)


MSG_NO_KERNEL = (
    "The answer needs {op} of a tensor of kind {backend}, for which PyTorch does not have it. Make "
    "such tensors dense where the program makes them: `x.to_dense()`, `x.to_padded_tensor(0.0)` or "
    "`x.dequantize()`."
)


MSG_NO_SUCH_PARAMETER = (
    "{value} matches no parameter of this problem. parameters= takes names, globs such as "
    "'layers.*.weight', or the tensors themselves; there are {names}."
)


MSG_FIXED_PARAMETER = (
    "Parameter {name!r} does not require a gradient. Set `requires_grad_(True)` on it, or leave it "
    "out of parameters=."
)


MSG_NO_SELECTION = (
    "parameters= names nothing; got {value!r}. It takes names, globs such as 'layers.*.weight', or "
    "the tensors themselves; there are {names}. Leave it out for all that require a gradient."
)


MSG_COMPLEX = (
    "Parameter {name!r} is complex ({dtype}), but the Gauss-Newton matrix is defined for real "
    "parameters. Leave it out with parameters=, or make its real and imaginary parts "
    "(torch.view_as_real) the parameter; gradients accept complex parameters."
)


# --- rules ----------------------------------------------------------------------------------------


MSG_UNKNOWN_RULE = (
    "There is no op named {value!r} to register a rule for; pass an OpOverload such as "
    "torch.ops.my.op.default."
)


MSG_RULE_TAKEN = "{value} already has a rule; pass replace=True to override it."


# --- rows of the gradient and quantities ----------------------------------------------------------


MSG_BY = "by is 'component', 'copy' or 'frozen'; got {value!r}."


MSG_NOT_COPY = (
    "by='copy' does not exist here: at {place} samples interact in a way that does not give each "
    "of them its own use of the parameters. Use by='component', which exists for every loss whose "
    "predictions have a sample axis."
)


MSG_NOT_FROZEN = (
    "by='frozen' does not exist here: at {place} samples interact by more than statistics, so "
    "holding those constant does not separate them. Use by='component'."
)


MSG_NO_ROWS = (
    "No prediction has a sample axis, so there are no rows: the predictions have shapes {shapes} "
    "for {n} samples. Return one prediction per sample, or declare where the samples lie, as by "
    "out_dims=unbatch.Views(2) in [2N, ..]; `problem.gradient()` gives the sum, and "
    "`problem.ggn()` is the matrix of the whole loss."
)


MSG_NOT_REPLACED = (
    "Crosstalk replaces one sample after the other, as these inputs have no derivatives, and the "
    "program does not take another one in the place of sample {sample}: {error}. What places or "
    "counts samples belongs to the whole batch: put None in its place in in_dims."
)


MSG_NO_OUTPUT = (
    "The model returns no tensor, so there are no predictions at which to take the loss apart. "
    "Return them, and let the loss read them from there; `problem.gradient()` needs none."
)


MSG_HIDDEN = (
    "The loss reads what is in an object that the model returns ({what}), and PyTorch does not "
    "open it: which of its tensors are predictions is not known. Return tensors, in a tuple, list "
    "or dict, and make the object of them in the loss; or register its class "
    "(`torch.utils._pytree.register_dataclass`)."
)


MSG_NO_ARRAY = (
    "A prediction of shape {shape} is sparse or nested, and has no rows. Return a dense tensor: "
    "`x.to_dense()`, or `x.to_padded_tensor(0.0)`."
)


MSG_NOT_REPLAYED = (
    "by={by!r} is not available: the derivatives of the recorded computation do not agree with the "
    "model's ({why}), and where samples mix, running the model itself cannot give these rows. Use "
    "by='component'."
)


MSG_OUT = (
    "out= does not fit: {what}. It takes an earlier result of the same question, or a mapping from "
    "parameter name to a tensor of shape [N, *param] of the parameter's dtype and device."
)


MSG_EFFORT = "effort= is a number of plain steps greater than zero; got {value!r}."


MSG_SECONDS = "seconds= is a number greater than zero, infinity included; got {value!r}."

MSG_MEMORY = "memory= is a number of bytes greater than zero; got {value!r}."


MSG_QUANTITY = (
    "compute takes quantities such as unbatch.SquaredNorms() or unbatch.Variance(), at least one; "
    "got {value!r}. For the rows themselves call gradients()."
)


MSG_MIXED_MOMENT = (
    "{what}: the number is exact for the {kind} rows of this batch of {n}, but not a statistic "
    "over samples. For that the loss lacks {lost}; see problem.structure. The same sample would "
    "get a different row in another batch."
)


MSG_HISTOGRAM = (
    "A histogram takes at least one bin and low < high; got bins={bins}, low={low}, high={high}."
)


MSG_MAX_NORM = "max_norm is a number greater than zero, in the scale of the rows; got {value!r}."


MSG_SAMPLES = "samples= takes sample numbers from 0 to {last}, at least one; got {value!r}."


MSG_DRAWS = "{what} is a whole number of at least {least}; got {value!r}."


MSG_START = "start is [{size}], or [{size}, K] of vectors; got a tensor of shape {shape}."


MSG_PROGRESS = "progress is switched by True, by False or by a function; got {value}."


MSG_POSITIVE = "{what} is a finite number greater than zero; got {value!r}."


# --- derivatives of the loss and of the model -----------------------------------------------------


MSG_NO_SECOND_DERIVATIVE = (
    "The loss has no second derivative by the predictions in PyTorch ({error}), so there is no "
    "Gauss-Newton matrix. Use a loss that can be differentiated twice, or write it in terms of "
    "functions that can."
)


MSG_NO_DERIVATIVE = (
    "A gradient of this program goes through {op}, of which PyTorch has no derivative (derivative "
    "is not implemented): the program takes derivatives itself, or uses an op that has none. "
    "Use another form of it, or plain operations; for attention, "
    "`with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):` around it."
)


MSG_THIRD_DERIVATIVE = (
    "The program takes second derivatives through {op}{place}, so its gradient is a third "
    "derivative, which PyTorch has wrong or not at all. Write this norm in plain operations: "
    "`(x - mean) / (var + eps).sqrt()`, with `x.mean` and `x.var(unbiased=False)` over its axes."
)


MSG_BACKWARD_INSIDE = (
    "The loss takes derivatives ({op}, {where}), and it draws noise or reads more of the "
    "model than its predictions. It would have to be replayed, but a recorded backward pass has no "
    "derivatives of its own. Take the derivatives in the model and return them with the "
    "predictions, or pass the noise with the data."
)


# This stands in for {error} in MSG_NO_SECOND_DERIVATIVE.
MSG_NO_GRAPH = (
    "{names} defines its own backward pass, whose derivative in PyTorch is not the change of the "
    "gradient with the predictions"
)


MSG_NO_TANGENT = (
    "Products with the Gauss-Newton matrix need tangents through {place}, for which PyTorch has no "
    "forward mode and no second derivative ({error}). Factors, diagonals and Gram matrices do not "
    "need them: use `ggn().diag()`, `.eigvalsh()` or `.trace()`."
)


MSG_NOT_LINEAR = (
    "What {places} does to gradients is not linear (it clips or normalises them, say). Rows of "
    "samples would not sum to the gradient, and there is no Jacobian to make a Gauss-Newton matrix "
    "of. Leave it out while you ask, and treat what comes back; `problem.gradient()` has the "
    "gradient as PyTorch does."
)


MSG_JOINED_BACKWARD = (
    "the backward pass through {places} lets other samples into a sample's gradient, though no "
    "prediction depends on them: rows are per component, and not per sample"
)


MSG_TANGENT_NOT_FINITE = (
    "Products with the Gauss-Newton matrix are not finite (not a number, or infinite), whatever "
    "the batch: look for parameters that are not finite."
)


# --- curvature ------------------------------------------------------------------------------------


MSG_VANISHING = (
    "On this batch the loss is linear in {cut} ({shapes}), so the Gauss-Newton matrix is zero: it "
    "is J^T H J, and H, the second derivative of the loss, vanishes there. {remedy}"
)


# {cut} and {remedy} of MSG_VANISHING for a model that computes its own loss ...
VANISHING_INSIDE = (
    "the values taken for its predictions, the last ones that parameters produced",
    "To cut the model elsewhere, let it return its logits and pass the loss separately: "
    "Problem(model, loss, (X, y)).",
)


# ... and for a loss that was passed.
VANISHING = (
    "its predictions, as absolute, hinge and, far out, Huber losses are, and nll_loss in "
    "log-probabilities",
    "Use a loss with a non-zero second derivative, e.g. cross_entropy on logits in place of "
    "nll_loss.",
)


MSG_NO_WAY_IN_MEMORY = (
    "`{question}` has no exact way that fits into the memory budget of {budget}; they need: "
    "{needs}. "
    "`memory=` of `problem.ggn` raises the budget. {estimates}"
)

MSG_NO_WAY_IN_TIME = (
    "`{question}` by {why} takes {passes:,} passes and some {time} ({one} measured for one), more "
    "than the budget of {budget}; `seconds=` of `problem.ggn` raises it. {estimates}"
)

MSG_MANY_COLUMNS = (
    "The second derivative of the loss has {columns:,} columns for each sample, which take some "
    "{time} ({one} measured for one), more than the budget of {budget}: `seconds=` of "
    "`problem.ggn` raises it. Products (`G @ v`), `G.eigh(k)` and `G.solve(b, damping)` take few "
    "passes; `G.estimate_diag(draws)` and `ub.DiagGGN(mc_samples=1)` estimate the diagonal."
)

MSG_METHODS = "method of `{question}` is one of {known}, or left out; got {value!r}."

MSG_NO_MEMORY = (
    "The memory of {device} did not hold what this question needs: {why}. Nothing was changed. "
    "Fewer samples, fewer parameters (`parameters=`) or a smaller budget (`memory=`) need less."
)

MSG_NO_BLOCKS = (
    "The second derivative of the loss by predictions of the shapes {shapes} is too large to be "
    "factored, or the loss rounds it too coarsely (bfloat16) to recognise its form, so its columns "
    "are not available. Use products (G @ v) and what is built on them: see unbatch.spectra."
)


MSG_HESSIAN_NOT_FINITE = (
    "The second derivative of the loss is not finite {which} on this batch (not a number, or "
    "infinite), so there is no Gauss-Newton matrix. Look for what is not finite in inputs, targets "
    "and parameters, or for an overflow, as with torch.autograd.detect_anomaly()."
)


MSG_MATRIX_NOT_FINITE = (
    "{what} of the Gauss-Newton matrix do not exist on this batch: some of its entries are not "
    "finite. `ggn().diag(per_component=True)` shows which samples they come from."
)


MSG_COMPLEX_OUTPUT = (
    "An output has the type {dtype}: the Gauss-Newton matrix is one of real outputs. Return "
    "torch.view_as_real(output), and take it apart in the loss."
)


MSG_JOINED = (
    "{what} would need outputs with a sample axis: {outputs} has none, and the loss is not linear "
    "in it, so the Gauss-Newton matrix is no sum over samples. Quantities of the whole batch exist."
)


MSG_NO_COMPONENTS = (
    "{what} would need a loss that is a sum over the samples (reduction: {why}, see "
    "problem.structure): the second derivative of this loss has no parts that belong to samples. "
    "Quantities of the whole batch exist."
)


MSG_NOT_POSITIVE = (
    "{what} need a second derivative of the loss that is positive semi-definite; its lowest "
    "eigenvalue here is {lowest:.3g}. Use the exact quantity, which may have negative entries."
)


MSG_GGN_STALE = (
    "Parameters, buffers or data have changed since this matrix was made from them, and products "
    "would mix the two. Make it again: `problem.ggn()`; or take `G.snapshot()` before they change, "
    "for the matrix as it was."
)


MSG_EMPTY_UNKNOWN = (
    "The structure of an empty batch is that of others, and none of these has been asked about, or "
    "what the program does with it is something else. Ask `problem.structure` on a batch with "
    "samples first, and then `problem.with_batch(..)` of the empty one."
)


MSG_EMPTY_JOINT = (
    "An empty batch has answers where the loss is a sum over samples, and here the reduction is "
    "{status} (see `problem.structure`)."
)


MSG_EMPTY_MOMENT = (
    "{what}: a statistic over samples, of which this batch has none (0/0). Sums, norms and rows "
    "are there for an empty batch."
)


MSG_EMPTY_NO_SUM = (
    "The loss of an empty batch is {value}: a mean over no samples is 0/0. With a loss that is a "
    "sum over samples (reduction='sum') the answers are zero, and have no rows."
)


MSG_NO_SNAPSHOT = (
    "A snapshot is computed from the recording alone, and here the program itself has to be run "
    "({why}). Ask `problem.ggn()` while the parameters are those that it is wanted at, or keep "
    "results: `G.to_dense()`, `G.eigh()`, `G.diag()`."
)

NO_SNAPSHOT_OF_LOSS = "the recorded loss has other derivatives than the loss"


MSG_BY_OF_COLUMNS = (
    "A Gauss-Newton matrix is built from derivatives of predictions, which do not exist for "
    "by={value!r}. Use by='component', or by='frozen', a different matrix, in which batch "
    "statistics are held constant."
)


MSG_UNBIASED = (
    "The correction from random signs exists for the whole diagonal, not for single components. "
    "Pass only one of per_component=True and unbiased=True."
)


MSG_BLOCKS = (
    "blocks is 'parameter', 'module', or a list of groups of parameters, each of them in one "
    "group; got {value!r}."
)


# --- linear systems and operators -----------------------------------------------------------------


MSG_VECTOR = (
    "A vector of parameters by name needs {name!r} in shape {shape}; got {got}. "
    "Pass one tensor for each parameter."
)


MSG_OPERATOR_VECTOR = "Pass a tensor of shape [{size}] or [{size}, K] ({what}); got {got}."


MSG_OPERATOR_SHAPES = (
    "Cannot {what} operators of shapes {shapes}: to add them their shapes must be equal, to "
    "multiply them the columns of each must match the rows of the next."
)


MSG_DAMPING = (
    "damping must be a number, or {count} numbers (one per direction), greater than minus the "
    "smallest eigenvalue used ({lowest:.3g}); got {value}."
)


MSG_NO_DAMPING = (
    "method='woodbury' solves (G + δI) x = b through the Gram matrix, with damping only: at δ = 0 "
    "there is no inverse unless G has full rank. Pass damping= other than zero, or method='cg'."
)


MSG_SINGULAR = (
    " At damping=0 there is a solution only where b is in the range of G, whose rank is at most "
    "{rank} of {size}: pass damping= greater than zero."
)


MSG_QUESTION = "A plan of a matrix is of one of {known}; got {value!r}."


MSG_NOT_DEFINITE = (
    "Conjugate gradients need a positive definite matrix, which damping={value} does not give. "
    "Pass damping= of zero or more."
)


MSG_NOT_CONVERGED = (
    "The linear system was not solved: after {iterations} iterations of {method} the relative "
    "residual is {residual:.2e}, above rtol={rtol:.2e}. Raise max_iterations, rtol or the damping, "
    "or pass info=True for the unfinished result with its residual."
)


MSG_WHICH = (
    "which= must be 'largest' or 'magnitude' (eigenpairs), method= 'xtrace', 'hutch++' or "
    "'hutchinson' (traces); got {value!r}."
)


MSG_SQUARE = (
    "Spectra need a symmetric operator of shape [D, D] with D > 0 and real floating-point entries; "
    "got shape {shape} and dtype {dtype}. For a factor V of another shape pass the operator "
    "V @ V.T."
)


MSG_NOT_SYMMETRIC = (
    "This operator is not symmetric: two products disagree by {gap:.1e} of its norm. Pass a "
    "symmetric one, such as 0.5 * (A + A.T)."
)


MSG_NOT_FINITE = (
    "A product with this operator has entries that are not finite. Look for NaN or infinite values "
    "in parameters and data, or for an overflow, which float64 may avoid."
)


MSG_EIGENPAIRS = (
    "The eigenpairs did not converge: after {products} products {near} of {k} have a residual "
    "within rtol={rtol:.2e} of the norm (the largest is {worst:.2e}), and the search for missed "
    "ones {found}. Raise max_products, basis or rtol, or pass info=True for the unfinished result "
    "with its residuals."
)


# --- pictures, pages and the monitor --------------------------------------------------------------


MSG_GIVEN = "{call} takes {takes}; got {value}. Pass the problem itself: {call}({arguments})."


MSG_REPORT_FILE = (
    "The report cannot be written to {path}: {reason}. Name a file that can be written "
    "(`--output FILE` in a shell); missing folders are created."
)


MSG_MONITOR_FILE = (
    "The monitor cannot write to {path}: {reason}. Pass path= a writable file that is new, empty "
    "or was written by a monitor; missing folders are created."
)


MSG_MONITOR_QUANTITY = (
    "A monitor takes quantities such as unbatch.SquaredNorms(), each once, or their names, out of "
    "{names}; got {value!r}."
)


MSG_MONITOR_COPY = (
    "by='copy' does not exist for {names}: a Gauss-Newton matrix is built from derivatives of "
    "predictions. Use by='component', or leave them out: quantities={rest!r}."
)


MSG_MONITOR_EVERY = (
    "every= is 'auto', or the number of calls from one measurement to the next, a whole number of "
    "at least 1; got {value!r}."
)


MSG_MONITOR_STEP = (
    "step= is a whole number, such as the number of the optimizer step; got {value!r}."
)


MSG_MONITOR_TARGETS = (
    "The loss {loss} takes targets as well as predictions, but step got {given} alone. Pass them "
    "as a second argument: monitor.step(X, y), or monitor.step(*batch) for a pair. For a model "
    "that computes its own loss leave out the loss: Monitor(model)."
)


MSG_MONITOR_NO_TARGETS = (
    "The loss {loss} takes predictions alone, but step got targets: {given}. Leave them out."
)


MSG_MONITOR_OWN_LOSS = (
    "Without a loss the model computes its own from monitor.step(inputs), targets included; got "
    "separate targets: {given}. For a loss outside the model pass it: Monitor(model, loss)."
)


MSG_MONITOR_FAILED = (
    "The monitor could not compute {what} at step {step} (training goes on; later failures of this "
    "kind are only counted, in monitor.failed): {error}"
)


MSG_MONITOR_WRITE = "The monitor could not write down step {step} (training goes on): {error}"


MSG_MONITOR_SPLIT = (
    "A monitor with a loss needs a pair (X, y), and this batch is {given}. Say how to make a pair "
    "of it, for instance: monitor_callback(monitor, split=lambda batch: (batch['x'], batch['y']))."
)


MSG_MONITOR_TRAINER = (
    "With Transformers' Trainer a monitor watches a model that computes its own loss, and this one "
    "was made with {loss}: leave it out, Monitor(model)."
)


MSG_MONITOR_UNSEEN = (
    "Training never calls the monitor's model, so there is nothing to measure. Make the monitor "
    "with the model that the Trainer trains: Monitor(model)."
)


MSG_EXTRA = (
    "{what} needs {package}, which is not installed. "
    "Install it with `pip install 'unbatch[{extra}]'`."
)
