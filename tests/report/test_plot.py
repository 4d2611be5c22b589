"""Pictures of results: what can be read back from the axes is what the quantities are."""

import builtins
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import unbatch as ub
from unbatch.diagram import figure as figure_module
from unbatch.errors import InputError, StructureError
from unbatch.linalg import spectra
from unbatch.report import plot, style

pytest.importorskip("matplotlib")
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

N = 8
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def mixing():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)).double()
    return ub.Problem(net, F.cross_entropy, (torch.randn(N, 4).double(), torch.randint(3, (N,))))


@pytest.fixture(scope="module")
def apart():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    return ub.Problem(net, F.cross_entropy, (torch.randn(N, 4).double(), torch.randint(3, (N,))))


DATA = torch.arange(4.0 * N).view(N, 4).sin(), torch.arange(N) % 3


def contrasting(z, y):
    return F.cross_entropy(z @ z.T, torch.arange(N))


PICTURES = {
    "structure": plot.structure,
    "crosstalk": plot.crosstalk,
    "gradient_norms": plot.gradient_norms,
    "spectrum": plot.spectrum,
    "directions": plot.directions,
    "density": lambda p, ax=None: plot.density(spectra.density(p.ggn(), probes=4, steps=8), ax),
    "plan": lambda p, ax=None: plot.plan(p.plan(), ax),
}


@pytest.mark.parametrize("name", PICTURES)
def test_axes_of_ones_own(name, mixing):
    mine = Figure().add_subplot()
    assert PICTURES[name](mixing, ax=mine) is mine
    assert mine.has_data()
    theirs = PICTURES[name](mixing)
    assert theirs is not mine
    assert theirs.figure is not mine.figure


@pytest.mark.parametrize("name", PICTURES)
def test_files_are_the_same_for_the_same_picture(name, mixing, tmp_path):
    for file in ("a.svg", "b.svg", "a.png", "b.png"):
        figure_module.save(PICTURES[name](mixing), tmp_path / file)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.svg").read_text().startswith('<svg role="img" aria-label="')
    assert "<dc:date>" not in (tmp_path / "a.svg").read_text()


def test_pyplot_is_left_alone(mixing):
    before = "matplotlib.pyplot" in sys.modules
    for picture in PICTURES.values():
        picture(mixing)
    assert ("matplotlib.pyplot" in sys.modules) == before


@pytest.mark.parametrize("name", PICTURES)
def test_without_matplotlib(name, mixing, monkeypatch):
    real = builtins.__import__

    def missing(module, *args, **kwargs):
        if module.partition(".")[0] == "matplotlib":
            raise ImportError(module)
        return real(module, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"pip install 'unbatch\[plot\]'"):
        PICTURES[name](mixing)


# --- the structure --------------------------------------------------------------------------------


def words(ax):
    return [t.get_text() for t in ax.texts]


def test_structure_draws_a_column_for_each_sample_and_the_neck(mixing, apart):
    ax = plot.structure(mixing)
    assert "R = 10" in words(ax)
    assert "samples share 10 numbers" in words(ax)
    assert [w for w in words(ax) if w.startswith("$x")] == [
        r"$x_{1}$",
        r"$x_{2}$",
        r"$x_{N-1}$",
        r"$x_{N}$",
    ]
    assert not any(w.startswith("R =") for w in words(plot.structure(apart)))
    assert words(plot.structure(mixing.diagram())) == words(ax)


def shapes(ax):
    return {(type(p).__name__, p.get_hatch()) for p in ax.patches}


def test_shapes_tell_the_kinds_apart_without_colour(mixing, apart):
    from unbatch.diagram import figure
    from unbatch.diagram.stage import Stage

    drawn = {}
    for kind in ("separate", "statistics", "mixed", "unknown"):
        ax = figure.draw([Stage("module", "m", kind)], N)
        drawn[kind] = (frozenset(shapes(ax)), len(ax.lines))
    assert len(set(drawn.values())) == 4


def drawn(figure):
    """A figure as it comes out on paper, and what measures it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return canvas.get_renderer()


@pytest.mark.parametrize("samples", [1, 2, 5, 100])
def test_nothing_overlaps(samples):
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))
    torch.manual_seed(0)
    data = torch.randn(max(samples, 2), 4), torch.randint(3, (max(samples, 2),))
    problem = ub.Problem(
        net if samples > 1 else net[:1], F.cross_entropy, tuple(t[:samples] for t in data)
    )
    ax = plot.structure(problem)
    renderer = drawn(ax.figure)
    boxes = [t.get_window_extent(renderer) for t in ax.texts if t.get_text()]
    page = ax.figure.bbox
    for i, box in enumerate(boxes):
        assert page.x0 <= box.x0 <= box.x1 <= page.x1, ax.texts[i].get_text()
        assert not any(box.overlaps(other) for other in boxes[:i]), words(ax)[i]


def spilling(ax, renderer):
    """Words that are drawn outside their axes, or over each other."""
    place = ax.get_window_extent(renderer)
    texts = [t for t in ax.texts if t.get_text() and t.get_visible()]
    boxes = [t.get_window_extent(renderer) for t in texts]
    out = [
        t.get_text()
        for t, b in zip(texts, boxes, strict=True)
        if not (place.x0 <= b.x0 and b.x1 <= place.x1)
    ]
    out += [
        t.get_text()
        for t, b in zip(texts, boxes, strict=True)
        if not (place.y0 <= b.y0 and b.y1 <= place.y1)
    ]
    return out + [
        t.get_text()
        for i, t in enumerate(texts)
        if any(boxes[i].overlaps(other) for other in boxes[:i])
    ]


SIZES = {
    "large": (12, 10),
    "small": (3, 2),
    "flat": (9, 1.5),
    "narrow": (1.5, 6),
    "tiny": (0.8, 0.8),
}


@pytest.mark.parametrize("layout", ["constrained", None])
@pytest.mark.parametrize("size", SIZES)
def test_words_stay_in_axes_of_any_size(size, layout, mixing):
    figure = Figure(figsize=SIZES[size], layout=layout)
    left, right = figure.subplots(1, 2)
    for ax, given in ((left, mixing), (right, ub.Problem(nn.Linear(4, 3), contrasting, DATA))):
        plot.structure(given, ax=ax)
    renderer = drawn(figure)
    assert spilling(left, renderer) == spilling(right, renderer) == []
    figure.set_size_inches(2, 2)  # afterwards, as a window does
    renderer = drawn(figure)
    assert spilling(left, renderer) == spilling(right, renderer) == []


def test_words_are_left_out_only_where_nobody_could_read_them(mixing):
    seen = {}
    for size in ("small", "tiny"):
        ax = plot.structure(mixing, ax=Figure(figsize=SIZES[size]).add_subplot())
        drawn(ax.figure)
        seen[size] = [t for t in ax.texts if t.get_text() and t.get_visible()]
        every = [t for t in ax.texts if t.get_text()]
    assert len(seen["small"]) == len(every)
    assert not seen["tiny"]


def test_words_that_keep_their_size_would_be_noticed(mixing):
    """The planted bug: letters of the size that fits a figure of its own."""
    ax = Figure(figsize=SIZES["small"]).add_subplot()
    plot.structure(mixing, ax=ax)
    ax.set_axes_locator(None)
    assert len(spilling(ax, drawn(ax.figure))) > 5


def test_words_are_as_large_as_intended_where_there_is_room(mixing):
    ax = Figure(figsize=SIZES["large"]).add_subplot()
    drawn(plot.structure(mixing, ax=ax).figure)
    assert {t.get_fontsize() for t in ax.texts} >= {7, 8}


def test_committed_figures_are_of_this_code():
    """Pixels may change with matplotlib; what the pictures say may not."""
    page = (ROOT / "docs" / "guides" / "draw_figures.md").read_text(encoding="utf-8")
    for name in ("without_batch_norm", "with_batch_norm", "contrastive_loss"):
        assert f"figures/{name}.svg" in page
        assert (
            'aria-label="The way of 16 samples'
            in (ROOT / "docs" / "figures" / f"{name}.svg").read_text()
        )
    with_, without = (
        (ROOT / "docs" / "figures" / f"{n}_batch_norm.svg").read_text() for n in ("with", "without")
    )
    assert "1 BatchNorm1d: samples share 16 numbers" in with_
    assert "stay separate" in without


# --- results --------------------------------------------------------------------------------------


def test_crosstalk(mixing, apart):
    found = mixing.crosstalk()
    ax = plot.crosstalk(found)
    np.testing.assert_array_equal(ax.images[0].get_array().filled(0), found.matrix.numpy())
    assert ax.images[0].norm.vmax == found.matrix.max()
    assert f"{found.strength:.1%}" in ax.get_title()
    shown = np.ma.masked_invalid(plot.crosstalk(apart).images[0].get_array())
    assert (shown.mask == ~np.eye(N, dtype=bool)).all()


def counts(ax):
    return [[int(bar.get_height()) for bar in bars] for bars in ax.containers]


def norms_of(problem, by):
    return problem.gradients(by=by).flat().norm(dim=1).numpy()


def test_gradient_norms(mixing, apart):
    ax = plot.gradient_norms(mixing, bins=6)
    assert ax.get_legend_handles_labels()[1] == ["per-component", "per-copy", "frozen"]
    every = [norms_of(mixing, by) for by in ("component", "copy", "frozen")]
    low, high = np.min(every), np.max(every)
    for drawn, norms in zip(counts(ax), every, strict=True):
        assert sum(drawn) == N
        expected, _ = np.histogram(norms, np.linspace(low, high, 7))
        assert abs(np.array(drawn) - expected).sum() <= 2  # the outermost may lie on an edge
    assert len({bars[0].get_hatch() for bars in ax.containers}) == 3
    (only,) = counts(plot.gradient_norms(apart))
    assert sum(only) == N


def test_gradient_norms_of_results(mixing):
    """Rows, and squared norms, which are the same to look at."""
    rows = {by: mixing.gradients(by=by) for by in ("component", "copy", "frozen")}
    named = plot.gradient_norms(
        {by: mixing.compute(ub.SquaredNorms(), by=by) for by in rows}, bins=6
    )
    assert named.get_legend_handles_labels()[1] == list(rows)
    assert (
        counts(named)
        == counts(plot.gradient_norms(rows, bins=6))
        == counts(plot.gradient_norms(mixing, bins=6))
    )
    assert len({bars[0].get_hatch() for bars in named.containers}) == 3
    (only,) = counts(plot.gradient_norms(rows["copy"], bins=6))
    norms = norms_of(mixing, "copy")
    assert (
        abs(np.array(only) - np.histogram(norms, np.linspace(norms.min(), norms.max(), 7))[0]).sum()
        <= 2
    )
    assert plot.gradient_norms(rows["copy"]).get_legend_handles_labels()[1] == ["per-copy"]


def covered(ax, renderer):
    """Bars and words that a legend lies over."""
    legend = ax.get_legend().get_window_extent(renderer)
    bars = [
        bar
        for bars in ax.containers
        for bar in bars
        if bar.get_height() > 0 and bar.get_width() > 0
    ]
    return [a for a in (*bars, *ax.texts) if a.get_window_extent(renderer).overlaps(legend)]


@pytest.mark.parametrize("layout", ["constrained", None])
@pytest.mark.parametrize("size", ["large", "small", "flat"])
def test_a_legend_lies_above_what_it_explains(size, layout, mixing):
    figure = Figure(figsize=SIZES[size], layout=layout)
    norms, plans = figure.subplots(1, 2)
    plot.gradient_norms(mixing, ax=norms, bins=1)  # bars everywhere
    plot.plan({by: mixing.plan(by=by) for by in ("component", "copy")}, ax=plans)
    renderer = drawn(figure)
    assert covered(norms, renderer) == covered(plans, renderer) == []
    for ax in (norms, plans):
        assert ax.get_legend().get_window_extent(renderer).y1 <= ax.get_window_extent(renderer).y1


def test_a_legend_over_bars_would_be_noticed(mixing):
    """The planted bug: no room is made."""
    ax = plot.gradient_norms(mixing, bins=1)
    ax.set_axes_locator(None)
    assert covered(ax, drawn(ax.figure))


def test_limits_of_ones_own_are_kept(mixing):
    ax = plot.gradient_norms(mixing)
    ax.set_ylim(0, 100)
    drawn(ax.figure)
    assert ax.get_ylim() == (0, 100)


def whole(axis):
    return all(float(x).is_integer() for x in axis.get_ticklocs())


def test_what_is_counted_has_whole_ticks(mixing, apart):
    ax = plot.gradient_norms(
        ub.Problem(nn.Linear(4, 3), F.cross_entropy, tuple(t[:2] for t in DATA))
    )
    drawn(ax.figure)
    assert whole(ax.yaxis)
    crossed, values = plot.crosstalk(mixing), plot.spectrum(apart)
    for axis in (crossed.xaxis, crossed.yaxis, values.xaxis):
        assert whole(axis)


def test_gradient_norms_that_differ_much_keep_all_samples():
    torch.manual_seed(0)
    X = torch.randn(N, 4) * torch.logspace(-3, 3, N)[:, None]
    X[0] = 0
    problem = ub.Problem(
        nn.Linear(4, 3, bias=False), lambda z, y: z.square().sum(), (X, torch.zeros(N))
    )
    ax = plot.gradient_norms(problem)
    assert ax.get_xscale() == "log"
    assert sum(map(sum, counts(ax))) == N - 1  # a norm of zero has no place on a log scale
    assert "1 of zero" in " ".join(ax.get_legend_handles_labels()[1])


def test_decompositions_that_do_not_exist_are_named(mixing, monkeypatch):
    real = mixing.compute

    def no_frozen(*quantities, by="component", **others):
        if by == "frozen":
            raise StructureError("not here")
        return real(*quantities, by=by, **others)

    monkeypatch.setattr(mixing, "compute", no_frozen)
    assert (
        plot.gradient_norms(mixing).get_legend_handles_labels()[1][-1]
        == "frozen: does not exist here"
    )


def test_spectrum(mixing):
    dense = torch.linalg.eigvalsh(mixing.ggn().to_dense()).flip(0)
    ax = plot.spectrum(mixing)
    curve, bound = ax.lines
    np.testing.assert_allclose(
        curve.get_ydata(), dense[: len(curve.get_ydata())], rtol=1e-6, atol=1e-9
    )
    assert len(curve.get_ydata()) == int((dense > 1e-13 * dense[0]).sum()) == 2 * N
    assert bound.get_xdata()[0] == mixing.ggn().rank_bound == 2 * N
    assert ax.get_yscale() == "log"


def test_spectrum_of_eigenvalues(mixing):
    G = mixing.ggn()
    expected = plot.spectrum(G).lines[0].get_ydata()
    for given in (G.eigvalsh(), G.eigh()):
        (curve,) = plot.spectrum(given).lines
        np.testing.assert_allclose(curve.get_ydata(), expected, rtol=1e-6)
    indefinite = plot.spectrum(torch.tensor([-2.0, 0.0, 1e-9, 1.0]))
    assert indefinite.lines[0].get_ydata().tolist() == [1, 2]
    assert len(indefinite.collections) == 1


WRONG = {
    "structure": (
        plot.structure,
        lambda p: p.structure,
        "Structure",
        r"plot\.structure\(problem\)",
    ),
    "crosstalk": (plot.crosstalk, lambda p: p.structure, "Structure", r"problem\.crosstalk\(\)"),
    "crosstalk of numbers": (
        plot.crosstalk,
        lambda p: p.crosstalk().matrix,
        r"shape \[8, 8\]",
        "Pass the problem",
    ),
    "norms": (
        plot.gradient_norms,
        lambda p: p.ggn(),
        "GGN",
        r"problem\.compute\(SquaredNorms\(\)\)",
    ),
    "norms of numbers": (
        plot.gradient_norms,
        lambda p: {"a": torch.ones(3)},
        r"a tensor of shape \[3\]",
        "Rows",
    ),
    "norms of nothing": (plot.gradient_norms, lambda p: {}, "dict", "mapping from names"),
    "spectrum": (
        plot.spectrum,
        lambda p: p.ggn().to_dense(),
        r"shape \[53, 53\] and dtype float64",
        "1-d",
    ),
    "spectrum of counts": (
        plot.spectrum,
        lambda p: torch.arange(3),
        "dtype int64",
        "real eigenvalues",
    ),
    "directions": (
        plot.directions,
        lambda p: p.ggn(blocks="module"),
        "BlockGGN",
        r"directions\(k\)",
    ),
    "directions of a class": (
        plot.directions,
        lambda p: ub.GGN,
        "the class GGN",
        "Pass the problem",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_drawn_is_refused(name, mixing):
    draw, given, value, remedy = WRONG[name]
    with pytest.raises(InputError, match=f"got .*{value}") as refusal:
        draw(given(mixing))
    assert re.search(remedy, str(refusal.value))


def test_spectrum_of_blocks(mixing):
    blocks = mixing.ggn(blocks="module")
    ax = plot.spectrum(blocks)
    curves = ax.lines[::2]
    for curve, block in zip(curves, blocks.blocks, strict=True):
        top = torch.linalg.eigvalsh(block.to_dense())[-1]
        assert curve.get_ydata()[0] == pytest.approx(float(top))
    assert len({(to_hex(c.get_color()), c.get_marker(), c.get_linestyle()) for c in curves}) == len(
        curves
    )


def test_directions(mixing):
    found = mixing.ggn().directions(3)
    ax = plot.directions(found, k=3)
    clouds = [c.get_offsets() for c in ax.collections if len(c.get_offsets()) == N]
    assert len(clouds) == 3
    gradient = torch.cat([g.flatten() for g in mixing.gradient().values()])
    for i, cloud in enumerate(clouds):  # the largest eigenvalue comes first
        slope, curvature = cloud.mean(0)
        assert curvature == pytest.approx(float(found.values[-1 - i]))
        assert slope == pytest.approx(float(gradient @ found.vectors[:, -1 - i]))


def test_density(mixing):
    found = spectra.density(mixing.ggn(), probes=4, steps=8)
    ax = plot.density(found, points=2001)
    (curve,) = ax.lines
    x, y = curve.get_data()
    assert np.trapezoid(y, x) == pytest.approx(1, abs=1e-3)
    np.testing.assert_allclose(y, found.on(torch.as_tensor(x)).values, rtol=1e-12)
    assert len(ax.collections) == 1
    with pytest.raises(InputError, match="got GGN"):
        plot.density(mixing.ggn())


def test_plan(mixing):
    plans = {by: mixing.plan(by=by) for by in ("component", "copy")}
    ax = plot.plan(plans)
    results, temporary = ax.containers
    assert [b.get_width() * 2**20 for b in results] == [p.results for p in plans.values()]
    assert [b.get_x() * 2**20 for b in temporary] == [p.results for p in plans.values()]
    assert [round(b.get_width() * 2**20) for b in temporary] == [
        p.temporary for p in plans.values()
    ]
    assert [t.get_text() for t in ax.get_yticklabels()] == list(plans)
    pullbacks = [f"{p.pullbacks} pullback" for p in plans.values()]
    assert all(w.strip().startswith(p) for w, p in zip(words(ax), pullbacks, strict=True))
    with pytest.raises(InputError, match=r"got \{\}"):
        plot.plan({})


def test_a_budget_that_is_near_is_drawn(mixing):
    tight = mixing.plan(memory=5_000)
    (stroke,) = plot.plan(tight).lines
    assert stroke.get_xdata()[0] * 2**20 == pytest.approx(tight.budget)


def test_colours_are_those_of_okabe_and_ito():
    known = {"#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"}
    assert set(style.COLOURS) == known


def test_a_permuted_matrix_would_be_noticed(mixing):
    """The planted bug: rows for columns."""
    found = mixing.crosstalk()
    drawn = plot.crosstalk(found).images[0].get_array().filled(0)
    assert not np.array_equal(drawn.T, found.matrix.numpy())
