"""The definitions, slow and plain, that tests hold everything against.

Nothing else of the package is imported here. In reading order:

- ``definitions.py``: gradient rows, the Gauss-Newton matrix, and quantities made of rows
- ``isolated_samples.py``: a batch, one sample of it alone, and all samples alone in lock-step
- ``cross_sample_ops.py``: the operations through which samples depend on each other
"""
