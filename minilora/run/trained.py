"""The trained weights of a run: the LoRA in its network or, with --full, all weights of the U-Net; and their files.

Everything around the loop (checkpoints, averages, validation, results) uses this file and need not know which it is.
"""

import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..files.names import UNET
from ..files.network import load_lora_state_dict, lora_state_dict, save_lora
from ..files.read import AVERAGE_NAME, FILE_NAME
from ..files.tensors import write_tensors
from ..lora import inject_lora, lora_layers, lora_parameters
from ..models.base import Base
from ..models.targets import ranks_and_alphas
from ..models.text import UNetWithText
from ..settings.errors import UserError
from ..settings.train import TrainConfig

BEST = "pytorch_lora_weights_best.safetensors"
LORA_RESULTS = FILE_NAME, AVERAGE_NAME, BEST
FULL_RESULTS = "model", "model_ema", "unet_best.safetensors"  # two bases, as diffusers folders, and weights of a U-Net


def result_names(full: bool) -> tuple[str, str, str]:
    """Return the names in the output folder of the result, its average (--ema) and the best (--validation)."""
    return FULL_RESULTS if full else LORA_RESULTS


def put_new_lora(network: UNetWithText | Any, unet: nn.Module, config: TrainConfig) -> None:
    """Inject the LoRA of the settings, its A drawn with their seed; UserError if a target matches nothing."""
    generator = torch.Generator().manual_seed(config.seed)
    try:
        ranks, alphas = ranks_and_alphas(unet, config.targets, config.rank, config.alpha, **config.by_part())
        inject_lora(unet, ranks, alphas, generator=generator)
        if config.train_text_encoder:
            network.inject(config.rank, config.alpha, config.text_encoder_targets, generator=generator)
    except ValueError as error:
        raise UserError(str(error)) from error


def trained_parameters(network: nn.Module, full: bool) -> list[nn.Parameter]:
    """Return all trained parameters, as a list for the optimizer."""
    return list(network.requires_grad_(True).parameters()) if full else lora_parameters(network)


def trained_state(network: nn.Module) -> dict[str, torch.Tensor]:
    """Return the trained tensors by name, not copies."""
    return lora_state_dict(network) if lora_layers(network) else network.state_dict()


def copied_state(network: nn.Module, device: torch.device | str) -> dict[str, torch.Tensor]:
    """Return copies of the trained tensors on a device, by name."""
    return {name: tensor.to(device, copy=True) for name, tensor in trained_state(network).items()}


@torch.no_grad()
def load_trained_state(network: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Copy tensors, named as by `trained_state`, into the network, in place."""
    if lora_layers(network):
        load_lora_state_dict(network, state)
    else:
        network.load_state_dict(state)


def save_trained(network: nn.Module, path: Path) -> int:
    """Write a LoRA file, or the weights of the U-Net; return the number of padding bytes (see `save_lora`)."""
    if lora_layers(network):
        return save_lora(network, path)
    write_tensors(path, {key: tensor.detach().cpu() for key, tensor in network.state_dict().items()}, {})
    return 0


def save_base(base: Base, folder: Path) -> None:
    """Write a base whose U-Net was trained, as a diffusers folder; unchanged files are linked or copied."""
    source = Path(base.source)
    if source.is_dir() and not base.loras and base.vae_parts is base.parts:
        for part in ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
            if (source / part).is_dir():
                shutil.copytree(source / part, folder / part, copy_function=_link, dirs_exist_ok=True)
        _link(source / "model_index.json", folder / "model_index.json")
        base.unet.save_pretrained(folder / UNET)
        base.scheduler.save_pretrained(folder / "scheduler")
    else:
        base.pipeline.save_pretrained(folder)


def _link(source: str | Path, target: str | Path) -> None:
    """Give a file a second name, or copy it if that is impossible, for example to another disk."""
    with suppress(OSError):
        os.link(os.path.realpath(source), target)  # the hub's cache has symbolic links
        return
    shutil.copy2(source, target)
