"""Settings of the process that decide what is computed, in one table: how to read and set each."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import gc
import logging
import os
import signal
import sys
import tracemalloc
import warnings
from collections.abc import Callable
from decimal import getcontext
from typing import Any

import numpy as np
import torch
import torch.utils._device
from torch import _tensor_str
from torch.backends import cuda, mha, opt_einsum
from torch.distributions import Distribution
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

C = torch._C


def _modes() -> list[Any]:
    """Return what changes functions and ops around a question, by class and plain attributes."""
    modes = []
    for mode in (*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack()):
        if type(mode).__module__.startswith("unbatch."):
            continue  # sees, and changes nothing
        attributes = {k: v for k, v in vars(mode).items() if isinstance(v, SIMPLE)}
        modes.append((type(mode), attributes))
    return modes


SIMPLE = (int, float, bool, str, type(None), torch.device, torch.dtype)

# Name -> how to read, and how to set what was read.
SWITCHES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "default device": (lambda: torch.utils._device.CURRENT_DEVICE, torch.set_default_device),
    "deterministic": (
        lambda: (C._get_deterministic_algorithms(), C._get_deterministic_algorithms_warn_only()),
        lambda old: torch.use_deterministic_algorithms(old[0], warn_only=old[1]),
    ),
    "fill memory": (
        C._get_deterministic_fill_uninitialized_memory,
        C._set_deterministic_fill_uninitialized_memory,
    ),
    "matmul precision": (
        torch.get_float32_matmul_precision,
        torch.set_float32_matmul_precision,
    ),
    "cudnn": (C._get_cudnn_enabled, C._set_cudnn_enabled),
    "cudnn benchmark": (C._get_cudnn_benchmark, C._set_cudnn_benchmark),
    "cudnn deterministic": (C._get_cudnn_deterministic, C._set_cudnn_deterministic),
    "cudnn in TF32": (lambda: _cudnn_in_tf32(), C._set_cudnn_allow_tf32),
    "bfloat16 summed in less": (
        C._get_cublas_allow_bf16_reduced_precision_reduction,
        lambda old: _set(C._set_cublas_allow_bf16_reduced_precision_reduction, old),
    ),
    "float16 summed in less": (
        C._get_cublas_allow_fp16_reduced_precision_reduction,
        lambda old: _set(C._set_cublas_allow_fp16_reduced_precision_reduction, old),
    ),
    "float16 accumulated in float16": (
        C._get_cublas_allow_fp16_accumulation,
        C._set_cublas_allow_fp16_accumulation,
    ),
    "mkldnn": (C._get_mkldnn_enabled, C._set_mkldnn_enabled),
    "flash attention": (cuda.flash_sdp_enabled, cuda.enable_flash_sdp),
    "lean attention": (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp),
    "plain attention": (cuda.math_sdp_enabled, cuda.enable_math_sdp),
    "cudnn attention": (cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp),
    "fast path": (mha.get_fastpath_enabled, mha.set_fastpath_enabled),
    "autocast cpu": (
        lambda: torch.is_autocast_enabled("cpu"),
        lambda old: torch.set_autocast_enabled("cpu", old),
    ),
    "autocast cpu to": (
        lambda: torch.get_autocast_dtype("cpu"),
        lambda old: torch.set_autocast_dtype("cpu", old),
    ),
    "autocast cuda": (
        lambda: torch.is_autocast_enabled("cuda"),
        lambda old: torch.set_autocast_enabled("cuda", old),
    ),
    "autocast cuda to": (
        lambda: torch.get_autocast_dtype("cuda"),
        lambda old: torch.set_autocast_dtype("cuda", old),
    ),
    "decimals": (lambda: getcontext().__reduce__()[1][:6], lambda old: _set_decimals(old)),
    # What a program enters it leaves itself: nothing is set back.
    "modes": (_modes, lambda _: None),
    "small numbers flushed": (lambda: _flushes(), torch.set_flush_denormal),
    "floating point errors": (np.geterr, lambda old: np.seterr(**old)),
}

# What decides nothing, and is put back all the same.
TRACES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "threads": (torch.get_num_threads, torch.set_num_threads),
    "anomalies": (torch.is_anomaly_enabled, torch.set_anomaly_enabled),
    "warnings": (lambda: list(warnings.filters), lambda old: _set_filters(old)),
    "checks of laws": (
        lambda: Distribution._validate_args,
        Distribution.set_default_validate_args,
    ),
    "checks of sparse tensors": (
        C._check_sparse_tensor_invariants,
        C._set_check_sparse_tensor_invariants,
    ),
    "printing of tensors": (
        lambda: dict(vars(_tensor_str.PRINT_OPTS)),
        lambda old: vars(_tensor_str.PRINT_OPTS).update(old),
    ),
    "printing of arrays": (np.get_printoptions, lambda old: np.set_printoptions(**old)),
    "path of imports": (lambda: list(sys.path), lambda old: _set_items(sys.path, old)),
    "limit of recursion": (sys.getrecursionlimit, sys.setrecursionlimit),
    "collector of garbage": (gc.isenabled, lambda old: _set_collector(old)),
    "thresholds of the collector": (gc.get_threshold, lambda old: gc.set_threshold(*old)),
    "silent loggers": (lambda: logging.root.manager.disable, logging.disable),
    "logged warnings": (
        lambda: logging._warnings_showwarning is not None,  # type: ignore[attr-defined]
        logging.captureWarnings,
    ),
    "cache of autocast": (torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled),
    "paths of products": (
        lambda: opt_einsum.strategy,
        lambda old: setattr(opt_einsum, "strategy", old),
    ),
    "each warning of PyTorch": (torch.is_warn_always_enabled, torch.set_warn_always),
    "folder": (lambda: _folder(), lambda old: _set_folder(old)),
    "traces of memory": (tracemalloc.is_tracing, lambda old: _set_tracing(old)),
    "handlers of signals": (lambda: _signals(), lambda old: _set_handlers(old)),
    "plots": (
        # As Python's own dict, whose methods check nothing.
        lambda: list(dict.items(_of_plots())),
        lambda old: dict.update(_of_plots(), old),
    ),
    "signals of decimals": (
        lambda: getcontext().__reduce__()[1][6:],
        lambda old: _set_signals(old),
    ),
}

# The smallest number of full precision.
SMALLEST = sys.float_info.min

ALL = (*SWITCHES.values(), *TRACES.values())


def settings() -> tuple[Any, ...]:
    """Return all that decides what is computed."""
    return tuple([read() for read, _ in SWITCHES.values()])


def all_settings() -> list[Any]:
    """Return what ``set_back`` takes."""
    return [read() for read, _ in ALL]


def set_back(before: list[Any]) -> None:
    """Set what has changed since."""
    for (read, write), old in zip(ALL, before, strict=True):
        if read() != old:
            write(old)


def _set_items(space: list[Any], old: list[Any]) -> None:
    space[:] = old


def _set_collector(enabled: bool) -> None:
    if enabled:
        gc.enable()
    else:
        gc.disable()


def _set(write: Callable[..., Any], old: Any) -> None:
    """Set one value, or several that belong together, as some versions of PyTorch have."""
    write(*(old if isinstance(old, tuple) else (old,)))


def _flushes() -> bool:
    """Return whether processors take numbers without full precision for zero; nothing says so."""
    return SMALLEST / 2 == 0.0


def _cudnn_in_tf32() -> bool | None:
    """Return the setting; None where its parts have been set apart."""
    try:
        return bool(C._get_cudnn_allow_tf32())
    except RuntimeError:
        return None


def _folder() -> str | None:
    """Return the folder of the process; None where that is gone."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        return None


def _set_folder(old: str | None) -> None:
    if old is not None:
        os.chdir(old)


def _set_tracing(traced: bool) -> None:
    if traced:
        tracemalloc.start()
    else:
        tracemalloc.stop()


# Those that may have a handler.
SIGNALS = sorted(map(int, signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}))


def _signals() -> list[Any]:
    # Python's own function makes enums of all that it returns, which takes a hundred times as long.
    return list(map(_signal.getsignal, SIGNALS))


def _set_handlers(old: list[Any]) -> None:
    for number, before in zip(SIGNALS, old, strict=True):
        now = _signal.getsignal(number)
        # Python cannot set what is none of its own, and none but the main thread sets any.
        if now is not before and before is not None:
            signal.signal(number, before)


def _of_plots() -> dict[str, Any]:
    """Return the settings of plots, if anybody plots."""
    matplotlib = sys.modules.get("matplotlib")
    return getattr(matplotlib, "rcParams", {})


# What of the arithmetic of decimals decides a result, in the order in which a context is copied;
# there follows what has happened, and what raises. One by one they take 20 times as long to read.
OF_DECIMALS = ("prec", "rounding", "Emin", "Emax", "capitals", "clamp")


def _set_decimals(old: tuple[Any, ...]) -> None:
    for name, value in zip(OF_DECIMALS, old, strict=True):
        setattr(getcontext(), name, value)


def _set_signals(old: tuple[Any, ...]) -> None:
    context = getcontext()
    for now, before in zip((context.flags, context.traps), old, strict=True):
        for flag in now:
            now[flag] = flag in before


def _set_filters(old: list[Any]) -> None:
    warnings.filters[:] = old  # type: ignore[index]
    # Python keeps what it has warned of by version.
    warnings._filters_mutated()  # type: ignore[attr-defined]
