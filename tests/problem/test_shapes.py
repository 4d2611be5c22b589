"""Batches of several shapes: what is recorded, what is tried, and that each is answered rightly."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unbatch as ub
from unbatch.capture import program as capture
from unbatch.capture import same_form
from unbatch.gradients import self_check
from unbatch.problem import analysis, known_forms, recording, spot_check

WORDS, WIDTH, C, N = 50, 6, 3, 7


class Sentences(nn.Module):
    """An embedding, attention, a mean over positions; ``mixing`` takes part in long sentences."""

    def __init__(self, long: int = 1000, norm: bool = False) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.q, self.k, self.out = nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 4), nn.Linear(WIDTH, C)
        self.norm = nn.BatchNorm1d(WIDTH) if norm else nn.Identity()
        self.long = long

    def forward(self, x: Tensor) -> Tensor:
        h = self.words(x)
        attention = (self.q(h) @ self.k(h).mT / h.shape[1] ** 0.5).softmax(-1)
        h = self.norm((attention @ h).mean(1))
        if x.shape[1] > self.long:
            h = h - h.mean(0)
        return self.out(h)


def sentences(length: int, samples: int = N) -> tuple[Tensor, Tensor]:
    return torch.randint(WORDS, (samples, length)), torch.randint(C, (samples,))


def vectors(samples: int, width: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(samples, width).double(), torch.randint(C, (samples,))


class Counts:
    """How often what was done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.recorded = self.tried = self.checked = 0
        self._count(monkeypatch, capture, "record", "recorded")
        self._count(monkeypatch, analysis, "settle", "tried")
        self._count(monkeypatch, self_check, "_passes", "checked")

    def _count(self, monkeypatch: Any, module: Any, function: str, name: str) -> None:
        plain = getattr(module, function)

        def counted(*args: Any, **kwargs: Any) -> Any:
            setattr(self, name, getattr(self, name) + 1)
            return plain(*args, **kwargs)

        monkeypatch.setattr(module, function, counted)


@pytest.fixture
def counts(monkeypatch) -> Counts:
    return Counts(monkeypatch)


def check_fresh(problem: ub.Problem) -> None:
    """Raise where answers are not those of a problem made afresh, or of plain autograd."""
    program = problem.program
    fresh = ub.Problem(program.model, program.loss, (problem.inputs, problem.targets))
    for mine, theirs in zip(problem.structure.verdicts, fresh.structure.verdicts, strict=True):
        assert (mine.name, mine.status, mine.basis) == (theirs.name, theirs.status, theirs.basis)
        assert mine.weights_depend_on == theirs.weights_depend_on
        assert mine.trial == theirs.trial
        assert len(mine.culprits) == len(theirs.culprits)
    rows = problem.gradients()
    torch.testing.assert_close(rows.flat(), fresh.gradients().flat())
    assert rows.kind == fresh.gradients().kind
    for name, gradient in problem.gradient().items():
        torch.testing.assert_close(rows[name].sum(0), gradient)
    torch.testing.assert_close(problem.ggn().diag(), fresh.ggn().diag())


# --- what is done how often -----------------------------------------------------------------------


def test_a_new_length_is_recorded_and_not_tried_again(counts):
    torch.manual_seed(0)
    problem = ub.Problem(Sentences().double(), F.cross_entropy, sentences(11))
    for length in (11, 13, 17, 13, 11, 19, 17):
        problem = problem.with_batch(*sentences(length))
        assert problem.gradients().kind == "per-sample"
    assert (counts.recorded, counts.tried, counts.checked) == (4, 1, 1)
    check_fresh(problem)


def test_a_last_batch_of_an_epoch_is_recorded_once(counts):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, C)).double()
    problem = ub.Problem(net, F.cross_entropy, vectors(16))
    for samples in (16, 16, 11, 16, 16, 11):
        problem = problem.with_batch(*vectors(samples))
        assert problem.gradients()
    assert (counts.recorded, counts.tried) == (2, 1)
    check_fresh(problem)


def test_parameters_may_change_between_lengths(counts):
    torch.manual_seed(0)
    net = Sentences().double()
    problem = ub.Problem(net, F.cross_entropy, sentences(11))
    for length in (11, 13, 11, 13):
        problem = problem.with_batch(*sentences(length))
        assert problem.gradients()
        with torch.no_grad():
            for p in net.parameters():
                p.add_(0.1 * torch.randn_like(p))
    assert counts.recorded == 2
    check_fresh(problem)


def test_the_least_recently_used_shape_is_given_up(counts):
    problem = ub.Problem(Sentences().double(), F.cross_entropy, sentences(11), shapes=2)
    for length in (11, 13, 11, 17, 11, 13):
        problem = problem.with_batch(*sentences(length))
        assert problem.structure
    assert counts.recorded == 4  # of 11, 13, 17, and of 13 again


@pytest.mark.parametrize("shapes", [0, -1, 2.0])
def test_a_number_of_shapes_is_checked(shapes):
    with pytest.raises(ub.InputError, match="shapes"):
        ub.Problem(Sentences(), F.cross_entropy, sentences(11), shapes=shapes)


def test_problems_asked_in_turns_do_not_drive_out_each_other(counts):
    torch.manual_seed(0)
    first = ub.Problem(Sentences().double(), F.cross_entropy, sentences(11))
    problems = [first, *[first.with_batch(*sentences(length)) for length in (13, 11, 17)]]
    expected = [problem.gradients().flat() for problem in problems]
    for _ in range(2):
        for problem, rows in zip(problems, expected, strict=True):
            torch.testing.assert_close(problem.gradients().flat(), rows)
    assert counts.recorded == 3


# --- what is not taken over -----------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [(11, 31), (31, 11)])
def test_another_branch_for_other_lengths_is_judged_by_itself(lengths):
    torch.manual_seed(0)
    problem = ub.Problem(Sentences(long=20).double(), F.cross_entropy, sentences(lengths[0]))
    for length in (*lengths, *lengths):
        problem = problem.with_batch(*sentences(length))
        status = problem.structure.independent_forward.status
        assert status == ("fails" if length > 20 else "holds")
        check_fresh(problem)


def test_a_witness_belongs_to_its_batch():
    torch.manual_seed(0)
    net = Sentences(norm=True).double()
    problem = ub.Problem(net, F.cross_entropy, sentences(11, 16))
    assert problem.structure.independent_forward.basis == "witness"
    other = problem.with_batch(*sentences(13, 5))
    verdict = other.structure.independent_forward
    assert verdict.status == "fails"
    named = [int(word) for word in verdict.note.replace(",", "").split() if word.isdigit()]
    assert named
    assert max(named) < 5
    check_fresh(other)


COINCIDENCES = {
    "as many samples as features": (7, WIDTH),
    "as many samples as positions": (7, 13),
    "a single position": (7, 1),
}


def lengths_of(name: str) -> tuple[tuple[int, int], ...]:
    samples, other = COINCIDENCES[name]
    if other == 1:
        return (13, samples), (1, samples)
    return (13, samples), (13, other)


@pytest.mark.parametrize("name", COINCIDENCES)
def test_sizes_that_coincide_are_tried_by_themselves(name, counts):
    first, second = lengths_of(name)
    problem = ub.Problem(Sentences().double(), F.cross_entropy, sentences(*first))
    assert problem.structure
    assert problem.with_batch(*sentences(*second)).structure
    assert counts.tried == 2


def test_axes_are_no_sizes(counts):
    """Chosen by the length, at one line: other steps, though the numbers look like sizes."""

    class Pooled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            h = super().forward(x)[:, :, None, None].expand(-1, -1, 5, 5)
            return h.mean(2 if x.shape[0] > 8 else 3).mean(2)

    problem = ub.Problem(Pooled(4, C).double(), F.cross_entropy, vectors(11))
    for samples in (11, 13, 6, 13, 7):
        assert problem.with_batch(*vectors(samples)).structure.independent_forward
    assert counts.tried == 2


def test_a_shape_that_comes_again_is_held_against_the_model(monkeypatch):
    monkeypatch.setattr(spot_check.SpotChecks, "_has_time", lambda self: False)
    agree = spot_check._agree
    lengths: list[int] = []

    def noted(session: Any) -> bool:
        lengths.append(session.batch.inputs.shape[1])
        return agree(session)

    monkeypatch.setattr(spot_check, "_agree", noted)
    problem = ub.Problem(Sentences().double(), F.cross_entropy, sentences(11))
    for length in (11, 13) * 6:
        assert problem.with_batch(*sentences(length)).predictions() is not None
    assert lengths == [11, 13] * spot_check.FIRST


def hooked_between_lengths() -> ub.Problem:
    """Ask about one length, hook the backward pass, and return the problem of another length."""
    torch.manual_seed(0)
    net = Sentences().double()
    problem = ub.Problem(net, F.cross_entropy, sentences(11))
    assert problem.gradients()

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda g: 3 * g)

    net.out.register_forward_hook(hook)
    return problem.with_batch(*sentences(13))


def test_a_change_of_derivatives_between_lengths_is_seen():
    check_fresh(hooked_between_lengths())


def test_another_mode_between_lengths_is_seen():
    torch.manual_seed(0)
    net = Sentences(norm=True).double()
    problem = ub.Problem(net, F.cross_entropy, sentences(11))
    for length in (11, 13):
        assert not problem.with_batch(*sentences(length)).structure.independent_forward
    net.eval()
    for length in (13, 11, 17):
        other = problem.with_batch(*sentences(length))
        assert other.structure.independent_forward
        check_fresh(other)


def test_labels_that_are_ignored_weigh_on_other_lengths_as_well():
    def loss(o: Tensor, y: Tensor) -> Tensor:
        terms = F.cross_entropy(o, y, reduction="none", ignore_index=-100)
        return terms.sum() / (y != -100).sum()

    problem = ub.Problem(Sentences().double(), loss, sentences(11))
    for length in (11, 13):
        other = problem.with_batch(*sentences(length))
        assert other.structure.reduction.weights_depend_on == {"targets"}


def test_a_rule_that_is_wrong_warns_at_every_length(monkeypatch):
    """What a trial contradicts is not taken over."""
    from unbatch.analysis import inference

    judge = inference.judge_forward

    def wrong(*args: Any) -> Any:
        structure = judge(*args)
        verdict = ub.Verdict("independent_forward", "holds", "proved")
        return structure.with_verdicts(verdict)

    monkeypatch.setattr(inference, "judge_forward", wrong)
    problem = ub.Problem(Sentences(norm=True).double(), F.cross_entropy, sentences(11))
    for length in (11, 13):
        with pytest.warns(ub.ContradictedProofWarning):
            structure = problem.with_batch(*sentences(length)).structure
        assert not structure.independent_forward


def test_what_nobody_watches_makes_all_shapes_forgotten(monkeypatch, counts):
    torch.manual_seed(0)
    problem = ub.Problem(Sentences().double(), F.cross_entropy, sentences(11))
    others = [problem.with_batch(*sentences(length)) for length in (11, 13)]
    for other in others:
        assert other.structure
    before = counts.recorded
    monkeypatch.setattr(spot_check.SpotChecks, "are_due", lambda *args: True)
    monkeypatch.setattr(spot_check, "_agree", lambda session: False)
    assert others[0].structure
    assert len(problem._recordings) == 1
    assert counts.recorded == before + 1


# --- a single sample ------------------------------------------------------------------------------


def images(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (1, 2, 2)), *layers, nn.Flatten(), nn.LazyLinear(C))


ONE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a net": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, C)), "holds"),
    "images": (lambda: images(nn.Conv2d(1, 3, 2, padding=1), nn.ReLU()), "holds"),
    "batch norm of images": (
        lambda: images(nn.Conv2d(1, 3, 2, padding=1), nn.BatchNorm2d(3)),
        "fails",
    ),
    "batch norm in eval mode": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, C)).eval(),
        "holds",
    ),
    "samples that are as many as features": (lambda: nn.Linear(4, C), "holds"),
}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    net = ONE[name][0]().double()
    net(vectors(4)[0])
    return net


@pytest.mark.parametrize("first", [4, 6])
@pytest.mark.parametrize("name", ONE)
def test_a_single_sample_has_the_verdicts_on_more(name, first):
    net, loss = made(name), nn.CrossEntropyLoss()
    problem = ub.Problem(net, loss, vectors(first))
    assert problem.structure
    one = problem.with_batch(*vectors(1))
    assert one.structure.independent_forward.status == ONE[name][1]
    assert one.structure.samples == 1
    assert one.structure.reduction
    rows = one.gradients()
    assert rows.kind == ("per-sample" if ONE[name][1] == "holds" else "per-component")
    for parameter, gradient in one.gradient().items():
        torch.testing.assert_close(rows[parameter][0], gradient)
    assert one.ggn().diag(per_component=True).shape[0] == 1


def test_a_single_sentence_after_others():
    torch.manual_seed(0)
    problem = ub.Problem(Sentences().double(), F.cross_entropy, sentences(13))
    assert problem.structure
    for length in (13, 11, 7):
        one = problem.with_batch(*sentences(length, 1))
        assert one.structure.independent_forward
        assert one.gradients().kind == "per-sample"


def test_a_single_sample_of_which_others_would_be_the_same_is_open():
    net = nn.Embedding(WORDS, C).double()
    problem = ub.Problem(net, F.cross_entropy, (torch.tensor([3]), torch.tensor([1])))
    assert problem.structure.independent_forward.status == "unknown"


def test_steps_that_one_sample_takes_alone_leave_it_open():
    class Squeezing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            h = super().forward(x)
            return h - h.mean() if len(x) == 1 else h

    problem = ub.Problem(Squeezing(4, C).double(), F.cross_entropy, vectors(6))
    assert problem.structure.independent_forward
    one = problem.with_batch(*vectors(1))
    assert one.structure.independent_forward.status == "unknown"


# --- no sample ------------------------------------------------------------------------------------


def squares(o: Tensor, y: Tensor) -> Tensor:
    return (o - F.one_hot(y, C)).square().sum()


SUMS: dict[str, Callable[[], Any]] = {
    "cross-entropy": lambda: nn.CrossEntropyLoss(reduction="sum"),
    "squares": lambda: squares,
}

NOT_EMPTY = ("a net", "images", "batch norm in eval mode")


@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("loss", SUMS)
@pytest.mark.parametrize("name", NOT_EMPTY)
def test_an_empty_batch_has_sums_that_are_zero(name, loss, asked):
    net = made(name)
    problem = ub.Problem(net, SUMS[loss](), vectors(6))
    if asked:
        assert problem.structure
    empty = problem.with_batch(*vectors(0))
    shapes = {parameter: tuple(p.shape) for parameter, p in net.named_parameters()}
    size = sum(p.numel() for p in net.parameters())
    assert empty.predictions().shape == (0, C)
    rows = empty.gradients()
    assert rows.kind == "per-sample"
    for parameter, shape in shapes.items():
        assert rows[parameter].shape == (0, *shape)
    for parameter, gradient in empty.gradient().items():
        assert gradient.shape == shapes[parameter]
        assert not gradient.any()
    norms, total, clipped = empty.compute(ub.SquaredNorms, ub.SumOfSquares, ub.ClippedSum(1.0))
    assert all(n.shape == (0,) for n in norms.values())
    assert not any(bool(t.any()) for t in (*total.values(), *clipped.values()))
    assert empty.compute(ub.Dots).shape == (0, 0)
    G, ones = empty.ggn(), torch.ones(size).double()
    for zero in (G.diag(), G @ ones, G.to_dense(), G.trace(), G.snapshot().diag()):
        assert not zero.any()
    assert G.diag(per_component=True).shape == (0, size)
    torch.testing.assert_close(G.solve(ones, damping=0.5), 2 * ones)
    assert empty.structure.samples == 0
    assert str(empty.structure)
    assert empty.verify()
    assert empty.crosstalk().matrix.shape == (0, 0)


def test_a_poisson_loop_goes_through_empty_batches(counts):
    torch.manual_seed(0)
    net, loss = made("a net"), nn.CrossEntropyLoss(reduction="sum")
    problem = ub.Problem(net, loss, vectors(6))
    total = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    expected = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for samples in (6, 3, 0, 1, 2, 0, 1, 7):
        data = vectors(samples)
        problem = problem.with_batch(*data)
        for name, clipped in problem.compute(ub.ClippedSum(1e9)).items():
            total[name] += clipped
        for name, gradient in zip(
            total,
            torch.autograd.grad(loss(net(data[0]), data[1]), list(net.parameters())),
            strict=True,
        ):
            expected[name] += gradient
    torch.testing.assert_close(total, expected)


def test_a_mean_over_no_samples_is_refused():
    problem = ub.Problem(made("a net"), nn.CrossEntropyLoss(), vectors(6))
    empty = problem.with_batch(*vectors(0))
    for ask in (lambda: empty.gradients(), lambda: empty.structure, lambda: empty.gradient()):
        with pytest.raises(ub.InputError, match="0/0"):
            ask()


def test_statistics_over_no_samples_are_refused():
    problem = ub.Problem(made("a net"), nn.CrossEntropyLoss(reduction="sum"), vectors(6))
    empty = problem.with_batch(*vectors(0))
    for quantity in (ub.Variance, ub.SecondMoment, ub.NoiseScale):
        with pytest.raises(ub.InputError, match=f"{quantity.__name__}.*0/0"):
            empty.compute(quantity)


def test_a_loss_that_joins_samples_is_refused_without_any():
    problem = ub.Problem(made("a net"), lambda o, y: squares(o, y) ** 2, vectors(6))
    with pytest.raises(ub.StructureError, match="sum over samples"):
        problem.with_batch(*vectors(0)).gradients()


def test_a_problem_is_not_made_of_nothing():
    with pytest.raises(ub.InputError, match="no samples"):
        ub.Problem(made("a net"), nn.CrossEntropyLoss(reduction="sum"), vectors(0))


# --- planted --------------------------------------------------------------------------------------


@pytest.fixture
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("name", list(COINCIDENCES)[:2])
def test_sizes_that_are_renamed_at_will_are_caught(name, counts, monkeypatch):
    monkeypatch.setattr(same_form.Renamed, "takes", lambda *args: True)
    with pytest.raises(AssertionError):
        test_sizes_that_coincide_are_tried_by_themselves(name, counts)


def test_a_program_that_counts_as_the_same_is_caught(monkeypatch):
    monkeypatch.setattr(known_forms.Judged, "is_current", lambda self: True)
    # Two more would see it: comparisons at the next question, and of derivatives behind hooks.
    monkeypatch.setattr(spot_check, "SHARE", 0.0)
    monkeypatch.setattr(recording, "_has_own_backward", lambda *args: False)
    with pytest.raises(AssertionError):
        test_a_change_of_derivatives_between_lengths_is_seen()


def test_proofs_that_are_not_compared_are_caught(monkeypatch, quiet):
    monkeypatch.setattr(same_form.Form, "is_like", lambda *args: True)
    monkeypatch.setattr(known_forms, "_proofs", lambda structure: 0)
    with pytest.raises(AssertionError):
        test_another_branch_for_other_lengths_is_judged_by_itself((11, 31))


def test_steps_that_are_not_compared_are_caught(monkeypatch):
    monkeypatch.setattr(same_form.Form, "is_like", lambda *args: True)
    with pytest.raises(AssertionError):
        test_steps_that_one_sample_takes_alone_leave_it_open()


def test_failed_trials_that_are_taken_over_are_caught(monkeypatch):
    monkeypatch.setattr(known_forms, "_has_passed", lambda *args: True)
    with pytest.raises(pytest.fail.Exception):
        test_a_rule_that_is_wrong_warns_at_every_length(monkeypatch)
