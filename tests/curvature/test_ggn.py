"""The Gauss-Newton matrix by the fast path, against ``Jᵀ H J`` by double backward, over the table
of models and losses.

In float64; tolerances are relative to the largest entry of the quantity.
"""

import sys
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unbatch as ub
from cases.comparison import near
from cases.gradients import CASES
from unbatch.reference import definitions as reference

pytestmark = pytest.mark.filterwarnings(
    "ignore::unbatch.VanishingCurvatureWarning"
)  # losses are linear here and there


EVERY = pytest.mark.parametrize("mode", ["train", "eval"])
EACH = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def entries_of(problem: ub.Problem) -> int:
    """How many entries of what belongs to samples depend on parameters."""
    linearised = problem.ggn().linearised
    outputs = linearised.outputs.items()
    return sum(t.numel() for i, t in outputs if i in linearised.context.axes)


def damping_of(G: Tensor) -> float:
    """Enough to make it definite."""
    values = torch.linalg.eigvalsh(G)
    return float(0.1 * values.abs().max() + 1.5 * max(-values.min(), 0) + 1e-6)


@EVERY
@EACH
def test_matrix_products_and_diagonal(case, mode, recorded):
    args, problem = recorded(case, mode)
    expected = reference.ggn(*args)
    floor = 1e-14 * float(reference.output_hessian(*args).abs().max())
    G = problem.ggn()
    near(G.to_dense(), expected, "dense", floor)
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(len(expected), 2, generator=generator, dtype=expected.dtype)
    near(G @ v, expected @ v, "G @ V", floor)
    near(v[:, 0] @ G, v[:, 0] @ expected, "v @ G", floor)
    named = G @ G.space.named(v[:, 0])
    near(torch.cat([t.flatten() for t in named.values()]), expected @ v[:, 0], "G @ dict", floor)
    near(G.diag(), expected.diagonal(), "diagonal", floor)
    near(G.trace(), expected.trace(), "trace", floor)
    near(
        problem.compute(ub.DiagGGN()).flat(),
        expected.diagonal(),
        "diagonal, with other quantities",
        floor,
    )


@EVERY
@EACH
def test_spectrum_determinants_and_solves(case, mode, recorded):
    args, problem = recorded(case, mode)
    expected, H = reference.ggn(*args), reference.output_hessian(*args)
    size = float(expected.abs().max())
    if size < 1e-14:
        pytest.skip("it is zero")
    G = problem.ggn()
    found, values = G.eigvalsh(), torch.linalg.eigvalsh(expected)
    assert len(found) == min(len(expected), entries_of(problem))
    near(
        found,
        values[values.abs().argsort(descending=True)][: len(found)].sort().values,
        "eigenvalues",
    )
    rank = int((values.abs() > 1e-9 * values.abs().max()).sum())
    of_blocks = int((torch.linalg.eigvalsh(H).abs() > 1e-12 * H.abs().max()).sum())
    assert rank <= G.rank_bound <= min(len(expected), len(H))
    assert G.rank_bound >= min(len(expected), of_blocks)
    pairs = G.eigh(2)
    near(expected @ pairs.vectors, pairs.vectors * pairs.values, "eigenvectors")
    near(
        pairs.vectors.T @ pairs.vectors,
        torch.eye(len(pairs.values), dtype=torch.float64),
        "orthonormal",
    )
    damped = expected + damping_of(expected) * torch.eye(len(expected), dtype=expected.dtype)
    near(G.logdet(damping_of(expected)), torch.linalg.slogdet(damped)[1], "log-determinant")
    b = torch.ones(len(expected), dtype=expected.dtype)
    near(G.solve(b, damping_of(expected)), torch.linalg.solve(damped, b), "solve")


@EVERY
@EACH
def test_definiteness_is_told(case, mode, recorded):
    args, problem = recorded(case, mode)
    H = reference.output_hessian(*args)
    lowest = float(torch.linalg.eigvalsh(H).min())
    verdict = problem.ggn().positive_semidefinite
    definite = lowest >= -1e-12 * float(H.abs().max())
    assert verdict.status == ("holds" if definite else "fails")
    if not definite:
        assert f"{lowest:.3g}" in verdict.note


@EVERY
@EACH
def test_diagonals_of_components(case, mode, recorded):
    args, problem = recorded(case, mode)
    if not problem.structure.reduction:
        with pytest.raises(ub.StructureError, match="sum over the samples"):
            problem.ggn().diag(per_component=True)
        return
    expected = reference.ggn_diagonals(*args)
    floor = 1e-14 * float(reference.output_hessian(*args).abs().max())
    found = problem.ggn().diag(per_component=True)
    near(found, expected, "diagonals", floor)
    near(found.sum(0), problem.ggn().diag(), "their sum", floor)


@EACH
def test_gram_matrix_and_factor(case, recorded):
    args, problem = recorded(case, "train")
    expected, G = reference.ggn(*args), problem.ggn()
    sigma = G.root.sigma
    V = torch.cat([t.flatten(1) if t.ndim > 1 else t[:, None] for t in G.factor().values()], 1).T
    floor = 1e-14 * float(reference.output_hessian(*args).abs().max())
    near((V * sigma) @ V.T, expected, "V Σ Vᵀ", floor)
    near(G._answers.gram_matrix, V.T @ V, "VᵀV", floor)
    entries = entries_of(problem)
    assert G.gram().shape == (entries, entries)
    if G.positive_semidefinite:
        values, wanted = torch.linalg.eigvalsh(G.gram()), torch.linalg.eigvalsh(expected)
        count = min(entries, len(expected))
        near(values[-count:], wanted[-count:], "spectrum of the Gram matrix", floor)


@EACH
def test_slopes_and_curvatures_of_components(case, recorded):
    args, problem = recorded(case, "train")
    if not problem.structure.reduction or problem.ggn().root.size == 0:
        pytest.skip("no components")
    G = problem.ggn()
    top = G.directions(2)
    J, H = reference.jacobian(*args), reference.output_hessian(*args)
    rows = reference.flat(reference.component(*args))
    near(top.slopes, rows @ top.vectors, "slopes", 1e-12)
    blocks = zip(J.chunk(problem.samples), range(problem.samples), strict=True)
    size = len(H) // problem.samples
    curved = [
        (
            (Jn @ top.vectors)
            * (H[n * size : (n + 1) * size, n * size : (n + 1) * size] @ Jn @ top.vectors)
        ).sum(0)
        for Jn, n in blocks
    ]
    near(top.curvatures, torch.stack(curved), "curvatures", 1e-12)
    near(top.curvatures.sum(0), top.values, "sum of curvatures")


# ------------------------------------------------------- the statements of the note, by their names


def two_batch_norms(loss=F.cross_entropy):
    torch.manual_seed(0)
    layers = [
        nn.Linear(6, 8),
        nn.BatchNorm1d(8),
        nn.Tanh(),
        nn.Linear(8, 8),
        nn.BatchNorm1d(8),
        nn.Tanh(),
        nn.Linear(8, 3),
    ]
    model, X, y = (
        nn.Sequential(*layers).double(),
        torch.randn(7, 6).double(),
        torch.randint(3, (7,)),
    )
    return (model, loss, X, y), ub.Problem(model, loss, (X, y))


def test_gradients_of_components_sum_to_the_gradient_with_batch_norm():
    args, problem = two_batch_norms()
    gradient = torch.cat([g.flatten() for g in reference.gradient(*args).values()])
    near(problem.gradients().flat().sum(0), gradient, "sum", 1e-15)


def test_with_batch_norm_the_matrix_is_a_sum_over_components_of_rank_at_most_C():
    args, problem = two_batch_norms()
    expected, G = reference.ggn(*args), problem.ggn()
    V = torch.cat([t.reshape(len(t), -1) for t in G.factor().values()], 1)
    parts = [v.T @ v for v in V.chunk(problem.samples)]
    near(torch.stack(parts).sum(0), expected, "sum over components")
    for part in parts:
        assert torch.linalg.matrix_rank(part) <= 3


def test_with_batch_norm_the_rank_is_at_most_NC():
    args, problem = two_batch_norms()
    expected = reference.ggn(*args)
    assert torch.linalg.matrix_rank(expected) <= problem.ggn().rank_bound <= 7 * 3 < len(expected)
    assert problem.ggn().rank_bound == 7 * (3 - 1), (
        "a softmax has a direction in which nothing changes"
    )


def test_with_batch_norm_the_diagonal_is_had_by_pulling_back_the_columns():
    args, problem = two_batch_norms()
    J, S = (
        reference.jacobian(*args),
        torch.linalg.cholesky(reference.output_hessian(*args) + 1e-13 * torch.eye(21).double()),
    )
    diagonal = sum((J.T @ s).square() for s in S.T)
    assert (problem.ggn().diag() - diagonal).abs().max() < 1e-6 * diagonal.max()


def test_the_frozen_matrix_is_another_one(capsys):
    args, _ = two_batch_norms()
    true, frozen = reference.ggn(*args), reference.ggn(*args, frozen=True)
    apart, traces = (
        float((true - frozen).norm() / true.norm()),
        float(frozen.trace() / true.trace()),
    )
    with capsys.disabled():
        sys.stdout.write(
            f"\nwith frozen statistics the GGN is {apart:.0%} away, "
            f"its trace {traces:.1f} times as large\n"
        )
    assert apart > 0.1


# ---------------------------------------------------------- losses: forms, signs, and what has none


def net(width=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, width)).double(), torch.randn(
        6, 4
    ).double()


def focal(p, y):
    logs = F.log_softmax(8 * p, 1).gather(1, y[:, None])[
        :, 0
    ]  # where it is sure of itself, it is not convex
    return -((1 - logs.exp()) ** 2 * logs).mean()


def heteroscedastic(p, y):
    return F.gaussian_nll_loss(p[:, :1], y[:, :1], p[:, 1:2].exp())


LABELS = torch.tensor([0, 2, 1, 1, 0, 2])
REALS = torch.linspace(-1, 1, 18).view(6, 3).double()
BITS = (REALS > 0).double()
FORMS = {
    "mse": (F.mse_loss, REALS, "single entries", True),
    "half of it": (lambda p, y: 0.5 * F.mse_loss(p, y), REALS, "single entries", True),
    "cross-entropy": (F.cross_entropy, LABELS, "softmax", True),
    "class weights": (
        lambda p, y: F.cross_entropy(p, y, weight=torch.tensor([0.5, 1, 2]).double()),
        LABELS,
        "softmax",
        True,
    ),
    "ignored labels": (F.cross_entropy, torch.tensor([0, -100, 1, 1, -100, 2]), "softmax", True),
    "smoothed labels": (
        lambda p, y: F.cross_entropy(p, y, label_smoothing=0.2),
        LABELS,
        "softmax",
        True,
    ),
    "soft targets that do not sum to one": (F.cross_entropy, REALS.abs(), "softmax", True),
    "nll of a log-softmax": (
        lambda p, y: F.nll_loss(F.log_softmax(p, 1), y),
        LABELS,
        "softmax",
        True,
    ),
    "kl of a log-softmax": (
        lambda p, y: F.kl_div(F.log_softmax(p, 1), y, reduction="batchmean"),
        REALS.softmax(1),
        "softmax",
        True,
    ),
    "binary cross-entropy": (F.binary_cross_entropy_with_logits, BITS, "single entries", True),
    "with weights of positives": (
        lambda p, y: F.binary_cross_entropy_with_logits(
            p, y, pos_weight=torch.tensor([1.0, 2, 3]).double()
        ),
        BITS,
        "single entries",
        True,
    ),
    "poisson": (F.poisson_nll_loss, BITS, "single entries", True),
    "huber": (F.huber_loss, REALS, "single entries", True),
    "gaussian nll": (heteroscedastic, REALS, "blocks", False),
    "focal": (focal, LABELS, "blocks", False),
    "concave": (lambda p, y: -(p - y).square().sum(), REALS, "single entries", False),
    "linear": (lambda p, y: (p * y).sum(), REALS, "zero", True),
    "root of a mean": (lambda p, y: F.mse_loss(p, y).sqrt(), REALS, "all predictions", True),
    "log of a sum of losses": (
        lambda p, y: (p - y).square().sum(1).exp().mean().log(),
        REALS,
        "all predictions",
        True,
    ),
    "contrastive": (
        lambda p, y: F.cross_entropy(p @ p.T, torch.arange(6)),
        REALS,
        "all predictions",
        False,
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms_of_the_second_derivative(name):
    loss, targets, form, definite = FORMS[name]
    model, X = net()
    problem = ub.Problem(model, loss, (X, targets))
    G, expected = problem.ggn(), reference.ggn(model, loss, X, targets)
    assert form in G.note, G.note
    assert bool(G.positive_semidefinite) == definite, G.positive_semidefinite
    near(G.diag(), expected.diagonal(), "diagonal", 1e-14)
    near(G.to_dense(), expected, "dense", 1e-14)
    values, wanted = G.eigvalsh(), torch.linalg.eigvalsh(expected)
    near(
        values,
        wanted[wanted.abs().argsort(descending=True)][: len(values)].sort().values,
        "eigenvalues",
        1e-14,
    )
    if not definite:
        assert values.min() < 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_loss_that_casts_its_predictions_keeps_its_form(dtype):
    """As mixed precision and language models do; what is left is the rounding of the cast."""
    model, X = net()
    expected = reference.ggn(model, F.cross_entropy, X, LABELS).diagonal()
    problem = ub.Problem(
        model.to(dtype), lambda p, y: F.cross_entropy(p.float(), y), (X.to(dtype), LABELS)
    )
    assert "softmax" in problem.ggn().note
    off = float((problem.ggn().diag() - expected).norm() / expected.norm())
    assert off < 1e-6, off


@pytest.mark.parametrize("classes_last", [False, True])
def test_dense_predictions_are_taken_apart_by_position(classes_last):
    torch.manual_seed(0)
    model, X, y = (
        nn.Conv2d(2, 4, 3, padding=1).double(),
        torch.randn(3, 2, 3, 3).double(),
        torch.randint(4, (3, 3, 3)),
    )
    y[0, 0, 0] = -100
    wrapped = nn.Sequential(model, nn.Flatten(2), Turn()) if classes_last else model
    loss = (lambda p, y: F.cross_entropy(p.mT, y.flatten(1))) if classes_last else F.cross_entropy
    G = ub.Problem(wrapped, loss, (X, y)).ggn()
    assert "softmax" in G.note
    assert G.root.columns == 9 * 3
    near(G.diag(), reference.ggn(wrapped, loss, X, y).diagonal(), "diagonal")


class Turn(nn.Module):
    def forward(self, x):
        return x.mT


def test_a_loss_without_a_second_derivative_is_refused():
    model, X = net(4)
    once, times = torch.ones(6).long(), lambda p: p.expand(3, 6, 4).log_softmax(-1)
    loss = lambda p, y: F.ctc_loss(times(p), y, 3 * once, once)  # noqa: E731
    problem = ub.Problem(model, loss, (X, once[:, None]))
    with pytest.raises(ub.StructureError, match="second derivative"):
        problem.ggn().diag()


def test_predictions_cut_elsewhere_have_another_matrix():
    model, X = net()
    soft = nn.Sequential(model, nn.LogSoftmax(1))
    logits = ub.Problem(model, F.cross_entropy, (X, LABELS)).ggn()
    logs = ub.Problem(soft, F.nll_loss, (X, LABELS)).ggn()
    assert logits.trace() > 0
    assert logs.trace() == 0
    assert "vanishes" in logs.note


class Own(nn.Module):
    """Returns its own loss, linear in the last values that a parameter made."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 3)

    def forward(self, x):
        return {"loss": self.body(x).sum(1).mean()}


def test_a_cut_at_which_the_curvature_vanishes_is_warned_about():
    torch.manual_seed(0)
    problem = ub.Problem(Own().double(), batch=torch.randn(5, 4).double())
    with pytest.warns(ub.VanishingCurvatureWarning, match="linear"):
        assert problem.ggn().trace() == 0


@pytest.mark.parametrize("loss", [nn.L1Loss(), nn.NLLLoss()])
def test_a_loss_without_curvature_is_warned_about(loss):
    torch.manual_seed(0)
    y = torch.randn(5, 3) if isinstance(loss, nn.L1Loss) else torch.arange(5) % 3
    problem = ub.Problem(nn.Linear(4, 3), loss, (torch.randn(5, 4), y))
    with pytest.warns(ub.VanishingCurvatureWarning, match="absolute, hinge"):
        assert problem.ggn().trace() == 0


def test_why_a_system_without_damping_is_not_solved():
    G = two_batch_norms()[1].ggn()
    with pytest.raises(
        ub.ConvergenceError, match=f"rank is at most {G.rank_bound} of {G.shape[0]}"
    ):
        G.solve(torch.ones(G.shape[0], dtype=G.dtype), damping=0)


# ---------------------------------------------------------------- blocks, draws, choices


def test_blocks():
    args, problem = two_batch_norms()
    expected, space = reference.ggn(*args), problem.ggn().space
    for blocks in ("parameter", "module", [["0.*", "6.*"], ["1.*", "3.*", "4.*"]]):
        G = problem.ggn(blocks=blocks)
        mask = torch.zeros_like(expected)
        for block in G.blocks:
            index = torch.cat(
                [torch.arange(len(expected))[space.slices[n]] for n in block.space.shapes]
            )
            mask[index[:, None], index] = 1
        near(G.to_dense(), expected * mask, str(blocks))
        near(G.diag(), expected.diagonal(), "diagonal")
        values = torch.linalg.eigvalsh(expected * mask)
        near(G.eigvalsh().sort().values[-5:], values[-5:], "eigenvalues")
        near(
            G.logdet(0.1),
            torch.linalg.slogdet(expected * mask + 0.1 * torch.eye(len(expected)).double())[1],
            "logdet",
        )
        b = torch.ones(len(expected), dtype=torch.float64)
        x, told = G.solve(b, 0.1, info=True)
        assert len(told) == len(G.blocks)
        assert torch.equal(x, G.solve(b, 0.1))
        near(
            x,
            torch.linalg.solve(expected * mask + 0.1 * torch.eye(len(expected)).double(), b),
            "solve",
        )


def test_blocks_of_a_loss_that_joins_samples():
    """Its columns run through all samples, and those of a block through the parameters of that
    block alone.
    """
    (model, _, X, _), _ = two_batch_norms()
    root = lambda p, y: F.mse_loss(p, y).sqrt()  # noqa: E731
    args = (model, root, X, torch.linspace(-1, 1, 21, dtype=torch.float64).view(7, 3))
    expected, G = reference.ggn(*args), ub.Problem(*args[:2], args[2:]).ggn(blocks="parameter")
    blocks = [expected[s, s] for s in G.space.slices.values()]
    near(G.trace(), expected.trace(), "trace")
    near(G.diag(), expected.diagonal(), "diagonal")
    for block, wanted in zip(G.blocks, blocks, strict=True):
        values = torch.linalg.eigvalsh(wanted)[-len(block.eigvalsh()) :]
        near(block.eigvalsh(), values, "eigenvalues", 1e-9 * float(expected.abs().max()))


@pytest.mark.parametrize("memory", [1, 2000])
def test_a_loss_that_joins_samples_with_parameters_a_few_at_a_time(memory):
    (model, _, X, _), _ = two_batch_norms()
    args = (model, lambda p, y: F.mse_loss(p, y).sqrt(), X, torch.ones(7, 3, dtype=torch.float64))
    expected, G = reference.ggn(*args), ub.Problem(*args[:2], args[2:]).ggn(memory=memory)
    near(G.eigvalsh(), torch.linalg.eigvalsh(expected)[-21:], "eigenvalues")


@pytest.mark.parametrize("name", ["cross-entropy", "mse", "binary cross-entropy", "poisson"])
def test_drawn_columns_are_right_on_average(name):
    loss, targets, _, _ = FORMS[name]
    model, X = net()
    problem = ub.Problem(model, loss, (X, targets))
    exact = problem.ggn().diag()
    draws = torch.stack(
        [problem.compute(ub.DiagGGN(mc_samples=4, seed=s)).flat() for s in range(60)]
    )
    error = draws.mean(0) - exact
    standard = draws.std(0) / 60**0.5
    assert (error.abs() < 5 * standard + 1e-12).all()
    assert torch.equal(draws[0], problem.compute(ub.DiagGGN(mc_samples=4, seed=0)).flat())
    G = problem.ggn(mc_samples=3, seed=1)
    assert "3 draws a sample, seed 1" in G.note
    near(G.diag(), G.to_dense().diagonal(), "diagonal of the drawn matrix")
    assert torch.linalg.eigvalsh(G.to_dense()).min() > -1e-12


def test_draws_need_a_definite_loss():
    model, X = net()
    with pytest.raises(ub.StructureError, match="positive semi-definite"):
        ub.Problem(model, focal, (X, LABELS)).ggn(mc_samples=1).diag()


def test_some_samples_stand_for_all():
    args, problem = two_batch_norms()
    whole = problem.ggn(samples=range(7))
    near(whole.to_dense(), reference.ggn(*args), "all samples")
    halves = [problem.ggn(samples=[n]).to_dense() for n in range(7)]
    near(torch.stack(halves).mean(0), reference.ggn(*args), "mean of single samples")
    near(problem.ggn(samples=[1, 4]).diag(), (halves[1] + halves[4]).diagonal() / 2, "diagonal")


def test_a_newton_step_lowers_the_loss():
    (model, loss, X, y), problem = two_batch_norms()
    before = loss(model(X), y)
    step = problem.ggn().newton_step(damping=0.5)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(step[name])
    assert loss(model(X), y) < before


def test_newton_step_along_top_directions():
    args, problem = two_batch_norms()
    expected = reference.ggn(*args)
    gradient = torch.cat([g.flatten() for g in reference.gradient(*args).values()])
    values, vectors = torch.linalg.eigh(expected)
    values, vectors = values[-3:], vectors[:, -3:]
    damping = torch.tensor([0.1, 0.2, 0.3])
    step = -vectors @ ((vectors.T @ gradient) / (values + damping))
    found = problem.ggn().newton_step(damping, k=3)
    near(torch.cat([t.flatten() for t in found.values()]), step, "step")


# ---------------------------------------------------------------- solving, and saying how well


def test_conjugate_gradients_report():
    args, problem = two_batch_norms()
    G, b = problem.ggn(), torch.ones(len(reference.ggn(*args)), dtype=torch.float64)
    x, solved = G.solve(b, 0.01, method="cg", info=True, rtol=1e-10)
    assert solved.converged
    near(
        x,
        torch.linalg.solve(reference.ggn(*args) + 0.01 * torch.eye(len(b)).double(), b),
        "cg",
        1e-7,
    )
    x, solved = G.solve(b, 1e-8, method="cg", info=True, max_iterations=2)
    assert not solved.converged
    residual = b - (reference.ggn(*args) @ x + 1e-8 * x)
    assert abs(float(residual.norm() / b.norm()) - solved.residual) < 1e-9
    with pytest.raises(ub.ConvergenceError, match="residual"):
        G.solve(b, 1e-8, method="cg", max_iterations=2)


def test_a_matrix_that_has_gone_stale_is_refused():
    (model, _, _, _), problem = two_batch_norms()
    G = problem.ggn()
    v = torch.ones(G.shape[0], dtype=torch.float64)
    before = G @ v
    with torch.no_grad():
        model[0].weight.mul_(2)
    with pytest.raises(ub.StaleError, match=r"problem\.ggn"):
        G @ v
    assert not torch.equal(problem.ggn() @ v, before)


def test_nothing_is_changed():
    (model, _, _, _), problem = two_batch_norms()
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    versions = {n: p._version for n, p in model.named_parameters()}
    rng = torch.get_rng_state()
    G = problem.ggn()
    G @ torch.ones(G.shape[0], dtype=torch.float64)
    G.diag(), G.gram(), G.eigh(2), G.directions(1), G.newton_step(0.1), G.logdet(1.0)
    problem.ggn(mc_samples=2).diag()
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())
    assert all(p._version == versions[n] and p.grad is None for n, p in model.named_parameters())
    assert torch.equal(rng, torch.get_rng_state())


BAD = {
    "blocks": (lambda p: p.ggn(blocks="layer"), "blocks"),
    "groups that leave something out": (lambda p: p.ggn(blocks=[["0.*"]]), "one group"),
    "no draws": (lambda p: p.ggn(mc_samples=0), "mc_samples"),
    "a sample that is not there": (lambda p: p.ggn(samples=[7]), "from 0 to 6"),
    "a vector of another length": (lambda p: p.ggn() @ torch.ones(3), r"shape \(3,\)"),
    "a dict that lacks something": (lambda p: p.ggn() @ {"0.weight": torch.ones(8, 6)}, "0.bias"),
    "no damping": (
        lambda p: p.ggn().solve(torch.ones(p.ggn().shape[0]), 0.0, method="woodbury"),
        "with damping only",
    ),
    "an unknown method": (
        lambda p: p.ggn().solve(torch.ones(p.ggn().shape[0]), 0.1, method="lu"),
        "'lu'",
    ),
    "no eigenpairs": (lambda p: p.ggn().eigh(0), "k is a whole number"),
    "no directions": (lambda p: p.ggn().directions(0), "k is a whole number"),
    "a damping that is a word": (lambda p: p.ggn().newton_step("a"), "'a'"),
    "too little damping": (lambda p: p.ggn().newton_step(-100.0), "damping"),
}


@pytest.mark.parametrize("what", BAD)
def test_refusals(what):
    ask, message = BAD[what]
    with pytest.raises(ub.InputError, match=message):
        ask(two_batch_norms()[1])


# ---------------------------------------------------------------- planted


def stacked_diagonal(problem):
    """As tools do that carry one column per class for all samples, each in its own slot."""
    model, X = problem.program.model, problem.inputs
    total = 0.0
    for _, _, column in problem.ggn().root.column_batches():
        (s,) = column.values()
        rows = ub.Problem(model, lambda p, t: (p * t).sum(), (X, s)).gradients(by="copy")
        total = total + rows.flat().square().sum(0)
    return total


def test_stacked_columns_are_right_without_batch_norm():
    (model, loss, X, y), _ = two_batch_norms()
    model.eval()
    near(
        stacked_diagonal(ub.Problem(model, loss, (X, y))),
        reference.ggn(model, loss, X, y).diagonal(),
        "diagonal",
    )


def test_stacked_columns_below_a_batch_norm_are_caught():
    args, problem = two_batch_norms()
    with pytest.raises(AssertionError, match="diagonal: off by"):
        near(stacked_diagonal(problem), reference.ggn(*args).diagonal(), "diagonal")


def test_a_wrong_tangent_is_caught(monkeypatch):
    from unbatch.autodiff import jvp_rules as tangents

    monkeypatch.setitem(tangents.RULES, "tanh", lambda ran, moving: [moving["self"]])
    _, problem = two_batch_norms()
    G = problem.ggn()
    near(
        G.to_dense(), G.to_dense().T, "symmetric"
    )  # the rule was not believed, and forward mode took over
    assert G.linearised.way == "at once"


def test_a_guess_that_does_not_hold_is_caught(monkeypatch):
    from unbatch.curvature import loss_hessian as forms

    monkeypatch.setattr(forms._Search, "_of_entries", lambda self, _: self._holds(wrong(self)))

    def wrong(search):
        grid = search._grid(-1)
        h = grid.split(
            search.loss.hessian_times(
                {i: torch.ones_like(t) for i, t in search.loss.predictions.items()}
            )
        )
        return forms.Factor(
            grid, (h.abs() + 1).sqrt()[..., None], torch.ones_like(h), "of single entries"
        )

    args, problem = two_batch_norms()
    near(problem.ggn().diag(), reference.ggn(*args).diagonal(), "diagonal")


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ub.MixedSamplesWarning)
        yield


# ---------------------------------------------------------------- layers of several types


class OfTwoTypes(nn.Module):
    """Layers of two types, as a net has of which a part is in another precision."""

    def __init__(self, first: torch.dtype, second: torch.dtype) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 5).to(first), nn.Linear(5, 3).to(second)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(x.to(self.a.weight.dtype)).tanh()
        return self.b(hidden.to(self.b.weight.dtype))


TYPES = [(torch.float32, torch.float64), (torch.float64, torch.float32)]


def problems_of_types(types) -> tuple[ub.Problem, ub.Problem]:
    """A net with layers of two types, and the same net in float64."""
    torch.manual_seed(0)
    net, exact = OfTwoTypes(*types), OfTwoTypes(torch.float64, torch.float64)
    exact.load_state_dict(net.state_dict())
    X, y = torch.randn(6, 4).double(), torch.arange(6) % 3
    return ub.Problem(net, F.cross_entropy, (X, y)), ub.Problem(exact, F.cross_entropy, (X, y))


OF_TYPES = {
    "product": lambda G, v: G @ v,
    "diagonal": lambda G, v: G.diag(),
    "matrix": lambda G, v: G.to_dense(),
    "Gram matrix": lambda G, v: G.gram(),
    "eigenvalues": lambda G, v: G.eigvalsh(),
    "largest eigenvalues": lambda G, v: G.eigh(2).values,
    "directions": lambda G, v: G.directions(1).values,
    "determinant": lambda G, v: G.logdet(0.1),
    "solution": lambda G, v: G.solve(v, damping=0.1),
    "solution by products": lambda G, v: G.solve(v, damping=0.1, method="cg", rtol=1e-5),
}


@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("question", OF_TYPES)
def test_layers_of_two_types_have_answers_in_the_wider_one(types, question):
    problem, exact = problems_of_types(types)
    v = torch.linspace(-1, 1, 43).double()
    found = OF_TYPES[question](problem.ggn(), v)
    assert found.dtype == torch.float64
    near(found, OF_TYPES[question](exact.ggn(), v), question, floor=1e-4)


@pytest.mark.parametrize("types", TYPES)
def test_blocks_of_two_types(types):
    problem, exact = problems_of_types(types)
    v = torch.linspace(-1, 1, 43).double()
    G, right = (p.ggn(blocks="module") for p in (problem, exact))
    near(G @ v, right @ v, "product", floor=1e-4)
    near(G.solve(v, damping=0.1), right.solve(v, damping=0.1), "solution", floor=1e-4)
    near(G.eigvalsh(), right.eigvalsh(), "eigenvalues", floor=1e-4)
    near(problem.compute(ub.Dots()), exact.compute(ub.Dots()), "dots", floor=1e-4)
