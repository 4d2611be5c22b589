"""Fused ops as compositions of plain ones, which have the forward mode that the fused op lacks.

A composition takes the arguments that its op was given, by their names in the op's schema, and
returns the op's results, or the first of them. Knows ops and tensors only.

Legend of a recurrence: ``x`` the input, ``h`` the state and ``c`` the cell of every sequence; a
*gate* is what a weight makes of one of them before the nonlinearity.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from unbatch.capture import ops
from unbatch.capture.recurrent_ops import GRU, LSTM, Cells, cell, unrolled

aten = torch.ops.aten


Arguments = Mapping[str, Any]


Composition = Callable[[Arguments], Any]


COMPOSITIONS: dict[str, Composition] = {}


NO_MASK = (
    "fused attention with dropout does not say what it drops; run it inside "
    "torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), or with dropout 0"
)


NO_BAGS = "bags by their largest entries, scaled by frequency, or with padding"


def composition(*names: str) -> Callable[[Composition], Composition]:
    """Register a composition of ops."""

    def register(function: Composition) -> Composition:
        for name in names:
            COMPOSITIONS[name] = function
        return function

    return register


# --- attention ------------------------------------------------------------------------------------


@composition(*ops.names(lambda row: row.attention))
def attention(arguments: Arguments) -> Any:
    """Products and a softmax; without dropout, whose mask the fused kernels do not return."""
    if arguments.get("dropout_p", 0.0):
        raise NotImplementedError(NO_MASK)
    # Some kernels call it a mask, some a bias, and some take none.
    mask = arguments.get("attn_mask", arguments.get("attn_bias"))
    return aten._scaled_dot_product_attention_math(
        arguments["query"],
        arguments["key"],
        arguments["value"],
        mask,
        0.0,
        arguments.get("is_causal", False),
        scale=arguments.get("scale"),
    )[0]


# --- recurrences ----------------------------------------------------------------------------------


@composition(*ops.names(lambda row: row.recurrence))
def recurrence(arguments: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs of the last layer, and last states and cells of all layers.

    The rows of a time step are the sequences that still run, longest first, as in a packed
    sequence.
    """
    x, hx, cx = arguments["input"], arguments["hx"], arguments["cx"]
    weights, per_layer = arguments["weight"], arguments["weight_stride0"]
    batch_sizes = list(arguments["batch_sizes"])
    directions = 1 + int(arguments["bidirectional"])
    time = int(arguments["batch_first"])
    # Packed sequences have a batch size for each time step; others are cut along the axis of time.
    steps = list(x.split(batch_sizes)) if batch_sizes else list(x.unbind(time))
    if cx is None:
        cx = hx
    states: list[Tensor] = []
    cells: list[Tensor] = []
    for first in range(0, len(weights) // per_layer, directions):
        # Both directions read the layer below, and the next layer reads both.
        sides = []
        for k in range(first, first + directions):
            outputs, h, c = _direction(
                steps,
                weights[k * per_layer : (k + 1) * per_layer],
                hx[k],
                cx[k],
                mode=arguments["mode"],
                backward=k > first,
                projected=arguments.get("proj_size", 0) > 0,
            )
            sides.append(outputs)
            states.append(h)
            cells.append(c)
        steps = [torch.cat(parts, -1) for parts in zip(*sides, strict=True)]
    y = torch.cat(steps) if batch_sizes else torch.stack(steps, time)
    last_cells = torch.stack(cells)
    if arguments["cx"] is None:
        last_cells = x.new_empty(0)
    return y, torch.stack(states), last_cells


def _direction(
    steps: Sequence[Tensor],
    weights: Sequence[Tensor],
    h: Tensor,
    c: Tensor,
    mode: int,
    backward: bool,
    projected: bool,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Return outputs, last state and last cell of one layer in one direction of time.

    The state of a sequence that has ended, or not begun, stays as it is.
    """
    # A layer has two weights, perhaps two biases and, at the end, perhaps a projection.
    by_input, by_hidden, *others = weights
    projection = None
    if projected:
        projection = others.pop()
    biases: list[Any] = others or [None, None]
    order = list(steps)
    if backward:
        order.reverse()
    outputs: list[Tensor] = []
    for x in order:
        running = len(x)
        gates = torch.nn.functional.linear(x, by_input, biases[0])
        recurrent = torch.nn.functional.linear(h[:running], by_hidden, biases[1])
        state, new_cell = cell(gates, recurrent, h[:running], c[:running], mode)
        if projection is not None:
            state = state @ projection.T
        # The sequences that do not run at this step are the last ones.
        h, c = torch.cat([state, h[running:]]), torch.cat([new_cell, c[running:]])
        outputs.append(state)
    if backward:
        outputs.reverse()
    return outputs, h, c


@composition("unbatch::recurrent_cells")
def recurrent_cells(arguments: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, last state and last cell of one layer."""
    return unrolled(Cells(**arguments))


@composition(*ops.names(lambda row: row.cell == "LSTM"))
def lstm_cell(arguments: Arguments) -> tuple[Tensor, Tensor]:
    """State and cell after one step."""
    gates, recurrent = _gates(arguments)
    return cell(gates, recurrent, arguments["cx"], arguments["cx"], LSTM)


@composition(*ops.names(lambda row: row.cell == "GRU"))
def gru_cell(arguments: Arguments) -> Tensor:
    """State after one step."""
    gates, recurrent = _gates(arguments)
    return cell(gates, recurrent, arguments["hx"], arguments["hx"], GRU)[0]


def _gates(arguments: Arguments) -> tuple[Tensor, Tensor]:
    """Return the gates of input and state, with their biases where there are any."""
    gates, recurrent = arguments["input_gates"], arguments["hidden_gates"]
    if arguments.get("input_bias") is not None:
        gates = gates + arguments["input_bias"]
    if arguments.get("hidden_bias") is not None:
        recurrent = recurrent + arguments["hidden_bias"]
    return gates, recurrent


@composition("_pack_padded_sequence")
def packed_sequence(arguments: Arguments) -> tuple[Tensor, Tensor]:
    """Rows of the sequences that still run, time step by time step, and how many run at each."""
    x, lengths = arguments["input"], arguments["lengths"]
    if arguments["batch_first"]:
        x = x.transpose(0, 1)
    running = lengths[None] > torch.arange(len(x))[:, None]
    return x[running.to(x.device)], running.sum(1)


# --- tables and norms -----------------------------------------------------------------------------


@composition("_embedding_bag", "_embedding_bag_forward_only")
def bags(arguments: Arguments) -> Any:
    """Sums (mode 0) or means (mode 1) of rows of a table over the runs of a flat index."""
    mode = arguments.get("mode", 0)
    unusual = arguments.get("scale_grad_by_freq") or arguments.get("include_last_offset")
    if unusual or mode > 1 or arguments.get("padding_idx", -1) >= 0:
        raise NotImplementedError(NO_BAGS)
    weight, indices, offsets = arguments["weight"], arguments["indices"], arguments["offsets"]
    places = torch.arange(len(indices), device=indices.device)
    bag = torch.searchsorted(offsets.contiguous(), places, right=True) - 1
    rows = weight[indices]
    if arguments.get("per_sample_weights") is not None:
        rows = rows * arguments["per_sample_weights"][:, None]
    count = len(offsets)
    empty = torch.zeros(count, weight.shape[1], dtype=weight.dtype, device=weight.device)
    sums = empty.index_add(0, bag, rows)
    if mode == 0:
        return sums
    return sums / bag.bincount(minlength=count).clamp_min(1)[:, None]


@composition("_weight_norm_interface")
def weight_norm(arguments: Arguments) -> Any:
    """``g v/‖v‖`` and ``‖v‖``, with norms over all axes but ``dim``."""
    v, g = arguments["v"], arguments["g"]
    norms = torch.norm_except_dim(v, 2, arguments.get("dim", 0))
    return v * (g / norms), norms
