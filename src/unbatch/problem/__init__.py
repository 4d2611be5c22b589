"""What a user asks.

In reading order:

- ``problem.py``: the class ``Problem``
- ``validation.py``, ``parameters.py``: whether arguments fit together; which parameters are meant
- ``recording.py``: a program as it ran on a batch, and what decides whether that is still valid
- ``analysis.py``, ``known_forms.py``: what is found out about it, here and on other sizes
- ``session.py``, ``recordings.py``: a recording with its analysis; those kept between questions
- ``spot_check.py``: recordings that are used again, held against the model
- ``staleness.py``: whether a matrix that was made earlier still is the one of the program
- ``question.py``, ``evaluate.py``: one question, from its context to the answers
"""
