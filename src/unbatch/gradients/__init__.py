"""Rows of the gradient, and what is asked about them.

In reading order:

- ``sources.py``: where rows come from; ``replayed_rows.py``, ``eager_rows.py``: the two kinds of source
- ``self_check.py``: a plan is tried against plain autograd before it is believed
- ``quantities.py``, ``diagnostics.py``: what can be asked about rows, and what is derived from that
- ``results.py``, ``plan.py``: what is returned, and what is going to be done
"""
