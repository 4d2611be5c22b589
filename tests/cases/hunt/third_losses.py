"""Losses and models with a loss of their own: sums over parts of a batch, and other surprises."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unbatch as ub
from cases.hunt.losses import table
from cases.losses import INDEXED, SEPARATE, SUM, TANGLED, D, N, classes, values
from cases.models.table import Net, linear
from unbatch import Structure

# No function of one number per sample adds up to it, and still each prediction is one number.
ONE_NUMBER_EACH = ("fails", "holds")
SUM_OF_NUMBERS = ("holds", "holds")  # of which each may be another function

VALUES, CLASSES, SCALARS = values(N, D), classes(N, D), values(N, 1)


def squares(p, y):
    return (p - y).square().sum(1)


def entropy(p):
    return -(p.softmax(1) * p.log_softmax(1)).sum(1).mean()


# ---------------------------------------------------------------- sums over parts of the batch


def labelled_half(p, y):
    """The first half has labels, and all samples are to be certain."""
    return F.cross_entropy(p[:3], y[:3]) + 0.1 * entropy(p)


def labelled_by_targets(p, y):
    return F.cross_entropy(p[y > 0], y[y > 0]) + 0.1 * entropy(p)


def domain_and_task(p, y):
    """The task on the source's samples, the domain on those of source and target."""
    domain = (torch.arange(N) < 3).float()
    return squares(p, y)[:3].mean() + F.binary_cross_entropy_with_logits(p[:, 0], domain)


def boundary_and_interior(p, y):
    return (p - y).square().mean() + 10 * p[[0, 5]].square().mean()


def two_halves(p, y):
    return squares(p, y)[:3].mean() + (p - y).abs().sum(1)[3:].mean()


def variance_of_risks(p, y):
    risks = torch.stack([squares(p, y)[:3].mean(), squares(p, y)[3:].mean()])
    return risks.mean() + 10 * risks.var()


def in_chunks(p, y):
    return sum(squares(a, b).sum() for a, b in zip(p.chunk(4), y.chunk(4), strict=True)) / N


def mean_of_unequal_chunks(p, y):
    return sum(squares(a, b).mean() for a, b in zip(p.split(4), y.split(4), strict=True)) / 2


table(
    INDEXED,
    CLASSES,
    {"labels for half, certainty for all": labelled_half},
    accept_unknown=True,
)
table(
    INDEXED,
    VALUES,
    {
        "task for half, domain for all": domain_and_task,
        "boundary and interior": boundary_and_interior,
        "two losses for two halves": two_halves,
        "less for some": lambda p, y: squares(p, y).mean() - 0.1 * p[:3].abs().sum(),
        "one anchor": lambda p, y: squares(p, y).mean() + p[0].square().sum(),
        "a penalty on every second": lambda p, y: squares(p, y).sum() + p[::2].abs().sum(),
    },
    accept_unknown=True,
)
table(
    SUM_OF_NUMBERS,
    SCALARS,
    {
        "boundary and interior of a scalar": boundary_and_interior,
        "two losses for two halves of scalars": two_halves,
        "a penalty on the first scalars": lambda p, y: (p - y).square().sum() + p[:2].abs().sum(),
    },
    accept_unknown=True,
)
table(
    SUM,
    VALUES,
    {
        "twice the first half": lambda p, y: squares(p, y).sum() + squares(p, y)[:3].sum(),
        "in chunks of unequal size": in_chunks,
        "means of unequal chunks": mean_of_unequal_chunks,
    },
    accept_unknown=True,
)
table(SUM, CLASSES, {"labels where there are any": labelled_by_targets}, True, accept_unknown=True)
table(
    SEPARATE,
    VALUES,
    {
        "mean and variance of two risks": variance_of_risks,
        "worst of two halves": lambda p, y: torch.stack(
            [squares(p, y)[:3].mean(), squares(p, y)[3:].mean()]
        ).max(),
    },
    accept_unknown=True,
)


# ---------------------------------------------------------------- one number per sample


def softly_weighted(p, y):
    losses = squares(p, y)
    return (losses * losses.softmax(0)).sum()


table(
    ONE_NUMBER_EACH,
    SCALARS,
    {
        "spread of scalar residuals": lambda p, y: (p - y).std(),
        "mean and spread of scalar losses": lambda p, y: squares(p, y).mean() + squares(p, y).std(),
        "scalar losses weighted by their softmax": softly_weighted,
        "variance of scalar residuals": lambda p, y: (p - y).var(),
        "spread of scalars kept up": lambda p, y: F.relu(1 - p.std()),
        "ranked against ranked": lambda p, y: (p.sort(0)[0] - y.sort(0)[0]).square().mean(),
        "scale-invariant error of scalars": lambda p, y: (
            (p - y).square().mean() - 0.85 * (p - y).mean().square()
        ),
    },
    accept_unknown=True,
)


# As Cox's likelihood: no scalar of a sample but the prediction itself.
table(TANGLED, SCALARS, {"pairs of scalars": lambda p, y: F.softplus(p - p.T).mean()})

# Unknown where `cdist` has no second derivative, as in PyTorch 2.13.
table(
    TANGLED,
    SCALARS,
    {"a kernel of scalars": lambda p, y: torch.cdist(p, p).exp().mean()},
    accept_unknown=True,
)


# ---------------------------------------------------------------- weights of the targets


def kept(y):
    return y[:, 0] > 0


def missing(y):
    return torch.where(y > 1, torch.nan, y)


def without_missing(p, y):
    known = ~missing(y).isnan()
    return torch.where(known, p - missing(y).nan_to_num(), 0.0).square().sum() / known.sum()


def smoothed_to_a_width(p, y):
    """Labels smoothed over as many classes as occur."""
    width = F.one_hot(y, num_classes=-1).shape[1]
    return (F.cross_entropy(p, y, reduction="none") - 0.1 / width * p.sum(1)).mean()


def over_classes(p, y):
    return F.cross_entropy(p, y, reduction="sum") / F.one_hot(y, -1).shape[1]


table(
    SUM,
    VALUES,
    {
        "over ones expanded as the kept": lambda p, y: (
            squares(p, y).sum() / torch.ones(1).expand_as(y[:, 0][kept(y)]).sum()
        ),
        "over a count in a LongTensor": lambda p, y: (
            squares(p, y).sum() / torch.LongTensor([kept(y).sum()])[0]
        ),
        "over the largest by Python": lambda p, y: (
            squares(p, y).sum() / max(y.abs().flatten().tolist())
        ),
        "over the targets' variation": lambda p, y: (
            1 - squares(p, y).sum() / (y - y.mean(0)).square().sum()
        ),
        "over what is not missing": without_missing,
        "the least first": lambda p, y: squares(p, y).gather(0, y[:, 0].argsort()[:3]).sum(),
    },
    True,
    accept_unknown=True,
)
table(
    SUM,
    CLASSES,
    {
        "over the number of classes": lambda p, y: (
            F.cross_entropy(p, y, reduction="sum") / y.unique().numel()
        ),
        "over the width of a one-hot": over_classes,
        "over how many have the same class": lambda p, y: (
            F.cross_entropy(p, y, reduction="none") / (y[:, None] == y).sum(1)
        ).sum(),
    },
    True,
    accept_unknown=True,
)
table(
    SUM,
    CLASSES,
    {"smoothed by the width of a one-hot": smoothed_to_a_width},
    None,
    accept_unknown=True,
)
table(
    SUM,
    VALUES,
    {
        "mean of what is a number": lambda p, y: (p - missing(y)).square().nanmean(),
        "standardised targets": lambda p, y: (p - (y - y.mean(0)) / y.std(0)).square().mean(),
        "clamped to the targets' range": lambda p, y: (
            (p.clamp(y.min().item(), y.max().item()) - y).square().mean()
        ),
    },
    None,
    accept_unknown=True,
)


# ---------------------------------------------------------------- of research papers


def wing(p, y):
    d = (p - y).abs()
    return torch.where(d < 1, 5 * (1 + 2 * d).log(), d - 1).mean()


def scale_invariant(p, y):
    d = p - y
    return (d.square().mean(1) - 0.85 * d.mean(1).square()).mean()


def scale_invariant_over_all(p, y):
    d = p - y
    return d.square().mean() - 0.85 * d.mean().square()


def asymmetric(p, y):
    positive = y > 0
    return -(positive * F.logsigmoid(p) + ~positive * F.logsigmoid(-p) * p.sigmoid() ** 2).mean()


def symmetric(p, y):
    reverse = -(p.softmax(1) * F.one_hot(y, D).float().clamp(1e-4).log()).sum(1).mean()
    return F.cross_entropy(p, y) + reverse


def generalised(p, y):
    return ((1 - p.softmax(1).gather(1, y[:, None]) ** 0.7) / 0.7).mean()


def importance(p, y):
    return (squares(p, y) * p[:, 0].exp()).sum() / p[:, 0].exp().sum()


table(
    SUM,
    VALUES,
    {
        "wing": wing,
        "scale-invariant per sample": scale_invariant,
        "asymmetric": asymmetric,
        "log of a hyperbolic cosine": lambda p, y: (p - y + F.softplus(2 * (y - p))).mean(),
        "Charbonnier": lambda p, y: ((p - y).square() + 1e-6).sqrt().mean(),
        "Geman and McClure": lambda p, y: (1 - 1 / (1 + (p - y).square())).sum(),
        "flooded sample by sample": lambda p, y: ((squares(p, y) - 0.1).abs() + 0.1).mean(),
        "rolled residuals": lambda p, y: (p - y).roll(1, 0).square().sum(),
        "losses flipped": lambda p, y: squares(p, y).flip(0).mean(),
        "losses sorted, then summed": lambda p, y: squares(p, y).sort().values.sum(),
        "last of the cumulative losses": lambda p, y: squares(p, y).cumsum(0)[-1],
    },
    None,
    accept_unknown=True,
)
table(
    SUM,
    CLASSES,
    {"symmetric": symmetric, "generalised": generalised},
    accept_unknown=True,
)
table(
    SEPARATE,
    VALUES,
    {
        "flooded mean": lambda p, y: (squares(p, y).mean() - 0.1).abs() + 0.1,
        "entropic risk": lambda p, y: (2 * squares(p, y)).exp().mean().log() / 2,
        "over a moving average of itself": lambda p, y: (
            squares(p, y).mean() / (0.9 + 0.1 * squares(p, y).mean().detach())
        ),
        "a product of all": lambda p, y: (1 + (p - y).square()).prod(),
        "largest residual": lambda p, y: (p - y).norm(float("inf")),
        "logsumexp of all residuals": lambda p, y: (p - y).flatten().logsumexp(0),
    },
    accept_unknown=True,
)
table(
    TANGLED,
    VALUES,
    {
        "scale-invariant over the batch": scale_invariant_over_all,
        "importance of its own": importance,
        "sliced ranks against ranks": lambda p, y: (p.sort(0)[0] - y.sort(0)[0]).square().mean(),
        "median of all residuals": lambda p, y: (p - y).abs().median(),
        "variance of all residuals": lambda p, y: (p - y).var(),
        "the larger of two samples": lambda p, y: torch.maximum(p[::2], p[1::2]).sum(),
        "ranks as weights": lambda p, y: (p.argsort(0).argsort(0) * p).sum(),
        "smooth along the batch": lambda p, y: (
            squares(p, y).mean() + (p[1:] - p[:-1]).square().mean()
        ),
    },
    accept_unknown=True,
)


# ---------------------------------------------------------------- models with a loss of their own


@dataclass(frozen=True)
class OwnLossCase:
    """A model `forward(net, x, y)` that returns its loss, with the truth about that."""

    name: str
    forward: Callable[..., Tensor]
    batch: Callable[[], tuple[Tensor, Tensor]]
    split: str
    reduction: str
    simd_loss: str
    parts: dict[str, Callable[[], Any]] = field(default_factory=dict)
    tokens: bool = False
    accept_unknown: bool = True

    def structure(self) -> Structure:
        torch.manual_seed(0)
        net = Net(self.forward, {"inner": linear(), "head": linear(), **self.parts})
        batch = dict(zip("xy", self.batch(), strict=True))
        if self.tokens:
            return ub.Problem(net, batch=batch, sample_dims=(0, 1)).structure
        return ub.Problem(net, batch=batch).structure

    def truth(self) -> dict[str, str]:
        return {
            "canonical_split": self.split,
            "reduction": self.reduction,
            "simd_loss": self.simd_loss,
        }


OWN: list[OwnLossCase] = []


def own(
    truth: tuple[str, str],
    batch: Callable[[], Any],
    models: dict[str, Callable[..., Tensor]],
    split: str = "holds",
    tokens: bool = False,
    **parts: Callable[[], Any],
) -> None:
    for name, forward in models.items():
        OWN.append(OwnLossCase(name, forward, batch, split, *truth, parts, tokens))


def predict(net, x):
    return net.head(net.inner(x).tanh())


def words():
    return torch.randint(D, (4, 5)), torch.randint(D, (4, 5))


def next_word(p, y):
    return F.cross_entropy(p[:, :-1].flatten(0, 1), y[:, 1:].flatten())


def with_penalty(net, x, y):
    """A language model with a penalty on the log-partition of all tokens, also of the last."""
    p = net.head(net.words(x))
    return next_word(p, y) + 0.1 * p.logsumexp(2).square().mean()


def autoencoder(net, x, y):
    mean, spread = net.inner(x), net.spread(x)
    out = net.head(mean + spread.exp() * torch.randn_like(mean))
    divergence = 0.5 * (mean.square() + (2 * spread).exp() - 1) - spread
    return (out - x).square().sum(1).mean() + divergence.sum(1).mean()


def quantised(net, x, y):
    h = net.inner(x)
    q = net.codes[torch.cdist(h, net.codes).argmin(1)]
    out = net.head(h + (q - h).detach())
    commitment = (q - h.detach()).square().mean() + 0.25 * (q.detach() - h).square().mean()
    return (out - x).square().mean() + commitment


def denoised(net, x, y):
    noise, t = torch.randn_like(x), torch.randint(0, 9, (N,))
    w = torch.linspace(0.1, 1, 9)[t]
    return (w * (net.head(w[:, None] * x + noise) - noise).square().mean(1)).mean()


def balanced_experts(net, x, y):
    r = net.router(x).softmax(1)
    load = F.one_hot(r.argmax(1), D).float().mean(0)
    return F.cross_entropy(predict(net, x), y) + (r.mean(0) * load).sum()


def contrast_with_a_learned_scale(net, x, y):
    scores = net.scale.exp() * predict(net, x) @ predict(net, y).T
    return F.cross_entropy(scores, torch.arange(N))


def flow(net, x, y):
    z = net.inner(x)
    return (0.5 * z.square().sum(1) - torch.linalg.slogdet(net.inner.weight)[1]).mean()


def flow_with_volume_outside(net, x, y):
    z = net.inner(x)
    return 0.5 * z.square().sum(1).mean() - torch.linalg.slogdet(net.inner.weight)[1]


own(
    INDEXED,
    CLASSES,
    {"own: labels for half, certainty for all": lambda n, x, y: labelled_half(predict(n, x), y)},
)
own(
    INDEXED,
    VALUES,
    {
        "own: boundary and interior": lambda n, x, y: boundary_and_interior(predict(n, x), y),
        "own: task for half, domain for all": lambda n, x, y: domain_and_task(predict(n, x), y),
    },
)
own(
    INDEXED,
    words,
    {"own: next word, and a penalty on all": with_penalty},
    tokens=True,
    words=lambda: nn.Embedding(D, D),
)
own(
    SUM,
    words,
    {
        "own: next word by sentence, with a penalty": with_penalty,
        "own: next word, tied": lambda n, x, y: next_word(n.words(x) @ n.words.weight.T, y),
    },
    words=lambda: nn.Embedding(D, D),
)
own(
    SUM,
    VALUES,
    {
        "own: autoencoder with a law": autoencoder,
        "own: quantised": quantised,
        "own: denoised at a time drawn": denoised,
        "own: a flow": flow,
        "own: learned widths": lambda n, x, y: (
            0.5 * (predict(n, x) - y).square() / n.widths.exp() + n.widths
        ).mean(),
    },
    spread=linear(),
    codes=lambda: nn.Parameter(torch.randn(5, D)),
    widths=lambda: nn.Parameter(torch.zeros(D)),
)
own(SUM, VALUES, {"own: a flow with its volume outside": flow_with_volume_outside}, "fails")
own(
    SUM,
    CLASSES,
    {
        "own: weights kept small": lambda n, x, y: (
            F.cross_entropy(predict(n, x), y) + 0.01 * n.head.weight.square().sum()
        ),
    },
    "fails",
)
own(
    TANGLED,
    CLASSES,
    {"own: experts kept in balance": balanced_experts},
    router=linear(),
)
own(
    TANGLED,
    VALUES,
    {"own: contrast with a learned scale": contrast_with_a_learned_scale},
    scale=lambda: nn.Parameter(torch.zeros(())),
)


# ---------------------------------------------------------------- the canonical split


@dataclass(frozen=True)
class SplitCase:
    """A model that may keep something for its loss, and whether parameters enter the loss so.

    ``kept``: of the net, its inputs and its predictions what is kept; ``loss``: of the net,
    predictions and targets.
    """

    name: str
    split: str
    loss: Callable[[Net, Tensor, Tensor], Tensor]
    kept: Callable[[Net, Tensor, Tensor], Any] | None = None
    accept_unknown: bool = True

    def structure(self) -> Structure:
        torch.manual_seed(0)
        net = Net(self.forward, {"inner": linear(), "head": linear()})
        loss = lambda p, y: self.loss(net, p, y)  # noqa: E731
        return ub.Problem(net, loss, VALUES()).structure

    def forward(self, net: Net, x: Tensor) -> Tensor:
        p = predict(net, x)
        if self.kept is not None:
            net.kept = self.kept(net, x, p)
        return p

    def truth(self) -> dict[str, str]:
        return {"canonical_split": self.split}


SPLITS: list[SplitCase] = []


def split(truth: str, losses: dict[str, Any]) -> None:
    for name, parts in losses.items():
        SPLITS.append(SplitCase(name, truth, *parts))


def error(p, y):
    return squares(p, y).mean()


def gradient_norm(loss, parameter):
    (g,) = torch.autograd.grad(loss, parameter, create_graph=True)
    return g.square().sum()


def weighed_by_gradients(net, p, y):
    """The weight of a second loss, by the gradients of both (as in a VQGAN)."""
    a, b = error(p, y), p.abs().mean()
    w = net.head.weight
    ratio = gradient_norm(a, w).sqrt() / gradient_norm(b, w).sqrt()
    return a + ratio.detach() * b


split(
    "fails",
    {
        "a penalty on gradients by inner weights": (
            lambda n, p, y: error(p, y) + 0.1 * gradient_norm(error(p, y), n.inner.weight),
        ),
        "a second loss weighed by gradients": (weighed_by_gradients,),
        "the sign of a weight": (lambda n, p, y: error(p, y) * (2 if n.head.bias[0] > 0 else 1),),
        "the sign of a weight, kept": (
            lambda n, p, y: error(p, y) * (2 if n.kept else 1),
            lambda n, x, p: bool(n.head.bias[0] > 0),
        ),
        "large weights counted, kept": (
            lambda n, p, y: error(p, y) * (1 + n.kept),
            lambda n, x, p: int((n.head.weight.abs() > 0.2).sum()),
        ),
        "large weights counted as an item, kept": (
            lambda n, p, y: error(p, y) * (1 + n.kept),
            lambda n, x, p: (n.head.weight.abs() > 0.2).sum().item(),
        ),
        "hidden values, kept": (
            lambda n, p, y: error(p, y) + n.kept.abs().mean(),
            lambda n, x, p: n.inner(x),
        ),
        "weights by their dict": (
            lambda n, p, y: error(p, y) + sum(w.square().sum() for w in n.state_dict().values()),
        ),
        "weights through numpy": (
            lambda n, p, y: error(p, y) + float((n.head.weight.detach().numpy() ** 2).sum()),
        ),
        "weights as one vector": (
            lambda n, p, y: error(p, y) + nn.utils.parameters_to_vector(n.parameters()).norm(),
        ),
    },
)
split(
    "holds",
    {
        "a norm of the inputs, kept": (
            lambda n, p, y: (squares(p, y) * n.kept).mean(),
            lambda n, x, p: x.square().sum(1),
        ),
        "how many weights there are": (
            lambda n, p, y: error(p, y) * sum(w.numel() for w in n.parameters()),
        ),
        "a penalty on gradients by predictions": (
            lambda n, p, y: error(p, y) + 0.1 * gradient_norm(error(p, y), p),
        ),
        "the shape of a weight": (lambda n, p, y: error(p, y) / n.head.weight.shape[0],),
        "a penalty on gradients by the last bias": (
            lambda n, p, y: error(p, y) + 0.1 * gradient_norm(error(p, y), n.head.bias),
        ),
    },
)
