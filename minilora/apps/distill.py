"""Other objectives: train a LoRA on the base's own pictures to draw in few steps, or evenly.

    python -m minilora.apps.distill                       # four steps instead of fifty: consistency.py
    python -m minilora.apps.distill --objective smooth    # pictures that change evenly: smooth.py

The LoRA should learn no new content, so the base draws the training pictures itself, from a file with one caption per
line.  Every 32nd caption is held out for measurements.  The ordinary loop trains the LoRA, with the objective as an
argument, and the effect is measured without and with the LoRA.  Repeating the command resumes a stopped run.
"""

if __name__ == "__main__":  # before torch is imported, which takes seconds: --help answers at once
    from minilora.settings.command_line import distill as command

    command()
    raise SystemExit

import json
from dataclasses import asdict
from pathlib import Path

from ..data.sheet import save_picture
from ..files.network import load_lora
from ..files.tensors import write_whole
from ..models.base import Base
from ..run.ranks import Ranks, processes, wait_for_all
from ..settings.distill import DistillConfig
from ..settings.train import TrainConfig
from ..training import train
from .consistency import LatentConsistency
from .drawing import draw_pictures, read_captions
from .fewsteps import few_steps
from .report import write_figures
from .smooth import SmoothDenoising, smoothness


def distill(config: DistillConfig) -> dict[str, float] | None:
    """Train a LoRA for the objective, measure it, and return the figures (on the main process)."""
    output = Path(config.output)
    learnt, held_out = read_captions(config)
    with processes() as ranks:
        folder = config.data or draw_pictures(config, learnt, output / "pictures", ranks)
        settings = TrainConfig(
            data=(str(folder),),
            caption_dropout=0.0,  # only the teacher, which is not trained, runs without a caption
            **config.base_settings(),
            rank=config.rank,
            targets=config.targets,
            steps=config.train_steps,
            batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            lr_schedule="cosine",
            precision=config.precision,
            seed=config.seed,
            output=str(output),
            checkpoint_every=min(100, config.train_steps),
            resume=repeats_last_run(config, output / "distill.json", ranks),
        )
        lora = train(settings, objective_of(config))
    if not ranks.is_main:
        return None
    base = Base.of(config, ranks.device, config.precision)
    load_lora(base.unet, lora)
    measure = few_steps if config.objective == "lcm" else smoothness
    figures, picture = measure(base, held_out, Path(folder), config)
    write_figures(output, figures)
    save_picture(picture, output / f"{config.objective}.png")
    print(f"wrote {output / f'{config.objective}.png'}")
    return figures


def repeats_last_run(config: DistillConfig, about: Path, ranks: Ranks) -> bool:
    """Return whether the last run had the same settings as this one, and record these in `about`."""
    settings = json.dumps(asdict(config), indent=2) + "\n"
    same = about.exists() and about.read_text() == settings
    wait_for_all()  # all processes read it before it is written
    if ranks.is_main:
        write_whole(about, settings.encode())
    return same


def objective_of(config: DistillConfig) -> LatentConsistency | SmoothDenoising:
    """Return the objective that the settings name."""
    if config.objective == "lcm":
        return LatentConsistency(config.guidance, config.skip)
    return SmoothDenoising(config.weight)
