"""What the tour says: a paragraph for each of its parts, and what to try next.

Numbers that stand in a paragraph are settings of the tour and come from here as well.
"""

from __future__ import annotations

BATCH = 32  # samples whose structure is asked for


FEW = 8  # samples whose crosstalk is printed


DAMPING = 0.01  # of the Newton step


TRAINING = (
    "A small convolutional net with two batch norms learns to read handwritten digits (8 x 8 "
    "pixels)."
)


WIDENED = "It is trained in float32. From here on it is in float64, so that rounding hides nothing."


ASKED = (
    f"How far does the loss of this net, on a mini-batch of {BATCH}, come apart into samples? The "
    "answer is six verdicts, each proved from the recorded computation or refuted by a witness, "
    "with what is to blame. In short: batch norm makes every prediction depend on all digits of "
    "the batch, but only through R numbers, its statistics; the loss itself is still a sum over "
    "samples."
)


FOLLOWS = (
    "What the verdicts are good for: they decide which of the usual per-sample and curvature "
    "quantities exist for this loss, and what a quantity has to be called where it does not mean "
    "what its usual name says. Those with a star are computed by this release; some are shown "
    "further down."
)


CROSSTALK = (
    "Which predictions depend on which samples? Row n, column m of the picture: how strongly "
    f"prediction n reacts to sample m, for the first {FEW} of the {BATCH} digits (darker is "
    "stronger, on a log scale over four decades). Without crosstalk only the diagonal would be "
    "dark."
)


VERIFIED = (
    "Should one believe the verdicts? Each is put to an experiment: replace the other samples, "
    "freeze the batch statistics, permute the batch, vary the loss. One that contradicted its "
    "verdict would say so here."
)


GRADIENTS = (
    "What does one digit contribute to the gradient? Under batch norm that has three answers. By "
    "component: what goes through its own prediction. By copy: what its own use of the parameters "
    "contributes, through all predictions that depend on it. Frozen: by component, but with the "
    "batch statistics held constant."
)


SUMS = (
    "Component and copy rows sum to the gradient, up to rounding; frozen rows do not, because "
    "what flows through the statistics is missing. Each is exact as what it is called, and none "
    "is the others:"
)


NOISE = (
    "The warning, in short: the number is right, but digits that depend on each other are no "
    "independent draws, so it does not say which batch size is needed."
)


CURVATURE = (
    "Back in train mode: how is the loss curved? The Gauss-Newton matrix G = JᵀHJ combines the "
    "Jacobian of the predictions (J, through the batch statistics as well) and the Hessian of the "
    "loss with respect to the predictions (H). It has a row for every parameter, but it is a sum "
    "of one part per digit, each of which has a rank of at most the number of classes, less one. "
    "So a much smaller matrix knows its whole spectrum:"
)


SPECTRUM = (
    "The eigenvalues that are not zero, counted by powers of ten (each is at least what its line "
    "says):"
)


DIRECTIONS = (
    "The eigenvectors with the largest eigenvalues are the directions in which the loss curves "
    "most. Along each the loss has one slope and one curvature, and every digit n has a share in "
    "them, its slope γ_n and its curvature λ_n. These sum to the whole, and are often spread "
    "unevenly: a few digits hold most of it."
)


NEWTON = (
    "Slope over curvature says how far to go. A damped Newton step does that along every "
    f"eigenvector at once, here with {DAMPING:g} added to each curvature. A gradient step costs "
    "less, and has one step size for all:"
)


EVAL = (
    "The same question after model.eval(), where batch norm uses its running statistics in place "
    "of those of the batch: no prediction depends on another sample any more, and every verdict "
    "holds."
)


ON_A_PAGE = "The same net on the same batch, as a page with pictures and the same numbers"


LEFT_OUT = "`unbatch demo` without --quick goes on to the curvature, and writes a page.\n\n"


NEXT = """\
What to try next

  unbatch inspect path/to/file.py:make_model --input 8,3,32,32 --loss cross_entropy
      the same for a model of yours; `unbatch inspect --help` lists the rest
  unbatch report path/to/file.py:make_model --input 8,3,32,32 --loss cross_entropy
      ... as a page with pictures

  import unbatch as ub
  problem = ub.Problem(model, loss, (X, y))
  print(problem.structure)      # the verdicts, on your own batch
  problem.gradients(by="copy")  # the gradient, one row per sample
  problem.compute(ub.SquaredNorms())   # squared norms of the rows, without forming them
  problem.verify().checks       # what was tried against them
  print(problem.crosstalk())    # which predictions depend on which samples
  problem.ggn().eigvalsh()      # the spectrum of the Gauss-Newton matrix
  problem.structure.follows()   # what may be computed, and why"""
