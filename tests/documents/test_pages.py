"""Pages that are made when the site is built, the size of the glossary, and the control of the
benchmarks.
"""

import importlib
import json
import sys
from pathlib import Path

import pytest

from cases.pages import load

ROOT = Path(__file__).resolve().parents[2]
MOST_WORDS = 25


def check_glossary(page: str) -> None:
    """Raise ``AssertionError`` where the glossary is too long, or lists a word twice."""
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    words = [row.split("|")[1].strip() for row in rows[1:]]
    assert len(words) == len(set(words)), "a word is listed twice"
    assert len(words) <= MOST_WORDS, f"{len(words)} words, where {MOST_WORDS} have room"


def test_the_glossary_stays_short():
    check_glossary((ROOT / "docs" / "glossary.md").read_text(encoding="utf-8"))


def test_a_long_glossary_is_found():
    rows = "".join(f"| word {n} | meaning |\n" for n in range(MOST_WORDS + 1))
    with pytest.raises(AssertionError, match="26 words"):
        check_glossary(f"| word | meaning |\n|---|---|\n{rows}")


@pytest.mark.parametrize(
    "path", sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem
)
def test_a_notebook_becomes_a_page_with_all_that_is_stored(path):
    pytest.importorskip("mkdocs")
    notebook = json.loads(path.read_text(encoding="utf-8"))
    page = load("docs/hooks/notebooks.py").markdown(notebook, path.name)
    assert f"]({path.name})" in page
    for cell in notebook["cells"]:
        assert "".join(cell["source"]) in page
        for output in cell.get("outputs", []):
            assert "".join(output.get("text", "")).rstrip() in page


def test_the_control_is_timed_with_every_run(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.delitem(sys.modules, "lib.interleaved", raising=False)
    assert importlib.import_module("lib.interleaved").facts(1, {})["control_ms"] > 0


def test_the_overview_shows_the_control():
    overview = load("benchmarks/overview.py")
    results = overview.results()
    results["ggn"]["control_ms"] = 12.345
    (row,) = [
        line
        for line in overview.page(results).splitlines()
        if line.startswith("| `benchmarks/ggn_cost.py`")
    ]
    assert row.endswith("| 12.3 ms |")
