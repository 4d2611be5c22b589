"""The Gauss-Newton matrix and what follows from it.

In reading order:

- ``loss_hessian.py``, ``hessian_root.py``: the second derivative of the loss, and its square root
- ``ggn.py``: the matrix as an operator, ``Jᵀ H J``; ``block_ggn.py``: its diagonal blocks
- ``spectrum.py``: eigenvalues, directions, solves and determinants from the Gram matrix
- ``ggn_quantities.py``: quantities of the columns; ``strategy.py``: how columns are pulled back, and why
- ``batch_statistics.py``, ``low_rank.py``: columns through batch statistics, in few directions
"""
