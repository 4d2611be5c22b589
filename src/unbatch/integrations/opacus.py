"""Per-sample clipping as in differentially private SGD, and a check that it bounds each sample.

The names are those of Opacus, which is not needed. There is no privacy accounting here: nothing
says which (ε, δ) a training run has, samples are not drawn for you, and the noise is not hardened
against attacks on floating point.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from unbatch.analysis.structure import Structure
from unbatch.analysis.verdict import TITLES, Culprit, Verdict
from unbatch.errors import InputError, StructureError
from unbatch.gradients.diagnostics import ClippedSum
from unbatch.gradients.quantities import SquaredNorms
from unbatch.problem.problem import Problem

# Per verdict that has to hold: what goes wrong where it does not.
MSG_REQUIRED = {
    "canonical_split": "the parameters also enter the loss directly, bypassing the predictions, "
    "and that part of the gradient is no sample's and is not clipped. Move a weight decay to the "
    "optimizer.",
    "independent_forward": "a prediction depends on other samples, so changing one sample changes "
    "the gradients of the others, and clipping bounds none of that.",
    "reduction": "the loss is no weighted sum of the losses of the samples, so the gradient of one "
    "depends on the losses of the others.",
    "simd_loss": "the loss joins samples, or has a function of its own for each by the place in "
    "the batch, so a sample that is exchanged for another one keeps the loss of the first.",
}


MSG_WEIGHTS = (
    "{title} holds, but weights depend on {what}: a mean over class weights or unmasked entries is "
    "divided by what all samples have together, so one sample scales the gradients of the others. "
    "Sum over samples, and divide by a fixed number."
)


MSG_TERMS = (
    "{title} holds, but only given statistics of the {what} of all samples, with which the loss of "
    "each is computed, so one sample changes the gradients of the others. Take such statistics (a "
    "mean, counts of classes) of the training set, and keep them fixed."
)


MSG_UNSUITABLE = "{title} {status}: {why}"


MSG_CULPRIT = "{module}{op} at {where}: {why}. {remedy}"


MSG_NOT_PRIVATE = "Clipping does not bound what one sample of this batch can do:\n{errors}"


MSG_NOISE = "noise_multiplier must be a number not less than zero; got {value!r}."


MSG_POSITIVE = "{what} must be a number greater than zero; got {value!r}."


MSG_REDUCTION = (
    "loss_reduction must be 'mean' or 'sum', whichever the loss does over samples; got {value!r}."
)


class UnsuitableLossError(StructureError):
    """One reason why clipping per sample does not bound what a sample can do.

    ``verdict``: the one that has to hold and does not. ``culprits``: the places in the program,
    with file, line and remedy; none where no place is responsible.
    """

    def __init__(self, message: str, verdict: Verdict) -> None:
        super().__init__(message)
        self.verdict = verdict
        self.culprits = verdict.culprits


def validate(problem: Problem, *, strict: bool = False) -> list[UnsuitableLossError]:
    """Return what stands in the way of clipping per sample, an empty list where nothing does.

    Opacus' ``ModuleValidator.validate`` goes by the classes of modules that are trained. This goes
    by what is computed: a prediction must depend on its own sample only, and the loss must be a sum
    over samples whose weights other samples do not set. So functional batch norm, batch norm
    without trained parameters, statistics taken by hand and losses that join samples are found, and
    batch norm with fixed statistics (``.eval()``) is let through. What is unknown counts against
    it. It is about the recorded batch size: a model that divides by the number of samples is not
    found.

    Raises ``UnsuitableLossError`` with all reasons if ``strict``.
    """
    errors = list(_errors(problem.structure))
    if errors and strict:
        reasons = "\n".join(map(str, errors))
        raise UnsuitableLossError(MSG_NOT_PRIVATE.format(errors=reasons), errors[0].verdict)
    return errors


def _errors(structure: Structure) -> Iterator[UnsuitableLossError]:
    for name, why in MSG_REQUIRED.items():
        verdict: Verdict = getattr(structure, name)
        if verdict:
            continue
        status = "is unknown" if verdict.status == "unknown" else verdict.status
        lines = [MSG_UNSUITABLE.format(title=TITLES[name], status=status, why=why)]
        lines += [_line(culprit) for culprit in verdict.culprits]
        yield UnsuitableLossError("\n  ".join(lines), verdict)
    # A sum of losses is not enough: other samples must not set its weights, nor enter its terms.
    for name, text in (("reduction", MSG_WEIGHTS), ("simd_loss", MSG_TERMS)):
        verdict = getattr(structure, name)
        if verdict and verdict.weights_depend_on:
            what = " and ".join(sorted(verdict.weights_depend_on))
            yield UnsuitableLossError(text.format(title=TITLES[name], what=what), verdict)
    if structure.joined_backward:
        yield UnsuitableLossError(structure.joined_backward, structure.independent_forward)


def _line(culprit: Culprit) -> str:
    module = f"{culprit.module}: " if culprit.module else ""
    return MSG_CULPRIT.format(
        module=module,
        op=culprit.op,
        where=culprit.where or "?",
        why=culprit.why,
        remedy=culprit.remedy,
    )


@dataclass(frozen=True)
class Clipped:
    """What ``write_clipped_gradient`` did.

    ``norms``: ``[N]``, of the gradients of the samples before clipping, in the scale of
    ``max_grad_norm``. ``clipped``: how many were longer than that. ``noise``: the standard
    deviation of what was added to each entry of ``.grad``, in the scale of ``.grad``.
    """

    norms: Tensor
    clipped: int
    noise: float


def write_clipped_gradient(
    problem: Problem,
    *,
    max_grad_norm: float,
    noise_multiplier: float = 0.0,
    expected_batch_size: float | None = None,
    loss_reduction: Literal["mean", "sum"] = "mean",
    generator: torch.Generator | None = None,
) -> Clipped:
    """Write to ``.grad`` what Opacus' ``DPOptimizer`` makes of per-sample gradients.

    ``Σ_n g_n min(1, max_grad_norm / ‖g_n‖)`` plus Gaussian noise of standard deviation
    ``noise_multiplier · max_grad_norm``, all divided by ``expected_batch_size`` (by default the
    number of samples) for a mean; ``g_n`` is the gradient of the loss of sample n alone, without
    the 1/N of a mean (Abadi et al. 2016, algorithm 1). ``loss_reduction`` says which of both the
    loss of the problem is, as in Opacus: a wrong one puts clipping and noise off by N.
    ``generator``: of the noise; by default a new one, seeded by the operating system, so that no
    seed of yours predicts it and no random state of yours moves. No rows are formed; what ``.grad``
    held is replaced.

    This is the mechanism only. **There is no privacy accounting**, and batches have to be drawn as
    an accountant expects. Raises ``UnsuitableLossError`` where ``validate`` finds anything,
    ``InputError`` for numbers out of range.
    """
    samples = problem.samples
    size = samples if expected_batch_size is None else expected_batch_size
    _check(max_grad_norm, noise_multiplier, size, loss_reduction)
    validate(problem, strict=True)
    # Rows of a mean have 1/N in them: ``unit`` makes them gradients of the samples, which are
    # clipped and get noise, and ``scale`` makes the sum a mean again.
    unit, scale = 1.0, 1.0
    if loss_reduction == "mean":
        unit, scale = float(samples), 1 / size
    # In one pass, as the norms are needed for clipping anyway.
    total, squared_norms = problem.compute(ClippedSum(max_grad_norm / unit), SquaredNorms())
    deviation = noise_multiplier * max_grad_norm
    for name, clipped_sum in total.items():
        parameter = problem.program.parameters[name]
        clipped = unit * clipped_sum.to(parameter.dtype)
        if deviation:
            clipped = clipped + _noise(clipped, deviation, generator)
        parameter.grad = scale * clipped
    norms: Tensor = unit * squared_norms.total.sqrt()
    return Clipped(norms, int((norms > max_grad_norm).sum()), scale * deviation)


def _noise(like: Tensor, deviation: float, generator: torch.Generator | None) -> Tensor:
    if generator is None:
        # A seed that nobody has chosen, and that no other random number depends on.
        generator = torch.Generator(like.device)
        generator.seed()
    normal = torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)
    return deviation * normal


def _check(max_grad_norm: float, noise_multiplier: float, size: float, loss_reduction: str) -> None:
    for what, value in (("max_grad_norm", max_grad_norm), ("expected_batch_size", size)):
        # Not ``<=``: what is not a number is refused, too.
        if not value > 0:
            raise InputError(MSG_POSITIVE.format(what=what, value=value))
    if not noise_multiplier >= 0:
        raise InputError(MSG_NOISE.format(value=noise_multiplier))
    if loss_reduction not in ("mean", "sum"):
        raise InputError(MSG_REDUCTION.format(value=loss_reduction))
