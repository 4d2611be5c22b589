"""The definitions, slow and plain, that tests hold everything against. Nothing of the package is imported here.

``definitions.py`` has the quantities by plain autograd, ``isolated_samples.py`` samples alone and in lock-step.
"""
