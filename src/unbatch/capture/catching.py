"""Whether the program would go on if an op raised an error: another path, which the numbers choose.

Python keeps, for each function, which instructions an error leads to a handler from. A handler that
asks for the class of the error, or for none, is an ``except``; ``finally`` and ``with`` hand the
error on, but for ``contextlib.suppress``.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable
from functools import lru_cache
from types import CodeType, FrameType
from typing import Any

# By the first of these that comes up in a handler, errors are caught there, or handed on.
CAUGHT = ("CHECK_EXC_MATCH", "CHECK_EG_MATCH", "RETURN_VALUE", "RETURN_CONST")
HANDED_ON = ("RERAISE", "WITH_EXCEPT_START")


def errors_are_caught(is_users: Callable[[FrameType], bool], top: set[CodeType]) -> bool:
    """Tell whether a function of the user's that is running would catch an error raised now.

    ``top``: code of the functions above which nobody looks.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code not in top:
        if is_users(frame) and _catches(frame.f_code, frame.f_lasti):
            return True
        frame = frame.f_back
    return False


@lru_cache(maxsize=4096)
def _catches(code: CodeType, offset: int) -> bool:
    """Tell whether an error at an instruction of a function ends in an ``except`` of it."""
    bytecode: Any = dis.Bytecode(code)
    entries = bytecode.exception_entries
    names: dict[int, str] = {}
    if entries:
        names = {i.offset: i.opname for i in bytecode}
    # A handler that hands an error on is in the reach of the next one.
    for _ in entries:
        target = _handler_of(entries, offset)
        if target is None:
            return False
        if _is_except(names, target, "suppress" in code.co_names):
            return True
        offset = target
    return False


def _handler_of(entries: Any, offset: int) -> int | None:
    for entry in entries:
        if entry.start <= offset < entry.end:
            return int(entry.target)
    return None


def _is_except(names: dict[int, str], target: int, suppresses: bool) -> bool:
    """Tell whether the handler that begins at ``target`` catches errors."""
    handler = [names[offset] for offset in sorted(names) if offset >= target]
    if handler[:2] == ["PUSH_EXC_INFO", "POP_TOP"]:  # without a class
        return True
    for name in handler:
        if name in CAUGHT:
            return True
        if name in HANDED_ON:
            return suppresses and name == "WITH_EXCEPT_START"
    return False
