"""What training makes small: the loop in training.py takes it as an argument.

The ordinary objective is here; apps/consistency.py and apps/smooth.py have others.
"""

from dataclasses import is_dataclass

import torch
from torch import nn

from ..data.examples import Batch
from ..diffusion import Schedule, denoising_loss, offset_noise
from ..settings.train import TrainConfig


class Objective:
    """What training makes small: a loss, and what it does around the steps."""

    def name(self) -> str:
        """Return the objective with its settings, if it has any: what is learnt is a function of that, too."""
        return repr(self) if is_dataclass(self) else type(self).__name__

    def begin(self, unet: nn.Module, config: TrainConfig) -> None:
        """Look at the U-Net, with the LoRA in it, before the first step."""

    def loss(self, unet: nn.Module, batch: Batch, schedule: Schedule, config: TrainConfig) -> torch.Tensor:
        """Return one loss per picture, (batch,)."""
        raise NotImplementedError

    def before_step(self) -> None:
        """Bring together what the processes saw, as it is done with the gradients; the LoRA is about to change."""

    def after_step(self) -> None:
        """Follow the LoRA, which has just changed."""

    def state(self) -> dict[str, torch.Tensor]:
        """Return the tensors that are kept from step to step; a checkpoint holds them, --resume copies into them."""
        return {}


class Denoising(Objective):
    """The ordinary objective: predict what noise was added to a picture."""

    def loss(self, unet: nn.Module, batch: Batch, schedule: Schedule, config: TrainConfig) -> torch.Tensor:
        noise = offset_noise(batch.noise, batch.noise_offset, config.noise_offset)
        more = config.snr_gamma, config.huber_c, config.dream
        return denoising_loss(unet, batch.latents, batch.conditioning, noise, batch.timesteps, schedule, *more)
