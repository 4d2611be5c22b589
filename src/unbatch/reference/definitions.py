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
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from unbatch.reference.isolated_samples import (
    Loss,
    Replay,
    Run,
    alone,
    check_same,
    constant,
    evaluate,
    in_lock_step,
    predict,
    recorded,
    run_batch,
)

Rows = dict[str, Tensor]


def _cotangents(run: Run, loss: Loss, targets: Any) -> list[Tensor]:
    """``∂L/∂F`` for the predictions that carry samples."""
    fresh = [run.leaves[i].detach().clone().requires_grad_() for i in run.own]
    return _grad([evaluate(loss, run.with_own(fresh, detach=True), targets)], fresh)


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
        out |= {
            f"loss.{n}": p
            for n, p in loss.named_parameters()
            if not any(p is q for q in out.values())
        }
    return {n: p for n, p in out.items() if p.requires_grad}


def _grad(
    outputs: Sequence[Tensor],
    by: Iterable[Tensor],
    cotangents: Sequence[Tensor] | None = None,
    keep: bool = False,
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
        value = evaluate(loss, predict(model, inputs), targets)
        return dict(zip(parameters, _grad([value], parameters.values()), strict=True))


def rest(model: nn.Module, loss: Loss, inputs: Any, targets: Any) -> dict[str, Tensor]:
    """The part of ``∇L`` that does not pass through the predictions of samples: ``{name: [*param]}``.

    It is the gradient of L with those predictions held constant: what a weight decay, a parameter of the loss, or a
    prediction without a sample axis (an auxiliary loss) contributes.
    """
    parameters = _parameters(model, loss)
    with _untouched(model, loss):
        run = run_batch(model, inputs)
        constant = [run.leaves[i].detach() for i in run.own]
        value = evaluate(loss, run.with_own(constant, detach=False), targets)
        return dict(zip(parameters, _grad([value], parameters.values()), strict=True))


def component(model: nn.Module, loss: Loss, inputs: Any, targets: Any) -> Rows:
    """Row n is ``(J_θ F_n)ᵀ ∂L/∂F_n``: the cotangent of sample n alone, pulled back through the whole batch.

    The rows sum to the gradient less its rest. For ``L = Σ w_n ℓ(F_n, y_n)`` row n is the gradient of the n-th term.
    """
    parameters = _parameters(model, loss)
    with _untouched(model, loss):
        run = run_batch(model, inputs)
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
        run, calls = recorded(model, inputs)
        ranks = [copy.deepcopy(before) for _ in range(run.samples)]
        with_grad = [[p for p in rank.parameters() if p.requires_grad] for rank in ranks]
        parts = in_lock_step(ranks, run, calls, inputs)
        joined = [torch.cat(part) for part in zip(*parts, strict=True)]
        check_same(run, joined, "copies")
        value = evaluate(loss, run.with_own(joined, detach=True), targets)
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
        run, calls = recorded(model, inputs)
        cotangents = _cotangents(run, loss, targets)
    for n in range(run.samples):
        with _untouched(model, loss):
            own = alone(model, run, inputs, Replay(n, run.samples, calls, constant(calls)))
            check_same(run, own, "frozen", n)
            rows.append(_grad(own, parameters.values(), [v[n : n + 1] for v in cotangents]))
    return _stacked(parameters, rows)


def _stacked(parameters: dict[str, Tensor], rows: list[list[Tensor]]) -> Rows:
    return {name: torch.stack([row[i] for row in rows]) for i, name in enumerate(parameters)}


# --- the Gauss-Newton matrix ----------------------------------------------------------------------
#
# D entries of all parameters, M = N·C entries of all predictions: sample by sample, and for each sample leaf by leaf.


def jacobian(model: nn.Module, loss: Loss, inputs: Any, targets: Any) -> Tensor:
    """``J = ∂F/∂θ``, ``[M, D]``: a backward pass for every entry of the predictions."""
    parameters = _parameters(model, loss)
    with _untouched(model, loss):
        run = run_batch(model, inputs)
        return _rows_of([run.leaves[i] for i in run.own], run.samples, list(parameters.values()))


def frozen_jacobian(model: nn.Module, loss: Loss, inputs: Any, targets: Any) -> Tensor:
    """The same with everything that crosses samples held constant, as for frozen rows; raises as these do."""
    parameters, rows = _parameters(model, loss), []
    with _untouched(model, loss):
        run, calls = recorded(model, inputs)
    for n in range(run.samples):
        with _untouched(model, loss):
            own = alone(model, run, inputs, Replay(n, run.samples, calls, constant(calls)))
            check_same(run, own, "frozen", n)
            rows.append(_rows_of(own, 1, list(parameters.values())))
    return torch.cat(rows)


def _rows_of(outputs: list[Tensor], samples: int, by: list[Tensor]) -> Tensor:
    rows = []
    for n in range(samples):
        for leaf, entries in [(k, t[n].numel()) for k, t in enumerate(outputs)]:
            for entry in range(entries):
                cotangents = [t.new_zeros(t.shape) for t in outputs]
                cotangents[leaf][n].view(-1)[entry] = 1
                rows.append(
                    torch.cat([g.reshape(-1) for g in _grad(outputs, by, cotangents, keep=True)])
                )
    return torch.stack(rows)


def output_hessian(model: nn.Module, loss: Loss, inputs: Any, targets: Any) -> Tensor:
    """``H = ∇²_F L`` at the predictions, ``[M, M]``: double backward, row by row."""
    with _untouched(model, loss):
        run = run_batch(model, inputs)
        fresh = [run.leaves[i].detach().clone().requires_grad_() for i in run.own]
        value = evaluate(loss, run.with_own(fresh, detach=True), targets)
        slopes = torch.autograd.grad(value, fresh, create_graph=True, allow_unused=True)
        rows = []
        for n in range(run.samples):
            for slope, leaf in zip(slopes, fresh, strict=True):
                for entry in range(leaf[n].numel()):
                    of = [] if slope is None else [slope[n].reshape(-1)[entry]]
                    rows.append([g.reshape(run.samples, -1) for g in _grad(of, fresh, keep=True)])
        return torch.stack([torch.cat(row, 1).reshape(-1) for row in rows])


def ggn(model: nn.Module, loss: Loss, inputs: Any, targets: Any, frozen: bool = False) -> Tensor:
    """``G = Jᵀ H J``, ``[D, D]`` (Schraudolph 2002); with ``frozen``, J holds what crosses samples constant."""
    J = (frozen_jacobian if frozen else jacobian)(model, loss, inputs, targets)
    return J.T @ output_hessian(model, loss, inputs, targets) @ J


def ggn_diagonals(model: nn.Module, loss: Loss, inputs: Any, targets: Any) -> Tensor:
    """``[N, D]``: the diagonal of ``J_nᵀ H_nn J_n`` for every component; where H is block diagonal they sum to G's."""
    J, H = jacobian(model, loss, inputs, targets), output_hessian(model, loss, inputs, targets)
    with _untouched(model, loss):
        samples = run_batch(model, inputs).samples
    blocks = zip(
        J.chunk(samples),
        [h.chunk(samples, 1)[n] for n, h in enumerate(H.chunk(samples))],
        strict=True,
    )
    return torch.stack([(Jn * (Hn @ Jn)).sum(0) for Jn, Hn in blocks])


# --- quantities of rows ---------------------------------------------------------------------------


def _matrix(row: Tensor) -> Tensor:
    return row.reshape(row.shape[0], row.shape[1:].numel())


def flat(rows: Rows) -> Tensor:
    """``[N, D]``, parameters one after the other."""
    return torch.cat([_matrix(row) for row in rows.values()], 1)


def squared_norms(rows: Rows) -> tuple[dict[str, Tensor], Tensor]:
    """``‖row_n‖²``: per parameter ``{name: [N]}``, and over all of them ``[N]``."""
    return {name: _matrix(row).square().sum(1) for name, row in rows.items()}, flat(
        rows
    ).square().sum(1)


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
    return {
        name: torch.stack([f * r for f, r in zip(factors, row, strict=True)]).sum(0)
        for name, row in rows.items()
    }
