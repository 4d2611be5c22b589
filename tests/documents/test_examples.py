"""The examples run as they are, say what their docstrings say, and need no more than three lines of
this package.
"""

import ast
import re
import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples"
EXAMPLES = sorted(path.stem for path in FOLDER.glob("*.py"))
MARK = "  # unbatch"
MOST = 3  # lines that a user adds
VERDICT = re.compile(
    r"^(canonical split|.*forward|SIMD given statistics|reduction|SIMD loss) +[✓✗?] (\w+)", re.M
)
BATCH_NORM = {"independent forward": "fails", "SIMD forward": "fails"}
COUPLED = {"reduction": "fails", "SIMD loss": "fails"}


@pytest.fixture
def run(capsys):
    """Run an example; what it printed."""

    def printed(name: str) -> str:
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return printed


def check_verdicts(text: str, **wanted: str) -> None:
    """Raise where the printed verdicts are not these, all others holding."""
    found = dict(VERDICT.findall(text))
    assert len(found) == 6, text
    assert found == dict.fromkeys(found, "holds") | wanted, found


def culprits(text: str) -> list[str]:
    """Module and op of each culprit in the report, in order."""
    part = text.partition("\nculprits\n")[2].partition("\nwhat follows")[0]
    return [
        " ".join(line.split()[:2])
        for line in part.splitlines()[1:]
        if re.search(r"\.py:\d+ ", line)
    ]


def numbers(text: str) -> list[float]:
    """Those of the last tensor that was printed."""
    return [float(x) for x in text.rpartition("tensor([")[2].partition("])")[0].split(",")]


# ---------------------------------------------------------------- what they print


def test_image_classification(run):
    text = run("image_classification")
    check_verdicts(text, **BATCH_NORM)
    assert culprits(text) == ["bn1 native_batch_norm"]
    assert "+2 more" in text  # beside the four that are named
    assert "R = 144 batch statistics" in text
    assert "squared gradient norms* (as squared norms of gradients per component)" in " ".join(
        text.split()
    )
    values = numbers(text)
    assert values == sorted(values)
    assert values[0] > 0


def test_text_classification(run):
    text = run("text_classification")
    check_verdicts(text)
    assert text.count("\nwrong label") >= 3, "mislabelled sentences have the largest gradients"
    assert text.count("\nwrong label") + text.count("\nright label") == 4


def test_causal_language_model(run):
    text = run("causal_lm")
    check_verdicts(text)
    assert "cut into model and loss at a value of shape [8, 32, 25] (lm_head," in text
    scale = float(re.search(r"gradient noise scale (\S+)", text)[1])
    assert 0 < scale < 1000


def test_contrastive(run):
    text = run("contrastive")
    check_verdicts(text, **BATCH_NORM, **COUPLED)
    assert culprits(text) == ["encoder.1 native_batch_norm", "- mm"]
    assert "does not exist losses, per-sample GGN*" in " ".join(text.split())
    assert len(numbers(text)) == 24
    assert 0 < float(text.split()[-1]) < 0.2


def test_segmentation(run):
    text = run("segmentation")
    check_verdicts(text, **BATCH_NORM, **COUPLED)
    assert culprits(text) == ["inc.1 native_batch_norm", "- sum"], "not the cross-entropy"
    assert len(numbers(text)) == 8
    assert 0 < float(re.search(r"off-diagonal share (\S+)% of the squares", text)[1]) < 50


# ---------------------------------------------------------------- how they are written


def check_additions(source: str) -> None:
    """Raise where more than three lines belong to this package, or one that does is not marked."""
    marked = {i for i, line in enumerate(source.splitlines(), 1) if line.endswith(MARK)}
    assert 0 < len(marked) <= MOST, f"{len(marked)} lines marked"
    names = {"ub", "unbatch", "problem"}
    uses = {
        n.lineno for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Name) and n.id in names
    }
    imports = {
        n.lineno
        for n in ast.walk(ast.parse(source))
        if isinstance(n, ast.Import) and "unbatch" in ast.dump(n)
    }
    assert uses | imports == marked, f"lines {sorted((uses | imports) ^ marked)}"


@pytest.mark.parametrize("name", EXAMPLES)
def test_three_lines_were_added(name):
    source = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    check_additions(source)
    assert ast.get_docstring(ast.parse(source))


def test_every_example_is_tested():
    own = Path(__file__).read_text(encoding="utf-8")
    assert EXAMPLES
    assert all(f'run("{name}")' in own for name in EXAMPLES)


PLANTED = {
    "a fourth line": f"import unbatch as ub{MARK}\n" + f"problem = ub.Problem(){MARK}\n" * 3,
    "a line without a mark": f"import unbatch as ub{MARK}\nproblem = ub.Problem()\n",
    "a mark too many": f"import unbatch as ub{MARK}\nx = 1{MARK}\n",
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_line_is_found(name):
    with pytest.raises(AssertionError, match="lines"):
        check_additions(PLANTED[name])


def test_a_planted_verdict_is_found():
    report = "\n".join(
        f"{name:22} ✓ holds" for name in ("canonical split", "independent forward", "SIMD forward")
    )
    report += "\nSIMD given statistics ✓ holds\nreduction ✗ fails\nSIMD loss ? unknown\n"
    check_verdicts(report, **{"reduction": "fails", "SIMD loss": "unknown"})
    with pytest.raises(AssertionError):
        check_verdicts(report, **COUPLED)
    with pytest.raises(AssertionError):
        check_verdicts(report.replace("reduction", "deduction"), **COUPLED)
