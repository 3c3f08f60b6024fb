"""Fold LoRAs into a checkpoint: W ← W + Σ sᵢ · ΔWᵢ, file to file, streaming.

A checkpoint has gigabytes of tensors, and a LoRA changes some of them.  No model is loaded: the header of a safetensors
file says where the bytes of each tensor are.  The bytes of unchanged tensors are copied.  Those of a changed tensor are
read, summed in float32, rounded once to their own type and written, a few rows at a time.  The result has the same
files, headers and order as the base, unless --dtype asks for another type of all weights.

Rounding removes what is too small relative to a weight.  How much of ΔW survives is measured on a sample.
"""

import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO

# Set before numpy is imported: threads in its matrix products would compete with the threads of tensors.rewrite.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

from ..settings.errors import UserError
from .layout import Checkpoint
from .names import Modules, block_factors, split
from .number_types import DTYPES, WEIGHTS, narrow, scratch, widen
from .read import Delta, FormatError, LoRA, other_network, read_lora, some
from .tensors import CHUNK, TensorFile, read_exactly, rewrite, staging
from .undo import keeping, name_of

SEEN = 1 << 12  # numbers of each chunk of a tensor on which the loss by rounding is measured
ENOUGH = 0.95  # share of ΔW; if less survives, there is a warning

# ---------------------------------------------------------------------------------------------- report


@dataclass
class Folded:
    """The effect of one LoRA on one component: ‖sΔW‖ / ‖W‖ by module."""

    lora: str
    component: str
    sizes: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        largest = max(self.sizes, key=self.sizes.get)
        mean = sum(self.sizes.values()) / len(self.sizes)
        return (
            f"{self.lora}: {len(self.sizes)} modules of {self.component}, ΔW is {mean:.2%} of the weight on average, "
            f"{self.sizes[largest]:.2%} at most ({split(largest)[1]})"
        )


@dataclass
class Report:
    """The report on folding LoRAs: what each did to each component, the unmatched keys, and notes."""

    folded: list[Folded]
    unmatched: dict[str, list[str]]
    notes: list[str]

    def __str__(self) -> str:
        lines = [str(folded) for folded in self.folded]
        lines += [f"{lora}: {key} matches nothing in the base" for lora, keys in self.unmatched.items() for key in keys]
        return "\n".join([*lines, *self.notes])


# ----------------------------------------------------------------------------------------------- fold


@dataclass(frozen=True)
class Part:
    """What is added to some rows of a tensor: B A of all LoRAs, with scales and strengths folded into B."""

    module: str
    first_row: int
    A: np.ndarray  # (ranks, columns)
    B: np.ndarray  # (rows, ranks)


def fold(
    base: Path,
    loras: list[tuple[Path, float]],
    output: Path,
    *,
    blocks: Mapping[str, float] = {},
    overwrite: bool = False,
    undo: Path | None = None,
    allow_unmatched: bool = False,
    dtype: type = np.float32,
    written: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
) -> Report:
    """Write `base` with LoRAs folded in, each at its strength, to `output`, in the layout of `base`.

    `blocks` are factors on the strengths, as `block_factors` takes them.  The sum is computed in `dtype` and rounded
    once to each weight's own type, or for all weights to the type `written` (such as "F32").  `undo` is a file for the
    original bytes of the changed weights.  `revision` and `variant` choose the base, as `Checkpoint` takes them.
    Raises UserError, with nothing left under `output`, for files that cannot be read, unmatched keys (unless allowed),
    blocks without a LoRA, shapes that do not fit, sums that are not finite, and a full disk.
    """
    if undo and undo.resolve().is_relative_to(output.resolve()):
        raise UserError(f"--undo {undo}: it is inside --output {output}; choose another folder")
    checkpoint = Checkpoint(base, revision, variant)
    read = [read_for(path, checkpoint.modules, str(base), allow_unmatched) for path, _ in loras]
    plan, folded = _plan(checkpoint, read, loras, blocks, dtype)
    types = {path: _types(file, written) for path, file in checkpoint.files.items()}
    additions: list[Addition] = []
    room = checkpoint.size * (1 if undo is None else 2) + sum(
        math.prod(entry.shape) * (DTYPES[types[path].get(key, entry.dtype)].itemsize - DTYPES[entry.dtype].itemsize)
        for path, file in checkpoint.files.items()
        for key, entry in file.entries.items()
    )
    staged = staging(output, room, overwrite, checkpoint.content)
    with staged as new, keeping(undo, checkpoint, plan) as kept:
        for path, file in checkpoint.files.items():
            added, planned = {}, plan.get(path, {})
            for key in planned | types[path]:
                keep = partial(kept.keep, name_of(path, key)) if kept else None
                kind = types[path].get(key, file.entries[key].dtype)
                added[key] = Addition(file, key, planned.get(key, []), kind, keep)
            rewrite(file, new / path, added, types[path])
            additions += added.values()
        checkpoint.copy_others(new)
    norms = {module: math.sqrt(square) for addition in additions for module, square in addition.squares.items()}
    for part in folded:
        part.sizes = {m: n / norms[m] if norms[m] else math.inf for m, n in part.sizes.items()}
    notes = [f"left out: {path}, because its weights would be the unchanged base's" for path in checkpoint.left_out]
    changed = sum(len(keys) for keys in plan.values())
    tensors = sum(len(file.entries) for file in checkpoint.files.values())
    notes += [f"changed {changed} of {tensors} tensors"]
    notes += _arrived(additions)
    ema = sum(key.startswith("model_ema.") for file in checkpoint.files.values() for key in file.entries)
    notes += [f"note: the {ema} tensors of the moving average (model_ema.) are unchanged"] if ema else []
    unmatched = {str(path): lora.unmatched for (path, _), lora in zip(loras, read, strict=True) if lora.unmatched}
    return Report(folded, unmatched, notes)


def read_for(path: Path, modules: Modules | None, base: str, allow_unmatched: bool, with_words: bool = False) -> LoRA:
    """Read a LoRA for a base with the given modules; UserError if it does not fit.

    Learnt words in the file count as unmatched, unless it is read `with_words`.
    """
    try:
        lora = read_lora(path, modules)
    except FormatError as error:
        raise UserError(f"LoRA {error}") from error
    unmatched = [key for key in lora.unmatched if key not in lora.words]
    # Without a base, nothing tells which modules of a U-Net there are.
    if other := other_network([*unmatched, *(lora.deltas if modules is None else ())]):
        network, key = other
        start = f"LoRA {path} " if modules is None else f"LoRA {path} was not made for this base: it "
        raise UserError(f"{start}is one of {network} ({key}); only those of Stable Diffusion 1, 2 and XL are read")
    if unmatched and modules is None:
        raise UserError(f"LoRA {path}: {unmatched[0]} does not spell out its module's name; --base is needed")
    if unmatched and (not allow_unmatched or not lora.deltas):
        raise UserError(f"LoRA {path} was not made for this base: {base} has no module for {some(unmatched, 3)}")
    if lora.words and not (with_words or allow_unmatched):
        raise UserError(
            f"LoRA {path} brings learnt words (embeddings), which only sample.py uses: {some(lora.words, 3)}; "
            "minilora.merge --allow-unmatched leaves them out"
        )
    return lora


def _types(file: TensorFile, written: str | None) -> dict[str, str]:
    """Return the new type of each tensor of a file whose type changes, by key.

    Tensors without a dot in their name are not weights but tables, for example of noise levels, and keep their type.
    """
    weights = (key for key, entry in file.entries.items() if written and entry.dtype in WEIGHTS and "." in key)
    return {key: written for key in weights if file.entries[key].dtype != written}


def _plan(checkpoint: Checkpoint, read: list[LoRA], loras: list[tuple[Path, float]], blocks: Mapping, dtype: type):
    """Return the parts to add to tensors, by file and key, and a report with ‖sΔW‖ instead of ‖sΔW‖ / ‖W‖."""
    plan: dict[Path, dict[str, list[Part]]] = {}
    folded: dict[tuple[int, str], Folded] = {}
    deltas: dict[str, list[tuple[Delta, float]]] = {}
    factors = block_factors([module for lora in read for module in lora.deltas], blocks)
    for number, (lora, (path, given)) in enumerate(zip(read, loras, strict=True)):
        for module, delta in lora.deltas.items():
            component, strength = split(module)[0], given * factors[module]
            about = folded.setdefault((number, component), Folded(f"{path} at {given:g}", component))
            about.sizes[module] = abs(strength) * delta.norm()
            deltas.setdefault(module, []).append((delta, strength))
    for module, several in deltas.items():
        a = np.concatenate([delta.A.reshape(delta.rank, -1).astype(dtype, copy=False) for delta, _ in several])
        scaled = [delta.B.astype(dtype, copy=False) * (delta.scale * strength) for delta, strength in several]
        b = np.concatenate(scaled, axis=1)  # (rows, ranks); a is (ranks, columns)
        for place in checkpoint.places[module]:
            if place.shape != checkpoint.places[module][0].shape:
                raise UserError(f"{checkpoint.path / place.file}: {place.key} has another shape in another variant")
            parts = plan.setdefault(place.file, {}).setdefault(place.key, [])
            parts.append(Part(module, place.first_row, *((b.T, a.T) if place.transposed else (a, b))))  # (B A)ᵀ = Aᵀ Bᵀ
    return plan, list(folded.values())


@dataclass
class Addition:
    """The parts to add to one tensor; calling it adds them and records norms.

    The loss by rounding is measured on a sample: the first rows of each chunk.
    """

    file: TensorFile
    key: str
    parts: list[Part]
    type: str  # of the tensor as it is written
    keep: Callable | None  # called with the place, the original and the new bytes of each chunk
    squares: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # ‖W‖² by module
    lost: float = 0.0  # ‖W′ − W − ΔW‖² of the sample
    whole: float = 0.0  # ‖ΔW‖² of the sample

    def __call__(self, source: BinaryIO) -> Iterator[np.ndarray]:
        """Yield the new bytes of the tensor, some rows at a time; `source` is at its first byte."""
        entry = self.file.entries[self.key]
        rows, columns = (entry.shape[0], math.prod(entry.shape[1:])) if self.parts else (math.prod(entry.shape), 1)
        stored, sum_type = DTYPES[entry.dtype], self.parts[0].A.dtype if self.parts else np.dtype(np.float32)
        shape = max(1, CHUNK // (stored.itemsize * columns)), columns
        raw = scratch("raw", shape, stored)
        wide = scratch("wide", shape, np.dtype(np.float64) if entry.dtype == "F64" else sum_type)
        for first in range(0, rows, len(raw)):
            piece = raw[: rows - first]
            original = piece.reshape(-1).view(np.uint8)
            read_exactly(source, original, self.file.path)
            weight = widen(piece, wide[: len(piece)])  # (rows, columns)
            samples = self._add(weight, first)
            self._refuse_overflow(weight)
            new = narrow(weight, self.type)
            for at, before, delta in samples:
                self._measure(new[at], before, delta)
            new = new.reshape(-1).view(np.uint8)
            if self.keep:
                self.keep(first * columns * stored.itemsize, original, new)
            yield new

    def _add(self, weight: np.ndarray, first: int) -> list[tuple[slice, np.ndarray, np.ndarray]]:
        """Add the parts to the rows from `first` on, in place; return the samples' places, with W and ΔW there."""
        seen, samples = max(1, SEEN // weight.shape[1]), []
        for part in self.parts:
            begin, end = max(first, part.first_row), min(first + len(weight), part.first_row + len(part.B))
            if begin < end:
                mine = weight[begin - first : end - first]
                self.squares[part.module] += float(np.vdot(mine, mine))
                sample = slice(begin - first, min(end - first, seen))
                before = weight[sample].copy()
                b = part.B[begin - part.first_row : end - part.first_row]
                with np.errstate(over="ignore", invalid="ignore"):  # _refuse_overflow looks for it
                    delta = np.matmul(b, part.A, scratch("product", mine.shape, part.A.dtype))
                    mine += delta
                samples.append((sample, before, delta[: len(before)].copy()))
        return samples

    def _refuse_overflow(self, weight: np.ndarray) -> None:
        extremes = np.array([weight.min(), weight.max()])
        if not np.isfinite(widen(narrow(extremes, self.type))).all():
            modules = f" ({', '.join(split(part.module)[1] for part in self.parts)})" if self.parts else ""
            raise UserError(f"{self.file.path}: {self.key}{modules} would not be finite numbers of type {self.type}")

    def _measure(self, new: np.ndarray, before: np.ndarray, delta: np.ndarray) -> None:
        error = widen(new) - before
        error -= delta
        self.lost += float(np.vdot(error, error))
        self.whole += float(np.vdot(delta, delta))


def _arrived(additions: Iterable[Addition]) -> list[str]:
    """Return a line for each component and type on how much of ΔW survived: 1 − ‖W′ − W − ΔW‖ / ‖ΔW‖, at least 0."""
    alike: dict[tuple[str, str], list[Addition]] = defaultdict(list)
    for addition in additions:
        if addition.parts:
            alike[split(addition.parts[0].module)[0], addition.type].append(addition)
    lines = []
    for (component, kind), several in sorted(alike.items()):
        lost, whole = math.fsum(each.lost for each in several), math.fsum(each.whole for each in several)
        share = max(0.0, 1 - math.sqrt(lost / whole)) if whole else 1.0
        after = f"{share:.1%} of ΔW survived rounding to {kind}"
        wider = "" if kind in ("F32", "F64") else "; see --dtype"
        lines.append(f"{component}: {after}" if share >= ENOUGH else f"warning: {component}: only {after}{wider}")
    return lines
