"""Measurements while a model trains.

In reading order: ``monitor.py`` is called at each step and calls the rest; ``account.py`` decides
when to measure, and keeps the cost; ``metrics.py`` measures a batch; ``messages.py`` knows what was
said before; ``log.py`` writes the lines, to a file and to TensorBoard.
"""
