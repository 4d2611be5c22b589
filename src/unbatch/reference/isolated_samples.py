"""A model run on a batch, on one sample of it alone, and on all samples alone in lock-step.

A sample that runs alone calls the same functions as the batch did. Where one of these combines
samples, it needs a statistic of all of them, which it takes from the recorded batch (then it is a
constant) or from the other samples, which run beside it. Nothing here knows the recorded graph of
the package, its analysis or any engine.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from unbatch.reference.cross_sample_ops import Axes, Coupling, Operation, operation

Loss = Callable[..., Any]

MSG_NO_TENSOR = "There is no tensor among the inputs, so no samples; got {inputs!r}."
MSG_PATH = (
    "A sample alone calls {alone} where the batch calls {batch}: the model takes other steps for "
    "other sizes."
)
MSG_SLICE = (
    "A sample alone has shape {alone} where the batch of {samples} has {batch}: no axis is cut by "
    "samples."
)
MSG_DIFFERS = (
    "A sample alone, with the statistics of the batch, predicts other values than in the batch "
    "(off by {error:.1e}): the model mixes samples in a way that {function} does not know. It "
    "knows batch_norm, sums, means, variances, amax, softmax, matmul and einsum."
)
MSG_NO_STATISTIC = (
    "{name} hands values of all samples on, not a statistic of them: nothing can be held constant."
)

# Relative to the predictions, in float64: a sample alone sums in another order than the batch.
ROUNDING = 1e-10

# Seconds after which a rank no longer waits for the others.
PATIENCE = 60


# --- the batch ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BatchRun:
    """The predictions of a batch.

    ``leaves``, ``spec``: what the model returned, flattened, and how to put it together again;
    ``own``: which leaves have the samples along axis 0.
    """

    leaves: list[Any]
    spec: Any
    own: list[int]
    samples: int

    @property
    def predictions(self) -> list[Any]:
        """The leaves that have the samples along axis 0."""
        return [self.leaves[i] for i in self.own]

    def with_own(self, values: Sequence[Tensor], detach: bool) -> Any:
        """Return the output with other values for the predictions.

        Leaves without samples are held constant if ``detach``.
        """
        leaves = list(self.leaves)
        if detach:
            leaves = tree_map(_detached, leaves)
        for i, value in zip(self.own, values, strict=True):
            leaves[i] = value
        return tree_unflatten(leaves, self.spec)


def predict(model: nn.Module, inputs: Any) -> Any:
    """Return what the model returns; a tuple of inputs is several arguments, a dict named ones."""
    if isinstance(inputs, tuple):
        return model(*inputs)
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(inputs)


def evaluate(loss: Loss, predictions: Any, targets: Any) -> Tensor:
    """Return the loss; without targets it is a function of the predictions alone."""
    arguments = [predictions]
    if targets is not None:
        arguments.append(targets)
    value: Tensor = loss(*arguments)
    return value


def run_batch(model: nn.Module, inputs: Any) -> BatchRun:
    """Run the model on the batch; the first tensor among the inputs has one entry per sample."""
    samples = _samples_of(inputs)
    leaves, spec = tree_flatten(predict(model, inputs))
    own = []
    for i, leaf in enumerate(leaves):
        if _has_samples(leaf, samples) and leaf.is_floating_point():
            own.append(i)
    return BatchRun(leaves, spec, own, samples)


def _samples_of(inputs: Any) -> int:
    for leaf in tree_leaves(inputs):
        if isinstance(leaf, Tensor):
            return len(leaf)
    raise ValueError(MSG_NO_TENSOR.format(inputs=inputs))


def _has_samples(leaf: Any, samples: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == samples


def _detached(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.detach()
    return leaf


# --- its calls are recorded -----------------------------------------------------------------------


@dataclass(frozen=True)
class RecordedCall:
    """A call of the batch that may combine samples, with its inputs; of dropout, with its mask."""

    name: str
    inputs: list[Tensor]


def record_batch(model: nn.Module, inputs: Any) -> tuple[BatchRun, list[RecordedCall]]:
    """Run the model on the batch, and return its calls as well."""
    with _CallRecorder() as recorder:
        run = run_batch(model, inputs)
    return run, recorder.calls


class _CallRecorder(TorchFunctionMode):
    """Keeps the inputs of every operation in which samples may be combined."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[RecordedCall] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        op = operation(func, args, kwargs)
        if op is None:
            return func(*args, **kwargs)
        if op.drop_probability:
            # The mask is drawn here, so that a sample alone can be handed its part of it.
            mask = F.dropout(torch.ones_like(op.inputs[0]), op.drop_probability)
            self.calls.append(RecordedCall(op.name, [mask]))
            return op.inputs[0] * mask
        # Clones, because the model may go on to write into them.
        copies = [x.detach().clone() for x in op.inputs]
        self.calls.append(RecordedCall(op.name, copies))
        return func(*args, **kwargs)


# --- one sample alone -----------------------------------------------------------------------------


# Where an operation gets its statistic from: by the number of its call, and how it combines samples
# along which axes.
StatisticOf = Callable[[int, Operation, Coupling, Axes], Any]


class IsolatedSample(TorchFunctionMode):
    """Sample n runs alone, and gets the statistics where the batch would combine samples.

    An input is cut by samples along the axis in which the batch is N times as long. So parameters,
    and values that are the same for all samples, need no mark.
    """

    def __init__(
        self, n: int, samples: int, calls: list[RecordedCall], statistic_of: StatisticOf
    ) -> None:
        super().__init__()
        self.n = n
        self.samples = samples
        self.calls = calls
        self.statistic_of = statistic_of
        self.count = 0  # calls so far

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        op = operation(func, args, kwargs)
        if op is None:
            return func(*args, **kwargs)
        index, call = self._next_call(op.name)
        # Where an input of the sample is shorter than that of the batch, samples lie.
        axes = []
        for alone, batch in zip(op.inputs, call.inputs, strict=True):
            axes.append(self._sample_axis(alone, batch))
        if op.drop_probability:
            return op.inputs[0] * self._own_part(call.inputs[0], axes[0])
        coupling = op.coupling(axes)
        if coupling is None:
            return func(*args, **kwargs)
        statistic = self.statistic_of(index, op, coupling, axes)
        return coupling.finish(*op.inputs, statistic)

    def check_finished(self) -> None:
        """Raise ``ValueError`` if the batch called more."""
        if self.count < len(self.calls):
            expected = self.calls[self.count].name
            raise ValueError(MSG_PATH.format(alone="nothing more", batch=expected))

    def _next_call(self, name: str) -> tuple[int, RecordedCall]:
        expected = "nothing more"
        if self.count < len(self.calls):
            expected = self.calls[self.count].name
        if name != expected:
            raise ValueError(MSG_PATH.format(alone=name, batch=expected))
        index = self.count
        self.count += 1
        return index, self.calls[index]

    def _sample_axis(self, alone: Tensor, batch: Tensor) -> int | None:
        """Return the axis along which the batch is N times as long, None where there is none."""
        if alone.shape == batch.shape:
            return None
        dims = range(min(alone.ndim, batch.ndim))
        axes = [d for d in dims if alone.shape[d] != batch.shape[d]]
        if alone.ndim == batch.ndim and len(axes) == 1:
            (axis,) = axes
            if batch.shape[axis] == self.samples * alone.shape[axis]:
                return axis
        shapes = {"alone": tuple(alone.shape), "batch": tuple(batch.shape)}
        raise ValueError(MSG_SLICE.format(samples=self.samples, **shapes))

    def _own_part(self, batch: Tensor, axis: int | None) -> Tensor:
        if axis is None:
            return batch
        return batch.chunk(self.samples, axis)[self.n]


def run_alone(model: nn.Module, run: BatchRun, inputs: Any, sample: IsolatedSample) -> list[Tensor]:
    """Return the predictions of one sample, ``[1, ...]`` each.

    Inputs without the sample axis are handed over whole.
    """

    def cut(leaf: Any) -> Any:
        if _has_samples(leaf, run.samples):
            # A slice and no index: the model takes a batch of one.
            return leaf[sample.n : sample.n + 1]
        return leaf

    own_inputs = tree_map(cut, inputs)
    with sample:
        leaves = tree_leaves(predict(model, own_inputs))
    sample.check_finished()
    return [leaves[i] for i in run.own]


def statistics_of_batch(calls: list[RecordedCall]) -> StatisticOf:
    """Return the statistics as the batch had them, constants for the sample that runs alone."""

    def statistic_of(index: int, op: Operation, coupling: Coupling, axes: Axes) -> Any:
        if not coupling.bounded:
            raise ValueError(MSG_NO_STATISTIC.format(name=op.name))
        return coupling.statistic(*calls[index].inputs)

    return statistic_of


def check_same_predictions(
    run: BatchRun, predictions: Sequence[Tensor], function: str, n: int | None = None
) -> None:
    """Raise ``ValueError`` where predictions (of sample n) are not those of the batch.

    Whatever crosses samples without being in the tables shows here.
    """
    for value, batch in zip(predictions, run.predictions, strict=True):
        expected = batch.detach()
        if n is not None:
            expected = expected[n : n + 1]
        if not value.numel():
            continue
        error = (value.detach() - expected).abs().max().item()
        size = expected.abs().max().item()
        # Not ``>``: an error that is not a number counts.
        if not error <= ROUNDING * (1 + size):
            raise ValueError(MSG_DIFFERS.format(error=error, function=function))


# --- all samples alone, in lock-step --------------------------------------------------------------


def in_lock_step(
    ranks: list[nn.Module], run: BatchRun, calls: list[RecordedCall], inputs: Any
) -> list[list[Tensor]]:
    """Return the predictions of every rank; rank n runs ``ranks[n]`` on sample n alone.

    What crosses samples is a collective of the activations. What all samples share is each rank's
    own, as it depends on its parameters.
    """
    group = _RankGroup(run.samples)
    predictions: dict[int, list[Tensor]] = {}

    def work(n: int) -> None:
        sample = IsolatedSample(n, run.samples, calls, group.statistics_for(n))
        predictions[n] = run_alone(ranks[n], run, inputs, sample)

    group.run(work)
    return [predictions[n] for n in range(run.samples)]


class _RankGroup:
    """N threads, each of which contributes its inputs to a collective and waits for the others'."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=PATIENCE)
        self.contributions: dict[tuple[int, int], list[Tensor]] = {}  # by call and rank
        self.errors: list[BaseException] = []

    def statistics_for(self, n: int) -> StatisticOf:
        """Return the statistics as rank n gets them, connected to the inputs of all ranks."""

        def statistic_of(index: int, op: Operation, coupling: Coupling, axes: Axes) -> Any:
            # Clones, because a rank that goes on may write into its input while another reads it.
            self.contributions[index, n] = list(map(torch.clone, op.inputs))
            self.barrier.wait()
            inputs = []
            for i, (own, axis) in enumerate(zip(op.inputs, axes, strict=True)):
                if axis is None:
                    # Shared by all samples, and made from the parameters of this rank.
                    inputs.append(own)
                    continue
                parts = [self.contributions[index, m][i] for m in range(self.size)]
                inputs.append(torch.cat(parts, axis))
            return coupling.statistic(*inputs)

        return statistic_of

    def run(self, work: Callable[[int], None]) -> None:
        """Run ``work(n)`` in a thread for every rank, and raise the first error of any."""
        threads = []
        for n in range(self.size):
            # A daemon, so that a rank that hangs does not keep Python from ending.
            thread = threading.Thread(target=self._run_rank, args=(work, n), daemon=True)
            threads.append(thread)
            thread.start()
        for thread in threads:
            thread.join()
        # A broken barrier is how the others learn of an error, not its cause.
        causes = [e for e in self.errors if not isinstance(e, threading.BrokenBarrierError)]
        for error in causes or self.errors:
            raise error

    def _run_rank(self, work: Callable[[int], None], n: int) -> None:
        try:
            work(n)
        except BaseException as error:
            self.errors.append(error)
            self.barrier.abort()
