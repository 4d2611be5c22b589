"""The command ``unbatch``: what is typed becomes a question, and the structure an exit status.

How words become models and tensors is in ``parsing.py`` and ``losses.py``; how results look, in
``report/tables.py``. Whatever imports torch is imported by the command that needs it, so that help
and completion come at once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

import unbatch
from unbatch.errors import CaptureError, InputError

if TYPE_CHECKING:
    from unbatch.analysis.structure import Structure
    from unbatch.problem.problem import Problem
    from unbatch.verification.verify import Verification


# Exit statuses. A script can tell what fails from what is not established; 2 is also what typer
# returns for options that it does not know.
HOLDS, FAILS, WRONG_CALL, UNKNOWN = 0, 1, 2, 3


MSG_ONE_LOSS = (
    "Name one source of the loss: either --loss NAME, or --own-loss for a model that returns its "
    "own{got}."
)


MSG_OWN_TARGETS = (
    "--targets goes with --loss; a model that returns its own loss takes its targets as an --input."
)


TOUR_PAGE = Path("demo-out/report.html")  # where the page of the tour goes


app = typer.Typer(
    help="Proves which structure a loss has, and says what may be computed because of it.",
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    # An exception that comes this far is a bug: its traceback is printed as Python does it.
    pretty_exceptions_enable=False,
    # Brackets in help texts, as in [NAME=]SHAPE, are no markup.
    rich_markup_mode=None,
)


def main() -> None:
    """Run the installed command."""
    app(prog_name="unbatch")


def _show_version(wanted: bool) -> None:
    """Print the version and end."""
    if wanted:
        typer.echo(f"unbatch {unbatch.__version__}")
        raise typer.Exit


# typer takes the options that stand before a subcommand from a function of this kind.
@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    pass


# --- demo -----------------------------------------------------------------------------------------


@app.command()
def demo(
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="Train for one epoch; leave out the curvature and, without --output, the page.",
        ),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help=f"Where the page is written; without --quick, {TOUR_PAGE}.",
        ),
    ] = None,
) -> None:
    """A tour on real data: a small net with batch norm, in train mode and after .eval()."""
    from unbatch.cli import demo as tour

    # A quick tour writes a page only where it is told to.
    if output is None and not quick:
        output = TOUR_PAGE
    try:
        tour.main(quick, report_to=output)
    except (ImportError, OSError) as error:
        _complain(_message(error))


# --- inspect and report ---------------------------------------------------------------------------


# The options of both commands, written once.

Target = Annotated[
    str,
    typer.Argument(
        help="The model: package.module:make_model or path/to/file.py:make_model, or a class."
    ),
]


Inputs = Annotated[
    list[str],
    typer.Option(
        "--input",
        "-i",
        metavar="[NAME=]SHAPE[:DTYPE]",
        help="A random input, for each argument of the model: 8,3,32,32 or '8,9:int64<50' or "
        "mask=8,9:bool.",
    ),
]


LossName = Annotated[
    str,
    typer.Option(
        "--loss", "-l", metavar="NAME", help="cross_entropy, mse, ..., or file.py:function."
    ),
]


Targets = Annotated[
    str,
    typer.Option(
        "--targets",
        "-t",
        metavar="SHAPE[:DTYPE]",
        help="Random targets. Without it they are drawn to fit the loss.",
    ),
]


OwnLoss = Annotated[bool, typer.Option("--own-loss", help="The model returns its own loss.")]


EvalMode = Annotated[bool, typer.Option("--eval", help="Call model.eval() first.")]


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]


Verify = Annotated[bool, typer.Option(help="Put the verdicts to a numerical test.")]


Output = Annotated[
    Path, typer.Option("--output", "-o", metavar="FILE", help="Where the report is written.")
]


Seed = Annotated[int, typer.Option(help="For the parameters, the inputs and the targets.")]


@dataclass(frozen=True)
class Call:
    """What was typed about a model, its loss and its batch; "" for what was not typed."""

    target: str
    inputs: Sequence[str]
    loss: str
    targets: str
    own_loss: bool
    eval_mode: bool
    seed: int

    def check(self) -> None:
        """Raise ``InputError`` unless there is one loss, and targets only where it takes them."""
        # Both were typed, or neither was.
        if bool(self.loss) == self.own_loss:
            raise InputError(MSG_ONE_LOSS.format(got=", not both" if self.loss else ""))
        if self.own_loss and self.targets:
            raise InputError(MSG_OWN_TARGETS)


# The arguments are the options of the command, of which typer reads names, types and defaults.
@app.command(
    epilog="Exit status: 0 all structures hold, 1 one fails, 2 wrong call, 3 none fails but one is "
    "unknown."
)
def inspect(  # noqa: PLR0913
    target: Target,
    inputs: Inputs,
    loss: LossName = "",
    targets: Targets = "",
    own_loss: OwnLoss = False,
    eval_mode: EvalMode = False,
    as_json: AsJson = False,
    verify: Verify = True,
    seed: Seed = 0,
) -> None:
    """Print the structure of a model's loss on a random batch, and put it to a numerical test."""
    call = Call(target, inputs, loss, targets, own_loss, eval_mode, seed)
    verification = None
    try:
        with _spinner("reading the model"):
            problem, facts = problem_of(call)
        # Questions have bars of their own, and two live displays would overwrite each other.
        structure = problem.structure
        if verify:
            verification = problem.verify()
    except (InputError, CaptureError) as error:
        _complain(str(error))
    if as_json:
        # Alone on standard output, for a pipe; whatever else is printed goes to standard error.
        from unbatch.report import tables

        typer.echo(json.dumps(facts | tables.as_dict(structure, verification), indent=2))
    else:
        _print(facts, structure, verification)
    raise typer.Exit(exit_status(structure, verification))


@app.command(name="report")
def write_report(
    target: Target,
    inputs: Inputs,
    output: Output = Path("unbatch-report.html"),
    loss: LossName = "",
    targets: Targets = "",
    own_loss: OwnLoss = False,
    eval_mode: EvalMode = False,
    seed: Seed = 0,
) -> None:
    """Write all that is to be known about a model's loss on a random batch to one HTML file."""
    from unbatch.report.page import check_writable

    call = Call(target, inputs, loss, targets, own_loss, eval_mode, seed)
    try:
        # Before the model is even imported: a report takes a while, and a typo does not.
        check_writable(output)
        with _spinner("reading the model"):
            problem, facts = problem_of(call)
        path = unbatch.write_report(problem, output, said=facts)
    except (InputError, CaptureError, ImportError, OSError) as error:
        _complain(_message(error))
    typer.echo(f"The report is {path.resolve()}")


def problem_of(call: Call) -> tuple[Problem, dict[str, str]]:
    """Return the problem, and in words what was drawn for it, by name.

    Raises ``InputError`` for what makes no sense, ``CaptureError`` where the model raises.
    """
    call.check()
    import torch

    from unbatch.cli.losses import draw_targets, find_loss
    from unbatch.cli.parsing import Shape, as_inputs, make_model
    from unbatch.problem.problem import Problem

    # All that is typed is read before the model is made, which may take long.
    shapes = [Shape.parse(text, "--input") for text in call.inputs]
    target_shape = Shape.parse(call.targets, "--targets") if call.targets else None
    loss = None if call.own_loss else find_loss(call.loss)
    model = make_model(call.target, call.seed)
    if call.eval_mode:
        model = model.eval()
    # A generator of its own: what is drawn does not change with what the model draws when made.
    generator = torch.Generator().manual_seed(call.seed)
    X = as_inputs(shapes, generator)
    mode = "train" if model.training else "eval"
    facts = {
        "model": f"{call.target} ({type(model).__name__}, {mode} mode)",
        "inputs": f"{', '.join(map(str, shapes))}, drawn at random",
    }
    if loss is None:
        return Problem(model, batch=X), facts | {"loss": "the model's own"}
    y, drawn = draw_targets(loss, target_shape, model, X, generator)
    facts |= {"loss": loss.words, "targets": drawn}
    return Problem(model, loss.function, (X, y)), facts


def exit_status(structure: Structure, verification: Verification | None) -> int:
    """Return the exit status.

    1 where a structure fails or a verdict is contradicted, else 3 where one is unknown, else 0.
    """
    statuses = {v.status for v in structure.verdicts}
    # A verdict that is contradicted may hold by its own words, and yet must not pass.
    contradicted = verification is not None and not verification
    if "fails" in statuses or contradicted:
        return FAILS
    if "unknown" in statuses:
        return UNKNOWN
    return HOLDS


# --- what is printed ------------------------------------------------------------------------------


def _complain(message: str) -> NoReturn:
    """Print a message as the command does, and end with the status of a wrong call."""
    typer.echo(f"unbatch: {message}", err=True)
    raise typer.Exit(WRONG_CALL)


def _message(error: Exception) -> str:
    """Return the message of an error, without the number that the operating system gives it."""
    return getattr(error, "strerror", None) or str(error)


def _spinner(what: str) -> AbstractContextManager[Any]:
    """Return a sign of life on a terminal; elsewhere it prints nothing."""
    from rich.console import Console

    return Console(stderr=True).status(f"{what} ...")


def _print(facts: dict[str, str], structure: Structure, verification: Verification | None) -> None:
    """Print the facts, the verdicts and the outcome of their test."""
    from unbatch.report import tables

    console = tables.console()
    # Paths and shapes hold brackets, which rich would read as markup.
    for title, text in facts.items():
        console.print(f"{title}: {text}", markup=False)
    console.print()
    console.print(structure)
    # --no-verify leaves the test out.
    if verification is not None:
        console.print("\nput to a numerical test")
        console.print(tables.verification_table(structure, verification))
