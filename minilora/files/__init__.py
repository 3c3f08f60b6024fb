"""Weights on disk: safetensors in and out, the names of weights in every program, LoRA files of any dialect, folding.

May import settings and lora.py.
"""
