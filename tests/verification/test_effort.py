"""Experiments end: a program is run on numbers that its author never meant, and may loop there.

Nothing here measures time. A loop that never ends counts its rounds, and gives up where nobody
would wait any longer.
"""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import unbatch as ub
from unbatch.capture import effort
from unbatch.capture.effort import OutOfEffort, metered, spend
from unbatch.verification.trial import NO_EFFORT

ROUNDS = 20_000  # of a loop: more than a run may take, and few enough for a test


class TooLong(BaseException):
    """Raised by a loop that goes on for too long; no handler of exceptions takes it."""


def counted():
    yield from range(ROUNDS)
    raise TooLong


def root(a):
    """The root of a number by Newton's method, until it is near enough."""
    u = a
    for _ in counted():
        if (u * u - a).abs() <= 1e-6:
            break
        u = (u + a / u) / 2
    return u


def newton(predictions, _):
    return torch.stack([root(a) for a in predictions[:, 0].exp()]).mean()


def logarithm(predictions, _):
    """The logarithm by bisection on what the sum of the predictions brackets."""
    low, high = predictions.detach().min() - 1, predictions.detach().max() + 1
    for _ in counted():
        if high - low < 1e-6:
            break
        middle = (low + high) / 2
        if middle.exp() > predictions.detach().exp().mean():
            high = middle
        else:
            low = middle
    return (predictions - high).square().sum()


def series(predictions, _):
    """The exponential by its series, term by term until they no longer count."""
    term, total = torch.ones_like(predictions), torch.ones_like(predictions)
    for n in counted():
        term = term * predictions / (n + 1)
        if term.abs().max() < 1e-9:
            break
        total = total + term
    return total.sum()


class FixedPoint(nn.Linear):
    """A state that is iterated until it stands still."""

    def forward(self, x):
        z = torch.zeros_like(x)
        for _ in counted():
            new = torch.tanh(super().forward(z) / 2 + x)
            if (new - z).abs().max() < 1e-9:
                break
            z = new
        return z


class Steps(nn.Linear):
    """An integrator that halves its step until the error is small."""

    def forward(self, x):
        time, step = 0.0, 0.1
        for _ in counted():
            slope = torch.tanh(super().forward(x))
            error = (torch.tanh(super().forward(x + step * slope)) - slope).norm().item() * step
            if error > 1e-2:
                step /= 2
                continue
            x, time, step = x + step * slope, time + step, 1.2 * step
            if time > 1:
                break
        return x


def squares(outputs, _):
    return outputs.square().sum()


ENDLESS = "Newton's method in the loss"  # where the number is large: that near it never comes

LOOPS = {
    "Newton's method in the loss": (nn.Linear, 1, newton),
    "bisection in the loss": (nn.Linear, 2, logarithm),
    "a series in the loss": (nn.Linear, 2, series),
    "a fixed point in the model": (FixedPoint, 3, squares),
    "an integrator in the model": (Steps, 3, squares),
}


def asked(name, samples=4):
    torch.manual_seed(0)
    kind, size, loss = LOOPS[name]
    data = torch.randn(samples, 3).double(), torch.zeros(samples)
    return ub.Problem(kind(3, size).double(), loss, data)


@pytest.mark.parametrize("name", LOOPS)
def test_a_structure_is_found_whatever_other_numbers_do_to_a_loop(name):
    problem = asked(name)
    assert problem.structure.canonical_split.status in ("holds", "unknown")
    assert problem.verify()
    assert problem.gradient()


def test_the_report_says_that_an_experiment_was_stopped():
    report = str(asked(ENDLESS, samples=2).structure)
    assert "a loop that Python ends may not end there" in " ".join(report.split())


def test_without_a_limit_the_loop_goes_on(monkeypatch):
    monkeypatch.setattr(effort, "LONGER", 10**9)
    with pytest.raises(TooLong):
        asked(ENDLESS, samples=2).structure  # noqa: B018


def test_all_experiments_together_have_a_limit(monkeypatch):
    monkeypatch.setattr(effort, "SECONDS", 0.0)
    with metered(plain=10, most=2) as meter:
        spend(60)
        with pytest.raises(OutOfEffort, match="after 2 plain steps"):
            spend(1)
    assert "effort=" in meter.stopped
    spend(10**6)  # outside of experiments nothing is counted


def test_experiments_that_are_short_may_be_many():
    with metered(plain=1, most=1):
        spend(10**6)


def test_what_was_not_found_out_is_unknown(monkeypatch):
    monkeypatch.setattr(effort, "SECONDS", 0.0)

    def loss(predictions, _):
        return predictions.exp().sum().square()

    data = torch.randn(8, 3), torch.zeros(8)
    structure = ub.Problem(nn.Linear(3, 2), loss, data, effort=0.001).structure
    assert structure.reduction.status == "unknown"
    assert any("experiments were stopped" in note for note in structure.notes)
    assert ub.Problem(nn.Linear(3, 2), loss, data).structure.reduction.status == "fails"


def test_a_trial_for_which_no_effort_is_left_says_so(monkeypatch):
    monkeypatch.setattr(effort, "SECONDS", 0.0)
    data = torch.randn(8, 3), torch.zeros(8, 2)
    structure = ub.Problem(nn.Linear(3, 2), nn.MSELoss(), data, effort=0.001).structure
    assert structure.independent_forward.trial == NO_EFFORT
    assert structure.reduction.trial == NO_EFFORT
    assert ub.Problem(nn.Linear(3, 2), nn.MSELoss(), data).structure.reduction.trial == "passed"


@pytest.mark.parametrize("rnn", [nn.LSTM, nn.GRU, nn.RNN])
def test_long_sequences_are_no_loop_that_does_not_end(rnn):
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.lengths = rnn(3, 3, 2, batch_first=True), torch.tensor([150, 90, 20])

        def forward(self, x):
            rows = pack_padded_sequence(x, self.lengths, batch_first=True)
            return self.rnn(rows)[0].data[:3]

    data = torch.randn(3, 150, 3), torch.zeros(3, 3)
    structure = ub.Problem(Packed(), nn.MSELoss(), data).structure
    assert structure.independent_forward.trial == "passed"
    assert not any("stopped" in note for note in structure.notes)


@pytest.mark.parametrize("value", [0, -1, True, "much"])
def test_an_effort_is_a_number_of_plain_steps(value):
    with pytest.raises(ub.InputError, match="effort"):
        ub.Problem(
            nn.Linear(3, 2), nn.MSELoss(), (torch.randn(4, 3), torch.randn(4, 2)), effort=value
        )
