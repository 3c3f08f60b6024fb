"""LoRAs as low-rank matrices: merge several into one, reduce the rank, extract one from two checkpoints.

A sum of several ΔW is again a product of two thin matrices, with the factors side by side,

    s·B₁A₁ + t·B₂A₂ = [s·B₁  t·B₂] · [A₁; A₂]

so merging is exact and the ranks add up.  The best approximation of a smaller rank keeps the largest singular values
(Eckart and Young, 1936).  The large matrix is never formed: with B = Q R and Aᵀ = P S, B A = Q (R Sᵀ) Pᵀ, and only the
small core R Sᵀ is decomposed.  All computations are in float64.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ..settings.errors import UserError
from .deltas import Delta, LoRA, at_strengths
from .layout import Checkpoint
from .names import last_layer
from .number_types import WEIGHTS, narrow, rounding_error, widen


@dataclass
class Reduction:
    """The error of a reduction: ‖ΔW − ΔW′‖ and ‖ΔW‖ by module."""

    lost: dict[str, float] = field(default_factory=dict)
    size: dict[str, float] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    at: dict[int, float] = field(default_factory=dict)  # Σ‖ΔW − ΔW′‖² over all modules, at each of some ranks

    def __str__(self) -> str:
        lines = [
            f"{name}: rank {rank}, error {self.lost[name] / self.size[name] if self.size[name] else 0:.3%}"
            for name, rank in self.ranks.items()
        ]
        total = math.sqrt(sum(size**2 for size in self.size.values()))
        error = math.sqrt(sum(lost**2 for lost in self.lost.values())) / total if total else 0.0
        errors = {rank: f"{math.sqrt(square) / total if total else 0:.3%}" for rank, square in self.at.items()}
        table = [" ".join(["rank ", *(f"{rank:>{len(text)}}" for rank, text in errors.items())])]
        table += [" ".join(["error", *errors.values()])]
        return "\n".join([*lines, *table, f"overall: error {error:.3%}"])


def combine(loras: Sequence[tuple[LoRA, float]], blocks: Mapping[str, float] = {}) -> LoRA:
    """Return Σ sᵢ · ΔWᵢ as one LoRA, exactly; its rank in each module is the sum of the ranks.

    `blocks` are factors on the strengths, as `block_factors` takes them.  Raises UserError if two LoRAs have ΔW of
    different shapes for a module.
    """
    deltas = at_strengths(loras, blocks)
    result = {}
    for name in dict.fromkeys(name for each in deltas for name in each):
        several = [each[name] for each in deltas if name in each]
        # (A linear layer and a convolution of 1 × 1 are the same.)
        shapes = {(len(delta.B), delta.A[0].size) for delta in several}
        if len(shapes) > 1:
            raise UserError(f"{name} is {' and '.join(map(str, sorted(shapes)))}: these LoRAs are for different bases")
        kernel = max((delta.A.shape[1:] for delta in several), key=len)
        A = np.concatenate([narrow(delta.A.reshape(delta.rank, *kernel), "F32") for delta in several])  # (ranks, in)
        B = np.concatenate([narrow(delta.B * np.float64(delta.scale), "F32") for delta in several], axis=1)
        stored = tuple(_widest([delta.stored[i] for delta in several]) for i in (0, 1))
        if not np.isfinite(B).all():
            strengths = ", ".join(f"{strength:g}" for lora, strength in loras if name in lora.deltas)
            raise UserError(f"{name}: at strength {strengths} it is not finite")
        result[name] = Delta(A, B, stored=stored)
    return LoRA(result)


def _widest(types: Sequence[str]) -> str:
    """Return a type up to F32 for numbers of several types: their own if they agree, else F32."""
    return types[0] if len(set(types)) == 1 and types[0] != "F64" else "F32"


def of_type(lora: LoRA, name: str) -> LoRA:
    """Return the LoRA, to be written in the type of that name."""
    return replace(lora, deltas={n: replace(delta, stored=(name, name)) for n, delta in lora.deltas.items()})


def reduce(lora: LoRA, rank: int | None, energy: float | None) -> tuple[LoRA, Reduction]:
    """Return the best LoRA of a smaller rank, or of the smallest rank that keeps a share of each ΔW's energy."""
    result, report = {}, Reduction()
    for name, delta in lora.deltas.items():
        q, r = np.linalg.qr(delta.B.astype(np.float64))  # (out, k), (k, rank)
        p, s = np.linalg.qr(delta.A.astype(np.float64).reshape(delta.rank, -1).T)  # (in, l), (l, rank)
        u, values, vt = np.linalg.svd(delta.scale * (r @ s.T), full_matrices=False)
        smaller = _split(q @ u, values, (p @ vt.T).T, delta.A.shape[1:], rank, energy)
        result[name] = replace(smaller, stored=delta.stored)
        _note(report, name, values, result[name].rank)
    return LoRA(result, lora.metadata), report


def extract(
    one: Checkpoint, two: Checkpoint, rank: int | None, energy: float | None
) -> tuple[LoRA, Reduction, list[str]]:
    """Return the best LoRA from one checkpoint to another, its error, and notes on what no LoRA can hold.

    Raises UserError if the checkpoints' modules differ.
    """
    shapes, others = one.modules, two.modules
    different = [n for n in shapes | others if shapes.get(n) != others.get(n)]
    last = last_layer(shapes | others)
    if any(not n.startswith(last) or (n in shapes and n in others) for n in different):
        raise UserError(f"{one.path} and {two.path} differ in {len(different)} modules, for example {different[0]}")
    deltas: dict[str, Delta] = {}
    report, equal = Reduction(), 0
    rounded: dict[str, list[str]] = {}  # by types
    for name, shape in shapes.items():
        if name in different:
            continue
        weight, tuned, kinds = one.weight(name), two.weight(name), (one.type_of(name), two.type_of(name))
        difference = (tuned - weight.astype(np.float64)).reshape(shape[0], -1)  # (out, in)
        if not np.isfinite(difference).all():
            raise UserError(f"{name} holds numbers that are not finite in {one.path} or {two.path}")
        if not difference.any():
            equal += 1
            continue
        if _is_rounding(weight, tuned, *kinds):
            rounded.setdefault(" and ".join(kinds), []).append(name)
            continue
        # The singular vectors of the shorter side come from the matrix times its transpose: in float64 this is exact
        # enough for float32 weights.
        wide = difference.shape[0] <= difference.shape[1]
        matrix = difference if wide else difference.T
        squares, vectors = np.linalg.eigh(matrix @ matrix.T)  # rising
        values, u = np.sqrt(np.maximum(squares[::-1], 0)), vectors[:, ::-1]
        v = (u.T @ matrix) / np.maximum(values, values[0] * 1e-12)[:, None]  # (k, long side)
        left, right = (u, v) if wide else (v.T, u.T)
        deltas[name] = _split(left, values, right, shape[1:], rank, energy)
        _note(report, name, values, deltas[name].rank)
    notes = [f"{equal} modules are the same in both"] if equal else []
    for types, names in rounded.items():
        notes.append(f"left out {len(names)} modules that differ only by rounding to {types}, for example {names[0]}")
    if different:
        notes.append(f"{last.removesuffix('.')} is in only one of the two: Stable Diffusion 2 does not use it")
    if one.files.keys() != two.files.keys():
        notes.append("other tensors (norms, biases, embeddings) were not compared: the files have different names")
    elif count := sum(1 for _ in _others_that_differ(one, two)):
        notes.append(f"{count} other tensors differ (norms, biases, embeddings); no LoRA can hold them")
    if not deltas:
        but = " up to rounding" if rounded else ""
        raise UserError(f"{one.path} and {two.path} have the same weights{but}; there is no LoRA between them")
    return LoRA(deltas), report, notes


def _split(left, values, right, kernel, rank: int | None, energy: float | None) -> Delta:
    """Return the largest singular values and their vectors as A and B, of equal norm, in float32."""
    kept = rank
    if energy is not None:
        squares = np.cumsum(values**2)
        kept = int((squares < (energy - 1e-12) * squares[-1]).sum()) + 1
    kept = min(len(values), kept or len(values))
    root = np.sqrt(values[:kept])
    a = narrow(root[:, None] * right[:kept], "F32")  # (kept, in)
    b = narrow(left[:, :kept] * root, "F32")  # (out, kept)
    return Delta(a.reshape(kept, *kernel), b)


def _note(report: Reduction, name: str, values: np.ndarray, kept: int) -> None:
    report.size[name] = float(np.linalg.norm(values))
    report.lost[name] = float(np.linalg.norm(values[kept:]))
    report.ranks[name] = kept
    for rank in (2**power for power in range(9)):
        if rank <= max(len(values), *report.at, 1):
            report.at[rank] = report.at.get(rank, 0.0) + float(np.square(values[rank:]).sum())


def _others_that_differ(one: Checkpoint, two: Checkpoint) -> Iterator[str]:
    """Yield the keys of differing tensors that are not the weight of a module."""
    known = {(place.file, place.key) for places in one.places.values() for place in places}
    files = {place.file for places in one.places.values() for place in places}
    for path in files:
        file, other = one.files[path], two.files[path]
        for key in file.entries.keys() & other.entries.keys():
            if (path, key) in known or key.startswith(("model_ema.", "first_stage_model.")):
                continue
            kinds = file.entries[key].dtype, other.entries[key].dtype
            if kinds[0] != kinds[1] and all(kind in WEIGHTS for kind in kinds):
                same = _is_rounding(widen(file.read(key)), widen(other.read(key)), *kinds)
            else:
                same = file.read(key).tobytes() == other.read(key).tobytes()
            if not same:
                yield key


def _is_rounding(one: np.ndarray, two: np.ndarray, kind: str, other: str) -> bool:
    """Whether two arrays may be the same numbers rounded to two types (with one type they would be equal)."""
    if kind == other or one.shape != two.shape:
        return False
    larger = np.maximum(np.abs(one), np.abs(two))
    most = rounding_error(larger, kind) + rounding_error(larger, other)
    return bool((np.abs(two - one.astype(np.float64)) <= most).all())
