"""Models by odd parts of the library, pairs of samples that cancel, and groups in many forms."""

import functools
import warnings

import torch
import torch.nn.utils.prune
from torch import Tensor, nn
from torch._higher_order_ops.associative_scan import associative_scan
from torch.masked import masked_tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cases.hunt.table import MODELS, table
from cases.models.table import (
    GROUPS,
    INDEXED,
    MIXED,
    SEQUENCE,
    SIMD,
    STATISTICS,
    ModelCase,
    Net,
    linear,
    norm,
    weight,
)

D = N = 6
CUBE = (N, N, D)


# ---------------------------------------------------------------- parts of the library


@torch.jit.script
def mean_of_samples(x: Tensor) -> Tensor:
    return x.mean(0)


@torch.jit.script
def centred_by_a_fork(x: Tensor) -> Tensor:
    future = torch.jit.fork(mean_of_samples, x)
    return x - torch.jit.wait(future)


class Ordinary(torch.Tensor):
    """A subclass that adds nothing."""


def nested_rows(net, x):
    """Sequences of own lengths in one nested tensor."""
    rows = torch.nested.as_nested_tensor([*net.linear(x)], layout=torch.jagged)
    return rows.to_padded_tensor(0.0)


def nested_by_offsets(net, x):
    flat, offsets = net.linear(x).flatten(0, 1), torch.arange(0, 25, 4)
    rows = torch.nested.nested_tensor_from_jagged(flat, offsets)
    return (rows * 2).values().view(N, 4, D)


def nested_before_the_layer(net, x):
    rows = torch.nested.nested_tensor([*x], layout=torch.jagged)
    return net.linear(rows).to_padded_tensor(0.0)


def positive(x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prototype
        return masked_tensor(x, x > 0)


def masked_sum(net, x):
    return net.linear(x) * positive(x).sum(1).to_tensor(0.0)[:, None]


def masked_mean_of_the_batch(net, x):
    return net.linear(x) - positive(x).mean(0).to_tensor(0.0)


def short_transform(net, x):
    return torch.stft(net.linear(x), 8, 2, window=torch.hann_window(8), return_complex=True).abs()


def inverse_transform(net, x):
    window = torch.hann_window(8)
    wave = torch.cat([net.linear(x)] * 6, 1)
    spectrum = torch.stft(wave, 8, 2, window=window, return_complex=True)
    return torch.istft(spectrum, 8, 2, window=window)


def traced():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and in use
        layers = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D))
        return torch.jit.trace(layers, torch.randn(N, D))


LIBRARY = {
    "norm": norm(),
    "traced": traced,
    "by_fx": lambda: torch.fx.symbolic_trace(nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D))),
    "pruned": lambda: nn.utils.prune.l1_unstructured(nn.Linear(D, D), "weight", 0.3),
    "old_spectral": lambda: nn.utils.spectral_norm(nn.Linear(D, D)),
    "parallel": lambda: nn.DataParallel(nn.Linear(D, D)),
}
table(
    SIMD,
    {
        "recomputed by the older way": lambda n, x: checkpoint(
            lambda h: n.linear(h).relu(), x, use_reentrant=True
        ),
        "pruned weights": lambda n, x: n.pruned(x),
        "spectral norm by hooks": lambda n, x: n.old_spectral(x),
        "data parallel without devices": lambda n, x: n.parallel(x),
        "vmap in chunks": lambda n, x: torch.vmap(lambda r: n.linear(r).relu(), chunk_size=2)(x),
        "softmax where masked": lambda n, x: torch.masked.softmax(
            n.linear(x), 1, mask=x > -3
        ).nan_to_num(),
        "in eight bits": lambda n, x: (
            n.linear(x).detach().to(torch.float8_e4m3fn).float() * n.linear.bias
        ),
        "quantised": lambda n, x: (
            torch.quantize_per_tensor(n.linear(x).detach(), 0.1, 0, torch.qint8).dequantize()
            * n.linear.bias
        ),
        "a product with conjugates": lambda n, x: (
            torch.complex(n.linear(x), x) @ torch.complex(n.linear.weight, n.linear.weight).mH
        ).abs(),
        "frames of a transform": short_transform,
        "there and back by frames": inverse_transform,
        "area of each row": lambda n, x: n.linear(x) * torch.trapz(x, dim=1)[:, None],
        "halves side by side": lambda n, x: torch.hstack(torch.hsplit(n.linear(x), 2)[::-1]),
        "in depth": lambda n, x: torch.dstack([n.linear(x), x]).mean(2),
        "exponents of each": lambda n, x: torch.ldexp(n.linear(x), torch.frexp(x)[1]),
        "split at places": lambda n, x: torch.cat(
            [n.linear(part) for part in torch.tensor_split(x, (2, 3))]
        ),
        "the sum of a masked tensor": masked_sum,
        "a sparse identity": lambda n, x: torch.eye(N).to_sparse_csr() @ n.linear(x),
    },
    accept_unknown=True,
    **LIBRARY,
)
table(
    SIMD,
    {
        "a scan along tokens": lambda n, x: associative_scan(
            lambda a, b: a + b, n.linear(x), 1, combine_mode="generic"
        ),
        "rows of a nested tensor": nested_rows,
        "rows of a nested tensor, by offsets": nested_by_offsets,
        "a layer on a nested tensor": nested_before_the_layer,
    },
    SEQUENCE,
    accept_unknown=True,
)
table(
    MIXED,
    {
        "a scan along samples": lambda n, x: associative_scan(
            lambda a, b: a + b, n.linear(x), 0, combine_mode="generic"
        ),
    },
    SEQUENCE,
    accept_unknown=True,
)
table(
    STATISTICS,
    {
        "centred by a fork": lambda n, x: n.linear(x) + centred_by_a_fork(x),
        "a traced batch norm": lambda n, x: n.traced(x),
        "a batch norm by fx": lambda n, x: n.by_fx(x),
        "a recomputed batch norm": lambda n, x: checkpoint(
            n.norm, n.linear(x), use_reentrant=False
        ),
        "a subclass that is centred": lambda n, x: n.linear(x).as_subclass(Ordinary) - x.mean(0),
        "mean where masked": lambda n, x: n.linear(x) - torch.masked.mean(x, 0, mask=x > 0),
        "spread where masked": lambda n, x: n.linear(x) - torch.masked.std(x, 0, mask=x > -1),
        "mean of a masked tensor": masked_mean_of_the_batch,
        "covariance by its function": lambda n, x: n.linear(x) @ torch.cov(x.T),
        "correlations by their function": lambda n, x: n.linear(x) @ torch.corrcoef(x.T),
        "second of each feature": lambda n, x: n.linear(x) - x.kthvalue(2, 0).values,
        "distance of the batch to zero": lambda n, x: (
            n.linear(x) * torch.dist(x, torch.zeros(N, D))
        ),
        "mean of all distances": lambda n, x: n.linear(x) * torch.pdist(x).mean(),
        "the largest so far, at the end": lambda n, x: n.linear(x) - x.cummax(0).values[-1],
        "bins between extremes": lambda n, x: (
            n.linear(x) + torch.bucketize(x, torch.stack([x.min(), x.mean(), x.max()]))
        ),
        "logsumexp by a loop": lambda n, x: (
            n.linear(x) - functools.reduce(torch.logaddexp, x.unbind())
        ),
        "moments of complex samples": lambda n, x: (
            torch.complex(n.linear(x), x) @ (torch.complex(x, x).mH @ torch.complex(x, x))
        ).abs(),
    },
    accept_unknown=True,
    **LIBRARY,
)
table(
    MIXED,
    {
        "a sparse roll": lambda n, x: torch.eye(N).roll(1, 0).to_sparse_csr() @ n.linear(x),
        "halves of the batch exchanged": lambda n, x: torch.vstack(
            torch.vsplit(n.linear(x), 2)[::-1]
        ),
        "resampled by own weights": lambda n, x: n.linear(x)[
            torch.multinomial(x[:, 0].softmax(0), N, True)
        ],
        "two samples dropped by their weights": lambda n, x: (
            n.linear(x)
            * torch.ones(N).index_fill(0, torch.multinomial(x[:, 0].exp(), 2), 0.0)[:, None]
        ),
    },
    accept_unknown=True,
)


# ---------------------------------------------------------------- pairs whose parts come apart


def dual_ridge(net, x):
    """Ridge regression on the batch by its Gram matrix, which is small where features are many."""
    gram = x @ x.T
    return gram @ torch.linalg.solve(gram + torch.eye(N), net.linear(x).tanh())


def dual_ridge_of_weights(net, x):
    w = x.T @ torch.linalg.solve(x @ x.T + torch.eye(len(x)), x.tanh())
    return net.linear(x) @ w


def whitened_by_the_gram_matrix(net, x):
    factor = torch.linalg.cholesky(x @ x.T + torch.eye(N))
    return torch.cholesky_solve(net.linear(x), factor)


def spread_around_each(net, x):
    """Of each feature, how far the samples are from this one: by mean and second moment alone."""
    return net.linear(x) * (x[:, None] - x).square().mean(1).sqrt()


def additive_attention(net, x):
    """Scores that are sums: what is the query's own cancels in the softmax."""
    return (net.linear(x)[:, :1] + x[:, :1].T).softmax(1) @ x


table(
    STATISTICS,
    {
        "additive attention among samples": additive_attention,
        "exponentials of sums of pairs": lambda n, x: n.linear(x) + (x[:, None] + x).exp().mean(1),
        "cosines of differences of pairs": lambda n, x: (
            n.linear(x) + (x[:, None] - x).cos().mean(1)
        ),
        "mean squared distance to others": lambda n, x: (
            n.linear(x) * torch.cdist(x, x).square().mean(1, keepdim=True)
        ),
        "logarithms of products of pairs": lambda n, x: (
            n.linear(x) + ((x[:, None].abs() + 0.1) * (x.abs() + 0.1)).log().mean(1)
        ),
        "determinant of the Gram matrix": lambda n, x: (
            n.linear(x) * torch.logdet(x @ x.T + torch.eye(N))
        ),
        "a centring matrix": lambda n, x: (torch.eye(N) - 1 / N) @ n.linear(x),
        "left out one by one, by a matrix": lambda n, x: (
            n.linear(x) + (1 - torch.eye(N)) @ x / (N - 1)
        ),
        "cosines as a linear attention": lambda n, x: (
            F.normalize(x) @ F.normalize(x).T @ n.linear(x)
        ),
        "largest sum of pairs": lambda n, x: n.linear(x) + (x[:, None] + x).amax(1),
        "larger of pairs, at most": lambda n, x: n.linear(x) + torch.maximum(x[:, None], x).amax(1),
        "attention with one query for all": lambda n, x: (
            x[:, 0].expand(N, N).softmax(1) @ n.linear(x)
        ),
        "largest by their places": lambda n, x: (
            n.linear(x) - x.gather(0, x.max(0, keepdim=True).indices)
        ),
        "mean of rows in order": lambda n, x: n.linear(x) - x[x[:, 0].argsort()].mean(0),
        "sum of outer products by Python": lambda n, x: (
            n.linear(x) @ sum(torch.outer(row, row) for row in x)
        ),
    },
    accept_unknown=True,
)
table(
    STATISTICS,
    {
        "ridge regression by the Gram matrix": dual_ridge,
        "ridge weights by the Gram matrix": dual_ridge_of_weights,
        "whitened by the Gram matrix": whitened_by_the_gram_matrix,
    },
    accept_unknown=True,
)
table(
    STATISTICS,
    {
        "spread around each": spread_around_each,
        "ridge of many features": dual_ridge_of_weights,
    },
    (N, 64),
    accept_unknown=True,
)


# ---------------------------------------------------------------- groups


BLOCKS = torch.block_diag(*[torch.full((2, 2), 0.5)] * 3)


def pooled(x):
    return F.avg_pool1d(x.T[None], 2)[0].T


def two_running_sums(net, x):
    sums = x.cumsum(0)
    parts = torch.stack([sums[2], sums[5] - sums[2]])
    return net.linear(x) - parts.repeat_interleave(3, 0) / 3


table(
    GROUPS,
    {
        "means of pairs by a matrix": lambda n, x: n.linear(x) - BLOCKS @ x,
        "means of pairs by a sparse matrix": lambda n, x: (
            n.linear(x) - torch.sparse.mm(BLOCKS.to_sparse(), x)
        ),
        "means of pairs by pooling": lambda n, x: n.linear(x) - pooled(x).repeat_interleave(2, 0),
        "means of pairs, pooled and spread": lambda n, x: (
            n.linear(x) - F.interpolate(pooled(x).T[None], scale_factor=2)[0].T
        ),
        "means of pairs by a convolution": lambda n, x: (
            n.linear(x)
            - F.conv1d(x.T[:, None], torch.full((1, 1, 2), 0.5), stride=2)[
                :, 0
            ].T.repeat_interleave(2, 0)
        ),
        "largest of threes by pooling": lambda n, x: (
            n.linear(x) - F.max_pool1d(x.T[None], 3)[0].T.repeat_interleave(3, 0)
        ),
        "means of segments": lambda n, x: (
            n.linear(x)
            - torch.segment_reduce(x, "mean", lengths=torch.tensor([2, 2, 2])).repeat_interleave(
                2, 0
            )
        ),
        "means by running sums": two_running_sums,
        "means with a partner": lambda n, x: (
            n.linear(x) - (x + x[torch.tensor([1, 0, 3, 2, 5, 4])]) / 2
        ),
        "means of windows side by side": lambda n, x: (
            n.linear(x) - x.unfold(0, 2, 2).mean(2).repeat_interleave(2, 0)
        ),
        "groups normalised by vmap": lambda n, x: torch.vmap(lambda g: (g - g.mean(0)) / g.std(0))(
            n.linear(x).view(2, 3, D)
        ).view(N, D),
    },
    accept_unknown=True,
)


# ---------------------------------------------------------------- samples along another axis


def along(name, truth, function, *shapes, in_dims=1, **parts):
    """Enter a model whose inputs have samples along ``in_dims``."""

    def build():
        inputs = tuple(s() if callable(s) else torch.randn(s) for s in shapes)
        width = inputs[0].shape[-1]
        return Net(function, {"linear": linear(width, width), **parts}), inputs

    MODELS.append(ModelCase(name, build, *truth, accept_unknown=True, in_dims=in_dims))


TIME_FIRST = (4, N, D)

along(
    "time first, last step",
    SIMD,
    lambda n, x: n.lstm(x)[0][-1],
    TIME_FIRST,
    lstm=lambda: nn.LSTM(D, D),
)
along(
    "time first, both directions' last states",
    SIMD,
    lambda n, x: n.lstm(x)[1][0].transpose(0, 1).flatten(1),
    TIME_FIRST,
    lstm=lambda: nn.LSTM(D, D, bidirectional=True),
)
along(
    "time first, an encoder",
    SIMD,
    lambda n, x: n.layer(x),
    TIME_FIRST,
    layer=lambda: nn.TransformerEncoderLayer(D, 2, 8, dropout=0.0),
)
along(
    "time first, an encoder that expects samples first",
    MIXED,
    lambda n, x: n.layer(x),
    TIME_FIRST,
    layer=lambda: nn.TransformerEncoderLayer(D, 2, 8, dropout=0.0, batch_first=True),
)
along(
    "time first, positions of time",
    SIMD,
    lambda n, x: n.linear(x) + n.place[: len(x)],
    CUBE,
    place=weight(8, 1, D),
)
along(
    "time first, positions of samples",
    INDEXED,
    lambda n, x: n.linear(x) + n.place,
    CUBE,
    place=weight(1, N, D),
)
along("time first, sums of time", SIMD, lambda n, x: n.linear(x).cumsum(0), CUBE)
along("time first, sums of samples", MIXED, lambda n, x: n.linear(x).cumsum(1), CUBE)
along("time first, softmax of samples", STATISTICS, lambda n, x: n.linear(x).softmax(1), CUBE)
along(
    "time first, a batch norm of features",
    STATISTICS,
    lambda n, x: n.norm(x.permute(1, 2, 0)).permute(2, 0, 1),
    TIME_FIRST,
    norm=norm(),
)
along("columns are samples", SIMD, lambda n, x: n.linear.weight @ x, (D, N))
along("columns are samples, taken for rows", MIXED, lambda n, x: n.linear(x), (D, N))
along(
    "a table beside",
    SIMD,
    lambda n, x, w: n.linear(x) @ w,
    (N, D),
    (N, D),
    in_dims=(0, None),
)
along(
    "rows beside",
    INDEXED,
    lambda n, x, w: n.linear(x) + w,
    (N, D),
    (N, D),
    in_dims=(0, None),
)
along(
    "edges beside",
    MIXED,
    lambda n, x, e: torch.zeros(N, D).index_add(0, e[1], n.linear(x)[e[0]]),
    (N, D),
    lambda: torch.tensor([[0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 0]]),
    in_dims=(0, None),
)
along(
    "groups beside",
    GROUPS,
    lambda n, x, g: n.linear(x) - (torch.zeros(3, D).index_add(0, g, x) / 2)[g],
    (N, D),
    lambda: torch.tensor([0, 1, 2, 0, 1, 2]),
    in_dims=(0, None),
)
along(
    "domains as data",
    STATISTICS,
    lambda n, x, g: (
        torch.where((g == 0)[:, None], x - x[g == 0].mean(0), x - x[g == 1].mean(0)) + n.linear.bias
    ),
    (N, D),
    lambda: torch.tensor([0, 1, 1, 0, 1, 0]),
    in_dims=0,
)
