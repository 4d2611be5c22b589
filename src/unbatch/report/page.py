"""One page about a problem: structure, tables and pictures in a single HTML file that loads nothing from elsewhere.

What is said comes from the results, what is drawn from ``plot.py``; here it is put in order, and ``page.html`` makes it
readable: by keyboard, by a screen reader, in the light and in the dark. Each part is asked for on its own, so that one
that is refused leaves the others.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from torch import Tensor

from unbatch.analysis import consequence_table
from unbatch.analysis.structure import MARKS, NAMED, NAMES, TITLES, Culprit, Verdict, by_kind
from unbatch.capture.program import name_of
from unbatch.diagram import figure
from unbatch.errors import MSG_REPORT_FILE, UnbatchError
from unbatch.gradients.results import Rows
from unbatch.problem.problem import Problem
from unbatch.problem.validation import check_given
from unbatch.report import plot, tables
from unbatch.report.tables import outcome, seen, untested

FILE = Path("unbatch-report.html")


DECOMPOSITIONS = ("component", "copy", "frozen")


WHOLE_SPECTRUM = 1024  # columns of the factor at most, for all eigenvalues


TOP = 4  # eigenvectors whose slopes and curvatures are shown


CROSSTALK = 64  # samples at most


# How to read a picture, by its caption.
READINGS = {
    "From samples to loss": (
        "Samples are columns, and the computation runs from top to bottom. In an hourglass samples meet, but only "
        "in as many numbers as its neck says; in a filled band they mix; a hatched band with a question mark is "
        "where that is not established."
    ),
    "Crosstalk": (
        "Row n, column m is how strongly prediction n reacts to sample m: brighter is stronger, on a log scale, and "
        "what is zero is crossed out. Where no prediction listens to another sample, only the diagonal is left."
    ),
    "Norms of the rows": (
        "How many samples have a row whose norm lies within each bin, with bars of its own for each decomposition. "
        "Bins are equally wide, on a log scale where norms differ by much."
    ),
    "Spectrum": (
        "Eigenvalues from the largest down, on a log scale; those that are zero but for rounding are left out. At "
        "the upright line is the bound on the rank, beyond which all are zero. Hollow markers are negative "
        "eigenvalues."
    ),
    "Slopes against curvatures": (
        "Each small marker is a sample along one of the top eigenvectors, with its slope and its curvature, both "
        "times N. The large marker is their mean, which is slope and curvature of the loss; its bars hold the "
        "middle 80 % of the samples."
    ),
}


# --- what a page is made of -------------------------------------------------------------------------


@dataclass(frozen=True)
class Status:
    """One of a few words, with a sign and a colour of its own."""

    word: str
    kind: str

    @property
    def sign(self) -> str:
        return MARKS.get(self.kind, "")


@dataclass(frozen=True)
class Table:
    """Cells are text or a ``Status``; the first of a row is its heading."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    folded: bool = False


@dataclass(frozen=True)
class Picture:
    """``svg`` is the drawing, ``alt`` says in words what can be seen in it, ``reading`` what that means."""

    svg: str
    alt: str
    caption: str
    reading: str


@dataclass(frozen=True)
class Part:
    title: str
    intro: str
    blocks: tuple[Table | Picture | str, ...]

    @property
    def anchor(self) -> str:
        return re.sub(r"\W+", "-", self.title.lower()).strip("-")


Block = Table | Picture | str


def write_report(
    problem: Problem,
    path: str | Path = FILE,
    title: str = "",
    said: Mapping[str, str] | None = None,
) -> Path:
    """Everything about a problem on one HTML page that needs no network; returns where it was written.

    Structure and its figure, the numerical tests of the verdicts, crosstalk, gradients in three ways, the spectrum of
    the Gauss-Newton matrix with slopes and curvatures, and what follows. ``said``: further facts for its head, by name.
    What is refused is replaced by the reason. Numbers are in the scale in which they enter the loss, and computed in
    the dtype of the model. Raises ``OSError`` where the file cannot be written, before anything is computed, and
    ``InputError`` for what is no problem.
    """
    check_given(isinstance(problem, Problem), problem, "write_report", "a Problem", "problem, path")
    path = Path(path)
    check_writable(path)
    path.write_text(page(problem, title, said or {}), encoding="utf-8")
    return path


def check_writable(path: Path) -> None:
    """Make the folders above a file; leaves no file where there was none. Raises ``OSError`` with the remedy."""
    new = not path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab"):
            pass
    except OSError as error:
        raise type(error)(
            error.errno, MSG_REPORT_FILE.format(path=path, reason=error.strerror)
        ) from error
    if new:
        path.unlink()


def page(problem: Problem, title: str, said: Mapping[str, str]) -> str:
    """The page as HTML."""
    templates = Environment(
        loader=PackageLoader("unbatch.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    templates.tests |= {
        kind.__name__.lower(): lambda x, kind=kind: isinstance(x, kind)
        for kind in (Table, Picture, Status)
    }
    templates.filters["code"] = _with_code
    parts = [Part(title_, intro, tuple(_asked(ask, problem))) for title_, intro, ask in PARTS]
    name = title or name_of(problem.program.inside)
    facts = _facts(problem) | dict(said)
    return templates.get_template("page.html").render(
        title=name, facts=facts, parts=parts, version=version("unbatch")
    )


def _with_code(text: str) -> Markup:
    """What stands between backticks is code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _asked(ask: Callable[[Problem], Iterator[Block]], problem: Problem) -> Iterator[Block]:
    """What a part has to say, with its warnings, as far as it gets."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield from ask(problem)
        except (UnbatchError, ImportError) as error:
            yield f"Not shown: {error}"
    yield from (
        f"{w.category.__name__}: {w.message}" for w in {str(w.message): w for w in caught}.values()
    )


def _facts(problem: Problem) -> dict[str, str]:
    structure, model, loss = problem.structure, problem.program.inside, problem.program.loss
    parameters = [p for p in problem.program.parameters.values() if p.requires_grad]
    training = getattr(model, "training", None)
    mode = "" if training is None else f", in {'train' if training else 'eval'} mode"
    return {
        "model": f"{name_of(model)}{mode}",
        "loss": "the model's own" if loss is None else name_of(loss),
        "samples": str(structure.samples),
        "predictions": ", ".join(str(list(shape)) for shape in structure.predictions),
        "parameters": f"{sum(p.numel() for p in parameters):,} entries in {len(parameters)} tensors",
        "dtype": _dtype(parameters),
    }


def _dtype(tensors: Iterable[Tensor]) -> str:
    return ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors}))


def _picture(ax: Any, alt: str, caption: str) -> Picture:
    """Drawings stand side by side on a page, so what they name has to be theirs: ids begin with the caption."""
    own = re.sub(r"\W+", "-", caption.lower())
    drawn = figure.as_svg(figure.whole(ax), "")
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{own}-", drawn)
    return Picture(svg, alt, caption, READINGS[caption])


# --- the parts ------------------------------------------------------------------------------------


def _structure(problem: Problem) -> Iterator[Block]:
    s = problem.structure
    rows = [
        (TITLES[v.name], tables.MEANINGS[v.name], _status(v), v.basis, v.note) for v in s.verdicts
    ]
    yield Table("Verdicts", ("structure", "which says", "verdict", "basis", "note"), rows)
    diagram = problem.diagram()
    yield _picture(plot.structure(diagram), diagram.description, "From samples to loss")
    if s.statistics:
        found = [(t.module, t.op, t.where.rpartition("/")[2], str(t.size)) for t in s.statistics]
        yield Table(
            f"Batch statistics, R = {s.statistics_size} numbers",
            ("module", "op", "where", "numbers"),
            found,
        )
    culprits = list(by_kind(s))
    if culprits:
        columns = ("module", "op", "where", "why", "what to do", "against")
        yield Table("Culprits", columns, [_culprit(*kind) for kind in culprits])
    yield from s.notes


def _status(verdict: Verdict) -> Status:
    return Status(verdict.status, verdict.status)


def _culprit(found: Sequence[Culprit], against: Sequence[str]) -> tuple[str, ...]:
    first, modules = found[0], list(dict.fromkeys(c.module or "–" for c in found))
    more = [f"{len(modules) - NAMED} more"] if len(modules) > NAMED else []
    return (
        ", ".join(modules[:NAMED] + more),
        first.op,
        first.short,
        first.why,
        first.remedy,
        ", ".join(against),
    )


def _tests(problem: Problem) -> Iterator[Block]:
    s, checks = problem.structure, {c.name: c for c in problem.verify().checks}
    asked = [checks.get(name) or untested(s, name) for name in NAMES]
    kinds = {True: "holds", False: "fails", None: "unknown"}
    rows = [(TITLES[c.name], c.status, Status(outcome(c), kinds[c.passed]), seen(c)) for c in asked]
    yield Table("Tests", ("structure", "verdict", "test", "what was done and seen"), rows)


def _crosstalk(problem: Problem) -> Iterator[Block]:
    if problem.samples > CROSSTALK:
        yield f"Not asked for: {problem.samples} x {problem.samples} is a large matrix. `problem.crosstalk()` gives it."
        return
    found = problem.crosstalk()
    size = f"{problem.samples} by {problem.samples}"
    alt = f"A matrix of shades, {size}; {found.strength:.1%} of the squares stand off the diagonal."
    yield _picture(plot.crosstalk(found), alt, "Crosstalk")


def _gradients(problem: Problem) -> Iterator[Block]:
    gradient = torch.cat([g.flatten() for g in problem.gradient().values()])
    rows: dict[str, Rows] = {}
    for by in DECOMPOSITIONS:
        try:
            rows[by] = problem.gradients(by=by)
        except UnbatchError as error:
            yield f"Rows by {by} are not shown: {error}"
    yield Table(
        "One row per sample",
        tables.NORMS,
        [tables.norms(by, r, gradient) for by, r in rows.items()],
    )
    alt = "Histograms of the norms of the rows, whose smallest, mean and largest are in the table above."
    yield _picture(plot.gradient_norms(_apart(rows)), alt, "Norms of the rows")
    apart = [
        (f"{a} and {b}", tables.share(tables.distance(rows[a], rows[b])))
        for a in rows
        for b in rows
        if a < b
    ]
    yield Table("Relative distance of the decompositions", ("decompositions", "distance"), apart)


def _apart(rows: Mapping[str, Rows]) -> dict[str, Rows]:
    """By what they are called, so that those that are the same are there once."""
    return {r.kind: r for r in rows.values()}


def _curvature(problem: Problem) -> Iterator[Block]:
    G: Any = problem.ggn()
    rank = G.rank_bound
    facts = [("parameters, D", f"{G.shape[0]:,}"), ("rank at most", f"{rank:,}")]
    if rank <= WHOLE_SPECTRUM:
        values = plot.told(G.eigvalsh())
        facts += [(f"eigenvalues above rounding ({_dtype([G])})", str(len(values)))]
        facts += [("largest", tables.number(values[0]))] if len(values) else []
        facts += [("smallest", tables.number(values[-1]))] if (values < 0).any() else []
    facts += [("trace, the sum of the eigenvalues", tables.number(G.trace()))]
    facts += [("negative eigenvalues", _negative(G.positive_semidefinite))]
    yield Table("Gauss-Newton matrix", ("what", "value"), facts)
    if rank <= WHOLE_SPECTRUM:
        alt = f"Eigenvalues from the largest down, on a log scale, and the bound on their number, {rank}."
        yield _picture(plot.spectrum(G), alt, "Spectrum")
    found = G.directions(min(TOP, rank or TOP))
    alt = "Slope and curvature of every sample along each of the top eigenvectors, whose ranges are in the table below."
    yield _picture(plot.directions(found), alt, "Slopes against curvatures")
    shown = [tables.shares(found, i) for i in reversed(range(len(found.values)))]
    yield Table(
        "Slopes γ and curvatures λ of the samples along the top eigenvectors", tables.SHARES, shown
    )


def _negative(semidefinite: Verdict) -> str:
    if semidefinite:
        return "none, because the second derivative of the loss by the predictions has none"
    return f"possible, because {semidefinite.note}"


def _follows(problem: Problem) -> Iterator[Block]:
    found = problem.structure.follows()
    for kind, words in consequence_table.OUTCOMES.items():
        rows = [
            (c.quantity, "yes" if c.available else "not yet", c.name, c.reason)
            for c in found
            if c.outcome == kind
        ]
        if rows:
            columns = ("quantity", "computed", "as", "why")
            yield Table(f"{words}: {len(rows)} quantities", columns, rows, folded=True)


PARTS: tuple[tuple[str, str, Callable[[Problem], Iterator[Block]]], ...] = (
    (
        "Structure",
        "How far does the loss come apart into samples? Six statements about the computation, each proved from its "
        "record, refuted by an experiment (a witness), assumed because it was declared, or left unknown.",
        _structure,
    ),
    (
        "Verification",
        "Each verdict put to an experiment; one that is contradicted would say so here.",
        _tests,
    ),
    (
        "Crosstalk",
        "How strongly each prediction reacts to each sample of the batch, its own and the others.",
        _crosstalk,
    ),
    (
        "Gradients",
        "What one sample contributes to the gradient: through its own prediction (component), by its own use of the "
        "parameters (copy), or through its own prediction with batch statistics held constant (frozen). Where samples "
        "do not listen to each other, the three are one.",
        _gradients,
    ),
    (
        "Curvature",
        "The Gauss-Newton matrix G = JᵀHJ, through batch statistics as well, and what each sample has of its largest "
        "eigenvalues.",
        _curvature,
    ),
    (
        "What follows",
        "Which of the usual quantities exist for this loss, under which name, and why.",
        _follows,
    ),
)
