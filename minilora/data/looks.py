"""Look at each picture of a folder: its hash and size, or what is wrong with it.

Looks are remembered, so that a folder of photographs is read only once.  A picture is known as long as its file has the
same size, mtime, ctime (which no program can set) and inode.  When it is read again for encoding, its content must have
the remembered hash.
"""

import hashlib
import io
import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ..files.tensors import write_whole
from ..settings.errors import UserError
from ..settings.train import TrainConfig
from .kinds import kind_of_bytes, unread_kind
from .pictures import BOMB, NO_PICTURE, look_at, open_mask, pixels_claimed, pixels_limited

SETTLED = 2.0  # seconds since a file's last change; two changes within one tick of the disk's clock have the same time
_VERSION = 2  # increase this when the rules for refusals or warnings change


@dataclass(frozen=True)
class Look:
    """What is known of a file: its hash and size, or what is wrong with it, or its unreadable kind."""

    digest: str = ""
    size: tuple[int, int] | None = None  # width and height in pixels
    wrong: str = ""
    kind: str = ""
    has_alpha: bool = False  # --alpha-mask uses it as the mask


def look_at_all(
    pictures: list[Path], masks: list[Path], folder: Path, config: TrainConfig, quiet: bool
) -> dict[Path, Look]:
    """Look at all pictures and masks, in threads on all cores: Pillow and hashlib release Python's lock."""
    known, most, paths = Known(config.cache, folder), config.max_pixels, list(dict.fromkeys((*pictures, *masks)))

    def look(path: Path) -> Look:
        alpha = config.alpha_mask and path not in masks
        if kind := unread_kind(path):
            return Look(kind=kind)
        content = b""
        try:
            state = state_of(path)
            if not alpha and (before := known.get(path, state)) and before.size[0] * before.size[1] <= most:
                return before
            content = path.read_bytes()
            size, wrong = look_at(io.BytesIO(content))
            digest = hashlib.sha256(content).hexdigest()
            mask = open_mask(io.BytesIO(content), alpha) if alpha or path in masks else None
            if mask and not mask.getbbox():
                told = "has an alpha channel that is all black" if alpha else "is all black"
                return Look(wrong=f"{told}, so nothing of the picture would be learnt")
            if not wrong:  # remembered pictures get no warning, and each run must print it
                known.add(path, state, digest, size)
            return Look(digest, size, wrong, has_alpha=alpha and mask is not None)
        except BOMB as error:
            pixels = pixels_claimed(error)
            advice = f"make it smaller or, if you trust the file, train with --max-pixels {pixels}"
            return Look(wrong=f"has {pixels:,} pixels, more than the {most:,} of --max-pixels; {advice}")
        except NO_PICTURE as error:
            return Look(kind=kind_of_bytes(content), wrong=f"cannot be opened as a picture ({error})")

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


# ------------------------------------------------------------------------------- remembered


def state_of(path: Path) -> list[int]:
    """Return the size, times and inode of a file; they differ after a change."""
    now = path.stat()
    return [now.st_size, now.st_mtime_ns, now.st_ctime_ns, now.st_ino]


class Known:
    """The looks at one folder's pictures, stored in the cache."""

    def __init__(self, cache: str, folder: Path):
        self.folder = folder
        name = hashlib.sha256(os.fsencode(os.path.abspath(folder))).hexdigest()
        self.file = _below(cache) / f"{name}.json"
        self.pictures: dict[str, list] = {}
        with suppress(OSError, ValueError, AttributeError):
            kept = json.loads(self.file.read_text())
            self.pictures = kept["pictures"] if kept.get("version") == _VERSION else {}
        self.new: dict[str, list] = {}

    def get(self, path: Path, state: list[int]) -> Look | None:
        """Return the hash and the size of a picture, if they are known for this state of its file."""
        match self.pictures.get(self._key(path)):
            case [before, str(digest), [int(width), int(height)]] if before == state:
                return Look(digest, (width, height))
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
