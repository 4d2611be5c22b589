"""What a question about gradients returns: tensors by parameter, and what they mean."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

SHOWN = 6  # parameters, when a result is printed


class ByParameter(Mapping[str, Tensor]):
    """One tensor for each parameter, in the order of the model.

    ``by`` and ``kind`` say of which rows it was made: "per-sample", "per-component", "per-copy" or
    "frozen"; ``note`` what to keep in mind. In the scale in which each row enters the loss.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], by: str = "component", kind: str = "", note: str = ""
    ) -> None:
        self.tensors = dict(tensors)
        self.by, self.kind, self.note = by, kind, note

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __repr__(self) -> str:
        # Shapes say more than entries, of which there may be millions.
        shapes = [f"{name}: {list(t.shape)}" for name, t in self.items()]
        if len(shapes) > SHOWN:
            shapes = [*shapes[:SHOWN], f"and {len(shapes) - SHOWN} more"]
        inside = ", ".join(shapes)
        return f"{type(self).__name__}({self.kind or self.by}; {inside})"

    def flat(self) -> Tensor:
        """Return all entries as one vector, ``[D]``."""
        return torch.cat([t.reshape(-1) for t in self.values()])


class Rows(ByParameter):
    """The decomposition of a gradient: ``[N, *param]`` for each parameter; row n belongs to sample
    n.

    ``kind`` is "per-sample", "per-component", "per-copy" or "frozen" (defined in
    ``docs/guides/take_gradients.md``). ``weights``: ``w_n`` of ``L = Σ w_n ℓ_n`` where ``ℓ_n`` sums
    over the entries of a sample; None where the loss is no such sum or they could not be read off.
    ``rest``: the part of ``∇L`` that bypasses the predictions of samples, by parameter; empty where
    there is none. ``note`` says what else to keep in mind.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        by: str = "component",
        kind: str = "",
        note: str = "",
        weights: Tensor | None = None,
        rest: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(tensors, by, kind, note)
        self.weights, self.rest = weights, dict(rest or {})

    def flat(self) -> Tensor:
        """Return every row as one vector, ``[N, D]``."""
        return torch.cat([rows.reshape(len(rows), rows[0].numel()) for rows in self.values()], 1)


class SquaredNormsByParameter(ByParameter):
    """``‖row_n‖²`` for each parameter, ``[N]``; ``total`` over all of them."""

    @property
    def total(self) -> Tensor:
        """Return squared norms of the whole rows, ``[N]``."""
        return torch.stack(list(self.values())).sum(0)


class Histograms(ByParameter):
    """Counts of the entries of all rows for each parameter, ``[bins]``; ``edges`` ``[bins + 1]``.

    ``outside``: how many entries of each parameter lie beyond the first or the last edge.
    """

    def __init__(
        self,
        counts: Mapping[str, Tensor],
        by: str,
        kind: str,
        note: str,
        edges: Tensor,
        outside: Mapping[str, int],
    ) -> None:
        super().__init__(counts, by, kind, note)
        self.edges, self.outside = edges, outside
