"""The settings of minilora.apps.morph, declared once."""

from dataclasses import dataclass
from pathlib import Path
from string import ascii_lowercase

from . import shared
from .base import BaseSettings
from .setting import AT_LEAST_1, SHARE, Within
from .shared import folder_for, of_lora, of_output, of_pictures


@dataclass(frozen=True)
class MorphConfig(BaseSettings):
    """Every setting of minilora.apps.morph."""

    usage = "A B [C …] --prompt TEXT …"
    examples = (
        "python -m minilora.apps.morph a.png b.png --prompt apple --prompt pear",
        "python -m minilora.apps.morph a.png b.png c.png \\\n"
        "      --prompt apple --prompt pear --prompt lemon --output morph.webp",
    )

    pictures: tuple[str, ...] = of_pictures((), "the pictures, two or more", "A B C …", basic=True, bare=True)
    prompt: tuple[str, ...] = of_pictures(
        (), "what a picture shows; once for each picture, in their order", repeat=True, basic=True
    )
    frames: int = of_pictures(
        17, "number of frames from one picture to the next, including the two", "FRAMES", Within(2), basic=True
    )
    lora: tuple[str, ...] = of_lora(
        (),
        "LoRA of a picture; once for each picture, in their order; if not given, they are trained",
        "LORA",
        repeat=True,
        basic=True,
    )
    model: str | None = shared.model()
    output: str | None = of_output(
        None,
        "animation to write (.gif, .webp, .png), or folder for the frames; if not given, morph.gif beside the LoRAs",
        "FILE|FOLDER",
        basic=True,
    )

    steps: int = of_pictures(50, "DDIM steps from a picture to its noise, and again back", "STEPS", AT_LEAST_1)
    attention: float = of_pictures(0.6, "share of the steps, 0 to 1, that mix self-attention", "SHARE", SHARE)
    adain: bool = of_pictures(True, "do not adjust the noise to a mean and deviation between those of the two ends")
    even: bool = of_pictures(True, "do not space the frames so that neighbours look equally different")
    rank: int = of_lora(16, "rank of the trained LoRAs", "RANK", AT_LEAST_1)
    train_steps: int = of_lora(200, "optimizer steps for each LoRA", "STEPS", AT_LEAST_1)
    precision: str = shared.precision()

    @property
    def folder(self) -> Path:
        """The folder for the LoRAs, the sheet and the figures."""
        return folder_for("morph", self.pictures)

    def problems(self, given: set[str]) -> list[str]:
        count = len(self.pictures)
        if not 2 <= count <= len(ascii_lowercase):
            return [f"morph takes 2 to {len(ascii_lowercase)} pictures, not {count}"]
        wrong = []
        if len(self.prompt) != count:
            wrong.append(f"--prompt is needed once for each picture; pictures: {count}, prompts: {len(self.prompt)}")
        if self.lora and len(self.lora) != count:
            wrong.append(f"--lora is needed for each picture or none; pictures: {count}, LoRAs: {len(self.lora)}")
        return wrong
