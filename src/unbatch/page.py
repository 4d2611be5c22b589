"""One page about a problem: structure, tables and pictures in a single HTML file that loads nothing from elsewhere.

What is said comes from the results, what is drawn from ``plot.py``; here it is put in order, and ``page.html`` makes it
readable: by keyboard, by a screen reader, in the light and in the dark. Each part is asked for on its own, so that one
that is refused leaves the others.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from torch import Tensor

from unbatch import consequences, figure, plot
from unbatch.errors import UnbatchError
from unbatch.problem import Problem
from unbatch.report import outcome, seen, untested
from unbatch.results import Rows
from unbatch.verdicts import MARKS, NAMES, TITLES, Culprit, by_kind

DECOMPOSITIONS = ("component", "copy", "frozen")
WHOLE_SPECTRUM = 1024  # columns of the factor at most, for all eigenvalues
TOP = 4  # eigenvectors whose slopes and curvatures are shown
CROSSTALK = 64  # samples at most


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
    """``svg`` is the drawing, ``alt`` says in words what can be seen in it."""

    svg: str
    alt: str
    caption: str


@dataclass(frozen=True)
class Part:
    title: str
    intro: str
    blocks: tuple[Table | Picture | str, ...]

    @property
    def anchor(self) -> str:
        return re.sub(r"\W+", "-", self.title.lower()).strip("-")


Block = Table | Picture | str


def write_report(problem: Problem, path: str | Path, title: str = "", said: Mapping[str, str] | None = None) -> Path:
    """Everything about a problem on one HTML page that needs no network; returns where it was written.

    Structure and its figure, the numerical tests of the verdicts, crosstalk, gradients in three ways, the spectrum of
    the Gauss-Newton matrix with slopes and curvatures, and what follows. ``said``: further facts for its head, by name.
    What is refused is replaced by the reason. Numbers are in the scale in which they enter the loss. Raises ``OSError``
    where the file cannot be written, before anything is computed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    path.write_text(page(problem, title, said or {}), encoding="utf-8")
    return path


def page(problem: Problem, title: str, said: Mapping[str, str]) -> str:
    """The page as HTML."""
    templates = Environment(
        loader=PackageLoader("unbatch", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    templates.tests |= {
        kind.__name__.lower(): lambda x, kind=kind: isinstance(x, kind) for kind in (Table, Picture, Status)
    }
    parts = [Part(title_, intro, tuple(_asked(ask, problem))) for title_, intro, ask in PARTS]
    name = title or type(problem.program.inside).__name__
    facts = _facts(problem) | dict(said)
    return templates.get_template("page.html").render(title=name, facts=facts, parts=parts, version=version("unbatch"))


def _asked(ask: Callable[[Problem], Iterator[Block]], problem: Problem) -> Iterator[Block]:
    """What a part has to say, with its warnings, as far as it gets."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield from ask(problem)
        except (UnbatchError, ImportError) as error:
            yield f"Not shown: {error}"
    yield from (f"{w.category.__name__}: {w.message}" for w in {str(w.message): w for w in caught}.values())


def _facts(problem: Problem) -> dict[str, str]:
    structure, model = problem.structure, problem.program.inside
    parameters = [p for p in problem.program.parameters.values() if p.requires_grad]
    training = getattr(model, "training", None)
    mode = "" if training is None else f", in {'train' if training else 'eval'} mode"
    return {
        "model": f"{type(model).__name__}{mode}",
        "samples": str(structure.samples),
        "predictions": ", ".join(str(list(shape)) for shape in structure.predictions),
        "parameters": f"{sum(p.numel() for p in parameters):,} entries in {len(parameters)} tensors",
    }


def _picture(ax: Any, alt: str, caption: str) -> Picture:
    """Drawings stand side by side on a page, so what they name has to be theirs: ids begin with the caption."""
    own = re.sub(r"\W+", "-", caption.lower())
    drawn = figure.as_svg(figure.whole(ax), "")
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{own}-", drawn)
    return Picture(svg, alt, caption)


# --- the parts ------------------------------------------------------------------------------------


def _structure(problem: Problem) -> Iterator[Block]:
    s = problem.structure
    rows = [(TITLES[v.name], Status(v.status, v.status), v.basis, v.note) for v in s.verdicts]
    yield Table("Verdicts", ("structure", "verdict", "basis", "note"), rows)
    diagram = problem.diagram()
    yield _picture(plot.structure(diagram), diagram.description, "From samples to loss")
    if s.statistics:
        found = [(t.module, t.op, t.where.rpartition("/")[2], str(t.size)) for t in s.statistics]
        yield Table(f"Batch statistics, R = {s.statistics_size} numbers", ("module", "op", "where", "numbers"), found)
    culprits = list(by_kind(s))
    if culprits:
        columns = ("module", "op", "where", "why", "what to do", "against")
        yield Table("Culprits", columns, [_culprit(*kind) for kind in culprits])
    yield from s.notes


def _culprit(found: Sequence[Culprit], against: Sequence[str]) -> tuple[str, ...]:
    first, more = found[0], f" and {len(found) - 1} more" if len(found) > 1 else ""
    return (first.module or "–") + more, first.op, first.short, first.why, first.remedy, ", ".join(against)


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
    said = f"{found.strength:.1%} of the squares stand off the diagonal."
    alt = f"A matrix of shades, {problem.samples} by {problem.samples}, darker where listening is stronger. {said}"
    yield _picture(plot.crosstalk(found), alt, "Crosstalk")
    yield said


def _gradients(problem: Problem) -> Iterator[Block]:
    gradient = torch.cat([g.flatten() for g in problem.gradient().values()])
    rows: dict[str, Rows] = {}
    for by in DECOMPOSITIONS:
        try:
            rows[by] = problem.gradients(by=by)
        except UnbatchError as error:
            yield f"Rows by {by} are not shown: {error}"
    cells = [_sizes(by, r, gradient) for by, r in rows.items()]
    columns = ("rows by", "called", "mean norm", "smallest", "largest", "sum against the gradient")
    yield Table("One row per sample", columns, cells)
    alt = "Histograms of the norms of the rows, whose smallest, mean and largest are in the table above."
    yield _picture(plot.gradient_norms(problem), alt, "Norms of the rows")
    apart = [(f"{a} and {b}", f"{_distance(rows[a], rows[b]):.2g}") for a in rows for b in rows if a < b]
    yield Table("Relative distance of the decompositions", ("decompositions", "distance"), apart)


def _sizes(by: str, rows: Rows, gradient: Tensor) -> tuple[str, ...]:
    norms = rows.flat().norm(dim=1)
    off = float((rows.flat().sum(0) - gradient).norm() / gradient.norm())
    return by, rows.kind, *(f"{float(x):.3g}" for x in (norms.mean(), norms.min(), norms.max())), f"{off:.1g} off"


def _distance(a: Rows, b: Rows) -> float:
    return float((a.flat() - b.flat()).norm() / a.flat().norm())


def _curvature(problem: Problem) -> Iterator[Block]:
    G: Any = problem.ggn()
    rank = G.rank_bound
    facts = [("parameters, D", f"{G.shape[0]:,}"), ("rank at most", f"{rank:,}")]
    if rank is not None and rank <= WHOLE_SPECTRUM:
        values = G.eigvalsh()
        felt = values[values.abs() > values.abs().max() * 1e-10]
        facts += [("eigenvalues not zero", str(len(felt))), ("largest", f"{float(values[-1]):.4g}")]
        facts += [("smallest", f"{float(values[0]):.4g}")] if float(values[0]) < 0 else []
    facts += [("trace, the sum of the eigenvalues", f"{float(G.trace()):.4g}")]
    facts += [("semi-definite", str(G.positive_semidefinite))]
    yield Table("Gauss-Newton matrix", ("what", "value"), facts)
    if rank is not None and rank <= WHOLE_SPECTRUM:
        alt = f"Eigenvalues from the largest down, on a log scale, and the bound on their number, {rank}."
        yield _picture(plot.spectrum(G), alt, "Spectrum")
    found = G.directions(min(TOP, rank or TOP))
    shown = [_direction(found, i) for i in reversed(range(len(found.values)))]
    alt = "Slope and curvature of every sample along each of the top eigenvectors, whose ranges are in the table below."
    yield _picture(plot.directions(found), alt, "Slopes against curvatures")
    columns = ("eigenvalue", "slope", "γ_n from", "to", "λ_n from", "to", "three samples hold")
    yield Table("Slopes γ and curvatures λ of the samples along the top eigenvectors", columns, shown)


def _direction(found: Any, i: int) -> tuple[str, ...]:
    slopes, curved = found.slopes[:, i], found.curvatures[:, i]
    numbers = (found.values[i], slopes.sum(), slopes.min(), slopes.max(), curved.min(), curved.max())
    held = curved.topk(min(3, len(curved))).values.sum() / curved.sum()
    return *(f"{float(x):.3g}" for x in numbers), f"{float(held):.0%}"


def _follows(problem: Problem) -> Iterator[Block]:
    found = problem.structure.follows()
    for kind, words in consequences.OUTCOMES.items():
        rows = [(c.quantity, "yes" if c.available else "not yet", c.name, c.reason) for c in found if c.outcome == kind]
        if rows:
            columns = ("quantity", "computed", "as", "why")
            yield Table(f"{words}: {len(rows)} quantities", columns, rows, folded=True)


PARTS: tuple[tuple[str, str, Callable[[Problem], Iterator[Block]]], ...] = (
    (
        "Structure",
        "Which parts does the loss have? Each verdict is proved from the recorded computation, refuted by a witness, "
        "assumed because it was declared, or unknown.",
        _structure,
    ),
    ("Verification", "Each verdict put to an experiment; one that is contradicted would say so here.", _tests),
    (
        "Crosstalk",
        "Who listens to whom: row n, column m is how strongly prediction n reacts to sample m.",
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
    ("What follows", "Which of the usual quantities exist for this loss, under which name, and why.", _follows),
)
