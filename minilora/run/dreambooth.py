"""DreamBooth: learn one subject from a few pictures without forgetting what else its class looks like.

A LoRA trained on four pictures of "a sks dog" soon draws that dog for every "a dog".  So half of what it
is trained on are pictures of the class, "a dog", that the base itself drew before:

    loss = ½ · (loss of the subject + λ · loss of the class)          λ: --prior-weight

The subject stands at the even positions of the stream, the class at the odd ones.  The class's pictures are
drawn into a folder of their own, each from its number as the seed; those that are there already are
counted and not drawn again, whoever put them there.

Source: Ruiz et al., "DreamBooth: fine tuning text-to-image diffusion models for subject-driven
generation", 2022.
"""

from pathlib import Path

from tqdm import tqdm

from ..data.folder import Item, read_folder
from ..models.base import DTYPES, Base
from ..sampling import TOGETHER, draw, save_picture
from ..settings.sample import SampleConfig
from ..settings.train import TrainConfig
from .lost import sign_of_life
from .ranks import Ranks, decided_by_main, wait_for_all


def class_pictures(config: TrainConfig, subjects: int, ranks: Ranks) -> list[Item]:
    """Return pictures of the class, --class-pictures for each of the subject's.

    Each process draws its share of the missing ones.  Raises UserError for a folder that holds what
    cannot be read.
    """
    folder, needed = Path(config.class_data), subjects * config.class_pictures
    what = TrainConfig(data=(str(folder),), caption=config.class_prompt, caption_column=config.caption_column)

    def look() -> list[Item]:
        return read_folder(str(folder), what, "--class-data")

    there = decided_by_main(lambda: len(look()) if folder.is_dir() and any(folder.iterdir()) else 0)
    names = (folder / f"class-{number:05d}.png" for number in range(needed + there))
    missing = [path for path in names if not path.exists()][: max(0, needed - there)]
    wait_for_all()  # before the first one is drawn, all must have counted
    if missing:
        ranks.say(
            f"class      {there} of {needed} pictures of {config.class_prompt!r} are in {folder}; drawing the others"
        )
        precision = DTYPES[config.precision]
        terminal = config.zero_terminal_snr
        base = Base(config.model, ranks.device, precision, config.model_config, terminal, config.base_lora)
        about = {"model": config.model, "model_config": config.model_config, "zero_terminal_snr": terminal}
        drawing = SampleConfig(prompt=(config.class_prompt,), **about)
        share = missing[ranks.rank :: ranks.world]
        for start in tqdm(range(0, len(share), TOGETHER), "draw", disable=not ranks.is_main):
            part = share[start : start + TOGETHER]
            seeds = [int(path.stem.split("-")[1]) for path in part]
            side = config.resolution or base.resolution
            for path, picture in zip(
                part, draw(base, config.class_prompt, seeds, side, drawing, sign_of_life), strict=True
            ):
                save_picture(picture, path)
        wait_for_all()
    return look()
