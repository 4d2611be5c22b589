"""Axes of samples that users declare: several views of each sample along one axis, and others."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unbatch as ub
from cases.comparison import near
from cases.joined_outputs import (
    JoinedCase,
    N,
    Net,
    WithLoss,
    dense_ggn,
    nt_xent,
    points,
    stacked,
)

MODES = pytest.mark.parametrize("mode", ["train", "eval"])


def squares(z: Tensor) -> Tensor:
    return z.square().sum() / 2


def distances(z: Tensor) -> Tensor:
    return (z[: len(z) // 2] - z[len(z) // 2 :]).square().sum()


LOSSES = {"squares": squares, "distances": distances, "contrasted": nt_xent}
LOSS = pytest.mark.parametrize("loss", LOSSES)


def layers(net: Net, x: Tensor) -> Tensor:
    return net.layers(x)


def net_of(returned: Any, mode: str, **sizes: Any) -> Net:
    return Net(returned, **sizes).double().train(mode == "train")


def check(problem: ub.Problem, expected: Tensor, parts: bool) -> None:
    """Hold the matrix against its definition, and rows against the gradient."""
    G = problem.ggn()
    near(G.to_dense(), expected, "dense")
    near(G.diag(), expected.diagonal(), "diagonal")
    rows, gradient = problem.gradients(), problem.gradient()
    assert not rows.rest
    for name, g in gradient.items():
        assert len(rows[name]) == N
        near(rows[name].sum(0), g, name, 1e-14)
    assert problem.verify()
    assert not problem.structure.joined
    assert bool(problem.structure.reduction) == parts
    if parts:
        near(G.diag(per_component=True).sum(0), expected.diagonal(), "parts")
    else:
        with pytest.raises(ub.StructureError):
            G.diag(per_component=True)


@MODES
@LOSS
def test_pairs_of_two_inputs(loss, mode):
    net, views = net_of(stacked, mode), points(N, N)
    expected = dense_ggn(JoinedCase("", None, LOSSES[loss]), net, views)
    problem = ub.Problem(net, LOSSES[loss], (views, None), out_dims=ub.Views(2))
    check(problem, expected, parts=loss != "contrasted")


@MODES
@LOSS
def test_pairs_of_one_input(loss, mode):
    net, X = net_of(layers, mode), torch.cat(points(N, N))
    expected = dense_ggn(JoinedCase("", None, LOSSES[loss]), net, (X,))
    declared = {"in_dims": ub.Views(2), "out_dims": ub.Views(2)}
    problem = ub.Problem(net, LOSSES[loss], (X, None), **declared)
    check(problem, expected, parts=loss != "contrasted")
    assert problem.predictions().shape == (N, 2, 2)
    larger = problem.with_batch(torch.cat(points(N + 1, N + 1)))
    assert larger.samples == N + 1
    assert len(larger.gradients()["first.weight"]) == N + 1


@MODES
@LOSS
def test_pairs_in_a_model_with_its_own_loss(loss, mode):
    net = WithLoss(stacked, LOSSES[loss]).double().train(mode == "train")
    views = points(N, N)
    expected = dense_ggn(JoinedCase("", None, LOSSES[loss]), net, views)
    problem = ub.Problem(net, batch=views, out_dims=ub.Views(2))
    check(problem, expected, parts=loss != "contrasted")


def test_without_mixing_rows_are_per_sample():
    """Row n is the gradient of the loss of the pair n."""
    net, X = net_of(layers, "eval"), torch.cat(points(N, N))
    declared = {"in_dims": ub.Views(2), "out_dims": ub.Views(2)}
    rows = ub.Problem(net, distances, (X, None), **declared).gradients()
    assert rows.kind == "per-sample"
    for n in range(N):
        alone = distances(net(X[[n, N + n]]))
        (g,) = torch.autograd.grad(alone, [net.first.weight])
        near(rows["first.weight"][n], g, f"sample {n}")


@MODES
def test_labels_are_stacked_as_well(mode):
    net, views, y = net_of(stacked, mode), points(N, N), torch.arange(N) % 2
    labels = torch.cat([y, 1 - y])
    loss = F.cross_entropy
    problem = ub.Problem(net, loss, (views, labels), in_dims=(0, ub.Views(2)), out_dims=ub.Views(2))
    expected = dense_ggn(JoinedCase("", None, lambda z: loss(z, labels)), net, views)
    check(problem, expected, parts=True)


@MODES
def test_entries_next_to_each_other(mode):
    def flattened(net: Net, x: Tensor) -> Tensor:
        return net.layers(x.flatten(0, 1))

    net, X = net_of(flattened, mode), torch.randn(N, 3, 3).double()
    expected = dense_ggn(JoinedCase("", None, squares), net, (X,))
    problem = ub.Problem(net, squares, (X, None), out_dims=ub.Views(3, adjacent=True))
    check(problem, expected, parts=True)


@MODES
def test_another_axis_where_samples_are_mixed(mode):
    def turned(net: Net, x: Tensor) -> Tensor:
        z = net.layers(x)
        return ((z @ z.T).softmax(1) @ z).T

    net, (X,) = net_of(turned, mode, outputs=3), points(N)
    expected = dense_ggn(JoinedCase("", None, squares), net, (X,))
    found = ub.Problem(net, squares, (X, None))
    assert found.structure.joined
    check(ub.Problem(net, squares, (X, None), out_dims=1), expected, parts=True)


@MODES
def test_one_output_of_several(mode):
    def pair(net: Net, a: Tensor, b: Tensor) -> Any:
        return {"z": stacked(net, a, b), "own": net.layers(a)}

    def loss(o: Any) -> Tensor:
        return squares(o["z"]) + (o["own"] ** 4).mean()

    net, views = net_of(pair, mode), points(N, N)
    expected = dense_ggn(JoinedCase("", None, loss), net, views)
    dims = {"z": ub.Views(2), "own": None}
    check(ub.Problem(net, loss, (views, None), out_dims=dims), expected, parts=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"out_dims": ub.Views(3)}, ("output[0]", "Views(count=3", "4 of them", "(8, 2)")),
        ({"out_dims": 1}, ("output[0]", "along 1", "(8, 2)")),
        ({"out_dims": {"a": 1}}, ("out_dims", "{'a': 1}")),
        ({"out_dims": "first"}, ("out_dims", "'first'")),
        ({"in_dims": ub.Views(3)}, ("X[0]", "(4, 3)")),
        ({"out_dims": ub.Views(2), "sample_dims": (0, 1)}, ("sample_dims", "out_dims")),
    ],
)
def test_what_does_not_fit_is_refused(options, words):
    with pytest.raises(ub.InputError) as error:
        _ = ub.Problem(net_of(stacked, "eval"), squares, (points(N, N), None), **options).structure
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("count", [0, -1, 1.5, True, "two"])
def test_counts_that_are_none(count):
    with pytest.raises(ub.InputError, match="at least 1"):
        ub.Views(count)


def test_a_model_with_its_own_loss_takes_one_entry():
    net = WithLoss(stacked, squares).double()
    with pytest.raises(ub.InputError, match="single entry"):
        _ = ub.Problem(net, batch=points(N, N), out_dims=[ub.Views(2)]).structure
    with pytest.raises(ub.InputError, match="cut at values of shapes"):
        _ = ub.Problem(net, batch=points(N, N), out_dims=ub.Views(3)).structure


def test_complex_outputs_are_refused_in_words():
    net = nn.Linear(3, 2).double()
    problem = ub.Problem(
        net, lambda z, *_: torch.fft.fft(z).abs().square().mean(), (*points(N), None)
    )
    assert problem.ggn().trace() > 0
    turned = nn.Sequential(net, _Fourier())
    complex_problem = ub.Problem(turned, lambda z, *_: z.abs().square().mean(), (*points(N), None))
    with pytest.raises(ub.StructureError, match="view_as_real"):
        complex_problem.ggn().trace()


class _Fourier(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft(x)
