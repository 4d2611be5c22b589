"""Reasons, and the rules that several quantities of the table of consequences share.

A rule is a tuple of cases, of which the first that matches counts. The quantities that follow each
rule stand in ``consequence_table.py``.
"""

from __future__ import annotations

from unbatch.analysis.consequence_facts import (
    FACTOR,
    INDEPENDENT,
    OWN_WEIGHTS,
    REDUCTION,
    SIMD_FORWARD,
    SIMD_LOSS,
    STATISTICS,
    Case,
    Outcome,
)

# --- reasons --------------------------------------------------------------------------------------

REST = (
    "Parameters also enter the loss directly, so all this is about the part through the "
    "predictions; what it leaves out of ∇L is carried as `rest`."
)


MIXED = (
    "F_n depends on other samples, so nothing belongs to sample n alone; the part through F_n is "
    "exact."
)


COUPLED = (
    "L is no sum over samples, and F_n does not enter it through one scalar of its own, by the "
    "same function for every n."
)


SCALED = (
    "L is not a sum of the losses: each part carries the factor ∂L/∂ℓ_n, set by the whole batch."
)


WEIGHED = "The weight w_n depends on the targets or masks of other samples."


NOT_BLOCKS = (
    "The Hessian of L by the predictions is not block diagonal, so G has no parts: candidates do "
    "not sum to it or are not positive semi-definite. "
)


CURVED = (
    "L is not linear in the losses: `H = blockdiag(R'_n H_n) + U R'' Uᵀ`, and the last term "
    "belongs to no single sample. The GGNs of the separate ℓ_n exist but leave it out."
)


OWN_TERMS = (
    "L is a sum with one term for each sample, but not one function of all: labels or weights go "
    "by the place in the batch."
)


FOREIGN = "The n-th term of L, or its weight, depends on targets or masks of other samples."


BLOCKS = "H is block diagonal, so `G = Σ_n J_nᵀ H_n J_n`."


STACKING = (
    "Below a layer that mixes, every (vector, sample) needs its own column; stacking samples is "
    "wrong."
)


DENSE = "H is not block diagonal: it enters as a product, or is factored as a whole."


LIKELIHOOD = "Unbiased if ℓ is a negative log-likelihood whose Fisher information equals H_n."


SIGNS = "No likelihood factorizes over samples; random signs need only a positive semi-definite H."


# --- rules ----------------------------------------------------------------------------------------


def rows(what: str, exact: str, lost: str = "") -> tuple[Case, ...]:
    """Return the cases of a quantity with one entry per sample, made from the n-th gradient row.

    `lost`: what no longer follows where the row is no gradient of one sample.
    """
    # From the worst fault to the mildest. Where samples mix, the row is no gradient of a sample at
    # all, whatever the loss does; where only the weight is set by others, it is one up to a
    # factor.
    component, scaled = f"{what} per component", f"{what} per sample{FACTOR}"
    return (
        Case("exact", exact, holds=(INDEPENDENT, REDUCTION, OWN_WEIGHTS)),
        Case("renamed", MIXED + lost, component, fails=(INDEPENDENT,)),
        Case(
            "renamed",
            f"{COUPLED} The part through F_n is exact.{lost}",
            component,
            fails=(SIMD_LOSS, REDUCTION),
        ),
        Case("renamed", SCALED + lost, scaled, fails=(REDUCTION,)),
        Case("renamed", FOREIGN + lost, component, fails=(SIMD_LOSS,)),
        Case("renamed", WEIGHED + lost, scaled, fails=(OWN_WEIGHTS,)),
    )


def moments(what: str, exact: str) -> tuple[Case, ...]:
    """Return the cases of a quantity that is not linear in the rows.

    It is a statistic over samples only if the rows are made alike and apart.
    """
    # No case has the reduction alone: as for the weights, one name serves for all that couples
    # rows.
    spread = "a spread over the parts of a sum, not over samples; computed with a warning."
    name = f"{what} over components"
    return (
        Case("exact", exact, holds=(SIMD_FORWARD, REDUCTION, SIMD_LOSS, OWN_WEIGHTS)),
        Case("renamed", f"The forward pass mixes samples: {spread}", name, fails=(INDEPENDENT,)),
        Case(
            "renamed",
            f"The forward pass treats samples unlike: {spread}",
            name,
            fails=(SIMD_FORWARD,),
        ),
        Case("renamed", f"{OWN_TERMS} So it is {spread}", name, (REDUCTION, OWN_WEIGHTS)),
        Case("renamed", f"The loss, or its weights, couples the rows: {spread}", name),
    )


def parts(what: str, kept: Outcome, whole: tuple[Case, ...]) -> tuple[Case, ...]:
    """Return the cases of a quantity with one entry per sample, made from the n-th part of G.

    `kept`: the outcome where it exists. `whole`: what is left where G has no parts.
    """
    # Estimates stay estimates under another name: "renamed" promises an exact number.
    other: Outcome = "estimate" if kept == "estimate" else "renamed"
    note = f" {LIKELIHOOD}" if kept == "estimate" else ""
    component, scaled = f"{what} per component", f"{what} per sample{FACTOR}"
    separate = (REDUCTION,)
    return (
        Case(kept, BLOCKS + note, holds=(INDEPENDENT, REDUCTION, OWN_WEIGHTS)),
        Case(other, f"{BLOCKS} {MIXED} {STACKING}{note}", component, separate, (INDEPENDENT,)),
        Case(other, f"{BLOCKS} {FOREIGN}{note}", component, separate, (SIMD_LOSS,)),
        Case(other, f"{BLOCKS} {WEIGHED}{note}", scaled, separate, (OWN_WEIGHTS,)),
        *whole,
    )


NO_PARTS = (
    Case("none", NOT_BLOCKS + COUPLED, fails=(SIMD_LOSS, REDUCTION)),
    Case("none", CURVED, fails=(REDUCTION,)),
)


NO_DRAWS = (Case("none", "There is no likelihood per sample to draw from; random signs are left."),)


def joint(name: str) -> tuple[Case, ...]:
    """Return what is left of a factor of G where G has no parts: one of the whole, under `name`."""
    return (
        Case("renamed", f"{DENSE} G still factors, but no column belongs to one sample.", name),
    )


def whole(what: str) -> tuple[Case, ...]:
    """Return the cases of a function of G itself: it always exists, only the shortcuts go."""
    # Three ways to compute one number: with stacked samples, in blocks without stacking, and with
    # H as a whole.
    return (
        Case("exact", f"{what} {BLOCKS}", holds=(INDEPENDENT, REDUCTION)),
        Case("exact", f"{what} {BLOCKS} {STACKING}", holds=(REDUCTION,)),
        Case("exact", f"{what} {DENSE}"),
    )


def hessian(what: str) -> tuple[Case, ...]:
    """Return the cases of a function of the Hessian of L.

    Double backward gives it, whatever the structure.
    """
    return (
        Case("exact", what, holds=(INDEPENDENT,)),
        Case(
            "exact",
            f"{what} Recursion through Jacobians per sample is wrong, double backward is not.",
        ),
    )


def kronecker(kept: Outcome, how: str) -> tuple[Case, ...]:
    """Return the cases of an approximation of G by `A ⊗ B` for each layer.

    A is made of its inputs, B of the cotangents of its outputs, both per sample. `kept`: the
    outcome where it exists; `how`: the way in which B is made.
    """
    lost = (
        "The factors pair what enters a layer for sample n with what F_n sends back to it for "
        "sample n. Here F_n sends something back to every sample: the layer's block of G has "
        "cross terms, and what is left without them depends on how the program is written."
    )
    frozen = (
        " With the statistics frozen the factors are defined, but they approximate the frozen GGN, "
        "another matrix (8.5 times the trace on a small trained net)."
    )
    nearest = (
        " A Kronecker product can still be fitted to the exact block; that is another "
        "approximation."
    )
    # The frozen statistics are named only where they exist, before the general case.
    return (
        Case(
            kept,
            f"An approximation of each layer's block of G, {how}",
            holds=(INDEPENDENT, REDUCTION),
        ),
        Case("none", lost + frozen + nearest, holds=(STATISTICS,), fails=(INDEPENDENT,)),
        Case("none", lost + nearest, fails=(INDEPENDENT,)),
        Case("none", f"{NOT_BLOCKS}{COUPLED}", fails=(SIMD_LOSS, REDUCTION)),
        Case("none", CURVED, fails=(REDUCTION,)),
    )
