"""Where the samples lie in a value: every question about it, asked of the same few values."""

import numpy as np
import pytest
import torch

from unbatch.analysis.domain.ownership import (
    MIXED,
    SHARED,
    Ownership,
    batched,
    follow_samples,
    group_owner,
    shared,
)
from unbatch.analysis.domain.sample_layout import (
    PADDED,
    Layout,
    Ragged,
    Scattered,
    SeveralAxes,
    any_layout_of,
    contiguous_blocks,
    in_its_group,
    in_its_place,
    in_order,
    layout_of,
    prediction_dim,
    uniform,
)
from unbatch.analysis.domain.sample_sets import SampleSets

N = 3


def owned_by(*owners):
    owner = np.array(owners, dtype=np.int32)
    return Ownership(owner.shape, owner, np.zeros(owner.shape, dtype=np.uint64))


VALUES = {
    "one slice each": batched([N, 2], 0, "x"),
    "along the second axis": batched([2, N], 1, "x"),
    "blocks": owned_by(0, 0, 1, 1, 2, 2),
    "interleaved": owned_by(0, 1, 2, 0, 1, 2),
    "another order": owned_by(0, 1, 1, 2, 2, 0),
    "flipped": owned_by(2, 1, 0),
    "uneven": owned_by(0, 0, 0, 1, 2),
    "partly shared": owned_by(0, SHARED, 2),
    "mixed": owned_by(0, MIXED, 2),
    "of a group": owned_by(0, group_owner(0), 2),
    "shared": shared([N, 2], "w"),
}

# by value: sample_dim, prediction_dim, in_its_place, layout_of, in_order
ANSWERS = {
    "one slice each": (0, 0, True, Layout(0, N), True),
    "along the second axis": (1, 1, True, Layout(1, N), True),
    "blocks": (None, None, True, Layout(0, N, 2), True),
    "interleaved": (None, None, False, Layout(0, N, 2, "tn"), True),
    "another order": (None, None, False, Layout(0, N, 2, (0, 5, 1, 2, 3, 4)), False),
    "flipped": (None, 0, False, Layout(0, N, 1, (2, 1, 0)), False),
    "uneven": (None, None, False, None, True),
    "partly shared": (0, 0, True, Layout(0, N), True),
    "mixed": (None, 0, False, None, None),
    "of a group": (None, 0, False, None, None),
    "shared": (None, 0, True, None, None),
}


@pytest.mark.parametrize("name", VALUES)
def test_the_answers_fit_together(name):
    value = VALUES[name]
    sample_dim, dim, in_place, layout, order = ANSWERS[name]
    assert value.sample_dim() == sample_dim
    assert prediction_dim(value, N) == dim
    assert in_its_place(value, N, leading=True) == in_place
    assert layout_of(value, N) == layout
    if order is not None:
        assert in_order(value, N) == order


def test_a_set_is_in_place_where_its_samples_are():
    sets = SampleSets(N)
    pair = sets.owner_of(np.array([True, False, True]))
    assert in_its_group(owned_by(pair, 1, pair), sets, leading=True)
    assert in_its_group(owned_by(pair, SHARED, 2), sets, leading=True)
    assert not in_its_group(owned_by(pair, pair, 2), sets, leading=True)
    assert not in_its_group(owned_by(pair, MIXED, 2), sets, leading=True)
    assert not in_its_group(owned_by(2, 1, 0), sets, leading=True)


@pytest.mark.parametrize(
    "name", [n for n, (*_, layout, _) in ANSWERS.items() if isinstance(layout, Layout)]
)
def test_a_layout_brings_the_entries_of_each_sample_to_the_front(name):
    value, layout = VALUES[name], layout_of(VALUES[name], N)
    owner = torch.from_numpy(np.broadcast_to(value.owner, value.shape).copy())
    rows = layout.split(owner)
    assert torch.equal(layout.join(rows), owner)
    for n, row in enumerate(rows):
        assert set(row.flatten().tolist()) <= {n, SHARED}


def test_equal_functions_are_told_from_others():
    different = Ownership((N,), np.arange(N, dtype=np.int32), np.arange(N, dtype=np.uint64))
    assert uniform(batched([N, 2], 0, "x"), N, leading=True)
    assert uniform(VALUES["blocks"], N, leading=True)
    assert not uniform(different, N, leading=True)
    assert contiguous_blocks(VALUES["interleaved"], N) is None


def test_samples_out_of_order_do_not_pass_for_their_own_slices():
    """A planted bug: looking at the set of owners only, and not at their places."""
    owner = np.array([1, 0, 2], dtype=np.int32)
    assert set(owner) == set(range(N))
    assert not follow_samples(owner, 0, N)


# --- samples of different lengths -----------------------------------------------------------------


def uneven(dim):
    """Sample 0 has three entries along ``dim``, sample 1 one and sample 2 two."""
    owner = np.array([0, 2, 0, 1, 2, 0], dtype=np.int32)
    owner = np.moveaxis(np.broadcast_to(owner[:, None], (6, 2)), 0, dim).copy()
    return Ownership(owner.shape, owner, np.zeros(owner.shape, dtype=np.uint64))


@pytest.mark.parametrize("dim", [0, 1])
def test_samples_of_different_lengths_are_filled_up_with_zeros(dim):
    layout = any_layout_of(uneven(dim), N)
    assert isinstance(layout, Ragged)
    assert layout.dim == dim
    t = torch.arange(1.0, 13).reshape(6, 2).movedim(0, dim)
    split = layout.split(t).movedim(1 + dim, 1)  # [n, entry, 2]
    expected = [[0, 2, 5], [3], [1, 4]]
    for n, places in enumerate(expected):
        assert torch.equal(split[n, : len(places)], t.movedim(dim, 0)[places])
        assert not split[n, len(places) :].any()


@pytest.mark.parametrize("dim", [0, 1])
def test_samples_of_different_lengths_alone_and_scaled(dim):
    layout = any_layout_of(uneven(dim), N)
    t = torch.randn(6, 2).movedim(0, dim)
    alone = layout.only(t, 0, N)
    assert torch.equal(alone.sum(0), t)
    for n in range(N):
        assert torch.equal(layout.split(alone[n])[n], layout.split(t)[n])
    weights = torch.tensor([2.0, 3.0, 5.0])
    expected = (alone * weights[:, None, None]).sum(0)
    assert torch.equal(layout.scaled(t, weights), expected)
    assert torch.equal(layout.only(t, 1, 2)[0], alone[1])


def test_one_long_sample_among_many_is_not_filled_up_to():
    samples = 10 * PADDED
    owner = np.concatenate([np.zeros(samples), np.arange(1, samples)]).astype(np.int32)
    value = Ownership(owner.shape, owner, np.zeros(owner.shape, dtype=np.uint64))
    assert isinstance(any_layout_of(value, samples), Scattered)


# --- samples along several axes -------------------------------------------------------------------

# The shape of a value, the axes of samples in the order in which these are counted, and how many
# entries follow on each other that belong to one sample.
SEVERAL = {
    "tokens": ((2, 3, 5), (0, 1), 1),
    "tokens, time first": ((3, 2, 5), (1, 0), 1),
    "pixels": ((2, 4, 3, 2), (0, 2, 3), 1),
    "pixels of one image": ((1, 4, 3, 2), (2, 3), 1),
    "pairs of columns": ((2, 3, 4), (0, 2), 2),
}


def along(shape, dims, block):
    """Entries along ``dims`` counted through, ``block`` of which belong to a sample."""
    sizes = [shape[d] for d in dims]
    others = [d for d in range(len(shape)) if d not in dims]
    owner = (np.arange(np.prod(sizes), dtype=np.int32) // block).reshape(*sizes, *[1] * len(others))
    owner = np.moveaxis(owner, range(len(shape)), (*dims, *others))
    owner = np.broadcast_to(owner, shape).copy()
    return Ownership(owner.shape, owner, np.zeros(owner.shape, dtype=np.uint64))


@pytest.mark.parametrize("name", SEVERAL)
def test_samples_along_several_axes(name):
    shape, dims, block = SEVERAL[name]
    value = along(shape, dims, block)
    samples = int(value.owner.max()) + 1
    layout = any_layout_of(value, samples)
    assert isinstance(layout, SeveralAxes)
    assert layout.dims == dims
    # Owner by owner, whatever their pattern is.
    plain = Scattered(torch.from_numpy(value.owner).long(), samples)
    t, weights = torch.randn(shape), torch.rand(samples)
    assert torch.equal(layout.only(t, 1, samples), plain.only(t, 1, samples))
    assert torch.equal(layout.scaled(t, weights), plain.scaled(t, weights))
    rows = layout.split(t)
    assert rows.ndim == 1 + t.ndim
    for n in range(samples):
        assert torch.equal(rows[n].flatten().sort()[0], t[plain.owner == n].sort()[0])
    places = layout.places(dims)
    assert (places is None) == (block > 1)
    if places is not None:
        at = [places.get(d, torch.zeros(samples, dtype=torch.long)) for d in range(t.ndim)]
        assert plain.owner[tuple(at)].tolist() == list(range(samples))


def test_samples_along_several_axes_in_no_even_pattern():
    owner = np.array([[0, 1], [1, 1]], dtype=np.int32)
    value = Ownership(owner.shape, owner, np.zeros(owner.shape, dtype=np.uint64))
    layout = any_layout_of(value, 2)
    t = torch.arange(1.0, 5).reshape(2, 2)
    assert layout.only(t, 0, 2).tolist() == [[[1, 0], [0, 0]], [[0, 2], [3, 4]]]
    assert layout.split(t).flatten(1).tolist() == [[1, 0, 0], [2, 3, 4]]
