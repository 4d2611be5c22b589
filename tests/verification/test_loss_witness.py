"""In which precision a loss is put to the test."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from unbatch.capture.isolation import random_state
from unbatch.capture.program import Program
from unbatch.linalg.precision import LOSS_IN_DOUBLE, LOSS_WITH_CASTS
from unbatch.verification.draw import ALL
from unbatch.verification.loss_experiment import loss_experiment

N, C = 4, 3
CONSTANT = torch.ones(C)


def refuses_double(p, y):
    return nn.functional.linear(p, CONSTANT[None]).square().sum()


def infinite(p, y):
    return p.sum() / 0


def cast_to_single(p, y):
    return p.float().square().sum()


def squares(p, y):
    return (p - y).square().sum()


# by loss: taken in float64; all of it computed there
LOSSES = {
    squares: (True, True),
    refuses_double: (False, False),
    infinite: (False, False),
    cast_to_single: (True, False),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_is_tested_in_float64_where_it_takes_it(loss):
    """And believed to 16 digits only where its value comes out in float64, too."""
    graph = SimpleNamespace(rng=random_state(), loss_steps=[], loss_writes=False, hooks_loss=False)
    program = Program(nn.Identity(), loss, {})
    experiment = SimpleNamespace(
        program=program,
        places=[0],
        out_dims=[0],
        samples=N,
        targets=torch.ones(N, C),
        draw=ALL,
        graph=graph,
        target_dims=[0],
    )
    at = loss_experiment(experiment, torch.randn(N, C))
    double, fine = LOSSES[loss]
    assert at.double == double
    assert at.tolerances == (LOSS_IN_DOUBLE if fine else LOSS_WITH_CASTS)
    dtype = torch.float64 if double else torch.float32
    assert [p.dtype for p in at.swapped({})] == [dtype]


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_slopes_are_those_of_the_gradient_wherever_the_samples_lie(dim):
    """Values show what ``detach`` hides from the gradient; samples may lie along any axis."""
    torch.manual_seed(0)
    shape = [2, 2, 2]
    shape[dim] = N
    predictions = torch.randn(shape, dtype=torch.float64)
    graph = SimpleNamespace(rng=random_state(), loss_steps=[], loss_writes=False, hooks_loss=False)
    experiment = SimpleNamespace(
        program=Program(nn.Identity(), lambda p, y: (p - y).pow(3).sum(), {}),
        places=[0],
        out_dims=[dim],
        samples=N,
        targets=torch.ones(shape, dtype=torch.float64),
        draw=ALL,
        graph=graph,
        target_dims=[0],
    )
    at = loss_experiment(experiment, predictions)
    gradient = at.gradient(at.predictions())
    for n in range(N):
        slope = at.slope(at.predictions(), n)
        torch.testing.assert_close(slope, gradient[n], rtol=1e-6, atol=1e-6)
