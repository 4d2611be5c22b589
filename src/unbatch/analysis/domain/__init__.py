"""The abstract values: which sample owns each element, and which function of it that element is.

In reading order: ``ownership.py`` has the value, and what moves its elements; ``sample_sets.py``
the owner of what is made from several, and ``choices.py`` what is one function of all although they
have terms in different numbers; ``folds.py`` what statistics of sets may be combined;
``dependence.py`` the tables of batch statistics and of steps at which samples became mixed;
``linearity.py`` how predictions enter a loss;
``propagation.py`` the four operations in which all rules are written; ``sample_layout.py`` the
answer to where the samples lie.
"""
