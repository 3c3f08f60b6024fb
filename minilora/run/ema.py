"""The moving average of the trained weights over the steps: train.py --ema.

    θ̄ ← d · θ̄ + (1 − d) · θ

The weights after any single step lean towards the last few pictures; the average is smoother.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from .trained import load_trained_state, trained_state


@torch.no_grad()
def ema_update(network: nn.Module, average: Mapping[str, torch.Tensor], step: int, decay: float) -> None:
    """Update the average, on its own device; the decay rises to `decay` over the first steps."""
    decay = min(decay, (1 + step) / (10 + step))
    for name, tensor in trained_state(network).items():
        average[name].lerp_(tensor.to(average[name].device), 1 - decay)


@contextmanager
def ema_weights(network: nn.Module, average: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Within the block the network has the average weights; afterwards its own."""
    now = {name: tensor.clone() for name, tensor in trained_state(network).items()}
    try:
        load_trained_state(network, average)
        yield
    finally:
        load_trained_state(network, now)
