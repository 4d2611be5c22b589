"""Results for people: in the terminal, as pictures, and as one HTML page.

In reading order: ``tables.py`` puts results into words and cells; ``plot.py`` has the pictures,
``curvature_plot.py`` those of curvature, ``style.py`` what they share; ``parts.py`` says what each
part of the page shows; ``page.py`` writes the page, of which ``page.html`` is the template.
"""
