"""Warnings of PyTorch about its own ops, which a sweep over all of them meets."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quietly() -> Iterator[None]:
    """Leave out warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
