"""Rules for whole layers that are one op, recurrent ones and encoders.

Time runs inside, sequences are left alone. Every step of a sequence is taken to depend on all of
that sequence, its first states and all weights: the rules say whose the values are, not when.

Index letters: n sample (a sequence), t time, i/o input and output feature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from unbatch.analysis.domain.ownership import (
    Ownership,
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
from unbatch.analysis.rules.registry import (
    EVERY,
    RuleContext,
    known_for_every_batch,
    numbered,
    rule,
    stack,
    summary,
    unknown,
)
from unbatch.capture import ops

# --- recurrences ----------------------------------------------------------------------------------


def whole(call: RuleContext, weights: Sequence[Ownership]) -> list[Ownership]:
    """Return weights of which every step of every sequence reads all."""
    return [summary(call, "weight", w, range(len(w.shape))) for w in weights]


@rule("mkldnn_rnn_layer", apart={3: EVERY})
def mkldnn_layer(call: RuleContext) -> Any:
    """A recurrence over the first dim; the second dim is left alone."""
    sequences = summary(call, "time", call["input"], [0, 2], True)
    states = _states(call, [call["hx_"], call["cx_"]])
    weights = whole(call, call.named("weight0", "weight1", "weight2", "weight3"))
    out = call.algebra.pointwise(call.title, sequences, *states, *weights)
    return numbered([_of_layer(out, shape) for shape in call.shapes])


def _states(call: RuleContext, states: Sequence[Ownership]) -> list[Ownership]:
    """First states [layer, n, o], or [n, o] of a single layer, as [1, n, 1]."""
    whole_states = []
    for state in states:
        if len(state.shape) == 2:
            state = unsqueeze(state, 0)
        # All layers and features: which of them a step reads is not told apart.
        whole_states.append(summary(call, "state", state, [0, 2], True))
    return whole_states


def _of_layer(out: Ownership, shape: tuple[int, ...]) -> Ownership:
    """An output of a layer: steps [t, n, o], a state [n, o], or memory for the backward pass."""
    if len(shape) == 3:
        return expand_plain(out, shape)
    if len(shape) == 2:
        return expand_plain(squeeze(out, [0]), shape)
    return shared(shape, "workspace")


@rule(
    *ops.names(lambda row: row.recurrence),
    counted="batch_sizes batch_first",
    ignored="weight_buf dropout_state",
    apart={3: EVERY, 4: EVERY},
)
def device_recurrence(call: RuleContext) -> Any:
    """All layers, directions and steps at once.

    Inputs are [t, n, i], or [n, t, i], or packed; states are [layer, n, o].
    """
    weights = whole(call, call["weight"])
    states = _states(call, call.named("hx", "cx"))
    if call["train"] and call["dropout"]:
        # Dropout between layers: noise of every sample's own, which one scalar stands for.
        weights.append(noise(replace(call, shapes=[()])))
    if call["batch_sizes"]:
        rows = summary(call, "features", call["input"], [1], True)
        last, steps = _packed(call, rows, call["batch_sizes"], states, weights)
    elif call["batch_first"]:
        sequences = permute(summary(call, "time", call["input"], [1, 2], True), [1, 0, 2])
        last = call.algebra.pointwise(call.title, sequences, *states, *weights)
        steps = permute(last, [1, 0, 2])
    else:
        sequences = summary(call, "time", call["input"], [0, 2], True)
        last = steps = call.algebra.pointwise(call.title, sequences, *states, *weights)
    out, hy, cy, *rest = call.shapes
    cell = shared(cy, "no cell")
    if call["cx"] is not None:
        cell = expand_plain(last, cy)
    # Memory for the backward pass, which no model reads.
    workspace = [shared(shape, "workspace", ["parameters"]) for shape in rest]
    return numbered([expand_plain(steps, out), expand_plain(last, hy), cell, *workspace])


@rule("unbatch::recurrent_states", counted="sizes")
def states_of_layer(call: RuleContext) -> Any:
    """The state before each step, and perhaps after it; of inputs [t, n, i], or packed."""
    steps, _ = _layer(call, call.named("x"), call["weights"])
    before, after = call.shapes
    if not after[0]:
        return numbered([expand_plain(steps, before), shared(after, "no projection")])
    return numbered([expand_plain(steps, before), expand_plain(steps, after)])


@rule("unbatch::recurrent_cells", counted="sizes", apart={3: EVERY, 4: EVERY, 5: EVERY})
def cells_of_layer(call: RuleContext) -> Any:
    """Outputs, last states and last cells; of gates [t, n, o], or packed."""
    gates = call.named("input_gates", "hidden_gates", "projected", "previous", "unprojected")
    steps, last = _layer(call, gates, call.named("hidden_weight", "projection"))
    outputs, state, cell, *rest = call.shapes
    results = [expand_plain(steps, outputs), expand_plain(last, state)]
    if call["c"] is None:
        results.append(shared(cell, "no cell"))
    else:
        results.append(expand_plain(last, cell))
    # What derivatives need, which no model reads.
    results += [shared(shape, "workspace", ["parameters"]) for shape in rest]
    return numbered(results)


def _layer(
    call: RuleContext, values: Sequence[Ownership], weights: Sequence[Ownership]
) -> tuple[Ownership, Ownership]:
    """Return the steps of a layer [1, n, 1], or [rows, 1] if packed, and its last state [n, 1]."""
    weights, states = whole(call, weights), _states(call, call.named("h", "c"))
    if call["sizes"]:
        rows = [summary(call, "features", x, [1], True) for x in values]
        joined = call.algebra.pointwise("gates", *rows)
        last, steps = _packed(call, joined, call["sizes"], states, weights)
    else:
        sequences = [summary(call, "time", x, [0, 2], True) for x in values]
        last = steps = call.algebra.pointwise(call.title, *sequences, *states, *weights)
    return steps, squeeze(last, [0])


def _packed(
    call: RuleContext,
    rows: Ownership,
    sizes: Sequence[int],
    states: Sequence[Ownership],
    weights: Sequence[Ownership],
) -> tuple[Ownership, Ownership]:
    """Return the last states [1, n, 1] of packed sequences, and their rows, from ``rows`` [.., 1].

    Step t holds one row of each of the first ``batch_sizes[t]`` sequences: lengths 3 and 1 are
    packed as the rows (n=0, t=0), (n=1, t=0), (n=0, t=1), (n=0, t=2), with batch sizes 2, 1, 1.
    """
    a, rows = call.algebra, spell_out(rows)
    # For sizes 2, 1, 1: n_of_row = [0, 1, 0, 0] and t_of_row = [0, 0, 1, 2].
    n_of_row = np.concatenate([np.arange(size) for size in sizes])
    t_of_row = np.repeat(np.arange(len(sizes)), sizes)
    sequences = []
    for n in range(sizes[0]):
        own = n_of_row == n
        part = replace(rows, shape=(int(own.sum()), 1), owner=rows.owner[own], key=rows.key[own])
        sequences.append(squeeze(summary(call, "time", part, [0], True), [0, 1]))
    joined = stack(a, sequences)
    last = a.pointwise(call.title, unsqueeze(unsqueeze(joined, 0), 2), *states, *weights)

    # A row is its sequence's, and differs from the other rows of it by its step.
    # Taken from the last states, which depend on all that any row of the sequence depends on.
    by_sequence = squeeze(last, [0, 2])
    by_row = spell_out(moved(by_sequence, lambda place: place[n_of_row], n_of_row.shape))
    by_row = replace(by_row, key=mix(by_row.key, t_of_row.astype(np.uint64)))
    return last, unsqueeze(by_row, 1)


@rule("_pack_padded_sequence", counted="lengths batch_first", apart={1: "input"})
def packing(call: RuleContext) -> Any:
    """Rows of the steps of sequences, longest first, without what is padded.

    The lengths have to be constants, since they decide which row is whose.
    """
    x, lengths = call["input"], call.values.get("lengths")
    if lengths is None or not known_for_every_batch(call["lengths"]):
        return unknown(call)
    if call["batch_first"]:
        x = permute(x, [1, 0, *range(2, len(x.shape))])
    steps, batch = x.shape[:2]
    # Step by step, the sequences that are not over yet.
    running = np.asarray(lengths)[None] > np.arange(steps)[:, None]  # [t, n]
    # In row-major order of [t, n], which is the order of a packed sequence.
    rows = np.flatnonzero(running)
    flat = (steps * batch, *x.shape[2:])
    data = moved(x, lambda place: place.reshape(flat)[rows], call.shape)
    return [data, shared(call.shapes[1], call.title)]


# --- the fast path of transformers, which has no derivatives --------------------------------------


@rule("_transformer_encoder_layer_fwd")
def encoder_layer(call: RuleContext) -> Ownership:
    """A whole encoder layer; [n, t, i]."""
    return expand_plain(_encoded(call, call["src"], call.tensors[1:]), call.shape)


@rule("_native_multi_head_attention")
def multi_head_attention(call: RuleContext) -> Any:
    """Attention with its projections; [n, t, i], and attention weights."""
    operands = call.named("query", "key", "value")
    sequences = [summary(call, "sequence", x, [1, 2], True) for x in operands]
    attended = call.algebra.pointwise("attended", *sequences)
    out = _encoded(call, attended, call.tensors[3:])
    results = [expand_plain(out, call.shape)]
    for shape in call.shapes[1:]:
        if len(shape) == 3:
            results.append(expand_plain(out, shape))
        elif len(shape) == 4:  # for each head
            results.append(expand_plain(unsqueeze(out, 3), shape))
        else:
            results.append(shared(shape, "no weights"))
    return numbered(results)


def _encoded(call: RuleContext, x: Ownership, others: Sequence[Ownership]) -> Ownership:
    """A function of each sequence as a whole, of its mask, and of all weights."""
    sequences = summary(call, "sequence", x, [1, 2], True)
    # The mask is no weight: it may be the samples', and is left with an axis for them.
    weights = whole(call, [w for w in others if w is not call["mask"]])
    masks = []
    if call["mask"] is not None:
        masks.append(_mask(call))
    return call.algebra.pointwise(call.title, sequences, *weights, *masks)


def _mask(call: RuleContext) -> Ownership:
    """``mask_type``: 0 for [t, s], the same for all; 1 for [n, s]; 2 for [n, head, t, s]."""
    mask = call["mask"]
    if call["mask_type"] == 0:
        return whole(call, [mask])[0]
    by_sample = summary(call, "mask", mask, range(1, len(mask.shape)))
    return unsqueeze(unsqueeze(by_sample, 1), 1)
