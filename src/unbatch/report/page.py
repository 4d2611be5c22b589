"""One page about a problem: a single HTML file that loads nothing from elsewhere.

What stands on it is in ``parts.py``; here the parts are collected and written. The
template ``page.html`` makes the page readable: by keyboard, by a screen reader, in the light and in
the dark.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from unbatch.capture.program import name_of
from unbatch.errors import MSG_REPORT_FILE, UnbatchError
from unbatch.problem.problem import Problem
from unbatch.problem.validation import check_shown
from unbatch.report.parts import PARTS, Block, Part, Picture, Status, Table, dtypes
from unbatch.running.tasks import task

FILE = Path("unbatch-report.html")


def write_report(
    problem: Problem,
    path: str | Path = FILE,
    title: str = "",
    said: Mapping[str, str] | None = None,
) -> Path:
    """Write everything about a problem to one HTML page that needs no network; return its path.

    Structure and its figure, the numerical tests of the verdicts, crosstalk, gradients in three
    ways, the spectrum of the Gauss-Newton matrix with slopes and curvatures, and what follows.
    ``said``: further facts for its head, by name. What is refused is replaced by the reason.
    Numbers are in the scale in which they enter the loss, and computed in the dtype of the model.
    Raises ``OSError`` where the file cannot be written, before anything is computed, and
    ``InputError`` for what is no problem.
    """
    check_shown(isinstance(problem, Problem), problem, "write_report", "a Problem", "problem, path")
    path = Path(path)
    check_writable(path)
    path.write_text(page(problem, title, said or {}), encoding="utf-8")
    return path


def check_writable(path: Path) -> None:
    """Make the folders above a file, and leave no file where there was none.

    Raises ``OSError`` with the remedy.
    """
    new = not path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Appending nothing changes nothing, and fails where writing would.
        with path.open("ab"):
            pass
    except OSError as error:
        message = MSG_REPORT_FILE.format(path=path, reason=error.strerror)
        # Two arguments: the class that the system chose for the number stays what it is.
        raise type(error)(error.errno, message) from error
    if new:
        path.unlink()


def page(problem: Problem, title: str, said: Mapping[str, str]) -> str:
    """Return the page as HTML; without a title it is that of the model."""
    # The parts first: they compute, and the facts then come from the same recording.
    parts = []
    with task("Computing the report", len(PARTS), "parts") as done:
        for part in done.over(PARTS):
            parts.append((part, list(_blocks(part, problem))))
    return _template().render(
        title=title or name_of(problem.program.inside),
        facts=_facts(problem) | dict(said),
        parts=parts,
        version=version("unbatch"),
    )


def _template() -> Any:
    """Return the template, strict about names that are missing."""
    environment = Environment(
        loader=PackageLoader("unbatch.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for kind in (Table, Picture, Status):
        environment.tests[kind.__name__.lower()] = _is_a(kind)
    environment.filters["code"] = _with_code
    return environment.get_template("page.html")


def _is_a(kind: type) -> Callable[[Any], bool]:
    """Return a test of a class for the template."""

    def test(value: Any) -> bool:
        return isinstance(value, kind)

    return test


def _with_code(text: str) -> Markup:
    """Return text as HTML, in which what stands between backticks is code."""
    # Escaped first: the tags that are put in are meant as tags.
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _blocks(part: Part, problem: Problem) -> Iterator[Block]:
    """Yield what a part shows, as far as it gets, and its warnings, each text once."""
    # Whatever filters a user has set, a page says what its numbers are worth.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield from part.shows(problem)
        except (UnbatchError, ImportError) as error:
            yield f"Not shown: {error}"
    # By text, because a part asks several questions, and each may warn of the same.
    texts = {}
    for w in caught:
        texts[str(w.message)] = f"{w.category.__name__}: {w.message}"
    yield from texts.values()


def _facts(problem: Problem) -> dict[str, str]:
    """Return what the head of the page says, by name."""
    structure, program = problem.structure, problem.program
    parameters = [p for p in program.parameters.values() if p.requires_grad]
    entries = 0
    for p in parameters:
        entries += p.numel()
    loss = "the model's own"
    if program.loss is not None:
        loss = name_of(program.loss)
    return {
        "model": name_of(program.inside) + _mode(program.inside),
        "loss": loss,
        "samples": str(structure.samples),
        "predictions": ", ".join(str(list(shape)) for shape in structure.predictions),
        "parameters": f"{entries:,} entries in {len(parameters)} tensors",
        "dtype": dtypes(parameters),
    }


def _mode(model: Any) -> str:
    """Return the mode of a module in words; nothing for a function, which has none."""
    training = getattr(model, "training", None)
    if training is None:
        return ""
    return f", in {'train' if training else 'eval'} mode"
