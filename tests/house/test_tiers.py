"""The quick tier leaves nothing out: each test function and each of its values, or a reason in a
list.
"""

import ast
from collections.abc import Sequence
from pathlib import Path

import pytest

import tiers
from tiers import COLLECTED, FULL, ONCE, SWEEPS, Call, listed, quick

ROOT = Path(__file__).parents[1]


def check_every_function(calls: Sequence[Call], chosen: Sequence[bool]) -> None:
    """Raise where no call of a function is quick, and no list says why."""
    functions = {call.names for call in calls if not listed(call, {**FULL, **SWEEPS})}
    reached = {call.names for call, is_quick in zip(calls, chosen, strict=True) if is_quick}
    missing = sorted(names[1] for names in functions - reached)
    assert not missing, f"neither quick nor listed with a reason: {missing}"


def check_every_value(calls: Sequence[Call], chosen: Sequence[bool]) -> None:
    """Raise where a module has a value that none of its quick tests is called with, and no list
    says why.
    """
    wanted, reached = set(), set()
    for call, is_quick in zip(calls, chosen, strict=True):
        if listed(call, {**FULL, **ONCE, **SWEEPS}):
            continue
        values = {(call.module, value) for _, value in call.values}
        wanted |= values
        if is_quick:
            reached |= values
    missing = wanted - reached
    assert not missing, (
        f"{len(missing)} values are in no quick test, such as {sorted(map(str, missing))[:3]}"
    )


def product(module: str, function: str, **axes: int) -> list[Call]:
    """The calls of a test function over all combinations of its values."""
    rows: list[tuple] = [()]
    for name, count in axes.items():
        rows = [(*row, (name, f"{name} {i}")) for row in rows for i in range(count)]
    return [Call(module, function, row) for row in rows]


# ---------------------------------------------------------------- the tests that there are


def test_every_function_that_was_collected_is_quick_or_listed(request):
    calls = request.config.stash[COLLECTED]
    check_every_function(calls, quick(calls))


def test_every_value_that_was_collected_is_quick(request):
    calls = request.config.stash[COLLECTED]
    check_every_value(calls, quick(calls))


@pytest.mark.parametrize("name", [*FULL, *ONCE, *SWEEPS])
def test_what_is_listed_is_there(name):
    module, _, function = name.partition("::")
    (file,) = ROOT.rglob(f"{module}.py")
    tree = ast.parse(file.read_text(encoding="utf-8"))
    defined = [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert not function or function in defined, f"there is no {function} in {file}"


def test_a_list_gives_reasons():
    reasons = [*FULL.values(), *ONCE.values(), *SWEEPS.values()]
    assert len({*FULL, *ONCE, *SWEEPS}) == len(reasons)
    assert all(len(reason.split()) >= 3 for reason in reasons)


# ---------------------------------------------------------------- the rule


def test_a_product_is_covered_by_as_many_tests_as_its_longest_parameter_has_values():
    calls = product("test_m", "test_f", case=24, mode=2, by=3)
    chosen = quick(calls)
    assert sum(chosen) == 24
    check_every_value(calls, chosen)
    pairs = {call.values[1:] for call, is_quick in zip(calls, chosen, strict=True) if is_quick}
    assert len(pairs) == 2 * 3


def test_functions_over_one_table_share_it():
    one = product("test_m", "test_f", case=120, mode=2)
    other = product("test_m", "test_g", case=120)
    chosen = quick([*one, *other])
    assert sum(chosen[: len(one)]) == 60
    assert sum(chosen[len(one) :]) == 60
    check_every_value([*one, *other], chosen)


def test_functions_of_other_modules_do_not_share():
    calls = [*product("test_m", "test_f", case=120), *product("test_n", "test_g", case=120)]
    assert all(quick(calls))


def test_a_function_without_parameters_is_quick():
    assert quick([Call("test_m", "test_f", ())]) == [True]


@pytest.mark.parametrize(("table", "count"), [("FULL", 0), ("ONCE", 1), ("SWEEPS", 0)])
@pytest.mark.parametrize("name", ["test_m", "test_m::test_f"])
def test_what_is_listed_runs_once_or_not(monkeypatch, table, count, name):
    monkeypatch.setitem(getattr(tiers, table), name, "it takes a minute")
    assert sum(quick(product("test_m", "test_f", case=5))) == count


def test_the_quick_tier_and_the_rest_are_the_whole(request):
    items = request.session.items
    kept, left = tiers.of_tier(items, "quick")
    others, rest = tiers.of_tier(items, "rest")
    sweeps = [item for item in items if tiers.listed(tiers.call_of(item), tiers.SWEEPS)]
    assert kept == [item for item in rest if item not in sweeps]
    assert left == [item for item in items if item in others or item in sweeps]
    assert sorted(item.nodeid for item in kept + left) == sorted(item.nodeid for item in items)


def test_an_order_by_recording_leaves_nothing_out(request):
    items = request.session.items
    ordered = tiers.by_recording(items)
    assert sorted(item.nodeid for item in ordered) == sorted(item.nodeid for item in items)


# ---------------------------------------------------------------- planted


def test_a_function_that_is_left_out_is_caught():
    calls = [*product("test_m", "test_f", case=2), *product("test_m", "test_g", case=2)]
    with pytest.raises(AssertionError, match="test_g"):
        check_every_function(calls, [True, True, False, False])


def test_a_value_that_is_left_out_is_caught():
    calls = product("test_m", "test_f", case=3, mode=2)
    with pytest.raises(AssertionError, match="mode 1"):
        check_every_value(calls, [call.values[1][1] == "mode 0" for call in calls])
