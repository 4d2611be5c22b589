"""How much a reader meets in a line of code: counts over a folder of Python files.

Run as a script, it prints a table of several folders beside each other:
``python tests/house/density.py src/unbatch path/to/another/package``.
"""

from __future__ import annotations

import ast
import io
import statistics
import sys
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
BRANCHES = (
    ast.If,
    ast.For,
    ast.While,
    ast.IfExp,
    ast.comprehension,
    ast.BoolOp,
    ast.ExceptHandler,
    ast.match_case,
)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
COLUMNS = 100


@dataclass(frozen=True)
class Function:
    """One function: where it stands, its lines, and how many ways lead through it."""

    place: str
    lines: int
    body: int
    branches: int


@dataclass
class Density:
    """What a folder holds. ``code``: lines that are neither blank, nor comment, nor docstring."""

    files: int = 0
    lines: int = 0
    code: int = 0
    comments: int = 0
    docstrings: int = 0
    comprehensions: int = 0
    nested: int = 0
    conditionals: int = 0
    booleans: int = 0
    long_lines: int = 0
    sizes: list[int] = field(default_factory=list)
    functions: list[Function] = field(default_factory=list)

    def per_hundred(self, count: int) -> float:
        """Occurrences in 100 lines of code."""
        return 100 * count / max(self.code, 1)

    def add(self, name: str, source: str) -> None:
        """Count one file."""
        tree = ast.parse(source)
        lines = source.splitlines()
        documented = _docstring_lines(tree)
        commented = _comment_lines(source)
        self.files += 1
        self.lines += len(lines)
        self.sizes.append(len(lines))
        self.docstrings += len(documented)
        self.comments += len(commented)
        for number, line in enumerate(lines, 1):
            self.long_lines += len(line) > COLUMNS
            alone = line.strip().startswith("#")
            self.code += bool(line.strip()) and not alone and number not in documented
        for node in ast.walk(tree):
            self._count(name, node)

    def _count(self, name: str, node: ast.AST) -> None:
        if isinstance(node, COMPREHENSIONS):
            self.comprehensions += 1
            self.nested += _holds_another(node)
        elif isinstance(node, ast.IfExp):
            self.conditionals += 1
        elif isinstance(node, ast.BoolOp):
            self.booleans += 1
        elif isinstance(node, FUNCTIONS):
            self.functions.append(_function(name, node))


def _function(name: str, node: ast.FunctionDef | ast.AsyncFunctionDef) -> Function:
    end = node.end_lineno or node.lineno
    first = node.body[0]
    if ast.get_docstring(node, clean=False) is not None and len(node.body) > 1:
        first = node.body[1]
    branches = sum(isinstance(inner, BRANCHES) for inner in ast.walk(node))
    place = f"{name}:{node.lineno} {node.name}"
    return Function(place, end - node.lineno + 1, end - first.lineno + 1, branches)


def _holds_another(node: ast.AST) -> bool:
    inner = ast.walk(node)
    next(inner)
    return any(isinstance(n, COMPREHENSIONS) for n in inner)


def _docstring_lines(tree: ast.AST) -> set[int]:
    numbers: set[int] = set()
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS)):
            continue
        if ast.get_docstring(node, clean=False) is not None:
            text = node.body[0]
            numbers.update(range(text.lineno, (text.end_lineno or text.lineno) + 1))
    return numbers


def _comment_lines(source: str) -> set[int]:
    """Lines with a comment, at the end of a line of code as well; what only speaks to a tool is
    none.
    """
    numbers: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        text = token.string.lstrip("# ")
        for_tools = text.startswith(("noqa", "type: ignore", "fmt:", "pragma"))
        if token.type == tokenize.COMMENT and not for_tools:
            numbers.add(token.start[0])
    return numbers


def sources(folder: Path) -> Iterator[tuple[str, str]]:
    """Name and text of every Python file of a folder."""
    for path in sorted(folder.rglob("*.py")):
        yield str(path.relative_to(folder)), path.read_text(encoding="utf-8")


def measure(files: Iterable[tuple[str, str]]) -> Density:
    """Count all files."""
    density = Density()
    for name, source in files:
        density.add(name, source)
    return density


def rows(density: Density) -> Iterator[tuple[str, str]]:
    """The table of one folder."""
    bodies = sorted(f.body for f in density.functions) or [0]
    branches = [f.branches for f in density.functions] or [0]
    p90 = bodies[int(0.9 * (len(bodies) - 1))]
    yield "files", str(density.files)
    yield "lines / code lines", f"{density.lines} / {density.code}"
    yield (
        "median file; files over 400",
        (f"{statistics.median(density.sizes):.0f}; {sum(size > 400 for size in density.sizes)}"),
    )
    yield (
        "function body, median / p90 / max",
        f"{statistics.median(bodies):.0f} / {p90} / {bodies[-1]}",
    )
    yield "most branches; functions over 12", f"{max(branches)}; {sum(b > 12 for b in branches)}"
    yield "docstring : code", f"{density.docstrings / max(density.code, 1):.2f}"
    yield "comment : code", f"{density.comments / max(density.code, 1):.2f}"
    yield "comprehensions / 100 lines", f"{density.per_hundred(density.comprehensions):.1f}"
    yield "nested comprehensions / 100 lines", f"{density.per_hundred(density.nested):.2f}"
    yield "conditional expressions / 100 lines", f"{density.per_hundred(density.conditionals):.1f}"
    yield "boolean operators / 100 lines", f"{density.per_hundred(density.booleans):.1f}"
    yield "lines over 100 columns", f"{100 * density.long_lines / max(density.lines, 1):.1f} %"


def main(folders: list[str]) -> None:
    """Print the table of several folders."""
    tables = [dict(rows(measure(sources(Path(folder))))) for folder in folders]
    names = [Path(folder).name for folder in folders]
    print("| |", " | ".join(names), "|")
    print("|---|" + "---|" * len(names))
    for label in tables[0]:
        cells = [table[label] for table in tables]
        print(f"| {label} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main(sys.argv[1:] or ["src/unbatch"])
