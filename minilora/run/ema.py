"""The moving average of a LoRA over the steps of its training: train.py --ema.

    θ̄ ← d · θ̄ + (1 − d) · θ

The last steps of training jump about, by the pictures that they happened to see; their average does not.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from ..files.network import load_lora_state_dict, lora_state_dict


@torch.no_grad()
def ema_update(network: nn.Module, average: Mapping[str, torch.Tensor], step: int, decay: float) -> None:
    """Move the average towards the LoRA in a network, with a decay that rises to `decay` over the first steps."""
    decay = min(decay, (1 + step) / (10 + step))
    for name, tensor in lora_state_dict(network).items():
        average[name].lerp_(tensor, 1 - decay)


@contextmanager
def ema_weights(network: nn.Module, average: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Within the block the LoRA is its average; afterwards it is as it was found."""
    now = {name: tensor.clone() for name, tensor in lora_state_dict(network).items()}
    try:
        load_lora_state_dict(network, average)
        yield
    finally:
        load_lora_state_dict(network, now)
