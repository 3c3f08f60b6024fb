"""LoRA for Stable Diffusion, from scratch.  Read lora.py first, then diffusion.py, then training.py."""

from .lora import (
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
from .models import load_lora, save_lora

__all__ = [
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
