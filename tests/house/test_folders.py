"""Test files have names of their own, and none takes anything from another: what they share is in
`cases`.
"""

import ast
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(ROOT.rglob("test_*.py"))


def check_imports(source: str) -> None:
    """Raise where a module imports a test module."""
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            last = name.rpartition(".")[2]
            assert not last.startswith("test_"), (
                f"line {node.lineno}: {name}; move what is shared to cases"
            )


def test_no_test_module_imports_another():
    for file in [*FILES, *(ROOT / "cases").rglob("*.py")]:
        check_imports(file.read_text(encoding="utf-8"))


def test_names_of_files_are_unique():
    counts = Counter(file.name for file in FILES)
    assert [name for name, count in counts.items() if count > 1] == []


@pytest.mark.parametrize(
    "line", ["import test_cases", "from test_ggn import near", "from tests.test_ggn import near"]
)
def test_an_import_of_a_test_module_is_caught(line):
    with pytest.raises(AssertionError, match="move what is shared"):
        check_imports(line)
