"""The settings of memory, speed and output; only one of them, the precision, changes what is learnt."""

import re
from dataclasses import dataclass

from . import shared
from .setting import ABOVE_0, AT_LEAST_1, ByBase, Settings, is_installed
from .shared import TIMEOUT, of_output, of_speed


@dataclass(frozen=True)
class OutputSettings(Settings):
    """How the work is done, and which files it writes."""

    precision: str = shared.precision()
    micro_batch_size: int | None = of_speed(
        None,
        "pictures per forward pass and process; gradients accumulate over the batch; if not given, all at once",
        "PICTURES",
        AT_LEAST_1,
    )
    gradient_checkpointing: bool = of_speed(
        False, "compute activations twice instead of keeping them: less memory, slower", by_recipe=True
    )
    compile: bool = shared.compile_unet()
    timeout: float = of_speed(
        TIMEOUT,
        "minutes to wait for another process before the run ends with a message that names it",
        "MINUTES",
        ABOVE_0,
    )

    output: str | None = of_output(
        None, "folder of the results; if not given, out/<name of the data folder>", "FOLDER", basic=True
    )
    preview: bool = of_output(
        False,
        "only write preview.png into the output folder: the pictures and captions as training will see them",
        basic=True,
    )
    resume: bool = of_output(False, "continue from the newest checkpoint in the output folder", basic=True)
    also: tuple[str, ...] = of_output(
        (), "also write the LoRA in these dialects: kohya (for A1111 and ComfyUI), peft", choices=("kohya", "peft")
    )
    checkpoint_every: int = of_output(ByBase(500, 100), "steps between two checkpoints", "STEPS", AT_LEAST_1)
    checkpoints_kept: int = of_output(1, "number of checkpoints to keep, the newest ones", "N", AT_LEAST_1)
    sample_prompt: tuple[str, ...] = of_output(
        (),
        "prompt to draw during training; may be repeated",
        repeat=True,
        needs=("sample_every", "how often it is drawn"),
    )
    sample_every: int | None = of_output(
        None,
        "steps between two rounds of samples from --sample-prompt",
        "STEPS",
        AT_LEAST_1,
        needs=("sample_prompt", "what to draw"),
    )
    sample_average: bool = of_output(
        False, "draw samples with the moving average of --ema", needs=("ema", "which computes the average")
    )
    push_to_hub: str | None = of_output(None, "Hugging Face hub repository to push the results to", "OWNER/NAME")
    wandb: str | None = of_output(None, "Weights & Biases project to also log to", "PROJECT")

    def problems(self, given: set[str]) -> list[str]:
        wrong = super().problems(given)
        if self.push_to_hub is not None and not re.fullmatch("[^/]+/[^/]+", self.push_to_hub):
            wrong.append(f"--push-to-hub is {self.push_to_hub!r}; it takes OWNER/NAME, the name of a repository")
        if self.wandb is not None and not is_installed("wandb"):
            wrong.append("--wandb needs the package wandb; run: pip install -e '.[wandb]'")
        return wrong
