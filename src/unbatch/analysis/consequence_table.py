"""The table of consequences: what becomes of each quantity in which world.

Data only. The reasons and rules that several quantities share stand in ``consequence_rules.py``,
and reading, checking and rendering the table in ``consequences.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from unbatch.analysis.consequence_facts import (
    FACTOR,
    INDEPENDENT,
    OWN_WEIGHTS,
    REDUCTION,
    SIMD_FORWARD,
    SIMD_LOSS,
    SPLIT,
    STATISTICS,
    Case,
    Quantity,
)
from unbatch.analysis.consequence_rules import (
    BLOCKS,
    COUPLED,
    FOREIGN,
    LIKELIHOOD,
    MIXED,
    NO_DRAWS,
    NO_PARTS,
    OWN_TERMS,
    SIGNS,
    WEIGHED,
    hessian,
    joint,
    kronecker,
    moments,
    parts,
    rows,
    whole,
)

# The outcomes of a case, in words.
OUTCOMES: Mapping[str, str] = MappingProxyType(
    {
        "exact": "exact",
        "renamed": "exact under another name",
        "estimate": "estimate only",
        "none": "does not exist",
        "unknown": "unknown",
    }
)


TABLE: tuple[Quantity, ...] = (
    # --- sums that need no structure, and what the forward pass alone decides ---------------------
    Quantity(
        "gradient",
        (Case("exact", "Backpropagation needs no structure."),),
        through_predictions=False,
        available=True,
    ),
    # ℓ_n exists where L is a function of one scalar per sample, and where it is a sum.
    Quantity(
        "losses",
        (
            Case("exact", "ℓ(F_n, y_n) depends on sample n only.", holds=(INDEPENDENT, SIMD_LOSS)),
            Case(
                "renamed",
                "ℓ(F_n, y_n) exists, but F_n depends on the whole batch.",
                "losses per component",
                holds=(SIMD_LOSS,),
            ),
            Case("renamed", OWN_TERMS, "terms of the loss", holds=(REDUCTION,)),
            Case("none", COUPLED),
        ),
    ),
    # Defined by the forward pass alone: parameters in the loss leave nothing out.
    Quantity(
        "crosstalk",
        (
            Case("exact", "F_n depends on x_n only: zero off the diagonal.", holds=(INDEPENDENT,)),
            Case("exact", "Entry (n, m) says how strongly F_n depends on x_m."),
        ),
        through_predictions=False,
        available=True,
    ),
    Quantity(
        "prediction Jacobian",
        (Case("exact", "∂F_n/∂θ exists for every differentiable forward pass."),),
        ("laplace jacobians",),
        through_predictions=False,
    ),
    # --- rows: one for each sample, or for what takes its place -----------------------------------
    # Where samples mix, three things take their place, each an entry of its own below: component,
    # copy and frozen rows. Where they do not, all are the same.
    Quantity(
        "per-sample gradients",
        rows(
            "gradients", "Row n is w_n ∇ℓ_n; it depends on sample n only, and the rows sum to ∇L."
        ),
        ("BackPACK BatchGrad", "Opacus grad_sample", "ASDL batch gradients"),
        available=True,
    ),
    # Never refused: the rows are defined by the predictions alone. What may be lost is only that
    # each is the gradient of a term of the loss.
    Quantity(
        "component rows",
        (
            Case(
                "exact",
                "Row n is `J_nᵀ ∂L/∂F_n`, the gradient w_n ∇ℓ_n of the n-th loss term; the sum is "
                "∇L.",
                holds=(REDUCTION,),
            ),
            Case(
                "exact",
                "Row n is `J_nᵀ ∂L/∂F_n`, the part of ∇L through F_n; the sum is ∇L, but it is no "
                "gradient of a term of L.",
            ),
        ),
        available=True,
    ),
    # The other way to divide the gradient where samples mix: by whose use of the parameters, and
    # not by whose prediction.
    Quantity(
        "copy rows",
        (
            Case("exact", "Without mixing they equal the component rows.", holds=(INDEPENDENT,)),
            Case(
                "exact",
                "Row m is what sample m's own use of the parameters contributes; the sum is ∇L, "
                "but they depend on how the program is written, not on F alone. BackPACK and ASDL "
                "return them under batch norm. Refused where one operation applies a parameter "
                "and sums over the samples at once.",
            ),
        ),
        available=True,
    ),
    # The only rows that do not sum to the gradient: what flows through the statistics is left out.
    Quantity(
        "frozen rows",
        (
            Case(
                "exact",
                "There is nothing to freeze: they equal the component rows.",
                holds=(INDEPENDENT,),
            ),
            Case(
                "exact",
                "Component rows with the batch statistics held constant; they do not sum to ∇L.",
                holds=(STATISTICS,),
            ),
            Case(
                "none",
                "Samples interact through more than batch statistics of bounded size: nothing to "
                "hold constant.",
            ),
        ),
        available=True,
    ),
    # --- functions of the rows, one entry for each row or pair of rows ----------------------------
    # They exist wherever rows do, and take over what the rows have to be called.
    Quantity(
        "squared gradient norms",
        rows("squared norms of gradients", "Entry n is the squared norm of w_n ∇ℓ_n."),
        ("BackPACK BatchL2Grad",),
        available=True,
    ),
    Quantity(
        "Gram matrix of gradients",
        rows("inner products of gradients", "Entry (n, m) is that of w_n ∇ℓ_n and w_m ∇ℓ_m."),
        available=True,
    ),
    Quantity(
        "sum of squared gradients",
        rows("sum of squares of gradients", "The squares of all rows, summed entry by entry."),
        ("BackPACK SumGradSquared",),
        available=True,
    ),
    Quantity(
        "gradient histogram",
        rows("histogram of gradients", "The entries of all rows, counted."),
        ("Cockpit GradHist1d",),
        available=True,
    ),
    # A sum, and still under the rule of rows: clipping acts on one row at a time, so it matters
    # whose the row is.
    Quantity(
        "clipped sum",
        rows(
            "clipped sum of gradients",
            "Clipping bounds what one sample contributes.",
            " Clipping does not bound the influence of a sample: no differential privacy.",
        ),
        ("Opacus DPOptimizer",),
        available=True,
    ),
    Quantity(
        "directional slopes",
        rows("slopes", "The n-th gradient along an eigenvector of G."),
        ("ViViT DirectionalDerivativesComputation (slopes)",),
        available=True,
    ),
    # --- moments: statistics over the rows --------------------------------------------------------
    # Not linear in the rows, so that another way to divide one gradient gives another number: the
    # rule asks for a SIMD forward, and not for independence alone.
    Quantity(
        "second moment of gradients",
        moments("second moment", "The rows are made alike and apart."),
        available=True,
    ),
    Quantity(
        "gradient variance",
        moments("variance", "The rows are made alike and apart."),
        ("BackPACK Variance",),
        available=True,
    ),
    Quantity(
        "signal-to-noise",
        moments("signal-to-noise", "The rows are made alike and apart."),
        available=True,
    ),
    Quantity(
        "gradient noise scale",
        moments("noise scale", "The rows are made alike and apart."),
        available=True,
    ),
    Quantity(
        "norm, inner product and orthogonality tests",
        moments("ratios of the tests", "The rows are made alike and apart."),
        ("Cockpit NormTest", "Cockpit InnerTest", "Cockpit OrthoTest"),
        available=True,
    ),
    Quantity(
        "early stopping criterion",
        moments("early stopping criterion", "The rows are made alike and apart."),
        ("Cockpit EarlyStopping",),
        available=True,
    ),
    # Under the rule of moments: up to a factor its diagonal is the second moment of the rows.
    Quantity(
        "empirical Fisher",
        moments(
            "outer products of gradients",
            "Σ_n g_n g_nᵀ; the name asks for a negative log-likelihood.",
        ),
        ("curvlinops EFLinearOperator", "laplace EFInterface"),
    ),
    # --- the GGN as a whole -----------------------------------------------------------------------
    # G exists in every world, and none of these is refused. What goes with the structures is the
    # cheap way: by blocks of H, and by stacked samples.
    Quantity(
        "GGN product",
        whole("Exists for every twice differentiable loss, and depends on the cut."),
        ("curvlinops GGNLinearOperator",),
        available=True,
    ),
    Quantity(
        "block-diagonal GGN product",
        whole("A product with G restricted to one parameter."),
        ("BackPACK GGNMP",),
        available=True,
    ),
    Quantity(
        "GGN diagonal", whole("The diagonal of G."), ("BackPACK DiagGGNExact",), available=True
    ),
    Quantity("GGN trace", whole("The trace of G."), available=True),
    Quantity(
        "GGN log-determinant",
        whole("Of the damped G, with sign, from a matrix of size N·C."),
        available=True,
    ),
    Quantity(
        "GGN solve", whole("The damped G inverted through a matrix of size N·C."), available=True
    ),
    Quantity(
        "GGN eigenvalues",
        whole("The spectrum of G, from a matrix of size N·C."),
        ("ViViT EigvalshComputation",),
        available=True,
    ),
    Quantity(
        "GGN eigenpairs",
        whole("Eigenvectors of G, from a matrix of size N·C."),
        ("ViViT EighComputation",),
        available=True,
    ),
    Quantity(
        "damped Newton step",
        whole(
            "Mean slopes over damped mean curvatures, along eigenvectors of G; a damping set by "
            "the noise over samples inherits what holds for the signal-to-noise."
        ),
        ("ViViT DirectionalDampedNewtonComputation",),
        available=True,
    ),
    # Each block of H bounds the rank of one part of G. Without blocks the number of predicted
    # entries is left.
    Quantity(
        "GGN rank bound",
        (
            Case("exact", f"{BLOCKS} So rank G ≤ min(D, Σ_n rank H_n).", holds=(REDUCTION,)),
            Case("renamed", "rank G ≤ rank H ≤ N·C, from the shape of H alone.", "rank bound N·C"),
        ),
        available=True,
    ),
    # --- the GGN, sample by sample ----------------------------------------------------------------
    # Factors come before parts: where G has no parts it still has a factor, whose columns are no
    # sample's.
    Quantity(
        "GGN factor",
        parts("GGN factor", "exact", joint("joint GGN factor")),
        ("BackPACK SqrtGGNExact",),
        available=True,
    ),
    Quantity(
        "GGN Gram matrix",
        parts("GGN Gram matrix", "exact", joint("joint GGN Gram matrix")),
        available=True,
    ),
    Quantity("per-sample GGN", parts("GGN", "exact", NO_PARTS), available=True),
    Quantity(
        "per-sample GGN diagonals",
        parts("GGN diagonals", "exact", NO_PARTS),
        ("BackPACK BatchDiagGGNExact",),
        available=True,
    ),
    Quantity(
        "directional curvatures",
        parts("curvatures", "exact", NO_PARTS),
        ("ViViT DirectionalDerivativesComputation (curvatures)",),
        available=True,
    ),
    # Draws come from the likelihood of a sample. Without one, random signs are left, an entry of
    # its own.
    Quantity(
        "sampled GGN factor",
        parts("sampled GGN factor", "estimate", NO_DRAWS),
        ("BackPACK SqrtGGNMC",),
        available=True,
    ),
    Quantity(
        "sampled per-sample GGN diagonals",
        parts("sampled GGN diagonals", "estimate", NO_PARTS),
        ("BackPACK BatchDiagGGNMC",),
        available=True,
    ),
    # A sum over samples, and so no part is needed: random signs estimate it in every world.
    Quantity(
        "sampled GGN diagonal",
        (
            Case("estimate", LIKELIHOOD, holds=(REDUCTION,)),
            Case("estimate", SIGNS, "GGN diagonal by random signs"),
        ),
        ("BackPACK DiagGGNMC",),
        available=True,
    ),
    Quantity(
        "random-sign GGN factor",
        (
            Case(
                "estimate", "Unbiased for every positive semi-definite H; one backward pass a draw."
            ),
        ),
    ),
    # --- Kronecker factors ------------------------------------------------------------------------
    # They need more than G has: what enters a layer, beside what comes back to it, sample by
    # sample.
    Quantity("KFAC", kronecker("estimate", "with sampled output gradients."), ("BackPACK KFAC",)),
    Quantity(
        "KFLR",
        kronecker("exact", "with the exact factors of H_n; linear and convolution layers."),
        ("BackPACK KFLR",),
    ),
    Quantity(
        "KFRA",
        kronecker("exact", "by averaging from layer to layer; needs a plain chain of layers."),
        ("BackPACK KFRA",),
    ),
    # --- the Hessian ------------------------------------------------------------------------------
    # By double backward through the loss as well, so that parameters in it are seen: these are not
    # about the part through the predictions.
    Quantity(
        "Hessian product",
        (Case("exact", "Double backward needs no structure."),),
        ("curvlinops HessianLinearOperator", "PyHessian"),
        through_predictions=False,
    ),
    Quantity(
        "block-diagonal Hessian product",
        hessian("The Hessian restricted to one parameter."),
        ("BackPACK HMP",),
        through_predictions=False,
    ),
    # An exception: it is built from H and from what each module adds, on the way through the
    # predictions.
    Quantity(
        "block-diagonal positive-curvature Hessian product",
        (
            Case(
                "exact",
                "Negative curvature that a module adds is removed, sample by sample; the result "
                "depends on how the net is cut into modules.",
                holds=(INDEPENDENT,),
            ),
            Case(
                "renamed",
                "What a mixing module adds is one matrix over the whole batch; negative curvature "
                "is removed from that, and BackPACK's recursion, sample by sample, is wrong.",
                "block-diagonal positive-curvature Hessian product, made positive over the whole "
                "batch",
            ),
        ),
        ("BackPACK PCHMP",),
    ),
    Quantity(
        "Hessian diagonal",
        hessian("The diagonal of the Hessian of L, by Hessian products."),
        ("BackPACK DiagHessian",),
        through_predictions=False,
    ),
    # Whether there is an ℓ_n comes first, then whether they add up to L, then whose each of them
    # is, and last who set its weight.
    Quantity(
        "per-sample Hessian diagonals",
        (
            Case(
                "exact",
                "The Hessian of L is the sum of those of w_n ℓ_n.",
                holds=(INDEPENDENT, REDUCTION, OWN_WEIGHTS),
            ),
            Case("none", COUPLED, fails=(SIMD_LOSS, REDUCTION)),
            Case(
                "renamed",
                "The Hessian of ℓ_n exists, but that of L also has terms across the losses.",
                "Hessian diagonals of the ℓ_n, not summing to that of L",
                fails=(REDUCTION,),
            ),
            Case(
                "renamed",
                f"The Hessian of the n-th term w_n ℓ_n; the sum is that of L. {MIXED}",
                "Hessian diagonals per component",
                fails=(INDEPENDENT,),
            ),
            Case("renamed", FOREIGN, "Hessian diagonals per component", fails=(SIMD_LOSS,)),
            Case("renamed", WEIGHED, f"Hessian diagonals per sample{FACTOR}", fails=(OWN_WEIGHTS,)),
        ),
        ("BackPACK BatchDiagHessian",),
    ),
    # --- beyond the batch -------------------------------------------------------------------------
    Quantity(
        "data-set sum",
        (
            Case(
                "exact",
                "Mini-batches add up to the data set, however it is cut, once w_n is rescaled for "
                "N.",
                holds=(INDEPENDENT, REDUCTION, SIMD_LOSS, OWN_WEIGHTS),
            ),
            Case(
                "renamed",
                "What a sample contributes depends on its mini-batch; the partition is recorded.",
                "data-set sum for this partition",
            ),
        ),
    ),
)


# Typical situations, and the facts that fail in each.
# Facts fail together: without independence there is no SIMD forward.
SITUATIONS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "everything holds": (),
        "batch norm in train mode": (INDEPENDENT, SIMD_FORWARD),
        "samples mixed arbitrarily": (INDEPENDENT, SIMD_FORWARD, STATISTICS),
        "reduction is not a sum": (REDUCTION,),
        "loss joins samples": (SIMD_LOSS, REDUCTION),
        "a loss of its own for each sample": (SIMD_LOSS,),
        "weights set by other samples": (OWN_WEIGHTS,),
        "parameters in the loss": (SPLIT,),
    }
)


# What becomes of quantities where an output has no axis of samples. Of the whole batch, nothing is
# lost: G is a function of all outputs.
OF_WHOLE_BATCH = frozenset(
    {
        "gradient",
        "crosstalk",
        "prediction Jacobian",
        "GGN product",
        "block-diagonal GGN product",
        "GGN diagonal",
        "GGN trace",
        "GGN log-determinant",
        "GGN solve",
        "GGN eigenvalues",
        "GGN eigenpairs",
        "damped Newton step",
        "GGN rank bound",
        "random-sign GGN factor",
        "Hessian product",
        "block-diagonal Hessian product",
        "Hessian diagonal",
        "data-set sum",
    }
)


# What needs G to be a sum over samples, as it is where the loss is linear in that output.
OF_PARTS = frozenset(
    {
        "GGN factor",
        "GGN Gram matrix",
        "per-sample GGN",
        "per-sample GGN diagonals",
        "directional curvatures",
        "sampled GGN factor",
        "sampled per-sample GGN diagonals",
        "sampled GGN diagonal",
        "KFAC",
        "KFLR",
        "KFRA",
    }
)
