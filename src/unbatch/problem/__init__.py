"""What a user asks.

In reading order:

- ``problem.py``: the class ``Problem``
- ``validation.py``, ``parameters.py``: whether arguments fit together; which parameters are meant
- ``recording.py``: a program as it ran on a batch, and what decides whether that is still valid
- ``session.py``: the recording with its analysis, kept between questions
- ``spot_check.py``: recordings that are used again, held against the model
- ``question.py``, ``evaluate.py``: one question, from its context to the answers
"""
