"""Recurrence and attention."""

import functools

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from cases.models.table import (
    CUBE,
    FLAT,
    MIXED,
    ODD_SEQUENCE,
    SEQUENCE,
    SIMD,
    STATISTICS,
    D,
    N,
    T,
    forward,
    integers,
    layers,
    linear,
    norm,
)

for cell in (nn.LSTM, nn.GRU):
    kind = cell.__name__

    @forward(
        f"{kind}, batch first", SIMD, SEQUENCE, rnn=functools.partial(cell, D, D, batch_first=True)
    )
    def _(net, x):
        return net.rnn(x)[0]

    @forward(
        f"{kind} that takes samples for time steps",
        MIXED,
        SEQUENCE,
        rnn=functools.partial(cell, D, D),
    )
    def _(net, x):
        return net.rnn(x)[0]

    @forward(
        f"{kind} that takes samples for time steps, cube",
        MIXED,
        CUBE,
        rnn=functools.partial(cell, D, D),
    )
    def _(net, x):
        return net.rnn(x)[0].mean(1)

    @forward(
        f"{kind}, time-major",
        SIMD,
        (T, N, D),
        rnn=functools.partial(cell, D, D),
        in_dims=1,
        out_dim=1,
    )
    def _(net, x):
        return net.rnn(x)[0]


@forward("LSTM, unbatched, samples as time steps", MIXED, rnn=lambda: nn.LSTM(D, D))
def _(net, x):
    return net.rnn(x)[0]


@forward("LSTM, time-major, last state", SIMD, (T, N, D), rnn=lambda: nn.LSTM(D, D), in_dims=1)
def _(net, x):
    return net.rnn(x)[1][0][-1]


@forward(
    "GRU of two layers, states split in the wrong order",
    MIXED,
    SEQUENCE,
    rnn=lambda: nn.GRU(D, D, 2, batch_first=True),
)
def _(net, x):
    return net.rnn(x)[1].view(len(x), -1)


@forward(
    "GRU of two layers, states transposed first",
    SIMD,
    SEQUENCE,
    rnn=lambda: nn.GRU(D, D, 2, batch_first=True),
)
def _(net, x):
    return net.rnn(x)[1].transpose(0, 1).reshape(len(x), -1)


@forward(
    "bidirectional LSTM",
    SIMD,
    SEQUENCE,
    rnn=lambda: nn.LSTM(D, 3, bidirectional=True, batch_first=True),
)
def _(net, x):
    return net.rnn(x)[0].amax(1)


@forward("LSTM cell in a loop over time", SIMD, SEQUENCE, cell=lambda: nn.LSTMCell(D, D))
def _(net, x):
    state = None
    for t in range(T):
        state = net.cell(x[:, t], state)
    return state[0]


@forward("GRU cell in a loop over samples", MIXED, SEQUENCE, cell=lambda: nn.GRUCell(D, D))
def _(net, x):
    state, out = None, []
    for row in x:
        state = net.cell(row, state)
        out.append(state)
    return torch.stack(out)


@forward(
    "LSTM over packed sequences",
    SIMD,
    SEQUENCE,
    integers(T, N),
    rnn=lambda: nn.LSTM(D, D),
    accept_unknown=True,
)
def _(net, x, lengths):
    packed = pack_padded_sequence(x, lengths + 1, batch_first=True, enforce_sorted=False)
    return pad_packed_sequence(net.rnn(packed)[0], batch_first=True, total_length=T)[0]


@forward("time-major mean over time", SIMD, (T, N, D), in_dims=1)
def _(net, x):
    return net.linear(x).mean(0)


@forward("time-major mean over samples", MIXED, CUBE, in_dims=1)
def _(net, x):
    return net.linear(x).mean(1)


@forward("time-major batch norm", STATISTICS, (T, N, D), bn=norm(), in_dims=1, out_dim=1)
def _(net, x):
    return net.bn(net.linear(x).permute(1, 2, 0)).permute(2, 0, 1)


@forward("time-major sequence beside a flat input", SIMD, FLAT, (T, N, D), in_dims=(0, 1))
def _(net, x, sequence):
    return net.linear(x) * sequence.mean(0)


@forward(
    "cross-attention to an input shared by the batch", SIMD, SEQUENCE, (N, D), in_dims=(0, None)
)
def _(net, x, memory):
    return (net.linear(x) @ memory.t()).softmax(-1) @ memory


attention = functools.partial(nn.MultiheadAttention, D, 2)


@forward(
    "multi-head attention, batch first", SIMD, SEQUENCE, attend=lambda: attention(batch_first=True)
)
def _(net, x):
    return net.attend(x, x, x)[0]


@forward("multi-head attention over the batch", MIXED, SEQUENCE, attend=attention)
def _(net, x):
    return net.attend(x, x, x)[0]


@forward("multi-head attention over the batch, fused", MIXED, CUBE, attend=attention)
def _(net, x):
    return net.attend(x, x, x, need_weights=False)[0]


@forward("multi-head attention, transposed to time-major and back", SIMD, CUBE, attend=attention)
def _(net, x):
    h = x.transpose(0, 1)
    return net.attend(h, h, h, need_weights=False)[0].transpose(0, 1)


@forward("multi-head attention of a flat batch, taken for a sequence", MIXED, attend=attention)
def _(net, x):
    return net.attend(x, x, x)[0]


@forward(
    "multi-head attention with a padding mask",
    SIMD,
    SEQUENCE,
    attend=lambda: attention(batch_first=True),
)
def _(net, x):
    padded = (x[..., 0] < 0) & (torch.arange(T) > 0)
    return net.attend(x, x, x, key_padding_mask=padded)[0]


encoder = functools.partial(nn.TransformerEncoderLayer, D, 2, 8)
layers(
    "transformer layer, batch first", SIMD, SEQUENCE, lambda: encoder(dropout=0.0, batch_first=True)
)
layers(
    "transformer layer with dropout",
    SIMD,
    ODD_SEQUENCE,
    lambda: nn.TransformerEncoderLayer(8, 2, 8, batch_first=True),
)
layers(
    "transformer layer, batch first, in eval",
    SIMD,
    CUBE,
    lambda: encoder(batch_first=True),
    train=False,
)
layers("transformer layer over the batch", MIXED, SEQUENCE, lambda: encoder(dropout=0.0))
layers("transformer layer over the batch, cube, in eval", MIXED, CUBE, encoder, train=False)


@forward("attention by hand within the sample", SIMD, CUBE, key=linear(), value=linear())
def _(net, x):
    return (net.linear(x) @ net.key(x).transpose(1, 2)).softmax(-1) @ net.value(x)


@forward("attention by hand over the batch", MIXED, key=linear(), value=linear())
def _(net, x):
    return (net.linear(x) @ net.key(x).t()).softmax(-1) @ net.value(x)


@forward("attention by hand over the batch, cube", MIXED, CUBE, key=linear(), value=linear())
def _(net, x):
    q, k, v = (f(x).transpose(0, 1) for f in (net.linear, net.key, net.value))
    return F.scaled_dot_product_attention(q, k, v).transpose(0, 1)


@forward("causal attention within the sample", SIMD, CUBE)
def _(net, x):
    return F.scaled_dot_product_attention(net.linear(x), x, x, is_causal=True)


@forward("attention to earlier samples only", MIXED)
def _(net, x):
    scores = (net.linear(x) @ x.t()).masked_fill(torch.ones(N, N).triu(1).bool(), -torch.inf)
    return scores.softmax(-1) @ x


@forward("attention over the batch, masked down to the sample itself", SIMD, accept_unknown=True)
def _(net, x):
    scores = (net.linear(x) @ x.t()).masked_fill(~torch.eye(N, dtype=torch.bool), -torch.inf)
    return scores.softmax(-1) @ x


@forward("heads merged into the sample axis after a transpose", SIMD, SEQUENCE)
def _(net, x):
    h = net.linear(x).view(N, T, 2, 3).transpose(1, 2).reshape(2 * N, T, 3)
    return (
        torch.bmm(torch.bmm(h, h.mT).softmax(-1), h)
        .view(N, 2, T, 3)
        .transpose(1, 2)
        .reshape(N, T, D)
    )


@forward("heads merged without the transpose, wrong but within the sample", SIMD, SEQUENCE)
def _(net, x):
    h = net.linear(x).view(2 * N, T, 3)
    return torch.bmm(torch.bmm(h, h.mT).softmax(-1), h).view(N, T, D)


@forward("heads merged before the samples, split after them", MIXED, SEQUENCE)
def _(net, x):
    h = net.linear(x).view(N, T, 2, 3).permute(2, 0, 1, 3).reshape(2 * N, T, 3)
    return (
        torch.bmm(torch.bmm(h, h.mT).softmax(-1), h)
        .view(N, 2, T, 3)
        .transpose(1, 2)
        .reshape(N, T, D)
    )


@forward("as many heads as samples, merged and split alike", SIMD, CUBE)
def _(net, x):
    h = net.linear(x).view(N, N, N, 1).permute(2, 0, 1, 3).reshape(N * N, N, 1)
    return (
        (torch.bmm(h, h.mT).softmax(-1) @ h).view(N, N, N, 1).permute(1, 2, 0, 3).reshape(N, N, D)
    )


@forward("as many heads as samples, confused with each other", MIXED, CUBE)
def _(net, x):
    h = net.linear(x).view(N, N, N, 1).permute(2, 0, 1, 3).reshape(N * N, N, 1)
    return (torch.bmm(h, h.mT).softmax(-1) @ h).view(N, N, N, 1).transpose(1, 2).reshape(N, N, D)


@forward("padding mask and masked mean", SIMD, SEQUENCE, integers(2, N, T))
def _(net, x, mask):
    return (net.linear(x) * mask[..., None]).sum(1) / (1 + mask.sum(1, keepdim=True))


@forward("masked mean divided by the count of the batch", STATISTICS, SEQUENCE, integers(2, N, T))
def _(net, x, mask):
    return (net.linear(x) * mask[..., None]).sum(1) / (1 + mask.sum())


@forward(
    "padding cropped to the longest sample", SIMD, SEQUENCE, integers(T + 1, N), accept_unknown=True
)
def _(net, x, lengths):
    longest = int(lengths.max())
    mask = torch.arange(longest) < lengths[:, None]
    return (net.linear(x[:, :longest]) * mask[..., None]).sum(1)


@forward(
    "padding trimmed to the longest sample without a mask",
    STATISTICS,
    SEQUENCE,
    integers(T - 1, N),
    accept_unknown=True,
)
def _(net, x, lengths):
    return net.linear(x[:, : int(lengths.max()) + 1]).sum(1)


@forward(
    "padded tokens dropped, processed, put back",
    SIMD,
    SEQUENCE,
    integers(2, N, T),
    accept_unknown=True,
)
def _(net, x, mask):
    keep = mask.bool()
    out = torch.zeros_like(x)
    out[keep] = net.linear(x[keep]).tanh()
    return out


@forward("kept tokens moved to the front of the batch", MIXED, SEQUENCE, integers(2, N, T))
def _(net, x, mask):
    keep = mask.bool().flatten()
    flat = net.linear(x).flatten(0, 1)
    return torch.cat([flat[keep], flat[~keep]]).view_as(x)
