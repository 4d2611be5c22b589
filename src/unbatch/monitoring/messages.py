"""Messages of a monitor: which are new, what failed in a line, and errors and warnings in words.

A monitor measures many times, and the same warning each time would bury the others. Whether a
message is a warning of Python or an entry of a line is decided in ``monitor.py``.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from unbatch.analysis.verdict import TITLES

NUMBER = re.compile(r"\d+(\.\d+)?")


@dataclass
class SeenMessages:
    """What was said before, so that each message is given once, whatever the numbers in it.

    ``verdicts``: status by name, as the last line had it.
    """

    texts: set[str] = field(default_factory=set)
    verdicts: dict[str, str] = field(default_factory=dict)

    def changes(self, verdicts: dict[str, str]) -> list[str]:
        """Return in words which verdicts are not what they were, and remember the new ones."""
        changes = []
        for name, status in verdicts.items():
            before = self.verdicts.get(name, status)
            if before != status:
                changes.append(f"{TITLES[name]}: {before} → {status}")
        self.verdicts = verdicts
        return changes

    def is_new(self, text: str) -> bool:
        """Return whether a text like this has not been given yet, and remember it."""
        # Sizes, steps and losses vary from batch to batch, and would make every message a new one.
        key = NUMBER.sub("0", text)
        new = key not in self.texts
        self.texts.add(key)
        return new


def failures(line: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the reasons why something in a line was not measured, each with the names of it."""
    names_of: dict[str, list[str]] = {}
    if "error" in line:
        names_of[line["error"]] = ["anything"]
    for name, entry in line.get("quantities", {}).items():
        if "error" in entry:
            names_of.setdefault(entry["error"], []).append(name)
    return names_of


def error_text(error: Exception) -> str:
    """Return an error as a traceback ends with it."""
    return f"{type(error).__name__}: {error}"


def warning_text(warning: warnings.WarningMessage) -> str:
    """Return a warning as Python prints it, without its place."""
    return f"{warning.category.__name__}: {warning.message}"
