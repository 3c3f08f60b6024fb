"""The objective: the loss that training minimizes.  The loop in training.py takes it as an argument.

The ordinary objective is here; apps/consistency.py and apps/smooth.py have others.
"""

from dataclasses import is_dataclass

import torch
from torch import nn

from ..data.examples import Batch
from ..diffusion import Schedule, add_noise, denoising_loss, offset_noise
from ..lora import lora_disabled
from ..settings.train import TrainConfig


class Objective:
    """A loss, and what it needs before and after each optimizer step."""

    def name(self) -> str:
        """Return the objective's name, with its settings if it has any, for the run's identity."""
        return repr(self) if is_dataclass(self) else type(self).__name__

    def begin(self, network: nn.Module, config: TrainConfig) -> None:
        """Prepare for the first step; `network`, a U-Net or one with its text encoders, already has the LoRA."""

    def loss(self, network: nn.Module, batch: Batch, schedule: Schedule, config: TrainConfig) -> torch.Tensor:
        """Return one loss per picture, (batch,).  The network may be compiled, or wrapped for several processes."""
        raise NotImplementedError

    def before_step(self) -> None:
        """Average over the processes what `loss` has collected, if anything; called just before the LoRA changes."""

    def after_step(self) -> None:
        """Update what depends on the LoRA, if anything; called just after it has changed."""

    def state(self) -> dict[str, torch.Tensor]:
        """Return the objective's state; checkpoints save these tensors, and --resume restores them."""
        return {}


class Denoising(Objective):
    """The ordinary objective: predict the noise in a picture, or v or x₀, according to the base's prediction type.

    --preserve adds λ · ‖prediction − the base's prediction‖² at another caption c, of the subject's class or without
    the trigger, for the same x_t and t.  So the LoRA learns the subject and changes little else: prior preservation
    (run/dreambooth.py) without class pictures.  It needs two more forward passes, one of them without gradient.
    """

    def begin(self, network: nn.Module, config: TrainConfig) -> None:
        self.network = network

    def loss(self, network: nn.Module, batch: Batch, schedule: Schedule, config: TrainConfig) -> torch.Tensor:
        noise = offset_noise(batch.noise, batch.noise_offset, config.noise_offset)
        more = config.snr_gamma, config.huber_c, config.dream, batch.where
        seen = batch.latents, batch.conditioning, noise, batch.timesteps
        loss = denoising_loss(network, *seen, schedule, *more)  # (batch,)
        if config.preserve:
            noisy = add_noise(batch.latents, noise, batch.timesteps, schedule)
            loss = loss + config.preserve * self.drift(network, batch, noisy)
        return loss

    def drift(self, network: nn.Module, batch: Batch, noisy: torch.Tensor) -> torch.Tensor:
        """Return the mean squared distance from the base's prediction, for each picture, (batch,)."""
        seen, conditioning = (noisy, batch.timesteps), batch.kept.inputs()
        with torch.no_grad(), lora_disabled(self.network):
            wanted = self.network(*seen, **conditioning).sample.float()
        return (network(*seen, **conditioning).sample.float() - wanted).square().mean(dim=(1, 2, 3))
