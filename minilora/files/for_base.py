"""Read a LoRA for a base: refuse one that was not made for it, and name the network that it was made for."""

import re
from pathlib import Path

from ..settings.errors import UserError, some
from .deltas import FormatError, LoRA
from .names import Modules
from .read import read_lora

_BEFORE = r"(base_model\.model\.|transformer\.|(model\.)?diffusion_model\.|unet\.|lora_(unet|transformer)_|lycoris_)*"
_OTHERS = {  # prefixes of names in networks other than Stable Diffusion 1, 2 and XL; the most specific ones come first
    _BEFORE + r"(single_transformer_blocks|double_blocks|single_blocks)[._]\d": "Flux",
    _BEFORE + r"joint_blocks[._]\d": "Stable Diffusion 3",
    _BEFORE + r"(transformer_blocks|blocks|layers)[._]\d": "a diffusion transformer such as Stable Diffusion 3",
    r"transformer\.|lora_transformer_": "a diffusion transformer such as Stable Diffusion 3",
    r"lora_te3_|text_encoder_3\.|text_encoders\.(t5|llama|qwen|gemma)": "a text encoder of Stable Diffusion 3 or Flux",
}


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
    if other := _other_network([*unmatched, *(lora.deltas if modules is None else ())]):
        start = f"LoRA {path} " if modules is None else f"LoRA {path} was not made for this base: it "
        raise UserError(f"{start}is one of {other}; only those of Stable Diffusion 1, 2 and XL are read")
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


def _other_network(keys: list[str]) -> str:
    """Return the network that keys belong to if it is not Stable Diffusion 1, 2 or XL, with one such key; else ""."""
    pairs = ((look, network, key) for look, network in _OTHERS.items() for key in keys)
    return next((f"{network} ({key})" for look, network, key in pairs if re.match(look, key)), "")
