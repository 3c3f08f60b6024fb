"""LoRA files in and out of a network in memory: a module, or all parts of a diffusers pipeline.

    a file of any dialect  <->  {full name: A, B, scale}  <->  LoRA layers in the network

Full names are explained in names.py, dialects in read.py.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from ..lora import Layer, LoRALinear, adapters_of, inject_lora, lora_layers, original_layers, remove_lora
from ..settings.errors import UserError, refuse, some
from .deltas import Delta, LoRA, Word
from .fold import Folded, Report
from .for_base import read_for
from .names import COMPONENTS, TEXT_ENCODER, TEXT_ENCODER_2, UNET, full_name
from .write import write_lora


def components(target) -> dict[str, nn.Module]:
    """Return the parts of a module or a diffusers pipeline that can have a LoRA, by their names in files."""
    parts = {name: getattr(target, name, None) for name in COMPONENTS}
    if not isinstance(target, nn.Module) or parts[UNET] is not None:
        return {name: part for name, part in parts.items() if part is not None}
    kinds = {"UNet2DConditionModel": UNET, "UNetMotionModel": UNET}
    kinds |= {"CLIPTextModel": TEXT_ENCODER, "CLIPTextModelWithProjection": TEXT_ENCODER_2}
    return {next((kinds[c.__name__] for c in type(target).__mro__ if c.__name__ in kinds), "model"): target}


def live_modules(target) -> dict[str, tuple[int, ...]]:
    """Return the shape of the weight of every layer that can have a LoRA, by its full name."""
    parts = {part: original_layers(module) for part, module in components(target).items()}
    return {
        full_name(part, path): tuple(layer.weight.shape)
        for part, layers in parts.items()
        for path, layer in layers.items()
        if isinstance(layer, Layer)
    }


def carrying_layers(target) -> dict[str, LoRALinear]:
    """Return the layers that carry LoRA, by full name."""
    parts = components(target).items()
    return {full_name(part, path): layer for part, module in parts for path, layer in lora_layers(module).items()}


def save_lora(target, path: str | Path, name: str = "default", dialect: str = "diffusers") -> int:
    """Write the LoRA called `name` of a module or a diffusers pipeline; the same LoRA gives the same bytes.

    `dialect` is "diffusers", "kohya" (for A1111, ComfyUI and kohya's tools) or "peft" (`path` is then a folder).  The
    scale alpha / rank is folded into B, because not every program reads it.  Returns the number of bytes that pad
    several ranks with zeros (docs/merging.md).
    """
    deltas = {}
    for full, layer in carrying_layers(target).items():
        if name in layer.adapters:
            adapter = layer.adapters[name]
            a, b = (matrix.detach().cpu().numpy() for matrix in (adapter.lora_A, adapter.lora_B))
            deltas[full] = Delta(a, b, adapter.scale)
    if not deltas:
        raise ValueError(f"this {type(target).__name__} carries no LoRA named {name!r}; inject_lora or load_lora first")
    return write_lora(Path(path), LoRA(deltas), dialect, live_modules(target))


def load_lora(
    target, path: str | Path, name: str = "default", strength: float = 1.0, allow_unmatched: bool = False
) -> Report:
    """Load a LoRA file into a module or a diffusers pipeline under a name, in place, and report on it.

    `path` is a file or folder of any dialect.  Its learnt words are added to a pipeline's tokenizers permanently.
    Raises UserError, with nothing changed, if it is not a LoRA or has a shape that does not fit; unless
    `allow_unmatched`, also for unmatched keys and for words that cannot be added.
    """
    where, with_words = " and ".join(components(target)), hasattr(target, "load_textual_inversion")
    lora = read_for(Path(path), live_modules(target), where, allow_unmatched, with_words=with_words)
    problems = {key: problem for key, word in lora.words.items() if (problem := _no_word_for(target, word))}
    if problems and not allow_unmatched:
        raise UserError(f"LoRA {path}: {some(problems.values())}; --allow-unmatched leaves it out")
    words = {key: word for key, word in lora.words.items() if key not in problems}
    unmatched = [key for key in lora.unmatched if key not in words]
    report = Report(attach_lora(target, lora, name, strength, path), {str(path): unmatched} if unmatched else {}, [])
    for word in words.values():
        tokenizer, encoder = _readers(target, word)
        vectors = torch.from_numpy(word.vectors)
        target.load_textual_inversion(vectors, token=word.text, tokenizer=tokenizer, text_encoder=encoder)
        report.notes.append(f"{path} brings the word {word.text!r}, {len(vectors)} vectors of {word.component}")
    return report


@torch.no_grad()
def attach_lora(target, lora: LoRA, name: str, strength: float, path: str | Path) -> list[Folded]:
    """Put a LoRA that was read from `path` into a module or a diffusers pipeline; return its effect on each part.

    Modules that `target` does not have are left out.  Raises UserError, with nothing changed, if the name is in use or
    a module cannot have a LoRA.
    """
    modules = components(target)
    done: list[Folded] = []
    for component, module in modules.items():
        paths = {full_name(component, path): path for path in original_layers(module)}
        mine = {paths[full]: delta for full, delta in lora.deltas.items() if full in paths}
        if not mine:
            continue
        try:
            layers = inject_lora(module, {at: delta.rank for at, delta in mine.items()}, name=name, fitting=False)
        except ValueError as error:
            for folded in done:
                remove_lora(modules[folded.component], name)
            raise UserError(f"LoRA {path}: {error}") from error
        effect = Folded(f"{path} at {strength:g}", component)
        for at, delta in mine.items():
            adapter = layers[at].adapters[name]
            adapter.lora_A.copy_(torch.from_numpy(delta.A))
            adapter.lora_B.copy_(torch.from_numpy(delta.B).float() * delta.scale)
            adapter.strength = strength
            weight = layers[at].base.weight.float().norm().item()
            effect.sizes[at] = abs(strength) * delta.norm() / max(weight, 1e-30)
        done.append(effect)
    return done


def _readers(pipeline, word: Word) -> tuple:
    """Return a pipeline's tokenizer and text encoder for a word; None for each that is missing."""
    tokenizer = word.component.replace("text_encoder", "tokenizer")
    return getattr(pipeline, tokenizer, None), getattr(pipeline, word.component, None)


def _no_word_for(target, word: Word) -> str | None:
    """Return why a word cannot be added to a pipeline, or None if it can."""
    tokenizer, encoder = _readers(target, word)
    if tokenizer is None or encoder is None:
        return f"its word {word.text!r} is for a {word.component}, which this base lacks"
    width = encoder.get_input_embeddings().weight.shape[1]
    if word.vectors.shape[1] != width:
        return f"its word {word.text!r} has vectors of {word.vectors.shape[1]} numbers, and {word.component} of {width}"
    if word.text in tokenizer.get_vocab():
        return f"its word {word.text!r} is already in the vocabulary of {word.component}"
    return None


# --------------------------------------------------------------------------------------------- tensors


def lora_state_dict(module: nn.Module, name: str = "default") -> dict[str, torch.Tensor]:
    """Return the tensors of one LoRA: `<layer>.lora_A.weight`, (rank, in), and `<layer>.lora_B.weight`."""
    return {
        f"{path}.{matrix}.weight": getattr(layer.adapters[name], matrix).detach()
        for path, layer, _ in adapters_of(module, name)
        for matrix in ("lora_A", "lora_B")
    }


@torch.no_grad()
def load_lora_state_dict(module: nn.Module, state: Mapping[str, torch.Tensor], name: str = "default") -> None:
    """Copy tensors, named as in `lora_state_dict`, into the LoRA called `name`, in place.

    Raises ValueError, with nothing changed, that names every missing key, unknown key and wrong shape.
    """
    own = lora_state_dict(module, name)
    problems = [f"{key} is missing" for key in own if key not in state]
    problems += [f"{key} has no layer here" for key in state if key not in own]
    problems += [
        f"{key} is {tuple(state[key].shape)} and should be {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    refuse("load LoRA", problems)
    for key, tensor in own.items():
        tensor.copy_(state[key])
