"""A small language model, with prompts and without."""

from typing import Any

import torch
from torch import Tensor

from cases import zoo

T, WORDS = 5, 11


def language_model(**config: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    small = {
        "vocab_size": WORDS,
        "n_embd": 8,
        "n_layer": 1,
        "resid_pdrop": 0,
        "embd_pdrop": 0,
        "attn_pdrop": 0,
    }
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**{**zoo.GPT, **small, **config})
    ).double()


def text() -> dict[str, Tensor]:
    """Three sentences; the ends of two are padding, and the first words of each are given, not to
    be learned.
    """
    words = torch.randint(3, WORDS, (3, T), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(T) < torch.tensor([[T], [T - 1], [T - 2]])).long()
    return {
        "input_ids": words * mask,
        "attention_mask": mask,
        "labels": words.masked_fill(mask == 0, -100),
    }


def with_prompts(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    asked = batch["labels"].clone()
    asked[:, :2] = -100
    return {**batch, "labels": asked}


def near_in_single(found: Tensor, expected: Tensor, what: str) -> None:
    """Raise where two tensors differ by more than what the loss, in float32, rounds."""
    assert found.shape == expected.shape, what
    off = float((found - expected).norm() / expected.norm())
    assert off < 1e-6, f"{what}: off by {off:.1e}"
