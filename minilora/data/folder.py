"""A folder of pictures with captions: the pictures to train on, and everything that is wrong with it.

Nothing that may be meant for training is skipped silently.  A picture that cannot be used is an error.  Hidden pictures
and copies made by programs, texts without a picture and files of other kinds are named in printed lines.
"""

import hashlib
import io
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..settings.errors import UserError
from ..settings.shared import WEIGHT, hub_name, is_mask, path_and_number
from ..settings.train import TrainConfig
from .captions import TABLES, beside, read_table, read_text, spelling
from .contents import about_left_out, about_unused, files_in, results_inside
from .from_hub import fetched
from .kinds import is_picture, named, remedy
from .looks import Look, look_at_all
from .pictures import open_mask, open_picture, pixels_limited


class ChangedError(UserError):
    """A picture has changed since its folder was read."""


@dataclass(frozen=True)
class Item:
    """One picture of a folder: its file, a hash of the file's bytes, its size, its captions."""

    path: Path
    digest: str
    size: tuple[int, int]  # width and height in pixels
    captions: tuple[str, ...]  # one or more
    mask: Path | None = None  # the mask's file; if it is the picture's own, the mask is its alpha channel
    mask_digest: str = ""

    def open(self) -> Image.Image:
        """Return the picture as `open_picture` does; ChangedError if the file is gone or has other content."""
        return open_picture(_unchanged(self.path, self.digest), self.size[0] * self.size[1])

    def open_mask(self) -> Image.Image | None:
        """Return the mask as `pictures.open_mask` does; ChangedError if its file is gone or has other content."""
        if self.mask:
            with pixels_limited(None):  # its size was checked before
                return open_mask(_unchanged(self.mask, self.mask_digest), self.mask == self.path)
        return None


def _unchanged(path: Path, digest: str) -> io.BytesIO:
    """Return a file's content; ChangedError if its hash is not the one from when its folder was read."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ChangedError(f"{path} can no longer be read ({error.strerror})") from error
    if hashlib.sha256(content).hexdigest() != digest:
        raise ChangedError(f"{path} has changed since its folder was read; start again")
    return io.BytesIO(content)


def read_folders(config: TrainConfig, quiet: bool = False) -> list[Item]:
    """Return the pictures of all folders of `config.data`, each repeated by its folder's weight.

    Raises UserError with everything that is wrong with the folders, in one message.  `quiet`: print nothing.
    """
    items, problems = [], []
    for text in config.data:
        folder, weight = path_and_number(text, WEIGHT)
        try:
            if hub_name(folder):
                folder = str(fetched(folder, config, quiet))
            items += [item for item in read_folder(folder, config, quiet=quiet) for _ in range(int(weight))]
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("; ".join(problems))
    return items


def read_folder(name: str, config: TrainConfig, option: str = "--data", quiet: bool = False) -> list[Item]:
    """Return the pictures of a folder with their captions, in the order of their names.

    Captions come from metadata.jsonl or metadata.csv, else from a .txt beside each picture, else from --caption;
    --trigger is put before each.  The mask of a.jpg is a.mask.png beside it or, with --alpha-mask, its alpha channel.
    `name` may also be a single picture, whose caption is --caption.  Unless `quiet`, prints which files are not used.
    Raises UserError with everything that is wrong with the folder, in one message that names the option.
    """
    folder = Path(os.path.normpath(name))
    problems: list[str] = []
    remarks: list[str] = []
    captions: dict[Path, tuple[str, ...]]
    masks: dict[Path, Path]
    if folder.is_file():
        if config.caption is None:
            raise UserError(f"{option} {folder}: one picture needs its --caption")
        captions = {folder: (config.caption,)}
        masks = beside(captions, _masks(folder.parent.iterdir()))
    elif not folder.is_dir():
        raise UserError(f"{option} {folder}: there is no such folder or picture")
    else:
        captions, masks = _captions(folder, config, problems, remarks)
        if not captions and not problems:
            raise UserError("; ".join([f"{option} {folder}: there is no picture in it", *remarks]))
    items, unread = [], {}
    looks = look_at_all(list(captions), [*masks.values()], folder, config, quiet)
    for path, look in looks.items():
        if look.kind:
            unread[_name(path, folder)] = look.kind
        elif look.size is None:
            problems.append(f"{'it' if path == folder else _name(path, folder)} {look.wrong}")
        elif path in captions:
            if look.wrong:
                remarks.append(f"{_name(path, folder)}: its colour profile cannot be used ({look.wrong})")
            texts = tuple(with_trigger(text, config) for text in captions[path])
            mask = masks.get(path, path if look.has_alpha else None)
            there = looks[mask] if mask else Look()
            if there.size and not same_shape(look.size, there.size):
                problems.append(
                    f"{_name(mask, folder)} has {there.size[0]} × {there.size[1]} pixels, another shape than "
                    f"{_name(path, folder)} with {look.size[0]} × {look.size[1]}; a mask covers the whole picture"
                )
            items.append(Item(path, look.digest, look.size, texts, mask, there.digest))
    if unread:
        kinds = list(dict.fromkeys(unread.values()))
        problems.append(f"{named(list(unread), 'pictures')} cannot be read ({', '.join(kinds)}); {remedy(kinds)}")
    if not quiet:
        for remark in remarks:
            print(f"note: {option} {folder}: {remark}", file=sys.stderr)
    if problems:
        raise UserError(f"{option} {folder}: " + "; ".join(problems))
    return items


def same_shape(picture: tuple[int, int], mask: tuple[int, int]) -> bool:
    """Whether picture and mask have the same aspect ratio, up to rounding by less than a pixel."""
    (width, height), (w, h) = picture, mask
    return abs(w * height - h * width) < max(width, height)


def with_trigger(caption: str, config: TrainConfig) -> str:
    """Return a caption with --trigger before it; for an empty caption, the trigger alone."""
    return ", ".join(filter(None, (config.trigger, caption)))


def without_trigger(caption: str, config: TrainConfig) -> str:
    """Return a caption without its --trigger; "" if there is no --trigger."""
    return caption.removeprefix(config.trigger).removeprefix(", ") if config.trigger else ""


def _name(path: Path, folder: Path) -> str:
    """Return a file's name for messages: its path relative to the folder."""
    return path.name if path == folder or not path.is_relative_to(folder) else str(path.relative_to(folder))


# ------------------------------------------------------------------------------------- captions


def _masks(files: Iterable[Path]) -> dict[Path, Path]:
    """Return the masks among files, by the path of the picture without its suffix."""
    return {path.with_name(path.stem[: -len(".mask")]): path for path in files if is_picture(path) and is_mask(path)}


def _captions(
    folder: Path, config: TrainConfig, problems: list[str], remarks: list[str]
) -> tuple[dict[Path, tuple[str, ...]], dict[Path, Path]]:
    """Return the captions of each picture, in the order of the names, and the masks of those that have one.

    Adds what is wrong, such as a picture without a caption, to `problems`, and unused files to `remarks`.
    """
    files, left_out = files_in(folder, problems)
    results = results_inside(folder, config.output)
    written = [path for path in files if results and path.is_relative_to(results)]
    if any(map(is_picture, written)):
        remarks.append(f"{_name(results, folder)}: left out, because results are written there")
    files = sorted({*files} - {*written}) if written else files
    tables = [folder / name for name in TABLES if (folder / name).exists()]
    if len(tables) > 1:
        raise UserError(f"{folder} holds metadata.jsonl and metadata.csv; keep one of them")
    pictures = {path for path in files if is_picture(path) and not is_mask(path)}
    texts = beside(pictures, {path.with_suffix(""): path for path in files if path.suffix.lower() == ".txt"})
    if tables:
        captions = read_table(tables[0], config.caption_column, [*files, *left_out, *written], problems)
    else:
        captions = {path: (read_text(text, _name(text, folder), problems).strip(),) for path, text in texts.items()}
    pictures |= captions.keys()  # a table may name pictures with any extension, in any place
    lacking = sorted(pictures - captions.keys())
    if config.caption is not None:
        captions |= dict.fromkeys(lacking, (config.caption,))
        lacking = []

    all_masks = _masks(path for path in files if path not in pictures)
    masks = beside(pictures, all_masks)
    if alone := sorted({*all_masks.values()} - {*masks.values()}):
        names = named([_name(path, folder) for path in alone], "masks")
        problems.append(f"{names}: there is no picture of that name; a.mask.png is the mask of a.png or a.jpg")

    remarks += about_left_out({*left_out} - pictures, folder)
    used = pictures | {*texts.values(), *all_masks.values(), *tables}
    unused = about_unused({*files} - used, folder)
    if lacking:
        problems.append("; ".join([_about_lacking(lacking, tables, texts, folder), *unused]))
    else:
        remarks += unused
        if tables and texts:
            names = named(sorted({_name(text, folder) for text in texts.values()}), "texts beside pictures")
            remarks.append(f"{names}: not read, because the captions are in {tables[0].name}")
    in_order = sorted(pictures, key=lambda path: Path(spelling(path)).parts)  # the same on all systems
    return {path: captions.get(path, ()) for path in in_order}, masks


def _about_lacking(lacking: Sequence[Path], tables: Sequence[Path], texts: dict[Path, Path], folder: Path) -> str:
    """Return a message about pictures without a caption: their names, where captions were expected, what to do."""
    names = [_name(path, folder) for path in lacking]
    told = f"{named(names, 'pictures')} {'has' if len(names) == 1 else 'have'} no caption"
    if not tables:
        where = "there is no metadata.jsonl, no metadata.csv and no .txt beside"
        return f"{told}: {where}; write them there, or give one for all with --caption"
    there = [_name(texts[path], folder) for path in lacking if path in texts]
    hint = f"{named(there, 'texts')} beside: not read, because there is a table; " if there else ""
    return f"{told} in {tables[0].name}; {hint}add it there, or give --caption"
