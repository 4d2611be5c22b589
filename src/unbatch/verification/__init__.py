"""Verdicts put to the test, by experiments on other batches.

In reading order:

- ``experiment.py``: the program on a batch that differs in chosen samples
- ``forward_tests.py``, ``loss_tests.py``: counterexamples to verdicts on the model and on the loss
- ``fidelity.py``: whether the recorded graph may stand for the model
- ``verify.py``: which verdict is settled, confirmed or contradicted by which experiment
- ``crosstalk.py``: how strongly each prediction depends on each sample
"""
