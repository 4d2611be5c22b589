"""What becomes of each op that PyTorch has for GPUs only: the one table behind
``docs/reference/device_ops.md``.

`PYTHONPATH=tests python -m cases.device_ops_table` writes the page. The row of an op that has a
kernel stands at its kernel; here are those of the others. A test holds the page to the table, and
the table to PyTorch's list of native functions.
"""

from __future__ import annotations

from pathlib import Path

from cases.device_kernels import BATCH_NORMS, NORMS
from cases.device_kernels_other import (
    ATTENTION,
    CELLS,
    CONVOLUTIONS,
    DROPOUT,
    FAMILIES,
    GRIDS,
    LOSSES,
    NORMALISATION,
    RECURRENCES,
)
from cases.device_rows import (
    APART,
    BACKWARD,
    BELOW,
    NOT_FORWARD,
    PLAIN,
    REFUSED,
    RULE,
    UNKNOWN,
    Row,
)

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "device_ops.md"

DECISIONS = {
    RULE: "it has a rule of its own, and everything that can be asked is answered",
    PLAIN: "it is the op that is named, under the name of a library, and is recorded as that op",
    APART: "it is recorded as several ops",
    REFUSED: "the question is refused, and the message names the op and the remedy",
    UNKNOWN: "no rule: what depends on the batch and goes through it makes the verdicts *unknown*, which is said with "
    "the line of the model",
    BELOW: "it runs inside the op that is named, which is the one that is seen",
    BACKWARD: "it belongs to a backward pass, which is PyTorch's own",
    NOT_FORWARD: "it is met in no forward pass of a model that is trained",
}

TYPED = "the overload that is given a type; structure only"

# Of forward passes, and of what runs in no pass of a model.
FORWARD = (
    Row(
        "native_dropout",
        "`F.dropout` in train mode",
        APART,
        ("native_dropout",),
        "what was drawn, and a product",
    ),
    *DROPOUT.rows,
    *RECURRENCES.rows,
    Row(
        "_pack_padded_sequence",
        "`pack_padded_sequence`; on a CPU as well",
        RULE,
        ("_cudnn_rnn: packed",),
    ),
    *CELLS.rows,
    *ATTENTION.rows,
    Row(
        "_scaled_dot_product_attention_math",
        "`scaled_dot_product_attention`",
        APART,
        ("_scaled_dot_product_attention_math",),
        "by PyTorch",
    ),
    Row(
        "_native_multi_head_attention",
        "`nn.MultiheadAttention` in eval mode, not trained",
        RULE,
        ("test_the_fast_path_of_transformers",),
        "structure; it has no derivatives",
    ),
    Row(
        "_transformer_encoder_layer_fwd",
        "`nn.TransformerEncoderLayer` in eval mode, not trained",
        RULE,
        ("test_the_fast_path_of_transformers",),
        "structure; it has no derivatives",
    ),
    Row("_flash_attention_forward", "called by name, `varlen_attn`, nested tensors", UNKNOWN),
    Row("_flash_attention_forward_no_dropout_inplace", "called by name", UNKNOWN),
    Row("_efficient_attention_forward", "called by name, nested tensors", UNKNOWN),
    Row("_cudnn_attention_forward", "called by name, nested tensors", UNKNOWN),
    Row("_cudnn_attention_forward_no_dropout_inplace", "called by name, from 2.15 on", UNKNOWN),
    Row("_triton_multi_head_attention", "called by name", UNKNOWN),
    Row("_triton_scaled_dot_attention", "called by name", UNKNOWN),
    *LOSSES.rows,
    Row("_use_miopen_ctc_loss", "the same on ROCm", RULE, (), "reads lengths and shapes"),
    *NORMALISATION.rows,
    Row(
        "_weight_norm_interface",
        "`weight_norm`; on a CPU as well",
        APART,
        ("_weight_norm_interface",),
        "by PyTorch",
    ),
    *GRIDS.rows,
    *CONVOLUTIONS.rows,
    Row("_conv_depthwise2d", "`nn.Conv2d(.., groups=channels)`", BELOW, (), "`convolution`"),
    Row("conv_depthwise3d", "`nn.Conv3d(.., groups=channels)`", BELOW, (), "`convolution`"),
    Row("cudnn_convolution_relu", "fused for inference", NOT_FORWARD),
    Row("cudnn_convolution_add_relu", "fused for inference", NOT_FORWARD),
    Row("miopen_convolution_relu", "fused for inference", NOT_FORWARD),
    Row("miopen_convolution_add_relu", "fused for inference", NOT_FORWARD),
    *BATCH_NORMS.rows,
    Row("batch_norm_stats", "`nn.SyncBatchNorm`", RULE, NORMS),
    Row("batch_norm_elemt", "`nn.SyncBatchNorm`", RULE, NORMS),
    Row("batch_norm_gather_stats", "`nn.SyncBatchNorm`", RULE, NORMS),
    Row("batch_norm_gather_stats_with_counts", "`nn.SyncBatchNorm`", RULE, NORMS),
    Row("mm", "`torch.mm(.., out_dtype=)`", RULE, (), TYPED),
    Row("bmm", "`torch.bmm(.., out_dtype=)`", RULE, (), TYPED),
    Row("addmm", "`torch.addmm(.., out_dtype=)`", RULE, (), TYPED),
    Row("baddbmm", "`torch.baddbmm(.., out_dtype=)`", RULE, (), TYPED),
    Row(
        "_cudnn_init_dropout_state",
        "`nn.LSTM(.., dropout=p)`",
        UNKNOWN,
        (),
        "it depends on no batch",
    ),
    Row(
        "_cudnn_rnn_flatten_weight", "`flatten_parameters`, outside of a forward pass", NOT_FORWARD
    ),
    Row("_philox_key_fold_in", "`torch.func` random keys", UNKNOWN),
    Row("_philox_key_split", "`torch.func` random keys", UNKNOWN),
    Row("_philox_normal_", "`torch.func` random keys", UNKNOWN),
    Row("_philox_uniform_", "`torch.func` random keys", UNKNOWN),
    Row("_fill_mem_eff_dropout_mask_", "tests of PyTorch", NOT_FORWARD),
    Row("_mixed_dtypes_linear", "weights in eight bits", NOT_FORWARD),
    Row("_convert_weight_to_int4pack", "weights in four bits", NOT_FORWARD),
    Row("_weight_int4pack_mm", "weights in four bits", NOT_FORWARD),
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
    Row("_efficient_attention_backward", "", BACKWARD),
    Row("_flash_attention_backward", "", BACKWARD),
    Row("batch_norm_backward_elemt", "", BACKWARD),
    Row("batch_norm_backward_reduce", "", BACKWARD),
)


def backward_rows() -> list[Row]:
    """The rows of all ops of backward passes, by name."""
    rows = list(BACKWARD_ONLY)
    for family in (*FAMILIES, BATCH_NORMS):
        rows += family.backward_rows
    return sorted(rows, key=lambda row: row.op)


ROWS = (*FORWARD, *backward_rows())

HEAD = """# Ops of a GPU

PyTorch runs other ops on a GPU than on a CPU. This table lists every op that has a kernel for GPUs and none for CPUs in
PyTorch's list of native functions, and those that only a GPU's way through PyTorch leads to. *Tested* means: on a CPU,
by a kernel of the CPU under the op's name, through PyTorch's own autograd formula for the op, against plain ops in
float64: structure, component, copy and frozen rows, norms, products, diagonal, eigenvalues, plan; and where samples
depend on each other. **None has run on a real GPU so far.**

Ops of optimizers (`_fused_adam`, `_foreach_*`) and of gradient scaling (`_amp_*`) run after the backward pass.
"""


def page() -> str:
    lines = [HEAD]
    for decision, meaning in DECISIONS.items():
        lines.append(f"- **{decision}**: {meaning}")
    lines += [
        "",
        "| op | where it arises | what becomes of it | tested | on a real GPU |",
        "|---|---|---|---|---|",
    ]
    for row in ROWS:
        name, *rest = row.op.split(" ", 1)
        op = " ".join([f"`{name}`", *rest])
        decision = f"{row.decision}: {row.note}" if row.note else row.decision
        tested = "yes" if row.tests else ""
        lines.append(f"| {op} | {row.arises} | {decision} | {tested} | no |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
