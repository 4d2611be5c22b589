"""Programs whose way is decided by numbers: recorded again only where these are others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import unbatch as ub
from unbatch.capture import program as capture

N, T, D, C = 6, 5, 4, 3


class Net(nn.Module):
    """A linear layer around ``inner``, which is called with the net and the rows."""

    def __init__(self, inner: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.inner = nn.Linear(D, D), nn.Linear(D, C), inner
        self.rnn = nn.LSTM(D, D, batch_first=True)
        self.register_buffer("length", torch.tensor(3))
        self.register_buffer("slope", torch.tensor(0.5))
        self.lengths = torch.tensor([5, 4, 4, 3, 1, 1])

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(self, self.first(x)))


def packed(net: Any, h: Tensor) -> Tensor:
    return net.rnn(pack_padded_sequence(h, net.lengths, batch_first=True))[1][0][0]


def packed_and_padded(net: Any, h: Tensor) -> Tensor:
    rows = pack_padded_sequence(h, net.lengths, batch_first=True)
    return pad_packed_sequence(rows, batch_first=True)[0].sum(1)


def by_a_sign(net: Any, h: Tensor) -> Tensor:
    if (h.detach() > -100).all():
        return h.mean(1)
    return h.sum(1)


def by_a_count(net: Any, h: Tensor) -> Tensor:
    steps = int((h.detach() > -100).sum()) // (N * D)
    return h[:, :steps].mean(1)


def by_a_buffer(net: Any, h: Tensor) -> Tensor:
    return F.leaky_relu(h[:, : int(net.length)].mean(1), float(net.slope))


def by_a_memory_that_is_written(net: Any, h: Tensor) -> Tensor:
    count = torch.zeros((), dtype=torch.long)
    for _ in range(2):
        count += (h.detach() > -100).all()
        if count == 1:
            h = h * 2
    return h.mean(1)


def by_a_view_that_is_written(net: Any, h: Tensor) -> Tensor:
    counts = torch.zeros(2, dtype=torch.long)
    counts[1].add_((h.detach() > -100).sum() // (T * N * D))
    return h.mean(1) * int(counts.sum())


def by_an_array(net: Any, h: Tensor) -> Tensor:
    counts = (h.detach() > -100).sum((0, 2)).numpy()
    return h[:, : int((counts > 0).sum())].mean(1)


SAME = {
    "packed": packed,
    "packed and padded": packed_and_padded,
    "a sign": by_a_sign,
    "a count": by_a_count,
    "a buffer": by_a_buffer,
    "a memory that is written": by_a_memory_that_is_written,
    "a view that is written": by_a_view_that_is_written,
    "an array": by_an_array,
}


def by_a_size(net: Any, h: Tensor) -> Tensor:
    return h.mean(1) * round(float(h.detach().abs().mean()), 12)


def by_the_largest(net: Any, h: Tensor) -> Tensor:
    return h[:, int(h.detach().sum((0, 2)).argmax())]


def by_the_larger(net: Any, h: Tensor) -> Tensor:
    first, second, *_ = h.detach().sum((0, 2))
    if first > second:
        return h.mean(1)
    return h.tanh().sum(1)


def by_counted_signs(net: Any, h: Tensor) -> Tensor:
    counts = torch.zeros(2, dtype=torch.long)
    counts[1].add_((h.detach() > 0).sum())
    return h.mean(1) * int(counts.sum())


OTHER = {
    "a size": by_a_size,
    "the largest": by_the_largest,
    "the larger": by_the_larger,
    "counted signs": by_counted_signs,
}


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(N, T, D).double(), torch.randint(C, (N,))


def rows_by_autograd(net: nn.Module, X: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The components of the gradient, sample by sample."""
    predictions, parameters = net(X), dict(net.named_parameters())
    slope = torch.autograd.grad(F.cross_entropy(predictions, y), predictions, retain_graph=True)[0]
    rows: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for n in range(N):
        alone = torch.zeros_like(slope)
        alone[n] = slope[n]
        grads = torch.autograd.grad(
            predictions,
            list(parameters.values()),
            alone,
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        for name, grad in zip(parameters, grads, strict=True):
            rows[name].append(grad)
    return {name: torch.stack(of_parameter) for name, of_parameter in rows.items()}


def asked(
    net: nn.Module, monkeypatch: pytest.MonkeyPatch, change: Callable[[int], None] | None = None
) -> int:
    """Return how often a net was recorded over six batches; hold each answer against autograd."""
    count, record = 0, capture.record

    def counted(*args: Any) -> Any:
        nonlocal count
        count += 1
        return record(*args)

    monkeypatch.setattr(capture, "record", counted)
    problem = ub.Problem(net, F.cross_entropy, batch())
    for number in range(6):
        X, y = batch()
        if change is not None:
            change(number)
        problem = problem.with_batch(X, y)
        rows, exact = problem.gradients(), rows_by_autograd(net, X, y)
        for name, expected in exact.items():
            torch.testing.assert_close(rows[name], expected)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.mul_(1.01)
    return count


@pytest.mark.parametrize("name", SAME)
def test_a_way_that_stays_the_same_is_recorded_once(name: str, monkeypatch) -> None:
    torch.manual_seed(0)
    assert asked(Net(SAME[name]).double(), monkeypatch) <= 2  # once more for several samples


@pytest.mark.filterwarnings("ignore::unbatch.MixedSamplesWarning")
@pytest.mark.parametrize("name", OTHER)
def test_another_way_is_recorded_anew(name: str, monkeypatch) -> None:
    torch.manual_seed(0)
    assert asked(Net(OTHER[name]).double(), monkeypatch) > 2


@pytest.mark.parametrize("name", ["packed", "packed and padded"])
def test_other_lengths_are_answered_rightly(name: str, monkeypatch) -> None:
    torch.manual_seed(0)
    net = Net(SAME[name]).double()

    def change(number: int) -> None:
        lengths = torch.tensor([5, 4, 4, 3, 2, 1 + number % 2])
        if number % 3:
            net.lengths = lengths
        else:
            net.lengths.copy_(lengths)

    asked(net, monkeypatch, change)


@pytest.mark.parametrize("in_place", [True, False])
def test_another_number_in_a_buffer_is_noticed(in_place: bool, monkeypatch) -> None:
    torch.manual_seed(0)
    net = Net(by_a_buffer).double()

    def change(number: int) -> None:
        length = torch.tensor(2 + number % 3)
        if in_place:
            net.length.copy_(length)
        else:
            net.length = length

    asked(net, monkeypatch, change)


def test_data_that_is_filled_again_is_compared_with_what_was_read(monkeypatch) -> None:
    torch.manual_seed(0)
    net = Net(by_the_larger).double()
    X, y = batch()
    problem = ub.Problem(net, F.cross_entropy, (X, y))
    for sign in (1, 1, -1, 1):
        X.copy_(torch.randn(N, T, D).double())
        with torch.no_grad():
            net.first.bias.fill_(float(sign * 10))
        rows, exact = problem.gradients(), rows_by_autograd(net, X, y)
        for name, expected in exact.items():
            torch.testing.assert_close(rows[name], expected)
