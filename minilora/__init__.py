"""LoRA for Stable Diffusion, from scratch.  Read lora.py first, then diffusion.py, then training.py."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .files.network import load_lora, load_lora_state_dict, lora_state_dict, save_lora
    from .lora import (
        LoRAConv2d,
        LoRALinear,
        inject_lora,
        lora_disabled,
        lora_layers,
        lora_parameters,
        merge_lora,
        remove_lora,
        set_lora_strength,
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
    "set_lora_strength",
    "unmerge_lora",
]


def __getattr__(name: str):
    """Import a public name when it is first used: importing torch takes seconds, and merging files does not need it."""
    if name in ("load_lora", "load_lora_state_dict", "lora_state_dict", "save_lora"):
        module = importlib.import_module(".files.network", __name__)
    elif name in __all__:
        module = importlib.import_module(".lora", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(module, name)
