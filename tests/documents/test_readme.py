"""The documents tell the truth: their Python runs, their commands run, and what they print is what
is shown.

Blocks of one page share a namespace. A `python` block that begins with `# name.py` is a file and
lies in the working directory; one that begins with the path of a file of this repository quotes it.
A `text` block after a `python` block is what that printed, a `console` block holds an `unbatch`
command and what that printed; a line `...` stands for any number of lines. Spaces and the numbers
of a witness may differ. A page with a comment `<!-- needs: transformers -->` is skipped where one
of these packages is missing.
"""

import ast
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cases.pages import blocks, granted, run_python, words
from unbatch.analysis.rules import registry as rules
from unbatch.autodiff.contractions import registry as kinds
from unbatch.cli import commands as cli

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FILE = re.compile(r"# ((?:\w+/)*\w+\.py)\n")
NEEDS = re.compile(r"<!-- needs: (.*?) -->")


def missing(page: str) -> list[str]:
    """The packages that a page says it needs, and that are not installed."""
    named = " ".join(NEEDS.findall(page)).split()
    return [name for name in named if importlib.util.find_spec(name) is None]


def assert_shown(shown: str, printed: str) -> None:
    """Raises ``AssertionError`` where what is shown is not what was printed, `...` lines aside."""
    pieces = [re.escape(words(piece)) for piece in re.split(r"^\.\.\.$", shown, flags=re.M)]
    pattern = ".*".join(pieces)
    assert re.fullmatch(pattern, words(printed)), f"shown:\n{shown}\nprinted:\n{printed}"


def assert_quoted(code: str, source: str) -> None:
    """Raises ``AssertionError`` where a definition in ``code`` does not stand in ``source`` as
    well.
    """
    there = {ast.dump(node) for node in ast.parse(source).body}
    for node in ast.parse(code).body:
        assert ast.dump(node) in there, f"no longer there:\n{ast.unparse(node)}"


def run_command(line: str) -> str:
    _, *arguments = shlex.split(line)
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code in (cli.HOLDS, cli.FAILS, cli.UNKNOWN), result.output
    return result.stdout


def check_page(page: str) -> None:
    """Run a page in the current directory. Raises where something does not run, or prints something
    else.
    """
    namespace = granted()
    printed = None
    for language, body in blocks(page):
        if language == "text" and printed is not None:
            assert_shown(body, printed)
        printed = None
        if language == "console":
            command, _, shown = body.removeprefix("$ ").partition("\n")
            assert_shown(shown, run_command(command))
        elif language == "python":
            file = FILE.match(body)
            if file is None:
                printed = run_python(body, namespace)
            elif (ROOT / file[1]).exists():
                assert_quoted(body, (ROOT / file[1]).read_text(encoding="utf-8"))
            else:
                Path(file[1]).write_text(body)


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rules, "CUSTOM", dict(rules.CUSTOM))
    monkeypatch.setattr(rules, "ASSUMED", dict(rules.ASSUMED))
    monkeypatch.setattr(kinds, "KINDS", dict(kinds.KINDS))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_page(page):
    text = page.read_text(encoding="utf-8")
    if lacks := missing(text):
        pytest.skip(f"needs {', '.join(lacks)}")
    check_page(text)


def test_the_readme_shows_something():
    languages = [
        language for language, _ in blocks((ROOT / "README.md").read_text(encoding="utf-8"))
    ]
    assert languages.count("python") >= 4
    assert languages.count("text") >= 3
    assert "console" in languages


PLANTED = {
    "other output": "```python\nprint('a b')\n```\n\n```text\na c\n```\n",
    "output left out without a word": "```python\nprint('a\\nb')\n```\n\n```text\na\n```\n",
    "too much output": "```python\nprint('a')\n```\n\n```text\na\n...\nb\n```\n",
    "code that raises": "```python\n1 / 0\n```\n",
    "a quotation of what is not there": (
        "```python\n# tests/documents/test_readme.py\ndef nowhere():\n    pass\n```\n"
    ),
    "a command that is wrong": "```console\n$ unbatch inspect nothing\n...\n```\n",
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_lie_is_found(name):
    with pytest.raises((AssertionError, ZeroDivisionError)):
        check_page(PLANTED[name])


def test_what_a_page_needs():
    assert missing("<!-- needs: torch nothing_of_this_name -->") == ["nothing_of_this_name"]
    assert missing("no need") == []


def test_an_honest_page_passes():
    check_page("```python\nprint('a\\nb  c\\nd')\n```\n\n```text\na\n...\nd\n```\n")
    check_page("```python\nprint('a\\nb')\n```\n\n```text\n...\nb\n```\n")
    check_page("```python\nprint('a\\nb')\n```\n\n```text\na\n...\n```\n")
