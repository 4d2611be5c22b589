"""Rules for what layers are made of: contractions, convolutions, attention, matrices, tables.

Windows over positions are in ``windows.py``, recurrences in ``recurrences.py``, normalisations in
``reductions.py``.

Index letters: n sample (here: any leading dim), c class or channel, o/i output and input feature,
t/s positions, b further leading dims, g group of channels, h head.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from unbatch.analysis.domain.ownership import (
    Ownership,
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
from unbatch.analysis.rules.registry import (
    EVERY,
    NO_RULE,
    RuleContext,
    all_mixed,
    filled,
    known_for_every_batch,
    mixed,
    numbered,
    rule,
    shared_outputs,
    stack,
    summary,
    unused,
)
from unbatch.capture import ops

# --- contractions ---------------------------------------------------------------------------------


PRODUCTS = {
    ("ni", "io", "no"): "mm addmm _addmm_activation _sparse_addmm",
    ("bni", "bio", "bno"): "bmm baddbmm",
    ("bni", "bio", "no"): "addbmm",
    ("ni", "i", "n"): "mv addmv",
    ("i", "i", ""): "dot",
    ("n", "o", "no"): "addr ger",
}

CONTRACTIONS = {name: letters for letters, names in PRODUCTS.items() for name in names.split()}


@rule(*CONTRACTIONS)
def matmul(call: RuleContext) -> Ownership:
    """A product of two matrices or vectors, added to a third argument, if there is one."""
    # Factors come last in all of these ops, and what is added first.
    *added, left, right = call.tensors
    left_letters, right_letters, out = CONTRACTIONS[call.name]
    product = call.algebra.contract("mul", (left, right), (left_letters, right_letters), out)
    if not added:
        return product
    # The activation after the sum makes it a function like any other.
    kind = "" if call.name == "_addmm_activation" else "sub"
    return call.algebra.pointwise(call.title, *added, product, kind=kind)


@rule("vdot")
def conjugate_product(call: RuleContext) -> Ownership:
    """A product of two vectors, of which the first is conjugated."""
    return call.algebra.contract("vdot", [call["self"], call["other"]], ("i", "i"), "")


@rule("linear", counted=EVERY)
def linear(call: RuleContext) -> Ownership:
    """A product with a matrix over the last dim."""
    x, w = call["input"], call["weight"]
    lead = "abdefgh"[: len(x.shape) - 1]  # all letters but those of features
    out = call.algebra.contract("mul", [x, w], (lead + "i", "oi"), lead + "o")
    if call["bias"] is None:
        return out
    return call.algebra.pointwise("bias", out, call["bias"])


@rule("_trilinear", counted=EVERY)
def trilinear(call: RuleContext) -> Ownership:
    """A product of three values with dims inserted, summed over some dims."""
    factors = []
    for name, inserted in (("i1", "expand1"), ("i2", "expand2"), ("i3", "expand3")):
        factor = call[name]
        for d in sorted(call[inserted]):
            factor = unsqueeze(factor, d)
        factors.append(factor)
    product = call.algebra.pointwise("mul", *factors)
    if not call["sumdim"]:
        return product
    return call.algebra.reduce("sum", product, call["sumdim"])


@rule("_cdist_forward", "_euclidean_dist", "cdist")
def distances(call: RuleContext) -> Ownership:
    """The distance of each row of one value to each row of the other."""
    x, y = call.tensors
    lead = "abef"[: len(call.shape) - 2]
    # Which norm it is makes no difference to who enters: each pair of rows, with all their entries.
    product = call.algebra.contract(call.title, [x, y], (f"{lead}ni", f"{lead}mi"), f"{lead}nm")
    return call.algebra.pointwise("distance", product)


@rule("_pdist_forward")
def pair_distances(call: RuleContext) -> Ownership:
    """The distances of all pairs of rows, one after the other."""
    # The rows of a pair are not told apart: if samples are rows, every distance counts as mixed.
    pairs = summary(call, "pairs", call["self"], [0, 1], how="pairwise")
    return expand_plain(unsqueeze(pairs, 0), call.shape)


# --- attention ------------------------------------------------------------------------------------


@rule(
    *ops.names(lambda row: row.attention),
    "_scaled_dot_product_attention_math scaled_dot_product_attention",
    apart=dict.fromkeys(range(1, 10), EVERY),
)
def attention(call: RuleContext) -> Any:
    """softmax(q kᵀ + mask) v over the positions of a sequence, with what a kernel keeps beside."""
    a, q = call.algebra, call["query"]
    k, v = _repeat_heads(call["key"], q), _repeat_heads(call["value"], q)
    lead = "bhgef"[: len(q.shape) - 2]
    # The contraction over s below makes each position a function of all others: no mixing, as long
    # as samples lie along ``lead``.
    scores = a.contract("mul", [q, k], (f"{lead}td", f"{lead}sd"), f"{lead}ts")
    scores = _masked(call, scores)
    weights = a.pointwise("softmax", scores, a.reduce("logsumexp", scores, [-1], True))
    if call["dropout_p"]:
        weights = a.pointwise("dropout", weights, shared((), "noise", ["noise"]))
    out = a.contract("mul", [weights, v], (f"{lead}ts", f"{lead}sd"), f"{lead}td")
    normalisation = a.reduce("logsumexp", scores, [-1])
    states = [_attention_state(call, normalisation, shape) for shape in call.shapes[1:]]
    return [out, *states]


def _masked(call: RuleContext, scores: Ownership) -> Ownership:
    """Scores with what masks add to them; the causal mask is a constant of two positions."""
    masks = call.named("attn_mask", "attn_bias")  # kernels call it one or the other
    if masks:
        scores = call.algebra.pointwise("mask", scores, masks[0])
    if call["is_causal"]:
        scores = call.algebra.pointwise("causal", scores, shared(scores.shape[-2:], "causal"))
    return scores


def _repeat_heads(x: Ownership, q: Ownership) -> Ownership:
    """Keys or values of grouped heads: each is that of several heads of queries."""
    # As many heads as queries have, or no dim of heads at all.
    if len(x.shape) < 3 or x.shape[-3] == q.shape[-3]:
        return x
    repeats = q.shape[-3] // x.shape[-3]
    repeated = expand(unsqueeze(x, len(x.shape) - 2), (*x.shape[:-2], repeats, *x.shape[-2:]))
    return reshape(repeated, (*x.shape[:-3], q.shape[-3], *x.shape[-2:]))


def _attention_state(
    call: RuleContext, normalisation: Ownership, shape: tuple[int, ...]
) -> Ownership:
    """What a kernel keeps: the normalisation, padded in some of them; random numbers; weights."""
    if shape == normalisation.shape:
        return normalisation
    lead = len(normalisation.shape) - 1
    if len(shape) <= lead or shape[:lead] != normalisation.shape[:lead]:
        return shared(shape, "state", ["noise"])
    rows = summary(call, "kept", normalisation, [lead])
    return with_new_dims(rows, shape, lead, "kept")


# --- convolutions ---------------------------------------------------------------------------------


CONVOLUTION = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")


@rule("convolution _convolution convolution_overrideable mkldnn_convolution")
def convolution(call: RuleContext) -> Ownership:
    """Channels are contracted within their group; positions see a window.

    With ``x`` as [n, g, i, ..] and the taps of ``w`` [g, o, i, ..] taken together, a convolution is
    ``ngi.., goi -> ngo..``. The leading dim is left alone.
    """
    a, groups = call.algebra, call["groups"]
    # MKL's form calls its input otherwise.
    x = call["self"] if call["input"] is None else call["input"]
    sizes = x.shape[2:]
    space = range(2, len(x.shape))
    # Plain positions need no scan: all are functions of the same samples, by index, and so are
    # windows of them. Only where samples lie along a position does a window mix them.
    if _reaches_out(call, x):
        x = a.scan("window", x, _stored(x, space))
    n, channels = x.shape[:2]
    x = replace(x, shape=(n, channels, *call.shape[2:]))
    x = reshape(x, (n, groups, channels // groups, *x.shape[2:]))
    w = _grouped_weight(call, channels // groups)
    # All taps of a weight are used for each output, in an order that is part of the op's name.
    w = summary(call, "taps", w, range(3, len(w.shape)))
    name = (call.name, repr([call[k] for k in CONVOLUTION]), sizes)
    letters = "xyz"[: len(space)]
    y = a.contract(name, [x, w], (f"ngi{letters}", "goi"), f"ngo{letters}")
    return channelwise(call, "bias", reshape(y, call.shape), call["bias"])


def _reaches_out(call: RuleContext, x: Ownership) -> bool:
    """Some window reaches beyond its own position along a dim where samples lie."""
    space = range(2, len(x.shape))
    if not x.explicit(space):
        return False
    for name, plain in (("stride", 1), ("padding", 0), ("output_padding", 0)):
        widths = set(call[name] or [])  # an op may lack the argument
        if not widths <= {plain}:
            return True
    for d in _stored(x, space):
        if call["weight"].shape[d] > 1 or call.shape[d] != x.shape[d]:
            return True
    return False


def _stored(x: Ownership, dims: Iterable[int]) -> list[int]:
    """The dims along which something is stored: samples lie there, or keys that differ."""
    return [d for d in dims if x.key.shape[d] > 1]


def _grouped_weight(call: RuleContext, inputs: int) -> Ownership:
    """The weight as [g, o, i, ..]. PyTorch has [g o, i, ..], transposed [g i, o, ..]."""
    w, groups = call["weight"], call["groups"]
    outputs, taps = call.shape[1] // groups, w.shape[2:]
    if not call["transposed"]:
        return reshape(w, (groups, outputs, inputs, *taps))
    if groups == 1:
        w = permute(w, [1, 0, *range(2, len(w.shape))])
        return reshape(w, (groups, outputs, inputs, *taps))
    w = reshape(w, (groups, inputs, outputs, *taps))
    return permute(w, [0, 2, 1, *range(3, len(w.shape))])


@rule("convolution_backward", apart={0: "input", 1: "weight", 2: "input weight"})
def convolution_backward(call: RuleContext) -> Any:
    """By the input: a convolution again. By the weight and the bias: sums over the leading dim."""
    a, g, x, w = call.algebra, call["grad_output"], call["input"], call["weight"]
    space = range(2, len(g.shape))
    # Channels would be contracted within groups, and windows would mix samples: not followed.
    if call["groups"] != 1 or g.explicit(space) or x.explicit(space):
        return [mixed(call, s, NO_RULE) if s else None for s in call.shapes]
    g, x = summary(call, "window", g, space), summary(call, "window", x, space)
    w = summary(call, "window", w, space)
    oi = "io" if call["transposed"] else "oi"
    gradients = (
        a.contract((call.title, 0), [g, w], ("no", oi), "ni"),
        a.contract((call.title, 1), [g, x], ("no", "ni"), oi),
        a.reduce("sum", g, [0]),
    )
    # Of the three gradients those with a mask of True are returned.
    shapes = iter(call.shapes)
    results = []
    for m, used in zip(gradients, call["output_mask"], strict=True):
        if used:
            results.append(with_new_dims(m, next(shapes), len(m.shape), 0))
    return results


# --- matrices -------------------------------------------------------------------------------------


@rule(
    "cholesky linalg_cholesky_ex linalg_inv_ex _linalg_eigh linalg_qr _linalg_svd _linalg_det "
    "_linalg_slogdet linalg_lu_factor_ex linalg_matrix_exp cholesky_inverse linalg_lu linalg_pinv "
    "linalg_eig _linalg_eigvals linalg_ldl_factor_ex lu_unpack linalg_householder_product ormqr "
    "geqrf linalg_lstsq linalg_polar linalg_matrix_sqrth"
)
def matrices(call: RuleContext) -> Any:
    """Functions of the matrices in the last two dims, separately for each index before them."""
    whole = []
    ndim = max(2, *(len(m.shape) for m in call.tensors))
    for m in call.tensors:
        # Beside matrices: a vector for each, as pivots are, or a number, as a tolerance is.
        while len(m.shape) < ndim:
            m = unsqueeze(m, len(m.shape))
        whole.append(_whole_matrix(call, "matrix", m))
    out = call.algebra.pointwise(call.title, *whole)
    lead = len(out.shape)
    # Whatever comes out (factors, eigenvalues, a number), each entry depends on the whole matrix.
    results = []
    for i, shape in enumerate(call.shapes):
        if 0 in shape:
            results.append(shared(shape, "empty"))
        else:
            results.append(with_new_dims(out, shape, lead, i))
    return results


def _whole_matrix(call: RuleContext, name: str, m: Ownership) -> Ownership:
    """One entry in place of the matrices in the last two dims."""
    return summary(call, name, m, [len(m.shape) - 2, len(m.shape) - 1])


def with_new_dims(x: Ownership, shape: tuple[int, ...], lead: int, name: object) -> Ownership:
    """Return ``x`` of shape ``shape``: behind ``lead`` dims all depends on the same, by index."""
    for _ in range(len(shape) - lead):
        x = unsqueeze(x, len(x.shape))
    return expand_plain(x, shape).with_key(name)


@rule(
    "linalg_solve_triangular triangular_solve cholesky_solve _linalg_solve_ex linalg_lu_solve",
    apart=dict.fromkeys(range(1, 4), "B self"),
)
def solve(call: RuleContext) -> Any:
    """Columns of the right-hand side (rows, if it stands on the left) are solved one by one."""
    rhs = call["self"] if call["B"] is None else call["B"]
    # By identity, as the argument's name differs from op to op.
    others = [m for m in call.tensors if m is not rhs]
    is_vector = call.name == "_linalg_solve_ex" and rhs.shape == others[0].shape[:-1]
    if is_vector:
        rhs = unsqueeze(rhs, len(rhs.shape))
    along = len(rhs.shape) - 2
    if call["left"] is False:
        along += 1
    columns = summary(call, "solve", rhs, [along], True)
    # Everything else is used as a whole for each column.
    whole = [_solver_operand(call, m) for m in others]
    solution = call.algebra.pointwise(call.title, columns, *whole)
    if is_vector:
        solution = squeeze(solution, [len(solution.shape) - 1])
    # What a solver returns beside the solution comes from the matrix alone.
    factors = _whole_matrix(call, "factors", others[0])
    lead = len(factors.shape)
    beside = [with_new_dims(factors, shape, lead, 0) for shape in call.shapes[1:]]
    return numbered([expand_plain(solution, call.shape), *beside])


def _solver_operand(call: RuleContext, m: Ownership) -> Ownership:
    """A matrix (or the pivots of its factors) with one entry left in its last two dims."""
    if m is call["pivots"]:
        m = unsqueeze(m, len(m.shape))
    return summary(call, "matrix", m, [len(m.shape) - 2, len(m.shape) - 1], True)


# --- lookups in a table ---------------------------------------------------------------------------


@rule("embedding", counted="padding_idx scale_grad_by_freq sparse")
def embedding(call: RuleContext) -> Ownership:
    """Each index takes a row of the table, whichever it is."""
    indices, table = call["indices"], call["weight"]
    row = summary(call, "rows", table, [0])
    return call.algebra.pointwise("embedding", unsqueeze(indices, len(indices.shape)), row)


@rule(
    "_embedding_bag _embedding_bag_forward_only embedding_bag",
    counted="offsets scale_grad_by_freq sparse",
    apart={1: EVERY, 2: EVERY, 3: EVERY},
)
def embedding_bag(call: RuleContext) -> Any:
    """Rows of a table, summed over the runs of a flat index that fixed offsets mark."""
    a, index, offsets = call.algebra, call["indices"], call.values.get("offsets")
    if offsets is None or not known_for_every_batch(call["offsets"]):
        if call.depends_on_batch:
            return all_mixed(call, NO_RULE)
        return shared_outputs(call, call.title)
    row = summary(call, "rows", call["weight"], [0])
    if call["per_sample_weights"] is not None:
        index = a.pointwise("weigh", index, call["per_sample_weights"])
    flat = spell_out(index)
    stops = [*offsets[1:].tolist(), index.shape[0]]
    if call["include_last_offset"]:  # the end of the last bag is no bag of its own
        stops.pop()
    bags = []
    empty = filled((), "empty bag")
    for start, stop in zip(offsets, stops, strict=False):
        run = slice(start, stop)
        members = replace(flat, shape=(stop - start,), owner=flat.owner[run], key=flat.key[run])
        bags.append(a.reduce("bag", members) if stop > start else empty)
    out = a.pointwise(call.title, unsqueeze(stack(a, bags), 1), row)
    return [out, *unused(call)]
