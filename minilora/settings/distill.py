"""The settings of minilora.apps.distill."""

import math
from dataclasses import dataclass

from . import shared
from .base import BaseSettings
from .setting import ABOVE_0, AT_LEAST_1, SEED, ByBase
from .shared import of_data, of_lora, of_output, of_training

# These objectives need more than the attention layers, so all kinds of layers are adapted.
ALL_LAYERS = (
    "attention",
    *("proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "time_emb_proj"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"),
)


@dataclass(frozen=True)
class DistillConfig(BaseSettings):
    """Every setting of minilora.apps.distill."""

    examples = (
        "python -m minilora.apps.distill",
        "python -m minilora.apps.distill --objective smooth --output out/smooth",
    )

    objective: str = of_training(
        "lcm",
        "what to learn: drawing in four steps (lcm), or pictures that change evenly with their noise (smooth)",
        choices=("lcm", "smooth"),
        basic=True,
    )
    data: str | None = of_data(
        None, "folder of pictures with captions; if not given, the base draws some", "FOLDER", basic=True
    )
    captions: str | None = of_data(
        None, "file of captions to draw, one per line; if not given, those of the bundled base", "FILE", basic=True
    )
    model: str | None = shared.model()
    train_steps: int | None = of_training(
        None, "optimizer steps; if not given, 500 for lcm and 150 for smooth", "STEPS", AT_LEAST_1, basic=True
    )
    output: str | None = of_output(None, "folder of the results; if not given, out/<objective>", "FOLDER", basic=True)

    pictures: int = of_data(320, "number of training pictures that the base draws", "PICTURES", AT_LEAST_1)
    guidance: tuple[float, ...] = of_training(
        ByBase((5.0, 10.0), (2.5, 3.5)),
        "range of guidance that lcm learns to replace; training pictures are drawn with its middle",
        "LOWEST,HIGHEST",
    )
    skip: int = of_training(
        ByBase(1, 5), "how many of 50 levels one step of lcm's teacher goes down", "LEVELS", AT_LEAST_1
    )
    weight: float = of_training(1.0, "weight of the variation in smooth's loss", "WEIGHT", ABOVE_0)
    batch_size: int = of_training(8, "pictures per optimizer step", "PICTURES", AT_LEAST_1)
    learning_rate: float = of_training(
        ByBase(1e-4, 1e-3), "highest learning rate, from which it falls to 0", "RATE", ABOVE_0
    )
    seed: int = of_training(0, "seed of every random draw", "SEED", SEED)
    rank: int = of_lora(ByBase(64, 32), "rank of the LoRA", "RANK", AT_LEAST_1)
    targets: tuple[str, ...] = of_lora(
        ALL_LAYERS, "layers to adapt, by name endings; if not given, all kinds", "LAYERS"
    )
    precision: str = shared.precision()

    @property
    def middle_guidance(self) -> float:
        return sum(self.guidance) / 2

    @classmethod
    def following(cls, values: dict) -> dict:
        objective = values.get("objective", "lcm")
        steps = {"lcm": 500, "smooth": 150}.get(objective)
        return super().following(values) | {"output": f"out/{objective}", "train_steps": steps}

    def problems(self, given: set[str]) -> list[str]:
        wrong = []
        if len(self.guidance) != 2 or not 1 <= self.guidance[0] <= self.guidance[-1] < math.inf:
            typed = ",".join(map(str, self.guidance))
            wrong.append(f"--guidance is {typed}; it takes the lowest, at least 1, and the highest number")
        other = {"lcm": "weight", "smooth": "skip"}.get(self.objective)
        if other in given:
            wrong.append(f"--{other} has no effect on --objective {self.objective}")
        return wrong
