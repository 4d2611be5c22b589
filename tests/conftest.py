"""One thread, one seed, reproducible examples: a failing test fails again when it is run alone."""

import os

import pytest
import torch
from hypothesis import settings

from unbatch import errors

torch.set_num_threads(1)

settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


errors.STRICT = True  # an error inside a rule is a bug here, not an "unknown"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
