"""Settings that programs of the third hunt read, as a project keeps them in a file of their own."""

from typing import Any

SCALE = 1.0
CALLS = 0
LAZY = {"DEFERRED": 1.0}


def __getattr__(name: str) -> Any:
    if name in LAZY:
        return LAZY[name]
    raise AttributeError(name)
