"""Derivatives of the recorded graph, taken at the places where parameters are used.

In reading order:

- ``planner.py``, ``schedule.py``: the parameter use sites, and what the backward pass does at each
- ``context.py``: the recorded problem as the passes below see it
- ``vjp.py``: one forward pass, and cotangents pulled back to the sites; ``contractions/``: what is made of them there
- ``jvp.py``, ``jvp_rules.py``: the model as a linear map of its parameters, and its rules
- ``loss.py``: the loss as a function of the predictions; ``eager.py``: the model itself, where its graph will not do
- ``autograd.py``: what is asked of PyTorch's own engine
"""
