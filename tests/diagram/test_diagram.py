"""The picture of a structure: what stands in it is what the verdicts and the nets' own definitions
say.
"""

import builtins
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

import unbatch as ub
from cases.models import FAMILIES, MODELS
from unbatch.analysis.verdict import Culprit
from unbatch.diagram import figure
from unbatch.diagram import mixing as meetings
from unbatch.diagram.diagram import Diagram
from unbatch.diagram.stage import Stage, shown
from unbatch.diagram.stages import MOST
from unbatch.problem import analysis as recording

N = 8


@torch.library.custom_op("diagram::opaque", mutates_args=())
def opaque(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


opaque.register_fake(lambda x: torch.empty_like(x))


@torch.library.custom_op("diagram::rolled", mutates_args=())
def rolled(x: torch.Tensor) -> torch.Tensor:
    return x.roll(1, 0)


rolled.register_fake(lambda x: torch.empty_like(x))


class Opaque(nn.Module):
    def forward(self, x):
        return opaque(x)


class Rolled(nn.Module):
    def forward(self, x):
        return rolled(x)


class Pairwise(nn.Module):
    def forward(self, x):
        return torch.softmax(x @ x.T, 1) @ x


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear, self.norm = nn.Linear(width, width), nn.BatchNorm1d(width)

    def forward(self, x):
        return x + F.relu(self.norm(self.linear(x)))


class Deep(nn.Module):
    def __init__(self, blocks, width=4):
        super().__init__()
        self.blocks, self.head = (
            nn.ModuleList(Block(width) for _ in range(blocks)),
            nn.Linear(width, 3),
        )

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def ghost(x):
    groups = x.view(2, N // 2, -1)
    return (groups - groups.mean(1, keepdim=True)).view(x.shape)


class Ghost(nn.Module):
    def forward(self, x):
        return ghost(x)


def contrastive(z, y):
    z = F.normalize(z, dim=1)
    return F.cross_entropy(z @ z.T, torch.arange(len(z)))


def root_of_mean(z, y):
    return F.mse_loss(z, F.one_hot(y, 3).float()).sqrt()


def around(*middle):
    return nn.Sequential(nn.Linear(4, 4), *middle, nn.Linear(4, 3))


def nothing(predictions, targets=None):
    """A loss that reads every prediction."""
    return 0 * sum(t.sum() for t in tree_leaves(predictions) if isinstance(t, torch.Tensor))


def problem(model, loss=F.cross_entropy, n=N):
    torch.manual_seed(0)
    return ub.Problem(model, loss, (torch.randn(n, 4), torch.randint(3, (n,))))


def middle(diagram):
    return {s.name: s for s in diagram.stages if s.role == "module"}


# Net -> the stages in which samples are not separate: name, kind, numbers, group.
NETS = {
    "mlp": (around(nn.ReLU()), []),
    "batch norm": (around(nn.BatchNorm1d(4), nn.ReLU()), [("1 BatchNorm1d", "statistics", 8, 0)]),
    "batch norm, eval": (around(nn.BatchNorm1d(4), nn.ReLU()).eval(), []),
    "two batch norms": (
        around(nn.BatchNorm1d(4), nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 4)),
        [("1 BatchNorm1d", "statistics", 8, 0), ("3 BatchNorm1d", "statistics", 12, 0)],
    ),
    "layer norm": (around(nn.LayerNorm(4)), []),
    "groups": (around(Ghost()), [("1 Ghost", "statistics", 4, N // 2)]),
    "pairwise": (around(Pairwise()), [("1 Pairwise", "mixed", 0, 0)]),
    "unknown op": (around(Opaque()), [("1 Opaque", "unknown", 0, 0)]),
}


@pytest.mark.parametrize("name", NETS)
def test_bands_stand_where_samples_meet(name):
    model, expected = NETS[name]
    diagram = problem(model).diagram()
    assert [(s.name, s.kind, s.numbers, s.group) for s in diagram.bands] == expected
    assert [s.name for s in diagram.stages if s.role == "module"] == [
        f"{i} {type(m).__name__}" for i, m in enumerate(model)
    ]
    assert [s.role for s in diagram.stages if s.role != "module"] == [
        "inputs",
        "predictions",
        "losses",
        "loss",
    ]


def disagreements(diagram, structure):
    """Where the picture says more or less than the verdicts: what the tests below let a planted bug
    be found by.
    """
    forward = [s for s in diagram.stages if s.role == "module"]
    kinds = {s.kind for s in forward}
    found = []
    if bool(structure.independent_forward) != all(s.apart for s in forward):
        found.append(
            "bands although samples are independent, or none although they are not known to be"
        )
    told = kinds & {"statistics", "moved", "mixed"} or any("witness" in s.summary for s in forward)
    if structure.independent_forward.status == "fails" and not told:
        found.append("no band for samples that meet")
    if structure.independent_forward.status == "unknown" and "unknown" not in kinds:
        found.append("no question mark")
    numbers = sum(s.numbers for s in forward)
    if structure.independent_forward.status == "fails" and numbers != structure.statistics_size:
        found.append(f"{numbers} statistics in place of {structure.statistics_size}")
    losses = {s.role: s.kind for s in diagram.stages if s.role in ("losses", "loss")}
    if bool(structure.simd_loss) != (losses["losses"] == "separate"):
        found.append("losses")
    if bool(structure.reduction) != (losses["loss"] == "sum"):
        found.append("reduction")
    return found


PROGRAMS = {n: (model, F.cross_entropy) for n, (model, _) in NETS.items()} | {
    "deep": (Deep(12), F.cross_entropy),
    "contrastive": (around(), contrastive),
    "root": (around(), root_of_mean),
    "both": (around(nn.BatchNorm1d(4)), contrastive),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_picture_says_what_the_verdicts_say(name):
    p = problem(*PROGRAMS[name])
    assert disagreements(p.diagram(), p.structure) == []


def hard(name):
    """A program of the table that the analyser is held against."""
    (case,) = [c for c in MODELS if c.name == name]
    torch.manual_seed(0)
    model, inputs = case.build()
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    called, given = (
        (model, {})
        if isinstance(model, nn.Module)
        else (lambda _, x: model(*x), {"parameters": {}})
    )
    return ub.Problem(called, nothing, (inputs, None), in_dims=(case.in_dims, None), **given)


@pytest.mark.parametrize("name", [case.name for case in MODELS[::12]])
def test_hard_programs(name):
    """Every twelfth of the table."""
    p = hard(name)
    assert disagreements(p.diagram(), p.structure) == []


# Programs whose samples change places or meet without a word of the verdicts on where -> the only
# band, and its op.
PLACES = {
    "transposed and not back": ("t", "moved", "t"),
    "permuted and back to another place": ("permute", "moved", "permute"),
    "flipped along the batch": ("flip", "moved", "flip"),
    "rolled without an axis": ("roll", "moved", "roll"),
    "fixed permutation of the samples": ("index", "moved", "index"),
    "fixed permutation of the samples, applied twice": ("index", "moved", "index"),
    "chunks joined in reverse": ("cat", "moved", "cat"),
    "first sample overwritten with the second": ("copy", "moved", "copy_"),
    "GRU of two layers, states split in the wrong order": ("view", "moved", "view"),
    "heads merged before the samples, split after them": ("unsafe_view", "moved", "_unsafe_view"),
    "as many heads as samples, confused with each other": ("view", "moved", "view"),
    "class token put before the batch": ("slice", "moved", "slice"),
    "pixel shuffle of samples as channels, two each": ("pixel_shuffle", "moved", "pixel_shuffle"),
    "forward pre-hook that rolls the batch": ("1 Tanh", "moved", "roll"),
    "previous sample by as_strided": ("add", "mixed", "add"),
    "index_add across samples": ("index_add", "mixed", "index_add"),
    "graph batch with an edge between graphs": ("index_add", "mixed", "index_add"),
}


@pytest.mark.parametrize("name", PLACES)
def test_the_place_is_found_where_only_a_witness_knew(name):
    p = hard(name)
    (band,) = p.diagram().bands
    assert (band.name, band.kind, band.culprits[0].op) == PLACES[name]
    assert disagreements(p.diagram(), p.structure) == []
    assert any(f"{family}.py:" in band.places for family in FAMILIES), band.places


def test_what_python_reads_in_one_place_is_that_place():
    """A loop that ends when the whole batch is done: recorded are four turns, and one line reads
    the batch.
    """
    bands = hard("fixed point iterated until the whole batch has converged").diagram().bands
    assert {(s.kind, s.culprits) for s in bands} == {("mixed", bands[0].culprits)}
    assert "read by Python, statistics.py:" in bands[0].remark


class Overwritten(nn.Module):
    def forward(self, x):
        h = x.flip(0)
        return h.relu_()


def test_a_write_in_place_is_not_taken_for_the_change_of_places():
    (band,) = problem(nn.Sequential(nn.Linear(4, 3), Overwritten())).diagram().bands
    assert (band.kind, band.culprits[0].op) == ("moved", "flip")


def without_bands(diagram):
    """The planted bug: batch norms are forgotten."""
    return replace(diagram, stages=tuple(s for s in diagram.stages if s.kind != "statistics"))


def test_a_forgotten_batch_norm_is_noticed():
    p = problem(NETS["two batch norms"][0])
    assert len(disagreements(without_bands(p.diagram()), p.structure)) == 3
    one_less = replace(
        p.diagram(), stages=tuple(s for s in p.diagram().stages if s.name != "3 BatchNorm1d")
    )
    assert disagreements(one_less, p.structure) == ["8 statistics in place of 20"]


def test_culprits_stand_at_their_stage():
    (band,) = problem(NETS["pairwise"][0]).diagram().bands
    assert {c.module for c in band.culprits} == {"1"}
    assert band.culprits[0].op == "mm"
    assert "test_diagram.py" in band.remark
    (unknown,) = problem(NETS["unknown op"][0]).diagram().bands
    assert "diagram::opaque" in unknown.remark


def test_a_value_that_python_reads_is_not_established():
    class Reads(nn.Module):
        def forward(self, x):
            return x * float(x.abs().max())

    p = problem(around(Reads()))
    assert disagreements(p.diagram(), p.structure) == []
    assert [s.name for s in p.diagram().bands] == ["1 Reads"]


@pytest.mark.parametrize("norm", [nn.ReLU(), nn.LayerNorm(4), nn.BatchNorm1d(4).eval(), Opaque()])
def test_one_sample_is_told_in_one_stage(norm):
    p = problem(around(norm), n=1)
    (only,) = middle(p.diagram()).values()
    assert (only.kind, only.name) == ("unknown", "0 Linear … 2 Linear")
    assert only.remark == "one sample: nothing to tell apart; give a batch of several"
    assert disagreements(p.diagram(), p.structure) == []
    assert "The way of 1 sample from" in p.diagram().description
    assert [row.split()[0] for row in str(p.diagram()).splitlines() if "?" in row] == ["0", "✓"]


def test_statistics_within_the_only_sample_are_not_told():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))
    p = ub.Problem(net, F.cross_entropy, (torch.randn(1, 1, 4, 4), torch.randint(3, (1,))))
    (only,) = middle(p.diagram()).values()
    assert (only.numbers, only.culprits, only.places) == (0, (), "")


# --- what only a witness knows --------------------------------------------------------------------


def test_one_of_several_unknown_ops_mixes():
    """Where there are several places in doubt, a witness says that, and not where, samples mix."""
    p = problem(around(Opaque(), nn.ReLU(), Rolled()))
    assert p.structure.independent_forward.status == "fails"
    assert [(s.name, s.kind) for s in p.diagram().bands] == [
        ("1 Opaque", "unknown"),
        ("3 Rolled", "unknown"),
    ]
    assert all("here or at another “?”: shown by a witness" in s.summary for s in p.diagram().bands)
    assert disagreements(p.diagram(), p.structure) == []


def test_several_unknown_ops_in_one_stage():
    class Both(nn.Module):
        def forward(self, x):
            return rolled(opaque(x))

    (band,) = problem(around(Both())).diagram().bands
    assert (band.name, band.summary) == ("1 Both", "samples mix somewhere here: shown by a witness")


def test_only_one_op_can_be_it():
    (band,) = problem(around(Rolled())).diagram().bands
    assert (band.name, band.kind) == ("1 Rolled", "mixed")


def test_a_witness_without_a_place(monkeypatch):
    """The planted bug: it is forgotten where places change. The picture must not say that samples
    are apart.
    """
    monkeypatch.setattr(meetings, "_displacing", lambda *_: set())
    p = problem(nn.Sequential(nn.Linear(4, 3), Overwritten()))
    (band,) = p.diagram().bands
    assert (band.name, band.kind) == ("0 Linear … 1 Overwritten", "unknown")
    assert band.summary == "samples mix somewhere here: shown by a witness"
    assert disagreements(p.diagram(), p.structure) == []


@pytest.mark.parametrize("norm", [nn.ReLU(), nn.BatchNorm1d(4)])
def test_a_recording_that_is_not_the_model_establishes_nothing(norm, monkeypatch):
    monkeypatch.setattr(recording, "replay_difference", lambda *_, **__: ("off by 1", ""))
    p = problem(around(norm, nn.ReLU()))
    assert all(not s.apart for s in middle(p.diagram()).values())
    doubtful = [s for s in p.diagram().bands if s.kind != "statistics"]
    assert [s.name for s in doubtful] in (
        ["0 Linear … 3 Linear"],
        ["0 Linear", "2 ReLU … 3 Linear"],
    )
    assert all("not all of the model" in s.summary for s in doubtful)
    assert disagreements(p.diagram(), p.structure) == []


# --- after samples have mixed ---------------------------------------------------------------------


def test_samples_that_have_mixed_may_mix_again():
    net = around(Pairwise(), nn.ReLU(), nn.BatchNorm1d(4), Pairwise())
    bands = problem(net).diagram().bands
    assert [(s.name, s.kind, s.numbers) for s in bands] == [
        ("1 Pairwise", "mixed", 0),
        ("3 BatchNorm1d", "statistics", 8),
        ("4 Pairwise", "mixed", 0),
    ]
    assert [s.places.split(",")[0] for s in bands] == ["mm", "native_batch_norm", "mm"]


def test_attention_among_tokens_mixes_them_in_every_block():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return x + self.linear((x @ x.mT).softmax(-1) @ x)

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks, self.head = nn.ModuleList(Attends() for _ in range(6)), nn.Linear(4, 3)

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return self.head(x)

    def loss(z, y):
        return F.cross_entropy(z.flatten(0, 1), y.flatten())

    torch.manual_seed(0)
    p = ub.Problem(
        Tokens(), loss, (torch.randn(3, 5, 4), torch.randint(3, (3, 5))), sample_dims=(0, 1)
    )
    (band,) = p.diagram().bands
    assert (band.name, band.kind, band.repeats) == ("blocks.0–5 Attends", "mixed", 6)


def test_what_has_mixed_does_not_mix_by_being_used():
    """A mean that is taken away from every sample; it has as many entries as there are samples."""
    stages = middle(hard("mean by pooling over the batch").diagram())
    assert [(name, s.kind) for name, s in stages.items()] == [
        ("linear Linear", "separate"),
        ("avg_pool2d", "mixed"),
        ("sub", "separate"),
    ]


def test_features_are_not_taken_for_samples_after_mixing():
    """As many features as samples: rows and columns of the matrix that samples are multiplied with
    are features.
    """

    def f(params, x):
        return x @ (x.T @ (torch.linspace(0, 1, len(x))[:, None] * x))

    p = ub.Problem(f, F.cross_entropy, (torch.randn(4, 4), torch.randint(4, (4,))), parameters={})
    assert [(s.name, s.kind) for s in p.diagram().stages if s.role == "module"] == [
        ("mul", "uneven"),
        ("mm", "mixed"),
        ("mm", "separate"),
    ]


def test_losses():
    stages = {s.role: s for s in problem(around(), contrastive).diagram().stages}
    assert (stages["losses"].name, stages["losses"].kind, stages["loss"].kind) == (
        "contrastive",
        "mixed",
        "whole",
    )
    assert "mm" in stages["losses"].remark
    stages = {s.role: s for s in problem(around(), root_of_mean).diagram().stages}
    assert (stages["losses"].kind, stages["loss"].kind) == ("separate", "whole")
    assert "no sum" in stages["loss"].note


def test_a_loss_and_its_value_have_different_names():
    def loss(z, y):
        return contrastive(z, y)

    assert [s.name for s in problem(around(), loss).diagram().stages[-2:]] == [
        "loss function",
        "loss",
    ]
    assert [
        s.name for s in problem(around(), lambda z, y: F.cross_entropy(z, y)).diagram().stages[-2:]
    ] == ["loss", "reduction"]


def test_parameters_in_the_loss_are_told():
    model = around()

    def decayed(z, y):
        return F.cross_entropy(z, y) + sum((p**2).sum() for p in model.parameters())

    (losses,) = [s for s in problem(model, decayed).diagram().stages if s.role == "losses"]
    assert "parameters enter" in losses.remark


def test_weights_that_depend_on_the_batch_are_told():
    def weighted(z, y):
        return F.cross_entropy(z, y, weight=torch.tensor([1.0, 2.0, 3.0]))

    p = problem(around(), weighted)
    assert p.structure.reduction.weights_depend_on == {"targets"}
    assert "targets" in p.diagram().stages[-1].note


def test_a_model_with_its_own_loss():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = around(nn.BatchNorm1d(4))

        def forward(self, x, labels):
            return {"loss": F.cross_entropy(self.net(x), labels)}

    torch.manual_seed(0)
    p = ub.Problem(Own(), batch={"x": torch.randn(N, 4), "labels": torch.randint(3, (N,))})
    assert disagreements(p.diagram(), p.structure) == []
    assert [(s.name, s.numbers) for s in p.diagram().bands] == [("net.1 BatchNorm1d", 8)]


def test_blocks_that_look_alike_are_told_once():
    diagram = problem(Deep(12)).diagram()
    blocks, head = middle(diagram).values()
    assert (blocks.name, blocks.repeats, blocks.numbers) == ("blocks.0–11 Block", 12, 12 * 8)
    assert head.name == "head Linear"
    assert "12 blocks" in str(diagram)


def test_blocks_of_another_size_are_told_apart():
    model = Deep(12)
    model.blocks[6] = Block(4).eval()
    names = [s.name for s in middle(problem(model).diagram()).values()]
    assert names == ["blocks.0–5 Block", "blocks.6 Block", "blocks.7–11 Block", "head Linear"]


def test_numbers_at_the_end_of_names_make_a_series():
    class Units(nn.Module):
        def __init__(self):
            super().__init__()
            for i in range(1, 7):
                self.add_module(f"unit{i}", Block(4))
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            for module in self.children():
                x = module(x)
            return x

    blocks, head = middle(problem(Units()).diagram()).values()
    assert (blocks.name, blocks.repeats, blocks.numbers) == ("unit1–6 Block", 6, 6 * 8)
    assert head.name == "head Linear"


def test_the_same_again_is_told_once():
    class Views(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 4), norm, nn.Linear(4, 3))

        def forward(self, x):
            return self.net(x), self.net(2 * x.flip(1)), self.net(x.flip(1))

    def loss(z, y):
        return F.triplet_margin_loss(*z)

    class Siamese(Views):
        def forward(self, x):
            return [self.net(x) for _ in range(3)]

    stages = middle(problem(Siamese(nn.BatchNorm1d(4)), loss).diagram())
    assert {name: (s.runs, s.numbers) for name, s in stages.items()} == {
        "net.0 Linear": (3, 0),
        "net.1 BatchNorm1d": (3, 24),
        "net.2 Linear": (3, 0),
    }
    assert stages["net.1 BatchNorm1d"].summary == "run 3 times, samples share 24 numbers"
    others = problem(Views(nn.ReLU()), loss).diagram()
    assert [(s.name, s.runs) for s in others.stages if s.role == "module"][:3] == [
        ("net.0 Linear", 1),
        ("net.1 ReLU", 1),
        ("net.2 Linear", 1),
    ]


class Moving(nn.Module):
    """Views and copies before, between and after its modules, as in GPT-2."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(2, 4), nn.Linear(4, 3)

    def forward(self, x):
        h = self.first(x.view(-1, 2, 2)).transpose(1, 2).clone()
        h = h.unsqueeze(1)[:, 0].mT.select(1, 0)
        return self.last(h)[:]


def test_what_only_moves_things_between_modules_is_no_stage():
    assert list(middle(problem(Moving()).diagram())) == ["first Linear", "last Linear"]


def test_what_only_moves_things_is_a_stage_where_it_matters():
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return self.linear(x).t()

    torch.manual_seed(0)
    p = ub.Problem(Turned(), F.cross_entropy, (torch.randn(4, 4), torch.randint(4, (4,))))
    assert [(s.name, s.kind) for s in middle(p.diagram()).values()] == [
        ("linear Linear", "separate"),
        ("t", "moved"),
    ]


def test_moves_alone_are_told():
    class Only(nn.Module):
        def forward(self, x):
            return x.view(-1, 2, 2).transpose(1, 2)[:, 0]

    p = ub.Problem(Only(), nothing, (torch.randn(N, 4), None))
    (only,) = middle(p.diagram()).values()
    assert only.name.startswith("view, transpose")
    assert disagreements(p.diagram(), p.structure) == []


class Funnel(nn.Module):
    """Layers of different sizes, each followed by something that is done to all samples."""

    def __init__(self, between, count=20):
        super().__init__()
        self.between, self.head = between, nn.Linear(4 + count, 3)
        self.linears = nn.ModuleList(nn.Linear(4 + i, 5 + i) for i in range(count))

    def forward(self, x):
        for i, linear in enumerate(self.linears):
            x = self.between(i, linear(x))
        return self.head(x)


def test_a_band_holds_what_does_not_fit_on_a_page():
    p = problem(Funnel(lambda i, x: x - x.mean(0)))
    stages = middle(p.diagram())
    assert list(stages) == [
        "linears.0 Linear",
        "linears.1 Linear … linears.19 Linear",
        "sub",
        "head Linear",
    ]
    (band,) = p.diagram().bands
    assert (band.kind, band.numbers) == ("statistics", p.structure.statistics_size)
    assert disagreements(p.diagram(), p.structure) == []


def test_a_band_of_statistics_and_unknown_ops_says_that_samples_mix():
    p = problem(Funnel(lambda i, x: opaque(x) if i % 3 == 1 else x - x.mean(0)))
    assert p.structure.independent_forward.status == "fails"
    (band,) = p.diagram().bands
    assert band.kind == "mixed"
    assert disagreements(p.diagram(), p.structure) in (
        [],
        [f"{band.numbers} statistics in place of {p.structure.statistics_size}"],
    )


def test_what_is_proved_harmless_is_not_blamed():
    """Rows are sorted and come back into their order."""
    assert all(
        not s.places
        for s in hard("mixture of experts by a grouped product, unsorted").diagram().stages
    )


@pytest.mark.parametrize("depth", [1, 5, 40])
def test_any_depth_stays_on_a_page(depth):
    flat = nn.Sequential(
        *[m for _ in range(depth) for m in (nn.Linear(4, 4), nn.ReLU())], nn.BatchNorm1d(4)
    )
    p = problem(flat)
    assert disagreements(p.diagram(), p.structure) == []
    assert len(middle(p.diagram())) <= MOST


def test_functions_are_told_by_their_ops():
    def f(params, x):
        z = x @ params["w"]
        return torch.relu(z - z.mean(0))

    torch.manual_seed(0)
    data = torch.randn(N, 4), torch.randint(3, (N,))
    p = ub.Problem(f, F.cross_entropy, data, parameters={"w": torch.randn(4, 3)})
    assert [(s.name, s.kind) for s in middle(p.diagram()).values()] == [
        ("mm", "separate"),
        ("mean", "statistics"),
        ("sub, relu", "separate"),
    ]


# --- who is to blame ------------------------------------------------------------------------------


def blamed(*modules, op="native_batch_norm", path="", repeats=1, lines=None):
    where = lines or ["net.py:7"] * len(modules)
    culprits = tuple(Culprit(m, op, w, "", "") for m, w in zip(modules, where, strict=True))
    return Stage(
        "module", "m", "statistics", 8, path=path, repeats=repeats, culprits=culprits
    ).places


def test_up_to_three_modules_are_named():
    assert blamed() == ""
    assert blamed("norm1") == "native_batch_norm, net.py:7"
    assert blamed("norm1", "norm2", "norm3") == "native_batch_norm in norm1, norm2, norm3, net.py:7"
    assert (
        blamed(*(f"norm{i}" for i in range(7)))
        == "native_batch_norm in norm0, norm1, norm2 and 4 more, net.py:7"
    )
    assert (
        blamed("norm1", "norm2", lines=["net.py:7", "net.py:8"])
        == "native_batch_norm in norm1, norm2"
    )


def test_places_in_one_module_are_counted():
    assert (
        blamed("norm", "norm", lines=["net.py:7", "net.py:8"])
        == "native_batch_norm, net.py:7, and 1 more"
    )
    assert blamed("norm", "norm") == "native_batch_norm, net.py:7"


def test_modules_are_named_as_in_their_stage():
    assert (
        blamed("a.b.norm1", "a.b.norm2", path="a.b")
        == "native_batch_norm in norm1, norm2, net.py:7"
    )
    assert blamed("a.0.norm", "a.1.norm", path="a.1", repeats=2) == "native_batch_norm, net.py:7"
    assert blamed("a.b.1", "a.b.4", path="a.b") == "native_batch_norm in a.b.1, a.b.4, net.py:7"


def test_a_block_with_several_norms_names_them():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.BatchNorm1d(4), nn.BatchNorm1d(4)

        def forward(self, x):
            return self.norm2(F.relu(self.norm1(x)))

    deep = nn.Sequential(
        *[nn.Sequential(nn.Linear(4, 4), Twice()) for _ in range(8)], nn.Linear(4, 3)
    )
    (band,) = problem(deep).diagram().bands
    assert (band.name, band.numbers) == ("0–7 Sequential", 8 * 16)
    assert " in .1.norm1, .1.norm2, test_diagram.py:" in band.places


@pytest.mark.parametrize("samples", [2, N])
def test_long_labels_fit_into_the_picture(samples):
    pytest.importorskip("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    places = [
        Culprit(f"encoder.norm{i}", "native_batch_norm", "program.py:12", "", "") for i in range(9)
    ]
    long = Stage(
        "module", "encoder Sequential", "statistics", 1024, path="", culprits=tuple(places)
    )
    kinds = [
        Stage("module", "norm", "unknown", note=meetings.HERE_OR_THERE),
        Stage("module", "flip", "moved"),
    ]
    ax = figure.draw([long, replace(long, kind="mixed"), *kinds], samples)
    canvas = FigureCanvasAgg(ax.figure)
    canvas.draw()
    boxes = [t.get_window_extent(canvas.get_renderer()) for t in ax.texts if t.get_text()]
    assert any("norm0, encoder.norm1, encoder.norm2 and 6 more" in t.get_text() for t in ax.texts)
    assert all(ax.figure.bbox.x0 <= b.x0 <= b.x1 <= ax.figure.bbox.x1 for b in boxes)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_a_change_of_places_looks_like_one():
    pytest.importorskip("matplotlib")
    moved, mixed = (
        figure.draw([Stage("module", "m", kind)], N).lines for kind in ("moved", "mixed")
    )
    ways = [tuple(line.get_xdata()) for line in moved]
    crossing = [(a, b) for a, b in ways if a != b]
    assert sorted(a for a, _ in crossing) == sorted(b for _, b in crossing) == [0, 1, 3, 4]
    assert len(moved) < len(mixed)


# --- text, and notebooks --------------------------------------------------------------------------


def test_text():
    text = str(problem(NETS["batch norm"][0]).diagram())
    rows = text.splitlines()
    assert [row.split()[0] for row in rows[:-1]] == [
        "sample",
        "inputs",
        "0",
        "1",
        "2",
        "3",
        "predictions",
        "cross_entropy",
        "reduction",
    ]
    assert rows[2].count("│") == rows[4].count("│") == 4
    assert ">8<" in rows[3]
    assert rows[3].index("├") == rows[2].index("│")
    assert "8 numbers" in rows[3]
    assert rows[-1].count("✗") == 2


def test_words_that_do_not_fit_beside_each_other_stand_below_each_other():
    name = "normalisation_with_a_long_name"

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module(name, nn.BatchNorm1d(4))
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.get_submodule(name)(x))

    rows = str(problem(Named()).diagram()).splitlines()
    (at,) = [i for i, row in enumerate(rows) if row.endswith("samples share 8 numbers")]
    assert rows[at + 1].strip().startswith("native_batch_norm, test_diagram.py:")
    assert rows[at + 1].index("native") == rows[at].index("samples share")
    assert max(map(len, rows)) <= 110


def test_columns():
    assert shown(3) == ["1", "2", "3"]
    assert shown(8) == ["1", "2", "⋯", "N−1", "N"]


def test_description_names_the_bands():
    met = problem(NETS["batch norm"][0]).diagram().description
    assert "1 BatchNorm1d: samples share 8 numbers" in met
    assert "weighted sum" in met
    assert "stay separate" in problem(NETS["mlp"][0]).diagram().description


def test_html_has_a_label_and_a_drawing():
    p = problem(NETS["batch norm"][0])
    pytest.importorskip("matplotlib")
    assert p._repr_html_() == p.diagram()._repr_html_()
    assert p._repr_html_().startswith('<svg role="img" aria-label="The way of 8 samples')


def test_html_without_matplotlib(monkeypatch):
    p = problem(NETS["batch norm"][0])
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    shown_ = p._repr_html_()
    assert shown_.startswith('<pre role="img" aria-label="The way of 8 samples')
    assert "├" in shown_
    with pytest.raises(ImportError, match=r"unbatch\[plot\]"):
        figure.draw(p.diagram().stages, N)


def test_a_notebook_shows_a_problem_that_cannot_be_recorded():
    p = ub.Problem(nn.Linear(5, 3), F.cross_entropy, (torch.randn(N, 4), torch.randint(3, (N,))))
    assert "RuntimeError" in p._repr_html_()
    assert "<pre>" in p._repr_html_()


def test_a_structure_in_a_notebook():
    html = problem(NETS["batch norm"][0]).structure._repr_html_()
    assert 'aria-label="Structure of the loss: canonical split: holds (proved)' in html
    assert "native_batch_norm" in html
    assert "<b" not in html.replace("<br", "")


def test_names_are_escaped():
    stage = Stage("losses", '<b>"loss"</b>', "mixed")
    html = Diagram(2, (stage, Stage("loss", "loss", "whole")), ())._repr_html_()
    assert "<b>" not in html
    assert "&quot;loss" in html
