"""Random programs: what the analyser says about them against plain numerical definitions.

The oracle below knows only how to run a program on another batch. A "holds" that it can refute is a
failure, and so is a "fails" that it cannot confirm. "unknown" is honest; its share is counted and
kept small.
"""

import sys
from collections import Counter

import pytest
from hypothesis import HealthCheck, event, given, note, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import unbatch as ub
from cases.experiments import FORWARD, check_forward, check_loss
from cases.programs import N, Program, forward_program, loss_program, noise
from unbatch import Structure

LOSS = ("reduction", "simd_loss")


# ---------------------------------------------------------------- the forward pass


# ---------------------------------------------------------------- the loss


# ---------------------------------------------------------------- the tests

QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
UNKNOWN = 0.4  # the share of honest "unknown"s that is still of use


class Same(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 1 * x


def count(tally: Counter[tuple[str, str]], structure: Structure, names: tuple[str, ...]) -> None:
    for name in names:
        status = getattr(structure, name).status
        tally[name, status] += 1
        event(f"{name} {status}")


def check_shares(tally: Counter[tuple[str, str]], names: tuple[str, ...]) -> None:
    """Raise where too much is left unknown."""
    for name in names:
        seen = {status: tally[name, status] for status in ("holds", "fails", "unknown")}
        share = seen["unknown"] / sum(seen.values())
        sys.stdout.write(f"{name}: {seen}, {share:.0%} unknown\n")  # shown by pytest -s
        assert share < UNKNOWN, f"{share:.0%} of the random programs leave {name} unknown: {seen}"


def structure_of_program(program: Program, x: Tensor) -> Structure:
    return ub.Problem(program, lambda p: p.sum(), (x, None)).structure


def structure_of_loss(loss: Program, p: Tensor, y: Tensor) -> Structure:
    return ub.Problem(Same(), lambda q, t: loss(q, t), (p, y)).structure


def test_forward_programs():
    tally: Counter[tuple[str, str]] = Counter()

    @settings(max_examples=200, suppress_health_check=QUIET)
    @given(st.data())
    def run(data):
        program, x = forward_program(lambda options: data.draw(st.sampled_from(list(options))))
        note(f"x: {list(x.shape)}{program}")
        structure = structure_of_program(program, x)
        check_forward(structure, program, x)
        count(tally, structure, FORWARD)

    run()
    check_shares(tally, FORWARD)


def test_loss_programs():
    tally: Counter[tuple[str, str]] = Counter()
    p, y = noise(N, 3, seed=5), noise(N, 3, seed=6)

    @settings(max_examples=150, suppress_health_check=QUIET)
    @given(st.data())
    def run(data):
        loss = loss_program(lambda options: data.draw(st.sampled_from(list(options))))
        note(repr(loss))
        structure = structure_of_loss(loss, p, y)
        check_loss(structure, loss, p, y)
        count(tally, structure, LOSS)

    run()
    check_shares(tally, LOSS)


# Programs that were judged wrongly once.
FOUND_FORWARD = {
    "scattered by data, then the diagonal": "x.scatter_add(1, x.argsort(1), x).diagonal()",
    "a scattered statistic": "torch.zeros(4).to(x).scatter_add(0, x.prod(0).argsort(0), x.prod(0))",
    "the winning entry of a statistic as predictions": "F.one_hot(x.mean(0).argmax(0), 4).to(x)[:, None]",
    "layer norm over the batch has two statistics": "F.layer_norm(x, [4, 4])",
    "a statistic for each turn of a loop": "torch.stack([c / (1 + c.abs().sum()) for c in x.unbind(1)], 1)",
    "a statistic looked up by the sample": "x.mean(0)[x.argmax(1)]",
    "a statistic gathered by the sample": "x.mean(0, True).expand(4, 4).take_along_dim(x.argsort(1), 1)",
}
FOUND_LOSS = {
    "weights lost in a product": "p.square().sum(1) * torch.arange(1.0, 5.0)\nh = (h * h * p.sum(1)).tanh().sum()",
    "an index added": "(torch.arange(1.0, 5.0) + p.square().sum(1)).square().sum()",
    "a total weighted by targets": "((p - y).abs().mean(1).sum() * y[:, 0]).sum()",
    "norm of a scalar": "(p * y).sum(1).mean().norm()",
    "maximum of a scalar": "(p * y).sum(1).mean().amax()",
    "number of non-zero scalars": "(p * y).sum(1).mean().count_nonzero() + p.sum()",
}


@pytest.mark.parametrize("name", FOUND_FORWARD)
def test_forward_programs_found(name):
    x = noise(N, 4, seed=99)
    program = Program([f"h = {FOUND_FORWARD[name]}"], {})
    check_forward(structure_of_program(program, x), program, x)


@pytest.mark.parametrize("name", FOUND_LOSS)
def test_loss_programs_found(name):
    p, y = noise(N, 3, seed=5), noise(N, 3, seed=6)
    loss = Program(f"h = {FOUND_LOSS[name]}".split("\n"), {}, "p, y")
    check_loss(structure_of_loss(loss, p, y), loss, p, y)
