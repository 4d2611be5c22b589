"""What is recorded of ``nn.RNN``, ``nn.LSTM`` and ``nn.GRU``: plain products, and two ops a layer.

PyTorch runs a whole layer in one op, whose weights no rule can take apart, or in hundreds of small
ones. While a program is recorded, its layers run as described in ``recurrent_ops.py`` instead: the
same numbers but for rounding, which the check of the recording compares with the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from unbatch.capture.recurrent_ops import (
    GRU,
    LSTM,
    RELU,
    TANH,
    recurrent_cells,
    recurrent_states,
)

# Functions of PyTorch that run all layers, and the recurrence that they run.
MODES = {torch.rnn_relu: RELU, torch.rnn_tanh: TANH, torch.lstm: LSTM, torch.gru: GRU}

SETTINGS = ("params", "has_biases", "num_layers", "dropout", "train", "bidirectional")

# Their arguments for tensors, and for packed sequences.
ARGUMENTS = ("input", "hx", *SETTINGS, "batch_first"), ("data", "batch_sizes", "hx", *SETTINGS)

DTYPES = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Layers:
    """A call of one of the functions."""

    mode: int
    x: Tensor
    batch_sizes: Tensor | None  # of packed sequences
    states: Sequence[Tensor]  # h, and for an LSTM c: [layer · direction, n, o]
    weights: Sequence[Tensor]
    biases: bool
    count: int
    dropout: float
    training: bool
    directions: int
    batch_first: bool

    @property
    def drops(self) -> bool:
        """Whether entries are dropped between layers."""
        return self.training and self.dropout > 0 and self.count > 1

    @property
    def per_layer(self) -> int:
        """How many weights a layer has in one direction."""
        return len(self.weights) // (self.count * self.directions)

    @property
    def projects(self) -> bool:
        """Whether states are projected: that weight comes last."""
        return self.per_layer == 2 + 2 * self.biases + 1


def layers_of(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Layers | None:
    """Return the call of a recurrence as it is to be recorded; None where it is another function.

    Also where it has tensors of an unusual kind, or runs inside of what transforms functions: then
    it is recorded as PyTorch runs it.
    """
    mode = _mode(function)
    if mode is None or kwargs or len(args) != 9:
        return None
    # Packed sequences have the sizes of their steps in front of the states.
    packed = isinstance(args[3], list | tuple)
    named = dict(zip(ARGUMENTS[packed], args, strict=True))
    states = named["hx"]
    if isinstance(states, Tensor):
        states = [states]
    layers = Layers(
        mode,
        named["data" if packed else "input"],
        named.get("batch_sizes"),
        list(states),
        list(named["params"]),
        named["has_biases"],
        named["num_layers"],
        named["dropout"],
        named["train"],
        1 + named["bidirectional"],
        named.get("batch_first", False),
    )
    return layers if _is_usual(layers) else None


def _mode(function: Any) -> int | None:
    try:
        return MODES.get(function)
    except TypeError:  # what cannot be hashed is no function of PyTorch's
        return None


def _is_usual(layers: Layers) -> bool:
    x = layers.x
    tensors = [x, *layers.states, *layers.weights]
    if x.ndim != 3 - (layers.batch_sizes is not None) or not x.numel() or x.dtype not in DTYPES:
        return False
    for tensor in tensors:
        plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
        if not plain or (tensor.dtype, tensor.device) != (x.dtype, x.device):
            return False
    return not _rounds_otherwise(layers) and not _transformed(x)


def _rounds_otherwise(layers: Layers) -> bool:
    """Return whether the library of a GPU runs the call, with other numbers than plain products.

    It may round what it multiplies, and keeps the random state of its dropout to itself.
    """
    if not layers.x.is_cuda or not torch.backends.cudnn.enabled:
        return False
    return layers.drops or layers.x.dtype == torch.float32


def _transformed(x: Tensor) -> bool:
    """Return whether what runs here is seen by other than autograd, which has its derivatives."""
    if torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0:
        return True
    return torch.is_autocast_enabled(x.device.type)


def run(layers: Layers) -> tuple[Tensor, ...]:
    """Return what the function returns: outputs, last states and, for an LSTM, last cells."""
    sizes: list[int] = []
    if layers.batch_sizes is not None:
        sizes = layers.batch_sizes.tolist()
    x, by_time = layers.x, not layers.batch_first
    states: list[Tensor] = []
    cells: list[Tensor] = []
    for layer in range(layers.count):
        sides: list[Tensor] = []
        for direction in range(layers.directions):
            y, h, c = _direction(layers, layer * layers.directions + direction, x, by_time, sizes)
            sides.append(y)
            states.append(h)
            cells.append(c)
        x, by_time = (sides[0] if len(sides) == 1 else torch.cat(sides, -1)), True
        if layers.drops and layer < layers.count - 1:
            x = F.dropout(x, layers.dropout, training=True)
    if layers.batch_first:
        x = x.transpose(0, 1)
    results = [x, torch.stack(states)]
    if layers.mode == LSTM:
        results.append(torch.stack(cells))
    return tuple(results)


def _direction(
    layers: Layers, number: int, x: Tensor, by_time: bool, sizes: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return outputs, last state and last cell of one layer in one direction of time."""
    h, *others = [state[number] for state in layers.states]
    c = others[0] if others else None
    first = number * layers.per_layer
    weights = layers.weights[first : first + layers.per_layer]
    by_input, by_state, *rest = weights
    projection = rest.pop() if layers.projects else None
    input_bias, hidden_bias = rest or (None, None)
    # Of all time steps at once.
    input_gates, steps = F.linear(x, by_input, input_bias), x
    if not by_time:
        input_gates, steps = input_gates.transpose(0, 1), x.transpose(0, 1)
    order = layers.mode, number % layers.directions == 1, sizes
    previous, unprojected = recurrent_states(steps, weights, h, c, *order)
    hidden_gates = F.linear(previous, by_state, hidden_bias)
    constant, projected = None, None
    if projection is None:
        unprojected = None
    else:
        projected = F.linear(unprojected, projection)
        constant = projection.detach()
    products = hidden_gates, projected, previous, unprojected, by_state.detach(), constant
    y, last, cell, *_ = recurrent_cells(input_gates, *products, h, c, *order)
    return y, last, cell
