"""What takes long: it shows how far it is, and stops when it is asked to.

In reading order: ``records.py`` (how far something is), ``tasks.py`` (what loops count, the
switch and the callback), ``display.py`` (the bars of a terminal and of a notebook),
``interrupts.py`` (Ctrl-C waits for the next pass).
"""
