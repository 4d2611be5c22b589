"""Rules for what layers are made of: contractions, convolutions, attention, recurrences, matrices, windows, tables.

Index letters: n sample (here: any leading batch dim), c class or channel, o/i output and input feature, t position.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from unbatch.analysis.domain.ownership import (
    Ownership,
    collapse,
    expand,
    expand_plain,
    permute,
    reshape,
    shared,
    spell_out,
    squeeze,
    unsqueeze,
)
from unbatch.analysis.rules.reductions import channelwise
from unbatch.analysis.rules.registry import RuleContext, mixed, numbered, rule

# --- contractions ---------------------------------------------------------------------------------


PRODUCTS = {
    ("ni", "io", "no"): "mm addmm _addmm_activation",
    ("bni", "bio", "bno"): "bmm baddbmm",
    ("bni", "bio", "no"): "addbmm",
    ("ni", "i", "n"): "mv addmv",
    ("i", "i", ""): "dot vdot",
    ("n", "o", "no"): "addr ger",
}


CONTRACTIONS = {name: letters for letters, names in PRODUCTS.items() for name in names.split()}


@rule(*CONTRACTIONS)
def matmul(call: RuleContext) -> Ownership:
    marks = call.marks
    left, right, out = CONTRACTIONS[call.name]
    product = call.algebra.contract("mul", marks[-2:], (left, right), out)
    kind = "" if call.name == "_addmm_activation" else "sub"
    return (
        call.algebra.pointwise(call.title, marks[0], product, kind=kind)
        if len(marks) == 3
        else product
    )


@rule("linear")
def linear(call: RuleContext) -> Ownership:
    x, w = call["input"], call["weight"]
    lead = "abdefgh"[: len(x.shape) - 1]
    out = call.algebra.contract("mul", [x, w], (lead + "i", "oi"), lead + "o")
    return call.algebra.pointwise("bias", out, call["bias"]) if call["bias"] is not None else out


@rule(
    "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
    "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention "
    "_scaled_dot_product_fused_attention_overrideable _scaled_dot_product_attention_math "
    "scaled_dot_product_attention"
)
def attention(call: RuleContext) -> Any:
    """softmax(q kᵀ + mask) v over the positions of a sequence; grouped heads are shared by repetition."""
    a, q, k, v = call.algebra, call["query"], call["key"], call["value"]
    lead = "bhgef"[: len(q.shape) - 2]
    k, v = (_repeat_heads(x, q) for x in (k, v))
    scores = a.contract("mul", [q, k], (f"{lead}td", f"{lead}sd"), f"{lead}ts")
    mask = call["attn_mask"] if call["attn_mask"] is not None else call["attn_bias"]
    scores = a.pointwise("mask", scores, mask) if mask is not None else scores
    scores = (
        a.pointwise("causal", scores, shared(scores.shape[-2:], "causal"))
        if call["is_causal"]
        else scores
    )
    weights = a.pointwise("softmax", scores, a.reduce("logsumexp", scores, [-1], True))
    if call["dropout_p"]:
        weights = a.pointwise("dropout", weights, shared((), "noise", ["noise"]))
    out = a.contract("mul", [weights, v], (f"{lead}ts", f"{lead}sd"), f"{lead}td")
    rest = a.reduce("logsumexp", scores, [-1])
    return [out, *(_attention_state(call, rest, s) for s in call.shapes[1:])]


def _attention_state(call: RuleContext, rest: Ownership, shape: tuple[int, ...]) -> Ownership:
    """What a kernel keeps beside the result: the normalisation, padded in some of them; random numbers; weights."""
    if shape == rest.shape:
        return rest
    lead = len(rest.shape) - 1
    if len(shape) <= lead or shape[:lead] != rest.shape[:lead]:
        return shared(shape, "state", ["noise"])
    seen = collapse(call.algebra.scan("kept", rest, [lead]), [lead], False)
    return _matrix_result(seen, shape, lead, "kept")


def _repeat_heads(x: Ownership, q: Ownership) -> Ownership:
    if len(x.shape) < 3 or x.shape[-3] == q.shape[-3]:
        return x
    repeats = q.shape[-3] // x.shape[-3]
    wide = expand(unsqueeze(x, len(x.shape) - 2), (*x.shape[:-2], repeats, *x.shape[-2:]))
    return reshape(wide, (*x.shape[:-3], q.shape[-3], *x.shape[-2:]))


@rule("convolution _convolution convolution_overrideable mkldnn_convolution")
def convolution(call: RuleContext) -> Ownership:
    """Channels are contracted within their group; positions see a window; the leading dim is left alone."""
    a, x, w = call.algebra, call["input"], call["weight"]
    groups, transposed = call["groups"], bool(call["transposed"])
    space = list(range(2, len(x.shape)))
    x = (
        a.scan("window", x, [d for d in space if x.key.shape[d] > 1])
        if _moves(call, x, space)
        else x
    )
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
    w = collapse(w, [d + 1 for d in taps], False)
    letters = "xyz"[: len(space)]
    y = a.contract(
        (
            call.name,
            repr(
                [
                    call[k]
                    for k in (
                        "stride",
                        "padding",
                        "dilation",
                        "transposed",
                        "output_padding",
                        "groups",
                    )
                ]
            ),
        ),
        [x, w],
        (f"ngi{letters}", "goi"),
        f"ngo{letters}",
    )
    y = reshape(y, call.shape)
    return channelwise(call, "bias", y, call["bias"])


def _moves(call: RuleContext, x: Ownership, space: list[int]) -> bool:
    """Some window reaches beyond its own position along a dim where samples lie."""
    plain = {"stride": 1, "padding": 0, "output_padding": 0}
    shifted = any(v != plain[k] for k in plain for v in call[k])
    return any(
        shifted or call["weight"].shape[d] > 1 or call.shape[d] != x.shape[d]
        for d in space
        if x.key.shape[d] > 1
    )


@rule("convolution_backward")
def convolution_backward(call: RuleContext) -> Any:
    """By the input: a convolution again. By the weight and the bias: sums over the leading dim."""
    a, g, x, w = call.algebra, call["grad_output"], call["input"], call["weight"]
    if call["groups"] != 1 or any(
        m.key.shape[d] > 1 for m in (g, x) for d in range(2, len(m.shape))
    ):
        return [mixed(call, s, "no rule") if s else None for s in call.shapes]
    space = list(range(2, len(g.shape)))
    g, x, w = (collapse(a.scan("window", m, space), space, False) for m in (g, x, w))
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
def fused_cell(call: RuleContext) -> Any:
    a = call.algebra
    gates = [collapse(a.scan("gates", m, [1]), [1], True) for m in call.marks if len(m.shape) == 2]
    biases = [collapse(a.scan("gates", m, [0]), [0], True) for m in call.marks if len(m.shape) == 1]
    out = a.pointwise(call.title, *gates, *biases)
    return numbered([expand_plain(out, s) for s in call.shapes])


@rule("_pdist_forward")
def pair_distances(call: RuleContext) -> Ownership:
    x = call["self"]
    seen = collapse(call.algebra.scan("pairs", x, [0, 1], "pairwise"), [0, 1], False)
    return expand_plain(unsqueeze(seen, 0), call.shape)


@rule("_embedding_bag", "_embedding_bag_forward_only")
def embedding_bag(call: RuleContext) -> Any:
    """Rows of a table, summed over the runs of a flat index that fixed offsets mark."""
    a, index, offsets = call.algebra, call["indices"], call.values.get("offsets")
    if (
        offsets is None
        or call["offsets"].depends_on_batch
        or call["offsets"].sources & {"inputs", "targets"}
    ):
        blind = any(m.depends_on_batch for m in call.marks)
        return [mixed(call, s, "no rule") if blind else shared(s, call.title) for s in call.shapes]
    table = collapse(a.scan("rows", call["weight"], [0]), [0], False)
    weights = call["per_sample_weights"]
    index = a.pointwise("weigh", index, weights) if weights is not None else index
    ends = [*offsets[1:].tolist(), index.shape[0]]
    flat = spell_out(index)
    bags = [
        a.reduce("bag", replace(flat, shape=(e - s,), owner=flat.owner[s:e], key=flat.key[s:e]))
        for s, e in zip(offsets, ends, strict=False)
    ]
    owner, key = np.stack([b.owner for b in bags]), np.stack([b.key for b in bags])
    rows = a.result((len(bags),), owner, key, bags, "joined")
    out = a.pointwise(call.title, unsqueeze(rows, 1), table)
    return [out, *(shared(s, "unused") for s in call.shapes[1:])]


@rule("_cdist_forward", "_euclidean_dist", "cdist")
def distances(call: RuleContext) -> Ownership:
    x, y = call.marks
    lead = "abef"[: len(call.shape) - 2]
    return call.algebra.pointwise(
        "distance",
        call.algebra.contract(call.title, [x, y], (f"{lead}ni", f"{lead}mi"), f"{lead}nm"),
    )


@rule("_trilinear")
def trilinear(call: RuleContext) -> Ownership:
    a = call.algebra
    xs = [call["i1"], call["i2"], call["i3"]]
    for i, key in enumerate(("expand1", "expand2", "expand3")):
        for d in sorted(call[key]):
            xs[i] = unsqueeze(xs[i], d)
    product = a.pointwise("mul", *xs)
    return a.reduce("sum", product, call["sumdim"]) if call["sumdim"] else product


@rule(
    "cholesky linalg_cholesky_ex linalg_inv_ex _linalg_eigh linalg_qr _linalg_svd _linalg_det "
    "_linalg_slogdet linalg_lu_factor_ex linalg_matrix_exp cholesky_inverse linalg_lu linalg_pinv "
    "linalg_eig _linalg_eigvals linalg_ldl_factor_ex"
)
def matrices(call: RuleContext) -> Any:
    """Functions of the matrices in the last two dims, separately for each index before them."""
    a = call.algebra
    whole = []
    for m in call.marks:
        m = m if len(m.shape) > 1 else unsqueeze(m, len(m.shape))
        dims = [len(m.shape) - 2, len(m.shape) - 1]
        whole.append(collapse(a.scan("matrix", m, dims), dims, False))
    out = a.pointwise(call.title, *whole)
    lead = len(out.shape)
    return [_matrix_result(out, s, lead, i) for i, s in enumerate(call.shapes)]


@rule("linalg_solve_triangular triangular_solve cholesky_solve _linalg_solve_ex linalg_lu_solve")
def solve(call: RuleContext) -> Any:
    """The columns of the right-hand side (its rows, if it stands on the left) are solved separately."""
    a = call.algebra
    rhs = call["B"] if call["B"] is not None else call["self"]
    if len(rhs.shape) < 2:
        return matrices(call)
    matrix = [m for m in call.marks if m is not rhs]
    both = [len(rhs.shape) - 2, len(rhs.shape) - 1]
    along = both[:1] if call["left"] is not False else both[1:]
    seen = collapse(a.scan("solve", rhs, along), along, True)
    whole = [
        collapse(
            a.scan("matrix", m, range(max(len(m.shape) - 2, 0), len(m.shape))),
            both[-len(m.shape) :],
            True,
        )
        for m in matrix
    ]
    out = a.pointwise(call.title, seen, *whole)
    same = [
        expand_plain(out, s) if s == rhs.shape else _lu_result(call, matrix, s) for s in call.shapes
    ]
    return numbered(same)


def _lu_result(call: RuleContext, matrix: list[Ownership], shape: tuple[int, ...]) -> Ownership:
    """What a solver returns beside the solution comes from the matrix alone."""
    m = matrix[0]
    dims = [len(m.shape) - 2, len(m.shape) - 1]
    return _matrix_result(
        collapse(call.algebra.scan("factors", m, dims), dims, False), shape, len(m.shape) - 2, 0
    )


def _matrix_result(out: Ownership, shape: tuple[int, ...], lead: int, i: object) -> Ownership:
    for _ in range(len(shape) - lead):
        out = unsqueeze(out, len(out.shape))
    return expand_plain(out, shape).with_key(i)


# --- windows and grids ----------------------------------------------------------------------------


# By how many dims at the end are positions.
POSITIONS = {
    1: (
        "avg_pool1d max_pool1d upsample_nearest1d upsample_linear1d _upsample_nearest_exact1d "
        "reflection_pad1d replication_pad1d"
    ),
    2: (
        "avg_pool2d max_pool2d_with_indices _adaptive_avg_pool2d adaptive_max_pool2d upsample_nearest2d "
        "upsample_bilinear2d upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa "
        "_upsample_nearest_exact2d reflection_pad2d replication_pad2d col2im max_unpool2d "
        "mkldnn_max_pool2d mkldnn_adaptive_avg_pool2d fractional_max_pool2d"
    ),
    3: (
        "avg_pool3d max_pool3d_with_indices _adaptive_avg_pool3d adaptive_max_pool3d upsample_nearest3d "
        "upsample_trilinear3d reflection_pad3d replication_pad3d im2col"
    ),
}


SPATIAL = {name: dims for dims, names in POSITIONS.items() for name in names.split()}


@rule(*SPATIAL)
def windows(call: RuleContext) -> Any:
    """Positions (the last dims) see windows of positions; leading dims are left alone."""
    x = call.marks[0]
    count = min(SPATIAL[call.name], len(x.shape))
    seen = call.algebra.scan(call.title, x, range(len(x.shape) - count, len(x.shape)))
    others = call.marks[1:]
    if others:
        seen = call.algebra.pointwise(
            call.title,
            seen,
            *(
                call.algebra.scan("index", m, range(len(m.shape) - count, len(m.shape)))
                for m in others
            ),
        )
    lead = len(x.shape) - count
    return [window_result(seen, s, lead).with_key(i) for i, s in enumerate(call.shapes)]


def window_result(x: Ownership, shape: tuple[int, ...], lead: int) -> Ownership:
    x = squeeze(
        replace(x, shape=(*x.shape[:lead], *[1] * (len(x.shape) - lead))), range(lead, len(x.shape))
    )
    for _ in range(len(shape) - lead):
        x = unsqueeze(x, len(x.shape))
    return expand_plain(x, shape)


@rule("grid_sampler_2d", "grid_sampler_3d")
def grid_sample(call: RuleContext) -> Ownership:
    a, x, grid = call.algebra, call["input"], call["grid"]
    space = list(range(2, len(x.shape)))
    seen = collapse(a.scan("space", x, space), space, True)
    points = permute(grid, [0, len(grid.shape) - 1, *range(1, len(grid.shape) - 1)])
    points = collapse(a.scan("point", points, [1]), [1], True)
    return a.pointwise(call.title, seen, points)


@rule("affine_grid_generator")
def affine_grid(call: RuleContext) -> Ownership:
    theta = collapse(call.algebra.scan(call.title, call["theta"], [1, 2]), [1, 2], False)
    return _matrix_result(theta, call.shape, 1, 0)


# --- lookups in a table ---------------------------------------------------------------------------


@rule("embedding")
def embedding(call: RuleContext) -> Ownership:
    if call["indices"].owned:
        call.algebra.consume_alone(call["weight"])
    table = collapse(call.algebra.scan("rows", call["weight"], [0]), [0], False)
    return call.algebra.pointwise(
        "embedding", unsqueeze(call["indices"], len(call["indices"].shape)), table
    )
