"""One layer of a recurrence as two ops, so that its weights stand in plain products alone.

Legend: ``x`` the input, ``h`` the state and ``c`` the cell of a sequence; ``t`` a time step, ``n``
a sequence; ``W`` and ``U`` the weights of input and state; ``d`` a cotangent, ``j`` a tangent.

The gates of a step are ``a_t = W x_t`` and ``b_t = U h_{t-1}``, with their biases. The first op,
``recurrent_states``, runs the layer and returns all ``h_{t-1}``, as constants. A plain product
makes ``b`` of them, for all steps at once. The second op, ``recurrent_cells``, makes the outputs of
``a`` and ``b``, and knows that a state moves the gates after it:

    h_t = cell(a_t, b_t + U (h_{t-1} − the constant), h_{t-1}).

Its value and all derivatives are those of the layer, and its derivative by ``U`` is zero: how the
layer moves with ``U`` is seen in the product that made ``b``. A projection ``P`` of the state is
treated like ``U``. Cotangents go back through time once, whatever is asked of the weights.

Values are ``[t, n, ..]``; or packed, ``[rows, ..]``, with ``sizes[t]`` rows of the first sequences
for step ``t``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

RELU, TANH, LSTM, GRU = range(4)  # the numbers that cuDNN and MIOpen use

FUNCTIONS: dict[int, Any] = {
    RELU: torch.rnn_relu,
    TANH: torch.rnn_tanh,
    LSTM: torch.lstm,
    GRU: torch.gru,
}

# Products with the weights of the state that make up the gates of a step.
GATES = {RELU: 1, TANH: 1, LSTM: 4, GRU: 3}

LIBRARY = torch.library.Library("unbatch", "DEF")

LIBRARY.define(
    "recurrent_states(Tensor x, Tensor[] weights, Tensor h, Tensor? c, int mode, bool reverse, "
    "int[] sizes) -> (Tensor, Tensor)"
)

LIBRARY.define(
    "recurrent_cells(Tensor input_gates, Tensor hidden_gates, Tensor? projected, Tensor previous, "
    "Tensor? unprojected, Tensor hidden_weight, Tensor? projection, Tensor h, Tensor? c, int mode, "
    "bool reverse, int[] sizes) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)

recurrent_states = torch.ops.unbatch.recurrent_states.default

recurrent_cells = torch.ops.unbatch.recurrent_cells.default


# --- time -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Time:
    """The order of the steps, and how values are cut into steps."""

    steps: int
    reverse: bool
    sizes: Sequence[int]

    @property
    def forth(self) -> Iterable[int]:
        """The steps in the order in which the layer takes them."""
        if self.reverse:
            return range(self.steps - 1, -1, -1)
        return range(self.steps)

    @property
    def back(self) -> Iterable[int]:
        """The other way round."""
        return reversed(list(self.forth))

    def cut(self, t: Tensor) -> Sequence[Tensor]:
        """Return a value step by step."""
        if self.sizes:
            return t.split(list(self.sizes))
        return t.unbind(0)

    def joined(self, steps: dict[int, Tensor]) -> Tensor:
        """Return the value with these steps."""
        in_order = [steps[t] for t in range(self.steps)]
        if self.sizes:
            return torch.cat(in_order)
        return torch.stack(in_order)

    def running(self, carried: Tensor, t: int) -> Tensor:
        """Return the part of the sequences that run at a step."""
        if not self.sizes or self.sizes[t] == self.sizes[0]:
            return carried
        return carried[: self.sizes[t]]

    def carried(self, new: Tensor, before: Tensor, t: int) -> Tensor:
        """Return what is carried on from a step: new for the sequences that run, or as before."""
        if not self.sizes or self.sizes[t] == self.sizes[0]:
            return new
        return torch.cat([new, before[self.sizes[t] :]])

    def turned(self, t: Tensor) -> Tensor:
        """Return a value with the steps of every sequence the other way round, if they are."""
        if not self.reverse:
            return t
        if not self.sizes:
            return t.flip(0)
        # Row n of step t is row n of step l - 1 - t, if sequence n has l steps.
        sizes = torch.tensor(self.sizes)
        starts = sizes.cumsum(0) - sizes
        lengths = (sizes[None] > torch.arange(self.sizes[0])[:, None]).sum(1)
        rows: list[Tensor] = []
        for step, size in enumerate(self.sizes):
            rows.append(starts[lengths[:size] - 1 - step] + torch.arange(size))
        return t[torch.cat(rows).to(t.device)]


def time_of(gates: Tensor, reverse: bool, sizes: Sequence[int]) -> Time:
    """Return how the time of gates runs."""
    return Time(len(sizes) or len(gates), reverse, sizes)


def _side_by_side(gates: Tensor) -> Tensor:
    """Return gates ``[.., gate, o]`` one after the other."""
    # Not by ``flatten``, which cannot be batched in a backward pass for many cotangents.
    return gates.reshape(*gates.shape[:-2], -1)


# --- one step -------------------------------------------------------------------------------------


def cell(a: Tensor, b: Tensor, h: Tensor, c: Tensor, mode: int) -> tuple[Tensor, Tensor]:
    """Return state and cell after one step, before any projection.

    From the gates of input and state, which are added up unless they are named with a and b:

        LSTM   c′ = σ(forget) c + σ(enter) tanh(new)        h′ = σ(out) tanh(c′)
        GRU    n = tanh(new_a + σ(reset) new_b)             h′ = n + σ(update) (h − n)
        plain                                               h′ = tanh(gates), or relu(gates)

    Where there is no cell, it is the state.
    """
    if mode == LSTM:
        enter, forget, new, out = (a + b).chunk(4, -1)
        c = forget.sigmoid() * c + enter.sigmoid() * new.tanh()
        return out.sigmoid() * c.tanh(), c
    if mode == GRU:
        reset, update, new = a.chunk(3, -1)
        by_reset, by_update, by_new = b.chunk(3, -1)
        update = (update + by_update).sigmoid()
        new = (new + (reset + by_reset).sigmoid() * by_new).tanh()
        h = new + update * (h - new)
        return h, h
    h = a + b
    h = h.relu() if mode == RELU else h.tanh()
    return h, h


def _states(
    x: Tensor,
    weights: Sequence[Tensor],
    h: Tensor,
    c: Tensor | None,
    mode: int,
    reverse: bool,
    sizes: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Return the state before every step, and the state after it without its projection.

    ``weights``: as of PyTorch's functions, with the projection at the end if there is one.
    """
    time = Time(len(sizes) or len(x), reverse, sizes)
    previous = _before(time, _by_pytorch(x, weights, h, c, mode, time), h)
    if len(weights) % 2 == 0:
        return previous, x.new_empty(0)
    by_input, by_state, *biases, _ = weights
    a, b = biases or (None, None)
    gates = F.linear(x, by_input, a), F.linear(previous, by_state, b)
    cells = Cells(*gates, None, previous, None, by_state, None, h, c, mode, reverse, sizes)
    _, of_lstm, _, tanh = _cells_of_lstm(cells)
    return previous, of_lstm.chunk(4, -1)[3] * tanh


def _before(time: Time, outputs: Tensor, h: Tensor) -> Tensor:
    """Return the state before every step, from that after it."""
    if not time.sizes:
        if time.reverse:
            return torch.cat([outputs[1:], h[None]])
        return torch.cat([h[None], outputs[:-1]])
    before: dict[int, Tensor] = {}
    after = time.cut(outputs)
    for t in time.forth:
        before[t] = time.running(h, t)
        h = time.carried(after[t], h, t)
    return time.joined(before)


def _by_pytorch(
    x: Tensor, weights: Sequence[Tensor], h: Tensor, c: Tensor | None, mode: int, time: Time
) -> Tensor:
    """Return the outputs of a layer, by PyTorch's own function, which goes forth in time."""
    states: Any = h[None]
    if c is not None:
        states = [h[None], c[None]]
    settings = list(weights), len(weights) > 3, 1, 0.0, False, False
    batch: tuple[Any, ...] = time.turned(x), states, *settings, False
    if time.sizes:
        batch = time.turned(x), torch.tensor(time.sizes), states, *settings
    # The library of a GPU warns where weights do not lie in one block of memory.
    with torch.backends.cudnn.flags(enabled=False) if x.is_cuda else nullcontext():
        outputs: Tensor = FUNCTIONS[mode](*batch)[0]
    return time.turned(outputs)


# --- all steps ------------------------------------------------------------------------------------


class Cells(NamedTuple):
    """The arguments of ``recurrent_cells``."""

    input_gates: Tensor
    hidden_gates: Tensor
    projected: Tensor | None
    previous: Tensor
    unprojected: Tensor | None
    hidden_weight: Tensor
    projection: Tensor | None
    h: Tensor
    c: Tensor | None
    mode: int
    reverse: bool
    sizes: Sequence[int]

    @property
    def time(self) -> Time:
        """How its time runs."""
        return time_of(self.input_gates, self.reverse, self.sizes)


def unrolled(cells: Cells) -> tuple[Tensor, Tensor, Tensor]:
    """Return what ``recurrent_cells`` returns, by plain ops with all their derivatives."""
    time, h, c = cells.time, cells.h, cells.c
    if c is None:
        c = h
    a, b, constants = map(time.cut, (cells.input_gates, cells.hidden_gates, cells.previous))
    projected: Sequence[Tensor] = ()
    unprojected: Sequence[Tensor] = ()
    if cells.projection is not None:
        assert cells.projected is not None
        assert cells.unprojected is not None
        projected, unprojected = time.cut(cells.projected), time.cut(cells.unprojected)
    outputs: dict[int, Tensor] = {}
    for t in time.forth:
        state, old_cell = time.running(h, t), time.running(c, t)
        moved = (state - constants[t]) @ cells.hidden_weight.T
        state, new_cell = cell(a[t], b[t] + moved, state, old_cell, cells.mode)
        if cells.projection is not None:
            state = projected[t] + (state - unprojected[t]) @ cells.projection.T
        outputs[t] = state
        h, c = time.carried(state, h, t), time.carried(new_cell, c, t)
    if cells.c is None:
        c = h.new_empty(0)
    return time.joined(outputs), h, c


def _last(time: Time, outputs: Sequence[Tensor], h: Tensor) -> Tensor:
    """Return the last state of every sequence."""
    if not time.sizes:
        return outputs[0 if time.reverse else -1].clone()
    for t in time.forth:
        h = time.carried(outputs[t], h, t)
    return h.clone()


class Ran(NamedTuple):
    """The results of ``recurrent_cells``: what the layer returns, and what its derivatives need.

    That is, as far as the kind of layer has it: its gates after their nonlinearities, and the cell
    before every step and, after a tanh, behind it.
    """

    outputs: Tensor
    h: Tensor
    c: Tensor
    gates: Tensor
    before: Tensor
    tanh: Tensor


def _cells(*arguments: Any) -> tuple[Tensor, ...]:
    """Run a layer, from the gates of all steps."""
    cells = Cells(*arguments)
    if cells.mode == LSTM:
        return tuple(_run_lstm(cells))
    if cells.mode == GRU:
        return tuple(_run_gru(cells))
    return tuple(_run_plain(cells))


def _like_steps(gates: Tensor) -> Tensor:
    """Return memory for gates, step by step as PyTorch's functions have it.

    That order counts: in it the noise of a dropout is drawn.
    """
    return torch.empty(gates.shape, dtype=gates.dtype, device=gates.device)


def _run_lstm(cells: Cells) -> Ran:
    c, gates, before, tanh = _cells_of_lstm(cells)
    if cells.projected is None:
        outputs = gates.chunk(4, -1)[3] * tanh
    else:
        outputs = cells.projected.clone()
    last = _last(cells.time, cells.time.cut(outputs), cells.h)
    return Ran(outputs, last, c, gates, before, tanh)


def _cells_of_lstm(cells: Cells) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the last cell, the gates, and the cell before every step and, by its tanh, behind."""
    assert cells.c is not None
    time, c = cells.time, cells.c
    gates = torch.add(cells.input_gates, cells.hidden_gates, out=_like_steps(cells.input_gates))
    enter, forget, new, out = gates.chunk(4, -1)
    for gate in (enter, forget, out):
        gate.sigmoid_()
    new.tanh_()
    entering, kept = time.cut(enter * new), time.cut(forget)
    before: dict[int, Tensor] = {}
    after: dict[int, Tensor] = {}
    for t in time.forth:
        before[t] = time.running(c, t)
        after[t] = torch.addcmul(entering[t], kept[t], before[t])
        c = time.carried(after[t], c, t)
    return c.clone(), gates, time.joined(before), time.joined(after).tanh_()


def _run_gru(cells: Cells) -> Ran:
    a, b = cells.input_gates.chunk(3, -1), cells.hidden_gates.chunk(3, -1)
    gates = _like_steps(cells.input_gates)
    r, z, n = gates.chunk(3, -1)
    torch.add(a[0], b[0], out=r).sigmoid_()
    torch.add(a[1], b[1], out=z).sigmoid_()
    torch.addcmul(a[2], r, b[2], out=n).tanh_()
    outputs = torch.addcmul(n, z, cells.previous - n)
    return _without_cell(cells, outputs, gates)


def _run_plain(cells: Cells) -> Ran:
    outputs = torch.add(cells.input_gates, cells.hidden_gates, out=_like_steps(cells.input_gates))
    outputs = outputs.relu_() if cells.mode == RELU else outputs.tanh_()
    return _without_cell(cells, outputs, outputs.new_empty(0))


def _without_cell(cells: Cells, outputs: Tensor, gates: Tensor) -> Ran:
    last = _last(cells.time, cells.time.cut(outputs), cells.h)
    nothing = [outputs.new_empty(0) for _ in range(3)]
    return Ran(outputs, last, nothing[0], gates, *nothing[1:])


# What a state moves is linear, so that every step has numbers that derivatives are made of: by them
# cotangents are pulled back through time, and tangents pushed.


class LSTMSlopes:
    """The derivatives of all steps of a layer of an LSTM.

    With ``i``, ``f``, ``g``, ``o`` the gates after their nonlinearities,

        dc_t = dc_{t+1} f_{t+1} + dh_t o (1 − tanh² c)
        di, df, dg = dc (g i (1 − i), c_{t-1} f (1 − f), i (1 − g²))
        do = dh tanh c o (1 − o)

    are the cotangents of the cell and of the gates before their nonlinearities.
    """

    def __init__(self, cells: Cells, ran: Ran) -> None:
        self.cells, self.time = cells, cells.time
        enter, self.forget, new, out = ran.gates.chunk(4, -1)
        # Of sigmoids, σ − σ²; for the gate that is a tanh another one stands there afterwards.
        slopes = torch.addcmul(ran.gates, ran.gates, ran.gates, value=-1)
        by_enter, by_forget, by_new, by_out = slopes.chunk(4, -1)
        by_enter.mul_(new)
        by_forget.mul_(ran.before)
        torch.addcmul(enter, enter * new, new, value=-1, out=by_new)
        by_out.mul_(ran.tanh)
        # What the gates move, three of them in the cell and one in the state: ``[.., 4, o]``.
        self.by_gates = self.time.cut(slopes.unflatten(-1, (4, -1)))
        by_cell = torch.addcmul(out, out * ran.tanh, ran.tanh, value=-1)
        self.by_cell = self.time.cut(by_cell)

    def pull(self, dy: Tensor | None, dh: Tensor, dc: Tensor) -> Pulled:
        """Return the cotangents of the arguments."""
        time, projection = self.time, self.cells.projection
        by_gates, by_cell, forget = self.by_gates, self.by_cell, time.cut(self.forget)
        of_outputs = None if dy is None else time.cut(dy)
        gates: dict[int, Tensor] = {}
        projected: dict[int, Tensor] = {}
        for t in time.back:
            d = time.running(dh, t)
            if of_outputs is not None:
                d = d + of_outputs[t]
            if projection is not None:
                projected[t] = d
                d = d @ projection
            d_cell = torch.addcmul(time.running(dc, t), d, by_cell[t])
            moved = torch.stack([d_cell, d_cell, d_cell, d], -2)
            gates[t] = _side_by_side(moved * by_gates[t])
            dh = time.carried(gates[t] @ self.cells.hidden_weight, dh, t)
            dc = time.carried(d_cell * forget[t], dc, t)
        of_gates = time.joined(gates)
        of_projected = None if projection is None else time.joined(projected)
        return Pulled(of_gates, of_gates, of_projected, dh, dc)

    def push(self, tangents: Tangents) -> tuple[Tensor, Tensor, Tensor]:
        """Return the tangents of the results."""
        time, cells, h, c = self.time, self.cells, tangents.h, tangents.c
        by_gates, by_cell, forget = self.by_gates, self.by_cell, time.cut(self.forget)
        of_gates, by_projected = time.cut(tangents.input_gates + tangents.hidden_gates), None
        if tangents.projected is not None:
            by_projected = time.cut(tangents.projected)
        outputs: dict[int, Tensor] = {}
        assert c is not None
        for t in time.forth:
            gates = of_gates[t] + time.running(h, t) @ cells.hidden_weight.T
            moved = gates.unflatten(-1, (4, -1)) * by_gates[t]
            j_cell = torch.addcmul(moved[..., :3, :].sum(-2), forget[t], time.running(c, t))
            j = torch.addcmul(moved[..., 3, :], by_cell[t], j_cell)
            if cells.projection is not None:
                j = j @ cells.projection.T
                if by_projected is not None:
                    j = j + by_projected[t]
            outputs[t] = j
            h, c = time.carried(j, h, t), time.carried(j_cell, c, t)
        return time.joined(outputs), h, c


class PlainSlopes:
    """The derivatives of all steps of a layer of a GRU, or of a plain recurrence.

    For a GRU with ``r``, ``z``, ``n`` the gates after their nonlinearities,

        h_t = n + z (h_{t-1} − n)
        dr, dz, dn = dh ((1 − z)(1 − n²) new_b r (1 − r), (h_{t-1} − n) z (1 − z), (1 − z)(1 − n²))

    are the cotangents of the gates of the input; that of ``new_b`` is ``r dn``.
    """

    def __init__(self, cells: Cells, ran: Ran) -> None:
        self.cells, self.time = cells, cells.time
        self.kept: Tensor | None = None
        if cells.mode == GRU:
            self._of_gru(ran)
            return
        if cells.mode == RELU:
            slope = (ran.outputs > 0).to(ran.outputs.dtype)
        else:
            slope = 1 - ran.outputs.square()
        self.by_input = self.by_state = slope.unsqueeze(-2)

    def _of_gru(self, ran: Ran) -> None:
        r, self.kept, n = ran.gates.chunk(3, -1)
        slopes = torch.addcmul(ran.gates, ran.gates, ran.gates, value=-1)
        by_reset, by_update, by_new = slopes.chunk(3, -1)
        torch.mul(1 - self.kept, 1 - n.square(), out=by_new)
        by_reset.mul_(by_new).mul_(self.cells.hidden_gates.chunk(3, -1)[2])
        by_update.mul_(self.cells.previous - n)
        self.by_input = slopes.unflatten(-1, (3, -1))
        of_state = slopes.clone()
        of_state.chunk(3, -1)[2].mul_(r)
        self.by_state = of_state.unflatten(-1, (3, -1))

    def pull(self, dy: Tensor | None, dh: Tensor, dc: Tensor) -> Pulled:
        """Return the cotangents of the arguments."""
        time, by_state = self.time, self.time.cut(self.by_state)
        of_outputs = None if dy is None else time.cut(dy)
        kept = None if self.kept is None else time.cut(self.kept)
        states: dict[int, Tensor] = {}
        gates: dict[int, Tensor] = {}
        for t in time.back:
            d = time.running(dh, t)
            if of_outputs is not None:
                d = d + of_outputs[t]
            states[t] = d
            gates[t] = _side_by_side(d.unsqueeze(-2) * by_state[t])
            before = gates[t] @ self.cells.hidden_weight
            if kept is not None:
                before = torch.addcmul(before, d, kept[t])
            dh = time.carried(before, dh, t)
        of_hidden = of_input = time.joined(gates)
        if kept is not None:
            of_input = _side_by_side(time.joined(states).unsqueeze(-2) * self.by_input)
        return Pulled(of_input, of_hidden, None, dh, dc)

    def push(self, tangents: Tangents) -> tuple[Tensor, Tensor, Tensor]:
        """Return the tangents of the results."""
        time, h = self.time, tangents.h
        by_state, count = time.cut(self.by_state), GATES[self.cells.mode]
        kept = None if self.kept is None else time.cut(self.kept)
        parts = tangents.input_gates.unflatten(-1, (count, -1)) * self.by_input
        parts = parts + tangents.hidden_gates.unflatten(-1, (count, -1)) * self.by_state
        by_gates = time.cut(parts.sum(-2))
        outputs: dict[int, Tensor] = {}
        for t in time.forth:
            before = time.running(h, t)
            gates = (before @ self.cells.hidden_weight.T).unflatten(-1, (count, -1))
            j = by_gates[t] + (gates * by_state[t]).sum(-2)
            if kept is not None:
                j = torch.addcmul(j, before, kept[t])
            outputs[t] = j
            h = time.carried(j, h, t)
        return time.joined(outputs), h, h.new_empty(0)


class Pulled(NamedTuple):
    """Cotangents of what ``recurrent_cells`` has derivatives by."""

    input_gates: Tensor
    hidden_gates: Tensor
    projected: Tensor | None
    h: Tensor
    c: Tensor


class Tangents(NamedTuple):
    """Tangents of what ``recurrent_cells`` has derivatives by."""

    input_gates: Any
    hidden_gates: Any
    projected: Tensor | None
    h: Any
    c: Tensor | None


def tangents_of(cells: Cells, moving: Mapping[str, Tensor | None]) -> Tangents:
    """Return the tangents of a layer's arguments, zero for those that do not move."""
    tangents: list[Tensor | None] = []
    for name in Tangents._fields:
        tangent, value = moving.get(name), getattr(cells, name)
        if tangent is None and value is not None:
            tangent = torch.zeros_like(value)
        tangents.append(tangent)
    return Tangents(*tangents)


def slopes(cells: Cells, ran: Ran) -> LSTMSlopes | PlainSlopes:
    """Return the derivatives of a layer at what it has run on."""
    return LSTMSlopes(cells, ran) if cells.mode == LSTM else PlainSlopes(cells, ran)


# --- as ops of autograd ---------------------------------------------------------------------------


TENSORS = 9  # among the arguments of ``recurrent_cells``, which come first


class _Differentiated(torch.autograd.Function):
    """``recurrent_cells``, pulled back through time."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        ctx.set_materialize_grads(False)
        ctx.numbers = arguments[TENSORS:]
        # A recording asks whether gradients are enabled for the program, not in here.
        with torch.enable_grad():
            ran = Ran(*_below_autograd(recurrent_cells, arguments))
        ctx.mark_non_differentiable(ran.gates, ran.before, ran.tanh)
        ctx.save_for_backward(*arguments[:TENSORS], *ran)
        return tuple(ran)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        saved = ctx.saved_tensors
        cells, ran = Cells(*saved[:TENSORS], *ctx.numbers), Ran(*saved[TENSORS:])
        dy, dh, dc, *_ = cotangents
        if torch.is_grad_enabled():  # there will be a derivative of this one
            return _pulled_twice(cells, [dy, dh, dc], ctx.needs_input_grad)
        if dh is None:
            dh = torch.zeros_like(cells.h)
        if dc is None:
            dc = torch.zeros_like(cells.h if cells.c is None else cells.c)
        pulled = slopes(cells, ran).pull(dy, dh, dc)
        of_cells = None if cells.c is None else pulled.c
        gates = pulled.input_gates, pulled.hidden_gates, pulled.projected
        return *gates, *[None] * 4, pulled.h, of_cells, None, None, None


def _pulled_twice(
    cells: Cells, cotangents: Sequence[Tensor | None], needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Return the cotangents of the arguments as functions of all that they depend on."""
    outs: list[Tensor] = []
    gs: list[Tensor] = []
    for out, g in zip(unrolled(cells), cotangents, strict=True):
        if g is not None and out.requires_grad:
            outs.append(out)
            gs.append(g)
    places = [k for k in range(TENSORS) if needed[k]]
    ends: list[Any] = [cells[k] for k in places]
    pulled = torch.autograd.grad(outs, ends, gs, create_graph=True, allow_unused=True)
    results: list[Tensor | None] = [None] * len(cells)
    for k, g in zip(places, pulled, strict=True):
        results[k] = g
    return tuple(results)


def _below_autograd(op: Any, arguments: Sequence[Any]) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return op(*arguments)


def _cut_off(*arguments: Any) -> Any:
    return _below_autograd(recurrent_states, arguments)


def _differentiated(*arguments: Any) -> Any:
    needed = any(isinstance(a, Tensor) and a.requires_grad for a in arguments)
    if needed and torch.is_grad_enabled():
        return _Differentiated.apply(*arguments)
    return _below_autograd(recurrent_cells, arguments)


KERNELS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "recurrent_states": (_states, _cut_off),
    "recurrent_cells": (_cells, _differentiated),
}

for _name, (_kernel, _with_autograd) in KERNELS.items():
    LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
    LIBRARY.impl(_name, _with_autograd, "Autograd")
