"""The abstract value: which sample owns each element, and which function of it the element is.

Here live the vocabulary (``Ownership``), owners, keys, and what moves elements without computing.
How ownership passes through computations is in ``propagation.py``. No op names of any framework,
no tensor values.

An element's *owner* is one number: a sample ``0..N-1``, or ``SHARED`` (the same for every
sample), or ``MIXED`` (of several samples, in no symmetric way), or the owner of a group (a
statistic of a set of samples, see ``group_owner``). For people a value is *shared*, has *one
slice per sample*, is a *total* or a *statistic* of the batch, or is *mixed*; these words are read
off the owners and are no classes.

Its *key* is a structural hash: an element with owner ``n`` and key ``k`` is ``phi_k(x_n, shared
values, statistics)``. Two elements with equal keys are the *same* function, of their own samples.
Equal keys are a proof up to hash collisions (64 bit), and different keys prove nothing.

Arrays are stored compressed. A dim of size one in the arrays, where the value has more, is
*plain*: the owner does not vary along it, and the element's index takes part in the key
implicitly. A dim that the arrays have in full is *explicit*. A batch of two samples with three
features, of shape [2, 3]::

                            owner           key
    plain features          [[0],           [[k],           two numbers for six elements;
                             [1]]            [k]]           element (n, i) has the key "k, at i"
    the same, spelled out   [[0, 0, 0],     [[k0, k1, k2],  ``spell_out``; ``compress`` goes back
                             [1, 1, 1]]      [k0, k1, k2]]  where all keys along a dim differ
    all features equal      [[0, 0, 0],     [[k, k, k],     explicit: an expanded value has no
                             [1, 1, 1]]      [k, k, k]]     index in its keys

So what follows costs as much as there are samples, not as there are pixels.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

SHARED, MIXED = -1, -2  # owners beside the samples 0..N-1
_FIRST_GROUP = -3  # and below: a statistic of a set of samples

# Among sources, while a rule is at work: an argument of its op.
ARGUMENT = "argument "

Array = np.ndarray
Dims = Sequence[int]


# --- owners ---------------------------------------------------------------------------------------


def group_owner(number: int) -> int:
    """Return the owner of what is a statistic of the set of samples with this number."""
    return _FIRST_GROUP - number


def group_number(owner: Array | int) -> Array:
    """Return the numbers of the sets of samples; 0 where the owner is none, see ``is_group``."""
    # 0 is a valid number, so that the answer can be used as an index before it is dropped.
    return np.where(is_group(owner), _FIRST_GROUP - owner, 0)


def is_group(owner: Array | int) -> Array:
    """Tell of every owner whether it is a set of samples, short of all of them."""
    return np.asarray(np.less_equal(owner, _FIRST_GROUP))


def is_sample(owner: Array) -> Array:
    """Tell of every owner whether it is a single sample."""
    return np.asarray(np.greater_equal(owner, 0))


def follow_samples(owner: Array, dim: int, samples: int) -> bool:
    """Tell whether slice n along ``dim`` belongs to sample n, or to none."""
    sample = np.arange(samples, dtype=np.int32).reshape(_along(samples, dim, owner.ndim))
    return bool(((owner == sample) | (owner == SHARED)).all())


# --- shapes ---------------------------------------------------------------------------------------


def with_one(shape: Dims, dims: Iterable[int]) -> tuple[int, ...]:
    """Return ``shape`` with one entry along ``dims``."""
    sizes = list(shape)
    for d in dims:
        sizes[d] = 1
    return tuple(sizes)


def without_dims(shape: Dims, dims: Iterable[int]) -> tuple[int, ...]:
    """Return ``shape`` without the entries for ``dims``."""
    removed = set(dims)
    return tuple(size for d, size in enumerate(shape) if d not in removed)


def normal_dims(dims: Iterable[int], ndim: int) -> list[int]:
    """Return dims, which may count from the end, in order and each once."""
    return sorted({d % ndim for d in dims})


def _along(size: int, dim: int, ndim: int) -> list[int]:
    """The shape that has ``size`` entries along ``dim`` and one along the others."""
    shape = [1] * ndim
    shape[dim] = size
    return shape


# --- keys -----------------------------------------------------------------------------------------


def code(*things: object) -> Array:
    """Return a 64-bit hash of the printed form of ``things``."""
    return _code_of(repr(things))


@lru_cache(maxsize=4096)
def _code_of(printed: str) -> Array:
    # Not Python's own hash, which differs from run to run.
    digest = hashlib.blake2b(printed.encode(), digest_size=8).digest()
    return np.frombuffer(digest, dtype=np.uint64).reshape(())


# The multipliers and shifts of splitmix64, which spreads every bit over the word.
_OF_A, _OF_B = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9)

_OF_BOTH = np.uint64(0x94D049BB133111EB)

_29, _32 = np.uint64(29), np.uint64(32)


def mix(a: Array, b: Array) -> Array:
    """Hash pairs, elementwise and in order: ``mix(a, b)`` is not ``mix(b, a)``."""
    with np.errstate(over="ignore"):
        folded = b ^ (b >> _29)
        x = a * _OF_A + folded * _OF_B
        x = (x ^ (x >> _32)) * _OF_BOTH
        return np.asarray(x ^ (x >> _29))


def total(keys: Array, axis: int | tuple[int, ...], keepdims: bool = False) -> Array:
    """Hash a multiset of keys along ``axis``, in no order."""
    # Hashed once more before they are added: the sum of sums must not be the hash of the union.
    elements = mix(keys, code("element"))
    with np.errstate(over="ignore"):
        return np.asarray(elements.sum(axis=axis, dtype=np.uint64, keepdims=keepdims))


def index_along(size: int, dim: int, ndim: int) -> Array:
    """Return the index of every element along ``dim``, to be mixed into its key."""
    return np.arange(size, dtype=np.uint64).reshape(_along(size, dim, ndim))


def _place_along(size: int, dim: int, ndim: int) -> Array:
    """Return a hash of the index of every element along ``dim``, and of ``dim`` itself."""
    # Counted from the end, as broadcasting aligns dims: a row of biases has the dim of its columns.
    return mix(index_along(size, dim, ndim), code("along", dim - ndim))


def varies(array: Array, dim: int) -> bool:
    """Tell whether the entries along ``dim`` differ."""
    # A stride of zero is numpy's mark of an expanded dim: nothing has to be compared.
    if array.shape[dim] == 1 or array.strides[dim] == 0:
        return False
    first = array.take([0], axis=dim)
    return bool((array != first).any())


# --- the value ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fold:
    """By which reduction over their samples statistics of sets were made, see ``folds.py``.

    ``roots``: the statistics that they are.
    """

    kind: str
    roots: frozenset[int]


@dataclass(frozen=True)
class Ownership:
    """Owners and keys of the elements of one value, and what the value as a whole comes from.

    ``statistics``: the batch statistics it uses, by number. ``sources``: subset of ``{"inputs",
    "targets", "parameters", "noise", "predictions"}``. ``mixers``: steps at which samples became
    mixed. ``atoms``: the scalars per sample through which predictions enter it. ``additive``: it is
    a sum over samples of such scalars. ``weighted``: its elements carry factors that differ from
    sample to sample and are not part of their keys. ``ranked``: if not zero, entries with keys of
    their own are values of different ranks, which are counted, and so stay stored; of so many ranks
    at most is what has one key. ``fold``: by which reduction its statistics of sets were made, None
    where that is lost. ``stands_for``: inside a rule, the value of which it is a summary.
    """

    shape: tuple[int, ...]
    owner: Array
    key: Array
    statistics: frozenset[int] = frozenset()
    sources: frozenset[str] = frozenset()
    mixers: frozenset[int] = frozenset()
    atoms: frozenset[int] = frozenset()
    additive: bool = False
    weighted: bool = False
    ranked: int = 0
    fold: Fold | None = None
    stands_for: Ownership | None = None

    def __post_init__(self) -> None:
        # Both arrays have one shape, and a dim for each dim of the value.
        assert self.owner.shape == self.key.shape
        assert self.owner.ndim == len(self.shape)

    @property
    def owned(self) -> bool:
        """Some element belongs to a single sample."""
        return bool(is_sample(self.owner).any())

    @property
    def all_owned(self) -> bool:
        """Every element belongs to a single sample."""
        return bool(is_sample(self.owner).all())

    @property
    def mixed(self) -> bool:
        """Some element depends on several samples in no symmetric way."""
        return bool((self.owner == MIXED).any())

    @property
    def grouped(self) -> bool:
        """Some element is a statistic of a set of samples."""
        return bool(is_group(self.owner).any())

    @property
    def coupled(self) -> bool:
        """Some element depends on several samples: it is mixed, or a statistic of a set of them."""
        return bool((self.owner < SHARED).any())

    @property
    def separate(self) -> bool:
        """Every element belongs to a single sample, or to none; and some do to one."""
        return self.owned and not self.coupled

    @property
    def partly_shared(self) -> bool:
        """Some elements belong to samples, and others to none."""
        return self.owned and not self.mixed and bool((self.owner == SHARED).any())

    @property
    def depends_on_batch(self) -> bool:
        """Some element would be another in another batch."""
        return self.owned or self.mixed or bool(self.statistics)

    def plain(self, dim: int) -> bool:
        """Tell whether elements along ``dim`` differ by their index only, which stands for them."""
        return self.shape[dim] > 1 and self.key.shape[dim] == 1

    def explicit(self, dims: Iterable[int]) -> bool:
        """Tell whether the arrays have several entries along any of ``dims``."""
        return any(self.key.shape[d] > 1 for d in dims)

    def varies(self, dim: int) -> bool:
        """Tell whether the owner, or the key by more than the index, changes along ``dim``."""
        return self.key.shape[dim] > 1 and (varies(self.owner, dim) or varies(self.key, dim))

    def owner_varies(self, dim: int) -> bool:
        """Tell whether the owner changes along ``dim``."""
        return self.owner.shape[dim] > 1 and varies(self.owner, dim)

    @property
    def size(self) -> int:
        """How many different elements it has (an expanded value counts once)."""
        # Along plain dims all elements differ; elsewhere as many as there are keys.
        implicit = 1
        for size, stored in zip(self.shape, self.key.shape, strict=True):
            if stored == 1:
                implicit *= size
        if self.key.size <= 1:
            return implicit
        return implicit * len(np.unique(self.key))

    def with_key(self, name: object) -> Ownership:
        """Return the same owners with another function of each element, named ``name``."""
        return replace(self.with_name(name), fold=None)

    def with_name(self, name: object) -> Ownership:
        """Return the same with ``name`` in the keys: elements that are others, by their index."""
        # Strides of zero are kept: one entry stands for all along such a dim.
        repeated = [slice(0, 1) if s == 0 else slice(None) for s in self.key.strides]
        renamed = mix(self.key[tuple(repeated)], code(name))
        return replace(self, key=np.broadcast_to(renamed, self.key.shape))

    def sample_dim(self) -> int | None:
        """Return the axis along which slice n belongs to sample n (or to none), if there is one."""
        for d, size in enumerate(self.shape):
            if self.owner_varies(d) and follow_samples(self.owner, d, size):
                return d
        # With one sample in the batch no owner varies, and any axis of size one will do.
        one_sample = self.owned and int(self.owner.max()) == 0 and not self.mixed
        if one_sample and 1 in self.shape:
            return self.shape.index(1)
        return None


def shared(
    shape: Dims, name: object, sources: Iterable[str] = (), constant_along: Iterable[int] = ()
) -> Ownership:
    """Return a value that no sample owns; along ``constant_along`` its elements are equal."""
    constant = set(constant_along)
    # Two kinds of dims: plain, with one entry whose index counts, and constant, stored in full by
    # strides of zero, where it does not.
    ones = [1] * len(shape)
    plain = [d for d in range(len(shape)) if d not in constant]
    stored = with_one(shape, plain)
    owner = np.broadcast_to(np.full(ones, SHARED, dtype=np.int32), stored)
    key = np.broadcast_to(code("shared", name).reshape(ones), stored)
    return Ownership(tuple(shape), owner, key, sources=frozenset(sources))


def batched(shape: Dims, dim: int, name: object, sources: Iterable[str] = ()) -> Ownership:
    """Return a value whose slice n along ``dim`` belongs to sample n."""
    # One key for all samples: slice n is one function of its own sample. Other dims are plain.
    view = _along(shape[dim], dim, len(shape))
    owner = np.arange(shape[dim], dtype=np.int32).reshape(view)
    key = np.broadcast_to(code("batched", name).reshape([1] * len(shape)), view)
    return Ownership(tuple(shape), owner, key, sources=frozenset(sources))


def digest(x: Ownership) -> int:
    """Return one number for all keys of a value."""
    return int(total(x.key.reshape(-1), 0))


# --- explicit dims and plain ones -----------------------------------------------------------------


def spell_out(x: Ownership, dims: Iterable[int] | None = None) -> Ownership:
    """Make ``dims`` (all by default) explicit."""
    ndim = len(x.shape)
    explicit = set(range(ndim) if dims is None else dims)
    for d in range(ndim):
        if x.key.shape[d] > 1:
            explicit.add(d)
    owner, key = explicit_arrays(x, explicit)
    return replace(x, owner=owner, key=key)


def explicit_arrays(x: Ownership, explicit: Iterable[int]) -> tuple[Array, Array]:
    """Return owners and keys with the dims in ``explicit`` spelled out.

    Dims that are constant beside plain ones are dropped: all others are left with one entry.
    """
    owner, key = x.owner, x.key
    dims = set(explicit)
    for d in range(len(x.shape)):
        if d in dims and x.plain(d):
            key = mix(key, _place_along(x.shape[d], d, len(x.shape)))
        elif d not in dims and key.shape[d] > 1:
            owner, key = owner.take([0], axis=d), key.take([0], axis=d)
    # The keys may have got more entries than the owners have; both are of one shape again.
    owner = np.broadcast_to(owner, np.broadcast_shapes(owner.shape, key.shape))
    return owner, key


def compress(x: Ownership, dims: Iterable[int] | None = None) -> Ownership:
    """Make dims plain again along which the owner is constant and all keys are different.

    Where keys along a dim are equal the dim is expanded: it stays explicit, at no cost. Where
    only some of them are, it stays as it is, since its elements do not differ by their index
    alone.
    """
    owner, key = x.owner, x.key
    if not key.size:
        return shared(x.shape, "empty", x.sources)
    if x.ranked:
        return x
    candidates = range(len(x.shape)) if dims is None else dims
    # From the last dim on, since the hash of a dim's keys goes into those of the dims before it.
    for d in sorted(candidates, reverse=True):
        if key.shape[d] == 1 or varies(owner, d):
            continue
        if not varies(key, d):
            stored = key.shape
            owner = np.broadcast_to(owner.take([0], axis=d), stored)
            key = np.broadcast_to(key.take([0], axis=d), stored)
            continue
        ordered = np.sort(key, axis=d)
        repeated = (np.diff(ordered, axis=d) == 0).any()
        if repeated:
            continue
        key = total(mix(key, index_along(key.shape[d], d, key.ndim)), axis=d, keepdims=True)
        owner = owner.take([0], axis=d)
    return replace(x, owner=owner, key=key)


# --- movements: nothing is computed, elements change place ----------------------------------------


def permute(x: Ownership, order: Sequence[int], record: bool = True) -> Ownership:
    """Bring the dims into another order.

    ``record``: the order of plain dims is part of what an element's index means, and enters the
    keys.
    """
    key = x.key
    plain = [d for d in order if x.plain(d)]
    # Explicit dims have their index in the keys of the elements already, or do without.
    if record and plain != sorted(plain):
        key = mix(key, code("permute", tuple(np.argsort(plain))))
    # [2, 3] with plain features, transposed, keeps its one plain dim: no new name.
    shape = tuple(x.shape[d] for d in order)
    return replace(x, shape=shape, owner=x.owner.transpose(order), key=key.transpose(order))


def unsqueeze(x: Ownership, dim: int) -> Ownership:
    """Insert a dim of size one."""
    shape = (*x.shape[:dim], 1, *x.shape[dim:])
    owner, key = np.expand_dims(x.owner, dim), np.expand_dims(x.key, dim)
    return replace(x, shape=shape, owner=owner, key=key)


def squeeze(x: Ownership, dims: Iterable[int]) -> Ownership:
    """Remove dims of size one."""
    removed = tuple(dims)
    shape = without_dims(x.shape, removed)
    return replace(x, shape=shape, owner=x.owner.squeeze(removed), key=x.key.squeeze(removed))


def expand(x: Ownership, shape: Dims) -> Ownership:
    """Broadcast to ``shape``; what is repeated is explicit, as its elements are equal."""
    x = align(x, len(shape))
    stored = list(shape)
    for d, size in enumerate(shape):
        if size == x.shape[d]:
            stored[d] = x.key.shape[d]
    owner, key = np.broadcast_to(x.owner, stored), np.broadcast_to(x.key, stored)
    return replace(x, shape=tuple(shape), owner=owner, key=key)


def align(x: Ownership, ndim: int) -> Ownership:
    """Insert dims of size one at the front, as broadcasting does, until there are ``ndim``."""
    missing = ndim - len(x.shape)
    if not missing:
        return x
    ones = (1,) * missing
    stored = ones + x.key.shape
    owner, key = x.owner.reshape(stored), x.key.reshape(stored)
    return replace(x, shape=ones + x.shape, owner=owner, key=key)


def reshape(x: Ownership, shape: Dims) -> Ownership:
    """Return the same elements in row-major order in another shape.

    The shapes are matched run by run: [2, 12] to [2, 3, 4] consists of [2] to [2] and [12] to [3,
    4]. A run of plain dims stays plain, under another name, since an index means another element
    now. One with an explicit dim is spelled out, moved, and compressed again.
    """
    shape = tuple(shape)
    if shape == x.shape:
        return x
    if math.prod(shape) == 0:
        return shared(shape, "empty", x.sources)
    runs = list(_runs(x.shape, shape))
    x = _spell_out_regrouped(x, runs)
    stored: list[int] = []  # the shape of the arrays
    regrouped: list[int] = []  # dims that may be compressed again
    renamed = []
    for old, new in runs:
        before = [x.shape[d] for d in old]
        after = [shape[d] for d in new]
        if x.explicit(old):
            stored += after
            if _regroups(old, new):
                regrouped += new
            continue
        stored += [1] * len(new)
        if _without_ones(before) != _without_ones(after):
            renamed.append((before, after))
    key = x.key
    if renamed:
        key = mix(key, code("reshape", renamed))
    out = replace(x, shape=shape, owner=x.owner.reshape(stored), key=key.reshape(stored))
    if not regrouped:
        return out
    return compress(out, regrouped)


def _runs(old: Dims, new: Dims) -> Iterator[tuple[list[int], list[int]]]:
    """Split two shapes of equal size into the smallest runs of dims with equal products."""
    i = j = 0
    while i < len(old) or j < len(new):
        left: list[int] = []
        right: list[int] = []
        a = b = 1
        # A run is complete when both products agree; dims of size one make runs of their own.
        while not (left or right) or a != b:
            if i < len(old) and (a <= b or j == len(new)):
                a *= old[i]
                left.append(i)
                i += 1
            else:
                b *= new[j]
                right.append(j)
                j += 1
        yield left, right


def _regroups(old: list[int], new: list[int]) -> bool:
    """Tell whether a run is more than one dim that becomes one."""
    return len(old) + len(new) > 2


def _spell_out_regrouped(x: Ownership, runs: list[tuple[list[int], list[int]]]) -> Ownership:
    dims: list[int] = []
    for old, new in runs:
        if _regroups(old, new) and x.explicit(old):
            dims += old
    if not dims:
        return x
    return spell_out(x, dims)


def _without_ones(sizes: list[int]) -> list[int]:
    return [size for size in sizes if size > 1]


def moved(x: Ownership, run: Callable[[Array], Array], shape: Dims) -> Ownership:
    """Return ``x`` after any movement of its elements, at the cost of spelling it out.

    ``run`` acts on an integer array of the value's shape, which numbers the elements; it returns
    the numbers in their new places, of shape ``shape``, and -1 where an element is new.
    """
    # What the movement is need not be known: it is run on the numbers of the elements, and each
    # number says which owner and key stand at its place afterwards.
    full = spell_out(x)
    place = run(np.arange(full.key.size, dtype=np.int64).reshape(x.shape)).reshape(tuple(shape))
    # Padding is put behind the last element, which is where the index -1 finds it.
    flat_owner = np.append(np.broadcast_to(full.owner, x.shape).reshape(-1), np.int32(SHARED))
    flat_key = np.append(np.broadcast_to(full.key, x.shape).reshape(-1), code("padding").reshape(1))
    owner = flat_owner[place].astype(np.int32)
    return compress(replace(x, shape=tuple(shape), owner=owner, key=flat_key[place]))


def collapse(x: Ownership, dims: list[int], keepdim: bool) -> Ownership:
    """Drop dims over which a scan has made everything alike."""
    x = replace(x, shape=with_one(x.shape, dims))
    if keepdim:
        return x
    return squeeze(x, dims)


def expand_plain(x: Ownership, shape: tuple[int, ...]) -> Ownership:
    """Return elements that all depend on the same things, and differ by their index."""
    return replace(x, shape=tuple(shape))
