"""A base and its parts: found by name, loaded part by part.

May import files, settings and the heart (lora.py, diffusion.py).
"""
