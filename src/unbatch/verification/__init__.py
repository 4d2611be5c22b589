"""Experiments on other batches, which put the verdicts of the analysis to the test.

An experiment can refute a verdict or support it; it never proves one. In reading order:

- ``experiment.py``, ``variants.py``: the program on a batch in which some samples are replaced
- ``counterexample.py``: what a test returns
- ``forward_tests.py``: does a prediction depend on other samples, or on its place in the batch
- ``noise_use.py``, ``noise_owners.py``: which noise belongs to which sample
- ``permutations.py``: predictions for a permuted batch, the noise of each sample included
- ``groups.py``: do samples depend on each other in groups that are apart
- ``ranks.py``: can a number of statistics that does not grow with the batch carry the dependence
- ``frozen_statistics.py``: predictions for other samples, every batch statistic held constant
- ``loss_experiment.py``, ``loss_tests.py``: the loss as a function of the predictions
- ``noise.py``: the noise of a recording, and whether other samples would get another one
- ``trial.py``, ``forward_trial.py``, ``loss_trial.py``: what is proved, tried before it is given
- ``fidelity.py``: may the recorded graph stand for the model
- ``verify.py``: which verdict is settled, confirmed or contradicted by which test
- ``crosstalk.py``: how strongly each prediction depends on each sample
"""
