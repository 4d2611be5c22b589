"""The parts of the page: which tables, pictures and sentences each of them shows.

Numbers and words come from the results and from ``tables.py``, pictures from ``plot.py``. Each part
is a generator over a problem: what it yielded before something was refused stays on the page. How a
page is put together and written is in ``page.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unbatch.analysis import consequence_table
from unbatch.analysis.structure_tables import MARKS, NAMED, by_kind
from unbatch.analysis.verdict import TITLES, Culprit, Verdict
from unbatch.diagram import figure
from unbatch.errors import UnbatchError
from unbatch.gradients.results import Rows
from unbatch.problem.problem import Problem
from unbatch.report import plot, tables

DECOMPOSITIONS = ("component", "copy", "frozen")


WHOLE_SPECTRUM = 1024  # columns of the factor at most, for all eigenvalues


TOP = 4  # eigenvectors whose slopes and curvatures are shown


CROSSTALK = 64  # samples at most


# How to read a picture, by its caption.
READINGS = {
    "From samples to loss": (
        "Samples are columns, and the computation runs from top to bottom. In an hourglass samples "
        "interact, but only through as many numbers as its neck says; in a filled band they mix; a "
        "hatched band with a question mark is where that is not established."
    ),
    "Crosstalk": (
        "Row n, column m is how strongly prediction n reacts to sample m: brighter is stronger, on "
        "a log scale, and what is zero is crossed out. Where no prediction depends on another "
        "sample, only the diagonal is left."
    ),
    "Norms of the rows": (
        "How many samples have a row whose norm lies within each bin, with bars of its own for "
        "each decomposition. Bins are equally wide, on a log scale where norms differ by much."
    ),
    "Spectrum": (
        "Eigenvalues from the largest down, on a log scale; those that are zero up to rounding are "
        "left out. At the upright line is the bound on the rank, beyond which all are zero. Hollow "
        "markers are negative eigenvalues."
    ),
    "Slopes against curvatures": (
        "Each small marker is a sample along one of the top eigenvectors, with its slope and its "
        "curvature, both times N. The large marker is their mean, which is slope and curvature of "
        "the loss; its bars hold the middle 80 % of the samples."
    ),
}


# --- what a part is made of -----------------------------------------------------------------------


@dataclass(frozen=True)
class Status:
    """One of a few words, with a sign and a colour of its own."""

    word: str
    kind: str

    @property
    def sign(self) -> str:
        """The mark of a verdict, so that colour is not all that tells statuses apart."""
        return MARKS.get(self.kind, "")


@dataclass(frozen=True)
class Table:
    """Rows of cells, which are text or a ``Status``; the first cell of a row is its heading."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    folded: bool = False


@dataclass(frozen=True)
class Picture:
    """A drawing; ``alt`` says in words what can be seen in it, ``reading`` how to read it."""

    svg: str
    alt: str
    caption: str
    reading: str


Block = Table | Picture | str


Shows = Callable[[Problem], Iterator[Block]]


@dataclass(frozen=True)
class Part:
    """A heading, a sentence on what is shown, and what shows it."""

    title: str
    intro: str
    shows: Shows

    @property
    def anchor(self) -> str:
        """The id of the part, for links to it."""
        return slug(self.title)


def slug(text: str) -> str:
    """Return a text in lower case, with hyphens in place of all that is no letter or number."""
    return re.sub(r"\W+", "-", text.lower()).strip("-")


def dtypes(tensors: Iterable[Any]) -> str:
    """Return the names of the dtypes of tensors or operators."""
    names = {str(t.dtype).removeprefix("torch.") for t in tensors}
    return ", ".join(sorted(names))


def _picture(ax: Any, alt: str, caption: str) -> Picture:
    """Return a drawing with how to read it."""
    drawing = figure.as_svg(figure.whole(ax), "")
    # All drawings stand in one document, and matplotlib calls things alike in each: the caption in
    # front makes ids unique.
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{slug(caption)}-", drawing)
    return Picture(svg, alt, caption, READINGS[caption])


# --- structure and verification -------------------------------------------------------------------


def _structure(problem: Problem) -> Iterator[Block]:
    """Yield verdicts, the figure, batch statistics, culprits and notes."""
    structure = problem.structure
    rows = []
    for v in structure.verdicts:
        status = Status(v.status, v.status)
        rows.append((TITLES[v.name], tables.MEANINGS[v.name], status, v.shown_basis, v.note))
    yield Table("Verdicts", ("structure", "which says", "verdict", "basis", "note"), rows)
    diagram = problem.diagram()
    yield _picture(plot.structure(diagram), diagram.description, "From samples to loss")
    if structure.statistics:
        yield _statistics(problem)
    culprits = [_culprit(group, against) for group, against in by_kind(structure.verdicts)]
    if culprits:
        columns = ("module", "op", "where", "why", "what to do", "against")
        yield Table("Culprits", columns, culprits)
    yield from structure.notes


def _statistics(problem: Problem) -> Table:
    """Return the numbers through which samples interact, a row for each op that has some."""
    structure = problem.structure
    # Files without their folders, which are different on every machine.
    rows = [(s.module, s.op, s.where.rpartition("/")[2], str(s.size)) for s in structure.statistics]
    caption = f"Batch statistics, R = {structure.statistics_size} numbers"
    return Table(caption, ("module", "op", "where", "numbers"), rows)


def _culprit(group: Sequence[Culprit], against: Sequence[str]) -> tuple[str, ...]:
    """Return the cells of culprits that are alike but for the module they stand in."""
    first = group[0]
    # A dash for what stands in no module: an empty cell looks like a mistake.
    modules = list(dict.fromkeys(c.module or "–" for c in group))
    names = modules[:NAMED]
    if len(modules) > NAMED:
        names.append(f"{len(modules) - NAMED} more")
    return (
        ", ".join(names),
        first.op,
        first.short,
        first.why,
        first.remedy,
        ", ".join(against),
    )


# Outcomes of tests are shown with the signs and colours of verdicts.
STATUS_OF_OUTCOME = {True: "holds", False: "fails", None: "unknown"}


def _verification(problem: Problem) -> Iterator[Block]:
    """Yield the outcome of the experiment on each verdict."""
    rows = []
    for check in tables.checks_of_all(problem.structure, problem.verify()):
        outcome = Status(tables.outcome(check), STATUS_OF_OUTCOME[check.passed])
        rows.append((TITLES[check.name], check.status, outcome, tables.experiment(check)))
    yield Table("Tests", tables.VERIFICATION_COLUMNS, rows)


def _crosstalk(problem: Problem) -> Iterator[Block]:
    """Yield the matrix as a picture, or how to compute one that is too large for a page."""
    n = problem.samples
    if n > CROSSTALK:
        yield (
            f"Not computed: a matrix of {n} x {n} is large. `problem.crosstalk()` computes it, "
            f"`problem.crosstalk(samples=range({CROSSTALK}))` some rows of it."
        )
        return
    result = problem.crosstalk()
    alt = (
        f"A matrix of shades, {n} by {n}; {result.strength:.1%} of the squares stand off the "
        "diagonal."
    )
    yield _picture(plot.crosstalk(result), alt, "Crosstalk")


# --- gradients ------------------------------------------------------------------------------------


def _gradients(problem: Problem) -> Iterator[Block]:
    """Yield norms of rows and how far the decompositions are apart."""
    # One by one: where copies do not exist, the components are still shown.
    gradient = flat(problem.gradient())
    rows: dict[str, Rows] = {}
    for by in DECOMPOSITIONS:
        try:
            rows[by] = problem.gradients(by=by)
        except UnbatchError as error:
            yield f"Rows by {by} are not shown: {error}"
    cells = [tables.norm_cells(by, r, gradient) for by, r in rows.items()]
    yield Table("One row per sample", tables.NORM_COLUMNS, cells)
    alt = (
        "Histograms of the norms of the rows, whose smallest, mean and largest are in the table "
        "above."
    )
    # By kind, so that decompositions that are the same are drawn once.
    by_name = {r.kind: r for r in rows.values()}
    yield _picture(plot.gradient_norms(by_name), alt, "Norms of the rows")
    caption = "Relative distance of the decompositions"
    yield Table(caption, ("decompositions", "distance"), _distances(rows))


def _distances(rows: Mapping[str, Rows]) -> list[tuple[str, str]]:
    """Return the relative distance of each pair of decompositions."""
    distances = []
    for a in rows:
        for b in rows:
            # Each pair once, and none of a decomposition with itself.
            if a < b:
                distance = tables.share(tables.distance(rows[a], rows[b]))
                distances.append((f"{a} and {b}", distance))
    return distances


def flat(gradient: Mapping[str, Tensor]) -> Tensor:
    """Return a gradient as one vector, in the order of the parameters."""
    return torch.cat([g.flatten() for g in gradient.values()])


# --- curvature ------------------------------------------------------------------------------------


def _curvature(problem: Problem) -> Iterator[Block]:
    """Yield facts about the matrix, its spectrum, and the samples along eigenvectors."""
    G: Any = problem.ggn()
    rank = G.rank_bound
    # The cost of all eigenvalues grows with the cube of the columns, that of the trace does not.
    whole = rank <= WHOLE_SPECTRUM
    facts = [("parameters, D", f"{G.shape[0]:,}"), ("rank at most", f"{rank:,}")]
    if whole:
        facts += _eigenvalue_facts(G)
    facts.append(("trace, the sum of the eigenvalues", tables.number(G.trace())))
    facts.append(("negative eigenvalues", _negative(G.positive_semidefinite)))
    yield Table("Gauss-Newton matrix", ("what", "value"), facts)
    if whole:
        alt = (
            "Eigenvalues from the largest down, on a log scale, and the bound on their number, "
            f"{rank}."
        )
        yield _picture(plot.spectrum(G), alt, "Spectrum")
    directions = G.directions(min(TOP, rank or TOP))
    alt = (
        "Slope and curvature of every sample along each of the top eigenvectors, whose ranges are "
        "in the table below."
    )
    yield _picture(plot.directions(directions), alt, "Slopes against curvatures")
    caption = "Slopes γ and curvatures λ of the samples along the top eigenvectors"
    yield Table(caption, tables.SHARE_COLUMNS, tables.share_rows(directions))


def _eigenvalue_facts(G: Any) -> list[tuple[str, str]]:
    """Return how many eigenvalues there are, and the two ends of the spectrum."""
    values = tables.nonzero(G.eigvalsh())
    facts = [(f"eigenvalues above rounding ({dtypes([G])})", str(len(values)))]
    if len(values):
        facts.append(("largest", tables.number(values[0])))
    if (values < 0).any():
        facts.append(("smallest", tables.number(values[-1])))
    return facts


def _negative(semidefinite: Verdict) -> str:
    """Return whether there may be negative eigenvalues, and why."""
    if semidefinite:
        return "none, because the second derivative of the loss by the predictions has none"
    return f"possible, because {semidefinite.note}"


# --- consequences ---------------------------------------------------------------------------------


def _follows(problem: Problem) -> Iterator[Block]:
    """Yield a folded table for each fate that a quantity can have."""
    consequences = problem.structure.follows()
    for kind, words in consequence_table.OUTCOMES.items():
        rows = []
        for c in consequences:
            if c.outcome == kind:
                computed = "yes" if c.available else "not yet"
                rows.append((c.quantity, computed, c.name, c.reason))
        # An outcome that no quantity has would be an empty table.
        if rows:
            columns = ("quantity", "computed", "as", "why")
            yield Table(f"{words}: {len(rows)} quantities", columns, rows, folded=True)


# --- all of them, in the order of the page --------------------------------------------------------


PARTS = (
    Part(
        "Structure",
        "How far does the loss come apart into samples? Six statements about the computation, each "
        "proved from its record, refuted by an experiment (a witness), assumed because it was "
        "declared, or left unknown.",
        _structure,
    ),
    Part(
        "Verification",
        "Each verdict put to an experiment; one that is contradicted would say so here.",
        _verification,
    ),
    Part(
        "Crosstalk",
        "How strongly each prediction reacts to each sample of the batch, its own and the others.",
        _crosstalk,
    ),
    Part(
        "Gradients",
        "What one sample contributes to the gradient: through its own prediction (component), by "
        "its own use of the parameters (copy), or through its own prediction with batch statistics "
        "held constant (frozen). Where samples do not depend on each other, the three are one.",
        _gradients,
    ),
    Part(
        "Curvature",
        "The Gauss-Newton matrix G = JᵀHJ, through batch statistics as well, and what each sample "
        "has of its largest eigenvalues.",
        _curvature,
    ),
    Part(
        "What follows",
        "Which of the usual quantities exist for this loss, under which name, and why.",
        _follows,
    ),
)
