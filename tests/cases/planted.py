"""Planted bugs: each makes the analyser wrong about a small program."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import unbatch as ub
from cases.experiments import check_forward, check_loss
from cases.verdicts import check
from unbatch.analysis import interpreter as walk
from unbatch.analysis.domain import folds
from unbatch.analysis.domain.ownership import SHARED, shared
from unbatch.analysis.domain.propagation import Propagation
from unbatch.analysis.rules import registry as rules
from unbatch.analysis.rules.registry import RuleContext, pointwise

N = D = 4  # a square batch: nothing can be told by size alone


class Net(nn.Module):
    def __init__(self, run: Callable):
        super().__init__()
        self.linear, self.norm, self.run = nn.Linear(D, D), nn.BatchNorm1d(D), run

    def forward(self, x):
        return self.run(self, x)


def linear_loss(p, y):
    return (p * y).sum()


@dataclass(frozen=True)
class Planted:
    """`plant(monkeypatch)` makes `verdict` on a program wrong: it is `status`, and in truth it is
    not.
    """

    name: str
    plant: Callable[[pytest.MonkeyPatch], None]
    run: Callable
    verdict: str = "independent_forward"
    loss: Callable = linear_loss

    def problem(self) -> ub.Problem:
        torch.manual_seed(0)
        x, y = torch.randn(2, N, D, dtype=torch.float64)
        return ub.Problem(Net(self.run).double(), self.loss, (x, y))


def as_rule(
    rule: Callable[[RuleContext], object], *ops: str
) -> Callable[[pytest.MonkeyPatch], None]:
    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        for op in ops:
            monkeypatch.setitem(rules.RULES, op, rule)

    return plant


def sum_that_forgets_an_axis(call: RuleContext):
    """Samples along the first of several dims are taken for one."""
    first, *others = call.dims()
    out = call.algebra.reduce("sum", call["self"], others, keepdim=True)
    owner, key = (
        np.full_like(a.take([0], first), fill) for a, fill in ((out.owner, SHARED), (out.key, 7))
    )
    kept = replace(
        out,
        shape=tuple(1 if d in (first, *others) else s for d, s in enumerate(out.shape)),
        owner=owner,
        key=key,
    )
    return kept if call["keepdim"] else shared(call.shape, "sum", call["self"].sources)


def pointwise_mean(call: RuleContext):
    """One entry for each row, whatever the dim."""
    x = call.algebra.pointwise("mean", call["self"])
    return replace(x, shape=call.shape, owner=x.owner[:, 0], key=x.key[:, 0])


def transpose_that_keeps_owners(call: RuleContext):
    return replace(call["self"], shape=call.shape)


def constant_arange(call: RuleContext):
    return shared(call.shape, "arange", (), range(len(call.shape)))


def linear_root(call: RuleContext):
    return call.algebra.pointwise("sqrt", *call.tensors, kind="scale")


def batch_norm_without_statistics(call: RuleContext):
    return [pointwise_of_first(call), *(shared(s, "unused") for s in call.shapes[1:])]


def pointwise_of_first(call: RuleContext):
    return call.algebra.pointwise(call.name, call["input"])


def blind_to_views(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk, "_through_views", lambda *_: None)


def every_meeting_is_symmetric(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "unbatch.analysis.domain.sample_sets.SampleSets._combine_several",
        lambda self, owner, key, of_sets: (SHARED, int(key.sum(dtype=np.uint64))),
    )


def every_fold_is_a_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folds, "ASSOCIATIVE", dict.fromkeys(folds.ASSOCIATIVE, folds.SUM))


def join_that_keeps_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Propagation,
        "join",
        lambda self, a, b: np.where(
            a == SHARED, b, np.broadcast_to(a, np.broadcast_shapes(a.shape, b.shape))
        ),
    )


def deaf_to_branches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unbatch.capture.tracer.Recorder.escape", lambda *_, **__: None)


# --------------------------------------------------------------- programs that they are wrong about


def centred_by_one_number(net, x):
    h = net.linear(x)
    return h - h.sum((0, 1))


def means_of_features(net, x):
    return net.linear(x).mean(0)[:, None] * net.linear.bias


def softmax_over_samples(net, x):
    return net.linear(x).softmax(0)


def transposed(net, x):
    return net.linear(x).t()


def written_through_a_view(net, x):
    h = net.linear(x).clone()
    tail = h[1:]
    tail += h[:-1].clone()
    return h


def normalised(net, x):
    return net.norm(net.linear(x)).tanh()


def scaled_by_index(net, x):
    return net.linear(x) * torch.arange(1.0, N + 1)[:, None]


def weighted_by_position(net, x):
    h = net.linear(x)
    return h - net.linear.bias @ h


def largest_sum(net, x):
    h = net.linear(x)
    return h - h.view(2, 2, D).sum(1).amax(0)


def blended(net, x):
    h = net.linear(x)
    return h + h.roll(1, 0)


def steered_by_the_batch(net, x):
    h = net.linear(x)
    return h * 0.5 if bool(h.mean() > 0) else h


def plain(net, x):
    return net.linear(x)


def root_mean_square(p, y):
    return F.mse_loss(p, y).sqrt()


PLANTED = [
    Planted(
        "a sum forgets an axis", as_rule(sum_that_forgets_an_axis, "sum"), centred_by_one_number
    ),
    Planted("a mean is pointwise", as_rule(pointwise_mean, "mean"), means_of_features),
    Planted(
        "a softmax is pointwise whatever its dim",
        as_rule(pointwise, "_softmax"),
        softmax_over_samples,
    ),
    Planted(
        "a transpose keeps the owners",
        as_rule(transpose_that_keeps_owners, "t", "transpose", "permute"),
        transposed,
    ),
    Planted("a write is not seen through views", blind_to_views, written_through_a_view),
    Planted(
        "batch norm has no statistics",
        as_rule(batch_norm_without_statistics, "native_batch_norm"),
        normalised,
    ),
    Planted(
        "arange is constant", as_rule(constant_arange, "arange"), scaled_by_index, "simd_forward"
    ),
    Planted(
        "every meeting is symmetric",
        every_meeting_is_symmetric,
        weighted_by_position,
        "simd_given_statistics",
    ),
    Planted(
        "a largest sum is one of all samples",
        every_fold_is_a_sum,
        largest_sum,
        "simd_given_statistics",
    ),
    Planted("a pair belongs to its first sample", join_that_keeps_the_first, blended),
    Planted("branches go unseen", deaf_to_branches, steered_by_the_batch),
    Planted("a root is linear", as_rule(linear_root, "sqrt"), plain, "reduction", root_mean_square),
]


# ---------------------------------------------------------------- the checkers


def by_verify(planted: Planted, problem: ub.Problem) -> None:
    verification = problem.verify()
    wrong = {c.name: c.detail for c in verification.checks if c.passed is False}
    assert bool(verification) == (not wrong)
    assert not wrong, wrong


def by_case_table(planted: Planted, problem: ub.Problem) -> None:
    check(problem.structure, {planted.verdict: "fails"}, accept_unknown=True)


def by_properties(planted: Planted, problem: ub.Problem) -> None:
    if planted.verdict == "reduction":
        check_loss(
            problem.structure, lambda p, y: planted.loss(p, y), problem.inputs, problem.targets
        )
    else:
        check_forward(problem.structure, problem.program.model, problem.inputs)


CHECKERS = {"verify": by_verify, "case table": by_case_table, "properties": by_properties}
