"""Whether the recorded graph may stand for the model: the same values and gradients on a batch.

The model and the replay of its recording are run on the same inputs, and compared in what they
return and in one product of the Jacobian with a random cotangent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from unbatch.capture.after_run import AfterRun
from unbatch.capture.hooks import HookWatch
from unbatch.capture.trees import dense, is_plain
from unbatch.linalg.precision import largest
from unbatch.linalg.probes import gaussian_like, seeded
from unbatch.verification.experiment import Experiment

# Model and replay run the same operations: what differs by more than ten tolerances is another one.
TOLERANCES = 10

# A gradient that is small beside the others is compared with this share of the largest.
NEGLIGIBLE = 1e-3

OF_ANOTHER_KIND = "it returns a tensor that is no array of numbers, and cannot be compared"

NOT_FINITE = "its gradients are not finite, so nothing can be compared"


@dataclass(frozen=True)
class _Outputs:
    """What was returned, detached; which of it is ``smooth``, that is, has derivatives."""

    values: list[Tensor]
    smooth: list[bool]
    gradients: list[Tensor | None]
    error: str


def replay_difference(experiment: Experiment, on_recorded_batch: bool = False) -> tuple[str, str]:
    """Return why the recording cannot stand for the model: in values, and in gradients.

    Empty where it can, or where the model does not take the batch. On a batch in which every sample
    is replaced, so that it shows if Python decided by the data; or, with ``on_recorded_batch``, on
    the one that was recorded.
    """
    inputs = experiment.inputs
    if not on_recorded_batch:
        keep = torch.zeros(experiment.samples, dtype=torch.bool)
        inputs = experiment.changed(keep, "noisy")
    own = _trained_parameters(experiment)
    parameters = list(own.values())
    watch = HookWatch()
    hooked = bool(experiment.graph.hooks) or any(p._backward_hooks for p in parameters)
    try:
        after = AfterRun()
        # A mode keeps PyTorch from its fast paths.
        with watch if hooked else nullcontext():
            outputs = experiment.eager(inputs, after)
        with experiment.backward(after), watch.on(parameters):
            eager = _outputs(outputs, parameters, retain=experiment.graph.has_history)
    except Exception:
        # The model refuses this batch (an index out of range, say): nothing can be compared.
        return "", ""
    if not all(map(is_plain, eager.values)):
        return OF_ANOTHER_KIND, ""
    # Only now, when the model's graph is gone: both keep what their backward pass needs.
    fresh = {ref: p.detach().clone().requires_grad_() for ref, p in own.items()}
    try:
        again = _replay(experiment, inputs, fresh)
        replayed = _outputs(again, list(fresh.values()), eager.smooth)
    except Exception as error:
        return f"replay raised {type(error).__name__}: {error}"[:120], ""
    # Other values have other gradients, too, so these are only compared if values agree.
    for model, replay in zip(eager.values, replayed.values, strict=True):
        difference = _difference(model, replay, experiment)
        if difference:
            return difference, ""
    if watch.changing:
        return "", f"{watch.changing[0]} changes them"
    return "", _gradient_difference(eager, replayed, parameters, experiment)


def _trained_parameters(experiment: Experiment) -> dict[int, Tensor]:
    """Return the parameters that require a gradient, by their values in the graph."""
    # By name first: of tied parameters, one value stands for all.
    refs = {}
    for ref, value in enumerate(experiment.graph.values):
        if value.kind == "parameters":
            refs[value.name] = ref
    parameters = {}
    for name, ref in refs.items():
        parameter = experiment.program.parameters[name]
        if parameter.requires_grad:
            parameters[ref] = parameter
    return parameters


def _replay(experiment: Experiment, inputs: object, parameters: dict[int, Tensor]) -> list[Tensor]:
    """Return what the model returns, by its recording: predictions, or the loss inside it."""
    # Of a model that computes its own loss, the predictions cannot be compared: it hides them.
    if not experiment.cut_inside_model:
        return experiment.replay(inputs, parameters)
    graph = experiment.graph
    assert graph.loss is not None
    return graph.run(experiment.feed(inputs) | parameters, [graph.loss.index])


def _outputs(
    tensors: Sequence[Tensor],
    parameters: Sequence[Tensor],
    counted: Sequence[bool] | None = None,
    retain: bool = False,
) -> _Outputs:
    """Return values, and gradients by the parameters for one random cotangent.

    ``counted``: the outputs that count for the gradients; by default all that are smooth. Both
    sides have to count the same ones, as each draws a part of the cotangent. ``retain``: another
    backward pass may follow.
    """
    tensors = list(map(dense, tensors))
    smooth = [t.requires_grad and t.is_floating_point() for t in tensors]
    if counted is None:
        counted = smooth
    differentiated = []
    for t, is_smooth, counts in zip(tensors, smooth, counted, strict=True):
        if is_smooth and counts:
            differentiated.append(t)
    # The same seed for model and replay, so that both have the same cotangents.
    generator = seeded(0)
    cotangents = [gaussian_like(t, generator) for t in differentiated]
    gradients: list[Tensor | None] = [None] * len(parameters)
    error = ""
    # Autograd refuses an empty list of either.
    if differentiated and parameters:
        try:
            found = torch.autograd.grad(
                differentiated, parameters, cotangents, retain_graph=retain, allow_unused=True
            )
            gradients = list(map(_dense, found))
        except Exception as raised:
            error = f"backward raised {type(raised).__name__}"
    return _Outputs([t.detach() for t in tensors], smooth, gradients, error)


def _dense(gradient: Tensor | None) -> Tensor | None:
    """Return a gradient with all its entries, as an embedding may leave out those that are zero."""
    return None if gradient is None else dense(gradient)


def _gradient_difference(
    eager: _Outputs, replayed: _Outputs, parameters: Sequence[Tensor], experiment: Experiment
) -> str:
    """Return how the gradients by the parameters differ, empty where they agree."""
    if not any(eager.smooth) or not parameters:
        # There are no gradients to compare.
        return ""
    for in_model, in_replay in zip(eager.smooth, replayed.smooth, strict=True):
        if in_model and not in_replay:
            return "no gradient flows through the replay"
    error = eager.error or replayed.error
    if error:
        return error
    size = _largest_finite(eager.gradients)
    if size is None:
        return NOT_FINITE
    least = NEGLIGIBLE * size
    for model, replay, p in zip(eager.gradients, replayed.gradients, parameters, strict=True):
        difference = _difference(_filled(model, p), _filled(replay, p), experiment, least)
        if difference:
            return difference
    return ""


def _largest_finite(gradients: Sequence[Tensor | None]) -> float | None:
    """Return the largest finite entry; None where there are entries, and none of these is."""
    sizes = []
    has_entries = False
    for gradient in gradients:
        if gradient is None or not gradient.numel():
            continue
        has_entries = True
        size = largest([gradient])
        # Most are finite throughout: only of others a copy is made.
        if not math.isfinite(size):
            finite = gradient[gradient.isfinite()]
            if not finite.numel():
                continue
            size = largest([finite])
        sizes.append(size)
    if has_entries and not sizes:
        return None
    return max(sizes, default=0.0)


def _filled(gradient: Tensor | None, p: Tensor) -> Tensor:
    """Return a gradient, zero where autograd reached nothing."""
    if gradient is None:
        return torch.zeros_like(p)
    return gradient


def _difference(model: Tensor, replay: Tensor, experiment: Experiment, least: float = 0.0) -> str:
    """Return how two tensors differ, relative to their size, which is ``least`` at least."""
    if model.shape != replay.shape:
        return f"shape {tuple(replay.shape)} in place of {tuple(model.shape)}"
    has_rounding = model.is_floating_point() or model.is_complex()
    if not model.numel() or not has_rounding:
        return "" if torch.equal(model, replay) else "other integers"
    model, replay = model.detach(), replay.detach()
    size = largest([model])
    error = largest([model - replay])
    if not (math.isfinite(size) and math.isfinite(error)):
        # What is not finite has to be so in both; all else is compared.
        finite = model.isfinite()
        if not finite.equal(replay.isfinite()):
            return "not finite in other places"
        size = largest([model[finite]])
        error = largest([(model - replay)[finite]])
    relative = error / (max(size, least) + 1e-37)
    # The tolerance is no smaller than that by type, and takes a forward pass.
    if relative <= TOLERANCES * experiment.by_type:
        return ""
    if relative <= TOLERANCES * experiment.tolerance:
        return ""
    return f"off by {relative:.2g} relative"
