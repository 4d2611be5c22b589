"""One thread, one seed, reproducible examples: a failing test fails again when it is run alone."""

import functools
import os

import pytest
import torch
from hypothesis import settings

from unbatch import branches, capture, errors, structure
from unbatch.graph import Graph, check_graph

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
capture.record = _checked(capture.record)
branches.record_answered = _checked(branches.record_answered)
structure.split = _checked(structure.split)
structure.folded = _checked(structure.folded)

errors.STRICT = True  # an error inside a rule is a bug here, not an "unknown"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
