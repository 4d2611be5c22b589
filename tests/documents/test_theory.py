"""What docs/theory.md states and no other test shows: batch norm's derivative, what it hides, and
variances.
"""

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unbatch as ub
from unbatch.reference import definitions as reference

N = 7


def normalise(z: Tensor) -> Tensor:
    return (z - z.mean(0)) / z.var(0, unbiased=False).sqrt()


def normed(*widths: int) -> nn.Sequential:
    """Linear layers with a batch norm (no ε to speak of) and a nonlinearity after each but the
    last.
    """
    layers: list[nn.Module] = []
    for i, o in pairwise(widths[:-1]):
        layers += [nn.Linear(i, o), nn.BatchNorm1d(o, eps=1e-300), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(*widths[-2:])).double()


def data(samples: int = N) -> tuple[Tensor, Tensor]:
    return torch.randn(samples, 4, dtype=torch.float64), torch.randint(3, (samples,))


# ---------------------------------------------------------------- the derivative of batch norm


def test_the_derivative_of_batch_norm_is_a_projector_over_sigma():
    z = torch.randn(N, dtype=torch.float64)
    hat, ones, sigma = (
        normalise(z),
        torch.ones(N, dtype=torch.float64),
        z.var(unbiased=False).sqrt(),
    )
    projector = torch.eye(N) - torch.outer(ones, ones) / N - torch.outer(hat, hat) / N
    torch.testing.assert_close(torch.autograd.functional.jacobian(normalise, z), projector / sigma)
    torch.testing.assert_close(projector @ projector, projector)
    assert torch.linalg.matrix_rank(projector) == N - 2


def test_with_two_values_nothing_is_left_of_it():
    jacobian = torch.autograd.functional.jacobian(normalise, torch.randn(2, dtype=torch.float64))
    assert jacobian.abs().max() < 1e-12


def scale_of_a_unit(model: nn.Sequential) -> Tensor:
    """The direction that stretches the weights of the first unit, as one
    vector of all parameters.
    """
    direction = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    direction["0.weight"][0] = model[0].weight[0].detach()
    return torch.cat([t.flatten() for t in direction.values()])


def test_the_frozen_matrix_bends_where_the_loss_does_not():
    model, (X, y) = normed(4, 5, 3), data()
    stretch, problem = scale_of_a_unit(model), ub.Problem(model, F.cross_entropy, (X, y))
    bent = {by: float(stretch @ (problem.ggn(by=by) @ stretch)) for by in ("component", "frozen")}
    assert bent["component"] < 1e-12 * bent["frozen"]
    before = F.cross_entropy(model(X), y)
    with torch.no_grad():
        model[0].weight[0] *= 3
    torch.testing.assert_close(F.cross_entropy(model(X), y), before)


def test_the_first_batch_norm_from_the_top_costs_no_pass_for_each_sample():
    X, y = data()
    pullbacks = [
        ub.Problem(normed(*w), F.cross_entropy, (X, y)).plan().pullbacks
        for w in [(4, 3), (4, 5, 3)]
    ]
    assert pullbacks == [1, 1]
    assert ub.Problem(normed(4, 5, 5, 3), F.cross_entropy, (X, y)).plan().pullbacks == 1 + N


# ---------------------------------------------------------------- rows


class Above(nn.Linear):
    """Lets through what lies above the mean of the batch: its derivatives do not mix samples, its
    values do.
    """

    def forward(self, x):
        z = super().forward(x)
        return z * (z > z.mean(0))


def test_rows_that_agree_prove_no_independence():
    model, (X, y) = Above(4, 3).double(), data()
    rows = [f(model, F.cross_entropy, X, y) for f in (reference.component, reference.copies)]
    for name, row in rows[0].items():
        torch.testing.assert_close(rows[1][name], row)
    assert (
        ub.Problem(model, F.cross_entropy, (X, y)).structure.independent_forward.status == "fails"
    )


# ---------------------------------------------------------------- sums and variances


TASKS = {
    "constant": (lambda x: x, lambda reached: torch.full_like(reached, 2.0)),
    "learned": (
        torch.exp,
        lambda reached: reached,
    ),  # skewed inputs, and targets that the net can reach
}


def drawn(mixing: bool, task: str, batches: int = 3000, samples: int = 8) -> tuple[float, float]:
    """The variance of the gradient from batch to batch, and what the rows of a batch say it is, on
    average.

    Summed over the weights of a layer below a normalisation, by the statistics of the batch or by
    those of all data. Rows are those by component; were they independent and alike, ``N/(N-1) Σ
    (r_n - r̄)²`` would be the variance of their sum.
    """
    generator = torch.Generator().manual_seed(0)
    weights, head = (torch.randn(2, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    inputs, targets = TASKS[task]
    X = inputs(torch.randn(batches, samples, 2, generator=generator, dtype=torch.float64))
    everything = (X @ weights.T).flatten(0, 1)
    mean, std = everything.mean(0), everything.std(0)
    Y = targets((X @ weights.T - mean) / std @ head.T)

    def terms(weights: Tensor, x: Tensor, y: Tensor) -> Tensor:
        z = x @ weights.T
        return ((normalise(z) if mixing else (z - mean) / std) @ head.T - y).square().sum(
            1
        ) / samples

    at = (
        weights if mixing else weights + 0.1
    )  # a net with fixed statistics that has reached its targets has no rows
    rows = torch.vmap(torch.func.jacrev(terms), (None, 0, 0))(at, X, Y)
    within = (rows - rows.mean(1, keepdim=True)).square().sum(1) * samples / (samples - 1)
    return float(rows.sum(1).var(0).sum()), float(within.mean(0).sum())


@pytest.mark.parametrize("task", TASKS)
def test_rows_of_separate_samples_tell_the_variance_of_the_gradient(task):
    true, told = drawn(False, task)
    assert told == pytest.approx(true, rel=0.1)


def test_rows_by_component_under_batch_norm_tell_too_much_or_too_little():
    true, told = drawn(True, "constant")
    assert told > 10 * true, f"true {true:.4f}, told {told:.4f}"
    true, told = drawn(True, "learned")
    assert told < 0.7 * true, f"true {true:.4f}, told {told:.4f}"
