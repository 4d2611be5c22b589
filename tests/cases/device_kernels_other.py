"""The ops that PyTorch picks on a GPU, run on a CPU: kernels of the CPU registered under their
names. At each stands what the page on ops of a GPU says of its op.

A call goes the whole way that it goes on a GPU: through PyTorch's own autograd formula for the op,
and through the backward op that this formula names. Where that backward op has no derivative on a
GPU it has none here. Batch norms are not here. The kernels are there inside ``registered()`` only:
some of these ops exist on a CPU as compositions.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from cases.device_rows import APART, PLAIN, REFUSED, RULE, Decorator, Family, Row, lent, pulled_back

aten = torch.ops.aten

RNN_MODES = {0: torch._VF.rnn_relu, 1: torch._VF.rnn_tanh, 2: torch._VF.lstm, 3: torch._VF.gru}
LSTM = 2


DROPOUT, RECURRENCES, CELLS, ATTENTION = Family(), Family(), Family(), Family()
LOSSES, NORMALISATION, GRIDS, CONVOLUTIONS = Family(), Family(), Family(), Family()

FAMILIES = (DROPOUT, RECURRENCES, CELLS, ATTENTION, LOSSES, NORMALISATION, GRIDS, CONVOLUTIONS)


def registered() -> AbstractContextManager[None]:
    """Inside, a CPU has the ops of a GPU."""
    return lent(*FAMILIES)


def _seeds() -> tuple[Tensor, Tensor]:
    """What a fused kernel returns of the state of its random numbers."""
    return torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.int64)


# --- dropout --------------------------------------------------------------------------------------


@DROPOUT.kernel("_fused_dropout", "called by name", APART, note="what was drawn, and a product")
def fused_dropout(x: Tensor, p: float, generator: Any = None) -> tuple[Tensor, Tensor]:
    """``p`` is the probability to keep an element."""
    mask = torch.bernoulli(torch.full_like(x, p), generator=generator)
    return x * mask / p, mask.to(torch.uint8)


@DROPOUT.backward("_masked_scale", arises="the backward pass of `_fused_dropout`")
def masked_scale(x: Tensor, mask: Tensor, scale: float) -> Tensor:
    return x * mask * scale


# --- recurrences ----------------------------------------------------------------------------------

TANGENTS = "no second derivative: tangents take plain ops"


def recurrence(
    x: Tensor,
    weights: Sequence[Tensor],
    stride: int,
    hx: Tensor,
    cx: Tensor | None,
    mode: int,
    layers: int,
    batch_first: bool,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_sizes: Sequence[int],
) -> tuple[Tensor, ...]:
    """The CPU's recurrence, with the arguments of cuDNN."""
    state: Any = (hx, cx) if mode == LSTM else hx
    biased = stride >= 4
    if batch_sizes:
        sizes = torch.tensor(batch_sizes)
        return RNN_MODES[mode](
            x, sizes, state, list(weights), biased, layers, dropout, train, bidirectional
        )
    return RNN_MODES[mode](
        x, state, list(weights), biased, layers, dropout, train, bidirectional, batch_first
    )


def _run(
    x: Tensor, weights: Sequence[Tensor], stride: int, hx: Tensor, cx: Tensor | None, *how: Any
) -> Any:
    with torch.no_grad():
        y, hy, *cy = recurrence(x, weights, stride, hx, cx, *how)
    reserve = torch.zeros(1, dtype=torch.uint8)
    return y.clone(), hy.clone(), cy[0].clone() if cy else x.new_empty(0), reserve, x.new_zeros(1)


def _back(
    x: Tensor,
    weights: Sequence[Tensor],
    stride: int,
    hx: Tensor,
    cx: Tensor | None,
    cotangents: Any,
    train: bool,
    how: Sequence[Any],
) -> Any:
    if not train:
        raise RuntimeError("cudnn RNN backward can only be called in training mode")

    def run(x: Tensor, hx: Tensor, cx: Tensor | None, *weights: Tensor) -> Any:
        return recurrence(x, weights, stride, hx, cx, *how)

    dx, dhx, dcx, *grads = pulled_back(run, [x, hx, cx, *weights], cotangents)
    zeros = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, grads, strict=True)]
    return dx, dhx, dcx, zeros


@RECURRENCES.kernel(
    "_cudnn_rnn",
    "`nn.LSTM`, `nn.GRU`, `nn.RNN`",
    tests=("_cudnn_rnn", "test_a_window_on_all_weights"),
)
def cudnn_rnn(
    x,
    weights,
    stride,
    buffer,
    hx,
    cx,
    mode,
    hidden,
    proj,
    layers,
    batch_first,
    dropout,
    train,
    bidirectional,
    batch_sizes,
    dropout_state,
):
    return _run(
        x,
        weights,
        stride,
        hx,
        cx,
        mode,
        layers,
        batch_first,
        dropout,
        train,
        bidirectional,
        batch_sizes,
    )


RECURRENCES.rows += [
    Row(
        "_cudnn_rnn with dropout",
        "`nn.LSTM(.., dropout=p)` in train mode",
        REFUSED,
        ("test_dropout_inside_a_recurrence_is_refused_by_name",),
        "its random state cannot be set; the structure is judged",
    ),
    Row(
        "_cudnn_rnn in eval mode",
        "`nn.LSTM(..).eval()` with trained weights",
        REFUSED,
        ("test_a_recurrence_in_eval_mode",),
        "no backward pass in PyTorch either; the structure is judged",
    ),
]


@RECURRENCES.backward("_cudnn_rnn_backward", note=TANGENTS)
def cudnn_rnn_backward(
    x,
    weights,
    stride,
    buffer,
    hx,
    cx,
    y,
    gy,
    ghy,
    gcy,
    mode,
    hidden,
    proj,
    layers,
    batch_first,
    dropout,
    train,
    bidirectional,
    batch_sizes,
    dropout_state,
    reserve,
    mask,
):
    how = (mode, layers, batch_first, dropout, train, bidirectional, batch_sizes)
    return _back(x, weights, stride, hx, cx, (gy, ghy, gcy), train, how)


@RECURRENCES.kernel("miopen_rnn", "the same on ROCm")
def miopen_rnn(
    x,
    weights,
    stride,
    hx,
    cx,
    mode,
    hidden,
    layers,
    batch_first,
    dropout,
    train,
    bidirectional,
    batch_sizes,
    state,
):
    return _run(
        x,
        weights,
        stride,
        hx,
        cx,
        mode,
        layers,
        batch_first,
        dropout,
        train,
        bidirectional,
        batch_sizes,
    )


@RECURRENCES.backward("miopen_rnn_backward", note=TANGENTS)
def miopen_rnn_backward(
    x,
    weights,
    stride,
    buffer,
    hx,
    cx,
    y,
    gy,
    ghy,
    gcy,
    mode,
    hidden,
    layers,
    batch_first,
    dropout,
    train,
    bidirectional,
    batch_sizes,
    dropout_state,
    reserve,
    mask,
):
    how = (mode, layers, batch_first, dropout, train, bidirectional, batch_sizes)
    return _back(x, weights, stride, hx, cx, (gy, ghy, gcy), train, how)


def _biased(gates: Tensor, bias: Tensor | None) -> Tensor:
    return gates if bias is None else gates + bias


def lstm_cell(
    by_input: Tensor, by_hidden: Tensor, cx: Tensor, *biases: Tensor | None
) -> tuple[Tensor, Tensor]:
    gates = by_input + by_hidden
    for bias in biases:
        gates = _biased(gates, bias)
    enter, forget, cell, out = gates.chunk(4, 1)
    cy = forget.sigmoid() * cx + enter.sigmoid() * cell.tanh()
    return out.sigmoid() * cy.tanh(), cy


@CELLS.kernel("_thnn_fused_lstm_cell", "`nn.LSTMCell`", APART, note="one step of it")
def fused_lstm_cell(by_input, by_hidden, cx, input_bias=None, hidden_bias=None):
    gates = _biased(_biased(by_input + by_hidden, input_bias), hidden_bias)
    enter, forget, cell, out = gates.chunk(4, 1)
    workspace = torch.cat([enter.sigmoid(), forget.sigmoid(), cell.tanh(), out.sigmoid()], 1)
    return *lstm_cell(by_input, by_hidden, cx, input_bias, hidden_bias), workspace


@CELLS.backward("_thnn_fused_lstm_cell_backward_impl")
def fused_lstm_cell_backward(ghy, gcy, cx, cy, workspace, has_bias):
    """From the gates as they were; the formula of an LSTM cell."""
    enter, forget, cell, out = workspace.chunk(4, 1)
    squashed = cy.tanh()
    gcy = torch.zeros_like(cy) if gcy is None else gcy
    ghy = torch.zeros_like(cy) if ghy is None else ghy
    gcell = gcy + ghy * out * (1 - squashed**2)
    parts = [
        gcell * cell * enter * (1 - enter),
        gcell * cx * forget * (1 - forget),
        gcell * enter * (1 - cell**2),
        ghy * squashed * out * (1 - out),
    ]
    gates = torch.cat(parts, 1)
    return gates, gcell * forget, gates.sum(0) if has_bias else gates.new_empty(0)


def gru_cell(
    by_input: Tensor, by_hidden: Tensor, hx: Tensor, input_bias: Any = None, hidden_bias: Any = None
) -> Any:
    r, z, n = _biased(by_input, input_bias).chunk(3, 1)
    hr, hz, hn = _biased(by_hidden, hidden_bias).chunk(3, 1)
    reset, update = (r + hr).sigmoid(), (z + hz).sigmoid()
    new = (n + reset * hn).tanh()
    return (hx - new) * update + new


@CELLS.kernel("_thnn_fused_gru_cell", "`nn.GRUCell`", APART, note="one step of it")
def fused_gru_cell(by_input, by_hidden, hx, input_bias=None, hidden_bias=None):
    r, z, n = _biased(by_input, input_bias).chunk(3, 1)
    hr, hz, hn = _biased(by_hidden, hidden_bias).chunk(3, 1)
    reset, update = (r + hr).sigmoid(), (z + hz).sigmoid()
    workspace = torch.cat([reset, update, (n + reset * hn).tanh(), hx, hn], 1)
    return gru_cell(by_input, by_hidden, hx, input_bias, hidden_bias), workspace


@CELLS.backward("_thnn_fused_gru_cell_backward")
def fused_gru_cell_backward(ghy, workspace, has_bias):
    reset, update, new, hx, hn = workspace.chunk(5, 1)
    gupdate = ghy * (hx - new) * update * (1 - update)
    gnew = ghy * (1 - update) * (1 - new**2)
    greset = gnew * hn * reset * (1 - reset)
    by_input = torch.cat([greset, gupdate, gnew], 1)
    by_hidden = torch.cat([greset, gupdate, gnew * reset], 1)
    biases = (by_input.sum(0), by_hidden.sum(0)) if has_bias else (None, None)
    return by_input, by_hidden, ghy * update, *biases


# --- attention ------------------------------------------------------------------------------------

NOT_TWICE = "no second derivative"


def attention_kernel(op: str, arises: str = "`scaled_dot_product_attention`") -> Decorator:
    """Register a kernel of attention."""
    refused = "test_products_through_attention_that_drops_go_by_its_backward_pass"
    note = "with dropout, products with the GGN are refused"
    return ATTENTION.kernel(op, arises, RULE, (op, refused), note)


def attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float | None
) -> Tensor:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = q @ k.mT * scale
    scores = scores if bias is None else scores + bias
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores.softmax(-1) @ v


def _logsumexp(
    q: Tensor, k: Tensor, bias: Tensor | None, causal: bool, scale: float | None
) -> Tensor:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = q @ k.mT * scale
    scores = scores if bias is None else scores + bias
    if causal:
        scores = scores.masked_fill(
            torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf
        )
    return scores.logsumexp(-1)


def _attended(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float | None
) -> Any:
    """What the flash and cuDNN forms return."""
    none = torch.empty(0, dtype=torch.int32)
    out, rest = attention(q, k, v, bias, causal, scale), _logsumexp(q, k, bias, causal, scale)
    return out, rest, none, none.clone(), q.shape[-2], k.shape[-2], *_seeds(), q.new_empty(0)


def _attended_back(
    g: Any, q: Any, k: Any, v: Any, bias: Any, causal: bool, scale: float | None
) -> Any:
    run = lambda q, k, v, bias: attention(q, k, v, bias, causal, scale)  # noqa: E731
    return tuple(pulled_back(run, [q, k, v, bias], [g]))


@attention_kernel("_scaled_dot_product_flash_attention")
def flash(q, k, v, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
    return _attended(q, k, v, None, is_causal, scale)


@ATTENTION.backward("_scaled_dot_product_flash_attention_backward", NOT_TWICE)
def flash_backward(
    g, q, k, v, out, rest, cq, ck, mq, mk, p, is_causal, seed, offset, *, scale=None
):
    return _attended_back(g, q, k, v, None, is_causal, scale)[:3]


@attention_kernel("_scaled_dot_product_efficient_attention")
def efficient(q, k, v, bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, *, scale=None):
    rest = (
        _logsumexp(q, k, bias, is_causal, scale)
        if compute_log_sumexp
        else q.new_empty(*q.shape[:2], 0)
    )
    return attention(q, k, v, bias, is_causal, scale), rest, *_seeds()


@ATTENTION.backward("_scaled_dot_product_efficient_attention_backward", NOT_TWICE)
def efficient_backward(
    g, q, k, v, bias, out, rest, seed, offset, p, mask, is_causal=False, *, scale=None
):
    grads = _attended_back(g, q, k, v, bias, is_causal, scale)
    return tuple(g if wanted else None for g, wanted in zip(grads, mask, strict=True))


@attention_kernel("_scaled_dot_product_cudnn_attention")
def cudnn(
    q,
    k,
    v,
    bias,
    compute_log_sumexp,
    dropout_p=0.0,
    is_causal=False,
    return_debug_mask=False,
    *,
    scale=None,
):
    return _attended(q, k, v, bias, is_causal, scale)


@ATTENTION.backward("_scaled_dot_product_cudnn_attention_backward", NOT_TWICE)
def cudnn_backward(
    g, q, k, v, out, rest, seed, offset, bias, cq, ck, mq, mk, p, is_causal, *, scale=None
):
    return _attended_back(g, q, k, v, bias, is_causal, scale)[:3]


@attention_kernel(
    "_scaled_dot_product_fused_attention_overrideable",
    "`scaled_dot_product_attention` of a backend outside of PyTorch",
)
def overrideable(
    q, k, v, bias=None, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None
):
    return _attended(q, k, v, bias, is_causal, scale)


@ATTENTION.unlisted("_scaled_dot_product_fused_attention_overrideable_backward")
def overrideable_backward(
    g, q, k, v, bias, mask, out, rest, cq, ck, mq, mk, p, is_causal, seed, offset, *, scale=None
):
    return _attended_back(g, q, k, v, bias, is_causal, scale)


# --- losses ---------------------------------------------------------------------------------------

CTC_TESTS = ("test_ctc_loss",)
CTC_NOTE = "`_ctc_loss`; it has no second derivative, which is refused by name"


def _ctc(
    log_probs: Tensor, targets: Tensor, inputs: Any, labels: Any, blank: int, zero_infinity: bool
) -> Any:
    """Losses, and the gradient that cuDNN works out beforehand."""
    run = lambda p: aten._ctc_loss(p, targets, inputs, labels, blank, zero_infinity)[0]  # noqa: E731
    loss = run(log_probs)
    return loss, pulled_back(run, [log_probs], [torch.ones_like(loss)])[0]


@LOSSES.kernel("_cudnn_ctc_loss", "`F.ctc_loss`", PLAIN, CTC_TESTS, CTC_NOTE)
def cudnn_ctc(log_probs, targets, inputs, labels, blank, deterministic, zero_infinity):
    return _ctc(log_probs, targets, inputs, labels, blank, zero_infinity)


@LOSSES.unlisted("_cudnn_ctc_loss.Tensor")
def cudnn_ctc_tensor(log_probs, targets, inputs, labels, blank, deterministic, zero_infinity):
    return _ctc(log_probs, targets, inputs.tolist(), labels.tolist(), blank, zero_infinity)


@LOSSES.kernel("miopen_ctc_loss", "the same on ROCm", PLAIN, CTC_TESTS, CTC_NOTE)
def miopen_ctc(log_probs, targets, inputs, labels, blank, deterministic, zero_infinity):
    return _ctc(log_probs, targets, inputs, labels, blank, zero_infinity)


@LOSSES.unlisted("miopen_ctc_loss.Tensor")
def miopen_ctc_tensor(log_probs, targets, inputs, labels, blank, deterministic, zero_infinity):
    return _ctc(log_probs, targets, inputs.tolist(), labels.tolist(), blank, zero_infinity)


@LOSSES.kernel("_use_cudnn_ctc_loss", "`F.ctc_loss`", RULE, CTC_TESTS, "reads lengths and shapes")
def use_cudnn_ctc(log_probs, targets, inputs, labels, blank):
    return True


@LOSSES.unlisted("_use_cudnn_ctc_loss.Tensor")
def use_cudnn_ctc_tensor(log_probs, targets, inputs, labels, blank):
    return True


# --- normalisation --------------------------------------------------------------------------------


def rms_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, eps: float | None
) -> tuple[Tensor, Tensor]:
    dims = list(range(-len(shape), 0))
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    rstd = (x.square().mean(dims, keepdim=True) + eps).rsqrt()
    y = x * rstd
    return (y if weight is None else y * weight), rstd


@NORMALISATION.kernel("_fused_rms_norm", "`nn.RMSNorm`")
def fused_rms_norm(x, shape, weight, eps):
    return rms_norm(x, shape, weight, eps)


@NORMALISATION.backward("_fused_rms_norm_backward")
def fused_rms_norm_backward(g, x, shape, rstd, weight, mask):
    """From ``1/rms`` as it was, as the kernel of a GPU works."""
    dims = list(range(-len(shape), 0))
    xhat = x * rstd
    by_xhat = g if weight is None else g * weight
    by_input = rstd * (by_xhat - xhat * (by_xhat * xhat).mean(dims, keepdim=True))
    lead = list(range(x.ndim - len(shape)))
    by_weight = (g * xhat).sum(lead) if weight is not None and mask[1] else None
    return by_input if mask[0] else None, by_weight


# --- convolutions and grids -----------------------------------------------------------------------


def convolution_kernel(op: str) -> Decorator:
    """Register a kernel of a convolution."""
    arises = "called by name; below `convolution`"
    return CONVOLUTIONS.kernel(op, arises, PLAIN, note="`convolution`")


@convolution_kernel("cudnn_convolution")
def cudnn_convolution(
    x, weight, padding, stride, dilation, groups, benchmark, deterministic, allow_tf32
):
    return aten.convolution(
        x, weight, None, stride, padding, dilation, False, [0] * len(stride), groups
    )


@convolution_kernel("cudnn_convolution_transpose")
def cudnn_convolution_transpose(
    x, weight, padding, out_padding, stride, dilation, groups, *settings
):
    return aten.convolution(x, weight, None, stride, padding, dilation, True, out_padding, groups)


@convolution_kernel("miopen_convolution")
def miopen_convolution(x, weight, bias, padding, stride, dilation, groups, *settings):
    return aten.convolution(
        x, weight, bias, stride, padding, dilation, False, [0] * len(stride), groups
    )


@convolution_kernel("miopen_convolution_transpose")
def miopen_convolution_transpose(
    x, weight, bias, padding, out_padding, stride, dilation, groups, *settings
):
    return aten.convolution(x, weight, bias, stride, padding, dilation, True, out_padding, groups)


@convolution_kernel("miopen_depthwise_convolution")
def miopen_depthwise_convolution(x, weight, bias, padding, stride, dilation, groups, *settings):
    return aten.convolution(
        x, weight, bias, stride, padding, dilation, False, [0] * len(stride), groups
    )


@GRIDS.kernel(
    "cudnn_grid_sampler",
    "`F.grid_sample(.., align_corners=True)`",
    PLAIN,
    note="`grid_sampler_2d`",
)
def cudnn_grid_sampler(x, grid):
    return aten.grid_sampler_2d(x, grid, 0, 0, True)


@GRIDS.backward("cudnn_grid_sampler_backward")
def cudnn_grid_sampler_backward(x, grid, g):
    return aten.grid_sampler_2d_backward(g, x, grid, 0, 0, True, [True, True])


@GRIDS.kernel(
    "cudnn_affine_grid_generator", "called by name", PLAIN, note="`affine_grid_generator`"
)
def cudnn_affine_grid_generator(theta, n, c, h, w):
    return aten.affine_grid_generator(theta, [n, c, h, w], True)


@GRIDS.backward("cudnn_affine_grid_generator_backward")
def cudnn_affine_grid_generator_backward(g, n, c, h, w):
    run = lambda theta: aten.affine_grid_generator(theta, [n, c, h, w], True)  # noqa: E731
    return pulled_back(run, [g.new_zeros(n, 2, 3)], [g])[0]
