"""The model itself, run with autograd where its recording has other derivatives: its predictions, connected to θ.

A model that computes its own loss does not return what the loss is cut at. That value is met again when the model runs,
by its number; whether the gradient of the loss goes through it, and only through it, is then tried.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from unbatch.autodiff.autograd import gradients
from unbatch.autodiff.context import Context
from unbatch.autodiff.loss import LossAt
from unbatch.capture.isolation import random_state, untouched
from unbatch.capture.program import own_loss
from unbatch.errors import MSG_INNER_LOSS, StructureError


@dataclass
class EagerModel:
    """``values``: what the model returns, by number in the graph, or where the loss is cut; ``inner`` as in a loss."""

    setting: Context
    output: Any
    values: dict[int, Tensor]
    inner: dict[int, Tensor]
    state: (
        tuple[Any, ...] | None
    )  # from which backward passes draw, the same each time; None: they do not

    @property
    def predictions(self) -> dict[int, Tensor]:
        """Those with an axis of samples, connected to the parameters."""
        return {i: self.values[i] for i in self.setting.axes if self.values[i].requires_grad}

    @property
    def loss(self) -> LossAt:
        alone, outputs = (
            {i: t.detach() for i, t in found.items()} for found in (self.predictions, self.values)
        )
        return LossAt(self.setting, alone, self.inner, outputs)


def run(setting: Context, parameters: Mapping[str, Tensor], twice: bool = False) -> EagerModel:
    """The model on its batch; for one with a loss of its own, raises ``StructureError`` where no cut can be trusted.

    ``twice``: so that there are second derivatives, which fused attention has not.
    """
    with sdpa_kernel(SDPBackend.MATH) if twice else nullcontext():
        return _cut(setting, parameters) if setting.own_loss else _called(setting)


def _called(setting: Context) -> EagerModel:
    output, state = _predict(setting)
    leaves = [t for t in tree_leaves(output) if isinstance(t, Tensor)]
    return EagerModel(
        setting,
        output,
        {r.index: t for r, t in zip(setting.graph.predictions, leaves, strict=True)},
        {},
        state,
    )


def _predict(setting: Context) -> tuple[Any, tuple[Any, ...]]:
    with untouched(setting.program.modules, setting.graph.rng), torch.enable_grad():
        return setting.program.on_copies().predict(setting.inputs), random_state()


def _cut(setting: Context, parameters: Mapping[str, Tensor]) -> EagerModel:
    graph = setting.graph
    if not setting.split:
        raise StructureError(
            MSG_INNER_LOSS.format(why="parameters reach the loss beside them as well")
        )
    read = graph.read_by_loss(setting.axes)
    seen = {
        i: graph.folded.get(i, i) for i in setting.axes
    }  # prediction -> what the model knows of it
    found = setting.numbers([*seen.values(), *read])
    meet = _Met({i: found[i] for i in seen.values()})
    with meet:
        output, state = _predict(setting)
    met = {i: _as_predicted(setting, i, meet.met[k]) for i, k in seen.items() if k in meet.met}
    live = EagerModel(setting, output, met, {i: found[i] for i in read}, state)
    if len(met) < len(setting.axes):
        raise StructureError(MSG_INNER_LOSS.format(why="no value that was met has their numbers"))
    if not _carries_the_gradient(live, own_loss(output), parameters):
        raise StructureError(
            MSG_INNER_LOSS.format(
                why="the gradient of the loss does not pass through what has their numbers, or not alone"
            )
        )
    return live


def _as_predicted(setting: Context, i: int, t: Tensor) -> Tensor:
    """Prediction ``i``, from what the model has in its place."""
    fold = setting.program.fold
    if fold is None or i not in setting.graph.folded:
        return t
    with torch.enable_grad():
        rows: Tensor = fold.folded(t, [fold.axes(t)])
    return rows


def _carries_the_gradient(
    live: EagerModel, loss: Tensor | None, parameters: Mapping[str, Tensor]
) -> bool:
    """``Jᵀ ∂L/∂F`` is the gradient of the loss that the model returns."""
    assert loss is not None
    slope = {i: g for i, g in live.loss.slope.items() if i in live.predictions}
    with untouched(live.setting.program.modules, live.state):
        ours = gradients(
            [live.predictions[i] for i in slope], parameters, list(slope.values()), retain=True
        )
    with untouched(live.setting.program.modules, live.state):
        true = gradients([loss], parameters, retain=True)
    size = max((float(g.abs().max()) for g in true.values() if g.numel()), default=0.0)
    rounding = live.setting.rounding
    return all(
        float((ours[n] - g).abs().max()) <= rounding * size for n, g in true.items() if g.numel()
    )


@dataclass
class _Met(TorchFunctionMode):
    """Looks out for tensors with given numbers, and keeps them as they are then."""

    wanted: Mapping[int, Tensor]
    met: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and t.requires_grad:
                for i in [i for i in self.wanted if i not in self.met and _same(t, self.wanted[i])]:
                    self.met[i] = t.clone()  # it may be written to
        return result


def _same(t: Tensor, value: Tensor) -> bool:
    """Up to the rounding by which two implementations of attention differ."""
    if t.shape != value.shape or t.dtype != value.dtype:
        return False
    allowed = (
        1e3 * torch.finfo(value.dtype).eps * float(value.abs().max()) if value.numel() else 0.0
    )
    return torch.allclose(t, value, 0, allowed)
