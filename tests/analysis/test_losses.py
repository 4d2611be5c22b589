"""Every loss of `torch.nn` in every reduction, and losses from the wild: verdicts, and each
quantity right or refused.

Under each loss lies a tiny net, once as it is and once with batch norm in train mode. Gradients,
norms, moments and the Gauss-Newton matrix are held against the reference, in float64 and at generic
points. Tolerances are relative to the largest entry of a quantity.
"""

import copy
import inspect
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map

import unbatch as ub
from cases import losses as cases_losses
from cases.losses import (
    CLASSES,
    LOSSES,
    PAIRS,
    VALUES,
    D,
    LossCase,
    N,
    bits,
    classes,
    counts,
    distributions,
    outputs,
    pairs,
    signs,
    values,
    with_targets,
)
from cases.verdicts import LOSS, check, check_weights, truth_of
from unbatch.reference import definitions as reference
from unbatch.versions import minor

EXACT = 1e-9
TORCHS = (
    "reduction: 'mean' divides the total loss"  # what torch has to say of the mean of its KLDivLoss
)
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{TORCHS}".replace("reduction:", "reduction.")),
    pytest.mark.filterwarnings("ignore::unbatch.VanishingCurvatureWarning"),  # many are linear
]

# ---------------------------------------------------------------- every loss of torch.nn


@dataclass(frozen=True)
class Form:
    """One way to call a loss of torch: how it is made, and how predictions and targets are handed
    to it.
    """

    inputs: Callable[[], tuple]
    options: dict[str, Any]
    call: Callable[[nn.Module, Any, Any], Tensor] = lambda loss, p, y: loss(p, y)
    weights_depend_on_targets: bool | None = False  # of the mean


def form(inputs, call=None, weights_depend_on_targets=False, **options):
    given = {"call": call} if call else {}
    return Form(inputs, options, weights_depend_on_targets=weights_depend_on_targets, **given)


def of_classes(count=D):
    return torch.linspace(0.5, 2.0, count, dtype=torch.float64)


def timed(loss, p, y):
    """Of predictions `[N, T, C]`, with sequences that end early."""
    lengths = torch.tensor([p.shape[1], p.shape[1] - 1] * (len(y) // 2))
    return loss(
        p.log_softmax(2).transpose(0, 1), y, lengths, torch.tensor([3, 1, 2] * (len(y) // 3))
    )


def apart(a, b):
    return (a - b).abs().pow(1.5).sum(-1)


ON_LOGS = {"call": lambda loss, p, y: loss(p.log_softmax(1), y)}
ON_PARTS = {"call": lambda loss, p, y: loss(*p, y)}
ALONE = {"call": lambda loss, p, y: loss(*p)}
POSITIVE = {"call": lambda loss, p, y: loss(p.exp(), y)}
THREE = outputs(lambda: torch.zeros(N), (D,), (D,), (D,))
SIGNS, BITS = with_targets(signs, N, D), with_targets(bits, N, D)
SEVERAL = lambda: (  # noqa: E731
    torch.randn(N, D),
    torch.tensor([[3, 0, -1, 1, 2, -1], [1, -1, 0, 0, 0, 0]] * (N // 2)),
)
TIMES = lambda: (torch.randn(N, 5, 4), torch.randint(1, 4, (N, 3)))  # noqa: E731

FORMS: dict[str, list[Form]] = {
    "L1Loss": [form(VALUES)],
    "MSELoss": [form(VALUES), form(values(N, 2, 3))],
    "SmoothL1Loss": [form(VALUES, beta=0.6), form(VALUES, beta=0.0)],
    "HuberLoss": [form(VALUES, delta=0.8)],
    "NLLLoss": [
        form(CLASSES, **ON_LOGS),
        form(CLASSES, **ON_LOGS, weight=of_classes(), weights_depend_on_targets=True),
        form(CLASSES, **ON_LOGS, ignore_index=2, weights_depend_on_targets=True),
    ],
    "NLLLoss2d": [form(classes(N, 3, 2, 2), **ON_LOGS)],
    "CrossEntropyLoss": [
        form(CLASSES),
        form(CLASSES, weight=of_classes(), label_smoothing=0.1, weights_depend_on_targets=True),
        form(classes(N, 3, 4), ignore_index=1, weights_depend_on_targets=True),
        form(
            with_targets(distributions, N, D), weight=of_classes(), weights_depend_on_targets=None
        ),
    ],
    "PoissonNLLLoss": [
        form(with_targets(counts, N, D), full=True),
        form(with_targets(counts, N, D), **POSITIVE, log_input=False),
    ],
    "GaussianNLLLoss": [
        form(
            pairs(lambda: torch.randn(N, D), N, D),
            lambda loss, p, y: loss(p[0], y, p[1].exp()),
            full=True,
        ),
        form(VALUES, lambda loss, p, y: loss(p[:, :5], y[:, :5], p[:, 5:].exp())),
    ],
    "KLDivLoss": [
        form(with_targets(distributions, N, D), **ON_LOGS),
        form(VALUES, lambda loss, p, y: loss(p.log_softmax(1), y.log_softmax(1)), log_target=True),
    ],
    "BCELoss": [form(BITS, lambda loss, p, y: loss(p.sigmoid(), y), weight=of_classes())],
    "BCEWithLogitsLoss": [
        form(BITS, pos_weight=of_classes()),
        form(BITS, weight=of_classes()[:, None]),
    ],
    "HingeEmbeddingLoss": [form(SIGNS, margin=0.7)],
    "SoftMarginLoss": [form(SIGNS)],
    "MultiLabelMarginLoss": [form(SEVERAL)],
    "MultiLabelSoftMarginLoss": [form(BITS), form(BITS, weight=of_classes())],
    "MultiMarginLoss": [form(CLASSES), form(CLASSES, p=2, margin=0.8, weight=of_classes())],
    "CosineEmbeddingLoss": [form(pairs(lambda: signs(N), N, D), **ON_PARTS, margin=-0.5)],
    "MarginRankingLoss": [form(pairs(lambda: signs(N, D), N, D), **ON_PARTS, margin=0.5)],
    "TripletMarginLoss": [
        form(THREE, **ALONE, margin=5.0),
        form(THREE, **ALONE, margin=4.0, p=3, swap=True),
    ],
    "TripletMarginWithDistanceLoss": [form(THREE, **ALONE, distance_function=apart, margin=5.0)],
    "CTCLoss": [form(TIMES, timed, zero_infinity=True)],
}
WITH_PARAMETERS = {"LinearCrossEntropyLoss", "AdaptiveLogSoftmaxWithLoss"}  # tested further down
NOT_SCALAR = "none"


def losses_of_torch() -> set[str]:
    """What the losses' module of torch defines, and what `torch.nn` offers under a name with Loss
    in it.
    """
    defined = {
        n
        for n, c in vars(nn.modules.loss).items()
        if getattr(c, "__module__", "") == nn.modules.loss.__name__
    }
    offered = {n for n, c in vars(nn).items() if "Loss" in n and inspect.isclass(c)}
    return {n for n in defined | offered if not n.startswith("_")}


def made(name: str, form: Form, reduction: str) -> Callable:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of those that are on their way out
        loss = getattr(nn.modules.loss, name)(reduction=reduction, **form.options)
    return lambda p, y: form.call(loss, p, y)


def reductions(name: str) -> list[str]:
    return ["mean", "sum", *(["batchmean"] if name == "KLDivLoss" else [])]


def cases_of_torch() -> list[LossCase]:
    cases = []
    for name, forms in FORMS.items():
        for number, form in enumerate(forms):
            for reduction in reductions(name):
                weights = form.weights_depend_on_targets if reduction == "mean" else None
                weights = weights if form.weights_depend_on_targets else False
                told = f"{name}, {reduction}" + (f", form {number}" if number else "")
                cases.append(
                    LossCase(
                        told, made(name, form, reduction), form.inputs, "holds", "holds", weights
                    )
                )
    return cases


TORCH = cases_of_torch()

# ---------------------------------------------------------------- losses from the wild

WILD = {
    "label-smoothed": ["cross-entropy, label smoothing"],
    "focal": ["focal", "focal, labels gathered", "focal with a detached factor"],
    "dice": [
        "soft dice over the batch",
        "soft dice per class over the batch",
        "soft dice per sample",
    ],
    "Lovász": [
        "Lovász hinge per sample",
        "Lovász hinge over the batch",
        "Lovász softmax over the batch",
    ],
    "triplet": [
        "triplet of three outputs",
        "triplet of three outputs by cosines",
        "triplets of the batch, hardest ones",
    ],
    "CLIP": ["CLIP", "sigmoid of pairs (SigLIP)"],
    "SupCon": ["supervised contrast", "supervised contrast of two views"],
    "Barlow Twins": ["Barlow Twins"],
    "VICReg": ["VICReg"],
    "Cox": ["Cox partial likelihood", "Cox partial likelihood with censoring"],
    "CTC": ["connectionist temporal classification", "temporal classification by hand"],
    "RNN-T-like": ["transducer (RNN-T) over a lattice"],
    "quantile": ["quantile loss", "several quantiles at once"],
    "evidential": ["evidential regression", "evidential classification"],
    "ELBO": ["evidence lower bound"],
    "distillation": ["distillation"],
    "DPO": ["direct preference", "direct preference of token sequences"],
    "PPO with normalised advantages": [
        "proximal policy, advantages normalised over the batch",
        "proximal policy, advantages relative to its own values",
    ],
    "mixup targets": ["cross-entropy of mixed labels", "labels mixed with those of other samples"],
    "physics-informed residuals": ["residual of a differential equation"],
}
BY_NAME = {case.name: case for case in LOSSES}
NAMED = [BY_NAME[name] for names in WILD.values() for name in names]
OTHERS = [case for case in LOSSES if case not in [*NAMED, *cases_losses.OF_TORCH]]

# ---------------------------------------------------------------- a net under a loss


class Under(nn.Module):
    """A tiny net with predictions of any shapes, one or several."""

    def __init__(self, shapes: list[tuple[int, ...]], norm: bool, last: Callable[[Tensor], Tensor]):
        super().__init__()
        sizes = [math.prod(shape) for shape in shapes]
        between = [nn.BatchNorm1d(4)] if norm else []
        self.body = nn.Sequential(nn.Linear(3, 4), *between, nn.Tanh(), nn.Linear(4, sum(sizes)))
        self.shapes, self.sizes, self.last = shapes, sizes, last

    def forward(self, x):
        parts = self.body(x).split(self.sizes, 1)
        out = tuple(
            self.last(part.reshape(len(x), *s)) for part, s in zip(parts, self.shapes, strict=True)
        )
        return out if len(out) > 1 else out[0]


@pytest.fixture(autouse=True)
def _double(monkeypatch):
    monkeypatch.setattr(cases_losses, "RISING", cases_losses.RISING.double())
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def put(case: LossCase, norm: bool) -> tuple[tuple, ub.Problem]:
    """A net under the loss: the arguments of the reference, and the problem."""
    predictions, targets = case.inputs()
    leaves = tree_leaves(predictions)
    samples = len(leaves[0])
    last = torch.sigmoid if "of probabilities" in case.name else lambda t: 2 * t
    model = Under([tuple(t.shape[1:]) for t in leaves], norm, last)
    loss = copy.deepcopy(case.loss).double() if isinstance(case.loss, nn.Module) else case.loss
    dims = tree_map(lambda t: 0 if t.shape[:1] == (samples,) else None, targets)
    X = torch.randn(samples, 3)
    return (model, loss, X, targets), ub.Problem(model, loss, (X, targets), in_dims=(0, dims))


def near(found: Tensor, expected: Tensor, what: str, scale: float = 0.0) -> None:
    """Raise where two tensors differ by more than rounding; `scale`: of which zeros are the
    rounding.
    """
    assert found.shape == expected.shape, (
        f"{what}: {tuple(found.shape)} where {tuple(expected.shape)} is expected"
    )
    size = float(expected.abs().max())
    error = float((found - expected).abs().max())
    assert error <= EXACT * size + 1e-12 * scale, (
        f"{what}: off by {error:.1e}, the largest entry is {size:.1e}"
    )


def largest(tensors: dict[str, Tensor]) -> float:
    return max(float(t.abs().max()) for t in tensors.values())


class Expected:
    """What the reference says, each thing once."""

    def __init__(self, *args: Any):
        self.rows, self.gradient = reference.component(*args), reference.gradient(*args)
        self.rest = reference.rest(*args)
        self.args = args

    @cached_property
    def H(self) -> Tensor:
        return reference.output_hessian(*self.args)

    @cached_property
    def G(self) -> Tensor:
        return self.J.T @ self.H @ self.J

    @cached_property
    def J(self) -> Tensor:
        return reference.jacobian(*self.args)

    @property
    def diagonals(self) -> Tensor:
        """Of every component, `[N, D]`."""
        samples = len(next(iter(self.rows.values())))
        Js = self.J.chunk(samples)
        Hs = [rows.chunk(samples, 1)[n] for n, rows in enumerate(self.H.chunk(samples))]
        return torch.stack([(J * (H @ J)).sum(0) for J, H in zip(Js, Hs, strict=True)])


def check_gradients(expected: Expected, problem: ub.Problem) -> None:
    rows, scale = problem.gradients(), largest(expected.rows)
    assert list(rows) == list(expected.gradient)
    for name, g in expected.gradient.items():
        rest = rows.rest.get(name, torch.zeros_like(g))
        near(rows[name], expected.rows[name], f"rows of {name}", scale)
        near(rest, expected.rest[name], f"rest of {name}", largest(expected.gradient))
        near(rows[name].sum(0) + rest, g, f"sum of the rows of {name}", scale)


def warned_of(problem: ub.Problem, *quantities) -> tuple[Any, bool]:
    """The results, and whether they came with the warning that they are no
    statistics over samples.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = problem.compute(*quantities)
    ours = [w for w in caught if not str(w.message).startswith(TORCHS)]
    assert {w.category for w in ours} <= {ub.MixedSamplesWarning}, [str(w.message) for w in ours]
    return found, bool(ours)


def check_moments(case: LossCase, expected: Expected, problem: ub.Problem, norm: bool) -> None:
    (norms, variance), warned = warned_of(problem, ub.SquaredNorms(), ub.Variance())
    scale = largest(expected.rows) ** 2
    near(norms.total, reference.squared_norms(expected.rows)[1], "squared norms", scale)
    for name, of_rows in reference.variance(expected.rows).items():
        near(variance[name], of_rows, f"variance of {name}", scale)
    over_samples = not norm and truth_of(case) == dict.fromkeys(LOSS, "holds")
    if not over_samples or case.weights_depend_on_targets:
        assert warned, "no warning that this is no statistic over samples"
    elif problem.structure.reduction and case.weights_depend_on_targets is False:
        assert not warned, "a warning although this is a statistic over samples"
    alone = not norm and problem.structure.simd_loss
    assert norms.kind == ("per-sample" if alone else "per-component")


def check_matrix(expected: Expected, problem: ub.Problem) -> None:
    G, scale = problem.ggn(), float(expected.G.abs().max())
    v = torch.randn(len(expected.G), 2)
    near(G @ v, expected.G @ v, "G @ V", scale)
    near(G.diag(), expected.G.diagonal(), "diagonal", scale)
    found, values = G.eigvalsh(), torch.linalg.eigvalsh(expected.G)
    assert len(found) == min(expected.J.shape)
    near(
        found,
        values[values.abs().argsort(descending=True)][: len(found)].sort().values,
        "eigenvalues",
        scale,
    )
    check_signs(G, expected.H)
    check_components(expected, problem)


def check_signs(G: ub.GGN, H: Tensor) -> None:
    lowest = float(torch.linalg.eigvalsh(H).min())
    if lowest >= -1e-12 * float(H.abs().max()):
        assert G.positive_semidefinite, G.positive_semidefinite.note
    else:
        assert G.positive_semidefinite.status == "fails"
        assert f"{lowest:.3g}" in G.positive_semidefinite.note, (
            lowest,
            G.positive_semidefinite.note,
        )


def check_components(expected: Expected, problem: ub.Problem) -> None:
    if problem.structure.reduction:
        found, scale = problem.ggn().diag(per_component=True), float(expected.diagonals.abs().max())
        near(found, expected.diagonals, "diagonals of components", scale)
        near(found.sum(0), expected.G.diagonal(), "their sum", scale)
    else:
        with pytest.raises(ub.StructureError, match="sum over the samples"):
            problem.ggn().diag(per_component=True)


def check_refusal_of_matrix(problem: ub.Problem) -> None:
    """Whatever is asked of a matrix that does not exist, the answer says why it does not."""
    for ask in (
        lambda: problem.ggn() @ torch.ones(problem.ggn().shape[0]),
        lambda: problem.ggn().diag(),
        lambda: problem.ggn().diag(per_component=True),
        lambda: problem.ggn().eigvalsh(),
        lambda: problem.ggn().positive_semidefinite,
        lambda: problem.compute(ub.DiagGGN()),
    ):
        with pytest.raises(
            ub.StructureError,
            match="The loss has no second derivative by the predictions in PyTorch",
        ):
            ask()


NOT_TWICE = ["MultiMarginLoss", "MultiLabelMarginLoss", "CTCLoss"]
NOT_TWICE += ["multi-class margin", "multi-label margin", "connectionist temporal classification"]
if minor(torch.__version__) == "2.13":  # which has no second derivative of `cdist`
    NOT_TWICE += [
        "moments matched with a kernel",
        "distances matched",
        "triplets of the batch, hardest ones",
    ]


def twice_differentiable(case: LossCase) -> bool:
    """Whether PyTorch has a second derivative of it."""
    return case.name.split(", ")[0] not in NOT_TWICE and case.name not in NOT_TWICE


def named(cases: list[LossCase]) -> list:
    return [pytest.param(case, id=case.name) for case in cases]


BOTH = pytest.mark.parametrize("norm", [False, True], ids=["plain", "batch norm"])

# ---------------------------------------------------------------- tests: torch.nn


def test_every_loss_of_torch_is_in_the_table():
    assert losses_of_torch() == FORMS.keys() | WITH_PARAMETERS


@pytest.mark.parametrize("name", FORMS)
def test_a_loss_that_is_not_reduced_is_refused(name):
    form = FORMS[name][0]
    case = LossCase(name, made(name, form, NOT_SCALAR), form.inputs, "holds", "holds")
    _, problem = put(case, norm=False)
    for ask in (lambda: problem.structure, problem.gradient, problem.gradients, problem.ggn):
        with pytest.raises(ub.InputError, match=r"must be a scalar tensor.*reduction='mean'"):
            ask()


def check_quantities(case: LossCase, norm: bool) -> ub.Problem:
    args, problem = put(case, norm)
    expected = Expected(*args)
    check_gradients(expected, problem)
    check_moments(case, expected, problem, norm)
    if twice_differentiable(case):
        check_matrix(expected, problem)
    else:
        with pytest.raises((RuntimeError, NotImplementedError), match="not implemented"):
            reference.output_hessian(*args)
        check_refusal_of_matrix(problem)
    return problem


def losses_and_nets() -> list:
    """Sums differ from means by a factor, and so are put under one net only."""
    nets = {False: "plain", True: "batch norm"}
    return [
        pytest.param(case, norm, id=f"{case.name}-{nets[norm]}")
        for case in TORCH
        for norm in nets
        if not (norm and ", sum" in case.name)
    ]


@pytest.mark.parametrize(("case", "norm"), losses_and_nets())
def test_losses_of_torch(case, norm):
    problem = check_quantities(case, norm)
    check(problem.structure, truth_of(case) | {"canonical_split": "holds"}, accept_unknown=False)
    check_weights(problem.structure, case.weights_depend_on_targets)


@BOTH
@pytest.mark.parametrize("case", named(NAMED))
def test_losses_from_the_wild(case, norm):
    check_quantities(case, norm)


@pytest.mark.parametrize("case", named(OTHERS))
def test_other_losses(case):
    check_quantities(case, norm=True)


# ---------------------------------------------------------------- weights of a sum

UNREADABLE = [  # weights by the place in the batch, or set by the targets of all
    "binary cross-entropy, a weight per sample",
    "weights by index",
    "the first three samples",
    "weights by class frequency",
    "policy gradient, advantages normalised over the batch",
]


def is_sum_of_one_function(case: LossCase) -> bool:
    return (case.reduction, case.simd_loss) == ("holds", "holds")


def alike(case: LossCase) -> LossCase:
    """The same loss where all samples have the targets of one."""
    predictions, targets = case.inputs()
    samples = len(tree_leaves(predictions)[0])
    same = tree_map(
        lambda t: t[1:2].expand_as(t).clone() if t.shape[:1] == (samples,) else t, targets
    )
    return replace(case, inputs=lambda: (predictions, same))


def check_weights_of_rows(rows: ub.Rows) -> None:
    """Rows of samples that are alike differ by their weights alone."""
    if rows.weights is not None:
        per_weight = rows.flat() / rows.weights[:, None]
        near(per_weight, per_weight[:1].expand_as(per_weight), "rows over their weights")


def rows_of_samples_alike(case: LossCase) -> ub.Rows:
    (_, _, X, y), problem = put(alike(case), norm=False)
    X = X[:1].expand_as(X).clone()
    return problem.with_batch(X, y).gradients()


@pytest.mark.parametrize(
    "case", named([c for c in [*cases_losses.OF_TORCH, *OTHERS] if is_sum_of_one_function(c)])
)
def test_weights_are_right_or_unknown(case):
    rows = rows_of_samples_alike(case)
    check_weights_of_rows(rows)
    if case.name in UNREADABLE:
        assert rows.weights is None


def test_weights_of_means_and_sums_are_read_off():
    for name, weight in {
        "squared error, mean": 1 / (N * D),
        "squared error, sum": 1.0,
        "half a squared error": 0.5 / (N * D),
        "cross-entropy, class weights": 1 / 19,  # the sum of the weights of the labels
        "binary cross-entropy, pos_weight": 1 / (N * D),
        "cross-entropy, ignore_index": 1 / 4,
    }.items():
        _, problem = put(BY_NAME[name], norm=False)
        near(problem.gradients().weights, torch.full((N,), weight), name)


def test_weights_of_another_sample_are_caught(monkeypatch):
    """What is read off without a look at the samples is wrong where some are left out."""
    monkeypatch.setattr("unbatch.analysis.loss_weights._treats_alike", lambda *_: True)
    with pytest.raises(AssertionError, match="rows over their weights: off by"):
        check_weights_of_rows(rows_of_samples_alike(BY_NAME["the first three samples"]))


# -------------------------------------------------------------- losses with parameters of their own


class Adaptive(nn.Module):
    """Of a module that returns more than its loss, the loss."""

    def __init__(self):
        super().__init__()
        self.head = nn.AdaptiveLogSoftmaxWithLoss(16, 8, [2, 5])

    def forward(self, p, y):
        return self.head(p, y).loss


class Contrast(nn.Module):
    """CLIP with a temperature that is learned."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.1))

    def forward(self, p, y):
        return (
            BY_NAME["CLIP"].loss([part * 1.0 for part in p], y) * self.scale.exp()
            + self.scale.square()
        )


class Centred(nn.Module):
    """Center loss: distances to centres of classes that are learned."""

    def __init__(self):
        super().__init__()
        self.centres = nn.Parameter(torch.randn(D, D))

    def forward(self, p, y):
        return F.cross_entropy(p, y) + 0.1 * (p - self.centres[y]).square().sum(1).mean()


def head(reduction="mean", **options):
    return nn.LinearCrossEntropyLoss(8, 4, bias=True, reduction=reduction, **options)


CHUNKED = {"options": nn.LinearCrossEntropyOptions()}
LABELS_OF_8 = lambda: (torch.randn(N, 16), torch.tensor([0, 3, 6, 1, 4, 7]))  # noqa: E731
# what makes the loss, its inputs, and whether reduction and SIMD loss hold; None: nobody can tell
OWN = {
    "LinearCrossEntropyLoss, mean": (head, classes(N, 8), True),
    "LinearCrossEntropyLoss, sum": (lambda: head("sum"), classes(N, 8), True),
    "LinearCrossEntropyLoss in chunks, mean": (lambda: head(**CHUNKED), classes(N, 8), None),
    "LinearCrossEntropyLoss in chunks, sum": (lambda: head("sum", **CHUNKED), classes(N, 8), None),
    "AdaptiveLogSoftmaxWithLoss": (Adaptive, LABELS_OF_8, None),
    "CLIP, temperature learned": (Contrast, PAIRS, False),
    "centres learned": (Centred, CLASSES, True),
}


@BOTH
@pytest.mark.parametrize("name", OWN)
def test_losses_with_parameters(name, norm):
    make, inputs, holds = OWN[name]
    predictions, targets = inputs()
    case = LossCase(
        name, make(), lambda: (predictions, targets % 4 if "Linear" in name else targets), "", ""
    )
    args, problem = put(case, norm)
    expected = Expected(*args)
    assert problem.structure.canonical_split.status == "fails"
    status = {True: "holds", False: "fails", None: "unknown"}[holds]
    check(problem.structure, dict.fromkeys(LOSS, status), accept_unknown=holds is None)
    check_gradients(expected, problem)
    assert any(t.any() for t in problem.gradients().rest.values())
    if "chunks" in name:
        with pytest.raises(ub.StructureError, match=r"chunked.*its own backward pass"):
            problem.ggn().diag()
    else:
        check_matrix(expected, problem)


def test_a_loss_in_chunks_has_no_second_derivative_in_pytorch():
    """PyTorch takes it for zero without a word; the same loss at once says what it is."""
    torch.manual_seed(1)
    case = LossCase("", head(), lambda: (torch.randn(N, 8), torch.arange(N) % 4), "", "")
    (model, loss, X, y), problem = put(case, norm=False)
    chunked = head(**CHUNKED)
    chunked.load_state_dict(loss.state_dict())
    assert reference.ggn(model, chunked, X, y).count_nonzero() == 0
    assert problem.ggn().trace() > 0.01


# ---------------------------------------------------------------- backward passes written by hand


class Exponential(torch.autograd.Function):
    """With a derivative that can be differentiated again."""

    @staticmethod
    def forward(ctx, x):
        y = x.exp()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0]


class Prepared(torch.autograd.Function):
    """Its gradient is made on the way forward, where nothing is recorded."""

    @staticmethod
    def forward(ctx, x):
        ctx.gradient = x.exp()
        return x.exp()

    @staticmethod
    def backward(ctx, g):
        return g * ctx.gradient


class Once(Exponential):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g * ctx.saved_tensors[0]


def by_hand(function, dtype=torch.float64):
    def loss(p, y):
        return function.apply(p - y).sum(1).mean() + F.mse_loss(p, y)

    args, _ = put(LossCase("", loss, VALUES, "holds", "holds"), norm=True)
    model, loss, X, y = (part.to(dtype) if hasattr(part, "to") else part for part in args)
    return (model, loss, X, y), ub.Problem(model, loss, (X, y))


def test_a_backward_pass_by_hand_is_differentiated_where_it_can_be():
    args, problem = by_hand(Exponential)
    check_matrix(Expected(*args), problem)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("function", [Prepared, Once])
def test_a_backward_pass_without_a_graph_is_refused(function, dtype):
    _, problem = by_hand(function, dtype)
    v = torch.ones(problem.ggn().shape[0], dtype=dtype)
    for ask in (problem.ggn().trace, problem.ggn().eigvalsh, lambda: problem.ggn() @ v):
        with pytest.raises(
            ub.StructureError, match=rf"{function.__name__} defines its own backward pass"
        ):
            ask()
    assert "defines its own backward pass" in repr(problem.ggn())  # which does not raise


def test_without_the_differences_it_would_be_wrong(monkeypatch):
    monkeypatch.setattr("unbatch.autodiff.loss.own_derivatives", lambda _: [])
    _, wrong = by_hand(Prepared)
    torch.manual_seed(0)
    args, _ = by_hand(Exponential)
    with pytest.raises(AssertionError, match="off by"):
        check_matrix(Expected(*args), wrong)


# ---------------------------------------------------------------- derivatives inside, noise inside


class PlainNorm(nn.BatchNorm1d):
    """A batch norm in plain operations, which can be differentiated as often as one likes."""

    def forward(self, x):
        var, mean = torch.var_mean(x, 0, unbiased=False)
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
        return (x - mean) / (var + self.eps).sqrt() * self.weight + self.bias


def body(norm: bool) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(2, 4), *([PlainNorm(4)] if norm else []), nn.Tanh(), nn.Linear(4, 1)
    )


def solution(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`u`, its derivative by time, and the second one by space, which parameters can be
    differentiated by.
    """
    x = x.detach().requires_grad_()
    u = net(x)
    (first,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first[:, 1].sum(), x, create_graph=True)
    return u[:, 0], first[:, 0], second[:, 1]


class Solver(nn.Module):
    """Predicts a function and its derivatives; with `own`, the residual of
    a differential equation.
    """

    def __init__(self, norm: bool, own: bool = False):
        super().__init__()
        self.body, self.own = body(norm), own

    def forward(self, x):
        found = solution(self.body, x)
        return residual(found, torch.zeros(len(x))) if self.own else found


residual = BY_NAME["residual of a differential equation"].loss


@BOTH
def test_residuals_with_derivatives_inside_the_model(norm):
    case = replace(BY_NAME["residual of a differential equation"], weights_depend_on_targets=False)
    args = (Solver(norm), residual, torch.randn(N, 2), torch.randn(N))
    problem = ub.Problem(args[0], residual, args[2:])
    expected = Expected(*args)
    forward = "fails" if norm else "holds"
    check(
        problem.structure, truth_of(case) | {"independent_forward": forward}, accept_unknown=False
    )
    check_gradients(expected, problem)
    check_moments(case, expected, problem, norm)
    check_matrix(expected, problem)


class Residual(nn.Module):
    """Of a net at points of their own, beside a squared error."""

    def __init__(self, net: nn.Module, points: Tensor):
        super().__init__()
        self.net, self.points = net, points

    def forward(self, p, y):
        return F.mse_loss(p[:, 0], y) + residual(
            solution(self.net, self.points), torch.zeros(len(self.points))
        )


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.LayerNorm])
def test_third_derivatives_of_norms_are_refused(norm, own):
    """Some versions of PyTorch return wrong numbers for them, and some raise."""
    model = Solver(norm=True, own=own)
    model.body[1] = norm(4)
    if own:
        problem = ub.Problem(model, batch=torch.randn(N, 2))
    else:
        problem = ub.Problem(model, residual, (torch.randn(N, 2), torch.randn(N)))
    assert problem.structure.canonical_split.status != "fails"
    for ask in (problem.gradient, problem.gradients, problem.ggn):
        with pytest.raises(ub.StructureError, match=r"a third derivative, which PyTorch has wrong"):
            ask()


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.LayerNorm])
def test_second_derivatives_of_norms_are_right(norm):
    """As they are where the model takes first derivatives, or second ones that it detaches."""
    model = Sloped(norm(4))
    args = (model, F.mse_loss, torch.randn(N, 2), torch.randn(N, 2))
    problem = ub.Problem(args[0], args[1], args[2:])
    expected = Expected(*args)
    check_gradients(expected, problem)
    check_matrix(expected, problem)


class Attends(nn.Module):
    """Predicts the slopes of an attention by its inputs, computed by one of PyTorch's kernels."""

    def __init__(self, backend: SDPBackend):
        super().__init__()
        self.layer, self.backend = nn.Linear(2, 2), backend

    def forward(self, x):
        x = x.detach().requires_grad_()
        h = self.layer(x)[:, None]
        with sdpa_kernel(self.backend):
            u = F.scaled_dot_product_attention(h, h, h)
            return torch.autograd.grad(u.square().sum(), x, create_graph=True)[0]


def test_an_op_without_a_derivative_is_refused_by_name():
    def problem(backend: SDPBackend) -> ub.Problem:
        return ub.Problem(
            Attends(backend), F.mse_loss, (torch.randn(N, 3, 2), torch.randn(N, 3, 2))
        )

    fused, plain = problem(SDPBackend.FLASH_ATTENTION), problem(SDPBackend.MATH)
    plain.ggn().diag()
    for ask in (fused.gradient, fused.gradients, lambda: fused.ggn().diag()):
        with pytest.raises(ub.StructureError, match=r"flash_attention_for_cpu_backward.*MATH"):
            ask()


class Sloped(nn.Module):
    """Predicts a function and its slope, weighted by a second derivative that is constant."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.body = body(norm=True)
        self.body[1] = norm

    def forward(self, x):
        u, slope, curvature = solution(self.body, x)
        return torch.stack([u, slope], 1) * (1 + curvature.detach().square()[:, None])


def with_residual(norm: bool) -> tuple:
    net = body(norm)
    return net, Residual(net, torch.randn(4, 2)), torch.randn(N, 2), torch.randn(N)


def test_residuals_with_derivatives_inside_the_loss():
    """No sample has a part in them: they are the rest."""
    args = with_residual(norm=False)
    problem = ub.Problem(args[0], args[1], args[2:])
    expected = Expected(*args)
    assert problem.structure.canonical_split.status == "fails"
    check_gradients(expected, problem)
    assert problem.gradients().rest["0.weight"].any()
    check_matrix(expected, problem)


def check_refusal_of_backward_inside(problem: ub.Problem) -> None:
    for ask in (
        problem.gradients,
        lambda: problem.compute(ub.SquaredNorms()),
        lambda: problem.ggn().diag(),
    ):
        with pytest.raises(ub.StructureError, match=r"The loss takes derivatives \(tanh_backward"):
            ask()


def test_derivatives_inside_a_loss_that_is_replayed_are_refused():
    """The net in the loss reads running statistics that the forward pass has moved on."""
    args = with_residual(norm=True)
    check_refusal_of_backward_inside(ub.Problem(args[0], args[1], args[2:]))


def test_replayed_derivatives_would_be_wrong(monkeypatch):
    args = with_residual(norm=True)
    problem = ub.Problem(args[0], args[1], args[2:])
    monkeypatch.setattr("unbatch.gradients.replayed_rows.by_graph", lambda *_: True)
    monkeypatch.setattr("unbatch.autodiff.loss.by_graph", lambda *_: True)
    with pytest.raises(AssertionError, match=r"rest of .*: off by"):
        check_gradients(Expected(*args), problem)


@BOTH
def test_residuals_as_the_loss_of_the_model_itself(norm):
    """Their derivatives cannot be replayed: the model runs, and is cut where the function and its
    derivatives are.
    """
    model, X = Solver(norm, own=True), torch.randn(N, 2)
    problem = ub.Problem(model, batch=X)
    outside = copy.deepcopy(model)
    outside.own = False
    expected = Expected(outside, residual, X, torch.zeros(N))
    check_gradients(expected, problem)
    G = problem.ggn()
    near(G.to_dense(), expected.G, "matrix")
    near(G.diag(), expected.G.diagonal(), "diagonal")


@BOTH
def test_noise_inside_the_loss_is_drawn_once(norm):
    """A bound with a code drawn from its distribution: the noise of the recording is that of every
    quantity.
    """
    decoder = torch.randn(3, D)

    def bound(p, y):
        mean, log_variance = p
        code = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        divergence = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(1)
        return (F.mse_loss(code.tanh() @ decoder, y, reduction="none").sum(1) + divergence).mean()

    case = LossCase("", bound, outputs(lambda: torch.randn(N, D), (3,), (3,)), "holds", "holds")
    args, problem = put(case, norm)
    state = torch.get_rng_state()
    check(problem.structure, truth_of(case), accept_unknown=False)
    assert torch.equal(torch.get_rng_state(), state)
    expected = Expected(*args)
    check_gradients(expected, problem)
    check_moments(case, expected, problem, norm)
    check_matrix(expected, problem)


# ---------------------------------------------------------------- losses in single precision


def weighted_with_a_penalty(dtype: torch.dtype) -> Callable:
    weight = of_classes(4).to(dtype)
    return lambda p, y: F.cross_entropy(p, y, weight) + 5e-5 * p.square().mean()


def in_both_precisions() -> tuple[ub.GGN, ub.GGN]:
    """A loss that holds numbers in single precision, and the same in double."""
    (model, _, X, y), _ = put(LossCase("", F.cross_entropy, classes(N, 4), "", ""), norm=False)
    exact = ub.Problem(copy.deepcopy(model), weighted_with_a_penalty(torch.float64), (X, y)).ggn()
    return ub.Problem(
        model.float(), weighted_with_a_penalty(torch.float32), (X.float(), y)
    ).ggn(), exact


def check_agreement(rough: ub.GGN, exact: ub.GGN) -> None:
    assert rough.rank_bound == exact.rank_bound, "another rank"
    error = (rough.diag() - exact.diag()).abs().max() / exact.diag().max()
    assert error < 1e-5, f"off by {error:.1e}"


def test_numbers_in_a_loss_do_not_make_its_second_derivative_rough():
    """A small penalty is not lost beside the softmax because class weights came in single
    precision.
    """
    check_agreement(*in_both_precisions())


def test_a_second_derivative_tested_in_single_precision_is_caught(monkeypatch):
    monkeypatch.setattr("unbatch.autodiff.loss.LossAt.in_double", lambda _: None)
    with pytest.raises(AssertionError, match="another rank"):
        check_agreement(*in_both_precisions())
