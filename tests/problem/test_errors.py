"""What the facade refuses, and what it accepts.

Every refusal is one clear error of the package's own, with the offending value and the remedy, and
changes nothing.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unbatch as ub
from cases.classifier import C, D, N, loss, model, with_nan, x, y
from cases.state import assert_unchanged, state
from unbatch.analysis.rules import registry
from unbatch.analysis.rules import registry as rules

# ---------------------------------------------------------------- refused


def frozen() -> nn.Module:
    return model().requires_grad_(False)


def broken(call: Callable | None = None) -> nn.Module:
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(D, C)

        def forward(self, x):
            raise ZeroDivisionError("seven times nothing")

    return Broken()


class Detached(nn.Linear):
    def __init__(self):
        super().__init__(D, C)

    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


def structure(p: ub.Problem) -> Any:
    return p.structure


def gradient(p: ub.Problem) -> Any:
    return p.gradient()


@dataclass(frozen=True)
class Bad:
    """`build()` or the question raises `error`, whose text has all of `says`: the value, and what
    to do.
    """

    name: str
    build: Callable[[], ub.Problem]
    says: tuple[str, ...]
    error: type[ub.UnbatchError] = ub.InputError
    ask: Callable[[ub.Problem], Any] = structure


P = ub.Problem


class Slots:
    """A mutable object without a dict."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


class Answer(nn.Module):
    """Puts its predictions where `kind` says."""

    def __init__(self, kind: Callable[[Tensor], Any]):
        super().__init__()
        self.linear = nn.Linear(D, C)
        self.kind = kind

    def forward(self, x):
        return self.kind(self.linear(x))


def likelihood(law: Any, y: Tensor) -> Tensor:
    return -law.log_prob(y).mean()


BAD = [
    Bad(
        "an array beside",
        lambda: P(Pair(), loss, ((x(), x().numpy()), y())),
        ("X[1]", "ndarray", "in_dims=((0, None), 0)"),
    ),
    Bad(
        "tensors in an object beside",
        lambda: P(Pair(), loss, ((x(), SimpleNamespace(parts=[x()])), y())),
        ("X[1]", "SimpleNamespace", "in_dims=((0, None), 0)"),
    ),
    Bad(
        "tensors in slots beside",
        lambda: P(Pair(), loss, ((x(), Slots(x())), y())),
        ("X[1]", "Slots", "in_dims=((0, None), 0)"),
    ),
    Bad(
        "targets in an array",
        lambda: P(model(), loss, (x(), y().numpy())),
        ("y[0]", "ndarray", "Pass tensors"),
    ),
    Bad(
        "rows of a law",
        lambda: P(
            Answer(lambda h: torch.distributions.Categorical(None, h)), likelihood, (x(), y())
        ),
        ("Categorical", "Return tensors", "register"),
        ub.StructureError,
        lambda p: p.gradients(),
    ),
    Bad(
        "crosstalk of a law",
        lambda: P(
            Answer(lambda h: torch.distributions.Categorical(None, h)), likelihood, (x(), y())
        ),
        ("Categorical", "Return tensors", "register"),
        ub.StructureError,
        lambda p: p.crosstalk(),
    ),
    Bad(
        "rows of sparse predictions",
        lambda: P(Answer(Tensor.to_sparse), lambda p, y: loss(p.to_dense(), y), (x(), y())),
        ("(5, 3)", "sparse", "to_dense()"),
        ub.StructureError,
        lambda p: p.gradients(),
    ),
    Bad(
        "loss without reduction",
        lambda: P(model(), nn.CrossEntropyLoss(reduction="none"), (x(), y())),
        ("scalar", "(5,)", "reduction='mean'"),
    ),
    Bad(
        "loss that is a float",
        lambda: P(model(), lambda p, y: 3.5, (x(), y())),
        ("scalar tensor", "3.5", "Reduce"),
    ),
    Bad(
        "loss that is nothing",
        lambda: P(model(), lambda p, y: None, (x(), y())),
        ("scalar tensor", "None"),
    ),
    Bad(
        "loss that is a tuple",
        lambda: P(model(), lambda p, y: (p.sum(), y), (x(), y())),
        ("scalar tensor", "tensor"),
    ),
    Bad(
        "targets of another size",
        lambda: P(model(), loss, (x(), y()[:3])),
        ("5", "3", "in_dims=(0, None)"),
    ),
    Bad(
        "inputs of different sizes",
        lambda: P(model(), loss, ((x(), x()[:2]), y())),
        ("X[0]", "X[1]", "5", "2", "in_dims"),
    ),
    Bad(
        "input without a batch axis",
        lambda: P(model(), loss, (torch.tensor(1.0), y())),
        ("X", "()", "no axis 0", "in_dims"),
    ),
    Bad(
        "target without a batch axis",
        lambda: P(model(), loss, (x(), torch.tensor(1))),
        ("y", "()", "no axis 0", "in_dims"),
    ),
    Bad(
        "axis that is not there",
        lambda: P(model(), loss, (x(), y()), in_dims=(2, 0)),
        ("(5, 4)", "axis 2"),
    ),
    Bad(
        "negative axis that is not there",
        lambda: P(model(), loss, (x(), y()), in_dims=(-3, 0)),
        ("(5, 4)", "axis -3"),
    ),
    Bad(
        "empty batch",
        lambda: P(model(), loss, (x()[:0], y()[:0])),
        ("no samples", "(0, 4)", "at least one"),
    ),
    Bad(
        "no input per sample",
        lambda: P(model(), loss, (x(), y()), in_dims=(None, 0)),
        ("None", "At least one input"),
    ),
    Bad(
        "inputs that are no tensors",
        lambda: P(model(), loss, ("text", y())),
        ("str", "torch.as_tensor"),
    ),
    Bad(
        "inputs that are lists of numbers",
        lambda: P(model(), loss, ([1.0, 2.0], y())),
        ("torch.as_tensor",),
    ),
    Bad(
        "in_dims of another structure",
        lambda: P(model(), loss, ((x(), x()), y()), in_dims=({"a": 0}, 0)),
        ("in_dims", "{'a': 0}", "same nesting"),
    ),
    Bad(
        "in_dims that are too many",
        lambda: P(model(), loss, (x(), y()), in_dims=(0, 0, 0)),
        ("in_dims", "(0, 0, 0)"),
    ),
    Bad(
        "in_dims that are words",
        lambda: P(model(), loss, (x(), y()), in_dims=("first", 0)),
        ("in_dims", "first"),
    ),
    Bad(
        "nothing trainable",
        lambda: P(frozen(), loss, (x(), y())),
        ("requires a gradient", "requires_grad_(True)"),
        ask=gradient,
    ),
    Bad(
        "not a number",
        lambda: P(model(), loss, (with_nan(), y())),
        ("NaN", "X[0]", "1 value", "sample 3", "impute"),
    ),
    Bad(
        "parameters without values",
        lambda: P(model().to("meta"), loss, (x(), y())),
        ("'0.weight'", "meta", "to_empty"),
    ),
    Bad(
        "data on another device",
        lambda: P(model(), loss, (x().to("meta"), y())),
        ("meta", "cpu", "Move", ".to("),
    ),
    Bad(
        "targets on another device",
        lambda: P(model(), loss, (x(), y().to("meta"))),
        ("y is on meta", "cpu", ".to("),
    ),
    Bad(
        "model that raises",
        lambda: P(broken(), loss, (x(), y())),
        ("ZeroDivisionError", "seven times nothing", "Broken", "float32 [5, 4]"),
        ub.CaptureError,
    ),
    Bad(
        "loss that raises",
        lambda: P(model(), loss, (x(), torch.randn(N, 2))),
        (
            "RuntimeError",
            "Sequential",
            "inputs float32 [5, 4]",
            "predictions float32 [5, 3] and y float32 [5, 2]",
        ),
        ub.CaptureError,
    ),
    Bad(
        "model and data of other types",
        lambda: P(model(), loss, (x().double(), y())),
        ("RuntimeError", "inputs float64 [5, 4]"),
        ub.CaptureError,
    ),
    Bad(
        "loss and model swapped",
        lambda: P(F.cross_entropy, model(), (x(), y())),
        ("TypeError", "missing", "Are model and loss swapped?"),
        ub.CaptureError,
    ),
    Bad(
        "predictions cut off",
        lambda: P(model(), lambda p, y: F.cross_entropy(p.detach(), y), (x(), y())),
        ("connected to no parameter", "detach()", "test_errors.py:"),
        ub.StructureError,
        gradient,
    ),
    Bad(
        "a model that keeps no graph",
        lambda: P(Detached(), loss, (x(), y())),
        ("connected to no parameter", "no_grad", "test_errors.py:"),
        ub.StructureError,
        lambda p: p.ggn(),
    ),
    Bad(
        "a function of which nobody knows the parameters",
        lambda: P(lambda z: z[:, :C], loss, (x(), y())),
        ("parameters={name: tensor}", "nn.ModuleList"),
        ask=gradient,
    ),
    Bad(
        "quantities in a list",
        lambda: P(model(), loss, (x(), y())),
        ("[SquaredNorms()]", "without a list"),
        ask=lambda p: p.compute([ub.SquaredNorms()]),
    ),
    Bad(
        "a pair for with_batch",
        lambda: P(model(), loss, (x(), y())),
        ("2 entries where there were 1", "with_batch(X, y)"),
        ask=lambda p: p.with_batch((torch.zeros(N, D), y())),
    ),
    Bad(
        "targets for with_batch that are no tensor",
        lambda: P(model(), loss, (x(), y())),
        ("y must be a tensor", "got float"),
        ask=lambda p: p.with_batch(torch.zeros(N, D), 1.0),
    ),
    Bad(
        "a quantity of another name",
        lambda: P(model(), loss, (x(), y())),
        ("'GGN diagonals'", "GGN diagonal"),
        ask=lambda p: p.structure.follows("GGN diagonals"),
    ),
    Bad(
        "model of other inputs",
        lambda: P(model(), loss, ((x(), x()), y())),
        ("TypeError", "positional", "Sequential"),
        ub.CaptureError,
    ),
    Bad(
        "model without a loss",
        lambda: P(model(), batch=x()),
        ("loss", "Tensor", "Problem(model, loss, (X, y))"),
    ),
    Bad("data that are no pair", lambda: P(model(), loss, x()), ("pair (X, y)", "Tensor")),
    Bad("data that are three", lambda: P(model(), loss, (x(), y(), y())), ("pair (X, y)",)),
    Bad("neither data nor batch", lambda: P(model(), loss), ("data=(X, y)", "batch=inputs")),
    Bad(
        "data and batch",
        lambda: P(model(), loss, (x(), y()), batch=x()),
        ("data=(X, y)", "batch=inputs"),
    ),
    Bad("data without a loss", lambda: P(model(), None, (x(), y())), ("loss",)),
    Bad(
        "a model that cannot be called",
        lambda: P("model", loss, (x(), y())),
        ("not callable", "str"),
    ),
    Bad(
        "a loss that does not know what to do with an output",
        lambda: P(
            lambda q, z: {"logits": z}, F.cross_entropy, (x(), y()), parameters={"w": torch.ones(1)}
        ),
        (
            "TypeError",
            "must be Tensor",
            "It was the loss",
            "predictions {logits: float32 [5, 4]} and y int64 [5]",
        ),
        ub.CaptureError,
    ),
    Bad(
        "a class in place of a model",
        lambda: P(nn.Identity, loss, (x(), y())),
        ("The model is the class Identity", "Identity(..)"),
    ),
    Bad(
        "a class in place of a loss",
        lambda: P(model(), nn.CrossEntropyLoss, (x(), y())),
        ("The loss is the class CrossEntropyLoss", "CrossEntropyLoss(..)"),
    ),
    Bad(
        "a function without parameters",
        lambda: P(lambda p, x: x, loss, (x(), y())),
        ("TypeError", "missing 1 required"),
        ub.CaptureError,
    ),
]


@pytest.mark.parametrize("bad", [pytest.param(b, id=b.name) for b in BAD])
def test_refused(bad):
    with pytest.raises(bad.error) as caught:
        bad.ask(bad.build())
    text = str(caught.value)
    missing = [word for word in bad.says if word not in text]
    assert not missing, f"{missing} is not in: {text}"
    assert len(text) < 600, text


@pytest.mark.parametrize("bad", [pytest.param(b, id=b.name) for b in BAD])
def test_refusals_change_nothing(bad, monkeypatch):
    made: list[ub.Problem] = []
    before: list[dict[str, Any]] = []
    init = ub.Problem.__init__

    def watched(self, model, loss=None, data=None, **options):
        inputs, targets = (
            data if isinstance(data, tuple) and len(data) == 2 else (data, options.get("batch"))
        )
        modules = [m for m in (model, loss) if isinstance(m, nn.Module)]
        made.append(
            type(
                "Stub",
                (),
                {
                    "program": type("Stub", (), {"modules": modules}),
                    "inputs": inputs,
                    "targets": targets,
                },
            )
        )
        before.append(state(made[0]))
        init(self, model, loss, data, **options)

    monkeypatch.setattr(ub.Problem, "__init__", watched)
    with pytest.raises(bad.error):
        bad.ask(bad.build())
    assert_unchanged(before[0], state(made[0]))


def test_constructing_computes_nothing():
    ub.Problem(broken(), loss, (x(), y()))


# ---------------------------------------------------------------- accepted


class Pair(nn.Module):
    """Two inputs by name, and one that is shared by the samples."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(D, C)

    def forward(self, left, right=None, table=None):
        out = self.linear(left if right is None else left - right)
        return out if table is None else out + table.mean(0)


def samples_last(net, z):
    return net(z.t())


ACCEPTED: dict[str, Callable[[], ub.Problem]] = {
    "a tensor": lambda: P(Pair(), loss, (x(), y())),
    "a tuple": lambda: P(Pair(), loss, ((x(), x()), y())),
    "a dict": lambda: P(Pair(), loss, ({"right": x(), "left": x()}, y())),
    "an input that is not per sample": lambda: P(
        Pair(), loss, ((x(), x(), torch.randn(7, C)), y()), in_dims=((0, 0, None), 0)
    ),
    "a dict with in_dims": lambda: P(
        Pair(),
        loss,
        ({"left": x(), "table": torch.randn(7, C)}, y()),
        in_dims=({"left": 0, "table": None}, 0),
    ),
    "targets that are not per sample": lambda: P(
        Pair(),
        lambda p, y: ((p - y.mean(0)) ** 2).sum(),
        (x(), torch.randn(9, C)),
        in_dims=(0, None),
    ),
    "targets of mixed kinds": lambda: P(
        Pair(),
        lambda p, y: F.cross_entropy(p, y["labels"], y["weights"]),
        (x(), {"labels": y(), "weights": torch.rand(C)}),
        in_dims=(0, {"labels": 0, "weights": None}),
    ),
    "targets that hold a number": lambda: P(
        Pair(), lambda p, y: F.cross_entropy(p / y[1], y[0]), (x(), (y(), 2.0))
    ),
    "no targets": lambda: P(Pair(), lambda p: p.square().sum(), (x(), None)),
    "a function": lambda: P(
        lambda q, z: z @ q["w"],
        loss,
        (x(), y()),
        parameters={"w": torch.randn(D, C, requires_grad=True)},
    ),
    "a loss with one entry": lambda: P(Pair(), lambda p, y: loss(p, y).reshape(1, 1), (x(), y())),
    "a negative axis": lambda: P(Pair(), loss, (x(), y()), in_dims=(-2, -1)),
}


@pytest.mark.parametrize("build", ACCEPTED.values(), ids=ACCEPTED)
def test_accepted(build):
    asked = build()
    found = asked.structure
    assert found.simd_forward, found.simd_forward
    assert found.simd_loss, found.simd_loss
    assert found.samples == N
    assert asked.verify(), asked.verify()
    assert all(torch.isfinite(g).all() for g in asked.gradient().values())
    assert asked.crosstalk().strength == pytest.approx(0, abs=1e-12)


def test_samples_on_another_axis():
    class Last(nn.Module):
        def forward(self, z):
            return z.t() * 2

    found = ub.Problem(Last(), loss, (torch.randn(C, N), y()), in_dims=(1, 0)).structure
    assert found.simd_forward
    assert found.samples == N


def test_model_with_its_own_loss():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(D, C)

        def forward(self, z, labels=None):
            logits = self.linear(z)
            return (
                {"logits": logits}
                if labels is None
                else {"loss": F.cross_entropy(logits, labels), "logits": logits}
            )

    found = ub.Problem(Own(), batch={"z": x(), "labels": y()}).structure
    assert found.simd_forward
    assert found.reduction
    assert found.predictions == ((N, C),)
    with pytest.raises(ub.InputError, match="labels"):
        _ = ub.Problem(Own(), batch={"z": x()}).structure


# -------------------------------------------------------------- what would be overlooked in silence


class InAList(nn.Module):
    """A plain list registers nothing."""

    def __init__(self):
        super().__init__()
        self.layers, self.head = [nn.Linear(D, D), nn.BatchNorm1d(D)], nn.Linear(D, C)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


HEAD = nn.Linear(C, C)
OVERLOOKED = {
    "modules in a list": (lambda: P(InAList(), loss, (x(), y())), "4 tensors", "[4, 4]"),
    "a head inside the loss": (
        lambda: P(model(), lambda p, y: loss(HEAD(p), y), (x(), y())),
        "2 tensors",
        "[3, 3]",
    ),
    "a weight of all modules": (
        lambda: P(model(), lambda p, y: loss(p * HEAD.bias, y), (x(), y())),
        "1 tensor",
        "[3]",
    ),
}


@pytest.mark.parametrize("name", OVERLOOKED)
@pytest.mark.parametrize(
    "ask",
    [
        gradient,
        ub.Problem.gradients,
        lambda p: p.compute(ub.SquaredNorms()),
        lambda p: p.ggn().trace(),
    ],
)
def test_parameters_that_nobody_registered(name, ask):
    build, count, shape = OVERLOOKED[name]
    problem = build()
    (note,) = problem.structure.notes
    assert note.startswith(f"{count} that require a gradient")
    assert f"{shape} (test_errors.py:" in note
    with pytest.warns(ub.UnregisteredParameterWarning, match="Register them") as caught:
        ask(problem)
    assert {str(w.message) for w in caught} == {note}
    assert {w.filename for w in caught} == {__file__}


def test_what_takes_part_on_purpose_is_not_warned_about():
    teacher = nn.Linear(D, C)

    def distilled(p, y):
        with torch.no_grad():
            soft = teacher(torch.ones(N, D)).softmax(1)
        return F.cross_entropy(p, soft)

    P(model(), distilled, (x(), y())).gradients()
    net = model()
    some = {n: p for n, p in net.named_parameters() if n.startswith("0")}
    functional = P(
        lambda q, z: torch.func.functional_call(net, q, (z,)), loss, (x(), y()), parameters=some
    )
    assert set(functional.gradients()) == {"0.weight", "0.bias"}
    assert functional.structure.notes[0].startswith("2 tensors")


def test_a_target_that_is_broadcast_is_named():
    with pytest.warns(UserWarning, match="different to the input size"):
        found = P(nn.Linear(D, 1), F.mse_loss, (x(), torch.randn(N))).structure
    (culprit,) = found.reduction.culprits
    assert "[5, 1] and [5]" in culprit.why
    assert "unsqueeze" in culprit.remedy


def test_modules_of_one_kind_are_named():
    net = nn.Sequential(*(nn.BatchNorm1d(D) for _ in range(6)), nn.Linear(D, C))
    printed = str(P(net, loss, (x(), y())).structure)
    table = printed.partition("culprits")[2].partition("what follows")[0]
    assert [line.split()[0] for line in table.splitlines()[2:6]] == ["0", "1", "2", "3"]
    assert "+2 more" in table


def test_what_is_printed_is_short():
    problem = ub.Problem(
        nn.Sequential(nn.Linear(D, C), nn.BatchNorm1d(C)), F.cross_entropy, (x(), y())
    )
    assert repr(problem) == f"Problem(Sequential, cross_entropy, {N} samples)"
    assert (
        repr(ub.Problem(model(), batch=x()))
        == f"Problem({type(model()).__name__}, its own loss, {N} samples)"
    )
    structure = problem.structure
    assert repr(structure).startswith(
        f"Structure({N} samples: canonical split ✓, independent forward ✗, SIMD forward ✗"
    )
    assert structure.follows("GGN diagonal").outcome == "exact"
    assert str(structure.reduction) == "reduction: holds (proved)"
    assert (
        str(structure.simd_given_statistics)
        == f"SIMD given statistics: holds (proved), R = {2 * C} batch statistics"
    )
    assert str(structure.independent_forward).startswith(
        "independent forward: fails (witness), replacing sample"
    )


def test_one_sample_leaves_the_forward_open_where_others_like_it_are_the_same():
    found = ub.Problem(nn.Embedding(D, C), loss, (y()[:1], y()[:1])).structure
    for verdict in (found.independent_forward, found.simd_forward, found.simd_given_statistics):
        assert verdict.status == "unknown"
        assert "one sample" in verdict.note
    problem_of_one = ub.Problem(nn.Linear(D, C), loss, (x()[:1], y()[:1]))
    assert problem_of_one.verify()
    assert problem_of_one.gradient()["weight"].shape == (C, D)


# ---------------------------------------------------------------- declared by the user


class Opaque(nn.Module):
    """Acts on each sample alone, in a way that cannot be seen."""

    def forward(self, z):
        return z * torch.from_numpy(z.detach().abs().amax(1, keepdim=True).numpy())


@pytest.fixture
def declarations(monkeypatch) -> None:
    """What a test declares is forgotten after it."""
    monkeypatch.setattr(rules, "CUSTOM", dict(rules.CUSTOM))
    monkeypatch.setattr(rules, "ASSUMED", dict(rules.ASSUMED))
    monkeypatch.setattr(registry, "ASSUMED_MODULES", dict(registry.ASSUMED_MODULES))


@pytest.mark.usefixtures("declarations")
def test_assumed_module():
    net = nn.Sequential(nn.Linear(D, D), Opaque(), nn.Linear(D, C))
    same = ub.Problem(net, loss, (x(), y()))
    assert same.structure.independent_forward.status == "unknown"
    ub.assume_independent(net[1])
    found = same.structure
    assert (found.independent_forward.status, found.independent_forward.basis) == (
        "holds",
        "assumed",
    )
    assert found.assumptions == ("1",)
    assert ub.Problem(nn.Linear(D, C), loss, (x(), y())).structure.assumptions == ()
    assert same.verify()


@pytest.mark.usefixtures("declarations")
def test_a_wrong_assumption_is_found():
    net = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D))
    ub.assume_independent(net[1])
    same = ub.Problem(net, loss, (x(), y()))
    assert same.structure.independent_forward.basis == "assumed"
    assert not same.verify()


@pytest.mark.parametrize("nonsense", ["conv", 3, None, nn.Linear, torch.relu, torch.ops.aten.relu])
def test_nonsense_cannot_be_assumed(nonsense):
    with pytest.raises(ub.InputError, match="assume_independent takes") as caught:
        ub.assume_independent(nonsense)
    assert repr(nonsense) in str(caught.value)


@torch.library.custom_op("unbatch_tests::centre", mutates_args=())
def centre(z: Tensor) -> Tensor:
    return z - z.mean(0)


centre.register_fake(torch.empty_like)
OP = torch.ops.unbatch_tests.centre.default


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(D, C)

    def forward(self, z):
        return self.linear(centre(z))


def centring(call: rules.RuleContext) -> Any:
    z = call.tensors[0]
    return call.algebra.pointwise(
        "centre", z, call.algebra.reduce("mean", z, [0], keepdim=True), kind="sub"
    )


@pytest.mark.usefixtures("declarations")
def test_a_rule_for_an_op_of_ones_own():
    same = ub.Problem(Custom(), loss, (x(), y()))
    before = same.structure
    assert before.simd_given_statistics.status == "unknown"
    assert before.unknown_ops
    assert before.custom_rules == ()
    assert any("register_rule" in c.remedy for c in before.simd_given_statistics.culprits)
    ub.register_rule(OP, centring)
    after = same.structure
    assert (after.simd_given_statistics.status, after.simd_given_statistics.basis) == (
        "holds",
        "proved",
    )
    assert after.custom_rules == (str(OP),)
    assert after.unknown_ops == ()
    assert after.statistics_size == D


@pytest.mark.usefixtures("declarations")
def test_an_op_can_be_assumed():
    same = ub.Problem(Custom(), loss, (x(), y()))
    ub.assume_independent(OP)
    assert same.structure.independent_forward.basis == "assumed"
    assert str(OP) in same.structure.assumptions
    assert not same.verify()


@pytest.mark.usefixtures("declarations")
def test_a_second_rule_is_refused():
    ub.register_rule(OP, centring)
    with pytest.raises(ub.InputError, match="replace=True") as caught:
        ub.register_rule(OP, centring)
    assert str(OP) in str(caught.value)
    # The new rule is in use. It is wrong about this op, which the trial finds and says.
    ub.register_rule(OP, rules.pointwise, replace=True)
    with pytest.warns(ub.ContradictedProofWarning, match=re.escape(f"a registered rule ({OP})")):
        verdict = ub.Problem(Custom(), loss, (x(), y())).structure.independent_forward
    assert (verdict.status, verdict.basis) == ("fails", "witness")


@pytest.mark.usefixtures("declarations")
def test_built_in_rules_are_kept():
    with pytest.raises(ub.InputError, match="already has a rule"):
        ub.register_rule(torch.ops.aten.mean.dim, rules.pointwise)
    with pytest.raises(ub.InputError, match=r"OpOverload|\.default"):
        ub.register_rule("my::op", rules.pointwise)


# ---------------------------------------------------------------- tensors of other kinds


def test_a_sparse_embedding_has_dense_gradients():
    def problem(sparse: bool) -> ub.Problem:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Embedding(9, 4, sparse=sparse), nn.Linear(4, 3))
        words = torch.randint(9, (6,))
        return ub.Problem(net, F.cross_entropy, (words, torch.arange(6) % 3))

    sparse, dense = problem(True), problem(False)
    torch.testing.assert_close(sparse.gradients().flat(), dense.gradients().flat())
    torch.testing.assert_close(sparse.gradient(), dense.gradient())
    torch.testing.assert_close(sparse.ggn().diag(), dense.ggn().diag())
    assert sparse.structure.independent_forward


def test_a_lazy_layer_is_refused_in_words():
    with pytest.raises(ub.InputError, match="lazy"):
        ub.Problem(nn.LazyLinear(3), F.cross_entropy, (torch.randn(6, 4), torch.arange(6) % 3))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused_in_words():
    nested = torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)])
    with pytest.raises(ub.InputError, match="nested"):
        ub.Problem(nn.Linear(4, 3), lambda o: o.sum(), (nested, None))


def test_parameters_swapped_in_place_are_seen():
    net = nn.Sequential(nn.Linear(4, 3))
    data = (torch.randn(6, 4), torch.arange(6) % 3)
    problem = ub.Problem(net, F.cross_entropy, data)
    problem.gradients()
    torch.utils.swap_tensors(net[0].weight, nn.Parameter(torch.randn(3, 4)))
    fresh = ub.Problem(net, F.cross_entropy, data)
    torch.testing.assert_close(problem.gradients().flat(), fresh.gradients().flat())
