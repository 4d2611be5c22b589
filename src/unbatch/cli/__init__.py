"""The command ``unbatch``: ``commands.py`` has its subcommands, ``parsing.py`` what is typed, ``demo.py`` the tour."""
