"""No hidden state: what a question computes does not depend on what was looked at before it.

And what it costs in forward passes, which are counted.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import unbatch as ub
from cases.ways import by_statistics
from unbatch.capture.graph import Graph
from unbatch.capture.program import Program
from unbatch.curvature.ggn import GGN
from unbatch.problem import spot_check

SAMPLES, FEATURES, CLASSES = 6, 5, 3


def net(norms: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(FEATURES, 8)]
    for _ in range(norms):
        layers += [nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Linear(8, CLASSES)).double()


def problem_of(norms: int) -> ub.Problem:
    model = net(norms)
    X = torch.randn(SAMPLES, FEATURES, dtype=torch.float64)
    return ub.Problem(model, F.cross_entropy, (X, torch.randint(CLASSES, (SAMPLES,))))


# --- what was looked at changes nothing -----------------------------------------------------------

LOOKS = {
    "printed": repr,
    "root": lambda G: G.root,
    "eigenvectors": lambda G: G.eigh(),
    "diagonal": lambda G: G.diag(),
}


def products(G):
    v = torch.linspace(-1, 1, G.shape[0], dtype=G.dtype)
    return {"product": G @ v, "eigenvalues": G.eigvalsh(), "logdet": G.logdet(0.1)}


def assert_the_same_bits(G, look):
    """Raise where products or eigenvalues change with a look at the matrix."""
    before = products(G)
    look(G)
    for name, after in products(G).items():
        assert torch.equal(before[name], after), f"{name} has changed by a look at the matrix"


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("norms", [0, 2])
def test_a_look_at_the_matrix_changes_no_bit(norms, look):
    assert_the_same_bits(problem_of(norms).ggn(), LOOKS[look])


def test_a_matrix_that_multiplies_by_its_root_once_that_is_known_is_caught():
    class Forgetful(GGN):
        @property
        def _hessian_times(self):
            if "root" in vars(self):
                return self.root.hessian_times
            return self.point.curvature.loss.hessian_times

        def eigvalsh(self):
            return torch.zeros(1)

        def logdet(self, damping):
            return torch.zeros(1)

    with pytest.raises(AssertionError, match="product has changed"):
        assert_the_same_bits(Forgetful(problem_of(0).ggn().point), repr)


# --- forward passes -------------------------------------------------------------------------------


class Passes:
    """Counts replays of the steps between the inputs and the predictions, and runs of the model."""

    def __init__(self, monkeypatch, problem):
        self.count, run, predict = 0, Graph.run, Program.predict
        fewest = len(problem._session.graph.forward_steps) / 2

        def replayed(graph, feed, wanted, **options):
            steps = options.get("steps")
            steps = graph.steps if steps is None else steps
            forward = {step.index for step in graph.forward_steps}
            self.count += len(forward & {step.index for step in steps}) > fewest
            return run(graph, feed, wanted, **options)

        def called(program, inputs):
            self.count += 1
            return predict(program, inputs)

        # Spot checks run the model as often as there is time, which is not what is counted.
        monkeypatch.setattr(spot_check, "SHARE", 0.0)
        monkeypatch.setattr(Graph, "run", replayed)
        monkeypatch.setattr(Program, "predict", called)

    def of(self, question, problem):
        self.count = 0
        question(problem)
        return self.count


QUESTIONS = {
    "rows": lambda problem: problem.gradients(),
    "diagonal as a quantity": lambda problem: problem.compute(ub.DiagGGN()),
    "diagonal": lambda problem: problem.ggn().diag(),
    "trace": lambda problem: problem.ggn().trace(),
    "product": lambda problem: problem.ggn() @ torch.ones(problem.ggn().shape[0]),
    "eigenvalues": lambda problem: problem.ggn().eigvalsh(),
    "diagonal of blocks": lambda problem: problem.ggn(blocks="module").diag(),
    "trace of blocks": lambda problem: problem.ggn(blocks="module").trace(),
}
CHECKED = 2  # the plain replay and the sweep of a self-check, once for a plan


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("norms", [0, 1, 2])
def test_a_question_runs_the_batch_forward_once(monkeypatch, norms, question):
    problem = problem_of(norms)
    assert problem.structure  # recorded and judged before anything is counted
    passes = Passes(monkeypatch, problem)
    first = passes.of(QUESTIONS[question], problem)
    assert first == (1 if question == "product" else 1 + CHECKED)
    assert passes.of(QUESTIONS[question], problem) == 1


def test_by_way_of_statistics_the_batch_runs_with_and_without_them(monkeypatch):
    """Once as it is, and once with statistics held constant for each of what goes on there: vjps
    and rows.
    """
    monkeypatch.setattr("unbatch.curvature.strategy.estimate_cost", by_statistics)
    problem = problem_of(2)
    assert problem.structure
    passes = Passes(monkeypatch, problem)
    passes.of(QUESTIONS["diagonal"], problem)
    for question in ("diagonal as a quantity", "diagonal", "eigenvalues"):
        assert passes.of(QUESTIONS[question], problem) == 3


# --- asserts compute nothing ----------------------------------------------------------------------

SCRIPT = """
from dataclasses import replace
import torch, unbatch as ub
from torch import nn
from torch.nn import functional as F

def net(*layers):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), *layers, nn.ReLU(), nn.Linear(5, 3)).double()

def numbers(*tensors):
    return [round(float(t.double().square().sum()), 9) for t in tensors]

X, y = torch.linspace(-1, 1, 24).double().sin().view(6, 4), torch.arange(6) % 3
norm = lambda: nn.BatchNorm1d(5)
vector = torch.ones(100).double()
questions = [
    lambda p: str(p.diagram()),
    lambda p: p.structure,
    lambda p: numbers(*p.gradients().values()),
    lambda p: numbers(*p.compute(ub.DiagGGN()).values(), *p.compute(ub.SquaredNorms()).values()),
    lambda p: numbers(p.ggn().diag(), p.ggn().eigvalsh(), p.ggn().trace()),
    lambda p: numbers(p.ggn().solve(vector[: p.ggn().shape[0]], 0.1)),
    lambda p: numbers(p.ggn(blocks="parameter").diag()),
    lambda p: replace(p.plan(ub.DiagGGN(), memory=2**28), seconds=None),
    lambda p: str(p.verify()),
    lambda p: str(p.crosstalk()),
]
for model in (net(), net(norm()), net(norm(), nn.Linear(5, 5), norm())):
    for question in questions:
        print(question(ub.Problem(model, F.cross_entropy, (X, y))))
"""


def printed(*flags: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(Path(ub.__file__).parent.parent)}
    run = [sys.executable, *flags, "-c", SCRIPT]
    done = subprocess.run(run, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_answers_are_the_same_without_asserts():
    assert printed("-O") == printed()
