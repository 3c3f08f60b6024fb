"""The loss on pictures that are not trained on: where it rises again, the LoRA learns its pictures by heart.

Each picture of --validation is looked at with the same noise at the same timesteps every time, so what
changes between two figures is the LoRA and nothing else:

    (1 / n·T) Σ_pictures Σ_t loss(x₀, ε, t)        T timesteps, evenly spaced; ε fixed per picture and t

The loss is the plain squared error, whatever training makes small, so that runs can be compared.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from .. import sampling
from ..data import draws
from ..data.folder import Item, read_folder, read_folders, with_trigger
from ..files.network import save_lora
from ..files.tensors import write_whole
from ..settings.errors import UserError
from ..settings.train import TrainConfig
from .checkpoint import UNFINISHED
from .objective import Denoising
from .ranks import Ranks, decided_by_main, mean_over_ranks

TIMESTEPS = 8  # at which each picture is looked at
FIGURES, BEST = "validation.json", "pytorch_lora_weights_best.safetensors"


def read_pictures(config: TrainConfig, ranks: Ranks) -> tuple[list[Item], list[Item]]:
    """Return the pictures that are trained on, and those of --validation."""
    items, held_out = read_folders(config), []
    if config.validation and config.validation_share is None:
        held_out = read_folder(config.validation, config, "--validation")
    if config.caption is not None:
        given = (with_trigger(config.caption, config),)
        if all(item.captions != given for item in (*items, *held_out)):
            raise UserError(
                f"--caption (or --instance-prompt) is {config.caption!r}, and has no effect: all pictures have "
                "captions of their own; go without it, or take those away"
            )
    if config.validation_share is not None:
        return keep_apart(items, config.validation_share, config.seed)
    if ranks.is_main and (both := {item.digest for item in items} & {item.digest for item in held_out}):
        print(f"warning: {len(both)} pictures of --validation {config.validation} are trained on", file=sys.stderr)
    return items, held_out


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


class Validation:
    """The figures of a run by step, and the LoRA of the lowest; in the output folder once the run is finished."""

    def __init__(self, run, first_step: int):
        self.run, self.file = run, Path(run.config.output) / UNFINISHED / FIGURES
        self.pictures = run.held_out.content()
        kept = decided_by_main(self._read) if first_step else {}
        # A run is a function of its identity, so its figures hold wherever it goes on from; those of
        # other pictures do not.
        self.losses = {int(step): loss for step, loss in kept.get("losses", {}).items()}

    def _read(self) -> dict:
        file = self.file if self.file.exists() else Path(self.run.config.output) / FIGURES  # of a run that was finished
        try:
            kept = json.loads(file.read_text())
        except (OSError, ValueError):
            return {}
        return kept if kept.get("pictures") == self.pictures else {}

    @property
    def best(self) -> int:
        """The step of the lowest figure, the first of equals."""
        return min(sorted(self.losses), key=self.losses.__getitem__)

    def measure(self, step: int) -> float:
        """Return the loss after `step` steps; keep the LoRA if there was no lower one."""
        self.losses[step] = self._loss()
        if self.run.ranks.is_main:
            if self.best == step:  # the LoRA first: of a stop in between, --resume measures this step again
                save_lora(self.run.network, self.file.with_name(BEST))
            figures = {str(s): self.losses[s] for s in sorted(self.losses)}
            about = {"best": self.best, "losses": figures, "pictures": self.pictures}
            write_whole(self.file, (json.dumps(about, indent=2) + "\n").encode())
        return self.losses[step]

    @torch.no_grad()
    def _loss(self) -> float:
        """Return the mean over the pictures and timesteps; the processes share the pictures."""
        run, network, schedule = self.run, self.run.network, self.run.base.schedule
        device, plain = run.ranks.device, replace(run.config, snr_gamma=None, huber_c=None, dream=None)
        timesteps = [len(schedule) * (2 * n + 1) // (2 * TIMESTEPS) for n in range(TIMESTEPS)]
        count, loss_sum = len(run.held_out.items), torch.zeros((), dtype=torch.float64, device=device)
        with sampling.evaluating(network), run.base.autocast():
            for number in range(run.ranks.rank, count, run.ranks.world):
                for start in range(0, TIMESTEPS, run.plan.micro):
                    some = range(start, min(start + run.plan.micro, TIMESTEPS))
                    batch = run.held_out.fixed_batch(number, {n: timesteps[n] for n in some}, device)
                    loss_sum += Denoising().loss(network, batch, schedule, plain).double().sum()
        return mean_over_ranks(loss_sum).item() * run.ranks.world / (count * TIMESTEPS)

    def __str__(self) -> str:
        first, last = min(self.losses), max(self.losses)
        words = [f"{self.losses[s]:.4f} {what} step {s}" for what, s in (("at", first), ("lowest at", self.best))]
        return f"{' → '.join(words)} → {self.losses[last]:.4f} at step {last}"
