"""What surrounds the loop: processes, checkpoints, validation, tracking, class pictures, the model card, the hub.

May import sampling.py and everything that it may: data, models, files, settings and the heart.
"""
