"""What becomes of each op that PyTorch has for GPUs only: the one table behind
``docs/reference/device_ops.md``.

`python tests/cases/device_ops_table.py` writes the page.
A test holds the page to the table, and the table to PyTorch's list
of native functions.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "device_ops.md"

RULE, PLAIN, APART, REFUSED, UNKNOWN, BELOW, BACKWARD, NOT_FORWARD = (
    "rule",
    "written down as",
    "taken apart",
    "refused by name",
    "unknown",
    "below",
    "backward",
    "no forward pass",
)

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


@dataclass(frozen=True)
class Row:
    """An op. ``tests``: prefixes of cases of ``tests/gradients/test_device_ops.py``, or names of
    tests there.
    """

    op: str
    arises: str
    decision: str
    tests: tuple[str, ...] = ()
    note: str = ""


TYPED = "the overload that is given a type; structure only"
NORMS = ("tests/gradients/test_device_norms.py",)

ROWS = (
    Row(
        "native_dropout",
        "`F.dropout` in train mode",
        APART,
        ("native_dropout",),
        "what was drawn, and a product",
    ),
    Row(
        "_fused_dropout",
        "called by name",
        APART,
        ("_fused_dropout",),
        "what was drawn, and a product",
    ),
    Row(
        "_cudnn_rnn",
        "`nn.LSTM`, `nn.GRU`, `nn.RNN`",
        RULE,
        ("_cudnn_rnn", "test_a_window_on_all_weights"),
    ),
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
    Row("miopen_rnn", "the same on ROCm", RULE, ("miopen_rnn",)),
    Row(
        "_pack_padded_sequence",
        "`pack_padded_sequence`; on a CPU as well",
        RULE,
        ("_cudnn_rnn: packed",),
    ),
    Row("_thnn_fused_lstm_cell", "`nn.LSTMCell`", RULE, ("_thnn_fused_lstm_cell",)),
    Row("_thnn_fused_gru_cell", "`nn.GRUCell`", RULE, ("_thnn_fused_gru_cell",)),
    Row(
        "_scaled_dot_product_flash_attention",
        "`scaled_dot_product_attention`",
        RULE,
        (
            "_scaled_dot_product_flash_attention",
            "test_products_through_attention_that_drops_are_refused",
        ),
        "with dropout, products with the GGN are refused",
    ),
    Row(
        "_scaled_dot_product_efficient_attention",
        "`scaled_dot_product_attention`",
        RULE,
        (
            "_scaled_dot_product_efficient_attention",
            "test_products_through_attention_that_drops_are_refused",
        ),
        "with dropout, products with the GGN are refused",
    ),
    Row(
        "_scaled_dot_product_cudnn_attention",
        "`scaled_dot_product_attention`",
        RULE,
        (
            "_scaled_dot_product_cudnn_attention",
            "test_products_through_attention_that_drops_are_refused",
        ),
        "with dropout, products with the GGN are refused",
    ),
    Row(
        "_scaled_dot_product_fused_attention_overrideable",
        "`scaled_dot_product_attention` of a backend outside of PyTorch",
        RULE,
        (
            "_scaled_dot_product_fused_attention_overrideable",
            "test_products_through_attention_that_drops_are_refused",
        ),
        "with dropout, products with the GGN are refused",
    ),
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
    Row("_triton_multi_head_attention", "called by name", UNKNOWN),
    Row("_triton_scaled_dot_attention", "called by name", UNKNOWN),
    Row(
        "_cudnn_ctc_loss",
        "`F.ctc_loss`",
        PLAIN,
        ("test_ctc_loss",),
        "`_ctc_loss`; it has no second derivative, which is refused by name",
    ),
    Row(
        "miopen_ctc_loss",
        "the same on ROCm",
        PLAIN,
        ("test_ctc_loss",),
        "`_ctc_loss`; it has no second derivative, which is refused by name",
    ),
    Row(
        "_use_cudnn_ctc_loss", "`F.ctc_loss`", RULE, ("test_ctc_loss",), "reads lengths and shapes"
    ),
    Row("_use_miopen_ctc_loss", "the same on ROCm", RULE, (), "reads lengths and shapes"),
    Row("_fused_rms_norm", "`nn.RMSNorm`", RULE, ("_fused_rms_norm",)),
    Row(
        "_weight_norm_interface",
        "`weight_norm`; on a CPU as well",
        APART,
        ("_weight_norm_interface",),
        "by PyTorch",
    ),
    Row(
        "cudnn_grid_sampler",
        "`F.grid_sample(.., align_corners=True)`",
        PLAIN,
        ("cudnn_grid_sampler",),
        "`grid_sampler_2d`",
    ),
    Row(
        "cudnn_affine_grid_generator",
        "called by name",
        PLAIN,
        ("cudnn_affine_grid_generator",),
        "`affine_grid_generator`",
    ),
    Row(
        "cudnn_convolution",
        "called by name; below `convolution`",
        PLAIN,
        ("cudnn_convolution",),
        "`convolution`",
    ),
    Row(
        "cudnn_convolution_transpose",
        "called by name; below `convolution`",
        PLAIN,
        ("cudnn_convolution_transpose",),
        "`convolution`",
    ),
    Row(
        "miopen_convolution",
        "called by name; below `convolution`",
        PLAIN,
        ("miopen_convolution",),
        "`convolution`",
    ),
    Row(
        "miopen_convolution_transpose",
        "called by name; below `convolution`",
        PLAIN,
        ("miopen_convolution_transpose",),
        "`convolution`",
    ),
    Row(
        "miopen_depthwise_convolution",
        "called by name; below `convolution`",
        PLAIN,
        ("miopen_depthwise_convolution",),
        "`convolution`",
    ),
    Row("_conv_depthwise2d", "`nn.Conv2d(.., groups=channels)`", BELOW, (), "`convolution`"),
    Row("conv_depthwise3d", "`nn.Conv3d(.., groups=channels)`", BELOW, (), "`convolution`"),
    Row("cudnn_convolution_relu", "fused for inference", NOT_FORWARD),
    Row("cudnn_convolution_add_relu", "fused for inference", NOT_FORWARD),
    Row("miopen_convolution_relu", "fused for inference", NOT_FORWARD),
    Row("miopen_convolution_add_relu", "fused for inference", NOT_FORWARD),
    Row("cudnn_batch_norm", "`nn.BatchNorm2d`", RULE, NORMS),
    Row("miopen_batch_norm", "the same on ROCm", RULE, NORMS),
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
    Row("_masked_scale", "the backward pass of `_fused_dropout`", BACKWARD),
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
    Row("_cudnn_attention_backward", "", BACKWARD),
    Row("_cudnn_rnn_backward", "", BACKWARD, (), "no second derivative: tangents take plain ops"),
    Row("_efficient_attention_backward", "", BACKWARD),
    Row("_flash_attention_backward", "", BACKWARD),
    Row("_fused_rms_norm_backward", "", BACKWARD),
    Row("_scaled_dot_product_cudnn_attention_backward", "", BACKWARD, (), "no second derivative"),
    Row(
        "_scaled_dot_product_efficient_attention_backward", "", BACKWARD, (), "no second derivative"
    ),
    Row("_scaled_dot_product_flash_attention_backward", "", BACKWARD, (), "no second derivative"),
    Row("_thnn_fused_gru_cell_backward", "", BACKWARD),
    Row("_thnn_fused_lstm_cell_backward_impl", "", BACKWARD),
    Row("batch_norm_backward_elemt", "", BACKWARD),
    Row("batch_norm_backward_reduce", "", BACKWARD),
    Row("cudnn_affine_grid_generator_backward", "", BACKWARD),
    Row("cudnn_batch_norm_backward", "", BACKWARD),
    Row("cudnn_grid_sampler_backward", "", BACKWARD),
    Row("miopen_batch_norm_backward", "", BACKWARD),
    Row("miopen_rnn_backward", "", BACKWARD, (), "no second derivative: tangents take plain ops"),
)

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
