"""Whole modules on the page of the API: a line `::: unbatch.module.*` becomes a line for every
public name of that module, in the order of the module.

Public is what `public.py` imports. Sources are read and not imported, as mkdocstrings reads them.
mkdocs calls ``on_page_markdown``.
"""

import ast
import re
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).parents[2] / "src"
EVERY = re.compile(r"^::: (unbatch\.[\w.]+)\.\*$", re.M)


def statements(module: str) -> list[ast.stmt]:
    """Return what a module consists of."""
    path = SOURCE.joinpath(*module.split(".")).with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8")).body


def public_names(module: str) -> list[str]:
    """Return the public names of a module. Raises ``ValueError`` if there are none."""
    public: set[str] = set()
    for statement in statements("unbatch.public"):
        if isinstance(statement, ast.ImportFrom) and statement.module == module:
            public |= {alias.name for alias in statement.names}
    names = []
    for statement in statements(module):
        if isinstance(statement, ast.ClassDef | ast.FunctionDef) and statement.name in public:
            names.append(statement.name)
    if not names:
        raise ValueError(f"public.py imports nothing from {module}: ::: {module}.* is empty")
    return names


def spelled_out(markdown: str) -> str:
    """Return a page with a line for each name."""

    def lines(match: re.Match[str]) -> str:
        return "\n\n".join(f"::: unbatch.{name}" for name in public_names(match[1]))

    return EVERY.sub(lines, markdown)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Spell out the names of modules before mkdocstrings looks them up."""
    return spelled_out(markdown)
