"""The cost of the Gauss-Newton matrix, here and with other tools: diagonal, products, spectrum.

    python benchmarks/ggn_cost.py                                       measures everything and prints the tables
    python benchmarks/ggn_cost.py --workloads W1,W6 --quantities diagonal,product --rounds 1
    python benchmarks/ggn_cost.py --write               writes docs/benchmarks/ggn.md and results/ggn.json

The unit is one forward and backward pass of the same batch. Process CPU time on one thread; in
every round all contestants, the unit among them, have their turn one after the other, and the
figure is the median over the rounds of the ratio within a round. Memory that was freed stays with
the process. Before a contestant is timed its answer is held against plain autograd in float64.
`make bench-ggn` installs the other tools; without them the table says so.

Legend: ``S`` a root of the second derivative of the loss at the predictions, ``H = S Sᵀ``; ``V = Jᵀ
S``, N·C columns.
"""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jvp, linearize, vjp, vmap

import unbatch as ub
from lib import interleaved
from lib.interleaved import Ask, Entry, Offer
from lib.workloads import WORKLOADS, Workload

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs" / "benchmarks" / "ggn.md"
RESULTS = ROOT / "benchmarks" / "results" / "ggn.json"
PART = 64  # columns that stand for all in a loop that would take too long
CHECKED = 6  # samples of the batch on which such a loop is held against the truth
CLASSES = 10
LANCZOS = 1e-3  # relative tolerance of eigenvalues by products

Named = Mapping[str, Tensor]


# --- what is asked --------------------------------------------------------------------------------

TOP = {"top 1": 1, "top 4": 4, "top 16": 16}
AT_ONCE, SPECTRAL = ("diagonal", "product", "fresh product"), ("spectrum", *TOP)
QUANTITIES = (*AT_ONCE, "gram", *SPECTRAL)


@dataclass(frozen=True)
class Case:
    """A workload at a batch size, and the quantities that are measured on it."""

    name: str
    samples: int
    quantities: tuple[str, ...]

    @property
    def workload(self) -> Workload:
        return WORKLOADS[self.name]


CASES = [
    Case("W1", 128, AT_ONCE),
    Case("W2", 128, AT_ONCE),
    Case("W3", 64, AT_ONCE),
    Case("W4", 64, AT_ONCE),
    Case("W5", 64, ("product", "fresh product")),
    Case("W5", 32, ("diagonal",)),
    Case("W6", 128, AT_ONCE),
    Case("W7", 32, AT_ONCE),
    Case("W1", 64, SPECTRAL),
    Case("W2", 32, SPECTRAL),
    Case("W3", 32, SPECTRAL),
    Case("W6", 32, ("gram", *SPECTRAL)),
]

# In plain steps. Diagonals where samples do not mix: 1.2 times what counting says they take at
# least.
FLOORS = {"W1": 2, "W2": 7, "W3": 7, "W4": 7, "W7": 7}
AIMS = {
    **{(name, "diagonal"): 1.2 * floor for name, floor in FLOORS.items()},
    ("W6", "diagonal"): 471.0,
    **{(case.name, "product"): 1.5 for case in CASES if "product" in case.quantities},
    ("W6", "gram"): 67.0,
}


# --- what the numbers should be -------------------------------------------------------------------


def root(predictions: Tensor) -> Tensor:
    """``S_n = (diag √p − p √pᵀ) / √N``, ``[n, c, k]``, of a mean cross-entropy of predictions ``[N,
    C]``.
    """
    p = predictions.softmax(-1)
    return (torch.diag_embed(p.sqrt()) - p[..., None] * p.sqrt()[..., None, :]) / len(p) ** 0.5


def columns(
    model: nn.Module, X: Tensor, y: Tensor, alone: bool = False
) -> Iterator[Sequence[Tensor]]:
    """Columns of V by definition: one backward pass each, column k of sample n at ``n·C + k``.

    ``alone``: samples do not mix, so the pass is one of the sample alone. H by autograd has to
    agree with its root.
    """
    predictions = model(X).detach()
    S = root(predictions)
    H = torch.autograd.functional.hessian(lambda f: F.cross_entropy(f, y), predictions)
    torch.testing.assert_close(torch.einsum("nck,ndk,nm->ncmd", S, S, torch.eye(len(S)).to(S)), H)
    if not alone:
        yield from pulled(model, X, S, y.numel() * CLASSES)
    for n in range(len(X)) if alone else ():
        yield from pulled(model, X[n : n + 1], S[n : n + 1], CLASSES)


def pulled(model: nn.Module, X: Tensor, S: Tensor | None, most: int) -> Iterator[Sequence[Tensor]]:
    """Yield the first columns of V; the default of ``S`` is the root for the loss."""
    parameters, predictions = list(model.parameters()), model(X)
    S = root(predictions.detach()) if S is None else S
    for n, k in list(np.ndindex(len(S), S.shape[-1]))[:most]:
        yield torch.autograd.grad(predictions[n], parameters, S[n, :, k], retain_graph=True)


def diagonal_of(columns: Iterable[Sequence[Tensor]], model: nn.Module) -> Named:
    found = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for column in columns:
        for total, g in zip(found.values(), column, strict=True):
            total.addcmul_(g, g)
    return found


def gram_of(columns: Iterable[Sequence[Tensor]], count: int, model: nn.Module) -> Tensor:
    """Return the Gram matrix. Columns are stored in single precision, and multiplied in double."""
    kept = [torch.empty(count, p.numel()) for p in model.parameters()]
    for at, column in enumerate(columns):
        for rows, g in zip(kept, column, strict=True):
            rows[at] = g.flatten()
    parts = (part.double() for rows in kept for part in rows.split(2**14, 1))
    return sum(part @ part.T for part in parts)  # type: ignore[return-value]


def double_backward(model: nn.Module, X: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
    """Return ``v ↦ Jᵀ H J v`` by double backward: a vjp is linear in its cotangent, and its vjp is
    a jvp.
    """
    parameters = list(model.parameters())
    predictions = model(X)
    cotangent = torch.zeros_like(predictions, requires_grad=True)
    pulled = torch.autograd.grad(predictions, parameters, cotangent, create_graph=True)
    p = predictions.detach().softmax(-1)

    def product(v: Tensor) -> Tensor:
        (pushed,) = torch.autograd.grad(pulled, cotangent, split(v, parameters), retain_graph=True)
        curved = p * (pushed - (p * pushed).sum(-1, keepdim=True)) / len(X)
        return joined(torch.autograd.grad(predictions, parameters, curved, retain_graph=True))

    return product


def split(v: Tensor, parameters: Iterable[Tensor]) -> list[Tensor]:
    parameters = list(parameters)
    return [
        part.view_as(p)
        for part, p in zip(v.split([p.numel() for p in parameters]), parameters, strict=True)
    ]


def joined(parts: Iterable[Tensor]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])


def vector(model: nn.Module) -> Tensor:
    """Return the vector that is multiplied, ``[D]``, the same for all tools."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(sum(p.numel() for p in model.parameters()), generator=generator)


def references(workload: Workload, samples: int, quantities: Iterable[str]) -> dict[str, Any]:
    """Return the reference results in float64, by plain autograd."""
    model, X, y = workload.build(samples)
    model, X, found = model.double(), X.double(), dict[str, Any]()
    every = partial(columns, model, X, y, not workload.mixes)
    if "product" in quantities or "fresh product" in quantities:
        found["product"] = found["fresh product"] = double_backward(model, X, y)(
            vector(model).double()
        )
    if "diagonal" in quantities:
        found["diagonal"] = diagonal_of(every(), model)
    if {"gram", *SPECTRAL} & set(quantities):
        found["gram"] = gram_of(every(), y.numel() * CLASSES, model)
        found["spectrum"] = values = torch.linalg.eigvalsh(found["gram"])
        found |= {name: values[-k:] for name, k in TOP.items()}
    return {quantity: interleaved.single(found[quantity]) for quantity in quantities}


# --- the contestants ------------------------------------------------------------------------------
# Each takes model, inputs and labels, and says how it answers which quantity.


def ours(model: nn.Module, X: Tensor, y: Tensor) -> Offer:
    """This library. Repeated products use a copy of the model that is never modified."""
    problem, v = interleaved.asked_anew(model, X, y), vector(model)
    kept = cache(lambda: ub.Problem(copy.deepcopy(model), F.cross_entropy, (X, y)).ggn())
    return {
        "diagonal": lambda: problem().compute(ub.DiagGGN()),
        "product": lambda: kept() @ v,
        "fresh product": lambda: problem().ggn() @ v,
        "gram": lambda: problem().ggn().gram(),
        "spectrum": lambda: problem().ggn().eigvalsh(),
        **{name: lambda k=k: problem().ggn().eigh(k).values for name, k in TOP.items()},
    }


def largest(operator: Callable[[], Any], k: int) -> Tensor:
    """Return the largest eigenvalues by SciPy's Lanczos iteration, with a new SciPy operator."""
    eigsh, made = importlib.import_module("scipy.sparse.linalg").eigsh, operator()
    start = np.random.default_rng(0).standard_normal(made.shape[0]).astype(np.float32)
    values = eigsh(made, k, which="LA", tol=LANCZOS, v0=start, return_eigenvectors=True)[0]
    return torch.as_tensor(values, dtype=torch.float32).sort().values


def products_and_scipy(model: nn.Module, X: Tensor, y: Tensor) -> Offer:
    """SciPy's eigenvalues from products of this library."""
    problem = interleaved.asked_anew(model, X, y)
    return {
        name: partial(largest, lambda: problem().ggn().to_scipy(), k) for name, k in TOP.items()
    }


def torch_func(model: nn.Module, X: Tensor, y: Tensor) -> Offer:
    """By hand: a vjp for each column, mapped over samples; a jvp and a vjp for products."""
    parameters, v = {name: p.detach() for name, p in model.named_parameters()}, vector(model)
    tangent = dict(zip(parameters, split(v, parameters.values()), strict=True))

    def predict(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(model, parameters, (X,))

    def of_sample(parameters: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        predictions, pull = vjp(lambda p: functional_call(model, p, (x[None],)), parameters)
        found = {name: torch.zeros_like(p) for name, p in parameters.items()}
        for column in root(predictions).unbind(-1):
            found = {name: found[name] + g * g for name, g in pull(column)[0].items()}
        return found

    def diagonal() -> Named:
        each = vmap(of_sample, (None, 0))(parameters, X)
        return {name: g.sum(0) / len(X) for name, g in each.items()}

    def curved(predictions: Tensor, pushed: Tensor) -> Tensor:
        p = predictions.softmax(-1)
        return p * (pushed - (p * pushed).sum(-1, keepdim=True)) / len(X)

    @cache
    def kept() -> tuple[Any, ...]:
        return *linearize(predict, parameters), vjp(predict, parameters)[1]

    def product() -> Tensor:
        predictions, push, pull = kept()
        return joined(pull(curved(predictions, push(tangent)))[0].values())

    def fresh() -> Tensor:
        predictions, pushed = jvp(predict, (parameters,), (tangent,))
        return joined(vjp(predict, parameters)[1](curved(predictions, pushed))[0].values())

    return {"diagonal": diagonal, "product": product, "fresh product": fresh}


def extended(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Return model and loss with BackPACK's hooks, converted if a module is not one of torch's."""
    extend = importlib.import_module("backpack").extend
    standard = all(type(m).__module__.startswith("torch.nn.") for m in model.modules())
    return extend(model, use_converter=not standard), extend(nn.CrossEntropyLoss())


def backpacks(model: nn.Module, X: Tensor, y: Tensor) -> Callable[..., Named]:
    """Return a function that runs an extension and returns what it stores at the parameters."""
    tool, extensions = (
        importlib.import_module("backpack"),
        importlib.import_module("backpack.extensions"),
    )
    hooked, loss = extended(model)

    def ask(extension: str, attribute: str, **options: Any) -> Named:
        with tool.backpack(getattr(extensions, extension)(**options)):
            loss(hooked(X), y).backward()
        return interleaved.harvest(model, attribute)

    return ask


def backpack(model: nn.Module, X: Tensor, y: Tensor) -> Offer:
    ask = backpacks(model, X, y)

    def gram() -> Tensor:
        V = ask("SqrtGGNExact", "sqrt_ggn_exact")
        rows = [part.transpose(0, 1).flatten(0, 1).flatten(1) for part in V.values()]
        return sum(r @ r.T for r in rows)  # type: ignore[return-value]

    return {"diagonal": partial(ask, "DiagGGNExact", "diag_ggn_exact"), "gram": gram}


def symeig(
    self: Tensor, eigenvectors: bool = False, upper: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Replace ``Tensor.symeig``, which ViViT calls and torch has removed."""
    triangle = "U" if upper else "L"
    return (
        torch.linalg.eigh(self, triangle)
        if eigenvectors
        else (torch.linalg.eigvalsh(self, triangle), None)
    )


def vivits(model: nn.Module, X: Tensor, y: Tensor) -> Callable[..., Any]:
    """Return a function that runs a computation of ViViT for the k largest eigenvalues."""
    backpack, (hooked, loss) = importlib.import_module("backpack").backpack, extended(model)

    def ask(computation: Any, k: int, **more: Any) -> Any:
        group = {
            "params": list(model.parameters()),
            "criterion": lambda e: list(range(len(e) - k, len(e))),
            **more,
        }
        several = hasattr(computation, "get_extensions")
        extensions = computation.get_extensions() if several else [computation.get_extension()]
        hook = computation.get_extension_hook([group])
        with (
            mock.patch.object(Tensor, "symeig", symeig),
            backpack(*extensions, extension_hook=hook),
        ):
            loss(hooked(X), y).backward()
        for p in model.parameters():
            p.grad = None
        return computation.get_result(group)

    return ask


def vivit(model: nn.Module, X: Tensor, y: Tensor) -> Offer:
    tool, ask = importlib.import_module("vivit"), vivits(model, X, y)
    return {
        "spectrum": lambda: ask(tool.EigvalshComputation(), 0),
        **{
            name: lambda k=k: ask(tool.EighComputation(warn_small_eigvals=0), k)[0]
            for name, k in TOP.items()
        },
    }


def curvlinops(model: nn.Module, X: Tensor, y: Tensor) -> Offer:
    """An operator without a cache: fresh products cost the same. Eigenvalues by SciPy."""
    tool, v = importlib.import_module("curvlinops"), vector(model)
    operator = tool.GGNLinearOperator(
        model, nn.CrossEntropyLoss(), list(model.parameters()), [(X, y)]
    )

    def product() -> Tensor:
        return operator @ v

    values = {
        name: partial(largest, lambda: operator.to_scipy(np.float32), k) for name, k in TOP.items()
    }
    return {"product": product, "fresh product": product, **values}


@dataclass(frozen=True)
class Part:
    """A fraction of a task; all of it takes `times` as long."""

    ask: Ask
    times: float

    def __call__(self) -> Any:
        return self.ask()


def autograd(model: nn.Module, X: Tensor, y: Tensor) -> Offer:
    """Double backward for products, one backward pass for every column for the rest."""
    v, kept = vector(model), cache(lambda: double_backward(model, X, y))
    count = len(X) * CLASSES
    most = min(count, PART)
    return {
        "product": lambda: kept()(v),
        "fresh product": lambda: double_backward(model, X, y)(v),
        "diagonal": Part(lambda: diagonal_of(pulled(model, X, None, most), model), count / most),
        "gram": lambda: gram(pulled(model, X, None, count), count, model),
    }


def gram(columns: Iterable[Sequence[Tensor]], count: int, model: nn.Module) -> Tensor:
    rows = torch.empty(count, sum(p.numel() for p in model.parameters()))
    for row, column in zip(rows, columns, strict=True):
        torch.cat([g.flatten() for g in column], out=row)
    return rows @ rows.T


CONTESTANTS: dict[str, Callable[[nn.Module, Tensor, Tensor], Offer]] = {
    "unbatch": ours,
    "torch.func": torch_func,
    "BackPACK": backpack,
    "ViViT": vivit,
    "curvlinops": curvlinops,
    "eigsh": products_and_scipy,
    "autograd": autograd,
}
OFFERED = {  # for where one cannot even be set up
    "unbatch": QUANTITIES,
    "torch.func": AT_ONCE,
    "BackPACK": ("diagonal", "gram"),
    "ViViT": SPECTRAL,
    "curvlinops": ("product", "fresh product", *TOP),
    "eigsh": tuple(TOP),
    "autograd": ("diagonal", "product", "fresh product", "gram"),
}
LOOPS = (("autograd", "diagonal"), ("autograd", "gram"))  # nobody would where samples do not mix
PACKAGES = {
    "BackPACK": "backpack-for-pytorch",
    "ViViT": "vivit-for-pytorch",
    "curvlinops": "curvlinops-for-pytorch",
    "SciPy": "scipy",
}


# --- measuring ------------------------------------------------------------------------------------


def offers(contestant: str, workload: Workload, samples: int) -> Offer:
    """Return the question for each quantity. If the setup of the tool fails, each raises that
    error.
    """
    try:
        found = CONTESTANTS[contestant](*workload.build(samples))
    except Exception as error:
        found = dict.fromkeys(OFFERED[contestant], interleaved.complaining(error))
    loops = () if workload.mixes else LOOPS
    return {quantity: ask for quantity, ask in found.items() if (contestant, quantity) not in loops}


def entry_of(ask: Ask | None, truth: Any, unit: float) -> Entry:
    """Check the first call against the reference. Fractions of a task are
    checked on a small batch.
    """
    return Entry("estimated") if isinstance(ask, Part) else interleaved.judged(ask, truth, unit)


def check_parts(workload: Workload) -> None:
    """Raise if a task that is timed only in part gives a wrong result."""
    ask = autograd(*workload.build(CHECKED))["diagonal"]
    assert isinstance(ask, Part)
    assert ask.times == 1
    found = interleaved.judged(
        ask.ask, references(workload, CHECKED, ["diagonal"])["diagonal"], 1.0
    )
    assert found.status == "ok", found


def measure(case: Case, quantities: Sequence[str], rounds: int) -> dict[str, Any]:
    """Measure all tools on all quantities of one case, by turns."""
    workload, quantities = case.workload, [q for q in case.quantities if q in quantities]
    step = interleaved.plain(*workload.build(case.samples))
    step()
    unit, truths = interleaved.turn(step), references(workload, case.samples, quantities)
    offered = {contestant: offers(contestant, workload, case.samples) for contestant in CONTESTANTS}
    asks = {(q, c): offered[c].get(q) for q in quantities for c in CONTESTANTS}
    entries = {(q, c): entry_of(ask, truths[q], unit) for (q, c), ask in asks.items()}
    del truths
    if any(isinstance(ask, Part) for ask in asks.values()):
        check_parts(workload)
    running = {
        key: asks[key]
        for key, entry in entries.items()
        if entry.first is not None or entry.status == "estimated"
    }
    for key, ratio in interleaved.medians(step, running, rounds).items():
        ask = asks[key]
        entries[key].ratio = ratio * (ask.times if isinstance(ask, Part) else 1)
    found = {q: {c: asdict(entries[q, c]) for c in CONTESTANTS} for q in quantities}
    about = {
        "workload": case.name,
        "title": workload.title,
        "samples": case.samples,
        "plain_ms": 1e3 * unit,
    }
    return about | {"quantities": found}


# --- the page -------------------------------------------------------------------------------------

HEADER = """\
# The Gauss-Newton matrix, measured

<!-- Written by benchmarks/ggn_cost.py; change that, not this. -->

What the generalized Gauss-Newton matrix of a mean cross-entropy over ten classes costs, as
multiples of one plain forward and backward pass on the same batch of N samples. *Diagonal* is the
exact one. *Product* is `G @ v` with a G that was used before; *fresh product* is with another batch
each time. *Gram* is the matrix `VᵀV` of the 10·N columns, *spectrum* all eigenvalues of it, *top k*
the k largest eigenpairs. If samples interact (W5, W6: batch norm in train mode), all of them
include the derivatives through the batch statistics.

Measured on {date}, {device}, torch {torch}, {tools}; float32, one thread, process CPU time, all
contestants interleaved, medians of {rounds} rounds after one to warm up. Freed memory stays with
the process. unbatch is used as in training, with another batch each time and after a change of the
parameters, except for *product*. *torch.func* is written by hand with `vjp`, `vmap`, `jvp` and
`linearize`. *eigsh* is SciPy's Lanczos iteration on products of unbatch, and *top k* of curvlinops
the same on its own, to a relative tolerance of {lanczos:g}. ViViT runs with a replacement for
`Tensor.symeig`, which torch has removed. *autograd* is double backward for products and one
backward pass for every column for the rest; ≈ marks times extrapolated from the first {part}
columns.

Each result was first compared with plain autograd in float64, one backward pass for every column,
with double backward for products: **wrong** means a relative error above {tolerance:g}; it is timed
nevertheless. For *top k* the eigenvalues are compared. Extrapolated ones were checked on a batch of
{checked}. *Refuses* is a deliberate error, *raises* any other; a dash means that the tool does not
offer the quantity or was not run. `make bench-ggn` repeats all of it.

*Aim* is the target for unbatch. For the diagonal without interaction of samples it is 1.2 times the
lower bound by counting (2 plain steps for W1, 7 for the others); for W6, and for the Gram matrix,
it is the time of an earlier prototype.
"""


def met(name: str, quantity: str, entry: Mapping[str, Any]) -> tuple[str, str]:
    """Return the aim, and whether it is met."""
    aim = AIMS.get((name, quantity))
    if aim is None:
        return "–", ""
    good = entry["status"] == "ok" and entry["ratio"] <= aim
    return f"{aim:g}", "met" if good else "**not met**"


def speeds(results: Iterable[Mapping[str, Any]]) -> str:
    lines: list[Sequence[object]] = [("workload", "N", "quantity", "aim", "", *CONTESTANTS)]
    for result in results:
        for quantity, entries in result["quantities"].items():
            verdict = met(result["workload"], quantity, entries["unbatch"])
            cells = (interleaved.cell(entries[c]) for c in CONTESTANTS)
            lines.append((result["workload"], result["samples"], quantity, *verdict, *cells))
    return interleaved.table(lines)


def workloads(results: Iterable[Mapping[str, Any]]) -> str:
    lines = [(r["workload"], r["title"], r["samples"], f"{r['plain_ms']:.1f} ms") for r in results]
    return interleaved.table([("workload", "model", "N", "plain step"), *lines])


def page(data: Mapping[str, Any]) -> str:
    """`docs/benchmarks/ggn.md`."""
    text = interleaved.header(HEADER, data | {"lanczos": LANCZOS, "part": PART, "checked": CHECKED})
    return text + "\n" + workloads(data["results"]) + "\n" + speeds(data["results"])


def main(arguments: Sequence[str] | None = None) -> None:
    options = interleaved.parsed(
        interleaved.parser(__doc__, dict.fromkeys(case.name for case in CASES), QUANTITIES),
        arguments,
    )
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # the tools' own deprecations, and torch's remarks about them
    interleaved.keep_memory()
    data = interleaved.facts(options.rounds, PACKAGES) | {"results": []}
    for case in CASES:
        if case.name in options.workloads and set(case.quantities) & set(options.quantities):
            data["results"].append(measure(case, options.quantities, options.rounds))
            print(speeds(data["results"][-1:]), flush=True)
    if options.write:
        interleaved.save(page(data), data, DOCS, RESULTS)


if __name__ == "__main__":
    main()
