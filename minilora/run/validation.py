"""The validation loss during a run (data/held_out.py), and the trained weights where it was lowest."""

import json
import sys
from pathlib import Path

import torch
from torch import nn

from .. import sampling
from ..data.examples import Examples
from ..data.folder import Item, read_folder, read_folders, with_trigger
from ..data.held_out import held_out_loss, keep_apart
from ..files.tensors import write_whole
from ..models.base import Base
from ..settings.errors import UserError
from ..settings.train import TrainConfig
from .checkpoint import UNFINISHED
from .ema import ema_weights
from .ranks import BatchPlan, Ranks, mean_over_ranks
from .trained import copied_state, load_trained_state, result_names, save_trained

FIGURES = "validation.json"


def read_pictures(config: TrainConfig, ranks: Ranks) -> tuple[list[Item], list[Item]]:
    """Return the pictures to train on, and the held-out ones of --validation."""
    items, held_out = read_folders(config, quiet=not ranks.is_main), []
    if config.validation and config.validation_share is None:
        held_out = read_folder(config.validation, config, "--validation", quiet=not ranks.is_main)
    if config.caption is not None:
        given = (with_trigger(config.caption, config),)
        if all(item.captions != given for item in (*items, *held_out)):
            raise UserError(
                f"--caption (or --instance-prompt) is {config.caption!r}, and has no effect: all pictures have "
                "their own captions; leave it out, or remove those captions"
            )
    every = (*items, *held_out)
    if config.alpha_mask and not any(item.mask == item.path for item in every):
        raise UserError("--alpha-mask has no effect: no picture has transparent parts")
    if config.outside and not any(item.mask for item in every):
        raise UserError("--outside has no effect: no picture has a mask")
    if config.validation_share is not None:
        return keep_apart(items, config.validation_share, config.seed)
    if ranks.is_main and (both := {item.digest for item in items} & {item.digest for item in held_out}):
        print(f"warning: {len(both)} pictures of --validation {config.validation} are trained on", file=sys.stderr)
    return items, held_out


class Validation:
    """The validation losses of a run by step, and the trained weights at the lowest.

    Checkpoints hold both, and so does the output folder once the run is finished.
    """

    def __init__(
        self, config: TrainConfig, network: nn.Module, base: Base, held_out: Examples, ranks: Ranks, plan: BatchPlan
    ):
        self.config, self.network, self.base, self.held_out = config, network, base, held_out
        self.ranks, self.plan = ranks, plan
        self.file = Path(config.output) / UNFINISHED / FIGURES
        self.pictures = held_out.content()
        self.losses: dict[int, float] = {}
        self.lowest: dict[str, torch.Tensor] = {}  # the trained weights where the loss is lowest, on the CPU

    def state(self) -> tuple[dict, dict[str, torch.Tensor]]:
        """Return the state for a checkpoint: the losses and their pictures, as JSON values; and the tensors."""
        return {"losses": self.losses, "pictures": self.pictures}, self.lowest

    def load(self, saved: dict, lowest: dict[str, torch.Tensor]) -> None:
        """Restore the result of `state`, unless it is for other held-out pictures; then measuring starts over."""
        if saved.get("pictures") == self.pictures:
            self.losses, self.lowest = {int(step): loss for step, loss in saved["losses"].items()}, lowest
            with ema_weights(self.network, lowest):
                self._write(with_lowest=True)

    @property
    def best(self) -> int:
        """The step of the lowest loss, the first of equals."""
        return min(sorted(self.losses), key=self.losses.__getitem__)

    def has_stalled(self) -> bool:
        """Whether the loss has not fallen for --patience measurements."""
        return self.config.patience is not None and sum(s > self.best for s in self.losses) >= self.config.patience

    def measure(self, step: int) -> float:
        """Measure the loss after `step` steps; keep the trained weights if no loss was lower."""
        self.losses[step] = self._loss()
        if is_lowest := self.best == step:
            self.lowest = copied_state(self.network, "cpu")
        self._write(is_lowest)
        return self.losses[step]

    def finish(self) -> None:
        """Print the losses; with --patience, load the trained weights of the lowest into the network."""
        first, last = min(self.losses), max(self.losses)
        words = [f"{self.losses[s]:.4f} {what} step {s}" for what, s in (("at", first), ("lowest at", self.best))]
        self.ranks.say(f"validation {' → '.join(words)} → {self.losses[last]:.4f} at step {last}")
        if self.config.patience:
            load_trained_state(self.network, self.lowest)
            why = f"the loss has not fallen for {self.config.patience} measurements; " if self.has_stalled() else ""
            self.ranks.say(f"patience   {why}the result is that of step {self.best}")

    def _write(self, with_lowest: bool) -> None:
        if self.ranks.is_main:
            if with_lowest:
                save_trained(self.network, self.file.with_name(result_names(self.config.full)[2]))
            figures = {str(s): self.losses[s] for s in sorted(self.losses)}
            about = {"best": self.best, "losses": figures, "pictures": self.pictures}
            write_whole(self.file, (json.dumps(about, indent=2) + "\n").encode())

    def _loss(self) -> float:
        """Return the mean over the pictures, which are divided over the processes."""
        ranks, count = self.ranks, len(self.held_out.items)
        mine = range(ranks.rank, count, ranks.world)
        with sampling.evaluating(self.network), self.base.autocast():
            losses = held_out_loss(self.network, self.held_out, self.base.schedule, mine, self.plan.micro)
        return mean_over_ranks(losses.sum()).item() * ranks.world / count
