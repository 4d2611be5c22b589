"""What a numerical test returns when it refutes a verdict."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Counterexample:
    """Something that changed although the verdict says that it does not.

    ``amount``: by how much, relative to its size. ``moved`` is the sample whose prediction changed
    and ``moved_by`` the sample that was replaced, each -1 where the test is not about one sample.
    ``together``: the samples that were replaced, where none of them alone moves the prediction.
    """

    test: str
    amount: float
    moved: int = -1
    moved_by: int = -1
    together: tuple[int, ...] = ()

    def __str__(self) -> str:
        if self.moved >= 0:
            return (
                f"replacing {self._replaced()} moved prediction {self.moved} "
                f"by {self.amount:.2g} of its size"
            )
        if self.test.startswith("rank"):
            # A rank is a count, and its test already says it.
            return self.test
        return f"{self.test}: off by {self.amount:.2g} relative"

    def _replaced(self) -> str:
        """Return in words which samples were replaced."""
        if not self.together:
            return f"sample {self.moved_by}"
        *others, last = map(str, self.together)
        return f"samples {', '.join(others)} and {last} together"
