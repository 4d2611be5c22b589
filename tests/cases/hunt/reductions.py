"""Losses that put the losses of samples together in sets, in loops, and by the way of numbers."""

import torch
from torch.nn import functional as F

from cases.hunt.losses import per_sample, table
from cases.losses import INDEXED, SEPARATE, SUM, TANGLED, D, N, classes, values


def accumulated(p, y):
    total = p.new_zeros(())
    for a, b in zip(p, y, strict=True):
        total = total + (a - b).square().sum()
    return total / len(p)


def accumulated_in_place(p, y):
    total = torch.zeros(())
    for a, b in zip(p, y, strict=True):
        total += (a - b).square().sum()
    return total


def accumulated_on_one(p, y):
    total = torch.ones(())
    for a, b in zip(p, y, strict=True):
        total = total * 1 + (a - b).square().sum()
    return total


def accumulated_on_wider(p, y):
    total = torch.zeros(2)
    for a, b in zip(p, y, strict=True):
        total = total + (a - b).square().sum()
    return total.sum()


def running_maximum(p, y):
    worst = torch.zeros(())
    for a, b in zip(p, y, strict=True):
        worst = torch.maximum(worst, (a - b).square().sum())
    return worst


def tried_factor(p, y):
    try:
        torch.linalg.cholesky(p.T @ p)
        return per_sample(p, y).mean()
    except RuntimeError:
        return 2 * per_sample(p, y).mean()


def tried_labels(p, y):
    try:
        return F.cross_entropy(p, y)
    except IndexError:
        return 0 * p.sum()


def tried_to_the_end(p, y):
    try:
        return F.cross_entropy(p, y)
    finally:
        p.detach()


def data_of_losses_flipped(p, y):
    losses = per_sample(p, y)
    losses.data = losses.data.flip(0)
    return (losses * per_sample(p, y).detach()).sum()


def pairs(p, y):
    return per_sample(p, y).view(3, 2)


def margins(p, y):
    own = p.gather(1, y[:, None])
    return F.relu(1 - own + p).sum(1).mean()


def margins_of_the_next(p, y):
    own = p.gather(1, y.roll(1)[:, None])
    return F.relu(1 - own + p).sum(1).mean()


def margins_of_all(p, y):
    own = p.gather(1, y[:, None])
    return F.relu(1 - own.T + own).sum() + 0 * p.sum()


def smoothed(p, y):
    one_hot = F.one_hot(y, D) * 0.9 + 0.1 / D
    return -(one_hot * p.log_softmax(1)).sum(1).mean()


def smoothed_by_the_batch(p, y):
    shares = F.one_hot(y, D).float().mean(0)
    return -(shares * p.log_softmax(1)).sum(1).mean()


def focal(p, y):
    log_p = p.log_softmax(1).gather(1, y[:, None])[:, 0]
    return -((1 - log_p.exp()) ** 2 * log_p).mean()


def hardest(p, y):
    return F.cross_entropy(p, y, reduction="none").topk(3)[0].mean()


def by_class(p, y):
    """Means of the losses of each class that occurs, averaged."""
    losses = F.cross_entropy(p, y, reduction="none")
    return torch.stack([losses[y == c].mean() for c in y.unique()]).mean()


def worst_class(p, y):
    losses = F.cross_entropy(p, y, reduction="none")
    return torch.stack([losses[y == c].mean() for c in y.unique()]).max()


table(
    SUM,
    values(N, D),
    {
        "sum of means over pairs": lambda p, y: pairs(p, y).mean(1).sum(),
        "mean of sums over pairs, scaled": lambda p, y: (pairs(p, y).sum(1) * 3).mean(),
        "a loop that accumulates": accumulated,
        "a loop that accumulates in place": accumulated_in_place,
        "a loop that accumulates on one": accumulated_on_one,
        "a loop that accumulates twice": accumulated_on_wider,
        "sums of three pieces": lambda p, y: sum(c.sum() for c in per_sample(p, y).split(2)),
        "sums of even and odd": lambda p, y: (
            per_sample(p, y)[::2].sum() + per_sample(p, y)[1::2].sum()
        ),
        "a dot with ones": lambda p, y: per_sample(p, y) @ torch.ones(N),
        "a sum by einsum": lambda p, y: torch.einsum("nc,nc->", p - y, p - y),
        "a sum by cumsum": lambda p, y: per_sample(p, y).cumsum(0)[-1],
        "a sum by scatter": lambda p, y: (
            torch.zeros(2).index_add(0, torch.arange(N) % 2, per_sample(p, y)).sum()
        ),
        "a mean by pooling": lambda p, y: F.avg_pool1d(per_sample(p, y)[None], N)[0, 0],
    },
    accept_unknown=True,
)
table(
    SEPARATE,
    values(N, D),
    {
        "largest mean of pairs": lambda p, y: pairs(p, y).mean(1).max(),
        "mean of the largest of pairs": lambda p, y: pairs(p, y).amax(1).mean(),
        "product of sums of pairs": lambda p, y: pairs(p, y).sum(1).prod(),
        "roots of sums of pairs": lambda p, y: pairs(p, y).sum(1).sqrt().sum(),
        "logsumexp of means of pairs": lambda p, y: pairs(p, y).mean(1).logsumexp(0),
        "a running maximum": running_maximum,
        "variance of means of pairs": lambda p, y: pairs(p, y).mean(1).var(),
    },
    accept_unknown=True,
)
table(
    TANGLED,
    values(N, D),
    {
        "a factor tried in a loss": tried_factor,
        "norms of means of pairs": lambda p, y: (p - y).view(3, 2, D).mean(1).norm(dim=1).sum(),
        "maxima of pairs of residuals": lambda p, y: (p - y).view(3, 2, D).amax(1).sum(),
        "squares of sums of pairs": lambda p, y: (p - y).view(3, 2, D).sum(1).square().sum(),
        "centred by pairs": lambda p, y: (
            (p.view(3, 2, D) - p.view(3, 2, D).mean(1, True)).square().sum()
        ),
        "Gram matrices of halves": lambda p, y: (p[:3].T @ p[3:]).square().sum(),
        "softmax over the samples": lambda p, y: (p.softmax(0) * y).sum(),
        "cumulative maxima": lambda p, y: p.cummax(0)[0].sum(),
    },
    accept_unknown=True,
)
table(
    INDEXED,
    values(N, D),
    {
        "norms of two orders by halves": lambda p, y: (
            (p - y)[:3].norm(2, 1).sum() + (p - y)[3:].norm(3, 1).sum()
        ),
        "Huber losses by halves": lambda p, y: (
            F.huber_loss(p[:3], y[:3], reduction="sum")
            + F.huber_loss(p[3:], y[3:], reduction="sum", delta=0.3)
        ),
        "smooth losses by halves": lambda p, y: (
            F.smooth_l1_loss(p[:3], y[:3], reduction="sum")
            + F.smooth_l1_loss(p[3:], y[3:], reduction="sum", beta=0.3)
        ),
        "softmax temperatures by index": lambda p, y: (
            (p * torch.arange(1.0, N + 1)[:, None]).logsumexp(1).sum()
        ),
    },
    accept_unknown=True,
)
table(
    SUM,
    classes(N, D),
    {
        "labels tried": tried_labels,
        "labels, and cleaning up": tried_to_the_end,
        "margins to own class": margins,
        "smoothed labels": smoothed,
        "focal loss": focal,
        "shares of classes as labels": smoothed_by_the_batch,
        "means by class": by_class,
        "the largest label": lambda p, y: F.cross_entropy(p, y.max().expand(N)),
    },
    accept_unknown=True,
)
table(
    SEPARATE,
    classes(N, D),
    {"hardest three": hardest, "worst class": worst_class},
    accept_unknown=True,
)
table(
    TANGLED,
    classes(N, D),
    {
        "margins to the class of the next": margins_of_the_next,
        "margins to all": margins_of_all,
        "labels sorted": lambda p, y: F.cross_entropy(p, y.sort()[0]),
        "labels flipped, in one product": lambda p, y: (
            -(p.log_softmax(1) * F.one_hot(y.flip(0), D)).sum()
        ),
        "the label of the first": lambda p, y: F.cross_entropy(p, y[:1].expand(N)),
    },
    accept_unknown=True,
)
