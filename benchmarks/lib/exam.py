"""Results for a zoo entry, compared with plain autograd on the unmodified model.

Rows, a product with the Gauss-Newton matrix, and its diagonal are computed for a few parameters, in
float64 if the model supports it. The reference uses nothing of the library but the values of the
predictions: they identify the module output at which the graph of autograd is split.

Legend: ``F`` the predictions, ``g = ∂L/∂F``, ``H`` the second derivative of the loss by F.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map

import unbatch as ub

RIGHT = {
    torch.float64: 1e-6,
    torch.float32: 2e-3,
}  # relative; losses of language models cast to float32 on their way
LARGEST = 3000  # entries of a parameter that is asked about
COLUMNS = 2000  # entries of one prediction up to which a diagonal is asked for
ENTRIES_ASKED = 6  # entries of the diagonal that are held against products with unit vectors


@dataclass(frozen=True)
class Answer:
    """``error``: relative to the largest entry. Unless the question was skipped, it or ``refusal``
    is set.
    """

    error: float | None = None
    refusal: str = ""
    seconds: float = 0.0
    mebibytes: float = 0.0


@dataclass(frozen=True)
class Exam:
    """``step``: seconds of a plain forward and backward pass; ``answers`` by question."""

    dtype: str = ""
    step: float = 0.0
    parameters: tuple[str, ...] = ()
    answers: dict[str, Answer] = field(default_factory=dict)

    def holds(self, answer: Answer) -> bool:
        """Return whether the result is right, or there is none."""
        return answer.error is None or answer.error <= RIGHT[getattr(torch, self.dtype)]

    @property
    def right(self) -> bool:
        """Return whether no result is wrong."""
        return all(self.holds(a) for a in self.answers.values())


QUESTIONS = ("rows", "product", "diagonal")


def examine(built: tuple[nn.Module, Any, Any, Any]) -> Exam:
    """Compare the results for a model, its inputs, targets and loss (None:
    its own) with autograd.
    """
    model, inputs, targets, loss = _widened(built)
    problem = (
        ub.Problem(model, batch=inputs)
        if loss is None
        else ub.Problem(model, loss, (inputs, targets))
    )
    chosen = _chosen(model)
    torch.manual_seed(0)
    cut = problem.predictions() if loss is None else None
    twin = copy.deepcopy(model)
    plain = Plain.of(
        twin,
        (inputs, targets, loss),
        [t for t in tree_leaves(cut) if isinstance(t, Tensor)],
        chosen,
    )
    dtype = next(iter(plain.parameters.values())).dtype
    answers = {
        "rows": _asked(lambda: problem.gradients(parameters=chosen), plain.off_rows),
        "product": _asked(
            lambda: (v := plain.vector(), problem.ggn(parameters=chosen) @ v), plain.off_product
        ),
        "diagonal": Answer(),
    }
    if plain.width <= COLUMNS:
        answers["diagonal"] = _asked(
            lambda: problem.ggn(parameters=chosen).diag(), plain.off_diagonal
        )
    return Exam(str(dtype).removeprefix("torch."), plain.seconds, tuple(chosen), answers)


def _widened(built: tuple[nn.Module, Any, Any, Any]) -> tuple[nn.Module, Any, Any, Any]:
    """Return a copy in float64, unless some op of the model does not support it."""
    model, inputs, targets, loss = built
    wide = lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t  # noqa: E731
    twin = copy.deepcopy(model).double()
    other = twin, tree_map(wide, inputs), tree_map(wide, targets), loss
    try:
        with torch.no_grad():
            _call(copy.deepcopy(twin), other[1])
    except RuntimeError:
        return built
    return other


def _chosen(model: nn.Module) -> list[str]:
    """Return the first, the last and two others of the parameters that are not too large."""
    small = [n for n, p in model.named_parameters() if p.requires_grad and 0 < p.numel() <= LARGEST]
    return [small[k] for k in sorted({0, len(small) // 3, len(small) // 2, len(small) - 1})]


def _call(model: nn.Module, inputs: Any) -> Any:
    return model(**inputs) if isinstance(inputs, dict) else model(inputs)


def _asked(ask: Callable[[], Any], off: Callable[[Any], float]) -> Answer:
    torch.manual_seed(0)
    _forget_peak()
    before, start = _peak(), time.process_time()
    try:
        found = ask()
    except ub.UnbatchError as error:
        return Answer(refusal=str(error).splitlines()[0])
    seconds, mebibytes = time.process_time() - start, (_peak() - before) / 2**10
    return Answer(off(found), "", round(seconds, 3), round(mebibytes, 1))


def _forget_peak() -> None:
    """Reset the peak of resident memory, if the system supports it."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> float:
    """Return the peak of resident memory since then, in KiB."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((float(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0.0)


# --- what answers are held against ----------------------------------------------------------------


@dataclass
class Plain:
    """The model run with autograd. F: ``outputs`` of the model, and ``leaves`` of the loss."""

    parameters: Mapping[str, Tensor]
    outputs: Sequence[Tensor]
    leaves: Sequence[Tensor]
    slope: Sequence[Tensor]
    state: Tensor  # from which a backward pass draws random numbers, if it does
    seconds: float

    @classmethod
    def of(
        cls,
        model: nn.Module,
        rest: tuple[Any, Any, Any],
        cut: Sequence[Tensor],
        chosen: Sequence[str],
    ) -> Plain:
        inputs, targets, loss = rest
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        torch.manual_seed(0)
        start = time.process_time()
        with sdpa_kernel(SDPBackend.MATH), _put_out(model) as seen:
            output = _call(model, inputs)
        state = torch.get_rng_state()
        if loss is None:
            leaves = outputs = [_found(t, seen) for t in cut]
            value = output["loss"]
        else:
            outputs, leaves, value = _apart(output, loss, targets)
        slope = _partial([value], leaves, None, create_graph=True)
        torch.autograd.grad(
            outputs,
            list(parameters.values()),
            [g.detach() for g in slope],
            None,
            True,
            allow_unused=True,
        )
        seconds = time.process_time() - start
        return cls({n: parameters[n] for n in chosen}, outputs, leaves, slope, state, seconds)

    @property
    def width(self) -> int:
        return sum(t[0].numel() for t in self.outputs)

    @property
    def _by(self) -> list[Tensor]:
        return list(self.parameters.values())

    def _pulled(self, cotangents: Sequence[Tensor]) -> list[Tensor]:
        torch.set_rng_state(self.state)
        return _grads(self.outputs, self._by, cotangents)

    def vector(self) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        size = sum(p.numel() for p in self._by)
        return torch.randn(size, generator=generator, dtype=torch.float64).to(self._by[0])

    def off_rows(self, rows: Mapping[str, Tensor]) -> float:
        """Return the error of rows; the reference pulls back the cotangent of one sample alone."""
        off = size = 0.0
        samples = len(next(iter(rows.values())))
        for n in range(samples):
            alone = [_of_sample(g.detach(), n, samples) for g in self.slope]
            for name, row in zip(self.parameters, self._pulled(alone), strict=True):
                off = max(off, float((rows[name][n] - row).abs().max()))
                size = max(size, float(row.abs().max()))
        return off / max(size, 1e-300)

    def off_product(self, asked: tuple[Tensor, Tensor]) -> float:
        v, found = asked
        expected = self.times(v)
        return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-300))

    def off_diagonal(self, found: Tensor) -> float:
        """Return the error of the diagonal, at some random entries and the largest one."""
        generator = torch.Generator().manual_seed(2)
        entries = {
            *torch.randint(len(found), (ENTRIES_ASKED,), generator=generator).tolist(),
            int(found.abs().argmax()),
        }
        units = {i: torch.zeros_like(found).index_fill(0, torch.tensor([i]), 1) for i in entries}
        off = max(abs(float(self.times(unit)[i] - found[i])) for i, unit in units.items())
        return off / max(float(found.abs().max()), 1e-300)

    def times(self, v: Tensor) -> Tensor:
        """Return ``Jᵀ H J v`` by double backward."""
        pieces = [
            t.view_as(p)
            for t, p in zip(v.split([p.numel() for p in self._by]), self._by, strict=True)
        ]
        w = [torch.zeros_like(t).requires_grad_() for t in self.outputs]
        torch.set_rng_state(self.state)
        pulled = torch.autograd.grad(
            self.outputs, self._by, w, create_graph=True, allow_unused=True
        )
        live = [
            (a, b) for a, b in zip(pulled, pieces, strict=True) if a is not None and a.requires_grad
        ]
        Jv = _grads([a for a, _ in live], w, [b for _, b in live])
        curved = [(g, t) for g, t in zip(self.slope, Jv, strict=True) if g.requires_grad]
        HJv = _partial([g for g, _ in curved], self.leaves, [t for _, t in curved])
        return torch.cat([t.reshape(-1) for t in self._pulled(HJv)]).detach()


def _grads(
    ends: Sequence[Tensor], by: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> list[Tensor]:
    found: Sequence[Tensor | None] = [None] * len(by)
    if ends:
        found = torch.autograd.grad(ends, by, cotangents, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if t is None else t for t, p in zip(found, by, strict=True)]


def _partial(
    ends: Sequence[Tensor],
    by: Sequence[Tensor],
    cotangents: Sequence[Tensor] | None,
    create_graph: bool = False,
) -> list[Tensor]:
    """Return the derivative by each tensor with the others held fixed.

    One of them may be computed from another: nothing is pulled back through the others.
    """
    found = []
    for t in by:
        hooks = [other.register_hook(torch.zeros_like) for other in by if other is not t]
        (grad,) = (
            torch.autograd.grad(
                ends, t, cotangents, retain_graph=True, create_graph=create_graph, allow_unused=True
            )
            if ends
            else (None,)
        )
        for hook in hooks:
            hook.remove()
        found.append(torch.zeros_like(t) if grad is None else grad)
    return found


class _put_out:
    """Collect the outputs of all modules while it is entered."""

    def __init__(self, model: nn.Module) -> None:
        self.seen: list[Tensor] = []
        self.hooks = [m.register_forward_hook(self._see) for m in model.modules()]

    def _see(self, module: nn.Module, arguments: Any, output: Any) -> None:
        self.seen += [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]

    def __enter__(self) -> list[Tensor]:
        return self.seen

    def __exit__(self, *_: Any) -> None:
        for hook in self.hooks:
            hook.remove()


def _found(value: Tensor, among: Sequence[Tensor]) -> Tensor:
    allowed = {torch.float64: 1e-9, torch.float32: 1e-4}[value.dtype] * max(
        1.0, float(value.abs().max())
    )
    alike = [
        t
        for t in among
        if t.shape == value.shape
        and t.dtype == value.dtype
        and torch.allclose(t, value, 0, allowed)
    ]
    if not alike:
        raise LookupError(f"no module puts out the predictions of shape {tuple(value.shape)}")
    return alike[0]


def _apart(
    output: Any, loss: Callable[[Any, Any], Tensor], targets: Any
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Return the used outputs, fresh leaves in their place, and the loss of these."""
    ends = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
    fresh = {id(t): t.detach().clone().requires_grad_() for t in ends}
    value = loss(tree_map(lambda t: fresh.get(id(t), t), output), targets)
    slopes = torch.autograd.grad(
        value, [fresh[id(t)] for t in ends], retain_graph=True, allow_unused=True
    )
    used = [t for t, g in zip(ends, slopes, strict=True) if g is not None]
    return used, [fresh[id(t)] for t in used], value


def _of_sample(slope: Tensor, n: int, samples: int) -> Tensor:
    """Return a slope with the entries of one sample alone; of none, where it has no such axis."""
    alone = torch.zeros_like(slope)
    if slope.shape[:1] == (samples,):
        alone[n] = slope[n]
    return alone
