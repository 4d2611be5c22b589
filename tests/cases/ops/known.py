"""Ops that the sweep has to leave out, in all or in part, and ops that it has to be told of."""

# Sweeps of what cannot be held against numbers.
LEFT_OUT = {
    "empty": "memory that was not written to",
    "empty_like": "memory that was not written to",
    "empty_permuted": "memory that was not written to",
    "empty_strided": "memory that was not written to",
    "new_empty": "memory that was not written to",
    "new_empty_strided": "memory that was not written to",
    "linalg.ldl_solve": "pivots of other matrices make it write anywhere",
    "_convert_indices_from_csr_to_coo": "rows that end before they begin make it write anywhere",
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

# Ops that take any integer for a mode or a size, and read or write anywhere if it does not fit.
UNCHECKED_INTEGERS = ("grid_sampler_2d", "grid_sampler_3d", "native_group_norm")

# Ops that do not check whether the sizes of their tensors fit each other.
UNCHECKED_SIZES = (
    "native_group_norm",
    "native_layer_norm",
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_batch_norm_with_update",
)
