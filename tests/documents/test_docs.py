"""The documentation is whole: public names, tests that are named, formulas, notebooks and figures
are what they claim.

What a page shows is run in tests/documents/test_readme.py.
"""

import ast
import importlib
import importlib.util
import json
import re
from pathlib import Path

import pytest

import unbatch
from cases.pages import load

ROOT = Path(__file__).parents[2]
PAGES = {
    p.relative_to(ROOT).as_posix(): p
    for p in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
}
NAMED = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")
LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)")
LISTED = re.compile(r"^::: unbatch\.(\S+)$", re.M)


# ---------------------------------------------------------------- tests that pages name


def defined(file: Path) -> set[str]:
    return {
        node.name
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
    }


def check_named_tests(page: str) -> None:
    """Raises ``AssertionError`` where a page names a test that is not there."""
    for file, test in NAMED.findall(page):
        assert (ROOT / file).exists(), f"there is no {file}"
        assert not test or test in defined(ROOT / file), f"there is no {test} in {file}"


@pytest.mark.parametrize("name", PAGES)
def test_tests_that_are_named_exist(name):
    check_named_tests(PAGES[name].read_text(encoding="utf-8"))


def statements(page: str) -> list[str]:
    """Paragraphs from one bold sentence to the next."""
    return re.findall(
        r"^\*\*[A-Z][^*]+\.\*\*.*?(?=^\*\*[A-Z][^*]+\.\*\*|^## |\Z)", page, flags=re.M | re.S
    )


def check_statements(page: str) -> None:
    """Raises ``AssertionError`` where a statement names no test."""
    for statement in statements(page):
        assert any(test for _, test in NAMED.findall(statement)), f"no test is named:\n{statement}"


def test_every_statement_of_the_theory_names_its_test():
    page = (ROOT / "docs/theory.md").read_text(encoding="utf-8")
    assert len(statements(page)) >= 30
    check_statements(page)


def test_a_statement_without_a_test_is_found():
    proved = "**One holds.** See `tests/curvature/test_ggn.py::test_blocks`."
    page = f"{proved}\n\n**Another holds.** Trust me.\n\n## Next\n"
    with pytest.raises(AssertionError, match="Another holds"):
        check_statements(page)


@pytest.mark.parametrize(
    "lie", ["`tests/curvature/test_ggn.py::test_of_nothing`", "`tests/test_nothing.py`"]
)
def test_a_test_that_is_not_there_is_found(lie):
    with pytest.raises(AssertionError, match="there is no"):
        check_named_tests(f"As {lie} shows.")


# ---------------------------------------------------------------- links of pages that are not built


def check_links(page: str) -> None:
    """Raises ``AssertionError`` where a link within the repository leads nowhere."""
    for target in LINK.findall(page):
        assert (ROOT / target).exists(), f"there is no {target}"


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(name):
    check_links((ROOT / name).read_text(encoding="utf-8"))


def test_a_link_that_leads_nowhere_is_found():
    check_links("[far](https://example.org/none) and [near](docs/tour.md#errors)")
    with pytest.raises(AssertionError, match=r"there is no docs/turn\.md"):
        check_links("[near](docs/turn.md#errors)")


# ---------------------------------------------------------------- public names


def check_listed(page: str, names: list[str]) -> None:
    """Raises ``AssertionError`` where a public name is not listed once, or what is listed is not
    there.
    """
    listed = LISTED.findall(page)
    for name in names:
        assert listed.count(name) == 1, f"{name} is listed {listed.count(name)} times, not once"
    for name in listed:
        module, _, attribute = f"unbatch.{name}".rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), f"there is no unbatch.{name}"


def test_public_names_are_on_the_page_once():
    page = (ROOT / "docs/reference/api.md").read_text(encoding="utf-8")
    check_listed(load("docs/hooks/api.py").spelled_out(page), unbatch.__all__)


def test_a_module_on_the_page_stands_for_its_public_names():
    spelled_out = load("docs/hooks/api.py").spelled_out
    page = spelled_out("::: unbatch.gradients.results.*\n\n::: unbatch.Dots\n")
    assert page == "::: unbatch.Rows\n\n::: unbatch.Dots\n"
    with pytest.raises(ValueError, match=r"imports nothing from unbatch\.gradients\.sources"):
        spelled_out("::: unbatch.gradients.sources.*\n")


def test_public_names_have_a_docstring():
    assert [n for n in unbatch.__all__ if not (getattr(unbatch, n).__doc__ or "").strip()] == []


@pytest.mark.parametrize(
    "page",
    [
        "",
        "::: unbatch.SquaredNorms\n::: unbatch.SquaredNorms\n",
        "::: unbatch.SquaredNorms\n::: unbatch.Nrms\n",
    ],
)
def test_a_page_with_other_names_is_found(page):
    with pytest.raises(AssertionError, match=r"is listed|there is no"):
        check_listed(page, ["SquaredNorms"])


# ---------------------------------------------------------------- formulas


def test_formulas_become_mathml():
    hook = load("docs/hooks/mathml.py")
    page = (
        '<p>with <span class="arithmatex">\\(a_n &lt; \\theta\\)</span>, <code>\\(a\\)</code></p>'
    )
    found = hook.on_page_content(page, page=None)
    assert "<msub><mi>a</mi><mi>n</mi></msub>" in found
    assert "arithmatex" not in found
    assert "<code>\\(a\\)</code>" in found


@pytest.mark.parametrize("formula", [r"\nosuchcommand x", r"\begin{aligned} a &= b \end{aligned}"])
def test_a_formula_that_has_no_mathml_is_refused(formula):
    with pytest.raises(ValueError, match="no MathML"):
        load("docs/hooks/mathml.py").mathml(formula)


# ---------------------------------------------------------------- figures that were measured


def test_the_overview_is_made_of_the_results():
    overview = load("benchmarks/overview.py")
    assert (ROOT / "docs/benchmarks/overview.md").read_text(encoding="utf-8") == overview.page(
        overview.results()
    )


def test_other_results_make_another_overview():
    overview = load("benchmarks/overview.py")
    results = json.loads(json.dumps(overview.results()))
    results["gradients"]["results"]["W2"]["quantities"]["norms"]["unbatch"]["ratio"] += 1
    assert overview.page(results) != overview.page(overview.results())
