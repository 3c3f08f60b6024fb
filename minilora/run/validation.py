"""The validation loss during a run (data/held_out.py), and what was trained at the step where it was lowest."""

import json
import sys
from pathlib import Path

from .. import sampling
from ..data.folder import Item, read_folder, read_folders, with_trigger
from ..data.held_out import held_out_loss, keep_apart
from ..files.tensors import write_whole
from ..settings.errors import UserError
from ..settings.train import TrainConfig
from .checkpoint import UNFINISHED
from .ranks import Ranks, decided_by_main, mean_over_ranks
from .trained import result_names, save_trained

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
                "captions of their own; leave it out, or remove those captions"
            )
    every = (*items, *held_out)
    if config.alpha_mask and not any(item.mask == item.path for item in every):
        raise UserError("--alpha-mask has no effect: no picture has an alpha channel in which something is hidden")
    if config.outside and not any(item.mask for item in every):
        raise UserError("--outside has no effect: no picture has a mask")
    if config.validation_share is not None:
        return keep_apart(items, config.validation_share, config.seed)
    if ranks.is_main and (both := {item.digest for item in items} & {item.digest for item in held_out}):
        print(f"warning: {len(both)} pictures of --validation {config.validation} are trained on", file=sys.stderr)
    return items, held_out


class Validation:
    """The losses of a run by step, and the LoRA of the lowest; the output folder has them once the run is finished."""

    def __init__(self, run, first_step: int):
        self.run, self.file = run, Path(run.config.output) / UNFINISHED / FIGURES
        self.pictures = run.held_out.content()
        kept = decided_by_main(self._read) if first_step else {}
        # The losses of the steps before are valid for any run with the same identity and the same held-out pictures.
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
        """The step of the lowest loss, the first of equals."""
        return min(sorted(self.losses), key=self.losses.__getitem__)

    def measure(self, step: int) -> float:
        """Return the loss after `step` steps; keep the LoRA if there was no lower one."""
        self.losses[step] = self._loss()
        if self.run.ranks.is_main:
            if self.best == step:  # the LoRA first: after a stop in between, --resume measures this step again
                save_trained(self.run.network, self.file.with_name(result_names(self.run.config.full)[2]))
            figures = {str(s): self.losses[s] for s in sorted(self.losses)}
            about = {"best": self.best, "losses": figures, "pictures": self.pictures}
            write_whole(self.file, (json.dumps(about, indent=2) + "\n").encode())
        return self.losses[step]

    def _loss(self) -> float:
        """Return the mean over the pictures, which are divided over the processes."""
        run, ranks, count = self.run, self.run.ranks, len(self.run.held_out.items)
        mine = range(ranks.rank, count, ranks.world)
        with sampling.evaluating(run.network), run.base.autocast():
            losses = held_out_loss(run.network, run.held_out, run.base.schedule, mine, run.plan.micro)
        return mean_over_ranks(losses.sum()).item() * ranks.world / count

    def __str__(self) -> str:
        first, last = min(self.losses), max(self.losses)
        words = [f"{self.losses[s]:.4f} {what} step {s}" for what, s in (("at", first), ("lowest at", self.best))]
        return f"{' → '.join(words)} → {self.losses[last]:.4f} at step {last}"
