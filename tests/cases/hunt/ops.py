"""Models made of ops and arguments that the other tables do not have."""

import torch
from torch import nn
from torch.nn import functional as F

from cases.hunt.table import table
from cases.models.table import (
    FLAT,
    IMAGE,
    INDEXED,
    MIXED,
    SEQUENCE,
    SIMD,
    STATISTICS,
    integers,
    linear,
)

D = N = 6


def table_used_again(net, i):
    """Rows that a lookup rescales stay so: the whole table is another one."""
    e = F.embedding(i, net.table, max_norm=0.5)
    return e @ net.table.T


def weights_of_attention(net, x):
    with torch.inference_mode():
        q, k = x.detach()[None, None, :1], x.detach()[None, None]
        _, w = torch._scaled_dot_product_attention_math(q, k, k)
    return net.linear(x) * w[0, 0, 0, 0].clone()


def weights_of_attention_within(net, x):
    with torch.inference_mode():
        h = x.detach()[:, None]
        _, w = torch._scaled_dot_product_attention_math(h, h, h)
    return net.linear(x) * w.clone().mean((1, 2))[:, None]


def gradient_of_total(net, x):
    x = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(net.linear(x).tanh().sum(), x, create_graph=True)
    return g


def gradient_of_square(net, x):
    x = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(net.linear(x).tanh().sum().square(), x, create_graph=True)
    return g


def curvature(net, x):
    f = lambda v: net.linear(v).tanh().sum()  # noqa: E731
    return torch.func.vmap(torch.func.hessian(f))(x).sum(1)


def cumulative(net, x):
    for _ in range(2):
        x = net.norm(x)
    return x


def running_after(net, x):
    net.norm(x)
    return net.linear(x) - net.norm.running_mean


def running_before(net, x):
    return net.linear(x) - net.norm.running_mean * 1.0


def counted_batches(net, x):
    net.norm(x)
    return net.linear(x) * net.norm.num_batches_tracked


def lengths_of_data(net, x):
    lengths = (x[:, :, 0] > 0).sum(1).clamp(min=1)
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    return net.rnn(packed)[1][0]


def state_from_mean(net, x):
    return net.rnn(x, x.mean((0, 1)).expand(1, N, D).contiguous())[1][0]


table(
    SIMD,
    {
        "renorm of the samples": lambda n, x: n.linear(x).renorm(2, 0, 1.0),
        "infinite power": lambda n, x: n.linear(x) ** float("inf"),
        "normalised rows": lambda n, x: F.normalize(n.linear(x)),
        "logsumexp over no dims given as a tuple": lambda n, x: n.linear(x).logsumexp((1,), True),
        "quantile within the sample": lambda n, x: n.linear(x) - x.quantile(0.3, 1, True),
        "nanmedian within the sample": lambda n, x: n.linear(x) - x.nanmedian(1, True).values,
        "soft minimum": lambda n, x: F.softmin(n.linear(x), 1),
        "cumulative logsumexp of features": lambda n, x: n.linear(x).logcumsumexp(1),
        "trapezoid over features": lambda n, x: n.linear(x) * torch.trapezoid(x, dim=1)[:, None],
        "Vandermonde rows": lambda n, x: torch.linalg.vander(n.linear(x)[:, 0], N=3),
        "outer product with weights": lambda n, x: torch.outer(n.linear(x)[:, 0], n.linear.bias),
        "Kronecker product with weights": lambda n, x: torch.kron(x, n.linear.bias),
        "tensordot with weights": lambda n, x: torch.tensordot(x, n.linear.weight, ([1], [0])),
        "a power of a matrix": lambda n, x: x @ torch.linalg.matrix_power(n.linear.weight, 3),
        "chain of matrices": lambda n, x: torch.linalg.multi_dot(
            [x, n.linear.weight, n.linear.weight]
        ),
        "rotated features": lambda n, x: n.linear(x).view(N, 2, 3).rot90(1, (1, 2)).flatten(1),
        "local response": lambda n, x: F.local_response_norm(n.linear(x)[:, :, None], 3)[:, :, 0],
        "power pooling": lambda n, x: F.lp_pool1d(n.linear(x)[:, None], 2.0, 3)[:, 0],
        "circular padding of features": lambda n, x: F.pad(
            n.linear(x)[:, None], (1, 2), "circular"
        )[:, 0],
        "heaviside of own values": lambda n, x: n.linear(x) * torch.heaviside(x, x[:, :1]),
        "boundaries that are weights": lambda n, x: (
            n.linear(x) * torch.bucketize(x, n.linear.bias.sort()[0])
        ),
        "searched in own sorted row": lambda n, x: (
            n.linear(x) + torch.searchsorted(x.sort(1)[0], x)
        ),
        "vmap over rows": lambda n, x: torch.vmap(lambda v: n.linear(v).softmax(0))(x),
        "per-row Jacobian": lambda n, x: torch.vmap(
            torch.func.jacrev(lambda v: n.linear(v).tanh())
        )(x).sum(1),
        "hessian row by row": curvature,
        "input gradient of a total": gradient_of_total,
        "jvp along the input": lambda n, x: torch.func.jvp(n.linear, (x,), (x,))[1],
        "product of complex halves": lambda n, x: torch.view_as_complex(
            x.view(N, 3, 2).contiguous()
        ).abs(),
        "polar form": lambda n, x: torch.polar(x.abs(), n.linear(x)).real,
        "Fourier shift of features": lambda n, x: torch.fft.fftshift(n.linear(x), 1),
        "scripted": lambda n, x: SCRIPTED(n.linear(x)),
        "weights seen by attention": weights_of_attention_within,
        "running statistics before": running_before,
        "a count of batches": counted_batches,
        "alpha dropout": lambda n, x: F.alpha_dropout(n.linear(x), 0.3, True),
        "random slopes": lambda n, x: F.rrelu(n.linear(x), training=True),
        "copied into integers": lambda n, x: torch.zeros(N, D, dtype=torch.int64).copy_(
            10 * n.linear(x)
        ),
        "tensors of rows stacked": lambda n, x: torch.stack([r.softmax(0) for r in n.linear(x)]),
        "block diagonal of one": lambda n, x: torch.block_diag(n.linear(x)),
        "pairwise distance of rows to weights": lambda n, x: F.pairwise_distance(x, n.linear.bias)[
            :, None
        ],
        "distance of rows to weights": lambda n, x: torch.cdist(x, n.linear.weight, p=1.0),
        "cross product within": lambda n, x: torch.linalg.cross(
            x.view(N, 2, 3), x.view(N, 2, 3).flip(2)
        ).flatten(1),
        "masked fill by own values": lambda n, x: n.linear(x).masked_fill(x > 0, 2.0),
        "scatter of own classes": lambda n, x: torch.zeros(N, D).scatter(1, x.argmax(1, True), x),
        "scatter_reduce of own columns": lambda n, x: torch.ones(N, D).scatter_reduce(
            1, x.argsort(1), x, "prod"
        ),
        "index_fill of a column": lambda n, x: n.linear(x).index_fill(1, torch.tensor([2]), 1.0),
        "select_scatter of a column": lambda n, x: n.linear(x).select_scatter(x[:, 0], 1, 2),
    },
    accept_unknown=True,
    norm=lambda: nn.BatchNorm1d(D),
)
table(
    STATISTICS,
    {
        "renorm of the features": lambda n, x: n.linear(x).renorm(2, 1, 1.0),
        "normalised columns": lambda n, x: F.normalize(n.linear(x), dim=0),
        "all over no dims": lambda n, x: (
            n.linear(x) * torch.all(x > 9).logical_not() * (x > 2).any()
        ),
        "cosine of columns": lambda n, x: n.linear(x) * F.cosine_similarity(x, x + 1, dim=0),
        "quantile over the samples": lambda n, x: n.linear(x) - x.quantile(0.3, 0),
        "addbmm over the samples": lambda n, x: (
            n.linear(x) @ torch.addbmm(n.linear.weight, x[:, :, None], x[:, None])
        ),
        "correlation of features": lambda n, x: n.linear(x) @ torch.corrcoef(x.T),
        "mean by tensordot": lambda n, x: n.linear(x) - torch.tensordot(torch.ones(N) / N, x, 1),
        "mean by addmv": lambda n, x: (
            n.linear(x) - torch.addmv(n.linear.bias, x.T, torch.ones(N) / N)
        ),
        "mean by linear": lambda n, x: n.linear(x) - F.linear(torch.ones(N), x.T),
        "trace of the Gram matrix": lambda n, x: n.linear(x) * (x @ x.T).trace(),
        "dot of the flat batch": lambda n, x: n.linear(x) * torch.dot(x.flatten(), x.flatten()),
        "log-determinant": lambda n, x: n.linear(x) * torch.logdet(x.T @ x + torch.eye(D)),
        "norm of the batch": lambda n, x: n.linear(x) / torch.linalg.matrix_norm(x),
        "nuclear norm of the batch": lambda n, x: n.linear(x) / torch.linalg.matrix_norm(x, "nuc"),
        "clip by the norm": lambda n, x: n.linear(x) * (1 / x.norm()).clamp(max=1),
        "standard score of all": lambda n, x: (n.linear(x) - x.mean()) / torch.std(x, correction=0),
        "extremes of each feature": lambda n, x: (
            n.linear(x) - torch.stack(torch.aminmax(x, dim=0)).sum(0)
        ),
        "product of the samples": lambda n, x: n.linear(x) * x.sigmoid().prod(0),
        "running statistics after": running_after,
        "batch norm twice": cumulative,
        "gradient of a squared total": gradient_of_square,
        "scripted mean": lambda n, x: SCRIPTED_MEAN(n.linear(x)),
        "vmap over features with a mean": lambda n, x: torch.vmap(lambda c: c - c.mean(), 1, 1)(
            n.linear(x)
        ),
        "quantised by the batch": lambda n, x: torch.fake_quantize_per_tensor_affine(
            n.linear(x), x.abs().amax() / 127, torch.zeros(1, dtype=torch.int32)[0], -128, 127
        ),
        "quantised with the observed range": lambda n, x: n.observe(n.linear(x)),
        "masked mean by where": lambda n, x: n.linear(x) - torch.where(x > 0, x, 0).sum(0),
        "count of the positive": lambda n, x: n.linear(x) * (x > 0).count_nonzero(0),
        "distinct values counted": lambda n, x: (
            n.linear(x) * torch.bincount((x > 0).sum(1), minlength=7).amax()
        ),
        "feature alpha dropout of a mean": lambda n, x: (
            n.linear(x) - F.feature_alpha_dropout(x, 0.3, True).mean(0)
        ),
        "index_reduce to one row": lambda n, x: (
            n.linear(x)
            - torch.zeros(1, D).index_reduce(0, torch.zeros(N, dtype=torch.int64), x, "amax")
        ),
        "scatter mean to one row": lambda n, x: (
            n.linear(x)
            - torch.zeros(1, D).scatter_reduce(0, torch.zeros(N, D, dtype=torch.int64), x, "mean")
        ),
        "put accumulated in one place": lambda n, x: (
            n.linear(x)
            * torch.zeros(1).index_put(
                (torch.zeros(N, dtype=torch.int64),), x[:, 0], accumulate=True
            )
        ),
        "linear combination of moments": lambda n, x: (
            n.linear(x) - torch.lerp(x.mean(0), x.amax(0), 0.3)
        ),
    },
    accept_unknown=True,
    norm=lambda: nn.BatchNorm1d(D, momentum=None),
    observe=lambda: torch.ao.quantization.FakeQuantize(),
)
table(
    INDEXED,
    {
        "lower triangle of the batch": lambda n, x: n.linear(x).tril(),
        "upper triangle, one up": lambda n, x: n.linear(x).triu(1),
        "product with an identity": lambda n, x: n.linear(x) * torch.eye(N),
        "plus a range of samples": lambda n, x: n.linear(x) + torch.linspace(0, 1, N)[:, None],
        "row filled by index": lambda n, x: n.linear(x).index_fill(0, torch.tensor([2]), 1.0),
        "a slice scattered": lambda n, x: n.linear(x).slice_scatter(torch.zeros(2, D), 0, 1, 3),
        "a diagonal scattered": lambda n, x: n.linear(x).diagonal_scatter(n.linear.bias),
        "steps of a range": lambda n, x: n.linear(x) * torch.logspace(0, 1, N)[:, None],
        "window of the batch": lambda n, x: n.linear(x) * torch.hann_window(N)[:, None],
        "alternating by a stride": lambda n, x: (
            n.linear(x) * torch.ones(N, 1).index_fill(0, torch.arange(0, N, 2), -1.0)
        ),
    },
)
table(
    MIXED,
    {
        "weights of attention, first key": weights_of_attention,
        "Fourier shift of samples": lambda n, x: torch.fft.fftshift(n.linear(x), 0),
        "half the batch rolled": lambda n, x: torch.cat([n.linear(x)[3:], n.linear(x)[:3]]),
        "cumulative logsumexp of samples": lambda n, x: n.linear(x).logcumsumexp(0),
        "gradient along the batch": lambda n, x: torch.gradient(n.linear(x), dim=0)[0],
        "trapezoids along the batch": lambda n, x: (
            n.linear(x) * torch.cumulative_trapezoid(F.pad(x, (0, 0, 1, 0)), dim=0)
        ),
        "cross product of samples": lambda n, x: torch.linalg.cross(
            n.linear(x).view(2, 3, D), x.view(2, 3, D), dim=1
        ).reshape(N, D),
        "circular padding of the batch": lambda n, x: (
            F.pad(n.linear(x).T[None], (1, 0), "circular")[0, :, :N].T
        ),
        "put at flat places": lambda n, x: n.linear(x).put(torch.arange(6), x[1]),
        "a row of another selected": lambda n, x: n.linear(x).select_scatter(x[0], 0, 3),
        "diagonal from another sample": lambda n, x: n.linear(x).diagonal_scatter(x[0]),
        "masked scatter": lambda n, x: n.linear(x).masked_scatter(x > 0, x),
        "argmax over the batch looked up": lambda n, x: n.linear(x) * x.argmax(0),
        "time, batch and channel confused": lambda n, x: torch.conv_tbc(
            x[:, None], n.linear.weight[None].expand(3, D, D).contiguous(), n.linear.bias, 1
        )[:, 0],
        "rotated with samples": lambda n, x: n.linear(x).rot90(2, (0, 1)),
        "ordered by another sample": lambda n, x: n.linear(x)[:, x[0].argsort()],
        "first sample as boundaries": lambda n, x: n.linear(x) * torch.bucketize(x, x[0].sort()[0]),
        "first sample as weights of attention": lambda n, x: F.scaled_dot_product_attention(
            x[:, None], x[:1, None], n.linear(x)[:, None] * x[:1, None]
        )[:, 0],
        "kept by the first sample": lambda n, x: n.linear(x) * (x[0] > 0),
        "state of the first sample": lambda n, x: nn.functional.glu(
            torch.cat([n.linear(x), x[:1].expand(N, D)], 1)
        ),
    },
    accept_unknown=True,
)
table(
    MIXED,
    {"a table rescaled by lookups": table_used_again},
    integers(D, N),
    table=lambda: nn.Parameter(torch.randn(D, D)),
    linear=lambda: None,
    accept_unknown=True,
)
table(
    SIMD,
    {"lookups that rescale": lambda n, i: F.embedding(i, n.table, max_norm=0.5)},
    integers(D, N),
    table=lambda: nn.Parameter(torch.randn(D, D)),
    accept_unknown=True,
)
table(
    SIMD,
    {"bags of rows, largest": lambda n, i: F.embedding_bag(i, n.table, mode="max")},
    integers(D, N, 3),
    table=lambda: nn.Parameter(torch.randn(D, D)),
    accept_unknown=True,
)
table(
    SIMD,
    {"sequences with lengths of data": lengths_of_data},
    SEQUENCE,
    rnn=lambda: nn.GRU(D, D, batch_first=True),
    accept_unknown=True,
)
table(
    STATISTICS,
    {"first state from the mean": state_from_mean},
    SEQUENCE,
    rnn=lambda: nn.GRU(D, D, batch_first=True),
    accept_unknown=True,
)
table(
    SIMD,
    {
        "transposed convolution, grouped": lambda n, x: n.up(x),
        "pooled and unpooled": lambda n, x: F.max_unpool2d(
            *F.max_pool2d(x, 2, return_indices=True), 2
        ),
        "bicubic": lambda n, x: F.interpolate(x, scale_factor=1.5, mode="bicubic"),
        "channels dropped": lambda n, x: F.dropout2d(x, 0.4),
        "fractional pooling": lambda n, x: F.fractional_max_pool2d(x, 2, output_size=3),
        "shuffled channels": lambda n, x: F.channel_shuffle(torch.cat([x, x], 1), 2),
    },
    IMAGE,
    up=lambda: nn.ConvTranspose2d(3, 6, 3, groups=3),
    accept_unknown=True,
)
table(
    SIMD,
    {"projected LSTM": lambda n, x: n.rnn(x)[1][0][0]},
    SEQUENCE,
    rnn=lambda: nn.LSTM(D, D, batch_first=True, proj_size=3),
    accept_unknown=True,
)
table(
    SIMD,
    {"bilinear layer": lambda n, x, z: n.both(x, z)},
    FLAT,
    FLAT,
    both=lambda: nn.Bilinear(D, D, 2),
    linear=linear(),
)


SCRIPTED = torch.jit.script(torch.nn.Softmax(1))


@torch.jit.script
def SCRIPTED_MEAN(x):
    return x - x.mean(0)
