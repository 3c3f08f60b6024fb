"""Weights on disk: safetensors files, the names of weights in every program, LoRA files of any dialect, folding.

May import settings and lora.py.
"""
