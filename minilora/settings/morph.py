"""The settings of minilora.apps.morph, declared once."""

from dataclasses import dataclass
from pathlib import Path

from . import shared
from .setting import AT_LEAST_1, SHARE, Settings, Within, setting
from .shared import LORA, OUTPUT, PICTURES, folder_for


@dataclass(frozen=True)
class MorphConfig(Settings):
    """Every setting of minilora.apps.morph."""

    usage = "A B --prompt-a TEXT --prompt-b TEXT"
    examples = (
        "python -m minilora.apps.morph a.png b.png --prompt-a apple --prompt-b pear",
        "python -m minilora.apps.morph a.png b.png --prompt-a apple --prompt-b pear \\\n"
        "      --frames 33 --output morph.webp",
    )

    pictures: tuple[str, ...] = setting((), "the two pictures", group=PICTURES, metavar="A B", basic=True, bare=True)
    prompt_a: str | None = setting(None, "what the first one shows", group=PICTURES, basic=True)
    prompt_b: str | None = setting(None, "what the second one shows", group=PICTURES, basic=True)
    frames: int = setting(
        17,
        "number of frames, the two pictures among them",
        group=PICTURES,
        metavar="FRAMES",
        basic=True,
        within=Within(2),
    )
    lora_a: str | None = setting(
        None, "LoRA of the first picture; if not given, one is trained", group=LORA, metavar="LORA", basic=True
    )
    lora_b: str | None = setting(None, "LoRA of the second picture, likewise", group=LORA, metavar="LORA", basic=True)
    model: str | None = shared.model()
    output: str | None = setting(
        None,
        "animation to write (.gif, .webp, .png), or folder for the frames; if not given, morph.gif beside the LoRAs",
        group=OUTPUT,
        metavar="FILE|FOLDER",
        basic=True,
    )

    steps: int = setting(
        50,
        "DDIM steps from a picture to its noise, and as many back",
        group=PICTURES,
        metavar="STEPS",
        within=AT_LEAST_1,
    )
    attention: float = setting(
        0.6,
        "share of the steps, 0 to 1, in which self-attention is mixed",
        group=PICTURES,
        metavar="SHARE",
        within=SHARE,
    )
    adain: bool = setting(True, "do not give the noise a mean and spread between those of the ends", group=PICTURES)
    even: bool = setting(True, "do not space the frames so that they look equally far apart", group=PICTURES)
    rank: int = setting(16, "rank of the LoRAs that are trained", group=LORA, metavar="RANK", within=AT_LEAST_1)
    train_steps: int = setting(
        200, "optimizer steps that each is trained for", group=LORA, metavar="STEPS", within=AT_LEAST_1
    )
    precision: str = shared.precision()

    @property
    def folder(self) -> Path:
        """Where the LoRAs, the sheet and the figures go."""
        return folder_for("morph", self.pictures)

    def problems(self) -> list[str]:
        wrong = [] if len(self.pictures) == 2 else [f"morph takes two pictures, not {len(self.pictures)}"]
        if self.prompt_a is None or self.prompt_b is None:
            wrong.append("--prompt-a and --prompt-b are needed: what the pictures show")
        return wrong
