"""Rules for whole layers that are one op, recurrent ones and encoders.

Time runs inside, sequences are left alone. Every step of a sequence is taken to depend on all of
that sequence, its first states and all weights: what is told apart is whose the values are, not
when.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from unbatch.analysis.domain.ownership import (
    Ownership,
    collapse,
    expand_plain,
    mix,
    moved,
    permute,
    shared,
    spell_out,
    squeeze,
    unsqueeze,
)
from unbatch.analysis.rules.elementwise import noise
from unbatch.analysis.rules.registry import RuleContext, numbered, rule, unknown


def alike(call: RuleContext, name: str, x: Ownership, dims: Sequence[int]) -> Ownership:
    """Everything along ``dims`` depends on everything along them."""
    return collapse(call.algebra.scan(name, x, dims), list(dims), True)


def whole(call: RuleContext, weights: Sequence[Ownership]) -> list[Ownership]:
    """Weights that every step of every sequence reads as a whole."""
    out = []
    for w in weights:
        dims = list(range(len(w.shape)))
        out.append(collapse(call.algebra.scan("weight", w, dims), dims, False))
    return out


@rule("mkldnn_rnn_layer")
def mkldnn_layer(call: RuleContext) -> Any:
    """A recurrence over the first dim; the second dim is left alone."""
    seen = alike(call, "time", call["input"], [0, 2])
    states = []
    for name in ("hx_", "cx_"):
        state = call[name]
        state = unsqueeze(state, 0) if len(state.shape) == 2 else state
        states.append(alike(call, "state", state, [0, 2]))
    weights = whole(call, [call[f"weight{i}"] for i in range(4) if call[f"weight{i}"] is not None])
    out = call.algebra.pointwise(call.title, seen, *states, *weights)
    return numbered([_of_layer(out, s) for s in call.shapes])


def _of_layer(out: Ownership, shape: tuple[int, ...]) -> Ownership:
    if len(shape) == 3:
        return expand_plain(out, shape)
    return expand_plain(squeeze(out, [0]), shape) if len(shape) == 2 else shared(shape, "workspace")


@rule("_cudnn_rnn", "miopen_rnn")
def device_recurrence(call: RuleContext) -> Any:
    """All layers, directions and steps at once: [time, n, i], or [n, time, i], or packed; states are [layer, n, o]."""
    weights = whole(call, call["weight"])
    states = [alike(call, "state", h, [0, 2]) for h in (call["hx"], call["cx"]) if h is not None]
    if call["train"] and call["dropout"]:
        weights.append(noise(replace(call, shapes=[()])))
    if call["batch_sizes"]:
        last, steps = _packed(call, states, weights)
    else:
        seen = alike(call, "time", call["input"], [1, 2] if call["batch_first"] else [0, 2])
        seen = permute(seen, [1, 0, 2]) if call["batch_first"] else seen
        last = call.algebra.pointwise(call.title, seen, *states, *weights)
        steps = permute(last, [1, 0, 2]) if call["batch_first"] else last
    out, hy, cy, *rest = call.shapes
    parts = [expand_plain(steps, out), expand_plain(last, hy)]
    parts.append(expand_plain(last, cy) if call["cx"] is not None else shared(cy, "no cell"))
    return numbered([*parts, *(shared(s, "workspace", ["parameters"]) for s in rest)])


def _packed(
    call: RuleContext, states: Sequence[Ownership], weights: Sequence[Ownership]
) -> tuple[Ownership, Ownership]:
    """Step t holds the first ``batch_sizes[t]`` sequences, one row each. Returns sequences, and the rows."""
    a, sizes = call.algebra, call["batch_sizes"]
    rows = spell_out(alike(call, "features", call["input"], [1]))
    member = np.concatenate([np.arange(size) for size in sizes])  # whose a row is
    moment = np.repeat(np.arange(len(sizes)), sizes)
    sequences = []
    for n in range(sizes[0]):
        own = member == n
        part = replace(rows, shape=(int(own.sum()), 1), owner=rows.owner[own], key=rows.key[own])
        sequences.append(collapse(a.scan("time", part, [0]), [0, 1], False))
    owner, key = np.stack([s.owner for s in sequences]), np.stack([s.key for s in sequences])
    seen = a.result((len(sequences),), owner, key, sequences, "joined")
    last = a.pointwise(call.title, unsqueeze(unsqueeze(seen, 0), 2), *states, *weights)
    by_row = spell_out(moved(squeeze(last, [0, 2]), lambda place: place[member], (len(member),)))
    by_row = replace(by_row, key=mix(by_row.key, moment.astype(np.uint64)))
    return last, unsqueeze(by_row, 1)


@rule("_pack_padded_sequence")
def packing(call: RuleContext) -> Any:
    """Rows of the steps of sequences, longest first, without what is padded; the lengths have to be constants."""
    x, lengths = call["input"], call.values.get("lengths")
    if (
        lengths is None
        or call["lengths"].depends_on_batch
        or call["lengths"].sources & {"inputs", "targets"}
    ):
        return unknown(call)
    if call["batch_first"]:
        x = permute(x, [1, 0, *range(2, len(x.shape))])
    steps, batch = x.shape[:2]
    running = np.asarray(lengths)[None] > np.arange(steps)[:, None]
    rows = np.flatnonzero(running)
    data = moved(x, lambda place: place.reshape(steps * batch, *x.shape[2:])[rows], call.shape)
    return [data, shared(call.shapes[1], call.title)]


# --- the fast path of transformers, which has no derivatives --------------------------------------


@rule("_transformer_encoder_layer_fwd")
def encoder_layer(call: RuleContext) -> Ownership:
    """A whole encoder layer; [n, t, i]."""
    return expand_plain(_encoded(call, call["src"], call.marks[1:]), call.shape)


@rule("_native_multi_head_attention")
def multi_head_attention(call: RuleContext) -> Any:
    """Attention with its projections; [n, t, i], and attention weights."""
    encoded = [call["query"], call["key"], call["value"]]
    seen = [alike(call, "sequence", x, [1, 2]) for x in encoded]
    out = _encoded(call, call.algebra.pointwise("attended", *seen), call.marks[3:])
    results = [expand_plain(out, call.shape)]
    for shape in call.shapes[1:]:
        weights = out if len(shape) == 3 else unsqueeze(out, 3)
        known = len(shape) > 2
        results.append(expand_plain(weights, shape) if known else shared(shape, "no weights"))
    return numbered(results)


def _encoded(call: RuleContext, x: Ownership, others: Sequence[Ownership]) -> Ownership:
    seen = alike(call, "sequence", x, [1, 2])
    masks = [] if call["mask"] is None else [_mask(call)]
    weights = whole(call, [w for w in others if w is not call["mask"]])
    return call.algebra.pointwise(call.title, seen, *weights, *masks)


def _mask(call: RuleContext) -> Ownership:
    """``mask_type``: 0 for [t, s], the same for all; 1 for [n, s]; 2 for [n, head, t, s]."""
    mask = call["mask"]
    if call["mask_type"] == 0:
        return whole(call, [mask])[0]
    seen = alike(call, "mask", mask, range(1, len(mask.shape)))
    by_sample = squeeze(seen, range(1, len(mask.shape)))
    return unsqueeze(unsqueeze(by_sample, 1), 1)
