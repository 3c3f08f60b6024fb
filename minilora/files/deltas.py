"""A LoRA in memory, the same for all file dialects: a ΔW = scale · B A for each module, by its full name (names.py)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..settings.errors import UserError
from .names import block_factors


class FormatError(UserError):
    """A file that is not what it should be; the message names the file and the keys."""


@dataclass(frozen=True)
class Delta:
    """The ΔW of one module, scale · B A.

    `A` is (rank, in), or (rank, in, height, width) for a convolution; `B` is (out, rank).  Both are float32 or float64;
    `stored` holds their types in the file.
    """

    A: np.ndarray
    B: np.ndarray
    scale: float = 1.0
    stored: tuple[str, ...] = ("F32", "F32")

    @property
    def rank(self) -> int:
        return len(self.A)

    def matrix(self, dtype: type = np.float32) -> np.ndarray:
        """Return ΔW in the shape of the weight, (out, in) or (out, in, height, width)."""
        a: np.ndarray = self.A.reshape(self.rank, -1).astype(dtype)  # (rank, in · height · width)
        product: np.ndarray = self.B.astype(dtype) @ a  # (out, in · height · width)
        return (self.scale * product).reshape(len(self.B), *self.A.shape[1:])

    def norm(self) -> float:
        """Return ‖ΔW‖, the Frobenius norm, without forming ΔW: with Aᵀ = Q R, ‖B A‖ = ‖B Rᵀ‖."""
        r: Any = np.linalg.qr(self.A.reshape(self.rank, -1).T.astype(np.float64), mode="r")  # (rank, rank)
        return abs(self.scale) * float(np.linalg.norm(self.B.astype(np.float64) @ r.T))


@dataclass(frozen=True)
class Word:
    """A word that was learnt with a LoRA (textual inversion): its embedding vectors for a text encoder."""

    text: str
    component: str
    vectors: np.ndarray  # (one or more, width)


@dataclass
class LoRA:
    """A LoRA: its ΔW by the modules' full names, and its file's metadata.

    `unmatched` are the file's keys without a module in the base; those of `words` are among them.
    """

    deltas: dict[str, Delta]
    metadata: dict[str, str] = field(default_factory=dict)
    unmatched: list[str] = field(default_factory=list)
    words: dict[str, Word] = field(default_factory=dict)


def at_strengths(loras: Sequence[tuple[LoRA, float]], blocks: Mapping[str, float]) -> list[dict[str, Delta]]:
    """Return the ΔW of each LoRA by module, with its strength in the scale.

    `blocks` are factors on the strengths, as `block_factors` takes them.
    """
    factors = block_factors([name for lora, _ in loras for name in lora.deltas], blocks)
    return [
        {name: replace(delta, scale=delta.scale * (strength * factors[name])) for name, delta in lora.deltas.items()}
        for lora, strength in loras
    ]
