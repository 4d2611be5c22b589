"""The grammar of recordings: every planted breach of it is caught, with the step and what is wrong.

`conftest.py` holds every graph against it that any test makes or changes.
"""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from unbatch.capture.check import GraphError, check_graph
from unbatch.capture.graph import Graph, HostRead, ModuleCall
from unbatch.capture.program import Program, record
from unbatch.capture.steps import Ref, Value

N, D = 4, 3


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(D, D), nn.BatchNorm1d(D)

    def forward(self, x):
        h = self.norm(self.linear(x))
        h[:, 0].mul_(2)
        return h.relu()


@pytest.fixture
def graph() -> Graph:
    model = Net()
    program = Program(model, F.cross_entropy, dict(model.named_parameters()))
    return record(program, (torch.randn(N, D),), torch.arange(N) % D)[0]


def step_named(graph, name):
    return next(s for s in graph.steps if s.name == name)


def with_step(graph, step, **changes):
    steps = list(graph.steps)
    steps[step.index] = replace(step, **changes)
    return replace(graph, steps=steps)


def with_value(graph, i, **changes):
    values = list(graph.values)
    values[i] = replace(values[i], **changes)
    return replace(graph, values=values)


def last_value(graph):
    return Ref(len(graph.values) - 1)


BREACHES = {
    "steps out of order": (
        lambda g: replace(g, steps=[*g.steps[1:], g.steps[0]]),
        "says that it is step 1",
    ),
    "read before it is made": (
        lambda g: with_step(g, g.steps[0], args=(last_value(g),)),
        "before it is made",
    ),
    "a value that is not there": (
        lambda g: with_step(g, g.steps[0], args=(Ref(len(g.values)),)),
        "reads value",
    ),
    "made twice": (
        lambda g: with_step(g, g.steps[1], outs=g.steps[0].outs),
        "which step 0 has made",
    ),
    "a write that is forgotten": (
        lambda g: with_step(g, step_named(g, "mul_"), writes=()),
        r"\(mul_\) writes to 'self', which is not recorded",
    ),
    "a write to what is no argument": (
        lambda g: with_step(g, step_named(g, "relu"), writes=((Ref(0), last_value(g)),)),
        r"\(relu\) writes to value 0, which it does not read",
    ),
    "a value of another step": (
        lambda g: with_value(g, g.steps[1].outs[0].index, step=0),
        "says that step 0 makes it, and step 1 does",
    ),
    "a value that nobody makes": (
        lambda g: replace(g, values=[*g.values, Value((), torch.float32, 0, (), 0)]),
        "and step -1 makes it",
    ),
    "strides of another shape": (lambda g: with_value(g, 0, stride=(1,)), "has the strides"),
    "a model that reads the loss": (
        lambda g: replace(g, after_cut=g.after_cut | {0}),
        "of the model reads",
    ),
    "a prediction that the loss makes": (
        lambda g: replace(
            g, after_cut=frozenset(range(g.values[g.predictions[0].index].step, len(g.steps)))
        ),
        "is made by step",
    ),
    "a step of the loss that is not there": (
        lambda g: replace(g, after_cut=frozenset({len(g.steps)})),
        "are none of the",
    ),
    "an escape before its value": (
        lambda g: replace(g, host_reads=[HostRead(last_value(g), "read", 0, "", "")]),
        "was read by Python before step 0",
    ),
    "a call that ends after the last step": (
        lambda g: replace(g, calls=[ModuleCall("net", 0, len(g.steps) + 1, (), ())]),
        "'net' ran from step 0",
    ),
    "a loss that is not there": (
        lambda g: replace(g, loss=Ref(len(g.values))),
        "an end of the computation",
    ),
}


def test_a_recording_keeps_the_grammar(graph):
    check_graph(graph)
    assert any(s.writes for s in graph.steps)


@pytest.mark.parametrize("name", BREACHES)
def test_a_planted_breach_is_caught(graph, name):
    plant, message = BREACHES[name]
    with pytest.raises(GraphError, match=message):
        check_graph(plant(graph))


def test_a_pass_that_breaks_it_is_caught_by_the_suite(graph, monkeypatch):
    """A planted bug: the first step gets lost."""
    monkeypatch.setattr(graph, "steps", graph.steps[1:])
    with pytest.raises(GraphError):
        graph.in_double()
