"""The command `unbatch`: what is typed, what is printed, and what it exits with."""

import errno
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import unbatch
from unbatch.cli import commands as cli
from unbatch.cli import demo, losses
from unbatch.cli.parsing import Shape
from unbatch.errors import InputError
from unbatch.report import tables as report
from unbatch.verification.verify import Check, Verification

NETS = '''
"""Nets for the tests of the command line."""

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x, labels):
        return {"loss": nn.functional.cross_entropy(self.linear(x), labels)}


class Hidden(nn.Module):
    """Sorts in numpy, within a sample: there is no witness, and no proof."""

    def forward(self, x):
        return torch.as_tensor(x.detach().numpy().copy())


class Failing(nn.Module):
    def forward(self, x):
        raise KeyError("out of order")


linear = nn.Linear(4, 3)
number = 3
deep = type("Names", (), {"inside": staticmethod(lambda: nn.Linear(4, 3))})


def embedding():
    return nn.Sequential(nn.Embedding(50, 4), nn.Flatten(), nn.Linear(12, 3))


def two():
    return nn.Bilinear(4, 5, 3)


def needs(width):
    return nn.Linear(width, 3)


def returns_nothing():
    return None


def broken():
    raise ValueError("no weights")


def root(p, y):
    return (p - y).pow(2).mean().sqrt()


def alone(p):
    return p.pow(2).mean()
'''


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A working directory of its own, with the nets as a file and as a module of a package."""
    (tmp_path / "nets.py").write_text(NETS)
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "module.py").write_text(NETS)
    (tmp_path / "bad.py").write_text("import no_such_library")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in [
        n for n in sys.modules if n.split(".")[0] in ("package", "nets", "bad") or ":" in n
    ]:
        del sys.modules[name]


def call(*words):
    return CliRunner().invoke(cli.app, list(words))


def inspected(*words):
    result = call("inspect", *words)
    assert not result.stderr, result.stderr
    return result


def refused(*words):
    """The message of a call that is wrong, as one line."""
    result = call("inspect", *words)
    assert result.exit_code == cli.WRONG_CALL, result.output
    assert not result.stdout
    return " ".join(result.stderr.split())


# ---------------------------------------------------------------- verdicts and exit status


def test_batch_norm_fails_and_is_named():
    result = inspected("nets.py:Net", "--input", "8,3,8,8", "--loss", "cross_entropy")
    assert result.exit_code == cli.FAILS
    for words in (
        "Net, train mode",
        "✗ fails",
        "norm ",
        "nets.py:14",
        "R = 8 batch statistics",
        "✓ passed",
    ):
        assert words in result.stdout


def test_eval_holds():
    result = inspected("nets.py:Net", "--input", "8,3,8,8", "--loss", "cross_entropy", "--eval")
    assert result.exit_code == cli.HOLDS
    assert "eval mode" in result.stdout
    assert "✗" not in result.stdout


def test_unknown():
    result = inspected("nets.py:Hidden", "--input", "8,3", "--loss", "mse")
    assert result.exit_code == cli.UNKNOWN
    assert "? unknown" in result.stdout
    assert "no witness against it" in result.stdout


def test_one_sample_is_unknown_and_says_why():
    result = inspected("nets.py:linear", "--input", "1,4", "--loss", "mse")
    assert result.exit_code == cli.UNKNOWN
    assert report.NO_TEST_OF_ONE_SAMPLE in result.stdout


def test_a_contradiction_is_a_failure():
    structure = unbatch.Problem(
        torch.nn.Linear(2, 2), torch.nn.MSELoss(), (torch.ones(2, 2),) * 2
    ).structure
    against = Check("reduction", "holds", "a test", False, "off by 1")
    assert cli.exit_status(structure, None) == cli.HOLDS
    assert cli.exit_status(structure, Verification((against,))) == cli.FAILS
    console = report.console()
    with console.capture() as printed:
        console.print(report.verification_table(structure, Verification((against,))))
    assert "✗ CONTRADICTED  a test: off by 1" in printed.get()


def test_without_verification():
    result = inspected("nets.py:linear", "--input", "4,4", "--loss", "mse", "--no-verify")
    assert result.exit_code == cli.HOLDS
    assert "passed" not in result.stdout


def test_the_same_seed_gives_the_same_report():
    words = ("nets.py:Net", "--input", "8,3,8,8", "--loss", "cross_entropy", "--json", "--seed")
    first, again, other = (inspected(*words, seed).stdout for seed in ("1", "1", "2"))
    assert first == again != other


# ---------------------------------------------------------------- targets of the command


@pytest.mark.parametrize(
    "target",
    [
        "nets.py:linear",
        "nets:linear",
        "./package/module.py:linear",
        "package.module:linear",
        "nets.py:deep.inside",
    ],
)
def test_a_model_by_file_or_module(target):
    assert (
        inspected(target, "--input", "4,4", "--loss", "mse", "--no-verify").exit_code == cli.HOLDS
    )


def test_several_inputs_are_arguments():
    result = inspected(
        "nets.py:two", "--input", "6,4", "--input", "6,5", "--loss", "l1", "--no-verify"
    )
    assert result.exit_code == cli.HOLDS
    assert "6,4, 6,5, drawn at random" in result.stdout


def test_own_loss_and_named_inputs():
    result = inspected(
        "nets.py:Own", "--input", "x=8,3", "--input", "labels=8:int64<2", "--own-loss"
    )
    assert result.exit_code == cli.HOLDS
    assert "the model's own" in result.stdout


def test_json_is_all_there_is():
    result = inspected("nets.py:Net", "--input", "8,3,8,8", "--loss", "cross_entropy", "--json")
    said = json.loads(result.stdout)
    assert said["verdicts"]["independent_forward"]["status"] == "fails"
    assert said["statistics_size"] == 8
    checks = {check["name"]: check for check in said["verification"]}
    assert checks["simd_given_statistics"]["passed"] is True
    assert checks["independent_forward"]["witness"]["amount"] > 0
    words = ("nets.py:linear", "--input", "4,4", "--loss", "mse", "--json", "--no-verify")
    assert json.loads(inspected(*words).stdout)["verification"] is None


# ---------------------------------------------------------------- inputs and targets that are drawn


@pytest.mark.parametrize(
    ("text", "shape", "dtype"),
    [
        ("8,3", (8, 3), torch.float32),
        ("8", (8,), torch.float32),
        ("8, 3:float64", (8, 3), torch.float64),
        ("64:int64", (64,), torch.int64),
        ("64:int32<50", (64,), torch.int32),
        ("8:bool", (8,), torch.bool),
    ],
)
def test_shapes(text, shape, dtype):
    drawn = Shape.parse(text, "--input").draw(torch.Generator().manual_seed(0))
    assert (tuple(drawn.shape), drawn.dtype) == (shape, dtype)
    if dtype in (torch.int32, torch.int64):
        bound = 50 if "<" in text else 10
        assert bound // 2 <= drawn.max() < bound
        assert drawn.min() >= 0


def test_dtype_suffix_on_the_command_line():
    result = inspected("nets.py:embedding", "--input", "8,3:int64<50", "--loss", "mse")
    assert result.exit_code == cli.HOLDS


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        ("cross_entropy", "random labels of 3 classes of shape [6]"),
        ("nll_loss", "random labels of 3 classes of shape [6]"),
        ("mse", "random normal numbers of shape [6, 3]"),
        ("huber_loss", "random normal numbers of shape [6, 3]"),
        ("bce_with_logits", "random zeros and ones of shape [6, 3]"),
        ("soft_margin", "random signs of shape [6, 3]"),
        ("poisson_nll", "random counts from 0 to 4 of shape [6, 3]"),
        ("kl_div", "random probabilities along the class axis of shape [6, 3]"),
        ("nets.py:root", "random normal numbers of shape [6, 3]"),
        ("nets.py:alone", "none, the loss takes predictions only"),
    ],
)
def test_targets_fit_the_loss_and_are_said(loss, said):
    result = inspected("nets.py:linear", "--input", "6,4", "--loss", loss, "--no-verify")
    assert f"targets: {said}" in result.stdout


def test_every_loss_runs_on_the_targets_drawn_for_it():
    for name in losses.KINDS:
        loss = losses.find_loss(name)
        model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Sigmoid())
        y, _ = losses.draw_targets(
            loss, None, model, torch.randn(6, 4), torch.Generator().manual_seed(0)
        )
        assert torch.isfinite(loss.function(model(torch.randn(6, 4)), y)), name


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("6:int64<2", "targets: 6:int64<2, drawn at random"),
        ("6", "targets: random labels of 3 classes of shape [6], drawn to fit the loss"),
        ("6,3:float32", "targets: 6,3:float32, drawn at random"),
    ],
)
def test_targets_as_typed(typed, said):
    words = (
        "nets.py:linear",
        "--input",
        "6,4",
        "--loss",
        "cross_entropy",
        "--targets",
        typed,
        "--no-verify",
    )
    assert said in inspected(*words).stdout


# ---------------------------------------------------------------- calls that are wrong


LINEAR = ("--input", "6,4", "--loss", "mse")


@pytest.mark.parametrize(
    ("target", "parts"),
    [
        ("nets", ("'nets'", "package.module:name")),
        ("nope.py:x", ("no file 'nope.py'", "current directory")),
        ("nope.deeper:x", ("no module 'nope.deeper'", "path/to/file.py")),
        ("bad.py:x", ("Importing 'bad.py'", "no_such_library")),
        ("bad:x", ("Importing 'bad'", "no_such_library")),
        ("nets.py:linaer", ("no 'linaer'", "Did you mean linear")),
        ("nets.py:number", ("'nets.py:number'", "it is an int", "def make_model")),
        ("nets.py:needs", ("missing 1 required", "Name a function that needs none")),
        ("nets.py:broken", ("ValueError: no weights",)),
        ("nets.py:returns_nothing", ("returned a NoneType",)),
        ("nets.py:Failing", ("KeyError", "out of order", "Failing on inputs float32 [6, 4]")),
        ("nets.py:embedding", ("embedding", "[6, 4]")),
    ],
)
def test_wrong_targets(target, parts):
    message = refused(target, *LINEAR)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("--input", "8x3", "--loss", "mse"), ("--input '8x3'", "8,3,32,32")),
        (("--input", "0,4", "--loss", "mse"), ("--input '0,4'", "positive")),
        (("--input", "6,4:flot32", "--loss", "mse"), ("'flot32'", "Did you mean float32")),
        (("--input", "6,4:float32<3", "--loss", "mse"), ("float32", "only integers")),
        (("--input", "x=6,4", "--input", "6,4", "--loss", "mse"), ("x=6,4 6,4", "all of them")),
        (("--input", "x=6,4", "--input", "x=6,4", "--loss", "mse"), ("'x' twice",)),
        (
            ("--input", "6,4", "--loss", "crossentropy"),
            ("'crossentropy'", "Did you mean cross_entropy", "mse"),
        ),
        (("--input", "6,4", "--loss", "nets.py:number"), ("'nets.py:number'", "it is an int")),
        (("--input", "6,4"), ("--loss NAME", "--own-loss")),
        (("--input", "6,4", "--loss", "mse", "--own-loss"), ("not both",)),
        (("--input", "6,4", "--own-loss", "--targets", "6"), ("--targets goes with --loss",)),
        (("--input", "6,4", "--loss", "mse", "--targets", "5,3"), ("X[0] has 6", "y[0] has 5")),
        (("--input", "4", "--loss", "cross_entropy"), ("[3]", "class axis", "--targets")),
        (("--loss", "mse"), ("Missing option", "--input")),
    ],
)
def test_wrong_options(words, parts):
    message = refused("nets.py:linear", *words)
    assert all(part in message for part in parts), message


def test_a_wrong_option_is_an_input_error():
    with pytest.raises(InputError):
        Shape.parse("a,b", "--input")


# ---------------------------------------------------------------- the other commands


def test_version():
    assert call("--version").stdout == f"unbatch {unbatch.__version__}\n"
    assert importlib.metadata.version("unbatch") == unbatch.__version__


def test_python_m():
    result = subprocess.run(
        [sys.executable, "-m", "unbatch", "--version"], capture_output=True, text=True, check=True
    )
    assert result.stdout == f"unbatch {unbatch.__version__}\n"


def test_help_lists_the_exit_status():
    assert "3 none fails" in " ".join(call("inspect", "--help").stdout.split())


@pytest.mark.parametrize("name", ["--output", "-o"])
def test_report(name, tmp_path):
    path = tmp_path / "deep" / "r.html"
    result = call(
        "report", "nets.py:Net", "--input", "4,3,6,6", "--loss", "cross_entropy", name, str(path)
    )
    assert result.exit_code == 0, result.stderr
    assert str(path) in result.stdout.replace("\n", "")
    text = path.read_text()
    assert "nets.py:Net (Net, train mode)" in text
    assert "4,3,6,6, drawn at random" in text


@pytest.mark.parametrize("where", ["file/r.html", "folder", "read-only.html"])
@pytest.mark.parametrize(
    "command", [("report", "nets.py:Failing", "--input", "4,3", "--loss", "mse"), ("demo",)]
)
def test_a_page_that_cannot_be_written(command, where, tmp_path, monkeypatch):
    """One message with the remedy, before anything is asked; the model would raise."""
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    real = Path.open

    def refusing(path, *arguments, **others):
        if path.name == "read-only.html":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *arguments, **others)

    monkeypatch.setattr(Path, "open", refusing)
    result = call(*command, "-o", where)
    assert result.exit_code == cli.WRONG_CALL
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.startswith(f"unbatch: The report cannot be written to {where}: ")
    assert result.stderr.count("\n") == 1
    assert "Name a file that can be written" in result.stderr
    assert "Errno" not in result.stderr
    assert not result.stdout


def test_a_report_that_is_refused_leaves_no_file(tmp_path):
    result = call("report", "nets.py:Failing", "--input", "4,3", "--loss", "mse", "-o", "r.html")
    assert result.exit_code == cli.WRONG_CALL
    assert "out of order" in result.stderr
    assert not (tmp_path / "r.html").exists()


def test_short_options():
    words = (
        "inspect",
        "nets.py:linear",
        "-i",
        "6,4",
        "-l",
        "cross_entropy",
        "-t",
        "6:int64<3",
        "--no-verify",
    )
    result = call(*words)
    assert result.exit_code == cli.HOLDS, result.output
    assert "6:int64<3, drawn at random" in result.stdout
    assert call("-h").stdout == call("--help").stdout
    assert call("report", "-h").stdout == call("report", "--help").stdout


LATE = """
import sys
from unbatch.cli import commands as cli
try:
    cli.main()
finally:
    assert "torch" not in sys.modules
"""


def typed(*words, **environment):
    """What the installed command prints for these words, if it does so without torch."""
    code = ["-c", LATE, *words]
    run = subprocess.run(
        [sys.executable, *code], capture_output=True, text=True, env=os.environ | environment
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.parametrize("words", [("--version",), ("--help",), ("report", "-h")])
def test_help_comes_before_torch(words):
    assert typed(*words)


def completed(line):
    """What bash offers for the last word of a line, as the script asks that completion installs."""
    asked = {
        "_UNBATCH_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(line.split(" ")) - 1),
    }
    return typed(**asked).split()


def test_completion():
    assert completed("unbatch ") == ["demo", "inspect", "report"]
    assert completed("unbatch rep") == ["report"]
    assert set(completed("unbatch report --o")) == {"--output", "--own-loss"}
    assert "--quick" in completed("unbatch demo --")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_for_a_shell(shell):
    script = typed("--show-completion", shell, _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert f"_UNBATCH_COMPLETE=complete_{shell}" in script


@pytest.mark.parametrize(
    ("words", "page"),
    [
        ((), "demo-out/report.html"),
        (("--quick",), None),
        (("-o", "r.html"), "r.html"),
        (("--quick", "-o", "r.html"), "r.html"),
    ],
)
def test_where_the_page_of_the_tour_goes(words, page, monkeypatch):
    asked = []
    monkeypatch.setattr(demo, "main", lambda quick, report_to: asked.append((quick, report_to)))
    assert call("demo", *words).exit_code == 0
    assert asked == [("--quick" in words, page and Path(page))]


def test_demo_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    result = call("demo")
    assert result.exit_code == cli.WRONG_CALL
    assert "pip install 'unbatch[demo]'" in result.stderr
