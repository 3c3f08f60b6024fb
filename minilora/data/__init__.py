"""Training data: pictures and captions, found, checked and cropped, and the random draws that order them.

May import models, files, settings and diffusion.py.
"""
