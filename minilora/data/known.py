"""What is known of pictures that were read before, so that a folder of photographs is read only once.

A picture is known as long as its file has the same size, times of change and number on the disk (inode).  Of the two
times no program can set the second, ctime.  The hash of the content is kept.  When a picture is read again to be
encoded, its content must have that hash.
"""

import hashlib
import json
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

from ..files.tensors import write_whole
from ..settings.errors import UserError

SETTLED = 2.0  # seconds since the last change; a file that changes twice in one tick of the disk's clock shows one time
_VERSION = 2  # raise this number when other pictures than before are refused or warned of


def state_of(path: Path) -> list[int]:
    """Return size, times and number on the disk of a file; a file that changes has others."""
    now = path.stat()
    return [now.st_size, now.st_mtime_ns, now.st_ctime_ns, now.st_ino]


class Known:
    """Hash and size in pixels of the pictures of one folder, kept in the cache."""

    def __init__(self, cache: str, folder: Path):
        self.folder = folder
        name = hashlib.sha256(os.fsencode(os.path.abspath(folder))).hexdigest()
        self.file = _below(cache) / f"{name}.json"
        self.pictures: dict[str, list] = {}
        with suppress(OSError, ValueError, AttributeError):
            kept = json.loads(self.file.read_text())
            self.pictures = kept["pictures"] if kept.get("version") == _VERSION else {}
        self.new: dict[str, list] = {}

    def get(self, path: Path, state: list[int]) -> tuple[str, tuple[int, int]] | None:
        """Return the hash and the size of a picture whose file is in a state, if they are known."""
        match self.pictures.get(self._key(path)):
            case [before, str(digest), [int(width), int(height)]] if before == state:
                return digest, (width, height)
        return None

    def add(self, path: Path, state: list[int], digest: str, size: tuple[int, int]) -> None:
        """Remember a picture, unless its file changed just now."""
        if time.time() - max(state[1:3]) / 1e9 > SETTLED and state_of(path) == state:
            self.new[self._key(path)] = [state, digest, list(size)]

    def save(self, there: list[Path]) -> None:
        """Write down what is known of the pictures in the folder, if there is anything new."""
        if self.new:
            names = {self._key(path) for path in there}
            pictures = {name: about for name, about in (self.pictures | self.new).items() if name in names}
            with suppress(OSError, UserError):  # the cache may not be writable; it only saves time
                write_whole(self.file, json.dumps({"version": _VERSION, "pictures": pictures}).encode())

    def _key(self, path: Path) -> str:
        return os.path.relpath(path, self.folder)


def forget(cache: str) -> None:
    """Forget all pictures of all folders."""
    shutil.rmtree(_below(cache), ignore_errors=True)


def _below(cache: str) -> Path:
    return Path(cache).expanduser() / "read"
