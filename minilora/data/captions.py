"""Captions, from a table (metadata.jsonl or metadata.csv) or from a .txt beside each picture.

Names are compared in one Unicode form (NFC).  macOS and some programs write "é" as "e" and an accent, so a name in a
table and the name of the file may differ in their bytes.
"""

import csv
import io
import json
import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files.tensors import write_whole
from ..settings.errors import UserError
from ..settings.strict_json import parse_json

TABLES = ("metadata.jsonl", "metadata.csv")


def spelling(path: Path) -> str:
    """Return a path in the form in which paths are compared."""
    return unicodedata.normalize("NFC", str(path))


def beside(pictures: Iterable[Path], exact: Mapping[Path, Path]) -> dict[Path, Path]:
    """Return the file beside each picture that has one; `exact` maps a picture's path without its suffix to a file."""
    alike = {spelling(stem): path for stem, path in exact.items()}
    found = {}
    for picture in pictures:
        stem = picture.with_suffix("")
        if file := exact.get(stem) or alike.get(spelling(stem)):
            found[picture] = file
    return found


def read_text(path: Path, name: str, problems: list[str]) -> str:
    """Return the text of a file; if it cannot be read, "", after adding that to `problems` with the file's `name`."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if "\0" in text:
            raise ValueError(f"character {text.index(chr(0)) + 1} is NUL, as in UTF-16")
    except (OSError, ValueError) as error:
        problems.append(f"{name} cannot be read as UTF-8 text ({error})")
        return ""
    return text


def read_table(table: Path, column: str, files: Iterable[Path], problems: list[str]) -> dict[Path, tuple[str, ...]]:
    """Read a table of captions: rows with `file_name` and a text, or in metadata.jsonl a list of texts.

    `files` are all files in the table's folder and its sub-folders.
    """
    folder, captions = table.parent, {}
    alike = {spelling(path): path for path in files}
    rows = _rows_of_csv if table.suffix == ".csv" else _rows_of_jsonl
    for where, row in rows(table, problems):
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            problems.append(f"{where} has no file_name")
            continue
        name, texts = row["file_name"], row.get(column)
        path = Path(os.path.normpath(folder / name))
        texts = [texts] if isinstance(texts, str) else texts
        if not os.path.isfile(path):  # pathlib would raise for a name that is too long
            path = alike.get(spelling(path), path)
        if not path.is_relative_to(folder):
            problems.append(f"{where}: {name} points outside the folder")
        elif not os.path.isfile(path):
            problems.append(f"{where}: there is no file {name}")
        elif not (isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts)):
            others = ", ".join(key for key in row if key != "file_name") or "nothing else"
            problems.append(f"{where}: {column!r} holds no text; the line has {others} (see --caption-column)")
        elif path in captions:
            problems.append(f"{where}: {name} occurs twice")
        else:
            captions[path] = tuple(texts)
    return captions


def edit_captions(folder: Path, captions: Mapping[str, Sequence[str]]) -> str:
    """Write captions, given by picture name, into a folder's metadata.jsonl; return a message about the result.

    Unchanged lines keep their bytes.  A changed line keeps its other keys and their order, and a picture without a line
    gets one, unless its captions are empty.  Raises UserError if the captions are in metadata.csv, or in a
    metadata.jsonl that cannot be read.
    """
    table, lines = folder / TABLES[0], []
    problems: list[str] = []
    if (folder / TABLES[1]).exists():
        raise UserError(f"{folder}: the captions are in {TABLES[1]}; edit them there, or convert it to {table.name}")
    rows: list[Any] = [row for _, row in _rows_of_jsonl(table, problems)] if table.exists() else []
    if problems or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{table}: " + "; ".join(problems or ["each line should be a JSON object"]))
    written = [line for line in table.read_text(encoding="utf-8-sig").split("\n") if line.strip()] if rows else []
    left, changed = {spelling(Path(name)): (name, tuple(texts)) for name, texts in captions.items()}, 0
    for row, line in zip(rows, written, strict=True):
        name, new = left.pop(spelling(Path(os.path.normpath(row.get("file_name", "")))), ("", None))
        old = row.get("text")
        if new and new != (tuple(old) if isinstance(old, list) else (old,)):
            row["text"] = list(new) if isinstance(old, list) or len(new) > 1 else new[0]
            line, changed = json.dumps(row, ensure_ascii=False), changed + 1
        lines.append(line)
    for name, texts in left.values():
        if any(texts):
            row = {"file_name": name, "text": texts[0] if len(texts) == 1 else texts}
            lines.append(json.dumps(row, ensure_ascii=False))
            changed += 1
    if changed:
        write_whole(table, "".join(f"{line}\n" for line in lines).encode())
    return f"captions changed in {table}: {changed}" if changed else f"no caption changed in {table}"


def _rows_of_jsonl(metadata: Path, problems: list[str]) -> Iterator[tuple[str, object]]:
    """Yield the place and the value of each row: one JSON object per line."""
    # Not splitlines(): it splits at characters that JSON allows inside a text.
    for number, line in enumerate(read_text(metadata, metadata.name, problems).split("\n"), start=1):
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
    """Yield the place of each row, and its cells by the names in the header."""
    reader = csv.reader(io.StringIO(read_text(metadata, metadata.name, problems)), skipinitialspace=True, strict=True)
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
