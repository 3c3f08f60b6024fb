"""Undo a merge: a file keeps the original bytes of the changed tensors, which `restore` puts back, byte for byte."""

import json
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
from .tensors import CHUNK, Entry, TensorFile, read_exactly, rewrite, staging, write_at

CHECKSUMS = "checksums"


class Undo:
    """A file with the original bytes of the tensors that a merge changed, and a checksum of the merged ones.

    It is an ordinary safetensors file.  A tensor is named by its file in the checkpoint and its key; `checksums` holds
    the CRC-32 of each changed tensor, in their order.  Tensors may be kept in any order.
    """

    def __init__(self, path: Path, changed: Mapping[str, Entry]):
        self.out = open(path, "wb", buffering=0)  # noqa: SIM115  closed by `keeping`
        self.checksums = dict.fromkeys(changed, 0)
        header: dict[str, dict] = {}
        position = 0
        for name, entry in changed.items():
            size = entry.end - entry.begin
            header[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [position, position + size]}
            position += size
        offsets = [position, position + 4 * len(changed)]
        header[CHECKSUMS] = {"dtype": "U32", "shape": [len(changed)], "data_offsets": offsets}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        write_at(self.out.fileno(), struct.pack("<Q", len(text)) + text, 0)
        self.places = {name: 8 + len(text) + about["data_offsets"][0] for name, about in header.items()}

    def keep(self, name: str, begin: int, original, new) -> None:
        """Store original bytes of a tensor from `begin` on, and add the new bytes to its checksum; call in order."""
        write_at(self.out.fileno(), original, self.places[name] + begin)
        self.checksums[name] = zlib.crc32(new, self.checksums[name])

    def finish(self) -> None:
        """Write the checksums at the end of the file."""
        checksums = struct.pack(f"<{len(self.checksums)}I", *self.checksums.values())
        write_at(self.out.fileno(), checksums, self.places[CHECKSUMS])
        os.fsync(self.out.fileno())


def name_of(path: Path, key: str) -> str:
    """Return the name of a checkpoint file's tensor in an undo file."""
    return f"{path.as_posix()}:{key}"


@contextmanager
def keeping(path: Path | None, checkpoint: Checkpoint, plan: Mapping[Path, Collection[str]]) -> Iterator[Undo | None]:
    """Write an undo file while the block runs; nothing if `path` is None.  An existing file is never overwritten."""
    if path is None:
        yield None
        return
    changed = {
        name_of(rel, key): entry
        for rel, file in checkpoint.files.items()
        for key, entry in file.entries.items()
        if key in plan.get(rel, {})
    }
    with staging(path, sum(entry.end - entry.begin for entry in changed.values()), overwrite=False) as new:
        undo = Undo(new, changed)
        try:
            yield undo
            undo.finish()
        finally:
            undo.out.close()


def restore(merged: Path, undo: Path, output: Path, *, overwrite: bool = False) -> int:
    """Write the base that `merged` was made from to `output`, byte for byte; return the number of restored tensors.

    Raises UserError if `merged` is not the result of the merge that wrote `undo`.
    """
    checkpoint, kept = Checkpoint(merged), TensorFile(undo)
    if CHECKSUMS not in kept.entries or kept.entries[CHECKSUMS].shape != (len(kept.entries) - 1,):
        raise UserError(f"{undo}: it is not the undo file of a merge")
    names = [name for name in kept.entries if name != CHECKSUMS]
    checksums = dict(zip(names, kept.read(CHECKSUMS).tolist(), strict=True))

    def put_back(file: TensorFile, key: str, name: str, source: BinaryIO) -> Iterator[memoryview]:
        entry, checksum = file.entries[key], 0
        with open(undo, "rb", buffering=0) as originals:
            originals.seek(kept.entries[name].begin)
            for begin in range(0, entry.end - entry.begin, CHUNK):
                piece = memoryview(bytearray(min(CHUNK, entry.end - entry.begin - begin)))
                read_exactly(source, piece, file.path)
                checksum = zlib.crc32(piece, checksum)
                read_exactly(originals, piece, undo)
                yield piece
        if checksum != checksums[name]:
            raise UserError(f"{file.path}: {key} was changed after the merge that {undo} undoes")

    with staging(output, checkpoint.size, overwrite, checkpoint.content) as new:
        for path, file in checkpoint.files.items():
            prefix = name_of(path, "")
            mine = {name.removeprefix(prefix): name for name in names if name.startswith(prefix)}
            for key, name in mine.items():
                if key not in file.entries or file.entries[key].shape != kept.entries[name].shape:
                    raise UserError(f"{file.path}: it has no {key} of {kept.entries[name].shape}, which {undo} undoes")
                names.remove(name)
            rewrite(file, new / path, {key: partial(put_back, file, key, name) for key, name in mine.items()})
        if names:
            raise UserError(f"{merged}: it has no {names[0]}, which {undo} undoes")
        checkpoint.copy_others(new)
    return len(checksums)
