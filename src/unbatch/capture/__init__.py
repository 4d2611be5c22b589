"""A program, run once and written down as a graph; the only wing that traces.

In reading order:

- ``forms.py``, ``ops.py``: the names of operations, and the facts about them, one row each
- ``steps.py``, ``graph.py``: what a recording is made of, and its grammar; ``check.py`` holds that
- ``replay.py``, ``substitutes.py``: recorded steps run again, and what runs in place of some
- ``aliasing.py``: values that share memory
- ``tracer.py``, ``python_values.py``: the recorder, and what Python reads of tensors
- ``catching.py``: whether the program goes on where an op raises an error
- ``device_ops.py``: fused ops of a GPU, as they are recorded
- ``missing_derivatives.py``, ``third_order.py``: derivatives and kernels that PyTorch does not have
- ``foreach.py``: ops on lists as loops
- ``hooks.py``, ``own_nodes.py``: what of a backward pass is not PyTorch's: hooks, and functions
- ``program.py``: the model with its loss, and the ways to record them
- ``data.py``, ``opened.py``: what the program is given, each time it runs, and what it returns
- ``sample_axes.py``, ``stacked_views.py``, ``ragged_rows.py``: samples along several axes, several
  views along one, or rows that an index gives to samples
- ``wrappers.py``: what stands around a model
- ``effort.py``: how much experiments with it may cost
- ``isolation.py``, ``distributed.py``: no trace is left, and no other process is kept waiting
- ``tensor_states.py``, ``after_run.py``: what is put back of tensors; what backward passes find
- ``holders.py``, ``foreign.py``, ``iterators.py``: places where a program keeps something
- ``histories.py``: tensors that it keeps with what autograd knows of them
- ``code_names.py``, ``reachable.py``: what its code names, and the walk that finds the places
- ``switches.py``: settings of the process that decide what is computed
- ``own_writes.py``, ``counters.py``: what a program writes without depending on it
- ``guards.py``, ``uses.py``: how long a recording is valid; which numbers it depends on
- ``same_form.py``: whether two recordings are one computation, but for sizes
- ``expressions.py``, ``simplifications.py``, ``symbolic.py``, ``control_flow.py``: proofs that all
  execution paths compute the same
"""
