"""When two tensors are the same but for rounding."""

from torch import Tensor

EXACT = 1e-9


def near(found: Tensor, expected: Tensor, what: str, floor: float = 0.0) -> None:
    """Raise where two tensors differ by more than rounding."""
    assert found.shape == expected.shape, (
        f"{what}: {tuple(found.shape)} where {tuple(expected.shape)} is expected"
    )
    size = float(expected.abs().max()) if expected.numel() else 0.0
    error = float((found - expected).abs().max()) if expected.numel() else 0.0
    assert error <= EXACT * size + floor, (
        f"{what}: off by {error:.1e}, the largest entry is {size:.1e}"
    )
