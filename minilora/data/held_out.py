"""Held-out pictures, which are not trained on, and the loss on them: where it rises again, a LoRA learns by heart.

Each picture is looked at with the same noise at the same timesteps every time, so what changes between two figures
is the network and nothing else:

    (1 / n·T) Σ_pictures Σ_t loss(x₀, ε, t)        T timesteps, evenly spaced; ε fixed per picture and t

The loss is the plain squared error, whatever training makes small, so that runs can be compared.
"""

from collections.abc import Iterable, Sequence

import torch

from ..diffusion import Schedule, denoising_loss
from ..settings.errors import UserError
from . import draws
from .examples import Examples
from .folder import Item

TIMESTEPS = 8  # at which each picture is looked at


def keep_apart(items: Sequence[Item], share: float, seed: int) -> tuple[list[Item], list[Item]]:
    """Return the pictures to train on, and a share of them, at least one, to keep from training.

    Each picture draws a number by the seed and its own content, and the lowest are kept: so it does not matter
    where they lie, and a picture that comes twice stays on one side.  Raises UserError if that leaves none.
    """
    drawn = {item.digest: draws.uniform(seed, f"kept from training {item.digest}", 0) for item in items}
    kept = dict.fromkeys(sorted(drawn, key=drawn.get)[: max(1, round(share * len(drawn)))])
    if len(kept) == len(drawn):
        raise UserError(f"--validation {share:g}: of {len(drawn)} different pictures that leaves none to train on")
    first = {item.digest: item for item in reversed(items)}
    return [item for item in items if item.digest not in kept], [first[digest] for digest in kept]


@torch.no_grad()
def held_out_loss(
    network, examples: Examples, schedule: Schedule, numbers: Iterable[int], at_once: int = TIMESTEPS
) -> torch.Tensor:
    """Return the mean loss over the timesteps of each picture of those numbers; (numbers,), float64, on the CPU.

    `network` predicts as diffusers' U-Nets do, and sees a picture at `at_once` timesteps in one pass.
    """
    spaced = {n: len(schedule) * (2 * n + 1) // (2 * TIMESTEPS) for n in range(TIMESTEPS)}
    device, means = schedule.alphas_cumprod.device, []
    for number in numbers:
        losses = []
        for start in range(0, TIMESTEPS, at_once):
            some = {n: t for n, t in spaced.items() if start <= n < start + at_once}
            batch = examples.fixed_batch(number, some, device)
            seen = batch.latents, batch.conditioning, batch.noise, batch.timesteps
            losses += denoising_loss(network, *seen, schedule).tolist()
        means.append(sum(losses) / TIMESTEPS)
    return torch.tensor(means, dtype=torch.float64)
