"""Taking a merge back: the original bytes of what it changed are kept beside it, and put back byte for byte."""

import json
import os
import struct
import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO

from .config import UserError
from .files import CHUNK, Entry, TensorFile, read_exactly, rewrite, staging, write_all
from .layout import Checkpoint

CHECKSUMS = "checksums"


class Undo:
    """A file with the original bytes of what a merge changed, and a checksum of what each became.

    An ordinary safetensors file: a tensor is named by its file in the checkpoint and its key, and
    `checksums` holds the CRC-32 of each changed tensor, in their order.
    """

    def __init__(self, path: Path, changed: list[tuple[str, Entry]]):
        self.out = open(path, "wb", buffering=0)  # noqa: SIM115  closed by `keeping`
        header, position = {}, 0
        for name, entry in changed:
            size = entry.end - entry.begin
            header[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [position, position + size]}
            position += size
        header[CHECKSUMS] = {
            "dtype": "U32",
            "shape": [len(changed)],
            "data_offsets": [position, position + 4 * len(changed)],
        }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        write_all(self.out, struct.pack("<Q", len(text)) + text)
        self.checksums: list[int] = []
        self.running = 0

    def original(self, raw) -> None:
        """Keep the next bytes of a tensor as they were."""
        write_all(self.out, raw)

    def changed(self, new) -> None:
        """Note the next bytes of the tensor as they have become."""
        self.running = zlib.crc32(new, self.running)

    def tensor_done(self) -> None:
        """Note that all bytes of a tensor have been seen."""
        self.checksums.append(self.running)
        self.running = 0

    def finish(self) -> None:
        """Write the checksums, which end the file."""
        write_all(self.out, struct.pack(f"<{len(self.checksums)}I", *self.checksums))
        os.fsync(self.out.fileno())


@contextmanager
def keeping(path: Path | None, checkpoint: Checkpoint, plan: Mapping[Path, Collection[str]]) -> Iterator[Undo | None]:
    """Write an undo file while the block runs; nothing if `path` is None.  One that is there is never overwritten."""
    if path is None:
        yield None
        return
    changed = [
        (f"{rel.as_posix()}:{key}", entry)
        for rel, file in checkpoint.files.items()
        for key, entry in file.entries.items()
        if key in plan.get(rel, {})
    ]
    with staging(path, sum(entry.end - entry.begin for _, entry in changed), overwrite=False) as new:
        undo = Undo(new, changed)
        try:
            yield undo
            undo.finish()
        finally:
            undo.out.close()


def restore(merged: Path, undo: Path, output: Path, *, overwrite: bool = False) -> int:
    """Write to `output` the base that `merged` was made from, byte for byte; return how many tensors were put back.

    Raises UserError if `merged` is not what that merge wrote.
    """
    checkpoint, kept = Checkpoint(merged), TensorFile(undo)
    if CHECKSUMS not in kept.entries or kept.entries[CHECKSUMS].shape != (len(kept.entries) - 1,):
        raise UserError(f"{undo}: it is no undo file of a merge")
    names = [name for name in kept.entries if name != CHECKSUMS]
    with open(undo, "rb") as originals, staging(output, checkpoint.size, overwrite, checkpoint.content) as new:
        originals.seek(kept.entries[CHECKSUMS].begin)
        checksums = dict(zip(names, struct.unpack(f"<{len(names)}I", originals.read(4 * len(names))), strict=True))

        def put_back(file: TensorFile, key: str, name: str, source: BinaryIO) -> Iterator[memoryview]:
            entry, there, checksum = file.entries[key], kept.entries[name], 0
            originals.seek(there.begin)
            for begin in range(0, entry.end - entry.begin, CHUNK):
                size = min(CHUNK, entry.end - entry.begin - begin)
                piece = memoryview(bytearray(size))
                read_exactly(source, piece, file.path)
                checksum = zlib.crc32(piece, checksum)
                read_exactly(originals, piece, undo)
                yield piece
            if checksum != checksums[name]:
                raise UserError(f"{file.path}: {key} is not as the merge left it that {undo} undoes")

        for path, file in checkpoint.files.items():
            mine = {
                name.removeprefix(f"{path.as_posix()}:"): name
                for name in names
                if name.startswith(f"{path.as_posix()}:")
            }
            for key, name in mine.items():
                if key not in file.entries or file.entries[key].shape != kept.entries[name].shape:
                    raise UserError(f"{file.path}: it has no {key} of {kept.entries[name].shape}, which {undo} undoes")
                names.remove(name)
            rewrite(file, new / path, {key: partial(put_back, file, key, name) for key, name in mine.items()})
        if names:
            raise UserError(f"{merged}: it has no {names[0]}, which {undo} undoes")
        checkpoint.copy_others(new)
    return len(checksums)
