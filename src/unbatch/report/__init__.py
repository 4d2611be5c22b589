"""Results shown: ``tables.py`` for the terminal, ``plot.py`` for pictures, ``page.py`` for the HTML report."""
