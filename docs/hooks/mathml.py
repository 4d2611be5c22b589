"""Formulas for the browser: what `pymdownx.arithmatex` marks in a page becomes MathML when the page
is built.

Browsers show MathML by themselves, so that a page asks nobody for a script or a font. mkdocs calls
``on_page_content``.
"""

import html
import re
from typing import Any

from latex2mathml.converter import convert

MARKED = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.S)
LEFT_OVER = re.compile(r"\\[a-zA-Z]+|<mi>&</mi>")


def mathml(latex: str, display: str = "inline") -> str:
    """One formula as a `<math>` element. Raises ``ValueError`` for what the conversion leaves as it
    is.
    """
    found: str = convert(latex, display=display)
    if unknown := LEFT_OVER.findall(found):
        raise ValueError(
            f"no MathML for {', '.join(unknown)} in the formula {latex!r}; "
            "write it in other commands"
        )
    return found


def on_page_content(content: str, **_: Any) -> str:
    """A page with its formulas converted."""

    def converted(match: re.Match[str]) -> str:
        return mathml(html.unescape(match[3]).strip(), "block" if match[2] == "[" else "inline")

    return MARKED.sub(converted, content)
