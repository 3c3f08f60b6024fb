"""Fold LoRAs into a checkpoint: W ← W + Σ sᵢ · ΔWᵢ, file to file, streaming.

A checkpoint has gigabytes of tensors, and a LoRA changes some of them.  No model is loaded: the header of a safetensors
file says where the bytes of each tensor are.  The bytes of unchanged tensors are copied.  Those of a changed tensor are
read, summed in float32, rounded once to their own type and written, a few rows at a time (addition.py).  The result has
the same files, headers and order as the base, unless --dtype asks for another type of all weights.

Rounding removes what is too small relative to a weight.  How much of ΔW survives is measured on a sample.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

# Set before numpy is imported: threads in its matrix products would compete with the threads of rewrite.py.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

from ..settings.errors import UserError
from .addition import Addition, Part, survived
from .deltas import Delta, at_strengths
from .for_base import read_for
from .layout import Checkpoint
from .names import split
from .number_types import DTYPES, WEIGHTS
from .rewrite import rewrite
from .tensors import TensorFile, staging
from .undo import keeping, name_of


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
    read = [(read_for(path, checkpoint.modules, str(base), allow_unmatched), strength) for path, strength in loras]
    deltas = at_strengths(read, blocks)
    plan = _plan(checkpoint, deltas, dtype)
    types = {path: _types(file, written) for path, file in checkpoint.files.items()}
    room = checkpoint.size * (1 if undo is None else 2) + sum(
        math.prod(file.entries[key].shape) * (DTYPES[kind].itemsize - DTYPES[file.entries[key].dtype].itemsize)
        for path, file in checkpoint.files.items()
        for key, kind in types[path].items()
    )
    additions: list[Addition] = []
    staged = staging(output, room, overwrite, checkpoint.content)
    with staged as new, keeping(undo, checkpoint, plan) as kept:
        for path, file in checkpoint.files.items():
            added, parts = {}, plan.get(path, {})
            for key in parts | types[path]:
                keep = partial(kept.keep, name_of(path, key)) if kept else None
                kind = types[path].get(key, file.entries[key].dtype)
                added[key] = Addition(file, key, parts.get(key, []), kind, keep)
            rewrite(file, new / path, added, types[path])
            additions += added.values()
        checkpoint.copy_others(new)
    notes = [f"left out: {path}, because its weights would be the unchanged base's" for path in checkpoint.left_out]
    tensors = sum(len(file.entries) for file in checkpoint.files.values())
    notes += [f"changed {sum(map(len, plan.values()))} of {tensors} tensors", *survived(additions)]
    ema = sum(key.startswith("model_ema.") for file in checkpoint.files.values() for key in file.entries)
    notes += [f"note: the {ema} tensors of the moving average (model_ema.) are unchanged"] if ema else []
    unmatched = {str(path): lora.unmatched for (path, _), (lora, _) in zip(loras, read, strict=True) if lora.unmatched}
    return Report(_effects(loras, deltas, additions), unmatched, notes)


def _types(file: TensorFile, written: str | None) -> dict[str, str]:
    """Return the new type of each tensor of a file whose type changes, by key.

    Tensors without a dot in their name are not weights but tables, for example of noise levels, and keep their type.
    """
    weights = (key for key, entry in file.entries.items() if written and entry.dtype in WEIGHTS and "." in key)
    return {key: written for key in weights if file.entries[key].dtype != written}


def _plan(checkpoint: Checkpoint, deltas: list[dict[str, Delta]], dtype: type) -> dict[Path, dict[str, list[Part]]]:
    """Return the parts to add to tensors, by file and key."""
    plan: dict[Path, dict[str, list[Part]]] = {}
    for module in dict.fromkeys(name for each in deltas for name in each):
        several = [each[module] for each in deltas if module in each]
        a = np.concatenate([delta.A.reshape(delta.rank, -1).astype(dtype, copy=False) for delta in several])
        b = np.concatenate([delta.B.astype(dtype, copy=False) * delta.scale for delta in several], axis=1)
        for place in checkpoint.places[module]:
            if place.shape != checkpoint.places[module][0].shape:
                raise UserError(f"{checkpoint.path / place.file}: {place.key} has another shape in another variant")
            parts = plan.setdefault(place.file, {}).setdefault(place.key, [])
            parts.append(Part(module, place.first_row, *((b.T, a.T) if place.transposed else (a, b))))  # (B A)ᵀ = Aᵀ Bᵀ
    return plan


def _effects(
    loras: list[tuple[Path, float]], deltas: list[dict[str, Delta]], additions: list[Addition]
) -> list[Folded]:
    """Return the effect of each LoRA on each component."""
    norms = {module: math.sqrt(square) for addition in additions for module, square in addition.squares.items()}
    effects: list[Folded] = []
    for (path, strength), each in zip(loras, deltas, strict=True):
        mine: dict[str, Folded] = {}
        for module, delta in each.items():
            component = split(module)[0]
            effect = mine.setdefault(component, Folded(f"{path} at {strength:g}", component))
            effect.sizes[module] = delta.norm() / norms[module] if norms[module] else math.inf
        effects += mine.values()
    return effects
