"""Models made with the source in hand: flat batches, repeats, writes, constants, odd ops."""

import operator
from functools import reduce

import torch
from torch import nn
from torch.nn import functional as F

from cases.hunt.table import table
from cases.models.table import (
    GROUPS,
    INDEXED,
    MIXED,
    SEQUENCE,
    SIMD,
    STATISTICS,
    integers,
    norm,
    weight,
)

D = N = 6
T = 4


# ---------------------------------------------------------------- samples packed into one


def packed_with_a_block_mask(net, x):
    """All sequences as one, with a mask that keeps them apart."""
    h = net.linear(x).reshape(1, N * T, D)
    document = torch.arange(N).repeat_interleave(T)
    mask = document[:, None] == document
    return F.scaled_dot_product_attention(h, h, h, attn_mask=mask).view(N, T, D)


def packed_with_a_wide_mask(net, x):
    h = net.linear(x).reshape(1, N * T, D)
    document = torch.arange(N).repeat_interleave(T)
    mask = (document[:, None] - document).abs() <= 1
    return F.scaled_dot_product_attention(h, h, h, attn_mask=mask).view(N, T, D)


def one_large_graph(net, x):
    """Nodes of all graphs in one list, with edges and a batch vector (PyG)."""
    nodes = net.linear(x).flatten(0, 1)
    offset = torch.arange(N)[:, None] * T
    sender = (torch.tensor([0, 1, 2]) + offset).flatten()
    receiver = (torch.tensor([1, 2, 3]) + offset).flatten()
    messages = torch.zeros_like(nodes).index_add_(0, receiver, nodes[sender])
    batch = torch.arange(N).repeat_interleave(T)
    return torch.zeros(N, D).index_add_(0, batch, nodes + messages.relu()) / T


def one_large_graph_without_offsets(net, x):
    nodes = net.linear(x).flatten(0, 1)
    sender, receiver = torch.tensor([0, 1, 2, 5, 9]), torch.tensor([1, 2, 3, 2, 20])
    messages = torch.zeros_like(nodes).index_add_(0, receiver, nodes[sender])
    return (nodes + messages.relu()).view(N, T, D).sum(1)


def graph_pooled_by_largest(net, x):
    nodes = net.linear(x).flatten(0, 1)
    batch = torch.arange(N).repeat_interleave(T)[:, None].expand(-1, D)
    return torch.full((N, D), -9.0).scatter_reduce(0, batch, nodes, "amax")


def graph_norm(net, x):
    nodes = net.linear(x).flatten(0, 1)
    return net.norm(nodes).view(N, T, D)


def convolved_in_one_line(net, x):
    """One long line, in steps as long as a sample."""
    line = x.reshape(1, 1, N * T * D)
    return F.conv1d(line, net.kernel, stride=T * D)[0].T


def table_of_samples(net, x):
    return F.embedding(torch.arange(N), net.linear(x).mean(1))


def table_of_samples_in_another_order(net, x):
    return F.embedding(torch.arange(N).flip(0), net.linear(x).mean(1))


table(
    SIMD,
    {
        "sequences packed with a block mask": packed_with_a_block_mask,
        "graphs as one large graph": one_large_graph,
        "graphs pooled by the largest": graph_pooled_by_largest,
        "convolved in one line": convolved_in_one_line,
        "samples as a table": table_of_samples,
    },
    SEQUENCE,
    accept_unknown=True,
    kernel=weight(5, 1, T * D),
)
table(STATISTICS, {"nodes of all graphs normalised": graph_norm}, SEQUENCE, norm=norm())
table(
    MIXED,
    {
        "sequences packed with a wide mask": packed_with_a_wide_mask,
        "graphs without offsets": one_large_graph_without_offsets,
        "samples as a table in another order": table_of_samples_in_another_order,
    },
    SEQUENCE,
    accept_unknown=True,
)


# ---------------------------------------------------------------- repeats


def averaged_over_dropout(net, x):
    h = F.dropout(net.linear(x.repeat(3, 1)).relu(), 0.3)
    return h.view(3, N, D).mean(0)


def averaged_over_dropout_of_others(net, x):
    h = F.dropout(net.linear(x.repeat(3, 1)).relu(), 0.3)
    return h.view(N, 3, D).mean(1)


def beams_interleaved(net, x):
    h = net.linear(x.repeat_interleave(2, 0)) + torch.randn(2 * N, D)
    return h.view(N, 2, D).logsumexp(1)


def beams_taken_for_repeated(net, x):
    h = net.linear(x.repeat_interleave(2, 0)) + torch.randn(2 * N, D)
    return h.view(2, N, D).logsumexp(0)


def flipped_as_augmentation(net, x):
    both = torch.cat([x, x.flip(1)])
    return net.linear(both).unflatten(0, (2, N)).mean(0)


def by_two_orders(net, x):
    order = torch.tensor([2, 0, 3, 5, 1, 4])
    h = net.linear(x[order]).relu()
    return h[order.argsort()]


def by_the_same_order_twice(net, x):
    order = torch.tensor([2, 0, 3, 5, 1, 4])
    return net.linear(x[order]).relu()[order]


def chunks_swapped(net, x):
    a, b = net.linear(x).chunk(2)
    return torch.cat([b, a])


def chunks_swapped_twice(net, x):
    a, b = net.linear(x).chunk(2)
    a, b = torch.cat([b, a]).chunk(2)
    return torch.cat([b, a])


def folded_and_unfolded(net, x):
    h = x.unflatten(0, (2, 3)).transpose(0, 1)
    return net.linear(h).transpose(0, 1).flatten(0, 1)


def folded_and_left(net, x):
    return net.linear(x).unflatten(0, (2, 3)).transpose(0, 1).flatten(0, 1)


table(
    SIMD,
    {
        "averaged over dropout": averaged_over_dropout,
        "beams interleaved": beams_interleaved,
        "flipped as augmentation": flipped_as_augmentation,
        "by an order and back": by_two_orders,
        "halves swapped twice": chunks_swapped_twice,
        "folded and unfolded": folded_and_unfolded,
        "rolled all the way": lambda n, x: n.linear(x).roll(N, 0),
        "turned all the way": lambda n, x: n.linear(x).rot90(4),
        "diagonal of all products": lambda n, x: torch.einsum(
            "ni,mi->nm", n.linear(x), x
        ).diagonal(),
        "its own by a mask": lambda n, x: (
            (x @ x.T).masked_fill(~torch.eye(N, dtype=torch.bool), -torch.inf).softmax(1)
            @ n.linear(x)
        ),
        "a block for each sample": lambda n, x: (
            torch.kron(torch.eye(N), n.linear.weight) @ x.flatten()
        ).view(N, D),
        "a mean times zero": lambda n, x: n.linear(x) + 0 * x.mean(0),
        "rows stacked anew": lambda n, x: torch.vstack([*n.linear(x)]),
        "an integer of itself": lambda n, x: n.linear((x * 10).to(torch.int8).float()),
    },
    accept_unknown=True,
)
table(
    MIXED,
    {
        "averaged over dropout of others": averaged_over_dropout_of_others,
        "beams taken for repeated": beams_taken_for_repeated,
        "by the same order twice": by_the_same_order_twice,
        "halves swapped": chunks_swapped,
        "folded and left so": folded_and_left,
        "rows stacked from the last": lambda n, x: torch.stack(n.linear(x).unbind()[::-1]),
        "a view in place of a transpose": lambda n, x: n.linear(x).T.reshape(N, D),
        "a square mixed by a fixed matrix": lambda n, x: (
            torch.fft.fft(torch.eye(N)).real @ n.linear(x)
        ),
        "pairs by combinations": lambda n, x: n.linear(x) + torch.combinations(x[:, 0])[:N, 1:],
        "neighbours by a sparse matrix": lambda n, x: torch.sparse.mm(
            torch.eye(N).roll(1, 0).to_sparse(), n.linear(x)
        ),
        "columns that are samples, masked": lambda n, x: n.linear(x).masked_fill((x > 0).T, 0.0),
    },
    accept_unknown=True,
)
table(
    INDEXED,
    {
        "one feature each, by place": lambda n, x: n.linear(x).diagonal(),
        "counted through by a sum of ones": lambda n, x: (
            n.linear(x) * torch.ones_like(x[:, :1]).cumsum(0)
        ),
        "places of ones": lambda n, x: n.linear(x) + torch.ones(N).nonzero(),
        "upper part": lambda n, x: n.linear(x).triu(),
        "a model each": lambda n, x: torch.vmap(torch.mv)(n.stack, x),
    },
    accept_unknown=True,
    stack=weight(N, D, D),
)


# ---------------------------------------------------------------- writes


def last_of_a_group_wins(net, x):
    """The score of each sample is written to its group, at its label."""
    board = torch.zeros(3, 4)
    label, score = x[:, :4].argmax(1), x[:, 4]
    board[torch.arange(N) // 2, label] = score
    return net.linear(x) + board.mean(1).repeat_interleave(2)[:, None]


def last_of_all_wins(net, x):
    board = torch.zeros(2, 4)
    label, score = x[:, :4].argmax(1), x[:, 4]
    board[torch.zeros(N, dtype=torch.int64), label] = score
    return net.linear(x) + board[0].mean()


def last_of_all_wins_on_a_large_board(net, x):
    """As before, where it is rare that two samples meet."""
    board = torch.zeros(1, 997)
    label, score = (x[:, 0].abs() * 300).long().clamp(max=996), x[:, 4]
    board[torch.zeros(N, dtype=torch.int64), label] = score
    return net.linear(x) + board.sum()


def last_label_of_a_group_wins(net, x):
    """Flags of labels by group: whichever writes, the same is written."""
    board = torch.zeros(3, 4)
    board[torch.arange(N) // 2, x[:, :4].argmax(1)] = 1.0
    return net.linear(x) + board.mean(1).repeat_interleave(2)[:, None]


def labels_of_a_group_counted(net, x):
    board = torch.zeros(3, 4)
    place = (torch.arange(N) // 2, x[:, :4].argmax(1))
    board.index_put_(place, x[:, 4], accumulate=True)
    return net.linear(x) + board.mean(1).repeat_interleave(2)[:, None]


def copied_to_groups(net, x):
    group = torch.arange(N) // 2
    return net.linear(x) - torch.zeros(3, D).index_copy(0, group, x)[group]


def groups_of_four_and_two(net, x):
    group = torch.tensor([0, 0, 0, 0, 1, 1])
    sums = torch.zeros(2, D).index_add(0, group, x)
    counts = torch.zeros(2).index_add(0, group, torch.ones(N))
    return net.linear(x) - (sums / counts[:, None])[group]


def largest_of_groups(net, x):
    group = (torch.arange(N) % 3)[:, None].expand(N, D)
    return net.linear(x) - torch.zeros(3, D).scatter_reduce(
        0, group, x, "amax", include_self=False
    ).gather(0, group)


def written_through_a_transpose(net, x):
    out = torch.empty(N, D)
    out.T.copy_(net.linear(x))
    return out


def written_through_columns(net, x):
    h = net.linear(x).clone()
    for i in range(D):
        column = h[:, i]
        column.sub_(column.mean())
    return h


def half_of_the_features_centred(net, x):
    h = net.linear(x).clone()
    a = h[:, :3]
    a -= a.mean(0)
    return h


def view_kept_before(net, x):
    h = net.linear(x).clone()
    first = h[0]
    h -= h.mean(0)
    return h + first


def swapped_without_a_copy(net, x):
    h = net.linear(x).clone()
    h[::2], h[1::2] = h[1::2], h[::2]
    return h


def joined_into_out(net, x):
    out = torch.empty(2 * N, D)
    with torch.no_grad():
        torch.cat([x, net.linear(x)], out=out)
    return out[:N] * out[N:]


def summed_into_itself(net, x):
    with torch.no_grad():
        h = net.linear(x)
        torch.add(h, h.flip(0), out=h)
    return h * net.linear.bias


def set_when_first_asked(net, x):
    """Statistics of the first batch are kept on the model."""
    if not hasattr(net, "first_mean"):
        net.first_mean = x.mean(0)
    return net.linear(x) - net.first_mean


table(
    MIXED,
    {
        "last of a group wins": last_of_a_group_wins,
        "last of all wins": last_of_all_wins,
        "last of all wins on a large board": last_of_all_wins_on_a_large_board,
        "copied to groups": copied_to_groups,
        "written through a transpose": written_through_a_transpose,
        "a view kept from before": view_kept_before,
        "swapped without a copy": swapped_without_a_copy,
        "summed into itself, flipped": summed_into_itself,
    },
    accept_unknown=True,
)
table(
    GROUPS,
    {
        "labels of a group flagged": last_label_of_a_group_wins,
        "labels of a group added": labels_of_a_group_counted,
        "means of groups of four and two": groups_of_four_and_two,
        "largest of groups by scatter": largest_of_groups,
        "group norm over samples in two groups": lambda n, x: F.group_norm(n.linear(x)[None], 2)[0],
    },
    accept_unknown=True,
)
table(
    STATISTICS,
    {
        "columns centred one by one": written_through_columns,
        "half of the features centred": half_of_the_features_centred,
        "set when first asked": set_when_first_asked,
        "summed to one row": lambda n, x: n.linear(x) - x.sum_to_size(1, D) / N,
        "classes counted and looked up": lambda n, x: (
            n.linear(x) / (x.argmax(1)[:, None] == torch.arange(D)).sum(0)[x.argmax(1), None]
        ),
        "noise around the mean": lambda n, x: n.linear(x) + torch.normal(x.mean(0), 1.0),
        "three products": lambda n, x: torch.linalg.multi_dot([n.linear(x), x.T, x]),
        "added up by Python": lambda n, x: n.linear(x) - reduce(operator.add, [*x]) / N,
        "pooled by own scores": lambda n, x: n.linear(x) - n.linear(x).mean(1).softmax(0) @ x,
        "whatever the order of the largest": lambda n, x: (
            n.linear(x) - x.topk(2, 0, sorted=False).values.mean(0)
        ),
        "sharpened by the batch's own slope": lambda n, x: F.linear(
            x,
            n.linear.weight
            + F.normalize(
                torch.func.grad(lambda w: (x @ w.T).tanh().square().mean())(n.linear.weight),
                dim=(0, 1),
            ),
        ),
    },
    accept_unknown=True,
)
table(
    MIXED,
    {
        "the first of the largest, unsorted": lambda n, x: (
            n.linear(x) - x.topk(3, 0, sorted=False).values[0]
        ),
    },
    (12, D),
    accept_unknown=True,
)
table(SIMD, {"joined into out": joined_into_out}, accept_unknown=True)


# ---------------------------------------------------------------- reads of Python


def stale_number(net, x):
    """What is read is a view that was there before the sum."""
    total = torch.zeros(1)
    first = total.view(())
    total += (x.abs() > 3.5).sum()
    return net.linear(x) * (1 + float(first))


def stale_answer(net, x):
    rare = torch.zeros(1, dtype=torch.bool)
    first = rare[0]
    rare |= (x.abs() > 3.5).any()
    return net.linear(x) * (2 if first else 1)


def stale_row(net, x):
    counts = torch.zeros(2, 3)
    row = counts[1]
    counts[1, 0] = (x.abs() > 3.5).sum()
    return net.linear(x) * (1 + sum(row.tolist()))


def number_of_large_ones(net, x):
    return net.linear(x) * (1 + float((x.abs() > 3.5).sum()))


def adversarial(net, x):
    """A step along the sign of each sample's own slope."""
    y = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(net.linear(y).tanh().square().sum(), y)
    return net.linear(x + 0.1 * slope.sign())


def adversarial_on_a_sphere(net, x):
    y = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(net.linear(y).tanh().square().sum(), y)
    return net.linear(x + 0.1 * slope / slope.norm())


def product_with_second_derivatives(net, x):
    f = lambda h: net.linear(h).tanh().square().sum()  # noqa: E731
    return torch.autograd.functional.hvp(f, x, torch.ones_like(x))[1]


def own_jacobian(net, x):
    j = torch.func.jacrev(lambda h: net.linear(h).tanh())(x)
    return torch.einsum("ncni->nc", j)


def limited_table(net, words):
    return net.limited(words).mean(1)


def limited_table_used_twice(net, words):
    """Rows that are looked up are shortened first, and the table is the last layer, too."""
    h = net.limited(words).mean(1)
    return h @ net.limited.weight.T


def masks_by_head(net, x):
    mask = (x[..., 0] > 0)[:, None, None].expand(N, 2, T, T).reshape(2 * N, T, T)
    return net.attention(x, x, x, attn_mask=mask & ~torch.eye(T, dtype=torch.bool))[0]


table(
    STATISTICS,
    {
        "a number read through an older view": stale_number,
        "an answer read through an older view": stale_answer,
        "a row read through an older view": stale_row,
        "the number of large ones": number_of_large_ones,
        "adversarial on one sphere": adversarial_on_a_sphere,
    },
    accept_unknown=True,
)
table(
    SIMD,
    {
        "adversarial by sign": adversarial,
        "a product with second derivatives": product_with_second_derivatives,
        "its own part of a Jacobian": own_jacobian,
        "imaginary parts of conjugates": lambda n, x: torch.complex(n.linear(x), x).conj().imag * 2,
        "eigenvalues of own matrices": lambda n, x: torch.linalg.eigvals(
            x[:, :, None] * n.linear(x)[:, None] + torch.eye(D)
        ).abs(),
        "solved for columns": lambda n, x: (
            torch.linalg.solve(n.linear.weight + 3 * torch.eye(D), x.T).T
        ),
        "solved from the right": lambda n, x: torch.linalg.solve(
            n.linear.weight + 3 * torch.eye(D), x, left=False
        ),
        "a bag of weighted rows": lambda n, x: F.embedding_bag(
            torch.arange(D).expand(N, D), n.linear.weight, per_sample_weights=x, mode="sum"
        ),
        "over columns by vmap": lambda n, x: torch.vmap(n.linear, in_dims=1, out_dims=0)(x.T),
    },
    accept_unknown=True,
)
table(
    SIMD,
    {"a limited table": limited_table},
    integers(9, N, 3),
    linear=lambda: None,
    limited=lambda: nn.Embedding(9, D, max_norm=1.0),
    accept_unknown=True,
)
table(
    STATISTICS,
    {"a limited table, used twice": limited_table_used_twice},
    integers(9, N, 3),
    linear=lambda: None,
    limited=lambda: nn.Embedding(9, D, max_norm=1.0),
    accept_unknown=True,
)
table(
    SIMD,
    {"masks by head": masks_by_head},
    SEQUENCE,
    attention=lambda: nn.MultiheadAttention(D, 2, batch_first=True),
    accept_unknown=True,
)
