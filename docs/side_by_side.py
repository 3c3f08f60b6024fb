"""Draw the same prompts with several LoRAs, one column each, from the same noise.

    python docs/side_by_side.py --prompt "sks robot" --lora "whole pictures" out/whole --lora "masks" out/robot \
        --output docs/pictures/masks.png
"""

import argparse
from pathlib import Path

from minilora.data.sheet import save_picture, sheet
from minilora.files.network import load_lora
from minilora.lora import remove_lora
from minilora.models.base import Base
from minilora.models.device import this_device
from minilora.sampling import draw_each, merged_at
from minilora.settings.sample import SampleConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", action="append", required=True, help="what to draw; may be repeated")
    parser.add_argument(
        "--lora", nargs=2, action="append", required=True, metavar=("TITLE", "LORA"), help="a column; may be repeated"
    )
    parser.add_argument("--count", type=int, default=1, metavar="N", help="rows for each prompt, from seeds 0, 1, …")
    parser.add_argument("--output", type=Path, required=True, metavar="PNG", help="where the sheet is written")
    args = parser.parse_args()
    base, seeds, how = Base(None, this_device()), range(args.count), SampleConfig(tuple(args.prompt))

    def column() -> list:
        return [picture for row in draw_each(base, args.prompt, seeds, base.resolution, how) for picture in row]

    columns = {"the base": column()}
    for title, lora in args.lora:
        load_lora(base.unet, lora)
        with merged_at(base, {}):
            columns[title] = column()
        remove_lora(base.unet)
    rows = [list(row) for row in zip(*columns.values(), strict=True)]
    save_picture(sheet(rows, list(columns), [prompt for prompt in args.prompt for _ in seeds]), args.output)


if __name__ == "__main__":
    main()
