"""What a user asks.

In reading order:

- ``problem.py``: the class ``Problem``
- ``validation.py``, ``parameters.py``: whether a call's arguments fit together, and which parameters are meant
- ``session.py``: the recording that is kept between questions
- ``question.py``, ``evaluate.py``: one question, from its context to the answers
"""
