"""Every op that only a GPU sees, run on a CPU by a kernel of the CPU, and held against plain ops in
float64.

A case is a model with a switch: with the op of a GPU, or with what a CPU does. Batch norms are not
here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torchgen
import yaml
from torch import Tensor, nn

import unbatch as ub
from cases.device_kernels import BATCH_NORMS, NORMS
from cases.device_kernels_composed import COMPOSED
from cases.device_kernels_other import FAMILIES
from cases.device_nets import Net
from cases.device_ops_table import PAGE, ROWS, page
from cases.device_rows import Case, E, H, N, Row, T, lent
from unbatch.analysis import interpreter
from unbatch.analysis.completeness import as_list
from unbatch.analysis.rules import recurrences
from unbatch.capture import device_ops, ops
from unbatch.capture.device_ops import SAME_AS, Composition
from unbatch.errors import CaptureError, StructureError
from unbatch.verification import verify

F = nn.functional
aten = torch.ops.aten

VERDICTS = (
    "independent_forward",
    "simd_forward",
    "simd_given_statistics",
    "canonical_split",
    "reduction",
    "simd_loss",
)

CASES: dict[str, tuple[Any, dict[str, Any]]] = {}
MIXING: dict[str, Any] = {}


@pytest.fixture(autouse=True)
def _device_ops() -> Iterator[None]:
    with lent(COMPOSED, *FAMILIES):
        yield


def case(name: str, **rnn: Any) -> Callable[[Any], Any]:
    def register(function: Any) -> Any:
        assert name not in CASES, name
        CASES[name] = function, rnn
        return function

    return register


def mixing(name: str, **rnn: Any) -> Callable[[Any], Any]:
    """A case in which samples depend on each other: no verdict may say that they do not."""

    def register(function: Any) -> Any:
        assert name not in MIXING, name
        MIXING[name] = function, rnn
        return function

    return register


def problem(
    function: Any, rnn: Any, device: bool, centred: bool = False, training: bool = True
) -> ub.Problem:
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(N, T, E, generator=generator).double()
    net = Net(function, device, centred, **rnn).double().train(training)
    torch.manual_seed(2)
    with torch.no_grad():
        net(X)  # shapes of the last layer
        generator.manual_seed(3)
        net.out.weight.copy_(torch.randn(net.out.weight.shape, generator=generator) / 3)
        net.out.bias.zero_()
    torch.manual_seed(4)
    return ub.Problem(net, F.cross_entropy, (X, torch.arange(N) % 3))


# --- dropout --------------------------------------------------------------------------------------


@case("native_dropout")
def _(net, x):
    return aten.native_dropout(x, 0.4, True)[0] if net.device else F.dropout(x, 0.4)


@case("native_dropout of a parameter")
def _(net, x):
    gain = aten.native_dropout(net.gain, 0.4, True)[0] if net.device else F.dropout(net.gain, 0.4)
    return x * gain


@case("native_dropout without training")
def _(net, x):
    return aten.native_dropout(x, 0.4, False)[0] if net.device else x.clone()


@case("_fused_dropout")
def _(net, x):
    if net.device:
        return aten._fused_dropout(x, 0.6)[0]
    return x * torch.bernoulli(torch.full_like(x, 0.6)) / 0.6


@mixing("native_dropout of differences to the mean")
def _(net, x):
    return aten.native_dropout(x.cumsum(0), 0.4, True)[0]


# --- recurrences ----------------------------------------------------------------------------------

MODES = {nn.LSTM: 2, nn.GRU: 3}


def zeros(net: Any, batch: int, size: int = H) -> Tensor:
    directions = 2 if net.rnn.bidirectional else 1
    return torch.zeros(net.rnn.num_layers * directions, batch, size, dtype=torch.float64)


def weights_of(rnn: nn.RNNBase) -> tuple[list[Tensor], int]:
    directions = 2 if rnn.bidirectional else 1
    weights = [getattr(rnn, n) for n in rnn._flat_weights_names]
    return weights, len(weights) // (rnn.num_layers * directions)


def cudnn_rnn(
    net: Any,
    x: Tensor,
    weights: Any = None,
    state: Any = None,
    batch_sizes: Any = (),
    train: bool = True,
) -> Any:
    rnn = net.rnn
    own, stride = weights_of(rnn)
    mode = MODES.get(type(rnn), 1 if getattr(rnn, "nonlinearity", "tanh") == "tanh" else 0)
    batch = batch_sizes[0] if batch_sizes else x.shape[0 if rnn.batch_first else 1]
    h = zeros(net, batch, rnn.proj_size or H) if state is None else state
    c = zeros(net, batch) if mode == 2 else None
    how = (
        mode,
        H,
        rnn.proj_size,
        rnn.num_layers,
        rnn.batch_first,
        0.0,
        train,
        rnn.bidirectional,
        list(batch_sizes),
    )
    return aten._cudnn_rnn(x, weights or own, stride, None, h, c, *how, None)


def miopen_rnn(net: Any, x: Tensor) -> Any:
    rnn = net.rnn
    weights, stride = weights_of(rnn)
    mode = MODES[type(rnn)]
    h = zeros(net, x.shape[0 if rnn.batch_first else 1])
    c = h.clone() if mode == 2 else None
    how = (mode, H, rnn.num_layers, rnn.batch_first, 0.0, True, rnn.bidirectional, [])
    return aten.miopen_rnn(x, weights, stride, h, c, *how, None)


def outputs(net: Any, x: Tensor) -> Tensor:
    return cudnn_rnn(net, x)[0] if net.device else net.rnn(x)[0]


case("_cudnn_rnn: LSTM", kind=nn.LSTM, batch_first=True)(outputs)
case("_cudnn_rnn: GRU", kind=nn.GRU, batch_first=True)(outputs)
case("_cudnn_rnn: tanh", kind=nn.RNN, batch_first=True)(outputs)
case("_cudnn_rnn: relu", kind=nn.RNN, batch_first=True, nonlinearity="relu")(outputs)
case(
    "_cudnn_rnn: two layers, both directions",
    kind=nn.GRU,
    batch_first=True,
    num_layers=2,
    bidirectional=True,
)(outputs)
case("_cudnn_rnn: no biases", kind=nn.LSTM, batch_first=True, bias=False)(outputs)
case("_cudnn_rnn: projected", kind=nn.LSTM, batch_first=True, proj_size=2)(outputs)


@case("_cudnn_rnn: time first, last states", kind=nn.LSTM)
def _(net, x):
    x = x.transpose(0, 1)
    last = cudnn_rnn(net, x)[1:3] if net.device else net.rnn(x)[1]
    return torch.cat(list(last), 2)[0]


@case("_cudnn_rnn: packed", kind=nn.GRU, bidirectional=True)
def _(net, x):
    lengths = torch.tensor([4, 4, 3, 2, 2])
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
    if not net.device:
        return nn.utils.rnn.pad_packed_sequence(
            net.rnn(packed)[0], batch_first=True, total_length=T
        )[0]
    y = cudnn_rnn(net, packed.data, batch_sizes=packed.batch_sizes.tolist())[0]
    packed = nn.utils.rnn.PackedSequence(y, packed.batch_sizes)
    return nn.utils.rnn.pad_packed_sequence(packed, batch_first=True, total_length=T)[0]


@case("_cudnn_rnn: a state of each sample", kind=nn.GRU, batch_first=True)
def _(net, x):
    state = x[:, 0].tanh().unsqueeze(0)
    return cudnn_rnn(net, x, state=state)[0] if net.device else net.rnn(x, state)[0]


case("miopen_rnn: LSTM", kind=nn.LSTM, batch_first=True)(
    lambda net, x: miopen_rnn(net, x)[0] if net.device else net.rnn(x)[0]
)
case("miopen_rnn: GRU", kind=nn.GRU, batch_first=True, bidirectional=True)(
    lambda net, x: miopen_rnn(net, x)[0] if net.device else net.rnn(x)[0]
)


@mixing("_cudnn_rnn along the batch", kind=nn.LSTM)
def _(net, x):
    return cudnn_rnn(net, x)[0]


@mixing("_cudnn_rnn with weights made of a sample", kind=nn.GRU, batch_first=True)
def _(net, x):
    first, *others = weights_of(net.rnn)[0]
    return cudnn_rnn(net, x, weights=[first * x[0, 0, 0], *others])[0]


@mixing("_cudnn_rnn from the state of another sample", kind=nn.GRU, batch_first=True)
def _(net, x):
    return cudnn_rnn(net, x, state=x[:, 0].roll(1, 0).unsqueeze(0).contiguous())[0]


@mixing("_cudnn_rnn, packed in the wrong order", kind=nn.GRU)
def _(net, x):
    return cudnn_rnn(net, x.reshape(N * T, E), batch_sizes=[N] * T)[0].reshape(N, T, H)


@case("_thnn_fused_lstm_cell")
def _(net, x):
    h = c = x[:, 1].tanh()
    by_input, by_hidden = x[:, 0] @ net.matrix.T, h @ net.matrix.T
    if net.device:
        return torch.cat(
            aten._thnn_fused_lstm_cell(by_input, by_hidden, c, net.shift, net.shift)[:2], 1
        )
    return torch.cat(
        torch.lstm_cell(x[:, 0], (h, c), net.matrix, net.matrix, net.shift, net.shift), 1
    )


@case("_thnn_fused_gru_cell")
def _(net, x):
    weight, bias, h = net.matrix[:9], net.shift[:9], x[:, 1].tanh()
    if net.device:
        return aten._thnn_fused_gru_cell(x[:, 0] @ weight.T, h @ weight.T, h, bias, bias)[0]
    return torch.gru_cell(x[:, 0], h, weight, weight, bias, bias)


@mixing("_thnn_fused_lstm_cell with a bias made of a sample")
def _(net, x):
    gates = x[:, 0] @ net.matrix.T
    return aten._thnn_fused_lstm_cell(gates, gates, x[:, 1], gates[0], net.shift)[0]


# --- attention ------------------------------------------------------------------------------------


def flash(q, k, v, bias=None, causal=False):
    return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)[0]


def efficient(q, k, v, bias=None, causal=False):
    return aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, 0.0, causal)[0]


def cudnn(q, k, v, bias=None, causal=False):
    return aten._scaled_dot_product_cudnn_attention(q, k, v, bias, True, 0.0, causal)[0]


def overrideable(q, k, v, bias=None, causal=False):
    return aten._scaled_dot_product_fused_attention_overrideable(q, k, v, bias, 0.0, causal)[0]


def math(q, k, v, bias=None, causal=False):
    return aten._scaled_dot_product_attention_math(q, k, v, bias, 0.0, causal)[0]


FORMS = {
    "_scaled_dot_product_flash_attention": flash,
    "_scaled_dot_product_efficient_attention": efficient,
    "_scaled_dot_product_cudnn_attention": cudnn,
    "_scaled_dot_product_fused_attention_overrideable": overrideable,
    "_scaled_dot_product_attention_math": math,
}


def plain_attention(q, k, v, bias=None, causal=False):
    scores = q @ k.mT / q.shape[-1] ** 0.5
    scores = scores if bias is None else scores + bias
    if causal:
        scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf)
    return scores.softmax(-1) @ v


def attention_cases(name: str, form: Any) -> None:
    def heads(net, x):
        q, k, v = (x @ net.matrix[3 * i : 3 * i + 3] for i in range(3))
        return tuple(t.unsqueeze(1) for t in (q, k, v))

    @case(name)
    def _(net, x):
        return (form if net.device else plain_attention)(*heads(net, x))

    @case(f"{name}, causal")
    def _(net, x):
        return (form if net.device else plain_attention)(*heads(net, x), causal=True)

    if form is not flash:

        @case(f"{name} with a bias")
        def _(net, x):
            bias = (
                (net.weight.sum() * torch.arange(T * T))
                .reshape(1, 1, T, T)
                .sin()
                .expand(N, 1, T, T)
            )
            bias = bias.detach() if form is cudnn else bias
            return (form if net.device else plain_attention)(*heads(net, x), bias=bias)

    @mixing(f"{name} over the batch")
    def _(net, x):
        q, k, v = (t.transpose(0, 2) for t in heads(net, x))
        return form(q, k, v).transpose(0, 2)

    @mixing(f"{name} with the keys of one sample")
    def _(net, x):
        q, k, v = heads(net, x)
        return form(q, k[:1].expand(N, -1, -1, -1), v)


for name_, form_ in FORMS.items():
    attention_cases(name_, form_)


# --- normalisation, convolutions, grids -----------------------------------------------------------


@case("_fused_rms_norm")
def _(net, x):
    if net.device:
        return aten._fused_rms_norm(x, [E], net.gain, 1e-5)[0]
    return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * net.gain


@case("_fused_rms_norm as rms_norm")
def _(net, x):
    if net.device:
        return F.rms_norm(x, [T, E], None, 1e-5)
    return x * (x.square().mean((1, 2), keepdim=True) + 1e-5).rsqrt()


@mixing("_fused_rms_norm over the batch")
def _(net, x):
    return aten._fused_rms_norm(x.transpose(0, 2), [N], None, 1e-5)[0].transpose(0, 2)


@case("_weight_norm_interface")
def _(net, x):
    v, g = net.matrix, net.shift[:, None]
    if net.device:
        return x @ aten._weight_norm_interface(v, g)[0].T
    return x @ (v * g / v.norm(dim=1, keepdim=True)).T


@case("_weight_norm_interface by columns")
def _(net, x):
    v, g = net.matrix, net.gain[None]
    if net.device:
        return x @ aten._weight_norm_interface(v, g, 1)[0].T
    return x @ (v * g / v.norm(dim=0, keepdim=True)).T


@mixing("_weight_norm_interface of samples")
def _(net, x):
    return aten._weight_norm_interface(x.flatten(1).T.contiguous(), torch.ones(T * E, 1).double())[
        0
    ].T


def image(x: Tensor) -> Tensor:
    """[n, channel, height, width]."""
    return x.transpose(1, 2).reshape(N, E, 2, 2)


def pair(value: int) -> list[int]:
    return [value, value]


@case("cudnn_convolution")
def _(net, x):
    weight = net.weight.expand(-1, E, -1, -1)
    if net.device:
        return aten.cudnn_convolution(
            image(x), weight, pair(1), pair(1), pair(1), 1, False, False, False
        )
    return F.conv2d(image(x), weight, padding=1)


@case("cudnn_convolution_transpose")
def _(net, x):
    how = (pair(1), pair(0), pair(2), pair(1), E)
    if net.device:
        return aten.cudnn_convolution_transpose(image(x), net.weight, *how, False, False, False)
    return F.conv_transpose2d(image(x), net.weight, padding=1, stride=2, groups=E)


def _biased_convolution(name: str, groups: int) -> None:
    @case(name)
    def _(net, x):
        weight = net.weight if groups == E else net.weight.expand(-1, E, -1, -1)
        if net.device:
            how = (pair(1), pair(1), pair(1), groups, False, False)
            return getattr(aten, name)(image(x), weight, net.gain, *how)
        return F.conv2d(image(x), weight, net.gain, padding=1, groups=groups)


_biased_convolution("miopen_convolution", 1)
_biased_convolution("miopen_depthwise_convolution", E)


@case("miopen_convolution_transpose")
def _(net, x):
    how = (pair(1), pair(0), pair(2), pair(1), E)
    if net.device:
        return aten.miopen_convolution_transpose(image(x), net.weight, net.gain, *how, False, False)
    return F.conv_transpose2d(image(x), net.weight, net.gain, padding=1, stride=2, groups=E)


@mixing("cudnn_convolution along the batch")
def _(net, x):
    along = x.permute(1, 2, 0).unsqueeze(-1)  # the batch as height
    weight = net.weight.expand(-1, E, -1, -1)[..., 1:2]
    y = aten.cudnn_convolution(along, weight, [1, 0], pair(1), pair(1), 1, False, False, False)
    return y.squeeze(-1).permute(2, 0, 1)


@case("cudnn_grid_sampler")
def _(net, x):
    grid = (x @ net.matrix[:2].T).tanh().reshape(N, 2, 2, 2) * 0.9
    if net.device:
        return aten.cudnn_grid_sampler(image(x), grid)
    return F.grid_sample(image(x), grid, align_corners=True)


@mixing("cudnn_grid_sampler with the grid of another sample")
def _(net, x):
    grid = (x @ net.matrix[:2].T).tanh().reshape(N, 2, 2, 2)
    return aten.cudnn_grid_sampler(image(x), grid.roll(1, 0))


@case("cudnn_affine_grid_generator")
def _(net, x):
    theta = x[:, :2]
    if net.device:
        return aten.cudnn_affine_grid_generator(theta.contiguous(), N, 1, 2, 3)
    return F.affine_grid(theta, [N, 1, 2, 3], align_corners=True)


# --- ops that are recorded as plain ones: their cases stand at their kernels ----------------------


def switched(one: Case) -> Any:
    """A case with the op, or with its kernel as plain PyTorch."""
    op, kernel = getattr(aten, one.op), COMPOSED.kernels[one.op]
    return lambda net, x: one.call(net, x, op if net.device else kernel)


for name_, one_ in COMPOSED.cases.items():
    case(name_)(switched(one_))

for name_, one_ in COMPOSED.mixing_cases.items():
    mixing(name_)(switched(one_))


# --- every case against plain ops -----------------------------------------------------------------

QUESTIONS: dict[str, Callable[[ub.Problem], Tensor]] = {
    "component": lambda p: p.gradients().flat(),
    "copy": lambda p: p.gradients(by="copy").flat(),
    "frozen": lambda p: p.gradients(by="frozen").flat(),
    "norms": lambda p: p.compute(ub.SquaredNorms()).total,
    "product": lambda p: p.ggn() @ torch.linspace(-1, 1, p.ggn().shape[1], dtype=torch.float64),
    "diagonal": lambda p: p.ggn().diag(),
    "diagonal by component": lambda p: p.ggn().diag(per_component=True),
    "eigenvalues": lambda p: p.ggn().eigvalsh(),
    "plan": lambda p: torch.tensor(p.plan(ub.DiagGGN()).pullbacks),
}


BOTH = pytest.mark.parametrize("centred", [False, True], ids=["apart", "centred"])


@cache
def recorded(name: str, centred: bool) -> tuple[ub.Problem, ub.Problem]:
    """The problem with the op of a GPU, and with plain ops; asked many questions, recorded once."""
    function, rnn = CASES[name]
    return problem(function, rnn, True, centred), problem(function, rnn, False, centred)


@BOTH
@pytest.mark.parametrize("name", CASES)
def test_structure(name: str, centred: bool) -> None:
    ours, plain = (p.structure for p in recorded(name, centred))
    for verdict in VERDICTS:
        assert getattr(ours, verdict).status == getattr(plain, verdict).status, verdict
        assert getattr(ours, verdict).basis == getattr(plain, verdict).basis, verdict


@pytest.mark.parametrize("question", QUESTIONS)
@BOTH
@pytest.mark.parametrize("name", CASES)
def test_answers(name: str, centred: bool, question: str) -> None:
    ours, plain = (QUESTIONS[question](p) for p in recorded(name, centred))
    torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("name", MIXING)
def test_samples_that_depend_on_each_other(name: str) -> None:
    function, rnn = MIXING[name]
    assert problem(function, rnn, True).structure.independent_forward.status != "holds"


# --- what a GPU does besides ----------------------------------------------------------------------


class Ctc(nn.Module):
    """CTC as ``F.ctc_loss`` runs it on a GPU. ``form``: "native", "cudnn" or "miopen"."""

    def __init__(self, form: str, tensors: bool) -> None:
        super().__init__()
        self.form, self.tensors = form, tensors

    def forward(self, scores: Tensor, labels: Tensor) -> Tensor:
        p, flat = scores.log_softmax(-1).transpose(0, 1), labels.reshape(-1).int()
        lengths: Any = ([T] * N, [2] * N)
        if self.tensors:
            lengths = tuple(torch.tensor(k) for k in lengths)
        if self.form == "native":
            return aten._ctc_loss(p, flat, *lengths, 0, False)[0].mean()
        if self.form == "cudnn":
            assert aten._use_cudnn_ctc_loss(p, flat, *lengths, 0)
            return aten._cudnn_ctc_loss(p, flat, *lengths, 0, False, False)[0].mean()
        return aten.miopen_ctc_loss(p, flat, *lengths, 0, False, False)[0].mean()


def ctc_problem(form: str, tensors: bool) -> ub.Problem:
    torch.manual_seed(0)
    net = nn.Linear(E, 4).double()
    return ub.Problem(
        net, Ctc(form, tensors), (torch.randn(N, T, E).double(), torch.randint(1, 4, (N, 2)))
    )


@pytest.mark.parametrize("tensors", [False, True], ids=["lists", "tensors"])
@pytest.mark.parametrize("form", ["cudnn", "miopen"])
def test_ctc_loss(form: str, tensors: bool) -> None:
    ours, plain = ctc_problem(form, tensors), ctc_problem("native", tensors)
    for verdict in VERDICTS:
        assert (
            getattr(ours.structure, verdict).status == getattr(plain.structure, verdict).status
        ), verdict
    for question in ("component", "copy", "norms"):
        torch.testing.assert_close(QUESTIONS[question](ours), QUESTIONS[question](plain))


@pytest.mark.parametrize("form", ["native", "cudnn", "miopen"])
def test_ctc_loss_has_no_second_derivative(form: str) -> None:
    """The library's is zero, and no error."""
    with pytest.raises(StructureError, match="no second derivative"):
        ctc_problem(form, False).ggn().diag()


def frozen(layer: nn.Module, mixes: bool) -> ub.Problem:
    """A layer that is not trained takes the fast path of transformers; a head is trained on it."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = layer.requires_grad_(False), nn.Linear(T * 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = x.transpose(0, 1).contiguous() if mixes else x
            h = (
                self.layer(x)
                if isinstance(self.layer, nn.TransformerEncoderLayer)
                else self.layer(x, x, x)[0]
            )
            return self.head((h.transpose(0, 1) if mixes else h).flatten(1))

    X = torch.randn(N, T, 4).double()
    return ub.Problem(Model().double().eval(), F.cross_entropy, (X, torch.arange(N) % 3))


FAST = {
    "_transformer_encoder_layer_fwd": lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True),
    "_native_multi_head_attention": lambda: nn.MultiheadAttention(4, 2, batch_first=True),
}


@pytest.mark.parametrize("name", FAST)
def test_the_fast_path_of_transformers(name: str) -> None:
    apart, mixed = frozen(FAST[name](), False), frozen(FAST[name](), True)
    assert apart.structure.simd_forward.basis == "proved"
    assert mixed.structure.independent_forward.status == "fails"
    rows = apart.gradients().flat()
    assert rows.shape == (N, 3 * T * 4 + 3)


class Recurrent(nn.Module):
    """An LSTM as ``nn.LSTM`` runs it on a GPU, with a window on the memory in which all of its
    weights lie.
    """

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.rnn, self.out, self.dropout = (
            nn.LSTM(E, H, 2, batch_first=True).double(),
            nn.Linear(H, 3).double(),
            dropout,
        )
        memory = torch.cat([p.detach().flatten() for p in self.rnn.parameters()])
        parts = memory.split([p.numel() for p in self.rnn.parameters()])
        for p, part in zip(self.rnn.parameters(), parts, strict=True):
            p.data = part.view(p.shape)

    def forward(self, x: Tensor) -> Tensor:
        weights, stride = weights_of(self.rnn)
        size = [sum(w.numel() for w in weights)]
        window = torch.empty(0, dtype=torch.float64).set_(
            weights[0].untyped_storage(), 0, size, [1]
        )
        h = torch.zeros(2, len(x), H, dtype=torch.float64)
        how = (2, H, 0, 2, True, self.dropout, True, False, [])
        return self.out(aten._cudnn_rnn(x, weights, stride, window, h, h, *how, None)[0][:, -1])


def recurrent(dropout: float) -> tuple[Recurrent, ub.Problem]:
    torch.manual_seed(0)
    model = Recurrent(dropout)
    X = torch.randn(N, T, E).double()
    return model, ub.Problem(model, F.cross_entropy, (X, torch.arange(N) % 3))


def test_a_window_on_all_weights() -> None:
    model, asked = recurrent(0.0)
    assert asked.structure.simd_forward.basis == "proved"
    X = torch.randn(N, T, E).double()
    asked = ub.Problem(model, F.cross_entropy, (X, torch.arange(N) % 3))
    loss = F.cross_entropy(model(X), torch.arange(N) % 3)
    gradient = torch.autograd.grad(loss, list(model.parameters()))
    torch.testing.assert_close(
        asked.gradients().flat().sum(0), torch.cat([g.flatten() for g in gradient])
    )
    G = asked.ggn()
    columns = torch.stack([G @ e for e in torch.eye(G.shape[1], dtype=torch.float64)[:5]])
    torch.testing.assert_close(columns.diagonal(), G.diag()[:5])


def test_dropout_inside_a_recurrence_is_refused_by_name() -> None:
    _, asked = recurrent(0.5)
    for ask in (
        lambda: asked.gradients(),
        lambda: asked.ggn().diag(),
        lambda: asked.ggn().eigvalsh(),
    ):
        with pytest.raises(StructureError, match=r"_cudnn_rnn.*dropout=0\.5.*nn\.Dropout"):
            ask()
    assert asked.structure.independent_forward.status == "holds"


def evaluated(trained: bool) -> ub.Problem:
    net = (
        Net(lambda net, x: cudnn_rnn(net, x, train=False)[0], True, kind=nn.GRU, batch_first=True)
        .double()
        .eval()
    )
    X = torch.randn(N, T, E).double()
    with torch.no_grad():
        net(X)
    net.rnn.requires_grad_(trained)
    net.inner.requires_grad_(trained)
    return ub.Problem(net, F.cross_entropy, (X, torch.arange(N) % 3))


def test_a_recurrence_in_eval_mode_is_refused_by_name() -> None:
    asked = evaluated(True)
    for ask in (lambda: asked.gradients(), lambda: asked.ggn().diag()):
        with pytest.raises(StructureError, match=r"_cudnn_rnn.*no backward pass.*train mode"):
            ask()
    assert asked.structure.simd_forward.basis == "proved"


def test_a_recurrence_in_eval_mode_that_is_not_trained() -> None:
    assert evaluated(False).gradients().flat().shape[0] == N


@pytest.mark.parametrize("form", list(FORMS.values())[:4], ids=list(FORMS)[:4])
def test_products_through_attention_that_drops_go_by_its_backward_pass(form: Any) -> None:
    """It does not say what it drops; its backward pass knows."""

    def run(net: Any, x: Tensor) -> Tensor:
        q = x.unsqueeze(1)
        if form is flash:
            return aten._scaled_dot_product_flash_attention(q, q, q, 0.5)[0]
        if form is overrideable:
            return aten._scaled_dot_product_fused_attention_overrideable(q, q, q, None, 0.5)[0]
        name = "efficient" if form is efficient else "cudnn"
        return getattr(aten, f"_scaled_dot_product_{name}_attention")(q, q, q, None, True, 0.5)[0]

    G = problem(run, {}, True).ggn()
    assert G.linearised.way == "columns"
    torch.testing.assert_close(G.to_dense().diagonal(), G.diag())


def test_weights_of_onednn_that_are_made_of_a_sample() -> None:
    """The layer of a CPU in float32."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.out = nn.LSTM(E, H, batch_first=True), nn.Linear(H, 3)

        def forward(self, x: Tensor) -> Tensor:
            first, *others = self.rnn._flat_weights
            h = torch.zeros(1, len(x), H)
            weights = [first * x[0, 0, 0], *others]
            y = torch._VF.lstm(x, (h, h), weights, True, 1, 0.0, self.training, False, True)[0]
            return self.out(y[:, -1])

    asked = ub.Problem(Model(), F.cross_entropy, (torch.randn(N, T, E), torch.arange(N) % 3))
    assert asked.structure.independent_forward.status != "holds"


# --- what is recorded as plain ops ----------------------------------------------------------------


def flash_attention(**changes: Any) -> ub.Problem:
    """A model with one head of attention; ``changes``: of the arguments of the op."""
    how = {"dropout_p": 0.0, "is_causal": False, "return_debug_mask": False, **changes}

    def run(net: Any, x: Tensor) -> Tensor:
        q = x.unsqueeze(2)
        return aten._flash_attention_forward(q, q, q, None, None, T, T, **how)[0]

    return problem(run, {}, True)


@pytest.mark.parametrize("changes", [{"window_size_left": 1}, {"dropout_p": 0.5}], ids=str)
def test_a_call_that_is_no_such_function_is_unknown(changes: dict[str, Any]) -> None:
    assert flash_attention().structure.independent_forward.basis == "proved"
    found = flash_attention(**changes).structure
    assert "_flash_attention_forward" in str(found.unknown_ops)
    assert found.independent_forward.basis != "proved"


def test_notes_of_a_library_that_a_model_reads_are_unknown() -> None:
    def run(net: Any, x: Tensor) -> Tensor:
        q = x.unsqueeze(2)
        out, normalisation, *_ = aten._flash_attention_forward(
            q, q, q, None, None, T, T, 0.0, False, False
        )
        return out.squeeze(2) * normalisation.sum()

    assert problem(run, {}, True).structure.independent_forward.status != "holds"


def test_a_composition_that_is_another_function_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the comparison of a recording with its model, before anything is derived from it."""
    row = SAME_AS["_flash_attention_forward"]
    forgets = replace(row, ignored=row.ignored | {"is_causal"}, taken=row.taken - {"is_causal"})
    function = partial(row.function, is_causal=False)
    monkeypatch.setitem(SAME_AS, "_flash_attention_forward", replace(forgets, function=function))
    true = CASES["_flash_attention_forward causal"][0]
    asked, plain = problem(true, {}, True), problem(true, {}, False)
    assert "off by" in asked.plan(ub.DiagGGN()).reason
    torch.testing.assert_close(asked.gradients().flat(), plain.gradients().flat())


def test_a_composition_of_another_shape_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    row = SAME_AS["_flash_attention_forward"]
    flat = replace(row, function=lambda **how: row.function(**how).flatten(1))
    monkeypatch.setitem(SAME_AS, "_flash_attention_forward", flat)
    with pytest.raises(CaptureError, match=r"\[5, 12\].*\[5, 4, 1, 3\].*device_ops"):
        _ = flash_attention().structure


def test_results_of_a_composition_have_their_own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written to them afterwards is written to no operand. The grid of one point is where
    the origin goes, which is a window on ``theta``.
    """
    row = SAME_AS["cudnn_affine_grid_generator"]
    window = replace(
        row,
        function=lambda theta: theta[:, None, None, :, 2],
        taken=frozenset({"theta"}),
        ignored=frozenset("NCHW"),
    )
    monkeypatch.setitem(SAME_AS, "cudnn_affine_grid_generator", window)

    def run(net: Any, x: Tensor) -> Tensor:
        # In memory the origins of all samples lie together, as a grid does.
        theta = (x[:, :2] * net.gain).permute(2, 0, 1).contiguous().permute(1, 2, 0)
        grid = theta[:, None, None, :, 2].clone()
        if net.device:
            grid = aten.cudnn_affine_grid_generator(theta, N, 1, 1, 1)
        grid.mul_(2)
        return torch.cat([grid.flatten(1), theta.tanh().flatten(1)], 1)

    ours, plain = problem(run, {}, True), problem(run, {}, False)
    assert ours.plan(ub.DiagGGN()).reason == plain.plan(ub.DiagGGN()).reason
    for question in ("component", "product", "diagonal"):
        torch.testing.assert_close(QUESTIONS[question](ours), QUESTIONS[question](plain))


def unknown_words(name: str, row: Composition) -> set[str]:
    """What a row of ``SAME_AS`` says of arguments that none of its ops has."""
    known: set[str] = set()
    for other, shared in SAME_AS.items():
        if other == name or shared is row:
            packet = getattr(aten, other)
            for overload in packet.overloads():
                known |= set(ops.argument_names(getattr(packet, overload)))
    return (row.taken | row.ignored) - known


@pytest.mark.parametrize("name", SAME_AS)
def test_a_composition_names_arguments_of_its_ops(name: str) -> None:
    assert unknown_words(name, SAME_AS[name]) == set()


def test_a_composition_that_names_another_argument_is_seen() -> None:
    row = replace(SAME_AS["_flash_attention_forward"], ignored=frozenset({"max_seqlen_q"}))
    assert unknown_words("_flash_attention_forward", row) == {"max_seqlen_q"}


def test_a_second_composition_of_an_op_is_refused() -> None:
    with pytest.raises(ValueError, match="_cudnn_ctc_loss"):
        device_ops.same_as("_cudnn_ctc_loss")(lambda log_probs: log_probs)


# --- the table ------------------------------------------------------------------------------------


def device_only() -> set[str]:
    """The ops that have a kernel for GPUs, and neither one for CPUs nor a composition."""
    listed = (
        Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
    )
    ops = set()
    for entry in yaml.safe_load(listed.read_text(encoding="utf-8")):
        name, _, overload = entry["func"].split("(")[0].partition(".")
        keys = ", ".join(entry.get("dispatch") or {})
        elsewhere = "Composite" in keys or re.search(r"\bCPU\b", keys)
        if re.search(r"\bCUDA\b", keys) and not elsewhere and not overload.endswith("out"):
            ops.add(name)
    return ops


def unlisted(rows: Iterable[Row]) -> list[str]:
    return sorted(device_only() - {row.op for row in rows})


def test_the_table_has_every_op_that_only_a_gpu_has() -> None:
    assert unlisted(ROWS) == []


def test_no_op_has_two_rows() -> None:
    """An op that has a kernel now is unknown no more: its other row goes."""
    listed = [row.op for row in ROWS]
    twice = {op for op in listed if listed.count(op) > 1}
    assert not twice, f"{twice}: take the row at the end of device_kernels_composed.py out"


def test_an_op_that_the_table_leaves_out_is_seen() -> None:
    assert unlisted(row for row in ROWS if row.op != "_cudnn_rnn") == ["_cudnn_rnn"]


def test_a_rule_that_forgets_the_weights_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The case of weights that are made of a sample is there for such a rule."""
    function, rnn = MIXING["_cudnn_rnn with weights made of a sample"]
    monkeypatch.setattr(recurrences, "whole", lambda call, weights: [])
    assert problem(function, rnn, True).structure.independent_forward.basis != "proved"
    # What is forgotten is noticed for any rule; without that, by this case.
    monkeypatch.setattr(
        interpreter, "completed", lambda call, rule, _: (as_list(rule(call)), frozenset())
    )
    monkeypatch.setattr(verify, "tried", lambda structure, *_: structure)
    assert problem(function, rnn, True).structure.independent_forward.basis == "proved"


def test_tangents_that_draw_dropout_anew_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused op has a forward mode, which draws another mask: another way is taken then."""
    function, rnn = CASES["native_dropout"]
    plain = QUESTIONS["product"](problem(function, rnn, False))
    monkeypatch.setattr(ops, "is_dropout", lambda op: False)
    torch.testing.assert_close(QUESTIONS["product"](problem(function, rnn, True)), plain)


def test_the_page_is_made_of_the_table() -> None:
    assert PAGE.read_text(encoding="utf-8") == page()


@pytest.mark.parametrize(
    "row", [r for r in ROWS if r.tests and r.tests != NORMS], ids=lambda row: row.op
)
def test_the_table_names_tests_that_exist(row: Row) -> None:
    names = [*CASES, *(name for name in globals() if name.startswith("test_"))]
    for prefix in row.tests:
        assert any(name.startswith(prefix) for name in names), prefix


def test_every_kernel_and_every_translation_is_in_the_table() -> None:
    listed = {row.op for row in ROWS}
    known_backward = {"_scaled_dot_product_fused_attention_overrideable_backward"}
    named = set(SAME_AS)
    for family in (COMPOSED, *FAMILIES, BATCH_NORMS):
        named |= {name.split(".")[0] for name in family.kernels}
    assert named - listed - known_backward == set()
