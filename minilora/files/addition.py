"""Add ΔW to one tensor of a checkpoint, some rows at a time, and measure how much of it survives rounding."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np

from ..settings.errors import UserError
from .names import split
from .number_types import DTYPES, narrow, scratch, widen
from .rewrite import CHUNK, read_exactly
from .tensors import TensorFile

SEEN = 1 << 12  # numbers of each chunk of a tensor on which the loss by rounding is measured
ENOUGH = 0.95  # share of ΔW; if less survives, there is a warning


@dataclass(frozen=True)
class Part:
    """What is added to some rows of a tensor: B A of all LoRAs, with scales and strengths folded into B."""

    module: str
    first_row: int
    A: np.ndarray  # (ranks, columns)
    B: np.ndarray  # (rows, ranks)


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
                error = widen(new[at]) - before - delta
                self.lost += float(np.vdot(error, error))
                self.whole += float(np.vdot(delta, delta))
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


def survived(additions: Iterable[Addition]) -> list[str]:
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
