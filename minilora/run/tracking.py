"""A run's numbers and pictures, in TensorBoard and, with `train.py --wandb PROJECT`, in Weights & Biases, too."""

import dataclasses
import hashlib
import json
import threading
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from ..data.sheet import save_picture
from ..settings.errors import UserError, in_one_line
from .ranks import decided_by_main
from .samples import draw_prompts


class Log:
    """Numbers and pictures of a run, for TensorBoard and --wandb; only the main process writes them."""

    def __init__(self, run, first_step: int):
        self.run, self.excepthook = run, threading.excepthook
        folder, purged = str(run.output / "tensorboard"), first_step + 1
        # (TensorBoard shows numbers that are at most two seconds old.)
        self.writer = SummaryWriter(folder, purge_step=purged, flush_secs=2) if run.ranks.is_main else None
        self.wandb: Any = None  # its run
        if run.config.wandb:
            decided_by_main(lambda: self._join_wandb(first_step > 0))

    def _join_wandb(self, resumed: bool) -> None:
        """Begin a wandb run; its id is a hash of the identity, so a resumed run continues in the same one."""
        import wandb

        config, identity = self.run.config, json.dumps(self.run.identity, sort_keys=True)
        try:
            self.wandb = wandb.init(
                project=config.wandb,
                id=hashlib.sha256(identity.encode()).hexdigest()[:16],
                resume="allow" if resumed else None,  # None: a run under this id is replaced
                config=dataclasses.asdict(config),
                dir=config.output,
                settings=wandb.Settings(console="off"),  # the terminal stays ours
            )
        except wandb.Error as error:  # it refuses, or cannot be reached
            why = in_one_line(error)
            raise UserError(f"--wandb {config.wandb}: {why} (run `wandb login`, or set WANDB_MODE=offline)") from error

    def __enter__(self) -> "Log":
        threading.excepthook = self._print_unless_disk_is_full
        return self

    def _print_unless_disk_is_full(self, about: threading.ExceptHookArgs) -> None:
        """Print an error that ended a thread, unless the disk is full, which the next call to the thread raises."""
        if not issubclass(about.exc_type, OSError):
            self.excepthook(about)

    def __exit__(self, kind: type | None, *error) -> None:
        try:
            if self.writer:
                self.writer.close()
        except OSError:
            if kind is None:  # else another error has already ended the run
                raise
        finally:
            threading.excepthook = self.excepthook
            if self.wandb:
                self.wandb.finish(exit_code=1 if kind else 0)

    def numbers(self, step: int, **values: float) -> None:
        if self.writer:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(values, step=step)

    def samples(self, step: int) -> None:
        """Draw every --sample-prompt with the current LoRA."""
        if self.writer:
            run, prompts = self.run, self.run.config.sample_prompt
            with run.as_drawn():
                sheet = draw_prompts(run.base, prompts, run.examples.resolution, run.drawing(prompts))
            save_picture(sheet, run.output / "samples" / f"step-{step:08d}.png")
            self.writer.add_image("samples", np.array(sheet), step, dataformats="HWC")
            if self.wandb:
                from wandb import Image

                self.wandb.log({"samples": Image(sheet)}, step=step)
            idle = () if run.config.train_text_encoder else ("text_encoder", "text_encoder_2")
            run.base.release("pipeline", "vae", *idle)  # training needs the memory
