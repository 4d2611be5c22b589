"""Products through ops without forward mode: a tangent is needed only where something flows."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

import unbatch as ub
from cases.tangents import BAGS, BY_COLUMNS, CASES, FEATURES, SAMPLES
from unbatch.autodiff.adjoint import AdjointTest, Columns
from unbatch.errors import StructureError


def asked(name):
    torch.manual_seed(0)
    net = CASES[name]().double()
    x = torch.randn(SAMPLES, FEATURES, dtype=torch.float64)
    y = torch.randn(SAMPLES, FEATURES, dtype=torch.float64)
    return net, x, ub.Problem(net, F.mse_loss, (x, y)).ggn()


@pytest.mark.parametrize("name", CASES)
def test_products_are_those_of_the_jacobian(name):
    net, x, G = asked(name)
    parameters = list(net.parameters())
    predictions = net(x)
    rows = []
    for entry in predictions.flatten():
        grads = torch.autograd.grad(entry, parameters, retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([g.flatten() for g in grads]))
    J = torch.stack(rows)
    expected = 2 / predictions.numel() * J.T @ J
    v = torch.linspace(-1, 1, len(expected), dtype=torch.float64)
    assert_close(G @ v, expected @ v)
    assert_close(G.diag(), expected.diagonal())
    assert_close(G.to_dense(), expected)
    assert (G.linearised.way == "columns") == (name in BY_COLUMNS)


@pytest.mark.parametrize("name", BY_COLUMNS)
def test_rows_are_kept_only_where_they_fit(name, monkeypatch):
    _, _, G = asked(name)
    v = torch.ones(G.shape[0], dtype=torch.float64)
    monkeypatch.setattr("unbatch.autodiff.adjoint.KEPT", 0)
    first = G @ v
    monkeypatch.setattr("unbatch.autodiff.adjoint.AT_ONCE", 0)
    assert_close(G @ v, first)


def test_wrong_rows_are_not_believed(monkeypatch):
    """Of a batched backward pass that is wrong, one by one is right; of both, nothing is said."""
    _, _, G = asked(BAGS[0])
    _, _, other = asked(BAGS[0])
    v = torch.ones(G.shape[0], dtype=torch.float64)
    right = other @ v
    push = Columns.push

    def scaled(self, tangents):
        return {i: 2 * t for i, t in push(self, tangents).items()}

    monkeypatch.setattr(Columns, "push", scaled)
    with pytest.raises(StructureError, match="belongs to its backward pass"):
        G @ v
    monkeypatch.setattr(AdjointTest, "agrees", lambda self, pushed: True)
    _, _, believed = asked(BAGS[0])
    assert not torch.allclose(believed @ v, right), "the test is what refuses them"
