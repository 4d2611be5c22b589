"""The model itself, run with autograd where its recording has other derivatives.

A model that computes its own loss does not return what the loss is cut at. That value is found by
its numbers while the model runs; whether the gradient of the loss goes through it, and through
nothing else, is then tried out.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from unbatch.autodiff.autograd import detached, gradients, subset
from unbatch.autodiff.context import Context
from unbatch.autodiff.dependence import within
from unbatch.autodiff.loss import LossAt
from unbatch.capture.after_run import AfterRun
from unbatch.capture.isolation import random_state
from unbatch.capture.program import own_loss
from unbatch.capture.trees import cloned, copied
from unbatch.errors import MSG_INNER_LOSS, StructureError

# Of the largest entry, in units of rounding: two implementations of attention differ by less.
ATTENTION_ROUNDINGS = 1e3


@dataclass
class EagerModel:
    """The model after one run.

    ``values``: what it returns, by number in the graph, or where the loss is cut; ``inner``: what
    else of the model the loss reads. ``state``: the random state from which backward passes draw,
    the same each time; None if they draw none. ``after``: what the run has left.
    """

    context: Context
    output: Any
    values: dict[int, Tensor]
    inner: dict[int, Tensor]
    state: tuple[Any, ...] | None
    after: AfterRun | None = None

    def differentiated(self) -> AbstractContextManager[Any]:
        """Return a context for backward passes: each is as one right after the run, and leaves no
        trace.
        """
        if self.state is None:
            return nullcontext()
        return self.context.program.untouched(self.state, after=self.after)

    def pull(
        self, cotangents: Mapping[int, Tensor], parameters: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the gradient by parameter for cotangents of outputs; another may follow."""
        ends = [self.values[i] for i in cotangents]
        with self.differentiated():
            return gradients(ends, parameters, list(cotangents.values()), retain=True)

    @property
    def outputs(self) -> dict[int, Tensor]:
        """Those that the loss reads, as far as they are connected to the parameters."""
        return {
            i: self.values[i] for i in self.context.outputs.smooth if self.values[i].requires_grad
        }

    @property
    def predictions(self) -> dict[int, Tensor]:
        """Those of them that have an axis of samples."""
        return {i: t for i, t in self.outputs.items() if i in self.context.axes}

    @property
    def loss(self) -> LossAt:
        """The loss at these outputs."""
        return LossAt(self.context, detached(self.outputs), self.inner, detached(self.values))


def run(context: Context, parameters: Mapping[str, Tensor], twice: bool = False) -> EagerModel:
    """Run the model on its batch.

    ``twice``: so that there are second derivatives, which fused attention has not. Raises
    ``StructureError`` for a model with its own loss where no value is the one that the loss is cut
    at.
    """
    with sdpa_kernel(SDPBackend.MATH) if twice else nullcontext():
        if context.own_loss:
            return _run_with_loss(context, parameters)
        return _run(context)


def _run(context: Context) -> EagerModel:
    """Run a model that returns its predictions."""
    output, state, after = _predict(context)
    tensors = [t for t in tree_leaves(output) if isinstance(t, Tensor)]
    numbers = [ref.index for ref in context.graph.predictions]
    return EagerModel(context, output, dict(zip(numbers, tensors, strict=True)), {}, state, after)


def _predict(context: Context) -> tuple[Any, tuple[Any, ...], AfterRun]:
    """Return the model's output, the random state after it, and what is left by the run."""
    after = AfterRun()
    with context.program.untouched(context.graph.rng, after=after), torch.enable_grad():
        # Copies of data that the model may write to, which have to last for the derivatives. Its
        # parameters and buffers are its own: it may know them by more than their numbers.
        inputs = tree_map(copied, context.inputs)
        output = context.program.forward(inputs)
        # What lies in a buffer is put back with it.
        return tree_map(cloned, output), random_state(), after


# --- models with their own loss -------------------------------------------------------------------


def _run_with_loss(context: Context, parameters: Mapping[str, Tensor]) -> EagerModel:
    """Run a model that returns its loss, and find its predictions on the way.

    Raises ``StructureError`` where they are not found, or the gradient bypasses them.
    """
    graph = context.graph
    if not context.split:
        raise StructureError(
            MSG_INNER_LOSS.format(why="parameters reach the loss beside them as well")
        )
    inner = graph.read_by_loss(context.outputs.smooth)
    # Predictions whose sample axes were flattened lie in the model as they were before.
    in_model = {i: graph.folded.get(i, i) for i in context.outputs.smooth}
    numbers = context.numbers([*in_model.values(), *inner])
    finder = ValueFinder(subset(numbers, in_model.values()))
    # Nothing is known of where in the model they are: every result is compared.
    with finder:
        output, state, after = _predict(context)
    predictions: dict[int, Tensor] = {}
    for i, original in in_model.items():
        if original in finder.tensors:
            predictions[i] = _as_predicted(context, i, finder.tensors[original])
    model = EagerModel(context, output, predictions, subset(numbers, inner), state, after)
    if len(predictions) < len(context.outputs.smooth):
        raise StructureError(
            MSG_INNER_LOSS.format(why="no tensor in the model has their recorded values")
        )
    if not _carries_the_gradient(model, own_loss(output), parameters):
        why = (
            "the gradient of the loss does not pass through the tensor with their recorded values, "
            "or not through it alone"
        )
        raise StructureError(MSG_INNER_LOSS.format(why=why))
    return model


def _as_predicted(context: Context, i: int, t: Tensor) -> Tensor:
    """Return prediction ``i``, from what the model has in its place."""
    fold = context.program.fold
    if fold is None or i not in context.graph.folded:
        return t
    # Connected to the parameters, as the derivatives of what follows go through it.
    with torch.enable_grad():
        rows: Tensor = fold.folded(t, [fold.axes(t)])
    return rows


def _carries_the_gradient(
    model: EagerModel, loss: Tensor | None, parameters: Mapping[str, Tensor]
) -> bool:
    """Tell whether ``Jᵀ ∂L/∂F`` is the gradient of the loss that the model returns."""
    assert loss is not None
    slope = model.loss.slope
    connected = within(slope, model.outputs)
    through = model.pull(subset(slope, connected), parameters)
    with model.differentiated():
        at_once = gradients([loss], parameters, retain=True)
    size, errors = 0.0, []
    for name, g in at_once.items():
        if g.numel():
            size = max(size, float(g.abs().max()))
            errors.append(float((through[name] - g).abs().max()))
    allowed = model.context.rounding * size
    return all(error <= allowed for error in errors)  # false for NaN


@dataclass
class ValueFinder(TorchFunctionMode):
    """Keeps a copy of each tensor of a running model that has given numbers, as it is then."""

    numbers: Mapping[int, Tensor]
    tensors: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                self._compare(leaf)
        return result

    def _compare(self, t: Tensor) -> None:
        for i, numbers in self.numbers.items():
            if i not in self.tensors and _same(t, numbers):
                self.tensors[i] = t.clone()  # the model may write to it


def _same(t: Tensor, numbers: Tensor) -> bool:
    """Tell whether a tensor has the given numbers, up to rounding."""
    if t.shape != numbers.shape or t.dtype != numbers.dtype:
        return False
    allowed = 0.0
    if numbers.numel():
        rounding = ATTENTION_ROUNDINGS * torch.finfo(numbers.dtype).eps
        allowed = rounding * float(numbers.abs().max())
    return torch.allclose(t, numbers, 0, allowed)
