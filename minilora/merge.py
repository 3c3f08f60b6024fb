"""Fold LoRA files into a base checkpoint: W ← W + Σ sᵢ · ΔWᵢ, file to file, streaming.

    python -m minilora.merge BASE LORA[:SCALE] … --output OUT

A checkpoint is gigabytes of tensors of which a LoRA changes some.  Nothing is loaded as a model: the
header of a safetensors file says where each tensor's bytes are, so the bytes of the others are copied,
and those of a changed tensor are read, changed in float32, rounded once to their own type, and written,
a few rows at a time.  The result has the same headers, order and files as the base; with --undo the
original bytes of what changed are kept, and --restore puts them back, byte for byte.

BASE is a diffusers folder or a single file in the original layout.
"""

import json
import math
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch

from .checkpoint import write_lora
from .config import MergeConfig, UserError
from .files import CHUNK, DTYPES, Checkpoint, Entry, TensorFile, read_exactly, rewrite, staging, write_all
from .formats import Change, FormatError, LoRA, read_lora, some
from .lowrank import combine, extract, reduce
from .names import Modules, split

# ---------------------------------------------------------------------------------------------- report


@dataclass
class Folded:
    """What one LoRA did to one component: ‖sΔW‖ / ‖W‖ by module."""

    lora: str
    component: str
    changes: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        largest = max(self.changes, key=self.changes.get)
        mean = sum(self.changes.values()) / len(self.changes)
        return (
            f"{self.lora}: {len(self.changes)} modules of {self.component}, change of the weight {mean:.2%} on "
            f"average, {self.changes[largest]:.2%} at most ({split(largest)[1]})"
        )


@dataclass
class Report:
    """What became of LoRAs: by LoRA and component, the keys that found no home, and what else is to be known."""

    folded: list[Folded]
    homeless: dict[str, list[str]]
    notes: list[str]

    def __str__(self) -> str:
        lines = [str(folded) for folded in self.folded]
        lines += [f"{lora}: {key} has no home in the base" for lora, keys in self.homeless.items() for key in keys]
        return "\n".join([*lines, *self.notes])


# ----------------------------------------------------------------------------------------------- fold


@dataclass(frozen=True)
class Part:
    """What is added to some rows of a tensor: B A, the scales being folded into B, for all LoRAs together."""

    module: str
    first_row: int
    A: torch.Tensor  # (ranks, columns)
    B: torch.Tensor  # (rows, ranks)


def fold(
    base: Path,
    loras: list[tuple[Path, float]],
    output: Path,
    *,
    overwrite: bool = False,
    undo: Path | None = None,
    allow_unmatched: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Report:
    """Write `base` with LoRAs folded in, each at its strength, to `output`, in the layout of `base`.

    The sum is taken in `dtype` and rounded once to each weight's own type.  `undo` is a file that
    then holds the original bytes of what changed.  Raises UserError, with nothing left under
    `output`, for files that cannot be read, keys without a home in the base (unless allowed), shapes
    that do not fit, sums that are not finite numbers, and a disk without room.
    """
    checkpoint = Checkpoint(base)
    read = [read_for(path, checkpoint.modules, str(base), allow_unmatched) for path, _ in loras]
    plan, folded = _plan(checkpoint, read, loras, dtype)
    changed = {(file, key) for file, keys in plan.items() for key in keys}
    norms: dict[str, float] = {}
    with staging(output, checkpoint.size, overwrite) as new, _keeping(undo, checkpoint, plan, overwrite) as kept:
        for path, file in checkpoint.files.items():
            parts = plan.get(path, {})
            changes = {key: partial(_added, file, key, parts[key], dtype, norms, kept) for key in parts}
            rewrite(file, new / path, changes)
        checkpoint.copy_others(new)
    for part in folded:
        part.changes = {m: n / norms[m] if norms[m] else math.inf for m, n in part.changes.items()}
    notes = [f"left out: {path}, whose weights would be those of the base" for path in checkpoint.left_out]
    notes += [f"changed {len(changed)} of {sum(len(f.entries) for f in checkpoint.files.values())} tensors"]
    ema = sum(key.startswith("model_ema.") for file in checkpoint.files.values() for key in file.entries)
    notes += [f"note: the {ema} tensors of the moving average (model_ema.) are those of the base"] if ema else []
    homeless = {str(path): lora.homeless for (path, _), lora in zip(loras, read, strict=True) if lora.homeless}
    return Report(folded, homeless, notes)


def read_for(path: Path, modules: Modules | None, base: str, allow_unmatched: bool) -> LoRA:
    """Read a LoRA for a base with the given modules; UserError if it does not fit."""
    try:
        lora = read_lora(path, modules)
    except FormatError as error:
        raise UserError(f"LoRA {error}") from error
    if lora.homeless and (not allow_unmatched or not lora.changes):
        raise UserError(
            f"LoRA {path} was not made for this base: nothing in {base} goes by the name in {some(lora.homeless, 3)}"
        )
    return lora


def _plan(checkpoint: Checkpoint, read: list[LoRA], loras: list[tuple[Path, float]], dtype: torch.dtype):
    """Return what is added to which tensors, by file and key, and a report whose changes are still absolute."""
    plan: dict[Path, dict[str, list[Part]]] = {}
    folded: dict[tuple[int, str], Folded] = {}
    changes: dict[str, list[tuple[Change, float]]] = {}
    for number, (lora, (path, strength)) in enumerate(zip(read, loras, strict=True)):
        for module, change in lora.changes.items():
            component = split(module)[0]
            about = folded.setdefault((number, component), Folded(f"{path} at {strength:g}", component))
            about.changes[module] = abs(strength) * change.norm()
            changes.setdefault(module, []).append((change, strength))
    for module, several in changes.items():
        a = torch.cat([change.A.flatten(1).to(dtype) for change, _ in several])  # (ranks, columns)
        b = torch.cat([change.B.to(dtype) * (change.scale * strength) for change, strength in several], dim=1)
        for home in checkpoint.homes[module]:
            if home.shape != checkpoint.homes[module][0].shape:
                raise UserError(f"{checkpoint.path / home.file}: {home.key} has another shape than its other variant")
            parts = plan.setdefault(home.file, {}).setdefault(home.key, [])
            parts.append(Part(module, home.first_row, a, b))
    return plan, list(folded.values())


def _added(
    file: TensorFile,
    key: str,
    parts: list[Part],
    dtype: torch.dtype,
    norms: dict[str, float],
    kept: "Undo | None",
    source: BinaryIO,
) -> Iterator[memoryview]:
    """Yield the bytes of a tensor with its parts added, some rows at a time, and note ‖W‖ by module."""
    entry = file.entries[key]
    stored = DTYPES[entry.dtype]
    columns = math.prod(entry.shape[1:])
    width = stored.itemsize * columns
    rows_at_once = max(1, CHUNK // width)
    buffer = bytearray(rows_at_once * width)
    squares = dict.fromkeys((part.module for part in parts), 0.0)
    for first in range(0, entry.shape[0], rows_at_once):
        rows = min(rows_at_once, entry.shape[0] - first)
        raw = memoryview(buffer)[: rows * width]
        read_exactly(source, raw, file.path)
        if kept:
            kept.original(raw)
        weight = torch.frombuffer(raw, dtype=stored).view(rows, columns).to(dtype)  # (rows, columns)
        for part in parts:
            begin, end = max(first, part.first_row), min(first + rows, part.first_row + len(part.B))
            if begin < end:
                mine = weight[begin - first : end - first]
                squares[part.module] += mine.norm().item() ** 2
                mine.addmm_(part.B[begin - part.first_row : end - part.first_row], part.A)
        result = weight.to(stored)
        if not all(extreme.isfinite() for extreme in result.to(weight.dtype).aminmax()):
            modules = ", ".join(split(part.module)[1] for part in parts)
            raise UserError(f"{file.path}: {key} ({modules}) would not be finite numbers of type {entry.dtype}")
        new = memoryview(result.view(torch.uint8).numpy()).cast("B")
        if kept:
            kept.changed(new)
        yield new
    if kept:
        kept.tensor_done()
    for module, square in squares.items():
        norms[module] = math.sqrt(square)


# ------------------------------------------------------------------------------------------------ undo


CHECKSUMS = "checksums"


class Undo:
    """A file with the original bytes of what a merge changed, and a checksum of what each became.

    An ordinary safetensors file: a tensor is named by its file in the checkpoint and its key, and
    `checksums` holds the CRC-32 of each changed tensor, in their order.
    """

    def __init__(self, path: Path, changed: list[tuple[str, Entry]]):
        self.out = open(path, "wb", buffering=0)  # noqa: SIM115  closed by finish, or by _keeping
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
        write_all(self.out, raw)

    def changed(self, new) -> None:
        self.running = zlib.crc32(new, self.running)

    def tensor_done(self) -> None:
        self.checksums.append(self.running)
        self.running = 0

    def finish(self) -> None:
        write_all(self.out, struct.pack(f"<{len(self.checksums)}I", *self.checksums))
        os.fsync(self.out.fileno())


@contextmanager
def _keeping(path: Path | None, checkpoint: Checkpoint, plan, overwrite: bool) -> Iterator[Undo | None]:
    """Write an undo file while the block runs; nothing if `path` is None."""
    if path is None:
        yield None
        return
    changed = [
        (f"{rel.as_posix()}:{key}", entry)
        for rel, file in checkpoint.files.items()
        for key, entry in file.entries.items()
        if key in plan.get(rel, {})
    ]
    with staging(path, sum(entry.end - entry.begin for _, entry in changed), overwrite) as new:
        undo = Undo(new, changed)
        try:
            yield undo
            undo.finish()
        finally:
            undo.out.close()


def restore(merged: Path, undo: Path, output: Path, *, overwrite: bool = False) -> Report:
    """Write to `output` the base that `merged` was made from, byte for byte, given the undo file of that merge.

    Raises UserError if `merged` is not what that merge wrote.
    """
    checkpoint, kept = Checkpoint(merged), TensorFile(undo)
    if CHECKSUMS not in kept.entries:
        raise UserError(f"{undo}: it is no undo file of a merge")
    names = [name for name in kept.entries if name != CHECKSUMS]
    with open(undo, "rb") as originals, staging(output, checkpoint.size, overwrite) as new:
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
    return Report([], {}, [f"put back {len(checksums)} tensors"])


# ------------------------------------------------------------------------------------------- the command


def merge(config: MergeConfig) -> None:
    """Do what `config` asks for and print what became of it."""
    output = Path(config.output)
    if config.restore:
        report = restore(*map(Path, config.files), output, overwrite=config.overwrite)
    elif config.loras_only or config.extract:
        report = _write_lora(config, output)
    else:
        base, *loras = config.files
        report = fold(
            Path(base),
            [split_strength(lora) for lora in loras],
            output,
            overwrite=config.overwrite,
            undo=Path(config.undo) if config.undo else None,
            allow_unmatched=config.allow_unmatched,
            dtype=torch.float64 if config.float64 else torch.float32,
        )
    print(report)
    print(f"wrote {output}")


def _write_lora(config: MergeConfig, output: Path) -> Report:
    """Write the LoRA that --extract or --loras-only asks for."""
    if output.exists() and not config.overwrite:
        raise UserError(f"--output {output}: it exists; choose another, or --overwrite")
    notes, reduction = [], None
    if config.extract:
        lora, reduction, notes = extract(*map(Path, config.files), config.rank, config.energy)
        modules = Checkpoint(Path(config.files[0])).modules
    else:
        modules = Checkpoint(Path(config.base)).modules if config.base else None
        loras = []
        for text in config.files:
            path, strength = split_strength(text)
            loras.append(
                (read_for(path, modules, config.base or "diffusers' naming", config.allow_unmatched), strength)
            )
            notes += [f"left out: {key} of {path}" for key in loras[-1][0].homeless]
        lora = combine(loras)
        if config.rank or config.energy:
            lora, reduction = reduce(lora, config.rank, config.energy)
    if modules is None and config.dialect == "kohya":
        raise UserError("--dialect kohya needs --base, whose modules it names")
    write_lora(output, lora, config.dialect, modules, flat_text_encoder=False)
    ranks = sorted({change.rank for change in lora.changes.values()})
    notes.append(f"{len(lora.changes)} modules, rank {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else ""))
    return Report([], {}, [*([str(reduction)] if reduction else []), *notes])


def split_strength(text: str) -> tuple[Path, float]:
    """Split "out/fluent:0.8" into path and strength; without a strength it is 1."""
    path, colon, last = text.rpartition(":")
    try:
        strength = float(last) if colon else None
    except ValueError:
        strength = None  # the colon belongs to the path
    if strength is None:
        return Path(text), 1.0
    if not math.isfinite(strength):
        raise UserError(f"LoRA {text}: the strength {last} is not a finite number")
    return Path(path), strength


if __name__ == "__main__":
    from .commands import merge as command

    command()
