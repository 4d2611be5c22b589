"""The definitions themselves: what they sum to, where they agree, and what they are in closed form.

Three checkers hold the rows of every case; planted bugs show that they see what they should.
"""

import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from cases.gradients import CASES, N, Net, by_groups
from unbatch.reference import definitions as reference
from unbatch.reference.cross_sample_ops import NORMS, REDUCTIONS

MODES = ("train", "eval")
BY_NAME = {case.name: case for case in CASES}
EVERY = pytest.mark.parametrize("mode", MODES)
EACH = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def problem(case, mode):
    model, loss, inputs, targets = case.build()
    return model.train(mode == "train"), loss, inputs, targets


def kinds(case, mode):
    """The decompositions that the reference can run."""
    yield reference.component
    for function, possible in ((reference.copies, case.copies), (reference.frozen, case.frozen)):
        if possible or not case.mixes_in(mode):
            yield function


def largest(tensors):
    return max((t.abs().max().item() for t in tensors.values() if t.numel()), default=0.0)


def check_equal(found, expected, relative=1e-12):
    """Relative to the largest entry of all, so that what is zero by cancellation is compared as
    such.
    """
    assert list(found) == list(expected)
    floor = relative * (largest(expected) or 1)
    for name in found:
        torch.testing.assert_close(
            found[name], expected[name], rtol=0, atol=floor, msg=lambda m, n=name: f"{n}: {m}"
        )


def check_sum(rows, gradient, rest):
    check_equal({name: rows[name].sum(0) + rest[name] for name in rows}, gradient)


# ---------------------------------------------------------------- every case


@EVERY
@EACH
def test_rows_sum_to_the_gradient_less_its_rest(case, mode):
    args = problem(case, mode)
    gradient, rest = reference.gradient(*args), reference.rest(*args)
    for rows_of in kinds(case, mode):
        if rows_of is not reference.frozen or not case.mixes_in(mode):
            check_sum(rows_of(*args), gradient, rest)


@EVERY
@EACH
def test_rows_agree_where_samples_are_apart(case, mode):
    if case.mixes_in(mode):
        pytest.skip("samples meet")
    args = problem(case, mode)
    rows = reference.component(*args)
    check_equal(reference.copies(*args), rows)
    check_equal(reference.frozen(*args), rows)


AGREE_THOUGH_MIXED = {  # no parameter acts before samples meet
    "batch norm first",
    "batch norm of the image",
    "batch norm, then a transformer",
    "a parameter inside a statistic of inputs",
}


@EACH
def test_rows_differ_where_samples_meet_after_a_parameter(case):
    if not case.mixes or case.name in AGREE_THOUGH_MIXED:
        pytest.skip("nothing to tell apart")
    args = problem(case, "train")
    first, *others = (rows_of(*args) for rows_of in kinds(case, "train"))
    for other in others:
        assert max(
            (other[n] - first[n]).abs().max() for n in first if first[n].numel()
        ) > 1e-4 * largest(first)


NOT_BY_REDUCTIONS_OF_AXIS_0 = {
    "covariance",
    "class centres by einsum",
    "soft mixing of experts",
    "batch norm of tokens, time first",
}
BY_REDUCTIONS = [
    c for c in CASES if c.mixes and c.frozen and c.name not in NOT_BY_REDUCTIONS_OF_AXIS_0
]


@pytest.mark.parametrize("case", BY_REDUCTIONS, ids=lambda case: case.name)
def test_frozen_rows_are_component_rows_of_a_batch_with_detached_statistics(case):
    model, loss, inputs, targets = problem(case, "train")

    def forward(net, *args):
        with Detached():
            return net.model(*args)

    held = Net(forward, {"model": lambda: model})
    expected = {
        name.removeprefix("model."): row
        for name, row in reference.component(held, loss, inputs, targets).items()
    }
    check_equal(reference.frozen(model, loss, inputs, targets), expected)


class Detached(TorchFunctionMode):
    """Statistics over axis 0 are constant, by another route than that of the reference: no sample
    runs alone.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.batch_norm:
            return normalised(func, *args, **kwargs)
        out = func(*args, **kwargs)
        if func not in (*REDUCTIONS, *NORMS):
            return out
        over = next((a for a in args[1:] if isinstance(a, int | tuple)), 0)
        if 0 not in (over if isinstance(over, tuple) else (over,)):
            return out
        return tuple(t.detach() for t in out) if isinstance(out, tuple) else out.detach()


def normalised(  # noqa: PLR0913  the arguments of F.batch_norm
    batch_norm,
    x,
    mean=None,
    var=None,
    weight=None,
    bias=None,
    training=False,
    momentum=0.1,
    eps=1e-5,
):
    over = [d for d in range(x.ndim) if d != 1]
    if training:
        mean, var = x.detach().mean(over), x.detach().var(over, unbiased=False)
    return batch_norm(x, mean, var, weight, bias, False, momentum, eps)


def test_groups_are_batches_of_their_own():
    args = problem(BY_NAME["ghost batch norm"], "train")
    check_equal(by_groups(reference.component), reference.component(*args))
    check_sum(by_groups(reference.copies), reference.gradient(*args), reference.rest(*args))


def test_the_table_is_large_and_its_names_are_its_own():
    assert len(BY_NAME) == len(CASES) >= 70
    for case in CASES:
        _, _, inputs, _ = case.build()
        leaves = (
            inputs
            if isinstance(inputs, tuple)
            else [*inputs.values()]
            if isinstance(inputs, dict)
            else [inputs]
        )
        assert 4 <= leaves[0].shape[0] <= 7


@EVERY
def test_asking_changes_nothing(mode):
    for name in ("batch norm and dropout", "spectral norm", "batch norm, cumulative average"):
        model, *rest = problem(BY_NAME[name], mode)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        state, flags = torch.get_rng_state(), [m.training for m in model.modules()]
        for function in (reference.gradient, reference.rest, *kinds(BY_NAME[name], mode)):
            function(model, *rest)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert torch.equal(torch.get_rng_state(), state)
        assert [m.training for m in model.modules()] == flags
        assert all(p.grad is None for p in model.parameters())


def test_copies_of_a_linear_layer_under_batch_norm_equal_what_it_holds_per_rank():
    """The same by hand: the weights enter as a stack with one copy per sample."""
    model, loss, x, y = problem(BY_NAME["two batch norms, ce"], "train")
    rows = reference.copies(model, loss, x, y)
    stacks = {
        n: p.detach().expand(N, *p.shape).clone().requires_grad_()
        for n, p in model.named_parameters()
    }
    h = x
    for i, layer in enumerate(model):
        w, b = stacks.get(f"{i}.weight"), stacks.get(f"{i}.bias")
        if isinstance(layer, nn.Linear):
            h = torch.einsum("ni,noi->no", h, w) + b
        elif isinstance(layer, nn.BatchNorm1d):
            h = F.batch_norm(h, None, None, training=True, eps=layer.eps) * w + b
        else:
            h = layer(h)
    found = torch.autograd.grad(loss(h, y), list(stacks.values()))
    check_equal(rows, dict(zip(stacks, found, strict=True)))


# ---------------------------------------------------------------- one batch norm, in closed form


def one_batch_norm(bias):
    """`γ(z - mean)/σ + β` with `z = XWᵀ`, and the loss a sum of cubes, whose gradient at the
    predictions is `g`.
    """
    x = torch.randn(N, 4, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(4, 3, bias=bias), nn.BatchNorm1d(3, eps=1e-300)).double()
    nn.init.normal_(model[1].weight)
    return model, lambda p, y: ((p - y) ** 3).sum(), x, torch.randn(N, 3, dtype=torch.float64)


def test_one_batch_norm_follows_the_formulas():
    model, loss, X, y = one_batch_norm(bias=False)
    Z = model[0](X).detach()
    sigma = Z.var(0, unbiased=False).sqrt()
    hat = (Z - Z.mean(0)) / sigma
    g = 3 * (model(X).detach() - y) ** 2
    L = model[1].weight.detach() * g / sigma
    rows = {
        kind: torch.zeros(N, 3, 4, dtype=torch.float64)
        for kind in ("component", "copies", "frozen")
    }
    eye, ones = torch.eye(N, dtype=torch.float64), torch.ones(N, N, dtype=torch.float64)
    for c in range(3):
        Pi = eye - ones / N - torch.outer(hat[:, c], hat[:, c]) / N
        for n in range(N):
            rows["component"][n, c] = L[n, c] * (Pi @ X)[n]
            rows["copies"][n, c] = (Pi @ L[:, c])[n] * X[n]
            rows["frozen"][n, c] = L[n, c] * X[n]
    for kind, expected in rows.items():
        found = getattr(reference, kind)(model, loss, X, y)
        torch.testing.assert_close(found["0.weight"], expected, rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(found["1.weight"], g * hat, rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(found["1.bias"], g, rtol=1e-10, atol=1e-11)


def test_a_bias_before_batch_norm_has_no_component_but_copies():
    args = one_batch_norm(bias=True)
    scale = largest(reference.gradient(*args))
    assert reference.component(*args)["0.bias"].abs().max() < 1e-13 * scale
    assert reference.copies(*args)["0.bias"].abs().max() > 1e-2 * scale
    assert reference.frozen(*args)["0.bias"].abs().max() > 1e-2 * scale


def test_component_rows_are_orthogonal_to_scale_invariant_weights():
    model, *args = one_batch_norm(bias=False)
    rows = reference.component(model, *args)["0.weight"]
    assert torch.einsum("noi,oi->no", rows, model[0].weight).abs().max() < 1e-13 * rows.abs().max()


def test_centring_before_or_after_the_weights_is_one_function_with_two_sets_of_copies():
    w = torch.randn(3, 4, dtype=torch.float64)
    x, y = torch.randn(N, 4, dtype=torch.float64), torch.randn(N, 3, dtype=torch.float64)
    before = Net(lambda net, x: (x - x.mean(0)) @ net.w.t(), {"w": lambda: nn.Parameter(w.clone())})
    after = Net(
        lambda net, x: (h := x @ net.w.t()) - h.mean(0), {"w": lambda: nn.Parameter(w.clone())}
    )
    check_equal(
        reference.component(before, F.mse_loss, x, y), reference.component(after, F.mse_loss, x, y)
    )
    apart = (
        reference.copies(before, F.mse_loss, x, y)["w"]
        - reference.copies(after, F.mse_loss, x, y)["w"]
    )
    assert apart.abs().max() > 0.1 * largest(reference.copies(before, F.mse_loss, x, y))


def test_a_parameter_applied_to_a_statistic_counts_for_those_who_consume_the_result():
    model = Net(
        lambda net, x: x + net.w * x.mean(0), {"w": lambda: nn.Parameter(torch.randn(4).double())}
    )
    x, g = torch.randn(N, 4, dtype=torch.float64), torch.randn(N, 4, dtype=torch.float64)
    rows = reference.copies(model, lambda p, y: (p * y).sum(), x, g)
    check_equal(rows, {"w": g * x.mean(0)})


# ---------------------------------------------------------------- rest


def test_rest_holds_what_does_not_pass_through_predictions():
    model, loss, x, y = problem(BY_NAME["mlp, with weight decay"], "train")
    rest = reference.rest(model, loss, x, y)
    check_equal(rest, {n: 0.2 * p.detach() for n, p in model.named_parameters()})


def test_parameters_of_the_loss_have_no_rows_but_a_rest():
    args = problem(BY_NAME["batch norm, with a parameter"], "train")
    rest, rows = reference.rest(*args), reference.component(*args)
    assert list(rows)[-1] == "loss.log_temperature"
    assert rows["loss.log_temperature"].shape == (N,)
    assert not rows["loss.log_temperature"].any()
    assert rest["loss.log_temperature"].abs() > 1e-3
    assert not any(v.any() for n, v in rest.items() if n != "loss.log_temperature")


def test_a_prediction_without_samples_counts_to_the_rest():
    model, loss, x, y = problem(BY_NAME["an auxiliary loss"], "train")
    rest = reference.rest(model, loss, x, y)
    torch.testing.assert_close(rest["hidden.weight"], 0.6 * model.hidden.weight.detach())
    assert not rest["head.weight"].any()


# ---------------------------------------------------------------- what it refuses


def test_mixing_that_it_does_not_know_is_refused():
    args = problem(BY_NAME["neighbours"], "train")
    with pytest.raises(ValueError, match="mixes samples in a way that copies does not know"):
        reference.copies(*args)
    with pytest.raises(ValueError, match="mixes samples in a way that frozen does not know"):
        reference.frozen(*args)


def test_attention_between_samples_has_no_frozen_rows():
    with pytest.raises(ValueError, match="hands values of all samples on"):
        reference.frozen(*problem(BY_NAME["attention between samples"], "train"))


def test_a_model_that_takes_other_steps_for_one_sample_is_refused():
    with pytest.raises(ValueError, match="no axis is cut by samples"):
        reference.copies(*problem(BY_NAME["ghost batch norm"], "train"))
    net = Net(
        lambda net, x: net.w * (x - x.mean(0) if len(x) > 1 else x),
        {"w": lambda: nn.Parameter(torch.ones(3))},
    )
    with pytest.raises(ValueError, match="calls nothing more where the batch calls mean"):
        reference.copies(net, F.mse_loss, torch.randn(N, 3), torch.randn(N, 3))


def test_an_error_of_one_rank_is_raised_and_nobody_waits():
    def forward(net, x):
        if len(x) == 1 and x[0, 0] == 2:
            raise ZeroDivisionError("rank 2")
        return net.w * (x - x.mean(0))

    net = Net(forward, {"w": lambda: nn.Parameter(torch.ones(3))})
    x, threads = torch.arange(float(N))[:, None].expand(N, 3), threading.active_count()
    with pytest.raises(ZeroDivisionError, match="rank 2"):
        reference.copies(net, F.mse_loss, x, torch.zeros(N, 3))
    assert threading.active_count() == threads


# ---------------------------------------------------------------- quantities


def test_quantities_are_what_loops_give():
    rows = {"w": torch.randn(N, 2, 3), "s": torch.randn(N), "none": torch.randn(N, 0)}
    vectors = [torch.cat([rows["w"][n].flatten(), rows["s"][n].reshape(1)]) for n in range(N)]
    each, total = reference.squared_norms(rows)
    torch.testing.assert_close(total, torch.stack([v @ v for v in vectors]))
    torch.testing.assert_close(each["s"], rows["s"] ** 2)
    assert not each["none"].any()
    torch.testing.assert_close(reference.dots(rows), torch.stack(vectors) @ torch.stack(vectors).T)
    torch.testing.assert_close(reference.sum_of_squares(rows)["w"], sum(r * r for r in rows["w"]))
    torch.testing.assert_close(
        reference.second_moment(rows)["w"] * N, reference.sum_of_squares(rows)["w"]
    )
    torch.testing.assert_close(reference.variance(rows)["w"], rows["w"].var(0, unbiased=False))
    clipped = sum(v * min(1.0, 1.5 / v.norm()) for v in vectors)
    found = reference.clipped_sum(rows, 1.5)
    torch.testing.assert_close(torch.cat([found["w"].flatten(), found["s"].reshape(1)]), clipped)


# ---------------------------------------------------------------- planted bugs


def shuffled(*args):
    return {
        n: torch.cat([row[1:2], row[:1], row[2:]]) for n, row in reference.component(*args).items()
    }


def test_a_wrong_sum_is_caught():
    args = problem(BY_NAME["batch norm, ce"], "train")
    with pytest.raises(AssertionError):
        check_sum(reference.frozen(*args), reference.gradient(*args), reference.rest(*args))


def stacked(model, loss, x, y):
    """One backward pass for all samples as if they were apart: the trick that every layer but batch
    norm allows.
    """
    rows, last = {}, {}
    for name, layer in model.named_children():
        layer.register_forward_hook(
            lambda _, inputs, output, name=name: last.update({name: (inputs[0], output)})
        )
    value = loss(model(x), y)
    for name, (inputs, output) in last.items():
        if isinstance(model.get_submodule(name), nn.Linear):
            (grad,) = torch.autograd.grad(value, output, retain_graph=True)
            rows[f"{name}.weight"] = torch.einsum("no,ni->noi", grad, inputs)
    return rows


def test_rows_by_one_stacked_backward_pass_are_caught():
    args = problem(BY_NAME["mlp, ce"], "train")
    rows = stacked(*args)
    check_equal(
        rows, {name: row for name, row in reference.component(*args).items() if name in rows}
    )
    args = problem(BY_NAME["two batch norms, ce"], "train")
    rows = stacked(*args)
    check_equal(rows, {name: row for name, row in reference.copies(*args).items() if name in rows})
    with pytest.raises(AssertionError):
        check_equal(
            rows, {name: row for name, row in reference.component(*args).items() if name in rows}
        )


def test_rows_of_other_samples_are_caught():
    args = problem(BY_NAME["mlp, ce"], "train")
    check_sum(shuffled(*args), reference.gradient(*args), reference.rest(*args))
    with pytest.raises(AssertionError):
        check_equal(shuffled(*args), reference.copies(*args))
