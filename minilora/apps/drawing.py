"""Training pictures that the base draws itself, and captions held out for measurements."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from ..data import draws
from ..data.pictures import as_picture
from ..data.sheet import save_picture, write_captions
from ..files.tensors import write_whole
from ..models.base import Base
from ..run.lost import heartbeat
from ..run.ranks import Ranks, wait_for_all
from ..settings.errors import UserError
from ..settings.sample import SampleConfig
from ..settings.setting import BUNDLED, is_miniature
from .ddim import Levels, ddim_draw, guided

HELD_OUT = 32  # one caption of 32 is held out
TOGETHER = 8  # pictures drawn in one pass
STYLES = ("", ", noto style", ", twemoji style", ", openmoji style")  # endings of the bundled base's captions


def read_captions(config) -> tuple[list[str], list[str]]:
    """Return the training captions and the held-out ones; for the bundled base each with a style."""
    path = Path(config.captions or BUNDLED / "captions.txt")
    try:
        names = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--captions {path}: it cannot be read as text ({error})") from error
    names = [name.strip() for name in names if name.strip()]
    if len(names) < 2:
        raise UserError(f"--captions {path}: it has {len(names)} captions; it needs two, because one is held out")
    held_out = names[::HELD_OUT]
    learnt = [name for number, name in enumerate(names) if number % HELD_OUT]
    if not is_miniature(config.model):
        return learnt, held_out
    return (
        [f"{name}{style}" for name in learnt for style in STYLES],
        [f"{name}{STYLES[1 + number % 3]}" for number, name in enumerate(held_out)],
    )


def draw_pictures(config, captions: Sequence[str], folder: Path, ranks: Ranks) -> Path:
    """Draw pictures of captions with the base, divided over the processes, and return their folder.

    Existing pictures that were drawn with the same settings are kept.
    """
    chosen = [captions[draws.picture_at(config.seed, p, len(captions))] for p in range(config.pictures)]
    files = [folder / f"{position:05d}.png" for position in range(config.pictures)]
    steps = SampleConfig(prompt=(*captions[:1],), model=config.model).steps
    base = Base.of(config, ranks.device, config.precision)
    base.refuse_inpainting()
    settings = [*config.base_settings().values(), base.precision, config.seed, config.middle_guidance, steps, chosen]
    about, said = folder / "drawn.json", json.dumps(settings) + "\n"
    other = not about.exists() or about.read_text() != said
    wait_for_all()
    if ranks.is_main and other:
        for path in folder.glob("*.png"):
            path.unlink()
        write_whole(about, said.encode())
        write_captions(folder, [file.name for file in files], chosen)
    wait_for_all()
    mine = [position for position in range(ranks.rank, config.pictures, ranks.world) if not files[position].exists()]
    for start in tqdm(range(0, len(mine), TOGETHER), "draw", disable=not (ranks.is_main and mine)):
        positions = mine[start : start + TOGETHER]
        shape = (base.unet.config.in_channels, *[base.unet.config.sample_size] * 2)
        noise = torch.stack([draws.gaussian(config.seed, "drawn picture", p, shape) for p in positions])
        pictures = draw_from(base, noise, [chosen[p] for p in positions], steps, config.middle_guidance)
        for position, picture in zip(positions, pictures, strict=True):
            save_picture(as_picture(picture), files[position])
            heartbeat()
    wait_for_all()
    return folder


def draw_from(base: Base, noise: torch.Tensor, captions: Sequence[str], steps: int, guidance: float) -> torch.Tensor:
    """Draw a picture from each noise, (n, channels, h, w), with its caption; (n, 3, h', w') in [-1, 1]."""
    texts = torch.stack([base.encode_text(caption) for caption in captions]).to(base.device)
    empty = base.encode_text("").to(base.device)
    levels = Levels.of(base.scheduler, steps, base.device)
    with base.autocast():
        predict = guided(base.unet, texts, empty, guidance)
        return base.decode_latents(ddim_draw(predict, noise.to(base.device), levels).float())
