"""Programs with loops that Python ends: what is found out about them, and at which cost.

The cost is counted in ops, and the unit is a plain step: three times the ops of the forward pass.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

import unbatch as ub
from cases.loops import LOOPS, VERDICTS
from unbatch.capture import effort
from unbatch.capture.effort import BESIDES, LONGER, PASSES, PLAIN_STEPS, Meter
from unbatch.problem import analysis

pytestmark = pytest.mark.filterwarnings("ignore::unbatch.MixedSamplesWarning")


@pytest.fixture
def meters(monkeypatch) -> list[Meter]:
    """The meters of all structures, which allow no seconds beyond the steps."""
    used: list[Meter] = []
    plain = analysis.metered

    @contextmanager
    def noted(ops: int, most: float) -> Iterator[Meter]:
        with plain(ops, most) as meter:
            used.append(meter)
            yield meter

    monkeypatch.setattr(effort, "SECONDS", 0.0)
    monkeypatch.setattr(analysis, "metered", noted)
    return used


def cost(meter: Meter) -> float:
    """Plain steps, without the last run, which may be long by itself."""
    last = LONGER * meter.plain + BESIDES
    return (meter.spent - last) / (PASSES * meter.plain)


def statuses(structure: ub.Structure) -> tuple[str, ...]:
    return tuple(getattr(structure, name).status for name in VERDICTS)


@pytest.mark.parametrize("name", LOOPS)
def test_a_structure_is_right_and_within_its_effort(name: str, meters: list[Meter]) -> None:
    structure = LOOPS[name].problem().structure
    assert statuses(structure) == LOOPS[name].expected
    (meter,) = meters
    assert cost(meter) <= PLAIN_STEPS


@pytest.mark.parametrize("name", LOOPS)
def test_less_effort_finds_less_and_nothing_wrong(name: str, meters: list[Meter]) -> None:
    problem = LOOPS[name].problem(effort=2)
    for status, truth in zip(statuses(problem.structure), LOOPS[name].truth, strict=True):
        assert status in (truth, "unknown")
    (meter,) = meters
    assert cost(meter) <= 2


@pytest.mark.parametrize("name", LOOPS)
def test_verifying_ends_and_contradicts_nothing(name: str) -> None:
    assert LOOPS[name].problem().verify()
