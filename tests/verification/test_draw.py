"""Where predictions are large, `verify` tries a sample of all there is, and says so."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unbatch as ub
from unbatch.verification import draw
from unbatch.verification.draw import ALL, Draw
from unbatch.verification.verify import verify

N, D, WORDS = 6, 4, 50


def next_words(predictions: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(predictions.flatten(0, 1), y.flatten())


def asked(*layers: nn.Module, loss=next_words, effort: float = 50) -> ub.Problem:
    torch.manual_seed(0)
    net = nn.Sequential(*layers, nn.Linear(D, WORDS)).double()
    data = torch.randn(N, 3, D).double(), torch.randint(WORDS, (N, 3))
    return ub.Problem(net, loss, data, effort=effort)


@pytest.fixture(autouse=True)
def large(monkeypatch) -> None:
    monkeypatch.setattr(draw, "LARGE", 20 * N)


def test_the_report_says_of_how_much_what_was_tried() -> None:
    verification = asked().verify()
    assert verification
    assert "20 of 150 entries of each prediction" in verification.drawn
    assert "2 of 12 pairs of samples" in verification.drawn
    assert verification.drawn in str(verification)


def test_more_effort_tries_more() -> None:
    assert "3 of 12 pairs" in asked(effort=75).verify().drawn
    assert asked(effort=1e4).verify().drawn == ""


def test_of_small_predictions_all_is_tried(monkeypatch) -> None:
    monkeypatch.setattr(draw, "LARGE", 10**6)
    assert Draw.of(10**6, 50) is ALL
    assert asked().verify().drawn == ""


class Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


def joint(predictions: Tensor, y: Tensor) -> Tensor:
    return next_words(predictions, y).square() + predictions.std(0).sum()


PLANTED = {
    "samples depend on each other": ([Centred()], next_words, "independent_forward"),
    "the loss is no sum": ([], joint, "reduction"),
    "rows turn with other samples": ([], joint, "simd_loss"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_wrong_verdict_is_contradicted_by_a_sample(name: str) -> None:
    layers, loss, verdict = PLANTED[name]
    problem = asked(*layers, loss=loss)
    structure = problem.structure
    wrong = replace(getattr(structure, verdict), status="holds", basis="proved")
    session = problem._comparable()
    structure = structure.with_verdicts(wrong)
    verification = verify(structure, session.experiment, session.predictions)
    assert verification.drawn
    (check,) = [check for check in verification.checks if check.name == verdict]
    assert check.passed is False


def test_parameters_of_the_loss_are_found_together() -> None:
    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterList([nn.Parameter(torch.ones(())) for _ in range(4)])

        def forward(self, predictions: Tensor, y: Tensor) -> Tensor:
            return next_words(predictions, y) * self.weights[2]

    problem = asked(loss=Loss())
    structure = problem.structure
    wrong = replace(structure.canonical_split, status="holds", basis="proved")
    session = problem._comparable()
    verification = verify(structure.with_verdicts(wrong), session.experiment, session.predictions)
    (check,) = [c for c in verification.checks if c.name == "canonical_split"]
    assert check.passed is False
    assert "weights.2" in check.detail
