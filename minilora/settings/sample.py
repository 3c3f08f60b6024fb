"""The settings of sample.py, and their checks."""

import math
from dataclasses import dataclass
from pathlib import Path

from . import shared
from .base import BaseSettings
from .setting import AT_LEAST_1, ByBase, as_typed
from .shared import of_model, of_output, of_pictures

SAMPLERS = {  # each with its class in diffusers
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "lcm": "LCMScheduler",
}


@dataclass(frozen=True)
class SampleConfig(BaseSettings):
    """Every setting of sample.py."""

    main, usage = "prompt", "--prompt TEXT"
    examples = (
        "python sample.py --prompt 'red apple' --lora out/fluent:0.8 --output apple.png",
        "python sample.py --prompt 'a photo of sks dog' --lora out/photos --count 4 \\\n"
        "      --model stable-diffusion-v1-5/stable-diffusion-v1-5 --size 512x768",
    )

    prompt: tuple[str, ...] = of_pictures((), "what to draw; may be repeated", repeat=True, basic=True)
    negative: str = of_pictures("", "what to keep out of the pictures (negative prompt)", basic=True)
    seed: int = shared.seed(basic=True)
    count: int = of_pictures(1, "number of pictures per prompt", "PICTURES", AT_LEAST_1, basic=True)
    size: tuple[int, ...] | None = of_pictures(
        None,
        "width and height of the pictures in pixels; one number is a square; if not given, the base's own",
        "WIDTHxHEIGHT",
        AT_LEAST_1,
        separator="x",
        basic=True,
    )
    steps: int = of_pictures(ByBase(30, 20), "denoising steps", "STEPS", AT_LEAST_1, basic=True)
    guidance: float = shared.guidance(ByBase(7.5, 2.0), basic=True)
    scheduler: str = of_pictures("ddim", "sampler", choices=tuple(SAMPLERS))
    image: str | None = of_pictures(
        None, "picture to repaint in part, with an inpainting base", "FILE", needs=("mask", "where to repaint")
    )
    mask: str | None = of_pictures(
        None,
        "picture that is white where --image is to be repainted",
        "FILE",
        needs=("image", "the picture to repaint"),
    )

    motion: str | None = of_model(
        None, "AnimateDiff motion adapter: diffusers folder or hub id; it draws clips instead of pictures", "ADAPTER"
    )
    frames: int = of_pictures(16, "frames of a clip", "FRAMES", AT_LEAST_1, needs=("motion", "which draws clips"))

    model: str | None = shared.model_of_lora()
    lora: tuple[str, ...] = shared.lora()
    allow_unmatched: bool = of_model(False, "leave out keys and learnt words of a LoRA that have no place in the base")
    strengths: tuple[float, ...] = of_model(
        (),
        "compare strengths, one column each: multiply those of --lora by these factors: --strengths=-1,0,1",
        "FACTOR,…",
        needs=("lora", "whose strength they change"),
    )
    lora_blocks: tuple[str, ...] = shared.lora_blocks(needs=("lora", "whose strength they change"))
    grid: tuple[float, ...] = of_model(
        (),
        "compare mixtures of two LoRAs: one row for each factor of the first, one column for each of the second",
        "FACTOR,…",
    )
    precision: str = shared.precision()
    compile: bool = shared.compile_unet()

    output: str = of_output(
        "out/sample.png",
        "file to write, several pictures on one sheet; or folder for single pictures, with their prompts as captions; "
        "for clips a .gif, .webp or .png, or folder with a folder of frames for each clip",
        "FILE|FOLDER",
        basic=True,
    )

    def problems(self, given: set[str]) -> list[str]:
        wrong = [] if self.prompt else ["--prompt is needed: what to draw, for example --prompt 'red apple'"]
        wrong += shared.wrong_blocks(self.lora_blocks)
        if self.grid and len(self.lora) != 2:
            wrong.append(f"--grid mixes two --lora, not {len(self.lora)}")
        if self.grid and (len(self.prompt) > 1 or self.count > 1):
            wrong.append("--grid takes one --prompt and a --count of 1, because it fills a whole sheet")
        if self.grid and self.strengths:
            wrong.append("--grid and --strengths cannot be combined")
        if self.size is not None and len(self.size) > 2:
            wrong.append(f"--size is {as_typed(self.size, 'x')}; it takes WIDTHxHEIGHT, or the side of a square")
        for name in ("strengths", "grid"):
            if not all(math.isfinite(factor) for factor in getattr(self, name)):
                wrong.append(f"--{name} is {as_typed(getattr(self, name))}; each must be a finite number")
        if (self.strengths or self.grid) and not Path(self.output).suffix:
            wrong.append(
                f"--output {self.output}: --strengths and --grid write one picture; name a file, such as sheet.png"
            )
        wrong += [
            f"--motion and --{name} cannot be combined"
            for name in ("image", "compile")
            if self.motion and getattr(self, name)
        ]
        if self.negative and self.guidance == 1:
            wrong.append("--negative has no effect at --guidance 1, which turns guidance off")
        return wrong
