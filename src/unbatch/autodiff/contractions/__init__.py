"""Per-sample contractions of cotangents with the other inputs of an op.

``contraction.py`` has the contract and the generic fallback, ``registry.py`` says which operation
is of which kind, ``row_block.py`` holds rows, or contractions in their place. The others are one
kind each.
"""
