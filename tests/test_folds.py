"""Samples along several axes: tokens of sentences and pixels of images, held against the same net on one axis."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import unbatch as ub
from unbatch import reference

B, T, D, C = 3, 4, 5, 3


class Sentences(nn.Module):
    """Token by token, or with attention between those of a sentence."""

    def __init__(self, attention=False, norm=False):
        super().__init__()
        self.words, self.places = nn.Embedding(7, D), nn.Parameter(0.1 * torch.randn(T, D))
        self.hidden, self.head = nn.Linear(D, D), nn.Linear(D, C)
        self.attention, self.norm = attention, nn.BatchNorm1d(D) if norm else None

    def forward(self, words):
        h = self.words(words) + self.places
        if self.attention:
            h = (h @ h.mT).softmax(-1) @ h
        h = self.hidden(h)
        if self.norm is not None:
            h = self.norm(h.mT).mT
        return self.head(h.tanh())


class Pixels(nn.Module):
    """1x1 convolutions see one pixel each; larger ones its neighbours too."""

    def __init__(self, size=1):
        super().__init__()
        self.first, self.last = nn.Conv2d(2, 4, size, padding=size // 2), nn.Conv2d(4, C, 1)

    def forward(self, x):
        return self.last(self.first(x).tanh())


class Together(nn.Module):
    """The same net with one axis of samples on what it takes and gives."""

    def __init__(self, net, sizes, dims):
        super().__init__()
        self.net, self.sizes, self.dims = net, sizes, dims

    def forward(self, x):
        front = tuple(range(len(self.dims)))
        whole = x.unflatten(0, self.sizes)
        whole = whole.movedim(front, self.dims) if whole.ndim > max(self.dims) else whole
        return self.net(whole).movedim(self.dims, front).flatten(0, len(front) - 1)


def tokens_loss(p, y):
    return F.cross_entropy(p.flatten(0, 1), y.flatten())


def words():
    return torch.randint(7, (B, T)), torch.randint(C, (B, T))


def pixels():
    return torch.randn(2, 2, 3, 2), torch.randint(C, (2, 3, 2))


# net, data, loss, axes, sizes; whether samples are independent
CASES = {
    "tokens": (Sentences, words, tokens_loss, (0, 1), (B, T), "holds"),
    "tokens under attention": (lambda: Sentences(attention=True), words, tokens_loss, (0, 1), (B, T), "fails"),
    "tokens under batch norm": (lambda: Sentences(norm=True), words, tokens_loss, (0, 1), (B, T), "fails"),
    "pixels": (Pixels, pixels, F.cross_entropy, (0, 2, 3), (2, 3, 2), "holds"),
    "pixels and their neighbours": (lambda: Pixels(3), pixels, F.cross_entropy, (0, 2, 3), (2, 3, 2), "fails"),
}


def problem_of(name):
    torch.manual_seed(0)
    make, data, loss, dims, sizes, _ = CASES[name]
    net, (x, y) = make().double(), data()
    x = x.double() if x.is_floating_point() else x
    front = tuple(range(len(dims)))
    folded = x.movedim(dims, front) if x.ndim > max(dims) else x
    args = (Together(net, sizes, dims), F.cross_entropy, folded.flatten(0, len(dims) - 1), y.flatten())
    return ub.Problem(net, loss, (x, y), sample_dims=dims), args


def near(found, expected, rounding=1e-10):
    assert (found - expected).abs().max() <= rounding * expected.abs().max().clamp_min(1e-12)


@pytest.mark.parametrize("name", CASES)
def test_verdicts(name):
    problem, _ = problem_of(name)
    structure = problem.structure
    assert structure.independent_forward.status == CASES[name][-1]
    assert structure.reduction.status == structure.simd_loss.status == structure.canonical_split.status == "holds"
    assert not [c for c in problem.verify().checks if c.passed is False]


@pytest.mark.parametrize("name", CASES)
def test_quantities_are_those_of_one_axis(name):
    problem, args = problem_of(name)
    rows, expected = problem.gradients(), reference.component(*args)
    for key, row in rows.items():
        near(row, expected[f"net.{key}"])
    near(sum_of(rows), reference.flat(expected).sum(0))
    G, dense = problem.ggn(), reference.ggn(*args)
    v = torch.randn(len(dense), dtype=torch.float64)
    near(G @ v, dense @ v, 1e-9)
    near(G.diag(), dense.diagonal(), 1e-9)
    near(G.diag(per_component=True), reference.ggn_diagonals(*args), 1e-9)


def sum_of(rows):
    return torch.cat([r.sum(0).flatten() for r in rows.values()])


def test_other_data_of_other_sizes():
    torch.manual_seed(0)
    net = Pixels().double()
    one, other = pixels(), (torch.randn(1, 2, 2, 2), torch.randint(C, (1, 2, 2)))
    problem = ub.Problem(net, F.cross_entropy, (one[0].double(), one[1]), sample_dims=(0, 2, 3))
    problem.gradients()
    moved = problem.with_batch(other[0].double(), other[1])
    assert moved.samples == 4
    for name, g in moved.gradient().items():
        near(moved.gradients()[name].sum(0), g, 1e-9)


def test_a_sentence_is_a_sample_without_them():
    _, args = problem_of("tokens under attention")
    net = args[0].net
    whole = ub.Problem(net, tokens_loss, words())
    assert whole.samples == B
    assert whole.structure.independent_forward.status == "holds"


REFUSED = {
    "one axis": ({"sample_dims": (0,)}, "two or more"),
    "an axis twice": ({"sample_dims": (0, 0)}, "two or more"),
    "in_dims beside them": ({"sample_dims": (0, 1), "in_dims": 1}, "leave out in_dims=1"),
    "axes that targets have not": ({"sample_dims": (0, 2)}, "y has a tensor of shape"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    options, says = REFUSED[name]
    x, y = torch.randn(B, T, D), torch.randint(C, (B, T))
    with pytest.raises(ub.InputError, match=says):
        ub.Problem(nn.Linear(D, C), tokens_loss, (x, y), **options)


def test_predictions_without_these_samples_are_refused():
    x, y = torch.randn(B, T, D), torch.randint(C, (B, T))
    problem = ub.Problem(lambda p, x: (x @ p["w"]).mean(1), lambda p, y: p.sum(), (x, y), sample_dims=(0, 1),
                         parameters={"w": torch.randn(D, C, requires_grad=True)})  # fmt: skip
    with pytest.raises(ub.UnbatchError, match="of which none has the samples"):
        problem.gradients()


def test_a_loss_of_its_own_is_refused():
    with pytest.raises(ub.InputError, match="pass the loss"):
        ub.Problem(nn.Linear(D, C), batch=torch.randn(B, T, D), sample_dims=(0, 1))


def test_samples_in_another_order_are_caught():
    problem, args = problem_of("tokens")
    expected = reference.component(*args)
    turned = expected["net.hidden.weight"].view(B, T, D, D).movedim(1, 0).flatten(0, 1)
    with pytest.raises(AssertionError):
        near(problem.gradients()["hidden.weight"], turned)
