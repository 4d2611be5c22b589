"""When a program is recorded again, when its recording is moved to other numbers, and that neither
is ever forgotten.

What is asked after a change is held against a problem made afresh, which knows nothing of before.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unbatch as ub
from cases.classifier import C, D, N, loss, model, with_nan, x, y
from unbatch.capture import guards as guard
from unbatch.capture import isolation
from unbatch.capture import program as capture
from unbatch.problem import spot_check


@pytest.fixture
def records(monkeypatch) -> Iterator[list[str]]:
    """One entry for every recording."""
    seen: list[str] = []
    record = capture.record

    def counted(*args: Any) -> Any:
        seen.append("record")
        return record(*args)

    monkeypatch.setattr(capture, "record", counted)
    return seen


def asked(net: Any = None, **more: Any) -> ub.Problem:
    """A problem that has answered before."""
    out = ub.Problem(net or model(), loss, (x(), y()), **more)
    _ = out.structure
    out.gradients()
    return out


def agrees_with_a_fresh_one(same: ub.Problem) -> None:
    program = same.program
    given = {"parameters": program.parameters} if program.functional else {}
    fresh = ub.Problem(program.model, program.loss, (same.inputs, same.targets), **given)
    assert [v.status for v in same.structure.verdicts] == [
        v.status for v in fresh.structure.verdicts
    ]
    assert same.structure.reduction.weights_depend_on == fresh.structure.reduction.weights_depend_on
    torch.testing.assert_close(same.predictions(), fresh.predictions())
    for by in ("component", "copy"):
        torch.testing.assert_close(same.gradients(by=by).flat(), fresh.gradients(by=by).flat())
    assert list(same.gradients()) == list(fresh.gradients())


def test_questions_share_a_recording(records):
    same = asked()
    found = same.structure
    same.verify()
    same.predictions()
    same.gradient()
    same.crosstalk()
    assert same.structure is found
    assert len(records) == 1


def _with_gradients(p: ub.Problem) -> None:
    for q in p.program.model.parameters():
        q.grad = torch.ones_like(q)


# ------------------------------------------------------------ other numbers: the recording is moved

NUMBERS: dict[str, Callable[[ub.Problem], Any]] = {
    "a parameter in place": lambda p: p.program.model[0].weight.detach().mul_(2),
    "a parameter behind its back": lambda p: p.program.model[0].weight.data.mul_(2),
    "a parameter by an optimizer": lambda p: torch.optim.SGD(
        p.program.model.parameters(), 0.1
    ).step(_with_gradients(p)),
    "a parameter's data replaced": lambda p: setattr(
        p.program.model[0].weight, "data", torch.randn(C, D)
    ),
    "parameters loaded": lambda p: p.program.model.load_state_dict(model().state_dict()),
    "a buffer": lambda p: p.program.model[1].running_mean.add_(1),
    "the data": lambda p: p.inputs.mul_(2),
    "the targets": lambda p: p.targets.zero_(),
}


@pytest.mark.parametrize("change", NUMBERS.values(), ids=NUMBERS)
@pytest.mark.parametrize("mode", [True, False])
def test_other_numbers_need_no_recording(change, mode, records):
    same = asked(model().train(mode))
    before = same.gradients().flat()
    change(same)
    rng = torch.get_rng_state()
    assert not torch.equal(same.gradients().flat(), before) or (
        change is NUMBERS["a buffer"] and mode
    )
    assert len(records) == 1
    agrees_with_a_fresh_one(same)
    assert torch.equal(rng, torch.get_rng_state())


def test_another_batch_needs_no_recording(records):
    first = asked()
    for _ in range(3):
        other = first.with_batch(x(), y())
        assert other.structure.simd_given_statistics
        assert len(records) == 1
        with isolation.untouched(other.program.modules):
            torch.testing.assert_close(other.predictions(), other.program.model(other.inputs))
            true = torch.autograd.grad(
                loss(other.program.model(other.inputs), other.targets),
                list(other.program.model.parameters()),
            )
        torch.testing.assert_close(list(other.gradient().values()), list(true))
        torch.testing.assert_close([r.sum(0) for r in other.gradients().values()], list(true))
    assert first.structure.samples == N
    assert len(records) == 1


def test_a_training_loop_needs_one_recording(records):
    net = model()
    problem, optimizer = ub.Problem(net, loss, (x(), y())), torch.optim.SGD(net.parameters(), 0.1)
    for _ in range(4):
        batch = (x(), y())
        problem = problem.with_batch(*batch)
        rows = problem.gradients()
        optimizer.zero_grad()
        loss(net(batch[0]), batch[1]).backward()
        for name, p in net.named_parameters():
            torch.testing.assert_close(rows[name].sum(0), p.grad)
        optimizer.step()
    assert len(records) == 1


def test_data_put_into_the_same_dict_are_other_data():
    """Also where a tensor gets the number and the memory of one that is gone."""

    class Named(nn.Linear):
        def forward(self, x):
            return super().forward(x)

    batch = {"x": x()}
    problem = ub.Problem(Named(D, C), loss, (batch, y()))
    again = 0
    for i in range(20):
        _ = problem.gradient()
        before = id(batch.pop("x"))  # gone, and its place is free
        batch["x"] = torch.full((N, D), float(i))
        again += id(batch["x"]) == before
        torch.testing.assert_close(problem.predictions(), problem.program.model(**batch))
        agrees_with_a_fresh_one(problem)
    assert again


def test_another_shape_needs_one(records):
    first = asked()
    other = first.with_batch(torch.randn(8, D), torch.arange(8) % C)
    assert other.structure.samples == 8
    assert other.predictions().shape == (8, C)
    assert len(records) == 2


def test_a_program_that_decides_on_values_is_recorded_again(records):
    class Branching(nn.Module):
        def forward(self, z):
            return z - z.mean(0) if z.sum() > 0 else z

    first = ub.Problem(Branching(), lambda p: p.sum(), (torch.ones(N, D) + x() / 9, None))
    assert first.structure.independent_forward.status == "fails"
    other = first.with_batch(-first.inputs)
    assert torch.equal(other.predictions(), other.inputs)
    assert len(records) == 2


def test_sizes_that_depend_on_data_are_recorded_again(records):
    class Positive(nn.Linear):
        def forward(self, z):
            out = super().forward(z)
            return out.index_put((torch.nonzero(z[:, 0] > 0)[:, 0],), out.new_ones(()))

    first = ub.Problem(Positive(D, C), lambda p: p.square().sum(), (x(), None))
    _ = first.structure
    other = first.with_batch(torch.ones(N, D))
    torch.testing.assert_close(other.predictions(), torch.ones(N, C))
    assert len(records) == 2


def test_another_batch_is_checked():
    first = asked()
    with pytest.raises(ub.InputError, match=r"5.*3"):
        first.with_batch(x(), y()[:3])
    with pytest.raises(ub.InputError, match="same structure"):
        first.with_batch((x(), x()), y())
    with pytest.raises(ub.InputError, match="NaN"):
        _ = first.with_batch(with_nan(), y()).structure


# ---------------------------------------------------------------- another program: recorded again

STATES: dict[str, Callable[[ub.Problem], Any]] = {
    "a parameter replaced": lambda p: setattr(
        p.program.model[0], "weight", nn.Parameter(torch.randn(C, D))
    ),
    "train and eval": lambda p: p.program.model.eval(),
    "one module to eval": lambda p: p.program.model[1].eval(),
    "an attribute": lambda p: setattr(p.program.model[1], "eps", 0.1),
    "a hook": lambda p: p.program.model[0].register_forward_hook(lambda m, i, o: o - o.mean(0)),
    "requires_grad": lambda p: p.program.model[0].weight.requires_grad_(False),
    "a module replaced": lambda p: p.program.model.__setitem__(1, nn.Tanh()),
}


@pytest.mark.parametrize("change", STATES.values(), ids=STATES)
def test_another_program_is_recorded_again(change, records):
    same = asked()
    change(same)
    _ = same.structure
    assert len(records) == 2, "answered from an old recording"
    agrees_with_a_fresh_one(same)


def test_eval_changes_the_answer():
    same = asked()
    assert not same.structure.simd_forward
    same.program.model.eval()
    assert same.structure.simd_forward
    same.program.model.train()
    assert not same.structure.simd_forward


GAIN = 1.0


def _gain(z: Tensor) -> Tensor:
    return z * GAIN


class Reading(nn.Module):
    """Reads a number from everywhere it can."""

    def __init__(self):
        super().__init__()
        self.linear, self.table = nn.Linear(D, C), {"gain": 1.0}
        self.offset = torch.zeros(C)  # no buffer

    def forward(self, z):
        return self.shifted(_gain(self.linear(z)))

    def shifted(self, z):
        return z * GAIN + self.offset


def _in_closure() -> tuple[Any, Callable[[], None]]:
    gain, net = 1.0, model()

    def run(parameters, z):
        return torch.func.functional_call(net, parameters, (z,)) * gain

    def change() -> None:
        nonlocal gain
        gain = 3.0

    run.net = net  # type: ignore[attr-defined]
    return run, change


class Callable_:
    def __init__(self):
        self.gain = 1.0

    def __call__(self, parameters, z):
        return z @ parameters["w"] * self.gain


def test_a_global_number_is_seen(monkeypatch):
    same = asked(Reading())
    monkeypatch.setattr(f"{__name__}.GAIN", 3.0)
    agrees_with_a_fresh_one(same)


def test_a_global_function_is_seen(monkeypatch):
    same = asked(Reading())
    monkeypatch.setattr(f"{__name__}._gain", torch.tanh)
    agrees_with_a_fresh_one(same)


def test_a_tensor_kept_as_attribute_is_seen():
    net = Reading()
    same = asked(net)
    net.offset = torch.ones(C)
    agrees_with_a_fresh_one(same)
    net.offset.mul_(2)
    agrees_with_a_fresh_one(same)


class Activated(nn.Module):
    """A layer with an activation that has no parameters: a module, or a function kept as an
    attribute.
    """

    def __init__(self, act: Callable[[Tensor], Tensor]):
        super().__init__()
        self.linear, self.act = nn.Linear(D, C), act

    def forward(self, z: Tensor) -> Tensor:
        return self.act(self.linear(z))


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (nn.ReLU(), nn.Tanh()),
        (nn.Sigmoid(), nn.Softmax(0)),
        (torch.relu, torch.tanh),
        (F.relu, lambda z: z.sigmoid()),
    ],
    ids=["module", "module that mixes", "built-in function", "function"],
)
def test_an_activation_that_was_swapped_is_seen(first, then):
    net = Activated(first)
    same = asked(net)
    net.act = then
    agrees_with_a_fresh_one(same)


def test_a_closure_is_seen():
    run, change = _in_closure()
    same = asked(run, parameters=dict(run.net.named_parameters()))
    change()
    agrees_with_a_fresh_one(same)
    run.net.eval()
    agrees_with_a_fresh_one(same)


def test_an_attribute_of_a_callable_is_seen():
    run = Callable_()
    same = asked(run, parameters={"w": torch.randn(D, C, requires_grad=True)})
    run.gain = 3.0
    agrees_with_a_fresh_one(same)


def test_arguments_of_a_partial_are_seen():
    table = {"gain": 1.0}

    def scaled(table, parameters, z):
        return z @ parameters["w"] * table["gain"]

    same = asked(
        functools.partial(scaled, table), parameters={"w": torch.randn(D, C, requires_grad=True)}
    )
    table["gain"] = 3.0
    agrees_with_a_fresh_one(same)


def test_a_number_in_the_loss_is_seen():
    scale = 1.0
    same = ub.Problem(model(), lambda p, y: scale * loss(p, y), (x(), y()))
    before = same.gradients().flat()
    scale = 2.0
    torch.testing.assert_close(same.gradients().flat(), 2 * before)


# ---------------------------------------------------------------- numbers that rules look at


class Picking(nn.Module):
    """Rows in an order that a buffer, or the data, gives."""

    def __init__(self, order: Tensor | None = None):
        super().__init__()
        self.linear = nn.Linear(D, C)
        self.register_buffer("order", order)

    def forward(self, z, order=None):
        out = self.linear(z)
        return out + out[self.order if order is None else order]


def test_an_order_kept_in_a_buffer_is_looked_at_again(records):
    net = Picking(torch.arange(N))
    same = asked(net)
    assert same.structure.independent_forward
    net.order.copy_(torch.arange(N).roll(1))
    assert same.structure.independent_forward.status != "holds"
    agrees_with_a_fresh_one(same)
    assert len(records) == 2  # and that is the fresh one


def test_a_label_to_be_ignored_is_looked_at_again(records):
    same = asked(model().eval())
    assert same.structure.reduction.weights_depend_on == set()
    other = same.with_batch(x(), torch.tensor([0, -100, 1, 2, 0]))
    assert other.structure.reduction.weights_depend_on == {"targets"}
    assert len(records) == 1
    agrees_with_a_fresh_one(other)


def test_ordinary_labels_are_not_looked_at(records):
    same = asked()
    other = same.with_batch(x(), y().flip(0))
    assert other.structure is same.structure
    assert len(records) == 1


# ---------------------------------------------------------------- noise


def noisy() -> nn.Module:
    return nn.Sequential(nn.Linear(D, 64), nn.Dropout(0.5), nn.Linear(64, C))


def test_one_mask_for_a_question_and_the_next(records):
    same = asked(noisy())
    assert torch.equal(same.gradients().flat(), same.gradients().flat())
    rows = same.gradients()
    torch.testing.assert_close(
        rows.flat().sum(0), torch.cat([g.flatten() for g in same.gradient().values()])
    )
    assert len(records) == 1


def test_other_numbers_get_another_mask():
    same = asked(noisy())
    before = same.gradients().flat()
    torch.manual_seed(1)
    first = same.with_batch(same.inputs.clone(), same.targets).gradients().flat()
    second = same.with_batch(same.inputs.clone(), same.targets)
    torch.manual_seed(1)
    again = same.with_batch(same.inputs.clone(), same.targets).gradients().flat()
    assert torch.equal(first, again)
    assert not torch.equal(first, before)
    torch.testing.assert_close(
        second.gradients().flat().sum(0),
        torch.cat([g.flatten() for g in second.gradient().values()]),
    )


def test_noise_in_the_loss_is_drawn_once():
    def noisy_loss(p, y):
        return (F.dropout(p, 0.5) - F.one_hot(y, C)).square().sum()

    first = ub.Problem(model().eval(), noisy_loss, (x(), y()))
    _ = first.structure
    for same in (first, first.with_batch(x(), y())):
        torch.testing.assert_close(same.gradients().flat(), same.gradients().flat())
        total = torch.cat([g.flatten() for g in same.gradient().values()])
        torch.testing.assert_close(same.gradients().flat().sum(0), total)


# ---------------------------------------------------------------- planted


@pytest.mark.parametrize(
    ("blind", "change"),
    [("state", lambda net: net.train()), ("numbers", lambda net: net[0].bias.data.add_(1))],
)
def test_a_guard_that_does_not_look_is_caught(blind, change, monkeypatch):
    monkeypatch.setattr(guard.Guard, blind, lambda self, data=(): ())
    monkeypatch.setattr(spot_check, "SHARE", 0.0)  # which would see it as well
    same = asked(model().eval())
    change(same.program.model)
    with pytest.raises(AssertionError):
        agrees_with_a_fresh_one(same)


def test_a_move_that_forgets_the_facts_is_caught(monkeypatch):
    monkeypatch.setattr("unbatch.analysis.interpreter.Fact.holds", lambda self, graph: True)
    with pytest.raises(AssertionError):
        test_an_order_kept_in_a_buffer_is_looked_at_again([])
