"""The moving average of a LoRA over the steps of its training: train.py --ema.

    θ̄ ← d · θ̄ + (1 − d) · θ

The LoRA after each single step depends on the pictures of the last few; the average is smoother.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from ..files.network import load_lora_state_dict, lora_state_dict


@torch.no_grad()
def ema_update(network: nn.Module, average: Mapping[str, torch.Tensor], step: int, decay: float) -> None:
    """Update the average with the LoRA in a network; the decay rises to `decay` over the first steps."""
    decay = min(decay, (1 + step) / (10 + step))
    for name, tensor in lora_state_dict(network).items():
        average[name].lerp_(tensor, 1 - decay)


@contextmanager
def ema_weights(network: nn.Module, average: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Within the block the network has the average as its LoRA; afterwards the LoRA that it had."""
    now = {name: tensor.clone() for name, tensor in lora_state_dict(network).items()}
    try:
        load_lora_state_dict(network, average)
        yield
    finally:
        load_lora_state_dict(network, now)
