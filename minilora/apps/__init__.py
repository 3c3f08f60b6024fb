"""Applications of LoRA, each a command: restore, morph, restyle, distill, evaluate.

May import all other folders.  Only base/ imports it, to measure the bundled base.
"""
