"""The command `unbatch`: what is typed becomes a question, and the structure an exit status.

How words become models and tensors is in `arguments.py`; how results look, in `verdicts.py` and `report.py`. All that
imports torch is imported by the command that needs it, so that help and completion come at once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

import unbatch
from unbatch.errors import CaptureError, InputError

if TYPE_CHECKING:
    from unbatch.analysis.structure import Structure
    from unbatch.problem.problem import Problem
    from unbatch.verification.verify import Verification


HOLDS, FAILS, WRONG_CALL, UNKNOWN = 0, 1, 2, 3


MSG_ONE_LOSS = "Say where the loss comes from: either --loss NAME, or --own-loss for a model that returns its own{got}."


MSG_OWN_TARGETS = (
    "--targets goes with --loss; a model that returns its own loss takes its targets as an --input."
)


TOUR = Path("demo-out/report.html")  # where the page of the tour goes


app = typer.Typer(
    help="Proves which structure a loss has, and says what may be computed because of it.",
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


# --- commands -------------------------------------------------------------------------------------


def main() -> None:
    """The entry point of the installed command."""
    app(prog_name="unbatch")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"unbatch {unbatch.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    pass


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
            help=f"Where the page is written; without --quick, {TOUR}.",
        ),
    ] = None,
) -> None:
    """A tour on real data: a small net with batch normalization, in train mode and after .eval()."""
    from unbatch.cli import demo as tour

    try:
        tour.main(quick, report_to=output or (None if quick else TOUR))
    except (ImportError, OSError) as error:
        _complain(_said(error))


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
        help="A random input, for each argument of the model: 8,3,32,32 or '8,9:int64<50' or mask=8,9:bool.",
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


@app.command(
    epilog="Exit status: 0 all structures hold, 1 one fails, 2 wrong call, 3 none fails but one is unknown."
)
def inspect(
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
    try:
        with _working("reading the computation"):
            problem, said = _problem(target, inputs, loss, targets, own_loss, eval_mode, seed)
            structure = problem.structure
        with _working("testing the verdicts"):
            verification = problem.verify() if verify else None
    except (InputError, CaptureError) as error:
        _complain(str(error))
    if as_json:
        from unbatch.report import tables as report

        typer.echo(json.dumps(said | report.as_dict(structure, verification), indent=2))
    else:
        _print(said, structure, verification)
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

    try:
        with _working("asking everything"):
            check_writable(output)
            problem, said = _problem(target, inputs, loss, targets, own_loss, eval_mode, seed)
            written = unbatch.write_report(problem, output, said=said)
    except (InputError, CaptureError, ImportError, OSError) as error:
        _complain(_said(error))
    typer.echo(f"The report is {written.resolve()}")


def exit_status(structure: Structure, verification: Verification | None) -> int:
    """1 where a structure fails or a witness contradicts a verdict, else 3 where one is unknown, else 0."""
    statuses = {v.status for v in structure.verdicts}
    if "fails" in statuses or (verification is not None and not verification):
        return FAILS
    return UNKNOWN if "unknown" in statuses else HOLDS


def _complain(message: str) -> NoReturn:
    typer.echo(f"unbatch: {message}", err=True)
    raise typer.Exit(WRONG_CALL)


def _said(error: Exception) -> str:
    """The message of an error, without the number that the operating system gives it."""
    return getattr(error, "strerror", None) or str(error)


def _working(what: str) -> AbstractContextManager[Any]:
    """A sign of life on a terminal; nothing elsewhere."""
    from rich.console import Console

    return Console(stderr=True).status(f"{what} ...")


def _print(said: dict[str, str], structure: Structure, verification: Verification | None) -> None:
    from unbatch.report import tables as report

    console = report.console()
    for title, text in said.items():
        console.print(f"{title}: {text}", markup=False)
    console.print()
    console.print(structure)
    if verification is not None:
        console.print("\nput to a numerical test")
        console.print(report.verification_table(structure, verification))


def _problem(
    target: str,
    inputs: Sequence[str],
    loss: str,
    targets: str,
    own_loss: bool,
    eval_mode: bool,
    seed: int,
) -> tuple[Problem, dict[str, str]]:
    """The problem, and in words what was made up for it. Raises ``InputError`` or ``CaptureError``."""
    if bool(loss) == own_loss:
        raise InputError(MSG_ONE_LOSS.format(got=", not both" if loss else ""))
    if own_loss and targets:
        raise InputError(MSG_OWN_TARGETS)
    import torch

    from unbatch.cli.parsing import Shape, as_inputs, draw_targets, find_loss, make_model
    from unbatch.problem.problem import Problem

    named = [Shape.parse(text, "--input") for text in inputs]
    wanted = Shape.parse(targets, "--targets") if targets else None
    chosen = None if own_loss else find_loss(loss)
    model = make_model(target, seed)
    model = model.eval() if eval_mode else model
    generator = torch.Generator().manual_seed(seed)
    X = as_inputs(named, generator)
    said = {
        "model": f"{target} ({type(model).__name__}, {'train' if model.training else 'eval'} mode)",
        "inputs": f"{', '.join(map(str, named))}, drawn at random",
    }
    if chosen is None:
        return Problem(model, batch=X), said | {"loss": "the model's own"}
    y, drawn = draw_targets(chosen, wanted, model, X, generator)
    return Problem(model, chosen.function, (X, y)), said | {"loss": chosen.words, "targets": drawn}
