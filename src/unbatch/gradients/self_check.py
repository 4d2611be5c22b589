"""Whether a planned sweep can be trusted: it is tried out against a plain backward pass before it is believed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from unbatch.analysis.domain.sample_layout import Layout
from unbatch.autodiff.autograd import gradients
from unbatch.autodiff.context import Context
from unbatch.autodiff.schedule import Schedule
from unbatch.capture.substitutes import held, norm_held
from unbatch.gradients.replayed_rows import ReplayedRows
from unbatch.linalg.precision import DOUBLE, in_double
from unbatch.linalg.probes import gaussians_like, seeded
from unbatch.linalg.rows import real, squares

ALWAYS = 2**26  # bytes that a trial in float64 may take in any case


def trusted(setting: Context, parameters: Mapping[str, Tensor], by: str, memory: int) -> bool:
    """Whether the planned sweep gives what a plain backward pass gives, for random cotangents and weights of samples.

    Rows by component are linear in the cotangents of the samples: sums with random weights that agree, agree for all
    weights but a set of measure zero. Frozen rows are held against a replay with frozen statistics, copy rows by their
    sum; the row of one sample, its norm and its squares against a sum in which all others weigh nothing. In float64
    where the computation can be run in it and ``memory`` allows, so that small gradients count as much as large ones.
    The answer is kept with the plan.
    """
    key = (tuple(parameters), by)
    if key not in setting.trust:
        planned = setting.route(parameters, by).flow
        setting.trust[key] = planned.divisible and _tried(setting, parameters, by, memory)
    return setting.trust[key]


def _tried(setting: Context, parameters: Mapping[str, Tensor], by: str, memory: int) -> bool:
    fits = 3 * setting.values_in_double <= max(memory, ALWAYS)  # forward and backward, as measured
    if not fits and _agrees(setting, parameters, by, setting.rounding):
        return True
    try:
        detached = {n: in_double(p.detach()) for n, p in parameters.items()}
        return _agrees(setting.in_double(), detached, by, DOUBLE)
    except (
        RuntimeError,
        TypeError,
        NotImplementedError,
        IndexError,
    ):  # some op does not take float64
        return fits and _agrees(setting, parameters, by, setting.rounding)


def _agrees(setting: Context, parameters: Mapping[str, Tensor], by: str, bound: float) -> bool:
    generator = seeded(0)
    like = next(iter(parameters.values()))
    weights = torch.rand(setting.samples, generator=generator, dtype=torch.float64) + 0.5
    weights = torch.ones_like(weights) if by == "copy" else weights
    weights = weights.to(like.device, real(like.dtype))
    cotangents, expected = _plainly(
        setting.route(parameters, by), parameters, setting.data, weights
    )
    scale = max((float(g.abs().max()) for g in cotangents.values() if g.numel()), default=0.0)
    tried = ReplayedRows(setting, parameters, by, cotangents).tried(weights, setting.samples // 2)
    row = {n: t.abs() for n, t in tried.alone.items()}
    pairs = [
        (tried.weighted, expected),
        (tried.row, tried.alone),
        (tried.norm, {n: squares(t[None]).sqrt() for n, t in tried.alone.items()}),
        ({n: t.sqrt() for n, t in tried.squares.items()}, row),
    ]
    return all(_agree(found, wanted, bound, scale) for found, wanted in pairs)


def _plainly(
    route: Schedule, parameters: Mapping[str, Tensor], feed: Mapping[int, Tensor], weights: Tensor
) -> tuple[dict[int, Tensor], dict[str, Tensor]]:
    """Random cotangents ``g``, and ``Σ_n c_n row_n`` for them by one backward pass of a plain replay.

    What a sweep has to agree with.
    """
    graph, flow = route.graph, route.flow
    leaves = {n: p.detach().requires_grad_() for n, p in parameters.items()}
    live = {i: leaves[name] for i, name in flow.parameters.items()}
    instead: dict[int, Callable[..., Any]] = {
        i: norm_held(graph.steps[i]) for i in flow.frozen_norms
    }
    instead = {s.index: held(s.op) for s in route.cut_off} | instead
    with torch.enable_grad():
        outs = graph.run(
            {**feed, **live}, list(flow.predictions), instead=instead, steps=graph.forward_steps
        )
    moving = {i: t for i, t in zip(flow.predictions, outs, strict=True) if t.requires_grad}
    cotangents = gaussians_like(moving, seeded(1))
    gs = [
        Layout(flow.predictions[i], flow.samples).scaled(g, weights) for i, g in cotangents.items()
    ]
    total = gradients(list(moving.values()), leaves, gs)
    return cotangents, {n: t.detach() for n, t in total.items()}


def _agree(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], bound: float, scale: float
) -> bool:
    """Up to rounding, of which there is more where what is large cancels (biases right below batch norms)."""
    largest = max([scale, *(float(g.abs().max()) for g in expected.values() if g.numel())])
    if not math.isfinite(largest):
        return True  # nothing can be told, and a plain backward pass would be no better
    for name, g in expected.items():
        allowed = bound * (float(g.abs().max()) + 1e-3 * largest) if g.numel() else 0.0
        if g.numel() and not float((found[name] - g).abs().max()) <= allowed:
            return False
    return True
