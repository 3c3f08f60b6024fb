"""A folder of pictures with captions: the pictures to train on, and everything that is wrong with it.

No file is skipped silently.  A picture that cannot be used is an error.  A copy, a text without a picture or a file of
another kind is named in a printed line.
"""

import hashlib
import io
import os
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from ..settings.errors import UserError
from ..settings.shared import WEIGHT, hub_name, is_mask, path_and_number
from ..settings.train import TrainConfig
from .captions import TABLES, beside, read_table, read_text
from .contents import files_in, told_left_out, told_unused
from .from_hub import fetched
from .kinds import is_picture, kind_of_bytes, named, remedy, unread_kind
from .known import Known, state_of
from .pictures import BOMB, NO_PICTURE, look_at, open_mask, open_picture, pixels_claimed, pixels_limited


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
    looks = _look_at_all(list(captions), [*masks.values()], folder, config, quiet)
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
            there = looks[mask] if mask else _Look()
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
    tables = [folder / name for name in TABLES if (folder / name).exists()]
    if len(tables) > 1:
        raise UserError(f"{folder} holds metadata.jsonl and metadata.csv; keep one of them")
    pictures = {path for path in files if is_picture(path) and not is_mask(path)}
    texts = beside(pictures, {path.with_suffix(""): path for path in files if path.suffix.lower() == ".txt"})
    if tables:
        captions = read_table(tables[0], config.caption_column, [*files, *left_out], problems)
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

    remarks += told_left_out({*left_out} - pictures, folder)
    used = pictures | {*texts.values(), *all_masks.values(), *tables}
    unused = told_unused({*files} - used, folder)
    if lacking:
        problems.append("; ".join([_told_lacking(lacking, tables, texts, folder), *unused]))
    else:
        remarks += unused
        if tables and texts:
            names = named(sorted({_name(text, folder) for text in texts.values()}), "texts beside pictures")
            remarks.append(f"{names}: not read, because the captions are in {tables[0].name}")
    return {path: captions.get(path, ()) for path in sorted(pictures, key=_order)}, masks


def _order(path: Path) -> list[str]:
    """Return the key to sort pictures by: the parts of the path, in the same Unicode form on all systems."""
    return [unicodedata.normalize("NFC", part) for part in path.parts]


def _told_lacking(lacking: Sequence[Path], tables: Sequence[Path], texts: dict[Path, Path], folder: Path) -> str:
    """Return a message about pictures without a caption: their names, where captions were expected, what to do."""
    names = [_name(path, folder) for path in lacking]
    told = f"{named(names, 'pictures')} {'has' if len(names) == 1 else 'have'} no caption"
    if not tables:
        return f"{told}: there is no metadata.jsonl, no metadata.csv and no .txt beside; give one, or --caption"
    there = [_name(texts[path], folder) for path in lacking if path in texts]
    hint = f"{named(there, 'texts')} beside: not read, because there is a table; " if there else ""
    return f"{told} in {tables[0].name}; {hint}add it there, or give --caption"


# ------------------------------------------------------------------------------------- pictures


@dataclass(frozen=True)
class _Look:
    """What is known of a file: its hash and size, or what is wrong with it, or its unreadable kind."""

    digest: str = ""
    size: tuple[int, int] | None = None
    wrong: str = ""
    kind: str = ""
    has_alpha: bool = False  # --alpha-mask uses it as the mask


def same_shape(picture: tuple[int, int], mask: tuple[int, int]) -> bool:
    """Whether picture and mask have the same aspect ratio, up to rounding by less than a pixel."""
    (width, height), (w, h) = picture, mask
    return abs(w * height - h * width) < max(width, height)


def _look_at_all(
    pictures: list[Path], masks: list[Path], folder: Path, config: TrainConfig, quiet: bool
) -> dict[Path, _Look]:
    """Examine all pictures and masks, in threads on all cores: Pillow and hashlib release Python's lock."""
    known, most, paths = Known(config.cache, folder), config.max_pixels, list(dict.fromkeys((*pictures, *masks)))

    def look(path: Path) -> _Look:
        alpha = config.alpha_mask and path not in masks
        if kind := unread_kind(path):
            return _Look(kind=kind)
        content = b""
        try:
            state = state_of(path)
            if not alpha and (before := known.get(path, state)):
                digest, size = before
                if size[0] * size[1] <= most:
                    return _Look(digest, size)
            content = path.read_bytes()
            size, wrong = look_at(io.BytesIO(content))
            digest = hashlib.sha256(content).hexdigest()
            mask = open_mask(io.BytesIO(content), alpha) if alpha or path in masks else None
            if mask and not mask.getbbox():
                told = "has an alpha channel that is all black" if alpha else "is all black"
                return _Look(wrong=f"{told}, so nothing of the picture would be learnt")
            if not wrong:  # remembered pictures get no warning, and each run must print it
                known.add(path, state, digest, size)
            return _Look(digest, size, wrong, has_alpha=alpha and mask is not None)
        except BOMB as error:
            pixels = pixels_claimed(error)
            advice = f"make it smaller or, if you trust the file, train with --max-pixels {pixels}"
            return _Look(wrong=f"has {pixels:,} pixels, more than the {most:,} of --max-pixels; {advice}")
        except NO_PICTURE as error:
            return _Look(kind=kind_of_bytes(content), wrong=f"cannot be opened as a picture ({error})")

    pool = ThreadPoolExecutor(_cores())
    try:
        with pixels_limited(most):
            done = pool.map(look, paths)
            bar = tqdm(done, "read", total=len(paths), unit="picture", delay=2, disable=quiet)
            found = dict(zip(paths, bar, strict=True))
    finally:
        pool.shutdown(cancel_futures=True)  # so that Ctrl-C does not wait for all of them
    known.save(paths)
    return found


def _cores() -> int:
    """Return the number of cores for this process; the processes of a machine divide its cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
