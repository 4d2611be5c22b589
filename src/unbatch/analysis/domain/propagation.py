"""How marks pass through computations: elementwise functions, reductions, scans, contractions.

Here statistics are made (``Root``) and met by samples (``Use``), sets of samples are interned, and, for the loss, it is
kept track of through which scalars predictions enter. No op names of any framework, no tensor values.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from unbatch.analysis.domain.ownership import (
    MIXED,
    SHARED,
    Array,
    Dims,
    Ownership,
    align,
    code,
    group_number,
    group_owner,
    index_along,
    is_group,
    is_sample,
    mix,
    permute,
    squeeze,
    total,
    unfold,
    unsqueeze,
    varies,
)

# --- the algebra ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class StatisticDef:
    """A statistic, where it is made: of how many numbers, each listening to how many samples.

    ``long``: it has entries for every sample (sorted values, say), so its size grows with the batch. ``groups``: codes
    of the sets of samples it was taken over, where that is not the whole batch.
    """

    step: int
    kind: str
    size: int
    samples: int
    sources: frozenset[str]
    long: bool = False
    groups: frozenset[int] = frozenset()


@dataclass(frozen=True)
class StatisticUse:
    """A statistic (made from ``roots``) where values of samples listen to it: ``size`` different numbers."""

    roots: frozenset[int]
    size: int
    long: bool


@dataclass
class Propagation:
    """How marks pass through operations, for a batch of ``samples`` samples.

    ``step`` is the operation at work, ``roots`` the statistics made so far, ``uses`` those that samples listen to.
    Sets of samples other than the whole batch are interned in ``groups`` (rows: membership). ``births`` tells how
    samples were mixed at a step, ``bent`` lists steps that are not polynomial in
    values already mixed, ``uneven`` those whose function depends on the sample's index;
    ``factors`` are statistics by which something of the predictions was multiplied. Values that come from the sources
    in ``constant`` only count as known: for the loss, targets are what they are.
    """

    samples: int
    step: int = -1
    roots: list[StatisticDef] = field(default_factory=list)
    uses: dict[frozenset[int], StatisticUse] = field(default_factory=dict)
    births: dict[int, str] = field(default_factory=dict)
    bent: set[int] = field(default_factory=set)
    uneven: set[int] = field(default_factory=set)
    factors: set[int] = field(default_factory=set)
    constant: frozenset[str] = frozenset()
    groups: Array = field(init=False)

    def __post_init__(self) -> None:
        self.groups = np.zeros((0, self.samples), dtype=bool)

    # -- sets of samples --

    def group_code(self, members: Array) -> int:
        if members.all():
            return SHARED
        hits = np.flatnonzero((self.groups == members).all(axis=1))
        if not len(hits):
            self.groups = np.vstack([self.groups, members])
            return group_owner(len(self.groups) - 1)
        return group_owner(int(hits[0]))

    def members(self, owner: int) -> Array:
        if is_group(owner):
            return self.groups[group_number(owner)]
        return np.arange(self.samples) == owner

    def join(self, a: Array, b: Array) -> Array:
        """Owner of something made from elements of owners ``a`` and ``b``."""
        out = np.where(a == SHARED, b, np.where((b == SHARED) | (a == b), a, MIXED)).astype(
            np.int32
        )
        for single_, group in ((a, b), (b, a)) if len(self.groups) else ():
            met = is_sample(single_) & is_group(group)
            inside = self.groups[group_number(group), np.where(met, single_, 0)]
            out = np.where(met & inside, single_, out)
        return out

    # -- bookkeeping shared by all operations --

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
        if not linear and any(x.weighted for x in operands):
            key = mix(key, mix(np.broadcast_to(owner, key.shape).astype(np.uint64), code("weight")))
        mixers = _union(x.mixers for x in operands)
        if bool((owner == MIXED).any()) and not any(x.mixed for x in operands):
            mixers |= {self.step}
            self.births[self.step] = how
        given = _union(x.given for x in operands)
        if root is not None:
            partial = {
                r
                for r in given
                if how == "pairwise" and self.roots[r].kind == "sum" and self.roots[r].groups
            }
            given = (given - partial) | {root}
        out = Ownership(
            tuple(shape),
            owner,
            key,
            given,
            _union(x.sources for x in operands),
            mixers,
            _union(x.atoms for x in operands),
        )
        if out.owned:
            for x in operands:
                self.consume_alone(x)
        if out.owned and _uneven(out) and not any(x.owned and _uneven(x) for x in operands):
            self.uneven.add(self.step)
        if (
            "predictions" in out.sources
            and single(out)
            and not out.mixed
            and not self.given_predictions(out)
        ):
            keys = np.unique(out.key)
            out = replace(out, atoms=frozenset([int(keys[0])])) if len(keys) == 1 else out
        return out

    def consume_alone(self, x: Ownership) -> None:
        """A statistic on its own is met by samples (or is itself a prediction of theirs)."""
        if not x.given or x.owned or x.mixed:
            return
        roots = [self.roots[r] for r in x.given]
        long = any(r.long and x.size > r.size // self.samples for r in roots)
        before = self.uses.get(x.given, StatisticUse(x.given, 0, False))
        self.uses[x.given] = StatisticUse(x.given, max(before.size, x.size), long or before.long)

    def given_predictions(self, x: Ownership) -> bool:
        return any("predictions" in self.roots[r].sources for r in x.given)

    # -- elementwise --

    def pointwise(self, name: object, *operands: Ownership, kind: str = "") -> Ownership:
        """Each output element is one function of the elements at its place (with broadcasting).

        ``kind``: "add" and "sub" for sums and differences, "scale" for a product with factors, where linearity matters.
        """
        factor = self._weight(operands) if kind == "scale" else None
        product = kind == "scale" and sum("predictions" in x.sources for x in operands) > 1
        operands = tuple(
            _absorb(x) if x.weighted and (product or not kind) else x for x in operands
        )
        shape = np.broadcast_shapes(*(x.shape for x in operands))
        aligned = [align(x, len(shape)) for x in operands]
        explicit = _explicit_dims(aligned, shape)
        owner: Array | None = None
        key = np.broadcast_to(code("pointwise", name), [1] * len(shape))
        for x in aligned:
            x_owner, x_key = unfold(x, explicit)
            owner = x_owner if owner is None else self.join(owner, x_owner)
            key = mix(key, code([d for d in range(len(shape)) if x.plain(d) and d not in explicit]))
            key = mix(key, x_key if factor is None or x is not aligned[factor] else code("weight"))
        assert owner is not None
        owner, key = np.broadcast_arrays(owner, key)
        root = None
        if (
            kind == "add"
            and bool((owner == MIXED).any())
            and len(operands) == 2
            and not any(x.mixed for x in operands)
        ):
            met = owner == MIXED
            owner, key = self._fold(owner, key, *(unfold(x, explicit) for x in aligned))
            root = self.statistic(
                "sum", owner[met], math.prod(shape), _union(x.sources for x in operands)
            )
        out = self.result(shape, owner, key, operands, "pairwise", root, bool(kind))
        if not kind and out.mixed:
            self.bent.add(self.step)
        return self._linear(out, operands, kind, factor is not None) if kind else out

    def _fold(
        self, owner: Array, key: Array, a: tuple[Array, Array], b: tuple[Array, Array]
    ) -> tuple[Array, Array]:
        """Adding the same function of another sample to a sum over samples makes a sum over one more."""
        owner, key = owner.copy(), key.copy()
        sides = [np.broadcast_arrays(o, k, owner)[:2] for o, k in (a, b)]
        summed = [np.where(o >= 0, mix(k, code("sum over samples")), k) for o, k in sides]
        for spot in np.argwhere((owner == MIXED) & (summed[0] == summed[1])):
            at = tuple(spot)
            members = [self.members(int(o[at])) for o, _ in sides]
            if not (members[0] & members[1]).any():
                owner[at], key[at] = self.group_code(members[0] | members[1]), summed[0][at]
        return owner, key

    def _weight(self, operands: Sequence[Ownership]) -> int | None:
        """Which of two operands is a constant factor per sample that differs from sample to sample."""
        for w, x in ((0, 1), (1, 0)) if len(operands) == 2 else ():
            weight, value = operands[w], operands[x]
            if (
                "predictions" in weight.sources
                or "predictions" not in value.sources
                or not value.owned
            ):
                continue
            dim = value.sample_dim()
            w_dim = None if dim is None else dim - len(value.shape) + len(weight.shape)
            if (
                w_dim is None
                or w_dim < 0
                or weight.owned
                or weight.mixed
                or weight.shape[w_dim] != self.samples
            ):
                continue
            if math.prod(weight.shape) == self.samples and weight.plain(w_dim):
                return w
        return None

    def _linear(
        self, out: Ownership, operands: Sequence[Ownership], kind: str, weighted: bool
    ) -> Ownership:
        entering = [x for x in operands if "predictions" in x.sources]
        if not entering or (kind == "scale" and len(entering) > 1):
            return replace(out, weighted=False)
        if kind == "scale":
            self.factors |= _union(x.given for x in operands if "predictions" not in x.sources)
        apart = all(
            x.additive or (kind != "scale" and not x.mixed and not self.given_predictions(x))
            for x in entering
        )
        additive = not out.owned and apart
        weighted = weighted or any(x.weighted for x in entering)
        if kind in ("add", "sub") and len(operands) > 1 and weighted and not additive:
            return _absorb(replace(out, weighted=True))
        atoms = out.atoms
        if (
            additive
            and len(entering) > 1
            and not weighted
            and all(len(x.atoms) == 1 for x in entering)
        ):
            atoms = frozenset([int(code(kind, *(sorted(x.atoms) for x in entering)))])
        return replace(out, additive=additive, weighted=weighted, atoms=atoms)

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

        ``monoid``: it can be taken per sample first and then over the samples (sum, max, logsumexp, but not the
        variance); "sum" and "mean" are linear besides.
        """
        linear = name in ("sum", "mean")
        if x.mixed and not linear:
            self.bent.add(self.step)
        x = x if linear or not x.weighted else _absorb(x)
        ndim = len(x.shape)
        axes = sorted({d % ndim for d in dims}) if dims is not None else list(range(ndim))
        kept = [d for d in range(ndim) if d not in axes]
        order = [*kept, *axes]
        rows = [x.key.shape[d] for d in kept]
        owner = x.owner.transpose(order).reshape(*rows, -1)
        key = x.key.transpose(order).reshape(*rows, -1)
        key = mix(
            key, code("reduce", name, [(x.shape[d], d in axes) for d in range(ndim) if x.plain(d)])
        )
        out_owner, out_key, met = self.meet(owner, key)
        stored = [1 if d in axes else x.key.shape[d] for d in range(ndim)]
        shape = [1 if d in axes else s for d, s in enumerate(x.shape)]
        out_owner = out_owner.reshape(stored)
        out_key = mix(
            out_key.reshape(stored),
            code("reduced", name, [x.shape[d] for d in axes if x.key.shape[d] > 1]),
        )
        entries = math.prod(s for d, s in enumerate(x.shape) if long or d not in axes)
        root = self.statistic(name, out_owner, entries, x.sources, long) if met else None
        out = self.result(shape, out_owner, out_key, [x], "unsymmetric", root, linear)
        if "predictions" in x.sources:
            out = self._entries(out, x, met, linear, monoid or linear)
        return out if keepdim else squeeze(out, axes)

    def statistic(
        self, name: object, owner: Array, size: int, sources: frozenset[str], long: bool = False
    ) -> int | None:
        """Note where samples met: every value made symmetrically from several samples rests on such a root."""
        groups = frozenset(int(o) for o in np.unique(owner) if is_group(o))
        if not groups and not (owner == SHARED).any():
            return None
        members = [self.members(g).sum() for g in groups]
        self.roots.append(
            StatisticDef(
                self.step,
                str(name),
                size,
                int(min(members, default=self.samples)),
                sources,
                long,
                groups,
            )
        )
        return len(self.roots) - 1

    def overlapping(self) -> bool:
        """Some of the groups whose statistics are used share samples without being equal."""
        used = frozenset().union(*(u.roots for u in self.uses.values()))
        rows = [
            self.members(g)
            for g in sorted(frozenset().union(*(self.roots[r].groups for r in used)))
        ]
        return bool(len(rows)) and bool((np.sum(rows, axis=0) > 1).any())

    def meet(self, owner: Array, key: Array) -> tuple[Array, Array, bool]:
        """Owner and key of what is made from the elements along the last axis; whether samples met there."""
        out_owner, out_key = _lone(owner, -1), total(key, axis=-1)
        several = _several(owner, -1)
        if not several.any():
            return out_owner, out_key, False
        rows = [self._meet_row(o, k) for o, k in zip(owner[several], key[several], strict=True)]
        out_owner[several] = [o for o, _ in rows]
        out_key[several] = [k for _, k in rows]
        return out_owner, out_key, True

    def _meet_row(self, owner: Array, key: Array) -> tuple[int, int]:
        """The same for one set of elements of several owners: symmetric in the samples that take part, or mixed."""
        names, inverse = np.unique(owner, return_inverse=True)
        sums = np.zeros(len(names), dtype=np.uint64)
        with np.errstate(over="ignore"):
            np.add.at(sums, inverse, mix(key, code("element")))
        own = names != SHARED
        members = [self.members(int(n)) for n in names[own] if n != MIXED]
        if MIXED in names or len(np.unique(sums[own])) > 1 or np.sum(members, axis=0).max() > 1:
            return MIXED, 0
        rest = sums[~own][0] if (~own).any() else np.uint64(0)
        return self.group_code(np.any(members, axis=0)), int(
            mix(np.asarray(sums[own][0]), np.asarray(rest))
        )

    def _entries(
        self, out: Ownership, x: Ownership, met: bool, linear: bool, monoid: bool
    ) -> Ownership:
        """How predictions enter a reduction: through one scalar per sample, and additively?"""
        separate = met and not x.mixed and not self.given_predictions(x)
        atoms = out.atoms
        if (
            separate
            and monoid
            and not out.mixed
            and math.prod(out.shape) == 1
            and not (single(x) and len(x.atoms) == 1)
        ):
            atoms = frozenset([int(out.key.reshape(-1)[0])])
        return replace(
            out,
            atoms=atoms,
            additive=linear and (x.additive or separate),
            weighted=x.weighted and linear,
        )

    # -- along an axis, with order --

    def scan(
        self,
        name: object,
        x: Ownership,
        dims: Iterable[int],
        how: str = "ordered",
        shape: Dims | None = None,
    ) -> Ownership:
        """Output elements along ``dims`` each depend, by their index, on all input elements along ``dims``."""
        x = _absorb(x) if x.weighted else x
        if x.mixed:
            self.bent.add(self.step)
        ndim = len(x.shape)
        axes = sorted({d % ndim for d in dims})
        owner, key = x.owner, x.key
        for d in axes:
            if key.shape[d] > 1:
                key = total(mix(key, index_along(key.shape[d], d, ndim)), axis=d, keepdims=True)
                owner = np.where(_several(owner, d, True), MIXED, _lone(owner, d, True)).astype(
                    np.int32
                )
        return self.result(
            x.shape if shape is None else shape, owner, mix(key, code("scan", name, axes)), [x], how
        )

    # -- contractions --

    def contract(
        self, name: object, operands: Sequence[Ownership], indices: Sequence[str], out: str
    ) -> Ownership:
        """A sum of products, in einsum's letters."""
        letters = "".join(dict.fromkeys("".join(indices)))
        spread = [_spread(x, i, letters) for x, i in zip(operands, indices, strict=True)]
        product = self.pointwise((name, tuple(indices), out), *spread, kind="scale")
        gone = [letters.index(i) for i in letters if i not in out]
        product = self.reduce("sum", product, gone) if gone else product
        kept = [i for i in letters if i in out]
        return permute(product, [kept.index(i) for i in out], record=False)


def _uneven(x: Ownership) -> bool:
    dim = x.sample_dim()
    return dim is not None and varies(x.key, dim)


def _union(sets: Iterable[frozenset]) -> frozenset:
    return frozenset().union(*sets)


def _lone(owner: Array, dim: int, keepdims: bool = False) -> Array:
    """The one owner along ``dim``, beside shared elements (meaningful where there are not several)."""
    low = np.where(owner == SHARED, np.iinfo(np.int32).max, owner).min(axis=dim, keepdims=keepdims)
    return np.where(low == np.iinfo(np.int32).max, SHARED, low).astype(np.int32)


def _several(owner: Array, dim: int, keepdims: bool = False) -> Array:
    """Whether more than one owner stands along ``dim``, shared elements aside."""
    first = _lone(owner, dim, True)
    return np.asarray(((owner != first) & (owner != SHARED)).any(axis=dim, keepdims=keepdims))


def single(x: Ownership) -> bool:
    """One element for each sample that occurs."""
    return x.owned and math.prod(x.shape) == x.owner.size == len(np.unique(x.owner))


def _absorb(x: Ownership) -> Ownership:
    """Let the factors that differ between samples be part of the function after all."""
    key = mix(x.key, mix(x.owner.astype(np.uint64), code("weight")))
    return replace(x, key=key, weighted=False)


def _explicit_dims(xs: Sequence[Ownership], shape: Dims) -> set[int]:
    explicit = set()
    for d in range(len(shape)):
        stored = [x for x in xs if x.key.shape[d] > 1]
        if stored and (not any(x.plain(d) for x in xs) or any(x.varies(d) for x in stored)):
            explicit.add(d)
    return explicit


def _spread(x: Ownership, index: str, letters: str) -> Ownership:
    """Permute and pad with size-one dims so that the dims follow ``letters``."""
    present = [index.index(i) for i in letters if i in index]
    x = permute(x, present, record=False)
    for at, letter in enumerate(letters):
        if letter not in index:
            x = unsqueeze(x, at)
    return x
