"""PyTorch's own table of ops, swept: rules held against what each op does to numbers.

In reading order: ``claims.py`` what marks claim, and whether numbers agree; ``roles.py`` which
arguments depend on samples; ``calls.py`` the op in its forms; ``table.py`` PyTorch's table.
"""
