"""The settings of minilora.apps.morph, declared once."""

from dataclasses import dataclass
from pathlib import Path

from . import shared
from .base import BaseSettings
from .setting import AT_LEAST_1, SHARE, Within
from .shared import folder_for, of_lora, of_output, of_pictures


@dataclass(frozen=True)
class MorphConfig(BaseSettings):
    """Every setting of minilora.apps.morph."""

    usage = "A B --prompt-a TEXT --prompt-b TEXT"
    examples = (
        "python -m minilora.apps.morph a.png b.png --prompt-a apple --prompt-b pear",
        "python -m minilora.apps.morph a.png b.png --prompt-a apple --prompt-b pear \\\n"
        "      --frames 33 --output morph.webp",
    )

    pictures: tuple[str, ...] = of_pictures((), "the two pictures", "A B", basic=True, bare=True)
    prompt_a: str | None = of_pictures(None, "what the first one shows", basic=True)
    prompt_b: str | None = of_pictures(None, "what the second one shows", basic=True)
    frames: int = of_pictures(17, "number of frames, including the two pictures", "FRAMES", Within(2), basic=True)
    lora_a: str | None = of_lora(None, "LoRA of the first picture; if not given, one is trained", "LORA", basic=True)
    lora_b: str | None = of_lora(None, "LoRA of the second picture, likewise", "LORA", basic=True)
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
        wrong = [] if len(self.pictures) == 2 else [f"morph takes two pictures, not {len(self.pictures)}"]
        if self.prompt_a is None or self.prompt_b is None:
            wrong.append("--prompt-a and --prompt-b are needed: what the pictures show")
        return wrong
