"""A model run on a batch, on one sample alone, and on all samples alone in lock-step: for the definitions.

A sample that runs alone is handed what crosses samples: as the batch had it, or from the others, which run beside it.
Nothing here knows the recorded graph, its labels or any engine.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

Loss = Callable[..., Any]


MSG_PATH = "A sample alone calls {got} where the batch calls {expected}: the model takes other steps for other sizes."


MSG_SLICE = "A sample alone has shape {alone} where the batch of {samples} has {batch}: no axis is cut by samples."


MSG_DIFFERS = (
    "A sample alone, given what crosses samples, predicts other values than in the batch (off by {error:.1e}): the "
    "model mixes samples in a way that {function} does not know. It knows batch_norm, sums, means, variances, amax, "
    "softmax, matmul and einsum."
)


MSG_NO_STATISTIC = (
    "{name} hands values of all samples on, not a statistic of them: nothing can be held constant."
)


# --- one run --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What a batch gave: ``leaves`` of the predictions, of which ``own`` carry samples; ``∂L/∂F`` for those."""

    leaves: list[Any]
    spec: Any
    own: list[int]
    samples: int

    def with_own(self, values: Sequence[Tensor], detach: bool) -> Any:
        """The predictions with other values for those that carry samples; the rest detached or as it is."""
        leaves = [t.detach() if detach and isinstance(t, Tensor) else t for t in self.leaves]
        for i, value in zip(self.own, values, strict=True):
            leaves[i] = value
        return tree_unflatten(leaves, self.spec)


def predict(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, tuple):
        return model(*inputs)
    return model(**inputs) if isinstance(inputs, dict) else model(inputs)


def evaluate(loss: Loss, predictions: Any, targets: Any) -> Tensor:
    value = loss(predictions) if targets is None else loss(predictions, targets)
    assert isinstance(value, Tensor)
    return value


def run_batch(model: nn.Module, inputs: Any) -> Run:
    samples = next(t.shape[0] for t in tree_leaves(inputs) if isinstance(t, Tensor))
    leaves, spec = tree_flatten(predict(model, inputs))
    own = [
        i
        for i, t in enumerate(leaves)
        if isinstance(t, Tensor) and t.is_floating_point() and t.ndim and t.shape[0] == samples
    ]
    return Run(leaves, spec, own, samples)


# --- what crosses samples -------------------------------------------------------------------------
#
# Where samples meet, an op is split in two: a statistic of the inputs of all samples, and how a sample's output
# follows from its own inputs and the statistic. For a reduction the output is the statistic.


Axes = list[int | None]  # per input, the axis that is cut by samples


@dataclass(frozen=True)
class _Split:
    statistic: Callable[..., Any]  # of the inputs of all samples
    finish: Callable[..., Any]  # of one's own inputs, then the statistic
    bounded: bool = True  # the statistic does not grow with N


@dataclass(frozen=True)
class _Op:
    name: str
    inputs: list[Tensor]
    split: Callable[[Axes], _Split | None]  # None where no samples meet
    dropped: float = 0.0  # of dropout: the probability


@dataclass(frozen=True)
class _Call:
    """An op as the batch called it; of dropout, its mask."""

    name: str
    inputs: list[Tensor]


def _named(names: str, *owners: Any) -> list[Any]:
    return [
        getattr(owner, name) for owner in owners for name in names.split() if hasattr(owner, name)
    ]


REDUCTIONS = _named("mean sum var std var_mean std_mean amax amin prod logsumexp", torch, Tensor)


NORMS = [*_named("norm", torch, Tensor), torch.linalg.vector_norm]


SOFTMAX = _named("softmax log_softmax", torch, Tensor, F)


PRODUCTS = _named("matmul mm __matmul__", torch, Tensor)


def _op(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Op | None:
    """The op behind a call, if samples may meet in it or it draws noise."""
    if func is F.batch_norm:
        return _batch_norm(args, kwargs)
    if func is F.dropout:
        return _dropout(args, kwargs)
    if func in REDUCTIONS:
        return _reduction(func, args, kwargs, _axes(args, kwargs, 1))
    if func in NORMS:
        return _reduction(func, args, kwargs, _axes(args, kwargs, 2))
    if func in SOFTMAX:
        return _softmax(func, args, kwargs)
    if func in PRODUCTS:
        return _product(func, args)
    return _einsum(args) if func is torch.einsum else None


def _axes(args: tuple[Any, ...], kwargs: dict[str, Any], position: int) -> set[int]:
    """The axes that a reduction runs over; all of them where none is named."""
    ndim = args[0].ndim
    dim = kwargs.get("dim", kwargs.get("axis", args[position] if len(args) > position else None))
    if dim is None or isinstance(dim, bool) or dim == ():
        return set(range(ndim))
    return {d % ndim for d in (dim if isinstance(dim, tuple | list) else [dim])}


def _reduction(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], over: set[int]) -> _Op:
    split = _Split(lambda x: func(x, *args[1:], **kwargs), lambda x, statistic: statistic)
    return _Op(func.__name__, [args[0]], lambda axes: split if axes[0] in over else None)


def _softmax(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Op:
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    log = "log" in func.__name__
    split = _Split(
        lambda x: x.logsumexp(dim, keepdim=True),
        lambda x, total: x - total if log else (x - total).exp(),
    )
    return _Op(
        func.__name__, [args[0]], lambda axes: split if axes[0] == dim % args[0].ndim else None
    )


def _batch_norm(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Op | None:
    call = inspect.signature(F.batch_norm).bind(*args, **kwargs)
    call.apply_defaults()
    x, weight, bias, eps = (call.arguments[k] for k in ("input", "weight", "bias", "eps"))
    if not call.arguments["training"]:
        return None
    over = [d for d in range(x.ndim) if d != 1]
    channels = [-1 if d == 1 else 1 for d in range(x.ndim)]

    def statistic(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.mean(over, keepdim=True), x.var(over, unbiased=False, keepdim=True)

    def finish(x: Tensor, mean_and_var: tuple[Tensor, Tensor]) -> Tensor:
        mean, var = mean_and_var
        y = (x - mean) / (var + eps).sqrt()
        y = y if weight is None else y * weight.reshape(channels)
        return y if bias is None else y + bias.reshape(channels)

    return _Op(
        "batch_norm", [x], lambda axes: _Split(statistic, finish) if axes[0] in over else None
    )


def _dropout(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Op | None:
    call = inspect.signature(F.dropout).bind(*args, **kwargs)
    call.apply_defaults()
    p = call.arguments["p"]
    return (
        _Op("dropout", [call.arguments["input"]], lambda axes: None, p)
        if call.arguments["training"] and p
        else None
    )


def _product(func: Any, args: tuple[Any, ...]) -> _Op | None:
    """``a @ b``: a sum over samples where both carry them on the axis that is summed; else, where both carry them,
    every sample meets all the ``b`` of the others."""
    a, b = args
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return None

    def split(axes: Axes) -> _Split | None:
        if None in axes or (
            a.ndim == b.ndim > 2 and axes[0] == axes[1] == 0
        ):  # one product per sample
            return None
        if axes == [a.ndim - 1, max(b.ndim - 2, 0)]:
            return _Split(func, lambda a, b, total: total)
        return _Split(lambda a, b: b, lambda a, b, everyone: func(a, everyone), bounded=False)

    return _Op(func.__name__, [a, b], split)


def _einsum(args: tuple[Any, ...]) -> _Op:
    """A sum over samples where their letter is not in the output; where it is, it stands for one sample at a time."""
    equation, *operands = args
    letters, output = equation.replace(" ", "").split("->")

    def split(axes: Axes) -> _Split | None:
        cut = {term[d] for term, d in zip(letters.split(","), axes, strict=True) if d is not None}
        summed = _Split(
            lambda *xs: torch.einsum(equation, *xs), lambda *xs_and_total: xs_and_total[-1]
        )
        return summed if cut - set(output) and None not in axes else None

    return _Op("einsum", operands, split)


# --- samples on their own -------------------------------------------------------------------------


class _Record(TorchFunctionMode):
    """The batch runs, and the inputs of ops in which samples may meet are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        op = _op(func, args, kwargs or {})
        if op is None:
            return func(*args, **(kwargs or {}))
        if op.dropped:
            mask = F.dropout(torch.ones_like(op.inputs[0]), op.dropped)
            self.calls.append(_Call(op.name, [mask]))
            return op.inputs[0] * mask
        self.calls.append(_Call(op.name, [x.detach().clone() for x in op.inputs]))
        return func(*args, **(kwargs or {}))


Ask = Callable[[int, _Op, _Split, Axes], Any]


class Replay(TorchFunctionMode):
    """Sample n runs alone, calling the same ops as the batch, and asks for the statistics where samples meet.

    An axis is cut by samples where the batch is N times as long; so parameters and batch-free values need no mark.
    """

    def __init__(self, n: int, samples: int, calls: list[_Call], ask: Ask) -> None:
        super().__init__()
        self.n, self.samples, self.calls, self.ask = n, samples, calls, ask
        self.index = -1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        op = _op(func, args, kwargs or {})
        if op is None:
            return func(*args, **(kwargs or {}))
        call = self._next(op.name)
        axes = [self._cut(x, y) for x, y in zip(op.inputs, call.inputs, strict=True)]
        if op.dropped:
            return op.inputs[0] * self._own(call.inputs[0], axes[0])
        split = op.split(axes)
        if split is None:
            return func(*args, **(kwargs or {}))
        return split.finish(*op.inputs, self.ask(self.index, op, split, axes))

    def finished(self) -> None:
        """Raise if the batch called more."""
        if self.index + 1 < len(self.calls):
            raise ValueError(
                MSG_PATH.format(got="nothing more", expected=self.calls[self.index + 1].name)
            )

    def _next(self, name: str) -> _Call:
        self.index += 1
        expected = self.calls[self.index].name if self.index < len(self.calls) else "nothing more"
        if name != expected:
            raise ValueError(MSG_PATH.format(got=name, expected=expected))
        return self.calls[self.index]

    def _cut(self, alone: Tensor, batch: Tensor) -> int | None:
        if alone.shape == batch.shape:
            return None
        axes = [d for d in range(min(alone.ndim, batch.ndim)) if alone.shape[d] != batch.shape[d]]
        if (
            alone.ndim != batch.ndim
            or len(axes) != 1
            or batch.shape[axes[0]] != self.samples * alone.shape[axes[0]]
        ):
            shapes = {
                "alone": tuple(alone.shape),
                "batch": tuple(batch.shape),
                "samples": self.samples,
            }
            raise ValueError(MSG_SLICE.format(**shapes))
        return axes[0]

    def _own(self, batch: Tensor, axis: int | None) -> Tensor:
        return batch if axis is None else batch.chunk(self.samples, axis)[self.n]


def recorded(model: nn.Module, inputs: Any) -> tuple[Run, list[_Call]]:
    with _Record() as record:
        run = run_batch(model, inputs)
    return run, record.calls


def alone(model: nn.Module, run: Run, inputs: Any, replay: Replay) -> list[Tensor]:
    """Sample n's predictions, ``[1, ...]`` each; tensors without the sample axis are handed over whole."""

    def cut(x: Any) -> Any:
        of_samples = isinstance(x, Tensor) and x.ndim and x.shape[0] == run.samples
        return x[replay.n : replay.n + 1] if of_samples else x

    own = tree_map(cut, inputs)
    with replay:
        leaves = tree_leaves(predict(model, own))
    replay.finished()
    return [leaves[i] for i in run.own]


def constant(calls: list[_Call]) -> Ask:
    def ask(index: int, op: _Op, split: _Split, axes: Axes) -> Any:
        if not split.bounded:
            raise ValueError(MSG_NO_STATISTIC.format(name=op.name))
        return split.statistic(*calls[index].inputs)

    return ask


class _Meeting:
    """Where the ranks hand over their inputs and wait for those of the others."""

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self.barrier = threading.Barrier(samples, timeout=60)
        self.brought: dict[tuple[int, int], list[Tensor]] = {}
        self.errors: list[BaseException] = []

    def ask(self, n: int) -> Ask:
        def collective(index: int, op: _Op, split: _Split, axes: Axes) -> Any:
            # Clones, because a rank that goes on may write into its input while another still reads it.
            self.brought[index, n] = [x.clone() for x in op.inputs]
            self.barrier.wait()
            everyone = [self.brought[index, m] for m in range(self.samples)]
            joined = [
                own if axis is None else torch.cat(parts, axis)
                for own, axis, parts in zip(
                    op.inputs, axes, zip(*everyone, strict=True), strict=True
                )
            ]
            return split.statistic(*joined)

        return collective

    def hold(self, work: Callable[[int], None]) -> None:
        """Run ``work(rank)`` in one thread per rank; the first error of a rank is raised here."""
        threads = [
            threading.Thread(target=self._attend, args=(work, n), daemon=True)
            for n in range(self.samples)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        causes = [e for e in self.errors if not isinstance(e, threading.BrokenBarrierError)]
        for error in causes or self.errors:
            raise error

    def _attend(self, work: Callable[[int], None], n: int) -> None:
        try:
            work(n)
        except BaseException as error:
            self.errors.append(error)
            self.barrier.abort()


def in_lock_step(
    ranks: list[nn.Module], run: Run, calls: list[_Call], inputs: Any
) -> list[list[Tensor]]:
    """Per rank its predictions. What is shared but depends on parameters is each rank's own."""
    meeting = _Meeting(run.samples)
    found: dict[int, list[Tensor]] = {}

    def work(n: int) -> None:
        replay = Replay(n, run.samples, calls, meeting.ask(n))
        found[n] = alone(ranks[n], run, inputs, replay)

    meeting.hold(work)
    return [found[n] for n in range(run.samples)]


def check_same(run: Run, found: Sequence[Tensor], function: str, n: int | None = None) -> None:
    """Whatever crosses samples unseen shows in the predictions."""
    for i, value in zip(run.own, found, strict=True):
        batch = run.leaves[i].detach() if n is None else run.leaves[i].detach()[n : n + 1]
        error = (value.detach() - batch).abs().max().item() if value.numel() else 0.0
        scale = batch.abs().max().item() if batch.numel() else 0.0
        if not error <= 1e-10 * (1 + scale):
            raise ValueError(MSG_DIFFERS.format(error=error, function=function))
