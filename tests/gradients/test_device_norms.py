"""Every op by which PyTorch may run a batch norm, held against the one of a CPU.

Which of them it picks is a matter of device, version and export. Whatever holds with
``native_batch_norm`` holds with all of them, to rounding: verdicts, rows, products, diagonals,
spectrum, and the plan, whose reason says whether anything fell back to a slower way.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from torch import nn

import unbatch as ub
from cases.device_kernels import registered
from unbatch.capture import ops

aten = torch.ops.aten
REFERENCE = aten.native_batch_norm.default

# PyTorch differentiates these by an op that needs a weight.
NEED_WEIGHT = (
    "_batch_norm_with_update",
    "_batch_norm_with_update_functional",
    "_batch_norm_no_update",
)


@pytest.fixture(autouse=True, scope="module")
def _kernels():
    with registered():
        yield


@dataclass(frozen=True)
class Case:
    """One op as one kind of layer calls it."""

    op: torch._ops.OpOverload
    training: bool
    affine: bool = True
    running: bool = True

    def __str__(self):
        words = [str(self.op).removeprefix("aten.").removesuffix(".default")]
        words.append("train" if self.training else "eval")
        words += [] if self.affine else ["not affine"]
        words += [] if self.running else ["no running statistics"]
        return ", ".join(words)

    def on(self, op):
        return Case(op, self.training, self.affine, self.running)


def cases():
    """Each op with everything that its schema allows."""
    overloads = {}
    for name in ops.names(lambda row: row.batch_norm):
        packet = getattr(aten, name)
        for overload in packet.overloads():
            if not overload.endswith("out"):
                op = getattr(packet, overload)
                overloads[str(op)] = op
    del overloads[str(REFERENCE)]
    out = []
    for op in overloads.values():
        for training in (True, False):
            for affine in (True, False):
                for running in (True, False):
                    case = Case(op, training, affine, running)
                    if allowed(case):
                        out.append(case)
    return out


def allowed(case):
    types = {a.name: str(a.type) for a in case.op._schema.arguments}
    takes_running = "running_mean" in types
    mode = ops.TRAITS[ops.base_name(case.op)].batch_norm.training
    if mode is not None and mode != case.training:
        return False
    needs_weight = types["weight"] == "Tensor" or ops.base_name(case.op) in NEED_WEIGHT
    if not case.affine and needs_weight:
        return False
    if case.running:
        return takes_running
    return case.training and types.get("running_mean", "Optional[Tensor]") == "Optional[Tensor]"


CASES = cases()


class BatchNorm(nn.Module):
    """A batch norm by a certain op."""

    def __init__(self, case, channels):
        super().__init__()
        self.op = case.op
        self.weight = nn.Parameter(torch.rand(channels) + 0.5) if case.affine else None
        self.bias = nn.Parameter(torch.randn(channels)) if case.affine else None
        self.register_buffer("mean", torch.randn(channels) / 4 if case.running else None)
        self.register_buffer("var", torch.rand(channels) + 0.5 if case.running else None)

    def forward(self, x):
        given = {
            "input": x,
            "weight": self.weight,
            "bias": self.bias,
            "running_mean": self.mean,
            "running_var": self.var,
            "training": self.training,
            "momentum": 0.1,
            "exponential_average_factor": 0.1,
            "eps": 1e-5,
            "epsilon": 1e-5,
            "cudnn_enabled": True,
        }
        y = self.op(*(given[a.name] for a in self.op._schema.arguments))
        return y if isinstance(y, torch.Tensor) else y[0]


def make_net(case):
    """Batch norms of images and of vectors, the topmost right above a matrix product."""
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(2, 3, 3),
        BatchNorm(case, 3),
        nn.ReLU(),
        nn.Conv2d(3, 4, 3, bias=False),
        BatchNorm(case, 4),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(16, 5),
        BatchNorm(case, 5),
        nn.ReLU(),
        nn.Linear(5, 3),
    ]
    return nn.Sequential(*layers).double().train(case.training)


def batch():
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(6, 2, 6, 6, generator=generator, dtype=torch.float64)
    return X, torch.arange(6) % 3


@cache
def problem(case):
    return ub.Problem(make_net(case), nn.functional.cross_entropy, batch())


@cache
def ggn(case):
    return problem(case).ggn()


def product(case):
    generator = torch.Generator().manual_seed(2)
    G = ggn(case)
    return G @ torch.randn(G.shape[1], 2, generator=generator, dtype=torch.float64)


NUMBERS = {
    "component rows": lambda case: problem(case).gradients().flat(),
    "copy rows": lambda case: problem(case).gradients(by="copy").flat(),
    "frozen rows": lambda case: problem(case).gradients(by="frozen").flat(),
    "norms": lambda case: problem(case).compute(ub.SquaredNorms()).total,
    "product": product,
    "diagonal": lambda case: ggn(case).diag(),
    "diagonal by component": lambda case: ggn(case).diag(per_component=True),
    "eigenvalues": lambda case: ggn(case).eigvalsh(),
    "trace": lambda case: ggn(case).trace(),
}


def structure(case):
    found = problem(case).structure
    verdicts = [(v.name, v.status, v.basis, v.note, v.weights_depend_on) for v in found.verdicts]
    return verdicts, found.statistics_size, found.unknown_ops, found.notes


def verification(case):
    """Which verdicts were put to which test, and what came out: the numbers are rounding."""
    return [(c.name, c.status, c.test, c.passed) for c in problem(case).verify().checks]


def plan(quantity):
    def of(case):
        plan = problem(case).plan(quantity)
        sites = [(s.parameters, s.module, s.kind, s.way) for s in plan.sites]
        return plan.pullbacks, plan.at_once, plan.reason, sites

    return of


FACTS = {
    "structure": structure,
    "verification": verification,
    "plan of the rows": plan(ub.SquaredNorms()),
    "plan of the diagonal": plan(ub.DiagGGN()),
}


@pytest.mark.parametrize("question", NUMBERS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_numbers(case, question):
    answer = NUMBERS[question]
    torch.testing.assert_close(answer(case), answer(case.on(REFERENCE)))


@pytest.mark.parametrize("question", FACTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_facts(case, question):
    answer = FACTS[question]
    assert answer(case) == answer(case.on(REFERENCE))


@pytest.mark.parametrize("case", [c for c in CASES if c.running], ids=str)
def test_running_statistics_stay(case):
    net = make_net(case)
    before = {name: t.clone() for name, t in net.state_dict().items()}
    ub.Problem(net, nn.functional.cross_entropy, batch()).ggn().diag()
    for name, t in net.state_dict().items():
        torch.testing.assert_close(t, before[name], rtol=0, atol=0)


def test_every_form_is_met():
    """A form that no case allows would be tested by nothing."""
    met = {ops.base_name(case.op) for case in CASES}
    assert met | {"native_batch_norm"} == set(ops.names(lambda row: row.batch_norm))


@pytest.fixture
def swapped():
    """The table says that the mean is where ``1/σ`` is."""

    def forget():
        for cached in (ops.traits, problem, ggn):
            cached.cache_clear()

    true = ops.TRAITS["cudnn_batch_norm"]
    wrong = replace(true.batch_norm, mean=2, invstd=1)
    ops.TRAITS["cudnn_batch_norm"] = replace(true, batch_norm=wrong)
    forget()
    yield Case(aten.cudnn_batch_norm.default, training=True)
    ops.TRAITS["cudnn_batch_norm"] = true
    forget()


@pytest.mark.filterwarnings("ignore:.*a trial on another batch contradicts")
def test_a_wrong_row_is_caught(swapped):
    """By the plan, which fails its own check and falls back: numbers are right even so."""
    answer = FACTS["plan of the diagonal"]
    assert answer(swapped) != answer(swapped.on(REFERENCE))
    answer = NUMBERS["component rows"]
    torch.testing.assert_close(answer(swapped), answer(swapped.on(REFERENCE)))
