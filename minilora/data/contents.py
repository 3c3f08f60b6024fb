"""Which files a folder of pictures has, and what to say about those that are not used."""

import os
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

from .captions import TABLES
from .kinds import is_picture, named

# What systems put beside pictures: thumbnails, waste bins, the other half of a file of macOS.
_SYSTEMS = ("@eadir", "__macosx", "#recycle", "@recycle", "$recycle.bin", "thumbs.db", "desktop.ini")
_FOR_PEOPLE = ("README", "LICENSE", "LICENCE", "COPYING")  # as is whatever ends with .md


def files_in(folder: Path, problems: list[str]) -> tuple[list[Path], list[Path]]:
    """Return the files of a folder and its sub-folders: first those that count, then those that are hidden or copies.

    Adds links to folders, and what cannot be read, to `problems`.
    """

    def unreadable(error: OSError) -> None:
        if not _left_out(Path(error.filename), folder):
            problems.append(f"{error.filename} cannot be read ({error.strerror})")

    files: list[Path] = []
    left_out: list[Path] = []
    for place, folders, names in os.walk(folder, onerror=unreadable):
        for path in (Path(place, name) for name in (*folders, *names)):
            hidden = _left_out(path, folder)
            if path.is_symlink() and path.is_dir() and not hidden:
                name = path.relative_to(folder)
                problems.append(
                    f"{name} is a link to a folder, which is not followed; put the pictures themselves there"
                )
            elif path.is_file() or not path.exists():  # a link that leads nowhere is an error when it is opened
                (left_out if hidden else files).append(path)
    return files, left_out


def _left_out(path: Path, folder: Path) -> Path | None:
    """Return the uppermost folder or file of a path, below a folder, that is hidden or a system's, if there is one."""
    parts = path.relative_to(folder).parts
    for count, part in enumerate(parts, start=1):
        if part.startswith(".") or part.lower() in _SYSTEMS:
            return Path(*parts[:count])
    return None


def told_left_out(left_out: Collection[Path], folder: Path) -> list[str]:
    """Return a line about the pictures that are hidden or copies, if there are any."""
    counts = Counter(_left_out(path, folder) for path in left_out if is_picture(path))
    names = [f"{top} (holding {n})" if (folder / top).is_dir() else str(top) for top, n in sorted(counts.items())]
    return [f"{named(names, 'places')}: pictures are left out there, as hidden ones and copies are"] if names else []


def told_unused(others: Collection[Path], folder: Path) -> list[str]:
    """Return lines about the files that are neither a picture nor the caption of one."""
    tables, texts, captions, rest = [], [], [], []
    for path in sorted(others):
        if path.name in TABLES:
            tables.append(path)
        elif path.suffix.lower() == ".txt":
            texts.append(path)
        elif path.suffix.lower() == ".caption":
            captions.append(path)
        elif path.suffix.lower() != ".md" and path.stem.upper() not in _FOR_PEOPLE:
            rest.append(path)
    lines = [
        f"{_names([table], folder)}: not read, as it is not at the top; give {table.parent} itself" for table in tables
    ]
    if texts:
        lines.append(f"{_names(texts, folder, 'texts')}: not read, as there is no picture of that name")
    if captions:
        lines.append(f"{_names(captions, folder)}: not read; a caption stands in a .txt")
    if rest:
        lines.append(f"{_names(rest, folder)}: not read, being neither picture nor caption")
    return lines


def _names(paths: Sequence[Path], folder: Path, what: str = "files") -> str:
    return named([str(path.relative_to(folder)) for path in paths], what)
