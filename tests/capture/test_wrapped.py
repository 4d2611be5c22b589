"""Models as they come: with a loss of their own, wrapped for training, partly frozen, quantised,
tied or hooked.

Each is held against the slow definitions on the plain model in float64, and asking must leave it as
it was.
"""

import warnings
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations
from torch.utils import checkpoint as checkpoint_module
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import unbatch as ub
from cases.comparison import near
from cases.language import WORDS, T, language_model, near_in_single, text, with_prompts
from cases.state import assert_unchanged, state
from unbatch.capture import wrappers as unwrapped
from unbatch.reference import definitions as reference

N, D, C = 6, 4, 3
ZERO = (
    1e-15  # what is left of larger numbers where a bias right below a batch norm has no derivative
)


def inputs() -> Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def labels() -> Tensor:
    return torch.tensor([0, 1, 2, 0, 1, 1])


# ---------------------------------------------------------------- the check


def check(problem: ub.Problem, model: nn.Module, loss: Any, X: Any, y: Any) -> None:
    """Gradients, norms, products and diagonal are those of ``reference`` on ``model``, and nothing
    is changed.

    ``model``: the same without what is wrapped around it. Raises ``AssertionError``.
    """
    before, wrapped = state(problem), problem.program.model
    hooks = [list(m._forward_hooks) + list(m._backward_hooks) for m in wrapped.modules()]
    rows, norms, gradient = (
        problem.gradients(),
        problem.compute(ub.SquaredNorms()),
        problem.gradient(),
    )
    G = problem.ggn()
    v = torch.randn(G.shape[0], generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    product, diagonal, structure = G @ v, G.diag(), problem.structure
    assert_unchanged(before, state(problem))
    assert hooks == [list(m._forward_hooks) + list(m._backward_hooks) for m in wrapped.modules()]
    assert structure.canonical_split, str(structure)

    expected = reference.component(model, loss, X, y)
    assert list(rows) == [n for n, p in wrapped.named_parameters() if p.requires_grad]
    near(rows.flat(), reference.flat(expected), "rows", ZERO)
    near(norms.total, reference.squared_norms(expected)[1], "squared norms", ZERO)
    near(
        torch.cat([g.flatten() for g in gradient.values()]),
        reference.flat(expected).sum(0),
        "gradient",
        ZERO,
    )
    matrix = reference.ggn(model, loss, X, y)
    near(product, matrix @ v, "product", ZERO)
    near(diagonal, matrix.diagonal(), "diagonal", ZERO)


# ---------------------------------------------------------------- wrapped, with the loss outside


def blocks() -> list[nn.Module]:
    torch.manual_seed(0)
    below = nn.Sequential(nn.Linear(D, 5), nn.BatchNorm1d(5), nn.Tanh())
    above = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.0))
    return [nn.Linear(D, D), below, above, nn.Linear(5, C)]


def plain() -> nn.Module:
    return nn.Sequential(*blocks()).double()


class Checkpointed(nn.Sequential):
    """Two blocks of it are computed again in the backward pass."""

    def __init__(self, how: str) -> None:
        super().__init__(*blocks())
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        first, below, above, last = self
        x = first(x)
        if self.how == "sequential":
            return last(checkpoint_sequential([below, above], 2, x, use_reentrant=False))
        reentrant = self.how == "reentrant"
        return last(
            checkpoint(
                above, checkpoint(below, x, use_reentrant=reentrant), use_reentrant=reentrant
            )
        )


def checkpointed(how: str) -> nn.Module:
    return Checkpointed(how).double()


def never(*_: Any) -> Any:
    raise AssertionError("run while a question is answered")


compiled = partial(torch.compile, backend=never)


def with_a_compiled_part() -> nn.Module:
    model = plain()
    model[1] = compiled(model[1])
    return model


def compiled_in_place() -> nn.Module:
    model = plain()
    model.compile(backend=never)
    return model


def compiled_and_checkpointed() -> nn.Module:
    model = checkpointed("not reentrant")
    model[1].compile(backend=never)
    return model


WRAPPED: dict[str, Callable[[], nn.Module]] = {
    "checkpointed, reentrant": lambda: checkpointed("reentrant"),
    "checkpointed, not reentrant": lambda: checkpointed("not reentrant"),
    "checkpointed, sequential": lambda: checkpointed("sequential"),
    "compiled": lambda: compiled(plain()),
    "with a compiled part": with_a_compiled_part,
    "compiled in place": compiled_in_place,
    "checkpointed with a compiled part": compiled_and_checkpointed,
    "data-parallel in threads": lambda: nn.DataParallel(plain()),
}


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", WRAPPED)
def test_what_is_wrapped_is_as_the_plain_model(name, mode):
    wrapped, model = (m.train(mode == "train") for m in (WRAPPED[name](), plain()))
    problem = ub.Problem(wrapped, F.cross_entropy, (inputs(), labels()))
    check(problem, model, F.cross_entropy, inputs(), labels())
    assert (
        problem.structure.statuses
        == ub.Problem(model, F.cross_entropy, (inputs(), labels())).structure.statuses
    )
    assert problem.verify()


def test_afterwards_it_is_compiled_as_before():
    model = compiled(plain())
    str(ub.Problem(model, F.cross_entropy, (inputs(), labels())).structure)
    with pytest.raises(Exception, match="run while"):
        model(inputs())


def test_threads_that_take_turns_leave_the_switches_as_they_were():
    """The one that came first leaves first; and one leaves by an exception."""
    before = checkpoint_module.CheckpointFunction
    first, second = unwrapped.plainly(), unwrapped.plainly()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert checkpoint_module.CheckpointFunction is unwrapped._Kept
    assert not second.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert checkpoint_module.CheckpointFunction is before


def test_a_compiled_loss():
    loss = torch.compile(F.cross_entropy, backend=never)
    check(
        ub.Problem(plain(), loss, (inputs(), labels())),
        plain(),
        F.cross_entropy,
        inputs(),
        labels(),
    )


def test_reentrant_checkpointing_of_the_first_block_has_no_gradients_there():
    """As in training, and as PyTorch warns: none of the arguments requires a gradient, so nothing
    below gets any.
    """

    class First(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[1](checkpoint(self[0], x, use_reentrant=True))

    torch.manual_seed(0)
    model = First(nn.Linear(D, D), nn.Linear(D, C)).double()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="None of the inputs have requires_grad")
        F.cross_entropy(model(inputs()), labels()).backward()
    rows = ub.Problem(model, F.cross_entropy, (inputs(), labels())).gradients()
    assert model[0].weight.grad is None
    assert not rows["0.weight"].any()
    near(rows["1.weight"].sum(0), model[1].weight.grad, "above")


def without_gradients(function: Any, preserve: bool, *args: Any) -> Any:
    with torch.no_grad():
        return function(*args)


def test_a_planted_way_to_run_checkpoints_is_caught(monkeypatch):
    monkeypatch.setattr(unwrapped._Kept, "apply", without_gradients)
    problem = ub.Problem(checkpointed("reentrant"), F.cross_entropy, (inputs(), labels()))
    with pytest.raises(AssertionError, match="rows: off by"):
        check(problem, plain(), F.cross_entropy, inputs(), labels())


def test_a_planted_trace_is_caught(monkeypatch):
    """A parameter that is moved by a question, and nothing else."""
    problem = ub.Problem(plain(), F.cross_entropy, (inputs(), labels()))
    ask = problem.compute

    def moving(*quantities: Any) -> Any:
        problem.program.model[0].weight.data[0, 0] += 1
        return ask(*quantities)

    monkeypatch.setattr(problem, "compute", moving)
    with pytest.raises(AssertionError, match=r"changed: \['0.weight'"):
        check(problem, plain(), F.cross_entropy, inputs(), labels())


# ---------------------------------------------------------------- data parallel


@pytest.fixture
def _process(tmp_path):
    """A group of one process."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def stepped() -> nn.Module:
    """In the middle of training, with gradients."""
    model = DistributedDataParallel(plain())
    F.cross_entropy(model(inputs()), labels()).backward()
    return model


PARALLEL: dict[str, Callable[[], nn.Module]] = {
    "as it comes": lambda: DistributedDataParallel(plain()),
    "looking for unused parameters": lambda: DistributedDataParallel(
        plain(), find_unused_parameters=True
    ),
    "of a static graph": lambda: DistributedDataParallel(plain(), static_graph=True),
    "in the middle of training": stepped,
    "of a compiled model": lambda: DistributedDataParallel(compiled(plain())),
    "of a checkpointed model": lambda: DistributedDataParallel(checkpointed("reentrant")),
}


@pytest.mark.usefixtures("_process")
@pytest.mark.parametrize("name", PARALLEL)
def test_distributed_data_parallel(name, monkeypatch):
    """Answered without the other processes, which need not ask the same; under the names that the
    wrapper has.
    """
    model = PARALLEL[name]()
    twin = deepcopy(model.module) if name == "in the middle of training" else plain()
    monkeypatch.setattr(DistributedDataParallel, "forward", never)
    problem = ub.Problem(model, F.cross_entropy, (inputs(), labels()))
    check(problem, twin, F.cross_entropy, inputs(), labels())
    assert problem.verify()


@pytest.mark.usefixtures("_process")
@pytest.mark.filterwarnings("ignore:.*unused parameters")
@pytest.mark.parametrize(
    "name", ["as it comes", "looking for unused parameters", "of a static graph"]
)
def test_training_goes_on_after_a_question(name):
    model, twin = PARALLEL[name](), plain()
    for _ in range(3):
        ub.Problem(model, F.cross_entropy, (inputs(), labels())).gradients()
        for m in (model, twin):
            m.zero_grad()
            F.cross_entropy(m(inputs()), labels()).backward()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            near(p.grad, q.grad, "gradient of a step")


@pytest.mark.usefixtures("_process")
def test_a_hook_on_the_wrapper_is_heard():
    model, twin = DistributedDataParallel(plain()), plain()
    problem = ub.Problem(model, F.cross_entropy, (inputs(), labels()))
    check(problem, twin, F.cross_entropy, inputs(), labels())
    for m in (model, twin):
        m.register_forward_hook(lambda module, args, out: 2 * out)
    check(problem, twin, F.cross_entropy, inputs(), labels())


# ---------------------------------------------------------------- unusual parts


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode, self.norm, self.decode = nn.Linear(D, 5), nn.BatchNorm1d(5), nn.Linear(5, D)
        self.decode.weight = nn.Parameter(self.encode.weight.T.contiguous())
        self.again = nn.Linear(D, 5)
        self.again.weight = self.encode.weight

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.norm(self.encode(x)))
        return self.again(self.decode(h) + self.encode(x) @ self.encode.weight)[:, :C]


class Weights8(nn.Module):
    """A frozen layer whose weights are kept in eight bits, with a scale for each row, and a trained
    one beside it.
    """

    def __init__(self) -> None:
        super().__init__()
        whole = torch.randn(5, D)
        self.register_buffer("scale", whole.abs().amax(1, keepdim=True).double() / 127)
        self.register_buffer("bits", (whole / self.scale).round().to(torch.int8))
        self.down, self.up = nn.Linear(D, 2, bias=False), nn.Linear(2, 5, bias=False)
        self.head = nn.Linear(5, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(
            torch.tanh(x @ (self.bits.to(x.dtype) * self.scale).T + self.up(self.down(x)))
        )


class FakeQuantised(nn.Module):
    """Rounded in the forward pass, straight through in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.below, self.above = nn.Linear(D, 5), nn.Linear(5, C)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.fake_quantize_per_tensor_affine(self.below(x).float(), 0.05, 0, -128, 127).to(
            x.dtype
        )
        return self.above(torch.tanh(h))


class Buffered(nn.Module):
    """Reads buffers, one of which it moves along."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(D, 5), nn.Linear(5, C)
        self.register_buffer("shift", torch.linspace(-1, 1, 5).double())
        self.register_buffer("mean", torch.zeros(5).double(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x) + self.shift - self.mean
        with torch.no_grad():
            self.mean.mul_(0.9).add_(h.mean(0), alpha=0.1)
        return self.head(torch.tanh(h))


def frozen(*names: str) -> nn.Module:
    model = plain()
    for name in names:
        model.get_submodule(name).requires_grad_(False)
    return model


def one_parameter() -> nn.Module:
    model = plain().requires_grad_(False)
    model[1][0].bias.requires_grad_(True)
    return model


def normed_weights() -> nn.Module:
    model = plain()
    parametrizations.weight_norm(model[1][0])
    parametrizations.orthogonal(model[0])
    return model


def hooked() -> nn.Module:
    """Hooks that change values, and hooks that only look."""
    model, model.seen = plain(), []
    model[1].register_forward_pre_hook(lambda m, args: (2 * args[0],))
    model[1][0].register_forward_hook(lambda m, args, out: out + args[0].sum(1, keepdim=True))
    model[2].register_forward_hook(lambda m, args, kwargs, out: out.tanh(), with_kwargs=True)
    model[3].register_forward_hook(lambda m, args, out: model.seen.append(out.shape))
    model[3].register_full_backward_hook(lambda m, gi, go: model.seen.append(go[0].shape))
    model[0].weight.register_hook(lambda g: None)
    return model


def bending() -> nn.Module:
    """Hooks that change gradients: of a module, of a value in the middle, of a parameter."""
    model = plain()
    model[2].register_full_backward_hook(lambda m, gi, go: (3 * gi[0],))
    model[1].register_full_backward_pre_hook(lambda m, go: (-go[0],))
    return model


def bending_values() -> nn.Module:
    model = plain()

    def bend(module: nn.Module, args: Any, out: Tensor) -> None:
        if out.requires_grad:
            out.register_hook(lambda g: g / 2)

    model[1].register_forward_hook(bend)
    return model


def bending_parameters() -> nn.Module:
    model = plain()
    model[1][0].weight.register_hook(lambda g: 5 * g)
    return model


PARTS: dict[str, Callable[[], nn.Module]] = {
    "tied weights": lambda: Tied().double(),
    "weights of eight bits, an adapter beside them": lambda: Weights8().double(),
    "a buffer that moves": lambda: Buffered().double(),
    "frozen below": lambda: frozen("0", "1"),
    "frozen in the middle": lambda: frozen("1", "2.0"),
    "a frozen head": lambda: frozen("3"),
    "one parameter that is trained": one_parameter,
    "weight norm and an orthogonal weight": normed_weights,
    "hooks": hooked,
    "hooks that change gradients": bending,
    "hooks on values in the middle": bending_values,
    "hooks on parameters": bending_parameters,
}


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", PARTS)
def test_unusual_parts(name, mode):
    torch.manual_seed(0)
    model = PARTS[name]().train(mode == "train")
    problem = ub.Problem(model, F.cross_entropy, (inputs(), labels()))
    check(
        problem,
        deepcopy(model) if name == "a buffer that moves" else model,
        F.cross_entropy,
        inputs(),
        labels(),
    )


def test_quantisation_that_looks_at_the_batch():
    """One scale for all samples, found in the forward pass, is a statistic; a scale that is given
    is none.
    """
    torch.manual_seed(0)

    class Dynamic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.below, self.above = nn.Linear(D, 5), nn.Linear(5, C)

        def forward(self, x: Tensor) -> Tensor:
            h = self.below(x)
            scale = h.detach().abs().max() / 127
            return self.above(h + ((h / scale).round() * scale - h).detach())

    found = ub.Problem(Dynamic().double(), F.cross_entropy, (inputs(), labels())).structure
    assert found.independent_forward.status == "fails"
    assert found.simd_given_statistics
    assert found.statistics_size == 1

    fake = ub.Problem(FakeQuantised(), F.cross_entropy, (inputs().float(), labels()))
    assert fake.structure.independent_forward
    total = fake.gradients().flat().sum(0)
    wanted = torch.cat([g.flatten() for g in fake.gradient().values()])
    assert (total - wanted).abs().max() <= 1e-6 * wanted.abs().max()


# ---------------------------------------------------------------- with a loss of their own


class Own(nn.Module):
    """The prediction is known to the loss inside only, or handed out beside it."""

    def __init__(self, net: nn.Module, shape: str) -> None:
        super().__init__()
        self.net, self.shape = net, shape

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        logits = self.net(x)
        loss = F.cross_entropy(logits, labels)
        return {
            "dict": {"logits": logits, "loss": loss},
            "tuple": (loss, logits),
            "tuple, loss last": (logits, loss),
            "number": loss,
        }[self.shape]


class Inside(nn.Module):
    """The same without the loss, its parameters under the same names."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@pytest.mark.parametrize(
    "net", [plain, lambda: checkpointed("reentrant"), lambda: checkpointed("not reentrant")]
)
@pytest.mark.parametrize("shape", ["dict", "tuple", "tuple, loss last", "number"])
def test_the_split_that_is_found(shape, net):
    problem = ub.Problem(Own(net(), shape), batch={"x": inputs(), "labels": labels()})
    check(problem, Inside(plain()), F.cross_entropy, inputs(), labels())
    shown = " ".join(str(problem.structure).split())
    assert f"predictions [{N}, {C}]" in shown
    assert (
        f"cut into model and loss at a value of shape [{N}, {C}] (net.3, test_wrapped.py:" in shown
    )


class Terms(nn.Module):
    """Two heads, a loss for each; with ``penalty`` a third term that knows the parameters only."""

    def __init__(self, penalty: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(D, 5), nn.BatchNorm1d(5), nn.Tanh())
        self.classes, self.values, self.penalty = nn.Linear(5, C), nn.Linear(5, 2), penalty

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        h = self.body(x)
        outputs = self.classes(h), self.values(h)
        if labels is None:
            return outputs
        loss = terms(outputs, labels)
        if self.penalty:
            loss = loss + 0.1 * self.body[0].weight.square().sum()
        return {"loss": loss, "classes": outputs[0], "values": outputs[1]}


def terms(outputs: Any, y: Tensor) -> Tensor:
    classes, values = outputs
    return F.cross_entropy(classes, y, ignore_index=1) + 0.3 * (values - y[:, None]).square().mean()


def test_several_terms():
    model = Terms().double()
    problem = ub.Problem(model, batch={"x": inputs(), "labels": labels()})
    check(problem, model, terms, inputs(), labels())
    assert problem.structure.predictions == ((N, C), (N, 2))
    assert [note[-30:].split()[-2] for note in problem.structure.notes] == ["(classes,", "(values,"]
    assert problem.structure.reduction.weights_depend_on == {
        "inputs"
    }  # how many labels there are to average over


def test_a_term_beside_the_predictions_is_the_rest():
    model = Terms(penalty=True).double()
    problem = ub.Problem(model, batch={"x": inputs(), "labels": labels()})
    assert problem.structure.canonical_split.status == "fails"
    rows = problem.gradients()
    near(rows.flat(), reference.flat(reference.component(model, terms, inputs(), labels())), "rows")
    assert list(rows.rest) == ["body.0.weight"]
    near(rows.rest["body.0.weight"], 0.2 * model.body[0].weight.detach(), "rest")
    near(
        problem.ggn().diag(), reference.ggn(model, terms, inputs(), labels()).diagonal(), "diagonal"
    )


# ---------------------------------------------------------------- language models


class Logits(nn.Module):
    """The parameters under the names that they have in the whole model."""

    def __init__(self, whole: Any) -> None:
        super().__init__()
        self.transformer, self.lm_head = whole.transformer, whole.lm_head
        self.whole = [whole]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.whole[0](
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).logits


def next_words(logits: Tensor, y: Tensor) -> Tensor:
    """In float32, as the model does it."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), y[:, 1:].flatten())


def checkpointing(how: bool) -> Callable[[], Any]:
    def make() -> Any:
        model = language_model()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": how}
            )
        return model

    return make


def adapters() -> Any:
    """Everything frozen but the last norm and the table of words, which the first and the last
    layer share.
    """
    model = language_model().requires_grad_(False)
    model.transformer.ln_f.requires_grad_(True)
    model.lm_head.weight.requires_grad_(True)
    return model


LANGUAGE: dict[str, Callable[[], Any]] = {
    "shared words": language_model,
    "remembering keys and values": lambda: language_model(use_cache=True),
    "checkpointed, reentrant": checkpointing(True),
    "checkpointed, not reentrant": checkpointing(False),
    "compiled": lambda: compiled(language_model()),
    "frozen but for a norm and shared words": adapters,
}


@pytest.mark.parametrize("name", LANGUAGE)
def test_language_models_with_padding_and_masked_labels(name):
    batch, model = with_prompts(text()), LANGUAGE[name]().train()
    problem = ub.Problem(model, batch=batch)
    before = state(problem)
    rows, gradient, G = problem.gradients(), problem.gradient(), problem.ggn()
    v = torch.ones(G.shape[0], dtype=torch.float64)
    product, diagonal = G @ v, G.diag()
    assert_unchanged(before, state(problem))
    assert problem.structure.predictions == ((3, T, WORDS),)
    assert (
        f"cut into model and loss at a value of shape [3, {T}, {WORDS}] (lm_head"
        in problem.structure.notes[0]
    )
    assert problem.structure.reduction

    twin = adapters() if "frozen" in name else language_model()
    X = {k: batch[k] for k in ("input_ids", "attention_mask")}
    args = Logits(twin.train()), next_words, X, batch["labels"]
    near_in_single(rows.flat(), reference.flat(reference.component(*args)), "rows")
    near_in_single(
        torch.cat([g.flatten() for g in gradient.values()]), rows.flat().sum(0), "gradient"
    )
    matrix = reference.ggn(*args)
    near_in_single(product, matrix @ v, "product")
    near_in_single(diagonal, matrix.diagonal(), "diagonal")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_is_proved_harmless(attention):
    """A mask without padding is left out by the one, which takes a look at the mask in Python."""
    model, batch = language_model(), text()
    model.set_attn_implementation(attention)
    for mask in (batch["attention_mask"], torch.ones_like(batch["attention_mask"])):
        structure = ub.Problem(model, batch=batch | {"attention_mask": mask}).structure
        assert structure.simd_forward
        assert structure.simd_forward.basis == "proved"


def test_labels_that_are_masked_leave_no_row():
    """A sample of which nothing is to be learned has no gradient; the others share the mean."""
    batch = text()
    batch["labels"][1] = -100
    rows = ub.Problem(language_model(), batch=batch).gradients().flat()
    assert not rows[1].any()
    assert rows[[0, 2]].abs().sum(1).min() > 0


def weighing(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), y.flatten())


def test_weights_depend_on_labels_only_where_they_are_masked_unevenly():
    """The last word of a sentence predicts nothing, in every sentence: that leaves the weights
    alone.
    """
    torch.manual_seed(0)
    words = torch.randint(3, WORDS, (3, T))
    whole = {"input_ids": words, "labels": words.clone()}
    problem = ub.Problem(language_model(), batch=whole)
    assert problem.structure.reduction.weights_depend_on == frozenset()
    problem.compute(ub.Variance())  # and is not warned about
    assert problem.gradients().weights.unique().numel() == 1

    whole["labels"] = whole["labels"].index_fill(1, torch.tensor([1]), -100)
    assert problem.with_batch(whole).structure.reduction.weights_depend_on == frozenset()
    whole["labels"] = whole["labels"].masked_fill(torch.eye(3, T).bool(), -100)
    assert problem.with_batch(whole).structure.reduction.weights_depend_on == {"inputs"}


@pytest.mark.parametrize(
    ("masked", "depends"),
    [
        ([], frozenset()),
        ([(0, 1), (1, 0), (2, 3)], frozenset()),
        ([(0, 1), (1, 0)], {"targets"}),
        ([(0, 1), (0, 2), (1, 0)], {"targets"}),
    ],
)
def test_labels_masked_at_other_places(masked, depends):
    y = torch.randint(C, (3, 4))
    for place in masked:
        y[place] = -100
    problem = ub.Problem(nn.Linear(D, C), weighing, (torch.randn(3, 4, D), y))
    assert problem.structure.reduction.weights_depend_on == depends
    terms = torch.stack(
        [F.cross_entropy(problem.predictions()[n], y[n], reduction="sum") for n in range(3)]
    )
    weights = problem.gradients().weights
    assert problem.verify()
    torch.testing.assert_close((weights.float() * terms).sum(), weighing(problem.predictions(), y))


def test_what_a_tokenizer_returns_is_taken_as_it_is():
    from transformers import BatchEncoding

    model, batch = language_model(), text()
    problem = ub.Problem(model, batch=BatchEncoding(batch))
    rows = problem.gradients().flat()
    near(rows, ub.Problem(model, batch=batch).gradients().flat(), "rows")
    near(problem.with_batch(BatchEncoding(batch)).gradients().flat(), rows, "rows of another batch")


# ---------------------------------------------------------------- without values


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("1.running_mean", "Buffer '1.running_mean'"),
        ("0.weight", "Parameter '0.weight'"),
        ("all", "Parameter"),
    ],
)
def test_what_lies_on_the_meta_device_is_named(place, says):
    model = nn.Sequential(nn.Linear(D, 5), nn.BatchNorm1d(5), nn.Linear(5, C))
    module, _, name = place.rpartition(".")
    if place == "all":
        model.to("meta")
    elif name == "weight":
        model.get_submodule(module).weight = nn.Parameter(torch.zeros(5, D, device="meta"))
    else:
        setattr(model.get_submodule(module), name, torch.zeros(5, device="meta"))
    with pytest.raises(ub.InputError, match=r"meta device and has no values.*to_empty") as refusal:
        ub.Problem(model, F.cross_entropy, (inputs().float(), labels()))
    assert says in str(refusal.value)
