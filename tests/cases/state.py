"""All that a question must not change, as plain data; and programs that
change it while they run.
"""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves

import unbatch as ub
from cases.function_net import D, N, Net, flat


def content(t: Tensor | None) -> Any:
    values = t.detach().clone() if t is not None and t.device.type != "meta" else None
    return None if t is None else (id(t), values, t.requires_grad, t.dtype)


def contained(value: Any) -> Any:
    """What a container holds, all the way down: things by identity, numbers and words by value."""
    if isinstance(value, dict):
        return [(k, contained(v)) for k, v in value.items()]
    if isinstance(value, list | tuple | set):
        return [contained(v) for v in value]
    return value if isinstance(value, int | float | str) else id(value)


def state(problem: ub.Problem) -> dict[str, Any]:
    """All that a question must not change, as plain data."""
    out: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "random": random.getstate(),
        "grad mode": torch.is_grad_enabled(),
    }
    kind, keys, *rest = np.random.get_state()
    out |= {
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *rest),
        "dispatch mode": _get_current_dispatch_mode(),
    }
    out["global hooks"] = [
        len(h)
        for h in (
            nn.modules.module._global_forward_hooks,
            nn.modules.module._global_forward_pre_hooks,
        )
    ]
    for module in problem.program.modules:
        for path, m in module.named_modules():
            out |= {f"{path} training": m.training, f"{path} attributes": list(m.__dict__)}
            out |= {f"{path}.{k}": (id(v), contained(v)) for k, v in m.__dict__.items()}
        for name, t in [*module.named_parameters(), *module.named_buffers()]:
            out |= {
                name: content(t),
                f"{name}.grad": content(t.grad),
                f"{name} hooks": len(t._backward_hooks or ()),
            }
    leaves = tree_leaves((problem.inputs, problem.targets))
    return out | {
        f"data {i}": (content(t), content(t.grad))
        for i, t in enumerate(leaves)
        if isinstance(t, Tensor)
    }


def assert_unchanged(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Raise where something is not bitwise what it was."""
    changed = [k for k in before if k not in after or not _equal(before[k], after[k])] + [
        k for k in after if k not in before
    ]
    assert not changed, f"changed: {changed}"


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return (
            isinstance(b, Tensor)
            and a.shape == b.shape
            and a.numpy().tobytes() == b.numpy().tobytes()
        )
    if isinstance(a, tuple):
        return isinstance(b, tuple) and len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b)


def writes_to_inputs(net, x):
    x.add_(1)
    x.view(-1)[0] = 7
    return net.linear(x)


def writes_to_a_buffer(net, x):
    net.count += 1
    net.sums.add_(x.detach().sum(0))
    return net.linear(x)


def replaces_a_buffer(net, x):
    net.sums = 0.9 * net.sums + x.detach().sum(0)
    return net.linear(x) - net.sums


def writes_to_a_parameter(net, x):
    with torch.no_grad():
        net.linear.weight.div_(net.linear.weight.norm())
        net.linear.bias.data.zero_()
    return net.linear(x)


def replaces_data(net, x):
    net.linear.weight.data = net.linear.weight.data * 2
    return net.linear(x)


def keeps_books(net, x):
    net.calls += 1
    net.history.append(x.mean())
    net.table["last"] = net.linear(x)
    net.new = x
    return net.table["last"]


def keeps_nested_books(net, x):
    net.table.setdefault("all", []).append(1)
    net.nested["inner"]["calls"] += 1
    return net.linear(x)


def draws(net, x):
    return net.linear(x) * random.random() + np.random.rand() + torch.rand(D)


def seeds(net, x):
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    return net.linear(x) + torch.rand(D)


def flips_flags(net, x):
    net.linear.weight.requires_grad_(False)
    net.eval()
    return net.linear(x) + net.linear.bias


def registers_hooks(net, x):
    net.linear.register_forward_hook(lambda m, i, o: o + 1)
    net.linear.weight.register_hook(lambda g: 2 * g)
    return net.linear(x)


def backpropagates(net, x):
    net.linear(x).square().sum().backward()
    return net.linear(x)


def clears_gradients(net, x):
    net.linear.weight.grad = None
    if net.linear.bias.grad is not None:
        net.linear.bias.grad.zero_()
    return net.linear(x)


def turns_gradients_off(net, x):
    out = net.linear(x)
    torch.set_grad_enabled(False)
    return out


def looks_up(net, x):
    return net.table(torch.arange(N)) * net.linear(x)


def stateful(run: Callable, **parts: Callable[[], Any]) -> Callable[[], nn.Module]:
    return lambda: Net(run, **{k: make() for k, make in parts.items()})


def usual() -> nn.Module:
    return nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D), nn.Dropout(0.5), nn.Linear(D, D))


def buffers() -> dict[str, Callable[[], Any]]:
    return {"sums": lambda: nn.Buffer(torch.zeros(D)), "count": lambda: nn.Buffer(torch.tensor(0))}


PLAIN = {"calls": int, "history": list, "table": dict, "nested": lambda: {"inner": {"calls": 0}}}


MESSY = [
    writes_to_inputs,
    writes_to_a_buffer,
    replaces_a_buffer,
    writes_to_a_parameter,
    replaces_data,
    keeps_books,
    keeps_nested_books,
    draws,
    seeds,
    flips_flags,
    registers_hooks,
    backpropagates,
    clears_gradients,
    turns_gradients_off,
]


STATEFUL: dict[str, Callable[[], nn.Module]] = {
    "batch norm and dropout": usual,
    "spectral norm": lambda: nn.Sequential(
        parametrizations.spectral_norm(nn.Linear(D, D)), nn.Tanh()
    ),
    "embedding with max_norm": stateful(looks_up, table=lambda: nn.Embedding(N, D, max_norm=0.1)),
    **{f.__name__.replace("_", " "): stateful(f, **buffers(), **PLAIN) for f in MESSY},
}


def stateful_problem(make: Callable[[], nn.Module]) -> ub.Problem:
    """A problem in the middle of a training run: some parameters have gradients, one is frozen."""
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    model = make()
    for i, p in enumerate(model.parameters()):
        p.grad = torch.randn_like(p) if i != 1 else None
    return ub.Problem(model, nn.MSELoss(), (flat(), flat()))


class Unseen:
    """Of a package whose objects nobody looks into."""

    __module__ = "concurrent"

    def __init__(self) -> None:
        self.runs = 0


class Countdown:
    """Counts runs out of reach of what puts attributes back, and raises from run `at` on."""

    def __init__(self, at: int, error: type[BaseException]):
        self.at, self.error, self.count = at, error, Unseen()

    @property
    def runs(self) -> int:
        return self.count.runs

    def tick(self) -> None:
        self.count.runs += 1
        if self.runs >= self.at:
            raise self.error(f"in run {self.runs}")
