"""Rules for ops that compute: elementwise families, reductions, normalisations, contractions, losses.

Each rule states an op as a short composition of the algebra's five operations. Index letters: n sample (here: any
leading batch dim), c class or channel, o/i output and input feature, t position.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from unbatch.labels import Marks, expand, permute, reshape, shared, spell_out, squeeze, unsqueeze
from unbatch.rules import Call, mixed, numbered, pointwise, rule

# --- values from nowhere ------------------------------------------------------------------------------------------------


@rule("zeros", "ones", "full", "empty", "scalar_tensor", "zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones",
      "new_full", "new_empty", "empty_strided", "new_empty_strided", "zero", "fill", "empty_permuted")  # fmt: skip
def constant(call: Call) -> Marks:
    """All elements equal. A tensor may be filled with the value of another."""
    arguments = ("value", "fill_value", "s")
    fills = [call[k] for k in arguments if isinstance(call[k], Marks)]
    written = [repr(call[k]) for k in arguments if call[k] is not None and not isinstance(call[k], Marks)]
    base = shared(call.shape, (call.name.removeprefix("new_").removesuffix("_like"), written), (), range(len(call.shape)))
    return call.algebra.pointwise("fill", base, *fills) if fills else base


@rule("arange", "linspace", "logspace", "eye", "tril_indices", "triu_indices", "hann_window", "hamming_window", "randperm_constant")
def sequence(call: Call) -> Marks:
    return shared(call.shape, call.title)


@rule("rand", "randn", "randint", "rand_like", "randn_like", "randint_like", "uniform", "exponential", "random", "randperm", "log_normal",
      "cauchy", "geometric", "normal_functional")  # fmt: skip
def noise(call: Call) -> Marks:
    """Fresh and identically distributed; whatever sample consumes an element, it becomes part of that sample."""
    return shared(call.shape, "noise", ["noise"], range(len(call.shape)))


@rule("bernoulli", "normal", "poisson", "binomial", "_standard_gamma", "_sample_dirichlet", "multinomial")
def shaped_noise(call: Call) -> Marks:
    """Noise whose distribution may depend on values; filled in place, what was there before does not matter."""
    a = call.algebra
    shaping = [call[k] for k in ("p", "mean", "std", "count", "prob") if isinstance(call[k], Marks)]
    if not call.op._schema.is_mutable and isinstance(call["self"], Marks) and not isinstance(call["p"], float):
        shaping.append(call["self"])
    if call.name in ("multinomial", "_sample_dirichlet"):
        last = [len(call["self"].shape) - 1]
        shaping = [_flat_dims(a.scan(call.title, m, last), last, True) for m in shaping]
        if shaping and shaping[0].shape[:-1] == call.shape[:-1]:
            shaping = [expand(m, call.shape) for m in shaping]
    fresh = noise(call)
    return a.pointwise(call.title, fresh, *shaping) if shaping else fresh


# --- elementwise --------------------------------------------------------------------------------------------------------


@rule("add", "sub", "rsub")
def addition(call: Call) -> Marks:
    if call.name != "rsub" and not isinstance(call["other"], Marks) and call["other"] == 0 and len(call.marks) == 1:
        return call.marks[0]
    plain = call.name == "add" and call["alpha"] in (None, 1) and isinstance(call["other"], Marks)
    return call.algebra.pointwise("add" if plain else call.title, *call.marks, kind="add" if plain else "sub")


@rule("mul", "div", "neg", "_to_copy", "clone", "detach", "alias", "positive", "lift_fresh", "lift_fresh_copy", "true_divide", "_conj",
      "view_as_real_copy", "to", "contiguous", "lift", "_lazy_clone")  # fmt: skip
def scaling(call: Call) -> Marks:
    marks = call.marks
    if not marks:
        return shared(call.shape, call.title)
    if call.name == "div" and len(marks) == 2 and "predictions" in marks[1].sources:
        return call.algebra.pointwise(call.title, *marks)
    if call["rounding_mode"] is not None:
        return call.algebra.pointwise(call.title, *marks)
    if len(marks) == 1 and call.name not in ("mul", "div", "neg"):
        return marks[0] if call["dtype"] is None and call.name != "_conj" else cast(call, marks[0])
    return call.algebra.pointwise(call.title, *marks, kind="scale")


def cast(call: Call, x: Marks) -> Marks:
    """To another floating-point type it is still the same number; to others it is not."""
    dtype = call["dtype"]
    floating = dtype is not None and dtype.is_floating_point
    return call.algebra.pointwise((call.name, repr(dtype)), x, kind="scale" if floating else "")


@rule("copy")
def overwrite(call: Call) -> Marks:
    return expand(call["src"], call.shape)


@rule("dropout", "native_dropout", "_fused_dropout", "rrelu_with_noise", "rrelu_with_noise_functional", "complex", "polar", "view_as_complex_copy",
      "log_sigmoid_forward", "prelu", "_prelu_kernel", "softplus_backward", "elu_backward", "leaky_relu_backward", "hardtanh_backward",
      "hardswish", "hardswish_backward", "log_sigmoid_backward", "hardsigmoid_backward", "mish_backward", "quantize_per_tensor", "dequantize",
      "fake_quantize_per_tensor_affine_cachemask", "celu", "softshrink", "softshrink_backward", "isclose",
      "real", "imag", "threshold", "glu_jvp", "special_erf", "nan_to_num", "frexp", "erfinv", "soft_margin",
      "logit", "lgamma", "where", "masked_fill", "clamp", "xlogy", "special_log_softmax")  # fmt: skip
def elementwise(call: Call) -> Any:
    return pointwise(call)


@rule("bucketize", "searchsorted", "isin")
def among(call: Call) -> Marks:
    """Each value is compared with all of a sorted list (or of a set)."""
    a = call.algebra
    x, table = (call["elements"], call["test_elements"]) if call.name == "isin" else (call["self"], call["boundaries"])
    if call.name == "searchsorted":
        x, table = call["self"], call["sorted_sequence"]
        if isinstance(table, Marks) and len(table.shape) > 1 and isinstance(x, Marks):
            last = [len(table.shape) - 1]
            rows = _flat_dims(a.scan("row", table, last), last, True)
            return a.pointwise(call.title, x, rows)
    tables = [_flat_dims(a.scan("table", t, range(len(t.shape))), list(range(len(t.shape))), False) for t in [table] if isinstance(t, Marks)]
    values = [m for m in [x] if isinstance(m, Marks)]
    return a.pointwise(call.title, *values, *tables)


@rule("glu")
def gated(call: Call) -> Marks:
    return call.algebra.scan(call.title, call["self"], call.dims(), shape=call.shape)


@rule("pow", "square", "float_power")
def power(call: Call) -> Marks:
    """Whole powers of what is mixed are still polynomials of it."""
    exponent = 2 if call.name == "square" else call["exponent"]
    whole = isinstance(exponent, int | float) and exponent == int(exponent) and exponent > 0
    bent = set(call.algebra.bent)
    out = call.algebra.pointwise(call.title, *call.marks)
    call.algebra.bent = bent if whole else call.algebra.bent
    return out


@rule("lerp", "addcmul", "addcdiv")
def several(call: Call) -> Marks:
    return call.algebra.pointwise(call.title, *call.marks)


# --- reductions ---------------------------------------------------------------------------------------------------------


@rule("sum", "mean", "amax", "amin", "prod", "logsumexp", "any", "all", "nansum", "nanmean", "norm", "linalg_vector_norm", "count_nonzero")
def monoid(call: Call) -> Marks:
    """Reductions that can be taken sample by sample first."""
    x = call["self"]
    if call["dtype"] is not None:
        x = cast(call, x)
    name: Any = call.name if call.name in ("sum", "mean") else (call.name, repr(call["ord"] if call["ord"] is not None else call["p"]))
    if not x.shape:
        return x.with_key(name)
    return call.algebra.reduce(name, x, call.dims(), bool(call["keepdim"]), monoid=True)


@rule("var", "std", "var_mean", "std_mean")
def moments(call: Call) -> Any:
    x, dims, keepdim = call["self"], call.dims(), bool(call["keepdim"])
    first = call.algebra.reduce((call.name, repr(call["correction"]), repr(call["unbiased"])), x, dims, keepdim)
    return [first, call.algebra.reduce("mean", x, dims, keepdim)] if call.name.endswith("_mean") else first


@rule("max", "min", "median", "nanmedian", "mode", "kthvalue", "aminmax", "argmax", "argmin")
def selection(call: Call) -> Any:
    """The extreme or middle value; its *position* is no symmetric function of the samples."""
    x = call["self"]
    if call["other"] is not None:
        return pointwise(call)
    if not x.shape:
        return [x.with_key((call.title, i)) for i in range(len(call.shapes))]
    dims, keepdim = call.dims(), bool(call["keepdim"])
    title = (call.name, call["k"])
    values = call.algebra.reduce(title, x, dims, keepdim, monoid=call.name in ("max", "min"))
    if call.name == "aminmax":
        return [values, values.with_key("max")]
    if len(call.shapes) == 1 and not call.name.startswith("arg"):
        return values
    places = _flat_dims(call.algebra.scan(title, x, dims, "position"), dims, keepdim)
    return places if call.name.startswith("arg") else numbered([values, places])


def _flat_dims(x: Marks, dims: list[int], keepdim: bool) -> Marks:
    """Drop dims over which a scan has made everything alike."""
    shape = tuple(1 if d in dims else s for d, s in enumerate(x.shape))
    x = replace(x, shape=shape)
    return x if keepdim else squeeze(x, dims)


@rule("sort", "topk", "msort", "argsort")
def ordering(call: Call) -> Any:
    """Sorted over the samples, values are symmetric in them (and as many as samples); the order itself is not."""
    x = call["self"]
    if not x.shape:
        return [x] * len(call.shapes)
    dim = call.dims()[0] if call["dim"] is not None else len(x.shape) - 1
    places = call.algebra.scan((call.name, repr(call["descending"])), x, [dim], "order" if call["k"] is None else "position", shape=call.shapes[-1])
    if not x.owner_varies(dim):
        return numbered([call.algebra.scan(call.title, x, [dim], shape=s) for s in call.shapes])
    whole = call.algebra.reduce((call.name, repr(call["descending"] or call["largest"])), x, [dim], True, long=call["k"] is None)
    stored = list(whole.key.shape)
    values = replace(whole, shape=call.shape, owner=whole.owner.reshape(stored), key=whole.key.reshape(stored))
    return numbered([values, places])[-len(call.shapes) :]


@rule("cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", "_fft_r2c", "_fft_c2r", "_fft_c2c", "cumsum_backward", "diff")
def ordered(call: Call) -> Any:
    dims = call.dims() if call["dim"] is not None else [0]
    return numbered([call.algebra.scan(call.title, call["self"], dims, shape=s) for s in call.shapes])


@rule("_softmax", "_log_softmax", "_safe_softmax", "softmax", "log_softmax")
def softmax(call: Call) -> Marks:
    x = call["self"]
    if not x.shape:
        return x.with_key(call.name)
    return call.algebra.pointwise(call.name, x, call.algebra.reduce("logsumexp", x, call.dims(), True, monoid=True))


@rule("_softmax_backward_data", "_log_softmax_backward_data")
def softmax_backward(call: Call) -> Marks:
    a = call.algebra
    product = a.pointwise("mul", call["grad_output"], call["output"])
    return a.pointwise(call.name, call["grad_output"], call["output"], a.reduce("sum", product, call.dims(of="output"), True))


# --- normalisations -------------------------------------------------------------------------------------------------------


def _channelwise(call: Call, name: Any, x: Marks, *channels: Marks | None) -> Marks:
    """An elementwise function of ``x`` and of vectors along its second dim."""
    trailing = [1] * (len(x.shape) - 2)
    return call.algebra.pointwise(name, x, *(reshape(p, (*p.shape, *trailing)) for p in channels if p is not None))


@rule("native_layer_norm", "_fused_rms_norm", "layer_norm", "rms_norm")
def layer_norm(call: Call) -> Any:
    a, x = call.algebra, call["input"]
    dims = range(len(x.shape) - len(call["normalized_shape"]), len(x.shape))
    spread = a.reduce((call.name, call["eps"]), x, dims, True)
    affine = [p for p in (call["weight"], call["bias"]) if p is not None]
    return numbered([a.pointwise(call.name, x, spread, *affine), *[spread] * (len(call.shapes) - 1)])


@rule("native_group_norm", "group_norm")
def group_norm(call: Call) -> Any:
    a, x = call.algebra, call["input"]
    groups = call["group"]
    parts = reshape(x, (x.shape[0], groups, math.prod(x.shape[1:]) // groups))
    spread = a.reduce((call.name, call["eps"]), parts, [2], True)
    y = reshape(a.pointwise(call.name, parts, spread), x.shape)
    y = _channelwise(call, "affine", y, call["weight"], call["bias"])
    return numbered([y, *[squeeze(spread, [2])] * (len(call.shapes) - 1)])


@rule("native_batch_norm", "_native_batch_norm_legit", "cudnn_batch_norm", "miopen_batch_norm", "_batch_norm_with_update",
      "_native_batch_norm_legit_no_training", "_batch_norm_no_update", "_native_batch_norm_legit_functional")  # fmt: skip
def batch_norm(call: Call) -> Any:
    """Statistics over all dims but the second; whether they mix samples is for the marks to say."""
    a, x = call.algebra, call["input"]
    if call["training"] is False or call.name in ("_native_batch_norm_legit_no_training", "_batch_norm_no_update"):
        y = _channelwise(call, ("batch_norm in eval", call["eps"]), x, call["running_mean"], call["running_var"], call["weight"], call["bias"])
        return [y, *(shared(s, "unused") for s in call.shapes[1:])]
    dims = [d for d in range(len(x.shape)) if d != 1]
    moments_ = [a.reduce("mean", x, dims), a.reduce("var", x, dims)]
    y = _channelwise(call, ("batch_norm", call["eps"]), x, *moments_, call["weight"], call["bias"])
    return [y, *moments_, *(shared(s, "reserve") for s in call.shapes[3:])]


def running_statistics(call: Call) -> dict[str, Marks]:
    """What a training batch norm leaves in its running statistics."""
    a, x = call.algebra, call["input"]
    dims = [d for d in range(len(x.shape)) if d != 1]
    new = {"running_mean": a.reduce("mean", x, dims), "running_var": a.reduce("var", x, dims)}
    return {k: a.pointwise("momentum", call[k], v) for k, v in new.items() if call[k] is not None}


# --- contractions -------------------------------------------------------------------------------------------------------------

CONTRACTIONS = {"mm": ("ni", "io", "no"), "bmm": ("bni", "bio", "bno"), "mv": ("ni", "i", "n"), "dot": ("i", "i", ""), "vdot": ("i", "i", ""),
                "addmm": ("ni", "io", "no"), "baddbmm": ("bni", "bio", "bno"), "addmv": ("ni", "i", "n"), "addbmm": ("bni", "bio", "no"),
                "addr": ("n", "o", "no"), "ger": ("n", "o", "no"), "_addmm_activation": ("ni", "io", "no")}  # fmt: skip


@rule(*CONTRACTIONS)
def matmul(call: Call) -> Marks:
    marks = call.marks
    left, right, out = CONTRACTIONS[call.name]
    product = call.algebra.contract("mul", marks[-2:], (left, right), out)
    kind = "" if call.name == "_addmm_activation" else "sub"
    return call.algebra.pointwise(call.title, marks[0], product, kind=kind) if len(marks) == 3 else product


@rule("linear")
def linear(call: Call) -> Marks:
    x, w = call["input"], call["weight"]
    lead = "abdefgh"[: len(x.shape) - 1]
    out = call.algebra.contract("mul", [x, w], (lead + "i", "oi"), lead + "o")
    return call.algebra.pointwise("bias", out, call["bias"]) if call["bias"] is not None else out


@rule("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
      "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_attention_math", "scaled_dot_product_attention")  # fmt: skip
def attention(call: Call) -> Any:
    """softmax(q kᵀ + mask) v over the positions of a sequence; grouped heads are shared by repetition."""
    a, q, k, v = call.algebra, call["query"], call["key"], call["value"]
    lead = "bhgef"[: len(q.shape) - 2]
    k, v = (_repeat_heads(x, q) for x in (k, v))
    scores = a.contract("mul", [q, k], (f"{lead}td", f"{lead}sd"), f"{lead}ts")
    mask = call["attn_mask"] if call["attn_mask"] is not None else call["attn_bias"]
    scores = a.pointwise("mask", scores, mask) if mask is not None else scores
    scores = a.pointwise("causal", scores, shared(scores.shape[-2:], "causal")) if call["is_causal"] else scores
    weights = a.pointwise("softmax", scores, a.reduce("logsumexp", scores, [-1], True))
    if call["dropout_p"]:
        weights = a.pointwise("dropout", weights, shared((), "noise", ["noise"]))
    out = a.contract("mul", [weights, v], (f"{lead}ts", f"{lead}sd"), f"{lead}td")
    rest = a.reduce("logsumexp", scores, [-1])
    return [out, *(rest if s == rest.shape else shared(s, "state", ["noise"]) for s in call.shapes[1:])]


def _repeat_heads(x: Marks, q: Marks) -> Marks:
    if len(x.shape) < 3 or x.shape[-3] == q.shape[-3]:
        return x
    repeats = q.shape[-3] // x.shape[-3]
    wide = expand(unsqueeze(x, len(x.shape) - 2), (*x.shape[:-2], repeats, *x.shape[-2:]))
    return reshape(wide, (*x.shape[:-3], q.shape[-3], *x.shape[-2:]))


@rule("convolution", "_convolution", "convolution_overrideable", "mkldnn_convolution")
def convolution(call: Call) -> Marks:
    """Channels are contracted within their group; positions see a window; the leading dim is left alone."""
    a, x, w = call.algebra, call["input"], call["weight"]
    groups, transposed = call["groups"], bool(call["transposed"])
    space = list(range(2, len(x.shape)))
    x = a.scan("window", x, [d for d in space if x.key.shape[d] > 1]) if _moves(call, x, space) else x
    n, channels, outs = x.shape[0], x.shape[1], call.shape[1]
    x = replace(x, shape=(*x.shape[:2], *call.shape[2:]))
    x = reshape(x, (n, groups, channels // groups, *x.shape[2:]))
    w = permute(w, [1, 0, *range(2, len(w.shape))]) if transposed and groups == 1 else w
    taps = list(range(2, len(w.shape)))
    if transposed and groups > 1:
        w = reshape(w, (groups, channels // groups, outs // groups, *w.shape[2:]))
        w = permute(w, [0, 2, 1, *range(3, len(w.shape))])
    else:
        w = reshape(w, (groups, outs // groups, channels // groups, *w.shape[2:]))
    w = a.scan("taps", w, [d + 1 for d in taps])
    w = _flat_dims(w, [d + 1 for d in taps], False)
    letters = "xyz"[: len(space)]
    y = a.contract((call.name, repr([call[k] for k in ("stride", "padding", "dilation", "transposed", "output_padding", "groups")])), [x, w], (f"ngi{letters}", "goi"), f"ngo{letters}")
    y = reshape(y, call.shape)
    return _channelwise(call, "bias", y, call["bias"])


def _moves(call: Call, x: Marks, space: list[int]) -> bool:
    """Some window reaches beyond its own position along a dim where samples lie."""
    plain = {"stride": 1, "padding": 0, "output_padding": 0}
    shifted = any(v != plain[k] for k in plain for v in call[k])
    return any(shifted or call["weight"].shape[d] > 1 or call.shape[d] != x.shape[d] for d in space if x.key.shape[d] > 1)


@rule("convolution_backward")
def convolution_backward(call: Call) -> Any:
    """By the input: a convolution again. By the weight and the bias: sums over the leading dim."""
    a, g, x, w = call.algebra, call["grad_output"], call["input"], call["weight"]
    if call["groups"] != 1 or any(m.key.shape[d] > 1 for m in (g, x) for d in range(2, len(m.shape))):
        return [mixed(call, s, "no rule") if s else None for s in call.shapes]
    space = list(range(2, len(g.shape)))
    g, x, w = (_flat_dims(a.scan("window", m, space), space, False) for m in (g, x, w))
    transposed = bool(call["transposed"])
    by_input = a.contract((call.title, 0), [g, w], ("no", "io" if transposed else "oi"), "ni")
    by_weight = a.contract((call.title, 1), [g, x], ("no", "ni"), "io" if transposed else "oi")
    by_bias = a.reduce("sum", g, [0])
    wanted = iter(call.shapes)
    out: list[Any] = []
    for m, use in zip((by_input, by_weight, by_bias), call["output_mask"], strict=True):
        out.append(_matrix_result(m, next(wanted), len(m.shape), 0) if use else None)
    return [m for m in out if m is not None]


@rule("_thnn_fused_lstm_cell", "_thnn_fused_gru_cell")
def fused_cell(call: Call) -> Any:
    a = call.algebra
    gates = [_flat_dims(a.scan("gates", m, [1]), [1], True) for m in call.marks if len(m.shape) == 2]
    biases = [_flat_dims(a.scan("gates", m, [0]), [0], True) for m in call.marks if len(m.shape) == 1]
    out = a.pointwise(call.title, *gates, *biases)
    return numbered([expand_plain(out, s) for s in call.shapes])


def expand_plain(x: Marks, shape: tuple[int, ...]) -> Marks:
    """Elements that all depend on the same things, and differ by their index."""
    return replace(x, shape=tuple(shape))


@rule("mkldnn_rnn_layer")
def recurrent_layer(call: Call) -> Any:
    """A recurrence over the first dim; the second dim is left alone."""
    a, x = call.algebra, call["input"]
    seen = _flat_dims(a.scan("time", x, [0, 2]), [0, 2], True)
    states = [_flat_dims(a.scan("state", unsqueeze(h, 0) if len(h.shape) == 2 else h, [0, 2]), [0, 2], True) for h in (call["hx_"], call["cx_"])]
    weights = [_flat_dims(a.scan("weight", w, range(len(w.shape))), list(range(len(w.shape))), False) for w in call.marks if len(w.shape) < 3 and not w.owned and w.shape[0] != x.shape[1]]
    out = a.pointwise(call.title, seen, *states, *weights)
    return numbered([_state_shape(out, s) for s in call.shapes])


def _state_shape(out: Marks, shape: tuple[int, ...]) -> Marks:
    if len(shape) == 3:
        return expand_plain(out, shape)
    return expand_plain(squeeze(out, [0]), shape) if len(shape) == 2 else shared(shape, "workspace")


@rule("_pdist_forward")
def pair_distances(call: Call) -> Marks:
    x = call["self"]
    seen = _flat_dims(call.algebra.scan("pairs", x, [0, 1], "pairwise"), [0, 1], False)
    return expand_plain(unsqueeze(seen, 0), call.shape)


@rule("eq", "ne")
def comparison(call: Call) -> Marks:
    """Targets compared with the ignored label of PyTorch's losses, where it does not occur, are all alike."""
    x = call.marks[0]
    if call["other"] == -100 and not isinstance(call["other"], Marks) and not _occurs(call.values.get("self"), -100):
        return shared(call.shape, "nothing ignored", (), range(len(call.shape)))
    return call.algebra.pointwise(call.title, x, *call.marks[1:])


@rule("_embedding_bag", "_embedding_bag_forward_only")
def embedding_bag(call: Call) -> Any:
    """Rows of a table, summed over the runs of a flat index that fixed offsets mark."""
    a, index, offsets = call.algebra, call["indices"], call.values.get("offsets")
    if offsets is None or call["offsets"].depends_on_batch or call["offsets"].sources & {"inputs", "targets"}:
        return [mixed(call, s, "no rule") if call.marks[1].depends_on_batch else shared(s, call.title) for s in call.shapes]
    table = _flat_dims(a.scan("rows", call["weight"], [0]), [0], False)
    weights = call["per_sample_weights"]
    index = a.pointwise("weigh", index, weights) if weights is not None else index
    ends = [*offsets[1:].tolist(), index.shape[0]]
    flat = spell_out(index)
    bags = [a.reduce("bag", replace(flat, shape=(e - s,), owner=flat.owner[s:e], key=flat.key[s:e])) for s, e in zip(offsets, ends, strict=False)]
    owner, key = np.stack([b.owner for b in bags]), np.stack([b.key for b in bags])
    rows = a.result((len(bags),), owner, key, bags, "joined")
    out = a.pointwise(call.title, unsqueeze(rows, 1), table)
    return [out, *(shared(s, "unused") for s in call.shapes[1:])]


@rule("_cdist_forward", "_euclidean_dist", "cdist")
def distances(call: Call) -> Marks:
    x, y = call.marks
    lead = "abef"[: len(call.shape) - 2]
    return call.algebra.pointwise("distance", call.algebra.contract(call.title, [x, y], (f"{lead}ni", f"{lead}mi"), f"{lead}nm"))


@rule("_trilinear")
def trilinear(call: Call) -> Marks:
    a = call.algebra
    xs = [call["i1"], call["i2"], call["i3"]]
    for i, key in enumerate(("expand1", "expand2", "expand3")):
        for d in sorted(call[key]):
            xs[i] = unsqueeze(xs[i], d)
    product = a.pointwise("mul", *xs)
    return a.reduce("sum", product, call["sumdim"]) if call["sumdim"] else product


@rule("cholesky", "linalg_cholesky_ex", "linalg_inv_ex", "_linalg_eigh",
      "linalg_qr", "_linalg_svd", "_linalg_det", "_linalg_slogdet", "linalg_lu_factor_ex", "linalg_matrix_exp", "cholesky_inverse",
      "linalg_lu", "linalg_pinv", "linalg_eig", "_linalg_eigvals", "linalg_ldl_factor_ex")  # fmt: skip
def matrices(call: Call) -> Any:
    """Functions of the matrices in the last two dims, separately for each index before them."""
    a = call.algebra
    whole = []
    for m in call.marks:
        m = m if len(m.shape) > 1 else unsqueeze(m, len(m.shape))
        dims = [len(m.shape) - 2, len(m.shape) - 1]
        whole.append(_flat_dims(a.scan("matrix", m, dims), dims, False))
    out = a.pointwise(call.title, *whole)
    lead = len(out.shape)
    return [_matrix_result(out, s, lead, i) for i, s in enumerate(call.shapes)]


@rule("linalg_solve_triangular", "triangular_solve", "cholesky_solve", "_linalg_solve_ex", "linalg_lu_solve")
def solve(call: Call) -> Any:
    """The columns of the right-hand side (its rows, if it stands on the left) are solved separately."""
    a = call.algebra
    rhs = call["B"] if call["B"] is not None else call["self"]
    if len(rhs.shape) < 2:
        return matrices(call)
    matrix = [m for m in call.marks if m is not rhs]
    both = [len(rhs.shape) - 2, len(rhs.shape) - 1]
    along = both[:1] if call["left"] is not False else both[1:]
    seen = _flat_dims(a.scan("solve", rhs, along), along, True)
    whole = [_flat_dims(a.scan("matrix", m, range(max(len(m.shape) - 2, 0), len(m.shape))), both[-len(m.shape) :], True) for m in matrix]
    out = a.pointwise(call.title, seen, *whole)
    same = [expand_plain(out, s) if s == rhs.shape else _lu_result(call, matrix, s) for s in call.shapes]
    return numbered(same)


def _lu_result(call: Call, matrix: list[Marks], shape: tuple[int, ...]) -> Marks:
    """What a solver returns beside the solution comes from the matrix alone."""
    m = matrix[0]
    dims = [len(m.shape) - 2, len(m.shape) - 1]
    return _matrix_result(_flat_dims(call.algebra.scan("factors", m, dims), dims, False), shape, len(m.shape) - 2, 0)


def _matrix_result(out: Marks, shape: tuple[int, ...], lead: int, i: int) -> Marks:
    for _ in range(len(shape) - lead):
        out = unsqueeze(out, len(out.shape))
    return expand_plain(out, shape).with_key(i)


# --- windows and grids --------------------------------------------------------------------------------------------------------

SPATIAL = {"avg_pool1d": 1, "avg_pool2d": 2, "avg_pool3d": 3, "max_pool2d_with_indices": 2, "max_pool3d_with_indices": 3,
           "_adaptive_avg_pool2d": 2, "_adaptive_avg_pool3d": 3, "adaptive_max_pool2d": 2, "adaptive_max_pool3d": 3, "max_pool1d": 1,
           "upsample_nearest1d": 1, "upsample_nearest2d": 2, "upsample_nearest3d": 3, "upsample_bilinear2d": 2, "upsample_bicubic2d": 2,
           "upsample_linear1d": 1, "upsample_trilinear3d": 3, "_upsample_bilinear2d_aa": 2, "_upsample_nearest_exact2d": 2,
           "_upsample_nearest_exact1d": 1, "_upsample_bicubic2d_aa": 2, "reflection_pad1d": 1, "reflection_pad2d": 2, "reflection_pad3d": 3,
           "replication_pad1d": 1, "replication_pad2d": 2, "replication_pad3d": 3, "im2col": 3, "col2im": 2, "max_unpool2d": 2,
           "mkldnn_max_pool2d": 2, "mkldnn_adaptive_avg_pool2d": 2, "fractional_max_pool2d": 2}  # fmt: skip


@rule(*SPATIAL)
def windows(call: Call) -> Any:
    """Positions (the last dims) see windows of positions; leading dims are left alone."""
    x = call.marks[0]
    count = min(SPATIAL[call.name], len(x.shape))
    seen = call.algebra.scan(call.title, x, range(len(x.shape) - count, len(x.shape)))
    others = call.marks[1:]
    if others:
        seen = call.algebra.pointwise(call.title, seen, *(call.algebra.scan("index", m, range(len(m.shape) - count, len(m.shape))) for m in others))
    lead = len(x.shape) - count
    return [_window_result(seen, s, lead).with_key(i) for i, s in enumerate(call.shapes)]


def _window_result(x: Marks, shape: tuple[int, ...], lead: int) -> Marks:
    x = squeeze(replace(x, shape=(*x.shape[:lead], *[1] * (len(x.shape) - lead))), range(lead, len(x.shape)))
    for _ in range(len(shape) - lead):
        x = unsqueeze(x, len(x.shape))
    return expand_plain(x, shape)


@rule("grid_sampler_2d", "grid_sampler_3d")
def grid_sample(call: Call) -> Marks:
    a, x, grid = call.algebra, call["input"], call["grid"]
    space = list(range(2, len(x.shape)))
    seen = _flat_dims(a.scan("space", x, space), space, True)
    points = permute(grid, [0, len(grid.shape) - 1, *range(1, len(grid.shape) - 1)])
    points = _flat_dims(a.scan("point", points, [1]), [1], True)
    return a.pointwise(call.title, seen, points)


@rule("affine_grid_generator")
def affine_grid(call: Call) -> Marks:
    theta = _flat_dims(call.algebra.scan(call.title, call["theta"], [1, 2]), [1, 2], False)
    return _matrix_result(theta, call.shape, 1, 0)


# --- lookups in a table ---------------------------------------------------------------------------------------------------------


@rule("embedding")
def embedding(call: Call) -> Marks:
    table = _flat_dims(call.algebra.scan("rows", call["weight"], [0]), [0], False)
    return call.algebra.pointwise("embedding", unsqueeze(call["indices"], len(call["indices"].shape)), table)


# --- losses ------------------------------------------------------------------------------------------------------------------------

NONE, MEAN = 0, 1


def reduced(call: Call, loss: Marks, reduction: int) -> Marks:
    """A loss per element, reduced as its ``reduction`` argument says."""
    if reduction == NONE:
        return loss
    return call.algebra.reduce("mean" if reduction == MEAN else "sum", loss) if loss.shape else loss


@rule("mse_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy", "soft_margin_loss", "l1_loss", "poisson_nll_loss", "hinge_embedding_loss")
def elementwise_loss(call: Call) -> Marks:
    marks = [m for m in (call["self"], call["target"], call["weight"]) if m is not None]
    loss = call.algebra.pointwise((call.name, repr(call["beta"] or call["delta"])), *marks)
    return reduced(call, loss, call["reduction"])


@rule("nll_loss_forward", "nll_loss2d_forward", "nll_loss_nd")
def nll_loss(call: Call) -> Any:
    """Pick the target's entry; the mean divides by the weights of the targets, which depends on the targets."""
    a, p, y = call.algebra, call["self"], call["target"]
    classes = 1 if len(p.shape) > 1 else 0
    picked = a.scan("classes", p, [classes]) if p.key.shape[classes] > 1 else p
    picked = _flat_dims(picked.with_key("pick"), [classes], False)
    weight = call["weight"]
    weigh = [_flat_dims(a.scan("classes", weight, [0]), [0], False)] if weight is not None else []
    ignored = call["ignore_index"]
    loss = a.pointwise(("nll", ignored), picked, y, *weigh)
    counts = a.pointwise(("weight", ignored), y, *weigh)
    depends = weight is not None or ignored >= 0 or _occurs(call.values.get("target"), ignored)
    amount = a.reduce("sum", counts) if depends and counts.shape else shared((), "count")
    if call["reduction"] == NONE or not loss.shape:
        return [loss, amount]
    out = a.reduce("sum", loss)
    return [a.pointwise("div", out, amount, kind="scale") if call["reduction"] == MEAN else out, amount]


def _occurs(values: Any, what: int) -> bool:
    return values is None or bool((np.asarray(values) == what).any())


@rule("multi_margin_loss", "multilabel_margin_loss_forward", "multilabel_margin_loss")
def margin_loss(call: Call) -> Any:
    a, p, y = call.algebra, call["self"], call["target"]
    last = len(p.shape) - 1
    seen = _flat_dims(a.scan("classes", p, [last]), [last], False)
    y = y if len(y.shape) == len(seen.shape) else _flat_dims(a.scan("classes", y, [last]), [last], False)
    loss = a.pointwise((call.name, repr(call["p"]), repr(call["margin"])), seen, y)
    return [reduced(call, loss, call["reduction"]), *(shared(s, "unused") for s in call.shapes[1:])]


@rule("_ctc_loss")
def ctc_loss(call: Call) -> Any:
    """Log-probabilities are [time, n, class]; the op itself gives every sample its labels and its lengths."""
    a, p = call.algebra, call["log_probs"]
    seen = _flat_dims(a.scan("path", p, [0, 2]), [0, 2], False)
    if any("predictions" in m.sources or (m.depends_on_batch and m.sample_dim() != 0 and not m.sources <= a.constant) for m in call.marks[1:]):
        return [mixed(call, s, "no rule") for s in call.shapes]
    own = shared(seen.shape, "labels", (), [0])
    loss = a.pointwise((call.name, call["blank"], call["zero_infinity"]), seen, own)
    return [loss, *(_window_result(loss, s, 1) for s in call.shapes[1:])]
