"""The structure of a case, and the checkers that hold it against the truth."""

from collections.abc import Callable

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

import unbatch as ub
from cases.losses import LossCase
from cases.models import ModelCase
from unbatch import Structure

FORWARD = ("independent_forward", "simd_forward", "simd_given_statistics")


LOSS = ("reduction", "simd_loss")


class Identity(nn.Module):
    """Predictions that are the inputs: leaves only the loss to judge."""

    def forward(self, *x):
        return tree_map(lambda t: t * 1, x if len(x) > 1 else x[0])


def nothing(predictions, targets=None):
    """A loss that reads every prediction."""
    return 0 * sum(t.sum() for t in tree_leaves(predictions) if isinstance(t, torch.Tensor))


def structure_of_model(case: ModelCase) -> Structure:
    model, inputs = case.build()
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    if isinstance(model, nn.Module):
        return ub.Problem(model, nothing, (inputs, None), in_dims=(case.in_dims, None)).structure
    called = lambda parameters, x: model(*x)  # noqa: E731
    return ub.Problem(
        called, nothing, (inputs, None), in_dims=(case.in_dims, None), parameters={}
    ).structure


def structure_of_loss(loss: Callable, inputs: tuple) -> Structure:
    predictions, targets = inputs
    samples = tree_leaves(predictions)[0].shape[0]
    dims = tree_map(lambda t: 0 if t.shape[:1] == (samples,) else None, targets)
    return ub.Problem(Identity(), loss, (predictions, targets), in_dims=(0, dims)).structure


def structure_of(case: ModelCase | LossCase) -> Structure:
    torch.manual_seed(0)
    if isinstance(case, ModelCase):
        return structure_of_model(case)
    return structure_of_loss(case.loss, case.inputs())


def truth_of(case: ModelCase | LossCase) -> dict[str, str]:
    if isinstance(case, ModelCase):
        return dict(zip(FORWARD, (case.independent, case.simd, case.given), strict=True))
    return dict(zip(LOSS, (case.reduction, case.simd_loss), strict=True))


def check(structure: Structure, truth: dict[str, str], accept_unknown: bool) -> None:
    """Raise where a verdict is neither the truth nor an "unknown" that is allowed."""
    for name, status in truth.items():
        verdict = getattr(structure, name)
        if verdict.status == "unknown":
            assert accept_unknown, f"{name} is unknown: {verdict.culprits} {verdict.note}"
            assert not verdict.basis, f"{name} is unknown, with the basis {verdict.basis!r}"
        else:
            assert verdict.status == status, (
                f"{name} {verdict.status}, in truth it {status}: {verdict}"
            )
            assert verdict.basis in {"proved", "witness", "assumed"}, verdict
            assert (verdict.status, verdict.basis) != ("holds", "witness"), (
                f"a witness proves no {name}"
            )
    decided = {name: getattr(structure, name).status for name in FORWARD}
    assert (decided["simd_forward"] == "holds") <= (decided["independent_forward"] == "holds"), (
        decided
    )
    assert (decided["simd_forward"] == "holds") <= (decided["simd_given_statistics"] == "holds"), (
        decided
    )


def check_weights(structure: Structure, on_targets: bool | None) -> None:
    """Raise where it is wrong whether the weights listen to the targets of other samples."""
    if structure.reduction and on_targets is not None:
        said = structure.reduction.weights_depend_on
        assert ("targets" in said) == on_targets, (
            f"weights depend on {set(said)}, on targets: {on_targets}"
        )
