"""Cross-sample dependence as an interpretation notes it: batch statistics, and mixing.

Here lives what is noted beside the ownership of values: where a statistic is defined, where
values of samples use one, and at which steps samples came to depend on each other in some other
way. Who notes it, and when, is in ``propagation.py``; what follows for the structure is in
``analysis/inference.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

# So many ranks are no share of a batch; more of them are one in batches of up to so many times more
# samples.
FEW_RANKS = 2


@dataclass(frozen=True)
class StatisticDef:
    """A batch statistic where it is defined: ``size`` numbers, each of ``samples`` samples.

    ``long``: it has entries for every sample (sorted values, say), so its size grows with the
    batch. ``groups``: owners of the sets of samples it was taken over, where that is not the
    whole batch.
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
    """What values of samples use: ``size`` numbers, made from the statistics ``definitions``.

    ``pieces``: how many numbers each use has, by the keys of its entries: what is used twice counts
    once. ``long``: so many ranks of a statistic are used that their number may grow with the batch.
    """

    definitions: frozenset[int]
    pieces: Mapping[frozenset[int], int]
    size: int  # of what is used, which may be less than the statistic has
    long: bool


def _may_grow(ranks: int, samples: int) -> bool:
    """Tell whether so many ranks (largest, median, ..) may be as many as a batch has samples.

    One batch cannot tell a fixed number of them from a share of the batch. A few are taken for a
    fixed number, if they are few among the samples as well.
    """
    return ranks > FEW_RANKS and ranks * FEW_RANKS >= samples


@dataclass
class DependenceRecord:
    """What propagation notes on its way, in six tables that only grow.

    ``definitions``: all batch statistics; ``Ownership.statistics`` names them by their place in
    this list. ``uses``: those that values of samples use, by the set of definitions they are made
    from. ``mixing``: for a step at which samples became mixed, how. ``nonlinear``: steps that are
    no polynomial in values already mixed. ``uneven``: steps whose function depends on the index
    of the sample: not permutation-equivariant. ``factors``: statistics by which something of the
    predictions was multiplied.
    """

    definitions: list[StatisticDef] = field(default_factory=list)
    uses: dict[frozenset[int], StatisticUse] = field(default_factory=dict)
    mixing: dict[int, str] = field(default_factory=dict)
    nonlinear: set[int] = field(default_factory=set)
    uneven: set[int] = field(default_factory=set)
    factors: set[int] = field(default_factory=set)

    def define(self, statistic: StatisticDef) -> int:
        """Enter a statistic, and return the number by which values refer to it."""
        # Only ever appended to, so that a number stays valid for the whole pass.
        self.definitions.append(statistic)
        return len(self.definitions) - 1

    def use(self, statistics: frozenset[int], keys: frozenset[int], size: int) -> None:
        """Enter that values of samples use ``size`` numbers made from ``statistics``.

        ``keys``: of their entries. Parts of a statistic that are used apart add up, to no more
        numbers than the statistics have.
        """
        pieces = {keys: size}
        before = self.uses.get(statistics)
        if before is not None:
            pieces = {**before.pieces, keys: size}
        available, samples, long = 0, 0, False
        for s in statistics:
            definition = self.definitions[s]
            available += definition.size
            samples = max(samples, definition.samples)
            long = long or definition.long
        size = max(max(pieces.values()), min(sum(pieces.values()), available))
        # Of a long statistic each rank has a key of its own.
        ranks = len(frozenset().union(*pieces))
        long = long and _may_grow(ranks, samples)
        self.uses[statistics] = StatisticUse(statistics, pieces, size, long)

    def of_predictions(self, statistics: frozenset[int]) -> bool:
        """Tell whether any of ``statistics`` is one of the predictions."""
        return any("predictions" in self.definitions[s].sources for s in statistics)

    def partial_sums(self, statistics: frozenset[int]) -> frozenset[int]:
        """Return those of ``statistics`` that are sums over a part of the batch."""
        # A sum over the whole batch has no groups, and is a statistic in its own right.
        partial = set()
        for s in statistics:
            definition = self.definitions[s]
            if definition.kind == "sum" and definition.groups:
                partial.add(s)
        return frozenset(partial)

    def groups_used(self) -> frozenset[int]:
        """Return the owners of the sets of samples whose statistics are used."""
        groups: set[int] = set()
        for use in self.uses.values():
            for root in use.definitions:
                groups |= self.definitions[root].groups
        return frozenset(groups)
