"""The definitions, slow and plain: what the fast paths are tested against, and what the words mean.

Loops over ``torch.autograd.grad`` and threads, in whatever precision the model has; meant for
float64. Nothing here knows the recorded graph of the package, its analysis or any engine. A model
is called as ``model(X)``, ``model(*X)`` for a tuple and ``model(**X)`` for a dict; samples lie on
axis 0 of inputs and predictions; the loss is ``loss(predictions, y)``. Every run starts from the
buffers and the random state of the moment of the call, and leaves both as they were.

Rows are ``{name: [N, *param]}`` over the parameters that require a gradient: those of the model in
their own order, then those of a loss that is a module, as ``loss.<name>``. Everything is in the
scale in which it enters the loss.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from unbatch.reference.isolated_samples import (
    BatchRun,
    IsolatedSample,
    Loss,
    check_same_predictions,
    evaluate,
    in_lock_step,
    predict,
    record_batch,
    run_alone,
    run_batch,
    statistics_of_batch,
)

Rows = dict[str, Tensor]


# --- the gradient and its decompositions ----------------------------------------------------------


def gradient(model: nn.Module, loss: Loss, inputs: Any, targets: Any) -> dict[str, Tensor]:
    """``∇L``: ``{name: [*param]}``, zero where a parameter is not used."""
    parameters = _parameters(model, loss)
    with _untouched(model, loss):
        value = evaluate(loss, predict(model, inputs), targets)
        return _by_name(parameters, _grad([value], parameters.values()))


def rest(model: nn.Module, loss: Loss, inputs: Any, targets: Any) -> dict[str, Tensor]:
    """The part of ``∇L`` that bypasses the predictions of samples: ``{name: [*param]}``.

    It is the gradient of L with those predictions held constant: what a weight decay, a parameter
    of the loss, or a prediction without a sample axis (an auxiliary loss) contributes.
    """
    parameters = _parameters(model, loss)
    with _untouched(model, loss):
        run = run_batch(model, inputs)
        constants = list(map(Tensor.detach, run.predictions))
        # All other leaves stay connected: they bypass the predictions.
        value = evaluate(loss, run.with_own(constants, detach=False), targets)
        return _by_name(parameters, _grad([value], parameters.values()))


def component(model: nn.Module, loss: Loss, inputs: Any, targets: Any) -> Rows:
    """Row n is ``(J_θ F_n)ᵀ ∂L/∂F_n``: the cotangent of sample n alone, through the whole batch.

    The rows sum to the gradient less its rest. For ``L = Σ_n w_n ℓ(F_n, y_n)`` row n is the
    gradient of the n-th term.
    """
    parameters = _parameters(model, loss)
    with _untouched(model, loss):
        run = run_batch(model, inputs)
        cotangents = _cotangents(run, loss, targets)
        rows = []
        for n in range(run.samples):
            # Other samples have no cotangent, and still take part: F_n may depend on them.
            of_sample = _only_sample(cotangents, n)
            rows.append(_grad(run.predictions, parameters.values(), of_sample, keep=True))
    return _stacked(parameters, rows)


def copies(model: nn.Module, loss: Loss, inputs: Any, targets: Any) -> Rows:
    """Row m is ``∂L/∂θ_m``, with ``θ_m`` the copy of the parameters that is applied to sample m.

    N ranks run in lock-step, each with one sample and with parameters of its own. What crosses
    samples is a collective of the activations: every rank contributes its own, and gets the
    statistic, from which it goes on with its own parameters. This is what rank m holds before the
    gradients are reduced, under synchronised batch normalisation with one sample per rank. Rows sum
    to the gradient less its rest.

    Raises ``ValueError`` for a model whose mixing of samples is not among the known collectives.
    """
    parameters = _parameters(model, loss)
    with _untouched(model, loss):
        # A run may move on the buffers that the next one starts from.
        before = copy.deepcopy(model)
        run, calls = record_batch(model, inputs)
        ranks = [copy.deepcopy(before) for _ in range(run.samples)]
        of_ranks = in_lock_step(ranks, run, calls, inputs)
        joined = _transposed(of_ranks, torch.cat)
        check_same_predictions(run, joined, "copies")
        # One backward pass reaches the parameters of all ranks, each apart from the others.
        value = evaluate(loss, run.with_own(joined, detach=True), targets)
        theta: list[Tensor] = []
        for rank in ranks:
            theta += _parameters(rank, loss=None).values()
        grads = _grad([value], theta)
    count = len(theta) // run.samples
    # A parameter of the loss belongs to no rank: what it contributes is in the rest.
    of_loss = _zeros(list(parameters.values())[count:])
    rows = []
    for m in range(run.samples):
        of_rank = grads[m * count : (m + 1) * count]
        rows.append(of_rank + of_loss)
    return _stacked(parameters, rows)


def frozen(model: nn.Module, loss: Loss, inputs: Any, targets: Any) -> Rows:
    """Row n is the component row of sample n with everything that crosses samples held constant.

    The statistics of the batch are recorded once; sample n then runs alone with them, and
    ``∂L/∂F_n``, taken at the predictions of the batch, is pulled back. The rows do not sum to the
    gradient where statistics depend on θ.

    Raises ``ValueError`` where what crosses samples is no statistic, as in attention across them.
    """
    parameters = _parameters(model, loss)
    with _untouched(model, loss):
        run, calls = record_batch(model, inputs)
        # At the predictions of the batch: the loss may depend on all of them.
        cotangents = _cotangents(run, loss, targets)
    rows = []
    for n in range(run.samples):
        with _untouched(model, loss):
            sample = IsolatedSample(n, run.samples, calls, statistics_of_batch(calls))
            predictions = run_alone(model, run, inputs, sample)
            check_same_predictions(run, predictions, "frozen", n)
            # Alone, the sample is a batch of one.
            of_sample = [v[n : n + 1] for v in cotangents]
            rows.append(_grad(predictions, parameters.values(), of_sample))
    return _stacked(parameters, rows)


# --- the Gauss-Newton matrix ----------------------------------------------------------------------
#
# D entries of all parameters, M = N·C entries of all predictions: sample by sample, and for each
# sample leaf by leaf.


def jacobian(model: nn.Module, loss: Loss, inputs: Any, targets: Any) -> Tensor:
    """``J = ∂F/∂θ``, ``[M, D]``: a backward pass for every entry of the predictions."""
    parameters = list(_parameters(model, loss).values())
    with _untouched(model, loss):
        run = run_batch(model, inputs)
        return _jacobian_rows(run.predictions, run.samples, parameters)


def frozen_jacobian(model: nn.Module, loss: Loss, inputs: Any, targets: Any) -> Tensor:
    """``J`` with everything that crosses samples held constant; raises as ``frozen`` does."""
    parameters = list(_parameters(model, loss).values())
    with _untouched(model, loss):
        run, calls = record_batch(model, inputs)
    blocks = []
    for n in range(run.samples):
        with _untouched(model, loss):
            sample = IsolatedSample(n, run.samples, calls, statistics_of_batch(calls))
            predictions = run_alone(model, run, inputs, sample)
            check_same_predictions(run, predictions, "frozen", n)
            blocks.append(_jacobian_rows(predictions, 1, parameters))
    return torch.cat(blocks)


def _jacobian_rows(predictions: list[Tensor], samples: int, parameters: list[Tensor]) -> Tensor:
    rows = []
    for n in range(samples):
        for prediction in predictions:
            for entry in range(prediction[n].numel()):
                # The cotangent of a single entry gives its row of J.
                one_hot = prediction.new_zeros(prediction.shape)
                one_hot[n].view(-1)[entry] = 1
                grads = _grad([prediction], parameters, [one_hot], keep=True)
                rows.append(torch.cat([g.reshape(-1) for g in grads]))
    return torch.stack(rows)


def output_hessian(model: nn.Module, loss: Loss, inputs: Any, targets: Any) -> Tensor:
    """``H = ∇²_F L`` at the predictions, ``[M, M]``: double backward, row by row."""
    with _untouched(model, loss):
        run = run_batch(model, inputs)
        F = _as_variables(run)
        value = evaluate(loss, run.with_own(F, detach=True), targets)
        slopes = torch.autograd.grad(value, F, create_graph=True, allow_unused=True)
        rows = []
        for n in range(run.samples):
            for slope, leaf in zip(slopes, F, strict=True):
                for entry in range(leaf[n].numel()):
                    of = []
                    # Where the loss does not use a leaf, its rows are zero.
                    if slope is not None:
                        of = [slope[n].reshape(-1)[entry]]
                    # By sample first, so that columns are in the order of the rows.
                    columns = [g.reshape(run.samples, -1) for g in _grad(of, F, keep=True)]
                    rows.append(torch.cat(columns, 1).reshape(-1))
        return torch.stack(rows)


def ggn(model: nn.Module, loss: Loss, inputs: Any, targets: Any, frozen: bool = False) -> Tensor:
    """``G = Jᵀ H J``, ``[D, D]`` (Schraudolph 2002).

    With ``frozen``, J holds constant what crosses samples.
    """
    if frozen:
        J = frozen_jacobian(model, loss, inputs, targets)
    else:
        J = jacobian(model, loss, inputs, targets)
    H = output_hessian(model, loss, inputs, targets)
    return J.T @ H @ J


def ggn_diagonals(model: nn.Module, loss: Loss, inputs: Any, targets: Any) -> Tensor:
    """``[N, D]``: the diagonal of ``J_nᵀ H_nn J_n`` for every component n.

    Where H is block diagonal they sum to the diagonal of G.
    """
    J = jacobian(model, loss, inputs, targets)
    H = output_hessian(model, loss, inputs, targets)
    with _untouched(model, loss):
        samples = run_batch(model, inputs).samples
    diagonals = []
    for n in range(samples):
        J_n = J.chunk(samples)[n]
        H_nn = H.chunk(samples)[n].chunk(samples, 1)[n]
        diagonals.append((J_n * (H_nn @ J_n)).sum(0))
    return torch.stack(diagonals)


# --- quantities of rows ---------------------------------------------------------------------------
#
# A complex entry counts as two real ones, its real and its imaginary part: its square is that of
# its magnitude, and an inner product is the real part of the one with a conjugate.


def flat(rows: Rows) -> Tensor:
    """``[N, D]``, parameters one after the other."""
    return torch.cat([_matrix(row) for row in rows.values()], 1)


def squared_norms(rows: Rows) -> tuple[dict[str, Tensor], Tensor]:
    """``‖row_n‖²``: per parameter ``{name: [N]}``, and over all of them ``[N]``."""
    by_parameter = _each(rows, lambda row: _matrix(row).abs().square().sum(1))
    return by_parameter, flat(rows).abs().square().sum(1)


def sum_of_squares(rows: Rows) -> dict[str, Tensor]:
    """``Σ_n row_n²``, entry by entry: ``{name: [*param]}``."""
    return _each(rows, lambda row: row.abs().square().sum(0))


def second_moment(rows: Rows) -> dict[str, Tensor]:
    """``(1/N) Σ_n row_n²``, entry by entry: ``{name: [*param]}``."""
    return _each(rows, lambda row: row.abs().square().mean(0))


def variance(rows: Rows) -> dict[str, Tensor]:
    """``(1/N) Σ_n (row_n - mean row)²``, the biased one, entry by entry: ``{name: [*param]}``."""
    return _each(rows, lambda row: (row - row.mean(0)).abs().square().mean(0))


def dots(rows: Rows) -> Tensor:
    """``⟨row_n, row_m⟩``, over all parameters: ``[N, N]``."""
    products = flat(rows) @ flat(rows).mH
    return products.real


def clipped_sum(rows: Rows, max_norm: float) -> dict[str, Tensor]:
    """``Σ_n row_n min(1, max_norm / ‖row_n‖)``: ``{name: [*param]}``; norms over all parameters."""
    norms = flat(rows).abs().square().sum(1).sqrt()
    total = {}
    for name, row in rows.items():
        clipped = []
        for row_n, norm in zip(row, norms.tolist(), strict=True):
            # Only a row that is too long is divided by its norm, which may be zero otherwise.
            factor = 1.0
            if norm > max_norm:
                factor = max_norm / norm
            clipped.append(factor * row_n)
        total[name] = torch.stack(clipped).sum(0)
    return total


def _each(rows: Rows, function: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Return a function of the rows of every parameter."""
    return {name: function(row) for name, row in rows.items()}


def _matrix(row: Tensor) -> Tensor:
    return row.reshape(row.shape[0], row.shape[1:].numel())


# --- parameters, and plain autograd ---------------------------------------------------------------


def _parameters(model: nn.Module, loss: Any) -> dict[str, Tensor]:
    """Return the parameters that require a gradient, by name."""
    named: dict[str, Tensor] = dict(model.named_parameters())
    if isinstance(loss, nn.Module):
        # A loss may hold the model, whose parameters keep the names that they have there.
        of_model = set(map(id, named.values()))
        for name, p in loss.named_parameters():
            if id(p) not in of_model:
                named[f"loss.{name}"] = p
    return {name: p for name, p in named.items() if p.requires_grad}


def _grad(
    outputs: Sequence[Tensor],
    by: Iterable[Tensor],
    cotangents: Sequence[Tensor | None] | None = None,
    keep: bool = False,
) -> list[Tensor]:
    """``autograd.grad``, with zeros where nothing flows.

    ``cotangents``: one for each output; outputs that are numbers need none. ``keep``: the graph,
    for another call.
    """
    by = list(by)
    if cotangents is None:
        cotangents = [None] * len(outputs)
    smooth = []
    vectors = []
    for output, cotangent in zip(outputs, cotangents, strict=True):
        # Autograd refuses outputs that are constants.
        if output.requires_grad:
            smooth.append(output)
            vectors.append(cotangent)
    if not smooth or not by:
        return _zeros(by)
    grads = torch.autograd.grad(smooth, by, vectors, retain_graph=keep, materialize_grads=True)
    return list(grads)


def _as_variables(run: BatchRun) -> list[Tensor]:
    """Return the predictions as variables of their own, at the same values."""
    return [p.detach().clone().requires_grad_() for p in run.predictions]


def _cotangents(run: BatchRun, loss: Loss, targets: Any) -> list[Tensor]:
    """``∂L/∂F`` for the predictions that carry samples."""
    F = _as_variables(run)
    return _grad([evaluate(loss, run.with_own(F, detach=True), targets)], F)


def _only_sample(cotangents: list[Tensor], n: int) -> list[Tensor]:
    """Return the cotangents of sample n, and zeros for all others."""
    masked = []
    for v in cotangents:
        only_n = torch.zeros_like(v)
        only_n[n] = v[n]
        masked.append(only_n)
    return masked


def _by_name(parameters: dict[str, Tensor], grads: list[Tensor]) -> dict[str, Tensor]:
    return dict(zip(parameters, grads, strict=True))


def _stacked(parameters: dict[str, Tensor], rows: list[list[Tensor]]) -> Rows:
    """Return rows by parameter: ``rows[n][i]`` belongs to sample n and the i-th parameter."""
    return _by_name(parameters, _transposed(rows, torch.stack))


def _transposed(rows: list[list[Tensor]], join: Callable[..., Tensor]) -> list[Tensor]:
    """Return the i-th entries of all rows, joined, for every i."""
    return [join(entries) for entries in zip(*rows, strict=True)]


def _zeros(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return zeros in the shapes of tensors."""
    return list(map(torch.zeros_like, tensors))


# --- a run changes nothing ------------------------------------------------------------------------


@contextmanager
def _untouched(*modules: Any) -> Iterator[None]:
    """Runs get copies of the buffers, and a random state that is put back.

    Copies, because writing the old values back would spoil what autograd has saved.
    """
    saved = []
    for module in modules:
        if isinstance(module, nn.Module):
            saved += _buffers(module)
    # A buffer that several modules share has one copy that they share.
    copies = {}
    for _, _, buffer in saved:
        copies[id(buffer)] = buffer.detach().clone()
    try:
        for module, name, buffer in saved:
            module._buffers[name] = copies[id(buffer)]
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            yield
    finally:
        for module, name, buffer in saved:
            module._buffers[name] = buffer


def _buffers(model: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    buffers = []
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                buffers.append((module, name, buffer))
    return buffers
