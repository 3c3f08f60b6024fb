"""Latent consistency distillation: a LoRA that draws in a few steps what the base draws in fifty.

Denoising without randomness is a path: x_T, …, x_t, …, x_0 (ddim.py).  A consistency function f(x_t, t) maps every
point of a path to its end, x_0.  So f has the same value everywhere on a path, and it can be learnt from pairs of
points.  The first is at t, one of N levels; a solver computes the second from it, at t′, k levels below.

    x_t  = √ᾱ_t · x₀ + √(1 − ᾱ_t) · ε                     a picture with noise, diffusion.py (1)
    x_t′ = ddim_step(x_t, teacher_g(x_t, t), ᾱ_t, ᾱ_t′)    one step of the teacher
    loss = d(f_θ(x_t, t), f_θ⁻(x_t′, t′))

The teacher is the same U-Net with its LoRA switched off.  Its guidance g is drawn at random for each picture.  So f
learns guided pictures, and drawing with f needs no guidance.  (The paper writes w for g − 1.)  θ⁻ is a moving average
of θ: θ⁻ ← μ θ⁻ + (1 − μ) θ.  d is the pseudo-Huber distance √(z² + c²) − c, about |z|, for each number z.

f must satisfy f(x, 0) = x.  So it is built from the U-Net's x̂₀ as

    f(x, t) = c_skip(t) · x + c_out(t) · x̂₀(x, t)
    c_skip(t) = σ² / ((10 t)² + σ²)        c_out(t) = 10 t / √((10 t)² + σ²)        σ = 0.5

diffusers' LCMScheduler draws with the same f: f, new noise, f, …, at a few of the N levels.

Sources: Luo et al., "Latent consistency models", 2023, and "LCM-LoRA: a universal Stable-Diffusion
acceleration module", 2023; Song et al., "Consistency models", 2023.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call

from ..data import draws
from ..data.examples import Batch
from ..diffusion import Schedule, add_noise, clean_and_noise, pseudo_huber
from ..lora import lora_disabled
from ..models.base import Base
from ..run.objective import Objective
from ..settings.train import TrainConfig
from .ddim import ddim_step, guided

SIGMA = 0.5  # about the spread of the pictures' latents
TIME_SCALING = 10.0
HUBER = 1e-3  # c: smaller differences count squared, larger ones linearly


@dataclass
class LatentConsistency(Objective):
    """Train f to have the same value at neighbouring levels of the teacher's path.

    `guidance` is the range of g.  `skip` is k: a larger one learns faster but less exactly.  `levels` is N, which
    LCMScheduler calls original_inference_steps, and `decay` is μ.
    """

    guidance: tuple[float, ...]  # the lowest and the highest
    skip: int = 1
    levels: int = 50
    decay: float = 0.95

    def begin(self, unet: nn.Module, config: TrainConfig) -> None:
        self.unet = unet  # `loss` may get it inside a wrapper that averages gradients
        device = next(unet.parameters()).device
        base = Base.of(config, device, loras=config.base_lora)
        self.empty = base.encode_text("").to(device)  # (tokens, width)
        self.target = {
            name: parameter.detach().clone() for name, parameter in unet.named_parameters() if parameter.requires_grad
        }  # θ⁻

    def loss(self, unet: nn.Module, batch: Batch, schedule: Schedule, config: TrainConfig) -> torch.Tensor:
        t, t_next = self.neighbours(batch.positions, schedule, config.seed)  # (batch,) each
        x, text = add_noise(batch.latents, batch.noise, t, schedule), batch.conditioning.text
        ours = consistency(unet(x, t, text).sample, x, t, schedule)  # (batch, channels, h, w)
        with torch.no_grad():
            with lora_disabled(self.unet):
                guidance = self.drawn_guidance(batch.positions, config.seed).to(x.device)
                prediction = guided(self.unet, text, self.empty, guidance)(x, t).float()
            here, there = schedule.alpha_bar(t), schedule.alpha_bar(t_next)
            x_next = ddim_step(x, prediction, here, there, schedule.prediction_type)
            prediction = functional_call(self.unet, self.target, (x_next, t_next, text)).sample
            wanted = consistency(prediction, x_next, t_next, schedule)
        return (pseudo_huber(ours - wanted, HUBER) * batch.where).mean(dim=(1, 2, 3))  # (batch,)

    @torch.no_grad()
    def after_step(self) -> None:
        for name, parameter in self.unet.named_parameters():
            if name in self.target:
                self.target[name].lerp_(parameter, 1 - self.decay)

    def state(self) -> dict[str, torch.Tensor]:
        return self.target

    def neighbours(
        self, positions: tuple[int, ...], schedule: Schedule, seed: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a timestep t for each position, and t′, k levels below it or 0; (batch,) each."""
        apart = len(schedule) // self.levels
        which = [draws.integer(seed, "level", position, 1, self.levels + 1) for position in positions]
        t = apart * torch.tensor(which, device=schedule.alphas_cumprod.device) - 1
        return t, (t - self.skip * apart).clamp(min=0)

    def drawn_guidance(self, positions: tuple[int, ...], seed: int) -> torch.Tensor:
        """Return the guidance at each position, (batch, 1, 1, 1)."""
        low, high = self.guidance
        drawn = [low + (high - low) * draws.uniform(seed, "guidance", position) for position in positions]
        return torch.tensor(drawn).view(-1, 1, 1, 1)


def boundary_scalings(timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return c_skip and c_out, shaped to multiply latents, (batch, 1, 1, 1)."""
    scaled = TIME_SCALING * timesteps.float().view(-1, 1, 1, 1)
    return SIGMA**2 / (scaled**2 + SIGMA**2), scaled / (scaled**2 + SIGMA**2).sqrt()


def consistency(prediction: torch.Tensor, x: torch.Tensor, timesteps: torch.Tensor, schedule: Schedule) -> torch.Tensor:
    """Return f(x, t), given the U-Net's prediction at x and t; (batch, channels, h, w), float32."""
    clean, _ = clean_and_noise(prediction.float(), x, schedule.alpha_bar(timesteps), schedule.prediction_type)
    c_skip, c_out = boundary_scalings(timesteps)
    return c_skip * x + c_out * clean
