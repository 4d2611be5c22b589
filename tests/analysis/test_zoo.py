"""Published architectures against the analyser: the truth about some of them, and tests of the
table's maker.

The truth is what the architecture does, not what the analyser says: an "unknown" where something is
true is allowed only if `KNOWN_UNKNOWN` says why. The packages the models come from are needed, not
optional.
"""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import unbatch as ub
from cases import zoo

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import zoo_table  # noqa: E402
from lib import exam  # noqa: E402
from unbatch.curvature.ggn import GGN  # noqa: E402

HOLDS = dict.fromkeys(zoo_table.NAMES, "holds")
NORMALIZED = HOLDS | {
    "independent_forward": "fails",
    "simd_forward": "fails",
}  # given statistics it holds
PAIRED = NORMALIZED | {"simd_given_statistics": "fails"}

# Entry: the truth in train mode, the truth in eval mode.
TRUTH = {
    "bert": (HOLDS, HOLDS),
    "bert-padded": (HOLDS, HOLDS),
    "gpt2": (HOLDS, HOLDS),
    "llama": (HOLDS, HOLDS),
    "mixtral": (HOLDS, HOLDS),
    "mixtral-batched": (HOLDS, HOLDS),
    "t5": (HOLDS, HOLDS),
    "vit": (HOLDS, HOLDS),
    "convnext": (HOLDS, HOLDS),
    "clip": (PAIRED, PAIRED),  # row n of the logits compares image n with every text
    "resnet": (NORMALIZED, HOLDS),
    "cv-resnet": (NORMALIZED, HOLDS),
    "cv-se-resnet": (NORMALIZED, HOLDS),
    "cv-densenet": (NORMALIZED, HOLDS),
    "cv-mobilenet": (NORMALIZED, HOLDS),
    "cv-shufflenet": (NORMALIZED, HOLDS),
    "cv-efficientnet": (NORMALIZED, HOLDS),
}

# Honest "unknown"s, the same in both modes: what it would take to decide them.
KNOWN_UNKNOWN: dict[str, str] = {}

CASES = [(name, mode) for name in TRUTH for mode in zoo_table.MODES]


def truth_of(name: str, mode: str) -> dict[str, str]:
    return TRUTH[name][zoo_table.MODES.index(mode)]


def normalized_channels(model: nn.Module) -> int:
    """The channels of all batch norms: each has a mean and a variance."""
    return sum(
        m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)
    )


def check_row(row: zoo_table.Row, truth: dict[str, str], may_be_unknown: bool) -> None:
    """Raise where a verdict is contradicted, or neither true nor an "unknown" that is allowed."""
    assert not row.failure, row.failure
    assert not row.contradictions, row.contradictions
    for structure, status in truth.items():
        said = row.statuses[structure]
        if said == "unknown" and may_be_unknown:
            continue
        reasons = [r for r in row.reasons if r.structure == structure]
        assert said == status, (
            f"{row.entry}, {row.mode}: {structure} {said}, in truth {status}: {reasons}"
        )
        assert row.bases[structure] in {"proved", "witness"}, row.bases
        assert (said, row.bases[structure]) != ("holds", "witness"), (
            f"a witness proves no {structure}"
        )
    assert all(r.where or r.why for r in row.reasons), row.reasons


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_verdicts_are_true_and_not_contradicted(name, mode):
    item = zoo.entry(name)
    row = zoo_table.ask(item, mode)
    check_row(row, truth_of(name, mode), name in KNOWN_UNKNOWN)
    if name in KNOWN_UNKNOWN:
        assert row.unknown, f"decided by now: {row.statuses}; take it out of KNOWN_UNKNOWN"
    channels = normalized_channels(item.build()[0]) if mode == "train" else 0
    assert row.statistics_size == 2 * channels or truth_of(name, mode) is PAIRED, (
        "a mean and a variance each"
    )


@pytest.mark.parametrize("structure", zoo_table.NAMES)
def test_a_wrong_verdict_is_caught(structure):
    """The check of this file sees each verdict turned round."""
    row = zoo_table.Row("bert", "eval", dict(HOLDS), dict.fromkeys(HOLDS, "proved"), checked=5)
    check_row(row, HOLDS, may_be_unknown=False)
    for wrong in ("fails", "unknown"):
        with pytest.raises(AssertionError, match=structure):
            check_row(
                replace(row, statuses=HOLDS | {structure: wrong}), HOLDS, may_be_unknown=False
            )


# --- the table's maker ----------------------------------------------------------------------------


class Peeks(nn.Module):
    """A branch on the whole batch: nothing can be established."""

    def forward(self, x):
        return x.cumsum(1) if x.sum() > 0 else 2 * x


def entry_of(model: nn.Module) -> zoo.ZooEntry:
    built = model, torch.ones(zoo.N, 3), torch.zeros(zoo.N, 3), nn.functional.mse_loss
    return zoo.ZooEntry("made up", "none", lambda: built)


def test_page_and_data_tell_the_rows_and_nothing_of_this_machine(tmp_path):
    class Broken(nn.Module):
        def forward(self, x):
            raise ValueError(f"cannot read {Path(__file__)}")

    table = list(zoo_table.rows([entry_of(Peeks()), entry_of(Broken())], ["eval"]))
    table.append(replace(table[0], contradictions=("SIMD loss holds, but it does not",)))
    zoo_table.save(table, tmp_path / "zoo.md", tmp_path / "results" / "zoo.json")
    page, data = (tmp_path / "zoo.md").read_text(), (tmp_path / "results" / "zoo.json").read_text()
    for text in (page, data):
        assert str(ROOT) not in text
        assert "test_zoo.py" in text
    assert "## Errors" in page
    assert "SIMD loss holds, but it does not" in page
    assert "Rows where a test contradicts a verdict: 1. Rows that ended in an error: 1." in page
    assert (
        "Python reads a value that depends on the batch"
        in page.partition("## What stayed unknown")[2]
    )


def test_the_command_prints_the_rows_it_is_asked_for(capsys, monkeypatch):
    monkeypatch.setattr(
        zoo_table, "save", lambda table: pytest.fail("a part of the table was written")
    )
    monkeypatch.setattr(zoo_table.logging, "disable", lambda level: None)
    zoo_table.main(["vit"])
    assert "| vit | train |" in capsys.readouterr().out


# --- gradients ------------------------------------------------------------------------------------

# What is not ordinary about them: shared entries in decoder inputs, batch norms with activations in
# place, experts that sort tokens, attention in pieces, several losses. Entry: backward passes in
# train and in eval mode.
ROWS = {
    "bert": (1, 1),
    "gpt2": (1, 1),
    "t5": (1, 1),
    "vit": (1, 1),
    "whisper": (1, 1),
    "mixtral-batched": (1, 1),
    "cv-resnet": (5, 1),
    "cv-densenet": (5, 1),
    "regnet": (5, 1),
    "clip": (5, 5),
}


@pytest.mark.parametrize("mode", zoo_table.MODES)
@pytest.mark.parametrize("name", ROWS)
def test_rows_sum_to_the_gradient_and_cost_what_they_should(name, mode):
    model, inputs, targets, loss = zoo.entry(name).build()
    model.train(mode == "train")
    problem = (
        ub.Problem(model, batch=inputs)
        if loss is None
        else ub.Problem(model, loss, (inputs, targets))
    )
    rows, gradient = problem.gradients(), problem.gradient()
    size = max(g.abs().max() for g in gradient.values() if g.numel())
    for key, g in gradient.items():
        total = rows[key].sum(0) + rows.rest.get(key, 0)
        assert (total - g).abs().max() <= 2e-5 * size, key
    assert problem.plan().pullbacks == ROWS[name][zoo_table.MODES.index(mode)]


# --- numbers --------------------------------------------------------------------------------------

# What is not ordinary about them: samples compared with each other, labels shifted and logits bent,
# experts in groups, a loss without second derivative, batch norms.
EXAMINED = ["bert", "clip", "gemma2", "mixtral", "wav2vec2-ctc", "cv-resnet"]


@pytest.mark.parametrize("mode", zoo_table.MODES)
@pytest.mark.parametrize("name", EXAMINED)
def test_numbers_are_those_of_plain_autograd(name, mode):
    row = zoo_table.ask(zoo.entry(name), mode, verify=False, numbers=True)
    assert not row.wrong, row
    refused = {question for question, answer in row.exam.answers.items() if answer.refusal}
    assert refused == ({"product", "diagonal"} if name == "wav2vec2-ctc" else set()), row.exam


@pytest.mark.parametrize("question", ["rows", "product", "diagonal"])
def test_a_wrong_number_is_caught(monkeypatch, question):
    scaled = {
        "rows": (
            ub.Problem,
            "gradients",
            lambda found: {n: 1.01 * row for n, row in found.items()},
        ),
        "product": (GGN, "__matmul__", lambda found: 1.01 * found),
        "diagonal": (GGN, "diag", lambda found: 1.01 * found),
    }
    owner, name, change = scaled[question]
    right = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: change(right(*args, **kwargs)))
    sat = exam.examine(zoo.entry("bert").build())
    assert [q for q, answer in sat.answers.items() if not sat.holds(answer)] == [question]
    assert not sat.right
