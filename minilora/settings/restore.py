"""The settings of minilora.apps.restore."""

from dataclasses import dataclass

from . import shared
from .base import BaseSettings
from .setting import AT_LEAST_0, AT_LEAST_1, ByBase
from .shared import folder_for, of_lora, of_output, of_pictures


@dataclass(frozen=True)
class RestoreConfig(BaseSettings):
    """Every setting of minilora.apps.restore."""

    usage = "PICTURE --prompt TEXT"
    examples = (
        "python -m minilora.apps.restore photo.png --prompt 'red apple'",
        "python -m minilora.apps.restore photo.png --prompt 'red apple' \\\n      --edit 'green apple' --strength 0.5",
    )

    picture: tuple[str, ...] = of_pictures((), "picture to restore", "PICTURE", basic=True, bare=True)
    prompt: str | None = of_pictures(None, "what it shows", basic=True)
    edit: tuple[str, ...] = of_pictures(
        (), "another prompt to draw from the picture's noise; may be repeated", repeat=True, basic=True
    )
    optimise_text: bool = of_pictures(
        False,
        "first adapt the caption's embedding to the picture; also draw pictures on the way from it to --edit",
        needs=("edit", "what to draw on the way to"),
        basic=True,
    )
    strength: float = of_pictures(0.4, "strength of the LoRA for --edit", "STRENGTH", AT_LEAST_0, basic=True)
    lora: str | None = of_lora(None, "LoRA of this picture; if not given, one is trained", "LORA", basic=True)
    model: str | None = shared.model()
    output: str | None = of_output(
        None, "folder of the results; if not given, out/restore-<name>", "FOLDER", basic=True
    )

    guidance: float = of_pictures(
        ByBase(4.0, 1.5), "classifier-free guidance of --edit; at least 1, which turns it off", "FACTOR", AT_LEAST_1
    )
    steps: int = of_pictures(50, "DDIM steps from the picture to its noise, and back again", "STEPS", AT_LEAST_1)
    rank: int = of_lora(16, "rank of the trained LoRA", "RANK", AT_LEAST_1)
    train_steps: int = of_lora(ByBase(500, 400), "optimizer steps for the LoRA", "STEPS", AT_LEAST_1)
    text_steps: int = of_lora(
        100,
        "optimizer steps for the caption's embedding",
        "STEPS",
        AT_LEAST_1,
        needs=("optimise_text", "which adapts it"),
    )
    precision: str = shared.precision()

    @classmethod
    def following(cls, values: dict) -> dict:
        return super().following(values) | {"output": str(folder_for("restore", values.get("picture", ())[:1]))}

    def problems(self, given: set[str]) -> list[str]:
        wrong = [] if len(self.picture) == 1 else [f"restore takes one picture, not {len(self.picture)}"]
        if self.prompt is None:
            wrong.append("--prompt is needed: what the picture shows")
        return wrong
