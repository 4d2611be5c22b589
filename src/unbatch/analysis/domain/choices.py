"""What samples choose of their own by masks of their own: terms in different numbers.

In ``ce(out[mask], y[mask])`` sample n has one term for each word that its mask chooses, so the
samples do not have equally many, and are one function of predictions and mask all the same:

    ℓ(F_n, m_n) = Σ_j g(the j-th chosen of F_n),  j = 1, .., |m_n|

That is proved where two interpretations of the loss agree. By the first, ``ORDERED``, what is
chosen is told apart by j: each sample has all terms up to its own number, and those of two samples
are equal as far as both go. By the second, ``ANONYMOUS``, it is not: all terms are one function,
whichever j they have. (The first alone would let row 7 of the batch be special, if only one sample
has so many; the second alone would let rows of a sample be paired with others of its own.)
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from unbatch.analysis.domain.ownership import Array, code, is_sample, mix, total

ORDERED, ANONYMOUS = "ordered", "anonymous"


@dataclass
class Choices:
    """Choices that samples made of their own, in one interpretation of a loss.

    ``counts``: for each choice, how many elements each sample chose.
    """

    samples: int
    mode: str
    counts: list[Array] = field(default_factory=list)

    def chosen(self, owner: Array, key: Array, mask: Array) -> tuple[Array, Array]:
        """Return owners and keys of what a mask chooses, each element of one sample.

        ``key``: of the elements with what they are chosen by.
        """
        owners = owner[mask]
        self.counts.append(np.bincount(owners, minlength=self.samples))
        keys = np.zeros(owners.shape, dtype=np.uint64)
        for one in np.unique(owners).tolist():
            places = np.flatnonzero(owners == one)
            order = np.arange(len(places), dtype=np.uint64)
            if self.mode == ANONYMOUS:
                order[:] = 0
            keys[places] = mix(mix(total(key[owner == one], 0), code("chosen")), order)
        return owners, keys

    def of_terms(self, owner: Array, key: Array) -> int | None:
        """Return the key of one function of all samples that these terms are; None if they are not.

        ``owner``, ``key``: of the terms that are summed up, along one axis.
        """
        if not is_sample(owner).all() or not self._are_all(owner):
            return None
        terms = [np.unique(key[owner == n]) for n in range(self.samples)]
        longest = max(terms, key=len)
        if self.mode == ANONYMOUS and len(longest) != 1:
            return None
        if self.mode == ORDERED and len(owner) != sum(map(len, terms)):
            return None  # some terms do not tell which of the chosen they are of
        if not all(np.isin(of_sample, longest).all() for of_sample in terms):
            return None
        return int(mix(total(longest, 0), code("terms of a choice")))

    def _are_all(self, owner: Array) -> bool:
        """Tell whether each sample has a term for all that it chose in some choice, no others."""
        terms = np.bincount(owner, minlength=self.samples)
        return any(np.array_equal(terms, chosen) for chosen in self.counts)
