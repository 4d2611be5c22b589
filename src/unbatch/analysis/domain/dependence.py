"""Cross-sample dependence as an interpretation notes it: batch statistics, and mixing.

Here lives what is noted beside the ownership of values: where a statistic is defined, where
values of samples use one, and at which steps samples came to depend on each other in some other
way. Who notes it, and when, is in ``propagation.py``; what follows for the structure is in
``analysis/inference.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, field


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
    """What values of samples use: ``size`` numbers, made from the statistics ``definitions``."""

    definitions: frozenset[int]
    size: int  # of what is used, which may be less than the statistic has
    long: bool


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

    def use(self, statistics: frozenset[int], size: int, long: bool) -> None:
        """Enter that values of samples use ``size`` numbers made from ``statistics``.

        A statistic is used at several places, in whole or in part: the largest use is the one
        that counts.
        """
        # Sizes are not added: parts of a statistic that are used apart may be the same numbers.
        before = self.uses.get(statistics)
        if before is not None:
            size = max(size, before.size)
            long = long or before.long
        self.uses[statistics] = StatisticUse(statistics, size, long)

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
