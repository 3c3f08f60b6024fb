"""A data set of the Hugging Face hub, OWNER/NAME, as a folder of pictures and captions in the cache.

The package datasets reads it row by row, so only --max-pictures of a large one are fetched.  The picture files are
stored unchanged, and the captions go into a metadata.jsonl.  The folder gets its name when it is complete; after that,
the hub is not contacted again.
"""

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Iterable
from io import BytesIO
from itertools import islice
from pathlib import Path

from filelock import FileLock
from PIL import Image
from tqdm import tqdm

from ..settings.errors import UserError, first_line
from ..settings.setting import is_installed
from ..settings.train import TrainConfig
from .kinds import named
from .pictures import BOMB, NO_PICTURE

SETTINGS = "data_revision", "image_column", "caption_column", "max_pictures"  # these decide what is fetched
ON_HUB = re.compile(r"(zip://[^:]*::)?hf://datasets/")  # allowed places of a picture that is not in the row itself


def fetched(name: str, config: TrainConfig, quiet: bool = False) -> Path:
    """Return the folder of a data set's pictures; fetch it if it is not in the cache.

    Raises UserError if there is no such data set or column, if a picture cannot be opened, or if the package datasets
    is missing.  Of several processes on a machine, the first fetches and the others wait.
    """
    what = [name, *(getattr(config, setting) for setting in SETTINGS)]
    digest = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]
    folder = Path(config.cache).expanduser() / "hub" / f"{name.replace('/', '--')}-{digest}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            unfinished = folder.with_name(f"{folder.name}.part")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            count = write_pictures(_rows(name, config), unfinished, f"--data {name}", config)
            unfinished.rename(folder)
            if not quiet:
                print(f"note: --data {name}: fetched {count} pictures into {folder}", file=sys.stderr)
    return folder


def _rows(name: str, config: TrainConfig) -> Iterable[dict]:
    """Yield the rows of a data set, from the split "train" or else the first; pictures are not decoded."""
    if not is_installed("datasets"):
        raise UserError(
            f"--data {name}: there is no such folder; to take it from the hub, pip install -e '.[datasets]'"
        )
    from datasets import load_dataset

    try:
        splits = load_dataset(name, revision=config.data_revision, streaming=True)
        split = splits.get("train", next(iter(splits.values())))
        yield from islice(split.decode(False), config.max_pictures)
    except Exception as error:  # no network, no such data set, a damaged file, …
        raise UserError(
            f"--data {name}: there is no such folder, and no such data set on the hub that can be read "
            f"({first_line(error)})"
        ) from error


def write_pictures(rows: Iterable[dict], folder: Path, title: str, config: TrainConfig) -> int:
    """Write the pictures of rows, and a table of their captions, into a folder; return the number of pictures."""
    captions, count, wrong = [], 0, []
    for number, row in enumerate(tqdm(rows, "fetch", unit="picture", delay=2)):
        needed = [config.image_column, *([config.caption_column] if config.caption is None else [])]
        if lacking := [name for name in needed if name not in row]:
            raise UserError(
                f"{title}: it has no column {' and no '.join(lacking)}, but {', '.join(row)}; --image-column and "
                "--caption-column name others"
            )
        content, caption = _content(row[config.image_column]), row.get(config.caption_column)
        ending = _ending(content)
        texts = caption if isinstance(caption, list) and caption else [caption]
        has_text = all(isinstance(text, str) for text in texts)
        if not ending or not (has_text or config.caption is not None):
            wrong.append(f"row {number}")
            continue
        path = folder / f"{number:06d}{ending}"
        path.write_bytes(content)
        if has_text:
            captions.append({"file_name": path.name, config.caption_column: caption})
        count += 1
    if wrong or not count:
        what = f"{named(wrong, 'rows')} have no picture that can be opened, or no caption" if wrong else "it is empty"
        raise UserError(f"{title}: {what}")
    if captions:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in captions)
        (folder / "metadata.jsonl").write_text(lines, encoding="utf-8")
    return count


def _content(cell: object) -> bytes:
    """Return the bytes of an undecoded picture; b"" if it is neither in the row nor on the hub."""
    if not isinstance(cell, dict):
        return b""
    if cell.get("bytes"):
        return cell["bytes"]
    path = str(cell.get("path") or "")
    if not ON_HUB.match(path):
        return b""  # a stranger's row must not name local files
    import fsspec

    with fsspec.open(path, "rb") as file:
        return file.read()


def _ending(content: bytes) -> str:
    """Return the extension for a picture by its content; "" if Pillow does not know it."""
    try:
        kind = Image.open(BytesIO(content)).format
    except BOMB:  # reading the folder checks the size
        return ".png"
    except NO_PICTURE:
        return ""
    known = Image.registered_extensions()
    usual = f".{str(kind).lower()}"
    return usual if usual in known else next((ending for ending, name in known.items() if name == kind), "")
