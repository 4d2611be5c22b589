"""What tests run on: tables of models, losses and programs whose truth is known, and what several
tests share.
"""
