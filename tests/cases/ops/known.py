"""Ops about which the sweep is not content yet, and those that it has to leave out."""

# Rules that are wrong or raise; a test fails where one of these has become right.
KNOWN_WRONG: dict[str, str] = {}

# Sweeps of what cannot be held against numbers.
LEFT_OUT = {
    "empty": "memory that was not written to",
    "empty_like": "memory that was not written to",
    "empty_permuted": "memory that was not written to",
    "empty_strided": "memory that was not written to",
    "new_empty": "memory that was not written to",
    "new_empty_strided": "memory that was not written to",
    "linalg.ldl_solve": "pivots of other matrices make it write anywhere",
}

# Ops with a rule that PyTorch's table does not reach, and whose arguments follow from the schema.
OWN_ARGUMENTS = [
    "_addmm_activation",
    "_index_put_impl",
    "_lazy_clone",
    "_linalg_eigvals",
    "_reshape_alias",
    "_scaled_dot_product_attention_math",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_unsafe_index",
    "_unsafe_index_put",
    "_upsample_bicubic2d_aa",
    "_upsample_bilinear2d_aa",
    "celu",
    "concat",
    "contiguous",
    "elu_backward",
    "erfinv",
    "frexp",
    "ger",
    "hardsigmoid_backward",
    "imag",
    "l1_loss",
    "lgamma",
    "lift",
    "lift_fresh_copy",
    "max_pool1d",
    "mish_backward",
    "nan_to_num",
    "native_channel_shuffle",
    "positive",
    "real",
    "select_copy",
    "slice_copy",
    "slice_scatter",
    "softplus_backward",
    "special_erf",
    "special_log_softmax",
    "split_copy",
    "square",
    "swapaxes",
    "unsafe_split_with_sizes",
    "view_as_real_copy",
]

# Ops that take any number for a mode, and read anywhere for one that there is not.
UNCHECKED = ("grid_sampler_2d", "grid_sampler_3d")
