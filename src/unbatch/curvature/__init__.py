"""The Gauss-Newton matrix and what follows from it.

In reading order:

- ``ggn.py``: the matrix as an operator, ``Jᵀ H J``; ``block_ggn.py``: its diagonal blocks
- ``point.py``, ``column_map.py``: where it is taken; the factor V in ``G = V Σ Vᵀ`` as a map
- ``loss_hessian.py``: the second derivative H of the loss; ``hessian_root.py``: its square root
  S; ``sampled_root.py``: roots that are drawn
- ``ggn_quantities.py``, ``gram.py``: quantities of the columns of V, and their inner products
- ``ways.py``, ``sizes.py``, ``pace.py``: the ways to answer a question, what each of them takes,
  and how long that is; ``answers.py``: how the one that was chosen is gone
- ``spectrum.py``: eigenvalues, directions, solves and determinants from a small matrix
- ``strategy.py``: how columns are pulled back, and why
- ``batch_statistics.py``, ``low_rank.py``, ``truncation.py``: columns through batch statistics, as
  a low-rank correction
"""
