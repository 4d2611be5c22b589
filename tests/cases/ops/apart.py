"""A trial in a process of its own, as some ops take the process with them."""

from __future__ import annotations

import os
import pickle
import signal
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn

import unbatch as ub
from cases.ops.warned import quietly

RAISED, CRASHED = "raised", "ends the process"

SECONDS = 120


@cache
def warm() -> None:
    """Load all that a question loads, once for all processes that follow."""
    net = nn.Linear(3, 2).double()
    X, y = torch.randn(4, 3).double(), torch.arange(4) % 2
    problem = ub.Problem(net, nn.functional.cross_entropy, (X, y))
    problem.gradients()
    problem.ggn() @ torch.ones(8).double()
    problem.ggn().diag()


def apart(function: Callable[..., Any], *args: Any) -> Any:
    """Return what a function returns in a process of its own, or how that ends."""
    warm()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        signal.alarm(SECONDS)
        _silence()
        try:
            with quietly():
                result = function(*args)
        except BaseException as error:
            result = RAISED, f"the sweep: {type(error).__name__}: {error}"
        os.write(writer, pickle.dumps(result)[:60000])
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    if not answer:
        return CRASHED, ""
    return pickle.loads(answer)


def _silence() -> None:
    """Send what C++ warns of nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
