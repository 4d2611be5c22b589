"""What is proved is tried before it is handed out: wrong rules are contradicted, right ones not."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import unbatch as ub
from cases.planted import PLANTED, Net, as_rule, linear_loss
from unbatch.analysis import loss_inference
from unbatch.analysis.domain.ownership import shared
from unbatch.analysis.rules import registry
from unbatch.analysis.rules.registry import pointwise
from unbatch.errors import ContradictedProofWarning
from unbatch.verification.experiment import Experiment
from unbatch.verification.loss_trial import reads_only_arguments
from unbatch.verification.trial_result import PASSED

N, D, T, WORDS = 6, 4, 5, 11


def structure_of(model, loss, data) -> tuple[ub.Structure, list[str]]:
    """The structure, and what was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        structure = ub.Problem(model, loss, data).structure
    return structure, [str(w.message) for w in caught if w.category is ContradictedProofWarning]


# --- wrong rules ----------------------------------------------------------------------------------


def first_owner(call):
    """What a lookup by an index of another sample returns is said to be the own sample's."""
    return call["self"]


def constant(call):
    return shared(call.shape, call.name, call["self"].sources)


def rolled(net, x):
    return net.linear(x).flip(0)


def scaled_by_the_largest(net, x):
    return net.linear(x) / x.detach().amax()


def by_the_last_sample(net, x):
    return net.linear(x) + x.detach()[:, :1].cumsum(0)


OWN = [
    ("a flip keeps the owners", as_rule(first_owner, "flip"), rolled, "independent_forward"),
    ("an extreme is constant", as_rule(constant, "amax"), scaled_by_the_largest, "simd_forward"),
    ("a cumsum is pointwise", as_rule(pointwise, "cumsum"), by_the_last_sample, "simd_forward"),
]


@pytest.mark.parametrize(("name", "plant", "run", "verdict"), OWN, ids=[case[0] for case in OWN])
def test_a_wrong_rule_is_contradicted(name, plant, run, verdict, monkeypatch):
    plant(monkeypatch)
    torch.manual_seed(0)
    data = torch.randn(2, D, D, dtype=torch.float64)
    structure, said = structure_of(Net(run).double(), linear_loss, (data[0], data[1]))
    assert getattr(structure, verdict).status == "fails"
    assert any("please report" in text for text in said)


# By the test of what Python reads, another path: no batch of one path shows it.
SEEN = [p for p in PLANTED if p.name != "branches go unseen"]


@pytest.mark.parametrize("planted", [pytest.param(p, id=p.name) for p in SEEN])
def test_a_planted_bug_is_contradicted(planted, monkeypatch):
    planted.plant(monkeypatch)
    problem = planted.problem()
    with pytest.warns(ContradictedProofWarning, match="please report"):
        structure = problem.structure
    assert getattr(structure, planted.verdict).status == "fails"
    assert problem.verify()


def test_a_verdict_without_a_witness_is_unknown(monkeypatch):
    """Where the tests of ``verify`` find nothing, what is left is no proof."""
    {p.name: p for p in PLANTED}["a pair belongs to its first sample"].plant(monkeypatch)
    silent = "unbatch.verification.forward_trial."
    monkeypatch.setattr(silent + "cross_sample_dependence", lambda _: None)
    monkeypatch.setattr(silent + "not_equivariant", lambda _: None)
    torch.manual_seed(0)
    data = torch.randn(2, D, D, dtype=torch.float64)
    model = Net(lambda net, x: net.linear(x) + net.linear(x).roll(1, 0)).double()
    structure, said = structure_of(model, linear_loss, (data[0], data[1]))
    for name in ("independent_forward", "simd_forward", "simd_given_statistics"):
        verdict = getattr(structure, name)
        assert verdict.status == "unknown"
        assert "a trial on another batch contradicts" in verdict.note
    assert len(said) == 3


def test_weights_that_depend_on_targets_are_said_to(monkeypatch):
    """The sum is one; what was proved of its weights is not so."""
    monkeypatch.setattr(loss_inference, "_batch_constants", lambda *_, **__: frozenset())
    torch.manual_seed(0)
    loss = lambda p, y: ((p - y).square().mean(1) * y[:, 0]).sum() / y[:, 0].sum()  # noqa: E731
    structure, said = structure_of(nn.Linear(D, D), loss, (torch.randn(N, D), torch.rand(N, D)))
    assert structure.reduction.status == "holds"
    assert structure.reduction.weights_depend_on == {"targets"}
    assert len(said) == 1


class Keeps(nn.Linear):
    def forward(self, x):
        self.size = float(self.weight.detach().norm())
        return super().forward(x)


def test_a_number_that_the_forward_pass_keeps_for_the_loss(monkeypatch):
    monkeypatch.setattr(loss_inference, "_reads_parameters", lambda *_: False)
    torch.manual_seed(0)
    model = Keeps(D, D)
    loss = lambda p, y: (p - y).square().mean() * model.size  # noqa: E731
    structure, _ = structure_of(model, loss, (torch.randn(N, D), torch.randn(N, D)))
    assert structure.canonical_split.status != "holds"


def test_a_declared_independence_is_not_tried(monkeypatch):
    """The user has said so: no bug of the package."""
    monkeypatch.setattr(registry, "ASSUMED_MODULES", registry.ASSUMED_MODULES.copy())
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D))
    ub.assume_independent(model[1])
    structure, said = structure_of(model, F.mse_loss, (torch.randn(N, D), torch.randn(N, D)))
    assert structure.independent_forward.basis == "assumed"
    assert not said


# --- right rules ----------------------------------------------------------------------------------


class Of(nn.Module):
    """Named parts, and a function of them and the inputs."""

    def __init__(self, run, **parts):
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs):
        return self.run(self, *inputs)


def tokens():
    return torch.randint(1, WORDS, (N, T))


def floats(*shape):
    return torch.randn(N, *(shape or (D,)))


def padded(net, ids, lengths):
    mask = torch.arange(T) < lengths[:, None]
    h = net.words(ids) * mask[..., None]
    return net.linear(h.sum(1) / lengths[:, None])


def attended(net, ids):
    h = net.words(ids)
    return net.linear(net.layer(h, src_key_padding_mask=ids == 0).mean(1))


def sequences(net, ids):
    return net.linear(net.rnn(net.words(ids))[0][:, -1])


def layer(**options):
    return nn.TransformerEncoderLayer(D, 2, 8, batch_first=True, **options)


def words():
    return nn.Embedding(WORDS, D)


def classes():
    return torch.randint(D, (N,))


def with_ignored():
    labels = classes()
    labels[1] = -100
    return labels


linear = lambda: nn.Linear(D, D)  # noqa: E731
weights = torch.rand(D) + 0.5


MODELS = {
    "linear": lambda: (linear(), floats()),
    "deep": lambda: (nn.Sequential(linear(), nn.Tanh(), linear(), nn.ReLU(), linear()), floats()),
    "dropout": lambda: (nn.Sequential(linear(), nn.Dropout(0.5), linear()), floats()),
    "dropout of channels": lambda: (
        nn.Sequential(nn.Conv2d(1, D, 3), nn.Dropout2d(), nn.Flatten(), nn.Linear(36, D)),
        floats(1, 5, 5),
    ),
    "batch norm": lambda: (nn.Sequential(linear(), nn.BatchNorm1d(D), linear()), floats()),
    "batch norm in eval": lambda: (nn.Sequential(linear(), nn.BatchNorm1d(D)).eval(), floats()),
    "two batch norms and dropout": lambda: (
        nn.Sequential(linear(), nn.BatchNorm1d(D), nn.Dropout(), linear(), nn.BatchNorm1d(D)),
        floats(),
    ),
    "batch norm of images": lambda: (
        nn.Sequential(nn.Conv2d(1, D, 3), nn.BatchNorm2d(D), nn.Flatten(), nn.Linear(36, D)),
        floats(1, 5, 5),
    ),
    "group norm": lambda: (nn.Sequential(linear(), nn.GroupNorm(2, D)), floats()),
    "a mean of the batch": lambda: (Of(lambda n, x: n.l(x) - x.mean(0), l=linear()), floats()),
    "a positive input": lambda: (Of(lambda n, x: n.l(x.log()), l=linear()), floats().exp()),
    "probabilities": lambda: (Of(lambda n, x: n.l(x.acos()), l=linear()), torch.rand(N, D)),
    "embedding": lambda: (Of(lambda n, i: n.e(i).mean(1), e=words()), tokens()),
    "padding mask": lambda: (
        Of(padded, words=words(), linear=linear()),
        (tokens(), torch.randint(1, T + 1, (N,))),
    ),
    "attention": lambda: (Of(attended, words=words(), linear=linear(), layer=layer()), tokens()),
    "attention in eval": lambda: (
        Of(attended, words=words(), linear=linear(), layer=layer()).eval(),
        tokens(),
    ),
    "lstm": lambda: (
        Of(sequences, words=words(), linear=linear(), rnn=nn.LSTM(D, D, batch_first=True)),
        tokens(),
    ),
    "gru with dropout": lambda: (
        Of(
            sequences,
            words=words(),
            linear=linear(),
            rnn=nn.GRU(D, D, 2, batch_first=True, dropout=0.5),
        ),
        tokens(),
    ),
    "noise that is added": lambda: (
        Of(lambda n, x: n.l(x + torch.randn_like(x)), l=linear()),
        floats(),
    ),
    "counts that are drawn": lambda: (
        Of(lambda n, x: n.l(torch.poisson(x.exp())), l=linear()),
        floats(),
    ),
    "values far from one": lambda: (nn.Sequential(linear(), nn.Tanh()), 1e6 * floats()),
    "rounded values": lambda: (Of(lambda n, x: n.l(x).round() + x, l=linear()), floats()),
    "half precision": lambda: (linear().to(torch.bfloat16), floats().to(torch.bfloat16)),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_right_verdict_on_a_model_stays(name):
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    structure, said = structure_of(model, F.cross_entropy, (inputs, classes()))
    assert not said
    proved = [v for v in structure.verdicts if v.status == "holds"]
    assert [v.trial for v in proved] == [PASSED] * len(proved)
    assert structure.simd_given_statistics.status == "holds"


def own_weights(p, y):
    return (F.cross_entropy(p, y, reduction="none") * weights[y]).mean()


LOSSES = {
    "mean": (F.cross_entropy, classes),
    "sum": (lambda p, y: F.cross_entropy(p, y, reduction="sum"), classes),
    "ignored labels": (F.cross_entropy, with_ignored),
    "no ignored label": (nn.CrossEntropyLoss(ignore_index=2), classes),
    "a count of labels": (
        lambda p, y: F.cross_entropy(p, y, reduction="sum") / (y != -100).sum(),
        with_ignored,
    ),
    "class weights": (nn.CrossEntropyLoss(weight=weights), classes),
    "weights by lookup": (own_weights, classes),
    "smoothed labels": (nn.CrossEntropyLoss(label_smoothing=0.1), classes),
    "squares": (F.mse_loss, floats),
    "absolute values": (F.l1_loss, floats),
    "huber": (F.huber_loss, floats),
    "probabilities": (
        lambda p, y: F.binary_cross_entropy(p.sigmoid(), y),
        lambda: torch.rand(N, D),
    ),
    "root of a mean": (lambda p, y: F.mse_loss(p, y).sqrt(), floats),
    "hardest": (lambda p, y: (p - y).square().mean(1).topk(3).values.mean(), floats),
    "standardised targets": (
        lambda p, y: ((p - (y - y.mean(0)) / y.std(0)).square()).mean(),
        floats,
    ),
    "margins": (F.multi_margin_loss, classes),
    "contrastive": (lambda p, y: F.cross_entropy(p @ p.T, torch.arange(N)), classes),
    "one number each": (lambda p, y: (p[:, 0] - y).square().mean().log(), lambda: torch.rand(N)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_right_verdict_on_a_loss_stays(name):
    torch.manual_seed(0)
    loss, targets = LOSSES[name]
    structure, said = structure_of(linear(), loss, (floats(), targets()))
    assert not said
    for verdict in (structure.reduction, structure.simd_loss):
        assert verdict.trial == (PASSED if verdict.status == "holds" else "")


def test_a_single_sample_is_not_tried_and_says_so():
    embedding = nn.Embedding(5, 3).double()  # of one number: others like it are the same
    data = torch.tensor([2]), torch.randn(1, 3).double()
    structure, _ = structure_of(embedding, F.mse_loss, data)
    assert structure.reduction.status == "holds"
    assert "proved, not tried: a single sample" in str(structure.reduction)
    assert structure.to_dict()["verdicts"]["reduction"]["basis"] == "proved"


def test_a_program_that_takes_no_other_batch_is_not_tried_and_says_so(monkeypatch):
    def refuse(*_):
        raise ValueError("another batch")

    monkeypatch.setattr(Experiment, "shuffled", refuse)
    structure, said = structure_of(linear(), F.mse_loss, (floats(), floats()))
    assert not said
    assert "not tried: the program takes no other batch" in str(structure.independent_forward)
    assert structure.reduction.trial == PASSED


def test_it_is_tried_once(monkeypatch):
    calls = []
    from unbatch.verification import verify

    true_trial = verify.tried
    monkeypatch.setattr(verify, "tried", lambda *a: calls.append(1) or true_trial(*a))
    problem = ub.Problem(linear(), F.mse_loss, (floats(), floats()))
    for _ in range(2):
        problem.structure  # noqa: B018
        problem.gradients()
        problem.ggn().diag()
    problem.with_batch(floats(), floats()).gradients()
    assert len(calls) == 1


# --- which losses may see the model ---------------------------------------------------------------

SCALE = [1.0]


def test_what_a_loss_may_see():
    model = linear()
    assert reads_only_arguments(F.cross_entropy)
    assert reads_only_arguments(nn.CrossEntropyLoss())
    assert reads_only_arguments(lambda p, y: F.mse_loss(p, y) + torch.zeros(()))
    assert not reads_only_arguments(lambda p, y: F.mse_loss(p, y) * SCALE[0])
    assert not reads_only_arguments(lambda p, y: F.mse_loss(p, y) * model.bias.sum())
    assert not reads_only_arguments(lambda p, y, m=model: F.mse_loss(p, y))
