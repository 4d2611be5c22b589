"""Which tests are the quick tier, and the order in which tests run.

`pytest --tier quick` runs every test function, and every value that a test function is called with,
at least once; `--tier rest` runs what that leaves out, but for sweeps that take as long as all
others together (`SWEEPS`); without the option everything runs. What is quick follows from the
parameters:

- A test with parameters runs as often as its longest parameter has values, each once. The values of
  the other parameters take turns, so that all of them, and pairs of them, come up.
- Test functions of one module that run over the same table share it: each takes every k-th case,
  and together they take all of it once.
- `ONCE` names what is slow and of one kind, of which one item is enough; `FULL` what is only in the
  full tier.

Tests of one recording run one after the other, so that it is made once.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

TIERS = ("all", "quick", "rest")
COLLECTED = pytest.StashKey[list["Call"]]()  # all tests, before those of other tiers were left out
SHARED = 100  # values from which on a parameter is a table that test functions share

# By module, or module::function; with the reason.
ONCE = {
    "test_zoo": "published models, seconds each; small ones of each kind are in the other tables",
    "test_notebooks": "each starts a kernel",
    "test_op_sweep::test_ops_do_not_share_keys": "hundreds of ops each",
    "test_op_sweep::test_chains_of_two_ops": "300 random chains each",
    "test_op_sweep::test_chains_of_four_ops": "100 random chains each",
    "test_plot::test_files_are_the_same_for_the_same_picture": "each draws a picture several times",
    "test_wrapped::test_what_is_wrapped_is_as_the_plain_model": "each compiles or wraps a model",
}
FULL = {
    "test_imports": "`make check` runs it, before any other test",
    "test_wheel": "builds the wheel and an environment to install it in",
    "test_properties::test_forward_programs": "200 random programs; those found wrong are quick",
    "test_properties::test_loss_programs": "150 random programs; those found wrong are quick",
    "test_hard::test_rows_are_the_definition": "the planted bugs run the cases once found wrong",
    "test_hard::test_the_matrix_is_the_definition": "as the definition of rows, likewise",
    "test_shapes_of_cases": "all models and losses at three sizes; the kinds are in test_shapes",
    "test_fuzz::test_random_nets": "random nets; those found wrong are quick",
}

# Neither quick nor in the rest: half an hour, of which `make test-all` is the place.
SWEEPS = {
    "test_op_sweep::test_every_op_is_as_the_page_says": "seconds for each of 700 ops",
    "test_op_derivatives::test_every_op_is_as_the_table_says": "a second for each of 600 ops",
    "test_op_writes::test_every_op_that_writes_is_as_the_table_says": "1500 ops that write",
}


@dataclass(frozen=True)
class Call:
    """A test as the rule sees it: its module, its function, and the values
    that it is called with.
    """

    module: str
    function: str
    values: tuple[tuple[str, Hashable], ...]

    @property
    def names(self) -> tuple[str, str]:
        return self.module, f"{self.module}::{self.function}"


def listed(call: Call, table: Iterable[str]) -> bool:
    return any(name in table for name in call.names)


def call_of(item: pytest.Item) -> Call:
    callspec = getattr(item, "callspec", None)
    values = []
    for name, value in (callspec.params if callspec else {}).items():
        values.append((name, identity(value)))
    function = getattr(item, "originalname", None) or item.name
    return Call(item.path.stem, function, tuple(values))


def identity(value: Any) -> Hashable:
    """Return what tells one value of a parameter from another: plain values by what they are,
    others as objects.
    """
    if isinstance(value, str | int | float | bool | None):
        return repr(value)
    return id(value)


# ---------------------------------------------------------------- the rule


@dataclass
class Function:
    """A test function: where its calls stand among all tests, and the calls themselves."""

    indices: list[int]
    calls: list[Call]

    @property
    def table(self) -> str:
        """The name of the parameter that has most values; empty where there is no parameter."""
        most, name = 0, ""
        for parameter, _ in self.calls[0].values:
            count = len(self.values_of(parameter))
            if count > most:
                most, name = count, parameter
        return name

    def values_of(self, parameter: str) -> dict[Hashable, list[int]]:
        """Return by value of a parameter which of the calls have it."""
        groups: dict[Hashable, list[int]] = {}
        for i, call in enumerate(self.calls):
            groups.setdefault(dict(call.values).get(parameter), []).append(i)
        return groups


def functions_of(calls: Sequence[Call]) -> list[Function]:
    functions: dict[tuple[str, str], Function] = {}
    for i, call in enumerate(calls):
        function = functions.setdefault((call.module, call.function), Function([], []))
        function.indices.append(i)
        function.calls.append(call)
    return list(functions.values())


def quick(calls: Sequence[Call]) -> list[bool]:
    """Return of each call whether it is in the quick tier."""
    chosen = [False] * len(calls)
    for functions in _by_table(functions_of(calls)):
        for place, function in enumerate(functions):
            for i in _covering(function, len(functions), place):
                chosen[function.indices[i]] = True
    return chosen


def _by_table(functions: Sequence[Function]) -> list[list[Function]]:
    """Return the functions in groups: those of a module that run over the same table, and each
    other one alone.
    """
    groups: dict[Hashable, list[Function]] = {}
    for function in functions:
        first = function.calls[0]
        values = frozenset(function.values_of(function.table))
        key: Hashable = first.names
        if len(values) >= SHARED:
            key = (first.module, values)
        groups.setdefault(key, []).append(function)
    return list(groups.values())


def _covering(function: Function, every: int, place: int) -> list[int]:
    """Return which calls of a function are quick: of its table every `every`-th value, from `place`
    on, each once.

    The calls of a value take turns, so that the other parameters vary; a value of these that did
    not come up is added.
    """
    calls, table = function.calls, function.table
    if listed(calls[0], FULL) or listed(calls[0], SWEEPS):
        return []
    if listed(calls[0], ONCE):
        return [0]
    chosen = []
    groups = list(function.values_of(table).values())
    for turn, group in enumerate(groups[place % len(groups) :: every]):
        chosen.append(group[(turn + place) % len(group)])
    covered: set[tuple[str, Hashable]] = set()
    for i in chosen:
        covered.update(calls[i].values)
    for i, call in enumerate(calls):
        others = [value for value in call.values if value[0] != table]
        if not covered.issuperset(others):
            chosen.append(i)
            covered.update(call.values)
    return chosen


# ---------------------------------------------------------------- of the items of pytest


def of_tier(items: Sequence[pytest.Item], tier: str) -> tuple[list[pytest.Item], list[pytest.Item]]:
    """Return the tests of a tier, and those that it leaves out."""
    if tier == "all":
        return list(items), []
    kept, left = [], []
    calls = [call_of(item) for item in items]
    for item, call, is_quick in zip(items, calls, quick(calls), strict=True):
        if is_quick == (tier == "quick") and not listed(call, SWEEPS):
            kept.append(item)
        else:
            left.append(item)
    return kept, left


def recording_of(item: pytest.Item) -> tuple[str, str] | None:
    """Return the case and mode of the problem that a test is lent; None of a test that is lent
    none.
    """
    callspec = getattr(item, "callspec", None)
    if callspec is None or "recorded" not in item.fixturenames:
        return None
    return callspec.params["case"].name, callspec.params.get("mode", "train")


def by_recording(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """Return the same tests, where all that are lent one recording follow the first that is."""
    groups: dict[Hashable, list[pytest.Item]] = {}
    for item in items:
        key = recording_of(item) or item.nodeid
        groups.setdefault(key, []).append(item)
    ordered = []
    for group in groups.values():
        ordered += group
    return ordered
