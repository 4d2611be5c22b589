"""Ops of a GPU that are recorded as plain ops (``same_as`` in ``capture/device_ops.py``), run on a
CPU: a kernel of the CPU for each, its row of the page, and its cases. At the end, the rows of the
ops of which nothing is known.

What an op computes is written here once more, in plain PyTorch, and each case holds what the
package makes of the op against that. What a case may use is said at ``Family.case``:

    net.matrix [4E, E]   net.shift [4E]   net.gain [E]   net.weight [E, 1, 3, 3]   x [N, T, E]
"""

from __future__ import annotations

import torch

from cases.device_rows import BACKWARD, UNKNOWN, Family, N, Row, T

COMPOSED = Family()


# --- attention ------------------------------------------------------------------------------------


@COMPOSED.definition(
    "_flash_attention_forward",
    "called by name, `varlen_attn`, nested tensors",
    "products and a softmax; *unknown* with dropout, windows or packed sequences",
    backward="_flash_attention_backward",
)
def flash(query, key, value, is_causal, scale):
    """Of [n, t, head, d]."""
    scores = torch.einsum("nthd,nshd->nhts", query, key)
    scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    return torch.einsum("nhts,nshd->nthd", scores.softmax(-1), value)


def heads(net, x):
    return [(x @ net.matrix[3 * i : 3 * i + 3]).unsqueeze(2) for i in range(3)]


@COMPOSED.case("_flash_attention_forward")
def _(net, x, op):
    return op(*heads(net, x), None, None, T, T, 0.0, False, False)[0]


@COMPOSED.case("_flash_attention_forward", "causal")
def _(net, x, op):
    return op(*heads(net, x), None, None, T, T, 0.0, True, False, scale=0.3)[0]


@COMPOSED.mixing("_flash_attention_forward", "over the batch")
def _(net, x, op):
    across = [t.transpose(0, 1).contiguous() for t in heads(net, x)]
    return op(*across, None, None, N, N, 0.0, False, False)[0].transpose(0, 1)


@COMPOSED.definition(
    "_efficient_attention_forward",
    "called by name, nested tensors",
    "products and a softmax; *unknown* with dropout, windows or packed sequences",
    backward="_efficient_attention_backward",
)
def efficient(query, key, value, bias, custom_mask_type, scale):
    """Of [n, t, head, d]; the bias of [n, head, t, s]."""
    scores = torch.einsum("nthd,nshd->nhts", query, key)
    scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias
    if custom_mask_type == 1:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    return torch.einsum("nhts,nshd->nthd", scores.softmax(-1), value)


@COMPOSED.case("_efficient_attention_forward", "causal")
def _(net, x, op):
    return op(*heads(net, x), None, None, None, None, None, 0.0, 1)[0]


@COMPOSED.case("_efficient_attention_forward", "with a bias")
def _(net, x, op):
    bias = net.matrix.sum() * x[:, None, :, :1] * x[:, None, :, 1:2].mT
    return op(*heads(net, x), bias, None, None, None, None, 0.0, 0, scale=0.3)[0]


@COMPOSED.mixing("_efficient_attention_forward", "with the keys of one sample")
def _(net, x, op):
    q, k, v = heads(net, x)
    return op(q, k[:1].expand(N, -1, -1, -1), v, None, None, None, None, None, 0.0, 0)[0]


# --- ops of which nothing is known: a row goes when its op gets a kernel above --------------------

UNKNOWN_ROWS = (
    Row("_flash_attention_forward_no_dropout_inplace", "called by name", UNKNOWN),
    Row("_cudnn_attention_forward", "called by name, nested tensors", UNKNOWN),
    Row("_cudnn_attention_forward_no_dropout_inplace", "called by name, from 2.15 on", UNKNOWN),
    Row("_triton_multi_head_attention", "called by name", UNKNOWN),
    Row("_triton_scaled_dot_attention", "called by name", UNKNOWN),
    Row(
        "_cudnn_init_dropout_state",
        "`nn.LSTM(.., dropout=p)`",
        UNKNOWN,
        (),
        "it depends on no batch",
    ),
    Row("_philox_key_fold_in", "`torch.func` random keys", UNKNOWN),
    Row("_philox_key_split", "`torch.func` random keys", UNKNOWN),
    Row("_philox_normal_", "`torch.func` random keys", UNKNOWN),
    Row("_philox_uniform_", "`torch.func` random keys", UNKNOWN),
    Row("_scaled_grouped_mm", "products in eight bits", UNKNOWN),
    Row("_scaled_grouped_mm_v2", "products in eight bits", UNKNOWN),
    Row("_cslt_compress", "semi-structured sparsity", UNKNOWN),
    Row("_cslt_sparse_mm", "semi-structured sparsity", UNKNOWN),
    Row("_cslt_sparse_mm_search", "semi-structured sparsity", UNKNOWN),
    Row("_sparse_semi_structured_addmm", "semi-structured sparsity", UNKNOWN),
    Row("_sparse_semi_structured_apply", "semi-structured sparsity", UNKNOWN),
    Row("_sparse_semi_structured_apply_dense", "semi-structured sparsity", UNKNOWN),
    Row("_sparse_semi_structured_linear", "semi-structured sparsity", UNKNOWN),
    Row("_sparse_semi_structured_mm", "semi-structured sparsity", UNKNOWN),
    Row("_sparse_semi_structured_tile", "semi-structured sparsity", UNKNOWN),
    Row("_to_sparse_semi_structured", "semi-structured sparsity", UNKNOWN),
    Row("record_stream", "copies between streams", UNKNOWN, (), "it returns nothing"),
)

# What runs in backward passes without a kernel of ours.
BACKWARD_ONLY = (
    Row("_cudnn_attention_backward", "", BACKWARD),
    Row("batch_norm_backward_elemt", "", BACKWARD),
    Row("batch_norm_backward_reduce", "", BACKWARD),
)
