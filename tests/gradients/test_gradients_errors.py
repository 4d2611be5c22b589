"""What questions about rows refuse: one clear error of the right class, with the value and the
remedy.

Every refusal changes nothing, and the problem can be asked on.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unbatch as ub
from cases.autograd_state import state
from cases.gradients import Twice
from cases.state import assert_unchanged

N, D, C = 5, 4, 3

# ---------------------------------------------------------------- problems


def loss(p: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(p, y)


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(N, D), torch.arange(N) % C


def plain() -> ub.Problem:
    return ub.Problem(
        nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D), nn.Linear(D, C)), loss, data()
    )


def partly_frozen() -> ub.Problem:
    problem = plain()
    problem.program.model[0].requires_grad_(False)
    return problem


def all_frozen() -> ub.Problem:
    problem = plain()
    problem.program.model.requires_grad_(False)
    return problem


class Net(nn.Module):
    """Two linear layers and a plain function of them."""

    def __init__(self, run: Callable[["Net", Tensor], Tensor]) -> None:
        super().__init__()
        self.hidden, self.head, self.run = nn.Linear(D, D), nn.Linear(D, C), run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def with_forward(run: Callable[[Net, Tensor], Tensor], of: Callable = loss) -> ub.Problem:
    return ub.Problem(Net(run), of, data())


def attending() -> ub.Problem:
    def run(net: Net, x: Tensor) -> Tensor:
        q = net.hidden(x)
        return net.head((q @ q.t()).softmax(1) @ x)

    return with_forward(run)


def rolling() -> ub.Problem:
    def run(net: Net, x: Tensor) -> Tensor:
        h = net.hidden(x)
        return net.head(h + h.roll(1, 0))

    return with_forward(run)


def own_derivative() -> ub.Problem:
    def run(net: Net, x: Tensor) -> Tensor:
        h = Twice.apply(net.hidden(x))
        return net.head(h - h.mean(0))

    return with_forward(run)


def own_derivative_and_loss() -> ub.Problem:
    class Own(Net):
        def forward(self, x: Tensor) -> Any:
            h = Twice.apply(self.hidden(x))
            return {"logits": self.head(h), "loss": self.head(h).square().mean()}

    return ub.Problem(Own(lambda net, x: x), batch=torch.randn(N, D))


def no_axis() -> ub.Problem:
    return with_forward(lambda net, x: net.head(x).mean(0), lambda p, y: p.square().sum())


def a_number() -> ub.Problem:
    return with_forward(lambda net, x: net.head(x).square().sum(), lambda p, y: p)


def own_loss_only() -> ub.Problem:
    class Own(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.hidden(x)).square().mean()

    return ub.Problem(Own(lambda net, x: x), batch=torch.randn(N, D))


# ---------------------------------------------------------------- refused


@dataclass(frozen=True)
class Refusal:
    """`ask` raises `error`, whose text has all of `says`: the value, and what to do."""

    name: str
    ask: Callable[[ub.Problem], Any]
    says: tuple[str, ...]
    build: Callable[[], ub.Problem] = plain
    error: type[ub.UnbatchError] = ub.InputError


def rows(by: Any = "component", **options: Any) -> Callable[[ub.Problem], Any]:
    return lambda problem: problem.gradients(by, **options)


def quantity(*quantities: Any, **options: Any) -> Callable[[ub.Problem], Any]:
    return lambda problem: problem.compute(*quantities, **options)


def buffers(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[ub.Problem], Any]:
    def ask(problem: ub.Problem) -> Any:
        good = {k: torch.zeros(N, *p.shape) for k, p in problem.program.model.named_parameters()}
        return problem.gradients(out=change(good))

    return ask


KINDS_OF_ROWS = ("'component'", "'copy'", "'frozen'")
NAMES = ("names", "globs", "'0.weight'")

REFUSALS = [
    Refusal("by a word", rows("samples"), ("'samples'", *KINDS_OF_ROWS)),
    Refusal("by another case", rows("Component"), ("'Component'", *KINDS_OF_ROWS)),
    Refusal("by nothing", rows(None), ("None", *KINDS_OF_ROWS)),
    Refusal("by a list", rows(["copy"]), ("['copy']", *KINDS_OF_ROWS)),
    Refusal(
        "quantities by a word",
        quantity(ub.SquaredNorms(), by="sample"),
        ("'sample'", *KINDS_OF_ROWS),
    ),
    Refusal(
        "a misspelt name",
        rows(parameters="0.wieght"),
        ("'0.wieght'", "Did you mean '0.weight'", *NAMES),
    ),
    Refusal(
        "a misspelt name among others",
        rows(parameters=["0.weight", "2.bais"]),
        ("'2.bais'", "mean '2.bias'"),
    ),
    Refusal("a name of nothing", rows(parameters="encoder"), ("'encoder'", *NAMES)),
    Refusal("a glob that matches nothing", rows(parameters="layers.*"), ("'layers.*'", *NAMES)),
    Refusal("a buffer", rows(parameters="1.running_mean"), ("'1.running_mean'", *NAMES)),
    Refusal(
        "a tensor that is none", rows(parameters=torch.randn(D, D)), ("tensor", "(4, 4)", *NAMES)
    ),
    Refusal(
        "an equal tensor",
        lambda p: p.gradients(parameters=p.program.model[0].weight.clone()),
        ("(4, 4)", *NAMES),
    ),
    Refusal(
        "quantities by a misspelt name",
        quantity(ub.SquaredNorms(), parameters="2.weigth"),
        ("Did you mean '2.weight'",),
    ),
    Refusal("no name at all", rows(parameters=[]), ("[]", *NAMES)),
    Refusal("a number as a name", rows(parameters=3), ("3", *NAMES)),
    Refusal("a number among names", rows(parameters=["0.weight", 3]), ("3", *NAMES)),
    Refusal(
        "a parameter that requires no gradient",
        rows(parameters="0.weight"),
        ("'0.weight'", "does not require a gradient", "requires_grad_(True)", "leave it out"),
        partly_frozen,
    ),
    Refusal(
        "a tensor that requires no gradient",
        lambda p: p.gradients(parameters=p.program.model[0].bias),
        ("'0.bias'", "requires_grad_(True)"),
        partly_frozen,
    ),
    Refusal(
        "a glob over some that require none",
        rows(parameters="*.weight"),
        ("'0.weight'", "leave it out"),
        partly_frozen,
    ),
    Refusal(
        "nothing trainable",
        rows(),
        ("No parameter requires a gradient", "requires_grad_(True)"),
        all_frozen,
    ),
    Refusal(
        "quantities of nothing trainable",
        quantity(ub.SquaredNorms()),
        ("requires_grad_(True)",),
        all_frozen,
    ),
    Refusal("no memory", rows(memory=0), ("memory=", "greater than zero", "got 0")),
    Refusal("less than no memory", rows(memory=-1), ("memory=", "got -1")),
    Refusal("memory in words", rows(memory="1GB"), ("number of bytes", "'1GB'")),
    Refusal("memory that is a flag", rows(memory=True), ("number of bytes", "True")),
    Refusal("memory that is no number", rows(memory=float("nan")), ("number of bytes", "nan")),
    Refusal(
        "memory for quantities", quantity(ub.SquaredNorms(), memory=[1]), ("number of bytes", "[1]")
    ),
    Refusal(
        "no quantity", quantity(), ("at least one", "None", "unbatch.SquaredNorms()", "gradients()")
    ),
    Refusal("a word as a quantity", quantity("norms"), ("'norms'", "unbatch.SquaredNorms()")),
    Refusal("a class without its arguments", quantity(ub.ClippedSum), ("ClippedSum takes",)),
    Refusal("a class of no quantity", quantity(ub.Problem), ("Problem", "takes quantities")),
    Refusal(
        "a list of quantities",
        quantity([ub.SquaredNorms()]),
        ("[SquaredNorms()]", "takes quantities"),
    ),
    Refusal(
        "one of several that is none", quantity(ub.SquaredNorms(), 3), ("3", "takes quantities")
    ),
    Refusal(
        "predictions without samples",
        rows(),
        ("sample axis", "(3,)", "5 samples", "problem.gradient()"),
        no_axis,
        ub.StructureError,
    ),
    Refusal(
        "a prediction that is a number",
        rows(),
        ("sample axis", "()", "5 samples"),
        a_number,
        ub.StructureError,
    ),
    Refusal(
        "quantities of such",
        quantity(ub.SquaredNorms()),
        ("sample axis", "(3,)"),
        no_axis,
        ub.StructureError,
    ),
    Refusal(
        "frozen attention between samples",
        rows("frozen"),
        ("frozen", "more than statistics", "by='component'", "test_gradients_errors.py"),
        attending,
        ub.StructureError,
    ),
    Refusal(
        "frozen quantities of it",
        quantity(ub.SquaredNorms(), by="frozen"),
        ("by='component'",),
        attending,
        ub.StructureError,
    ),
    Refusal(
        "frozen neighbours",
        rows("frozen"),
        ("more than statistics", "by='component'"),
        rolling,
        ub.StructureError,
    ),
    *(
        Refusal(
            f"{by} rows of a derivative of one's own",
            rows(by),
            (repr(by), "recorded computation", "derivatives", "by='component'"),
            own_derivative,
            ub.StructureError,
        )
        for by in ("copy", "frozen")
    ),
    Refusal(
        "a buffer is missing",
        buffers(lambda b: {k: t for k, t in b.items() if k != "2.bias"}),
        ("out=", "'2.bias'", "[N, *param]"),
    ),
    Refusal(
        "a buffer of another shape",
        buffers(lambda b: b | {"2.bias": torch.zeros(C)}),
        ("out=", "'2.bias'", "(3,)", "(5, 3)"),
    ),
    Refusal(
        "a buffer of another dtype",
        buffers(lambda b: b | {"2.bias": torch.zeros(N, C, dtype=torch.float64)}),
        ("out=", "'2.bias'", "float64", "float32"),
    ),
    Refusal(
        "a buffer on another device",
        buffers(lambda b: b | {"2.bias": torch.zeros(N, C, device="meta")}),
        ("out=", "'2.bias'", "meta", "on cpu"),
    ),
    Refusal(
        "a buffer that is no tensor",
        buffers(lambda b: b | {"2.bias": [0.0] * N}),
        ("out=", "'2.bias'", "list"),
    ),
    Refusal("buffers without names", buffers(lambda b: list(b.values())), ("out=", "list")),
]
EVERY = pytest.mark.parametrize("refusal", [pytest.param(r, id=r.name) for r in REFUSALS])


def check_refusal(refusal: Refusal, error: BaseException) -> None:
    """Raise where class or text are not those of the refusal."""
    assert type(error) is refusal.error, (
        f"{type(error).__name__} in place of {refusal.error.__name__}: {error}"
    )
    text = str(error)
    missing = [word for word in refusal.says if word not in text]
    assert not missing, f"{missing} is not in: {text}"
    assert len(text) < 600, text
    assert "{" not in text, text


def raised(refusal: Refusal, problem: ub.Problem) -> BaseException:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        refusal.ask(problem)
    return caught.value


@EVERY
def test_refused(refusal):
    check_refusal(refusal, raised(refusal, refusal.build()))


@EVERY
def test_refused_again_after_an_answer(refusal):
    """What is kept between questions does not open a back door."""
    problem = refusal.build()
    _ = problem.structure
    first = raised(refusal, problem)
    second = raised(refusal, problem)
    assert (type(first), str(first)) == (type(second), str(second))


@EVERY
def test_refusals_change_nothing(refusal):
    problem = refusal.build()
    for p in list(problem.program.model.parameters())[::2]:
        p.grad = torch.randn_like(p)
    before = state(problem)
    raised(refusal, problem)
    assert_unchanged(before, state(problem))


@EVERY
def test_a_refusal_does_not_stand_in_the_way_of_the_next_question(refusal):
    problem = refusal.build()
    raised(refusal, problem)
    if refusal.build in (plain, partly_frozen, attending, rolling, own_derivative):
        gradient = problem.gradient()
        for name, row in problem.gradients().items():
            torch.testing.assert_close(row.sum(0), gradient[name], rtol=1e-4, atol=1e-6)


def test_only_what_rests_on_the_structure_is_a_structure_error():
    for refusal in REFUSALS:
        assert issubclass(refusal.error, ub.UnbatchError)
        assert refusal.error is ub.StructureError or refusal.build in (
            plain,
            partly_frozen,
            all_frozen,
        )


# ---------------------------------------------------------------- beside them, accepted


ACCEPTED: dict[str, tuple[Callable[[ub.Problem], Any], Callable[[], ub.Problem]]] = {
    "memory as a float": (rows(memory=1e6), plain),
    "memory without end": (rows(memory=float("inf")), plain),
    "one byte": (rows(memory=1), plain),
    "a tuple of names": (rows(parameters=("0.weight", "2.*")), plain),
    "buffers that are more than needed": (
        buffers(lambda b: b | {"another": torch.zeros(2)}),
        plain,
    ),
    "attention between samples by copy": (rows("copy"), attending),
    "attention between samples by component": (rows(), attending),
    "a derivative of one's own by component": (rows(), own_derivative),
    "the rest of the parameters": (rows(parameters="2.*"), partly_frozen),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name):
    ask, build = ACCEPTED[name]
    found = ask(build())
    assert all(torch.isfinite(t).all() and len(t) == N for t in found.values())


@pytest.mark.parametrize("build", [own_loss_only, own_derivative_and_loss])
def test_a_loss_of_its_own_has_rows_where_it_has_samples(build):
    problem = build()
    gradient = problem.gradient()
    for name, row in problem.gradients().items():
        torch.testing.assert_close(row.sum(0), gradient[name], rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------- the checker sees what is wrong


PLANTED: dict[str, BaseException] = {
    "in place of InputError": ValueError("by is 'component', 'copy' or 'frozen'; got 'samples'."),
    "in place of InputError: another": ub.StructureError(
        "by is 'component', 'copy' or 'frozen'; got 'samples'."
    ),
    "is not in": ub.InputError("by is 'component', 'copy' or 'frozen'."),
    "{value": ub.InputError("by is 'component', 'copy' or 'frozen'; got 'samples' {value!r}."),
    "xxx": ub.InputError("by is 'component', 'copy' or 'frozen'; got 'samples'." + 600 * "x"),
}


@pytest.mark.parametrize("says", PLANTED)
def test_a_wrong_refusal_is_caught(says):
    with pytest.raises(AssertionError) as caught:
        check_refusal(REFUSALS[0], PLANTED[says])
    assert says.partition(":")[0] in str(caught.value)


def test_no_refusal_is_caught():
    with pytest.raises(pytest.fail.Exception):
        raised(Refusal("none", rows(), ()), plain())
