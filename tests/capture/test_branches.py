"""Programs that ask a boolean which way to go: proved where the answer does not matter, and only
there.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import unbatch as ub
from unbatch.analysis.rules import registry as rules
from unbatch.capture import control_flow as branches
from unbatch.capture import expressions as terms
from unbatch.capture import simplifications
from unbatch.capture import symbolic as reading

N, T, H, E = 4, 5, 2, 4


class Attention(nn.Module):
    """One layer of attention over ``[N, T, 8]`` under a mask ``[N, T]``,
    one where a word stands.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(H * E, 3 * H * E)
        self.head = nn.Linear(H * E, 3)

    def heads(self, x: Tensor) -> list[Tensor]:
        return [t.unflatten(-1, (H, E)).transpose(1, 2) for t in self.mix(x).chunk(3, -1)]

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.attend(x, mask).transpose(1, 2).flatten(2).mean(1))

    def attend(self, x: Tensor, mask: Tensor) -> Tensor:
        raise NotImplementedError


class Skipped(Attention):
    def attend(self, x, mask):
        if mask.all():
            return F.scaled_dot_product_attention(*self.heads(x))
        return F.scaled_dot_product_attention(*self.heads(x), attn_mask=mask.bool()[:, None, None])


class Counted(Attention):
    """Asks by a sum, as often as there are layers, and adds the mask to the scores by hand."""

    def attend(self, x, mask):
        out = x
        for _ in range(2):
            q, k, v = self.heads(out)
            scores = q @ k.mT / math.sqrt(E)
            if (mask == 1).sum() != mask.numel():
                scores += torch.where(mask == 0, -torch.inf, 0.0)[:, None, None]
            y = scores.softmax(-1) @ v
            out = y.transpose(1, 2).flatten(2)
        return y


class Causal(Attention):
    def attend(self, x, mask):
        q, k, v = self.heads(x)
        if not (mask == 0).any():
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        later = torch.ones(T, T, dtype=torch.bool).tril()
        seen = later & mask.bool()[:, None, None] | torch.eye(T, dtype=torch.bool)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)


class Shared(Attention):
    """Keys and values of one head: repeated by hand where there is a mask, by the kernel where
    there is none.
    """

    def attend(self, x, mask):
        q, k, v = self.heads(x)
        k, v = k[:, :1], v[:, :1]
        if mask.all():
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        k, v = (t[:, :, None].expand(-1, -1, H, -1, -1).flatten(1, 2) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.bool()[:, None, None])


class Finite(Attention):
    """Clamps everything if anything is infinite."""

    def attend(self, x, mask):
        out = F.scaled_dot_product_attention(*self.heads(x))
        if not torch.isfinite(out).all() or out.isinf().any():
            out = out.clamp(-torch.finfo(out.dtype).max, torch.finfo(out.dtype).max)
        return out


class Written(Attention):
    """The mask is written into a buffer, through a window."""

    def attend(self, x, mask):
        hidden = torch.zeros(N, 1, 1, T)
        if (~mask.bool()).any():
            hidden[:, 0, 0] = torch.where(mask.bool(), 0.0, -torch.inf)
        return F.scaled_dot_product_attention(*self.heads(x), attn_mask=hidden)


class Dropped(Attention):
    """With noise, drawn in the same order whichever way it goes."""

    def attend(self, x, mask):
        if mask.all():
            return F.scaled_dot_product_attention(*self.heads(x), dropout_p=0.5)
        return F.scaled_dot_product_attention(
            *self.heads(x), attn_mask=mask.bool()[:, None, None], dropout_p=0.5
        )


class Checked(Attention):
    def attend(self, x, mask):
        if (mask > 1).any():
            raise ValueError("a mask has zeros and ones")
        return F.scaled_dot_product_attention(*self.heads(x))


# --- where the answer matters ---


class Scaled(Skipped):
    """Without padding, it is not the same."""

    def attend(self, x, mask):
        return super().attend(x, mask) * (2.0 if mask.all() else 1.0)


class Louder(Attention):
    """Two answers that matter together only."""

    def attend(self, x, mask):
        out = F.scaled_dot_product_attention(*self.heads(x))
        first = bool(mask.all())
        return out * 2 if x.sum() > 0 and first else out


class Unlike(Attention):
    """Causal without padding, looking ahead with it."""

    def attend(self, x, mask):
        causal = bool(mask.all())
        hidden = None if causal else mask.bool()[:, None, None]
        return F.scaled_dot_product_attention(*self.heads(x), attn_mask=hidden, is_causal=causal)


class AnyWord(Attention):
    """That some word stands somewhere does not say that all do."""

    def attend(self, x, mask):
        hidden = None if mask.any() else mask.bool()[:, None, None]
        return F.scaled_dot_product_attention(*self.heads(x), attn_mask=hidden)


class Halved(Attention):
    """Clamped to less than the largest numbers there are."""

    def attend(self, x, mask):
        out = F.scaled_dot_product_attention(*self.heads(x))
        return out.clamp(-1.0, 1.0) if out.isinf().any() else out


class TwiceNoise(Attention):
    """Draws once more, if there is padding."""

    def attend(self, x, mask):
        if not mask.all():
            torch.rand(1)
        return F.dropout(F.scaled_dot_product_attention(*self.heads(x)), 0.5)


class Loud(Attention):
    """Twice as loud if no word is missing: what each of the classes below hides in another way."""

    def attend(self, x, mask):
        return F.scaled_dot_product_attention(*self.heads(x)) * self.factor(mask)

    def factor(self, mask):
        raise NotImplementedError


class Asserted(Loud):
    """On the other way, something is asserted that holds there, and not here."""

    def factor(self, mask):
        if not mask.all():
            return 1.0
        assert (mask == 1).all()
        return 2.0


class Overwritten(Loud):
    """What was asked for is written over, and read again."""

    def factor(self, mask):
        flag = mask.all().clone()
        seen = flag.view(())
        loud = 2.0 if seen else 1.0
        flag.fill_(True)
        return loud * seen


class Counted8(Loud):
    """As an integer of eight bits, 256 words are none."""

    def factor(self, mask):
        many = mask.bool()[:, :1].expand(N, 64).clone()
        if many.sum(dtype=torch.uint8) == 0:
            return 1.0
        return torch.where(many[:, 0], 2.0, 1.0)[:, None, None, None]


class CopiedToItself(Loud):
    def factor(self, mask):
        flag = mask.all().clone()
        flag.copy_(flag)
        return 2.0 if flag else 1.0


class Elsewhere(Loud):
    """The same numbers in another memory, of which a window shows others."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.arange(8.0).view(4, 2))

    def factor(self, mask):
        w = self.w[1:3].clone() if mask.all() else self.w[1:3]
        return w.as_strided((1,), (1,), 3)


class Typed(Loud):
    """A constant without dims counts less for the type of what is compared with it."""

    def factor(self, mask):
        c = torch.tensor(0.1, dtype=torch.float64)
        c = c.reshape(1) if mask.all() else c
        return 1.0 + (torch.full((N, 1, 1, 1), 0.1) * mask[:, :1, None, None] == c)


class Numpy(Loud):
    def __init__(self):
        super().__init__()
        self.array = np.ones(1, dtype="f")

    def factor(self, mask):
        self.array[0] = 2 if mask.all() else 1
        return torch.from_numpy(self.array)


class OneRow(Attention):
    """What hides all but the first word from every word is not what hides what comes later."""

    def attend(self, x, mask):
        q, k, v = self.heads(x)
        if mask.all():
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        first = (torch.arange(T) == 0)[None, None, None].expand(N, 1, 1, T)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=first)


class OtherAmount(Attention):
    """Draws in the same order, and not as much."""

    def attend(self, x, mask):
        torch.rand(1 if mask.all() else 7)
        return F.dropout(F.scaled_dot_product_attention(*self.heads(x)), 0.5)


HARMLESS = [Skipped, Counted, Causal, Shared, Finite, Written, Dropped, Checked]
HARMFUL = [
    Scaled,
    Louder,
    Unlike,
    AnyWord,
    Halved,
    TwiceNoise,
    Asserted,
    Overwritten,
    Counted8,
    CopiedToItself,
    Elsewhere,
    Typed,
    Numpy,
    OneRow,
    OtherAmount,
]


def batch(padded: bool) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    lengths = torch.tensor([T, T - 1, T - 3, T - 2]) if padded else torch.full((N,), T)
    return torch.randn(N, T, H * E), (torch.arange(T) < lengths[:, None]).long()


def structure(maker: type[Attention], padded: bool = True) -> ub.Structure:
    torch.manual_seed(0)
    y = torch.tensor([0, 1, 2, 1])
    return ub.Problem(maker().train(), F.cross_entropy, (batch(padded), y)).structure


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "full"])
@pytest.mark.parametrize("maker", HARMLESS)
def test_an_answer_that_changes_nothing(maker, padded):
    found = structure(maker, padded)
    assert found.simd_forward
    assert found.simd_forward.basis == "proved"
    assert found.reduction


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "full"])
@pytest.mark.parametrize("maker", HARMFUL)
def test_an_answer_that_matters_leaves_it_open(maker, padded):
    """Independence given the answers may be there; that it holds is not said."""
    found = structure(maker, padded).independent_forward
    assert found.status != "holds"
    assert any("Python reads a value" in c.why for c in found.culprits) or found.status == "fails"


class Encoder(nn.Module):
    """PyTorch's own encoder asks an op that answers with a boolean: is the padding on the right?"""

    def __init__(self, frozen: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder, self.head = (
            nn.TransformerEncoder(layer, 2).requires_grad_(not frozen),
            nn.Linear(8, 3),
        )

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.head(self.encoder(x, src_key_padding_mask=padding).mean(1))


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_an_op_that_answers_with_a_boolean(mode, left):
    torch.manual_seed(0)
    padding = torch.arange(T) >= torch.tensor([5, 3, 5, 2])[:, None]
    data = torch.randn(N, T, 8), padding.flip(1) if left else padding
    structure = ub.Problem(
        getattr(Encoder(False), mode)(), F.cross_entropy, (data, torch.arange(N) % 3)
    ).structure
    assert [v.basis for v in structure.verdicts] == ["proved"] * 6
    assert structure.unknown_ops == ()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_shortcut_with_other_values_leaves_it_open():
    """Frozen and in eval mode the encoder packs its words, and what stands
    at padding becomes zero.
    """
    padding = torch.arange(T) >= torch.tensor([5, 3, 5, 2])[:, None]
    problem = ub.Problem(
        Encoder(True).eval(),
        F.cross_entropy,
        ((torch.randn(N, T, 8), padding), torch.arange(N) % 3),
    )
    assert problem.structure.independent_forward.status == "unknown"
    with_shortcut = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        fresh = ub.Problem(
            problem.program.model, F.cross_entropy, (problem.inputs, problem.targets)
        )
        assert fresh.structure.independent_forward.basis == "proved"
    finally:
        torch.backends.mha.set_fastpath_enabled(with_shortcut)


class Equal(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if torch.equal(x, x.abs()) else super().forward(x + 0 * x.mean(0))


def test_what_an_op_answers_can_be_declared_harmless(monkeypatch):
    monkeypatch.setattr(rules, "ASSUMED", dict(rules.ASSUMED))
    problem = ub.Problem(Equal(8, 3), F.cross_entropy, (torch.rand(N, 8), torch.arange(N) % 3))
    assert any(
        "the result of equal" in c.why for c in problem.structure.independent_forward.culprits
    )
    ub.assume_independent(torch.ops.aten.equal.default)
    assert problem.structure.independent_forward.basis == "assumed"
    assert problem.structure.assumptions == ("aten.equal.default",)


def test_a_recording_without_the_mask_is_judged_by_the_one_with_it():
    """Without padding nothing mixes on the way that is taken; on the other way, samples do."""

    class Mean(Attention):
        def attend(self, x, mask):
            out = F.scaled_dot_product_attention(*self.heads(x))
            if mask.all():
                return out
            return out + (out - out.mean(0)) * torch.where(mask.bool(), 0.0, 1.0)[:, None, :, None]

    for padded in (True, False):
        assert structure(Mean, padded).independent_forward.status != "holds"


# --- bugs, planted ---


def planted(
    monkeypatch: pytest.MonkeyPatch, op: str, wrong: simplifications.Simpler, maker: type[Attention]
) -> None:
    """With a wrong rule for an op, an answer that matters passes for harmless."""
    monkeypatch.setitem(simplifications.SIMPLER, op, wrong)
    assert structure(maker).independent_forward.status == "holds"


def test_a_wrong_rule_is_caught(monkeypatch):
    planted(monkeypatch, "mul", lambda t, a, made: a["self"], Scaled)


def test_a_clamp_that_is_thought_to_do_nothing_is_caught(monkeypatch):
    planted(monkeypatch, "clamp", lambda t, a, made: a["self"], Halved)


def test_noise_that_is_not_counted_is_caught(monkeypatch):
    planted(
        monkeypatch, "bernoulli", lambda t, a, made: t.constant(torch.ones(made.shape)), TwiceNoise
    )


def test_a_wrong_conclusion_is_caught(monkeypatch):
    """Some are true: all are."""
    right = terms._implied

    def wrong(known, made, answer):
        yield from (
            [(made.arguments["self"], answer)] if made.op == "any" else right(known, made, answer)
        )

    monkeypatch.setattr(terms, "_implied", wrong)
    assert structure(AnyWord).independent_forward.status == "holds"


def test_ways_that_are_not_compared_are_caught(monkeypatch):
    monkeypatch.setattr(branches, "_computes", lambda one, other: True)
    assert structure(Scaled).independent_forward.status == "holds"


# --- terms of their own ---


def values_of(function, *inputs: Tensor) -> list[terms.Expr]:
    """The terms of what ``function`` returns."""
    from unbatch.capture.program import Program, record_answered

    graph = record_answered(
        Program(function, lambda out: sum(o.sum() for o in out), {}), inputs, None, ()
    )
    read = reading.SymbolicRun(graph, values_of.terms)
    return [read[r] for r in graph.predictions]


SAME = {
    "a zero added": lambda x: (x, x + torch.zeros(3), 0 + x, x.clone() - 0),
    "factors of one": lambda x: (x, x * torch.ones(()), x / 1),
    "chosen": lambda x: (
        x,
        torch.where(torch.tensor(True), x, x * 2),
        x.masked_fill(torch.arange(3) > 5, 1.0),
    ),
    "shaped and back": lambda x: (x, x.view(3, 2).view(2, 3), x[None].squeeze(0), x[:, :3]),
    "in place": lambda x: (x * 2 + 1, (x.clone().mul_(2)).add_(1)),
    "worked out": lambda x: (
        x + torch.tensor([[4.0]]),
        x + torch.full((2, 3), 4.0),
        x + torch.ones(1).add_(3),
    ),
}

OTHER = {
    "alpha": lambda x: (x, torch.add(torch.zeros(2, 3), x, alpha=2)),
    "zeros of another shape": lambda x: (x, x + torch.zeros(4, 1, 1)),
    "a number of another type": lambda x: ((x > 0) + 1, (x > 0) + 1.0),
    "part of it": lambda x: (x[:, :2], x[:, 1:]),
    "rounded": lambda x: (x, torch.div(x, 1, rounding_mode="floor")),
    "another type's bits": lambda x: (x, x.view(torch.int32).view(torch.float32)),
    "written through a window": lambda x: (_windows(x, 0), _windows(x, 1)),
    "rows and columns": lambda x: (x, x.t().reshape(2, 3)),
    "of another order": lambda x: (x.amax(0), x.amax(1)[:1].expand(3)),
}


def _windows(x: Tensor, row: int) -> Tensor:
    out = torch.zeros(2, 3)
    out[row] = x[0]
    return out


@pytest.mark.parametrize("case", SAME)
def test_same_functions_have_the_same_term(case):
    values_of.terms = terms.ExprTable()
    assert len(set(values_of(SAME[case], torch.randn(2, 3)))) == 1


@pytest.mark.parametrize("case", OTHER)
def test_other_functions_have_other_terms(case):
    values_of.terms = terms.ExprTable()
    assert len(set(values_of(OTHER[case], torch.randn(2, 3)))) == 2
