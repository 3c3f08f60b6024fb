"""Base + LoRAs + prompt -> pictures, and the sheets that show several of them side by side.

The denoising itself is diffusers' StableDiffusionPipeline.  Every picture has a seed of its own, as
in diffusers: `torch.Generator("cpu").manual_seed(seed)`.
"""

import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import diffusers
import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from .config import SampleConfig, UserError
from .data import Item, cut_square, open_picture
from .distributed import this_device
from .files import write_whole
from .lora import lora_layers, merge_lora, unmerge_lora
from .merge import split_strength
from .models import DTYPES, Base, components, load_lora

TOGETHER = 4  # pictures drawn in one pass; more are faster and take more memory
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "lcm": "LCMScheduler",
}


def use_scheduler(base: Base, name: str) -> None:
    """Let the base draw with the sampler of that name, with its own noise levels."""
    base.pipeline.scheduler = getattr(diffusers, SCHEDULERS[name]).from_config(base.scheduler.config)


@torch.no_grad()
def draw(base: Base, prompt: str, seeds: Sequence[int], size: int, config: SampleConfig) -> list[Image.Image]:
    """Draw a prompt once for each seed, `size` pixels wide and high, with the steps and guidance of `config`."""
    pictures = []
    for start in range(0, len(seeds), TOGETHER):
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds[start : start + TOGETHER]]
        pictures += base.pipeline(
            [prompt] * len(generators),
            negative_prompt=[config.negative] * len(generators),
            height=size,
            width=size,
            num_inference_steps=config.steps,
            guidance_scale=config.guidance,
            generator=generators,
        ).images
    return pictures


@contextmanager
def merged_at(base: Base, strengths: dict[str, float]) -> Iterator[None]:
    """Within the block the LoRAs are merged at the given strengths; afterwards all is as it was found.

    Raises UserError if that gives weights that are not finite numbers.
    """
    modules = [module for module in components(base.pipeline).values() if lora_layers(module)]
    adapters = [
        (name, adapter)
        for module in modules
        for layer in lora_layers(module).values()
        for name, adapter in layer.adapters.items()
    ]
    found = [adapter.strength for _, adapter in adapters]
    try:
        for name, adapter in adapters:
            adapter.strength = strengths.get(name, adapter.strength)
        try:
            for module in modules:
                merge_lora(module)
        except ValueError as error:
            raise UserError(f"LoRA at {', '.join(f'{s:g}' for s in strengths.values())}: {error}") from error
        yield
    finally:
        for module in modules:
            if any(layer.merged for layer in lora_layers(module).values()):
                unmerge_lora(module)
        for (_, adapter), strength in zip(adapters, found, strict=True):
            adapter.strength = strength


@contextmanager
def evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Within the block the module is in evaluation mode; afterwards every part is in the mode it had."""
    found = {child: child.training for child in module.modules()}
    try:
        module.eval()
        yield
    finally:
        for child, training in found.items():
            child.training = training


# ------------------------------------------------------------------------------- during training


def draw_prompts(base: Base, prompts: Sequence[str], size: int, config: SampleConfig) -> Image.Image:
    """Draw each prompt with the LoRA as it is now, three seeds to a row."""
    seeds = [config.seed, config.seed + 1, config.seed + 2]
    with evaluating(base.unet):
        rows = [draw(base, prompt, seeds, size, config) for prompt in prompts]
    return sheet(rows, [f"seed {seed}" for seed in seeds], list(prompts))


def before_after(base: Base, item: Item, size: int, config: SampleConfig) -> Image.Image:
    """Draw a training picture's caption by the base, the LoRA at 0.5 and at 1.0, and the picture itself."""
    seeds, columns = [config.seed, config.seed + 1, config.seed + 2], []
    with evaluating(base.unet):
        for strength in (0.0, 0.5, 1.0):
            with merged_at(base, {"default": strength}):
                columns.append(draw(base, item.captions[0], seeds, size, config))
    columns.append([cut_square(open_picture(item.path), size)] * len(seeds))
    rows = [list(row) for row in zip(*columns, strict=True)]
    return sheet(rows, ["base", "LoRA at 0.5", "LoRA at 1.0", "training picture"], [f"seed {seed}" for seed in seeds])


# ------------------------------------------------------------------------------- the command


def sample(config: SampleConfig) -> Path:
    """Draw what `config` asks for and return the path of the picture."""
    picture_format(Path(config.output))  # before the work, not after it
    base = Base(config.model, this_device(), DTYPES[config.precision])
    size = config.size or base.resolution
    if size % base.side_multiple:
        raise UserError(f"--size is {size}; this base needs a multiple of {base.side_multiple}")
    strengths = {}
    for number, text in enumerate(config.lora):
        path, strength = split_strength(text)
        name = f"lora{number}"
        load_lora(base.pipeline, path, name, strength)
        strengths[name] = strength
    use_scheduler(base, config.scheduler)

    seeds = [config.seed + i for i in range(config.count)]

    def draw_all(prompt: str) -> list[Image.Image]:
        return draw(base, prompt, seeds, size, config)

    if config.scales:
        columns = []
        for scale in config.scales:
            with merged_at(base, {name: scale * strengths[name] for name in strengths}):
                columns.append([picture for prompt in config.prompt for picture in draw_all(prompt)])
        rows = [list(row) for row in zip(*columns, strict=True)]
        labels = [f"{prompt}, seed {seed}" for prompt in config.prompt for seed in seeds]
        result = sheet(rows, [f"scale {scale:g}" for scale in config.scales], labels)
    else:
        with merged_at(base, strengths):  # for speed; in float32 the picture is the same
            rows = [draw_all(prompt) for prompt in config.prompt]
        labels = [f"seed {seed}" for seed in seeds]
        single = len(rows) == len(seeds) == 1
        result = rows[0][0] if single else sheet(rows, labels, list(config.prompt))
    path = Path(config.output)
    save_picture(result, path)
    print(f"wrote {path}")
    return path


# ------------------------------------------------------------------------------- sheets


def sheet(rows: list[list[Image.Image]], columns: Sequence[str], labels: Sequence[str]) -> Image.Image:
    """Put pictures on one labelled sheet: `columns` above, `labels` to the left; small ones enlarged."""
    cell = max(192, rows[0][0].width)
    font = ImageFont.load_default(16)
    margin = 12 + max(round(font.getlength(label)) for label in labels)
    result = Image.new("RGB", (margin + len(columns) * (cell + 4), 28 + len(rows) * (cell + 4)), "white")
    ink = ImageDraw.Draw(result)
    for x, column in enumerate(columns):
        ink.text((margin + x * (cell + 4) + cell // 2, 14), column, "black", font, anchor="mm")
    for y, (row, label) in enumerate(zip(rows, labels, strict=True)):
        top = 28 + y * (cell + 4)
        ink.text((margin - 6, top + cell // 2), label, "black", font, anchor="rm")
        for x, picture in enumerate(row):
            result.paste(picture.resize((cell, cell), Image.Resampling.BICUBIC), (margin + x * (cell + 4), top))
    place = {"columns": list(columns), "rows": list(labels), "left": margin, "top": 28, "cell": cell, "gap": 4}
    result.info["sheet"] = json.dumps(place)  # a PNG file keeps it, for programs that cut the pictures out again
    return result


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture, whole or not at all, in the format that its name ends with."""
    content, about = io.BytesIO(), PngImagePlugin.PngInfo()
    if "sheet" in picture.info:
        about.add_text("sheet", picture.info["sheet"])
    picture.save(content, picture_format(path), pnginfo=about)
    write_whole(path, content.getvalue())


def picture_format(path: Path) -> str:
    """Return the format that a file's name stands for; UserError if there is none that can be written."""
    name = Image.registered_extensions().get(path.suffix.lower())
    if name not in Image.SAVE:
        raise UserError(f"--output {path}: its name must end as a picture's does, for example .png")
    return name
