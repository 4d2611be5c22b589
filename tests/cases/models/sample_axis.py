"""The sample axis merged with others, split and moved."""

import torch

from cases.models.table import (
    CUBE,
    INDEXED,
    MIXED,
    ODD_SEQUENCE,
    SEQUENCE,
    SHUFFLED,
    SIMD,
    STATISTICS,
    C,
    D,
    N,
    T,
    conv,
    forward,
    linear,
    norm,
)


@forward("frames merged into the sample axis and split back", SIMD, (N, T, C, 5, 5), conv=conv())
def _(net, x):
    return net.conv(x.flatten(0, 1)).relu().flatten(1).view(N, T, -1).mean(1)


@forward("frames merged, split back in the wrong order", MIXED, (N, T, C, 5, 5), conv=conv())
def _(net, x):
    return net.conv(x.flatten(0, 1)).relu().flatten(1).view(T, N, -1).mean(0)


@forward("frames merged time first and split back time first", SIMD, ODD_SEQUENCE)
def _(net, x):
    return net.linear(x.transpose(0, 1).reshape(15, 8)).view(3, 5, 8).sum(0)


@forward("frames merged time first, split back samples first", MIXED, ODD_SEQUENCE)
def _(net, x):
    return net.linear(x.transpose(0, 1).reshape(15, 8)).view(5, 3, 8).sum(1)


@forward("transposed by a reshape, then mean over time", MIXED, SEQUENCE)
def _(net, x):
    return net.linear(x).reshape(T, N, D).mean(0)


@forward("cube merged and split back", SIMD, CUBE)
def _(net, x):
    return net.linear(x.view(-1, D)).view(N, N, D).mean(1)


@forward("cube merged, split and reduced over the wrong axis", MIXED, CUBE)
def _(net, x):
    return net.linear(x.view(-1, D)).view(N, N, D).mean(0)


@forward("cube transposed, reduced over the time axis", SIMD, CUBE)
def _(net, x):
    return net.linear(x.transpose(0, 1)).mean(0)


@forward("transposed and back", SIMD)
def _(net, x):
    return (net.linear.weight @ x.t()).tanh().t()


@forward("transposed and not back", MIXED)
def _(net, x):
    return net.linear(x).t()


@forward("permuted and back", SIMD, CUBE)
def _(net, x):
    return net.linear(x.permute(2, 0, 1)).permute(1, 2, 0)


@forward("permuted and back to another place", MIXED, CUBE)
def _(net, x):
    return net.linear(x.permute(2, 0, 1)).permute(2, 0, 1)


@forward("flipped and flipped back", SIMD)
def _(net, x):
    return net.linear(x.flip(0)).tanh().flip(0)


@forward("flipped along the batch", MIXED)
def _(net, x):
    return net.linear(x).flip(0)


@forward("flipped along the features", SIMD)
def _(net, x):
    return net.linear(x).flip(1)


@forward("blended with the next sample", MIXED)
def _(net, x):
    return net.linear(0.7 * x + 0.3 * x.roll(1, 0))


@forward("rolled and rolled back", SIMD)
def _(net, x):
    return net.linear(x.roll(2, 0)).tanh().roll(-2, 0)


@forward("rolled all the way round", SIMD)
def _(net, x):
    return net.linear(x).roll(len(x), 0)


@forward("rolled without an axis", MIXED)
def _(net, x):
    return net.linear(x).roll(1)


@forward("fixed permutation of the samples", MIXED)
def _(net, x):
    return net.linear(x)[SHUFFLED]


@forward("fixed permutation of the samples, undone", SIMD)
def _(net, x):
    order = torch.tensor(SHUFFLED)
    return net.linear(x[order]).tanh()[order.argsort()]


@forward("fixed permutation of the samples, applied twice", MIXED)
def _(net, x):
    return net.linear(x[SHUFFLED]).tanh()[SHUFFLED]


@forward("random permutation of the samples, undone", SIMD)
def _(net, x):
    order = torch.randperm(len(x))
    return net.linear(x[order]).tanh()[torch.argsort(order)]


@forward("random permutation of the samples, undone by indexed assignment", SIMD)
def _(net, x):
    order = torch.randperm(len(x))
    out = torch.empty_like(x)
    out[order] = net.linear(x[order])
    return out


@forward("sorted by a score, processed, unsorted", SIMD, score=linear(D, 1), accept_unknown=True)
def _(net, x):
    order = net.score(x)[:, 0].argsort()
    return net.linear(x[order]).tanh()[order.argsort()]


@forward("sorted by a score, processed, left sorted", MIXED, score=linear(D, 1))
def _(net, x):
    return net.linear(x[net.score(x)[:, 0].argsort()])


@forward("halves swapped and swapped back", SIMD)
def _(net, x):
    h = net.linear(torch.cat([x[3:], x[:3]])).tanh()
    return torch.cat([h[3:], h[:3]])


@forward("two views of each sample, concatenated along the batch", SIMD)
def _(net, x):
    a, b = net.linear(torch.cat([x, x.flip(1)])).tanh().chunk(2)
    return a + b


@forward("two views of each sample through one batch norm", STATISTICS, bn=norm())
def _(net, x):
    a, b = net.bn(net.linear(torch.cat([x, x.flip(1)]))).chunk(2)
    return a * b


@forward("beams by repeat, split as beams first", SIMD)
def _(net, x):
    return (
        (net.linear(x.repeat(2, 1)) + torch.tensor([[0.0], [1.0]]).repeat_interleave(N, 0))
        .tanh()
        .view(2, N, D)
        .sum(0)
    )


@forward("beams by repeat, split as samples first", MIXED)
def _(net, x):
    return net.linear(x.repeat(2, 1)).view(N, 2, D).sum(1)


@forward("beams by repeat_interleave, split as samples first", SIMD)
def _(net, x):
    return net.linear(x.repeat_interleave(2, 0)).view(N, 2, D).sum(1)


@forward("beams by repeat_interleave, split as beams first", MIXED)
def _(net, x):
    return net.linear(x.repeat_interleave(2, 0)).view(2, N, D).sum(0)


@forward("diagonal of the merged axes", SIMD, CUBE)
def _(net, x):
    return net.linear(x).diagonal(dim1=1, dim2=2)


@forward("diagonal across samples and time", INDEXED, CUBE)
def _(net, x):
    return net.linear(x).diagonal(dim1=0, dim2=1).t()
