"""The zoo: real architectures with tiny random configurations, built without any download.

An entry's `build()` gives `(model, inputs, targets, loss)`. The sample axis is axis 0 and there are
four samples. `inputs` is a dict of keyword tensors (transformers) or one tensor of images
(pytorchcv). `loss` is a callable `(predictions, targets) -> scalar` that takes the model's output
as it is; where the model computes its own loss from the labels among its inputs, `loss` and
`targets` are None.

Only builders live here; what is asked of the entries lives in the tests.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Inputs = dict[str, Tensor] | Tensor
Loss = Callable[[Any, Any], Tensor]
Built = tuple[nn.Module, Inputs, Any, Loss | None]

N = 4  # samples
T = 7  # tokens in a sentence
CLASSES = 5
VOCABULARY = 50
FIRST_WORD = 3  # 0 pads, 1 begins, 2 ends


@dataclass(frozen=True)
class ZooEntry:
    """One architecture: `build()` is deterministic and leaves the model in train mode."""

    name: str
    package: str
    build: Callable[[], Built]


def entry(name: str) -> ZooEntry:
    """The entry called `name`."""
    for candidate in ENTRIES:
        if candidate.name == name:
            return candidate
    raise KeyError(
        f"no zoo entry is called {name!r}; there are {', '.join(e.name for e in ENTRIES)}"
    )


def _seeded(build: Callable[[], Built]) -> Callable[[], Built]:
    def seeded() -> Built:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return build()

    return seeded


# --- data: what a model of each kind is fed, labels included --------------------------------------


def _words(length: int = T) -> Tensor:
    return torch.randint(FIRST_WORD, VOCABULARY, (N, length))


def _classes() -> Tensor:
    return torch.randint(CLASSES, (N,))


def _padding(length: int = T) -> Tensor:
    """[N, length], one where a word stands: every sentence but the first ends in some padding."""
    lengths = torch.tensor([length, length - 1, length - 3, length - 2])
    return (torch.arange(length) < lengths[:, None]).long()


def _sentences(length: int = T) -> dict[str, Tensor]:
    return {"input_ids": _words(length), "labels": _classes()}


def _padded_sentences() -> dict[str, Tensor]:
    mask = _padding()
    return {"input_ids": _words() * mask, "attention_mask": mask, "labels": _classes()}


def _masked_sentences() -> dict[str, Tensor]:
    """Two words of each sentence are to be predicted; -100 marks the others."""
    words = _words()
    hidden = torch.rand(N, T).argsort(1) < 2
    return {"input_ids": words.masked_fill(hidden, 1), "labels": words.masked_fill(~hidden, -100)}


def _tagged_sentences() -> dict[str, Tensor]:
    return {"input_ids": _words(), "labels": torch.randint(CLASSES, (N, T))}


def _text() -> dict[str, Tensor]:
    words = _words()
    return {"input_ids": words, "labels": words.clone()}


def _padded_text() -> dict[str, Tensor]:
    words, mask = _words(), _padding()
    return {
        "input_ids": words * mask,
        "attention_mask": mask,
        "labels": words.masked_fill(mask == 0, -100),
    }


def _translations() -> dict[str, Tensor]:
    return {"input_ids": _words(), "labels": _words(6)}


def _forced_translations() -> dict[str, Tensor]:
    return {**_translations(), "decoder_input_ids": _words(6)}


def _images(size: int) -> Callable[[], dict[str, Tensor]]:
    return lambda: {"pixel_values": torch.randn(N, 3, size, size), "labels": _classes()}


def _segmented_images(size: int) -> Callable[[], dict[str, Tensor]]:
    return lambda: {
        "pixel_values": torch.randn(N, 3, size, size),
        "labels": torch.randint(CLASSES, (N, size, size)),
    }


def _captioned_images() -> dict[str, Tensor]:
    return {
        "pixel_values": torch.randn(N, 3, 16, 16),
        "input_ids": _words(),
        "labels": torch.arange(N),
    }


def _boxed_images() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(N, 3, 64, 64), "labels": torch.rand(N, 4, 4)}


def _spoken_classes() -> dict[str, Tensor]:
    return {"input_values": torch.randn(N, 400), "labels": _classes()}


def _spoken_words() -> dict[str, Tensor]:
    return {"input_values": torch.randn(N, 400), "labels": torch.randint(1, VOCABULARY, (N, 3))}


def _transcribed_spectrograms() -> dict[str, Tensor]:
    return {"input_features": torch.randn(N, 8, 40), "labels": _words(6)}


def _classified_spectrograms() -> dict[str, Tensor]:
    return {"input_values": torch.randn(N, 24, 16), "labels": _classes()}


def _series() -> dict[str, Tensor]:
    return {"past_values": torch.randn(N, 32, 3), "labels": torch.randn(N, 8, 3)}


# --- losses outside the model; each takes the model's whole output --------------------------------


def _cross_entropy(output: Any, classes: Tensor) -> Tensor:
    return F.cross_entropy(getattr(output, "logits", output), classes)


def _next_token(output: Any, words: Tensor) -> Tensor:
    return F.cross_entropy(output.logits[:, :-1].flatten(0, 1), words[:, 1:].flatten())


def _each_token(output: Any, words: Tensor) -> Tensor:
    return F.cross_entropy(output.logits.flatten(0, 1), words.flatten())


def _contrastive(output: Any, partners: Tensor) -> Tensor:
    """Couples the samples: entry (n, m) of the logits compares image n with text m."""
    of_images = F.cross_entropy(output.logits_per_image, partners)
    of_texts = F.cross_entropy(output.logits_per_text, partners)
    return (of_images + of_texts) / 2


def _boxes(output: Any, boxes: Tensor) -> Tensor:
    """Query q of an image is to find its box q, of class 0; no matcher."""
    logits = output.logits.flatten(0, 1)
    classes = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    return F.l1_loss(output.pred_boxes, boxes) + F.cross_entropy(logits, classes)


def _forecast(output: Any, future: Tensor) -> Tensor:
    return F.mse_loss(output.prediction_outputs, future)


# --- transformers ---------------------------------------------------------------------------------


def _transformers(
    name: str,
    model_class: str,
    data: Callable[[], dict[str, Tensor]],
    config: dict[str, Any],
    loss: Loss | None = None,
) -> ZooEntry:
    """An entry of transformers. With a `loss`, the labels leave the inputs
    and become the targets.
    """

    def build() -> Built:
        import transformers

        transformers.logging.set_verbosity_error()
        architecture = getattr(transformers, model_class)
        model = architecture(architecture.config_class(**config)).train()
        inputs = data()
        targets = inputs.pop("labels") if loss is not None else None
        return model, inputs, targets, loss

    return ZooEntry(name, "transformers", _seeded(build))


SPECIAL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
ENCODER = {
    **SPECIAL,
    **SIZES,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
    "num_labels": CLASSES,
}
DECODER = {**ENCODER, "num_key_value_heads": 1, "head_dim": 8, "use_cache": False}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
GPT = {**SPECIAL, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "use_cache": False}
MAMBA = {**SPECIAL, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "use_cache": False}
T5 = {
    **SPECIAL,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 0,
    "use_cache": False,
}
BART = {
    **SPECIAL,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "num_labels": CLASSES,
    "max_position_embeddings": 32,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
    "use_cache": False,
}
PATCHES = {
    **SIZES,
    "intermediate_size": 32,
    "image_size": 16,
    "patch_size": 4,
    "num_labels": CLASSES,
}
PYRAMID = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 16, 16], "num_labels": CLASSES}
SWIN = {
    "image_size": 16,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [2, 2],
    "num_heads": [2, 2],
    "window_size": 4,
    "num_labels": CLASSES,
}
CLIP = {
    "projection_dim": 8,
    "text_config": {**ENCODER, "eos_token_id": VOCABULARY - 1},
    "vision_config": PATCHES,
    "num_labels": CLASSES,
}
SPEECH = {
    **SIZES,
    "vocab_size": VOCABULARY,
    "intermediate_size": 32,
    "conv_dim": [8, 8],
    "conv_kernel": [10, 4],
    "conv_stride": [5, 4],
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "num_labels": CLASSES,
    "classifier_proj_size": 8,
    "mask_time_prob": 0.0,
    "layerdrop": 0.0,
    "ctc_loss_reduction": "mean",
}
WHISPER = {
    **BART,
    "num_mel_bins": 8,
    "max_source_positions": 20,
    "max_target_positions": 16,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
DETR = {
    **{name: value for name, value in BART.items() if name != "vocab_size"},
    "backbone_config": {
        "model_type": "resnet",
        "embedding_size": 8,
        "hidden_sizes": [8, 8, 16, 16],
        "depths": [1, 1, 1, 1],
        "layer_type": "basic",
        "out_features": ["stage4"],
    },
    "use_timm_backbone": False,
    "num_queries": 4,
}

LANGUAGE = [
    _transformers("bert", "BertForSequenceClassification", _sentences, ENCODER),
    _transformers("bert-padded", "BertForSequenceClassification", _padded_sentences, ENCODER),
    _transformers(
        "bert-outer-loss",
        "BertForSequenceClassification",
        _padded_sentences,
        ENCODER,
        _cross_entropy,
    ),
    _transformers("bert-masked-words", "BertForMaskedLM", _masked_sentences, ENCODER),
    _transformers("bert-tags", "BertForTokenClassification", _tagged_sentences, ENCODER),
    _transformers(
        "distilbert",
        "DistilBertForSequenceClassification",
        _padded_sentences,
        {
            **SPECIAL,
            "dim": 16,
            "hidden_dim": 32,
            "n_layers": 2,
            "n_heads": 2,
            "num_labels": CLASSES,
        },
    ),
    _transformers("roberta", "RobertaForSequenceClassification", _padded_sentences, ENCODER),
    _transformers(
        "albert",
        "AlbertForSequenceClassification",
        _padded_sentences,
        {**ENCODER, "embedding_size": 8},
    ),
    _transformers(
        "electra",
        "ElectraForSequenceClassification",
        _padded_sentences,
        {**ENCODER, "embedding_size": 8},
    ),
    _transformers(
        "deberta",
        "DebertaForSequenceClassification",
        _padded_sentences,
        {**ENCODER, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    ),
    _transformers(
        "deberta-v2",
        "DebertaV2ForSequenceClassification",
        _padded_sentences,
        {**ENCODER, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    ),
    _transformers("mpnet", "MPNetForSequenceClassification", _padded_sentences, ENCODER),
    _transformers(
        "modernbert",
        "ModernBertForSequenceClassification",
        _padded_sentences,
        {**ENCODER, "cls_token_id": 1, "sep_token_id": 2},
    ),
    _transformers(
        "roformer",
        "RoFormerForSequenceClassification",
        _padded_sentences,
        {**ENCODER, "embedding_size": 8},
    ),
    _transformers(
        "squeezebert",
        "SqueezeBertForSequenceClassification",
        _padded_sentences,
        {
            **ENCODER,
            "embedding_size": 16,
            "q_groups": 2,
            "k_groups": 2,
            "v_groups": 2,
            "post_attention_groups": 1,
            "intermediate_groups": 2,
            "output_groups": 2,
        },
    ),
    _transformers(
        "convbert",
        "ConvBertForSequenceClassification",
        _padded_sentences,
        {**ENCODER, "embedding_size": 8, "head_ratio": 1, "conv_kernel_size": 3},
    ),
    _transformers("fnet", "FNetForSequenceClassification", _sentences, ENCODER),
    _transformers(
        "nystromformer",
        "NystromformerForSequenceClassification",
        lambda: _sentences(8),
        {**ENCODER, "num_landmarks": 4, "segment_means_seq_len": 8, "conv_kernel_size": 3},
    ),
    _transformers(
        "longformer",
        "LongformerForSequenceClassification",
        _padded_sentences,
        {**ENCODER, "attention_window": 4},
    ),
    _transformers(
        "bigbird",
        "BigBirdForSequenceClassification",
        _padded_sentences,
        {**ENCODER, "attention_type": "original_full"},
    ),
    _transformers(
        "bigbird-sparse",
        "BigBirdForSequenceClassification",
        lambda: _sentences(24),
        {**ENCODER, "attention_type": "block_sparse", "block_size": 2, "num_random_blocks": 1},
    ),
    _transformers(
        "xlnet",
        "XLNetForSequenceClassification",
        _padded_sentences,
        {**SPECIAL, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32, "num_labels": CLASSES},
    ),
    _transformers("gpt2", "GPT2LMHeadModel", _text, GPT),
    _transformers("gpt2-padded", "GPT2LMHeadModel", _padded_text, GPT),
    _transformers("gpt2-outer-loss", "GPT2LMHeadModel", _text, GPT, _next_token),
    _transformers("llama", "LlamaForCausalLM", _text, DECODER),
    _transformers("llama-padded", "LlamaForCausalLM", _padded_text, DECODER),
    _transformers("llama-outer-loss", "LlamaForCausalLM", _text, DECODER, _next_token),
    _transformers("llama-classes", "LlamaForSequenceClassification", _padded_sentences, DECODER),
    _transformers("mistral", "MistralForCausalLM", _text, {**DECODER, "sliding_window": 4}),
    _transformers("qwen2", "Qwen2ForCausalLM", _text, DECODER),
    _transformers("qwen3", "Qwen3ForCausalLM", _text, DECODER),
    _transformers("gemma", "GemmaForCausalLM", _text, DECODER),
    _transformers("gemma2", "Gemma2ForCausalLM", _text, {**DECODER, "sliding_window": 4}),
    _transformers("phi", "PhiForCausalLM", _text, DECODER),
    _transformers("olmo2", "Olmo2ForCausalLM", _text, DECODER),
    _transformers("falcon", "FalconForCausalLM", _text, {**SPECIAL, **SIZES, "use_cache": False}),
    _transformers(
        "falcon-alibi",
        "FalconForCausalLM",
        _text,
        {**SPECIAL, **SIZES, "alibi": True, "use_cache": False},
    ),
    _transformers(
        "opt", "OPTForCausalLM", _text, {**DECODER, "ffn_dim": 32, "word_embed_proj_dim": 16}
    ),
    _transformers(
        "bloom",
        "BloomForCausalLM",
        _text,
        {**SPECIAL, "hidden_size": 16, "n_layer": 2, "n_head": 2, "use_cache": False},
    ),
    _transformers("gpt-neox", "GPTNeoXForCausalLM", _text, {**ENCODER, "use_cache": False}),
    _transformers(
        "gpt-neo",
        "GPTNeoForCausalLM",
        _text,
        {
            **SPECIAL,
            "hidden_size": 16,
            "num_layers": 2,
            "num_heads": 2,
            "window_size": 4,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 32,
            "use_cache": False,
        },
    ),
    _transformers("gptj", "GPTJForCausalLM", _text, {**GPT, "rotary_dim": 4}),
    _transformers(
        "mpt",
        "MptForCausalLM",
        _text,
        {
            **SPECIAL,
            "d_model": 16,
            "n_heads": 2,
            "n_layers": 2,
            "max_seq_len": 32,
            "use_cache": False,
        },
    ),
    # The grouped matrix product of the experts, which is the default, has no float64; the other two
    # do.
    _transformers(
        "mixtral",
        "MixtralForCausalLM",
        _text,
        {**DECODER, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    _transformers(
        "mixtral-batched",
        "MixtralForCausalLM",
        _text,
        {
            **DECODER,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "experts_implementation": "batched_mm",
        },
    ),
    _transformers(
        "mixtral-looped",
        "MixtralForCausalLM",
        _text,
        {
            **DECODER,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "experts_implementation": "eager",
        },
    ),
    _transformers(
        "mixtral-balanced",
        "MixtralForCausalLM",
        _text,
        {**DECODER, "num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True},
    ),
    _transformers(
        "qwen2-moe",
        "Qwen2MoeForCausalLM",
        _text,
        {**DECODER, **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 16},
    ),
    _transformers(
        "gpt-oss",
        "GptOssForCausalLM",
        _text,
        {**DECODER, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4},
    ),
    _transformers(
        "deepseek-v3",
        "DeepseekV3ForCausalLM",
        _text,
        {
            **ENCODER,
            **EXPERTS,
            "num_key_value_heads": 2,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
            "use_cache": False,
        },
    ),
    _transformers("mamba", "MambaForCausalLM", _text, MAMBA),
    _transformers(
        "mamba2",
        "Mamba2ForCausalLM",
        _text,
        {**MAMBA, "num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 4},
    ),
    _transformers(
        "rwkv",
        "RwkvForCausalLM",
        _text,
        {
            **SPECIAL,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "context_length": 32,
            "use_cache": False,
        },
    ),
    _transformers(
        "recurrent-gemma",
        "RecurrentGemmaForCausalLM",
        _text,
        {**DECODER, "num_hidden_layers": 3, "lru_width": 16, "attention_window_size": 4},
    ),
    _transformers("t5", "T5ForConditionalGeneration", _translations, T5),
    _transformers(
        "t5-outer-loss", "T5ForConditionalGeneration", _forced_translations, T5, _each_token
    ),
    _transformers("bart", "BartForConditionalGeneration", _translations, BART),
    _transformers("pegasus", "PegasusForConditionalGeneration", _translations, BART),
    _transformers(
        "switch",
        "SwitchTransformersForConditionalGeneration",
        _translations,
        {
            **T5,
            "num_experts": 4,
            "num_decoder_layers": 2,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
            "expert_capacity": 8,
        },
    ),
]

VISION = [
    _transformers("vit", "ViTForImageClassification", _images(16), PATCHES),
    _transformers(
        "vit-outer-loss", "ViTForImageClassification", _images(16), PATCHES, _cross_entropy
    ),
    _transformers("deit", "DeiTForImageClassification", _images(16), PATCHES),
    _transformers(
        "beit",
        "BeitForImageClassification",
        _images(16),
        {**PATCHES, "vocab_size": VOCABULARY, "use_relative_position_bias": True},
    ),
    _transformers(
        "dinov2", "Dinov2ForImageClassification", _images(16), {**PATCHES, "mlp_ratio": 2}
    ),
    _transformers("swin", "SwinForImageClassification", _images(16), SWIN),
    _transformers("swinv2", "Swinv2ForImageClassification", _images(16), SWIN),
    _transformers("convnext", "ConvNextForImageClassification", _images(64), PYRAMID),
    _transformers("convnextv2", "ConvNextV2ForImageClassification", _images(64), PYRAMID),
    _transformers("poolformer", "PoolFormerForImageClassification", _images(64), PYRAMID),
    _transformers(
        "resnet", "ResNetForImageClassification", _images(64), {**PYRAMID, "embedding_size": 8}
    ),
    _transformers(
        "resnet-outer-loss",
        "ResNetForImageClassification",
        _images(64),
        {**PYRAMID, "embedding_size": 8, "layer_type": "basic"},
        _cross_entropy,
    ),
    _transformers(
        "bit",
        "BitForImageClassification",
        _images(64),
        {**PYRAMID, "embedding_size": 8, "layer_type": "bottleneck", "num_groups": 2},
    ),
    _transformers(
        "regnet",
        "RegNetForImageClassification",
        _images(64),
        {**PYRAMID, "embedding_size": 8, "groups_width": 4},
    ),
    _transformers(
        "mobilenet-v1",
        "MobileNetV1ForImageClassification",
        _images(64),
        {"depth_multiplier": 0.125, "image_size": 64, "num_labels": CLASSES},
    ),
    _transformers(
        "mobilenet-v2",
        "MobileNetV2ForImageClassification",
        _images(64),
        {"depth_multiplier": 0.25, "image_size": 64, "num_labels": CLASSES},
    ),
    _transformers(
        "efficientnet",
        "EfficientNetForImageClassification",
        _images(64),
        {
            "width_coefficient": 0.25,
            "depth_coefficient": 0.25,
            "hidden_dim": 320,
            "num_labels": CLASSES,
        },
    ),
    _transformers(
        "mobilevit",
        "MobileViTForImageClassification",
        _images(64),
        {
            "image_size": 64,
            "hidden_sizes": [16, 16, 16],
            "neck_hidden_sizes": [8, 8, 8, 8, 16, 16, 32],
            "num_attention_heads": 2,
            "num_labels": CLASSES,
        },
    ),
    _transformers(
        "segformer",
        "SegformerForImageClassification",
        _images(64),
        {**PYRAMID, "num_attention_heads": [1, 1, 2, 2]},
    ),
    _transformers(
        "segformer-pixels",
        "SegformerForSemanticSegmentation",
        _segmented_images(64),
        {**PYRAMID, "num_attention_heads": [1, 1, 2, 2], "decoder_hidden_size": 16},
    ),
    _transformers(
        "cvt",
        "CvtForImageClassification",
        _images(64),
        {
            "embed_dim": [8, 8, 16],
            "num_heads": [1, 1, 2],
            "depth": [1, 2, 3],
            "num_labels": CLASSES,
        },
    ),
    _transformers(
        "levit",
        "LevitForImageClassification",
        _images(64),
        {
            "image_size": 64,
            "hidden_sizes": [16, 16, 32],
            "key_dim": [8, 8, 8],
            "depths": [1, 1, 1],
            "num_attention_heads": [2, 2, 2],
            "down_ops": [["Subsample", 8, 2, 4, 2, 2], ["Subsample", 8, 2, 4, 2, 2]],
            "num_labels": CLASSES,
        },
    ),
    _transformers("clip", "CLIPModel", _captioned_images, CLIP, _contrastive),
    _transformers("clip-classes", "CLIPForImageClassification", _images(16), CLIP),
    _transformers("detr", "DetrForObjectDetection", _boxed_images, DETR, _boxes),
]

SOUND = [
    _transformers("wav2vec2", "Wav2Vec2ForSequenceClassification", _spoken_classes, SPEECH),
    _transformers("wav2vec2-ctc", "Wav2Vec2ForCTC", _spoken_words, SPEECH),
    _transformers("hubert", "HubertForSequenceClassification", _spoken_classes, SPEECH),
    _transformers("whisper", "WhisperForConditionalGeneration", _transcribed_spectrograms, WHISPER),
    _transformers(
        "audio-spectrogram",
        "ASTForAudioClassification",
        _classified_spectrograms,
        {
            **SIZES,
            "intermediate_size": 32,
            "patch_size": 4,
            "frequency_stride": 4,
            "time_stride": 4,
            "max_length": 24,
            "num_mel_bins": 16,
            "num_labels": CLASSES,
        },
    ),
    _transformers(
        "patchtsmixer",
        "PatchTSMixerForPrediction",
        _series,
        {
            "context_length": 32,
            "prediction_length": 8,
            "patch_length": 8,
            "patch_stride": 8,
            "num_input_channels": 3,
            "d_model": 16,
            "num_layers": 2,
        },
        _forecast,
    ),
]


# --- pytorchcv ------------------------------------------------------------------------------------


def _narrow_classifier(head: Any, width: int = 16) -> None:
    """VGG's two hidden layers are 4096 wide whatever the features are: 20 million parameters."""
    head.fc1.fc = nn.Linear(head.fc1.fc.in_features, width)
    head.fc2.fc = nn.Linear(width, width)
    head.fc3 = nn.Linear(width, head.fc3.out_features)


def _pytorchcv(name: str, family: str, model: str, size: int, **arguments: Any) -> ZooEntry:
    """An entry of pytorchcv: `model`, a class or a factory of `pytorchcv.models.<family>`, on
    square images.

    The ImageNet classes pool a fixed window of 7 x 7 at the end; with s stages and a first block of
    stride 4 that asks for images of 28 * 2^(s-1).
    """

    def build() -> Built:
        module = importlib.import_module(f"pytorchcv.models.{family}")
        net = getattr(module, model)(in_size=(size, size), **arguments).train()
        if family == "vgg":
            _narrow_classifier(net.output)
        pixels = (size, size) if family in SEGMENTERS else ()
        return (
            net,
            torch.randn(N, 3, size, size),
            torch.randint(net.num_classes, (N, *pixels)),
            _cross_entropy,
        )

    return ZooEntry(name, "pytorchcv", _seeded(build))


SEGMENTERS = ("lednet", "cgnet", "espcnet", "fpenet", "edanet", "contextnet")
BASIC: dict[str, Any] = {
    "channels": [[16, 16], [32, 32]],
    "init_block_channels": 16,
    "num_classes": CLASSES,
    "bottleneck": False,
    "conv1_stride": True,
}
SQUEEZE: dict[str, Any] = {
    "channels": [[16, 16], [32, 32]],
    "init_block_channels": 16,
    "init_block_kernel_size": 3,
    "num_classes": CLASSES,
}
VGG: dict[str, Any] = {"channels": [[8], [8], [16, 16]], "num_classes": CLASSES}

IMAGES = [
    _pytorchcv("cv-resnet", "resnet", "ResNet", 56, **BASIC),
    _pytorchcv("cv-resnet-bottleneck", "resnet", "ResNet", 56, **{**BASIC, "bottleneck": True}),
    _pytorchcv("cv-resnet20", "resnet_cifar", "resnet20_cifar10", 32),
    _pytorchcv("cv-preresnet", "preresnet", "PreResNet", 56, **BASIC),
    _pytorchcv("cv-preresnet20", "preresnet_cifar", "preresnet20_cifar10", 32),
    _pytorchcv("cv-se-resnet", "seresnet", "SEResNet", 56, **BASIC),
    _pytorchcv("cv-se-resnet20", "seresnet_cifar", "seresnet20_cifar10", 32),
    _pytorchcv(
        "cv-resnext",
        "resnext_cifar",
        "CIFARResNeXt",
        32,
        channels=[[16], [32], [64]],
        init_block_channels=8,
        cardinality=2,
        bottleneck_width=64,
        num_classes=CLASSES,
    ),
    _pytorchcv(
        "cv-wide-resnet",
        "wrn_cifar",
        "get_wrn_cifar",
        32,
        num_classes=CLASSES,
        blocks=10,
        width_factor=2,
    ),
    _pytorchcv(
        "cv-densenet",
        "densenet",
        "DenseNet",
        56,
        channels=[[12, 16], [12, 16]],
        init_block_channels=8,
        dropout_rate=0.1,
        num_classes=CLASSES,
    ),
    _pytorchcv("cv-densenet40", "densenet_cifar", "densenet40_k12_bc_cifar10", 32),
    _pytorchcv("cv-vgg", "vgg", "VGG", 56, **VGG),
    _pytorchcv("cv-vgg-norm", "vgg", "VGG", 56, use_bn=True, **VGG),
    _pytorchcv("cv-squeezenet", "squeezenet", "SqueezeNet", 112, **SQUEEZE, residuals=None),
    _pytorchcv(
        "cv-squeezenet-residual",
        "squeezenet",
        "SqueezeNet",
        112,
        **SQUEEZE,
        residuals=[[0, 1], [0, 1]],
    ),
    _pytorchcv("cv-mobilenet", "mobilenet", "mobilenet_wd4", 224, num_classes=CLASSES),
    _pytorchcv("cv-mobilenet-v2", "mobilenetv2", "mobilenetv2_wd4", 224, num_classes=CLASSES),
    _pytorchcv(
        "cv-shufflenet",
        "shufflenet",
        "ShuffleNet",
        112,
        channels=[[24, 24], [48, 48]],
        init_block_channels=12,
        groups=3,
        num_classes=CLASSES,
    ),
    _pytorchcv(
        "cv-shufflenet-v2",
        "shufflenetv2",
        "ShuffleNetV2",
        112,
        channels=[[16, 16], [32, 32]],
        init_block_channels=8,
        final_block_channels=64,
        num_classes=CLASSES,
    ),
    _pytorchcv(
        "cv-efficientnet",
        "efficientnet",
        "EfficientNet",
        64,
        channels=[[8], [12, 12], [16, 16], [24, 24]],
        init_block_channels=8,
        final_block_channels=64,
        kernel_sizes=[[3], [3, 3], [5, 5], [3, 3]],
        strides_per_stage=[1, 2, 2, 2],
        expansion_factors=[[1], [4, 4], [4, 4], [4, 4]],
        num_classes=CLASSES,
    ),
    _pytorchcv("cv-dia-resnet20", "diaresnet_cifar", "diaresnet20_cifar10", 32),
    _pytorchcv("cv-dia-preresnet20", "diapreresnet_cifar", "diapreresnet20_cifar10", 32),
    _pytorchcv("cv-se-preresnet20", "sepreresnet_cifar", "sepreresnet20_cifar10", 32),
    _pytorchcv("cv-nin", "nin_cifar", "nin_cifar10", 32),
    _pytorchcv("cv-ror", "ror_cifar", "ror3_56_cifar10", 32),
    _pytorchcv("cv-shake-shake", "shakeshakeresnet_cifar", "shakeshakeresnet20_2x16d_cifar10", 32),
    _pytorchcv("cv-shake-drop", "shakedropresnet_cifar", "shakedropresnet20_cifar10", 32),
    _pytorchcv("cv-resdrop", "resdropresnet_cifar", "resdropresnet20_cifar10", 32),
    _pytorchcv("cv-fdmobilenet", "fdmobilenet", "fdmobilenet_wd4", 224, num_classes=CLASSES),
    _pytorchcv("cv-shufflenet-v2b", "shufflenetv2b", "shufflenetv2b_wd2", 224, num_classes=CLASSES),
    _pytorchcv("cv-mnasnet", "mnasnet", "mnasnet_small", 224, num_classes=CLASSES),
    _pytorchcv("cv-menet", "menet", "menet108_8x1_g3", 224, num_classes=CLASSES),
    _pytorchcv("cv-squeezenext", "squeezenext", "sqnxt23_w1", 224, num_classes=CLASSES),
    _pytorchcv("cv-darknet", "darknet", "darknet_tiny", 224, num_classes=CLASSES),
    _pytorchcv("cv-dicenet", "dicenet", "dicenet_wd5", 224, num_classes=CLASSES),
    _pytorchcv("cv-igcv3", "igcv3", "igcv3_wd4", 224, num_classes=CLASSES),
    _pytorchcv("cv-peleenet", "peleenet", "peleenet", 224, num_classes=CLASSES),
    _pytorchcv("cv-hardnet", "hardnet", "hardnet39ds", 224, num_classes=CLASSES),
    _pytorchcv("cv-resnet-a", "resneta", "resneta10", 64, num_classes=CLASSES),
    _pytorchcv("cv-tresnet", "tresnet", "tresnet_m", 64, num_classes=CLASSES),
    _pytorchcv("cv-lednet", "lednet", "lednet_cityscapes", 64, num_classes=CLASSES),
    _pytorchcv("cv-cgnet", "cgnet", "cgnet_cityscapes", 64, num_classes=CLASSES),
    _pytorchcv("cv-espcnet", "espcnet", "espcnet_cityscapes", 64, num_classes=CLASSES),
    _pytorchcv("cv-fpenet", "fpenet", "fpenet_cityscapes", 64, num_classes=CLASSES),
    _pytorchcv("cv-edanet", "edanet", "edanet_cityscapes", 64, num_classes=CLASSES),
    _pytorchcv("cv-contextnet", "contextnet", "ctxnet_cityscapes", 64, num_classes=CLASSES),
]

ENTRIES = [*LANGUAGE, *VISION, *SOUND, *IMAGES]
