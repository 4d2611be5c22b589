"""The loss, tried with other predictions and targets for half of the samples.

Reduction: the row ``∂L/∂F_n = w_n ∇ℓ(F_n, y_n)`` of a sample that was kept is what it was. SIMD
loss: so is its direction, and equal samples have rows of one direction. Canonical split: with other
parameters the loss at the same predictions is what it was. Every test is a few evaluations of the
loss; only the last runs the model, and only where the loss is code of the user's that may see it.
"""

from __future__ import annotations

import builtins
import functools
from collections.abc import Callable, Iterator
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_unflatten

from unbatch.analysis.structure import Structure
from unbatch.capture.code_names import codes_in
from unbatch.capture.trees import copied
from unbatch.linalg.precision import LOSS_WITH_CASTS
from unbatch.verification.counterexample import Counterexample
from unbatch.verification.forward_trial import markers
from unbatch.verification.loss_experiment import TINY, LossExperiment
from unbatch.verification.loss_tests import (
    direction_depends_on_index,
    direction_depends_on_predictions,
    not_a_sum,
    parameter_enters,
    sines,
)
from unbatch.verification.trial_result import Contradiction, Outcome

NO_ROWS = "the loss has no gradient with a row for each sample"
NOT_RUN = "the loss takes no other predictions"

MOVED = "the gradient by predictions that were kept changed by {amount:.2g} of its size"
TURNED = "the gradient by predictions that were kept turned by {amount:.2g}"
UNEQUAL = "samples with equal predictions and targets have other gradients"
ENTERS = "other parameters changed the loss at the same predictions by {amount:.2g} of its size"

# A change that counts is this many times what rounding does.
ROUNDINGS = 10


def try_loss(structure: Structure, loss: LossExperiment) -> Outcome:
    """Return what came of the trial of reduction and SIMD loss."""
    try:
        rows = loss.gradient(loss.predictions())
        if not rows.shape[1] or rows.is_complex():
            return NO_ROWS
        if structure.reduction:
            return _try_reduction(structure, loss, rows)
        return _try_directions(structure, loss, rows)
    except Exception:
        return NOT_RUN


# --- a sum ----------------------------------------------------------------------------------------


def _try_reduction(structure: Structure, loss: LossExperiment, rows: Tensor) -> Outcome:
    """Return what came of the trial of a sum over samples, whose rows do not change at all."""
    mixed = _mixed(loss)
    amount = _moved(loss, rows, loss.gradient(mixed))
    if amount:
        return _against_reduction(loss, amount)
    against: dict[str, Contradiction] = {}
    if not _uses_targets_of_others(structure):
        for marked, other in _with_other_targets(loss):
            amount = _moved(loss, rows, other.gradient(mixed))
            if amount:
                detail = MOVED.format(amount=amount)
                against["reduction"] = Contradiction(detail, None, frozenset({"targets"}), marked)
                break
    if structure.simd_loss:
        against |= _against_one_function(loss, rows)
    return against


def _against_reduction(loss: LossExperiment, amount: float) -> Outcome:
    """Return what is left of a sum whose rows depend on the predictions of others."""
    detail = MOVED.format(amount=amount)
    return {
        "reduction": Contradiction(detail, not_a_sum(loss)),
        "simd_loss": Contradiction(detail, direction_depends_on_predictions(loss)),
    }


def _moved(loss: LossExperiment, rows: Tensor, others: Tensor) -> float:
    """Return by how much the row of a kept sample changed; 0 where it may be rounding."""
    keep = _kept(loss).to(rows.device)
    before, after = rows[keep], others[keep]
    if not torch.isfinite(before).all() or not torch.isfinite(after).all():
        return 0.0
    size = float(before.norm(dim=1).max()) + TINY
    change = float((after - before).norm(dim=1).max())
    # Relative to the largest row: the smaller ones may be rounding of it.
    if change <= loss.tolerances.direction * size or change <= ROUNDINGS * loss.floor(rows):
        return 0.0
    return change / size


def _uses_targets_of_others(structure: Structure) -> bool:
    depends = structure.reduction.weights_depend_on | structure.simd_loss.weights_depend_on
    return "targets" in depends


# --- one function of each sample ------------------------------------------------------------------


def _try_directions(structure: Structure, loss: LossExperiment, rows: Tensor) -> Outcome:
    """Return what came of the trial of a SIMD loss that is no sum: rows keep their direction."""
    if rows.shape[1] == 1:
        # A single number has no direction, and any function of the numbers is one of theirs alone.
        return {}
    others = loss.gradient(_mixed(loss))
    amount = _turned(loss, rows, others, _kept(loss))
    if amount:
        witness = direction_depends_on_predictions(loss)
        return {"simd_loss": Contradiction(TURNED.format(amount=amount), witness)}
    return _against_one_function(loss, rows)


def _against_one_function(loss: LossExperiment, rows: Tensor) -> dict[str, Contradiction]:
    """Return that equal samples have rows of other directions, where they have."""
    # A single entry has no direction.
    if rows.shape[1] < 2 or not _are_equal_by_arguments(loss):
        return {}
    samples = loss.experiment.samples
    equal = loss.with_targets(lambda t: t[:1].expand(samples, *t.shape[1:]).contiguous())
    others = equal.gradient(equal.swapped(dict.fromkeys(range(samples), 0)))
    everyone = torch.ones(samples, dtype=torch.bool)
    if not _turned(loss, others[:1].expand_as(others), others, everyone):
        return {}
    witness = direction_depends_on_index(loss)
    if witness is None:
        return {}
    return {"simd_loss": Contradiction(UNEQUAL, witness)}


def _are_equal_by_arguments(loss: LossExperiment) -> bool:
    """Return whether samples with equal predictions and targets are equal in all.

    They are not where the loss has noise, or constants for each sample (lengths, a table).
    """
    graph, samples = loss.experiment.graph, loss.experiment.samples
    if loss.experiment.program.loss is None:
        return False
    allowed = {ref.index for ref in (*graph.targets, *graph.predictions) if ref is not None}
    for step in graph.loss_steps:
        allowed.update(ref.index for ref in step.made())
    for step in graph.loss_steps:
        if step.noise:
            return False
        for ref in step.refs():
            if ref.index not in allowed and samples in graph.values[ref.index].shape:
                return False
        if any(isinstance(a, list | tuple) and len(a) == samples for a in step.named.values()):
            return False
    return True


def _turned(loss: LossExperiment, rows: Tensor, others: Tensor, watched: Tensor) -> float:
    """Return how far a watched row turns at most, by its sine; 0 where it may be rounding."""
    watched = watched.to(rows.device)
    rows_watched, others_watched = rows[watched], others[watched]
    if not len(rows_watched):
        return 0.0
    worst = float(sines(rows_watched, others_watched, 0.0).max())
    if worst > loss.tolerances.direction:
        # A few evaluations of the loss, for what looks like a turn alone.
        worst = float(sines(rows_watched, others_watched, loss.floor(rows)).max())
    return worst if worst > loss.tolerances.direction else 0.0


# --- other predictions and targets ----------------------------------------------------------------


def _kept(loss: LossExperiment) -> Tensor:
    """Return which samples keep their predictions and targets: every second one."""
    return torch.arange(loss.experiment.samples) % 2 == 1


def _sources(loss: LossExperiment) -> list[int]:
    """Return the sample that each one gets its predictions and targets from."""
    keep, samples = _kept(loss).tolist(), loss.experiment.samples
    return [n if keep[n] else (n + 1) % samples for n in range(samples)]


def _mixed(loss: LossExperiment) -> list[Tensor]:
    """Return predictions, those of every second sample half way to another one's.

    In between: probabilities stay probabilities, and the largest of the batch is another one.
    """
    sources = dict(enumerate(_sources(loss)))
    mixed = []
    for own, other in zip(loss.predictions(), loss.swapped(sources), strict=True):
        mixed.append((own + other) / 2 if own.is_floating_point() else other)
    return mixed


def _with_other_targets(loss: LossExperiment) -> Iterator[tuple[bool, LossExperiment]]:
    """Yield the loss with other targets for every second sample, or one that is ignored.

    The first entry says whether it is the latter.
    """
    if loss.experiment.program.loss is None:
        return  # labels are inputs there
    if not loss.experiment.samples_are_alike:
        return  # rows may name their sample, and others would then be nobody's
    order = torch.tensor(_sources(loss))
    yield False, loss.with_targets(lambda t: t[order.to(t.device)])
    # What PyTorch's own losses ignore is theirs to divide by: of one without ignored labels the
    # weights depend on no others, whether it looks for them by a comparison or not.
    if _is_library(loss.experiment.program.loss):
        return
    graph = loss.experiment.graph
    for marker in markers(graph, graph.loss_steps):
        other = loss.with_targets(functools.partial(_with_marker, marker=marker))
        if _is_taken(other):
            yield True, other


def _with_marker(t: Tensor, marker: int) -> Tensor:
    """Return integers with a marker for the first sample, which is not kept."""
    if t.is_floating_point() or t.dtype == torch.bool:
        return t
    t = t.clone()
    t[0] = marker
    return t


def _is_taken(loss: LossExperiment) -> bool:
    """Return whether the loss takes such targets."""
    try:
        return bool(torch.isfinite(loss.value(loss.predictions())))
    except Exception:
        return False


# --- the canonical split --------------------------------------------------------------------------


def try_split(loss: LossExperiment) -> Outcome:
    """Return what came of the trial that no parameter enters past the predictions.

    The model runs with other parameters, as it may keep something of them for the loss.
    """
    program = loss.experiment.program
    if program.loss is None or reads_only_arguments(program.loss):
        return {}
    try:
        before = _loss_before(loss)
        amount = _change(before, _loss_after(loss, 1.5, 0.1))
        if amount <= LOSS_WITH_CASTS.parameter:
            return {}
        # What the model keeps of other things is there before and after.
        amount = _change(_loss_after(loss, 1.0, 0.0), _loss_after(loss, 1.5, 0.1))
    except Exception:
        return NOT_RUN
    if amount <= LOSS_WITH_CASTS.parameter:
        return {}
    return {"canonical_split": Contradiction(ENTERS.format(amount=amount), _entering(loss))}


def _entering(loss: LossExperiment) -> Counterexample | None:
    """Return a parameter that enters the loss by itself; what the model keeps is not there then."""
    try:
        return parameter_enters(loss)
    except Exception:
        return None


def _loss_before(loss: LossExperiment) -> Tensor:
    """Return the loss as it is; where it needs what the model keeps, the model runs."""
    try:
        return loss.value([loss.leaves[i] for i in loss.at]).detach()
    except Exception:
        return _loss_after(loss, 1.0, 0.0)


def _loss_after(loss: LossExperiment, factor: float, offset: float) -> Tensor:
    """Return the loss at the batch's predictions, after a run with other parameters."""
    program, experiment = loss.experiment.program, loss.experiment
    # Before parameters change: an output may be a view of one.
    output = tree_unflatten([copied(leaf) for leaf in loss.leaves], loss.spec)
    with program.untouched(experiment.graph.rng):
        with torch.no_grad():
            for p in program.parameters.values():
                if p.is_floating_point() and factor != 1.0:
                    p.mul_(factor).add_(offset)
        program.predict(experiment.inputs)
        value: Tensor = program.evaluate(output, experiment.targets)
    return value.detach()


def _change(before: Tensor, after: Tensor) -> float:
    """Return by how much a loss changed, relative to it; 0 where one is not finite."""
    change = float((after - before).abs()) / (float(before.abs()) + TINY)
    return change if torch.isfinite(torch.tensor(change)) else 0.0


def reads_only_arguments(loss: Callable[..., Any]) -> bool:
    """Return whether a loss sees nothing but what it is called with, and PyTorch.

    Of functions by the names in their code; a method, or an object with a call, may see anything.
    """
    if _is_library(loss):
        return True
    if not isinstance(loss, FunctionType):
        return False
    if loss.__closure__ or loss.__defaults__ or loss.__kwdefaults__:
        return False
    for code in codes_in(loss.__code__):
        if not all(_is_of_library(loss, name) for name in code.co_names):
            return False
    return True


def _is_library(loss: Callable[..., Any]) -> bool:
    """Return whether a loss is one of PyTorch's."""
    if isinstance(loss, functools.partial):
        return _is_library(loss.func)
    owner = type(loss) if isinstance(loss, nn.Module) else loss
    return (getattr(owner, "__module__", None) or "").startswith("torch.")


def _is_of_library(loss: FunctionType, name: str) -> bool:
    """Return whether a name is an attribute, a builtin, or a module of PyTorch."""
    if name not in loss.__globals__:
        return True
    value = loss.__globals__[name]
    if isinstance(value, ModuleType):
        return value.__name__.partition(".")[0] in ("torch", "math", builtins.__name__)
    return False
