"""The cases that lie beside the checkout, in the folder `shared`, where there is one."""

import importlib.util
from pathlib import Path

import pytest
import torch

import unbatch as ub
from cases.verdicts import LOSS, check, check_weights, nothing, structure_of_loss

PATH = Path(__file__).resolve().parents[3] / "shared" / "cases" / "structure_cases.py"

if not PATH.exists():
    pytest.skip(f"no {PATH}", allow_module_level=True)


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CASES = load(PATH)


@pytest.mark.parametrize(
    ("name", "build", "truth"), CASES.MODELS, ids=[case[0] for case in CASES.MODELS]
)
def test_model(name, build, truth):
    model, inputs = build()
    structure = ub.Problem(model, nothing, (inputs, None), in_dims=(0, None)).structure
    verdicts = {k: v for k, v in truth.items() if k != "accept_unknown"}
    check(structure, verdicts, truth["accept_unknown"])


@pytest.mark.parametrize(
    ("name", "loss", "make", "truth"), CASES.LOSSES, ids=[case[0] for case in CASES.LOSSES]
)
def test_loss(name, loss, make, truth):
    structure = structure_of_loss(loss, tuple(m() for m in make))
    check(structure, {k: truth[k] for k in LOSS}, accept_unknown=False)
    check_weights(structure, truth["weights_depend_on_targets"])


def test_module_hides_no_seed():
    """Loading the cases draws no random numbers, so their order does not matter."""
    before = torch.get_rng_state()
    load(PATH)
    assert torch.equal(before, torch.get_rng_state())
