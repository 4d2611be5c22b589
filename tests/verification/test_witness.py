"""Counterexamples to independence are true: no rounding, no shifted noise, and the right sample."""

import pytest
import torch
from torch import Tensor, nn

import unbatch as ub

N, D = 6, 4
SIZES = torch.tensor([1e6, 1, 1, 1e5, 1, 1])[:, None]
FAR_APART = torch.tensor([1e20, 1, 1, 1e15, 1, 1])[:, None]


class Net(nn.Module):
    def __init__(self, run, start=None):
        super().__init__()
        self.linear, self.run, self.start = nn.Linear(D, D), run, start

    def forward(self, x):
        return self.run(self, x)


def problem(run, x, dtype=torch.float32):
    torch.manual_seed(0)
    net = Net(run, x[:, 0].clone()).to(dtype)
    return ub.Problem(net, lambda o, t: o.square().sum(), (x.to(dtype), torch.zeros(N)))


def batch() -> Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(1))


# --- rounding -------------------------------------------------------------------------------------


def through_the_gram_matrix(net, x):
    gram = x.T @ x
    return net.linear(x @ torch.linalg.inv(gram) @ gram)


def through_a_nearly_singular_matrix(net, x):
    x = torch.cat([x, x * 0.5 + x.pow(2) * 1e-3], 1)
    gram = x.T @ x
    return net.linear((x @ torch.linalg.inv(gram) @ gram)[:, :D])


def sums_and_differences(net, x):
    sums = x.cumsum(0)
    return torch.cat([sums[:1], sums[1:] - sums[:-1]])


def bounded_differences(net, x):
    return net.linear(sums_and_differences(net, x).tanh())


def centred_and_back(net, x):
    mean = x.mean(0)
    return net.linear((x - mean) @ torch.eye(D).to(x) + mean)


def fourier_and_back(net, x):
    return net.linear(torch.fft.ifft(torch.fft.fft(x, dim=0) * 1.0, dim=0).real)


ROUNDED = [
    through_the_gram_matrix,
    through_a_nearly_singular_matrix,
    sums_and_differences,
    bounded_differences,
    centred_and_back,
    fourier_and_back,
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [1.0, SIZES, FAR_APART], ids=["alike", "unequal", "far apart"])
@pytest.mark.parametrize("run", ROUNDED)
def test_rounding_is_no_counterexample(run, sizes, dtype):
    """Each prediction is a function of its own sample, and what moves it is lost digits."""
    try:
        structure = problem(run, batch() * sizes, dtype).structure
    except ub.CaptureError:
        return  # a matrix that is singular in this precision
    assert structure.independent_forward.status == "unknown"
    assert structure.simd_forward.status != "fails"


def centred(net, x):
    return net.linear(x) - x.mean(0)


def above_the_mean(net, x):
    return net.linear(x * (x > x.mean(0)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [1.0, SIZES, FAR_APART], ids=["alike", "unequal", "far apart"])
@pytest.mark.parametrize("run", [centred, above_the_mean])
def test_a_true_dependence_is_found_whatever_the_sizes(run, sizes, dtype):
    assert problem(run, batch() * sizes, dtype).structure.independent_forward.status == "fails"


# --- noise ----------------------------------------------------------------------------------------


def without_rule(x: Tensor) -> Tensor:
    """The same numbers, through an op that nothing is known of."""
    return torch.linalg.lstsq(torch.eye(D).to(x), x.detach().T).solution.T


def counts(net, x):
    return net.linear(without_rule(x)) + torch.poisson(x.detach().exp())


def rates(net, x):
    return net.linear(without_rule(x)) + torch._standard_gamma(x.detach().exp())


def trials(net, x):
    of_ten = torch.binomial(torch.full_like(x.detach(), 10.0), x.detach().sigmoid())
    return net.linear(without_rule(x)) * of_ten


def counts_before_dropout(net, x):
    return nn.functional.dropout(net.linear(without_rule(x)) + torch.poisson(x.detach().exp()))


@pytest.mark.parametrize("run", [counts, rates, trials, counts_before_dropout])
def test_noise_that_is_drawn_by_rejection_is_no_counterexample(run):
    """Another rate of one sample moves the random stream of all that follow."""
    structure = problem(run, batch()).structure
    assert structure.independent_forward.status != "fails"
    assert structure.simd_forward.status != "fails"


def test_samples_that_mix_beside_such_noise_are_found():
    def run(net, x):
        return net.linear(x) - x.mean(0) + torch.poisson(x.detach().exp())

    assert problem(run, batch()).structure.independent_forward.status == "fails"


# --- which sample ---------------------------------------------------------------------------------


def unless_both_changed(net, x):
    kept = (x[0, 0] == net.start[0]) | (x[1, 0] == net.start[1])
    return torch.where(kept, net.linear(x), 2 * net.linear(x))


def unless_three_changed(net, x):
    same = (x[:, 0] == net.start).sum()
    return torch.where(same > N - 3, net.linear(x), 2 * net.linear(x))


def second_largest(net, x):
    return net.linear(x) * x.detach()[:, 0].sort().values[-2]


def of_the_last(net, x):
    return net.linear(x) + x[-1]


@pytest.mark.parametrize(
    "run", [unless_both_changed, unless_three_changed, second_largest, of_the_last]
)
def test_the_samples_that_are_named_move_the_prediction(run):
    """And where several are named, none of them can be left out."""
    asked = problem(run, batch())
    witness = next(c.witness for c in asked.verify().checks if c.name == "independent_forward")
    replaced = witness.together or (witness.moved_by,)
    assert witness.moved not in replaced
    assert ("together" in str(witness)) == (len(replaced) > 1)
    assert str(witness) == asked.structure.independent_forward.note
    # The same replacements as the search: other samples, or other samples and noise.
    moves = [moved(asked, witness.moved, replaced, seed) for seed in range(6)]
    assert any(moves)
    for m in replaced:
        fewer = [other for other in replaced if other != m]
        if fewer:
            assert not moved(asked, witness.moved, fewer, moves.index(True))


def moved(asked: ub.Problem, prediction: int, replaced, seed: int) -> bool:
    experiment = asked._recorded().experiment
    keep = torch.ones(N, dtype=torch.bool)
    keep[list(replaced)] = False
    new = asked.program.model(experiment.changed(keep, "rolled", seed))[prediction]
    old = asked.program.model(asked.inputs)[prediction]
    return not torch.allclose(new, old, rtol=1e-4)


def test_samples_of_one_number_each():
    """The inputs have no axis but that of the samples."""
    weights = torch.arange(1.0, N + 1)
    asked = ub.Problem(lambda x: x * weights, lambda p, *_: p.sum(), (torch.randn(N), None))
    assert asked.structure.simd_forward.status == "fails"
