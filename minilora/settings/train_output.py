"""The settings of memory, speed and results; what is learnt depends on the precision only."""

import re
from dataclasses import dataclass
from functools import partial

from . import shared
from .setting import ABOVE_0, AT_LEAST_1, ByBase, Settings, is_installed, setting
from .shared import OUTPUT, SPEED, TIMEOUT

of_speed = partial(setting, group=SPEED, in_identity=False)
of_output = partial(setting, group=OUTPUT, in_identity=False)


@dataclass(frozen=True)
class OutputSettings(Settings):
    """How the work is done, and what it leaves."""

    precision: str = shared.precision()
    micro_batch_size: int | None = of_speed(
        None,
        "pictures per forward pass and process; gradients accumulate over the batch; if not given, all at once",
        metavar="PICTURES",
        within=AT_LEAST_1,
    )
    gradient_checkpointing: bool = of_speed(
        False, "compute activations twice instead of keeping them: less memory, slower", by_recipe=True
    )
    compile: bool = shared.compile_unet(in_identity=False)
    timeout: float = of_speed(
        TIMEOUT,
        "minutes to wait for another process, before the run ends with a message that names it",
        metavar="MINUTES",
        within=ABOVE_0,
    )

    output: str | None = of_output(
        None, "folder of the results; if not given, out/<name of the data folder>", metavar="FOLDER", basic=True
    )
    preview: bool = of_output(
        False,
        "write preview.png into the output folder, the pictures and captions as training will see them, and stop",
        basic=True,
    )
    resume: bool = of_output(False, "go on from the newest checkpoint in the output folder", basic=True)
    also: tuple[str, ...] = of_output(
        (), "also write the LoRA in these dialects: kohya (for A1111 and ComfyUI), peft", choices=("kohya", "peft")
    )
    checkpoint_every: int = of_output(
        ByBase(500, 100), "steps between two checkpoints", metavar="STEPS", within=AT_LEAST_1
    )
    checkpoints_kept: int = of_output(
        1, "number of checkpoints to keep, the newest ones", metavar="N", within=AT_LEAST_1
    )
    sample_prompt: tuple[str, ...] = of_output(
        (),
        "prompt to draw during training; may be repeated",
        repeat=True,
        needs=("sample_every", "how often it is drawn"),
    )
    sample_every: int | None = of_output(
        None,
        "steps between two drawings of --sample-prompt",
        metavar="STEPS",
        needs=("sample_prompt", "what to draw"),
        within=AT_LEAST_1,
    )
    sample_average: bool = of_output(
        False, "draw with the average of --ema, not with the LoRA as it is", needs=("ema", "which keeps the average")
    )
    push_to_hub: str | None = of_output(
        None, "repository of the Hugging Face hub to push the results to", metavar="OWNER/NAME"
    )
    wandb: str | None = of_output(None, "project of Weights & Biases to log to as well", metavar="PROJECT")

    def problems(self) -> list[str]:
        wrong = super().problems()
        if self.push_to_hub is not None and not re.fullmatch("[^/]+/[^/]+", self.push_to_hub):
            wrong.append(f"--push-to-hub is {self.push_to_hub!r}; it takes OWNER/NAME, as the hub calls a repository")
        if self.wandb is not None and not is_installed("wandb"):
            wrong.append("--wandb needs the package wandb; type: pip install -e '.[wandb]'")
        return wrong
