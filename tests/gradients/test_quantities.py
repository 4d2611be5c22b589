"""Quantities of rows against their definitions in `cases/quantities.py`, from the rows of the
reference.

What is compared is relative to the largest entry expected, with a floor from the largest entry of
all rows, because some rows are zero by cancellation.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unbatch as ub
from cases.gradients import CASES
from cases.quantities import (
    ASKED,
    BINS,
    CLIP,
    EDGES,
    HIGH,
    LOW,
    Plain,
    early_stopping,
    histogram,
    norm_test,
    per_loss,
)
from unbatch.autodiff.contractions.row_block import RowBlock
from unbatch.gradients.quantities import About, Basic, Collector, Derived, Quantity
from unbatch.reference import definitions as reference

EXACT, FLOOR = 1e-9, 1e-12
EVERY = pytest.mark.parametrize("asked", ASKED, ids=lambda a: a.name)

# ---------------------------------------------------------------- cases

CHOSEN = {
    "mlp, ce": "component copy frozen",
    "mlp, mse sum": "component",
    "mlp, ce class weights": "component",
    "mlp, root of a mean": "component",
    "mlp, contrastive": "component",
    "mlp, with weight decay": "component",
    "mlp, with a parameter": "component",
    "linear on tokens": "component",
    "conv2d": "component",
    "conv2d grouped": "component",
    "group norm": "component",
    "layer norm on tokens": "component",
    "dropout": "component",
    "embedding": "component",
    "embedding tied with the output": "component",
    "two modules with one weight": "component",
    "a layer used twice": "component",
    "weight norm": "component",
    "lora": "component",
    "positions": "component",
    "attention": "component",
    "lstm, two layers, time first": "component",
    "an unused parameter": "component",
    "batch norm, ce": "component copy frozen",
    "two batch norms, ce": "component copy frozen",
    "two batch norms, contrastive": "component copy",
    "two batch norms of convs": "component copy frozen",
    "batch norm with tied weights around": "component copy frozen",
    "a parameter applied to a statistic": "component copy",
    "attention between samples": "component",
}
PAIRS = [(name, by) for name, bys in CHOSEN.items() for by in bys.split()]
EACH = pytest.mark.parametrize(("name", "by"), PAIRS, ids=[f"{name}-{by}" for name, by in PAIRS])
MEMORY = pytest.mark.parametrize("memory", [None, 1], ids=["all at once", "one sample at a time"])
REFERENCE = {"component": reference.component, "copy": reference.copies, "frozen": reference.frozen}


def case(name: str) -> Any:
    return next(c for c in CASES if c.name == name)


@cache
def problem(name: str) -> ub.Problem:
    """Asked many times, as a user would: what it keeps between questions
    must not spoil the next.
    """
    model, loss, inputs, targets = case(name).build()
    torch.manual_seed(0)
    made = ub.Problem(model.train(), loss, (inputs, targets))
    made.predictions()
    return made


@cache
def expected_rows(name: str, by: str) -> Plain:
    model, loss, inputs, targets = case(name).build()
    torch.manual_seed(0)
    return REFERENCE[by](model.train(), loss, inputs, targets)


def compute(question: ub.Problem, *quantities: Quantity, **options: Any) -> Any:
    """Without the warning that samples mix."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ub.MixedSamplesWarning)
        return question.compute(*quantities, **options)


def largest(value: Any) -> float:
    tensors = value.values() if isinstance(value, Mapping) else [value]
    return max((t.abs().max().item() for t in tensors if t.numel()), default=0.0)


def check(found: Any, expected: Any, floor: float, rtol: float = EXACT) -> None:
    """Raise where names, shapes or numbers differ."""
    if isinstance(expected, Mapping):
        assert list(found) == list(expected)
        for name, e in expected.items():
            try:
                check(found[name], e, floor, rtol)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from None
        return
    assert found.shape == expected.shape, (
        f"{tuple(found.shape)} where {tuple(expected.shape)} is expected"
    )
    bound = rtol * largest(expected) + floor
    error = largest(found.double() - expected.double())
    assert error <= bound, (
        f"off by {error:.1e}, allowed {bound:.1e}, largest entry {largest(expected):.1e}"
    )


def beyond_rounding(rows: Plain) -> Plain:
    """The parameters of which every entry either has rows that differ, or
    rows that are all zero.
    """
    size = FLOOR * largest(rows)
    apart = {k: (r - r.mean(0)).square().mean(0).sqrt() for k, r in rows.items()}
    return {k: r for k, r in rows.items() if bool(((apart[k] > size) | (r == 0).all(0)).all())}


def test_every_public_quantity_is_in_the_table():
    public = set()
    for name in ub.__all__:
        offered = getattr(ub, name)
        if isinstance(offered, type) and issubclass(offered, Basic | Derived):
            public.add(name)
    # The one that is fed with columns of the GGN's factor instead of rows of a gradient.
    assert public - {"DiagGGN"} == {asked.name for asked in ASKED if asked.row}


@MEMORY
@EVERY
@EACH
def test_a_quantity_is_what_its_definition_says(name, by, asked, memory):
    rows = expected_rows(name, by)
    if asked.ratio:
        rows = beyond_rounding(rows)
    found = compute(problem(name), asked.quantity, by=by, memory=memory, parameters=list(rows))
    expected = asked.definition(rows)
    floor = FLOOR * largest(rows) ** asked.degree
    if asked.name == "SignalToNoise":
        expected = {k: e.nan_to_num(0.0) for k, e in expected.items()}
    check(found, expected, floor, 1e-7 if asked.degree == 0 else EXACT)


@EACH
def test_totals_are_over_all_parameters(name, by):
    rows = expected_rows(name, by)
    squared = compute(problem(name), ub.SquaredNorms(), by=by)
    check(squared.total, reference.squared_norms(rows)[1], FLOOR * largest(rows) ** 2)


@MEMORY
def test_a_histogram_says_what_lies_beyond_its_edges(memory):
    rows = expected_rows("two batch norms, ce", "component")
    found = problem("two batch norms, ce").compute(ub.Histogram(BINS, LOW, HIGH), memory=memory)
    torch.testing.assert_close(
        found.edges.double(), torch.tensor(EDGES, dtype=torch.float64), rtol=0, atol=1e-6
    )
    n = len(next(iter(rows.values())))
    for name, r in rows.items():
        assert found.outside[name] == int(((n * r < LOW) | (n * r > HIGH)).sum())
        assert found.outside[name] + int(found[name].sum()) == r.numel()
    assert sum(found.outside.values()) > 0


@pytest.mark.parametrize("max_norm", [1e-6, 1e6])
def test_clipping_far_below_and_far_above_all_norms(max_norm):
    rows = expected_rows("two batch norms, ce", "component")
    found = problem("two batch norms, ce").compute(ub.ClippedSum(max_norm))
    check(found, reference.clipped_sum(rows, max_norm), FLOOR * min(max_norm, largest(rows)))


# ---------------------------------------------------------------- several at once


@MEMORY
@pytest.mark.parametrize(
    "name",
    [
        "mlp, ce",
        "conv2d",
        "embedding",
        "dropout",
        "two batch norms, ce",
        "weight norm",
        "two batch norms of convs",
        "batch norm with tied weights around",
    ],
)
def test_together_they_are_what_they_are_alone(name, memory):
    rows = expected_rows(name, "component")
    sturdy = [a for a in ASKED if not a.ratio]
    for chosen, wanted in [
        (sturdy, None),
        (sturdy[1:], None),
        (sturdy[::-1], None),
        (ASKED, beyond_rounding(rows)),
    ]:
        together = compute(
            problem(name), *(a.quantity for a in chosen), memory=memory, parameters=wanted
        )
        assert isinstance(together, tuple)
        for asked, one in zip(chosen, together, strict=True):
            alone = compute(problem(name), asked.quantity, memory=memory, parameters=wanted)
            assert type(one) is type(alone)
            check(one, alone, FLOOR * largest(rows) ** asked.degree, 1e-7)


def test_the_same_quantity_twice_is_answered_twice():
    first, other, second = problem("mlp, ce").compute(
        ub.SquaredNorms(), ub.Histogram(), ub.SquaredNorms()
    )
    assert torch.equal(first.flat(), second.flat())
    assert set(other) == set(first)


def test_a_name_of_before_goes_on_working():
    assert ub.Norms is ub.SquaredNorms


def test_a_quantity_may_be_given_by_its_class():
    asked = problem("mlp, ce")
    by_class, variance = asked.compute(ub.SquaredNorms, ub.Variance())
    assert torch.equal(by_class.flat(), asked.compute(ub.SquaredNorms()).flat())
    assert torch.equal(variance.flat(), asked.compute(ub.Variance).flat())
    by_class, by_object = asked.plan(ub.SquaredNorms), asked.plan(ub.SquaredNorms())
    assert replace(by_class, seconds=None) == replace(by_object, seconds=None)
    assert "time: some" in str(by_class)


def test_one_quantity_is_no_tuple():
    assert isinstance(problem("mlp, ce").compute(ub.Dots()), Tensor)


# ---------------------------------------------------------------- variance and precision


def nearly_equal(dtype: torch.dtype, apart: float) -> tuple[ub.Problem, Plain]:
    """Rows that are inputs near 1000, known exactly, by a linear layer and by a generic way."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 1, bias=False)
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) + (x * self.scale).sum(1, keepdim=True)

    x = (1000 + apart * torch.randn(16, 4)).to(dtype)
    rows = {"scale": x.double(), "linear.weight": x.double()[:, None]}
    return ub.Problem(Both().to(dtype), lambda p: p.sum(), (x, None)), rows


def check_variance(found: Mapping[str, Tensor], rows: Plain, eps: float) -> None:
    """Never negative, and exact up to the rounding of the mean."""
    for name, expected in reference.variance(rows).items():
        assert (found[name] >= 0).all(), f"{name}: negative, {found[name].min():.1e}"
        floor = (4 * eps * rows[name].abs().max().item()) ** 2
        check(found[name].double(), expected, floor, 1e-3)


@MEMORY
@pytest.mark.parametrize("apart", [1.0, 1e-2, 1e-3, 1e-4, 0.0])
def test_variance_of_rows_that_are_nearly_equal(apart, memory):
    question, rows = nearly_equal(torch.float32, apart)
    assert list(question.gradients()) == list(rows)
    check_variance(
        question.compute(ub.Variance(), memory=memory), rows, torch.finfo(torch.float32).eps
    )
    check_variance(question.compute(ub.Gradients(), ub.Variance(), memory=memory)[1], rows, 1.2e-7)


def test_variance_from_moments_is_caught():
    _, rows = nearly_equal(torch.float32, 1e-3)
    narrow = {k: r.float() for k, r in rows.items()}
    moments = {k: r.square().mean(0) - r.mean(0).square() for k, r in narrow.items()}
    with pytest.raises(AssertionError, match=r"negative|off by"):
        check_variance(moments, rows, 1.2e-7)


@MEMORY
@EACH
def test_a_variance_is_never_negative(name, by, memory):
    model, loss, inputs, targets = case(name).build()
    narrow = torch.utils._pytree.tree_map(
        lambda t: t.float() if isinstance(t, Tensor) and t.is_floating_point() else t,
        (inputs, targets),
    )
    if "class weights" in name or name == "two batch norms of convs":
        narrow_loss = lambda p, y: loss(p.double(), y)  # noqa: E731
    else:
        narrow_loss = loss.float() if isinstance(loss, nn.Module) else loss
    question = ub.Problem(model.float().train(), narrow_loss, narrow)
    for v in compute(question, ub.Variance(), by=by, memory=memory).values():
        assert (v >= 0).all()


def mixed_net(narrow: torch.dtype | None = None) -> nn.Module:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 4, 3)
            self.norm = nn.BatchNorm2d(4)
            self.hidden = nn.Linear(4, 6)
            self.layer_norm = nn.LayerNorm(6)
            self.head = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", narrow or torch.bfloat16, enabled=narrow is not None):
                h = self.norm(self.conv(x)).relu().mean((2, 3))
                return self.head(self.layer_norm(self.hidden(h)).tanh())

    return Net()


def in_precision(
    dtype: torch.dtype, autocast: torch.dtype | None = None
) -> tuple[ub.Problem, ub.Problem]:
    """The same problem in a narrow precision and in float64, with the same values of everything."""
    x, y = torch.randn(8, 2, 6, 6).to(dtype), torch.arange(8) % 3
    narrow = mixed_net(autocast).to(dtype)
    exact = mixed_net().double()
    exact.load_state_dict(
        {k: v.double() if v.is_floating_point() else v for k, v in narrow.state_dict().items()}
    )

    def loss(p: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(p.to(torch.promote_types(p.dtype, torch.float32)), y)

    return ub.Problem(narrow, loss, (x, y)), ub.Problem(exact, loss, (x.double(), y))


def check_precision(narrow: ub.Problem, exact: ub.Problem, rtol: float, memory: int | None) -> None:
    quantities = [
        a.quantity for a in ASKED if not a.ratio and a.name not in ("Histogram", "NoiseScale")
    ]
    found = compute(narrow, *quantities, memory=memory)
    expected = compute(exact, *quantities)
    for q, f, e in zip(quantities, found, expected, strict=True):
        scale = largest(e)
        for name in e if isinstance(e, Mapping) else [None]:
            a, b = (f, e) if name is None else (f[name], e[name])
            error = largest(a.double() - b)
            assert error <= rtol * scale, (
                f"{type(q).__name__} {name or ''}: off by {error / scale:.1e} of the largest"
            )


PRECISIONS = {
    "float32": (torch.float32, None, 1e-5),
    "bfloat16": (torch.bfloat16, None, 0.12),
    "autocast": (torch.float32, torch.bfloat16, 0.06),
}


@MEMORY
@pytest.mark.parametrize(("dtype", "autocast", "rtol"), PRECISIONS.values(), ids=PRECISIONS)
def test_narrow_precisions_agree_with_float64(dtype, autocast, rtol, memory):
    check_precision(*in_precision(dtype, autocast), rtol, memory)


NETS: dict[str, tuple[Callable[[], list[nn.Module]], tuple[int, ...]]] = {
    "linear": (lambda: [nn.Linear(6, 3)], (8, 6)),
    "mlp": (lambda: [nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)], (8, 6)),
    "layer norm": (lambda: [nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3)], (8, 6)),
    "batch norm": (lambda: [nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)], (8, 6)),
    "conv": (
        lambda: [nn.Conv2d(2, 3, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten()],
        (8, 2, 6, 6),
    ),
    "batch norm of a conv": (
        lambda: [
            nn.Conv2d(2, 3, 3),
            nn.BatchNorm2d(3),
            nn.Tanh(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        ],
        (8, 2, 6, 6),
    ),
}


class Narrowed(nn.Sequential):
    """Its layers, under autocast or not."""

    narrow = False

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.narrow):
            return super().forward(x)


@MEMORY
@pytest.mark.parametrize("by", ["component", "copy", "frozen"])
@pytest.mark.parametrize("net", NETS)
def test_autocast_inside_the_model_agrees_with_float32(net, by, memory):
    layers, shape = NETS[net]
    model, x, y = Narrowed(*layers()), torch.randn(shape), torch.arange(8) % 3
    answers = []
    for narrow in (True, False):
        model.narrow = narrow
        question = ub.Problem(model, lambda p, y: F.cross_entropy(p.float(), y), (x, y))
        answers.append(
            compute(
                question,
                *(a.quantity for a in ASKED[:7]),
                ub.ClippedSum(CLIP),
                by=by,
                memory=memory,
            )
        )
    for found, expected in zip(*answers, strict=True):
        scale = largest(expected)
        check(found, expected, 0.06 * scale, 0)


def test_autocast_around_the_question():
    narrow, exact = in_precision(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        check_precision(narrow, exact, 0.06, None)


@MEMORY
@pytest.mark.parametrize(
    "asked",
    [a for a in ASKED if a.name in ("SquaredNorms", "Projections", "Dots", "Variance")],
    ids=lambda a: a.name,
)
def test_autocast_around_the_question_does_not_reach_the_sums(asked, memory):
    """Against the rows as they came out, so that only accumulation is measured."""
    question, _ = in_precision(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        rows = {k: r.double() for k, r in question.gradients().items()}
        found = compute(question, asked.quantity, memory=memory)
    check(found, asked.definition(rows), 1e-5 * largest(rows) ** 2, 1e-5)


def test_another_problem_is_caught_by_the_comparison_of_precisions():
    narrow, _ = in_precision(torch.float32)
    _, other = in_precision(torch.float32)
    with pytest.raises(AssertionError, match="off by"):
        check_precision(narrow, other, 0.06, None)


@pytest.mark.parametrize(
    "asked",
    [a for a in ASKED if a.name not in ("Gradients", "Histogram", "ClippedSum")],
    ids=lambda a: a.name,
)
@MEMORY
def test_sums_over_bfloat16_are_accumulated_in_float32(asked, memory):
    """Against the rows as they came out, so that only accumulation is measured."""
    question, _ = in_precision(torch.bfloat16)
    rows = {k: r.double() for k, r in question.gradients().items()}
    if asked.ratio:
        rows = beyond_rounding(rows)
    found = compute(question, ub.Gradients(), asked.quantity, memory=memory, parameters=list(rows))[
        1
    ]
    for t in found.values() if isinstance(found, Mapping) else [found]:
        assert t.dtype == torch.float32
    if asked.name in ("SquaredNorms", "SumOfSquares", "SecondMoment", "Dots", "Variance"):
        check(found, asked.definition(rows), 1e-5 * largest(rows) ** 2, 1e-5)


# -------------------------------------------------------------- statistics over what are no samples

MEANINGFUL = [
    "mlp, ce",
    "mlp, mse sum",
    "conv2d",
    "embedding",
    "dropout",
    "attention",
    "mlp, ce class weights sum",
]
MEANINGLESS = {
    "batch norm, ce": "simd",
    "two batch norms, ce": "simd",
    "attention between samples": "simd",
    "mlp, contrastive": "loss",
    "mlp, root of a mean": "reduction",
    "mlp, ce class weights": "weights",
    "mlp, ce ignore_index": "weights",
}


def warnings_of(question: ub.Problem, quantity: Quantity) -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        question.compute(quantity)
    return list(caught)


@EVERY
@pytest.mark.parametrize("name", MEANINGFUL)
def test_nothing_warns_where_samples_are_apart(name, asked):
    assert not warnings_of(problem(name), asked.quantity)


@EVERY
@pytest.mark.parametrize("name", MEANINGLESS)
def test_statistics_warn_where_rows_are_no_samples_of_anything(name, asked):
    caught = warnings_of(problem(name), asked.quantity)
    if not asked.moment:
        assert not caught
        return
    (warning,) = caught
    assert warning.category is ub.MixedSamplesWarning
    text = str(warning.message)
    assert asked.name in text
    assert MEANINGLESS[name] in text.lower()
    assert problem(name).gradients().kind in text
    assert warning.filename == __file__, "the warning points at the line of the caller"


def test_warnings_are_errors_where_the_user_wants_them_to_be():
    question = problem("batch norm, ce")
    with warnings.catch_warnings():
        warnings.simplefilter("error", ub.MixedSamplesWarning)
        for asked in ASKED:
            if asked.moment:
                with pytest.raises(ub.MixedSamplesWarning, match=asked.name):
                    question.compute(ub.SquaredNorms(), asked.quantity)
            else:
                question.compute(asked.quantity)


# ---------------------------------------------------------------- a quantity of one's own


@dataclass(frozen=True)
class Largest(Basic):
    """`max_p |r_np|`, `[N]` for each parameter."""

    def start(self, about: About) -> Collector:
        return _Largest(about)


class _Largest(Collector):
    def __init__(self, about: About) -> None:
        super().__init__(about)
        self.found = {n: about.like.new_zeros(about.samples) for n in about.shapes}

    def take(self, name: str, block: RowBlock) -> None:
        self.found[name][block.where] = block.rows().flatten(1).abs().amax(1)

    def finish(self) -> Any:
        return self.about.result(self.found)


@dataclass(frozen=True)
class Spikiness(Derived):
    """`max_p r_np² / ‖r_n‖²` for each parameter: `[N]`; between 1/D and 1."""

    moment = True

    def bases(self) -> Sequence[Quantity]:
        return Largest(), ub.SquaredNorms()

    def combine(self, about: About, *results: Any) -> Any:
        most, squared = results
        return about.result({n: most[n].square() / squared[n] for n in about.shapes})


@MEMORY
@pytest.mark.parametrize("name", ["mlp, ce", "two batch norms, ce", "conv2d", "embedding"])
def test_a_quantity_of_ones_own_stands_beside_the_others(name, memory):
    rows = expected_rows(name, "component")
    own, dots, most = compute(problem(name), Spikiness(), ub.Dots(), Largest(), memory=memory)
    check(dots, reference.dots(rows), 0)
    check(most, {k: r.flatten(1).abs().amax(1) for k, r in rows.items()}, FLOOR * largest(rows))
    squared = reference.squared_norms(rows)[0]
    for k in beyond_rounding(rows):
        check(own[k], rows[k].flatten(1).abs().amax(1).square() / squared[k], 0)
    assert own.kind == problem(name).gradients().kind


def test_a_quantity_of_ones_own_warns_as_the_others_do():
    (warning,) = warnings_of(problem("batch norm, ce"), Spikiness())
    assert "Spikiness" in str(warning.message)


class PlainLargest(Basic):
    """Neither frozen nor comparable: every instance is another quantity."""

    def start(self, about: About) -> Collector:
        return _Largest(about)


class OfPlain(Derived):
    def bases(self) -> Sequence[Quantity]:
        return (PlainLargest(),)

    def combine(self, about: About, *results: Any) -> Any:
        return results[0]


def test_a_quantity_of_ones_own_may_be_a_plain_class():
    found = problem("mlp, ce").compute(OfPlain())
    check(found, dict(problem("mlp, ce").compute(Largest())), 0)


class Spread(Derived):
    """Says of itself that it is no statistic, and rests on one."""

    def bases(self) -> Sequence[Quantity]:
        return (ub.Variance(),)

    def combine(self, about: About, *results: Any) -> Any:
        return results[0].flat().sum()


def test_what_is_made_from_a_statistic_warns_as_the_statistic_does():
    (warning,) = warnings_of(problem("batch norm, ce"), Spread())
    assert warning.category is ub.MixedSamplesWarning
    assert not warnings_of(problem("mlp, ce"), Spread())


# ---------------------------------------------------------------- buffers of the caller


@MEMORY
@pytest.mark.parametrize(
    "name",
    [
        "mlp, ce",
        "conv2d",
        "embedding",
        "two batch norms, ce",
        "a layer used twice",
        "an unused parameter",
        "two batch norms of convs",
        "weight norm",
    ],
)
def test_rows_are_written_to_the_buffers_of_the_caller(name, memory):
    rows = problem(name).gradients()
    buffers = {k: torch.full_like(r, float("nan")) for k, r in rows.items()}
    found = problem(name).gradients(out=buffers, memory=memory)
    assert list(found) == list(rows)
    for k, buffer in buffers.items():
        assert found[k] is buffer
        torch.testing.assert_close(buffer, rows[k], rtol=1e-12, atol=1e-14)
    again = problem(name).gradients(out=found)
    assert all(again[k] is buffers[k] for k in buffers)


def test_buffers_may_lie_in_memory_in_any_way():
    rows = problem("mlp, ce").gradients()
    whole = torch.full(
        (2 * problem("mlp, ce").samples, rows.flat().shape[1]), float("nan"), dtype=torch.float64
    )
    pieces = whole[::2].split([r[0].numel() for r in rows.values()], 1)
    buffers = {k: p.view(r.shape) for (k, r), p in zip(rows.items(), pieces, strict=True)}
    problem("mlp, ce").gradients(out=buffers)
    torch.testing.assert_close(whole[::2], rows.flat())
    assert whole[1::2].isnan().all()


def test_only_the_buffers_of_what_is_asked_are_written_to():
    rows = problem("mlp, ce").gradients()
    buffers = {k: torch.zeros_like(r) for k, r in rows.items()}
    problem("mlp, ce").gradients(parameters="*.bias", out=buffers)
    assert {k for k, b in buffers.items() if b.any()} == {k for k in rows if k.endswith("bias")}


REFUSED: dict[str, Callable[[Plain], Mapping[str, Tensor]]] = {
    "0.weight' is (5, 6)": lambda good: good | {"0.weight": good["0.weight"][:, :, 0].clone()},
    "(4, 6, 6)": lambda good: good | {"0.weight": good["0.weight"][:4].clone()},
    "float32": lambda good: good | {"0.weight": good["0.weight"].float()},
    "nothing for '2.bias'": lambda good: {k: t for k, t in good.items() if k != "2.bias"},
    "meta": lambda good: good | {"0.weight": good["0.weight"].to("meta")},
}


@pytest.mark.parametrize("says", REFUSED)
def test_buffers_that_do_not_fit_are_refused_and_none_is_written_to(says):
    good = {k: torch.full_like(r, 7) for k, r in problem("mlp, ce").gradients().items()}
    with pytest.raises(ub.InputError, match="out= does not fit") as caught:
        problem("mlp, ce").gradients(out=REFUSED[says](good))
    assert says in str(caught.value)
    assert all((t == 7).all() for t in good.values())


@pytest.mark.parametrize(
    "name", ["mlp, ce", "conv2d", "embedding", "two batch norms, ce", "an unused parameter"]
)
def test_results_share_no_memory(name):
    """With each other, with those of a later call, or with parameters and data."""
    question = problem(name)
    taken: set[int] = {t.untyped_storage().data_ptr() for t in question.program.parameters.values()}
    taken |= {t.untyped_storage().data_ptr() for t in (question.inputs, question.targets)}
    for _ in range(2):
        results = compute(question, *(a.quantity for a in ASKED))
        tensors = [
            t for r in results for t in (r.values() if isinstance(r, Mapping) else [r]) if t.numel()
        ]
        kept = [t.clone() for t in tensors]
        storages = [t.untyped_storage().data_ptr() for t in tensors]
        assert len(set(storages)) == len(storages)
        assert not taken & set(storages)
        taken |= set(storages)
        compute(question, *(a.quantity for a in ASKED))
        assert all(torch.equal(a, b) for a, b in zip(kept, tensors, strict=True))


# ---------------------------------------------------------------- which parameters


def test_parameters_by_name_by_glob_and_as_tensors():
    question = problem("two batch norms, ce")
    model = question.program.model
    rows = question.gradients()
    asked: dict[Any, list[str]] = {
        "0.weight": ["0.weight"],
        "*.bias": ["0.bias", "1.bias", "3.bias", "4.bias", "5.bias"],
        model[1].weight: ["1.weight"],
        ("4.*", "0.weight"): ["0.weight", "4.weight", "4.bias"],
        (model[5].bias, "[01].weight", "0.weight"): ["0.weight", "1.weight", "5.bias"],
        "*": list(rows),
    }
    for wanted, names in asked.items():
        found = question.gradients(parameters=wanted)
        assert list(found) == names
        for name in names:
            torch.testing.assert_close(found[name], rows[name], rtol=1e-12, atol=1e-15)
        assert list(question.compute(ub.SquaredNorms(), parameters=wanted)) == names
    some = {k: r for k, r in rows.items() if k.endswith("bias")}
    torch.testing.assert_close(
        question.compute(ub.Dots(), parameters="*.bias"), reference.dots(some)
    )


def test_parameters_may_come_from_a_generator():
    question = problem("mlp, ce")
    wanted = (p for p in question.program.model.parameters() if p.ndim == 1)
    assert list(question.gradients(parameters=wanted)) == ["0.bias", "2.bias"]


def test_a_name_that_is_a_glob_too_is_meant_as_a_name():
    w = torch.randn(4, requires_grad=True)
    question = ub.Problem(
        lambda q, x: (x * q["a[0]"]).sum(1),
        lambda p: p.sum(),
        (torch.randn(5, 4), None),
        parameters={"a[0]": w},
    )
    assert list(question.gradients(parameters="a[0]")) == ["a[0]"]


# ---------------------------------------------------------------- noise


def drop_out() -> ub.Problem:
    model, loss, inputs, targets = case("dropout").build()
    return ub.Problem(model.train(), loss, (inputs, targets))


def test_the_same_seed_gives_the_same_rows():
    def rows(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return drop_out().gradients().flat()

    assert torch.equal(rows(3), rows(3))
    assert not torch.equal(rows(3), rows(4))


def test_one_mask_is_used_for_all_of_a_question():
    torch.manual_seed(3)
    question = drop_out()
    rows, dots, squares, norms = question.compute(
        ub.Gradients(), ub.Dots(), ub.SumOfSquares(), ub.SquaredNorms()
    )
    check(dots, reference.dots(rows), 0)
    check(squares, reference.sum_of_squares(rows), 0)
    check(norms, reference.squared_norms(rows)[0], 0)
    torch.manual_seed(9)
    assert torch.equal(question.gradients().flat(), rows.flat()), (
        "the mask is that of the recorded run"
    )
    assert torch.equal(
        question.compute(ub.SquaredNorms()).total,
        question.compute(ub.SquaredNorms(), memory=1).total,
    )


# ---------------------------------------------------------------- what results say


KINDS = {
    "mlp, ce": dict.fromkeys(("component", "copy", "frozen"), "per-sample"),
    "two batch norms, ce": {"component": "per-component", "copy": "per-copy", "frozen": "frozen"},
    "mlp, contrastive": {"component": "per-component", "copy": "per-copy"},
    "attention between samples": {"component": "per-component", "copy": "per-copy"},
}


@pytest.mark.parametrize("name", KINDS)
def test_results_say_what_they_are_made_of(name):
    for by, kind in KINDS[name].items():
        rows, norms, variance, clipped = compute(
            problem(name),
            ub.Gradients(),
            ub.SquaredNorms(),
            ub.Variance(),
            ub.ClippedSum(1.0),
            by=by,
        )
        for result in (rows, norms, variance, clipped):
            assert (result.by, result.kind) == (by, kind)
            assert kind in repr(result)


def test_flat_results_are_in_the_order_of_the_parameters():
    rows, variance, norms = problem("mlp, ce").compute(
        ub.Gradients(), ub.Variance(), ub.SquaredNorms()
    )
    n = problem("mlp, ce").samples
    assert list(rows) == [k for k, _ in problem("mlp, ce").program.model.named_parameters()]
    assert torch.equal(rows.flat(), torch.cat([r.reshape(n, -1) for r in rows.values()], 1))
    assert torch.equal(variance.flat(), torch.cat([v.reshape(-1) for v in variance.values()]))
    assert torch.equal(norms.flat(), torch.cat(list(norms.values())))
    torch.testing.assert_close(variance.flat(), rows.flat().var(0, unbiased=False))


@pytest.mark.parametrize("name", ["mlp, with weight decay", "two batch norms, with weight decay"])
def test_the_rest_completes_the_gradient(name):
    rows = problem(name).gradients()
    assert rows.rest
    gradient = problem(name).gradient()
    for k, g in gradient.items():
        torch.testing.assert_close(rows[k].sum(0) + rows.rest[k], g, rtol=1e-10, atol=1e-12)
    chosen = problem(name).gradients(parameters="0.*")
    assert set(chosen.rest) == set(chosen)


@pytest.mark.parametrize("name", ["mlp, ce", "two batch norms, ce"])
def test_without_a_parameter_beside_the_predictions_there_is_no_rest(name):
    assert problem(name).gradients().rest == {}


# ---------------------------------------------------------------- the checker sees what is wrong


WRONG: dict[str, Callable[[Plain], Any]] = {
    "SquaredNorms": lambda rows: {k: r.flatten(1).norm(dim=1) for k, r in rows.items()},
    "SecondMoment": reference.sum_of_squares,
    "Variance": lambda rows: {k: r.var(0, unbiased=True) for k, r in rows.items()},
    "Dots": lambda rows: reference.dots({k: r.roll(1, 0) for k, r in rows.items()}),
    "NoiseScale": lambda rows: per_loss(rows).var(0).sum() / per_loss(rows).mean(0).square().sum(),
    "NormTest": lambda rows: norm_test(rows).sqrt(),
    "OrthogonalityTest": norm_test,
    "EarlyStopping": lambda rows: early_stopping(rows) + 1e-4,
    "ClippedSum": lambda rows: {k: r.sum(0) for k, r in rows.items()},
    "Histogram": lambda rows: histogram({k: r / 5 for k, r in rows.items()}),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_quantity_is_caught(name):
    rows = expected_rows("mlp, ce", "component")
    asked = next(a for a in ASKED if a.name == name)
    check(asked.definition(rows), asked.definition(rows), 0)
    with pytest.raises(AssertionError, match="off by"):
        check(WRONG[name](rows), asked.definition(rows), FLOOR, 1e-7)
