"""Cases of the hunt that are wrong yet, by cause; the list shrinks as causes are mended."""

WRONG_TODAY = frozenset(
    [
        # An op that raises by its data, and a program that catches that: no read is seen.
        "model: a Cholesky factor that fails",
        "model: a class out of range",
        "model: a solver that refuses",
        "model: a gather that fails",
        "model: a scatter that fails",
        "model: a selection that fails",
        "model: a likelihood that fails",
        "loss: a class out of range in the loss",
        # A tensor's memory exchanged by `.data =` is no step.
        "model: data exchanged for centred data",
        "model: data exchanged for flipped data",
        # The noise of `rrelu` is not moved along with its samples where proofs are tried.
        "model: random slopes",
        # Labels that are mixed count as constants of the sample.
        "loss: paths to labels mixed with those of others",
        "loss: paths to labels of others",
        "loss: paths to labels mixed, in one vector",
    ]
)
