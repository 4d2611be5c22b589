"""The tour: a small net with batch norm on real data, its structure, gradients and curvature.

It uses the package as a user would, and nothing that a user could not. The page at its end is about
the same problem, so its numbers are those that were printed. The net and its training are in
``digits.py``, the paragraphs in ``texts.py``.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor
from torch.nn import functional as F

import unbatch as ub
from unbatch import rendering
from unbatch.analysis.structure_tables import (
    culprit_part,
    follows_part,
    heading,
    remarks,
    verdict_table,
)
from unbatch.analysis.verdict import TITLES
from unbatch.cli import texts
from unbatch.cli.digits import CLASSES, Digits, Net, load, train
from unbatch.cli.texts import BATCH, DAMPING, FEW, ON_A_PAGE
from unbatch.report import page, tables

__all__ = ["BATCH", "CLASSES", "FEW", "ON_A_PAGE", "SHOWN", "Digits", "Net", "load", "main"]


EPOCHS = 3


SHOWN = 4  # eigenvectors along which slopes and curvatures are shown


BAR = 40  # characters of the longest bar of a histogram


STEP_SIZES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # of the gradient steps beside the Newton step


DECOMPOSITIONS = ("component", "copy", "frozen")


def main(
    quick: bool = False, console: Console | None = None, report_to: Path | None = None
) -> None:
    """Run the tour and print it; some ten seconds on one core, half of them for imports.

    ``quick``: with one epoch of training, and without the curvature. ``report_to``: a page to
    write. The random state and the number of threads are afterwards as they were. Raises
    ``ImportError`` where scikit-learn is missing, and ``OSError`` where the page cannot be written,
    before anything is computed.
    """
    out = console or tables.console()
    if report_to is not None:
        page.check_writable(report_to)
    digits = load()
    threads = torch.get_num_threads()
    # No devices: all is done on the CPU, and the states of GPUs need not be saved.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # Sums in another order round differently: on one thread the tour prints the same anywhere.
        torch.set_num_threads(1)
        try:
            problem = _tour(out, digits, quick)
            if report_to is not None:
                _report(out, problem, report_to)
            out.print()
            out.rule(style="dim")
            if quick:
                out.print(texts.LEFT_OUT + texts.NEXT, markup=False)
            else:
                out.print(texts.NEXT, markup=False)
        finally:
            torch.set_num_threads(threads)


def _tour(out: Console, digits: Digits, quick: bool) -> ub.Problem:
    """Print all parts; return the problem, in train mode and float64."""
    model = Net()
    _train(out, model, digits, epochs=1 if quick else EPOCHS)
    # Trained in float32, as is usual; in float64 comparisons show differences and no rounding.
    data = (digits.X[:BATCH].double(), digits.y[:BATCH])
    problem = ub.Problem(model.double(), F.cross_entropy, data)
    in_train_mode = problem.structure
    _structure(out, in_train_mode)
    _part(out, "3. What follows", texts.FOLLOWS, follows_part(in_train_mode.follows()))
    # The page computes the whole matrix, with which a quick tour has nothing to compare.
    crosstalk = _crosstalk(problem, FEW if quick else BATCH)
    _part(out, "4. Crosstalk", texts.CROSSTALK, *crosstalk)
    checks = tables.verification_table(in_train_mode, problem.verify())
    _part(out, "5. Verification", texts.VERIFIED, checks)
    _gradients(out, problem)
    # The problem stays the same object: it notices that the mode changed, and records again.
    model.eval()
    _in_eval_mode(out, in_train_mode, problem)
    model.train()
    if not quick:
        _curvature(out, model, problem)
    return problem


def _part(out: Console, title: str, paragraph: str, *shown: Any) -> None:
    """Print a part of the tour: what it is about, then what was computed."""
    out.print()
    out.rule(f"[bold]{title}", align="left", style="dim")
    out.print(paragraph, markup=False)
    for block in shown:
        out.print()
        out.print(block)


def _report(out: Console, problem: ub.Problem, path: Path) -> None:
    """Write the page and print where it is."""
    facts = {"data": "handwritten digits of scikit-learn"}
    written = ub.write_report(problem, path, "Digits", facts)
    out.print(f"\n{ON_A_PAGE}: {written.resolve()}", markup=False, soft_wrap=True)


# --- training and structure -----------------------------------------------------------------------


def _train(out: Console, model: Net, digits: Digits, epochs: int) -> None:
    """Train the net and print how well it reads."""
    _part(out, "1. A trained net", texts.TRAINING)
    out.print()
    reached = train(model, digits, epochs, out)
    sizes = f"{len(digits.y)} digits to learn from, {len(digits.y_held_out)} held out"
    out.print(f"{sizes}, of which the net now reads {reached:.1%} correctly. {texts.WIDENED}")


def _structure(out: Console, structure: ub.Structure) -> None:
    """Print the verdicts with what each of them says."""
    # What each verdict says stands above the verdicts, for a reader who has not met the words.
    meanings = []
    for name, meaning in tables.MEANINGS.items():
        meanings.append((TITLES[name], Text(meaning, "dim")))
    _part(
        out,
        "2. Structure in train mode",
        texts.ASKED,
        rendering.table((), meanings),
        heading(structure.samples, structure.predictions),
        verdict_table(structure.verdicts),
        *culprit_part(structure.verdicts),
        *remarks(
            structure.assumptions, structure.custom_rules, structure.unknown_ops, structure.notes
        ),
    )


def _crosstalk(problem: ub.Problem, rows: int) -> list[Text]:
    """Return a corner of the matrix as a picture, and the strength in so many rows of it."""
    result = problem.crosstalk(samples=range(rows))
    corner = replace(result, matrix=result.matrix[:FEW, :FEW])
    # The last line is the strength of the corner alone, which would contradict the sentence.
    picture, _, _ = str(corner).rpartition("\n")
    return [Text(picture), _off_diagonal(result, rows)]


def _off_diagonal(result: ub.Crosstalk, rows: int) -> Text:
    """Return the strength of the crosstalk in a sentence."""
    return Text(
        f"In the rows of the first {rows} predictions {result.strength:.1%} of the squares stand "
        "off the diagonal."
    )


def _in_eval_mode(out: Console, before: ub.Structure, problem: ub.Problem) -> None:
    """Print what has become of the verdicts and of what follows, without the long tables."""
    after = problem.structure
    checks = tables.verification_table(after, problem.verify())
    rows = _rows(problem)
    distances = [tables.distance(a, b) for a, b in combinations(rows.values(), 2)]
    same = (
        f"The three decompositions of the gradient are one, {rows['component'].kind}: at most "
        f"{tables.share(max(distances))} apart."
    )
    _part(
        out,
        "7. Structure in eval mode",
        texts.EVAL,
        heading(after.samples, after.predictions),
        verdict_table(after.verdicts),
        _gained(before, after),
        _off_diagonal(problem.crosstalk(samples=range(FEW)), FEW),
        Text(same),
        *_noise_scale(problem),
        checks,
    )


def _gained(before: ub.Structure, after: ub.Structure) -> Text:
    """Return in words how many quantities have become what their names say."""
    exact_before, exact_after = _exact(before), _exact(after)
    # Quantities of single samples are what most readers know by name.
    new = [name for name in exact_after if name not in exact_before and "sample" in name]
    examples = ""
    if new:
        examples = f", {' and '.join(new[:2])} among them"
    return Text(
        f"Exact under their own names are now {len(exact_after)} quantities in place of "
        f"{len(exact_before)}{examples}."
    )


def _exact(structure: ub.Structure) -> list[str]:
    """Return the quantities that exist under their own names."""
    return [c.quantity for c in structure.follows() if c.outcome == "exact"]


# --- gradients ------------------------------------------------------------------------------------


def _rows(problem: ub.Problem) -> dict[str, ub.Rows]:
    """Return the rows of the gradient by each decomposition."""
    return {by: problem.gradients(by=by) for by in DECOMPOSITIONS}


def _gradients(out: Console, problem: ub.Problem) -> None:
    """Print norms, sums and distances of the rows, and a statistic over them."""
    rows = _rows(problem)
    gradient = _flat(problem.gradient())
    norms = [tables.norm_cells(by, r, gradient) for by, r in rows.items()]
    _part(
        out,
        "6. The gradient in three ways",
        texts.GRADIENTS,
        rendering.table(tables.NORM_COLUMNS, norms),
        Text(texts.SUMS),
        _distances(rows),
        *_noise_scale(problem),
        Text(texts.NOISE),
    )


def _flat(gradient: Mapping[str, Tensor]) -> Tensor:
    """Return a gradient as one vector, in the order of the parameters."""
    return torch.cat([g.flatten() for g in gradient.values()])


def _distances(rows: Mapping[str, ub.Rows]) -> Table:
    """Return how far each pair of decompositions is apart, relative to the first."""
    cells = []
    for a, b in combinations(rows, 2):
        distance = tables.share(tables.distance(rows[a], rows[b]))
        cells.append((f"{a} and {b}", f"{distance} apart"))
    return rendering.table((), cells)


def _noise_scale(problem: ub.Problem) -> list[Text]:
    """Return how many samples make a gradient half noise, and the warnings that come with it."""
    # Warnings are printed as a part of the tour. Always, because Python shows the same warning
    # once, and the tour may have been run before.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ub.MixedSamplesWarning)
        scale = problem.compute(ub.NoiseScale())
    blocks = [Text(f"Gradient noise scale: {tables.number(scale)} samples.")]
    blocks += [Text(f"{w.category.__name__}: {w.message}", "yellow") for w in caught]
    return blocks


# --- curvature ------------------------------------------------------------------------------------


def _curvature(out: Console, model: Net, problem: ub.Problem) -> None:
    """Print the spectrum, the digits along eigenvectors, and steps that use both."""
    G: Any = problem.ggn()
    values = tables.nonzero(G.eigvalsh())
    _part(
        out,
        "8. The curvature",
        texts.CURVATURE,
        _spectrum(problem, G, values),
        Text(texts.SPECTRUM),
        _histogram(values),
        Text(texts.DIRECTIONS),
        *_shares(problem, G.directions(SHOWN)),
        Text(texts.NEWTON),
        _steps(model, problem, G),
    )


def _spectrum(problem: ub.Problem, G: Any, values: Tensor) -> Table:
    """Return sizes, and what holds the trace; ``values``: eigenvalues without zeros, descending."""
    trace, frozen = float(G.trace()), float(problem.ggn(by="frozen").trace())
    shares = [f"{values[:k].sum() / values.sum():.0%}" for k in (1, 10, 50)]
    held = f"of which the largest 1, 10, 50 hold {', '.join(shares)}"
    times = f"{frozen / trace:.2g} times as large: that is another matrix"
    rows = (
        ("parameters, D", str(G.shape[0])),
        ("rank at most, N(C-1)", f"{problem.samples} x {CLASSES - 1} = {G.rank_bound}"),
        ("eigenvalues above rounding", f"{len(values)}, the largest {tables.number(values[0])}"),
        ("trace, their sum", f"{tables.number(trace)}, {held}"),
        ("trace, statistics frozen", f"{tables.number(frozen)}, {times}"),
    )
    return rendering.table((), rows)


def _histogram(values: Tensor) -> Table:
    """Return a line for every power of ten, the largest first."""
    powers, counts = values.log10().floor().int().unique(return_counts=True)
    most = int(counts.max())
    rows = []
    for power, count in zip(powers.tolist(), counts.tolist(), strict=True):
        # One block at least: a single eigenvalue should be seen.
        bar = "█" * max(1, round(BAR * count / most))
        rows.append((f"1e{power:+d}", Text(bar), str(count)))
    # ``unique`` ascends, and a spectrum is read from the largest value down.
    return rendering.table((), reversed(rows))


def _shares(problem: ub.Problem, directions: Any) -> list[Any]:
    """Return the digits' slopes and curvatures along eigenvectors, and what these sum to.

    Over samples n, the curvatures λ_n of a direction sum to its eigenvalue, and the slopes γ_n to
    the slope of the loss, the product of the eigenvector and the gradient.
    """
    table = rendering.table(tables.SHARE_COLUMNS, tables.share_rows(directions))
    gradient = _flat(problem.gradient())
    curvature_gap = (directions.curvatures.sum(0) / directions.values - 1).abs().max()
    slope_gap = (directions.slopes.sum(0) - directions.vectors.T @ gradient).norm()
    slope_gap = slope_gap / gradient.norm()
    sums = (
        f"Σ λ_n is the eigenvalue ({tables.share(curvature_gap)} off), Σ γ_n the slope of the loss "
        f"({tables.share(slope_gap)} off)."
    )
    return [table, Text(sums)]


def _steps(model: Net, problem: ub.Problem, G: Any) -> Table:
    """Return the loss on the batch, before and after a step of each kind."""
    # The best of several sizes, so that the comparison with Newton's step is fair.
    gradient = problem.gradient()
    losses = {}
    for size in STEP_SIZES:
        step = {name: -size * g for name, g in gradient.items()}
        losses[size] = _loss_after(model, problem, step)
    best = min(losses, key=losses.__getitem__)
    sizes = ", ".join(f"{size:g}" for size in STEP_SIZES)
    newton = _loss_after(model, problem, G.newton_step(DAMPING))
    rows = (
        ("loss on the batch", f"{_loss_after(model, problem, {}):.2g}"),
        (
            "after a gradient step",
            f"{losses[best]:.2g}",
            f"step size {best:g}, the best of {sizes}",
        ),
        ("after a damped Newton step", f"{newton:.2g}"),
    )
    return rendering.table((), rows)


def _loss_after(model: Net, problem: ub.Problem, step: Mapping[str, Tensor]) -> float:
    """Return the loss on the batch after a step."""
    # On a copy: in train mode a forward pass moves the running statistics, and the model's stay.
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in moved.named_parameters():
            p.add_(step.get(name, 0))
        return float(F.cross_entropy(moved(problem.inputs), problem.targets))
