"""Models that make numbers, sizes and types of the batch where it is easily overlooked."""

import math
import operator
from collections import Counter

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from cases.hunt.table import table
from cases.models.table import FLAT, INDEXED, MIXED, SIMD, STATISTICS, integers, weight

D = N = 6


def count(x):
    """How many entries are positive, divided by the number of features."""
    return (x > 0).sum() // D


def outliers(x):
    """Rows with an entry beyond ten, of which a batch of normal numbers has none."""
    return x[:, 0][x.abs().amax(1) > 10]


# ---------------------------------------------------------------- tensors of tensors


table(
    STATISTICS,
    {
        "a count in a LongTensor": lambda n, x: n.linear(x) * torch.LongTensor([count(x), 1])[0],
        "a count in an IntTensor": lambda n, x: n.linear(x) * torch.IntTensor([count(x)]),
        "a count in a new tensor of its kind": lambda n, x: (
            n.linear(x) * torch.zeros(1, dtype=torch.int64).new([count(x)])
        ),
        "outliers counted in a LongTensor": lambda n, x: (
            n.linear(x) * (1 + torch.LongTensor([(x.abs() > 10).sum()]))
        ),
        "outliers in a BoolTensor": lambda n, x: (
            n.linear(x) * (1 + torch.BoolTensor([(x.abs() > 10).any()]).float())
        ),
        "a count in a ByteTensor": lambda n, x: n.linear(x) * torch.ByteTensor([count(x)]),
        "a count in a ShortTensor, in a list": lambda n, x: (
            n.linear(x) * torch.ShortTensor([[1, count(x)], [1, 1]]).sum()
        ),
        "a count as an index": lambda n, x: n.linear(x) * operator.index(count(x)),
        "a count as a complex number": lambda n, x: n.linear(x) * complex(count(x)).real,
        "how often a range is gone through": lambda n, x: sum(
            (n.linear(x) for _ in range(count(x))), n.linear(x)
        ),
        "a mean in a DoubleTensor": lambda n, x: (
            n.linear(x) * torch.DoubleTensor([x.mean()]).float()
        ),
        "a mean in a HalfTensor": lambda n, x: n.linear(x) * torch.HalfTensor([x.mean()]).float(),
        "a mean in a new tensor": lambda n, x: n.linear(x) * x.new([x.mean(), x.std()])[0],
        "an item in a new tensor": lambda n, x: n.linear(x) * x.new([x.mean().item()]),
        "a count in a new_tensor": lambda n, x: n.linear(x) * x.new_tensor([count(x), 1])[0],
        "a new tensor of as many entries": lambda n, x: (
            n.linear(x) * x.new(int(count(x)) + 1).fill_(1.0).sum()
        ),
        "a new tensor of as many entries, by an item": lambda n, x: (
            n.linear(x) * x.new(count(x).item() + 1).fill_(1.0).sum()
        ),
        "a mean in a FloatTensor": lambda n, x: n.linear(x) * torch.FloatTensor([x.mean()]),
        "rows of moments in a FloatTensor": lambda n, x: (
            n.linear(x)
            * torch.FloatTensor([[a, b] for a, b in zip(x.mean(0), x.std(0), strict=True)]).sum()
        ),
        "a mean in a Tensor": lambda n, x: n.linear(x) * torch.Tensor([x.mean(), x.std()])[0],
        "a mean in torch.asarray": lambda n, x: n.linear(x) * torch.asarray([x.mean(), x.std()])[0],
        "means as a list": lambda n, x: n.linear(x) * torch.tensor(list(x.mean(0))).sum(),
        "a count beside a number": lambda n, x: n.linear(x) * torch.tensor((count(x), 2))[0],
        "a mean in a sparse tensor": lambda n, x: (
            n.linear(x) * torch.sparse_coo_tensor([[0]], [x.mean()], (1,)).to_dense()
        ),
    },
    accept_unknown=True,
)


table(
    SIMD,
    {
        "numbers in a LongTensor": lambda n, x: n.linear(x) * torch.LongTensor([2, x.shape[1]])[0],
        "numbers in a new tensor": lambda n, x: n.linear(x) * x.new([2.0, 1.0])[0],
        "numbers of parameters in a new tensor": lambda n, x: (
            n.linear(x) * x.new([n.linear.bias[0], n.linear.bias.sum().item()])[1]
        ),
        "a new tensor of the size of features": lambda n, x: (
            n.linear(x) + x.new(x.shape[1]).fill_(2.0)
        ),
    },
)


# ---------------------------------------------------------------- sizes


def sized(function):
    """A model scaled by a number made of parameters and of how many entries are positive."""
    return lambda net, x: net.linear(x) * function(net.linear.bias, count(x))


table(
    STATISTICS,
    {
        "ones expanded as the outliers": lambda n, x: (
            n.linear(x) * (1 + torch.ones(1).expand_as(outliers(x)).sum())
        ),
        "a bias expanded as a selection": lambda n, x: (
            n.linear(x) * n.linear.bias[:1].expand_as(x[:, 0][x[:, 0] > 0]).sum()
        ),
        "resized as a selection": lambda n, x: (
            n.linear(x) * torch.ones(0).resize_as_(x[:, 0][x[:, 0] > 0]).fill_(1).sum()
        ),
        "resized as the outliers": lambda n, x: (
            n.linear(x) * (1 + torch.ones(0).resize_as_(outliers(x)).fill_(1).sum())
        ),
        "rows of an identity": sized(lambda b, k: torch.eye(k).sum()),
        "points on a line": sized(lambda b, k: torch.linspace(0, 1, k).sum()),
        "the largest of a bias": sized(lambda b, k: b.topk(k).values.sum()),
        "the first chunk of a bias": sized(lambda b, k: b.chunk(k)[0].sum()),
        "a bias padded": sized(lambda b, k: F.pad(b, (0, k), value=1.0).sum()),
        "an entry selected": sized(lambda b, k: b.select(0, k)),
        "an entry narrowed to": sized(lambda b, k: b.narrow(0, k, 1)),
        "the first entries": sized(lambda b, k: b[:k].sum()),
        "counted with a least length": sized(
            lambda b, k: torch.bincount(torch.zeros(1, dtype=torch.int64), minlength=k).numel()
        ),
        "a diagonal of the weights": sized(lambda b, k: torch.outer(b, b).diagonal(k).sum()),
        "a triangle of the weights": sized(lambda b, k: torch.outer(b, b).tril(k - 3).sum()),
        "a bias expanded": sized(lambda b, k: b[:1].expand(k).sum()),
        "a bias repeated entry by entry": sized(lambda b, k: b.repeat_interleave(k).sum()),
        "a bias pooled to a length": sized(lambda b, k: F.adaptive_avg_pool1d(b[None], k).sum()),
        "a bias resampled": sized(lambda b, k: F.interpolate(b[None, None], size=int(k)).sum()),
        "a size of PyTorch": sized(lambda b, k: torch.Size([k]).numel()),
    },
    accept_unknown=True,
)
table(
    STATISTICS,
    {
        "classes counted by a one-hot": lambda n, i: (
            n.row * F.one_hot(i, -1).float().mean(1, keepdim=True)
        ),
        "width of a one-hot": lambda n, i: (
            n.row * i[:, None] * F.one_hot(i, num_classes=-1).shape[1]
        ),
        "smoothed labels of unknown width": lambda n, i: (
            n.row * (0.9 * F.one_hot(i, -1) + 0.1 / F.one_hot(i, -1).shape[1]).amax(1, keepdim=True)
        ),
    },
    integers(5, N),
    linear=lambda: None,
    row=weight(1, 3),
    accept_unknown=True,
)
table(
    SIMD,
    {
        "classes of a known width": lambda n, i: F.one_hot(i, 5).float() @ n.table,
    },
    integers(5, N),
    linear=lambda: None,
    table=weight(5, 3),
)


# ---------------------------------------------------------------- numbers as arguments


table(
    STATISTICS,
    {
        "a spread as the slope of an activation": lambda n, x: F.leaky_relu(n.linear(x), x.std()),
        "a mean as a threshold": lambda n, x: F.threshold(n.linear(x), x.mean(), 0.0),
        "a mean that fills": lambda n, x: n.linear(x) * torch.full((N, 1), x.mean()),
        "a spread in an exponential unit": lambda n, x: F.elu(n.linear(x), x.std()),
        "a spread as a sharpness": lambda n, x: F.softplus(n.linear(x), x.std()),
        "extremes as bounds": lambda n, x: n.linear(x).clamp(*x.aminmax()),
        "a mean as the value of a product": lambda n, x: torch.addcmul(
            n.linear(x), x, x, value=x.mean()
        ),
        "a variance as the eps of a norm": lambda n, x: F.layer_norm(
            n.linear(x), (D,), eps=x.var()
        ),
        "a spread as an exponent": lambda n, x: n.linear(x).abs().pow(x.std()),
        "a mean along a diagonal": lambda n, x: (
            n.linear(x) @ n.linear.weight.clone().fill_diagonal_(x.mean())
        ),
        "a mean where there is no number": lambda n, x: torch.nan_to_num(
            n.linear(x).log(), nan=x.mean()
        ),
        "the least where masked": lambda n, x: n.linear(x).masked_fill(x > 0, x.min().item()),
        "a constant of an initialiser": lambda n, x: (
            n.linear(x) * nn.init.constant_(torch.empty(D), x.mean().item())
        ),
        "an exponential of Python": lambda n, x: n.linear(x) * math.exp(x.mean()),
        "an exponential of numpy": lambda n, x: n.linear(x) * float(np.exp(x.mean().item())),
        "the largest by Python's max": lambda n, x: n.linear(x) * max(x.mean(0)),
        "the third by Python's sorted": lambda n, x: n.linear(x) * sorted(x[:, 0])[2],
        "truths counted by a Counter": lambda n, x: (
            n.linear(x) * Counter((x[:, 0] > 0).tolist())[True]
        ),
        "any of a generator": lambda n, x: n.linear(x) * (1 + any(r.sum() > 3 for r in x)),
        "a count among numbers": lambda n, x: n.linear(x) * (2.0 if count(x) in [3, 4] else 1.0),
    },
    accept_unknown=True,
)
table(
    MIXED,
    {
        "the first of a generator": lambda n, x: (
            n.linear(x) * next((i for i, r in enumerate(x) if r.sum() > 0), 0)
        ),
        "rolled by a count": lambda n, x: n.linear(x).roll(count(x), 0),
    },
    accept_unknown=True,
)


# ---------------------------------------------------------------- types and memory


def rows_kept_in(dtype):
    """The first half of the rows goes through a buffer of another type, and back."""

    def forward(net, x):
        h = net.linear(x).detach().clone()
        kept = torch.empty(3, D, dtype=dtype)
        kept.copy_(h[:3])
        h[:3] = kept
        return h * net.linear.bias

    return forward


def last_rows_from_a_cache(net, x):
    h = net.linear(x).detach()
    cache = torch.zeros(N, D, dtype=torch.float16)
    cache[:] = h
    out = h.clone()
    out[3:] = cache[3:]
    return out * net.linear.bias


def product_into_less_precision(net, x):
    h = net.linear(x).detach()
    low = torch.empty(3, D, dtype=torch.bfloat16)
    torch.mul(h[:3], 0.5, out=low)
    out = 0.5 * h
    out[:3] = low
    return out * net.linear.bias


def written_to(make, write):
    """The first rows are written into one tensor that is made, the last ones into another."""

    def forward(net, x):
        h = net.linear(x).detach()
        low, wide = make(torch.bfloat16), make(torch.float32)
        write(low, h[:3])
        write(wide, h[3:])
        return torch.cat([low.float(), wide]) * net.linear.bias

    return forward


def zeros(dtype):
    return torch.zeros(3, D, dtype=dtype)


def tenths(dtype):
    return torch.full((3, D), 0.1, dtype=dtype)


def all_rows_added_into_less_precision(net, x):
    low = torch.zeros(N, D, dtype=torch.bfloat16)
    low += net.linear(x).detach()
    return low.float() * net.linear.bias


def all_rows_from_a_cache(net, x):
    h = net.linear(x).detach()
    cache = torch.zeros(N, D, dtype=torch.float16)
    cache[:] = h
    return h.copy_(cache) * net.linear.bias


def bits_cut(net, x):
    h = net.linear(x).detach().clone()
    h.view(torch.int32).bitwise_and_(-65536)
    return h * net.linear.bias


def bits_cut_in_half_of_the_rows(net, x):
    h = net.linear(x).detach().clone()
    h[:3].view(torch.int32).bitwise_and_(-65536)
    return h * net.linear.bias


def flat_diagonal_zeroed(net, x):
    h = net.linear(x).clone()
    h.view(-1)[:: N + 1] = 0.0
    return h


def resized_and_back(net, x):
    h = net.linear(x).detach().clone()
    h.resize_(3, 12)
    return h.resize_(N, D) * net.linear.bias


def resized_flipped_and_back(net, x):
    h = net.linear(x).detach().clone().resize_(4, 9).flip(1).contiguous()
    return h.resize_(N, D) * net.linear.bias


def scratch_used_again(net, x):
    scratch, rows = torch.zeros(D), []
    for row in x:
        torch.mv(net.linear.weight.detach(), row, out=scratch)
        rows.append(scratch * net.linear.bias)
    return torch.stack(rows)


def scratch_kept(net, x):
    scratch, rows = torch.zeros(D), []
    for row in x:
        torch.mv(net.linear.weight.detach(), row, out=scratch)
        rows.append(scratch)
    return torch.stack(rows) * net.linear.bias


def accumulator_kept(net, x):
    total, rows = torch.zeros(D), []
    for row in net.linear(x).detach():
        total += row
        rows.append(total)
    return torch.stack(rows) * net.linear.bias


def accumulator_replaced(net, x):
    total, rows = torch.zeros(D), []
    for row in net.linear(x):
        total = total + row
        rows.append(total)
    return torch.stack(rows)


def rows_written_in_reverse(net, x):
    out = torch.empty(N, D)
    for i in range(N):
        out[N - 1 - i].copy_(net.linear(x[i]))
    return out


def cache_read_at_once(net, x):
    net.cache[:N] = net.linear(x).detach()
    return net.linear(x) * net.cache[:N]


def cache_one_behind(net, x):
    net.cache[1 : N + 1] = net.linear(x).detach()
    return net.linear(x) * net.cache[:N]


CACHE = {"cache": lambda: nn.Parameter(torch.zeros(8, D), requires_grad=False)}

table(
    INDEXED,
    {
        "half of the rows kept in bfloat16": rows_kept_in(torch.bfloat16),
        "half of the rows kept in float16": rows_kept_in(torch.float16),
        "half of the rows kept in integers": rows_kept_in(torch.int32),
        "the last rows from a cache in float16": last_rows_from_a_cache,
        "a product into less precision": product_into_less_precision,
        "half of the rows kept in bits of eight": rows_kept_in(torch.float8_e4m3fn),
        "half of the rows added in bfloat16": written_to(zeros, lambda out, h: out.add_(h)),
        "half of the rows joined in bfloat16": written_to(
            zeros, lambda out, h: torch.cat([h], out=out)
        ),
        "half of the rows summed in bfloat16": written_to(
            zeros, lambda out, h: torch.sum(h[None], 0, out=out)
        ),
        "a tenth in less precision for half of the rows": written_to(
            tenths, lambda out, h: out.copy_(out * h.to(out.dtype).sign())
        ),
        "bits of half of the rows cut": bits_cut_in_half_of_the_rows,
        "a diagonal zeroed in the flat batch": flat_diagonal_zeroed,
    },
    accept_unknown=True,
)
table(
    SIMD,
    {
        "all rows from a cache in float16": all_rows_from_a_cache,
        "all rows added in bfloat16": all_rows_added_into_less_precision,
        "bits cut": bits_cut,
        "resized and back": resized_and_back,
        "a scratch buffer used again": scratch_used_again,
        "a cache read at once": cache_read_at_once,
        "what is left by bfloat16": lambda n, x: n.linear(x) - n.linear(x).bfloat16().float(),
    },
    accept_unknown=True,
    **CACHE,
)
table(
    MIXED,
    {
        "resized, flipped and back": resized_flipped_and_back,
        "a scratch buffer kept": scratch_kept,
        "a running sum, replaced": accumulator_replaced,
        "rows written in reverse": rows_written_in_reverse,
        "a cache one behind": cache_one_behind,
    },
    accept_unknown=True,
    **CACHE,
)
table(STATISTICS, {"a running sum, kept": accumulator_kept}, FLAT, accept_unknown=True)


# ---------------------------------------------------------------- nothing at all


table(
    SIMD,
    {
        "a penalty on no terms": lambda n, x: n.linear(x) + torch.zeros(0).sum(),
        "no tokens in front": lambda n, x: n.linear(x) + x.new_zeros(N, 0, D).sum(1),
        "no features left": lambda n, x: n.linear(x) + x[:, D:].sum(1, keepdim=True),
        "no samples left": lambda n, x: torch.cat([n.linear(x), n.linear(x[N:])]),
        "no rows of a table": lambda n, x: n.linear(x) + n.linear.weight[:0].sum(0),
        "a product of no features": lambda n, x: n.linear(x) + x[:, :0] @ n.linear.weight[:0],
        "sums along no features": lambda n, x: n.linear(x) + x[:, :0].cumsum(1).sum(1, True),
        "a product of nothing": lambda n, x: n.linear(x) * x[:, :0].prod(1, keepdim=True),
        "the length of nothing": lambda n, x: n.linear(x) + x[:, :0].norm(dim=1, keepdim=True),
        "shares of nothing": lambda n, x: n.linear(x) + x[:, :0].softmax(1).sum(1, True),
        "nothing in order": lambda n, x: n.linear(x) + x[:, :0].sort(1).values.sum(1, True),
        "distances to no samples": lambda n, x: n.linear(x) + torch.cdist(x, x[N:]).sum(1, True),
        "no words": lambda n, x: (
            n.linear(x) + F.embedding(torch.zeros(N, 0, dtype=torch.int64), n.linear.weight).sum(1)
        ),
        "an empty chunk": lambda n, x: torch.cat(
            [n.linear(chunk).softmax(1) for chunk in (x[:4], x[4:], x[N:])]
        ),
        "a loss of no samples": lambda n, x: (
            n.linear(x) + F.mse_loss(x[N:], 2 * x[N:], reduction="sum")
        ),
        "no mask at all": lambda n, x: (
            n.linear(x) * (1 + torch.zeros(0, dtype=torch.bool).any().float())
        ),
    },
    accept_unknown=True,
)


# In another batch there may be some.
table(
    STATISTICS,
    {
        "the sum of no outliers": lambda n, x: n.linear(x) * (1 + outliers(x).sum()),
        "the product of no outliers": lambda n, x: n.linear(x) * outliers(x).prod(),
        "ones for no outliers": lambda n, x: n.linear(x) * (1 + torch.ones_like(outliers(x)).sum()),
        "squares of no outliers, repeated": lambda n, x: (
            n.linear(x) * (1 + outliers(x).expand(3, -1).reshape(-1).square().sum())
        ),
        "ones for no large mean": lambda n, x: (
            n.linear(x) * (1 + torch.ones_like(x.mean(0)[x.mean(0) > 10]).sum())
        ),
    },
    accept_unknown=True,
)


# ---------------------------------------------------------------- numbers that grow


def sine_map(net, x):
    """Each step makes rounding five times larger: still of each sample alone."""
    h = net.linear(x).tanh()
    for _ in range(60):
        h = torch.cos(5 * h)
    return h


def reservoir(net, x):
    h = torch.zeros(len(x), 16)
    for t in range(60):
        h = torch.sin(3 * (h @ net.recurrent) + x[:, t % D, None])
    return h[:, :3]


table(
    SIMD,
    {"a chaotic map": sine_map, "a chaotic reservoir": reservoir},
    recurrent=lambda: nn.Parameter(torch.randn(16, 16) / 2),
    accept_unknown=True,
)
