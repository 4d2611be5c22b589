"""Programs that were once judged wrongly: no verdict may contradict the truth again ("unknown" is
allowed).

Truths are three letters for the forward pass (independent, SIMD, SIMD given statistics), two for
the loss (reduction, SIMD loss): h holds, f fails, a dot where nothing is demanded.
"""

import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import unbatch as ub
from unbatch.analysis.domain.ownership import batched, shared
from unbatch.analysis.domain.propagation import Propagation
from unbatch.analysis.rules.registry import RULES, RuleContext
from unbatch.reference import definitions as reference

N, D = 6, 4
FORWARD = ("independent_forward", "simd_forward", "simd_given_statistics")
LOSS = ("reduction", "simd_loss")
WORDS = {"h": "holds", "f": "fails"}


class Forward(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        return self.f(x)


def x():
    return torch.randn(N, D, generator=torch.Generator().manual_seed(0))


def halves(a, b):
    return torch.cat([a[:3], b[3:]])


def order(h):
    return h[:, 0].argsort()


def bytes_of_others(h):
    y = h.clone()
    v = y.view(torch.uint8)
    v[3:] = v[:3].clone()
    return y * 1


def overwritten_while_sorted(h):
    y = h[order(h)].clone()
    y[0] = 0
    return y[order(h).argsort()]


def mask_of_bytes(h):
    """PyTorch takes bytes for a mask, so every row becomes that of sample 1."""
    y = h.clone()
    y[torch.ones(N, dtype=torch.uint8)] = h[1:2]
    return y


def queries(h):
    q, kv = torch.ones(1, 1, N, D), h[None, None]
    return h + F.scaled_dot_product_attention(q, kv, kv, is_causal=True)[0, 0, 0]


def bag(h):
    return F.embedding_bag(
        h.long().abs(), torch.ones(9, 3), mode="sum", per_sample_weights=h.flip(0)
    )


def bags(h):
    """Where sample n begins is where sample n - 1 ends."""
    starts = 4 * torch.arange(N) + ((h[:, 0] > 0) & (torch.arange(N) > 0))
    return F.embedding_bag(torch.arange(4 * N + 2) % 9, torch.arange(27.0).view(9, 3), starts)


MODELS = {
    "an embedding bag that ends where the next sample begins": (bags, "fff"),
    "weights of an embedding bag from another sample": (bag, "fff"),
    "padding and stride over the samples, kernel one": (
        lambda h: F.conv1d(h.T[None], torch.ones(D, D, 1), stride=2, padding=3)[0].T,
        "fff",
    ),
    "memory written through a view of bytes": (bytes_of_others, "fff"),
    "causal attention over the samples by fixed queries": (queries, "fff"),
    "two constants added": (lambda h: halves(h + 1, h + 2), "hff"),
    "two factors of a product added": (
        lambda h: halves(
            torch.addmm(torch.ones(D), h, torch.eye(D)),
            torch.addmm(torch.ones(D), h, torch.eye(D), alpha=2),
        ),
        "hff",
    ),
    "two epsilons": (
        lambda h: halves(
            F.batch_norm(h, torch.zeros(D), torch.ones(D)),
            F.batch_norm(h, torch.zeros(D), torch.ones(D), eps=1.0),
        ),
        "hff",
    ),
    "two quantiles": (
        lambda h: halves(h.quantile(0.25, dim=1), h.quantile(0.75, dim=1))[:, None],
        "hff",
    ),
    "one-hot read at another place for each sample": (
        lambda h: (
            F.one_hot((h[:, 0] > 0).long(), 4).float().gather(1, torch.arange(N)[:, None] % 4)
        ),
        "hff",
    ),
    "no sample axis on a leaf": (lambda h: h.sum(), "..."),
    "half precision inside": (
        lambda h: ((h.half() + h.half().mean(0)) - h.half().mean(0)).float(),
        "hhh",
    ),
    "sum and difference in double at the end": (
        lambda h: ((h + h.mean(0)) - h.mean(0)).double(),
        "hhh",
    ),
    "distances squared again": (lambda h: torch.cdist(h, h).pow(2).sum(1, keepdim=True), "ffh"),
    "additive attention": (lambda h: torch.softmax(h[:, :1] + h[:, 1:2].T, 1) @ h, "ffh"),
    "a row overwritten while sorted": (overwritten_while_sorted, "fff"),
    "unsorted in descending order": (
        lambda h: (2 * h[order(h)])[order(h).argsort(descending=True)],
        "fff",
    ),
    "an inverse permutation off by one": (
        lambda h: (2 * h[order(h)])[torch.full((N,), -1).index_add(0, order(h), torch.arange(N))],
        "fff",
    ),
    "an unsorted bias beside sorted rows": (
        lambda h: torch.addmm(h, h[order(h)], torch.ones(D, D))[order(h).argsort()],
        "fff",
    ),
    "sorted and unsorted": (lambda h: (2 * h[order(h)])[order(h).argsort()], "hhh"),
    "all close, in Python": (lambda h: h if torch.equal(h.clamp(-50, 50), h) else h * 2, "ff."),
    "length of a list of what is large": (
        lambda h: h * (1 + len(h[h[:, 0] > 50].unbind(0))),
        "ff.",
    ),
    "length of a nested list": (lambda h: h * (1 + len((h[:, 0] > 50).nonzero().tolist())), "ff."),
    "all of a list, in Python": (
        lambda h: h if all(v < 50 for v in h[:, 0].tolist()) else h * 2,
        "ff.",
    ),
    "text of a tensor": (lambda h: h * 2 if "e+" in str(h * 0.001 + 0.001) else h, "ff."),
}

W = torch.arange(1.0, N + 1)


def per_sample(p):
    return p.pow(2).sum(1)


LOSSES = {
    "two constants in a product": (lambda p: (p + 1).pow(2).sum() * (p + 2).pow(2).sum(), "ff"),
    "weights joined, then bent": (lambda p: torch.cat([W * per_sample(p)] * 2).sin().sum(), "hf"),
    "weights scattered, then bent": (
        lambda p: torch.zeros(N).index_add(0, torch.arange(N), W * per_sample(p)).exp().sum(),
        "hf",
    ),
    "weights squared": (lambda p: ((1 + (W * per_sample(p)) ** 2).sqrt() * p.sum(1)).sum(), "hf"),
    "activation inside a product": (
        lambda p: torch._addmm_activation(torch.zeros(D), torch.ones(1, N), p).sum(),
        "f.",
    ),
    "root mean squared error per output": (lambda p: p.pow(2).mean(0).sqrt().sum(), "ff"),
    "norm of a total": (lambda p: p.sum().norm(), "fh"),
    "vanishing identically": (lambda p: (per_sample(p).mean() - per_sample(p)).sum(), "hh"),
    "a large constant cancelled": (lambda p: (per_sample(p) + 1e8).cumsum(0)[-1] - N * 1e8, "hh"),
    "float32 inside": (lambda p: per_sample(p.float()).cumsum(0)[-1], "hh"),
}


def check(structure, names, truth):
    for name, letter in zip(names, truth, strict=True):
        status = getattr(structure, name).status
        assert letter == "." or status in (WORDS[letter], "unknown"), (
            f"{name} {status}, in truth {WORDS[letter]}"
        )


@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    f, truth = MODELS[name]
    structure = ub.Problem(Forward(f), lambda p: 0 * p.sum(), (x(), None)).structure
    check(structure, FORWARD, truth)


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name):
    f, truth = LOSSES[name]
    structure = ub.Problem(Forward(lambda h: h * 1), f, (x(), None)).structure
    check(structure, LOSS, truth)


def test_a_gradient_free_reading_of_a_parameter_breaks_the_split():
    model = nn.Linear(D, D)
    for loss in (
        lambda p, y: F.mse_loss(p, y) + float(model.weight.norm()),
        lambda p, y: F.mse_loss(p, y) * (2 if model.weight.sum() > 0 else 1),
    ):
        assert not ub.Problem(model, loss, (x(), x())).structure.canonical_split
    shape_only = ub.Problem(
        model, lambda p, y: F.mse_loss(p, y) + torch.zeros_like(model.weight).sum(), (x(), x())
    )
    assert shape_only.structure.canonical_split


def test_state_that_changes_from_run_to_run_is_no_dependence():
    calls = []

    def counted(h):
        calls.append(1)
        return h * len(calls)

    structure = ub.Problem(Forward(counted), lambda p: 0 * p.sum(), (x(), None)).structure
    assert structure.independent_forward.status != "fails"


def test_an_index_whose_numbers_are_not_known_may_hit_any_sample():
    x_, index = batched((N, D), 0, "x"), shared((N,), "index")
    call = RuleContext(
        Propagation(N),
        torch.ops.aten.index.Tensor,
        {"self": x_, "indices": [index]},
        [(N, D)],
        {"indices": [None]},
    )
    assert RULES["index"](call).mixed


@pytest.mark.filterwarnings("ignore:indexing with dtype torch.uint8:UserWarning")
def test_a_mask_of_bytes_is_a_mask_in_a_write():
    structure = ub.Problem(Forward(mask_of_bytes), lambda p: 0 * p.sum(), (x(), None)).structure
    check(structure, FORWARD, "fff")


def test_a_mask_of_another_batch_forgets_no_index_beside_it():
    """How many entries there are depends on the inputs, and which of them on the samples."""
    table, index = shared((N, D), "table"), batched((N,), 0, "x")
    mask = shared((D,), "mask", ["inputs"])
    call = RuleContext(
        Propagation(N),
        torch.ops.aten.index.Tensor,
        {"self": table, "indices": [index, mask]},
        [(N,)],
        {"indices": [None, np.ones(D, dtype=bool)]},
    )
    assert RULES["index"](call).mixed


@pytest.mark.parametrize(
    ("loss", "blamed"),
    [
        (lambda p, y: F.cross_entropy(p, y) + p.pow(2).mean().sqrt(), ["mean"]),
        (lambda p, y: F.cross_entropy(p, y).add_(p.pow(2).mean().sqrt()), ["mean"]),
        (lambda p, y: torch.stack([F.cross_entropy(p, y), p.pow(2).mean().exp()]).sum(), ["mean"]),
        (lambda p, y: F.cross_entropy(p, y) * p.pow(2).mean(), ["mean", "nll_loss_forward"]),
        (lambda p, y: (F.cross_entropy(p, y) + p.abs().mean()).log(), ["mean", "nll_loss_forward"]),
    ],
)
def test_a_total_that_is_only_added_is_no_culprit(loss, blamed):
    structure = ub.Problem(nn.Linear(D, D), loss, (x(), torch.arange(N) % D)).structure
    assert structure.reduction.status == "fails"
    assert sorted(c.op for c in structure.reduction.culprits) == blamed


class ScaledByNoise(nn.Module):
    """One number drawn for each sample, brought to the shape of images; or one for each channel."""

    def __init__(self, of_samples):
        super().__init__()
        self.norm, self.of_samples = nn.BatchNorm2d(2), of_samples

    def forward(self, x):
        drawn = (
            torch.rand(len(x)).view(-1, 1, 1, 1)
            if self.of_samples
            else torch.rand(2).view(-1, 1, 1)
        )
        return (self.norm(x) * drawn).flatten(1)


@pytest.mark.parametrize("of_samples", [True, False])
def test_noise_in_another_shape_is_permuted_with_its_samples(of_samples):
    problem = ub.Problem(
        ScaledByNoise(of_samples), lambda p: p.square().mean(), (torch.randn(4, 2, 3, 3), None)
    )
    assert problem.structure.simd_given_statistics.status == "holds"
    (check,) = [c for c in problem.verify().checks if c.name == "simd_given_statistics"]
    assert check.passed, check


@pytest.mark.parametrize(
    ("loss", "listens"),
    [
        (lambda p, y: F.mse_loss(p, (y - y.mean(0)) / y.std(0)), {"targets"}),
        (lambda p, y: (p - y + y.mean()).square().sum(), {"targets"}),
        (lambda p, y: (p - y / y.norm(dim=1, keepdim=True)).square().sum(), set()),
        (F.mse_loss, set()),
    ],
    ids=["standardised", "centred", "normalised one by one", "plain"],
)
def test_targets_that_are_standardised_over_the_batch_are_said_to_be(loss, listens):
    """The loss is SIMD with targets as constants; its rows are no independent draws, and say so."""
    problem = ub.Problem(nn.Linear(4, 3), loss, (torch.randn(6, 4), torch.randn(6, 3)))
    assert problem.structure.simd_loss
    assert problem.structure.simd_loss.weights_depend_on == listens
    norms = problem.compute(ub.SquaredNorms())
    assert ("statistics of the targets" in norms.note) == bool(listens)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        problem.compute(ub.Variance())
    said = [str(w.message) for w in caught if w.category is ub.MixedSamplesWarning]
    assert bool(said) == bool(listens)
    assert all("losses that depend on no other sample" in text for text in said)


OWN_LOSSES = {
    "mean under a mask": (
        lambda p, x, m: (p.square().sum(1) * m).sum() / m.sum(),
        {"inputs"},
        set(),
    ),
    "weights normalised first": (
        lambda p, x, m: (p.square().sum(1) * (m / m.sum())).sum(),
        {"inputs"},
        set(),
    ),
    "advantages centred": (
        lambda p, x, m: (p.square().sum(1) * (m - m.mean())).sum(),
        {"inputs"},
        set(),
    ),
    "targets centred": (
        lambda p, x, m: (p - x[:, :3] + x[:, :3].mean(0)).square().sum(),
        set(),
        {"inputs"},
    ),
    "sum under a mask": (lambda p, x, m: (p.square().sum(1) * m).sum(), set(), set()),
}


@pytest.mark.parametrize("name", OWN_LOSSES)
def test_statistics_of_inputs_in_a_loss_of_the_models_own_are_seen(name):
    loss, weights, terms = OWN_LOSSES[name]

    class Own(nn.Linear):
        def forward(self, x, mask):
            return {"loss": loss(super().forward(x), x, mask)}

    structure = ub.Problem(
        Own(4, 3), batch={"x": torch.randn(6, 4), "mask": torch.rand(6)}
    ).structure
    assert structure.reduction
    assert structure.reduction.weights_depend_on == weights
    assert structure.simd_loss.weights_depend_on == terms


class Picked(nn.Linear):
    """Leaves out what has no label, by a size that Python reads (as DeBERTa's classifier does)."""

    def forward(self, x, labels):
        out = super().forward(x)
        rows = (labels >= 0).nonzero()
        if rows.size(0) == 0:
            return {"loss": out.sum() * 0}
        kept = out.gather(0, rows.expand(-1, out.shape[1]))
        return {"loss": F.cross_entropy(kept, labels.gather(0, rows.view(-1)))}


@pytest.mark.parametrize(
    "labels", [[0, 1, 2, 0, 1, 2], [0, -100, 2, -100, 1, 1], [-100, 1, 2, 0, 2, -100]]
)
def test_labels_that_are_picked_by_number_are_constants_of_the_loss(labels):
    """What Python reads of labels alone, after the predictions were made, steers neither them nor
    what a term is.
    """
    torch.manual_seed(0)
    model, X, y = Picked(4, 3).double(), torch.randn(6, 4).double(), torch.tensor(labels)
    problem = ub.Problem(model, batch={"x": X, "labels": y})
    structure = problem.structure
    assert structure.simd_forward
    assert structure.simd_loss
    assert structure.reduction.weights_depend_on == {"inputs"}
    rows = problem.gradients().flat()
    expected = reference.flat(reference.component(_Plain(model), F.cross_entropy, X, y))
    torch.testing.assert_close(rows, expected)


class _Plain(nn.Module):
    def __init__(self, model: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = model.weight, model.bias

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class RankedPairs(nn.Linear):
    """Each prediction is multiplied with that of the sample that comes next by its label: no sum of
    losses.
    """

    def forward(self, x, labels):
        out = super().forward(x)
        order = labels.argsort()
        return {"loss": (out * out[order]).sum()}


def test_numbers_that_pick_other_samples_predictions_do_not_make_a_sum():
    y = torch.tensor([3, 1, 0, 2, 5, 4])
    structure = ub.Problem(RankedPairs(4, 3), batch={"x": torch.randn(6, 4), "labels": y}).structure
    assert structure.simd_loss.status != "holds"
    assert structure.reduction.status != "holds"


class Iterated(nn.Module):
    """An inverse by Newton's iteration that starts from a statistic of the batch, which is
    forgotten but for 1e-10.
    """

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        a = self.linear(x).sigmoid() + 1
        z = 0.5 / a.amax() * torch.ones_like(a)
        for _ in range(5):
            z = z * (2 - a * z)
        return z


def test_a_coupling_below_single_precision_has_a_witness():
    torch.manual_seed(0)
    structure = ub.Problem(
        Iterated(), lambda p: p.square().sum(), (torch.randn(6, 4), None)
    ).structure
    assert structure.independent_forward.status == "fails"


def test_many_right_sides_are_solved_and_those_that_do_not_fit_are_refused():
    torch.manual_seed(0)
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    G = ub.Problem(nn.Linear(4, 3).double(), F.cross_entropy, (torch.randn(6, 4).double(), y)).ggn()
    b = torch.randn(15, 2).double()
    dense = G.to_dense() + 0.1 * torch.eye(15).double()
    for method in ("woodbury", "cg"):
        found, solved = G.solve(b, 0.1, method=method, info=True)
        torch.testing.assert_close(found, torch.linalg.solve(dense, b), rtol=1e-6, atol=1e-8)
        assert solved.residual < 1e-8
    assert G.solve(b[:, :0], 0.1).shape == (15, 0)
    for wrong in (torch.randn(20), torch.randn(2, 15), torch.randn(15, 2, 2), [1.0] * 15):
        with pytest.raises(ub.InputError, match=r"shape \[15\]"):
            G.solve(wrong, 0.1)


# --- the kind of a type ---------------------------------------------------------------------------


def whole_numbers_of_a_copy(h):
    return torch.empty_like(h, dtype=torch.int32).copy_(h)


def whole_numbers_of_a_fill(h):
    return torch.full_like(h, 0.7, dtype=torch.int64) * h


def booleans_of_a_fill(h):
    return torch.empty_like(h, dtype=torch.bool).fill_(0.7) * h


@pytest.mark.parametrize(
    ("whole", "broken"),
    [
        (whole_numbers_of_a_copy, lambda h: h.clone()),
        (whole_numbers_of_a_fill, lambda h: torch.full_like(h, 0.7) * h),
        (booleans_of_a_fill, lambda h: torch.full_like(h, 0.7) * h),
    ],
)
def test_numbers_of_another_kind_are_another_function(whole, broken):
    """Half of the samples as whole numbers, and the others as they are."""

    def forward(x):
        h = x.exp()
        return torch.cat([whole(h[: N // 2]).to(h.dtype), broken(h[N // 2 :])])

    structure = ub.Problem(Forward(forward), lambda p: 0 * p.sum(), (x(), None)).structure
    assert structure.simd_forward.status != "holds"


def test_a_total_copied_into_whole_numbers_is_no_sum_over_samples():
    def loss(p):
        return torch.zeros((), dtype=torch.int64).copy_(p.sum()) * p.new_ones(())

    structure = ub.Problem(
        Forward(torch.exp), lambda p: loss(p) + 0 * p.sum(), (x(), None)
    ).structure
    assert structure.reduction.status != "holds"


def test_what_an_op_writes_last_is_in_what_it_returns():
    """An op that inference mode shows whole: its body writes to its result after all else."""

    def forward(x):
        with torch.inference_mode():
            wide = F.pad(x[None], (1, 2), mode="circular")[0]
        return torch.stack([wide[n, D + 1 + n % 2] for n in range(N)])[:, None]

    structure = ub.Problem(Forward(forward), lambda p: 0 * p.sum(), (x(), None)).structure
    assert structure.simd_forward.status != "holds"
