"""Numerical witnesses about the forward pass.

A witness can prove that a structure *fails* (sample m moved prediction n), never that it holds. Here too: replays with
frozen statistics, and the comparison of the recording with the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from unbatch.capture import ops
from unbatch.capture.graph import Step
from unbatch.capture.substitutes import norm_held
from unbatch.verification.experiment import GAIN, VARIANTS, Experiment, relative_change


@dataclass(frozen=True)
class Counterexample:
    """Sample ``moved_by`` was changed and prediction ``moved`` changed by ``amount`` (relative to its size)."""

    test: str
    amount: float
    moved: int = -1
    moved_by: int = -1

    def __str__(self) -> str:
        if self.moved < 0 and self.test.startswith("rank"):
            return self.test
        if self.moved < 0:
            return f"{self.test}: off by {self.amount:.2g} relative"
        return f"replacing sample {self.moved_by} moved prediction {self.moved} by {self.amount:.2g} of its size"


# --- independence ---------------------------------------------------------------------------------


def partitions(samples: int) -> Iterator[Tensor]:
    """Few sets of samples such that every ordered pair is told apart by one of them."""
    index = torch.arange(samples)
    for bit in range(max(1, math.ceil(math.log2(max(samples, 2))))):
        for side in (0, 1):
            keep = (index >> bit) & 1 == side
            if keep.any() and not keep.all():
                yield keep


def listening(oracle: Experiment) -> Counterexample | None:
    """A sample whose prediction moves when others are replaced; also on a batch that is far out itself, and by little.

    What rounding hides in the numbers of the model (a statistic that an iteration starts from) is seen in float64.
    """
    if not oracle.repeatable:
        return None
    wide = oracle.in_double()
    return (
        _listening(oracle)
        or _listening(oracle.stretched(100.0))
        or (_listening(wide) if wide is not None else None)
    )


def _listening(oracle: Experiment) -> Counterexample | None:
    for variant in VARIANTS:
        sets = list(partitions(oracle.samples))
        for seed, keep in enumerate(sets if variant in ("rolled", "noisy") else sets[:2]):
            found = _moved(oracle, variant, seed, keep, keep)
            if found is not None and _confirmed(oracle, variant, seed, keep, found[1]):
                return _narrow(oracle, variant, seed, keep, *found)
    return None


def _moved(
    oracle: Experiment, variant: str, seed: int, keep: Tensor, watch: Tensor
) -> tuple[int, float] | None:
    """Which of the watched predictions moved most when all samples but ``keep`` were replaced."""
    try:
        new = oracle.rows(oracle.predict(oracle.changed(keep, variant, seed)))
    except Exception:
        return None
    base = oracle.rows(oracle.base)
    if new.shape != base.shape:
        return None
    amount = torch.where(watch, relative_change(base, new), 0.0)
    worst = int(amount.argmax())
    return (
        (worst, float(amount[worst]))
        if amount[worst] > oracle.tolerance * GAIN.get(variant, 1.0)
        else None
    )


def _confirmed(oracle: Experiment, variant: str, seed: int, keep: Tensor, amount: float) -> bool:
    """It stands out by far, or in float64 the change is still there."""
    if amount > max(100 * oracle.tolerance, 1e-2):
        return True
    wide = oracle.in_double()
    if wide is None:
        return oracle.tolerance <= 1e-9
    found = _moved(wide, variant, seed, keep, keep)
    return found is not None and found[1] > 1e-2 * amount


def _narrow(
    oracle: Experiment, variant: str, seed: int, keep: Tensor, moved: int, amount: float
) -> Counterexample:
    """Find one sample whose replacement alone moves the prediction."""
    index = torch.arange(oracle.samples)
    for m in [int(i) for i in torch.nonzero(~keep)][:16]:
        found = _moved(oracle, variant, seed, index != m, index == moved)
        if found is not None:
            return Counterexample("replacing other samples", found[1], moved, m)
    return Counterexample("replacing other samples", amount, moved, int(torch.nonzero(~keep)[0]))


# --- uniformity -----------------------------------------------------------------------------------


def uneven(oracle: Experiment) -> Counterexample | None:
    """Permuting the samples does not just permute the predictions."""
    if not oracle.repeatable:
        return None
    base, n = oracle.rows(oracle.base), oracle.samples
    index = torch.arange(n)
    for order in (
        index.roll(1),
        index.flip(0),
        torch.randperm(n, generator=torch.Generator().manual_seed(0)),
    ):
        try:
            new = oracle.rows(oracle.predict_permuted(order))
        except Exception:
            continue
        if new.shape == base.shape and new.shape[1]:
            size = base.abs().nan_to_num(0, 0, 0).amax() + 1e-37
            off = float((new - base[order]).abs().nan_to_num(0, 0, 0).amax() / size)
            if off > 10 * oracle.tolerance and (off > 1e-2 or _still_uneven(oracle, order, off)):
                return Counterexample("permuting the samples", off)
    return None


def _still_uneven(oracle: Experiment, order: Tensor, off: float) -> bool:
    wide = oracle.in_double()
    if wide is None:
        return off > 100 * oracle.tolerance
    base, new = wide.rows(wide.base), wide.rows(wide.predict_permuted(order))
    return float((new - base[order]).abs().nan_to_num(0, 0, 0).amax()) > 1e-2 * off * float(
        base.abs().nan_to_num(0, 0, 0).amax()
    )


def unbounded(oracle: Experiment, samples: int = 128) -> Counterexample | None:
    """How predictions listen to other samples has a rank that grows with their number.

    With ``F_n = f(x_n, s)`` the derivatives of half of the predictions by the other half of the samples have rank at
    most the size of ``s``. Here the rank of that matrix grows as the batch does.
    """
    try:
        few, many = (_cross_rank(oracle, size) for size in (samples // 4, samples))
    except Exception:
        return _full_rank(oracle)
    if few == 0 or many < 3 * few:
        return None
    return Counterexample(
        f"rank of the cross-derivatives grows from {few} ({samples // 4} samples) to {many} ({samples})",
        many / few,
    )


def _full_rank(oracle: Experiment) -> Counterexample | None:
    """Where the model takes no other batch size: half of the samples need a number each from the others."""
    half = oracle.samples // 2
    if half < 3:
        return None
    try:
        ranks = [_cross_rank(oracle, oracle.samples, seed) for seed in range(5)]
    except Exception:
        return None
    return (
        Counterexample(
            f"rank of the cross-derivatives is as large as the batch allows, {half}", float(half)
        )
        if max(ranks) == half
        else None
    )


def _cross_rank(oracle: Experiment, samples: int, seed: int = 1) -> int:
    rows, moving = oracle.resized(samples, seed)
    generator = torch.Generator().manual_seed(2)
    u = torch.randn(rows.shape[1], generator=generator, dtype=torch.float64)
    half = samples // 2
    cross = torch.zeros(half, half, dtype=torch.float64)
    dims = [
        d
        for d, x in zip(oracle.dims, tree_leaves(oracle.inputs), strict=True)
        if d is not None and x.is_floating_point()
    ]
    probes = [
        torch.randn(x.movedim(d, 0)[0].shape, generator=generator, dtype=torch.float64)
        for x, d in zip(moving, dims, strict=True)
    ]
    for a in range(half):
        with oracle.backward():
            grads = torch.autograd.grad(rows[a] @ u, moving, retain_graph=True, allow_unused=True)
        for g, d, v in zip(grads, dims, probes, strict=True):
            if g is not None:
                cross[a] += (g.movedim(d, 0)[half:] * v).reshape(samples - half, -1).sum(1)
    values = torch.linalg.svdvals(cross)
    return int((values > 1e-9 * values[0]).sum()) if float(values[0]) > 0 else 0


# --- frozen statistics ----------------------------------------------------------------------------


def frozen_change(oracle: Experiment) -> float | str:
    """How much predictions move when other samples are replaced and every batch statistic keeps its value."""
    graph, forward = oracle.graph, oracle.findings.forward
    if forward.algebra.overlapping() or graph.escapes:
        return "statistics leave the tensor world and cannot be frozen"
    pinned = {i for s in graph.forward_steps for i in _statistics(forward, s)}
    wanted = [graph.predictions[i].index for i in oracle.places]
    fused: dict[int, tuple[int, int]] = {}
    for step in graph.forward_steps:
        moments = _moments(step, pinned)
        if moments is not None:
            fused[step.index] = moments
    if any(_hides(forward, s) for s in graph.forward_steps if s.index not in fused):
        return "an op keeps its statistic to itself and cannot be frozen"
    kept: dict[int, Tensor] = {}

    def note(i: int, t: Tensor) -> None:
        if i in pinned:
            kept[i] = t.clone()

    graph.run({}, wanted, visit=note)
    instead = {}
    for i, (mean, invstd) in fused.items():
        instead[i] = norm_held(graph.steps[i], (kept[mean], kept[invstd]))
    base = oracle.rows(graph.run({}, wanted, keep=kept, instead=instead))
    worst = 0.0
    for seed, keep in enumerate(partitions(oracle.samples)):
        feed = oracle.feed(oracle.changed(keep, "noisy", seed))
        new = oracle.rows(graph.run(feed, wanted, keep=kept, instead=instead))
        if base.shape[1]:
            worst = max(worst, float((new - base).abs()[keep].nan_to_num(0, 0, 0).amax()))
    return worst


def _statistics(forward: Any, step: Any) -> list[int]:
    """The values of a step that are statistics and were none before."""
    made = [
        r.index
        for r in [*step.outs, *(new for _, new in step.writes)]
        if r is not None and r.index in forward.marks
    ]
    return [
        i
        for i in made
        if not (m := forward.marks[i]).owned and not m.mixed and forward.made_at(step, i)
    ]


def _moments(step: Step, pinned: set[int]) -> tuple[int, int] | None:
    """Return the values that are mean and ``1/σ`` of a batch norm, where they are statistics of the batch.

    Instance norm is a batch norm by its name, and has its own for every sample.
    """
    if not ops.is_training_batch_norm(step):
        return None
    refs = ops.batch_moments(step.op, step.outs)
    if refs is None or not any(r.index in pinned for r in refs):
        return None
    return refs[0].index, refs[1].index


def _hides(forward: Any, step: Any) -> bool:
    roots = [r for r in forward.algebra.roots if r.step == step.index]
    outs = [forward.marks[r.index] for r in step.outs if r is not None]
    return (
        bool(roots)
        and any(m.owned for m in outs)
        and not any(m.given and not m.owned for m in outs)
    )


# --- the recording against the model --------------------------------------------------------------
