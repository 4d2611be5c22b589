"""The picture of a structure: what stands in it is what the verdicts and the nets' own definitions say."""

import builtins
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

import unbatch as ub
from cases_models import MODELS
from unbatch import figure
from unbatch.diagram import Diagram
from unbatch.stages import MOST, Stage, shown

N = 8


@torch.library.custom_op("diagram::opaque", mutates_args=())
def opaque(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


opaque.register_fake(lambda x: torch.empty_like(x))


class Opaque(nn.Module):
    def forward(self, x):
        return opaque(x)


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
        self.blocks, self.head = nn.ModuleList(Block(width) for _ in range(blocks)), nn.Linear(width, 3)

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
    assert [s.role for s in diagram.stages if s.role != "module"] == ["inputs", "predictions", "losses", "loss"]


def disagreements(diagram, structure):
    """Where the picture says more or less than the verdicts: what the tests below let a planted bug be found by."""
    forward = [s for s in diagram.stages if s.role == "module"]
    kinds = {s.kind for s in forward}
    found = []
    if bool(structure.independent_forward) != all(s.apart for s in forward):
        found.append("bands although samples are independent, or none although they are not known to be")
    if structure.independent_forward.status == "fails" and not kinds & {"statistics", "mixed"}:
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


@pytest.mark.parametrize("case", MODELS[::12], ids=lambda case: case.name)
def test_hard_programs(case):
    """Every twelfth of the table that the analyser is held against."""
    torch.manual_seed(0)
    model, inputs = case.build()
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    called, given = (model, {}) if isinstance(model, nn.Module) else (lambda _, x: model(*x), {"parameters": {}})
    p = ub.Problem(called, nothing, (inputs, None), in_dims=(case.in_dims, None), **given)
    # Where samples only change places, all stages are doubtful and none is blamed.
    assert set(disagreements(p.diagram(), p.structure)) <= {"no band for samples that meet"}


def without_bands(diagram):
    """The planted bug: batch norms are forgotten."""
    return replace(diagram, stages=tuple(s for s in diagram.stages if s.kind != "statistics"))


def test_a_forgotten_batch_norm_is_noticed():
    p = problem(NETS["two batch norms"][0])
    assert len(disagreements(without_bands(p.diagram()), p.structure)) == 3
    one_less = replace(p.diagram(), stages=tuple(s for s in p.diagram().stages if s.name != "3 BatchNorm1d"))
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


def test_one_sample_establishes_nothing():
    p = problem(around(nn.ReLU()), n=1)
    assert {s.kind for s in middle(p.diagram()).values()} == {"unknown"}
    assert "?" in str(p.diagram())


def test_losses():
    stages = {s.role: s for s in problem(around(), contrastive).diagram().stages}
    assert (stages["losses"].name, stages["losses"].kind, stages["loss"].kind) == ("contrastive", "mixed", "whole")
    assert "mm" in stages["losses"].remark
    stages = {s.role: s for s in problem(around(), root_of_mean).diagram().stages}
    assert (stages["losses"].kind, stages["loss"].kind) == ("separate", "whole")
    assert "no sum" in stages["loss"].note


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


@pytest.mark.parametrize("depth", [1, 5, 40])
def test_any_depth_stays_on_a_page(depth):
    flat = nn.Sequential(*[m for _ in range(depth) for m in (nn.Linear(4, 4), nn.ReLU())], nn.BatchNorm1d(4))
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
        ("mm", "separate"), ("mean", "statistics"), ("sub, relu", "separate")
    ]  # fmt: skip


# --- text, and notebooks --------------------------------------------------------------------------


def test_text():
    text = str(problem(NETS["batch norm"][0]).diagram())
    rows = text.splitlines()
    assert [row.split()[0] for row in rows[:-1]] == [
        "sample", "inputs", "0", "1", "2", "3", "predictions", "cross_entropy", "reduction"
    ]  # fmt: skip
    assert rows[2].count("│") == rows[4].count("│") == 4
    assert ">8<" in rows[3]
    assert rows[3].index("├") == rows[2].index("│")
    assert "8 numbers" in rows[3]
    assert rows[-1].count("✗") == 2


def test_columns():
    assert shown(3) == ["1", "2", "3"]
    assert shown(8) == ["1", "2", "⋯", "N−1", "N"]


def test_description_names_the_bands():
    met = problem(NETS["batch norm"][0]).diagram().description
    assert "1 BatchNorm1d: samples meet in 8 numbers" in met
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
