"""One thread, one seed, reproducible examples: a failing test fails again when it is run alone."""

import functools
import os
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import settings

from cases import versions
from cases.recordings import Recordings, check_asks_only
from tiers import COLLECTED, TIERS, by_recording, call_of, of_tier
from unbatch import errors
from unbatch.analysis import loss_boundary
from unbatch.capture import program
from unbatch.capture import program as program_module
from unbatch.capture.check import check_graph
from unbatch.capture.graph import Graph

torch.set_num_threads(1)

settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


def _checked(function):
    """A pass that makes or changes a graph, whose result is held against the grammar."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        result = function(*args, **kwargs)
        check_graph(result[0] if isinstance(result, tuple) else result)
        return result

    return run


for name in ("moved", "inserted", "in_double"):
    setattr(Graph, name, _checked(getattr(Graph, name)))
program.record = _checked(program.record)
program_module.record_answered = _checked(program_module.record_answered)
loss_boundary.split = _checked(loss_boundary.split)
loss_boundary.folded = _checked(loss_boundary.folded)

errors.STRICT = True  # an error inside a rule is a bug here, not an "unknown"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def recordings() -> Recordings:
    return Recordings()


@pytest.fixture
def recorded(request: pytest.FixtureRequest, recordings: Recordings) -> Iterator[Callable]:
    """`recorded(case, mode)`: a problem that other tests share, and the arguments of the reference.

    Fails where the test has changed any of it.
    """
    check_asks_only(request.fixturenames)
    borrowed = []

    def lend(case, mode):
        borrowed.append((case, mode))
        return recordings.lend(case, mode)

    yield lend
    for case, mode in borrowed:
        recordings.take_back(case, mode)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--tier", choices=TIERS, default="all", help="which tests to run, see tests/README.md"
    )
    parser.addoption(
        "--record", action="store_true", help="write the counts to tests/versions.json"
    )


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if config.getoption("--record"):
        versions.record(config.getoption("--tier"), terminalreporter.stats)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[COLLECTED] = [call_of(item) for item in items]
    kept, left = of_tier(items, config.getoption("--tier"))
    if left:
        config.hook.pytest_deselected(items=left)
    items[:] = by_recording(kept)
