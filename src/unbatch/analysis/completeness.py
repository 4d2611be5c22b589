"""Every argument of an op counts, unless its rule says in so many words that it does not.

A rule that forgets an argument would prove too much: that samples are apart where the argument
joins them, or alike where it tells them apart. So tensors carry a token through a rule: a result
that lacks one is mixed if the tensor depends on the batch, and else gets the tensor into its keys.
So does every other argument that is not at its default. What a rule takes account of in a way of
its own it names where it is registered, see ``registry.Arguments``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from unbatch.analysis.domain.dependence import StatisticDef
from unbatch.analysis.domain.ownership import ARGUMENT, MIXED, Ownership, code, digest, mix
from unbatch.analysis.rules import registry
from unbatch.analysis.rules.registry import Arguments, Rule, RuleContext

# Where results lie, and whether they take a gradient: no number depends on it. What a type does to
# numbers is seen by the types of the results, see ``_conversion``.
IMMATERIAL = frozenset(
    {
        "device",
        "dtype",
        "generator",
        "implicit",
        "layout",
        "memory_format",
        "non_blocking",
        "pin_memory",
        "requires_grad",
    }
)

# Arguments that say which numbers are taken, and are none of them.
CHOOSING = frozenset({"index", "indices", "mask", "condition"})


@dataclass
class _Tokens:
    """Tensor arguments, each with a word of its own among its sources.

    ``given``: by token, the name of the argument and its ownership without the token.
    """

    given: dict[str, tuple[str, Ownership]] = field(default_factory=dict)

    def put(self, name: str, argument: Any) -> Any:
        """Return an argument with a token on every tensor; ``name``: of the argument."""
        if isinstance(argument, list | tuple):
            return [self.put(name, part) for part in argument]
        # What has no elements has no part in any result.
        if not isinstance(argument, Ownership) or 0 in argument.shape:
            return argument
        token = f"{ARGUMENT}{len(self.given)}"
        self.given[token] = name, argument
        return replace(argument, sources=argument.sources | {token})

    def take(self, x: Any) -> Any:
        """Return a result, or a statistic, without tokens."""
        return replace(x, sources=x.sources - self.given.keys())

    def missing(
        self, result: Ownership, definitions: Sequence[StatisticDef]
    ) -> list[tuple[str, Ownership]]:
        """Return names and ownership of the tensors that a result does not come from.

        ``definitions``: of all statistics; what a statistic comes from, its users come from.
        """
        sources = result.sources.union(*(definitions[s].sources for s in result.statistics))
        return [tensor for token, tensor in self.given.items() if token not in sources]


def completed(
    call: RuleContext, rule: Rule, defaults: Mapping[str, Any]
) -> tuple[list[Ownership | None], frozenset[str]]:
    """Return the results of a rule as functions of all arguments, and what it had forgotten.

    ``defaults``: by name, the values of arguments that a call does not give. The second value names
    the arguments that depend on the batch and are missing from a result, which is mixed therefore.
    """
    counted = registry.ARGUMENTS.get(rule, Arguments())
    tokens = _Tokens()
    arguments = {name: tokens.put(name, a) for name, a in call.arguments.items()}
    definitions = call.algebra.record.definitions
    first = len(definitions)
    results = as_list(rule(replace(call, arguments=arguments)))
    constants = _other_constants(call, counted, defaults)
    forgotten: set[str] = set()
    for place, result in enumerate(results):
        if result is None:
            continue
        results[place] = plain = tokens.take(result)
        if 0 in result.shape:
            continue
        missing = []
        for name, marks in tokens.missing(result, definitions):
            if not counted.leaves_out(name, place):
                missing.append((name, marks))
        joining = {name for name, marks in missing if marks.depends_on_batch}
        if joining and not (result.owner == MIXED).all():
            forgotten |= joining
            results[place] = registry.mixed(call, result.shape, registry.NO_RULE)
            continue
        tensors = [(name, digest(m)) for name, m in missing if not counted.counts(name)]
        converted = _conversion(call, counted, place)
        results[place] = _renamed(plain, tensors + constants + converted)
    # Only now, as a result may come from an argument by way of a statistic.
    definitions[first:] = [tokens.take(d) for d in definitions[first:]]
    return results, frozenset(forgotten)


def as_list(results: Any) -> list[Ownership | None]:
    """Return what a rule returns as a list: one result may come alone."""
    if isinstance(results, list | tuple):
        return list(results)
    return [results]


def _other_constants(
    call: RuleContext, counted: Arguments, defaults: Mapping[str, Any]
) -> list[tuple[str, Any]]:
    """Return names and values of the arguments, other than tensors, that a key has to say."""
    constants = []
    for name, argument in call.arguments.items():
        if name in IMMATERIAL or counted.counts(name) or registry.has_tensors(argument):
            continue
        value = repr(argument)
        if value != repr(defaults.get(name)):
            constants.append((name, value))
    return constants


def _conversion(call: RuleContext, counted: Arguments, place: int) -> list[tuple[str, Any]]:
    """Return the family of a result's type where the arguments of an op do not decide it.

    By the families of the arguments the keys of these differ already.
    """
    if place >= len(call.families.results):
        return []
    result = call.families.results[place]
    read: set[str] = set()
    for name, families in call.families.arguments.items():
        if name not in CHOOSING and not counted.leaves_out(name, place):
            read |= families
    # 0.7 in a tensor of floats, and one copied into whole numbers. Sums of small and large integers
    # are of either type, by the number of dims.
    whole = result not in ("floating", "complex")
    if result in read and not (whole and len(read) > 1):
        return []
    if not read and result == "floating":
        return []
    return [("type", result)]


def _renamed(x: Ownership, names: list[tuple[str, Any]]) -> Ownership:
    """Return ``x`` as another function of each element, and of each scalar of the samples."""
    if not names:
        return x
    # A scalar that is such an element keeps the name of its key. Others only enter.
    atoms = set()
    for atom in x.atoms:
        key = np.asarray(atom, dtype=np.uint64)
        renamed = bool((x.key == key).any())
        atoms.add(int(mix(key, code(names))) if renamed else atom)
    return replace(x.with_name(names), atoms=frozenset(atoms))
