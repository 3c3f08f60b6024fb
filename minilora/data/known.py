"""Remember pictures that were read before, so that a folder of photographs is read only once.

A picture is known as long as its file has the same size, times of change (mtime and ctime, which no program can set)
and inode.  Its content's hash is stored.  When the picture is read again for encoding, its content must have that hash.
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

SETTLED = 2.0  # seconds since the last change: two changes within one tick of the disk's clock have the same time
_VERSION = 2  # increase this when the rules for refusals or warnings change


def state_of(path: Path) -> list[int]:
    """Return the size, times and inode of a file; they differ after a change."""
    now = path.stat()
    return [now.st_size, now.st_mtime_ns, now.st_ctime_ns, now.st_ino]


class Known:
    """The hashes and sizes in pixels of one folder's pictures, stored in the cache."""

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
        """Return the hash and the size of a picture, if they are known for this state of its file."""
        match self.pictures.get(self._key(path)):
            case [before, str(digest), [int(width), int(height)]] if before == state:
                return digest, (width, height)
        return None

    def add(self, path: Path, state: list[int], digest: str, size: tuple[int, int]) -> None:
        """Remember a picture, unless its file changed just now."""
        if time.time() - max(state[1:3]) / 1e9 > SETTLED and state_of(path) == state:
            self.new[self._key(path)] = [state, digest, list(size)]

    def save(self, there: list[Path]) -> None:
        """Store what is known of the pictures in the folder, if anything is new."""
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
