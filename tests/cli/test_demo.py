"""The tour: right verdicts before and after `.eval()`, nothing left behind, and a page with the
same numbers.
"""

import html
import io
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from rich.console import Console

import unbatch
from unbatch.cli import demo
from unbatch.report import tables as report

NEWLY = ("independent forward", "SIMD forward")
ALWAYS = ("canonical split", "SIMD given statistics", "reduction", "SIMD loss")


def run(quick: bool = True, report_to: Path | None = None) -> str:
    out = Console(file=io.StringIO(), width=110, highlight=False)
    demo.main(quick, console=out, report_to=report_to)
    return out.file.getvalue()


@pytest.fixture(scope="module")
def text() -> str:
    return run()


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    pytest.importorskip("matplotlib")
    return tmp_path_factory.mktemp("demo") / "report.html"


@pytest.fixture(scope="module")
def whole(page) -> str:
    """All of it, after which the page is written."""
    return run(quick=False, report_to=page)


def parts(text: str) -> dict[str, str]:
    """The text of the parts, by the first digit of their titles."""
    pieces = re.split(r"^(\d)\. ", text, flags=re.M)
    return dict(zip(pieces[1::2], pieces[2::2], strict=True))


def verdict(part: str, name: str) -> str:
    """What the first table of verdicts in a part says about a structure."""
    found = re.search(rf"^{name} +[✓✗?] (\w+)", part, flags=re.M)
    assert found, f"no verdict on {name} in\n{part}"
    return found[1]


def test_train_mode(text):
    part = parts(text)["2"]
    assert {name: verdict(part, name) for name in NEWLY} == dict.fromkeys(NEWLY, "fails")
    assert {name: verdict(part, name) for name in ALWAYS} == dict.fromkeys(ALWAYS, "holds")
    assert "R = 48 batch statistics" in part
    assert "norm1" in part
    assert "norm2" in part


def test_eval_mode(text):
    part = parts(text)["7"]
    assert {name: verdict(part, name) for name in (*NEWLY, *ALWAYS)} == dict.fromkeys(
        (*NEWLY, *ALWAYS), "holds"
    )
    assert "0.0% of the squares stand off the diagonal" in part
    assert "what follows" not in part


def test_every_experiment_agrees(text):
    for number in "57":
        assert parts(text)[number].count("✓ passed") == 6
    assert "CONTRADICTED" not in text


def test_what_follows_is_shown_once(text):
    assert len(re.findall(r"what follows \(", text)) == 1
    assert "per-sample gradients" in parts(text)["3"]


def sum_of_rows(part: str, by: str, kind: str) -> str:
    """What the table says about the sum of the rows of a decomposition."""
    found = re.search(rf"^{by} +{kind} +(?:[\d.e-]+ +){{3}}(.+?) *$", part, flags=re.M)
    assert found, f"no {by} rows called {kind} in\n{part}"
    return found[1]


def test_the_gradient_is_taken_apart(text):
    part = parts(text)["6"]
    for by in ("component", "copy"):
        (off,) = re.findall(r"(\S+) off", sum_of_rows(part, by, f"per-{by}"))
        assert float(off) < 1e-12
    assert re.fullmatch(r"\d\d+% off", sum_of_rows(part, "frozen", "frozen"))
    apart = {
        pair: int(percent)
        for pair, percent in re.findall(r"^(\w+ and \w+) +(\d+)% apart", part, flags=re.M)
    }
    assert set(apart) == {"component and copy", "component and frozen", "copy and frozen"}
    assert min(apart.values()) > 1


def test_the_decompositions_are_one_in_eval_mode(text):
    (apart,) = re.findall(
        r"are one, per-sample: at most (\S+) apart\.", " ".join(parts(text)["7"].split())
    )
    assert float(apart) < 1e-12


def test_the_noise_scale_warns_where_samples_mix(text):
    for number, warned in (("6", True), ("7", False)):
        assert re.search(r"Gradient noise scale: \S+ samples\.", parts(text)[number])
        assert ("MixedSamplesWarning" in parts(text)[number]) == warned
    assert "are no independent draws" in " ".join(parts(text)["6"].split())


def test_the_spectrum_fits_the_bound_on_the_rank(whole):
    part = parts(whole)["8"]
    (bound,) = re.findall(r"rank at most, N\(C-1\) +32 x 9 = (\d+)", part)
    (count,) = re.findall(r"eigenvalues above rounding +(\d+)", part)
    assert int(bound) == demo.BATCH * (demo.CLASSES - 1) >= int(count)
    counted = re.findall(r"^1e[+-]\d+ +█+ +(\d+)", part, flags=re.M)
    assert sum(map(int, counted)) == int(count)
    held = [int(x) for x in re.findall(r"(\d+)%", re.findall(r"1, 10, 50 hold(.*)", part)[0])]
    assert 0 < held[0] < held[1] < held[2] <= 100


def test_shares_of_digits_sum_to_slope_and_curvature(whole):
    said = " ".join(parts(whole)["8"].split())
    off = re.findall(
        r"is the eigenvalue \((\S+) off\), Σ γ_n the slope of the loss \((\S+) off\)", said
    )[0]
    assert max(map(float, off)) < 1e-10
    rows = re.findall(
        r"^(\S+) +\S+ +\S+ +\S+ +(\S+) +(\S+) +(\S+) +\d+% ", parts(whole)["8"], flags=re.M
    )
    assert len(rows) == demo.SHOWN
    for eigenvalue, smallest, mean, largest in rows:
        assert 0 <= float(smallest) < float(mean) < float(largest) < float(eigenvalue)
        assert abs(demo.BATCH * float(mean) / float(eigenvalue) - 1) < 0.1


def test_a_newton_step_lowers_the_loss_more_than_a_gradient_step(whole):
    part = parts(whole)["8"]
    titles = ("loss on the batch", "after a gradient step", "after a damped Newton step")
    before, gradient, newton = (
        float(re.findall(rf"^{t} +(\S+)", part, flags=re.M)[0]) for t in titles
    )
    assert newton < gradient < before


def test_crosstalk_is_drawn(text):
    assert len(re.findall(r"^ +\d +(?:[░▒▓█]{2} ?){8}", parts(text)["4"], flags=re.M)) == demo.FEW


def test_the_net_learns(text):
    (reached,) = re.findall(r"now reads ([\d.]+)% correctly", text)
    assert float(reached) > 70


def test_no_part_is_longer_than_two_screens(text):
    assert max(part.count("\n") for part in parts(text).values()) < 60


def test_twice_the_same_and_nothing_left_behind(text):
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    clock = r"\d:\d\d:\d\d"
    assert re.sub(clock, "", run()) == re.sub(clock, "", text)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_quick_leaves_out_what_it_says(text, whole):
    assert set(parts(text)) == set("1234567")
    assert set(parts(whole)) == set("12345678")
    assert "goes on to the curvature" in text
    assert "goes on to the curvature" not in whole
    assert demo.ON_A_PAGE not in text


def rows_of(page: Path) -> list[list[str]]:
    """The cells of all rows of its tables, as text."""
    rows = re.findall(r"<tr>(.*?)</tr>", page.read_text(encoding="utf-8"), flags=re.S)
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, flags=re.S) for row in rows]
    return [[html.unescape(re.sub(r"<.*?>", "", cell)).strip() for cell in row] for row in cells]


def disagreements(text: str, page: Path) -> list[str]:
    """Rows of numbers that are printed and stand on the page, with other digits in one of them."""
    printed = {tuple(re.split(r"\s\s+", line.strip())) for line in text.splitlines()}
    names = {"component", "copy", "frozen"}
    shared = [
        row for row in rows_of(page) if row[0] in names or len(row) == len(report.SHARE_COLUMNS)
    ]
    assert len(shared) == len(names) + demo.SHOWN + 1
    return [" ".join(row) for row in shared if tuple(row) not in printed]


def test_the_page_has_the_numbers_that_are_printed(whole, page):
    assert f"the same numbers: {page}" in whole
    assert disagreements(whole, page) == []
    told = {row[0]: row[1] for row in rows_of(page) if len(row) == 2}
    part = parts(whole)["8"]
    assert re.search(
        rf"eigenvalues above rounding +{told['eigenvalues above rounding (float64)']}, ", part
    )
    assert re.search(rf"largest {re.escape(told['largest'])}\s", part)
    assert re.search(
        rf"trace, their sum +{re.escape(told['trace, the sum of the eigenvalues'])}, ", part
    )
    for pair, apart in re.findall(r"^(\w+ and \w+) +(\S+) apart", parts(whole)["6"], flags=re.M):
        assert told[pair] == apart
    (strength,) = re.findall(
        rf"first {demo.BATCH} predictions (\S+) of the squares", " ".join(whole.split())
    )
    assert f"; {strength} of the squares stand off the diagonal" in page.read_text(encoding="utf-8")


def test_a_page_of_another_net_would_be_noticed(whole, page, tmp_path):
    """The planted bug: a page that is not about what was printed."""
    other = tmp_path / "other.html"
    net, loss = (
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)),
        torch.nn.functional.cross_entropy,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        unbatch.write_report(
            unbatch.Problem(net, loss, (torch.rand(8, 64), torch.arange(8))), other
        )
    assert disagreements(whole, other)


def test_the_page(whole, page):
    words = page.read_text()
    assert "R = 48 numbers" in words
    assert words.count("<svg") == 5


def test_a_page_that_cannot_be_written_is_said_first(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "load", lambda: pytest.fail("was begun"))
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="Name a file that can be written"):
        run(report_to=tmp_path / "file" / "r.html")


def test_it_needs_no_optimizer():
    """The first of torch.optim takes seconds to import."""
    code = (
        "import sys; from unbatch.cli import demo; demo.main(quick=True); "
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
