"""LoRA for Stable Diffusion, from scratch.  Read lora.py first, then diffusion.py, then training.py."""

from .lora import (
    LoRAConv2d,
    LoRALinear,
    inject_lora,
    load_lora_state_dict,
    lora_disabled,
    lora_layers,
    lora_parameters,
    lora_state_dict,
    merge_lora,
    remove_lora,
    set_lora_scale,
    unmerge_lora,
)

__all__ = [
    "LoRAConv2d",
    "LoRALinear",
    "inject_lora",
    "load_lora",
    "load_lora_state_dict",
    "lora_disabled",
    "lora_layers",
    "lora_parameters",
    "lora_state_dict",
    "merge_lora",
    "remove_lora",
    "save_lora",
    "set_lora_scale",
    "unmerge_lora",
]


def __getattr__(name: str):
    """Import load_lora and save_lora when first used: they need diffusers, whose import takes seconds."""
    if name in ("load_lora", "save_lora"):
        from . import models

        return getattr(models, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
