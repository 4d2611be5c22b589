"""The tables of models and losses on batches of other sizes, after one that was judged.

A verdict that is taken over from one size to another is what a problem of that size alone has.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import unbatch as ub
from cases.losses import LOSSES
from cases.models import MODELS
from cases.verdicts import Identity, nothing

SIZES = (9, 4, 1)

OF_MODULES = [case for case in MODELS if isinstance(case.build()[0], nn.Module)]


def resized(tree: Any, dims: Any, samples: int) -> Any:
    """Data with so many samples, like those that are there."""

    def leaf(x: Any, dim: int | None) -> Any:
        if dim is None or not isinstance(x, Tensor):
            return x
        return x.index_select(dim, torch.arange(samples) % x.shape[dim])

    if isinstance(dims, int) or dims is None:
        return tree_map(lambda x: leaf(x, dims), tree)
    return type(tree)(leaf(x, dim) for x, dim in zip(tree, dims, strict=True))


def statuses(problem: ub.Problem) -> dict[str, str] | None:
    try:
        return {verdict.name: verdict.status for verdict in problem.structure.verdicts}
    except ub.UnbatchError:
        return None  # the size is written into the program


def check(problem: ub.Problem, inputs: Any, targets: Any, dims: Any) -> None:
    """Raise where a batch of another size has another verdict than it has alone."""
    first = statuses(problem)
    if first is None:
        return
    known = {name: {status, "unknown"} for name, status in first.items()}
    for samples in SIZES:
        data = resized(inputs, dims[0], samples), resized(targets, dims[1], samples)
        with torch.random.fork_rng():
            mine = statuses(problem.with_batch(*data))
        alone = statuses(
            ub.Problem(problem.program.model, problem.program.loss, data, in_dims=dims)
        )
        if samples > 1:
            # A counterexample may be found in numbers of one size, and not in those of another.
            if mine is None or alone is None:
                assert mine is alone
                continue
            for name, status in mine.items():
                assert status == alone[name] or "holds" not in (status, alone[name]), samples
                known[name].add(status)
        elif mine is not None and alone is not None:
            # It has what is known of more, of any size, or of itself alone.
            for name, status in mine.items():
                assert status in known[name] | {alone[name]} or first[name] == "unknown"


@pytest.mark.parametrize("case", OF_MODULES, ids=lambda case: case.name)
def test_models(case):
    torch.manual_seed(0)
    model, inputs = case.build()
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    dims = case.in_dims, None
    check(ub.Problem(model, nothing, (inputs, None), in_dims=dims), inputs, None, dims)


@pytest.mark.parametrize("case", LOSSES, ids=lambda case: case.name)
def test_losses(case):
    torch.manual_seed(0)
    inputs, targets = case.inputs()
    samples = tree_leaves(inputs)[0].shape[0]
    of_targets: Any = None
    if isinstance(targets, Tensor) and targets.shape[:1] == (samples,):
        of_targets = 0
    dims = 0, of_targets
    problem = ub.Problem(Identity(), case.loss, (inputs, targets), in_dims=dims)
    check(problem, inputs, targets, dims)
