"""Vocabularies: the second derivative of a softmax is known by what it does, and never formed."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import unbatch as ub
from unbatch import errors
from unbatch.curvature.hessian_root import Grid, SoftmaxRoot

WORDS = 50_257


class Words(nn.Module):
    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.words, self.out = nn.Embedding(words, width), nn.Linear(width, words, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.words(x).tanh())


def of_tokens(outputs: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, 1), y.flatten())


def problem_of(words: int, width: int, dtype: torch.dtype = torch.float32) -> ub.Problem:
    torch.manual_seed(0)
    X = torch.randint(words, (2, 6))
    return ub.Problem(Words(words, width).to(dtype), of_tokens, (X, X.roll(-1, 1)))


def root(c: int = 5) -> SoftmaxRoot:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 2, c, generator=generator, dtype=torch.float64)
    Q = torch.tensor([[1.0, 2.0], [0.5, -1.5], [0.0, 3.0]], dtype=torch.float64)
    grid = Grid({0: (3, c, 2)}, {0: 0}, 1)
    return SoftmaxRoot(grid, logits.softmax(-1).sqrt(), Q)


def formed(of: SoftmaxRoot) -> tuple[Tensor, Tensor]:
    """Return S, ``[n, t, c, k]``, from products with unit vectors, and H by its definition."""
    n, t, c, k = of.shape
    units = torch.eye(of.size, dtype=torch.float64)
    columns = torch.stack([of.grid.split(of.times(unit)) for unit in units], -1)
    S = torch.zeros(n, t, c, k, dtype=torch.float64)
    for i in range(n):
        for j in range(t):
            S[i, j] = columns[i, j].unflatten(-1, (n, t, k))[:, i, j]
    p = of.u.square()
    H = of.Q[..., None, None] * (torch.diag_embed(p) - p[..., :, None] * p[..., None, :])
    return S, H


def test_the_root_is_one_of_the_second_derivative():
    S, H = formed(root())
    signs = root().signs
    assert torch.allclose(torch.einsum("ntck,ntk,ntdk->ntcd", S, signs, S), H)


def test_columns_and_transposed_products_are_those_of_the_root():
    of = root()
    S, _ = formed(of)
    for j in range(of.columns):
        t, k = divmod(j, of.shape[3])
        column = of.grid.split(of.column(j))
        assert torch.allclose(column[:, t], S[:, t, :, k])
        assert not column[:, 1 - t].any()
    v = torch.randn(3, 5, 2, dtype=torch.float64)
    expected = torch.einsum("ntck,ntc->ntk", S, of.grid.split({0: v}))
    assert torch.allclose(of.transposed_times({0: v}), expected.flatten())


def test_the_symmetric_root_has_a_column_for_each_entry():
    of = root()
    S, H = formed(of)
    whole = torch.einsum("ntck,ntdk->ntcd", S, of.to_entries)
    squared = torch.einsum("ntck,ntdk->ntcd", whole, whole)
    assert torch.allclose(squared * of.Q.sign()[..., None, None], H)


def test_rank_and_lowest_eigenvalue():
    of = root()
    _, H = formed(of)
    assert of.rank == 5 * 4  # one position has no weight
    assert of.lowest == pytest.approx(float(torch.linalg.eigvalsh(H).min()))


def test_some_samples_are_those_of_the_root():
    of = root()
    S, _ = formed(of)
    some, _ = formed(of.restricted(torch.tensor([1]), 4.0))
    assert torch.allclose(some[1], 2 * S[1])
    assert not some[[0, 2]].any()


def test_drawn_columns_are_gradients_of_the_likelihood():
    problem = problem_of(9, 3, torch.float64)
    exact = problem.ggn().to_dense()
    drawn = problem.ggn(mc_samples=4000).to_dense()
    assert (drawn - exact).norm() < 0.1 * exact.norm()


def test_a_vocabulary_takes_no_square_of_its_size():
    problem = problem_of(WORDS, 4)
    drawn = problem.compute(ub.DiagGGN(mc_samples=1))
    assert all(d.isfinite().all() for d in drawn.values())
    G = problem.ggn()
    largest = G.eigh(1)
    v = largest.vectors[:, 0]
    residual = G @ v - largest.values * v
    assert residual.norm() < 1e-2 * largest.values
    estimate = G.estimate_diag(2)
    assert estimate.values.isfinite().all()
    with pytest.raises(errors.BudgetError, match=r"(minutes|hours) .*G\.estimate_diag"):
        problem.ggn(seconds=5).diag()
