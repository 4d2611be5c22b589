"""One layer of a recurrence as two ops: values and derivatives against PyTorch's own functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbatch.capture import recurrences
from unbatch.capture.recurrent_ops import (
    FUNCTIONS,
    GATES,
    LSTM,
    Cells,
    Ran,
    recurrent_cells,
    recurrent_states,
    slopes,
    tangents_of,
    unrolled,
)

N, D, H, P = 4, 3, 5, 2
SIZES = [4, 3, 3, 1, 1]
CASES = [
    (mode, bias, projected, packed, reverse)
    for mode in FUNCTIONS
    for bias in (False, True)
    for projected in (False, True)
    for packed in (False, True)
    for reverse in (False, True)
    if mode == LSTM or not projected
]


def leaf(*shape: int) -> Tensor:
    return (torch.randn(*shape, dtype=torch.float64) / 2).requires_grad_()


class Layer:
    """A layer with weights and a batch of its own; ``leaves``: all that it has derivatives by."""

    def __init__(self, mode: int, bias: bool, projected: bool, packed: bool, reverse: bool) -> None:
        self.mode, self.bias, self.reverse = mode, bias, reverse
        width, gates = P if projected else H, GATES[mode] * H
        self.weights = [leaf(gates, D), leaf(gates, width)]
        if bias:
            self.weights += [leaf(gates), leaf(gates)]
        if projected:
            self.weights.append(leaf(width, H))
        self.h, self.c = leaf(N, width), leaf(N, H) if mode == LSTM else None
        self.sizes = SIZES if packed else []
        self.x = leaf(sum(SIZES), D) if packed else leaf(6, N, D)
        self.leaves = [self.x, self.h, *self.weights]
        if self.c is not None:
            self.leaves.append(self.c)

    def cells(self) -> Cells:
        order = self.mode, self.reverse, self.sizes
        by_input, by_state, *rest = self.weights
        projection = rest.pop() if len(self.weights) % 2 else None
        a, b = rest or (None, None)
        previous, after = recurrent_states(self.x, self.weights, self.h, self.c, *order)
        gates = F.linear(self.x, by_input, a), F.linear(previous, by_state, b)
        constant, projected = None, None
        if projection is not None:
            constant, projected = projection.detach(), F.linear(after, projection)
        after = None if projection is None else after
        weights = previous, after, by_state.detach(), constant
        return Cells(*gates, projected, *weights, self.h, self.c, *order)

    def ours(self) -> list[Tensor]:
        outputs = recurrent_cells(*self.cells())
        return list(outputs[:3] if self.mode == LSTM else outputs[:2])

    def theirs(self) -> list[Tensor]:
        """By both directions of a layer of PyTorch, with the same weights."""
        states: Any = torch.stack([self.h, self.h])
        if self.c is not None:
            states = [states, torch.stack([self.c, self.c])]
        batch = [self.x, torch.tensor(self.sizes)] if self.sizes else [self.x]
        settings = [self.weights * 2, self.bias, 1, 0.0, True, True]
        if not self.sizes:
            settings.append(False)
        y, *last = FUNCTIONS[self.mode](*batch, states, *settings)
        return [y.chunk(2, -1)[self.reverse], *(s[int(self.reverse)] for s in last)]


def gradients(results: list[Tensor], layer: Layer, **options: bool) -> list[Tensor]:
    """Return the gradient of a sum of all results, each with weights of its own."""
    torch.manual_seed(1)
    total = sum((r * torch.randn(r.shape, dtype=r.dtype)).sum() for r in results)
    assert isinstance(total, Tensor)
    return list(torch.autograd.grad(total, layer.leaves, **options))


def close(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.allclose(s, t, rtol=0, atol=1e-12) for s, t in zip(a, b, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_pytorch(case: tuple[Any, ...]) -> None:
    layer = Layer(*case)
    ours, theirs = layer.ours(), layer.theirs()
    assert close(ours, theirs)
    assert close(gradients(ours, layer), gradients(theirs, layer))


@pytest.mark.parametrize("case", CASES)
def test_unrolled_it_is_the_same(case: tuple[Any, ...]) -> None:
    layer = Layer(*case)
    ours, steps = layer.ours(), list(unrolled(layer.cells()))[: 2 + (layer.mode == LSTM)]
    assert close(ours, steps)
    assert close(gradients(ours, layer), gradients(steps, layer))


@pytest.mark.parametrize("case", CASES)
def test_second_derivatives_are_those_of_pytorch(case: tuple[Any, ...]) -> None:
    layer = Layer(*case)
    # Of samples and first states: that by weights is taken from the product above, once.
    ends = [layer.x, layer.h]
    curvatures = []
    for results in (layer.ours(), layer.theirs()):
        first = gradients(results, layer, create_graph=True)
        bent = (first[0].square().sum() + first[1].sin().sum(),)
        curvatures.append(list(torch.autograd.grad(bent, ends, allow_unused=True)))
    if layer.mode == 0:  # which has none
        curvatures = [[t for t in c if t is not None] for c in curvatures]
    assert close(*curvatures)


@pytest.mark.parametrize("case", CASES)
def test_many_cotangents_are_pulled_back_at_once(case: tuple[Any, ...]) -> None:
    layer = Layer(*case)
    outputs, *_ = layer.ours()
    gs = torch.randn(3, *outputs.shape, dtype=outputs.dtype)
    together = torch.autograd.grad(
        outputs, layer.leaves, gs, retain_graph=True, is_grads_batched=True, allow_unused=True
    )
    for k in range(3):
        alone = torch.autograd.grad(outputs, layer.leaves, gs[k], retain_graph=True)
        assert close([t[k] for t in together], list(alone))


@pytest.mark.parametrize("case", CASES)
def test_tangents_are_pushed_as_cotangents_are_pulled(case: tuple[Any, ...]) -> None:
    cells = Cells(*(t.detach() if isinstance(t, Tensor) else t for t in Layer(*case).cells()))
    moving = {
        name: torch.randn_like(getattr(cells, name))
        for name in ("input_gates", "hidden_gates", "projected", "h", "c")
        if getattr(cells, name) is not None
    }
    ready = slopes(cells, Ran(*recurrent_cells(*cells)))
    pushed = ready.push(tangents_of(cells, moving))
    dy, dh, dc = (torch.randn_like(t) for t in pushed)
    if cells.c is None:
        dc = torch.zeros_like(cells.h)
    pulled = ready.pull(dy, dh, dc)._asdict()
    forth = (pushed[0] * dy).sum() + (pushed[1] * dh).sum()
    if cells.c is not None:
        forth = forth + (pushed[2] * dc).sum()
    back = sum((moving[name] * pulled[name]).sum() for name in moving)
    assert torch.allclose(forth, back)


# --- which calls are recorded so ------------------------------------------------------------------


def call(**changes: Any) -> list[Any]:
    net = nn.LSTM(D, H, 2).double()
    states = torch.zeros(2, N, H).double()
    named = {
        "x": torch.randn(6, N, D).double(),
        "hx": (states, states),
        "weights": net._flat_weights,
        "biases": True,
        "layers": 2,
        "dropout": 0.0,
        "training": True,
        "both": False,
        "first": False,
    }
    return list((named | changes).values())


def test_a_plain_call_is_taken_apart() -> None:
    assert recurrences.layers_of(torch.lstm, call(), {}) is not None
    assert recurrences.layers_of(torch.add, call(), {}) is None


class Tagged(Tensor):
    """A tensor of another class, which may do anything."""


@pytest.mark.parametrize(
    "changes",
    [
        {"x": torch.randn(6, N, D)},  # of another type than the weights
        {"x": torch.randn(N, D).double()},
        {"x": torch.randn(0, N, D).double()},
        {"x": torch.randn(6, N, D).double().as_subclass(Tagged)},
    ],
)
def test_unusual_calls_are_left_to_pytorch(changes: dict[str, Any]) -> None:
    assert recurrences.layers_of(torch.lstm, call(**changes), {}) is None


def test_inside_of_transformations_pytorch_runs_it() -> None:
    asked, arguments = [], call()

    def ask(x: Tensor) -> Tensor:
        asked.append(recurrences.layers_of(torch.lstm, arguments, {}))
        return x

    torch.func.vmap(ask)(torch.zeros(2))
    torch.func.jvp(ask, (torch.zeros(2),), (torch.ones(2),))
    with torch.autograd.forward_ad.dual_level():
        ask(torch.zeros(2))
    with torch.autocast("cpu"):
        ask(torch.zeros(2))
    assert asked == [None] * 4
