"""What is said where autograd comes to an op that PyTorch has no derivative of."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from unbatch.errors import MSG_NO_DERIVATIVE, StructureError

MISSING = re.compile(r"derivative for '?(?:aten::)?(\w+)'? is not implemented")


@contextmanager
def refused_if_missing() -> Iterator[None]:
    """Raise ``StructureError`` with the name of an op that has no derivative."""
    try:
        yield
    except RuntimeError as error:  # NotImplementedError is one
        missing = MISSING.search(str(error))
        if missing is None or isinstance(error, StructureError):
            raise
        raise StructureError(MSG_NO_DERIVATIVE.format(op=missing[1])) from error
