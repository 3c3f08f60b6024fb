"""The files in a folder of pictures, and messages about those that are not used."""

import os
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

from .captions import TABLES
from .kinds import is_picture, named

# What systems put beside pictures: thumbnails, trash folders, macOS's resource files.
_SYSTEMS = ("@eadir", "__macosx", "#recycle", "@recycle", "$recycle.bin", "thumbs.db", "desktop.ini")
_FOR_PEOPLE = ("README", "LICENSE", "LICENCE", "COPYING")  # and all .md files


def files_in(folder: Path, problems: list[str]) -> tuple[list[Path], list[Path]]:
    """Return the files of a folder and its sub-folders: first those to use, then those that are hidden or copies.

    Adds links to folders, and folders that cannot be read, to `problems`.
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
            elif path.is_file() or not path.exists():  # a broken link is an error when it is opened
                (left_out if hidden else files).append(path)
    return files, left_out


def _left_out(path: Path, folder: Path) -> Path | None:
    """Return the topmost part of a path, below `folder`, that is hidden or made by a system; None if none is."""
    parts = path.relative_to(folder).parts
    for count, part in enumerate(parts, start=1):
        if part.startswith(".") or part.lower() in _SYSTEMS:
            return Path(*parts[:count])
    return None


def results_inside(folder: Path, output: str | None) -> Path | None:
    """Return where, inside a folder of pictures, results are written: `out`, or an --output outside of that.

    The previews and samples there are not pictures to train on.
    """
    here, usual, output_path = (Path(name).resolve() for name in (folder, "out", output or "out"))
    results = usual if output_path.is_relative_to(usual) and here != usual else output_path
    return folder / results.relative_to(here) if results != here and results.is_relative_to(here) else None


def about_left_out(left_out: Collection[Path], folder: Path) -> list[str]:
    """Return a line about pictures that are hidden or copies, if there are any."""
    counts = Counter(_left_out(path, folder) for path in left_out if is_picture(path))
    names = [f"{top} (holding {n})" if (folder / top).is_dir() else str(top) for top, n in sorted(counts.items())]
    return [f"{named(names, 'places')}: hidden pictures and copies there are left out"] if names else []


def about_unused(others: Collection[Path], folder: Path) -> list[str]:
    """Return lines about the files that are neither pictures nor their captions."""
    tables = sorted(path for path in others if path.name in TABLES)
    texts = sorted(path for path in others if path.suffix.lower() == ".txt")
    captions = sorted(path for path in others if path.suffix.lower() == ".caption")
    for_people = {path for path in others if path.suffix.lower() == ".md" or path.stem.upper() in _FOR_PEOPLE}
    rest = sorted({*others} - {*tables, *texts, *captions} - for_people)
    lines = [
        f"{_names([table], folder)}: not read, because it is in a sub-folder; give {table.parent} itself"
        for table in tables
    ]
    if texts:
        lines.append(f"{_names(texts, folder, 'texts')}: not read, because there is no picture of that name")
    if captions:
        lines.append(f"{_names(captions, folder)}: not read; name captions .txt")
    if rest:
        lines.append(f"{_names(rest, folder)}: not read: neither picture nor caption")
    return lines


def _names(paths: Sequence[Path], folder: Path, what: str = "files") -> str:
    return named([str(path.relative_to(folder)) for path in paths], what)
