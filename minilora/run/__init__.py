"""Everything around the loop: processes, checkpoints, validation, tracking, class pictures, the model card, the hub.

May import sampling.py and everything that it may import: data, models, files, settings, lora.py and diffusion.py.
"""
