"""The ways to answer a question about G, what each of them takes, and which is taken.

Every way here is exact, or converges to a residual that is stated; an estimate is never put in the
place of one. What a way takes is counted from shapes before anything has run: backward passes
(``pulls``), forward passes of tangents (``pushes``), multiplications of dense linear algebra, and
bytes. The cheapest that fits into the memory budget is taken.

Legend: ``D`` parameter entries; ``M`` columns of the factor V; ``k`` eigenpairs asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from rich.console import Group
from rich.table import Table
from rich.text import Text

from unbatch.curvature.pace import Pace
from unbatch.curvature.sizes import Sizes
from unbatch.curvature.spectrum import is_few
from unbatch.errors import (
    MSG_METHODS,
    MSG_NO_WAY_IN_MEMORY,
    MSG_NO_WAY_IN_TIME,
    BudgetError,
    InputError,
)
from unbatch.rendering import as_text, in_bytes, in_time, table

FLOAT64 = 8  # bytes

# Multiplications of dense linear algebra in float64, in multiples of n³.
EIGH, EIGVALSH, SOLVE = 7.0, 2.0, 0.6

# A multiplication of these in those of the engine, which mostly runs in float32.
DOUBLE = 3.0

# What it takes to keep an entry of a column until all are there, in multiplications of the engine.
STORED = 400

# Products with a formed matrix that find a few eigenpairs of it, and what each takes besides
# n² multiplications.
FORMED_PRODUCTS, OF_PRODUCT = 300, 3e6

# Products with G in a search for k eigenpairs, and in a solve by conjugate gradients: what was seen
# on networks of many kinds. The result says how many it were.
FIRST_PRODUCTS, PRODUCTS_A_PAIR = 22, 4
PRODUCTS_OF_SOLVE = {False: 40, True: 120}  # whether in float64, where the residual is smaller

# Vectors of a basis of Krylov, for k pairs.
BASIS, BASIS_A_PAIR = 20, 2

# Bytes that fit whatever the budget: the smallest matrices are not worth a refusal.
ALWAYS = 2**20

# Of multiplications in all for which nobody gives away an exact answer: some milliseconds.
LITTLE = 1e9

# Of multiplications in all beyond which the time is measured, and held against the budget.
LONG = 1e12


@dataclass(frozen=True)
class Way:
    """``method`` as it is asked for by hand; ``why`` in words.

    ``pulls``, ``pushes``: passes; ``algebra``: multiplications of dense linear algebra; ``bytes``:
    of memory beside the result. ``guessed``: the passes of an iteration, which nobody knows
    beforehand.
    """

    method: str
    why: str
    pulls: float
    pushes: float
    algebra: float
    bytes: int
    guessed: bool = False

    @property
    def passes(self) -> float:
        return self.pulls + self.pushes


@dataclass(frozen=True)
class Counting:
    """Counts what ways take.

    ``has_gram``, ``has_dense``: a matrix is there from before; ``decomposed``: the methods whose
    matrix has been decomposed, too.
    """

    sizes: Sizes
    has_gram: bool = False
    has_dense: bool = False
    decomposed: frozenset[str] = frozenset()

    # -- the small matrices --

    def gram(self, matrices: float) -> Way:
        """Return the way to the Gram matrix; ``matrices``: how many of its size are needed."""
        M = self.sizes.columns
        way = Way("gram", f"the Gram matrix of {M:,} columns", 0, 0, 0, _square(M, matrices))
        if self.has_gram:
            return replace(way, why=way.why + ", which is there")
        dots = (M / 2 + STORED) * M * self.sizes.dots / DOUBLE
        return replace(way, pulls=self.sizes.column_pulls, algebra=dots)

    def dense(self, matrices: float) -> Way:
        """Return the way to G itself, by a product with each unit vector."""
        D = self.sizes.entries
        way = Way("dense", f"the matrix of {D:,} parameters", 0, 0, 0, _square(D, matrices))
        if self.has_dense:
            return replace(way, why=way.why + ", which is there")
        return replace(way, pulls=D, pushes=D)

    # -- the questions --

    def diagonal(self) -> list[Way]:
        """Return the ways to the diagonal and the trace."""
        D, M = self.sizes.entries, self.sizes.columns
        columns = f"{M:,} columns, each pulled back"
        forward = f"{D:,} unit vectors, each pushed forward"
        most = self.sizes.element_size * max(M, D)
        return [
            Way("columns", columns, self.sizes.column_pulls, 0, 0, most),
            Way("forward", forward, 0, D, 0, most),
        ]

    def inner_products(self) -> list[Way]:
        """Return the ways to the Gram matrix itself."""
        D, M = self.sizes.entries, self.sizes.columns
        forward = f"{D:,} unit vectors, each pushed forward"
        # All rows of V are kept until they are multiplied.
        rows = self.sizes.element_size * D * M
        return [
            replace(self.gram(1), method="columns"),
            Way("forward", forward, 0, D, M * M / 2 * D, _square(M, 1) + rows),
        ]

    def eigenvalues(self) -> list[Way]:
        """Return the ways to all eigenvalues, and to determinants."""
        gram, dense = self.gram(2), self.dense(3)
        return [self._eigen(gram, EIGVALSH), self._eigen(dense, EIGH)]

    def eigenpairs(self, k: int | None, vectors: bool = True) -> list[Way]:
        """Return the ways to the k largest eigenpairs, or to all for None.

        ``vectors``: each is wanted on its own, and not only a sum of them.
        """
        # No more eigenvalues than that differ from zero.
        count = self.sizes.smaller
        if k is not None:
            count = min(k, count)
        gram = self._eigen(self.gram(3), EIGH)
        few = k is not None and is_few(k, self.sizes.columns)
        if few and "gram" not in self.decomposed:
            gram = self.gram(2)
            products = FORMED_PRODUCTS * (float(self.sizes.columns) ** 2 + OF_PRODUCT)
            gram = replace(gram, algebra=gram.algebra + products)
        # A sum of eigenvectors is one vector, whatever it is a sum of.
        more = count if vectors else 1
        gram = replace(gram, pulls=gram.pulls + more)
        ways = [gram, self._eigen(self.dense(3), EIGH)]
        if k is not None:
            ways.append(self._lanczos(count, more))
        return ways

    def _eigen(self, way: Way, factor: float) -> Way:
        """Return a way with a decomposition of its matrix."""
        if way.method in self.decomposed:
            return way
        size = self.sizes.entries if way.method == "dense" else self.sizes.columns
        return _with(way, factor, size)

    def _lanczos(self, k: int, vectors: int) -> Way:
        products = FIRST_PRODUCTS + PRODUCTS_A_PAIR * k
        basis = BASIS + BASIS_A_PAIR * k
        return Way(
            "lanczos",
            f"products with G, some {products} of them",
            products + vectors,
            products,
            4 * self.sizes.smaller * min(basis, products) * products,
            FLOAT64 * basis * self.sizes.smaller,
            guessed=True,
        )

    def newton_step(self, k: int | None, double: bool) -> list[Way]:
        """Return the ways to a step along k eigenvectors, or along all that are not zero."""
        ways = self.eigenpairs(k, vectors=False)
        if k is None:
            ways.append(self._cg(1, double))
        return ways

    def solution(self, columns: int, double: bool) -> list[Way]:
        """Return the ways to solve for so many right-hand sides."""
        gram = replace(_with(self.gram(2), SOLVE, self.sizes.columns), method="woodbury")
        # Each is solved twice: a product with V and its transpose, and one with G.
        gram = replace(gram, pulls=gram.pulls + 4 * columns, pushes=gram.pushes + 4 * columns)
        # Of G itself, which has all: a product for each time.
        dense = _with(self.dense(2), SOLVE, self.sizes.entries)
        dense = replace(dense, pulls=dense.pulls + 2 * columns, pushes=dense.pushes + 2 * columns)
        return [gram, dense, self._cg(columns, double)]

    def _cg(self, columns: int, double: bool) -> Way:
        products = PRODUCTS_OF_SOLVE[double] * columns
        why = f"conjugate gradients, some {products} products with G"
        return Way(
            "cg",
            why,
            products,
            products,
            0,
            4 * self.sizes.element_size * self.sizes.entries,
            guessed=True,
        )


def _square(n: int, matrices: float) -> int:
    return int(FLOAT64 * matrices * n * n)


def _with(way: Way, factor: float, n: int) -> Way:
    """Return a way with ``factor·n³`` multiplications more."""
    return replace(way, algebra=way.algebra + factor * float(n) ** 3)


# --- choosing -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ways:
    """All ways to answer a question, and the one that is taken; printable.

    ``question``: as it is called. ``memory``: the budget in bytes; ``seconds``: that of the time.
    ``estimates``: calls that estimate the same, in words. ``measured``: passes as they were timed,
    None where nothing has run for it.
    """

    question: str
    ways: Sequence[Way]
    sizes: Sizes
    memory: int
    seconds: float
    estimates: str
    measured: Pace | None = None

    def multiplications(self, way: Way) -> float:
        """Return what a way takes, in multiplications of the engine."""
        return way.passes * self.sizes.of_pass + DOUBLE * way.algebra

    @property
    def in_memory(self) -> list[Way]:
        """Return the ways that fit into the memory budget, the cheapest first."""
        fitting = [way for way in self.ways if self._fits(way)]
        return sorted(fitting, key=self._price)

    def _price(self, way: Way) -> float:
        """Return what ways are compared by: one that iterates has to save some milliseconds."""
        return self.multiplications(way) + (LITTLE if way.guessed else 0.0)

    def _fits(self, way: Way) -> bool:
        return way.bytes <= max(self.memory, ALWAYS)

    @property
    def taken(self) -> Way:
        """Return the cheapest. Raises ``BudgetError`` where none fits into the memory budget."""
        fitting = self.in_memory
        # The message has what each of them needs: one may be worth the memory.
        if not fitting:
            needs = [f"{way.why} {in_bytes(way.bytes)}" for way in self.ways]
            raise BudgetError(
                MSG_NO_WAY_IN_MEMORY.format(
                    question=self.question,
                    needs=", ".join(needs),
                    budget=in_bytes(self.memory),
                    estimates=self.estimates,
                )
            )
        return fitting[0]

    def by_hand(self, method: str | None) -> Ways:
        """Return only the way that is asked for. Raises ``InputError`` for one that is not here."""
        if method is None:
            return self
        chosen = [way for way in self.ways if way.method == method]
        if not chosen:
            known = ", ".join(repr(way.method) for way in self.ways)
            raise InputError(MSG_METHODS.format(question=self.question, known=known, value=method))
        return replace(self, ways=chosen)

    def without(self, method: str) -> Ways:
        """Return all ways but one."""
        return replace(self, ways=[way for way in self.ways if way.method != method])

    def within_time(self, pace: Callable[[], Pace]) -> Way:
        """Return the way that is taken, after its time was held against the budget.

        ``pace``: measures passes, which is done only where many are counted. Raises
        ``BudgetError``.
        """
        way = self.taken
        # What is done in seconds by any count is not timed before; what an iteration takes is a
        # guess, and it says how far it came.
        if way.guessed or self.multiplications(way) < LONG:
            return way
        timed = replace(self, measured=pace())
        seconds = timed.seconds_of(way)
        if seconds <= self.seconds:
            return way
        raise BudgetError(
            MSG_NO_WAY_IN_TIME.format(
                question=self.question,
                why=way.why,
                passes=round(way.passes),
                time=in_time(seconds),
                one=in_time(timed.pace.push),
                budget=in_time(self.seconds),
                estimates=self.estimates,
            )
        )

    @property
    def pace(self) -> Pace:
        """Return the passes as they were measured; a guess from counts where none was."""
        return self.measured or Pace.counted(self.sizes.of_pass, DOUBLE)

    def seconds_of(self, way: Way) -> float:
        """Return how long a way takes, in seconds."""
        return self.pace.seconds(way.pulls, way.pushes, way.algebra)

    def __rich__(self) -> Group:
        taken = self.taken if self.in_memory else None
        lines: list[Text | Table] = [Text(self._headline(taken))]
        rows = []
        for way in self.ways:
            rows.append(self._row(way, way is taken))
        lines.append(table(["", "method", "passes", "time", "memory", "by way of"], rows))
        if self.estimates:
            lines.append(Text(f"Estimates, with standard errors: {self.estimates}."))
        return Group(*lines)

    def _headline(self, taken: Way | None) -> str:
        budget = f"budget {in_bytes(self.memory)}, {in_time(self.seconds)}"
        if taken is None:
            return f"{self.question}: no exact way fits ({budget})."
        return f"{self.question}: by {taken.why}, the cheapest that fits ({budget})."

    def _row(self, way: Way, is_taken: bool) -> list[str]:
        mark = "→" if is_taken else ""
        passes = f"{way.passes:,.0f}"
        if way.guessed:
            passes = f"some {passes}"
        memory = in_bytes(way.bytes)
        if not self._fits(way):
            memory += " (too much)"
        return [mark, way.method, passes, in_time(self.seconds_of(way)), memory, way.why]

    def __str__(self) -> str:
        return as_text(self.__rich__())
