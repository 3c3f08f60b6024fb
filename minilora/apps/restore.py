"""Restore one picture: find the noise from which it would be drawn, and draw it again from that noise.

    python -m minilora.apps.restore PICTURE --prompt TEXT [--edit TEXT …]

DDIM works in both directions (ddim.py), so every picture has a noise.  From picture to noise it is only approximate,
and the less the base knows of a picture, the less comes back.  A LoRA trained on this one picture brings more of it
back.  From the same noise, another prompt then draws another picture with the same layout.  Such an edit uses the LoRA
at less than half strength: at full strength the base draws only this picture.

With --optimise-text the caption's embedding is adapted to the picture first, and pictures on the way from it to each
edit are drawn, too (imagic.py).  DragDiffusion (Shi et al., 2023) trains a LoRA on one picture, too.
"""

if __name__ == "__main__":  # before torch is imported, which takes seconds: --help answers at once
    from minilora.settings.command_line import restore as command

    command()
    raise SystemExit

import json
from dataclasses import replace
from pathlib import Path

import torch

from ..data.pictures import NO_PICTURE, as_picture, as_tensor, crop_square, open_picture
from ..data.sheet import save_picture, sheet
from ..files.network import load_lora
from ..lora import lora_disabled, set_lora_strength
from ..models.base import Base
from ..models.device import this_device
from ..settings.errors import UserError
from ..settings.restore import RestoreConfig
from ..settings.train import TrainConfig
from ..training import train
from .ddim import Levels, ddim_draw, ddim_invert, guided
from .imagic import SHARES, WithText, find_text, on_the_way
from .likeness import psnr
from .report import write_figures


def restore(config: RestoreConfig) -> dict[str, float]:
    """Restore a picture with and without a LoRA of it, draw the edits, and return the figures."""
    path, output = Path(config.picture[0]), Path(config.output)
    picture = see(path, config)
    optimized = find_text(picture, config) if config.optimise_text else None
    folder = output / ("lora" if optimized is None else "lora-optimised")
    lora = config.lora or learn(path, config.prompt, folder, config, optimized)
    base = Base.of(config, this_device(), config.precision)
    base.refuse_inpainting()
    load_lora(base.unet, lora)

    levels = Levels.of(base.scheduler, config.steps, base.device)
    latents = base.encode_picture(picture)[0][None].to(base.device)  # (1, channels, h, w)
    texts = [base.encode_text(text)[None].to(base.device) for text in (config.prompt, "", *config.edit)]
    text, empty, *edits = texts  # (1, tokens, width) each
    text = text if optimized is None else optimized
    predict = guided(base.unet, text)

    def draw_edit(edit: torch.Tensor) -> torch.Tensor:
        return ddim_draw(guided(base.unet, edit, empty, config.guidance), noise, levels)

    with base.autocast():
        with lora_disabled(base.unet):
            without = ddim_draw(predict, ddim_invert(predict, latents, levels), levels)
        restored = ddim_draw(predict, ddim_invert(predict, latents, levels), levels)
        set_lora_strength(base.unet, config.strength)
        noise = ddim_invert(predict, latents, levels)
        shares = SHARES if config.optimise_text else SHARES[-1:]
        between = [[draw_edit(text.lerp(edit, share)) for share in shares] for edit in edits]  # the last is the edit

    ends = [row[-1] for row in between]
    pixels = [base.decode_latents(x)[0] for x in (latents, without, restored, *ends)]  # (3, h, w) each
    names = ["the picture", "only through the VAE", "restored by the base", "with the LoRA", *config.edit]
    row = [as_picture(p) for p in (picture, *pixels)]
    save_picture(sheet([row], names, [path.stem]), output / "restored.png")
    figures = {
        "PSNR through the VAE alone, the most that can be reached, dB": psnr(pixels[0], picture),
        "PSNR restored by the base, dB": psnr(pixels[1], picture),
        "PSNR restored with the LoRA, dB": psnr(pixels[2], picture),
        "error of the latents there and back by the base, relative": relative_error(without, latents),
        "error of the latents there and back with the LoRA, relative": relative_error(restored, latents),
    }
    if config.optimise_text:
        rows = [[as_picture(base.decode_latents(x)[0]) for x in row] for row in between]
        columns = [f"{share:.0%} of the edit" for share in SHARES]
        save_picture(sheet(rows, columns, list(config.edit)), output / "between.png")
        print(f"wrote {output / 'between.png'}")
        for edit, row in zip(config.edit, rows, strict=True):
            figures |= on_the_way(base, picture, edit, row, config)
    write_figures(output, figures)
    print(f"wrote {output / 'restored.png'}")
    return figures


def see(path: Path, config) -> torch.Tensor:
    """Return a picture as training sees it, (3, side, side) in [-1, 1]; UserError if it cannot be opened."""
    try:
        picture = open_picture(path)
    except NO_PICTURE as error:
        raise UserError(f"{path}: it cannot be opened as a picture ({error})") from error
    return as_tensor(crop_square(picture, Base.of(config, torch.device("cpu")).resolution))


def learn(path: Path, prompt: str, output: Path, config, text: torch.Tensor | None = None) -> Path:
    """Train a LoRA on one picture, as `config` says, and return its file.

    `text`, (1, tokens, width), is the embedding to train with, if it is not that of the prompt.  An existing LoRA that
    was trained with the same settings is reused.
    """
    settings = TrainConfig(
        data=(str(path),),
        caption=prompt,
        caption_dropout=0.0,  # guidance is low here, so the empty prompt hardly matters
        **config.base_settings(),
        rank=config.rank,
        targets=("attention",),  # the other layers would hold on to what an edit is to change
        steps=config.train_steps,
        checkpoint_every=config.train_steps,  # one at the end; it identifies the picture, so another one is noticed
        precision=Base.of(config, this_device(), config.precision).precision,  # as config.json has it
        output=str(output),
    )
    about = output / "config.json"
    before = json.loads(about.read_text()) if about.exists() else {}
    same = before | {"resume": False} == json.loads(settings.to_json())
    return train(replace(settings, resume=same), None if text is None else WithText(text))


def relative_error(one: torch.Tensor, two: torch.Tensor) -> float:
    """Return the sum of squares of the difference, relative to that of the second tensor."""
    return ((one - two).square().sum() / two.square().sum()).item()
