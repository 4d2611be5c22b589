"""The cost of curvature at real sizes: vocabularies, ImageNet classes, pixels.

    python benchmarks/size_cost.py                 measures all models and prints the page
    python benchmarks/size_cost.py gpt2 unet       these models only
    python benchmarks/size_cost.py --write         writes the page and results/sizes.json

A process for each model. Process CPU time on one thread; the unit is a plain step (a forward and a
backward pass) on the same batch. Memory is the peak of the process during a question over its peak
during a plain step.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import unbatch as ub
from lib.interleaved import facts

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs" / "benchmarks" / "sizes.md"
RESULTS = ROOT / "benchmarks" / "results" / "sizes.json"
LIMIT = 3600.0  # seconds for a model
DAMPING = 1e-3

# --- models ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """A model in train mode, its batch, and its plain step."""

    model: nn.Module
    problem: ub.Problem
    loss: Callable[[], Tensor]


def language(layers: int, width: int, heads: int, batch: tuple[int, int]) -> Setting:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=layers, n_embd=width, n_head=heads, **no_dropout("pdrop"))
    config._attn_implementation = "eager"
    words = torch.randint(config.vocab_size, batch)
    return own_loss(GPT2LMHeadModel(config), {"input_ids": words, "labels": words})


def no_dropout(ending: str) -> dict[str, float]:
    return {f"{part}_{ending}": 0.0 for part in ("resid", "embd", "attn")}


def llama() -> Setting:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=12,
        attn_implementation="eager",
    )
    words = torch.randint(config.vocab_size, (2, 64))
    return own_loss(LlamaForCausalLM(config), {"input_ids": words, "labels": words})


def bert() -> Setting:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=4)
    config._attn_implementation = "eager"
    words = torch.randint(config.vocab_size, (8, 128))
    batch = {"input_ids": words, "labels": torch.randint(4, (8,))}
    return own_loss(BertForSequenceClassification(config), batch)


def own_loss(model: nn.Module, batch: dict[str, Tensor]) -> Setting:
    return Setting(model, ub.Problem(model, batch=batch), lambda: model(**batch).loss)


def images(name: str, samples: int = 8) -> Setting:
    from pytorchcv.model_provider import get_model

    model = get_model(name, pretrained=False)
    return classified(model, torch.randn(samples, 3, 224, 224), torch.randint(1000, (samples,)))


def classified(model: nn.Module, X: Tensor, y: Tensor) -> Setting:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    problem = ub.Problem(model, F.cross_entropy, (X, y))
    return Setting(model, problem, lambda: F.cross_entropy(model(X), y))


def vision_transformer() -> Setting:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(num_labels=1000, attn_implementation="eager")
    batch = {"pixel_values": torch.randn(4, 3, 224, 224), "labels": torch.randint(1000, (4,))}
    return own_loss(ViTForImageClassification(config), batch)


class UNet(nn.Module):
    """Three levels with batch norm, and a 1x1 convolution to the classes."""

    def __init__(self, classes: int = 5, width: int = 16) -> None:
        super().__init__()
        self.down = nn.ModuleList([block(3, width), block(width, 2 * width)])
        self.bottom = block(2 * width, 4 * width)
        self.up = nn.ModuleList([block(6 * width, 2 * width), block(3 * width, width)])
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for level in self.down:
            x = level(x)
            kept.append(x)
            x = F.max_pool2d(x, 2)
        x = self.bottom(x)
        for level in self.up:
            x = level(torch.cat([F.interpolate(x, scale_factor=2), kept.pop()], 1))
        return self.head(x)


def block(narrow: int, wide: int) -> nn.Module:
    layers: list[nn.Module] = []
    for channels in (narrow, wide):
        layers += [nn.Conv2d(channels, wide, 3, padding=1), nn.BatchNorm2d(wide), nn.ReLU()]
    return nn.Sequential(*layers)


def unet() -> Setting:
    return classified(UNet(), torch.randn(2, 3, 256, 256), torch.randint(5, (2, 256, 256)))


MODELS: dict[str, tuple[str, Callable[[], Setting]]] = {
    "gpt2": (
        "GPT-2, 2 layers of width 64, 50,257 words, 2 x 64",
        lambda: language(2, 64, 2, (2, 64)),
    ),
    "gpt2-wide": (
        "GPT-2, 4 layers of width 256, 50,257 words, 2 x 64",
        lambda: language(4, 256, 4, (2, 64)),
    ),
    "bert": ("BERT-base, 4 classes, 8 x 128", bert),
    "vit": ("ViT-B/16, 1000 classes, 4 x 224 x 224", vision_transformer),
    "llama": ("Llama-like, 8 layers of width 768, 32,000 words, 2 x 64", llama),
    "resnet50": ("ResNet-50, train mode, 1000 classes, 8 x 224 x 224", lambda: images("resnet50")),
    "densenet121": (
        "DenseNet-121, train mode, 1000 classes, 8 x 224 x 224",
        lambda: images("densenet121"),
    ),
    "efficientnet": (
        "EfficientNet-B0, train mode, 1000 classes, 8 x 224 x 224",
        lambda: images("efficientnet_b0"),
    ),
    "unet": ("U-Net with batch norm, train mode, 5 classes, 2 x 256 x 256", unet),
}

# --- questions ------------------------------------------------------------------------------------


def traced(G: Any) -> Any:
    """Return the trace to two percent: exactly where that is affordable."""
    try:
        return G.trace(info=True)[1].method
    except ub.BudgetError:
        pass
    for samples in (20, 60, 180):
        estimate = ub.spectra.trace(G, samples)
        if float(estimate.standard_errors) < 0.02 * float(estimate.values):
            return f"xtrace, {estimate.products} products"
    return f"xtrace, off by {float(estimate.standard_errors / estimate.values):.1%}"


def solved(G: Any) -> Any:
    gradient = G.space.flat(G.linearised.pull(G.point.curvature.loss.slope, G.space.shapes))
    _, report = G.solve(gradient, DAMPING, info=True)
    return f"{report.method}, {report.iterations} iterations, residual {report.residual:.1g}"


def spent_on(G: Any, k: int) -> str:
    _, spent = G.eigh(k, info=True)
    return f"{spent.method}, {spent.pulls:.0f} pulls, {spent.pushes:.0f} pushes"


def product(G: Any) -> None:
    _ = G @ torch.ones(G.shape[0], dtype=G.dtype)


QUESTIONS: dict[str, Callable[[ub.Problem], Any]] = {
    "structure": lambda problem: problem.structure and None,
    "squared norms": lambda problem: problem.compute(ub.SquaredNorms()) and None,
    "norms again": lambda problem: problem.compute(ub.SquaredNorms()) and None,
    "copy norms": lambda problem: problem.compute(ub.SquaredNorms(), by="copy") and None,
    "product": lambda problem: product(problem.ggn()),
    "product again": lambda problem: product(problem.ggn()),
    "sampled diagonal": lambda problem: problem.compute(ub.DiagGGN(mc_samples=1)) and None,
    "diagonal": lambda problem: problem.ggn().diag(info=True)[1].pullbacks,
    "eigh(1)": lambda problem: spent_on(problem.ggn(), 1),
    "eigh(5)": lambda problem: spent_on(problem.ggn(), 5),
    "trace to 2 %": lambda problem: traced(problem.ggn()),
    "solve": lambda problem: solved(problem.ggn()),
}


def peak(of: Callable[[], Any]) -> tuple[float, float, Any]:
    """Return CPU seconds, the peak of the resident memory in bytes, and the result."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    began = time.process_time()
    result = of()
    seconds = time.process_time() - began
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return seconds, 1024.0 * int(line.split()[1]), result


def measure(name: str) -> None:
    """Measure a model, a line of JSON for each question as it is answered."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    setting = MODELS[name][1]()

    def step() -> None:
        setting.loss().backward()
        setting.model.zero_grad()

    peak(step)
    seconds, memory, _ = min(peak(step) for _ in range(3))
    tell(name, "plain step", seconds, memory, "")
    for question, ask in QUESTIONS.items():
        try:
            spent, most, way = peak(lambda ask=ask: ask(setting.problem))
            tell(name, question, spent / seconds, most / memory, way or "")
        except ub.UnbatchError as error:
            tell(name, question, None, None, str(error))


def tell(name: str, question: str, cost: float | None, memory: float | None, way: Any) -> None:
    row = {"model": name, "question": question, "cost": cost, "memory": memory, "way": str(way)}
    print(json.dumps(row), flush=True)


# --- the page -------------------------------------------------------------------------------------

HEADER = """\
# Real sizes, measured

<!-- Written by benchmarks/size_cost.py; change that, not this. -->

Curvature and rows at real sizes, as multiples of a plain step (a forward and a backward pass) on the same batch, one after
the other in one process; in brackets the peak memory over that of a plain step. *Again*: a second question, with another
matrix. The way that was taken stands below each table. *Refused*: with the message that stands there, before anything
long was begun. Models are initialised at random, without dropout.

Process CPU time on one thread; torch {torch}; not measured on a GPU. To measure again run `python benchmarks/size_cost.py`.
"""


def page(rows: Sequence[dict[str, Any]]) -> str:
    """`docs/benchmarks/sizes.md`."""
    names = [name for name in MODELS if any(row["model"] == name for row in rows)]
    text = [HEADER.format(torch=version("torch").partition("+")[0])]
    for name in names:
        of_model = [row for row in rows if row["model"] == name]
        (plain,) = [row for row in of_model if row["question"] == "plain step"]
        text.append(f"## {MODELS[name][0]}\n")
        text.append(
            f"A plain step takes {plain['cost']:.2g} s and {plain['memory'] / 2**30:.1f} GiB.\n"
        )
        text.append("| question | plain steps | memory | way |\n| --- | --- | --- | --- |")
        for row in of_model:
            if row is not plain:
                text.append(line_of(row))
        text.append("")
    return "\n".join(text)


def line_of(row: dict[str, Any]) -> str:
    if row["cost"] is None:
        return f"| {row['question']} | refused | | {row['way']} |"
    return f"| {row['question']} | {row['cost']:.3g} | {row['memory']:.2f} | {row['way']} |"


def rows_of(name: str) -> list[dict[str, Any]]:
    """Return the rows of a model, measured in a process of its own."""
    command = [sys.executable, __file__, "--model", name]
    rows = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                print(line, end="", file=sys.stderr)
                rows.append(json.loads(line))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("models", nargs="*", choices=[*MODELS, []], help="all by default")
    parser.add_argument("--write", action="store_true", help="write the page and the rows")
    parser.add_argument("--model", choices=list(MODELS), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.model:
        measure(options.model)
        return
    rows: list[dict[str, Any]] = []
    if options.write and RESULTS.exists():
        rows = json.loads(RESULTS.read_text())["rows"]
    for name in options.models or MODELS:
        rows = [row for row in rows if row["model"] != name] + rows_of(name)
    text = page(rows)
    print(text)
    if options.write:
        DOCS.write_text(text)
        RESULTS.write_text(json.dumps(facts(1, {}) | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
