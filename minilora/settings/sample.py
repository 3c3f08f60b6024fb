"""The settings of sample.py, and their checks."""

import math
from dataclasses import dataclass
from pathlib import Path

from .setting import AT_LEAST_1, SEED, ByBase, Settings, setting
from .shared import (
    COMPILE_HELP,
    MODEL,
    MODEL_CONFIG_HELP,
    MODEL_HELP,
    OUTPUT,
    PICTURES,
    PRECISION_HELP,
    PRECISIONS,
    ZERO_SNR_HELP,
)

SAMPLERS = {  # the class of diffusers behind each
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "lcm": "LCMScheduler",
}


@dataclass(frozen=True)
class SampleConfig(Settings):
    """Every setting of sample.py."""

    prompt: tuple[str, ...] = setting((), "what to draw; may be repeated", repeat=True, group=PICTURES)
    negative: str = setting("", "what to keep away from", group=PICTURES)
    seed: int = setting(0, "seed of the first picture; the next ones count up", group=PICTURES, within=SEED)
    count: int = setting(1, "pictures per prompt", group=PICTURES, within=AT_LEAST_1)
    steps: int = setting(ByBase(30, 20), "denoising steps", group=PICTURES, within=AT_LEAST_1)
    guidance: float = setting(
        ByBase(7.5, 3.0),
        "how strongly the prompt is followed; 1 is without guidance",
        group=PICTURES,
        within=AT_LEAST_1,
    )
    zero_terminal_snr: bool = setting(False, ZERO_SNR_HELP, group=PICTURES)
    image: str | None = setting(
        None, "picture to paint in, for an inpainting base", group=PICTURES, needs=("mask", "where it is painted anew")
    )
    mask: str | None = setting(
        None,
        "picture that is white where --image is to be painted anew",
        group=PICTURES,
        needs=("image", "the picture that is painted in"),
    )
    size: int | None = setting(
        None, "side of the pictures, in pixels; the base's own if not given", group=PICTURES, within=AT_LEAST_1
    )
    scheduler: str = setting("ddim", "sampler", choices=tuple(SAMPLERS), group=PICTURES)

    model: str | None = setting(None, MODEL_HELP, group=MODEL)
    model_config: str | None = setting(None, MODEL_CONFIG_HELP, group=MODEL)
    lora: tuple[str, ...] = setting(
        (),
        "LoRA file or training output, optionally with a strength: out/fluent:0.8; may be repeated",
        repeat=True,
        group=MODEL,
    )
    strengths: tuple[float, ...] = setting(
        (),
        "factors on the strengths of --lora to compare, with commas between (--strengths=-1,0,1): one column each",
        group=MODEL,
        needs=("lora", "whose strength they change"),
    )
    grid: tuple[float, ...] = setting(
        (),
        "factors on the strengths of two --lora: a row each for the first, a column each for the second",
        group=MODEL,
    )
    precision: str = setting("fp32", PRECISION_HELP, choices=PRECISIONS, group=MODEL)
    compile: bool = setting(False, COMPILE_HELP, group=MODEL)

    output: str = setting(
        "out/sample.png",
        "picture to write, several on one sheet; or a folder, for single ones with their prompts as captions",
        group=OUTPUT,
    )

    def problems(self) -> list[str]:
        wrong = [] if self.prompt else ["--prompt is needed: what to draw, for example --prompt 'red apple'"]
        if self.grid and len(self.lora) != 2:
            wrong.append(f"--grid mixes two --lora, not {len(self.lora)}")
        if self.grid and (len(self.prompt) > 1 or self.count > 1):
            wrong.append("--grid takes one --prompt and one --count: it fills a sheet with it")
        if self.grid and self.strengths:
            wrong.append("--grid and --strengths cannot be given at once")
        for name in ("strengths", "grid"):
            if not all(math.isfinite(factor) for factor in getattr(self, name)):
                wrong.append(f"--{name} is {','.join(map(str, getattr(self, name)))}; each must be a finite number")
        if (self.strengths or self.grid) and not Path(self.output).suffix:
            wrong.append(
                f"--output {self.output}: --strengths and --grid make one sheet, whose name ends as a picture's does"
            )
        if self.negative and self.guidance == 1:
            wrong.append("--negative has no effect at --guidance 1, which is without guidance")
        return wrong
