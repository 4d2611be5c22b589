"""The abstract values: which sample owns each element, and which function of it that element is.

``ownership.py`` has the value, ``propagation.py`` the four operations in which all rules are written,
``sample_layout.py`` the answer to where the samples lie.
"""
