"""Losses whose structure is known: what the analyser has to say about each of them.

The predictions are fresh inputs with samples on axis 0 (a tensor or a tuple of them), the targets
are constants. `weights_depend_on_targets` says whether a weight listens to the targets of *other*
samples; it is None where a factor of the sample's own target may be counted as part of the weight
or of the loss.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

N, D, T = 6, 6, 4


@dataclass(frozen=True)
class LossCase:
    name: str
    loss: Callable
    inputs: Callable[[], tuple]
    reduction: str
    simd_loss: str
    weights_depend_on_targets: bool | None = False
    accept_unknown: bool = False


SUM = ("holds", "holds")  # a weighted sum of one loss per sample
SEPARATE = ("fails", "holds")  # another function of one loss per sample
INDEXED = ("holds", "fails")  # a sum, of terms that are another function from sample to sample
TANGLED = ("fails", "fails")
FOREIGN = ("fails", "fails")  # terms that read targets of others: no term of one sample alone

LOSSES: list[LossCase] = []


def case(name, truth, inputs, loss=None, weights_depend_on_targets=False, accept_unknown=False):
    """A case, at once from a loss or as the decorator of one."""
    if loss is None:
        return lambda f: case(name, truth, inputs, f, weights_depend_on_targets, accept_unknown)
    LOSSES.append(LossCase(name, loss, inputs, *truth, weights_depend_on_targets, accept_unknown))
    return loss


def values(*shape):
    return lambda: (torch.randn(shape), torch.randn(shape))


def classes(*shape):
    return lambda: (torch.randn(shape), torch.randint(shape[1], (shape[0], *shape[2:])))


def with_targets(make, *shape):
    return lambda: (torch.randn(shape), make(*shape))


def fixed(labels, width=D):
    return lambda: (torch.randn(len(labels), width), torch.tensor(labels))


def pairs(targets, *shape):
    return lambda: ((torch.randn(shape), torch.randn(shape)), targets())


def bits(*shape):
    return torch.randint(2, shape).to(torch.get_default_dtype())


def counts(*shape):
    return torch.randint(5, shape).to(torch.get_default_dtype())


def signs(*shape):
    return 2 * bits(*shape) - 1


def distributions(*shape):
    return torch.randn(shape).softmax(1)


VALUES = values(N, D)
LABELS = [0, 1, 2, 2, 5, 3]
CLASSES = fixed(LABELS)
BITS = with_targets(bits, N, D)
PAIRS = pairs(lambda: torch.zeros(N), N, D)
GROUPS = fixed([0, 0, 1, 1, 0, 1])
TOKENS = with_targets(lambda n, t, _: torch.randint(D, (n, t)), N, T, D)
RISING = torch.arange(1.0, N + 1)


def squares(p, y):
    return (p - y).square().sum(1)


def focal(logs):
    return -((1 - logs.exp()) ** 2 * logs).mean()


def surprise(p, y):
    return F.cross_entropy(p, y, reduction="none")


# ---------------------------------------------------------------- torch's own

case("squared error, mean", SUM, VALUES, nn.MSELoss())
case("squared error, sum", SUM, VALUES, nn.MSELoss(reduction="sum"))
case("squared error, mean, seven samples", SUM, values(7, 3), nn.MSELoss())
case("squared error of sequences", SUM, values(N, T, D), nn.MSELoss())
case("squared error of scalars", SUM, values(N), nn.MSELoss())
case("absolute error, mean", SUM, VALUES, nn.L1Loss())
case("absolute error, sum", SUM, values(5, 8), nn.L1Loss(reduction="sum"))
case("Huber", SUM, VALUES, nn.HuberLoss(delta=0.7))
case("smooth absolute error, sum", SUM, VALUES, nn.SmoothL1Loss(reduction="sum"))
case(
    "binary cross-entropy of probabilities",
    SUM,
    lambda: (torch.rand(N, D), bits(N, D)),
    nn.BCELoss(),
)
case("binary cross-entropy, mean", SUM, BITS, nn.BCEWithLogitsLoss())
case(
    "binary cross-entropy, sum",
    SUM,
    with_targets(bits, 7, 3),
    nn.BCEWithLogitsLoss(reduction="sum"),
)
case("binary cross-entropy, pos_weight", SUM, BITS, nn.BCEWithLogitsLoss(pos_weight=RISING))
case("binary cross-entropy, a weight per output", SUM, BITS, nn.BCEWithLogitsLoss(weight=RISING))
case(
    "binary cross-entropy, a weight per sample",
    SUM,
    BITS,
    nn.BCEWithLogitsLoss(weight=RISING[:, None]),
)
case(
    "binary cross-entropy, a weight per entry",
    INDEXED,
    BITS,
    nn.BCEWithLogitsLoss(weight=1 + torch.eye(N)),
)
case("cross-entropy, mean", SUM, CLASSES, nn.CrossEntropyLoss())
case("cross-entropy, mean, five samples", SUM, classes(5, 8), nn.CrossEntropyLoss())
case("cross-entropy, sum", SUM, CLASSES, nn.CrossEntropyLoss(reduction="sum"))
case("cross-entropy, class weights", SUM, CLASSES, nn.CrossEntropyLoss(RISING), True)
case(
    "cross-entropy, class weights, sum",
    SUM,
    CLASSES,
    nn.CrossEntropyLoss(RISING, reduction="sum"),
    None,
)
case("cross-entropy, ignore_index", SUM, CLASSES, nn.CrossEntropyLoss(ignore_index=2), True)
case(
    "cross-entropy, ignore_index, sum",
    SUM,
    CLASSES,
    nn.CrossEntropyLoss(ignore_index=2, reduction="sum"),
    None,
)
case("cross-entropy, label smoothing", SUM, CLASSES, nn.CrossEntropyLoss(label_smoothing=0.1))
case(
    "cross-entropy, smoothing and weights",
    SUM,
    CLASSES,
    nn.CrossEntropyLoss(RISING, label_smoothing=0.1),
    True,
)
case("cross-entropy, soft targets", SUM, with_targets(distributions, N, D), nn.CrossEntropyLoss())
case(
    "cross-entropy, soft targets, weights",
    SUM,
    with_targets(distributions, N, D),
    nn.CrossEntropyLoss(RISING),
    None,
)
case("cross-entropy of images", SUM, classes(N, 3, 4, 4), nn.CrossEntropyLoss())
case("cross-entropy of sequences", SUM, classes(N, D, N), nn.CrossEntropyLoss())
case("cross-entropy of sequences, sum", SUM, classes(N, D, T), nn.CrossEntropyLoss(reduction="sum"))
case(
    "cross-entropy of sequences, ignore_index",
    SUM,
    classes(N, D, T),
    nn.CrossEntropyLoss(ignore_index=0),
    True,
)
case("negative log-likelihood", SUM, CLASSES, lambda p, y: F.nll_loss(p.log_softmax(1), y))


@case("negative log-likelihood, weights", SUM, CLASSES, weights_depend_on_targets=True)
def _(p, y):
    return F.nll_loss(p.log_softmax(1), y, RISING)


@case("negative log-likelihood of images", SUM, classes(N, D, 3, 3))
def _(p, y):
    return F.nll_loss(p.log_softmax(1), y)


@case("Kullback-Leibler, batchmean", SUM, with_targets(distributions, N, D))
def _(p, y):
    return F.kl_div(p.log_softmax(1), y, reduction="batchmean")


@case("Kullback-Leibler, log targets, sum", SUM, VALUES)
def _(p, y):
    return F.kl_div(p.log_softmax(1), y.log_softmax(1), reduction="sum", log_target=True)


case("Poisson", SUM, with_targets(counts, N, D), nn.PoissonNLLLoss())
case("Poisson with Stirling's term", SUM, with_targets(counts, N, D), nn.PoissonNLLLoss(full=True))


@case("Gaussian, variance predicted", SUM, pairs(lambda: torch.randn(N, D), N, D))
def _(p, y):
    return F.gaussian_nll_loss(p[0], y, p[1].exp())


@case("Gaussian, halves of one output", SUM, lambda: (torch.randn(N, D), torch.randn(N, 3)))
def _(p, y):
    return F.gaussian_nll_loss(p[:, :3], y, p[:, 3:].exp())


case("hinge embedding", SUM, with_targets(signs, N, D), nn.HingeEmbeddingLoss())
case("soft margin", SUM, with_targets(signs, N, D), nn.SoftMarginLoss())
case("hinge by hand", SUM, with_targets(signs, N, D), lambda p, y: (1 - p * y).relu().sum(1).mean())
case("multi-class margin", SUM, CLASSES, nn.MultiMarginLoss())
case(
    "multi-label margin",
    SUM,
    lambda: (torch.randn(N, D), torch.tensor([[3, 0, -1, 1, 2, -1]] * N)),
    nn.MultiLabelMarginLoss(),
)
case("multi-label soft margin", SUM, BITS, nn.MultiLabelSoftMarginLoss())


@case("cosine embedding of pairs", SUM, pairs(lambda: signs(N), N, D))
def _(p, y):
    return F.cosine_embedding_loss(*p, y, margin=-0.5)


@case("margin ranking of pairs", SUM, pairs(lambda: signs(N, D), N, D))
def _(p, y):
    return F.margin_ranking_loss(*p, y, margin=0.5)


@case("triplet with targets as anchors", SUM, pairs(lambda: torch.randn(N, D), N, D))
def _(p, y):
    return F.triplet_margin_loss(y, *p, margin=5.0)


@case(
    "connectionist temporal classification",
    SUM,
    lambda: (torch.randn(N, 8, D), torch.randint(1, D, (N, 3))),
    accept_unknown=True,
)
def _(p, y):
    return F.ctc_loss(p.log_softmax(2).transpose(0, 1), y, torch.full((N,), 8), torch.full((N,), 3))


OF_TORCH = list(LOSSES)

# ---------------------------------------------------------------- sums of separate losses

case("half a squared error", SUM, VALUES, lambda p, y: 0.5 * F.mse_loss(p, y))
case("squared plus absolute error", SUM, VALUES, lambda p, y: F.mse_loss(p, y) + F.l1_loss(p, y))
case(
    "squared error, sum over outputs, mean over samples",
    SUM,
    VALUES,
    lambda p, y: squares(p, y).mean(),
)
case("squared error by einsum", SUM, VALUES, lambda p, y: torch.einsum("nc,nc->", p - y, p - y))
case(
    "squared error by vdot",
    SUM,
    VALUES,
    lambda p, y: torch.dot((p - y).flatten(), (p - y).flatten()),
)


@case("squared error by the trace of a Gram matrix", SUM, VALUES, accept_unknown=True)
def _(p, y):
    return ((p - y) @ (p - y).t()).trace()


@case("squared error divided by the targets' power", SUM, VALUES, weights_depend_on_targets=True)
def _(p, y):
    return squares(p, y).sum() / y.square().sum()


@case("unexplained variance", SUM, VALUES, weights_depend_on_targets=True)
def _(p, y):
    return squares(p, y).sum() / (y - y.mean(0)).square().sum()


case(
    "focal, labels looked up",
    SUM,
    CLASSES,
    lambda p, y: focal(p.log_softmax(1)[torch.arange(N), y]),
)
case(
    "focal, labels gathered",
    SUM,
    CLASSES,
    lambda p, y: focal(p.log_softmax(1).gather(1, y[:, None])[:, 0]),
)
case(
    "negative log of a product",
    SUM,
    CLASSES,
    lambda p, y: -p.softmax(1).gather(1, y[:, None]).log().sum(),
)


@case("log of the product of the samples' likelihoods", SUM, CLASSES, accept_unknown=True)
def _(p, y):
    return -p.softmax(1).gather(1, y[:, None]).prod().log()


@case("mean over a loop", SUM, CLASSES)
def _(p, y):
    return sum(F.cross_entropy(a, b) for a, b in zip(p, y, strict=True)) / N


@case("mean over chunks", SUM, VALUES)
def _(p, y):
    return sum(F.mse_loss(a, b) for a, b in zip(p.chunk(2), y.chunk(2), strict=True)) / 2


@case("mean over chunks of unequal size", SUM, VALUES)
def _(p, y):
    return sum(F.mse_loss(a, b) for a, b in zip(p.split(4), y.split(4), strict=True))


@case("per-token cross-entropy, flattened", SUM, TOKENS)
def _(p, y):
    return F.cross_entropy(p.flatten(0, 1), y.flatten())


@case("per-token cross-entropy, time first", SUM, TOKENS)
def _(p, y):
    return F.cross_entropy(p.transpose(0, 1).flatten(0, 1), y.t().flatten())


@case("next-token cross-entropy", SUM, TOKENS)
def _(p, y):
    return F.cross_entropy(p[:, :-1].flatten(0, 1), y[:, 1:].flatten())


@case(
    "cross-entropy of mixed labels",
    SUM,
    lambda: (torch.randn(N, D), (torch.tensor(LABELS), torch.tensor(LABELS[::-1]))),
)
def _(p, y):
    return 0.3 * F.cross_entropy(p, y[0]) + 0.7 * F.cross_entropy(p, y[1])


@case("cross-entropy with an entropy bonus", SUM, CLASSES)
def _(p, y):
    return F.cross_entropy(p, y) + 0.1 * (p.softmax(1) * p.log_softmax(1)).sum(1).mean()


@case("cross-entropy with a penalty on the logits", SUM, CLASSES)
def _(p, y):
    return F.cross_entropy(p, y) + 0.01 * p.square().mean()


@case("focal", SUM, CLASSES)
def _(p, y):
    ce = surprise(p, y)
    return ((1 - (-ce).exp()) ** 2 * ce).mean()


@case("focal with a detached factor", SUM, CLASSES)
def _(p, y):
    ce = surprise(p, y)
    return ((1 - (-ce.detach()).exp()) ** 2 * ce).mean()


@case("distillation from the predictions themselves, detached", SUM, VALUES)
def _(p, y):
    return F.kl_div(
        p.log_softmax(1), (2 * p).softmax(1).detach(), reduction="batchmean"
    ) + F.mse_loss(p, y)


case(
    "agreement of two views",
    SUM,
    PAIRS,
    lambda p, y: -F.cosine_similarity(p[0], p[1].detach()).mean(),
)


@case("two heads", SUM, pairs(lambda: torch.tensor(LABELS), N, D))
def _(p, y):
    return 0.7 * F.cross_entropy(p[0], y) + 0.3 * F.cross_entropy(p[1], y)


@case("two heads with two losses", SUM, pairs(lambda: torch.randn(N, D), N, D))
def _(p, y):
    return F.mse_loss(p[0], y) + F.l1_loss(p[1], y)


case("cosine similarity per sample", SUM, VALUES, lambda p, y: 1 - F.cosine_similarity(p, y).mean())
case("root of the squared error per sample", SUM, VALUES, lambda p, y: squares(p, y).sqrt().mean())
case("worst output per sample", SUM, VALUES, lambda p, y: (p - y).abs().amax(1).mean())


@case("total variation within the sample", SUM, VALUES)
def _(p, y):
    return F.mse_loss(p, y) + p.diff(dim=1).abs().mean()


@case("correlation within the sample", SUM, VALUES)
def _(p, y):
    return -torch.stack(
        [torch.corrcoef(torch.stack(ab))[0, 1] for ab in zip(p, y, strict=True)]
    ).sum()


@case("soft dice per sample", SUM, BITS)
def _(p, y):
    s = p.sigmoid()
    return 1 - (2 * (s * y).sum(1) / (s.sum(1) + y.sum(1) + 1)).mean()


@case("squared for positive targets, absolute for others", SUM, VALUES)
def _(p, y):
    return torch.where(y > 0, (p - y) ** 2, (p - y).abs()).mean()


case("quantile loss", SUM, VALUES, lambda p, y: torch.maximum(0.9 * (y - p), 0.1 * (p - y)).mean())


@case("sum of the losses above a threshold", SUM, CLASSES)
def _(p, y):
    ce = surprise(p, y)
    return (ce * (ce > 1.5)).sum()


case("first output only", SUM, VALUES, lambda p, y: F.mse_loss(p[:, 0], y[:, 0]))


@case(
    "all predictions against all targets",
    SUM,
    VALUES,
    weights_depend_on_targets=None,
    accept_unknown=True,
)
def _(p, y):
    return (p[:, None] - y[None]).square().mean()


case("a linear loss", SUM, VALUES, lambda p, y: (p * y).sum())


@case("a mean of the targets subtracted", SUM, VALUES)
def _(p, y):
    return F.mse_loss(p, y) - F.mse_loss(y.mean(0).expand_as(y), y)


# ---------------------------------------------------------------- weights

case("weights by index", SUM, CLASSES, lambda p, y: (RISING * surprise(p, y)).sum())


@case("weights by index, in a loop", SUM, VALUES)
def _(p, y):
    return sum(0.9**n * squares(p, y)[n] for n in range(N))


case("weights of both signs", SUM, VALUES, lambda p, y: (RISING - 3.5) @ squares(p, y))
case("the first three samples", SUM, VALUES, lambda p, y: F.mse_loss(p[:3], y[:3]))


@case("weights by class frequency", SUM, CLASSES, weights_depend_on_targets=True)
def _(p, y):
    return (surprise(p, y) / torch.bincount(y, minlength=D)[y]).mean()


@case("weights by class, normalised by their sum", SUM, CLASSES, weights_depend_on_targets=True)
def _(p, y):
    return (RISING[y] * surprise(p, y)).sum() / RISING[y].sum()


case(
    "weights by softmax of the targets",
    SUM,
    VALUES,
    lambda p, y: y.sum(1).softmax(0) @ squares(p, y),
    True,
)


@case("mean over the entries that the targets keep", SUM, BITS, weights_depend_on_targets=True)
def _(p, y):
    return (p.square() * y).sum() / y.sum()


case(
    "mean over the samples that the targets keep",
    SUM,
    GROUPS,
    lambda p, y: p[y == 1].square().mean(),
    True,
)


@case("mean per sample over the entries that the targets keep", SUM, BITS)
def _(p, y):
    return ((p.square() * y).sum(1) / (1 + y.sum(1))).mean()


@case(
    "class weights beside an unweighted penalty",
    SUM,
    CLASSES,
    weights_depend_on_targets=True,
    accept_unknown=True,
)
def _(p, y):
    return F.cross_entropy(p, y, RISING) + p.square().mean()


@case("mean of the two groups' means", SUM, GROUPS, weights_depend_on_targets=True)
def _(p, y):
    return (p[y == 0].square().mean() + p[y == 1].square().mean()) / 2


# ---------------------------------------------------------------- another loss for every sample

case(
    "the index as a target",
    INDEXED,
    VALUES,
    lambda p, y: (p - torch.arange(N)[:, None]).square().sum(),
)


@case("a margin by index", INDEXED, CLASSES)
def _(p, y):
    return (RISING[:, None] - p).relu().sum() + F.cross_entropy(p, y)


@case("squared for even samples, absolute for odd ones", INDEXED, VALUES)
def _(p, y):
    return F.mse_loss(p[::2], y[::2]) + F.l1_loss(p[1::2], y[1::2])


@case("weights by index beside an unweighted penalty", INDEXED, CLASSES)
def _(p, y):
    return RISING @ surprise(p, y) + p.square().sum()


case(
    "diagonal of square predictions",
    INDEXED,
    VALUES,
    lambda p, y: (p - y).diagonal().square().sum(),
)


@case("cross-entropy to the sample's own index", INDEXED, VALUES)
def _(p, y):
    return F.cross_entropy(p, torch.arange(N))


case(
    "a temperature by index", INDEXED, CLASSES, lambda p, y: F.cross_entropy(p * RISING[:, None], y)
)

SOME_LABELLED = with_targets(lambda *_: torch.tensor([0, 1, -1, 2, 1, -1]), N, D)


@case("labelled samples by their places", SUM, SOME_LABELLED, None, True)
def _(p, y):
    places = (y >= 0).nonzero()[:, 0]
    return F.cross_entropy(p[places], y[places])


@case("labelled samples by where", SUM, SOME_LABELLED, None, True)
def _(p, y):
    return F.cross_entropy(p[torch.where(y >= 0)], y[torch.where(y >= 0)])


@case("labelled samples by a selection of rows", SUM, SOME_LABELLED, None, True)
def _(p, y):
    places = (y >= 0).nonzero().squeeze(1)
    return F.cross_entropy(p.index_select(0, places), y.index_select(0, places))


@case("entries by a selection of a mask", SUM, SOME_LABELLED, None, True)
def _(p, y):
    kept = (y >= 0)[:, None].expand_as(p)
    return p.masked_select(kept).square().mean()


@case("places of labels, moved by one", FOREIGN, SOME_LABELLED, accept_unknown=True)
def _(p, y):
    places = (y >= 0).nonzero()[:, 0]
    return F.cross_entropy(p[places], y.clamp(min=0)[(places + 1) % N])


@case("places of labels, in turned order", FOREIGN, SOME_LABELLED, accept_unknown=True)
def _(p, y):
    places = (y >= 0).nonzero()[:, 0]
    return F.cross_entropy(p[places], y[places.flip(0)])


CLOSED_OVER = torch.arange(N) % D


@case("labels in a closure", INDEXED, VALUES)
def _(p, y):
    return F.cross_entropy(p, CLOSED_OVER)


@case("a loop over samples, of two functions in turns", INDEXED, VALUES)
def _(p, y):
    total = p.new_zeros(())
    for n in range(N):
        total = total + (p[n].square().sum() if n % 2 else p[n].exp().sum() / 8)
    return total


@case("cross-entropy for one half, squares for the other", INDEXED, CLASSES)
def _(p, y):
    return F.cross_entropy(p[:3], y[:3]) + p[3:].square().mean()


@case("bits by the place in the batch", INDEXED, VALUES)
def _(p, y):
    return F.binary_cross_entropy_with_logits(p, (RISING[:, None] > 3).to(p).expand_as(p))


@case("largest of terms by index", TANGLED, VALUES)
def _(p, y):
    return (RISING[:, None] * p).max() + p.square().sum()


@case("root of a sum of terms by index", TANGLED, VALUES)
def _(p, y):
    return (p - RISING[:, None]).square().sum().sqrt()


@case("product of a sum of terms by index and a sum", TANGLED, VALUES)
def _(p, y):
    return (p - RISING[:, None]).square().sum() * p.sum()


@case("sums of terms by index stacked with a maximum", TANGLED, VALUES)
def _(p, y):
    return torch.stack([(RISING[:, None] * p.square()).sum(), p[:, 0].max()]).sum()


# --------------------------------------------------------------- other functions of separate losses

case("root mean squared error", SEPARATE, VALUES, lambda p, y: F.mse_loss(p, y).sqrt())
case(
    "root mean squared error, seven samples",
    SEPARATE,
    values(7, 3),
    lambda p, y: F.mse_loss(p, y).sqrt(),
)
case("norm of the residual", SEPARATE, VALUES, lambda p, y: (p - y).norm())
case("relative error", SEPARATE, VALUES, lambda p, y: torch.dist(p, y) / y.norm())


@case("signal-to-noise ratio in decibels", SEPARATE, VALUES)
def _(p, y):
    return -10 * torch.log10(y.square().sum() / squares(p, y).sum())


case("log of the mean", SEPARATE, CLASSES, lambda p, y: F.cross_entropy(p, y).log())
case("perplexity", SEPARATE, CLASSES, lambda p, y: F.cross_entropy(p, y).exp())
case("square of the mean", SEPARATE, CLASSES, lambda p, y: F.cross_entropy(p, y) ** 2)
case(
    "mean loss kept off zero", SEPARATE, CLASSES, lambda p, y: (F.cross_entropy(p, y) - 2).abs() + 2
)
case("logsumexp of the losses", SEPARATE, CLASSES, lambda p, y: surprise(p, y).logsumexp(0))
case(
    "geometric mean of the losses",
    SEPARATE,
    CLASSES,
    lambda p, y: surprise(p, y).log().mean().exp(),
)
case("product of the losses", SEPARATE, CLASSES, lambda p, y: surprise(p, y).prod())
case(
    "mean of the largest losses",
    SEPARATE,
    CLASSES,
    lambda p, y: surprise(p, y).topk(3).values.mean(),
)


@case("hard examples by sorting", SEPARATE, VALUES)
def _(p, y):
    return squares(p, y).sort(descending=True).values[:2].mean()


case("largest loss", SEPARATE, CLASSES, lambda p, y: surprise(p, y).max())
case("median loss", SEPARATE, CLASSES, lambda p, y: surprise(p, y).median())
case("quantile of the losses", SEPARATE, CLASSES, lambda p, y: surprise(p, y).quantile(0.8))
case(
    "largest loss, and a mean of exponentials",
    SEPARATE,
    CLASSES,
    lambda p, y: surprise(p, y).exp().mean() * surprise(p, y).max(),
)
case(
    "losses over the largest root of one",
    SEPARATE,
    CLASSES,
    lambda p, y: surprise(p, y).mean() / surprise(p, y).sqrt().max(),
)
case(
    "a sum for one factor, a length for the other",
    TANGLED,
    VALUES,
    lambda p, y: p.sum(1).exp().mean() * p.norm(dim=1).max(),
)
case(
    "losses by exponentials, and by another scalar",
    TANGLED,
    CLASSES,
    lambda p, y: surprise(p, y).exp().mean() * p.square().sum(1).sqrt().mean(),
)
case(
    "losses weighted by their rank",
    SEPARATE,
    CLASSES,
    lambda p, y: RISING @ surprise(p, y).sort().values,
)


@case("losses clipped at their median", SEPARATE, CLASSES)
def _(p, y):
    ce = surprise(p, y)
    return torch.minimum(ce, 1.2 * ce.median()).mean()


@case("mean of the losses above a threshold", SEPARATE, CLASSES, accept_unknown=True)
def _(p, y):
    ce = surprise(p, y)
    return ce[ce > 1.5].mean()


@case("mean plus largest", SEPARATE, CLASSES)
def _(p, y):
    ce = surprise(p, y)
    return ce.mean() + ce.max()


@case("mean plus variance of the losses", SEPARATE, CLASSES)
def _(p, y):
    ce = surprise(p, y)
    return ce.mean() + ce.var()


@case("mean plus spread of the losses", SEPARATE, CLASSES)
def _(p, y):
    return F.cross_entropy(p, y) + 0.1 * surprise(p, y).std()


@case("losses weighted by their own softmax", SEPARATE, CLASSES)
def _(p, y):
    ce = surprise(p, y)
    return ce.detach().softmax(0) @ ce


case(
    "losses weighted by index, squared",
    SEPARATE,
    CLASSES,
    lambda p, y: (RISING @ surprise(p, y)) ** 2,
)


@case("worst of two groups", SEPARATE, GROUPS)
def _(p, y):
    return torch.stack([surprise(p, y)[y == g].mean() for g in (0, 1)]).max()


@case("mean over chunks, then the largest", SEPARATE, VALUES)
def _(p, y):
    return torch.stack([c.mean() for c in squares(p, y).chunk(2)]).max()


case("worst entry of all", SEPARATE, VALUES, lambda p, y: (p - y).abs().max(), accept_unknown=True)
case(
    "grand mean matched",
    SEPARATE,
    VALUES,
    lambda p, y: (p.mean() - y.mean()).square(),
    accept_unknown=True,
)


@case("mean loss, an if on its size", SEPARATE, CLASSES, accept_unknown=True)
def _(p, y):
    m = F.cross_entropy(p, y)
    return m if m < 1 else m.sqrt()


# ---------------------------------------------------------------- tangled

case("product of two means", TANGLED, VALUES, lambda p, y: F.mse_loss(p, y) * F.l1_loss(p, y))


@case("root mean squared plus mean absolute error", TANGLED, VALUES)
def _(p, y):
    return F.mse_loss(p, y).sqrt() + F.l1_loss(p, y)


@case("root mean squared error per output", TANGLED, VALUES)
def _(p, y):
    return (p - y).square().mean(0).sqrt().mean()


case("worst sample per output", TANGLED, VALUES, lambda p, y: (p - y).abs().amax(0).sum())


@case("error relative to the predictions' power", TANGLED, VALUES)
def _(p, y):
    return squares(p, y).sum() / p.square().sum()


@case("cosine similarity of the flat batch", TANGLED, VALUES)
def _(p, y):
    return 1 - F.cosine_similarity(p.flatten(), y.flatten(), dim=0)


@case("soft dice over the batch", TANGLED, BITS)
def _(p, y):
    return 1 - 2 * (p.sigmoid() * y).sum() / (p.sigmoid().sum() + y.sum())


@case("soft dice per class over the batch", TANGLED, BITS)
def _(p, y):
    return 1 - (2 * (p.sigmoid() * y).sum(0) / (p.sigmoid() + y + 1).sum(0)).mean()


@case("soft Jaccard over the batch", TANGLED, with_targets(bits, 5, 8))
def _(p, y):
    s = p.sigmoid()
    return 1 - (s * y).sum() / (s + y - s * y).sum()


@case("mean normalised by the predictions' confidence", TANGLED, CLASSES)
def _(p, y):
    w = p.softmax(1).amax(1)
    return (w * surprise(p, y)).sum() / w.sum()


case("batch mean matched", TANGLED, VALUES, lambda p, y: (p.mean(0) - y.mean(0)).square().sum())


@case("entropy of the mean prediction", TANGLED, CLASSES)
def _(p, y):
    return F.cross_entropy(p, y) + (lambda m: (m * m.log()).sum())(p.softmax(1).mean(0))


@case("moments matched with a kernel", TANGLED, VALUES)
def _(p, y):
    return (-torch.cdist(p, p)).exp().mean() - 2 * (-torch.cdist(p, y)).exp().mean()


case("cross-entropy over the batch axis", TANGLED, CLASSES, lambda p, y: F.cross_entropy(p.t(), y))
case(
    "softmax over the batch axis by hand",
    TANGLED,
    CLASSES,
    lambda p, y: F.nll_loss(p.log_softmax(0), y),
)
case(
    "standardised predictions",
    TANGLED,
    VALUES,
    lambda p, y: F.mse_loss((p - p.mean(0)) / p.std(0), y),
)


@case("Pearson correlation per output", TANGLED, VALUES)
def _(p, y):
    return -F.cosine_similarity(p - p.mean(0), y - y.mean(0), dim=0).mean()


@case("contrast with the next sample", TANGLED, VALUES)
def _(p, y):
    return F.mse_loss(p, y) - 0.1 * (p - p.roll(1, 0)).abs().mean()


@case("total variation along the batch", TANGLED, VALUES)
def _(p, y):
    return F.mse_loss(p, y) + p.diff(dim=0).abs().mean()


case("Gram matrices matched", TANGLED, VALUES, lambda p, y: F.mse_loss(p @ p.t(), y @ y.t()))
case("distances matched", TANGLED, VALUES, lambda p, y: F.mse_loss(F.pdist(p), F.pdist(y)))
case(
    "off-diagonal covariance", TANGLED, VALUES, lambda p, y: torch.cov(p.t()).triu(1).square().sum()
)


@case("log-determinant of the covariance", TANGLED, values(7, 3))
def _(p, y):
    return F.mse_loss(p, y) - torch.cov(p.t()).logdet()


@case("variance of every output kept up", TANGLED, VALUES)
def _(p, y):
    return F.mse_loss(p, y) + (2 - p.std(0)).relu().mean()


@case("losses multiplied by the batch's own spread", TANGLED, VALUES)
def _(p, y):
    return F.mse_loss(p, y) * p.detach().std()


@case("hard examples by another score", TANGLED, CLASSES)
def _(p, y):
    return (p.softmax(1).amax(1).softmax(0) * surprise(p, y)).sum()


@case("a statistic that a rare where lets through", TANGLED, VALUES)
def _(p, y):
    return torch.where(p.std(0) > 50, p.mean(0), F.mse_loss(p, y)).mean()


@case("teacher centred over the batch", TANGLED, PAIRS)
def _(p, y):
    return F.cross_entropy(p[0], (p[1] - p[1].mean(0)).softmax(1).detach())


@case("concordance correlation per output", TANGLED, VALUES)
def _(p, y):
    covariance = ((p - p.mean(0)) * (y - y.mean(0))).mean(0)
    return -(2 * covariance / (p.var(0) + y.var(0) + (p.mean(0) - y.mean(0)) ** 2)).mean()


@case("InfoNCE", TANGLED, PAIRS)
def _(p, y):
    a, b = (F.normalize(v, dim=1) for v in p)
    return F.cross_entropy(a @ b.t() * 10, torch.arange(N))


@case("InfoNCE of two concatenated views", TANGLED, PAIRS)
def _(p, y):
    z = F.normalize(torch.cat(p), dim=1)
    scores = (z @ z.t() * 5).masked_fill(torch.eye(2 * N, dtype=torch.bool), -1e9)
    return F.cross_entropy(scores, torch.arange(2 * N).roll(N))


@case("triplets of the batch, hardest ones", TANGLED, GROUPS)
def _(p, y):
    distance, same = torch.cdist(p, p), y[:, None] == y
    return ((distance * same).amax(1) - (distance + 1e3 * same).amin(1) + 1).relu().mean()


@case("supervised contrast", TANGLED, GROUPS)
def _(p, y):
    z = F.normalize(p, dim=1)
    scores = (z @ z.t()).masked_fill(torch.eye(N, dtype=torch.bool), -1e9).log_softmax(1)
    return -(scores * ((y[:, None] == y) & ~torch.eye(N, dtype=torch.bool))).sum(1).mean()


@case("Barlow Twins", TANGLED, PAIRS)
def _(p, y):
    a, b = ((v - v.mean(0)) / v.std(0) for v in p)
    return (a.t() @ b / N - torch.eye(D)).square().sum()


@case(
    "Cox partial likelihood", TANGLED, lambda: (torch.randn(N), torch.rand(N)), accept_unknown=True
)
def _(p, y):
    risk = p[y.argsort(descending=True)]
    return (risk.logcumsumexp(0) - risk).mean()


@case(
    "Cox partial likelihood of competing risks", TANGLED, lambda: (torch.randn(N, 2), torch.rand(N))
)
def _(p, y):
    risk = p[y.argsort(descending=True)]
    return (risk.logcumsumexp(0) - risk).mean()


@case("pairwise ranking", TANGLED, VALUES)
def _(p, y):
    higher = y[:, None] > y[None]
    return (F.softplus(p[None] - p[:, None]) * higher).mean()


@case("distance to the class means of the batch", TANGLED, GROUPS)
def _(p, y):
    member = F.one_hot(y).to(p)
    return squares(p, member @ (member.t() @ p / member.sum(0)[:, None])).mean()


@case("connected by a loop over pairs", TANGLED, VALUES)
def _(p, y):
    return sum((p[i] - p[j]).norm() * (y[i] - y[j]).norm() for i in range(N) for j in range(i))


# ---------------------------------------------------------------- from the wild: sums

BLANK, LOW = 0, -1e4  # the blank symbol; a log-probability of about nothing


def outputs(targets, *shapes):
    """Predictions in several parts, with targets of any form."""
    return lambda: (tuple(torch.randn(N, *shape) for shape in shapes), targets())


def chosen(logs, labels):
    return logs.gather(-1, labels[..., None])[..., 0]


@case("triplet of three outputs", SUM, outputs(lambda: torch.zeros(N), (D,), (D,), (D,)))
def _(p, y):
    return F.triplet_margin_loss(*p, margin=5.0, swap=True)


@case("triplet of three outputs by cosines", SUM, outputs(lambda: torch.zeros(N), (D,), (D,), (D,)))
def _(p, y):
    def distance(a, b):
        return 1 - F.cosine_similarity(a, b)

    return F.triplet_margin_with_distance_loss(*p, distance_function=distance, reduction="sum")


@case("additive angular margin (ArcFace)", SUM, CLASSES)
def _(p, y):
    cosines = (0.9 * p.tanh()).clamp(-0.99, 0.99)
    wider = (cosines.acos() + 0.3 * F.one_hot(y, D)).cos()
    return F.cross_entropy(4 * wider, y)


@case("large margin cosine, with a penalty on the log-partition", SUM, CLASSES)
def _(p, y):
    return F.cross_entropy(p - 0.4 * F.one_hot(y, D), y) + 1e-2 * p.logsumexp(1).square().mean()


@case("several quantiles at once", SUM, values(N, 3))
def _(p, y):
    levels, short = torch.tensor([0.1, 0.5, 0.9]).to(p), y[:, :1] - p
    return torch.maximum(levels * short, (levels - 1) * short).sum(1).mean()


@case(
    "continuous ranked probability score of a Gaussian",
    SUM,
    lambda: (torch.randn(N, 2), torch.randn(N)),
)
def _(p, y):
    scale = F.softplus(p[:, 1])
    z = (y - p[:, 0]) / scale
    density = (-z.square() / 2).exp() / (2 * torch.pi) ** 0.5
    return (scale * (z * torch.erf(z / 2**0.5) + 2 * density - torch.pi**-0.5)).mean()


@case("mixture density", SUM, lambda: (torch.randn(N, 9), torch.randn(N)))
def _(p, y):
    mixture, mean, log_scale = p.split(3, 1)
    logs = torch.distributions.Normal(mean, log_scale.exp()).log_prob(y[:, None])
    return -(mixture.log_softmax(1) + logs).logsumexp(1).mean()


@case("evidential regression", SUM, lambda: (torch.randn(N, 4), torch.randn(N)))
def _(p, y):
    mean, (nu, alpha, beta) = p[:, 0], F.softplus(p[:, 1:]).unbind(1)
    alpha = alpha + 1
    omega = 2 * beta * (1 + nu)
    surprise = (
        0.5 * (torch.pi / nu).log()
        - alpha * omega.log()
        + torch.lgamma(alpha)
        - torch.lgamma(alpha + 0.5)
    )
    surprise = surprise + (alpha + 0.5) * ((y - mean) ** 2 * nu + omega).log()
    return (surprise + 0.1 * (y - mean).abs() * (2 * nu + alpha)).mean()


@case("evidential classification", SUM, CLASSES)
def _(p, y):
    alpha, hot = F.softplus(p) + 1, F.one_hot(y, D)
    total = alpha.sum(1, keepdim=True)
    risk = (
        (hot - alpha / total).square() + alpha * (total - alpha) / (total**2 * (total + 1))
    ).sum(1)
    other = hot + (1 - hot) * alpha
    excess = (other - 1) * (other.digamma() - other.sum(1, keepdim=True).digamma())
    return (risk + 0.1 * (other.sum(1).lgamma() - other.lgamma().sum(1) + excess.sum(1))).mean()


@case("evidence lower bound", SUM, outputs(lambda: bits(N, D), (D,), (3,), (3,)))
def _(p, y):
    decoded, mean, log_variance = p
    divergence = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum()
    return (F.binary_cross_entropy_with_logits(decoded, y, reduction="sum") + divergence) / len(y)


@case("likelihood of a normalising flow", SUM, outputs(lambda: torch.zeros(N), (D,), ()))
def _(p, y):
    latent, log_determinant = p
    return -(torch.distributions.Normal(0.0, 1.0).log_prob(latent).sum(1) + log_determinant).mean()


@case(
    "distillation",
    SUM,
    with_targets(lambda n, d: (torch.randint(d, (n,)), torch.randn(n, d)), N, D),
)
def _(p, y):
    labels, teacher = y
    soft = F.kl_div((p / 2).log_softmax(1), (teacher / 2).softmax(1), reduction="batchmean")
    return 0.3 * F.cross_entropy(p, labels) + 0.7 * 4 * soft


@case("direct preference", SUM, outputs(lambda: (torch.randn(N), torch.randn(N)), (), ()))
def _(p, y):
    return -F.logsigmoid(0.1 * ((p[0] - y[0]) - (p[1] - y[1]))).mean()


@case(
    "direct preference of token sequences",
    SUM,
    outputs(lambda: torch.randint(D, (N, 2, T)), (T, D), (T, D)),
)
def _(p, y):
    better, worse = (chosen(logits.log_softmax(2), y[:, i]).sum(1) for i, logits in enumerate(p))
    return -F.logsigmoid(0.5 * (better - worse)).mean()


def rollout():
    return torch.randint(D, (N,)), torch.rand(N) - 2, torch.randn(N), torch.randn(N)


@case(
    "proximal policy, advantages normalised over the batch",
    SUM,
    outputs(rollout, (D,), ()),
    weights_depend_on_targets=None,
)
def _(p, y):
    actions, old, advantages, returns = y
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    return proximal(*p, actions, old, advantages, returns)


@case("proximal policy", SUM, outputs(rollout, (D,), ()))
def _(p, y):
    return proximal(*p, *y)


def proximal(logits, value, actions, old, advantages, returns):
    logs = logits.log_softmax(1)
    ratio = (chosen(logs, actions) - old).exp()
    policy = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()
    return -policy + 0.5 * F.mse_loss(value, returns) + 0.01 * (logs.exp() * logs).sum(1).mean()


@case(
    "temporal difference, by a target network",
    SUM,
    with_targets(lambda n, d: (torch.randint(d, (n,)), *torch.randn(2, n)), N, D),
)
def _(p, y):
    actions, rewards, following = y
    return F.smooth_l1_loss(chosen(p, actions), rewards + 0.9 * following)


@case("non-saturating adversary", SUM, outputs(lambda: torch.zeros(N), (1,), (1,)))
def _(p, y):
    return F.softplus(-p[0]).mean() + F.softplus(p[1]).mean()


@case(
    "noise predicted, weighted by its level",
    SUM,
    with_targets(lambda n, d: (torch.randn(n, d), torch.rand(n)), N, D),
    weights_depend_on_targets=None,
)
def _(p, y):
    noise, level = y
    return (((1 - level) / level).clamp(max=5) * squares(p, noise)).mean()


@case("overlap of boxes (GIoU)", SUM, with_targets(lambda n, d: torch.rand(n, 4), N, 4))
def _(p, y):
    (a, b), (c, d) = (corners(t) for t in (p, y))
    area = ((torch.minimum(b, d) - torch.maximum(a, c)).clamp(min=0)).prod(1)
    union = (b - a).prod(1) + (d - c).prod(1) - area
    hull = (torch.maximum(b, d) - torch.minimum(a, c)).prod(1)
    return (1 - area / union + (hull - union) / hull).mean()


def corners(box):
    low = box[:, :2].sigmoid()
    return low, low + 0.2 + box[:, 2:].sigmoid()


@case("structural similarity of images", SUM, values(N, 1, 5, 5))
def _(p, y):
    (mp, my), (pp, yy, py) = (
        (F.avg_pool2d(t, 3, 1) for t in ts) for ts in ((p, y), (p * p, y * y, p * y))
    )
    likeness = (2 * mp * my + 0.1) * (2 * (py - mp * my) + 0.9)
    return 1 - (likeness / ((mp**2 + my**2 + 0.1) * (pp - mp**2 + yy - my**2 + 0.9))).mean()


@case("distance between sets of points (Chamfer)", SUM, values(N, T, 2))
def _(p, y):
    apart = (p[:, :, None] - y[:, None]).square().sum(3)
    return (apart.amin(1) + apart.amin(2)).sum(1).mean()


@case("likelihood of an order (ListMLE)", SUM, VALUES)
def _(p, y):
    ranked = p.gather(1, y.argsort(1, descending=True))
    return (ranked.flip(1).logcumsumexp(1).flip(1) - ranked).sum(1).mean()


@case("optimal transport within the sample", SUM, VALUES)
def _(p, y):
    cost, potential = (p.sigmoid()[:, :, None] - y.sigmoid()[:, None]).square(), torch.zeros_like(p)
    for _ in range(4):
        other = -((potential[:, :, None] - cost) / 0.3).logsumexp(1) * 0.3
        potential = -((other[:, None] - cost) / 0.3).logsumexp(2) * 0.3
    return (((potential[:, :, None] + other[:, None] - cost) / 0.3).exp() * cost).sum((1, 2)).mean()


def lovasz_slopes(hits):
    """Of the Lovász extension of the Jaccard loss, for labels in the order of falling errors
    (Berman et al. 2018).
    """
    total = hits.sum(-1, keepdim=True)
    jaccard = 1 - (total - hits.cumsum(-1)) / (total + (1 - hits).cumsum(-1))
    return torch.cat([jaccard[..., :1], jaccard.diff(dim=-1)], -1)


def lovasz_hinge(p, y):
    errors, order = (1 - p * (2 * y - 1)).sort(-1, descending=True)
    return (errors.relu() * lovasz_slopes(y.gather(-1, order))).sum(-1)


HITS = lambda: (torch.randn(N, D), torch.tensor([1.0, 0, 1, 0, 0, 1]).repeat(N, 1))  # noqa: E731

case("Lovász hinge per sample", SUM, HITS, lambda p, y: lovasz_hinge(p, y).mean())


@case(
    "temporal classification by hand",
    SUM,
    lambda: (torch.randn(N, 5, 4), torch.randint(1, 4, (N, 2))),
)
def _(p, y):
    """The forward recursion of CTC over labels with blanks between them."""
    logs, (n, length) = p.log_softmax(2), y.shape
    states = F.pad(y[:, :, None], (1, 0), value=BLANK).flatten(1)
    states = F.pad(states, (0, 1), value=BLANK)
    skips = F.pad((states[:, 2:] != BLANK) & (states[:, 2:] != states[:, :-2]), (2, 0), value=False)
    emitted = logs.gather(2, states[:, None].expand(n, p.shape[1], 2 * length + 1))
    alpha = emitted[:, 0].masked_fill(torch.arange(2 * length + 1) > 1, LOW)
    for t in range(1, p.shape[1]):
        one, two = (F.pad(alpha, (k, 0), value=LOW)[:, :-k] for k in (1, 2))
        alpha = emitted[:, t] + torch.stack([alpha, one, two.masked_fill(~skips, LOW)]).logsumexp(0)
    return -alpha[:, -2:].logsumexp(1).mean()


@case(
    "transducer (RNN-T) over a lattice",
    SUM,
    lambda: (torch.randn(N, 3, 3, 4), torch.randint(1, 4, (N, 2))),
)
def _(p, y):
    logs = p.log_softmax(3)
    blank = logs[..., BLANK]
    label = chosen(logs[:, :, :-1], y[:, None].expand(-1, p.shape[1], -1))
    alpha: dict = {}
    for t in range(p.shape[1]):
        for u in range(p.shape[2]):
            ways = [alpha[t - 1, u] + blank[:, t - 1, u]] if t else []
            ways += [alpha[t, u - 1] + label[:, t, u - 1]] if u else []
            alpha[t, u] = (
                torch.stack(ways).logsumexp(0) if ways else torch.zeros_like(blank[:, 0, 0])
            )
    return -(alpha[t, u] + blank[:, -1, -1]).mean()


@case(
    "linear-chain random field",
    SUM,
    with_targets(lambda n, t, d: torch.randint(d, (n, t)), N, T, 3),
)
def _(p, y):
    steps = torch.tensor([[0.5, -0.2, 0.1], [0.0, 0.3, -0.4], [0.2, 0.1, 0.0]]).to(p)
    alpha, score = p[:, 0], chosen(p, y).sum(1) + steps[y[:, :-1], y[:, 1:]].sum(1)
    for t in range(1, p.shape[1]):
        alpha = (alpha[:, :, None] + steps).logsumexp(1) + p[:, t]
    return (alpha.logsumexp(1) - score).mean()


@case("residual of a differential equation", SUM, outputs(lambda: torch.randn(N), (), (), ()))
def _(p, y):
    value, by_time, twice_by_space = p
    return (by_time + value * value - 0.1 * twice_by_space).square().mean() + 0.5 * F.mse_loss(
        value, y
    )


@case(
    "policy gradient, advantages normalised over the batch",
    SUM,
    with_targets(lambda n, d: (torch.randint(d, (n,)), torch.randn(n)), N, D),
    weights_depend_on_targets=True,
)
def _(p, y):
    actions, advantages = y
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    return -(advantages * chosen(p.log_softmax(1), actions)).mean()


# ---------------------------------------------------------------- from the wild: not sums


@case("group-wise worst case, smoothed (DRO)", SEPARATE, CLASSES)
def _(p, y):
    return 0.5 * (surprise(p, y) / 0.5).logsumexp(0)


@case("tail of the losses (CVaR)", SEPARATE, CLASSES)
def _(p, y):
    losses = surprise(p, y)
    return 1.5 + (losses - 1.5).relu().mean().square()


@case("CLIP", TANGLED, PAIRS)
def _(p, y):
    image, text = (F.normalize(v, dim=1) for v in p)
    scores, own = 3 * image @ text.t(), torch.arange(N)
    return (F.cross_entropy(scores, own) + F.cross_entropy(scores.t(), own)) / 2


@case("sigmoid of pairs (SigLIP)", TANGLED, PAIRS)
def _(p, y):
    image, text = (F.normalize(v, dim=1) for v in p)
    return -F.logsigmoid((2 * torch.eye(N) - 1).to(image) * (3 * image @ text.t() - 1)).sum() / N


@case("VICReg", TANGLED, PAIRS)
def _(p, y):
    spread = sum((1 - (v.var(0) + 1e-4).sqrt()).relu().mean() for v in p)
    covariances = [torch.cov(v.t()) for v in p]
    apart = sum((c - c.diagonal().diag()).square().sum() / D for c in covariances)
    return 25 * F.mse_loss(*p) + 25 * spread + apart


@case(
    "supervised contrast of two views",
    TANGLED,
    pairs(lambda: torch.tensor([0, 0, 1, 1, 0, 1]), N, D),
)
def _(p, y):
    z, labels, other = (
        F.normalize(torch.cat(p), dim=1),
        y.repeat(2),
        ~torch.eye(2 * N, dtype=torch.bool),
    )
    logs = (z @ z.t() / 0.5).masked_fill(~other, -1e9).log_softmax(1)
    same = (labels[:, None] == labels) & other
    return -((logs * same).sum(1) / same.sum(1)).mean()


def lifetimes():
    return torch.randn(N, 1), (torch.rand(N), torch.tensor([1.0, 1, 0, 1, 0, 1]))


@case("Cox partial likelihood with censoring", TANGLED, lifetimes, accept_unknown=True)
def _(p, y):
    times, seen = y
    at_risk = times[None] >= times[:, None]
    hazard = p[:, 0][None].masked_fill(~at_risk, -1e9).logsumexp(1)
    return -((p[:, 0] - hazard) * seen).sum() / seen.sum()


@case("Lovász hinge over the batch", TANGLED, HITS)
def _(p, y):
    return lovasz_hinge(p.flatten(), y.flatten())


@case("Lovász softmax over the batch", TANGLED, fixed([0, 1, 2, 2, 1, 0], 3))
def _(p, y):
    def of_class(c):
        hits = (y == c).to(p)
        errors, order = (hits - p.softmax(1)[:, c]).abs().sort(descending=True)
        return errors @ lovasz_slopes(hits[order])

    return torch.stack([of_class(c) for c in range(3)]).mean()


@case("focal Tversky over the batch", TANGLED, BITS)
def _(p, y):
    s = p.sigmoid()
    hit, missed, wrong = (s * y).sum(), ((1 - s) * y).sum(), (s * (1 - y)).sum()
    return (1 - hit / (hit + 0.7 * missed + 0.3 * wrong)) ** 0.75


@case("balanced load of experts", TANGLED, VALUES)
def _(p, y):
    share = F.one_hot(p.argmax(1), D).to(p).mean(0)
    return F.mse_loss(p, y) + D * (share * p.softmax(1).mean(0)).sum()


@case("kernel alignment", TANGLED, VALUES)
def _(p, y):
    a, b = (v - v.mean(0) for v in (p, y))
    return 1 - (a.t() @ b).square().sum() / ((a.t() @ a).norm() * (b.t() @ b).norm())


@case("independence of the two outputs (HSIC)", TANGLED, PAIRS)
def _(p, y):
    a, b = ((-(v[:, None] - v[None]).square().sum(2) / D).exp() for v in p)
    centre = (torch.eye(N) - 1 / N).to(a)
    return (a @ centre @ b @ centre).trace() / (N - 1) ** 2


@case("proximal policy, advantages relative to its own values", TANGLED, outputs(rollout, (D,), ()))
def _(p, y):
    actions, old, _, returns = y
    advantages = returns - p[1].detach()
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    return proximal(*p, actions, old, advantages, returns)


@case("labels mixed with those of other samples", FOREIGN, CLASSES, accept_unknown=True)
def _(p, y):
    return 0.7 * F.cross_entropy(p, y) + 0.3 * F.cross_entropy(p, y.flip(0))
