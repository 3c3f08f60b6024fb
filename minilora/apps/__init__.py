"""What LoRA is used for, each a short story: restore, morph, restyle, distill, evaluate.

May import all the others; nothing imports it but base/, whose figures it measures.
"""
