"""Sums over rows, moments that come in slices, tolerances and probes."""

import pytest
import torch

from unbatch.linalg import rows
from unbatch.linalg.precision import BACKWARD, DOUBLE, FORWARD, SINGLE, in_double, tolerance
from unbatch.linalg.probes import gaussian_like, gaussians_like, random_signs, seeded
from unbatch.linalg.rows import Moments, sum_of


def apart(moments, x):
    """The largest relative error of mean and scatter."""
    scatter = (x - x.mean(0)).abs().square().sum(0)
    off = (moments.mean - x.mean(0)).abs().max() / x.mean(0).abs().max()
    return max(float(off), float((moments.scatter - scatter).abs().max() / scatter.max()))


@pytest.mark.parametrize("sizes", [(7,), (1,) * 7, (3, 4), (1, 5, 1)])
@pytest.mark.parametrize("entries", [3, 2**12])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_moments_of_slices_are_those_of_all_rows(sizes, entries, dtype):
    x = torch.randn(7, entries, generator=seeded(0), dtype=dtype) + 1e3
    moments = Moments()
    for part in x.split(sizes):
        moments.add(part.clone())
    assert apart(moments, x) < 1e-12
    assert torch.allclose(moments.variance, x.var(0))


def test_moments_that_forget_how_many_rows_came_before_are_caught(monkeypatch):
    """A planted bug: slices weigh the same, however many rows they have."""

    class Forgetful(Moments):
        def add(self, part):
            self.count = min(self.count, 1)
            super().add(part)

    x = torch.randn(7, 3, generator=seeded(0), dtype=torch.float64)
    moments = Forgetful()
    for part in x.split((3, 4)):
        moments.add(part)
    assert apart(moments, x) > 1e-3


def test_one_row_has_no_variance():
    moments = Moments()
    moments.add(torch.ones(1, 3))
    assert moments.variance.tolist() == [0, 0, 0]


def test_a_sum_leaves_its_terms_alone():
    first = torch.ones(2)
    assert sum_of([first, first, first]).tolist() == [3, 3]
    assert first.tolist() == [1, 1]
    assert sum_of([first]) is first


def test_rows_in_half_precision_are_summed_in_single():
    assert (
        rows.total_of_squares(torch.full((5000, 1), 0.1, dtype=torch.bfloat16)).dtype
        == torch.float32
    )


def test_the_coarsest_type_decides():
    both = [torch.float64, torch.float32, torch.int64]
    assert tolerance(both, BACKWARD) == SINGLE
    assert tolerance([torch.float64, torch.bool], BACKWARD) == DOUBLE
    assert tolerance([], BACKWARD) == DOUBLE
    assert tolerance([torch.bfloat16, *both], BACKWARD) == 0.3
    assert tolerance([torch.bfloat16, *both], FORWARD) == 5e-2
    assert tolerance([torch.complex64], FORWARD) == 1e-9, "left to the rounding that is measured"


def test_in_double_reaches_into_trees_and_leaves_the_rest():
    index, wide = torch.arange(2), torch.ones(2, dtype=torch.float64)
    tree = in_double(
        {"x": [torch.ones(2), index], "y": (torch.ones(2, dtype=torch.bfloat16), wide, None, 3)}
    )
    assert tree["x"][0].dtype == tree["y"][0].dtype == torch.float64
    assert tree["x"][1] is index
    assert tree["y"][1] is wide
    assert tree["y"][2:] == (None, 3)


def test_probes_are_the_same_in_every_precision_and_follow_the_order():
    """Documented figures rest on these numbers."""
    tensors = {"a": torch.ones(2, 2), "b": torch.ones(3, dtype=torch.float64)}
    drawn = gaussians_like(tensors, seeded(0))
    flat = torch.randn(2, 2, generator=seeded(0), dtype=torch.float64)
    assert torch.equal(drawn["a"], flat.float())
    assert torch.equal(gaussian_like(torch.ones(2, 2), seeded(0)), drawn["a"])
    assert drawn["b"].dtype == torch.float64
    signs = random_signs(6, seeded(3))
    assert torch.equal(signs.view(2, 3), torch.randint(2, (2, 3), generator=seeded(3)) * 2 - 1)
    assert set(random_signs(50, seeded(0)).tolist()) == {-1, 1}
