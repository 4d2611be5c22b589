"""Layers on the rows of samples of different lengths, against a loop of plain autograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import unbatch as ub

N, T, D, C, WORDS = 5, 4, 6, 3, 7
LENGTHS = torch.tensor([4, 1, 3, 4, 2])


class Words(nn.Module):
    """Looks up what the rows are rounded to."""

    def __init__(self, **options: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, D, padding_idx=2, **options)

    def forward(self, rows: Tensor) -> Tensor:
        return self.table((rows[:, 0].detach().abs() * 3).long() % WORDS) * rows


class Places(nn.Module):
    """Adds a table with an entry for every row."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(int(LENGTHS.sum()), D))

    def forward(self, rows: Tensor) -> Tensor:
        return rows * self.table


class Pixels(nn.Module):
    """A convolution over the features of each row."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv1d(1, 2, 3, padding=1)

    def forward(self, rows: Tensor) -> Tensor:
        return self.inner(rows[:, None]).mean(1)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(D, D),
    "linear without bias": lambda: nn.Linear(D, D, bias=False),
    "two linear": lambda: nn.Sequential(nn.Linear(D, 9), nn.Tanh(), nn.Linear(9, D)),
    "layer norm": lambda: nn.LayerNorm(D),
    "group norm": lambda: nn.GroupNorm(2, D),
    "batch norm in eval mode": lambda: nn.BatchNorm1d(D).eval(),
    "batch norm": lambda: nn.BatchNorm1d(D),
    "prelu": lambda: nn.PReLU(D),
    "words": Words,
    "words scaled by frequency": lambda: Words(scale_grad_by_freq=True),
    "places": Places,
    "convolution": Pixels,
    "bilinear": lambda: Twice(nn.Bilinear(D, D, D)),
}


class Twice(nn.Module):
    """A layer of two arguments, with the same rows as both."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, rows: Tensor) -> Tensor:
        return self.layer(rows, rows.tanh())


class Net(nn.Module):
    """The layer on the rows of all samples, between two linear ones."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.inner, self.layer, self.out = nn.Linear(D, D), layer, nn.Linear(D, C)

    def forward(self, x: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.inner(x), LENGTHS, True, enforce_sorted=False)
        rows = PackedSequence(self.layer(packed.data), *packed[1:])
        return self.out(pad_packed_sequence(rows, batch_first=True)[0].sum(1))


@pytest.mark.filterwarnings("ignore::unbatch.MixedSamplesWarning")
@pytest.mark.parametrize("name", LAYERS)
def test_rows_are_those_of_a_loop(name: str) -> None:
    net = Net(LAYERS[name]()).double()
    X, y = torch.randn(N, T, D).double(), torch.arange(N) % C
    problem = ub.Problem(net, F.cross_entropy, (X, y))
    answer, norms = problem.gradients(), problem.compute(ub.SquaredNorms())
    squares = problem.compute(ub.SumOfSquares())
    predictions = net(X)
    (slope,) = torch.autograd.grad(F.cross_entropy(predictions, y), predictions, retain_graph=True)
    for n in range(N):
        alone = torch.zeros_like(slope)
        alone[n] = slope[n]
        exact = torch.autograd.grad(predictions, list(net.parameters()), alone, retain_graph=True)
        for (parameter, _), row in zip(net.named_parameters(), exact, strict=True):
            assert torch.allclose(answer[parameter][n], row, rtol=0, atol=1e-12), parameter
            assert torch.allclose(norms[parameter][n], row.square().sum(), rtol=1e-9), parameter
    for parameter, _ in net.named_parameters():
        assert torch.allclose(squares[parameter], answer[parameter].square().sum(0)), parameter


@pytest.mark.parametrize("name", ["linear", "linear without bias", "two linear", "layer norm"])
def test_one_backward_pass_serves_samples_of_all_lengths(name: str) -> None:
    net = Net(LAYERS[name]()).double()
    X, y = torch.randn(N, T, D).double(), torch.arange(N) % C
    plan = ub.Problem(net, F.cross_entropy, (X, y)).plan(ub.SquaredNorms())
    assert {site.kind for site in plan.sites} <= {"linear", "shift", "scale"}
