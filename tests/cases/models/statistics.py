"""Statistics of the batch, or of groups of samples, by hand."""

import numpy as np
import torch
from torch.nn import functional as F

from cases.models.table import (
    FLAT,
    GROUPS,
    IMAGE,
    MIXED,
    ODD,
    SIMD,
    STATISTICS,
    C,
    D,
    N,
    conv,
    forward,
    integers,
    linear,
    norm,
    standardise,
    weight,
)

# ---------------------------------------------------------------- statistics by hand


@forward("mean and std by hand", STATISTICS)
def _(net, x):
    h = net.linear(x)
    return (h - h.mean(0)) / h.std(0)


@forward("mean and std by hand, batch of five", STATISTICS, ODD)
def _(net, x):
    h = net.linear(x)
    return (h - h.mean(0)) / h.std(0)


@forward("mean and std over features by hand", SIMD)
def _(net, x):
    return standardise(net.linear(x), 1)


@forward("var_mean by hand", STATISTICS)
def _(net, x):
    h = net.linear(x)
    var, mean = torch.var_mean(h, 0)
    return (h - mean) * torch.rsqrt(var + 1e-5)


@forward("mean by einsum with ones", STATISTICS)
def _(net, x):
    h = net.linear(x)
    return h - torch.einsum("n,nd->d", torch.ones(len(x)), h) / len(x)


@forward("mean by matmul with ones", STATISTICS)
def _(net, x):
    h = net.linear(x)
    return h - torch.ones(1, len(x)) @ h / len(x)


@forward("mean by bmm with ones", STATISTICS)
def _(net, x):
    h = net.linear(x)
    return h - torch.bmm(torch.full((1, 1, len(x)), 1 / len(x)), h[None])[0]


@forward("mean by sums and divisions", STATISTICS)
def _(net, x):
    h = net.linear(x)
    mean = h.sum(0) / len(x)
    return (h - mean) / ((h * h).sum(0) / len(x) - mean * mean + 1e-3).sqrt()


@forward("mean by Python's sum over rows", STATISTICS)
def _(net, x):
    h = net.linear(x)
    return h - sum(h) / len(h)


@forward("mean by pooling over the batch", STATISTICS, accept_unknown=True)
def _(net, x):
    h = net.linear(x)
    return h - F.avg_pool1d(h.t()[None], len(h))[0].t()


@forward("mean by the centring matrix", STATISTICS, accept_unknown=True)
def _(net, x):
    n = len(x)
    return (torch.eye(n) - torch.full((n, n), 1 / n)) @ net.linear(x)


@forward("weighted mean with weights by index", MIXED)
def _(net, x):
    h = net.linear(x)
    return h - torch.arange(1.0, len(x) + 1) @ h / 21


@forward("mean weighted by the samples' own scores", STATISTICS, score=linear(D, 1))
def _(net, x):
    return x - (net.score(x).softmax(0) * net.linear(x)).sum(0)


@forward("mean of all other samples", STATISTICS)
def _(net, x):
    h = net.linear(x)
    return h - (h.sum(0) - h) / (len(x) - 1)


@forward("detached statistics", STATISTICS)
def _(net, x):
    h = net.linear(x)
    return (h - h.mean(0).detach()) / h.std(0).detach()


@forward("statistics of .data", STATISTICS)
def _(net, x):
    h = net.linear(x)
    return h - h.data.mean(0)


@forward("statistics under no_grad", STATISTICS)
def _(net, x):
    h = net.linear(x)
    with torch.no_grad():
        mean, std = h.mean(0), h.std(0)
    return (h - mean) / std


@forward("statistic through item()", STATISTICS, accept_unknown=True)
def _(net, x):
    h = net.linear(x)
    return h / h.detach().abs().mean().item()


@forward("statistic through float()", STATISTICS, accept_unknown=True)
def _(net, x):
    h = net.linear(x)
    return h - float(h.detach().mean())


@forward("statistic through numpy", STATISTICS, accept_unknown=True)
def _(net, x):
    h = net.linear(x)
    return h - torch.from_numpy(h.detach().numpy().mean(0))


@forward("statistic through tolist()", STATISTICS, accept_unknown=True)
def _(net, x):
    h = net.linear(x)
    return h - torch.tensor(h.detach().mean(0).tolist())


@forward("statistic through an attribute of the module", STATISTICS)
def _(net, x):
    h = net.linear(x)
    net.centre = h.detach().mean(0)
    return torch.tanh(h) - net.centre


@forward("statistic through an attribute that holds a float", STATISTICS, accept_unknown=True)
def _(net, x):
    h = net.linear(x)
    net.scale = float(h.detach().abs().max())
    return h / net.scale


@forward("statistic through the size of a selection", STATISTICS, accept_unknown=True)
def _(net, x):
    h = net.linear(x)
    return h / (1 + h[h > 0].numel())


@forward("own value through numpy", SIMD, accept_unknown=True)
def _(net, x):
    return net.linear(torch.from_numpy(np.tanh(x.numpy())))


@forward("own value through item()", SIMD, accept_unknown=True)
def _(net, x):
    return torch.stack([net.linear(row) * row.abs().max().item() for row in x])


@forward("every prediction is the batch mean", STATISTICS)
def _(net, x):
    return net.linear(x).mean(0).expand(len(x), -1)


@forward("scaled by the largest entry of the batch", STATISTICS)
def _(net, x):
    h = net.linear(x)
    return h / h.abs().max()


@forward("quantised with the range of the batch, straight through", STATISTICS)
def _(net, x):
    h = net.linear(x)
    step = h.abs().amax().detach() / 7
    return h + ((h / step).round() * step - h).detach()


@forward("normalised along the batch", STATISTICS)
def _(net, x):
    return F.normalize(net.linear(x), dim=0)


@forward("normalised along the features", SIMD)
def _(net, x):
    return F.normalize(net.linear(x), dim=1)


@forward("median over the batch", STATISTICS)
def _(net, x):
    h = net.linear(x)
    return h - h.median(0).values


@forward("logsumexp over the batch", STATISTICS)
def _(net, x):
    h = net.linear(x)
    return h - h.logsumexp(0)


@forward("softmax over the batch", STATISTICS)
def _(net, x):
    return net.linear(x).softmax(0)


@forward("softmax with a default axis by position", SIMD)
def _(net, x):
    return net.linear(x).softmax(-1)


@forward("quantiles over the batch", STATISTICS)
def _(net, x):
    h = net.linear(x)
    low, high = h.quantile(torch.tensor([0.25, 0.75]), 0)
    return (h - low) / (high - low)


@forward("third largest of the batch as a threshold", STATISTICS)
def _(net, x):
    h = net.linear(x)
    return h * (h >= h.topk(3, 0).values[-1])


@forward("mean of the three largest of the batch", STATISTICS)
def _(net, x):
    h = net.linear(x)
    return h - h.topk(3, 0).values.mean(0)


@forward("the sample of largest norm, as a prototype", STATISTICS, accept_unknown=True)
def _(net, x):
    h = net.linear(x)
    return h * h[h.norm(dim=1).argmax()]


@forward("the first sample, as a prototype", MIXED)
def _(net, x):
    h = net.linear(x)
    return h - h[0]


@forward("statistics of statistics", STATISTICS)
def _(net, x):
    h = net.linear(x)
    mean = h.mean(0)
    return h - (mean - mean.mean()) / mean.std()


@forward("gate computed from a statistic by a layer", STATISTICS, gate=linear())
def _(net, x):
    h = net.linear(x)
    return h * net.gate(h.mean(0)).sigmoid()


@forward("a weight computed from a statistic", STATISTICS)
def _(net, x):
    return F.linear(net.linear(x), x.t() @ x / len(x))


@forward("statistic of another input", STATISTICS, FLAT, FLAT)
def _(net, x, y):
    return net.linear(x) + y.mean(0)


@forward("minibatch standard deviation", STATISTICS, head=linear(D + 1, D))
def _(net, x):
    return net.head(torch.cat([x, x.std(0).mean().expand(len(x), 1)], 1))


@forward("minibatch standard deviation of groups", GROUPS, IMAGE, conv=conv(C + 1))
def _(net, x):
    spread = x.view(2, 3, *x.shape[1:]).std(1).mean((1, 2, 3))
    plane = spread.repeat_interleave(3).view(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])
    return net.conv(torch.cat([x, plane], 1)).mean((2, 3))


@forward("noise scaled by the spread of the batch", STATISTICS)
def _(net, x):
    h = net.linear(x)
    return h + 0.1 * torch.randn_like(h) * h.std(0)


@forward("class means by one-hot matmul", STATISTICS, router=linear(D, 3))
def _(net, x):
    member = F.one_hot(net.router(x).argmax(1), 3).to(x)
    return x - member @ ((member.t() @ x) / (1 + member.sum(0)[:, None]))


@forward("class means by index_add", STATISTICS, router=linear(D, 3), accept_unknown=True)
def _(net, x):
    owner = net.router(x).argmax(1)
    return x - torch.zeros(3, x.shape[1]).index_add(0, owner, net.linear(x))[owner]


@forward("class frequencies by bincount", STATISTICS, FLAT, integers(4, N), accept_unknown=True)
def _(net, x, label):
    return net.linear(x) / torch.bincount(label, minlength=4)[label][:, None]


@forward("histogram of the batch", STATISTICS, accept_unknown=True)
def _(net, x):
    h = net.linear(x)
    return h * torch.histc(h.detach(), 6, -3, 3)


@forward(
    "one k-means step on a codebook, then assignment",
    STATISTICS,
    codebook=weight(3, D),
    accept_unknown=True,
)
def _(net, x):
    member = F.one_hot(torch.cdist(x, net.codebook).argmin(1), 3).to(x)
    codebook = 0.5 * net.codebook + 0.5 * member.t() @ x
    return net.linear(x) + codebook[torch.cdist(x, codebook).argmin(1)]


@forward("cross-correlation of features", STATISTICS)
def _(net, x):
    h = net.linear(x)
    return torch.einsum("nk,dk->nd", h, torch.einsum("nd,nk->dk", h, x))


@forward("linear attention over the batch, state first", STATISTICS, key=linear(), value=linear())
def _(net, x):
    return net.linear(x) @ (net.key(x).t() @ net.value(x))


@forward(
    "linear attention over the batch, scores first",
    STATISTICS,
    key=linear(),
    value=linear(),
    accept_unknown=True,
)
def _(net, x):
    return (net.linear(x) @ net.key(x).t()) @ net.value(x)


@forward("mean squared distance to all samples, by pairs", STATISTICS, accept_unknown=True)
def _(net, x):
    h = net.linear(x)
    return h * (h[:, None] - h[None]).square().sum(-1).mean(1)[:, None]


@forward("whitening by Cholesky", STATISTICS, (7, 3))
def _(net, x):
    h = net.linear(x)
    h = h - h.mean(0)
    factor = torch.linalg.cholesky(h.t() @ h / len(h) + 0.1 * torch.eye(h.shape[1]))
    return torch.linalg.solve_triangular(factor, h.t(), upper=False).t()


@forward("whitening by eigenvectors", STATISTICS, (7, 3))
def _(net, x):
    h = net.linear(x)
    values, vectors = torch.linalg.eigh(torch.cov(h.t()) + 0.1 * torch.eye(h.shape[1]))
    return (h - h.mean(0)) @ vectors * values.rsqrt() @ vectors.t()


@forward("ridge regression on the batch", STATISTICS, FLAT, (N, 2))
def _(net, x, y):
    h = net.linear(x)
    return h @ torch.linalg.solve(h.t() @ h + torch.eye(D), h.t() @ y)


@forward("kernel ridge regression on the batch", MIXED, FLAT, (N, 2))
def _(net, x, y):
    kernel = (-torch.cdist(x, x)).exp()
    return kernel @ torch.linalg.solve(kernel + torch.eye(len(x)), y)


@forward("statistic that a rare torch.where lets through", STATISTICS)
def _(net, x):
    h = net.linear(x)
    mean = h.mean(0)
    return torch.where(mean > 50, mean, h)


@forward("statistic in a clamp that rarely acts", STATISTICS)
def _(net, x):
    h = net.linear(x)
    return torch.minimum(h, 50 + h.std(0))


@forward("an if on a batch statistic that rarely fires", STATISTICS, accept_unknown=True)
def _(net, x):
    h = net.linear(x)
    return h / 2 if h.abs().max() > 50 else h


@forward("an if on a batch statistic that often fires", STATISTICS, accept_unknown=True)
def _(net, x):
    h = net.linear(x)
    return h / 2 if h.mean() > 0 else h


@forward("gradient norm style clipping of activations", STATISTICS)
def _(net, x):
    h = net.linear(x)
    return h * (1 / h.norm()).clamp(max=1.0)


@forward("raise on a batch statistic", SIMD, accept_unknown=True)
def _(net, x):
    h = net.linear(x)
    if not torch.isfinite(h).all():
        raise ValueError("not finite")
    return h


@forward("assert on a batch statistic", SIMD, accept_unknown=True)
def _(net, x):
    assert x.abs().max() < 1e6
    return net.linear(x)


@forward("an if on the sample's own value", SIMD, accept_unknown=True)
def _(net, x):
    return torch.stack([net.linear(row) if row.sum() > 0 else -row for row in x])


@forward(
    "fixed point iterated until the whole batch has converged", STATISTICS, accept_unknown=True
)
def _(net, x):
    w, z = 0.4 * F.normalize(net.linear.weight, dim=None), torch.zeros_like(x)
    while True:
        new = torch.tanh(z @ w.t() + x)
        if (new - z).abs().max() < 0.02:
            return new
        z = new


@forward("fixed point iterated five times", SIMD)
def _(net, x):
    z = torch.zeros_like(x)
    for _ in range(5):
        z = torch.tanh(net.linear(z) + x)
    return z


@forward("a statistic times zero", SIMD, accept_unknown=True)
def _(net, x):
    h = net.linear(x)
    return h + 0 * h.mean(0)


@forward("a statistic that softmax cancels", SIMD, accept_unknown=True)
def _(net, x):
    h = net.linear(x)
    return (h + h.mean()).softmax(1)


@forward("a scale of the batch that normalisation cancels", SIMD, accept_unknown=True)
def _(net, x):
    h = net.linear(x)
    return F.normalize(h / h.norm(), dim=1, eps=0)


@forward("a mean subtracted and added back", SIMD, accept_unknown=True)
def _(net, x):
    h = net.linear(x)
    mean = h.mean(0)
    return (h - mean) + mean


# ---------------------------------------------------------------- statistics of groups


@forward("ghost batch norm by chunks", GROUPS, bn=norm())
def _(net, x):
    return torch.cat([net.bn(chunk) for chunk in net.linear(x).chunk(2)])


@forward("ghost batch norm by a view", GROUPS)
def _(net, x):
    return standardise(net.linear(x).view(2, 3, D), 1).view(N, D)


@forward("ghost batch norm of interleaved groups", GROUPS)
def _(net, x):
    return standardise(net.linear(x).view(3, 2, D), 0).view(N, D)


@forward("ghost batch norm through functional batch norm", GROUPS)
def _(net, x):
    h = net.linear(x).view(2, 3, D).transpose(1, 2).reshape(1, 2 * D, 3)
    return F.batch_norm(h, None, None, training=True).view(2, D, 3).transpose(1, 2).reshape(N, D)


@forward("ghost batch norm with one group", STATISTICS)
def _(net, x):
    return standardise(net.linear(x).view(1, N, D), 1).view(N, D)


@forward("ghost batch norm with groups of one", SIMD)
def _(net, x):
    h = net.linear(x)
    return h / (1 + h.view(N, 1, D).mean(1).abs())


@forward("groups that take their neighbours' statistics", MIXED, accept_unknown=True)
def _(net, x):
    h = net.linear(x).view(2, 3, D)
    return (h - h.mean(1, keepdim=True).flip(0)).view(N, D)
