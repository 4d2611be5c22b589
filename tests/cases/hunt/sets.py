"""Models in which statistics of sets of samples are combined over the sets."""

import torch
from torch.nn import functional as F

from cases.hunt.table import table
from cases.models.table import MIXED, STATISTICS

N = D = 6


def pairs(net, x):
    """Three pairs of samples, by pair, sample and feature."""
    return net.linear(x).view(3, 2, D)


def by_two(reduce_pairs, combine):
    """Take off a statistic of all samples that is made of statistics of the three pairs."""

    def forward(net, x):
        return net.linear(x) - combine(reduce_pairs(pairs(net, x)))

    return forward


def loop_of_sums(net, x):
    h = net.linear(x)
    return h - sum(h[i : i + 2].sum(0) for i in (0, 2, 4))


def loop_of_maxima(net, x):
    h = net.linear(x)
    return h - sum(h[i : i + 2].amax(0) for i in (0, 2, 4))


def two_maxima(net, x):
    h = net.linear(x)
    return h - (h[:3].amax(0) + h[3:].amax(0))


def two_sums(net, x):
    h = net.linear(x)
    return h - (h[:3].sum(0) + h[3:].sum(0)).tanh()


def joined_sums(net, x):
    h = net.linear(x)
    return h - torch.stack([h[:3].sum(0), h[3:].sum(0)]).sum(0)


def joined_sums_and_squares(net, x):
    p = pairs(net, x).sum(1)
    return net.linear(x) - torch.cat([p, p.square()], 1).sum(0)[D:]


def joined_products(net, x):
    h = net.linear(x)
    return h - torch.stack([h[:3].prod(0), h[3:].prod(0)]).sum(0)


def normalised_by_pair(net, x):
    p = pairs(net, x)
    return net.linear(x) - (p - p.mean(1, keepdim=True)).exp().sum(1).sum(0)


def normalised_by_half(net, x):
    h = net.linear(x).view(2, 3, D)
    y = (h - h.mean(1, keepdim=True)).exp().view(N, D)
    return net.linear(x) - y.view(2, 3, D).sum(1).sum(0)


def loop_over_normalised(net, x):
    p = pairs(net, x)
    rows = (p - p.sum(1, keepdim=True)).exp().view(N, D)
    return net.linear(x) - sum(rows.unbind(0))


def tree_over_normalised(net, x):
    p = pairs(net, x)
    a, b, c, d, e, f = (p - p.sum(1, keepdim=True)).exp().view(N, D).unbind(0)
    return net.linear(x) - (((a + b) + (c + d)) + (e + f))


def normalised_with_what_normalises(net, x):
    p = pairs(net, x)
    s = p.sum(1)
    return net.linear(x) - (s + (p - s[:, None]).exp().sum(1)).sum(0)


def normalised_by_pair_at_one_place(net, x):
    p = pairs(net, x)
    rows = (p - p.sum(1, keepdim=True)).exp().view(N, D)
    return net.linear(x) - torch.zeros(1, D).index_add(0, torch.zeros(N, dtype=torch.long), rows)


def at_one_place(of_pairs):
    def forward(net, x):
        h = of_pairs(pairs(net, x))
        return net.linear(x) - torch.zeros(1, D).index_add(0, torch.zeros(3, dtype=torch.long), h)

    return forward


def four_and_two(net, x):
    """The constant counts twice for four of the samples, and once for two."""
    h = net.linear(x)
    a, b, c = (h[i : i + 2].sum(0) + 1 for i in (0, 2, 4))
    return h - torch.cat([(a + b).expand(4, D), c.expand(2, D)])


def pools_of_pools(net, x):
    h = net.linear(x).T[None]
    return net.linear(x) - F.max_pool1d(F.max_pool1d(h, 2), 3)[0, :, 0]


def means_of_pools(net, x):
    h = net.linear(x).T[None]
    return net.linear(x) - F.avg_pool1d(F.max_pool1d(h, 2), 3)[0, :, 0]


def over_sum(net, x):
    return net.linear(x) - (1 / pairs(net, x).sum(1)).sum(0)


table(
    STATISTICS,
    {
        "sum of sums over pairs": by_two(lambda p: p.sum(1), lambda s: s.sum(0)),
        "mean of means over pairs": by_two(lambda p: p.mean(1), lambda s: s.mean(0)),
        "sum of means over pairs": by_two(lambda p: p.mean(1), lambda s: s.sum(0)),
        "maximum of maxima over pairs": by_two(lambda p: p.amax(1), lambda s: s.amax(0)),
        "minimum of minima over pairs": by_two(lambda p: p.amin(1), lambda s: s.amin(0)),
        "maxima with their places over pairs": by_two(lambda p: p.max(1)[0], lambda s: s.max(0)[0]),
        "logsumexp of those of pairs": by_two(lambda p: p.logsumexp(1), lambda s: s.logsumexp(0)),
        "product of products over pairs": by_two(lambda p: p.prod(1), lambda s: s.prod(0)),
        "norm of norms over pairs": by_two(lambda p: p.norm(dim=1), lambda s: s.norm(dim=0)),
        "any of any over pairs": by_two(lambda p: (p > 1).any(1), lambda s: s.any(0).float()),
        "maximum of everything by pairs": by_two(lambda p: p.amax(1), lambda s: s.amax()),
        "sum of sums of features": by_two(lambda p: p.sum(1), lambda s: s[:, :2].sum()),
        "sum of scaled means": by_two(lambda p: p.mean(1) * 3 + 1, lambda s: s.sum(0)),
        "sum of sums over three": by_two(lambda p: p.sum(1) / 3, lambda s: s.sum(0)),
        "sum of linear maps of sums": lambda n, x: (
            n.linear(x) - n.linear(pairs(n, x).sum(1)).sum(0)
        ),
        "sum of sums of exponentials": by_two(lambda p: p.exp().sum(1), lambda s: s.sum(0)),
        "sum of two statistics of pairs": by_two(
            lambda p: p.sum(1) - p.square().mean(1), lambda s: s.mean(0)
        ),
        "exponential of a sum of sums": by_two(lambda p: p.sum(1), lambda s: s.sum(0).exp()),
        "sums in a loop": loop_of_sums,
        "sums of two halves": two_sums,
        "sums of two halves, stacked": joined_sums,
    },
)
table(
    MIXED,
    {
        "maximum of sums over pairs": by_two(lambda p: p.sum(1), lambda s: s.amax(0)),
        "sum of maxima over pairs": by_two(lambda p: p.amax(1), lambda s: s.sum(0)),
        "sum of exponentials of means": by_two(lambda p: p.mean(1).exp(), lambda s: s.sum(0)),
        "sum of squares of sums": by_two(lambda p: p.sum(1).square(), lambda s: s.sum(0)),
        "sum of variances of pairs": by_two(lambda p: p.var(1), lambda s: s.sum(0)),
        "variance of means of pairs": by_two(lambda p: p.mean(1), lambda s: s.var(0)),
        "median of medians": by_two(lambda p: p.median(1)[0], lambda s: s.median(0)[0]),
        "minimum of maxima": by_two(lambda p: p.amax(1), lambda s: s.amin(0)),
        "logsumexp of means": by_two(lambda p: p.mean(1), lambda s: s.logsumexp(0)),
        "norm of norms of another order": by_two(
            lambda p: p.norm(dim=1), lambda s: s.norm(1, dim=0)
        ),
        "sum of norms": by_two(lambda p: p.norm(dim=1), lambda s: s.sum(0)),
        "count of counts": by_two(
            lambda p: (p > 0.3).count_nonzero(1), lambda s: s.count_nonzero(0).float()
        ),
        "mean of nanmeans with gaps": by_two(
            lambda p: p.where(p > -0.5, torch.nan).nanmean(1), lambda s: s.nanmean(0).nan_to_num()
        ),
        "sum of products of two statistics": by_two(
            lambda p: p.sum(1) * p.exp().sum(1), lambda s: s.sum(0)
        ),
        "sum of softmaxed sums": by_two(lambda p: p.sum(1).softmax(1), lambda s: s.sum(0)),
        "largest of sorted sums": by_two(lambda p: p.sum(1), lambda s: s.sort(0)[0][-1]),
        "largest two of sums": by_two(lambda p: p.sum(1), lambda s: s.topk(2, 0)[0].sum(0)),
        "one over sums": over_sum,
        "maxima in a loop": loop_of_maxima,
        "maxima of two halves": two_maxima,
        "products of two halves, stacked": joined_products,
        "sums and their squares, side by side": joined_sums_and_squares,
        "samples normalised by pairs, in a loop": loop_over_normalised,
        "samples normalised by pairs, summed by pairs": normalised_by_pair,
        "samples normalised by halves, summed by halves": normalised_by_half,
        "samples normalised by pairs, in a tree": tree_over_normalised,
        "samples normalised by pairs, and what normalises": normalised_with_what_normalises,
        "samples normalised by pairs, added at one place": normalised_by_pair_at_one_place,
        "maxima added at one place": at_one_place(lambda p: p.amax(1)),
        "means of pooled maxima": means_of_pools,
    },
    accept_unknown=True,
)
table(
    STATISTICS,
    {
        "pools of pools": pools_of_pools,
        "sums added at one place": at_one_place(lambda p: p.sum(1)),
    },
    accept_unknown=True,
)
table(
    MIXED,
    {"sums of four and of two with a constant": four_and_two},
    accept_unknown=True,
)
