"""A folder of pictures with captions: what is in it, and everything that is wrong with it.

Captions stand in metadata.jsonl or metadata.csv, or in a .txt beside each picture.
"""

import csv
import hashlib
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..settings.errors import UserError
from ..settings.shared import WEIGHT, path_and_number
from ..settings.strict_json import parse_json
from ..settings.train import TrainConfig
from .pictures import NO_PICTURE, open_picture


@dataclass(frozen=True)
class Item:
    """One picture of a folder: its file, a hash of the file's bytes, its size, its captions."""

    path: Path
    digest: str
    size: tuple[int, int]  # width and height in pixels
    captions: tuple[str, ...]  # one or more


def read_folders(config: TrainConfig) -> list[Item]:
    """Return the pictures of all folders of `config.data`, each as often as its folder's weight says.

    Raises UserError with everything that is wrong with the folders, in one message.
    """
    items, problems = [], []
    for text in config.data:
        folder, weight = path_and_number(text, WEIGHT)
        try:
            items += [item for item in read_folder(folder, config) for _ in range(int(weight))]
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("; ".join(problems))
    return items


def read_folder(name: str, config: TrainConfig, option: str = "--data") -> list[Item]:
    """Return the pictures of a folder with their captions, in the order of their names.

    Captions come from metadata.jsonl or metadata.csv, or else from a .txt beside each picture, or else
    from --caption; --trigger stands before each.  `name` may also be a single picture, whose caption is
    --caption.  Raises UserError with everything that is wrong with the folder, in one message, which
    names the option.
    """
    folder, problems = Path(os.path.normpath(name)), []
    if folder.is_file():
        if config.caption is None:
            raise UserError(f"{option} {folder}: one picture needs its --caption")
        captions, pictures = {folder: (config.caption,)}, [folder]
    elif not folder.is_dir():
        raise UserError(f"{option} {folder}: there is no such folder or picture")
    else:
        captions, pictures = _look_into(folder, config, problems)
        if not pictures and not problems:
            raise UserError(f"{option} {folder}: there is no picture in it")
    items = []
    for path in pictures:
        if path not in captions:
            problems.append(
                f"{path.name} has no caption in metadata.jsonl, metadata.csv or a .txt beside it; "
                "give one, or --caption"
            )
        try:
            size = open_picture(path).size
        except NO_PICTURE as error:
            problems.append(f"{'it' if path == folder else path.name} cannot be opened as a picture ({error})")
        else:
            texts = tuple(with_trigger(text, config) for text in captions.get(path, ()))
            items.append(Item(path, hashlib.sha256(path.read_bytes()).hexdigest(), size, texts))
    if problems:
        raise UserError(f"{option} {folder}: " + "; ".join(problems))
    return items


def with_trigger(caption: str, config: TrainConfig) -> str:
    """Return a caption with --trigger before it; of an empty one, the trigger alone."""
    return ", ".join(filter(None, (config.trigger, caption)))


def _look_into(
    folder: Path, config: TrainConfig, problems: list[str]
) -> tuple[dict[Path, tuple[str, ...]], list[Path]]:
    """Return the captions by picture, and the pictures; add what is wrong with them to `problems`."""
    suffixes = Image.registered_extensions()

    def unreadable(error: OSError) -> None:
        problems.append(f"{error.filename} cannot be read ({error.strerror})")

    below = os.walk(folder, onerror=unreadable)
    inside = [Path(place, name) for place, folders, files in below for name in (*folders, *files)]
    # (A link that leads nowhere is no file, and opening it will say so.)
    pictures = [p for p in inside if p.suffix.lower() in suffixes and (p.is_file() or not p.exists())]
    problems += [
        f"{p.relative_to(folder)} is a link to a folder, which is not followed; put the pictures themselves there"
        for p in inside
        if p.is_symlink() and p.is_dir()
    ]
    tables = [folder / name for name in ("metadata.jsonl", "metadata.csv") if (folder / name).exists()]
    captions: dict[Path, tuple[str, ...]] = {}
    if len(tables) > 1:
        raise UserError(f"{folder} holds metadata.jsonl and metadata.csv; keep one of them")
    if tables:
        captions = _read_metadata(tables[0], config.caption_column, problems)
    else:
        for picture in pictures:
            beside = picture.with_suffix(".txt")
            if beside.exists():
                captions[picture] = (_read_text(beside, problems).strip(),)
    if config.caption is not None:
        captions = dict.fromkeys(pictures, (config.caption,)) | captions
    return captions, sorted({*pictures, *captions})  # metadata may name a picture whatever its name ends with


def _read_text(path: Path, problems: list[str]) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
        if "\0" in text:
            raise ValueError(f"character {text.index(chr(0)) + 1} is NUL, as in UTF-16")
    except (OSError, ValueError) as error:
        problems.append(f"{path.name} cannot be read as UTF-8 text ({error})")
        return ""
    return text


def _read_metadata(metadata: Path, column: str, problems: list[str]) -> dict[Path, tuple[str, ...]]:
    """Read a table of captions: rows with `file_name` and a text, or in metadata.jsonl a list of texts."""
    folder, captions = metadata.parent, {}
    rows = _rows_of_csv if metadata.suffix == ".csv" else _rows_of_jsonl
    for where, row in rows(metadata, problems):
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            problems.append(f"{where} has no file_name")
            continue
        name, texts = row["file_name"], row.get(column)
        path = Path(os.path.normpath(folder / name))
        texts = [texts] if isinstance(texts, str) else texts
        if not path.is_relative_to(folder):
            problems.append(f"{where}: {name} points outside the folder")
        elif not os.path.isfile(path):  # of a name that is too long for a file, pathlib would raise
            problems.append(f"{where}: there is no file {name}")
        elif not (isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts)):
            others = ", ".join(key for key in row if key != "file_name") or "nothing else"
            problems.append(f"{where}: {column!r} holds no text; the line has {others} (see --caption-column)")
        elif path in captions:
            problems.append(f"{where}: {name} stands there twice")
        else:
            captions[path] = tuple(texts)
    return captions


def _rows_of_jsonl(metadata: Path, problems: list[str]) -> Iterator[tuple[str, object]]:
    """Yield where each row stands and its value: one JSON object a line."""
    # Not splitlines(): a text may hold what that, and not JSON, takes for the end of a line.
    for number, line in enumerate(_read_text(metadata, problems).split("\n"), start=1):
        where = f"{metadata.name} line {number}"
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            problems.append(f"{where} is not JSON ({error})")
        else:
            yield where, row


def _rows_of_csv(metadata: Path, problems: list[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield where each row begins, and its cells by the names of the header."""
    reader = csv.reader(io.StringIO(_read_text(metadata, problems)), skipinitialspace=True, strict=True)
    header, number = None, 1
    try:
        for cells in reader:
            where, number = f"{metadata.name} line {number}", reader.line_num + 1
            if not cells:
                continue
            if header is None:
                header = cells
                if "file_name" not in header:
                    problems.append(f"{where}: the header has no file_name, only {', '.join(header)}")
                    return
            elif len(cells) != len(header):
                hint = "put a text with a comma in quotation marks"
                problems.append(f"{where} has {len(cells)} cells and the header {len(header)}; {hint}")
            else:
                yield where, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        problems.append(f"{metadata.name} line {number} is not CSV ({error})")
