"""Applications of LoRA, each a command: restore, morph, restyle, distill, evaluate.

May import all the other wings.  Only base/ imports it, to measure the bundled base.
"""
