"""The definitions, slow and plain: what the fast paths are tested against, and what the words mean.

Loops over ``torch.autograd.grad`` and threads, in whatever precision the model has; meant for float64. Nothing here
knows the recorded graph, its labels or any engine. A model is called as ``model(X)``, ``model(*X)`` for a tuple and
``model(**X)`` for a dict; samples lie on axis 0 of inputs and predictions; the loss is ``loss(predictions, y)``. Every
run starts from the buffers and the random state of the moment of the call, and leaves both as they were.

Rows are ``{name: [N, *param]}`` over the parameters that require a gradient: those of the model in their own order,
then those of a loss that is a module, as ``loss.<name>``. Everything is in the scale in which it enters the loss.
"""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

Rows = dict[str, Tensor]
Loss = Callable[..., Any]

MSG_PATH = "A sample alone calls {got} where the batch calls {expected}: the model takes other steps for other sizes."
MSG_SLICE = "A sample alone has shape {alone} where the batch of {samples} has {batch}: no axis is cut by samples."
MSG_DIFFERS = (
    "A sample alone, given what crosses samples, predicts other values than in the batch (off by {error:.1e}): the "
    "model mixes samples in a way that {function} does not know. It knows batch_norm, sums, means, variances, amax, "
    "softmax, matmul and einsum."
)
MSG_NO_STATISTIC = "{name} hands values of all samples on, not a statistic of them: nothing can be held constant."


# --- one run --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Run:
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


def _predict(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, tuple):
        return model(*inputs)
    return model(**inputs) if isinstance(inputs, dict) else model(inputs)


def _evaluate(loss: Loss, predictions: Any, targets: Any) -> Tensor:
    value = loss(predictions) if targets is None else loss(predictions, targets)
    assert isinstance(value, Tensor)
    return value


def _run(model: nn.Module, inputs: Any) -> _Run:
    samples = next(t.shape[0] for t in tree_leaves(inputs) if isinstance(t, Tensor))
    leaves, spec = tree_flatten(_predict(model, inputs))
    own = [
        i
        for i, t in enumerate(leaves)
        if isinstance(t, Tensor) and t.is_floating_point() and t.ndim and t.shape[0] == samples
    ]
    return _Run(leaves, spec, own, samples)


def _cotangents(run: _Run, loss: Loss, targets: Any) -> list[Tensor]:
    """``∂L/∂F`` for the predictions that carry samples."""
    fresh = [run.leaves[i].detach().clone().requires_grad_() for i in run.own]
    return _grad([_evaluate(loss, run.with_own(fresh, detach=True), targets)], fresh)


@contextmanager
def _untouched(*modules: Any) -> Iterator[None]:
    """Runs get copies of the buffers: writing the old values back would spoil what autograd has saved."""
    owners = [m for module in modules if isinstance(module, nn.Module) for m in module.modules()]
    saved = [(m, name, b) for m in owners for name, b in m._buffers.items() if b is not None]
    clones = {id(b): b.detach().clone() for _, _, b in saved}
    try:
        for m, name, b in saved:
            m._buffers[name] = clones[id(b)]
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            yield
    finally:
        for m, name, b in saved:
            m._buffers[name] = b


def _parameters(model: nn.Module, loss: Any) -> dict[str, Tensor]:
    out: dict[str, Tensor] = dict(model.named_parameters())
    if isinstance(loss, nn.Module):
        out |= {f"loss.{n}": p for n, p in loss.named_parameters() if not any(p is q for q in out.values())}
    return {n: p for n, p in out.items() if p.requires_grad}


def _grad(
    outputs: Sequence[Tensor], by: Iterable[Tensor], cotangents: Sequence[Tensor] | None = None, keep: bool = False
) -> list[Tensor]:
    """``autograd.grad``, with zeros where nothing flows."""
    by = list(by)
    cotangents = [torch.ones_like(t) for t in outputs] if cotangents is None else cotangents
    live = [(t, v) for t, v in zip(outputs, cotangents, strict=True) if t.requires_grad]
    if not live or not by:
        return [torch.zeros_like(p) for p in by]
    ends, vectors = zip(*live, strict=True)
    grads = torch.autograd.grad(ends, by, vectors, retain_graph=keep, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(by, grads, strict=True)]


# --- the gradient and its decompositions ----------------------------------------------------------


def gradient(model: nn.Module, loss: Loss, inputs: Any, targets: Any) -> dict[str, Tensor]:
    """``∇L``: ``{name: [*param]}``, zero where a parameter is not used."""
    parameters = _parameters(model, loss)
    with _untouched(model, loss):
        value = _evaluate(loss, _predict(model, inputs), targets)
        return dict(zip(parameters, _grad([value], parameters.values()), strict=True))


def rest(model: nn.Module, loss: Loss, inputs: Any, targets: Any) -> dict[str, Tensor]:
    """The part of ``∇L`` that does not pass through the predictions of samples: ``{name: [*param]}``.

    It is the gradient of L with those predictions held constant: what a weight decay, a parameter of the loss, or a
    prediction without a sample axis (an auxiliary loss) contributes.
    """
    parameters = _parameters(model, loss)
    with _untouched(model, loss):
        run = _run(model, inputs)
        constant = [run.leaves[i].detach() for i in run.own]
        value = _evaluate(loss, run.with_own(constant, detach=False), targets)
        return dict(zip(parameters, _grad([value], parameters.values()), strict=True))


def component(model: nn.Module, loss: Loss, inputs: Any, targets: Any) -> Rows:
    """Row n is ``(J_θ F_n)ᵀ ∂L/∂F_n``: the cotangent of sample n alone, pulled back through the whole batch.

    The rows sum to the gradient less its rest. For ``L = Σ w_n ℓ(F_n, y_n)`` row n is the gradient of the n-th term.
    """
    parameters = _parameters(model, loss)
    with _untouched(model, loss):
        run = _run(model, inputs)
        cotangents = _cotangents(run, loss, targets)
        outputs = [run.leaves[i] for i in run.own]
        rows = []
        for n in range(run.samples):
            masked = [torch.zeros_like(v) for v in cotangents]
            for mask, v in zip(masked, cotangents, strict=True):
                mask[n] = v[n]
            rows.append(_grad(outputs, parameters.values(), masked, keep=True))
    return _stacked(parameters, rows)


def copies(model: nn.Module, loss: Loss, inputs: Any, targets: Any) -> Rows:
    """Row m is ``∂L/∂θ_m``, with ``θ_m`` the copy of the parameters that rank m of N applies to sample m.

    N ranks run in lock-step, each with one sample and with parameters of its own. What crosses samples is a
    collective of the activations: every rank contributes its own, and gets the statistic, from which it goes on with
    its own parameters. This is what rank m holds before the gradients are reduced, under synchronised batch
    normalisation with one sample per rank. Rows sum to the gradient less its rest.

    Raises ``ValueError`` for a model whose mixing of samples is not among the known collectives.
    """
    parameters = _parameters(model, loss)
    with _untouched(model, loss):
        before = copy.deepcopy(model)  # a run may move on the buffers that the next one starts from
        run, calls = _recorded(model, inputs)
        ranks = [copy.deepcopy(before) for _ in range(run.samples)]
        with_grad = [[p for p in rank.parameters() if p.requires_grad] for rank in ranks]
        parts = _in_lock_step(ranks, run, calls, inputs)
        joined = [torch.cat(part) for part in zip(*parts, strict=True)]
        _check_same(run, joined, "copies")
        value = _evaluate(loss, run.with_own(joined, detach=True), targets)
        grads = iter(_grad([value], [p for rank in with_grad for p in rank]))
    of_loss = [torch.zeros_like(p) for p in list(parameters.values())[len(with_grad[0]) :]]
    return _stacked(parameters, [[next(grads) for _ in rank] + of_loss for rank in with_grad])


def frozen(model: nn.Module, loss: Loss, inputs: Any, targets: Any) -> Rows:
    """Row n is the component row of sample n with everything that crosses samples held constant.

    The statistics of the batch are recorded once; sample n then runs alone with them, and ``∂L/∂F_n``, taken at the
    predictions of the batch, is pulled back. The rows do not sum to the gradient where statistics depend on θ.

    Raises ``ValueError`` where what crosses samples is no statistic, as in attention between samples.
    """
    parameters = _parameters(model, loss)
    rows = []
    with _untouched(model, loss):
        run, calls = _recorded(model, inputs)
        cotangents = _cotangents(run, loss, targets)
    for n in range(run.samples):
        with _untouched(model, loss):
            alone = _alone(model, run, inputs, _Replay(n, run.samples, calls, _constant(calls)))
            _check_same(run, alone, "frozen", n)
            rows.append(_grad(alone, parameters.values(), [v[n : n + 1] for v in cotangents]))
    return _stacked(parameters, rows)


def _stacked(parameters: dict[str, Tensor], rows: list[list[Tensor]]) -> Rows:
    return {name: torch.stack([row[i] for row in rows]) for i, name in enumerate(parameters)}


def _check_same(run: _Run, found: Sequence[Tensor], function: str, n: int | None = None) -> None:
    """Whatever crosses samples unseen shows in the predictions."""
    for i, value in zip(run.own, found, strict=True):
        batch = run.leaves[i].detach() if n is None else run.leaves[i].detach()[n : n + 1]
        error = (value.detach() - batch).abs().max().item() if value.numel() else 0.0
        scale = batch.abs().max().item() if batch.numel() else 0.0
        if not error <= 1e-10 * (1 + scale):
            raise ValueError(MSG_DIFFERS.format(error=error, function=function))


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
    return [getattr(owner, name) for owner in owners for name in names.split() if hasattr(owner, name)]


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
    split = _Split(lambda x: x.logsumexp(dim, keepdim=True), lambda x, total: x - total if log else (x - total).exp())
    return _Op(func.__name__, [args[0]], lambda axes: split if axes[0] == dim % args[0].ndim else None)


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

    return _Op("batch_norm", [x], lambda axes: _Split(statistic, finish) if axes[0] in over else None)


def _dropout(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Op | None:
    call = inspect.signature(F.dropout).bind(*args, **kwargs)
    call.apply_defaults()
    p = call.arguments["p"]
    return _Op("dropout", [call.arguments["input"]], lambda axes: None, p) if call.arguments["training"] and p else None


def _product(func: Any, args: tuple[Any, ...]) -> _Op | None:
    """``a @ b``: a sum over samples where both carry them on the axis that is summed; else, where both carry them,
    every sample meets all the ``b`` of the others."""
    a, b = args
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return None

    def split(axes: Axes) -> _Split | None:
        if None in axes or (a.ndim == b.ndim > 2 and axes[0] == axes[1] == 0):  # one product per sample
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
        summed = _Split(lambda *xs: torch.einsum(equation, *xs), lambda *xs_and_total: xs_and_total[-1])
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


class _Replay(TorchFunctionMode):
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
            raise ValueError(MSG_PATH.format(got="nothing more", expected=self.calls[self.index + 1].name))

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
        if alone.ndim != batch.ndim or len(axes) != 1 or batch.shape[axes[0]] != self.samples * alone.shape[axes[0]]:
            shapes = {"alone": tuple(alone.shape), "batch": tuple(batch.shape), "samples": self.samples}
            raise ValueError(MSG_SLICE.format(**shapes))
        return axes[0]

    def _own(self, batch: Tensor, axis: int | None) -> Tensor:
        return batch if axis is None else batch.chunk(self.samples, axis)[self.n]


def _recorded(model: nn.Module, inputs: Any) -> tuple[_Run, list[_Call]]:
    with _Record() as record:
        run = _run(model, inputs)
    return run, record.calls


def _alone(model: nn.Module, run: _Run, inputs: Any, replay: _Replay) -> list[Tensor]:
    """Sample n's predictions, ``[1, ...]`` each; tensors without the sample axis are handed over whole."""

    def cut(x: Any) -> Any:
        of_samples = isinstance(x, Tensor) and x.ndim and x.shape[0] == run.samples
        return x[replay.n : replay.n + 1] if of_samples else x

    own = tree_map(cut, inputs)
    with replay:
        leaves = tree_leaves(_predict(model, own))
    replay.finished()
    return [leaves[i] for i in run.own]


def _constant(calls: list[_Call]) -> Ask:
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
                for own, axis, parts in zip(op.inputs, axes, zip(*everyone, strict=True), strict=True)
            ]
            return split.statistic(*joined)

        return collective

    def hold(self, work: Callable[[int], None]) -> None:
        """Run ``work(rank)`` in one thread per rank; the first error of a rank is raised here."""
        threads = [threading.Thread(target=self._attend, args=(work, n), daemon=True) for n in range(self.samples)]
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


def _in_lock_step(ranks: list[nn.Module], run: _Run, calls: list[_Call], inputs: Any) -> list[list[Tensor]]:
    """Per rank its predictions. What is shared but depends on parameters is each rank's own."""
    meeting = _Meeting(run.samples)
    found: dict[int, list[Tensor]] = {}

    def work(n: int) -> None:
        replay = _Replay(n, run.samples, calls, meeting.ask(n))
        found[n] = _alone(ranks[n], run, inputs, replay)

    meeting.hold(work)
    return [found[n] for n in range(run.samples)]


# --- quantities of rows ---------------------------------------------------------------------------


def _matrix(row: Tensor) -> Tensor:
    return row.reshape(row.shape[0], row.shape[1:].numel())


def flat(rows: Rows) -> Tensor:
    """``[N, D]``, parameters one after the other."""
    return torch.cat([_matrix(row) for row in rows.values()], 1)


def squared_norms(rows: Rows) -> tuple[dict[str, Tensor], Tensor]:
    """``‖row_n‖²``: per parameter ``{name: [N]}``, and over all of them ``[N]``."""
    return {name: _matrix(row).square().sum(1) for name, row in rows.items()}, flat(rows).square().sum(1)


def sum_of_squares(rows: Rows) -> dict[str, Tensor]:
    """``Σ_n row_n²``, entry by entry: ``{name: [*param]}``."""
    return {name: row.square().sum(0) for name, row in rows.items()}


def second_moment(rows: Rows) -> dict[str, Tensor]:
    """``(1/N) Σ_n row_n²``, entry by entry: ``{name: [*param]}``."""
    return {name: row.square().mean(0) for name, row in rows.items()}


def variance(rows: Rows) -> dict[str, Tensor]:
    """``(1/N) Σ_n (row_n - mean row)²``, the biased one, entry by entry: ``{name: [*param]}``."""
    return {name: (row - row.mean(0)).square().mean(0) for name, row in rows.items()}


def dots(rows: Rows) -> Tensor:
    """``⟨row_n, row_m⟩``, over all parameters: ``[N, N]``."""
    return flat(rows) @ flat(rows).T


def clipped_sum(rows: Rows, max_norm: float) -> dict[str, Tensor]:
    """``Σ_n row_n min(1, max_norm / ‖row_n‖)``, the norm over all parameters: ``{name: [*param]}``."""
    norms = flat(rows).square().sum(1).sqrt()
    factors = [min(1.0, max_norm / norm) if norm else 1.0 for norm in norms.tolist()]
    return {name: torch.stack([f * r for f, r in zip(factors, row, strict=True)]).sum(0) for name, row in rows.items()}
