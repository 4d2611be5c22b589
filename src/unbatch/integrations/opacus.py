"""Per-sample clipping as in differentially private SGD, and a check that it bounds what a sample can do.

The names are those of Opacus, which is not needed. There is no privacy accounting here: nothing says which (ε, δ) a
training run has, samples are not drawn for you, and the noise is not hardened against attacks on floating point.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from unbatch.analysis.structure import TITLES, Culprit, Structure, Verdict
from unbatch.errors import InputError, StructureError
from unbatch.gradients.diagnostics import ClippedSum
from unbatch.gradients.quantities import SquaredNorms
from unbatch.problem.problem import Problem

MSG_REQUIRED = {
    "canonical_split": "the parameters also enter the loss beside the predictions, and what comes that way is no "
    "sample's and is not clipped. Move a weight decay to the optimizer.",
    "independent_forward": "a prediction depends on other samples, so changing one sample changes the gradients of the "
    "others, and clipping bounds none of that.",
    "reduction": "the loss is no weighted sum of the losses of the samples, so the gradient of one depends on the "
    "losses of the others.",
    "simd_loss": "the loss joins the predictions of different samples, so no part of the gradient belongs to one.",
}


MSG_WEIGHTS = (
    "{title} holds, but weights depend on {what}: a mean over class weights or unmasked entries is divided by what all "
    "samples have together, so one sample scales the gradients of the others. Sum over samples, and divide by a number "
    "that is fixed."
)


MSG_UNSUITABLE = "{title} {status}: {why}"


MSG_CULPRIT = "{module}{op} at {where}: {why}. {remedy}"


MSG_NOT_PRIVATE = "Clipping does not bound what one sample of this batch can do:\n{errors}"


MSG_NOISE = "noise_multiplier is a number not less than zero; got {value!r}."


MSG_POSITIVE = "{what} is a number greater than zero; got {value!r}."


MSG_REDUCTION = (
    "loss_reduction is 'mean' or 'sum', whichever the loss does over samples; got {value!r}."
)


class UnsuitableLossError(StructureError):
    """One reason why clipping per sample does not bound what a sample can do; ``verdict`` is the one that is wanting.

    ``culprits``: the places in the program, with file, line and remedy; none where nothing could be pointed at.
    """

    def __init__(self, message: str, verdict: Verdict) -> None:
        super().__init__(message)
        self.verdict, self.culprits = verdict, verdict.culprits


def validate(problem: Problem, *, strict: bool = False) -> list[UnsuitableLossError]:
    """What stands in the way of clipping per sample; an empty list where nothing does. ``strict``: raise instead.

    Opacus' ``ModuleValidator.validate`` goes by the classes of modules that are trained. This goes by what is computed:
    predictions must listen to their own sample only, and the loss must be a sum over samples whose weights other
    samples do not set. So functional batch norm, batch norm without trained parameters, statistics taken by hand and
    losses that join samples are found, and batch norm with fixed statistics (``.eval()``) is let through. What is
    unknown counts against it. It is about the recorded batch size: a model that divides by the number of samples is not
    found. Raises ``UnsuitableLossError`` with all reasons if ``strict``.
    """
    errors = list(_errors(problem.structure))
    if errors and strict:
        raise UnsuitableLossError(
            MSG_NOT_PRIVATE.format(errors="\n".join(map(str, errors))), errors[0].verdict
        )
    return errors


def _errors(structure: Structure) -> Iterator[UnsuitableLossError]:
    for name, why in MSG_REQUIRED.items():
        verdict: Verdict = getattr(structure, name)
        if not verdict:
            status = {"fails": "fails", "unknown": "is unknown"}[verdict.status]
            said = MSG_UNSUITABLE.format(title=TITLES[name], status=status, why=why)
            yield UnsuitableLossError("\n  ".join([said, *_lines(verdict.culprits)]), verdict)
    reduction = structure.reduction
    if reduction and reduction.weights_depend_on:
        what = " and ".join(sorted(reduction.weights_depend_on))
        yield UnsuitableLossError(
            MSG_WEIGHTS.format(title=TITLES["reduction"], what=what), reduction
        )


def _lines(culprits: Sequence[Culprit]) -> list[str]:
    return [
        MSG_CULPRIT.format(
            module=f"{c.module}: " if c.module else "",
            op=c.op,
            where=c.where or "?",
            why=c.why,
            remedy=c.remedy,
        )
        for c in culprits
    ]


@dataclass(frozen=True)
class Clipped:
    """``norms`` ``[N]``: of the gradients of the samples before clipping, in the scale of ``max_grad_norm``.

    ``clipped``: how many were longer than that. ``noise``: the standard deviation of what was added to each entry of
    ``.grad``, in the scale of ``.grad``.
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
    """Write to ``.grad`` what Opacus' ``DPOptimizer`` makes of per-sample gradients before it takes its step.

    ``Σ_n g_n min(1, max_grad_norm / ‖g_n‖)`` plus Gaussian noise of standard deviation ``noise_multiplier ·
    max_grad_norm``, all divided by ``expected_batch_size`` (by default the number of samples) for a mean; ``g_n`` is
    the gradient of the loss of sample n alone, without the 1/N of a mean (Abadi et al. 2016, algorithm 1).
    ``loss_reduction`` says which of both the loss of the problem is, as Opacus asks: a wrong one puts clipping and
    noise off by N. ``generator``: of the noise; by default a new one, seeded by the operating system, so that no seed
    of yours foretells it and no random state of yours moves. No rows are formed; what ``.grad`` held is replaced.

    This is the mechanism only. **There is no privacy accounting**, and batches have to be drawn as an accountant
    expects. Raises ``UnsuitableLossError`` where ``validate`` finds anything, ``InputError`` for numbers out of range.
    """
    n = problem.samples
    size = n if expected_batch_size is None else expected_batch_size
    _check(max_grad_norm, noise_multiplier, size, loss_reduction)
    validate(problem, strict=True)
    unit = (
        float(n) if loss_reduction == "mean" else 1.0
    )  # from rows of the loss to gradients of the samples
    total, norms = problem.compute(ClippedSum(max_grad_norm / unit), SquaredNorms())
    scale = 1 / size if loss_reduction == "mean" else 1.0
    std = noise_multiplier * max_grad_norm
    for name, t in total.items():
        parameter = problem.program.parameters[name]
        clipped = unit * t.to(parameter.dtype)
        parameter.grad = (
            scale * (clipped + _noise(clipped, std, generator)) if std else scale * clipped
        )
    lengths: Tensor = unit * norms.total.sqrt()
    return Clipped(lengths, int((lengths > max_grad_norm).sum()), scale * std)


def _noise(like: Tensor, std: float, generator: torch.Generator | None) -> Tensor:
    if generator is None:
        generator = torch.Generator(like.device)
        generator.seed()
    return std * torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)


def _check(max_grad_norm: float, noise_multiplier: float, size: float, loss_reduction: str) -> None:
    for what, value in (("max_grad_norm", max_grad_norm), ("expected_batch_size", size)):
        if not value > 0:
            raise InputError(MSG_POSITIVE.format(what=what, value=value))
    if not noise_multiplier >= 0:
        raise InputError(MSG_NOISE.format(value=noise_multiplier))
    if loss_reduction not in ("mean", "sum"):
        raise InputError(MSG_REDUCTION.format(value=loss_reduction))
