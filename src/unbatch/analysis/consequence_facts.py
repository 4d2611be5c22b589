"""The vocabulary of consequences: facts, worlds, and what a quantity, a case and an answer are.

A *fact* is a structure that holds, or one of the few facts beside the structures. A *world* is the
set of facts that hold. What follows in which world stands in ``consequence_table.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Outcome = Literal["exact", "renamed", "estimate", "none", "unknown"]


# A frozenset, so that worlds can be keys: answers are compared world by world.
World = frozenset[str]


SPLIT = "canonical_split"


INDEPENDENT = "independent_forward"


SIMD_FORWARD = "simd_forward"


STATISTICS = "simd_given_statistics"


REDUCTION = "reduction"


SIMD_LOSS = "simd_loss"


STRUCTURES = (SPLIT, INDEPENDENT, SIMD_FORWARD, STATISTICS, REDUCTION, SIMD_LOSS)


# A fact beside the structures: w_n depends on N and on sample n's own target and input only.
OWN_WEIGHTS = "own_weights"


FACTS = (*STRUCTURES, OWN_WEIGHTS)


# "unknown" is no fact about the program, but about us: it stands for both of the others.
STATUSES = ("holds", "fails", "unknown")


# Ends the name of a quantity where parameters also enter the loss past the predictions.
PART = ", of the part through the predictions"


# Ends the name of a row whose weight other samples have set.
FACTOR = ", up to a batch-dependent factor"


@dataclass(frozen=True)
class Case:
    """One line of a rule: matches a world in which all of `holds` hold and all of `fails` fail."""

    outcome: Outcome
    reason: str
    name: str = ""
    holds: tuple[str, ...] = ()
    fails: tuple[str, ...] = ()

    def matches(self, world: World) -> bool:
        """Tell whether this case is the answer in a world, if no case before it is."""
        return world.issuperset(self.holds) and world.isdisjoint(self.fails)


@dataclass(frozen=True)
class Quantity:
    """A quantity, what peers call it, and its cases, of which the first match counts.

    `through_predictions`: its definition sees the parameters through the predictions only, so that
    it leaves something out where they also enter the loss directly. `available`: this release
    computes it.
    """

    name: str
    cases: tuple[Case, ...]
    peers: tuple[str, ...] = ()
    through_predictions: bool = True
    available: bool = False


@dataclass(frozen=True)
class Consequence:
    """What follows for one quantity.

    `name` is what the result must be called, empty if there is none. `depends_on` is filled when
    the outcome is `"unknown"`: the fewest facts that would settle it.
    """

    quantity: str
    outcome: Outcome
    name: str
    reason: str
    peers: tuple[str, ...]
    available: bool
    depends_on: tuple[str, ...] = ()
