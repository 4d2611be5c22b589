"""How ownership passes through computations: elementwise, reductions, scans, contractions.

Here live the four operations in which all rules are written. What moves elements without
computing is in ``ownership.py``; the tables in which dependence between samples is noted are in
``dependence.py``. No op names of any framework, no tensor values.

An example, the centring of a batch norm over two samples: ``x`` has the shape [2, 3], its rows are
samples, and the columns are plain (one entry is stored)::

    value           owners       keys        because
    x               [0], [1]     [a], [a]    that is how a batch begins
    mean(x, 0)      [SHARED]     [m]         the same function of both: statistic number 0
    x - mean(x, 0)  [0], [1]     [d], [d]    a sample joined with SHARED; uses statistic 0
    x - x.flip(0)   [MIXED] ..               sample 0 joined with sample 1

The keys ``d`` agree, so both rows are one function of the own sample and of the statistic: SIMD
given statistics. Were they to differ (``x * arange(2)``), each row would be its own sample's, but
another function of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from unbatch.analysis.domain import folds
from unbatch.analysis.domain.choices import Choices
from unbatch.analysis.domain.dependence import DependenceRecord, StatisticDef
from unbatch.analysis.domain.folds import LINEAR
from unbatch.analysis.domain.linearity import (
    absorb,
    absorb_unless_linear,
    any_weighted,
    of_linear,
    of_reduction,
    sample_weight,
    weighted_key,
    with_atom,
)
from unbatch.analysis.domain.ownership import (
    ARGUMENT,
    MIXED,
    SHARED,
    Array,
    Dims,
    Ownership,
    align,
    code,
    explicit_arrays,
    index_along,
    is_group,
    is_sample,
    mix,
    normal_dims,
    permute,
    shared,
    squeeze,
    total,
    unsqueeze,
    varies,
    with_one,
    without_dims,
)
from unbatch.analysis.domain.sample_sets import SampleSets, several_owners, single_owner


@dataclass
class Propagation:
    """How ownership passes through operations, for a batch of ``samples`` samples.

    ``step``: the operation at work, set by whoever interprets. ``record``: the statistics and the
    mixing so far. ``choices``: those of samples, where a loss is followed through them. Values from
    the sources in ``constant`` count as known: for the loss, targets are what they are.
    """

    samples: int
    step: int = -1
    constant: frozenset[str] = frozenset()
    record: DependenceRecord = field(default_factory=DependenceRecord)
    choices: Choices | None = None
    sets: SampleSets = field(init=False)

    def __post_init__(self) -> None:
        self.sets = SampleSets(self.samples, self.choices)

    def is_constant(self, x: Ownership) -> bool:
        """Tell whether a value is made of what counts as known alone."""
        return all(s in self.constant or s.startswith(ARGUMENT) for s in x.sources)

    def uses_overlapping_sets(self) -> bool:
        """Tell whether statistics are used of sets that share samples without being equal."""
        return self.sets.overlap(self.record.groups_used())

    # -- bookkeeping shared by all operations --

    def join(self, a: Array, b: Array) -> Array:
        """Return the owners of what is made from elements of owners ``a`` and ``b``."""
        return self.sets.join(a, b)

    def result(
        self,
        shape: Dims,
        owner: Array,
        key: Array,
        operands: Sequence[Ownership],
        how: str,
        root: int | None = None,
        linear: bool = False,
    ) -> Ownership:
        """Return the ownership of an output, and note how samples depend on each other there.

        ``how``: the way in which samples became mixed, if they did here. ``root``: the statistic
        that the output is. ``linear``: it is so in the operands, whose weights per sample then
        stay factors.
        """
        # Factors per sample stay factors in what is linear; elsewhere they make functions differ.
        if not linear and any_weighted(operands):
            key = weighted_key(owner, key)
        statistics, sources, mixers, atoms = _origins(operands)
        # Only the step at which samples become mixed is noted: that one is to blame.
        if _becomes_mixed(owner, operands):
            self.record.mixing[self.step] = how
            mixers |= {self.step}
        if root is not None:
            statistics = self._with_statistic(statistics, root, how, operands)
        ranked = max((x.ranked for x in operands), default=0)
        out = Ownership(tuple(shape), owner, key, statistics, sources, mixers, atoms, ranked=ranked)
        self._note_uses(out, operands)
        return with_atom(out, operands, self.record)

    def _with_statistic(
        self, statistics: frozenset[int], root: int, how: str, operands: Sequence[Ownership]
    ) -> frozenset[int]:
        """The statistics that an output rests on, which is the statistic ``root`` itself.

        Adding up samples one by one defines a statistic at every step, each a part of the next.
        Only the last of them counts, so the partial sums are dropped when the sum goes on. So are
        the statistics of sets when they become one of all samples in them.
        """
        if how == "pairwise" and any(map(folds.is_loss, operands)):
            statistics -= self.record.partial_sums(statistics)
        return statistics - folds.roots_of(operands) | {root}

    def _note_uses(self, out: Ownership, operands: Sequence[Ownership]) -> None:
        """Note the statistics that samples use here, and whether samples begin to differ here."""
        if not out.owned:
            return
        # Here a shared statistic becomes part of a sample: until then nothing depends on other
        # samples.
        for x in operands:
            self.note_use(x)
        if not _uneven(out):
            return
        # Only where it begins: later steps inherit it, and are not to blame.
        if not any(x.owned and _uneven(x) for x in operands):
            self.record.uneven.add(self.step)

    def note_use(self, x: Ownership) -> None:
        """Note that values of samples use ``x``, if ``x`` is a statistic on its own."""
        if not x.statistics or x.owned or x.mixed or not x.key.size:
            return
        # Where one entry stands for many numbers, these are what is used.
        used = _with_entries(x.stands_for or x)
        # What is not ranked has as many ranks as keys.
        ranked = max(used.ranked, 1)
        keys = frozenset(np.unique(used.key).tolist())
        self.record.use(used.statistics, keys, used.size, ranked)

    def uses_predictions(self, x: Ownership) -> bool:
        """Tell whether ``x`` rests on a statistic of the predictions."""
        return self.record.of_predictions(x.statistics)

    def statistic(
        self, name: object, owner: Array, size: int, sources: frozenset[str], long: bool = False
    ) -> int | None:
        """Note that a batch statistic is defined here, and return its number.

        ``owner``: the owners of its elements. None if none of them is shared or of a set: then
        samples were mixed, or none took part, and there is no statistic.
        """
        groups = frozenset(np.unique(owner[is_group(owner)]).tolist())
        if not groups and not (owner == SHARED).any():
            return None
        # Of several sets the smallest counts: the fewer samples, the more each of them matters.
        members = self.samples
        for group in groups:
            members = min(members, int(self.sets.members(group).sum()))
        return self.record.define(
            StatisticDef(self.step, str(name), size, members, sources, long, groups)
        )

    # -- elementwise --

    def pointwise(
        self, name: object, *operands: Ownership, kind: str = "", polynomial: bool = False
    ) -> Ownership:
        """Each output element is one function of the elements at its place, with broadcasting.

        ``kind``: "add" and "sub" for sums and differences, "scale" for a product with factors,
        where linearity matters. ``polynomial``: so is the function, if not of one of these kinds.

        The owners are joined; the key is the hash of ``name`` and of the operands' keys, in order::

            key = mix(.. mix(mix(code(name), [plain dims of x1]), key of x1) .., key of x2)

        An operand's plain dims belong to it, since by them an element's index takes part in its
        key: ``x + b`` and ``x + b.unsqueeze(1)`` are different functions of the same stored keys.
        """
        factor = None
        if kind == "scale":
            factor = sample_weight(operands, self.samples)
        terms = absorb_unless_linear(operands, kind)
        shape = np.broadcast_shapes(*(x.shape for x in terms))
        aligned = [align(x, len(shape)) for x in terms]
        explicit = _explicit_dims(aligned, shape)
        # From here on plain dims are plain in all operands that have them, or in none.
        arrays = [explicit_arrays(x, explicit) for x in aligned]
        owner = arrays[0][0]
        key = np.broadcast_to(code("pointwise", name), [1] * len(shape))
        for position, (x, (x_owner, x_key)) in enumerate(zip(aligned, arrays, strict=True)):
            if position == factor:
                # A weight per sample is left out of the key; ``weighted`` says that there is one.
                x_key = code("weight")
            if position:
                owner = self.join(owner, x_owner)
            key = mix(mix(key, code(_implicit_dims(x, explicit))), x_key)
        owner, key = np.broadcast_arrays(owner, key)

        root = None
        if kind == "add" and len(terms) == 2 and _becomes_mixed(owner, terms):
            mixed = owner == MIXED
            owner, key = self._add_samples(owner, key, terms, arrays)
            sources = terms[0].sources | terms[1].sources
            root = self.statistic("sum", owner[mixed], math.prod(shape), sources)
        out = self.result(shape, owner, key, terms, "pairwise", root, bool(kind))
        # What is linear keeps a sum over samples a sum; anything else on mixed values does not.
        if kind:
            out = folds.with_linear(out, terms, kind, root)
            return of_linear(out, terms, kind, factor is not None, self.record)
        if out.mixed and not polynomial:
            self.record.nonlinear.add(self.step)
        return out

    def _add_samples(
        self,
        owner: Array,
        key: Array,
        terms: Sequence[Ownership],
        arrays: Sequence[tuple[Array, Array]],
    ) -> tuple[Array, Array]:
        """Owners and keys of ``a + b`` where these are the same function of different samples.

        ``f(x_0) + f(x_1)`` is the sum of f over {0, 1}, and adding ``f(x_2)`` gives that over {0,
        1, 2}: so a loop over samples becomes the statistic that ``sum`` would be. A single sample
        counts as the sum over itself, hence the name mixed into its key. ``arrays``: owners and
        keys of the terms.
        """
        if not all(folds.is_sum(x) for x in terms):
            return owner, key
        mixed = owner == MIXED
        owner, key = owner.copy(), key.copy()
        owners = []
        sums = []
        for term_owner, term_key in arrays:
            full_owner, full_key, _ = np.broadcast_arrays(term_owner, term_key, owner)
            as_sum = mix(full_key, code("sum over samples"))
            owners.append(full_owner)
            sums.append(np.where(is_sample(full_owner), as_sum, full_key))
        # Sums are of one function if their keys agree, and over disjoint sets if no sample is in
        # both. Anything else stays mixed.
        for place in np.argwhere(mixed & (sums[0] == sums[1])):
            at = tuple(place)
            left = self.sets.members(int(owners[0][at]))
            right = self.sets.members(int(owners[1][at]))
            if not (left & right).any():
                owner[at] = self.sets.owner_of(left | right)
                key[at] = sums[0][at]
        return np.where(mixed, self.across_sets(owner, terms), owner), key

    # -- reductions --

    def reduce(
        self,
        name: object,
        x: Ownership,
        dims: Iterable[int] | None = None,
        keepdim: bool = False,
        monoid: bool = False,
        long: bool = False,
    ) -> Ownership:
        """A function of all elements along ``dims`` that does not depend on their order.

        ``monoid``: it can be taken per sample first and then over the samples (sum, max,
        logsumexp, but not the variance); "sum" and "mean" are linear besides. ``long``: its
        result has as many entries as ``x`` (sorted values). Over several samples it is a
        statistic, or mixed, see ``combine``.
        """
        linear = name in LINEAR
        if x.mixed and not linear:
            self.record.nonlinear.add(self.step)
        if not linear:
            x = absorb(x)
        x = _with_entries(x)
        ndim = len(x.shape)
        axes = normal_dims(range(ndim) if dims is None else dims, ndim)
        owner, key, combined = self._reduced(name, x, axes)
        if combined and len(self.sets):
            owner = self.across_sets(owner, [x])
        shape = with_one(x.shape, axes)
        root = None
        if combined:
            # Sorted values are as many as there were, all others one for each place that is left.
            entries = math.prod(x.shape if long else shape)
            root = self.statistic(name, owner, entries, x.sources, long)
        out = self.result(shape, owner, key, [x], "unsymmetric", root, linear)
        if len(self.sets):
            out = folds.with_reduction(out, x, name, root)
        if "predictions" in x.sources:
            out = of_reduction(out, x, combined, (linear, monoid or linear), self.record)
        if keepdim:
            return out
        return squeeze(out, axes)

    def _reduced(self, name: object, x: Ownership, axes: list[int]) -> tuple[Array, Array, bool]:
        """Owners and keys with one entry over ``axes``; whether samples were combined.

        Two names enter the key. Before the elements are combined, which plain dims there are, and
        which of them are reduced: by these an element's index takes part. Afterwards, how many
        entries the stored dims had: a mean over four equal keys is another function than one over
        five.
        """
        ndim = len(x.shape)
        # Elements to be combined along one last axis.
        rest = without_dims(range(ndim), axes)
        order = [*rest, *axes]
        rows = without_dims(x.key.shape, axes)
        owner = x.owner.transpose(order).reshape(*rows, -1)
        key = x.key.transpose(order).reshape(*rows, -1)
        plain = []
        counts = []
        for d in range(ndim):
            if x.plain(d):
                plain.append((x.shape[d], d in axes))
            elif d in axes and x.key.shape[d] > 1:
                counts.append(x.shape[d])
        key = mix(key, code("reduce", name, plain))
        owner, key, combined = self.sets.combine(owner, key, folds.continues(x, name))
        stored = with_one(x.key.shape, axes)
        key = mix(key.reshape(stored), code("reduced", name, counts))
        return owner.reshape(stored), key, combined

    def across_sets(self, owner: Array, xs: Sequence[Ownership]) -> Array:
        """Owners of functions of several samples, each of which may use a statistic of a set.

        Over samples of several such sets it is mixed: exchanging two of them, of different sets,
        changes both statistics. The statistics that are combined are no such.
        """
        xs = [x for x in xs if x.owned or not folds.is_loss(x)]
        used: set[int] = set()
        for x in xs:
            used |= x.statistics
        used -= folds.roots_of(xs)
        groups: set[int] = set()
        for statistic in used:
            groups |= self.record.definitions[statistic].groups
        for result in np.unique(owner[(owner == SHARED) | is_group(owner)]).tolist():
            members = np.ones(self.samples, dtype=bool)
            if result != SHARED:
                members = self.sets.members(result)
            for group in groups:
                inside = self.sets.members(group)[members]
                if inside.any() and not inside.all():
                    owner = np.where(owner == result, MIXED, owner).astype(np.int32)
        return owner

    # -- along an axis, with order --

    def scan(
        self,
        name: object,
        x: Ownership,
        dims: Iterable[int],
        how: str = "ordered",
        shape: Dims | None = None,
    ) -> Ownership:
        """Each output element along ``dims`` depends, by its index, on all inputs along ``dims``.

        The output is plain along ``dims``. Where several owners lie there it is mixed: a function
        that knows the order of samples is not symmetric in them. Where ranks do, each entry may
        be another number made of all of them.
        """
        x = _with_entries(absorb(x))
        if x.mixed:
            self.record.nonlinear.add(self.step)
        ndim = len(x.shape)
        axes = normal_dims(dims, ndim)
        owner, key, ranked = x.owner, x.key, x.ranked
        for d in axes:
            if key.shape[d] > 1:
                ranked *= key.shape[d]
                # Hashed with their places, so that the order counts in a hash that knows none.
                key = total(mix(key, index_along(key.shape[d], d, ndim)), axis=d, keepdims=True)
                one = single_owner(owner, d, True)
                owner = np.where(several_owners(owner, d, True), MIXED, one).astype(np.int32)
        # How many entries there are decides what the last of them is, and an index from the end.
        sizes = [x.shape[d] for d in axes if x.plain(d)]
        key = mix(key, code("scan", name, axes, sizes))
        # Another shape may be given: as an output is plain along ``dims``, it has any size there.
        if shape is None:
            shape = x.shape
        out = self.result(shape, owner, key, [x], how)
        return replace(out, ranked=ranked) if ranked else out

    # -- contractions --

    def contract(
        self, name: object, operands: Sequence[Ownership], indices: Sequence[str], out: str
    ) -> Ownership:
        """A sum of products, in einsum's letters: ``(("ni", "oi"), "no")`` is ``x @ w.T``."""
        letters = "".join(dict.fromkeys("".join(indices)))  # each once, in order
        # As einsum is defined: all products by broadcasting, then sums. Arrays are compressed, so
        # the products are few, whatever the sizes of the values.
        spread = [_spread(x, i, letters) for x, i in zip(operands, indices, strict=True)]
        product = self.pointwise((name, tuple(indices), out), *spread, kind="scale")
        summed = []
        left = []
        # What is left keeps the order of ``letters``, and is brought into that of ``out`` at the
        # end.
        for d, letter in enumerate(letters):
            if letter in out:
                left.append(letter)
            else:
                summed.append(d)
        if summed:
            product = self.reduce("sum", product, summed)
        return permute(product, [left.index(letter) for letter in out], record=False)


# --- parts of the operations ----------------------------------------------------------------------


def _with_entries(x: Ownership) -> Ownership:
    """``x``, or with one shared entry if it has no elements: what is made of none is alike."""
    if x.key.size:
        return x
    empty = shared(x.shape, "empty", (), np.flatnonzero(x.shape).tolist())
    # That there are none may depend on the batch.
    return replace(x, owner=empty.owner, key=empty.key)


def _uneven(x: Ownership) -> bool:
    """Samples are different functions of themselves, along the axis on which they lie."""
    dim = x.sample_dim()
    return dim is not None and varies(x.key, dim)


def _origins(
    operands: Sequence[Ownership],
) -> tuple[frozenset[int], frozenset[str], frozenset[int], frozenset[int]]:
    """What an output takes over from all operands: ``statistics, sources, mixers, atoms``."""
    statistics: frozenset[int] = frozenset()
    sources: frozenset[str] = frozenset()
    mixers: frozenset[int] = frozenset()
    atoms: frozenset[int] = frozenset()
    for x in operands:
        statistics |= x.statistics
        sources |= x.sources
        mixers |= x.mixers
        atoms |= x.atoms
    return statistics, sources, mixers, atoms


def _becomes_mixed(owner: Array, operands: Sequence[Ownership]) -> bool:
    """Tell whether elements with these owners are mixed, while the operands were not."""
    return bool((owner == MIXED).any()) and not any(x.mixed for x in operands)


def _explicit_dims(xs: Sequence[Ownership], shape: Dims) -> set[int]:
    """The dims that have to be spelled out before operands are combined.

    Beside a plain dim, one that is stored but constant may be dropped (its entries are equal).
    One that varies may not, and then the plain one has to be spelled out to go with it.
    """
    explicit = set()
    for d in range(len(shape)):
        stored = []
        beside_plain = False
        for x in xs:
            if x.key.shape[d] > 1:
                stored.append(x)
            elif x.shape[d] > 1:
                beside_plain = True
        # Whether it varies is asked last, as it compares elements.
        if stored and (not beside_plain or any(x.varies(d) for x in stored)):
            explicit.add(d)
    return explicit


def _implicit_dims(x: Ownership, explicit: set[int]) -> list[int]:
    """The dims along which an element's index takes part in its key without being spelled out."""
    return [d for d in range(len(x.shape)) if x.plain(d) and d not in explicit]


def _spread(x: Ownership, index: str, letters: str) -> Ownership:
    """Permute and pad with size-one dims so that the dims follow ``letters``."""
    # First into the order of ``letters``, so that the missing ones can be inserted from the left.
    present = [index.index(letter) for letter in letters if letter in index]
    x = permute(x, present, record=False)
    for d, letter in enumerate(letters):
        if letter not in index:
            x = unsqueeze(x, d)
    return x
