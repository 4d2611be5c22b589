"""The page on other tools: what stands before and after is the same, where the tools are there.

What needs no tool is also run, and its output compared, by `test_readme.py`.
"""

from pathlib import Path

import pytest
import torch

from cases.pages import blocks, granted, run_python

PAGE = (Path(__file__).parents[2] / "docs" / "guides" / "migrate.md").read_text(encoding="utf-8")
TOOLS = {
    "BackPACK": "backpack",
    "ViViT": "",
    "curvlinops": "curvlinops",
    "Opacus": "opacus",
    "laplace": "laplace",
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
]


def sections(page):
    """`{title: text}`."""
    return {part.partition("\n")[0]: part for part in page.split("\n## ")[1:]}


def check_section(text, namespace):
    """Raises ``AssertionError`` where before and after are not the same."""
    for language, body in blocks(text):
        if language in ("py", "python"):
            run_python(body, namespace)
    for one, other in zip(namespace["before"], namespace["after"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_every_tool_has_its_section():
    assert list(sections(PAGE)) == list(TOOLS)


@pytest.mark.parametrize("title", [t for t, tool in TOOLS.items() if tool])
def test_before_and_after_are_the_same(title):
    pytest.importorskip(TOOLS[title], exc_type=ImportError)
    namespace = granted()
    run_python("import copy\nimport torch\nimport unbatch as ub", namespace)
    check_section(sections(PAGE)[title], namespace)


def test_a_planted_difference_is_found():
    text = "```py\nbefore = [torch.ones(2)]\n```\n\n```python\nafter = [torch.ones(2) / 2]\n```\n"
    with pytest.raises(AssertionError):
        check_section(text, {"torch": torch})
