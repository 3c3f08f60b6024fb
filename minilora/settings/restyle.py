"""The settings of minilora.apps.restyle."""

from dataclasses import dataclass

from . import shared
from .base import BaseSettings
from .setting import AT_LEAST_1, ByBase, Within
from .shared import folder_for, of_data, of_output, of_pictures


@dataclass(frozen=True)
class RestyleConfig(BaseSettings):
    """Every setting of minilora.apps.restyle."""

    usage = "PICTURE --lora LORA"
    examples = (
        "python -m minilora.apps.restyle photo.png --prompt apple --lora out/fluent:0.8",
        "python -m minilora.apps.restyle pictures --lora out/fluent --strengths 0,0.5,1",
    )

    data: tuple[str, ...] = of_data(
        (), "picture, or folder of pictures with captions", "PICTURE", basic=True, bare=True
    )
    prompt: str | None = of_data(None, "what pictures without a caption show", basic=True)
    lora: tuple[str, ...] = shared.lora()
    strength: float = of_pictures(
        0.5,
        "how much of a picture to redraw: above 0, up to 1 for all of it",
        "SHARE",
        Within(0, 1, above=True),
        basic=True,
    )
    model: str | None = shared.model_of_lora()
    output: str | None = of_output(
        None, "folder of the results; if not given, out/restyle-<name>", "FOLDER", basic=True
    )

    strengths: tuple[float, ...] = of_pictures(
        (1.0,), "compare strengths, one row each: multiply those of --lora by these factors: 0,0.5,1", "FACTOR,…"
    )
    steps: int = of_pictures(
        ByBase(50, 30), "denoising steps at --strength 1; at 0.5, half as many", "STEPS", AT_LEAST_1
    )
    guidance: float = shared.guidance(ByBase(7.5, 2.0))
    negative: str = of_pictures("", "what to keep out of the pictures (negative prompt)")
    seed: int = shared.seed()
    controlnet: str | None = of_pictures(
        None, "diffusers folder of a ControlNet for Canny edges, which keeps a picture's edges", "FOLDER"
    )
    style: str | None = of_pictures(
        None, "folder of pictures in the style, to measure how much of it the results show", "FOLDER"
    )
    precision: str = shared.precision()

    @classmethod
    def following(cls, values: dict) -> dict:
        return super().following(values) | {"output": str(folder_for("restyle", values.get("data", ())[:1]))}

    def problems(self, given: set[str]) -> list[str]:
        wrong = [] if len(self.data) == 1 else [f"restyle takes one picture or folder, not {len(self.data)}"]
        wrong += [] if self.lora else ["--lora is needed: the style"]
        if 0 < self.strength * self.steps < 1:
            wrong.append(f"--strength {self.strength} of --steps {self.steps} is less than one step")
        return wrong
