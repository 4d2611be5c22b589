"""Which structure a loss has, by abstract interpretation of its graph.

In reading order:

- ``domain/``: ownership, the abstract value, and how it propagates
- ``rules/``: what each operation does to it
- ``initial.py``, ``interpreter.py``: what the interpretation starts from, and its one pass over the
  graph; ``policy.py``, ``number_facts.py``, ``decomposition.py``, ``memory.py``: its parts
- ``loss_boundary.py``, ``loss_weights.py``: where the loss begins, and the weights of its terms
- ``outputs.py``: the outputs that a loss reads, and their axes of samples
- ``inference.py``: from ownership to verdicts, with ``forward_inference.py``, ``loss_inference.py``
- ``verdict.py``, ``structure.py``: the verdicts as data; ``explanations.py``: their reasons in
  words; ``structure_tables.py``: the printed report
- ``consequence_table.py``, ``consequences.py``: which quantity exists under which structure
"""
