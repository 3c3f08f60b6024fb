"""The bundled miniature Stable Diffusion: its weights, and the scripts that trained and measured it.

The folder is a base in diffusers' layout.  The scripts may import all the other wings.
"""
