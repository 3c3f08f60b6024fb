"""DreamBooth: learn one subject from a few pictures, without forgetting what the rest of its class looks like.

A LoRA trained on four pictures of "a sks dog" soon draws that dog for every "a dog".  So half of the training pictures
are class pictures of "a dog", which the base draws before training (prior preservation):

    loss = ½ · (loss of the subject + λ · loss of the class)          λ: --prior-weight

The subject has the even positions of the stream, the class the odd ones.  The class pictures have their own folder,
and the number of each is its seed.  Only missing ones are drawn; other pictures in the folder count, too.  A drawn
picture's file names its base and its prompt; pictures of another base or prompt are refused.

Source: Ruiz et al., "DreamBooth: fine tuning text-to-image diffusion models for subject-driven
generation", 2022.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from ..data.folder import Item, read_folder
from ..data.pictures import pixels_limited
from ..data.sheet import DRAWN_BY, save_picture
from ..models.base import Base
from ..sampling import TOGETHER, draw
from ..settings.errors import UserError
from ..settings.sample import SampleConfig
from ..settings.train import TrainConfig
from .lost import heartbeat
from .ranks import Ranks, decided_by_main, wait_for_all


def class_pictures(config: TrainConfig, base: Base, ranks: Ranks) -> list[Item]:
    """Return pictures of the class, at least --class-pictures.

    Each process draws its share of the missing ones.  Raises UserError for a folder with unreadable pictures, or with
    pictures that were drawn by another base or for another prompt.
    """
    folder, needed = Path(config.class_data), config.class_pictures
    drawn_by = f"{config.class_prompt!r} by the base {base.content[:16]}"
    same = {name: getattr(config, name) for name in ("caption_column", "max_pixels", "cache")}
    what = TrainConfig(data=(str(folder),), caption=config.class_prompt, **same)

    def look(quiet: bool = True) -> list[Item]:
        return read_folder(str(folder), what, "--class-data", quiet)

    def count() -> int:
        items = look() if folder.is_dir() and any(folder.iterdir()) else []
        refuse_others(items, drawn_by)
        return len(items)

    there = decided_by_main(count)
    names = (folder / f"class-{number:05d}.png" for number in range(needed + there))
    missing = [path for path in names if not path.exists()][: max(0, needed - there)]
    wait_for_all()  # all processes count before the first picture is drawn
    if missing:
        drawing = SampleConfig(prompt=(config.class_prompt,), model=config.model)
        share, side = missing[ranks.rank :: ranks.world], config.resolution or base.resolution
        minutes = seconds_per_picture(base, side, drawing) * len(share) / 60
        found = f"{there} of {needed} pictures of {config.class_prompt!r} are in {folder}"
        ranks.say(f"class      {found}; drawing {len(missing)}, about {minutes:.1f} minutes")
        for start in tqdm(range(0, len(share), TOGETHER), "draw", disable=not ranks.is_main):
            part = share[start : start + TOGETHER]
            seeds = [int(path.stem.split("-")[1]) for path in part]
            drawn = draw(base, config.class_prompt, seeds, side, drawing, heartbeat)
            for path, picture in zip(part, drawn, strict=True):
                picture.info[DRAWN_BY] = drawn_by
                save_picture(picture, path)
        base.release("pipeline", "vae", "text_encoder", "text_encoder_2")
        wait_for_all()
    return look(quiet=not ranks.is_main)


def refuse_others(items: Sequence[Item], drawn_by: str) -> None:
    """Raise UserError for class pictures whose files name another base or another prompt."""
    others = {}
    for item in items:
        with pixels_limited(None), Image.open(item.path) as picture:  # decodes nothing
            told = picture.info.get(DRAWN_BY, drawn_by)  # the user's own pictures name none
        if told != drawn_by:
            others[item.path] = told
    if others:
        path, told = next(iter(others.items()))
        raise UserError(
            f"--class-data {path.parent}: {len(others)} of its {len(items)} pictures are for another base or prompt: "
            f"{path.name} was drawn for {told}, and this run is for {drawn_by}; choose another folder, or delete them"
        )


def seconds_per_picture(base: Base, side: int, drawing: SampleConfig) -> float:
    """Estimate the time to draw a picture: one and two steps are measured, and their difference is one step."""
    times = []
    for steps in (1, 1, 2):  # the first time is slower
        began = time.perf_counter()
        draw(base, drawing.prompt[0], range(TOGETHER), side, replace(drawing, steps=steps), heartbeat)
        times.append((time.perf_counter() - began) / TOGETHER)
    return times[1] + (drawing.steps - 1) * max(0.0, times[2] - times[1])
