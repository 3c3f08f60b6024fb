"""The pictures that a run draws: samples during training, and the before-and-after sheet."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from PIL import Image

from ..data.buckets import Size
from ..data.folder import Item
from ..data.pictures import crop
from ..data.sheet import sheet
from ..files.network import components
from ..models.base import Base
from ..sampling import draw, draw_each, evaluating, merged_at
from ..settings.sample import SampleConfig
from .lost import heartbeat


@contextmanager
def beside_training(base: Base) -> Iterator[None]:
    """Within the block every part is in evaluation mode; on a GPU the VAE uses as little memory as possible.

    For that it decodes one picture at a time, and pictures larger than its own size in overlapping tiles.
    """
    if base.device.type != "cpu":
        base.vae.enable_slicing()
        base.vae.enable_tiling()
    with evaluating(*components(base.pipeline).values()):
        yield


def draw_prompts(base: Base, prompts: Sequence[str], size: int, config: SampleConfig) -> Image.Image:
    """Draw each prompt with the current LoRA and three seeds."""
    seeds = range(config.seed, config.seed + 3)
    with beside_training(base):
        rows = draw_each(base, prompts, seeds, size, config, heartbeat)
    return sheet(rows, [f"seed {seed}" for seed in seeds], list(prompts))


def before_after(base: Base, item: Item, size: Size, config: SampleConfig, before: Base | None = None) -> Image.Image:
    """Draw a training picture's caption with the base and with the LoRA at 0.5 and 1.0, beside the picture itself.

    `before` is the original base if all its weights were trained; the sheet then compares it with the trained base.
    """
    seeds, columns = range(config.seed, config.seed + 3), []
    ways = {"base": (base, 0.0), "LoRA at 0.5": (base, 0.5), "LoRA at 1.0": (base, 1.0)}
    if before:
        ways = {"base": (before, 1.0), "trained": (base, 1.0)}
    for drawn_by, strength in ways.values():
        with beside_training(drawn_by), merged_at(drawn_by, {"default": strength}):
            # One after the other on a GPU, where training may leave little memory.
            groups = [seeds] if base.device.type == "cpu" else [[seed] for seed in seeds]
            drawn = [draw(drawn_by, item.captions[0], group, size, config, heartbeat) for group in groups]
            columns.append([picture for group in drawn for picture in group])
    columns.append([crop(item.open(), size)] * len(seeds))
    rows = [list(row) for row in zip(*columns, strict=True)]
    return sheet(rows, [*ways, "training picture"], [f"seed {seed}" for seed in seeds])
