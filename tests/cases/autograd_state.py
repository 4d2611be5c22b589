"""All that a question about derivatives must not change."""

from typing import Any

import torch

import unbatch as ub
from cases.state import state as books


def state(problem: ub.Problem) -> dict[str, Any]:
    """All that `cases.state` looks at, with the versions of tensors, the hooks of modules and
    autocast.
    """
    out = books(problem) | {
        "autocast": torch.is_autocast_enabled("cpu"),
        "threads": torch.get_num_threads(),
    }
    for module in problem.program.modules:
        for name, t in [*module.named_parameters(), *module.named_buffers()]:
            out[f"{name} version"] = (t._version, t.data_ptr(), t.is_leaf)
        for path, m in module.named_modules():
            hooks = [
                m._forward_hooks,
                m._forward_pre_hooks,
                m._backward_hooks,
                m._backward_pre_hooks,
            ]
            out[f"{path} hooks"] = [list(h.items()) for h in hooks]
    return out
