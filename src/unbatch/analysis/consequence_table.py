"""The table of quantities: which structures each one needs, and what becomes of it without them.

Facts only. Reading, checking and rendering the table stand in ``consequences.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Outcome = Literal["exact", "renamed", "estimate", "none", "unknown"]


World = frozenset[str]


SPLIT, INDEPENDENT, SIMD = "canonical_split", "independent_forward", "simd_forward"


STATISTICS, SUM, LOSS = "simd_given_statistics", "reduction", "simd_loss"


OWN_WEIGHTS = "own_weights"


STRUCTURES = (SPLIT, INDEPENDENT, SIMD, STATISTICS, SUM, LOSS)


FACTS = (*STRUCTURES, OWN_WEIGHTS)


STATUSES = ("holds", "fails", "unknown")


OUTCOMES: Mapping[str, str] = MappingProxyType({
    "exact": "exact",
    "renamed": "exact under another name",
    "estimate": "estimate only",
    "none": "does not exist",
    "unknown": "unknown",
})  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One line of a rule: matches a world in which all of `holds` hold and all of `fails` fail."""

    outcome: Outcome
    reason: str
    name: str = ""
    holds: tuple[str, ...] = ()
    fails: tuple[str, ...] = ()

    def matches(self, world: World) -> bool:
        return world.issuperset(self.holds) and world.isdisjoint(self.fails)


@dataclass(frozen=True)
class Quantity:
    """A quantity, what peers call it, and its cases, of which the first match counts.

    `through_predictions`: its definition sees the parameters through the predictions only, so that it
    leaves something out where they also enter the loss directly. `available`: this release computes it.
    """

    name: str
    cases: tuple[Case, ...]
    peers: tuple[str, ...] = ()
    through_predictions: bool = True
    available: bool = False


@dataclass(frozen=True)
class Consequence:
    """What follows for one quantity. `name` is what the result must be called, empty if there is none.

    `depends_on` is filled when the outcome is `"unknown"`: the fewest facts that would settle it.
    """

    quantity: str
    outcome: Outcome
    name: str
    reason: str
    peers: tuple[str, ...]
    available: bool
    depends_on: tuple[str, ...] = ()


REST = (
    "Parameters also enter the loss directly, so all this is about the part through the predictions; what "
    "it leaves out of ∇L is carried as `rest`."
)


PART = ", of the part through the predictions"


FACTOR = ", up to a batch-dependent factor"


MIXED = "F_n listens to other samples, so nothing belongs to sample n alone; the part through F_n is exact."


COUPLED = "F_n does not enter L through one scalar of its own, by the same function for every n."


SCALED = (
    "L is not a sum of the losses: each part carries the factor ∂L/∂ℓ_n, set by the whole batch."
)


WEIGHED = "The weight w_n depends on the targets or masks of other samples."


NOT_BLOCKS = (
    "The Hessian of L by the predictions is not block diagonal, so G has no parts: candidates do not sum to "
    "it or are not positive semi-definite. "
)


CURVED = (
    "L bends the losses: `H = blockdiag(R'_n H_n) + U R'' Uᵀ`, and the last term belongs to no single "
    "sample. The GGNs of the separate ℓ_n exist but leave it out."
)


BLOCKS = "H is block diagonal, so `G = Σ_n J_nᵀ H_n J_n`."


STACKING = "Below a layer that mixes, every (vector, sample) needs its own column; stacking samples is wrong."


DENSE = "H is not block diagonal: it enters as a product, or is factored as a whole."


LIKELIHOOD = "Unbiased if ℓ is a negative log-likelihood whose Fisher information equals H_n."


SIGNS = "No likelihood factorizes over samples; random signs need only a positive semi-definite H."


def _rows(what: str, exact: str, lost: str = "") -> tuple[Case, ...]:
    """One entry per sample, made from the n-th gradient row; `lost`: what no longer follows without that."""
    component, scaled = f"{what} per component", f"{what} per sample{FACTOR}"
    return (
        Case("exact", exact, holds=(INDEPENDENT, SUM, LOSS, OWN_WEIGHTS)),
        Case("renamed", MIXED + lost, component, fails=(INDEPENDENT,)),
        Case(
            "renamed", f"{COUPLED} The part through F_n is exact.{lost}", component, fails=(LOSS,)
        ),
        Case("renamed", SCALED + lost, scaled, fails=(SUM,)),
        Case("renamed", WEIGHED + lost, scaled, fails=(OWN_WEIGHTS,)),
    )


def _moments(what: str, exact: str) -> tuple[Case, ...]:
    """Not linear in the rows: a statistic over samples only if the rows are made alike and apart."""
    spread = "a spread over the parts of a sum, not over samples; computed with a warning."
    name = f"{what} over components"
    return (
        Case("exact", exact, holds=(SIMD, SUM, LOSS, OWN_WEIGHTS)),
        Case("renamed", f"The forward pass mixes samples: {spread}", name, fails=(INDEPENDENT,)),
        Case("renamed", f"The forward pass treats samples unlike: {spread}", name, fails=(SIMD,)),
        Case("renamed", f"The loss, or its weights, couples the rows: {spread}", name),
    )


def _parts(what: str, kept: Outcome, whole: tuple[Case, ...]) -> tuple[Case, ...]:
    """One entry per sample, made from the n-th part of G; `whole`: what is left when G has no parts."""
    other: Outcome = "estimate" if kept == "estimate" else "renamed"
    note = f" {LIKELIHOOD}" if kept == "estimate" else ""
    component, scaled = f"{what} per component", f"{what} per sample{FACTOR}"
    separate = (SUM, LOSS)
    return (
        Case(kept, BLOCKS + note, holds=(INDEPENDENT, *separate, OWN_WEIGHTS)),
        Case(other, f"{BLOCKS} {MIXED} {STACKING}{note}", component, separate, (INDEPENDENT,)),
        Case(other, f"{BLOCKS} {WEIGHED}{note}", scaled, separate, (OWN_WEIGHTS,)),
        *whole,
    )


NO_PARTS = (
    Case("none", NOT_BLOCKS + COUPLED, fails=(LOSS,)),
    Case("none", CURVED, fails=(SUM,)),
)


NO_DRAWS = (Case("none", "There is no likelihood per sample to draw from; random signs are left."),)


def _joint(name: str) -> tuple[Case, ...]:
    return (
        Case("renamed", f"{DENSE} G still factors, but no column belongs to one sample.", name),
    )


def _whole(what: str) -> tuple[Case, ...]:
    """A function of G itself: it always exists, only the shortcuts go."""
    return (
        Case("exact", f"{what} {BLOCKS}", holds=(INDEPENDENT, SUM, LOSS)),
        Case("exact", f"{what} {BLOCKS} {STACKING}", holds=(SUM, LOSS)),
        Case("exact", f"{what} {DENSE}"),
    )


def _hessian(what: str) -> tuple[Case, ...]:
    """A function of the Hessian of L: double backward gives it, whatever the structure."""
    return (
        Case("exact", what, holds=(INDEPENDENT,)),
        Case(
            "exact",
            f"{what} Recursion through Jacobians per sample is wrong, double backward is not.",
        ),
    )


def _kronecker(kept: Outcome, how: str) -> tuple[Case, ...]:
    """`A ⊗ B` per layer: A from its inputs, B from what is sent back to its outputs, both per sample."""
    lost = (
        "The factors pair what enters a layer for sample n with what F_n sends back to it for sample n. Here "
        "F_n sends something back to every sample: the layer's block of G has cross terms, and what is left "
        "without them depends on how the program is written."
    )
    frozen = (
        " With the statistics frozen the factors are defined, but they approximate the frozen GGN, another "
        "matrix (8.5 times the trace on a small trained net)."
    )
    nearest = " A Kronecker product can still be fitted to the exact block; that is another approximation."
    return (
        Case(
            kept,
            f"An approximation of each layer's block of G, {how}",
            holds=(INDEPENDENT, SUM, LOSS),
        ),
        Case("none", lost + frozen + nearest, holds=(STATISTICS,), fails=(INDEPENDENT,)),
        Case("none", lost + nearest, fails=(INDEPENDENT,)),
        Case("none", f"{NOT_BLOCKS}{COUPLED}", fails=(LOSS,)),
        Case("none", CURVED, fails=(SUM,)),
    )


TABLE: tuple[Quantity, ...] = (
    Quantity("gradient", (
        Case("exact", "Backpropagation needs no structure."),
    ), through_predictions=False, available=True),
    Quantity("losses", (
        Case("exact", "ℓ(F_n, y_n) depends on sample n only.", holds=(INDEPENDENT, LOSS)),
        Case("renamed", "ℓ(F_n, y_n) exists, but F_n listens to the whole batch.", "losses per component",
             holds=(LOSS,)),
        Case("none", COUPLED),
    )),
    Quantity("crosstalk", (
        Case("exact", "F_n listens to x_n only: zero off the diagonal.", holds=(INDEPENDENT,)),
        Case("exact", "Entry (n, m) says how strongly F_n listens to x_m."),
    ), through_predictions=False, available=True),
    Quantity("prediction Jacobian", (Case("exact", "∂F_n/∂θ exists for every differentiable forward pass."),),
             ("laplace jacobians",), through_predictions=False),

    Quantity("per-sample gradients",
             _rows("gradients", "Row n is w_n ∇ℓ_n; it depends on sample n only, and the rows sum to ∇L."),
             ("BackPACK BatchGrad", "Opacus grad_sample", "ASDL batch gradients"), available=True),
    Quantity("component rows", (
        Case("exact", "Row n is `J_nᵀ ∂L/∂F_n`, the gradient w_n ∇ℓ_n of the n-th loss term; the sum is ∇L.",
             holds=(SUM, LOSS)),
        Case("exact", "Row n is `J_nᵀ ∂L/∂F_n`, the part of ∇L through F_n; the sum is ∇L, but it is no "
             "gradient of a term of L."),
    ), available=True),
    Quantity("copy rows", (
        Case("exact", "Without mixing they equal the component rows.", holds=(INDEPENDENT,)),
        Case("exact", "Row m is what sample m's own use of the parameters contributes; the sum is ∇L, but "
             "they depend on how the program is written, not on F alone. BackPACK and ASDL return them under "
             "batch norm. Refused where one operation meets a parameter and sums over the samples at once."),
    ), available=True),
    Quantity("frozen rows", (
        Case("exact", "There is nothing to freeze: they equal the component rows.", holds=(INDEPENDENT,)),
        Case("exact", "Component rows with the batch statistics held constant; they do not sum to ∇L.",
             holds=(STATISTICS,)),
        Case("none", "Samples meet in more than batch statistics of bounded size: nothing to hold."),
    ), available=True),
    Quantity("squared gradient norms",
             _rows("squared norms of gradients", "Entry n is the squared norm of w_n ∇ℓ_n."),
             ("BackPACK BatchL2Grad",), available=True),
    Quantity("Gram matrix of gradients",
             _rows("inner products of gradients", "Entry (n, m) is that of w_n ∇ℓ_n and w_m ∇ℓ_m."), available=True),
    Quantity("sum of squared gradients",
             _rows("sum of squares of gradients", "The squares of all rows, summed entry by entry."),
             ("BackPACK SumGradSquared",), available=True),
    Quantity("gradient histogram",
             _rows("histogram of gradients", "The entries of all rows, counted."), ("Cockpit GradHist1d",),
             available=True),
    Quantity("clipped sum",
             _rows("clipped sum of gradients", "Clipping bounds what one sample contributes.",
                   " Clipping does not bound the influence of a sample: no differential privacy."),
             ("Opacus DPOptimizer",), available=True),
    Quantity("directional slopes", _rows("slopes", "The n-th gradient along an eigenvector of G."),
             ("ViViT DirectionalDerivativesComputation (slopes)",), available=True),

    Quantity("second moment of gradients", _moments("second moment", "The rows are made alike and apart."),
             available=True),
    Quantity("gradient variance", _moments("variance", "The rows are made alike and apart."),
             ("BackPACK Variance",), available=True),
    Quantity("signal-to-noise", _moments("signal-to-noise", "The rows are made alike and apart."), available=True),
    Quantity("gradient noise scale", _moments("noise scale", "The rows are made alike and apart."), available=True),
    Quantity("norm, inner product and orthogonality tests",
             _moments("ratios of the tests", "The rows are made alike and apart."),
             ("Cockpit NormTest", "Cockpit InnerTest", "Cockpit OrthoTest"), available=True),
    Quantity("early stopping criterion", _moments("early stopping criterion", "The rows are made alike and apart."),
             ("Cockpit EarlyStopping",), available=True),
    Quantity("empirical Fisher",
             _moments("outer products of gradients", "Σ_n g_n g_nᵀ; the name asks for a negative "
                      "log-likelihood."),
             ("curvlinops EFLinearOperator", "laplace EFInterface")),

    Quantity("GGN product", _whole("Exists for every twice differentiable loss, and depends on the cut."),
             ("curvlinops GGNLinearOperator",), available=True),
    Quantity("block-diagonal GGN product", _whole("A product with G restricted to one parameter."),
             ("BackPACK GGNMP",), available=True),
    Quantity("GGN diagonal", _whole("The diagonal of G."), ("BackPACK DiagGGNExact",), available=True),
    Quantity("GGN trace", _whole("The trace of G."), available=True),
    Quantity("GGN log-determinant", _whole("Of the damped G, with sign, from a matrix of size N·C."), available=True),
    Quantity("GGN solve", _whole("The damped G inverted through a matrix of size N·C."), available=True),
    Quantity("GGN eigenvalues", _whole("The spectrum of G, from a matrix of size N·C."),
             ("ViViT EigvalshComputation",), available=True),
    Quantity("GGN eigenpairs", _whole("Eigenvectors of G, from a matrix of size N·C."),
             ("ViViT EighComputation",), available=True),
    Quantity("damped Newton step",
             _whole("Mean slopes over damped mean curvatures, along eigenvectors of G; a damping set by "
                    "the noise over samples inherits what holds for the signal-to-noise."),
             ("ViViT DirectionalDampedNewtonComputation",), available=True),
    Quantity("GGN rank bound", (
        Case("exact", f"{BLOCKS} So rank G ≤ min(D, Σ_n rank H_n).", holds=(SUM, LOSS)),
        Case("renamed", "rank G ≤ rank H ≤ N·C, from the shape of H alone.", "rank bound N·C"),
    ), available=True),

    Quantity("GGN factor", _parts("GGN factor", "exact", _joint("joint GGN factor")),
             ("BackPACK SqrtGGNExact",), available=True),
    Quantity("GGN Gram matrix", _parts("GGN Gram matrix", "exact", _joint("joint GGN Gram matrix")), available=True),
    Quantity("per-sample GGN", _parts("GGN", "exact", NO_PARTS), available=True),
    Quantity("per-sample GGN diagonals", _parts("GGN diagonals", "exact", NO_PARTS),
             ("BackPACK BatchDiagGGNExact",), available=True),
    Quantity("directional curvatures", _parts("curvatures", "exact", NO_PARTS),
             ("ViViT DirectionalDerivativesComputation (curvatures)",), available=True),
    Quantity("sampled GGN factor", _parts("sampled GGN factor", "estimate", NO_DRAWS),
             ("BackPACK SqrtGGNMC",), available=True),
    Quantity("sampled per-sample GGN diagonals", _parts("sampled GGN diagonals", "estimate", NO_PARTS),
             ("BackPACK BatchDiagGGNMC",), available=True),
    Quantity("sampled GGN diagonal", (
        Case("estimate", LIKELIHOOD, holds=(SUM, LOSS)),
        Case("estimate", SIGNS, "GGN diagonal by random signs"),
    ), ("BackPACK DiagGGNMC",), available=True),
    Quantity("random-sign GGN factor", (
        Case("estimate", "Unbiased for every positive semi-definite H; one backward pass a draw."),
    )),

    Quantity("KFAC", _kronecker("estimate", "with sampled output gradients."), ("BackPACK KFAC",)),
    Quantity("KFLR", _kronecker("exact", "with the exact factors of H_n; linear and convolution layers."),
             ("BackPACK KFLR",)),
    Quantity("KFRA", _kronecker("exact", "by averaging from layer to layer; needs a plain chain of layers."),
             ("BackPACK KFRA",)),

    Quantity("Hessian product", (Case("exact", "Double backward needs no structure."),),
             ("curvlinops HessianLinearOperator", "PyHessian"), through_predictions=False),
    Quantity("block-diagonal Hessian product", _hessian("The Hessian restricted to one parameter."),
             ("BackPACK HMP",), through_predictions=False),
    Quantity("block-diagonal positive-curvature Hessian product", (
        Case("exact", "Negative curvature that a module adds is removed, sample by sample; the result "
             "depends on how the net is cut into modules.", holds=(INDEPENDENT,)),
        Case("renamed", "What a mixing module adds is one matrix over the whole batch; negative curvature is "
             "removed from that, and BackPACK's recursion, sample by sample, is wrong.",
             "block-diagonal positive-curvature Hessian product, made positive over the whole batch"),
    ), ("BackPACK PCHMP",)),
    Quantity("Hessian diagonal", _hessian("The diagonal of the Hessian of L, by Hessian products."),
             ("BackPACK DiagHessian",), through_predictions=False),
    Quantity("per-sample Hessian diagonals", (
        Case("exact", "The Hessian of L is the sum of those of w_n ℓ_n.",
             holds=(INDEPENDENT, SUM, LOSS, OWN_WEIGHTS)),
        Case("none", COUPLED, fails=(LOSS,)),
        Case("renamed", "The Hessian of ℓ_n exists, but that of L also bends the losses together.",
             "Hessian diagonals of the ℓ_n, not summing to that of L", fails=(SUM,)),
        Case("renamed", f"The Hessian of the n-th term w_n ℓ_n; the sum is that of L. {MIXED}",
             "Hessian diagonals per component", fails=(INDEPENDENT,)),
        Case("renamed", WEIGHED, f"Hessian diagonals per sample{FACTOR}", fails=(OWN_WEIGHTS,)),
    ), ("BackPACK BatchDiagHessian",)),
    Quantity("data-set sum", (
        Case("exact", "Mini-batches add up to the data set, however it is cut, once w_n is rescaled for N.",
             holds=(INDEPENDENT, SUM, LOSS, OWN_WEIGHTS)),
        Case("renamed", "What a sample contributes depends on its mini-batch; the partition is recorded.",
             "data-set sum for this partition"),
    )),
)  # fmt: skip


SITUATIONS: Mapping[str, tuple[str, ...]] = MappingProxyType({
    "everything holds": (),
    "batch norm in train mode": (INDEPENDENT, SIMD),
    "samples mixed arbitrarily": (INDEPENDENT, SIMD, STATISTICS),
    "reduction is not a sum": (SUM,),
    "loss not SIMD": (LOSS, SUM),
    "weights set by other samples": (OWN_WEIGHTS,),
    "parameters in the loss": (SPLIT,),
})  # fmt: skip
