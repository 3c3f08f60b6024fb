"""Checkpoints on disk, without loading them: where each tensor's bytes are, and writing them anew.

A safetensors file is 8 bytes with the length of a header, the header (JSON: the type, shape and place
of each tensor), and the tensors' bytes.  So a file can be rewritten with some of its tensors changed
by reading its header only and streaming the rest, in memory that does not grow with the file.
"""

import errno
import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from .config import UserError
from .names import TEXT_ENCODER, TEXT_ENCODER_2, UNET, diffusers_unet_paths, full_name, modules_of_original

CHUNK = 1 << 21  # bytes that are worked on at a time: few enough to stay in a processor's cache
DTYPES = {  # the types that a weight can have
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}
SIZES = {name: dtype.itemsize for name, dtype in DTYPES.items()}  # bytes of one number
SIZES |= {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies in a safetensors file: bytes `begin` to `end`, counted from the file's start."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFile:
    """The header of a safetensors file: which tensors are in it and where, in the order of their bytes.

    The file is 8 bytes with the header's length, the header (JSON), the tensors' bytes.  Raises
    UserError, naming the key, for a header that does not describe the file exactly.
    """

    def __init__(self, path: Path):
        self.path = path
        self.size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else self.size
            if length > self.size - 8 or length > 100_000_000:
                raise UserError(f"{path}: not a whole safetensors file; its header would be {length:,} bytes")
            self.first = 8 + length  # of the tensors' bytes
            try:
                header = json.loads(file.read(length))
                self.metadata = header.pop("__metadata__", {})
                entries = {
                    key: Entry(e["dtype"], tuple(e["shape"]), *(self.first + n for n in e["data_offsets"]))
                    for key, e in header.items()
                }
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise UserError(f"{path}: its safetensors header cannot be read ({error!r})") from error
        self.entries = dict(sorted(entries.items(), key=lambda item: item[1].begin))
        end = self.first
        for key, entry in self.entries.items():
            size = SIZES.get(entry.dtype)
            if size is None or any(not isinstance(n, int) or n < 0 for n in entry.shape):
                raise UserError(f"{path}: {key} has type {entry.dtype} and shape {entry.shape}, which is not known")
            if entry.begin != end or entry.end - entry.begin != math.prod(entry.shape) * size:
                raise UserError(
                    f"{path}: {key}, {entry.dtype} {entry.shape}, should begin at byte {end} and be of that size, "
                    f"but lies at {entry.begin} to {entry.end}"
                )
            end = entry.end
        if end != self.size:
            raise UserError(f"{path}: it has {self.size:,} bytes and should have {end:,}; it was cut off or added to")

    def bytes_of(self, key: str, begin: int = 0, end: int | None = None) -> bytearray:
        """Return the bytes of one tensor, or those from `begin` to `end` of them."""
        entry = self.entries[key]
        end = entry.end - entry.begin if end is None else end
        content = bytearray(end - begin)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(entry.begin + begin)
            read_exactly(file, memoryview(content), self.path)
        return content


@dataclass(frozen=True)
class Home:
    """Where the weight of a module lies: rows `first_row` and on of a tensor of a file of a checkpoint."""

    file: Path  # relative to the checkpoint
    key: str
    first_row: int
    shape: tuple[int, ...]  # of the module's weight


class Checkpoint:
    """A base on disk: its weight files, all its other files, and where the weight of each module lies.

    Raises UserError if there is no Stable Diffusion in safetensors files at `path`.
    """

    def __init__(self, path: Path):
        self.path = path
        self.files: dict[Path, TensorFile] = {}  # by path relative to `path`
        self.others: list[Path] = []
        self.left_out: list[Path] = []  # weights of other kinds, which would be those of the base
        self.homes: dict[str, list[Home]] = {}
        if path.is_dir():
            self._look_through_folder()
        elif path.is_file():
            self.files[Path()] = TensorFile(path)
            self._find_original_homes()
        else:
            raise UserError(f"{path}: there is no such file or folder")
        if not self.homes:
            raise UserError(
                f"{path}: it is neither a diffusers folder with .safetensors weights nor a single file of one"
            )

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files.values()) + sum((self.path / p).stat().st_size for p in self.others)

    @property
    def modules(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the weights, by the modules' full names."""
        return {name: homes[0].shape for name, homes in self.homes.items()}

    def weight(self, name: str) -> torch.Tensor:
        """Return the weight of a module."""
        home = self.homes[name][0]
        file = self.files[home.file]
        dtype = DTYPES[file.entries[home.key].dtype]
        width = dtype.itemsize * math.prod(home.shape[1:])
        rows = file.bytes_of(home.key, home.first_row * width, (home.first_row + home.shape[0]) * width)
        return torch.frombuffer(rows, dtype=dtype).view(home.shape)

    def copy_others(self, target: Path) -> None:
        """Copy all that is not a weight into another folder."""
        for path in self.others:
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.path / path, target / path)

    def _look_through_folder(self) -> None:
        for path in sorted(p.relative_to(self.path) for p in self.path.rglob("*") if p.is_file()):
            component = path.parts[0] if len(path.parts) == 2 else ""
            if path.suffix in (".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".onnx", ".h5"):
                self.left_out.append(path)
            elif path.suffix != ".safetensors" or len(path.parts) != 2:
                (self.left_out if path.suffix == ".safetensors" else self.others).append(path)
            else:
                self.files[path] = TensorFile(self.path / path)
                if component in (UNET, TEXT_ENCODER, TEXT_ENCODER_2):
                    for key, entry in self.files[path].entries.items():
                        self._add([full_name(component, key.removesuffix(".weight"))], path, key, entry)

    def _find_original_homes(self) -> None:
        prefix, entries = "model.diffusion_model.", self.files[Path()].entries
        originals = {key: key.removeprefix(prefix).removesuffix(".weight") for key in entries if key.startswith(prefix)}
        paths = diffusers_unet_paths(originals.values())
        for key, entry in entries.items():
            if key not in originals:
                self._add(modules_of_original(key), Path(), key, entry)
            elif path := paths.get(originals[key]):
                self._add([full_name(UNET, path)], Path(), key, entry)

    def _add(self, names: list[str], file: Path, key: str, entry: Entry) -> None:
        """Note that the weights of some modules lie, one below the other, under a key."""
        if not key.endswith("weight") or len(entry.shape) not in (2, 4):
            return
        if entry.dtype not in DTYPES or any(".embeddings." in name for name in names):
            return  # tables of vectors, and whole numbers: no layer that can carry LoRA
        for number, name in enumerate(names):
            rows = entry.shape[0] // len(names)
            home = Home(file, key, number * rows, (rows, *entry.shape[1:]))
            self.homes.setdefault(name, []).append(home)


# ------------------------------------------------------------------------------------------ byte streams


def rewrite(file: TensorFile, target: Path, changes: Mapping[str, Callable[[BinaryIO], Iterator]]) -> None:
    """Write a checkpoint file anew: for the keys in `changes` the bytes that these give, the others as they are.

    Each of `changes` is called with the open file, at the tensor's first byte, and reads all of it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(file.path, "rb", buffering=0) as source, open(target, "wb", buffering=0) as out:
        position = 0  # up to which all is written
        for key in [*(key for key in file.entries if key in changes), None]:
            until = file.entries[key].begin if key is not None else file.size
            copy_bytes(source, out, until - position, file.path)
            position = until
            if key is not None:
                for piece in changes[key](source):
                    write_all(out, piece)
                position = file.entries[key].end
        os.fsync(out.fileno())


def copy_bytes(source: BinaryIO, out: BinaryIO, count: int, path: Path) -> None:
    """Copy the next `count` bytes from one unbuffered file to another, within the kernel where it can."""
    in_kernel = getattr(os, "copy_file_range", None)
    while count:
        try:
            done = in_kernel(source.fileno(), out.fileno(), count) if in_kernel else 0
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            in_kernel, done = None, 0  # not between these two files
        if not done:
            piece = memoryview(bytearray(min(CHUNK, count)))
            read_exactly(source, piece, path)
            write_all(out, piece)
            done = len(piece)
        count -= done


def read_exactly(source: BinaryIO, piece: memoryview, path: Path) -> None:
    """Fill `piece` from an unbuffered file, or raise UserError if the file ends before."""
    done = 0
    while done < len(piece):
        count = source.readinto(piece[done:])
        if not count:
            raise UserError(f"{path}: it became shorter while it was read")
        done += count


def write_all(out: BinaryIO, piece) -> None:
    """Write all of `piece` to an unbuffered file."""
    piece = memoryview(piece)
    while piece:
        piece = piece[out.write(piece) :]


@contextmanager
def staging(output: Path, size: int, overwrite: bool) -> Iterator[Path]:
    """Give a temporary path to write to, which takes the name `output` once the block is done, or goes away.

    Raises UserError if there is something at `output` already, unless it may be overwritten, or if
    the disk has no room for `size` bytes.
    """
    if output.exists() and not overwrite:
        raise UserError(f"--output {output}: it exists; choose another, or --overwrite")
    output.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(output.parent).free
    if free < size:
        raise UserError(f"--output {output}: it needs {size:,} bytes and the disk has {free:,} left")
    new = output.with_name(f".{output.name}.{os.getpid()}.part")
    old = output.with_name(f".{output.name}.{os.getpid()}.old")
    try:
        yield new
        if output.is_dir():
            output.rename(old)
        os.replace(new, output)
    finally:
        for path in (new, old):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
