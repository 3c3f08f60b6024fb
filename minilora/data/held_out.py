"""Held-out pictures, which are not trained on, and the loss on them: if it rises again, the LoRA is overfitting.

Each picture always gets the same noise at the same timesteps, so two measurements differ only by the network:

    (1 / n·T) Σ_pictures Σ_t loss(x₀, ε, t)        T timesteps, evenly spaced; ε fixed per picture and t

The loss is always the plain squared error, even if the training loss is another, so that runs can be compared.  If a
picture has a mask, only its white part counts.
"""

from collections.abc import Iterable, Sequence

import torch

from ..diffusion import Schedule, denoising_loss
from ..settings.errors import UserError
from . import draws
from .examples import Examples
from .folder import Item

TIMESTEPS = 8  # per picture


def keep_apart(items: Sequence[Item], share: float, seed: int) -> tuple[list[Item], list[Item]]:
    """Split pictures into those to train on and the held-out ones: a share of them, at least one.

    The seed and a picture's content give it a random number, and the pictures with the lowest are held out.  So names
    and folders do not matter, and copies of a picture stay together.  Raises UserError if none is left to train on.
    """
    drawn = {item.digest: draws.uniform(seed, f"kept from training {item.digest}", 0) for item in items}
    held_out = dict.fromkeys(sorted(drawn, key=drawn.get)[: max(1, round(share * len(drawn)))])
    if len(held_out) == len(drawn):
        raise UserError(f"--validation {share:g}: of {len(drawn)} different pictures that leaves none to train on")
    first = {item.digest: item for item in reversed(items)}
    return [item for item in items if item.digest not in held_out], [first[digest] for digest in held_out]


@torch.no_grad()
def held_out_loss(
    network, examples: Examples, schedule: Schedule, numbers: Iterable[int], at_once: int = TIMESTEPS
) -> torch.Tensor:
    """Return each picture's mean loss over the timesteps, (pictures,), float64, on the CPU.

    `numbers` selects the pictures.  `network` is called like diffusers' U-Nets, with `at_once` timesteps per pass.
    """
    spaced = {n: len(schedule) * (2 * n + 1) // (2 * TIMESTEPS) for n in range(TIMESTEPS)}
    device, means = schedule.alphas_cumprod.device, []
    for number in numbers:
        losses = []
        for start in range(0, TIMESTEPS, at_once):
            some = {n: t for n, t in spaced.items() if start <= n < start + at_once}
            batch = examples.fixed_batch(number, some, device)
            seen = batch.latents, batch.conditioning, batch.noise, batch.timesteps
            losses += denoising_loss(network, *seen, schedule, where=batch.where).tolist()
        means.append(sum(losses) / TIMESTEPS)
    return torch.tensor(means, dtype=torch.float64)
