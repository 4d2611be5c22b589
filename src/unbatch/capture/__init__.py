"""A program, run once and written down as a graph; the only wing that traces.

In reading order:

- ``ops.py``: the facts about operations, one row each
- ``graph.py``: the graph and its replay; ``aliasing.py``, ``substitutes.py``: shared memory, replaced steps
- ``tracer.py``, ``python_values.py``: recording, and what Python reads of tensors
- ``program.py``, ``sample_axes.py``, ``wrappers.py``: the model with its loss, and what stands around it
- ``isolation.py``, ``distributed.py``: no trace is left, and no other process is kept waiting
- ``guards.py``: how long a recording is valid
- ``expressions.py``, ``symbolic.py``, ``control_flow.py``: proofs that all execution paths compute the same
"""
