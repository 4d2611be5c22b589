"""The picture of a structure.

- ``mixing.py``: at which ops samples interact
- ``stage.py``, ``stages.py``: one row of the picture, and the ops as a few such rows
- ``figure.py``: the drawing; ``diagram.py``: what a user gets, and its text
"""
