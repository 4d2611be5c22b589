"""Samples along several axes: tokens of sentences and pixels of images, held against the same net
on one axis.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import unbatch as ub
from cases.language import WORDS, language_model, near_in_single, text, with_prompts
from unbatch.analysis import inference as structure
from unbatch.analysis import loss_boundary as split
from unbatch.capture import sample_axes as folds
from unbatch.reference import definitions as reference

B, T, D, C = 3, 4, 5, 3


class Sentences(nn.Module):
    """Token by token, or with attention between those of a sentence."""

    def __init__(self, attention=False, norm=False):
        super().__init__()
        self.words, self.places = nn.Embedding(7, D), nn.Parameter(0.1 * torch.randn(T, D))
        self.hidden, self.head = nn.Linear(D, D), nn.Linear(D, C)
        self.attention, self.norm = attention, nn.BatchNorm1d(D) if norm else None

    def forward(self, words):
        h = self.words(words) + self.places
        if self.attention:
            h = (h @ h.mT).softmax(-1) @ h
        h = self.hidden(h)
        if self.norm is not None:
            h = self.norm(h.mT).mT
        return self.head(h.tanh())


class Pixels(nn.Module):
    """1x1 convolutions see one pixel each; larger ones its neighbours too."""

    def __init__(self, size=1):
        super().__init__()
        self.first, self.last = nn.Conv2d(2, 4, size, padding=size // 2), nn.Conv2d(4, C, 1)

    def forward(self, x):
        return self.last(self.first(x).tanh())


class Together(nn.Module):
    """The same net with one axis of samples on what it takes and gives."""

    def __init__(self, net, sizes, dims):
        super().__init__()
        self.net, self.sizes, self.dims = net, sizes, dims

    def forward(self, x):
        front = tuple(range(len(self.dims)))
        whole = x.unflatten(0, self.sizes)
        whole = whole.movedim(front, self.dims) if whole.ndim > max(self.dims) else whole
        return self.net(whole).movedim(self.dims, front).flatten(0, len(front) - 1)


def tokens_loss(p, y):
    return F.cross_entropy(p.flatten(0, 1), y.flatten())


def words():
    return torch.randint(7, (B, T)), torch.randint(C, (B, T))


def pixels():
    return torch.randn(2, 2, 3, 2), torch.randint(C, (2, 3, 2))


# net, data, loss, axes, sizes; whether samples are independent
CASES = {
    "tokens": (Sentences, words, tokens_loss, (0, 1), (B, T), "holds"),
    "tokens under attention": (
        lambda: Sentences(attention=True),
        words,
        tokens_loss,
        (0, 1),
        (B, T),
        "fails",
    ),
    "tokens under batch norm": (
        lambda: Sentences(norm=True),
        words,
        tokens_loss,
        (0, 1),
        (B, T),
        "fails",
    ),
    "pixels": (Pixels, pixels, F.cross_entropy, (0, 2, 3), (2, 3, 2), "holds"),
    "pixels and their neighbours": (
        lambda: Pixels(3),
        pixels,
        F.cross_entropy,
        (0, 2, 3),
        (2, 3, 2),
        "fails",
    ),
}


def problem_of(name):
    torch.manual_seed(0)
    make, data, loss, dims, sizes, _ = CASES[name]
    net, (x, y) = make().double(), data()
    x = x.double() if x.is_floating_point() else x
    front = tuple(range(len(dims)))
    folded = x.movedim(dims, front) if x.ndim > max(dims) else x
    args = (
        Together(net, sizes, dims),
        F.cross_entropy,
        folded.flatten(0, len(dims) - 1),
        y.flatten(),
    )
    return ub.Problem(net, loss, (x, y), sample_dims=dims), args


def near(found, expected, rounding=1e-10):
    assert (found - expected).abs().max() <= rounding * expected.abs().max().clamp_min(1e-12)


@pytest.mark.parametrize("name", CASES)
def test_verdicts(name):
    problem, _ = problem_of(name)
    structure = problem.structure
    assert structure.independent_forward.status == CASES[name][-1]
    assert (
        structure.reduction.status
        == structure.simd_loss.status
        == structure.canonical_split.status
        == "holds"
    )
    assert not [c for c in problem.verify().checks if c.passed is False]


@pytest.mark.parametrize("name", CASES)
def test_quantities_are_those_of_one_axis(name):
    problem, args = problem_of(name)
    rows, expected = problem.gradients(), reference.component(*args)
    for key, row in rows.items():
        near(row, expected[f"net.{key}"])
    near(sum_of(rows), reference.flat(expected).sum(0))
    G, dense = problem.ggn(), reference.ggn(*args)
    v = torch.randn(len(dense), dtype=torch.float64)
    near(G @ v, dense @ v, 1e-9)
    near(G.diag(), dense.diagonal(), 1e-9)
    near(G.diag(per_component=True), reference.ggn_diagonals(*args), 1e-9)


def sum_of(rows):
    return torch.cat([r.sum(0).flatten() for r in rows.values()])


def test_other_data_of_other_sizes():
    torch.manual_seed(0)
    net = Pixels().double()
    one, other = pixels(), (torch.randn(1, 2, 2, 2), torch.randint(C, (1, 2, 2)))
    problem = ub.Problem(net, F.cross_entropy, (one[0].double(), one[1]), sample_dims=(0, 2, 3))
    problem.gradients()
    moved = problem.with_batch(other[0].double(), other[1])
    assert moved.samples == 4
    for name, g in moved.gradient().items():
        near(moved.gradients()[name].sum(0), g, 1e-9)


class Flat(Pixels):
    """Asks for views that exist of contiguous tensors alone."""

    def forward(self, x):
        assert x.is_contiguous()
        return super().forward(x.view(len(x), -1).view(x.shape))


def test_models_and_losses_get_contiguous_tensors():
    def loss(p, y):
        return F.cross_entropy(p.view(len(p), C, -1), y.view(len(y), -1))

    torch.manual_seed(0)
    net, (x, y) = Flat().double(), pixels()
    problem = ub.Problem(net, loss, (x.double(), y), sample_dims=(0, 2, 3))
    gradient = problem.gradient()
    for name, rows in problem.gradients().items():
        near(rows.sum(0), gradient[name])


def test_a_sentence_is_a_sample_without_them():
    _, args = problem_of("tokens under attention")
    net = args[0].net
    whole = ub.Problem(net, tokens_loss, words())
    assert whole.samples == B
    assert whole.structure.independent_forward.status == "holds"


REFUSED = {
    "one axis": ({"sample_dims": (0,)}, "two or more"),
    "an axis twice": ({"sample_dims": (0, 0)}, "two or more"),
    "an axis twice, once from the end": ({"sample_dims": (0, 1, -2)}, "two or more"),
    "an axis beyond": ({"sample_dims": (0, 7)}, "X has a tensor of shape"),
    "in_dims beside them": ({"sample_dims": (0, 1), "in_dims": 1}, "leave out in_dims=1"),
    "axes that targets have not": ({"sample_dims": (0, 2)}, "y has a tensor of shape"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    options, says = REFUSED[name]
    x, y = torch.randn(B, T, D), torch.randint(C, (B, T))
    with pytest.raises(ub.InputError, match=says):
        ub.Problem(nn.Linear(D, C), tokens_loss, (x, y), **options)


def test_predictions_without_these_samples_are_refused():
    x, y = torch.randn(B, T, D), torch.randint(C, (B, T))
    problem = ub.Problem(
        lambda p, x: (x @ p["w"]).mean(1),
        lambda p, y: p.sum(),
        (x, y),
        sample_dims=(0, 1),
        parameters={"w": torch.randn(D, C, requires_grad=True)},
    )
    with pytest.raises(ub.InputError, match="none of which has the sample axes of"):
        problem.gradients()


def test_axes_from_the_end():
    x, y = pixels()
    net = Pixels()
    front, back = (
        ub.Problem(net, F.cross_entropy, (x, y), sample_dims=dims)
        for dims in ((0, 2, 3), (0, -2, -1))
    )
    assert back.samples == front.samples
    for name, rows in front.gradients().items():
        assert torch.equal(back.gradients()[name], rows)


def test_samples_in_another_order_are_caught():
    problem, args = problem_of("tokens")
    expected = reference.component(*args)
    turned = expected["net.hidden.weight"].view(B, T, D, D).movedim(1, 0).flatten(0, 1)
    with pytest.raises(AssertionError):
        near(problem.gradients()["hidden.weight"], turned)


# ---------------------------------------------------------------- models that bring their own loss


class Own(nn.Module):
    """A net and its loss in one, as language models come."""

    def __init__(self, net, loss):
        super().__init__()
        self.net, self.loss = net, loss

    def forward(self, x, labels):
        found = self.net(x)
        return {"loss": self.loss(found, labels), "logits": found}


class Normed(nn.Module):
    """Pixels under batch norm."""

    def __init__(self):
        super().__init__()
        self.below, self.norm, self.above = (
            nn.Conv2d(2, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.Conv2d(4, C, 1),
        )

    def forward(self, x):
        return self.above(self.norm(self.below(x)).tanh())


class Rounded(nn.Module):
    """A straight-through estimator: its recording has other derivatives, so they are taken of the
    model itself.
    """

    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(7, D), nn.Linear(D, C)

    def forward(self, words):
        h = 3 * self.words(words)
        return self.head(StraightThrough.apply(h))


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, g):
        return 1.5 * g


def next_tokens(p, y):
    return F.cross_entropy(p[:, :-1].flatten(0, 1), y[:, 1:].flatten())


def next_tokens_padded(p, y):
    """As the language models of transformers do it: the last token of each sentence has a label
    that is left out.
    """
    shifted = F.pad(y, (0, 1), value=-100)[:, 1:]
    return F.cross_entropy(p.flatten(0, 1), shifted.flatten())


def next_tokens_picked(p, y):
    return -p.log_softmax(-1)[:, :-1].gather(-1, y[:, 1:, None]).mean()


def next_tokens_halved(p, y):
    """Writes to the predictions."""
    return next_tokens(p.div_(2), y)


def next_values(p, y):
    return (p[:, :-1] - y[:, 1:, None]).square().sum(-1).mean()


def differences(p, y):
    """Neighbours are compared with each other: no sum over tokens."""
    return (p[:, 1:] - p[:, :-1] - y[:, 1:, None]).square().mean()


def twice(p, y):
    """The labels of two tokens for each prediction."""
    return next_tokens(p, y) + F.cross_entropy(p[:, :-2].flatten(0, 1), y[:, 2:].flatten())


def by_place(p, y):
    """What comes later in a sentence counts more."""
    places = torch.arange(T - 1, dtype=p.dtype)
    return ((p[:, :-1] - y[:, 1:, None]).square().sum(-1) * places).mean()


def labels_by_place(p, y):
    """No one function of a prediction and a label, but another at every place."""
    return (p[:, :-1] - (y * torch.arange(T))[:, 1:, None]).square().sum(-1).mean()


def channels_flat(p, y):
    """A view that needs the memory of what a convolution returns to be as it was."""
    return F.cross_entropy(p.view(len(p), C, -1), y.view(len(y), -1))


def labelled():
    """One label is to be left out."""
    x, y = words()
    return x, y.index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(-100))


def channels_last():
    x, y = pixels()
    return x.contiguous(memory_format=torch.channels_last), y


attending = lambda: Sentences(attention=True)  # noqa: E731
token = (0, 1), (B, T)
pixel = (0, 2, 3), (2, 3, 2)
SUM, NEITHER, OPEN = ("holds", "holds"), ("fails", "fails"), ("unknown", "unknown")
OWN_TERMS = ("holds", "unknown")  # a sum, of terms that go by the place

# net, data, loss, axes, sizes; whether samples are independent, and the loss a sum over samples of
# one loss
OWN = {
    "tagger": (Sentences, words, tokens_loss, *token, "holds", SUM),
    "tagger with labels left out": (Sentences, labelled, tokens_loss, *token, "holds", SUM),
    "tagger under attention": (attending, words, tokens_loss, *token, "fails", SUM),
    "tagger under batch norm": (
        lambda: Sentences(norm=True),
        words,
        tokens_loss,
        *token,
        "fails",
        SUM,
    ),
    "next tokens": (attending, words, next_tokens, *token, "fails", SUM),
    "next tokens, without attention": (Sentences, words, next_tokens, *token, "holds", SUM),
    "next tokens, padded": (attending, labelled, next_tokens_padded, *token, "fails", SUM),
    "next tokens, picked": (attending, words, next_tokens_picked, *token, "fails", SUM),
    "next tokens, predictions written to": (
        attending,
        words,
        next_tokens_halved,
        *token,
        "fails",
        SUM,
    ),
    "next values": (attending, words, next_values, *token, "fails", SUM),
    "next values, weighed by place": (attending, words, by_place, *token, "fails", OWN_TERMS),
    "next values, labels changed by place": (
        attending,
        words,
        labels_by_place,
        *token,
        "fails",
        OPEN,
    ),
    "the next two tokens": (attending, words, twice, *token, "fails", OWN_TERMS),
    "differences of neighbours": (Sentences, words, differences, *token, "holds", NEITHER),
    "pixels": (Pixels, pixels, F.cross_entropy, *pixel, "holds", SUM),
    "pixels under batch norm": (Normed, pixels, F.cross_entropy, *pixel, "fails", SUM),
    "pixels, flattened by the loss": (Normed, pixels, channels_flat, *pixel, "fails", SUM),
    "pixels, channels last": (Normed, channels_last, F.cross_entropy, *pixel, "fails", SUM),
    "derivatives of its own": (Rounded, words, next_tokens, *token, "holds", SUM),
}


def own_problem(name):
    """A model with its own loss, the same given apart, and the arguments of the reference, on one
    axis of samples.
    """
    torch.manual_seed(0)
    make, data, loss, dims, sizes, *_ = OWN[name]
    net, (x, y) = make().double(), data()
    x = x.double() if x.is_floating_point() else x
    front = tuple(range(len(dims)))
    rows = (x.movedim(dims, front) if x.ndim > max(dims) else x).flatten(0, len(dims) - 1)
    own = ub.Problem(Own(net, loss), batch={"x": x, "labels": y}, sample_dims=dims)
    apart = ub.Problem(net, loss, (x, y), sample_dims=dims)

    def on_rows(p, y):
        whole = (
            p.unflatten(0, sizes).movedim(front, dims).clone(memory_format=torch.contiguous_format)
        )
        return loss(whole, y.unflatten(0, sizes))

    return own, apart, (Together(net, sizes, dims), on_rows, rows, y.flatten())


@pytest.mark.parametrize("name", OWN)
def test_verdicts_with_a_loss_of_its_own(name):
    problem, apart, _ = own_problem(name)
    structure = problem.structure
    assert structure.predictions == ((problem.samples, C),)
    assert structure.canonical_split.status == "holds"
    found = (
        structure.independent_forward.status,
        (structure.reduction.status, structure.simd_loss.status),
    )
    assert found == OWN[name][-2:]
    assert found[0] == apart.structure.independent_forward.status
    assert not [c for c in problem.verify().checks if c.passed is False]


@pytest.mark.parametrize("name", OWN)
def test_quantities_with_a_loss_of_its_own(name):
    problem, apart, args = own_problem(name)
    rows, expected = problem.gradients(), reference.component(*args)
    near(rows.flat(), reference.flat(expected))
    near(sum_of(rows), torch.cat([g.flatten() for g in problem.gradient().values()]))
    near(problem.predictions(), args[0](args[2]))
    G, dense = problem.ggn(), reference.ggn(*args)
    v = torch.randn(len(dense), dtype=torch.float64)
    near(G @ v, dense @ v, 1e-9)
    near(G.diag(), dense.diagonal(), 1e-9)
    near(G.diag(), apart.ggn().diag(), 1e-9)
    if problem.structure.reduction:
        near(G.diag(per_component=True), reference.ggn_diagonals(*args), 1e-9)


@pytest.mark.parametrize("name", OWN)
def test_copies_with_a_loss_of_its_own(name):
    problem, apart, _ = own_problem(name)
    try:
        expected = apart.gradients(by="copy")
    except ub.StructureError:
        with pytest.raises(ub.StructureError):
            problem.gradients(by="copy")
        return
    near(problem.gradients(by="copy").flat(), expected.flat())
    assert problem.gradients(by="copy").kind == (
        "per-sample" if OWN[name][-2:] == ("holds", SUM) else "per-copy"
    )


# ---------------------------------------------------------------- models of transformers


class Apart(nn.Module):
    """The parameters of a whole model under their names; its logits, of rows of samples."""

    def __init__(self, whole):
        super().__init__()
        for name, part in whole.named_children():
            self.add_module(name, part)
        self.whole = [whole]

    def forward(self, input_ids, attention_mask):
        ids, mask = input_ids.unflatten(0, (3, 5)), attention_mask.unflatten(0, (3, 5))
        return self.whole[0](input_ids=ids, attention_mask=mask).logits.flatten(0, 1)


def tagger():
    return bert(transformers().BertForTokenClassification)


def masked():
    return bert(transformers().BertForMaskedLM)


def bert(kind):
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 12,
    }
    config = transformers().BertConfig(
        vocab_size=WORDS, num_labels=WORDS, max_position_embeddings=8, **sizes
    )
    return kind(config).double().eval()


def transformers():
    import transformers

    return transformers


def shifted_in_single(p, y):
    return F.cross_entropy(
        p.unflatten(0, (3, 5))[:, :-1].flatten(0, 1).float(),
        y.unflatten(0, (3, 5))[:, 1:].flatten(),
    )


MODELS = {
    "causal language model": (language_model, shifted_in_single, "lm_head"),
    "tokens classified": (tagger, F.cross_entropy, "classifier"),
    "masked language model": (masked, F.cross_entropy, "cls.predictions"),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_of_transformers_with_padding_and_masked_labels(name):
    make, loss, place = MODELS[name]
    model, batch = make(), with_prompts(text())
    problem = ub.Problem(model, batch=batch, sample_dims=(0, 1))
    structure = problem.structure
    assert structure.predictions == ((15, WORDS),)
    assert f"at a value of shape [15, {WORDS}] ({place}" in structure.notes[0]
    assert structure.independent_forward.status == "fails"
    assert structure.canonical_split
    assert structure.reduction
    assert structure.simd_loss
    assert structure.reduction.weights_depend_on == {
        "inputs"
    }  # how many labels there are to average over
    assert not [c for c in problem.verify().checks if c.passed is False]

    rows = problem.gradients()
    told = batch["labels"][:, 1:] != -100 if name.startswith("causal") else batch["labels"] != -100
    asked = F.pad(told, (0, 5 - told.shape[1])).flatten()
    assert rows.kind == "per-component"
    assert torch.equal(
        rows.flat().any(1), asked
    )  # no label, no row: the last word of a sentence predicts nothing

    args = (
        Apart(model),
        loss,
        {k: batch[k].flatten() for k in ("input_ids", "attention_mask")},
        batch["labels"].flatten(),
    )
    near_in_single(rows.flat(), reference.flat(reference.component(*args)), "rows")
    near_in_single(
        sum_of(rows), torch.cat([g.flatten() for g in problem.gradient().values()]), "gradient"
    )
    G, dense = problem.ggn(), reference.ggn(*args)
    v = torch.ones(len(dense), dtype=torch.float64)
    near_in_single(G @ v, dense @ v, "product")
    near_in_single(G.diag(), dense.diagonal(), "diagonal")


def test_other_sentences_for_a_model_with_its_own_loss():
    model, batch = language_model(), text()
    problem = ub.Problem(model, batch=batch, sample_dims=(0, 1))
    problem.gradients()
    for other in (
        {**batch, "labels": batch["labels"].roll(1, 0)},
        {k: t[:2, :4] for k, t in batch.items()},
    ):
        moved, fresh = problem.with_batch(other), ub.Problem(model, batch=other, sample_dims=(0, 1))
        assert moved.samples == other["labels"].numel()
        near(moved.gradients().flat(), fresh.gradients().flat())


# ----------------------------------------------------- parts beside the tokens, and what is refused


class Cut(nn.Module):
    """Its loss is cut at something else than one tensor of all tokens, or
    reads parameters as well.
    """

    def __init__(self, how, attention=False):
        super().__init__()
        self.words, self.head, self.how, self.attention = (
            nn.Embedding(7, D),
            nn.Linear(D, C),
            how,
            attention,
        )
        self.other = nn.Linear(D, C)

    def forward(self, x, labels):
        h = self.words(x)
        h = (h @ h.mT).softmax(-1) @ h if self.attention else h
        if self.how == "all but the last":
            return F.cross_entropy(self.head(h[:, :-1]).flatten(0, 1), labels[:, 1:].flatten())
        if self.how == "flat":
            return F.cross_entropy(self.head(h.flatten(0, 1)), labels.flatten())
        loss = tokens_loss(self.head(h), labels)
        if self.how == "sentences beside":
            return loss + F.cross_entropy(self.other(h.mean(1)), labels[:, 0])
        if self.how == "two heads":
            return loss + next_tokens(self.other(h), labels)
        return loss + 0.1 * self.words.weight.square().sum()


def own_cut(*args):
    torch.manual_seed(0)
    x, y = words()
    return ub.Problem(Cut(*args).double(), batch={"x": x, "labels": y}, sample_dims=(0, 1))


UNKNOWN_TOKENS = {
    "all but the last": ("all but the last", False),
    "flat, after attention": ("flat", True),
}


@pytest.mark.parametrize("name", UNKNOWN_TOKENS)
def test_a_cut_without_known_tokens_is_refused(name):
    problem = own_cut(*UNKNOWN_TOKENS[name])
    for ask in (lambda: problem.structure, problem.gradients, problem.ggn):
        with pytest.raises(
            ub.InputError, match=r"do not have the sample axes of sample_dims=.*pass the loss"
        ):
            ask()


def test_a_flat_cut_is_taken_where_its_tokens_are_known():
    problem = own_cut("flat")
    assert problem.structure.independent_forward
    near(sum_of(problem.gradients()), torch.cat([g.flatten() for g in problem.gradient().values()]))


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize(
    ("how", "alone"), [("two heads", True), ("sentences beside", False), ("decay", False)]
)
def test_several_heads_and_what_parameters_do_beside_them(how, alone, attention):
    problem = own_cut(how, attention)
    rows = problem.gradients()
    assert (B * T, C) in problem.structure.predictions
    assert bool(rows.rest) is not alone
    for name, g in problem.gradient().items():
        near(rows[name].sum(0) + rows.rest.get(name, torch.zeros_like(g)), g)


def test_inputs_without_tokens_are_refused():
    x, _ = words()
    with pytest.raises(ub.InputError, match=r"X has a tensor of shape \(3,\)"):
        ub.Problem(Cut("flat"), batch={"x": x, "labels": torch.zeros(B)}, sample_dims=(0, 1))


def test_a_cut_folded_in_another_order_is_caught(monkeypatch):
    fold = folds.SampleAxes.folded
    turned = lambda self, tree, axes: fold(self, tree, [a and a[::-1] for a in axes])  # noqa: E731
    problem, _, args = own_problem("next tokens")
    monkeypatch.setattr(folds.SampleAxes, "folded", turned)
    with pytest.raises((AssertionError, ub.UnbatchError)):
        near(problem.gradients().flat(), reference.flat(reference.component(*args)))


def test_labels_left_with_the_tokens_they_came_with_are_caught(monkeypatch):
    monkeypatch.setattr(structure, "placed", lambda *_: {})
    with pytest.raises(AssertionError):
        test_verdicts_with_a_loss_of_its_own("next tokens")


def test_labels_of_several_kinds_taken_for_one_are_caught(monkeypatch):
    beside = split._beside
    alike = lambda m: replace(m, key=np.zeros_like(m.key))  # noqa: E731
    monkeypatch.setattr(
        split, "_beside", lambda label, prediction: beside(alike(label), prediction)
    )
    with pytest.raises(AssertionError):
        test_verdicts_with_a_loss_of_its_own("next values, labels changed by place")
