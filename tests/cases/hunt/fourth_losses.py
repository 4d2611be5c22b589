"""Losses as training scripts have them, and losses that a rule of the analysis may forget."""

from collections import Counter

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from cases.hunt.losses import table
from cases.hunt.third_losses import own, predict
from cases.losses import INDEXED, SEPARATE, SUM, TANGLED, D, N, classes, values, with_targets

# No function of one number per sample adds up to it, and still each prediction is one number.
ONE_NUMBER_EACH = ("fails", "holds")

VALUES, CLASSES, SCALARS = values(N, D), classes(N, D), values(N, 1)
TOKENS = with_targets(lambda n, t, c: torch.randint(c, (n, t)), N, 4, D)
BITS = with_targets(lambda n, c: (torch.rand(n, c) < 0.4).float(), N, D)


def two(width=D):
    return lambda: ((torch.randn(N, width), torch.randn(N, width)), torch.randn(N, width))


def squares(p, y):
    return (p - y).square().sum(1)


def surprise(p, y):
    return F.cross_entropy(p, y, reduction="none")


# ---------------------------------------------------------------- sums


def classes_in_balance(p, y):
    """Weights by the effective number of samples of each class in the batch."""
    counts = F.one_hot(y, D).sum(0)
    weights = 0.1 / (1 - 0.9 ** counts.clamp(min=1))
    return F.cross_entropy(p, y, weight=weights)


def edges_in_balance(p, y):
    """As of an edge detector: positives weigh as much as negatives in the batch (HED)."""
    positive, negative = y.sum(), (1 - y).sum()
    weights = torch.where(y > 0.5, negative, positive) / (positive + negative)
    return F.binary_cross_entropy(p.sigmoid(), y, weight=weights)


def positives_weighed(p, y):
    rate = (1 - y).sum(0) / y.sum(0).clamp(min=1)
    return F.binary_cross_entropy_with_logits(p, y, pos_weight=rate)


def counted_by_python(p, y):
    counts = Counter(y.tolist())
    weights = torch.tensor([1 / counts[label] for label in y.tolist()])
    return (surprise(p, y) * weights).sum()


def counted_by_numpy(p, y):
    labels, counts = np.unique(y.numpy(), return_counts=True)
    weights = torch.ones(D)
    weights[torch.from_numpy(labels)] = torch.from_numpy(1 / counts).float()
    return (surprise(p, y) * weights[y]).mean()


def mean_of_means_of_classes(p, y):
    one_hot = F.one_hot(y, D).float()
    by_class = (one_hot * surprise(p, y)[:, None]).sum(0) / one_hot.sum(0).clamp(min=1)
    return by_class.mean()


def weighted_error(p, y):
    return (p - y).abs().sum() / y.abs().sum()


def relative_error(p, y):
    return ((p - y).norm(dim=1) / y.norm(dim=1)).mean()


def symmetric_percentage(p, y):
    return (2 * (p - y).abs() / (p.abs() + y.abs() + 1e-6)).mean()


def boxes_and_backgrounds(p, y):
    """Boxes where there are objects, and quiet where there are none."""
    objects = y[:, 0] > 0
    box = F.smooth_l1_loss(p[objects], y[objects], reduction="sum") / objects.sum().clamp(min=1)
    return box + 0.5 * p[~objects].square().sum() / (~objects).sum().clamp(min=1)


def confident_alone(p, y):
    """Pseudo-labels of those that are sure, averaged over the batch (FixMatch)."""
    q = p.detach().softmax(1)
    sure, label = q.max(1)
    return (surprise(p, label) * (sure > 0.5)).mean()


def two_passes_alike(p, y):
    """Both passes are right and agree (R-Drop)."""
    a, b = p[0].log_softmax(1), p[1].log_softmax(1)
    both = F.kl_div(a, b.exp(), reduction="batchmean") + F.kl_div(b, a.exp(), reduction="batchmean")
    return squares(p[0], y).mean() + squares(p[1], y).mean() + both


def free_bits(p, y):
    mean, spread = p
    divergence = 0.5 * (mean.square() + spread.exp() - 1 - spread)
    return squares(mean, y).mean() + divergence.clamp(min=0.1).sum(1).mean()


def advantage_over_the_mean(p, y):
    return -(p[:, 0] * (y[:, 0] - y[:, 0].mean())).mean()


def advantages_in_groups(p, y):
    """Rewards are compared within groups of answers to one prompt (GRPO)."""
    r = y[:, 0].view(2, 3)
    a = ((r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-4)).view(-1)
    return -(p.log_softmax(1)[:, 0] * a).mean()


def huberised_action_values(p, y):
    action = y[:, :1].abs().long().clamp(max=D - 1)
    return F.smooth_l1_loss(p.gather(1, action)[:, 0], y[:, 1] + 0.9 * y[:, 2])


def by_token(p, y):
    return F.cross_entropy(p.transpose(1, 2), y, ignore_index=0)


def by_sequence(p, y):
    """The mean over the tokens of each sample that count, then over the samples."""
    kept = (y > 0).float()
    loss = F.cross_entropy(p.transpose(1, 2), y, reduction="none")
    return ((loss * kept).sum(1) / kept.sum(1).clamp(min=1)).mean()


def by_token_without_ignoring(p, y):
    kept = y != 0
    return F.cross_entropy(p[kept], y[kept])


def poly(p, y):
    ce = surprise(p, y)
    return (ce + 1 - (-ce).exp()).mean()


def margins_by_class(p, y):
    """Margins by how rare a class is in the data (LDAM)."""
    margins = torch.tensor([40.0, 30, 20, 10, 5, 1]) ** -0.25
    one_hot = F.one_hot(y, D).to(p.dtype)
    return F.cross_entropy(8 * (p - one_hot * margins), y)


def overlap_by_sample(p, y):
    q = p.sigmoid()
    return (1 - 2 * (q * y).sum(1) / (q.sum(1) + y.sum(1) + 1)).mean()


def hazards(p, y):
    """A likelihood of survival times in intervals."""
    time = y.abs().sum(1).long().clamp(max=D - 1)
    before = torch.arange(D) < time[:, None]
    hazard = p.gather(1, time[:, None])[:, 0]
    return -(F.logsigmoid(hazard) + (F.logsigmoid(-p) * before).sum(1)).mean()


def in_micro_batches(p, y):
    total = 0.0
    for a, b in zip(p.split(2), y.split(2), strict=True):
        total = total + F.mse_loss(a, b) / 3
    return total


def accumulated(p, y):
    losses = []
    for i in range(N):
        losses.append(F.mse_loss(p[i], y[i]))
    return torch.stack(losses).mean()


def by_vmap(p, y):
    return torch.vmap(F.mse_loss)(p, y).mean()


def by_einsum(p, y):
    r = p - y
    return torch.einsum("ni,ij,nj->", r, torch.eye(D) + 0.1, r) / N


table(
    SUM,
    CLASSES,
    {
        "classes in balance": classes_in_balance,
        "classes counted by Python": counted_by_python,
        "classes counted by numpy": counted_by_numpy,
        "mean of the means of classes": mean_of_means_of_classes,
    },
    True,
    accept_unknown=True,
)
table(SUM, BITS, {"positives weighed by the batch": positives_weighed}, True, accept_unknown=True)
# A weight for each entry, by its own target and those of all.
table(SUM, BITS, {"edges in balance": edges_in_balance}, None, accept_unknown=True)
# A factor that is the same for all entries, given as their weight.
table(
    SUM,
    BITS,
    {
        "over the positives, as a weight": lambda p, y: F.binary_cross_entropy(
            p.sigmoid(), y, weight=1 / y.sum(), reduction="sum"
        ),
        "over the positives, as a divisor": lambda p, y: torch.addcdiv(
            torch.zeros(N), squares(p, y), y.sum()
        ).sum(),
    },
    True,
    accept_unknown=True,
)
table(
    SUM,
    BITS,
    {
        "over the positives, as a factor": lambda p, y: torch.addcmul(
            torch.zeros(N), squares(p, y), 1 / y.sum()
        ).sum(),
    },
    True,
    accept_unknown=True,
)
table(
    SUM,
    CLASSES,
    {
        "classes in balance, summed": lambda p, y: F.cross_entropy(
            p, y, weight=1 / (1 + F.one_hot(y, D).sum(0)), reduction="sum"
        ),
        "margins in balance, summed": lambda p, y: F.multi_margin_loss(
            p, y, weight=1 / (1 + F.one_hot(y, D).sum(0)), reduction="sum"
        ),
    },
    True,
    accept_unknown=True,
)
table(
    SUM,
    BITS,
    {
        "a weight each, of the op": lambda p, y: F.binary_cross_entropy(
            p.sigmoid(), y, weight=torch.arange(1.0, N + 1)[:, None]
        ),
        "over each one's own size": lambda p, y: torch.addcdiv(
            torch.zeros(N), squares(p, y), 1 + p.square().sum(1)
        ).sum(),
    },
    False,
    accept_unknown=True,
)
table(
    SUM,
    VALUES,
    {
        "error over the size of all targets": weighted_error,
        "advantage over the mean": advantage_over_the_mean,
        "advantages in groups": advantages_in_groups,
        "weighted by the targets' softmax": lambda p, y: squares(p, y) @ y[:, 0].softmax(0),
        "less than the targets' median": lambda p, y: (
            squares(p, y) * (y[:, 0] < y[:, 0].median())
        ).mean(),
        "over the targets' variance": lambda p, y: F.mse_loss(p, y) / y.var(),
    },
    True,
    accept_unknown=True,
)
table(
    SUM,
    VALUES,
    {
        "error relative to each target": relative_error,
        "symmetric percentage": symmetric_percentage,
        "Huber of action values": huberised_action_values,
        "hazards": hazards,
        "in micro-batches": in_micro_batches,
        "sample by sample, stacked": accumulated,
        "by vmap": by_vmap,
        "by einsum": by_einsum,
        "boxes and backgrounds": boxes_and_backgrounds,
        "confident ones alone": confident_alone,
        "a Gaussian of fixed width": lambda p, y: F.gaussian_nll_loss(
            p, y, torch.full((N, D), 0.5)
        ),
        "Poisson counts": lambda p, y: F.poisson_nll_loss(p, y.abs().round()),
        "cosines to targets": lambda p, y: (1 - F.cosine_similarity(p, y)).mean(),
        "cosines to targets, by labels": lambda p, y: F.cosine_embedding_loss(
            p, y, torch.where(y[:, 0] > 0, 1, -1), margin=0.2
        ),
        "peak signal by sample": lambda p, y: (
            10 * (p - y).square().mean(1).add(1e-6).log10()
        ).mean(),
        "a quantile": lambda p, y: torch.maximum(0.9 * (y - p), -0.1 * (y - p)).mean(),
    },
    None,
    accept_unknown=True,
)
table(
    SUM,
    two(),
    {
        "two passes alike": two_passes_alike,
        "free bits by entry": free_bits,
        "a Gaussian of own width": lambda p, y: F.gaussian_nll_loss(p[0], y, p[1].exp()),
        "triplet with given others": lambda p, y: F.triplet_margin_loss(p[0], p[1], y),
    },
    None,
    accept_unknown=True,
)
table(SUM, TOKENS, {"mean over all tokens that count": by_token}, True, accept_unknown=True)
table(
    SUM,
    TOKENS,
    {"tokens that count, selected": by_token_without_ignoring},
    True,
    accept_unknown=True,
)
table(SUM, TOKENS, {"mean over each sample's tokens": by_sequence}, False, accept_unknown=True)
table(
    SUM,
    CLASSES,
    {"a polynomial of the loss": poly, "margins by class": margins_by_class},
    accept_unknown=True,
)
table(SUM, BITS, {"overlap by sample": overlap_by_sample}, None, accept_unknown=True)


# ---------------------------------------------------------------- other functions of losses


def focal_of_the_mean(p, y):
    ce = F.cross_entropy(p, y)
    return (1 - (-ce).exp()) ** 2 * ce


def hard_examples(p, y):
    return surprise(p, y).topk(3).values.mean()


def median_of_means(p, y):
    return squares(p, y).view(3, 2).mean(1).median()


def trimmed(p, y):
    return squares(p, y).sort().values[1:-1].mean()


table(
    SEPARATE,
    CLASSES,
    {"focal loss of the mean": focal_of_the_mean, "the hardest three": hard_examples},
    None,
    accept_unknown=True,
)
table(
    SEPARATE,
    VALUES,
    {
        "root of the mean square": lambda p, y: F.mse_loss(p, y).sqrt(),
        "log of the mean square": lambda p, y: F.mse_loss(p, y).log(),
        "root of the mean square over the range": lambda p, y: (
            F.mse_loss(p, y).sqrt() / (y.max() - y.min())
        ),
        "relative error of the batch": lambda p, y: (p - y).norm() / y.norm(),
        "trimmed": trimmed,
        "spread of the losses": lambda p, y: squares(p, y).mean() + squares(p, y).std(),
        "losses in a power mean": lambda p, y: squares(p, y).pow(3).mean().pow(1 / 3),
        "worst and mean": lambda p, y: squares(p, y).amax() + squares(p, y).mean(),
        "tilted": lambda p, y: (0.5 * squares(p, y)).logsumexp(0) / 0.5,
        "weighted by their detached softmax": lambda p, y: (
            squares(p, y) * squares(p, y).detach().softmax(0)
        ).sum(),
    },
    None,
    accept_unknown=True,
)
# Which samples are in a group counts: no symmetric function of the losses, but one of them.
table(SEPARATE, VALUES, {"median of means": median_of_means}, None, accept_unknown=True)


# ---------------------------------------------------------------- samples that interact


def certain_and_diverse(p, y):
    """Each certain, and all together spread over the classes (SHOT)."""
    q = p.softmax(1)
    own = -(q * q.log()).sum(1).mean()
    mean = q.mean(0)
    return own + (mean * mean.log()).sum()


def confident_average(p, y):
    sure, label = p.detach().softmax(1).max(1)
    kept = sure > 0.4
    return (surprise(p, label) * kept).sum() / kept.sum().clamp(min=1)


def free_bits_of_the_batch(p, y):
    mean, spread = p
    divergence = 0.5 * (mean.square() + spread.exp() - 1 - spread)
    return squares(mean, y).mean() + divergence.mean(0).clamp(min=0.1).sum()


def capacity(p, y):
    mean, spread = p
    divergence = 0.5 * (mean.square() + spread.exp() - 1 - spread).sum(1).mean()
    return squares(mean, y).mean() + (divergence - 3).abs()


def soft_f1(p, y):
    q = p.sigmoid()
    hit = (q * y).sum(0)
    return 1 - (2 * hit / (q.sum(0) + y.sum(0) + 1e-6)).mean()


def quadratic_kappa(p, y):
    q, one_hot = p.softmax(1), F.one_hot(y, D).float()
    place = torch.arange(D)
    cost = (place[:, None] - place).square().float()
    seen = (one_hot @ cost * q).sum()
    return seen / (one_hot.sum(0) @ cost @ q.sum(0) / N)


def total_percentage(p, y):
    return (p - y).abs().sum() / (p.abs() + y.abs()).sum()


def sliced_distance(p, y):
    directions = torch.linspace(-1, 1, 3 * D).view(D, 3)
    return ((p @ directions).sort(0).values - (y @ directions).sort(0).values).abs().mean()


def softened_teacher_of_the_batch(p, y):
    return F.kl_div(p.log_softmax(0), y.softmax(0), reduction="batchmean")


def explained_variance(p, y):
    return 1 - (y - p).var(0).sum() / y.var(0).sum()


def preferred_pairs(p, y):
    score = p.mean(1)
    return -F.logsigmoid(score[::2] - score[1::2]).mean()


def relative_to_the_average(p, y):
    """Real ones are to be more real than the average fake one (relativistic)."""
    real, fake = p
    return F.softplus(-(real - fake.mean(0))).mean() + F.softplus(fake - real.mean(0)).mean()


def matched_moments(p, y):
    return (p.mean(0) - y.mean(0)).square().sum() + (p.T @ p - y.T @ y).square().mean() / N


table(
    TANGLED,
    VALUES,
    {
        "each certain, all diverse": certain_and_diverse,
        "average of the confident": confident_average,
        "percentage of totals": total_percentage,
        "sliced distance": sliced_distance,
        "divergence along the wrong axis": softened_teacher_of_the_batch,
        "explained variance": explained_variance,
        "preferred pairs": preferred_pairs,
        "matched moments": matched_moments,
        "correlation of each output": lambda p, y: (
            1 - F.cosine_similarity(p - p.mean(0), y - y.mean(0), dim=0).mean()
        ),
        "the largest of each output": lambda p, y: (p - y).square().amax(0).sum(),
        "cosine along the batch": lambda p, y: (1 - F.cosine_similarity(p, y, dim=0)).mean(),
    },
    None,
    accept_unknown=True,
)
table(TANGLED, BITS, {"F1 by class": soft_f1}, None, accept_unknown=True)
table(TANGLED, CLASSES, {"quadratic kappa": quadratic_kappa}, None, accept_unknown=True)
table(
    TANGLED,
    two(),
    {
        "free bits of the batch": free_bits_of_the_batch,
        "a capacity for the divergence": capacity,
        "relative to the average": relative_to_the_average,
    },
    None,
    accept_unknown=True,
)


# ---------------------------------------------------------------- made with the source in hand


RISING = torch.linspace(1, 2, N)
TWO_SCALARS = lambda: ((torch.randn(N), torch.randn(N)), torch.randn(N))  # noqa: E731


def totals(p):
    return p[0].sum(), p[1].sum()


def product_of_sum_and_difference(p, y):
    a, b = totals(p)
    return (a + b) * (a - b)


def product_of_sums_scaled(p, y):
    a, b = totals(p)
    return (a + b) * (2 * a + 2 * b)


def product_of_sums_exchanged(p, y):
    a, b = totals(p)
    return (a + b) * (b + a)


table(
    SUM,
    VALUES,
    {
        "weights by einsum": lambda p, y: torch.einsum("n,ni->", RISING, (p - y).square()),
        "weights by bmm": lambda p, y: torch.bmm(
            RISING[:, None, None], (p - y).square()[:, None]
        ).sum(),
        "weighted residuals squared": lambda p, y: (RISING[:, None] * (p - y)).square().sum(),
        "weights by a diagonal matrix": lambda p, y: (torch.diag(RISING) @ (p - y)).square().sum(),
        "trace of the residuals' products": lambda p, y: ((p - y) @ (p - y).T).trace(),
        "norms of the rows": lambda p, y: (p - y).norm(dim=1).sum(),
        "variance within each": lambda p, y: (p - y).var(1).mean(),
        "counted": lambda p, y: (p > 0).sum().float() + 0 * p.sum(),
        "in bfloat16": lambda p, y: (p.bfloat16() - y.bfloat16()).square().mean(),
        "summed in float16": lambda p, y: (p.half() - y.half()).square().sum().float(),
        "where finite": lambda p, y: torch.where(
            torch.isfinite(squares(p, y)), squares(p, y), 0.0
        ).mean(),
        "first half against second": lambda p, y: squares(p, y)[:3].sum() - squares(p, y)[3:].sum(),
        "weighed by chance": lambda p, y: (torch.rand(N) * squares(p, y)).mean(),
        "half by chance": lambda p, y: squares(p, y)[torch.randperm(N)[:3]].mean(),
        "weights by vmap": lambda p, y: torch.vmap(lambda a, b, w: w * F.mse_loss(a, b))(
            p, y, RISING
        ).sum(),
        "sorted within each": lambda p, y: (p.sort(1).values - y.sort(1).values).square().mean(),
        "large targets": lambda p, y: F.mse_loss(p, 1e6 * y),
        "one weight for each entry, of rank one": lambda p, y: (
            RISING[:, None] * RISING * (p - y).square()
        ).sum(),
    },
    None,
    accept_unknown=True,
)
table(
    SUM,
    VALUES,
    {
        "Huber at the targets' median": lambda p, y: F.huber_loss(
            p, y, delta=y.abs().median().item()
        ),
        "a weight each by Python": lambda p, y: sum(
            loss * w
            for loss, w in zip(squares(p, y), (y[:, 0] / y[:, 0].sum()).tolist(), strict=True)
        ),
        "those of the largest targets": lambda p, y: squares(p, y)[y[:, 0].topk(3).indices].mean(),
        "that of the largest target": lambda p, y: squares(p, y)[y[:, 0].argmax()],
        "weights by rank of the targets": lambda p, y: (
            squares(p, y) * y[:, 0].argsort().argsort()
        ).sum(),
        "weights by running sums of targets": lambda p, y: (
            squares(p, y) * y[:, 0].cumsum(0)
        ).sum(),
        "weights by a kernel of the targets": lambda p, y: (
            squares(p, y) * torch.linalg.solve(y @ y.T + torch.eye(N), torch.ones(N))
        ).sum(),
    },
    True,
    accept_unknown=True,
)
table(
    INDEXED,
    VALUES,
    {
        "weighted residuals in a logarithm": lambda p, y: (
            (RISING[:, None] * (p - y)).abs().log1p().sum()
        ),
        "weights of rank two": lambda p, y: (
            (RISING[:, None] * RISING + torch.eye(N)) * (p - y).square()
        ).sum(),
        "an entry of each, by place": lambda p, y: (p - y).diagonal().square().sum(),
        "the upper part": lambda p, y: (p - y).triu().square().sum(),
        "signs by place": lambda p, y: F.cosine_embedding_loss(
            p, y, torch.tensor([1, -1, 1, 1, -1, 1])
        ),
    },
    None,
    accept_unknown=True,
)
table(
    INDEXED,
    TWO_SCALARS,
    {
        "weights of two kinds": lambda p, y: (RISING * p[0]).sum() + (RISING.flip(0) * p[1]).sum(),
        "weights of one of two": lambda p, y: (RISING * p[0]).sum() + p[1].sum(),
    },
    None,
    accept_unknown=True,
)
table(
    SEPARATE,
    TWO_SCALARS,
    {
        "product of sums, scaled": product_of_sums_scaled,
        "product of sums, exchanged": product_of_sums_exchanged,
        "square of a difference of totals": lambda p, y: (p[0].sum() - p[1].sum()).square(),
    },
    None,
    accept_unknown=True,
)
table(
    TANGLED,
    TWO_SCALARS,
    {
        "product of sum and difference": product_of_sum_and_difference,
        "product of totals": lambda p, y: p[0].sum() * p[1].sum(),
        "square of totals of two weights": lambda p, y: (
            (RISING * p[0]).sum() + (RISING.flip(0) * p[1]).sum()
        ).square(),
        "a sum with another factor": lambda p, y: (
            torch.add(p[0].sum(), p[1].sum(), alpha=2) * (p[0].sum() + p[1].sum())
        ),
    },
    None,
    accept_unknown=True,
)
table(
    SEPARATE,
    VALUES,
    {
        "largest row sum": lambda p, y: torch.linalg.matrix_norm(p - y, float("inf")),
        "fourth norm": lambda p, y: (p - y).flatten().norm(4),
        "clipped total": lambda p, y: squares(p, y).mean().clamp(max=1e4),
        "over what it was": lambda p, y: squares(p, y).mean() / (0.9 + 0.1 * squares(p, y).mean()),
        "differences of pairs of losses": lambda p, y: (
            (squares(p, y)[:3] - squares(p, y)[3:]).abs().sum()
        ),
        "by the next one's loss": lambda p, y: (
            squares(p, y) * squares(p, y).detach().roll(1)
        ).sum(),
    },
    None,
    accept_unknown=True,
)
table(
    TANGLED,
    VALUES,
    {
        "largest column sum": lambda p, y: torch.linalg.matrix_norm(p - y, 1),
        "nuclear norm": lambda p, y: torch.linalg.matrix_norm(p - y, "nuc"),
        "norms of the columns": lambda p, y: (p - y).norm(dim=0).sum(),
        "mean of the positive": lambda p, y: p.clamp(min=0).sum() / (p > 0).sum(),
        "products of all residuals": lambda p, y: ((p - y) @ (p - y).T).sum(),
        "a small part of the mean": lambda p, y: (
            squares(p, y).mean() + 1e-3 * p.mean(0).square().sum()
        ),
        "largest and sum": lambda p, y: p.max() + p.sum(),
        "a random other": lambda p, y: (p - p[torch.randperm(N)]).square().mean(),
    },
    None,
    accept_unknown=True,
)


# ---------------------------------------------------------------- models with a loss of their own


def words_masked(net, x, y):
    """The head sees the masked words alone (masked language model)."""
    h = net.words(x)
    kept = y >= 2
    return F.cross_entropy(net.head(h[kept]), y[kept])


def active_tokens(net, x, y):
    logits = net.head(net.words(x)).view(-1, D)
    active = (x > 0).view(-1)
    labels = torch.where(active, y.view(-1), torch.tensor(-100))
    return F.cross_entropy(logits, labels)


def two_heads(net, x, y):
    h = net.inner(x).tanh()
    return F.mse_loss(net.head(h), y) + 0.1 * F.mse_loss(net.second(h), x)


def reconstructed_where_masked(net, x, y):
    kept = (torch.rand(N, D) < 0.5).float()
    out = predict(net, x * kept)
    return ((out - x).square() * (1 - kept)).sum() / (1 - kept).sum()


def centred_contrast(net, x, y):
    a, b = predict(net, x), predict(net, y)
    return -F.cosine_similarity(a - a.mean(0), b - b.mean(0)).mean()


def whole_words():
    return torch.randint(D, (N, 4)), torch.randint(D, (N, 4))


own(
    SUM,
    whole_words,
    {"own: head on masked words": words_masked, "own: active tokens": active_tokens},
    words=lambda: nn.Embedding(D, D),
)
own(SUM, VALUES, {"own: two heads": two_heads}, second=lambda: nn.Linear(D, D))
own(SUM, VALUES, {"own: reconstructed where masked": reconstructed_where_masked})
own(TANGLED, VALUES, {"own: contrast, centred": centred_contrast})
