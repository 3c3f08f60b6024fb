"""Draw prompts with a LoRA after too few, enough and too many steps, one column each.

python docs/how_many_steps.py dataset/cyanotype --prompt lion --prompt tomato --output docs/pictures/how_many_steps.png
"""

import argparse
from pathlib import Path

import torch

from minilora.data.sheet import save_picture, sheet
from minilora.files.network import load_lora
from minilora.lora import remove_lora
from minilora.models.base import Base
from minilora.sampling import draw_each, merged_at
from minilora.settings.sample import SampleConfig
from minilora.settings.train import TrainConfig
from minilora.training import train

STEPS = (25, 400, 1600)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="folder of pictures to train on")
    parser.add_argument("--prompt", action="append", required=True, help="what to draw; may be repeated")
    parser.add_argument("--output", type=Path, required=True, help="where the sheet is written")
    args = parser.parse_args()
    base = Base(None, torch.device("cpu"))
    how = SampleConfig(tuple(args.prompt))
    columns = {"the base": draw_each(base, args.prompt, (0,), base.resolution, how)}
    for steps in STEPS:
        # Each run goes on where the shorter one ended, which is the same as a run from the start.
        settings = {"steps": steps, "checkpoint_every": steps, "resume": steps > STEPS[0]}
        load_lora(base.unet, train(TrainConfig(data=(args.data,), output="out/how_many_steps", **settings)))
        with merged_at(base, {"default": 1.0}):
            columns[f"{steps} steps"] = draw_each(base, args.prompt, (0,), base.resolution, how)
        remove_lora(base.unet)
    rows = [[column[row][0] for column in columns.values()] for row in range(len(args.prompt))]
    save_picture(sheet(rows, list(columns), args.prompt), args.output)


if __name__ == "__main__":
    main()
