"""The settings of the base and of the LoRA."""

import re
from dataclasses import dataclass
from typing import Any

from . import shared
from .base import BaseSettings
from .setting import ABOVE_0, AT_LEAST_1, ByBase, option
from .shared import TEXT_ATTENTION, TEXT_ENCODERS, of_model, of_source


@dataclass(frozen=True)
class LoraSettings(BaseSettings):
    """The base that the LoRA is trained on, and the layers that it adapts."""

    model: str | None = shared.model()
    base_lora: tuple[str, ...] = of_source(
        (),
        "LoRA to merge into the base before training; with a strength: out/fluent:0.8; may be repeated",
        "LORA[:STRENGTH]",
        repeat=True,
    )
    init_from: str | None = of_source(
        None, "LoRA to train further, with its own layers and ranks, instead of a new one", "LORA"
    )
    full: bool = of_model(
        False, "train all weights of the U-Net, not a LoRA; it needs much more memory, and writes a base"
    )
    rank: int = of_model(
        8,
        "rank of the LoRA; a higher one can learn more, and makes a larger file",
        "RANK",
        AT_LEAST_1,
        basic=True,
        by_recipe=True,
    )
    alpha: float | None = of_model(None, "ΔW is multiplied by alpha / rank; if not given, the rank", "ALPHA", ABOVE_0)
    targets: tuple[str, ...] = of_model(
        ByBase(("attention",), ("linear", "conv")),
        "layers of the U-Net to adapt: attention, ff, linear, conv, joined by +, or name endings: to_q,to_v; in one "
        "block: up_blocks.1:attention; on XL also subject or style, the block that holds it",
        "LAYERS",
        by_recipe=True,
    )
    rank_for: tuple[str, ...] = of_model(
        (),
        "rank of the layers with PART in their name, at the same scale: attn2=16,ff=4; the last match wins",
        "PART=RANK,…",
    )
    alpha_for: tuple[str, ...] = of_model(
        (), "alpha of the layers with PART in their name: attn2=8,ff=4", "PART=ALPHA,…"
    )
    train_text_encoder: bool = of_model(False, "also train a LoRA in the text encoders", by_recipe=True)
    text_encoder_targets: tuple[str, ...] = of_model(
        TEXT_ATTENTION,
        "layers of the text encoders to adapt, by name endings; fc1 and fc2 are the others",
        "LAYERS",
        needs=TEXT_ENCODERS,
    )

    def by_part(self) -> dict[str, Any]:
        """Return --rank-for and --alpha-for as mappings, as `inject_lora` takes them."""
        return {"rank_for": shared.by_name(self.rank_for, int), "alpha_for": shared.by_name(self.alpha_for)}

    def problems(self, given: set[str]) -> list[str]:
        wrong = super().problems(given)
        wrong += [f"{option(name)} is empty" for name in ("targets", "text_encoder_targets") if not getattr(self, name)]
        for name, number, example in (
            ("rank_for", r"[1-9]\d*", "a rank, such as attn2=16"),
            ("alpha_for", r"(?=.*[1-9])\d*\.?\d+", "an alpha above 0, such as attn2=8"),
        ):
            wrong += [
                f"{option(name)} {text}: it takes a part of a name and {example}"
                for text in getattr(self, name)
                if not re.fullmatch(rf"[\w.]+={number}", text)
            ]
        of_new_lora = ("rank", "alpha", "targets", "rank_for", "alpha_for")
        if self.init_from:
            why = "has no effect with --init-from, which takes layers and ranks from the file"
            wrong += [f"{option(name)} {why}" for name in of_new_lora if name in given]
        if self.full:
            why = "has no effect with --full, which trains no LoRA"
            names = (*of_new_lora, "init_from", "dropout", "train_text_encoder", "also", "preserve")
            wrong += [f"{option(name)} {why}" for name in names if name in given]
        return wrong
