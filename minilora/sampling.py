"""Base + LoRAs + prompt -> pictures.

diffusers' pipelines do the denoising.  Every picture has its own seed, used as in diffusers:
`torch.Generator("cpu").manual_seed(seed)`.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import diffusers
import numpy as np
import torch
from PIL import Image

from .data.buckets import Size
from .data.pictures import NO_PICTURE, crop, open_picture
from .data.sheet import SETTINGS, numbered_in, picture_format, save_picture, sheet, write_captions
from .files.names import block_factors
from .files.network import carrying_layers, components, load_lora
from .lora import lora_layers, merge_lora, unmerge_lora
from .models.base import Base
from .models.compiling import check_compiler, compile_options
from .models.device import this_device
from .models.text import warn_of_cuts
from .settings.errors import UserError
from .settings.sample import SAMPLERS, SampleConfig
from .settings.shared import by_name, path_and_number

T = TypeVar("T")  # a picture, or another thing that is drawn

TOGETHER = 4  # pictures drawn in one pass; more are faster and need more memory


def use_scheduler(base: Base, name: str) -> None:
    """Make the base draw with the sampler of that name; the noise levels stay those of the base."""
    base.pipeline.scheduler = getattr(diffusers, SAMPLERS[name]).from_config(base.scheduler.config)


@torch.no_grad()
def draw(
    base: Base,
    prompt: str | Sequence[str],
    seeds: Sequence[int],
    size: int | Size,
    config: SampleConfig,
    on_step: Callable[[], None] | None = None,
) -> list[Image.Image]:
    """Draw one picture for each seed, with the steps and guidance of `config`.

    `prompt` is one for all pictures, or one for each.  `size` is the side of a square, or width and height, in pixels.
    `on_step` is called after each step.
    """
    width, height = (size, size) if isinstance(size, int) else size
    prompts = [prompt] * len(seeds) if isinstance(prompt, str) else prompt
    inpainting = _inpainting(base, (width, height), config)
    pictures: list[Image.Image] = []

    def after_step(pipeline, step: int, timestep, tensors: dict) -> dict:
        if on_step:
            on_step()
        return tensors

    for start in range(0, len(seeds), TOGETHER):
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds[start : start + TOGETHER]]
        some = list(prompts[start : start + TOGETHER])
        drawn = base.pipeline(  # it runs the conditional and the unconditional pass as one batch
            some,
            # None and not "": the base then gets the empty prompt that it was trained with.
            negative_prompt=[config.negative] * len(generators) if config.negative else None,
            height=height,
            width=width,
            num_inference_steps=config.steps,
            guidance_scale=config.guidance,
            generator=generators,
            output_type="np",
            callback_on_step_end=after_step,
            **inpainting,
        ).images  # (n, h, w, 3)
        if not np.isfinite(drawn).all():
            what = " or ".join(map(repr, dict.fromkeys(some)))
            raise UserError(
                f"--model {base.source}: what it draws for {what} is not finite; with --precision fp16 try bf16 or "
                "fp32, else the base or the LoRA is damaged"
            )
        pictures += base.pipeline.image_processor.numpy_to_pil(drawn)
    return pictures


def draw_each(
    base: Base,
    prompts: Sequence[str],
    seeds: Sequence[int],
    size: int | Size,
    config: SampleConfig,
    on_step: Callable[[], None] | None = None,
) -> list[list[Image.Image]]:
    """Draw each prompt once for each seed, several pictures in one pass; return a list for each prompt."""
    each = [prompt for prompt in prompts for _ in seeds]
    drawn = iter(draw(base, each, [*seeds] * len(prompts), size, config, on_step))
    return [[next(drawn) for _ in seeds] for _ in prompts]


def _inpainting(base: Base, size: Size, config: SampleConfig) -> dict:
    """Return the picture and the mask for an inpainting base, as the pipeline takes them.

    Raises UserError if they are missing for an inpainting base, or given for another base.
    """
    if bool(config.image) != base.is_inpainting:
        what = "an inpainting base needs --image and --mask" if base.is_inpainting else "only inpainting takes --image"
        raise UserError(f"--model {base.source}: {what}")
    if not base.is_inpainting:
        return {}
    inputs = {}
    for name, path in (("image", config.image), ("mask_image", config.mask)):
        try:
            inputs[name] = crop(open_picture(Path(path)), size)
        except NO_PICTURE as error:
            raise UserError(f"--{name.removesuffix('_image')} {path}: it cannot be opened ({error})") from error
    return inputs | {"strength": 1.0}


@contextmanager
def merged_at(base: Base, strengths: dict[str, float], blocks: Mapping[str, float] = {}) -> Iterator[None]:
    """Within its `with` statement the LoRAs are merged at the given strengths; afterwards everything is as before.

    `blocks` are factors on the strengths, as `block_factors` takes them.  Raises UserError if a block has no layer of
    a LoRA, or if a weight would not be finite.
    """
    modules = [module for module in components(base.pipeline).values() if lora_layers(module)]
    layers = carrying_layers(base.pipeline)
    factors = block_factors(layers, blocks)
    before = [(adapter, adapter.strength) for layer in layers.values() for adapter in layer.adapters.values()]
    try:
        for full, layer in layers.items():
            for name, adapter in layer.adapters.items():
                adapter.strength = strengths.get(name, adapter.strength) * factors[full]
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
        for adapter, strength in before:
            adapter.strength = strength


@contextmanager
def evaluating(*modules: torch.nn.Module) -> Iterator[None]:
    """Within the block the modules are in evaluation mode; afterwards each sub-module returns to its former mode."""
    found = {child: child.training for module in modules for child in module.modules()}
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for child, training in found.items():
            child.training = training


# ------------------------------------------------------------------------------- the command


def sample(config: SampleConfig) -> Path:
    """Draw what `config` asks for and return the path of the picture, or of the folder."""
    path = Path(config.output)
    names = numbered_in(path, len(config.prompt) * config.count)
    if path.suffix:
        picture_format(path)  # both before the work, not after it
    result, rows = draw_all(*load(config), config)
    if path.suffix:
        save_picture(result, path)
    else:
        captions = [caption for caption in config.prompt for _ in range(config.count)]
        for picture, name in zip((p for row in rows for p in row), names, strict=True):
            save_picture(picture, path / name)
        write_captions(path, names, captions)
    print(f"wrote {path}")
    return path


def load(config: SampleConfig) -> tuple[Base, dict[str, float]]:
    """Return the base that `config` names, with its LoRAs injected, and their strengths by adapter name."""
    device = this_device()
    if config.compile:
        check_compiler(device)
    base = Base.of(config, device, config.precision)
    strengths = prepare(base, config)
    if config.compile:
        base.unet.compile(**compile_options(device))
    return base, strengths


def prepare(base: Base, config: SampleConfig) -> dict[str, float]:
    """Put the LoRAs of `config` into a base; return their strengths by adapter name."""
    print(f"base       {base.source}, {base.predicts}, {base.computes}")
    size_of(base, config)  # refuses a wrong size before the U-Net is loaded
    return load_loras(base, config.lora, config.allow_unmatched)


def size_of(base: Base, config: SampleConfig) -> Size:
    """Return width and height of the pictures; UserError if the base cannot draw them."""
    width, height = (*config.size, *config.size)[:2] if config.size else (base.resolution, base.resolution)
    if width % base.side_multiple or height % base.side_multiple:
        raise UserError(f"--size is {width}x{height}; this base needs multiples of {base.side_multiple}")
    return width, height


def draw_all(
    base: Base, strengths: dict[str, float], config: SampleConfig, on_step: Callable[[], None] | None = None
) -> tuple[Image.Image, list[list[Image.Image]]]:
    """Draw all that `config` asks for; `base` and `strengths` are those of `load`.

    Returns the picture or the sheet, and its content as rows of single pictures.  Each carries the settings, for its
    file.
    """
    size, steps, began = size_of(base, config), itertools.count(), time.monotonic()

    def after_step() -> None:
        if next(steps) == 0 and config.compile:
            print(f"the first step took {time.monotonic() - began:.1f} s, compiling included", flush=True)
        if on_step:
            on_step()

    def draw_pictures(seeds: Sequence[int]) -> list[list[Image.Image]]:
        return draw_each(base, config.prompt, seeds, size, config, after_step)

    rows, columns, labels = draw_rows(base, strengths, config, draw_pictures)
    result = arrange(config, rows, columns, labels)
    for picture in (result, *(picture for row in rows for picture in row)):
        picture.info[SETTINGS] = config.to_json()
    return result, rows


def draw_rows(
    base: Base,
    strengths: dict[str, float],
    config: SampleConfig,
    draw_prompts: Callable[[Sequence[int]], list[list[T]]],
) -> tuple[list[list[T]], list[str], list[str]]:
    """Draw all that `config` asks for; return it in rows, with the labels of the columns and of the rows.

    `draw_prompts` gets the seeds, and draws each prompt once for each, a row for each prompt.  It is called with the
    LoRAs merged, once for each mixture of them.
    """
    warn_of_cuts(base.tokenizers, dict.fromkeys((*config.prompt, config.negative)), "prompt")
    use_scheduler(base, config.scheduler)
    seeds = [config.seed + i for i in range(config.count)]

    def draw_at(*factors: float) -> list[list[T]]:
        """Draw every prompt with every seed, with the LoRAs merged at their strengths times these factors."""
        at = {name: strengths[name] * factor for name, factor in zip(strengths, factors, strict=True)}
        with merged_at(base, at, by_name(config.lora_blocks)):
            return draw_prompts(seeds)

    if config.strengths:
        columns = [[p for row in draw_at(*[factor] * len(strengths)) for p in row] for factor in config.strengths]
        rows = [list(row) for row in zip(*columns, strict=True)]
        labels = [f"{prompt}, seed {seed}" for prompt in config.prompt for seed in seeds]
        return rows, [f"strength {factor:g}" for factor in config.strengths], labels
    if config.grid:
        first, second = (Path(path_and_number(text)[0]).name for text in config.lora)
        rows = [[draw_at(one, other)[0][0] for other in config.grid] for one in config.grid]
        return rows, [f"{second} {f:g}" for f in config.grid], [f"{first} {f:g}" for f in config.grid]
    return draw_at(*[1.0] * len(strengths)), [f"seed {seed}" for seed in seeds], list(config.prompt)


def arrange(
    config: SampleConfig, rows: list[list[Image.Image]], columns: Sequence[str], labels: Sequence[str]
) -> Image.Image:
    """Return the pictures that `config` asks for on a sheet; a single picture as it is."""
    compared = config.strengths or config.grid
    return sheet(rows, columns, labels) if compared or len(config.prompt) * config.count > 1 else rows[0][0]


def load_loras(base: Base, texts: Sequence[str], allow_unmatched: bool = False) -> dict[str, float]:
    """Put LoRAs, each "path" or "path:strength", into a base; return their strengths by adapter name.

    Prints which learnt words they bring, and with `allow_unmatched` what is left out.
    """
    strengths = {}
    for number, text in enumerate(texts):
        path, strength = path_and_number(text)
        report = load_lora(base.pipeline, path, f"lora{number}", strength, allow_unmatched)
        for line in (*report.notes, *(f"left out: {key} of {path}" for key in report.unmatched.get(path, ()))):
            print(line)
        strengths[f"lora{number}"] = strength
    return strengths
