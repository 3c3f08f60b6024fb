"""Files on disk: written completely or not at all, never unpickled; safetensors files read without loading them.

A file is written under a temporary name and flushed to the disk.  Then it gets its final name by a rename, which is
atomic.  So a file with a final name is complete, whenever the program or the machine stops.

A safetensors file has three parts: 8 bytes with the length of the header, the header (JSON with the type, shape and
place of each tensor), and the tensors' bytes.  So some tensors of a file can be changed while the rest is streamed, and
memory use does not grow with the file.
"""

import hashlib
import json
import math
import os
import shutil
import struct
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any

import numpy as np

from ..settings.errors import UserError
from ..settings.shared import WEIGHT_FILES
from ..settings.strict_json import parse_json
from .number_types import DTYPES, NAMES

PICKLES = WEIGHT_FILES[1:]
PICKLE_HELP = (
    "a pickle, which can run code when it is opened, is not read; if you trust it, convert it with "
    "safetensors.torch.save_file(torch.load(file, weights_only=True), 'new.safetensors')"
)

Tensors = dict[str, np.ndarray]  # as they are stored (number_types.py)


# --------------------------------------------------------------------------------- written whole


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that gets its name only after all of it is on the disk."""
    try:
        with staging(path, 0, overwrite=True) as new, open(new, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(
            f"{path}: it cannot be written ({error.strerror}); what was there before is unchanged"
        ) from error


def refuse_existing(output: Path, overwrite: bool) -> None:
    """Raise UserError if there is something at `output` that may not be overwritten."""
    if output.exists() and not overwrite:
        raise UserError(f"{output}: it already exists; choose another name, or give --overwrite")


@contextmanager
def staging(output: Path, size: int, overwrite: bool, content: Collection[Path] = ()) -> Iterator[Path]:
    """Yield a temporary path to write to; it is renamed to `output` after the block, or deleted if the block fails.

    Raises UserError if `output` exists and may not be overwritten, or if the disk has no room for `size` bytes.  A
    folder is overwritten only if `content`, the files of the new one, has all its files, so that nothing else is lost.
    """
    refuse_existing(output, overwrite)
    if output.is_dir():
        there = {path.relative_to(output) for path in output.rglob("*") if path.is_file()}
        if lost := sorted(there - set(content)):
            raise UserError(f"{output}: the folder holds {lost[0]}, so it is not overwritten; choose another name")
    output.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(output.parent).free
    if free < size:
        raise UserError(f"{output}: it needs {size:,} bytes and the disk has {free:,} left")
    new = output.with_name(f".{output.name}.{os.getpid()}.part")
    old = output.with_name(f".{output.name}.{os.getpid()}.old")
    try:
        yield new
        if output.is_dir():
            output.rename(old)
        try:
            os.replace(new, output)
        except OSError:
            if old.exists():
                old.rename(output)
            raise
        sync_folder(output.parent)
    finally:
        delete(new)
        delete(old)


def delete(path: Path) -> None:
    """Delete a file or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk, so that a rename survives a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --------------------------------------------------------------------------------- safetensors


def write_tensors(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Write arrays, or torch's tensors on the CPU, as a safetensors file; equal arguments give equal bytes."""
    write_whole(path, tensor_bytes(tensors, metadata))


def tensor_bytes(tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    """Return a safetensors file of some tensors and its metadata."""
    arrays = {key: np.asarray(tensor) for key, tensor in tensors.items()}
    header, places = file_header({key: (NAMES[a.dtype], a.shape) for key, a in arrays.items()}, metadata)
    return b"".join([header, *(arrays[key].tobytes() for key in places)])


def file_header(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """Return the header of a file with tensors of given types and shapes, and the first byte of each tensor.

    The order is that of safetensors itself: the widest types first, so that all tensors are aligned.
    """
    order, entries, begins, position = list(DTYPES), {}, {}, 0
    for key, (dtype, shape) in sorted(tensors.items(), key=lambda item: (order.index(item[1][0]), item[0])):
        begins[key] = position
        position += math.prod(shape) * DTYPES[dtype].itemsize
        entries[key] = {"dtype": dtype, "shape": shape, "data_offsets": [begins[key], position]}
    header = {"__metadata__": dict(sorted(metadata.items())), **entries}
    text = json.dumps(dict(sorted(header.items())), separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, {key: 8 + len(text) + begin for key, begin in begins.items()}


def write_checked(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Write tensors as `write_tensors` does, with a checksum of them and the metadata for `read_checked`."""
    write_tensors(path, tensors, {**metadata, "checksum": _checksum(tensors, metadata)})


def read_checked(path: Path) -> tuple[Tensors, dict[str, str]]:
    """Return the tensors and the metadata that `write_checked` wrote; UserError if any bit of them has changed."""
    file = TensorFile(path)
    tensors, metadata = {key: file.read(key) for key in file.entries}, file.metadata
    if metadata.pop("checksum", None) != _checksum(tensors, metadata):
        raise UserError(f"{path}: its checksum does not match its content, so it is damaged")
    return tensors, metadata


def _checksum(tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> str:
    return hashlib.sha256(tensor_bytes(tensors, metadata)).hexdigest()


@dataclass(frozen=True)
class Entry:
    """A tensor's place in a safetensors file: bytes `begin` to `end`, counted from the file's start."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFile:
    """The header of a safetensors file: its tensors and their places, in the order of their bytes.

    Raises UserError, naming the key, for a header that does not describe the file exactly.
    """

    def __init__(self, path: Path):
        if path.suffix in PICKLES:
            raise UserError(f"{path}: {PICKLE_HELP}")
        self.path = path
        self.size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else self.size
            if length > self.size - 8 or length > 100_000_000:
                raise UserError(f"{path}: not a whole safetensors file; its header would be {length:,} bytes")
            self.first = 8 + length  # the first of the tensors' bytes
            try:
                header = parse_json(file.read(length))
                self.metadata = dict(header.pop("__metadata__", None) or {})
                if not all(isinstance(value, str) for value in self.metadata.values()):
                    raise ValueError("its metadata are not all text")
                entries = {
                    key: Entry(str(e["dtype"]), tuple(e["shape"]), *(self.first + index(n) for n in e["data_offsets"]))
                    for key, e in header.items()
                }
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise UserError(f"{path}: its safetensors header cannot be read ({error!r})") from error
        self.entries = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))
        end = self.first
        for key, entry in self.entries.items():
            if entry.dtype not in DTYPES or any(type(n) is not int or n < 0 for n in entry.shape):
                raise UserError(f"{path}: {key} has an unknown type or shape: {entry.dtype}, {entry.shape}")
            if entry.begin != end or entry.end - entry.begin != math.prod(entry.shape) * DTYPES[entry.dtype].itemsize:
                raise UserError(
                    f"{path}: {key}, {entry.dtype} {entry.shape}, should begin at byte {end} and be of that size, "
                    f"but lies at {entry.begin} to {entry.end}"
                )
            end = entry.end
        if end != self.size:
            raise UserError(f"{path}: it has {self.size:,} bytes and should have {end:,}: it was cut off or extended")

    @property
    def numbers(self) -> int:
        """The total number of numbers in all tensors."""
        return sum(math.prod(entry.shape) for entry in self.entries.values())

    def read(self, key: str) -> np.ndarray:
        """Return one tensor as it is stored."""
        entry = self.entries[key]
        count = math.prod(entry.shape)
        stored = np.fromfile(self.path, DTYPES[entry.dtype], count, offset=entry.begin)
        if len(stored) < count:
            raise UserError(f"{self.path}: it became shorter while it was read")
        return stored.reshape(entry.shape)


def free_memory() -> int | None:
    """Return the free bytes of main memory, swap included; None if the system does not tell (Linux does)."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return sum(int(lines[name].split()[0]) * 1024 for name in ("MemAvailable", "SwapFree"))
    except (OSError, KeyError):
        return None


def refuse_more_than_memory(numbers: int, bytes_of_a_number: int) -> None:
    """Raise UserError if so many numbers do not fit into free memory."""
    needed, free = numbers * bytes_of_a_number, free_memory()
    if free is not None and needed > free:
        raise UserError(f"its numbers need {needed / 1e9:,.1f} GB of memory, and {free / 1e9:,.1f} GB are free")
