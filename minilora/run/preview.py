"""--preview: the pictures and captions as training will see them; only the tokenizers are loaded."""

import itertools
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps

from ..data.examples import Examples
from ..data.folder import Item
from ..data.pictures import as_picture
from ..data.sheet import save_picture
from ..models.device import CPU
from ..models.text import cut_off
from ..settings.train import TrainConfig
from .encode import notes, sizes_for
from .ranks import Ranks
from .setup import load_base
from .validation import read_pictures

TILE, GAP, LINE = 192, 16, 16  # pixels: a picture's side, the gap between pictures, the height of a line of text
COLUMNS, ROWS, PAGES = 6, 4, 10  # pictures across and down a page; maximum number of pages
FADED = 0.85  # share of grey in what a mask leaves out
GREY, BLACK, RED = "#777777", "#000000", "#c00000"  # the picture's data; its captions; their ends that are cut off

Word = tuple[str, str]  # with its colour


@dataclass(frozen=True)
class Preview:
    """The training data of a run: counts in lines of text, and pictures on pages."""

    lines: list[str]
    pages: list[Image.Image]


def write_preview(config: TrainConfig) -> Path:
    """Write the preview into the output folder, print its counts, and return the path of the first page."""
    seen, output = look_at(config), Path(config.output)
    for old in output.glob("preview*.png"):
        if re.fullmatch(r"preview(_\d+)?", old.stem):
            old.unlink()
    paths = [
        output / (f"preview_{number}.png" if number > 1 else "preview.png") for number in range(1, len(seen.pages) + 1)
    ]
    for page, path in zip(seen.pages, paths, strict=True):
        save_picture(page, path)
    print("\n".join([*seen.lines, f"wrote      {' and '.join(map(str, paths))}"]))
    return paths[0]


def look_at(config: TrainConfig) -> Preview:
    """Return the preview of a run with these settings; UserError for anything wrong with its pictures."""
    items, held_out = read_pictures(config, Ranks(0, 1, CPU))
    config = config.with_steps(len(items))
    base = load_base(config, CPU)
    resolution, sizes = sizes_for(base, config)
    examples = Examples(items, config, resolution, base, len(base.schedule), sizes)
    first: dict[Item, int] = {}  # the first position of each picture
    positions = itertools.count()
    while len(first) < len({*items}):
        position = next(positions)
        first.setdefault(examples.picture_at(position), position)

    shown = list(dict.fromkeys(items))[: PAGES * COLUMNS * ROWS]
    repeats, cuts = Counter(items), {text: cut_off(base.tokenizers, text) for text in examples.captions}
    tiles = [_tile(examples, first[item], repeats[item], cuts) for item in shown]
    pages = [_page(tiles[start : start + COLUMNS * ROWS]) for start in range(0, len(tiles), COLUMNS * ROWS)]
    return Preview(_counts(config, examples, held_out, cuts, len(shown)), pages)


def _counts(
    config: TrainConfig, examples: Examples, held_out: list[Item], cuts: dict[str, str], shown: int
) -> list[str]:
    """Return the counts of pictures, captions, sizes and steps, as lines."""
    items, different = examples.items, len({*examples.items})
    copies = "" if different == len(items) else f", {different} different ones"
    lines = [f"pictures   {len(items)} of {', '.join(config.data)}{copies}"]
    if shown < different:
        lines.append(f"shown      the first {shown}")
    if held_out:
        lines.append(f"validation {len(held_out)} held-out pictures, not shown")
    sizes = [f"{width} × {height} ({len(inside)})" for (width, height), inside in examples.buckets.items()]
    lines.append(f"size       {' and '.join(sizes)} pixels")
    lines += notes(examples)
    lines += [f"enlarged   {line}" for line in examples.enlarged()]
    numbers = range(config.variants or 1)
    captions = {examples.version(text, n) for item in items for text in item.captions for n in numbers}
    cut = sum(bool(cuts[caption]) for caption in captions)
    lines.append(f"captions   {len(captions)} different" + f"; the end of {cut}, struck out, is not seen" * (cut > 0))
    times = config.steps * config.batch_size / len(items) / (2 if config.has_class_pictures else 1)
    halves = ", half of them class pictures" if config.has_class_pictures else ""
    lines.append(f"steps      {config.steps} × {config.batch_size} pictures{halves}; each is seen {times:,.1f} times")
    return lines


# ------------------------------------------------------------------------------------------ drawing


def _tile(examples: Examples, position: int, repeats: int, cuts: dict[str, str]) -> Image.Image:
    """Return the picture at a position as training sees it, above its name, its sizes and its captions."""
    view = examples.view_at(position)
    item, pixels = view.item, examples.pixels(view)  # (3, h, w)
    if item.mask:  # fade what does not count into grey
        counts = F.interpolate(examples.mask(view)[None], pixels.shape[1:])[0]  # (1, h, w)
        pixels = pixels * (1 - FADED * (1 - counts))
    picture = as_picture(pixels)
    about = " to ".join(f"{width}x{height}" for width, height in (item.size, picture.size))  # (the font has no ×)
    about += ", masked" * (item.mask is not None) + ", mirrored" * view.mirrored + f", {repeats} times" * (repeats > 1)
    lines = _wrapped(item.path.name, GREY) + _wrapped(about, GREY)
    for caption in (examples.version(text, examples.variant_at(position)) for text in item.captions):
        seen = caption.removesuffix(cuts[caption])
        lines += _wrapped(seen, BLACK, cuts[caption]) if caption else _wrapped("(no words)", GREY)

    tile = Image.new("RGB", (TILE, TILE + LINE * (len(lines) + 1)), "white")
    fitted = ImageOps.contain(picture, (TILE, TILE), Image.Resampling.LANCZOS)
    tile.paste(fitted, ((TILE - fitted.width) // 2, (TILE - fitted.height) // 2))
    ink, font = ImageDraw.Draw(tile), ImageFont.load_default(LINE - 4)
    for number, line in enumerate(lines):
        left, middle = 0.0, TILE + LINE * (number + 1)
        for word, colour in line:
            right = left + font.getlength(word)
            ink.text((left, middle), word, colour, font, anchor="lm")
            if colour == RED:
                ink.line((left, middle, left + font.getlength(word.rstrip()), middle), RED)
            left = right
    return tile


def _wrapped(text: str, colour: str, cut: str = "") -> list[list[Word]]:
    """Return a text, and the end that is cut off, in lines that are no wider than a tile."""
    font = ImageFont.load_default(LINE - 4)
    lines: list[list[Word]] = []
    left = float(TILE)
    for part, ink in ((text, colour), (cut, RED)):
        for word in re.findall(r"\S+\s*|\s+", part):
            for piece in [word] if font.getlength(word.rstrip()) <= TILE else word:  # letter by letter
                if not lines or left + font.getlength(piece.rstrip()) > TILE:
                    lines.append([])
                    left = 0.0
                lines[-1].append((piece, ink))
                left += font.getlength(piece)
    return lines


def _page(tiles: list[Image.Image]) -> Image.Image:
    """Put tiles on a page, row by row; a row is as high as its tallest tile."""
    rows = [tiles[start : start + COLUMNS] for start in range(0, len(tiles), COLUMNS)]
    heights = [max(tile.height for tile in row) + GAP for row in rows]
    page = Image.new("RGB", (GAP + len(rows[0]) * (TILE + GAP), GAP + sum(heights)), "white")
    for number, row in enumerate(rows):
        for column, tile in enumerate(row):
            page.paste(tile, (GAP + column * (TILE + GAP), GAP + sum(heights[:number])))
    return page
