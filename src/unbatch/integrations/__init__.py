"""The tools that people already have: one file for each, and each file imports its tool only when it is asked.

Nothing is computed here that ``Problem`` does not compute; names, shapes and scales are those of the other tool.
"""
