"""Questions asked while a model trains: ``monitor.py`` says when, ``metrics.py`` what, ``log.py`` writes it down."""
