"""PyTorch's table of ops, imported late: it takes ten seconds."""

from __future__ import annotations

import importlib.util
import sys
import types
import unittest
from functools import cache
from typing import Any
from unittest import mock

import torch


@cache
def op_table() -> dict[str, Any]:
    """Return the ops of PyTorch's own tests, by name and variant."""
    # The module imports the base of PyTorch's test cases, of which nothing is used here.
    if importlib.util.find_spec("expecttest") is None:
        stand_in: Any = types.ModuleType("expecttest")
        stand_in.TestCase = unittest.TestCase
        sys.modules["expecttest"] = stand_in
    # The import would forbid everybody in this process to set flags of backends.
    with mock.patch.object(torch.backends, "disable_global_flags"):
        from torch.testing._internal.common_methods_invocations import op_db

    table = {}
    for op in op_db:
        name = op.name
        if op.variant_test_name:
            name = f"{name}.{op.variant_test_name}"
        table[name] = op
    return table
