"""The tools that people already have: one file for each, which is imported when it is asked for.

Nothing is computed here that ``Problem`` does not compute; names, shapes and scales are those of the other tool.
"""

from importlib import import_module
from typing import Any

TOOLS = ("backpack", "curvlinops", "laplace", "lightning", "opacus", "transformers")
MSG_MISSING = (
    "This needs {tool}, which is not installed: {error}. Install it with `pip install {package}`."
)


def needed(module: str, tool: str, package: str) -> Any:
    """A module of another tool. Raises ``ImportError`` with the command that installs it where it is missing."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(MSG_MISSING.format(tool=tool, error=error, package=package)) from error


def __getattr__(name: str) -> Any:
    """``unbatch.integrations.laplace`` needs no import of its own, and laplace only then."""
    if name in TOOLS:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"unbatch has no integration {name!r}; there are {', '.join(TOOLS)}.")
