"""Adapters to other tools: one file for each tool, imported when it is first used.

Nothing is computed here that ``Problem`` does not compute; names, shapes and scales are those of
the other tool. ``backpack`` and ``opacus`` offer the names of these tools without needing them,
``curvlinops`` and ``laplace`` connect to them, ``lightning`` and ``transformers`` are callbacks for
a monitor.
"""

from importlib import import_module
from typing import Any

TOOLS = ("backpack", "curvlinops", "laplace", "lightning", "opacus", "transformers")
MSG_MISSING = (
    "This needs {tool}, which is not installed: {error}. Install it with `pip install {package}`."
)


def needed(module: str, tool: str, package: str) -> Any:
    """Return a module of another tool.

    Raises ``ImportError`` with the command that installs it where it is missing.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(MSG_MISSING.format(tool=tool, error=error, package=package)) from error


def __getattr__(name: str) -> Any:
    """Return an adapter: ``unbatch.integrations.laplace`` imports laplace when it is used."""
    if name not in TOOLS:
        tools = ", ".join(TOOLS)
        raise AttributeError(f"unbatch has no integration {name!r}; there are {tools}.")
    return import_module(f"{__name__}.{name}")
