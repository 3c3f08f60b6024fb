"""Rewrite a safetensors file with other bytes for some tensors, streaming: memory use does not grow with the file."""

import errno
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..settings.errors import UserError
from .tensors import TensorFile, file_header

CHUNK = 1 << 20  # bytes processed at a time: few enough for a processor's cache
COMPUTING = 2  # threads that change tensors, besides the one that copies
UNCACHED = 0x80 if sys.platform == "linux" else 0  # RWF_DONTCACHE of Linux 6.14, which Python has no name for yet


def rewrite(
    file: TensorFile,
    target: Path,
    changes: Mapping[str, Callable[[BinaryIO], Iterator]],
    types: Mapping[str, str] | None = None,
) -> None:
    """Write a checkpoint file with new bytes for the tensors in `changes`; the others are copied.

    Each function in `changes` is called in one of a few threads, with the open file at the tensor's first byte; it
    reads the whole tensor and yields the new bytes.  `types` maps tensors to their new types; if it is not empty, the
    file gets a new header, with the tensors in the order of `file_header`.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(file.path, "rb", buffering=0) as source, open(target, "wb", buffering=0) as out:
        if types:
            tensors = {key: (types.get(key, entry.dtype), entry.shape) for key, entry in file.entries.items()}
            header, places = file_header(tensors, file.metadata)
        else:
            header, places = source.read(file.first), {key: entry.begin for key, entry in file.entries.items()}
        write_at(out.fileno(), header, 0)
        pool = ThreadPoolExecutor(1 + COMPUTING)  # copying and computing do not wait for each other
        try:
            moves = {key: None if key in changes else places[key] - e.begin for key, e in file.entries.items()}
            jobs = [pool.submit(_copy_unchanged, file, moves, source, out.fileno())]
            for key in file.entries:  # in the order of the file, so that it grows evenly
                if key in changes:
                    jobs.append(pool.submit(_write_change, file, key, changes[key], places[key], out.fileno()))
            for job in as_completed(jobs):
                job.result()
        finally:
            pool.shutdown(cancel_futures=True)
        os.fsync(out.fileno())


def _write_change(file: TensorFile, key: str, change: Callable[[BinaryIO], Iterator], place: int, out: int) -> None:
    """Write the new bytes of a tensor to their place."""
    with open(file.path, "rb", buffering=0) as source:
        source.seek(file.entries[key].begin)
        for piece in change(source):
            write_at(out, piece, place)
            place += len(piece)


def _copy_unchanged(file: TensorFile, moves: Mapping[str, int | None], source: BinaryIO, out: int) -> None:
    """Copy the tensors that move by a number of bytes; those that move by None are changed, and not copied."""
    buffer = memoryview(bytearray(CHUNK))
    for move, keys in groupby(file.entries, moves.get):  # neighbours that move equally far are copied as one
        run = [file.entries[key] for key in keys]
        if move is not None:
            source.seek(run[0].begin)
            for begin in range(run[0].begin, run[-1].end, CHUNK):
                piece = buffer[: run[-1].end - begin]
                read_exactly(source, piece, file.path)
                write_at(out, piece, begin + move)


def read_exactly(source: BinaryIO, piece: memoryview | np.ndarray, path: Path) -> None:
    """Fill `piece` from an unbuffered file; raise UserError if the file ends too soon."""
    done = 0
    while done < len(piece):
        count = source.readinto(piece[done:])  # type: ignore[attr-defined]
        if not count:
            raise UserError(f"{path}: it became shorter while it was read")
        done += count


def write_at(out: int, piece, place: int) -> None:
    """Write bytes to a place in an open file, bypassing the page cache if the system can do that.

    They are not read again soon, and allocating pages for them would take longer than everything else.
    """
    done = 0
    while done < len(piece):
        rest = [piece[done:]]
        try:
            done += os.pwritev(out, rest, place + done, UNCACHED)
        except OSError as error:
            if not UNCACHED or error.errno != errno.EOPNOTSUPP:  # an older system, or another file system
                raise
            done += os.pwritev(out, rest, place + done)
