"""LoRA files: the diffusers dialect, `pytorch_lora_weights.safetensors`.

A file holds, for each part of the base ("unet", "text_encoder") and each adapted layer in it, the
two matrices of the change:

    unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight    (rank, in)
    unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_B.weight    (out, rank)

The scale alpha / rank is folded into B: programs disagree on where else to look for it.  Files of
older diffusers say `.lora.down` for A and `.lora.up` for B.
"""

import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

FILE_NAME = "pytorch_lora_weights.safetensors"
_KEY = re.compile(r"(?P<component>[^.]+)\.(?P<layer>.+)\.(?P<matrix>lora_A|lora_B|lora\.down|lora\.up)\.weight")
_MATRIX = {"lora_A": "lora_A", "lora.down": "lora_A", "lora_B": "lora_B", "lora.up": "lora_B"}

Tensors = dict[str, torch.Tensor]  # "<layer>.lora_A.weight" and "<layer>.lora_B.weight"


class FormatError(ValueError):
    """A file that is not what it should be; the message names the file and the keys."""


def as_diffusers(components: dict[str, Tensors]) -> Tensors:
    """Return the tensors of a diffusers file, given by component."""
    return {f"{name}.{key}": value for name, state in components.items() for key, value in state.items()}


def read_lora(path: Path) -> dict[str, Tensors]:
    """Read a LoRA by component; `path` is a file or a folder with pytorch_lora_weights.safetensors.

    Raises FormatError, naming every key that is not understood, that is alone, or that does not fit
    its partner.
    """
    if path.is_dir():
        path = path / FILE_NAME
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise FormatError(f"{path}: not a safetensors file that can be read ({error})") from error
    if "lora_adapter_metadata" in metadata:
        raise FormatError(f"{path}: its scales stand in lora_adapter_metadata, which is not read yet")

    components: dict[str, Tensors] = {}
    unknown = []
    for key, tensor in tensors.items():
        if match := _KEY.fullmatch(key):
            name = f"{match['layer']}.{_MATRIX[match['matrix']]}.weight"
            components.setdefault(match["component"], {})[name] = tensor
        else:
            unknown.append(f"{key} is no key of a diffusers LoRA")
    problems = unknown or ([] if tensors else ["it holds no tensors"])
    for component, state in components.items():
        for key, tensor in state.items():
            partner = key.replace("lora_A", "lora_?").replace("lora_B", "lora_A").replace("lora_?", "lora_B")
            if partner not in state:
                problems.append(f"{component}.{key} has no partner {partner}")
            elif tensor.ndim != 2 or state[partner].ndim != 2:
                problems.append(f"{component}.{key} has shape {tuple(tensor.shape)}; only linear layers are read")
            elif "lora_A" in key and tensor.shape[0] != state[partner].shape[1]:
                shapes = f"{tuple(tensor.shape)} and {tuple(state[partner].shape)}"
                problems.append(f"{component}.{key} and its partner differ in rank: {shapes}")
            elif not tensor.isfinite().all():
                problems.append(f"{component}.{key} holds numbers that are not finite")
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise FormatError(f"{path}: " + "; ".join(problems[:3]) + more)
    return components
