"""Calls written by hand, of ops whose arguments neither PyTorch's table nor a schema gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cases.ops.aten import DRAWS, tensor
from cases.ops.roles import Call

aten = torch.ops.aten
Made = tuple[tuple[int, ...], str]  # shape and kind of a tensor


@dataclass(frozen=True)
class Own:
    """A call of an op: the function, and the tensors that it takes."""

    name: str
    function: Callable[..., Any]
    made: tuple[Made, ...]

    @property
    def call(self) -> Call:
        draws = []
        for draw in range(DRAWS):
            draws.append([tensor(s, k, 10 * draw + i) for i, (s, k) in enumerate(self.made)])
        names = [f"arg{i}" for i in range(len(self.made))]
        return Call(self.function, draws, names)


def floats(*shapes: tuple[int, ...]) -> tuple[Made, ...]:
    return tuple((shape, "float") for shape in shapes)


NORM = floats((4, 3, 4), (3,), (3,), (3,), (3,))
IMAGE = floats((4, 3, 4, 4), (3, 3, 2, 2), (3,))
ROWS = floats((4, 3, 4))


def packed(x: Tensor) -> Any:
    return aten._pack_padded_sequence(x, torch.tensor([4, 2, 1]), False)[0]


def ctc(log_probs: Tensor, targets: Tensor) -> Any:
    return aten._ctc_loss(log_probs.log(), targets + 1, [5, 5, 4], [2, 2, 1])[0]


def attention(x: Tensor, w: Tensor, b: Tensor, v: Tensor, c: Tensor) -> Any:
    return aten._native_multi_head_attention(x, x, x, 4, 2, w, b, v, c)[0]


def encoder(x: Tensor, w: Tensor, b: Tensor, v: Tensor, c: Tensor) -> Any:
    square, vector = v, c
    norms = (False, False, 1e-5, vector, vector, vector, vector)
    return aten._transformer_encoder_layer_fwd(
        x, 4, 2, w, b, v, c, *norms, square, vector, square, vector
    )


HEADS = floats((3, 5, 4), (12, 4), (12,), (4, 4), (4,))
LENGTHS = (((), "float"), ((), "float"))

OWN = (
    Own(
        "_batch_norm_impl_index",
        lambda *t: aten._batch_norm_impl_index(*t, True, 0.1, 1e-5, False)[0],
        NORM,
    ),
    Own("_batch_norm_no_update", lambda *t: aten._batch_norm_no_update(*t, 0.1, 1e-5)[0], NORM),
    Own(
        "_batch_norm_with_update_functional",
        lambda *t: aten._batch_norm_with_update_functional(*t, 0.1, 1e-5),
        NORM,
    ),
    Own(
        "_native_batch_norm_legit_functional",
        lambda *t: aten._native_batch_norm_legit_functional(*t, True, 0.1, 1e-5),
        NORM,
    ),
    Own(
        "_native_batch_norm_legit_no_training",
        lambda *t: aten._native_batch_norm_legit_no_training(*t, 0.1, 1e-5)[0],
        NORM,
    ),
    Own(
        "_convolution",
        lambda *t: aten._convolution(
            *t, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, False, False, False, False
        ),
        IMAGE,
    ),
    Own(
        "mkldnn_convolution",
        lambda *t: aten.mkldnn_convolution(*(x.float() for x in t), [1, 1], [1, 1], [1, 1], 1),
        IMAGE,
    ),
    Own(
        "_fused_rms_norm",
        lambda x, w: aten._fused_rms_norm(x, [4], w, 1e-5)[0],
        floats((3, 4), (4,)),
    ),
    Own("_ctc_loss", ctc, (((5, 3, 4), "float"), ((3, 2), "int"))),
    Own("_pack_padded_sequence", packed, floats((4, 3, 2))),
    Own("_native_multi_head_attention", attention, HEADS),
    Own("_transformer_encoder_layer_fwd", encoder, HEADS),
    Own(
        "affine_grid_generator",
        lambda x: aten.affine_grid_generator(x, [4, 1, 3, 3], False),
        floats((4, 2, 3)),
    ),
    Own("glu_jvp", lambda x, dx: aten.glu_jvp(aten.glu(x, 1), x, dx, 1), floats((3, 4), (3, 4))),
    Own("view_as_complex_copy", lambda x: aten.view_as_complex_copy(x), floats((4, 3, 2))),
    Own("_reshape_copy", lambda x: aten._reshape_copy(x, [2, 6]), floats((4, 3))),
    Own("native_dropout", lambda x: aten.native_dropout(x, 0.5, True)[0], floats((4, 3))),
    Own("linspace", lambda a, b: torch.linspace(a, b, 4), LENGTHS),
    Own("logspace", lambda a, b: torch.logspace(a, b, 4), LENGTHS),
    Own("full", lambda a: torch.full((4,), a), LENGTHS[:1]),
    Own(
        "quantize_per_tensor",
        lambda x: aten.quantize_per_tensor(x.float(), 0.1, 0, torch.quint8).dequantize(),
        floats((4, 3)),
    ),
    Own(
        "lstm",
        lambda x, *w: aten.lstm.input(
            x, [x.new_zeros(1, 3, 2), x.new_zeros(1, 3, 2)], w, True, 1, 0.0, False, False, False
        )[0],
        floats((4, 3, 5), (8, 5), (8, 2), (8,), (8,)),
    ),
    Own(
        "gru",
        lambda x, *w: aten.gru.input(x, x.new_zeros(1, 3, 2), w, True, 1, 0.0, False, False, False)[
            0
        ],
        floats((4, 3, 5), (6, 5), (6, 2), (6,), (6,)),
    ),
    Own(
        "mkldnn_rnn_layer",
        lambda x, *w: aten.lstm.input(
            x.float(),
            [torch.zeros(1, 3, 2), torch.zeros(1, 3, 2)],
            [v.float() for v in w],
            True,
            1,
            0.0,
            False,
            False,
            False,
        )[0],
        floats((4, 3, 5), (8, 5), (8, 2), (8,), (8,)),
    ),
)
