"""Linear algebra that knows no networks.

In reading order:

- ``operators.py``: linear maps that are known by their products
- ``space.py``: several named tensors as one vector
- ``rows.py``, ``precision.py``, ``probes.py``: accurate sums, tolerances, random vectors
- ``solvers.py``: linear systems, and how well they were solved
- ``estimates.py``: diagonals from random signs
- ``spectra.py``: eigenvalues, traces, diagonals and densities of any operator
- ``lanczos.py``, ``traces.py``, ``products.py``: the algorithms behind them
"""
