"""What a diffusion model is trained to do, as pure functions.

A picture's latent x₀ is mixed with gaussian noise ε; the timestep t says how much of each:

    x_t = √ᾱ_t · x₀ + √(1 − ᾱ_t) · ε                                                         (1)

ᾱ_t falls from almost 1 (t = 0, nearly clean) to almost 0 (t = T − 1, nearly pure noise).  The
U-Net sees x_t, t and the caption, and predicts one of three things, its prediction type:

    epsilon         ε
    v_prediction    v = √ᾱ_t · ε − √(1 − ᾱ_t) · x₀
    sample          x₀

The loss is the squared distance between prediction and target.  Any one of the three gives the
other two through (1), so they differ only in how they weigh the timesteps against each other.

Nothing here draws a random number: noise and timesteps come in as arguments (see data/draws.py).

Sources: Ho et al., "Denoising diffusion probabilistic models", 2020 (1, epsilon); Salimans & Ho,
"Progressive distillation", 2022 (v); Hang et al., "Efficient diffusion training via min-SNR
weighting strategy", 2023.
"""

from dataclasses import dataclass

import torch

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class Schedule:
    """The noise levels of a base and what its U-Net predicts.

    `alphas_cumprod` holds ᾱ_t for t = 0 … T − 1, float32, shape (T,).
    """

    alphas_cumprod: torch.Tensor
    prediction_type: str

    def __post_init__(self):
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type is {self.prediction_type!r}; known are {', '.join(PREDICTION_TYPES)}")

    @classmethod
    def of(cls, scheduler) -> "Schedule":
        """Read the schedule of any diffusers scheduler that has `alphas_cumprod`."""
        return cls(scheduler.alphas_cumprod.float(), scheduler.config.prediction_type)

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def to(self, device: torch.device) -> "Schedule":
        return Schedule(self.alphas_cumprod.to(device), self.prediction_type)

    def alpha_bar(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Return ᾱ_t, shaped to multiply latents."""
        return self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)  # (batch, 1, 1, 1)


@dataclass(frozen=True)
class Conditioning:
    """What the U-Net gets besides x_t and t: the encoded caption; in Stable Diffusion XL two more inputs."""

    text: torch.Tensor  # (batch, tokens, width)
    pooled: torch.Tensor | None = None  # (batch, width'): the whole caption in one vector
    # (batch, 6): height and width of the picture, top and left of the crop, height and width of the crop
    sizes: torch.Tensor | None = None

    def inputs(self) -> dict:
        """Return the keyword arguments for diffusers' U-Nets."""
        if self.pooled is None:
            return {"encoder_hidden_states": self.text}
        more = {"text_embeds": self.pooled, "time_ids": self.sizes}
        return {"encoder_hidden_states": self.text, "added_cond_kwargs": more}


def denoising_loss(
    unet,
    latents: torch.Tensor,
    conditioning: Conditioning,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    schedule: Schedule,
    snr_gamma: float | None = None,
    huber_c: float | None = None,
    dream: float | None = None,
    where: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return one float32 loss per picture, (batch,): the mean squared error of the U-Net's prediction.

    `latents` x₀ and `noise` ε are (batch, channels, h, w), `timesteps` (batch,).  `unet` is called as diffusers' are.
    The optional arguments are those of `min_snr_weight`, `huber` and `dream_noise`; `where`, (batch, 1, h, w), is the
    weight of each place, with mean 1 per picture.
    """
    if dream is not None:
        noise = dream_noise(unet, latents, conditioning, noise, timesteps, schedule, dream)
    noisy = add_noise(latents, noise, timesteps, schedule)
    prediction = unet(noisy, timesteps, **conditioning.inputs()).sample
    wanted = target(latents, noise, timesteps, schedule)
    difference = prediction.float() - wanted.float()
    loss = difference.square() if huber_c is None else huber(difference, huber_c)
    loss = (loss if where is None else loss * where).mean(dim=(1, 2, 3))
    if snr_gamma is not None:
        loss = loss * min_snr_weight(timesteps, schedule, snr_gamma)
    return loss  # (batch,)


def add_noise(latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, schedule: Schedule) -> torch.Tensor:
    """Return x_t of equation (1); latents and noise are (batch, channels, h, w), timesteps (batch,)."""
    alpha_bar = schedule.alpha_bar(timesteps)
    return alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise


def target(latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, schedule: Schedule) -> torch.Tensor:
    """Return what the U-Net should predict, which depends on the prediction type; (batch, channels, h, w)."""
    if schedule.prediction_type == "epsilon":
        return noise
    if schedule.prediction_type == "sample":
        return latents
    alpha_bar = schedule.alpha_bar(timesteps)
    return alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * latents


def clean_and_noise(
    prediction: torch.Tensor, noisy: torch.Tensor, alpha_bar: torch.Tensor, prediction_type: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the latent x̂₀ and the noise ε̂ that a prediction at x_t implies; all (batch, channels, h, w).

    It is the inverse of `add_noise` and `target`.  `alpha_bar` is ᾱ_t, a number or shaped to multiply latents.
    """
    signal, spread = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    if prediction_type == "epsilon":
        return (noisy - spread * prediction) / signal, prediction
    if prediction_type == "sample":
        return prediction, (noisy - signal * prediction) / spread
    return signal * noisy - spread * prediction, signal * prediction + spread * noisy


def offset_noise(noise: torch.Tensor, offset: torch.Tensor, strength: float) -> torch.Tensor:
    """Add one constant per picture and channel to the noise, so that overall brightness is learnt, too.

    `noise` is (batch, channels, h, w), `offset` is gaussian, (batch, channels, 1, 1).
    Source: Guttenberg, "Diffusion with offset noise", 2023.
    """
    return noise + strength * offset


def min_snr_weight(timesteps: torch.Tensor, schedule: Schedule, gamma: float) -> torch.Tensor:
    """Return a weight for each picture's loss, so that the error in x₀ is weighted by min(SNR, γ); (batch,).

    The signal-to-noise ratio is SNR = ᾱ / (1 − ᾱ).  The formula differs by prediction type, so that the error in x₀
    has the same weight for all.  The formula for epsilon gives 1 for an SNR of 0, not 0 / 0.
    """
    alpha_bar = schedule.alphas_cumprod[timesteps]
    snr = alpha_bar / (1 - alpha_bar)  # (batch,)
    if schedule.prediction_type == "epsilon":
        return (gamma / snr).clamp(max=1)
    if schedule.prediction_type == "v_prediction":
        return snr.clamp(max=gamma) / (snr + 1)
    return snr.clamp(max=gamma)


def pseudo_huber(difference: torch.Tensor, c: float) -> torch.Tensor:
    """Return √(z² + c²) − c for each number z: about |z| if |z| is far above c, and about z² / 2c if far below.

    Source: Charbonnier et al., "Deterministic edge-preserving regularization in computed imaging", 1997.
    """
    return (difference.square() + c**2).sqrt() - c


def huber(difference: torch.Tensor, c: float) -> torch.Tensor:
    """Return 2c · (√(z² + c²) − c): about z² for small differences, and 2c · |z| for large ones.

    Unusual pictures count less, and learning rates for the squared error still fit.  diffusers and kohya use the same
    factor 2c.
    """
    return 2 * c * pseudo_huber(difference, c)


@torch.no_grad()
def dream_noise(
    unet,
    latents: torch.Tensor,
    conditioning: Conditioning,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    schedule: Schedule,
    preservation: float,
) -> torch.Tensor:
    """Return the noise plus λ times the U-Net's error in it, ε + λ (ε − ε̂); (batch, channels, h, w).

    When drawing, each step starts from the errors of the step before; plain training never shows these to the U-Net.
    λ = (√(1 − ᾱ_t))^p; a larger p = `preservation` keeps more details.  This costs one more forward pass.
    Source: Zhou et al., "DREAM: diffusion rectification and estimation-adaptive models", 2023.
    """
    noisy, alpha_bar = add_noise(latents, noise, timesteps, schedule), schedule.alpha_bar(timesteps)
    prediction = unet(noisy, timesteps, **conditioning.inputs()).sample.float()
    _, predicted_noise = clean_and_noise(prediction, noisy, alpha_bar, schedule.prediction_type)
    return noise + (1 - alpha_bar).sqrt() ** preservation * (noise - predicted_noise)
