"""Weights on disk: safetensors in and out, what every tool calls a weight, LoRA files of any dialect, and folding.

May import settings and lora.py.
"""
