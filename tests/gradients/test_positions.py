"""Samples that are pixels or tokens, against a loop of plain autograd over them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn

import unbatch as ub
from cases.positions import CASES, PositionCase, image
from unbatch.analysis.rules import registry
from unbatch.autodiff import context, dependence, readers
from unbatch.gradients.self_check import trusted
from unbatch.reference import definitions as reference

EACH = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
BY = pytest.mark.parametrize("by", ["component", "copy", "frozen"])
EXACT, FLOOR = 1e-9, 1e-12

Rows = dict[str, Tensor]


def made(case: PositionCase) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = case.build().double().train()
    x, y = case.data()
    if x.is_floating_point():
        x = x.double()
    return model, x, y


@cache
def asked(case: PositionCase) -> tuple[ub.Problem, Rows, Tensor]:
    """The problem, the rows of all positions, and the GGN of each, by definition."""
    model, x, y = made(case)
    problem = ub.Problem(model, case.loss, (x, y), sample_dims=case.dims)
    parameters = dict(model.named_parameters())
    predictions = model(x)
    terms = case.terms(predictions, y)
    if len(terms) > problem.samples:  # a sample has several pixels
        terms = terms.view(problem.samples, -1).sum(1)
    rows = [gradients(term, parameters) for term in terms]
    by_name = {name: torch.stack([row[name] for row in rows]) for name in parameters}
    return problem, by_name, torch.stack(list(ggn_of_each(case, predictions, y, parameters)))


def gradients(value: Tensor, parameters: Rows) -> Rows:
    grads = torch.autograd.grad(
        value, list(parameters.values()), retain_graph=True, materialize_grads=True
    )
    return dict(zip(parameters, grads, strict=True))


def ggn_of_each(
    case: PositionCase, predictions: Tensor, y: Tensor, parameters: Rows
) -> Iterator[Tensor]:
    """`J_nᵀ H_n J_n`, entry by entry of a prediction."""
    point = predictions.detach().requires_grad_()
    (slope,) = torch.autograd.grad(case.loss(point, y), point, create_graph=True)
    slope, outputs = by_position(case, slope), by_position(case, predictions)
    for n in range(len(outputs)):
        jacobian, hessian = [], []
        for c in range(outputs.shape[1]):
            row = gradients(outputs[n, c], parameters)
            jacobian.append(torch.cat([g.flatten() for g in row.values()]))
            (second,) = torch.autograd.grad(slope[n, c], point, retain_graph=True)
            hessian.append(by_position(case, second)[n])
        J, H = torch.stack(jacobian), torch.stack(hessian)
        yield J.T @ H @ J


def by_position(case: PositionCase, t: Tensor) -> Tensor:
    """`[N, C]`; predictions have their samples where inputs have them."""
    front = tuple(range(len(case.dims)))
    return t.movedim(case.dims, front).flatten(0, len(front) - 1).flatten(1)


def near(found: Tensor, expected: Tensor, scale: float = 0.0) -> None:
    assert found.shape == expected.shape
    error = (found - expected).abs().max()
    bound = max(EXACT * expected.abs().max().item(), FLOOR * scale)
    assert error <= bound, f"off by {error:.1e}, allowed {bound:.1e}"


def near_by_name(found: Rows, expected: Rows, scale: float) -> None:
    for name in found:
        near(found[name], expected[name], scale)


def size(rows: Rows) -> float:
    return max(row.abs().max().item() for row in rows.values())


@EACH
def test_rows(case):
    problem, expected, _ = asked(case)
    near_by_name(problem.gradients(), expected, size(expected))
    # By the plan, and not because it was refused and the model run for each position.
    for names in (None, last_layers_below(case, problem.program.model)):
        assert "model" not in {site.way for site in problem.plan(parameters=names).sites}


def last_layers_below(case: PositionCase, model: nn.Module) -> list[str]:
    """The last layer, in order of parameters, of those above which positions are mixed."""
    alone = case.names(model)
    others = [name for name, _ in model.named_parameters() if name not in alone]
    if not others:
        return alone
    layer = others[-1].rpartition(".")[0]
    return [name for name in others if name.rpartition(".")[0] == layer]


@EACH
def test_rows_where_positions_are_alone_take_one_pass(case):
    problem, expected, _ = asked(case)
    names = case.names(problem.program.model)
    near_by_name(problem.gradients(parameters=names), expected, size(expected))
    plan = problem.plan(parameters=names)
    assert (plan.pullbacks == 1) == case.in_one_pass, str(plan)
    generic = [site for site in plan.sites if site.kind == "genericcontraction"]
    assert not generic, str(plan)


@BY
@EACH
def test_all_decompositions_are_one_where_positions_are_alone(case, by):
    problem, expected, _ = asked(case)
    names = case.names(problem.program.model)
    if not case.in_one_pass:
        pytest.skip("a parameter stands where tokens are mixed, too")
    found = problem.gradients(by=by, parameters=names)
    near_by_name(found, expected, size(expected))


@pytest.mark.parametrize("case", [c for c in CASES if c.below], ids=lambda case: case.name)
def test_rows_right_below_the_topmost_batch_norm_have_a_closed_form(case):
    problem, expected, _ = asked(case)
    names = case.names(problem.program.model, below=True)
    near_by_name(problem.gradients(parameters=names), expected, size(expected))
    plan = problem.plan(parameters=names)
    assert plan.pullbacks == 1, str(plan)
    assert {site.way for site in plan.sites} == {"local", "projected"}


@pytest.mark.parametrize("by", ["copy", "frozen"])
@pytest.mark.parametrize("case", [c for c in CASES if c.below], ids=lambda case: case.name)
def test_other_decompositions_right_below_the_topmost_batch_norm(case, by):
    problem, rows, _ = asked(case)
    names = case.names(problem.program.model, below=True)
    found = problem.gradients(by=by, parameters=names)
    reference = {"copy": own_uses, "frozen": with_constant_statistics}[by]
    near_by_name(found, reference(case, names), size(rows))


def own_uses(case: PositionCase, names: list[str]) -> Rows:
    """What the entries of a layer's output that lie at a position contribute to the gradient."""
    model, x, y = made(case)
    outputs: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _, args, out, name=name: outputs.update({name: out}))
    loss = case.loss(model(x), y)
    rows: Rows = {}
    for name in names:
        layer, _, own = name.rpartition(".")
        parameter, out = getattr(model.get_submodule(layer), own), outputs[layer]
        (cotangent,) = torch.autograd.grad(loss, out, retain_graph=True)
        parts = by_position(case, out * cotangent.detach()).sum(1)
        # The layer's own output by its own parameter: nothing else stands between the two.
        of_each = [torch.autograd.grad(p, parameter, retain_graph=True)[0] for p in parts]
        rows[name] = torch.stack(of_each)
    return rows


def with_constant_statistics(case: PositionCase, names: list[str]) -> Rows:
    """Rows of the model whose batch norms have the statistics of this batch as constants."""
    model, x, y = made(case)

    def settle(norm: nn.Module, args: tuple[Tensor]) -> None:
        h = args[0].detach().transpose(0, 1).flatten(1)
        norm.running_mean, norm.running_var = h.mean(1), h.var(1, unbiased=False)
        norm.eval()

    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(settle)
    parameters = {name: model.get_parameter(name) for name in names}
    rows = [gradients(term, parameters) for term in case.terms(model(x), y)]
    return {name: torch.stack([row[name] for row in rows]) for name in names}


@EACH
def test_quantities(case):
    problem, rows, _ = asked(case)
    model = problem.program.model
    for names in (None, case.names(model), case.names(model, below=True)):
        of_names = rows if names is None else {name: rows[name] for name in rows if name in names}
        scale = size(of_names) ** 2
        quantities = [ub.SquaredNorms(), ub.SumOfSquares(), ub.Dots(), ub.Variance()]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ub.MixedSamplesWarning)
            norms, squares, dots, variance = problem.compute(*quantities, parameters=names)
        of_each, total = reference.squared_norms(of_names)
        near_by_name(norms, of_each, scale)
        near(norms.total, total, scale)
        near_by_name(squares, reference.sum_of_squares(of_names), scale)
        near(dots, reference.dots(of_names), scale)
        near_by_name(variance, reference.variance(of_names), scale)


@EACH
def test_curvature(case):
    problem, rows, of_each = asked(case)
    names = case.names(problem.program.model)
    places = torch.cat([torch.full((row[0].numel(),), name in names) for name, row in rows.items()])
    for chosen, mine in ((None, torch.ones_like(places)), (names, places)):
        expected = of_each[:, mine][:, :, mine]
        G = problem.ggn(parameters=chosen)
        scale = expected.abs().max().item()
        near(G.diag(), expected.sum(0).diagonal(), scale)
        near(G.diag(per_component=True), expected.diagonal(dim1=1, dim2=2), scale)
        near(G.trace(), expected.sum(0).trace(), scale)
        v = torch.randn(int(mine.sum()), dtype=torch.float64)
        near(G @ v, expected.sum(0) @ v, scale)


def test_batch_statistics_of_pixels_stand_for_all_columns():
    few = next(c for c in CASES if c.name == "batch norm of each pixel")
    problem, _, of_each = asked(replace(few, data=lambda: image(6, 6)))
    near(problem.ggn().diag(per_component=True), of_each.diagonal(dim1=1, dim2=2))
    pullbacks = problem.plan(ub.DiagGGN()).pullbacks
    assert pullbacks < problem.samples, pullbacks


class Detour(nn.Module):
    """Sums over pixels and takes differences again: each is alone, which no rule can see."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(4, 4, 1)

    def forward(self, h: Tensor) -> Tensor:
        return self.inner(h).cumsum(3).diff(dim=3, prepend=torch.zeros_like(h[..., :1]))


def test_what_is_declared_independent_is_started_afresh_nowhere(monkeypatch):
    detour = Detour()
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), detour, nn.Tanh(), nn.Conv2d(4, 3, 1)
    ).double()
    monkeypatch.setattr(registry, "ASSUMED_MODULES", {id(detour): detour})
    case = replace(CASES[0], build=lambda: net, data=image)
    problem, expected, _ = asked(case)
    for names in (None, ["1*"], ["3*"], ["0*", "3*"]):
        near_by_name(problem.gradients(parameters=names), expected, size(expected))
        assert "model" not in {site.way for site in problem.plan(parameters=names).sites}
    assert problem.plan(parameters=["3*"]).pullbacks == 1


# What is wrong is seen: owners that were guessed wrongly, and a guess that is taken for a proof.


def shifted(found):
    """Guess the next position's reader everywhere but at the predictions."""

    def guess(self, step, outs):
        before = set(self.owners)
        found(self, step, outs)
        for value in set(self.owners) - before:
            self.owners[value] = (self.owners[value] + 1) % self.plan.samples

    return guess


@pytest.mark.parametrize("name", ["u-net", "language model", "places of pixels"])
def test_a_wrong_guess_costs_passes_and_no_row(name, monkeypatch):
    case = next(c for c in CASES if c.name == name)
    _, expected, _ = asked(case)
    monkeypatch.setattr(readers._Readers, "_pass", shifted(readers._Readers._pass))
    model, x, y = made(case)
    problem = ub.Problem(model, case.loss, (x, y), sample_dims=case.dims)
    names = case.names(model)
    near_by_name(problem.gradients(parameters=names), expected, size(expected))
    plan = problem.plan(parameters=names)
    assert plan.pullbacks == 1 + problem.samples
    assert "model" not in {site.way for site in plan.sites}  # the plan is right


def test_a_guess_that_is_taken_for_a_proof_is_caught(monkeypatch):
    case = next(c for c in CASES if c.name == "fully convolutional, batch norms")
    model, x, y = made(case)
    problem = ub.Problem(model, case.loss, (x, y), sample_dims=case.dims)
    right = problem._recorded().analysis.context
    parameters = dict(model.named_parameters())
    assert trusted(right, parameters, "component", 2**30)

    def keeps_separate(self, step, outs, reads):
        return all(self.owned.owners(o).separate for o in outs)

    monkeypatch.setattr(dependence._Separation, "_keeps_separate", keeps_separate)
    wrong = replace(right, schedules={}, trust={}, tested=context.Tested())
    assert not trusted(wrong, parameters, "component", 2**30)


def test_rows_in_another_order_are_caught():
    problem, expected, _ = asked(CASES[0])
    with pytest.raises(AssertionError, match="off by"):
        near(problem.gradients()["head.weight"], expected["head.weight"].flip(0))
