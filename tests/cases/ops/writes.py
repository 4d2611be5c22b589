"""Every op of PyTorch whose schema writes, in a net that hands it its own buffers and parameters.

Asking must leave these as they were. Arguments are made from the schema (``aten.py``). A call runs
in a process of its own: some ops do not check what they are given, and take the process with them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

import unbatch as ub
from cases.ops.apart import CRASHED, RAISED, apart
from cases.ops.aten import SHAPES, Attempt, attempt_of, tensor

RIGHT, REFUSED, CHANGED, UNREACHED = "right", "refused", "changed", "not called"

STATUSES = (RIGHT, REFUSED, CHANGED, RAISED, UNREACHED, CRASHED)

# Their states are numbers of an engine, which they believe.
LEFT_OUT = ("_sobol_engine", "rename_")

KINDS = ("float", "int", "definite", "bool")


@cache
def writing_ops() -> dict[str, Any]:
    """Return the ops of ATen whose schema says that they write to an argument, by name."""
    found = {}
    for schema in torch._C._jit_get_all_schemas():
        name = schema.name.removeprefix("aten::")
        if not schema.is_mutable or "::" in name or name.startswith(LEFT_OUT):
            continue
        if not any(_writes_tensors(argument) for argument in schema.arguments):
            continue  # TorchScript's lists and dicts
        packet = getattr(torch.ops.aten, name, None)
        overload = getattr(packet, schema.overload_name or "default", None)
        if overload is not None:
            found[f"{name}.{schema.overload_name or 'default'}"] = overload
    return dict(sorted(found.items()))


def _writes_tensors(argument: Any) -> bool:
    writes = argument.alias_info is not None and argument.alias_info.is_write
    return writes and "Tensor" in str(argument.type) and "Dict" not in str(argument.type)


# Shapes of the tensors of ops whose arguments the schema does not give, by name; numbers as they
# are. What is written to comes first, second, or last.
NORM = {
    "input": (4, 3),
    "weight": (3,),
    "bias": (3,),
    "running_mean": (3,),
    "running_var": (3,),
    "momentum": 0.1,
    "eps": 1e-5,
}
LISTS = {"self": [(3,), (2,)], "grads": [(3,), (2,)]}
MOMENTS = {"exp_avgs": [(3,), (2,)], "exp_avg_sqs": [(3,), (2,)], "max_exp_avg_sqs": []}
STEPS = {"state_steps": [(), ()], "lr": 0.1, "weight_decay": 0.0, "eps": 1e-8, "maximize": False}
ADAM = LISTS | MOMENTS | STEPS | {"beta1": 0.9, "beta2": 0.99, "amsgrad": False}
RATES = {"momentum": 0.9, "dampening": 0.0, "nesterov": False, "is_first_step": False}
OBSERVER = {
    "self": (4, 3),
    "observer_on": ("int", (1,)),
    "fake_quant_on": ("int", (1,)),
    "running_min": (1,),
    "running_max": (1,),
    "scale": (1,),
    "zero_point": ("zeros", (1,)),
    "averaging_const": 0.1,
    "quant_min": 0,
    "quant_max": 255,
    "ch_axis": 0,
}
SPECIAL: dict[str, dict[str, Any]] = {
    "_native_batch_norm_legit.default": NORM | {"training": True},
    "_batch_norm_with_update.default": NORM,
    "_fused_moving_avg_obs_fq_helper.default": OBSERVER,
    "_fused_adam_.default": ADAM,
    "_fused_adamw_.default": ADAM,
    "_fused_sgd_.default": LISTS
    | {"momentum_buffer_list": [(3,), (2,)], "weight_decay": 0.0, "lr": 0.1, "maximize": False}
    | RATES,
    "_fused_adagrad_.default": LISTS | {"state_sums": [(3,), (2,)], "lr_decay": 0.0} | STEPS,
    "_amp_foreach_non_finite_check_and_unscale_.default": {
        "self": [(3,), (2,)],
        "found_inf": (1,),
        "inv_scale": (1,),
    },
    "addmv_.default": {"self": (4,), "mat": (4, 3), "vec": (3,)},
    "addr_.default": {"self": (4, 3), "vec1": (4,), "vec2": (3,)},
    "addbmm_.default": {"self": (4, 2), "batch1": (5, 4, 3), "batch2": (5, 3, 2)},
    "clamp_.default": {"self": (4, 3), "min": 0.4},
    "clip_.default": {"self": (4, 3), "max": 0.6},
    "clamp_.Tensor": {"self": (4, 3), "min": (4, 3)},
    "clip_.Tensor": {"self": (4, 3), "max": (4, 3)},
}


def special(name: str, op: Any) -> Attempt:
    """Return a call of an op whose arguments are listed."""
    arguments: dict[str, Any] = {}
    made: list[Tensor] = []

    def make(shape: Any) -> Any:
        kind = "float"
        if shape and isinstance(shape[0], str):
            kind, shape = shape
        made.append(tensor(shape, "float", len(made)))
        if kind != "float":
            made[-1] = torch.ones(shape).int() if kind == "int" else torch.zeros(shape).int()
            if name.startswith("_fused_moving") and kind == "int":
                made[-1] = made[-1].long()
        elif name.startswith(("_fused_moving", "_amp")):
            made[-1] = made[-1].float()
        return ...

    for argument, value in SPECIAL[name].items():
        if isinstance(value, list):
            value = [make(shape) for shape in value]
        elif isinstance(value, tuple):
            value = make(value)
        arguments[argument] = value
    return Attempt(op, arguments, [made], [])


class Net(nn.Module):
    """A linear layer, shifted by what an op makes of the net's own tensors."""

    def __init__(self, attempt: Attempt) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2).double()
        self.attempt = attempt
        for i, t in enumerate(attempt.draws[0]):
            # What is trained is written to as well as what is not.
            if t.is_floating_point() and i % 2:
                self.register_parameter(f"t{i}", nn.Parameter(t.clone()))
            else:
                self.register_buffer(f"t{i}", t.clone())

    def forward(self, x: Tensor) -> Tensor:
        tensors = [getattr(self, f"t{i}") for i in range(len(self.attempt.draws[0]))]
        with torch.no_grad():
            self.attempt.call.function(*tensors)
            shift = x.new_zeros(())
            for t in tensors:
                if t.is_floating_point():
                    shift = shift + t.nan_to_num(0, 0, 0).clamp(-1, 1).sum()
        return self.linear(x) + shift


QUESTIONS: dict[str, Callable[[ub.Problem], Any]] = {
    "gradient": lambda problem: problem.gradient(),
    "rows": lambda problem: problem.gradients(),
    "product": lambda problem: problem.ggn() @ torch.ones(problem.ggn().shape[0]).double(),
}


def attempt(name: str, op: Any) -> Attempt | None:
    """Return a call of an op that runs; None if none is found."""
    if name in SPECIAL:
        return special(name, op)
    for shape in SHAPES:
        for kinds in product(KINDS, repeat=2):
            found = attempt_of(op, shape, kinds)
            with torch.no_grad():
                if found is not None and found.runs:
                    return found
    return None


def judged(name: str) -> tuple[str, str]:
    """Ask a net around an op all questions; return a status, and why."""
    found = attempt(name, writing_ops()[name])
    if found is None:
        return UNREACHED, ""
    torch.manual_seed(0)
    net = Net(found)
    X, y = torch.randn(4, 3).double(), torch.arange(4) % 2
    before, rng = _state(net), torch.get_rng_state()
    problem = ub.Problem(net, nn.functional.cross_entropy, (X, y))
    status, why = RIGHT, ""
    for name, ask in QUESTIONS.items():
        try:
            ask(problem)
        except ub.UnbatchError as error:
            status, why = REFUSED, f"{name}: {error}"
        except Exception as error:
            return RAISED, f"{name}: {type(error).__name__}: {error}"
        if not torch.equal(torch.get_rng_state(), rng):
            return CHANGED, f"{name}: the random state"
        for tensor_name, bits in _state(net).items():
            if bits != before[tensor_name]:
                return CHANGED, f"{name}: {tensor_name}"
    return status, why


def _state(net: nn.Module) -> dict[str, Any]:
    """Return shape and bits of all tensors of a net."""
    state = {}
    for name, t in net.state_dict().items():
        state[name] = tuple(t.shape), t.dtype, t.detach().clone().numpy().tobytes()
    return state


# --- the table ------------------------------------------------------------------------------------


def row_of(name: str) -> tuple[str, str]:
    """Return the status of an op, and why."""
    status, why = apart(judged, name)
    return status, why


def page(rows: Iterable[tuple[str, str]]) -> str:
    """Return the table of counts from names and statuses, and which ops are not right."""
    by_status: dict[str, list[str]] = {}
    for name, status in rows:
        by_status.setdefault(status, []).append(f"`{name}`")
    counts = Counter({status: len(names) for status, names in by_status.items()})
    lines = [HEAD, "| outcome | ops |", "|---|---|"]
    lines += [f"| {status} | {counts[status]} |" for status in STATUSES]
    for status in STATUSES[1:]:
        if counts[status]:
            lines += ["", f"*{status}*: {', '.join(by_status[status])}."]
    return "\n".join(lines) + "\n"


HEAD = """# Ops whose schema writes

Every op of PyTorch whose schema says that it writes to an argument, in a net that hands it its own
buffers and parameters, and is asked for its gradient, its rows (and so its structure) and a
product. *Right*: all of it is as before, in every bit. *Not called*: the schema alone does not say
which arguments an op takes (of other backends, sparse or quantized tensors). *Ends the process*: an
op does not check such arguments.

`python tests/capture/op_writes.py` writes this page.
"""
