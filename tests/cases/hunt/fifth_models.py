"""Indices and masks that a program fills in through views, before it selects by them."""

import torch

from cases.hunt.table import table
from cases.models.table import INDEXED, MIXED, SEQUENCE, SIMD

N = D = 6
T = 4


def attention(net, x, seen):
    """Attention over all words of the batch, as far as a mask lets them see each other."""
    q = net.linear(x).flatten(0, 1)
    return ((q @ q.T).masked_fill(~seen, -1e9).softmax(1) @ q).view(N, T, D)


def block_mask(net, x, beyond=0):
    seen = torch.zeros(N * T, N * T, dtype=torch.bool)
    for n in range(N):
        seen[n * T : (n + 1) * T + beyond, n * T : (n + 1) * T + beyond] = True
    return attention(net, x, seen)


def block_mask_too_large(net, x):
    return block_mask(net, x, beyond=1)


def mask_of_columns(net, x):
    chosen = torch.zeros(N, T, dtype=torch.bool)
    chosen[:, :2] = True
    return net.linear(x)[chosen].view(N, 2, D)


def all_but_the_last(net, x):
    chosen = torch.ones(T, dtype=torch.bool)
    chosen[-1] = False
    return net.linear(x)[:, chosen]


def places_put_in(net, x):
    index = torch.zeros(N, dtype=torch.long)
    index.view(2, 3).copy_(torch.arange(N).view(2, 3))
    return net.linear(x)[index]


def changed_and_changed_back(net, x):
    index = torch.arange(N)
    every_second = index[::2]
    every_second += 1
    every_second -= 1
    return net.linear(x)[index]


def batch_vector(net, x, late=0):
    """Words summed up by their sentences, as a loop numbers them."""
    owners = torch.zeros(N * T, dtype=torch.long)
    for n in range(N):
        owners[n * T + late : (n + 1) * T + late] = n
    h = net.linear(x).flatten(0, 1)
    return torch.zeros(N, D).index_add(0, owners, h)


def batch_vector_off_by_one(net, x):
    return batch_vector(net, x, late=1)


table(
    SIMD,
    {
        "written: a mask of columns": mask_of_columns,
        "written: all but the last": all_but_the_last,
        "written: places put in": places_put_in,
        "written: changed and changed back": changed_and_changed_back,
        "written: a batch vector": batch_vector,
    },
    SEQUENCE,
)
table(SIMD, {"written: a mask of blocks": block_mask}, SEQUENCE, accept_unknown=True)


def first_entry(net, x):
    index = torch.arange(N)
    index[0] = 1
    return net.linear(x)[index]


def moved_along(net, x):
    index = torch.arange(N)
    index[1:] = index[:-1].clone()
    return net.linear(x)[index]


def neighbours_swapped(net, x):
    index = torch.arange(N)
    even, odd = index[::2], index[1::2]
    even += 1
    odd -= 1
    return net.linear(x)[index]


def gathered(net, x):
    h = net.linear(x)
    index = torch.arange(N)[:, None, None].expand(h.shape).clone()
    index[0, 0] = 2
    return h.gather(0, index)


def added_at(net, x):
    index = torch.arange(N)
    index[0] = 1
    h = net.linear(x)
    return torch.zeros_like(h).index_add(0, index, h)


def made_by_out(net, x):
    index = torch.empty(N, dtype=torch.long)
    torch.arange(N, out=index)
    index[:1] = 3
    return net.linear(x)[index]


def in_the_buffer(net, x):
    net.index.copy_(torch.arange(N))
    net.index[0] = 1
    return net.linear(x)[net.index]


def kept_in_the_buffer(net, x):
    net.index[0] = 1
    return net.linear(x)[net.index]


def where_the_mask_is(net, x):
    chosen = torch.zeros(N, dtype=torch.bool)
    chosen[1] = True
    h = net.linear(x)
    return torch.where(chosen[:, None, None], h.roll(1, 0), h)


table(
    MIXED,
    {
        "written: a mask of blocks that are too large": block_mask_too_large,
        "written: a batch vector off by one": batch_vector_off_by_one,
        "written: the first entry of an index": first_entry,
        "written: an index moved along": moved_along,
        "written: neighbours swapped": neighbours_swapped,
        "written: an index of gather": gathered,
        "written: an index of sums": added_at,
        "written: an index made by out": made_by_out,
        "written: where a mask is": where_the_mask_is,
    },
    SEQUENCE,
    accept_unknown=True,
)
table(
    MIXED,
    {"written: in a buffer": in_the_buffer, "written: kept in a buffer": kept_in_the_buffer},
    SEQUENCE,
    accept_unknown=True,
    index=lambda: torch.arange(N),
)


def first_weight(net, x):
    weights = torch.ones(N, 1, 1, dtype=torch.long)
    weights[0] = 5
    return net.linear(x) * weights


table(INDEXED, {"written: a weight": first_weight}, SEQUENCE)
