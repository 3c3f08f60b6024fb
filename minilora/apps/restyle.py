"""Restyle: redraw a picture in the style of a LoRA.

    python -m minilora.apps.restyle PICTURE --prompt TEXT --lora out/fluent:0.8 --strength 0.5
    python -m minilora.apps.restyle FOLDER --lora out/fluent --strengths 0,0.25,0.5,0.75,1 --style dataset/fluent

Noise is added to the picture, up to timestep t = strength · T, and denoised again with the LoRA:

    x_t = √ᾱ_t · x₀ + √(1 − ᾱ_t) · ε          W + s · ΔW

Large shapes survive the noise.  The style, which is drawn last, is new.  A higher --strength leaves less of the
picture; a higher strength s of the LoRA gives more of its style.  A ControlNet can keep the picture's edges (canny.py).

With --style, a folder of pictures in the style, a classifier (classifier.py) measures the style in the results.  It
learns to tell the style from the base's own pictures of the same captions, all decoded by the VAE.

diffusers' image-to-image pipelines do the denoising.

Sources: Meng et al., "SDEdit", 2021; Zhang et al., "Adding conditional control to text-to-image diffusion
models", 2023.
"""

if __name__ == "__main__":  # before torch is imported, which takes seconds: --help answers at once
    from minilora.settings.command_line import restyle as command

    command()
    raise SystemExit

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import diffusers
import torch
from PIL import Image

from ..data.folder import Item, read_folder
from ..data.pictures import crop_square
from ..data.sheet import save_picture, sheet
from ..models.base import Base
from ..models.device import this_device
from ..models.folder import loading, refuse_missing
from ..sampling import TOGETHER, draw, load_loras, merged_at
from ..settings.errors import UserError
from ..settings.restyle import RestyleConfig
from ..settings.sample import SampleConfig
from ..settings.train import TrainConfig
from .canny import canny
from .classifier import probability, share_right, train_classifier
from .likeness import pixels_of, through_vae
from .report import write_figures

SHOWN = 6  # pictures on the sheet


def restyle(config: RestyleConfig) -> dict[str, float]:
    """Redraw pictures at each strength of the LoRAs, write them, and return the figures."""
    output, [data] = Path(config.output), config.data
    items = read_pictures(data, config.prompt, "restyle")
    base = Base.of(config, this_device(), config.precision)
    base.refuse_inpainting()
    strengths = load_loras(base, config.lora)
    draw_again = pipeline_for(base, config)
    pictures = [crop_square(item.open(), base.resolution) for item in items]
    captions = [item.captions[0] for item in items]

    figures: dict[str, float] = {}
    if config.style:
        style, figures["style recognized in held-out pictures"] = learn_style(base, strengths, config)
    rows, likely, far = [], [], []
    for factor in config.strengths:
        with merged_at(base, {name: factor * strength for name, strength in strengths.items()}):
            drawn = draw_again(pictures, captions)
        for number, (item, picture) in enumerate(zip(items, drawn, strict=True), start=1):
            save_picture(picture, output / f"strength-{factor:g}" / f"{number:04d}-{item.path.stem}.png")
        rows.append(drawn)
        far.append(distance(pictures, drawn))
        figures[f"distance to the pictures, in levels of 255; strength {factor:g}"] = far[-1]
        if config.style:
            likely.append(probability(style, pixels_of(drawn), kind=1).mean().item())
            figures[f"probability of the style; strength {factor:g}"] = likely[-1]
    curves = {"distance to the pictures": (config.strengths, far)}
    if config.style:
        curves["probability of the style"] = config.strengths, likely
    write_figures(output, figures, curves)
    shown = [row[:SHOWN] for row in (pictures, *rows)]
    labels = ["the pictures", *(f"strength {factor:g}" for factor in config.strengths)]
    save_picture(sheet(shown, captions[:SHOWN], labels), output / "restyled.png")
    print(f"wrote {output / 'restyled.png'}, and every picture beside it")
    return figures


def read_pictures(name: str, caption: str | None, option: str) -> list[Item]:
    """Return the pictures of a folder with their captions, or a single picture, read as for training."""
    try:
        return read_folder(name, TrainConfig(data=(name,), caption=caption), option)
    except UserError as error:  # it names an option of train.py
        raise UserError(re.sub("--caption(?!-)", "--prompt", str(error))) from error


def pipeline_for(base: Base, config: RestyleConfig):
    """Return a function that redraws pictures, each with its caption and its own seed."""
    name = "ControlNetImg2ImgPipeline" if config.controlnet else "Img2ImgPipeline"
    kind = getattr(diffusers, f"StableDiffusionXL{name}" if base.is_xl else f"StableDiffusion{name}")
    more = {"controlnet": load_controlnet(config.controlnet, base)} if config.controlnet else {}
    settings = ("force_zeros_for_empty_prompt", "requires_safety_checker")  # the first of XL, the second of the others
    more |= {key: base.pipeline.config[key] for key in settings if key in base.pipeline.config}
    pipeline = kind(**base.pipeline.components, **more)
    pipeline.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def draw_again(pictures: Sequence[Image.Image], captions: Sequence[str]) -> list[Image.Image]:
        drawn = []
        for start in range(0, len(pictures), TOGETHER):
            part = pictures[start : start + TOGETHER]
            edges = {"control_image": [canny(picture) for picture in part]} if config.controlnet else {}
            drawn += pipeline(
                list(captions[start : start + TOGETHER]),
                image=list(part),
                **edges,
                strength=config.strength,
                num_inference_steps=config.steps,
                guidance_scale=config.guidance,
                # None and not "": the base then gets the empty prompt that it was trained with.
                negative_prompt=[config.negative] * len(part) if config.negative else None,
                generator=[torch.Generator("cpu").manual_seed(config.seed + start + i) for i in range(len(part))],
            ).images
        return drawn

    return draw_again


def load_controlnet(folder: str, base: Base) -> diffusers.ControlNetModel:
    """Load a ControlNet; UserError if there is none or it was made for another base."""
    title, part = f"--controlnet {folder}", "ControlNet"
    if not Path(folder).is_dir():
        raise UserError(f"{title}: there is no such folder")
    with loading(title, part):
        kind = diffusers.ControlNetModel.load_config(folder).get("_class_name")
    if kind != "ControlNetModel":
        raise UserError(f"{title}: it holds a {kind} and should hold a ControlNetModel")
    options = {"torch_dtype": base.dtype, "low_cpu_mem_usage": False, "output_loading_info": True}
    with loading(title, part):
        controlnet, about = diffusers.ControlNetModel.from_pretrained(folder, use_safetensors=True, **options)
    refuse_missing(title, part, about["missing_keys"])
    for key in ("in_channels", "block_out_channels", "cross_attention_dim"):
        theirs, ours = getattr(controlnet.config, key), getattr(base.unet.config, key)
        if theirs != ours:
            raise UserError(f"{title}: made for another base; its {key} is {theirs}, the base's {ours}")
    pixels = 2 ** (len(controlnet.config.conditioning_embedding_out_channels) - 1)
    if pixels != base.pixels_per_latent:
        wanted = base.pixels_per_latent
        raise UserError(f"{title}: made for another base; it has {pixels} pixels per latent, the base has {wanted}")
    return controlnet.requires_grad_(False).eval().to(base.device)


# ------------------------------------------------------------------------------------------- figures


def distance(pictures: Sequence[Image.Image], drawn: Sequence[Image.Image]) -> float:
    """Return the root mean square difference of pictures, in levels of 255; a mean over the pictures."""
    difference = (pixels_of(pictures) - pixels_of(drawn)) * 127.5
    return difference.square().mean(dim=(1, 2, 3)).sqrt().mean().item()


def learn_style(base: Base, strengths: Mapping[str, float], config: RestyleConfig) -> tuple[torch.nn.Module, float]:
    """Train a classifier, with kind 1 for the style; return it and how often it is right on held-out pictures."""
    items = read_pictures(config.style, config.prompt, "--style")
    ours = through_vae(base, pixels_of([crop_square(item.open(), base.resolution) for item in items]))
    how = SampleConfig(prompt=("any",), model=config.model)
    with merged_at(base, dict.fromkeys(strengths, 0.0)):
        theirs = [draw(base, item.captions[0], [n], base.resolution, how)[0] for n, item in enumerate(items)]
    pixels = torch.cat([pixels_of(theirs), ours])
    kinds = torch.arange(2).repeat_interleave(len(items))  # 0: the base's, 1: the style
    held_out = torch.arange(len(pixels)) % 5 == 0
    model = train_classifier(pixels[~held_out], kinds[~held_out])
    return model, share_right(model, pixels[held_out], kinds[held_out])
