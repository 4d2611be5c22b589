"""Where the lines of a monitor go: a file of one JSON object a line, and TensorBoard.

A file is continued by the next run. What stands in a line is not decided here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from unbatch.errors import MSG_EXTRA, MSG_MONITOR_FILE, InputError

# JSON has no numbers that are not finite; these are the words of Protocol Buffers' JSON mapping.
NOT_FINITE = {math.inf: "Infinity", -math.inf: "-Infinity"}


# Lists up to this length get a curve for each entry in TensorBoard; longer ones get none.
MOST_CURVES = 3


# --- the file -------------------------------------------------------------------------------------


class Journal:
    """A file of one JSON object a line, opened anew for each, so that a killed run loses nothing.

    An existing file is continued; ``last`` is its last line. Raises ``InputError`` where the file
    cannot be written or holds something else.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.last = self._last_line()
        except (OSError, ValueError) as error:
            reason = str(error)
            if isinstance(error, OSError) and error.strerror:
                reason = error.strerror
            raise InputError(MSG_MONITOR_FILE.format(path=self.path, reason=reason)) from error

    def _last_line(self) -> dict[str, Any]:
        """Return the last whole line, and cut off a broken one that a killed run left behind.

        Raises ``ValueError`` for lines that no monitor wrote, which are left as they are.
        """
        # Appending creates a file and fails on one that cannot be written, without changing it.
        with self.path.open("a+", encoding="utf-8") as file:
            file.seek(0)
            whole, _, broken = file.read().rpartition("\n")
            last = {}
            if whole:
                last = _parsed(whole.rpartition("\n")[2])
            if not broken:
                return last
            # With a whole line above it, the broken one is ours; alone it has to look like ours.
            if not whole and not broken.startswith('{"step"'):
                raise ValueError("it holds other text")
            size = 0
            if whole:
                size = len(f"{whole}\n".encode())
            file.truncate(size)
            return last

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one line."""
        text = json.dumps(standard(line), allow_nan=False, ensure_ascii=False)
        # Names may hold surrogates (file names do), which UTF-8 does not have: they are escaped.
        with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text + "\n")


def _parsed(text: str) -> dict[str, Any]:
    """Return a line that a monitor wrote; raises ``ValueError`` for anything else."""
    try:
        line = json.loads(text)
    except ValueError:
        line = None
    if not isinstance(line, dict) or not isinstance(line.get("step"), int):
        raise ValueError("its last line was not written by a monitor")
    return line


def standard(value: Any) -> Any:
    """Return the value in standard JSON: numbers that are not finite as words."""
    if isinstance(value, dict):
        return {name: standard(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [standard(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return NOT_FINITE.get(value, "NaN")
    return value


# --- TensorBoard ----------------------------------------------------------------------------------


def board_at(place: Any) -> Any:
    """Return a writer to a folder; a ``SummaryWriter``, or None, is returned as it is.

    Raises ``ImportError`` for a folder where TensorBoard is missing.
    """
    if not isinstance(place, str | Path):
        return place
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        message = MSG_EXTRA.format(
            what="Writing for TensorBoard", package="tensorboard", extra="tensorboard"
        )
        raise ImportError(message) from error
    return SummaryWriter(str(place))


def write_to_board(board: Any, line: Mapping[str, Any]) -> None:
    """Write the numbers of a line as curves, its changes and warnings as text."""
    for path, number in scalars(line):
        board.add_scalar(path, number, line["step"])
    for kind in ("changes", "warnings"):
        for text in line.get(kind, ()):
            board.add_text(f"unbatch/{kind}", text, line["step"])


def scalars(line: Mapping[str, Any], prefix: str = "unbatch") -> Iterator[tuple[str, float]]:
    """Yield the numbers of a line, each with the path of its curve."""
    for name, entry in line.get("quantities", {}).items():
        yield from _numbers_below(f"{prefix}/{name}", entry.get("value"))
    if line["overhead"] is not None:
        yield f"{prefix}/overhead", line["overhead"]


def _numbers_below(path: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for name, entry in value.items():
            yield from _numbers_below(f"{path}/{name}", entry)
    elif isinstance(value, int | float):
        yield path, value
    elif isinstance(value, list) and len(value) <= MOST_CURVES:
        # Eigenvalues ascend; curve 1 is the largest, however many there are.
        for rank, entry in enumerate(reversed(value), 1):
            yield from _numbers_below(f"{path}/{rank}", entry)
