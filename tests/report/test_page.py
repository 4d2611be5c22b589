"""The report: one page with everything in it, for reading in a browser that loads nothing from
elsewhere.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import unbatch as ub
from unbatch.report import plot

pytest.importorskip("matplotlib")
N, D, C = 6, 5, 3
ARTIFACTS = Path(__file__).parents[2] / "build" / "artifacts"


def problem(norm: bool = True, loss=F.cross_entropy) -> ub.Problem:
    torch.manual_seed(0)
    layers = [nn.Linear(D, 4), *([nn.BatchNorm1d(4)] if norm else []), nn.ReLU(), nn.Linear(4, C)]
    return ub.Problem(
        nn.Sequential(*layers).double(), loss, (torch.randn(N, D).double(), torch.arange(N) % C)
    )


class Page(HTMLParser):
    """What a page consists of, and which elements were left open."""

    VOID = ("meta", "link", "br", "img", "hr", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID and not self.svg:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if self.open and tag == self.open[-1]:
            self.open.pop()

    def handle_data(self, data):
        self.words.append(data)

    @property
    def svg(self) -> bool:
        return "svg" in self.open

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    return ub.write_report(
        problem(),
        tmp_path_factory.mktemp("report") / "deep" / "report.html",
        "A net <1>",
        {"data": "drawn & random"},
    )


def test_everything_is_said(written):
    page = Page(written.read_text())
    words = " ".join(" ".join(page.words).split())
    structure = problem().structure
    for verdict in structure.verdicts:
        assert f"{verdict.status}" in words
    assert f"R = {structure.statistics_size} numbers" in words
    assert "A net <1>" in words
    assert "drawn & random" in words
    G = problem().ggn()
    assert f"{float(G.trace()):.3g}" in words
    assert f"largest {float(G.eigvalsh()[-1]):.3g}" in words
    assert "native_batch_norm" in words or "batch_norm" in words
    norms = problem().gradients(by="copy").flat().norm(dim=1)
    assert f"{float(norms.max()):.3g}" in words


def test_it_loads_nothing_from_elsewhere(written):
    text = written.read_text()
    page = Page(text)
    links = [
        v
        for _, attributes in page.tags
        for k, v in attributes.items()
        if k in ("src", "href", "xlink:href", "data")
    ]
    assert all(v.startswith(("#", "data:")) for v in links)
    assert "@import" not in text
    assert not re.search(r"url\((?!#|data:)", text)
    assert not page.named("script")


def test_it_can_be_read_by_all(written):
    page = Page(written.read_text())
    assert page.named("html")[0]["lang"] == "en"
    ids = [a["id"] for _, a in page.tags if a.get("id")]
    assert len(ids) == len(set(ids))
    assert all(a["href"][1:] in ids for a in page.named("a"))
    pictures = [a for _, a in page.tags if a.get("role") == "img"]
    assert len(pictures) >= 4
    assert all(len(a["aria-label"]) > 20 for a in pictures)
    assert len(page.named("caption")) == len(page.named("table"))
    assert all(a.get("scope") in ("col", "row") for a in page.named("th"))
    headings = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == 1
    assert set(headings[1:]) == {2}
    assert not page.open


def contrast(a: str, b: str) -> float:
    """WCAG 2.1, relative luminance."""

    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    bright, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def test_colours_can_be_told_from_the_paper(written):
    themes = re.findall(r":root \{(.*?)\}", written.read_text(), re.S)
    assert len(themes) == 2
    for theme in themes:
        colours = dict(re.findall(r"--(\w+): (#\w{6})", theme))
        for ink in ("ink", "faint", "link", "holds", "fails", "unknown"):
            for paper in ("paper", "card"):
                assert contrast(colours[ink], colours[paper]) >= 4.5, (ink, paper)


def test_what_is_refused_leaves_the_rest(tmp_path):
    """A loss that couples samples: whole parts are refused, and the page says why."""

    def coupled(p, y):
        return (p @ p.T).logsumexp(1).sum() + p.square().sum(1).log().sum().exp()

    page = Page(ub.write_report(problem(loss=coupled), tmp_path / "r.html").read_text())
    words = " ".join(page.words)
    assert "SIMD loss" in words
    assert "fails" in words
    assert "MixedSamplesWarning" in words or "Not shown" in words or "Gauss-Newton" in words
    assert not page.open


def test_code_looks_like_code(written):
    """Backticks are for who writes; readers see code."""
    page = Page(re.sub(r"<svg.*?</svg>", "", written.read_text(), flags=re.S))
    assert "`" not in " ".join(page.words)
    assert {"code"} <= {tag for tag, _ in page.tags}
    assert "<code>.eval()</code>" in written.read_text()


def test_all_culprits_of_a_kind_are_named(tmp_path):
    layers = [layer for _ in range(6) for layer in (nn.Linear(D, D), nn.BatchNorm1d(D))]
    data = problem().inputs, problem().targets
    path = ub.write_report(
        ub.Problem(nn.Sequential(*layers).double(), F.cross_entropy, data), tmp_path / "r.html"
    )
    assert "1, 3, 5, 7, 2 more" in path.read_text()


def test_names_are_no_markup(tmp_path):
    """What is turned into code is escaped before, and all else as ever."""
    said = {"note": "`<b>` and <i>"}
    text = ub.write_report(problem(), tmp_path / "r.html", said=said).read_text()
    assert "<code>&lt;b&gt;</code> and &lt;i&gt;" in text


def test_every_picture_says_how_to_read_it(written):
    captions = re.findall(
        r"<figcaption><strong>(.*?)\.</strong> (.*?)</figcaption>", written.read_text(), flags=re.S
    )
    assert len(captions) == written.read_text().count("<figure>") == 5
    assert len({caption for caption, _ in captions}) == 5
    assert all(len(reading.split()) > 20 for _, reading in captions)


def facts(path):
    return dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", path.read_text()))


def cell(path, name):
    """The value beside a name in a table of two columns."""
    (found,) = re.findall(
        rf'<th scope="row">{re.escape(name)}\s*</th><td>(.*?)\s*</td></tr>', path.read_text()
    )
    return found


def test_loss_and_dtype_are_named(written, tmp_path):
    assert facts(written).items() >= {"loss": "cross_entropy", "dtype": "float64"}.items()
    other = ub.write_report(
        problem(loss=nn.CrossEntropyLoss(label_smoothing=0.1)), tmp_path / "r.html"
    )
    assert facts(other)["loss"] == "CrossEntropyLoss"
    other = ub.write_report(
        problem(loss=functools.partial(F.cross_entropy, label_smoothing=0.1)), tmp_path / "r.html"
    )
    assert facts(other)["loss"] == "cross_entropy"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eigenvalues_are_counted_as_far_as_the_dtype_tells_them(dtype, tmp_path):
    given = problem(norm=False)
    model = given.program.inside.to(dtype)
    given = ub.Problem(model, F.cross_entropy, (given.inputs.to(dtype), given.targets))
    path = ub.write_report(given, tmp_path / "r.html")
    told = cell(path, f"eigenvalues above rounding ({str(dtype).removeprefix('torch.')})")
    assert int(told) == int((given.ggn().eigvalsh() != 0).sum())
    (curve, _) = plot.spectrum(given).lines
    assert int(told) == len(curve.get_ydata())


def test_negative_eigenvalues_are_told(written, tmp_path):
    assert cell(written, "negative eigenvalues").startswith("none, because")
    saddle = ub.write_report(
        problem(loss=lambda p, y: (p.pow(4) - p.pow(2)).sum()), tmp_path / "r.html"
    )
    assert re.match(r"possible, because .* eigenvalue -\d", cell(saddle, "negative eigenvalues"))


def test_the_share_off_the_diagonal_is_said_once(written):
    page = Page(written.read_text())
    share = f"{problem().crosstalk().strength:.1%} of the squares"
    assert share not in " ".join(page.words)  # who sees the picture reads it there
    assert sum(share in (a.get("aria-label") or "") for _, a in page.tags) == 1


def test_what_is_no_problem_is_refused(tmp_path):
    with pytest.raises(
        ub.InputError,
        match=r"write_report takes a Problem; got Structure\. Pass the problem itself",
    ):
        ub.write_report(problem().structure)
    assert not list(tmp_path.iterdir())


def test_the_file_has_a_name_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert ub.write_report(problem(norm=False)).resolve() == tmp_path / "unbatch-report.html"


def test_a_path_that_cannot_be_written_is_said_before_anything_is_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(ub.Problem, "structure", property(lambda self: pytest.fail("was asked")))
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "r.html", tmp_path):
        with pytest.raises(OSError, match=f"cannot be written to {path}: .*Name a file"):
            ub.write_report(problem(), path)


def test_a_bug_in_the_template_is_caught(written, monkeypatch, tmp_path):
    """The checks above see a table without its caption and a picture without its words."""
    text = written.read_text().replace('role="img"', "", 1)
    broken = tmp_path / "r.html"
    broken.write_text(text.replace("</table>", "", 1))
    with pytest.raises(AssertionError):
        test_it_can_be_read_by_all(broken)


BROWSER = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")
def test_a_browser_shows_it(written, tmp_path):
    """Opened in a headless Chromium: no errors on its console, text and pictures are there."""
    ARTIFACTS.mkdir(parents=True, exist_ok=True)
    picture = ARTIFACTS / "report.png"
    flags = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={tmp_path}",
    ]
    log = ["--enable-logging=stderr", "--v=0"]
    shot = [
        BROWSER,
        *flags,
        *log,
        "--window-size=1100,5200",
        f"--screenshot={picture}",
        written.as_uri(),
    ]
    run = subprocess.run(
        shot, capture_output=True, text=True, timeout=120, env=os.environ | {"HOME": str(tmp_path)}
    )
    assert run.returncode == 0, run.stderr
    assert "CONSOLE" not in run.stderr, run.stderr
    assert picture.stat().st_size > 50_000
    assert picture.read_bytes().startswith(b"\x89PNG")
    dom = subprocess.run(
        [BROWSER, *flags, "--dump-dom", written.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert dom.stdout.count("<svg") == written.read_text().count("<svg")
    assert "Gauss-Newton matrix" in dom.stdout


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")
def test_a_browser_complains_about_a_broken_page(tmp_path):
    """The check of the console is one that can fail."""
    broken = tmp_path / "broken.html"
    broken.write_text("<script>throw new Error('planted')</script>")
    flags = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path}",
        "--enable-logging=stderr",
    ]
    run = subprocess.run(
        [BROWSER, *flags, "--dump-dom", broken.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "CONSOLE" in run.stderr
