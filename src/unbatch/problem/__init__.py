"""What a user asks.

In reading order:

- ``problem.py``: the class ``Problem``
- ``validation.py``, ``parameters.py``: whether arguments fit together; which parameters are meant
- ``recording.py``: a program as it ran on a batch, and what decides whether that is still valid
- ``session.py``: the recording with its analysis, kept between questions
- ``question.py``, ``evaluate.py``: one question, from its context to the answers
"""
