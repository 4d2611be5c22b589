"""Losses that are a sum with one term for each sample, of which each may be another function.

What belongs to a sample then is as exact as with one function for all: rows, and the curvature of
each component. The truth is plain autograd in float64.
"""

import pytest
import torch
from torch import nn

import unbatch as ub
from cases.losses import INDEXED, LOSSES, TANGLED

IN_FLOAT32 = "weights by index beside an unweighted penalty"  # has a constant of that type
OWN = [c for c in LOSSES if (c.reduction, c.simd_loss) == INDEXED and c.name != IN_FLOAT32]
# The batch of a trial need not be one where another sample is the largest: proofs do without it.
NOT_TRIED = ("largest", "maximum", "worst", "rare where")
JOINED = []
for case in LOSSES:
    # Both fail, too, for terms that read targets of others, of which a trial says nothing.
    if (
        case.accept_unknown
        or (case.reduction, case.simd_loss) != TANGLED
        or any(w in case.name for w in NOT_TRIED)
    ):
        continue
    JOINED.append(case)


def asked(case):
    """A linear layer under the loss, and its problem."""
    torch.manual_seed(0)
    predictions, targets = case.inputs()
    if not isinstance(predictions, torch.Tensor) or predictions.ndim != 2:
        pytest.skip("the net here has one prediction, a vector")
    net = nn.Linear(5, predictions.shape[1]).double()
    if isinstance(targets, torch.Tensor) and targets.is_floating_point():
        targets = targets.double()
    X = torch.randn(len(predictions), 5).double()
    return net, X, targets, ub.Problem(net, case.loss, (X, targets))


def parts_of(net, X, loss):
    """Rows ``J_nᵀ ∂L/∂F_n`` and parts ``J_nᵀ H_n J_n`` of every sample."""
    predictions = net(X)
    parameters = list(net.parameters())
    (slope,) = torch.autograd.grad(loss(predictions), predictions, retain_graph=True)
    H = torch.autograd.functional.hessian(loss, predictions.detach())
    rows, parts = [], []
    for n, prediction in enumerate(predictions):
        J = torch.stack(
            [
                torch.cat(
                    [g.flatten() for g in torch.autograd.grad(f, parameters, retain_graph=True)]
                )
                for f in prediction
            ]
        )
        rows.append(J.T @ slope[n])
        parts.append(J.T @ H[n, :, n] @ J)
    return torch.stack(rows), torch.stack(parts)


@pytest.mark.parametrize("case", OWN, ids=lambda case: case.name)
def test_what_belongs_to_a_sample_is_exact(case):
    net, X, y, problem = asked(case)
    rows, parts = parts_of(net, X, lambda F: case.loss(F, y))
    assert problem.structure.reduction
    assert not problem.structure.simd_loss
    torch.testing.assert_close(problem.gradients().flat(), rows)
    diagonals = problem.ggn().diag(per_component=True)
    torch.testing.assert_close(diagonals, parts.diagonal(dim1=1, dim2=2))
    torch.testing.assert_close(problem.ggn().to_dense(), parts.sum(0))


@pytest.mark.parametrize("case", OWN, ids=lambda case: case.name)
def test_rows_are_those_of_samples(case):
    assert asked(case)[3].gradients().kind == "per-sample"


def test_terms_that_read_targets_of_others_are_not_called_terms_of_one_sample():
    net, X, y = nn.Linear(4, 3), torch.randn(6, 4), torch.randn(6, 3)
    problem = ub.Problem(net, lambda F, t: (F - t.roll(1, 0)).square().sum(), (X, y))
    assert problem.structure.reduction.status == "unknown"


def test_the_report_says_what_to_hand_over():
    labels = torch.arange(6) % 3
    net, X = nn.Linear(4, 3), torch.randn(6, 4)
    problem = ub.Problem(net, lambda F, _: nn.functional.cross_entropy(F, labels), (X, X))
    (culprit,) = problem.structure.simd_loss.culprits
    assert "one term for each sample" in culprit.why
    assert "Problem(model, loss, (X, y))" in culprit.remedy


def test_a_variance_over_own_terms_warns():
    problem = asked(next(case for case in OWN if case.name == "labels in a closure"))[3]
    with pytest.warns(ub.MixedSamplesWarning, match="SIMD loss"):
        problem.compute(ub.Variance())


@pytest.mark.filterwarnings("ignore::unbatch.ContradictedProofWarning")
@pytest.mark.parametrize("case", JOINED[:30], ids=lambda case: case.name)
def test_a_rule_that_takes_everything_for_a_sum_is_contradicted(case, monkeypatch):
    monkeypatch.setattr("unbatch.analysis.loss_inference._is_additive", lambda evidence: True)
    assert not asked(case)[3].structure.reduction
