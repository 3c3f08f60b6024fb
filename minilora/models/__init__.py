"""A base and its parts: found by name, loaded part by part.

May import files, settings and lora.py and diffusion.py.
"""
