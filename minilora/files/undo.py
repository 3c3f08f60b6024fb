"""Undo a merge: a file keeps the original bytes of the changed tensors, which `restore` puts back, byte for byte."""

import os
import struct
import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO

from ..settings.errors import UserError
from .layout import Checkpoint
from .rewrite import CHUNK, read_exactly, rewrite, write_at
from .tensors import Entry, TensorFile, file_header, staging

CHECKSUMS = "checksums"


class Undo:
    """A file with the original bytes of the tensors that a merge changed, and a checksum of the merged ones.

    It is an ordinary safetensors file.  A tensor is named by its file in the checkpoint and its key; `checksums` holds
    the CRC-32 of each changed tensor, in their order.  Tensors may be kept in any order.
    """

    def __init__(self, out: int, changed: Mapping[str, Entry]):
        tensors = {name: (entry.dtype, entry.shape) for name, entry in changed.items()}
        header, self.places = file_header(tensors | {CHECKSUMS: ("U32", (len(changed),))}, {})
        self.checksums = {name: 0 for name in self.places if name != CHECKSUMS}
        self.out = out
        write_at(out, header, 0)

    def keep(self, name: str, begin: int, original, new) -> None:
        """Store original bytes of a tensor from `begin` on, and add the new bytes to its checksum; call in order."""
        write_at(self.out, original, self.places[name] + begin)
        self.checksums[name] = zlib.crc32(new, self.checksums[name])

    def finish(self) -> None:
        """Write the checksums."""
        checksums = struct.pack(f"<{len(self.checksums)}I", *self.checksums.values())
        write_at(self.out, checksums, self.places[CHECKSUMS])
        os.fsync(self.out)


def name_of(path: Path, key: str) -> str:
    """Return the name of a checkpoint file's tensor in an undo file."""
    return f"{path.as_posix()}:{key}"


@contextmanager
def keeping(path: Path | None, checkpoint: Checkpoint, plan: Mapping[Path, Collection[str]]) -> Iterator[Undo | None]:
    """Write an undo file while the block runs; nothing if `path` is None.  An existing file is never overwritten."""
    if path is None:
        yield None
        return
    changed = {name_of(rel, key): checkpoint.files[rel].entries[key] for rel, keys in plan.items() for key in keys}
    size = sum(entry.end - entry.begin for entry in changed.values())
    with staging(path, size, overwrite=False) as new, open(new, "wb", buffering=0) as out:
        undo = Undo(out.fileno(), changed)
        yield undo
        undo.finish()


def restore(merged: Path, undo: Path, output: Path, *, overwrite: bool = False) -> int:
    """Write the base that `merged` was made from to `output`, byte for byte; return the number of restored tensors.

    Raises UserError if `merged` is not the result of the merge that wrote `undo`.
    """
    checkpoint, kept = Checkpoint(merged), TensorFile(undo)
    originals = {name: entry for name, entry in kept.entries.items() if name != CHECKSUMS}
    if CHECKSUMS not in kept.entries or kept.entries[CHECKSUMS].shape != (len(originals),):
        raise UserError(f"{undo}: it is not the undo file of a merge")
    checksums = dict(zip(originals, kept.read(CHECKSUMS).tolist(), strict=True))

    def put_back(file: TensorFile, key: str, name: str, source: BinaryIO) -> Iterator[memoryview]:
        size, checksum = originals[name].end - originals[name].begin, 0
        buffer = memoryview(bytearray(min(CHUNK, size)))
        with open(undo, "rb", buffering=0) as original:
            original.seek(originals[name].begin)
            for begin in range(0, size, CHUNK):
                piece = buffer[: size - begin]
                read_exactly(source, piece, file.path)
                checksum = zlib.crc32(piece, checksum)
                read_exactly(original, piece, undo)
                yield piece
        if checksum != checksums[name]:
            raise UserError(f"{file.path}: {key} was changed after the merge that {undo} undoes")

    left = set(originals)
    with staging(output, checkpoint.size, overwrite, checkpoint.content) as new:
        for path, file in checkpoint.files.items():
            prefix = name_of(path, "")
            mine = {name.removeprefix(prefix): name for name in originals if name.startswith(prefix)}
            for key, name in mine.items():
                if key not in file.entries or file.entries[key].shape != originals[name].shape:
                    raise UserError(f"{file.path}: it has no {key} of {originals[name].shape}, which {undo} undoes")
            left.difference_update(mine.values())
            rewrite(file, new / path, {key: partial(put_back, file, key, name) for key, name in mine.items()})
        if left:
            raise UserError(f"{merged}: it has no {min(left)}, which {undo} undoes")
        checkpoint.copy_others(new)
    return len(originals)
