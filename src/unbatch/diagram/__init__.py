"""The picture of a structure: ``mixing.py`` finds where samples mix, ``stages.py`` folds the graph into a few stages,
``figure.py`` draws, ``diagram.py`` is what a user gets.
"""
