"""Fused ops spelled out in plain ones, which have the forward mode that the fused op lacks.

Each takes the arguments of its op and returns its results, or the first of them. Knows tensors
only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


NO_MASK = (
    "fused attention with dropout does not say what it drops; run it inside "
    "torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), or with dropout 0"
)


RELU, LSTM, GRU = 0, 2, 3  # the modes of cuDNN and of MIOpen; 1 is tanh


# --- attention ------------------------------------------------------------------------------------


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Any:
    """Fused attention as products and a softmax; without dropout, whose mask the fused kernel does not tell."""
    if dropout_p:
        raise NotImplementedError(NO_MASK)
    return aten._scaled_dot_product_attention_math(
        query, key, value, mask, 0.0, is_causal, scale=scale
    )[0]


def attention_on_cpu(
    query: Tensor, key: Tensor, value: Tensor, dropout_p: float = 0.0, is_causal: bool = False, *,
    attn_mask: Tensor | None = None, scale: float | None = None,
) -> Any:  # fmt: skip
    return attention(query, key, value, attn_mask, dropout_p, is_causal, scale)


def flash(
    query: Tensor, key: Tensor, value: Tensor, dropout_p: float = 0.0, is_causal: bool = False,
    return_debug_mask: bool = False, *, scale: float | None = None,
) -> Any:  # fmt: skip
    return attention(query, key, value, None, dropout_p, is_causal, scale)


def efficient(
    query: Tensor, key: Tensor, value: Tensor, attn_bias: Tensor | None, compute_log_sumexp: bool,
    dropout_p: float = 0.0, is_causal: bool = False, return_debug_mask: bool = False, *, scale: float | None = None,
) -> Any:  # fmt: skip
    """The memory-efficient form, and cuDNN's."""
    return attention(query, key, value, attn_bias, dropout_p, is_causal, scale)


def overrideable(
    query: Tensor, key: Tensor, value: Tensor, attn_bias: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, return_debug_mask: bool = False, *, scale: float | None = None,
) -> Any:  # fmt: skip
    """The form that a backend outside of PyTorch brings along."""
    return attention(query, key, value, attn_bias, dropout_p, is_causal, scale)


# --- recurrences ----------------------------------------------------------------------------------


def cudnn_rnn(
    input: Tensor, weight: Sequence[Tensor], weight_stride0: int, weight_buf: Tensor | None, hx: Tensor,
    cx: Tensor | None, mode: int, hidden_size: int, proj_size: int, num_layers: int, batch_first: bool,
    dropout: float, train: bool, bidirectional: bool, batch_sizes: Sequence[int], dropout_state: Tensor | None,
) -> Any:  # fmt: skip
    layers = [tuple(weight[i : i + weight_stride0]) for i in range(0, len(weight), weight_stride0)]
    return recurrence(
        input, layers, hx, cx, mode, batch_first, bidirectional, batch_sizes, proj_size > 0
    )


def miopen_rnn(
    input: Tensor, weight: Sequence[Tensor], weight_stride0: int, hx: Tensor, cx: Tensor | None, mode: int,
    hidden_size: int, num_layers: int, batch_first: bool, dropout: float, train: bool, bidirectional: bool,
    batch_sizes: Sequence[int], dropout_state: Tensor | None,
) -> Any:  # fmt: skip
    layers = [tuple(weight[i : i + weight_stride0]) for i in range(0, len(weight), weight_stride0)]
    return recurrence(input, layers, hx, cx, mode, batch_first, bidirectional, batch_sizes, False)


def recurrence(
    x: Tensor, layers: Sequence[tuple[Tensor, ...]], hx: Tensor, cx: Tensor | None, mode: int, batch_first: bool,
    bidirectional: bool, batch_sizes: Sequence[int], projected: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return outputs and last states of all layers; ``layers``: the weights of a layer in one direction.

    Rows of a step are the sequences that still run, longest first, as in a packed sequence.
    """
    directions = 2 if bidirectional else 1
    time = 1 if batch_first else 0
    steps = list(x.split(list(batch_sizes)) if batch_sizes else x.unbind(time))
    states: list[Tensor] = []
    cells: list[Tensor] = []
    for first in range(0, len(layers), directions):
        sides = []
        for k in range(first, first + directions):
            cell = None if cx is None else cx[k]
            outputs, h, c = _direction(steps, layers[k], hx[k], cell, mode, k > first, projected)
            sides.append(outputs)
            states.append(h)
            cells.append(c)
        steps = [torch.cat(parts, -1) for parts in zip(*sides, strict=True)]
    y = torch.cat(steps) if batch_sizes else torch.stack(steps, time)
    return y, torch.stack(states), torch.stack(cells) if cx is not None else x.new_empty(0)


def _direction(
    steps: Sequence[Tensor], weights: tuple[Tensor, ...], h: Tensor, c: Tensor | None, mode: int, backward: bool,
    projected: bool,
) -> tuple[list[Tensor], Tensor, Tensor]:  # fmt: skip
    """One layer in one direction of time. The state of a sequence that has ended, or not begun, stays as it is."""
    by_input, by_hidden, *others = weights
    projection = others.pop() if projected else None
    biases: list[Any] = others or [None, None]
    c = h if c is None else c
    outputs: list[Tensor] = []
    for x in reversed(steps) if backward else steps:
        running = len(x)
        gates = torch.nn.functional.linear(x, by_input, biases[0])
        recurrent = torch.nn.functional.linear(h[:running], by_hidden, biases[1])
        new, cell = _cell(gates, recurrent, h[:running], c[:running], mode)
        new = new if projection is None else new @ projection.T
        h, c = torch.cat([new, h[running:]]), torch.cat([cell, c[running:]])
        outputs.append(new)
    return outputs[::-1] if backward else outputs, h, c


def _cell(
    gates: Tensor, recurrent: Tensor, h: Tensor, c: Tensor, mode: int
) -> tuple[Tensor, Tensor]:
    """One step, without projection: the new state, and the new cell where there is one."""
    if mode == LSTM:
        enter, forget, cell, out = (gates + recurrent).chunk(4, -1)
        c = forget.sigmoid() * c + enter.sigmoid() * cell.tanh()
        return out.sigmoid() * c.tanh(), c
    if mode == GRU:
        reset, update, new = gates.chunk(3, -1)
        by_reset, by_update, by_new = recurrent.chunk(3, -1)
        update = (update + by_update).sigmoid()
        new = (new + (reset + by_reset).sigmoid() * by_new).tanh()
        h = new + update * (h - new)
        return h, h
    h = (gates + recurrent).relu() if mode == RELU else (gates + recurrent).tanh()
    return h, h


def lstm_cell(
    input_gates: Tensor, hidden_gates: Tensor, cx: Tensor, input_bias: Tensor | None = None,
    hidden_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    gates = input_gates if input_bias is None else input_gates + input_bias
    recurrent = hidden_gates if hidden_bias is None else hidden_gates + hidden_bias
    return _cell(gates, recurrent, cx, cx, LSTM)


def gru_cell(
    input_gates: Tensor, hidden_gates: Tensor, hx: Tensor, input_bias: Tensor | None = None,
    hidden_bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    gates = input_gates if input_bias is None else input_gates + input_bias
    recurrent = hidden_gates if hidden_bias is None else hidden_gates + hidden_bias
    return _cell(gates, recurrent, hx, hx, GRU)[0]


def packed_sequence(input: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
    x = input.transpose(0, 1) if batch_first else input
    running = lengths[None] > torch.arange(len(x))[:, None]
    return x[running.to(x.device)], running.sum(1)


# --- tables and norms -----------------------------------------------------------------------------


def bags(
    weight: Tensor, indices: Tensor, offsets: Tensor, scale_grad_by_freq: bool = False, mode: int = 0,
    sparse: bool = False, per_sample_weights: Tensor | None = None, include_last_offset: bool = False,
    padding_idx: int = -1,
) -> Any:  # fmt: skip
    """Sums and means of rows of a table over the runs of a flat index."""
    if mode > 1 or scale_grad_by_freq or include_last_offset or padding_idx >= 0:
        raise NotImplementedError(
            "bags by their largest entries, scaled by frequency, or with padding"
        )
    places = torch.arange(len(indices), device=indices.device)
    bag = torch.searchsorted(offsets.contiguous(), places, right=True) - 1
    rows = (
        weight[indices]
        if per_sample_weights is None
        else weight[indices] * per_sample_weights[:, None]
    )
    out = torch.zeros(
        len(offsets), weight.shape[1], dtype=weight.dtype, device=weight.device
    ).index_add(0, bag, rows)
    return out if mode == 0 else out / bag.bincount(minlength=len(offsets)).clamp_min(1)[:, None]


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Any:
    norms = torch.norm_except_dim(v, 2, dim)
    return v * (g / norms), norms


SPELLED_OUT: dict[str, Callable[..., Any]] = {
    "_weight_norm_interface": weight_norm,
    "_scaled_dot_product_flash_attention_for_cpu": attention_on_cpu,
    "_scaled_dot_product_flash_attention": flash,
    "_scaled_dot_product_efficient_attention": efficient,
    "_scaled_dot_product_cudnn_attention": efficient,
    "_scaled_dot_product_fused_attention_overrideable": overrideable,
    "_cudnn_rnn": cudnn_rnn,
    "miopen_rnn": miopen_rnn,
    "_thnn_fused_lstm_cell": lstm_cell,
    "_thnn_fused_gru_cell": gru_cell,
    "_pack_padded_sequence": packed_sequence,
    "_embedding_bag": bags,
    "_embedding_bag_forward_only": bags,
}
