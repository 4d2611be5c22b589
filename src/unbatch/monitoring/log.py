"""The file that a monitor writes: one JSON object a line, to be gone on with by the next run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unbatch.errors import MSG_MONITOR_FILE, InputError

NOT_FINITE = {math.inf: "Infinity", -math.inf: "-Infinity"}


class Journal:
    """A file of one JSON object a line, opened for each line, so that nothing is lost where a run is killed.

    What is there already is kept; ``last`` is its last line. Raises ``InputError`` where the file cannot be written,
    or holds something else.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+", encoding="utf-8") as file:
                file.seek(0)
                whole, _, broken = file.read().rpartition("\n")
                self.last = _entry(whole.rpartition("\n")[2]) if whole else {}
                if broken and not (whole or broken.startswith('{"step"')):
                    raise ValueError("it holds other text")
                if broken:  # a run died while it wrote this
                    file.truncate(len(f"{whole}\n".encode()) if whole else 0)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise InputError(MSG_MONITOR_FILE.format(path=self.path, reason=reason)) from error

    def write(self, line: Mapping[str, Any]) -> None:
        text = json.dumps(standard(line), allow_nan=False, ensure_ascii=False)
        with self.path.open(
            "a", encoding="utf-8", errors="backslashreplace"
        ) as file:  # surrogates are not UTF-8
            file.write(text + "\n")


def _entry(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("step"), int):
        raise ValueError("its last line was not written by a monitor")
    return found


def standard(value: Any) -> Any:
    """JSON has no word for what is not finite; these are the ones of Protocol Buffers' JSON mapping."""
    if isinstance(value, dict):
        return {k: standard(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [standard(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return NOT_FINITE.get(value, "NaN")
    return value
