"""The tour, in its quick form: right verdicts before and after `.eval()`, and nothing left behind."""

import io
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console

from unbatch import demo

NEWLY = ("independent forward", "SIMD forward")
ALWAYS = ("canonical split", "SIMD given statistics", "reduction", "SIMD loss")


def run(report_to: Path | None = None) -> str:
    out = Console(file=io.StringIO(), width=110, highlight=False)
    demo.main(quick=True, console=out, report_to=report_to)
    return out.file.getvalue()


@pytest.fixture(scope="module")
def text() -> str:
    return run()


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
    assert "+1 more" in part


def test_eval_mode(text):
    part = parts(text)["8"]
    assert {name: verdict(part, name) for name in (*NEWLY, *ALWAYS)} == dict.fromkeys((*NEWLY, *ALWAYS), "holds")
    assert "off-diagonal share 0.0%" in part
    assert "what follows" not in part


def test_every_experiment_agrees(text):
    for number in "58":
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
        (off,) = re.findall(r"equal, (\S+) off", sum_of_rows(part, by, f"per-{by}"))
        assert float(off) < 1e-4
    assert re.fullmatch(r"\d\d+% off", sum_of_rows(part, "frozen", "frozen"))
    apart = {pair: int(percent) for pair, percent in re.findall(r"^(\w+ and \w+) +(\d+)% apart", part, flags=re.M)}
    assert set(apart) == {"component and copy", "component and frozen", "copy and frozen"}
    assert min(apart.values()) > 1


def test_the_decompositions_are_one_in_eval_mode(text):
    (apart,) = re.findall(r"are one, per-sample: at most (\S+) apart\.", " ".join(parts(text)["8"].split()))
    assert float(apart) < 1e-4


def test_the_noise_scale_warns_where_samples_mix(text):
    for number, warned in (("6", True), ("8", False)):
        assert re.search(r"Gradient noise scale: \S+ samples\.", parts(text)[number])
        assert ("MixedSamplesWarning" in parts(text)[number]) == warned
    assert "are no independent draws" in " ".join(parts(text)["6"].split())


def test_the_spectrum_fits_the_bound_on_the_rank(text):
    part = parts(text)["7"]
    (bound,) = re.findall(r"rank at most, N\(C-1\) +32 x 9 = (\d+)", part)
    (count,) = re.findall(r"eigenvalues not zero +(\d+)", part)
    assert int(bound) == demo.BATCH * (demo.CLASSES - 1) >= int(count)
    counted = re.findall(r"^1e[+-]\d+ +█+ +(\d+)", part, flags=re.M)
    assert sum(map(int, counted)) == int(count)
    held = [int(x) for x in re.findall(r"(\d+)%", re.findall(r"1, 10, 50 hold(.*)", part)[0])]
    assert 0 < held[0] < held[1] < held[2] <= 100


def test_shares_of_digits_sum_to_slope_and_curvature(text):
    said = " ".join(parts(text)["7"].split())
    off = re.findall(r"is the eigenvalue \((\S+) off\), Σ γ_n the slope of the loss \((\S+) off\)", said)[0]
    assert max(map(float, off)) < 1e-10
    rows = re.findall(r"^(\S+) +(\S+) +(\S+) +(\S+) +(\d+)% ", parts(text)["7"], flags=re.M)
    assert len(rows) == demo.SHOWN
    for eigenvalue, smallest, mean, largest, _ in rows:
        assert 0 <= float(smallest) < float(mean) < float(largest) < float(eigenvalue)
        assert abs(demo.BATCH * float(mean) / float(eigenvalue) - 1) < 0.1


def test_a_newton_step_lowers_the_loss_more_than_a_gradient_step(text):
    part = parts(text)["7"]
    titles = ("loss on the batch", "after a gradient step", "after a damped Newton step")
    before, gradient, newton = (float(re.findall(rf"^{t} +(\S+)", part, flags=re.M)[0]) for t in titles)
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


def test_a_page_is_written(tmp_path):
    """The same net, as a page: the trace of its Gauss-Newton matrix is the one that is told."""
    said = run(tmp_path / "report.html")
    assert str(tmp_path / "report.html") in said
    page = (tmp_path / "report.html").read_text()
    assert "R = 48 numbers" in page
    assert page.count("<svg") == 5
