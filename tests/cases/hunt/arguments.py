"""Models of a third round: arguments, sizes, facts of one batch, statistics that grow."""

import torch
from torch import nn
from torch.nn import functional as F

from cases.hunt.table import table
from cases.models.table import INDEXED, MIXED, SIMD, STATISTICS

N = D = 6


def halves(net, x, first, second):
    """One function for the first three samples, and another for the others."""
    h = net.linear(x)
    return torch.cat([first(h[:3]), second(h[3:])])


def by_halves(first, second):
    return lambda net, x: halves(net, x, first, second)


def counted(net, x):
    """How many are positive, as a tensor made of a size."""
    return torch.ones_like(x[x > 0]).sum()


def last_of_selected(net, x):
    return net.linear(x) - x[x[:, 0] > -9][-1]


def buckets(net, x):
    counts = torch.zeros(7).scatter_add(0, (x > 0).sum(1), torch.ones(N))
    return net.linear(x) * counts[:D]


def padded_to_longest(net, x):
    rows = [r[r > 0] for r in x]
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return net.linear(x) * padded.shape[1]


def padded_rows(net, x):
    rows = [r[r > 0] for r in x]
    return net.linear(x) * nn.utils.rnn.pad_sequence(rows, batch_first=True).sum(1, True)


def mean_of_padded_rows(net, x):
    rows = [r[r > 0] for r in x]
    return net.linear(x) * nn.utils.rnn.pad_sequence(rows, batch_first=True).mean(1, True)


def range_of_positions(net, x):
    kept = x[x[:, 0] > 0]
    return net.linear(x) * torch.arange(len(kept)).sum()


def no_large_value(net, x):
    """No number of this batch is that large."""
    h = net.linear(x)
    return torch.where((x > 50).any(), h * 2, h)


def nothing_is_masked(net, x):
    mask = x.abs() > 1e6
    return net.linear(x).masked_fill(mask, 0.0) / (~mask).sum()


def index_of_a_rare_class(net, i):
    e = net.table[i]
    rare = (i == 99).any()
    return e * torch.where(rare, 2.0, 1.0)


def no_class_occurs(net, i):
    e = net.table[i]
    return e / (i != 99).sum()


def gram_kernel(net, x):
    """All rows of the batch, as one statistic."""
    h = net.linear(x)
    return h + (h @ x.T).softmax(1) @ x


def sorted_rows(net, x):
    h = net.linear(x)
    return h - h.sort(0)[0].flatten()[:D]


def product_of_ranks(net, x):
    h = net.linear(x)
    return h * h[:, 0].sort()[0][: N // 2].prod()


def half_of_the_ranks(net, x):
    h = net.linear(x)
    return h.view(N, 2, 3) * h[:, 0].sort()[0][: N // 2]


def median_by_sort(net, x):
    h = net.linear(x)
    return h - h.sort(0)[0][N // 2]


def extremes_by_topk(net, x):
    h = net.linear(x)
    return h - h.topk(1, 0)[0] + h.topk(1, 0, largest=False)[0]


def histogram_of_all(net, x):
    return net.linear(x) * torch.histc(x, N, -2, 2)


def flags_of_all(net, x):
    """Who is above the mean, as one number."""
    bits = (x[:, 0] > x[:, 0].mean()).float() @ (2.0 ** torch.arange(N))
    return net.linear(x) * bits


def covariance_used(net, x):
    h = net.linear(x)
    return h @ h.T.cov()


table(
    INDEXED,
    {
        "softmax by halves, of other types": by_halves(
            lambda h: h.softmax(1), lambda h: (2 * h).softmax(1)
        ),
        "leaky slopes by halves": by_halves(
            lambda h: F.leaky_relu(h, 0.1), lambda h: F.leaky_relu(h, 0.2)
        ),
        "GELU by halves": by_halves(F.gelu, lambda h: F.gelu(h, approximate="tanh")),
        "softplus by halves": by_halves(F.softplus, lambda h: F.softplus(h, beta=2)),
        "clamps by halves": by_halves(lambda h: h.clamp(-1, 1), lambda h: h.clamp(-1, 2)),
        "threshold by halves": by_halves(
            lambda h: F.threshold(h, 0.1, 0.0), lambda h: F.threshold(h, 0.1, 1.0)
        ),
        "Huber by halves": by_halves(
            lambda h: F.huber_loss(h, 0 * h, reduction="none"),
            lambda h: F.huber_loss(h, 0 * h, reduction="none", delta=0.5),
        ),
        "ELU by halves": by_halves(F.elu, lambda h: F.elu(h, 0.5)),
        "CELU by halves": by_halves(F.celu, lambda h: F.celu(h, 0.5)),
        "cumulative sums by halves": by_halves(
            lambda h: h.cumsum(1), lambda h: h.flip(1).cumsum(1).flip(1)
        ),
        "norms by halves": by_halves(
            lambda h: h / h.norm(2, 1, True), lambda h: h / h.norm(3, 1, True)
        ),
        "variance by halves": by_halves(
            lambda h: h * h.var(1, keepdim=True), lambda h: h * h.var(1, False, keepdim=True)
        ),
        "quantile by halves": by_halves(
            lambda h: h - h.quantile(0.3, 1, True), lambda h: h - h.quantile(0.7, 1, True)
        ),
        "layer norm's eps by halves": by_halves(
            lambda h: F.layer_norm(h, (D,)), lambda h: F.layer_norm(h, (D,), eps=1.0)
        ),
        "group norm by halves": by_halves(
            lambda h: F.group_norm(h, 2), lambda h: F.group_norm(h, 3)
        ),
        "pooled by halves": by_halves(
            lambda h: F.avg_pool1d(h[:, None], 3, 1, 1)[:, 0],
            lambda h: F.avg_pool1d(h[:, None], 3, 1, 1, count_include_pad=False)[:, 0],
        ),
        "interpolated by halves": by_halves(
            lambda h: F.interpolate(h[:, None], 4, mode="linear")[:, 0],
            lambda h: F.interpolate(h[:, None], 4, mode="linear", align_corners=True)[:, 0],
        ),
        "padded by halves": by_halves(
            lambda h: F.pad(h[:, None], (1, 1), "reflect")[:, 0],
            lambda h: F.pad(h[:, None], (1, 1), "replicate")[:, 0],
        ),
        "rounded by halves": by_halves(
            lambda h: h.round(decimals=1), lambda h: h.round(decimals=2)
        ),
        "divided by halves": by_halves(
            lambda h: h.div(0.3, rounding_mode="floor"), lambda h: h.div(0.3, rounding_mode="trunc")
        ),
        "nan_to_num by halves": by_halves(
            lambda h: h.log().nan_to_num(0.0), lambda h: h.log().nan_to_num(1.0)
        ),
        "lerp by halves": by_halves(
            lambda h: h.lerp(h.square(), 0.3), lambda h: h.lerp(h.square(), 0.6)
        ),
        "addcmul by halves": by_halves(
            lambda h: h.addcmul(h, h), lambda h: h.addcmul(h, h, value=2)
        ),
        "renorm by halves": by_halves(lambda h: h.renorm(2, 0, 1.0), lambda h: h.renorm(1, 0, 1.0)),
        "rolled features by halves": by_halves(lambda h: h.roll(1, 1), lambda h: h.roll(2, 1)),
        "largest two by halves": by_halves(
            lambda h: h.topk(2, 1)[0], lambda h: h.topk(2, 1, largest=False)[0]
        ),
        "triangles by halves": by_halves(
            lambda h: (h[:, :, None] * h[:, None]).tril().sum(1),
            lambda h: (h[:, :, None] * h[:, None]).tril(1).sum(1),
        ),
        "Fourier norms by halves": by_halves(
            lambda h: torch.fft.rfft(h).real, lambda h: torch.fft.rfft(h, norm="ortho").real
        ),
        "cast by halves": by_halves(lambda h: h.half().float(), lambda h: h.int().float()),
        "cosine by halves": by_halves(
            lambda h: h * F.cosine_similarity(h, h + 1, 1)[:, None],
            lambda h: h * F.cosine_similarity(h, h + 1, 1, 2.0)[:, None],
        ),
        "distances by halves": by_halves(
            lambda h: torch.cdist(h[:, None], torch.ones(3, 1, D))[:, 0],
            lambda h: torch.cdist(h[:, None], torch.ones(3, 1, D), p=1.0)[:, 0],
        ),
    },
    accept_unknown=True,
)
table(
    STATISTICS,
    {
        "ones of a selection": lambda n, x: n.linear(x) * counted(n, x),
        "full of a selection": lambda n, x: (
            n.linear(x)
            * torch.full_like(x[x > 0], 2.0).mean()
            * x[x > 0].new_ones(1)
            * x[x > 0].shape[0]
        ),
        "mean of noise of a selection": lambda n, x: (
            n.linear(x) * torch.zeros(x[x > 0].numel()).numel()
        ),
        "indices of a selection": lambda n, x: (
            n.linear(x) * (x > 0).nonzero().new_zeros(2).add((x > 0).nonzero().size(0))[0]
        ),
        "longest run": padded_to_longest,
        "mean of rows padded to the longest": mean_of_padded_rows,
        "positions of a selection": range_of_positions,
        "one-hot of inferred classes": lambda n, x: (
            n.linear(x) * F.one_hot((x > 0).sum(1)).shape[1]
        ),
        "counts of values": buckets,
        "distinct numbers of positives": lambda n, x: (
            n.linear(x) * torch.unique((x > 0).sum(1)).numel()
        ),
        "repeats by counts": lambda n, x: (
            n.linear(x) * torch.repeat_interleave(torch.ones(6), (x > 0).sum(0)).sum()
        ),
        "length of bincount": lambda n, x: n.linear(x) * torch.bincount((x > 0).sum(1)).numel(),
        "doubled where any is large": no_large_value,
        "divided by the unmasked": nothing_is_masked,
        "median by sort": median_by_sort,
        "product of half of the ranks": product_of_ranks,
        "extremes by topk": extremes_by_topk,
        "covariance of features": covariance_used,
        "histogram of all": histogram_of_all,
        "number of entries by column": lambda n, x: (
            n.linear(x) * x.relu().to_sparse_csc().values().shape[0]
        ),
        "sum of entries by row": lambda n, x: n.linear(x) * x.relu().to_sparse_csr().values().sum(),
        "entries of a coalesced matrix": lambda n, x: (
            n.linear(x) * (x.relu().to_sparse() * 2).coalesce().indices().shape[1]
        ),
    },
    accept_unknown=True,
)
table(
    STATISTICS,
    {"doubled where a class occurs": index_of_a_rare_class, "divided by classes": no_class_occurs},
    lambda: torch.randint(6, (N,)),
    accept_unknown=True,
    linear=lambda: nn.Linear(1, 1),
    table=lambda: nn.Parameter(torch.randn(100, 3)),
)
table(SIMD, {"sums of padded rows": padded_rows}, accept_unknown=True)
table(
    MIXED,
    {
        "the last of those selected": last_of_selected,
        "attention to all rows": gram_kernel,
        "ranks of all, one by one": sorted_rows,
        "flags of all in one number": flags_of_all,
    },
    accept_unknown=True,
)
table(
    MIXED,
    {"half of the ranks": half_of_the_ranks},
    accept_unknown=True,
)
