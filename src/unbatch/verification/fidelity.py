"""Whether the recorded graph may stand for the model: the same values and the same gradients on another batch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from unbatch.linalg.probes import gaussian_like, seeded
from unbatch.verification.experiment import Experiment


def unfaithful(oracle: Experiment, here: bool = False) -> tuple[str, str]:
    """Why the recorded computation cannot stand for the model: in values, in gradients (or "").

    On another batch, where what steers the computation shows; or, ``here``, on the one that was recorded.
    """
    other = torch.full((oracle.samples,), here, dtype=torch.bool)
    inputs = oracle.inputs if here else oracle.changed(other, "noisy")
    graph, program = oracle.graph, oracle.program
    named = {v.name: i for i, v in enumerate(graph.values) if v.kind == "parameters"}
    fresh = {
        i: program.parameters[n].detach().clone().requires_grad_()
        for n, i in named.items()
        if program.parameters[n].requires_grad
    }
    wanted = [program.parameters[graph.values[i].name] for i in fresh]
    try:
        with oracle.backward():
            eager = _Seen.of(oracle.eager(inputs), wanted)
    except Exception:
        return "", ""
    try:  # after the other is gone: both keep what their backward pass needs
        if program.loss is None and graph.after_cut:
            assert graph.loss is not None
            outputs = graph.run(oracle.feed(inputs) | fresh, [graph.loss.index])
        else:
            outputs = oracle.replay(inputs, fresh)
        replayed = _Seen.of(outputs, list(fresh.values()), eager.moving)
    except Exception as error:
        return f"replay raised {type(error).__name__}: {error}"[:120], ""
    tensors = zip(eager.values, replayed.values, strict=True)
    values = next((d for a, b in tensors if (d := _apart(a, b, oracle.tolerance))), "")
    return values, "" if values else _gradients_apart(eager, replayed, wanted, oracle.tolerance)


@dataclass
class _Seen:
    """Values, detached, and their gradients for one random cotangent; ``moving`` are those that have any."""

    values: list[Tensor]
    moving: list[bool]
    gradients: list[Tensor | None]
    error: str = ""

    @staticmethod
    def of(outputs: list[Tensor], leaves: list[Tensor], asked: list[bool] | None = None) -> _Seen:
        """``asked``: the outputs that count for the gradients; by default all that have any."""
        moving = [t.requires_grad and t.is_floating_point() for t in outputs]
        counts = moving if asked is None else [a and b for a, b in zip(asked, moving, strict=True)]
        live = [t for t, moves in zip(outputs, counts, strict=True) if moves]
        seen = _Seen([t.detach() for t in outputs], moving, [None] * len(leaves))
        generator = seeded(0)
        cotangents = [gaussian_like(t, generator) for t in live]
        try:
            if live and leaves:
                seen.gradients = list(
                    torch.autograd.grad(live, leaves, cotangents, allow_unused=True)
                )
        except Exception as error:
            seen.error = f"backward raised {type(error).__name__}"
        return seen


def _apart(a: Tensor, b: Tensor, tolerance: float, size: float = 0.0) -> str:
    """How far two tensors are from each other, relative to the larger of their own size and 1e-3 of ``size``."""
    if a.shape != b.shape:
        return f"shape {tuple(b.shape)} in place of {tuple(a.shape)}"
    if not a.numel() or not (a.is_floating_point() or a.is_complex()):
        return "" if torch.equal(a, b) else "other integers"
    a, b = a.detach(), b.detach()
    largest, off = float(a.abs().max()), float((a - b).abs().max())
    if not (math.isfinite(largest) and math.isfinite(off)):
        largest, off = (float(t.abs().nan_to_num(0, 0, 0).max()) for t in (a, a - b))
    relative = off / (max(largest, 1e-3 * size) + 1e-37)
    return f"off by {relative:.2g} relative" if relative > 10 * tolerance else ""


def _gradients_apart(eager: _Seen, replayed: _Seen, wanted: list[Tensor], tolerance: float) -> str:
    """Compare gradients by the parameters, for one random cotangent."""
    if not any(eager.moving) or not wanted:
        return ""
    if not all(b for a, b in zip(eager.moving, replayed.moving, strict=True) if a):
        return "no gradient flows through the replay"
    if eager.error or replayed.error:
        return eager.error or replayed.error
    largest = max(
        (float(g.abs().max()) for g in eager.gradients if g is not None and g.numel()), default=0.0
    )
    for a, b, p in zip(eager.gradients, replayed.gradients, wanted, strict=True):
        a, b = (torch.zeros_like(p) if g is None else g for g in (a, b))
        if why := _apart(a, b, tolerance, largest):
            return why
    return ""
