"""Rows of the gradient, and what is asked about them.

In reading order:

- ``request.py``: a question as plain data, and which source of rows answers it
- ``sources.py``: where rows come from; ``replayed_rows.py``, ``eager_rows.py``: the two kinds
- ``self_check.py``: a plan is held against plain autograd before it is believed
- ``quantities.py``, ``diagnostics.py``: what can be asked about rows, and what is derived from that
- ``results.py``, ``plan.py``: what is returned, and what is going to be done
"""
