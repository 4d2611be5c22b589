"""SciPy's solvers take our operators and find what the definition of the matrix has."""

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import unbatch as ub
from unbatch.linalg.operators import Dense, Diagonal
from unbatch.reference import definitions as reference

linalg = pytest.importorskip("scipy.sparse.linalg")

N, K = 6, 3


def setting(dtype=torch.float64):
    """A net with batch norm in train mode, its matrix, and that of the definition."""
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)
    X, y = torch.randn(N, 5, dtype=dtype), torch.randint(3, (N,))
    return ub.Problem(model, F.cross_entropy, (X, y)).ggn(), reference.ggn(
        model, F.cross_entropy, X, y
    ).numpy()


def assert_near(found, wanted, tolerance=1e-9):
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype
    assert numpy.linalg.norm(found - wanted) <= tolerance * numpy.linalg.norm(wanted)


def start(size, dtype="float64"):
    return numpy.random.default_rng(0).standard_normal(size).astype(dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_eigsh_finds_the_largest_eigenpairs(dtype, tolerance):
    G, truth = setting(dtype)
    operator = G.to_scipy()
    assert operator.dtype == truth.dtype
    values, vectors = linalg.eigsh(operator, k=K, v0=start(len(truth), truth.dtype))
    assert_near(values, numpy.linalg.eigvalsh(truth)[-K:], tolerance)
    assert_near(truth @ vectors, vectors * values, 10 * tolerance)
    assert_near(values, G.eigvalsh()[-K:].numpy(), tolerance)


def test_eigsh_takes_a_composed_operator():
    """Damped, so that the smallest eigenvalue is the damping: found from the other end."""
    G, truth = setting()
    damped = G + Diagonal(torch.full((len(truth),), 0.3, dtype=torch.float64), G.space)
    (value,) = linalg.eigsh(
        damped.to_scipy(), k=1, which="SA", v0=start(len(truth)), return_eigenvectors=False
    )
    assert value == pytest.approx(0.3)
    solution, status = linalg.cg(damped.to_scipy(), start(len(truth)), rtol=1e-12)
    assert status == 0
    assert_near(
        solution, numpy.linalg.solve(truth + 0.3 * numpy.eye(len(truth)), start(len(truth)))
    )


def test_vectors_matrices_and_adjoints():
    M = torch.randn(4, 7, dtype=torch.float64)
    A = Dense(M).to_scipy()
    for shape in ((7,), (7, 1), (7, 3)):
        v = start(shape)
        assert_near(A @ v, M.numpy() @ v)
    u = start((4, 2))
    assert_near(A.H @ u, M.T.numpy() @ u)
    assert_near(A.rmatvec(u[:, 0]), M.T.numpy() @ u[:, 0])
    largest = numpy.linalg.svd(M.numpy())[1]
    assert_near(linalg.svds(A, k=2, v0=start(4), return_singular_vectors=False), largest[1::-1])


def test_a_planted_scale_is_caught():
    G, truth = setting()
    values = linalg.eigsh(
        (2.0 * G).to_scipy(), k=K, v0=start(len(truth)), return_eigenvectors=False
    )
    with pytest.raises(AssertionError):
        assert_near(values, numpy.linalg.eigvalsh(truth)[-K:])
