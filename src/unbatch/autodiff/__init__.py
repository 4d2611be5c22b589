"""Derivatives of the recorded graph, taken at the places where parameters are used.

In reading order:

- ``dependence.py``: what depends on the parameters, and where samples are still separate
- ``planner.py``, ``schedule.py``: the parameter use sites, and what the passes do at which step
- ``readers.py``: which sample reads a value in which samples are mixed
- ``context.py``: the recorded problem as the passes below see it
- ``forward.py``, ``vjp.py``: one forward pass, and cotangents pulled back to the sites;
  ``contractions/``: what is made of them there
- ``jvp.py``, ``tangent_store.py``: the model as a linear map of its parameters;
  ``jvp_rules.py``, ``forward_mode.py``, ``compositions.py``: how a tangent passes through an op
- ``model_jvp.py``: the same of the model itself; ``adjoint.py``: whether a way of pushing belongs
  to the backward pass
- ``own_backward.py``: backward passes that PyTorch did not write, on trial
- ``other_batches.py``: batches to try a pass on where the own one is not finite
- ``loss.py``: the loss as a function of the predictions
- ``eager.py``: the model itself, where its graph has other derivatives
- ``autograd.py``: what PyTorch's own engine lacks
"""
