"""What is known about a value: for every element, which sample it belongs to and which function of that sample it is.

Here lives the vocabulary (``Marks``) and what moves elements without computing. How marks pass through computations
is in ``algebra.py``. No op names of any framework, no tensor values.

Whose an element is stands as one number, its owner: a sample ``0..N-1``, or ``SHARED`` (the same for every sample),
``MIXED`` (of several samples, in no symmetric way), or the code of a group (a statistic of a set of samples, see
``group_owner``). For people a value is *shared*, has *one slice per sample*, is a *total* or a *statistic* of the
batch, or is *mixed*; these words are read off the owners and are no classes.

An element with owner ``n`` and key ``k`` is ``phi_k(x_n, shared values, statistics)``. Two elements with equal keys
are the *same* function, of their own samples. Keys are structural hashes, so equal keys are a proof up to hash
collisions (64 bit), and different keys prove nothing.

Arrays are stored compressed. A dimension of size one in the array, where the value has more, is *plain*: there the
owner does not vary, and the element's index takes part in the key implicitly. So a batch ``[N, C, H, W]`` has marks
of shape ``[N, 1, 1, 1]``, and everything below costs as much as there are samples, not as there are pixels.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

SHARED, MIXED = -1, -2  # owners beside the samples 0..N-1


_FIRST_GROUP = -3  # and below: a statistic of a set of samples


Array = np.ndarray


Dims = Sequence[int]


# --- owners ---------------------------------------------------------------------------------------


def group_owner(number: int) -> int:
    """Return the owner of what is a statistic of the set of samples with this number."""
    return _FIRST_GROUP - number


def group_number(owner: Array | int) -> Array:
    """Return the numbers of the sets of samples; 0 where the owner is none, see ``is_group``."""
    return np.where(is_group(owner), _FIRST_GROUP - owner, 0)


def is_group(owner: Array | int) -> Array:
    """Tell of every owner whether it is a set of samples, short of all of them."""
    return np.asarray(np.less_equal(owner, _FIRST_GROUP))


def is_sample(owner: Array) -> Array:
    """Tell of every owner whether it is a single sample."""
    return np.asarray(np.greater_equal(owner, 0))


def follow_samples(owner: Array, dim: int, samples: int) -> bool:
    """Tell whether slice n along ``dim`` belongs to sample n, or to none."""
    view = [samples if d == dim else 1 for d in range(owner.ndim)]
    sample = np.arange(samples, dtype=np.int32).reshape(view)
    return bool(((owner == sample) | (owner == SHARED)).all())


# --- keys -----------------------------------------------------------------------------------------


def code(*things: object) -> Array:
    """A 64-bit hash of the printed form of ``things``."""
    digest = hashlib.blake2b(repr(things).encode(), digest_size=8).digest()
    return np.frombuffer(digest, dtype=np.uint64).reshape(())


def mix(a: Array, b: Array) -> Array:
    """Hash pairs, elementwise and in order."""
    with np.errstate(over="ignore"):
        x = a * np.uint64(0x9E3779B97F4A7C15) + (b ^ (b >> np.uint64(29))) * np.uint64(
            0xBF58476D1CE4E5B9
        )
        x = (x ^ (x >> np.uint64(32))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(x ^ (x >> np.uint64(29)))


def total(keys: Array, axis: int | tuple[int, ...], keepdims: bool = False) -> Array:
    """Hash a multiset of keys along ``axis``, in no order."""
    with np.errstate(over="ignore"):
        return np.asarray(
            mix(keys, code("element")).sum(axis=axis, dtype=np.uint64, keepdims=keepdims)
        )


def index_along(size: int, dim: int, ndim: int) -> Array:
    return np.arange(size, dtype=np.uint64).reshape([size if d == dim else 1 for d in range(ndim)])


# --- marks ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ownership:
    """Owners and keys of the elements of one value, and what the value as a whole comes from.

    ``given``: statistics it uses; ``sources``: subset of ``{"inputs", "targets", "parameters", "noise",
    "predictions"}``; ``mixers``: steps at which samples met in no symmetric way; ``atoms``: the scalars per sample
    through which predictions enter it; ``additive``: it is a sum over samples of such scalars; ``weighted``: its
    elements carry factors that differ from sample to sample and are not part of their keys.
    """

    shape: tuple[int, ...]
    owner: Array
    key: Array
    given: frozenset[int] = frozenset()
    sources: frozenset[str] = frozenset()
    mixers: frozenset[int] = frozenset()
    atoms: frozenset[int] = frozenset()
    additive: bool = False
    weighted: bool = False

    def __post_init__(self) -> None:
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
        return self.owned or self.mixed or bool(self.given)

    def plain(self, dim: int) -> bool:
        """The elements along ``dim`` belong together and differ by their index only."""
        return self.shape[dim] > 1 and self.key.shape[dim] == 1

    def varies(self, dim: int) -> bool:
        """The owner, or the key by more than the index, changes along ``dim``."""
        return self.key.shape[dim] > 1 and (varies(self.owner, dim) or varies(self.key, dim))

    def owner_varies(self, dim: int) -> bool:
        return self.owner.shape[dim] > 1 and varies(self.owner, dim)

    @property
    def size(self) -> int:
        """How many different elements it has (an expanded value counts once)."""
        implicit = math.prod(s for s, k in zip(self.shape, self.key.shape, strict=True) if k == 1)
        return implicit * len(np.unique(self.key)) if self.key.size > 1 else implicit

    def with_key(self, name: object) -> Ownership:
        """The same owners, another function."""
        return replace(self, key=mix(self.key, code(name)))

    def sample_dim(self) -> int | None:
        """The axis along which slice n belongs to sample n (or to none), if there is one."""
        for d in range(len(self.shape)):
            if self.owner_varies(d) and follow_samples(self.owner, d, self.shape[d]):
                return d
        single = self.owned and int(self.owner.max()) == 0 and not self.mixed
        return next((d for d, s in enumerate(self.shape) if s == 1), None) if single else None


def varies(array: Array, dim: int) -> bool:
    if array.shape[dim] == 1 or array.strides[dim] == 0:
        return False
    first = array.take([0], axis=dim)
    return bool((array != first).any())


def shared(
    shape: Dims, name: object, sources: Iterable[str] = (), constant_along: Iterable[int] = ()
) -> Ownership:
    """Marks of a value that no sample owns; along ``constant_along`` its elements are equal."""
    stored = [shape[d] if d in set(constant_along) else 1 for d in range(len(shape))]
    ones = [1] * len(shape)
    owner = np.broadcast_to(np.full(ones, SHARED, dtype=np.int32), stored)
    key = np.broadcast_to(code("shared", name).reshape(ones), stored)
    return Ownership(tuple(shape), owner, key, sources=frozenset(sources))


def batched(shape: Dims, dim: int, name: object, sources: Iterable[str] = ()) -> Ownership:
    """Marks of a value whose slice n along ``dim`` belongs to sample n."""
    view = [shape[dim] if d == dim else 1 for d in range(len(shape))]
    owner = np.arange(shape[dim], dtype=np.int32).reshape(view)
    key = np.broadcast_to(code("batched", name).reshape([1] * len(shape)), view)
    return Ownership(tuple(shape), owner, key, sources=frozenset(sources))


# --- movements: nothing is computed, elements change place ----------------------------------------


def permute(x: Ownership, order: Sequence[int], record: bool = True) -> Ownership:
    """``record``: the order of plain dims is part of what an element's index means."""
    moved = [d for d in order if x.plain(d)]
    key = (
        mix(x.key, code("permute", tuple(np.argsort(moved))))
        if record and moved != sorted(moved)
        else x.key
    )
    shape = tuple(x.shape[d] for d in order)
    return replace(x, shape=shape, owner=x.owner.transpose(order), key=key.transpose(order))


def unsqueeze(x: Ownership, dim: int) -> Ownership:
    shape = (*x.shape[:dim], 1, *x.shape[dim:])
    return replace(
        x, shape=shape, owner=np.expand_dims(x.owner, dim), key=np.expand_dims(x.key, dim)
    )


def squeeze(x: Ownership, dims: Iterable[int]) -> Ownership:
    gone = tuple(d for d in dims)
    shape = tuple(s for d, s in enumerate(x.shape) if d not in gone)
    return replace(x, shape=shape, owner=x.owner.squeeze(gone), key=x.key.squeeze(gone))


def expand(x: Ownership, shape: Dims) -> Ownership:
    x = align(x, len(shape))
    stored = [s if s != x.shape[d] else x.key.shape[d] for d, s in enumerate(shape)]
    return replace(
        x,
        shape=tuple(shape),
        owner=np.broadcast_to(x.owner, stored),
        key=np.broadcast_to(x.key, stored),
    )


def spell_out(x: Ownership, dims: Iterable[int] | None = None) -> Ownership:
    """Make ``dims`` (all by default) explicit."""
    dims = range(len(x.shape)) if dims is None else dims
    owner, key = unfold(x, {d for d in range(len(x.shape)) if d in set(dims) or x.key.shape[d] > 1})
    return replace(x, owner=owner, key=key)


def compress(x: Ownership, dims: Iterable[int] | None = None) -> Ownership:
    """Make dims plain again where the owner is constant and the keys differ by index in the same way everywhere."""
    owner, key = x.owner, x.key
    if not key.size:
        return shared(x.shape, "empty", x.sources)
    for d in sorted(range(len(x.shape)) if dims is None else dims, reverse=True):
        if key.shape[d] == 1 or varies(owner, d):
            continue
        if not varies(key, d):
            view = key.shape
            owner = np.broadcast_to(owner.take([0], axis=d), view)
            key = np.broadcast_to(key.take([0], axis=d), view)
            continue
        ordered = np.sort(key, axis=d)
        if (np.diff(ordered, axis=d) == 0).any():
            continue
        key = total(mix(key, index_along(key.shape[d], d, key.ndim)), axis=d, keepdims=True)
        owner = owner.take([0], axis=d)
    return replace(x, owner=owner, key=key)


def reshape(x: Ownership, shape: Dims) -> Ownership:
    """The same elements in row-major order in another shape."""
    shape = tuple(shape)
    if shape == x.shape:
        return x
    if math.prod(shape) == 0:
        return shared(shape, "empty", x.sources)
    owner_shape: list[int] = []
    touched: list[int] = []
    pieces = list(_factor(x.shape, shape))
    spelled = [
        d
        for old, new in pieces
        for d in old
        if len(old) + len(new) > 2 and any(x.key.shape[o] > 1 for o in old)
    ]
    x = spell_out(x, spelled) if spelled else x
    renamed = []
    for old, new in pieces:
        sizes = [shape[d] for d in new]
        if any(x.key.shape[d] > 1 for d in old):
            owner_shape += sizes
            touched += new if len(old) + len(new) > 2 else []
        else:
            owner_shape += [1] * len(new)
            if [x.shape[d] for d in old if x.shape[d] > 1] != [s for s in sizes if s > 1]:
                renamed.append(([x.shape[d] for d in old], sizes))
    key = mix(x.key, code("reshape", renamed)) if renamed else x.key
    out = replace(x, shape=shape, owner=x.owner.reshape(owner_shape), key=key.reshape(owner_shape))
    return compress(out, touched) if touched else out


def _factor(old: Dims, new: Dims) -> Iterable[tuple[list[int], list[int]]]:
    """Split two shapes of equal size into the smallest runs of dims with equal products."""
    i = j = 0
    while i < len(old) or j < len(new):
        left: list[int] = []
        right: list[int] = []
        a = b = 1
        while not (left or right) or a != b:
            if i < len(old) and (a <= b or j == len(new)):
                a, i = a * old[i], i + 1
                left.append(i - 1)
            else:
                b, j = b * new[j], j + 1
                right.append(j - 1)
        yield left, right


def moved(x: Ownership, run: Callable[[Array], Array], shape: Dims) -> Ownership:
    """Any movement: ``run`` acts on an integer array of the value's shape; -1 where an element is new."""
    full = spell_out(x)
    place = run(np.arange(full.key.size, dtype=np.int64).reshape(x.shape)).reshape(tuple(shape))
    flat_owner = np.append(np.broadcast_to(full.owner, x.shape).reshape(-1), np.int32(SHARED))
    flat_key = np.append(np.broadcast_to(full.key, x.shape).reshape(-1), code("padding").reshape(1))
    out = replace(
        x, shape=tuple(shape), owner=flat_owner[place].astype(np.int32), key=flat_key[place]
    )
    return compress(out)


def collapse(x: Ownership, dims: list[int], keepdim: bool) -> Ownership:
    """Drop dims over which a scan has made everything alike."""
    shape = tuple(1 if d in dims else s for d, s in enumerate(x.shape))
    x = replace(x, shape=shape)
    return x if keepdim else squeeze(x, dims)


def expand_plain(x: Ownership, shape: tuple[int, ...]) -> Ownership:
    """Elements that all depend on the same things, and differ by their index."""
    return replace(x, shape=tuple(shape))


# --- shapes brought together ----------------------------------------------------------------------


def align(x: Ownership, ndim: int) -> Ownership:
    pad = ndim - len(x.shape)
    if not pad:
        return x
    view = (1,) * pad + x.key.shape
    return replace(
        x, shape=(1,) * pad + x.shape, owner=x.owner.reshape(view), key=x.key.reshape(view)
    )


def unfold(x: Ownership, explicit: Iterable[int]) -> tuple[Array, Array]:
    """Arrays with ``explicit`` dims spelled out, and dims that are constant beside plain ones dropped."""
    owner, key = x.owner, x.key
    wanted = set(explicit)
    for d in range(len(x.shape)):
        if d in wanted and x.plain(d):
            key = mix(key, index_along(x.shape[d], d, len(x.shape)))
        elif d not in wanted and key.shape[d] > 1:
            owner, key = owner.take([0], axis=d), key.take([0], axis=d)
    owner = np.broadcast_to(owner, np.broadcast_shapes(owner.shape, key.shape))
    return owner, key
