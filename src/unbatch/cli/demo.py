"""The tour: a small net with batch norm on real data, asked for its structure, its gradients and its curvature.

It uses the package as a user would, and nothing that a user could not. The page at its end is about the same problem,
so its numbers are those that were printed.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch.nn import functional as F

import unbatch as ub
from unbatch.analysis.structure import (
    TITLES,
    culprit_part,
    follows_part,
    heading,
    remarks,
    verdict_table,
)
from unbatch.report import page, tables

MSG_NO_SKLEARN = (
    "The demo trains on the handwritten digits that come with scikit-learn, which is not installed. "
    "Install it with `pip install 'unbatch[demo]'`."
)


EPOCHS = 3


STEP = 0.2  # of the training


BATCH = 32  # samples whose structure is asked for


FEW = 8  # samples whose crosstalk is printed


CLASSES = 10


SHOWN = 4  # eigenvectors along which slopes and curvatures are shown


BAR = 40  # characters of the longest bar of a histogram


DAMPING = 0.01  # of the Newton step


STEP_SIZES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # of the gradient steps beside it


TRAINING = "A small convolutional net with two batch norms learns to read handwritten digits (8 x 8 pixels)."


WIDENED = "It is trained in float32. From here on it is in float64, so that rounding hides nothing."


ASKED = (
    f"How far does the loss of this net, on a mini-batch of {BATCH}, come apart into samples? The answer is six "
    "verdicts, each proved from the recorded computation or refuted by a witness, with what is to blame. In "
    "short: batch norm lets every digit look at all others of its batch, but only through R numbers, its "
    "statistics; the loss itself is still a sum over samples."
)


FOLLOWS = (
    "What the verdicts are good for: they decide which of the usual per-sample and curvature quantities "
    "exist for this loss, and what a quantity has to be called where it does not mean what its usual name "
    "says. Those with a star are computed by this release; some are shown further down."
)


CROSSTALK = (
    "Who listens to whom? Row n, column m of the picture: how strongly prediction n reacts to sample m, "
    f"for the first {FEW} of the {BATCH} digits (darker is stronger, on a log scale over four decades). Without "
    "crosstalk only the diagonal would be dark."
)


VERIFIED = (
    "Should one believe the verdicts? Each is put to an experiment: replace the other samples, freeze the "
    "batch statistics, permute the batch, vary the loss. One that contradicted its verdict would say so "
    "here."
)


GRADIENTS = (
    "What does one digit contribute to the gradient? Under batch norm that has three answers. By component: "
    "what goes through its own prediction. By copy: what its own use of the parameters contributes, "
    "whichever prediction listens. Frozen: by component, but with the batch statistics held constant."
)


SUMS = (
    "Component and copy rows sum to the gradient, up to rounding; frozen rows do not, because what flows "
    "through the statistics is missing. Each is exact as what it is called, and none is the others:"
)


NOISE = (
    "The warning, in short: the number is right, but digits that see each other are no independent draws, so "
    "it does not say which batch size is needed."
)


CURVATURE = (
    "Back in train mode: how is the loss curved? The Gauss-Newton matrix G = JᵀHJ puts together how the predictions "
    "move with the parameters (J, through the batch statistics as well) and how the loss bends with the predictions "
    "(H). It has a row for every parameter, but it is a sum of one part per digit, each of which bends in at most "
    "as many directions as there are classes, less one. So a much smaller matrix knows its whole spectrum:"
)


SPECTRUM = "The eigenvalues that are not zero, counted by powers of ten (each is at least what its line says):"


DIRECTIONS = (
    "The eigenvectors with the largest eigenvalues are the directions in which the loss curves most. Along each "
    "the loss has one slope and one curvature, and every digit n has a share in them, its slope γ_n and its "
    "curvature λ_n. These sum to the whole, and are often spread unevenly: a few digits hold most of it."
)


NEWTON = (
    "Slope over curvature says how far to go. A damped Newton step does that along every eigenvector at once, here "
    f"with {DAMPING:g} added to each curvature. A gradient step costs less, and has one step size for all:"
)


EVAL = (
    "The same question after model.eval(), where batch norm uses its running statistics in place of those "
    "of the batch: no prediction listens to another sample any more, and every verdict holds."
)


DECOMPOSITIONS = ("component", "copy", "frozen")


ON_A_PAGE = "The same net on the same batch, as a page with pictures and the same numbers"


LEFT_OUT = "`unbatch demo` without --quick goes on to the curvature, and writes a page.\n\n"


NEXT = """\
What to try next

  unbatch inspect path/to/file.py:make_model --input 8,3,32,32 --loss cross_entropy
      the same for a model of yours; `unbatch inspect --help` lists the rest
  unbatch report path/to/file.py:make_model --input 8,3,32,32 --loss cross_entropy
      ... as a page with pictures

  import unbatch as ub
  problem = ub.Problem(model, loss, (X, y))
  print(problem.structure)      # the verdicts, on your own batch
  problem.gradients(by="copy")  # the gradient, one row per sample
  problem.compute(ub.SquaredNorms())   # squared norms of the rows, without forming them
  problem.verify().checks       # what was tried against them
  print(problem.crosstalk())    # who listens to whom
  problem.ggn().eigvalsh()      # the spectrum of the Gauss-Newton matrix
  problem.structure.follows()   # what may be computed, and why"""


class Digits(NamedTuple):
    """Images ``[N, 1, 8, 8]`` and labels ``[N]``, to learn from and held out."""

    X: Tensor
    y: Tensor
    X_held_out: Tensor
    y_held_out: Tensor


class Net(nn.Module):
    """Twice convolution, batch norm and ReLU, then a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 16, 3, padding=1, stride=2), nn.BatchNorm2d(16)
        self.linear = nn.Linear(16 * 4 * 4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.conv2(x)))
        return self.linear(x.flatten(1))


def main(
    quick: bool = False, console: Console | None = None, report_to: Path | None = None
) -> None:
    """Run the tour and print it; some ten seconds on one core, half of them for imports.

    ``quick``: with one epoch of training, and without the curvature. ``report_to``: a page to write. The random state
    and the number of threads are afterwards as they were. Raises ``ImportError`` where scikit-learn is missing, and
    ``OSError`` where the page cannot be written, before anything is computed.
    """
    out = console or tables.console()
    if report_to is not None:
        page.check_writable(report_to)
    digits = load()
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.set_num_threads(1)
        try:
            problem = _tour(out, digits, quick)
            _report(out, problem, report_to)
            out.print()
            out.rule(style="dim")
            out.print(LEFT_OUT + NEXT if quick else NEXT, markup=False)
        finally:
            torch.set_num_threads(threads)


def load() -> Digits:
    """The digits, a fifth of them held out. Raises ``ImportError`` where scikit-learn is missing."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(MSG_NO_SKLEARN) from error
    data = load_digits()
    X = torch.as_tensor(data.images, dtype=torch.get_default_dtype()).unsqueeze(1) / 16
    y = torch.as_tensor(data.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    held_out, kept = order[: len(y) // 5], order[len(y) // 5 :]
    return Digits(X[kept], y[kept], X[held_out], y[held_out])


def train(model: Net, digits: Digits, epochs: int, out: Console) -> float:
    """Train under a progress bar; the accuracy on held-out digits."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[accuracy]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=out) as progress:
        task = progress.add_task("training", total=epochs * (len(digits.y) // BATCH), accuracy="")
        for _ in range(epochs):
            for batch in torch.randperm(len(digits.y)).split(BATCH):
                if len(batch) == BATCH:
                    _step(model, digits.X[batch], digits.y[batch])
                    progress.advance(task)
            progress.update(
                task, accuracy=f"{accuracy(model, digits):.1%} of held-out digits read correctly"
            )
    return accuracy(model, digits)


def accuracy(model: Net, digits: Digits) -> float:
    """The share of held-out digits that the model, in eval mode, reads correctly."""
    model.eval()
    with torch.no_grad():
        right = model(digits.X_held_out).argmax(1) == digits.y_held_out
    model.train()
    return float(right.double().mean())


def _step(model: Net, X: Tensor, y: Tensor) -> None:
    """Of plain gradient descent: the first optimizer of torch.optim takes seconds to import."""
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(F.cross_entropy(model(X), y), parameters)
    with torch.no_grad():
        for p, g in zip(parameters, gradients, strict=True):
            p.add_(g, alpha=-STEP)


def _report(out: Console, problem: ub.Problem, path: Path | None) -> None:
    if path is not None:
        written = ub.write_report(
            problem, path, "Digits", {"data": "handwritten digits of scikit-learn"}
        )
        out.print(f"\n{ON_A_PAGE}: {written.resolve()}", markup=False, soft_wrap=True)


def _tour(out: Console, digits: Digits, quick: bool) -> ub.Problem:
    """Tell everything; the problem, in train mode and float64."""
    model = Net()
    _train(out, model, digits, epochs=1 if quick else EPOCHS)
    problem = ub.Problem(
        model.double(), F.cross_entropy, (digits.X[:BATCH].double(), digits.y[:BATCH])
    )
    before = problem.structure
    found = [heading(before), verdict_table(before), *culprit_part(before), *remarks(before)]
    _part(out, "2. Structure in train mode", ASKED, _meanings(), *found)
    _part(out, "3. What follows", FOLLOWS, follows_part(before))
    _part(out, "4. Crosstalk", CROSSTALK, *_crosstalk(problem, FEW if quick else BATCH))
    _part(out, "5. Verification", VERIFIED, tables.verification_table(before, problem.verify()))
    rows = {by: problem.gradients(by=by) for by in DECOMPOSITIONS}
    shown = [
        _norms(rows, problem.gradient()),
        Text(SUMS),
        _distances(rows),
        *_noise_scale(problem),
        Text(NOISE),
    ]
    _part(out, "6. The gradient in three ways", GRADIENTS, *shown)
    model.eval()
    _eval(out, before, problem)
    model.train()
    if not quick:
        _curvature(out, model, problem)
    return problem


def _crosstalk(problem: ub.Problem, rows: int) -> list[Text]:
    """A corner of the picture, and what there is in so many rows of it."""
    found = problem.crosstalk(samples=range(rows))
    corner, _, _ = str(replace(found, matrix=found.matrix[:FEW, :FEW])).rpartition("\n")
    return [Text(corner), Text(_off_diagonal(found, rows))]


def _off_diagonal(found: ub.Crosstalk, rows: int) -> str:
    return f"In the rows of the first {rows} predictions {found.strength:.1%} of the squares stand off the diagonal."


def _eval(out: Console, before: ub.Structure, problem: ub.Problem) -> None:
    after = problem.structure
    checked = tables.verification_table(after, problem.verify())
    strength = Text(_off_diagonal(problem.crosstalk(samples=range(FEW)), FEW))
    rows = {by: problem.gradients(by=by) for by in DECOMPOSITIONS}
    apart = tables.share(max(tables.distance(a, b) for a, b in combinations(rows.values(), 2)))
    same = f"The three decompositions of the gradient are one, {rows['component'].kind}: at most {apart} apart."
    shown = [heading(after), verdict_table(after), _gained(before, after), strength, Text(same)]
    _part(out, "7. Structure in eval mode", EVAL, *shown, *_noise_scale(problem), checked)


def _train(out: Console, model: Net, digits: Digits, epochs: int) -> None:
    _part(out, "1. A trained net", TRAINING)
    out.print()
    reached = train(model, digits, epochs, out)
    sizes = f"{len(digits.y)} digits to learn from, {len(digits.y_held_out)} held out"
    out.print(f"{sizes}, of which the net now reads {reached:.1%} correctly. {WIDENED}")


def _meanings() -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    for name, meaning in tables.MEANINGS.items():
        table.add_row(TITLES[name], Text(meaning, "dim"))
    return table


def _gained(before: ub.Structure, after: ub.Structure) -> Text:
    """In words: how many quantities have become what their names say."""
    was, now = ([c.quantity for c in s.follows() if c.outcome == "exact"] for s in (before, after))
    new = [q for q in now if q not in was and "sample" in q]
    some = f", {' and '.join(new[:2])} among them" if new else ""
    return Text(
        f"Exact under their own names are now {len(now)} quantities in place of {len(was)}{some}."
    )


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    return table


def _norms(rows: Mapping[str, ub.Rows], gradient: Mapping[str, Tensor]) -> Table:
    whole = torch.cat([g.flatten() for g in gradient.values()])
    return _table(tables.NORM_COLUMNS, [tables.norm_cells(by, r, whole) for by, r in rows.items()])


def _distances(rows: Mapping[str, ub.Rows]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    for a, b in combinations(rows, 2):
        table.add_row(f"{a} and {b}", f"{tables.share(tables.distance(rows[a], rows[b]))} apart")
    return table


def _noise_scale(problem: ub.Problem) -> list[Text]:
    """How many samples it takes for a gradient to be half noise, and what the package has to say about that."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ub.MixedSamplesWarning)
        scale = problem.compute(ub.NoiseScale())
    said = [Text(f"{w.category.__name__}: {w.message}", "yellow") for w in caught]
    return [Text(f"Gradient noise scale: {tables.number(scale)} samples."), *said]


def _curvature(out: Console, model: Net, problem: ub.Problem) -> None:
    G: Any = problem.ggn()
    values, directions = tables.nonzero(G.eigvalsh()), G.directions(SHOWN)
    before = [_spectrum(problem, G, values), Text(SPECTRUM), _histogram(values)]
    steps = [Text(NEWTON), _steps(model, problem, G)]
    _part(
        out,
        "8. The curvature",
        CURVATURE,
        *before,
        Text(DIRECTIONS),
        *_shares(problem, directions),
        *steps,
    )


def _spectrum(problem: ub.Problem, G: Any, values: Tensor) -> Table:
    """Sizes, and where the trace is; ``values``: eigenvalues that are not zero, the largest first."""
    frozen = float(problem.ggn(by="frozen").trace())
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_row("parameters, D", str(G.shape[0]))
    table.add_row("rank at most, N(C-1)", f"{problem.samples} x {CLASSES - 1} = {G.rank_bound}")
    table.add_row(
        "eigenvalues above rounding", f"{len(values)}, the largest {tables.number(values[0])}"
    )
    table.add_row(
        "trace, their sum",
        f"{tables.number(G.trace())}, of which the largest 1, 10, 50 hold {_held(values)}",
    )
    times = f"{frozen / float(G.trace()):.2g} times as large"
    table.add_row(
        "trace, statistics frozen", f"{tables.number(frozen)}, {times}: that is another matrix"
    )
    return table


def _held(values: Tensor) -> str:
    return ", ".join(f"{values[:k].sum() / values.sum():.0%}" for k in (1, 10, 50))


def _histogram(values: Tensor) -> Table:
    """A line for every power of ten, the largest first."""
    powers, counts = values.log10().floor().int().unique(return_counts=True)
    table = Table(box=None, pad_edge=False, show_header=False)
    for power, count in zip(powers.tolist()[::-1], counts.tolist()[::-1], strict=True):
        table.add_row(
            f"1e{power:+d}", Text("█" * max(1, round(BAR * count / int(counts.max())))), str(count)
        )
    return table


def _shares(problem: ub.Problem, found: Any) -> list[Any]:
    """What digits have of slope and curvature along eigenvectors, the most curved first; and what that sums to."""
    table = _table(
        tables.SHARE_COLUMNS,
        [tables.share_cells(found, i) for i in reversed(range(len(found.values)))],
    )
    gradient = torch.cat([g.flatten() for g in problem.gradient().values()])
    curved = tables.share((found.curvatures.sum(0) / found.values - 1).abs().max())
    along = tables.share(
        (found.slopes.sum(0) - found.vectors.T @ gradient).norm() / gradient.norm()
    )
    return [
        table,
        Text(f"Σ λ_n is the eigenvalue ({curved} off), Σ γ_n the slope of the loss ({along} off)."),
    ]


def _steps(model: Net, problem: ub.Problem, G: Any) -> Table:
    """The loss on the batch, before and after a step."""
    gradient = problem.gradient()
    losses = {
        a: _after(model, problem, {n: -a * g for n, g in gradient.items()}) for a in STEP_SIZES
    }
    best = min(losses, key=losses.__getitem__)
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_row("loss on the batch", f"{_after(model, problem, {}):.2g}")
    sizes = f"step size {best:g}, the best of {', '.join(f'{a:g}' for a in STEP_SIZES)}"
    table.add_row("after a gradient step", f"{losses[best]:.2g}", sizes)
    table.add_row(
        "after a damped Newton step", f"{_after(model, problem, G.newton_step(DAMPING)):.2g}"
    )
    return table


def _after(model: Net, problem: ub.Problem, step: Mapping[str, Tensor]) -> float:
    """The loss after a step, by a copy of the model: its running statistics are not to move."""
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in moved.named_parameters():
            p.add_(step.get(name, 0))
        return float(F.cross_entropy(moved(problem.inputs), problem.targets))


def _part(out: Console, title: str, sentence: str, *shown: Any) -> None:
    out.print()
    out.rule(f"[bold]{title}", align="left", style="dim")
    out.print(sentence, markup=False)
    for part in shown:
        out.print()
        out.print(part)
