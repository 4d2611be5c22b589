"""The command ``unbatch``.

In reading order: ``commands.py`` has the subcommands; ``parsing.py`` turns what is typed into
shapes and models, ``losses.py`` into losses with fitting targets; ``demo.py`` is the tour,
``texts.py`` what it says, ``digits.py`` the net that it is about.
"""
