"""Predict the memory that a run will need, before anything is loaded.

Fake tensors have a shape and a type but no numbers.  A U-Net of fake tensors, with its LoRA, goes through one step in
seconds and without memory, while `Live` counts what a real one would hold at each moment.  VAE and text encoders are
counted in the same way.  They leave memory one after the other before the first step, so the largest counts:

    encoding    text encoders in float32; then the VAE in float32 + its activations for one picture
    training    U-Net + LoRA with gradients and Adam's averages + activations for the backward pass
"""

import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..files.names import TEXT_ENCODER, TEXT_ENCODER_2, UNET
from ..files.tensors import free_memory
from ..lora import inject_lora
from ..models.base import Base
from ..models.folder import VAE
from ..models.targets import ranks_and_alphas
from ..settings.errors import UserError
from ..settings.setting import as_typed, is_installed, option
from ..settings.train import TrainConfig
from .trained import trained_parameters

SLACK = 1.2  # for kernels' buffers and gaps between tensors, which are not counted


class Live(TorchDispatchMode):
    """Within the block, count the bytes of all living tensors, except those in `known`; record the peak."""

    def __init__(self, known: Iterator[torch.Tensor]):
        super().__init__()
        self.now, self.peak = 0, 0
        self.alive = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.alive:  # a view shares the memory of another tensor
                    self.alive[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._free, storage._cdata)
        self.peak = max(self.peak, self.now)
        return result

    def _free(self, storage: int) -> None:
        self.now -= self.alive.pop(storage, 0)


@dataclass(frozen=True)
class Memory:
    """The memory that a run needs on its device, in bytes."""

    process: int  # what the process already holds
    encoding: int
    weights: int
    lora: int
    step: int

    @property
    def total(self) -> int:
        return self.process + max(self.encoding, self.weights + self.lora + self.step)

    def __str__(self) -> str:
        parts = (
            f"base {_gb(self.weights)}, LoRA {_gb(self.lora)}, a step {_gb(self.step)}, encoding {_gb(self.encoding)}"
        )
        return f"about {_gb(self.total)} GB ({parts})"


def tell_memory(config: TrainConfig, base: Base, say) -> None:
    """Print how much memory the run will need, and warn, with what makes it fit, if the device has less."""
    need, free = memory_of(config, base), _free_on(base.device)
    say(f"memory     {need}" + (f"; {_gb(free)} GB are free on {base.device.type}" if free else ""))
    if free and need.total - need.process > free:
        advice = "; ".join(ways_to_fit(config, base, free)) or "a smaller base"
        print(f"warning: this run may need more memory than is free; to need less: {advice}", file=sys.stderr)


def memory_of(config: TrainConfig, base: Base) -> Memory:
    """Return the memory that a run of one process needs."""
    side, autocast = config.resolution or base.resolution, base.dtype
    dtype = torch.float32 if config.full else autocast  # of the weights
    empty = {part: base.empty(part) for part in (UNET, VAE, *base.text_parts)}
    encoding_captions = sum(4 * tensor.numel() for part in base.text_parts for tensor in empty[part].parameters())
    with FakeTensorMode():
        vae = _faked(empty[VAE], torch.float32)
        with Live(vae.parameters()) as live, torch.no_grad():
            vae.encode(torch.empty(1, 3, side, side))
        encoding_pictures = _bytes(vae.parameters()) + round(SLACK * live.peak)
        unet = _faked(empty[UNET], dtype).train()
        encoders = [_faked(empty[part], dtype) for part in base.text_parts] if config.train_text_encoder else []
        weights, numbers, step = _step(config, base, unet, encoders, side, autocast)
    # A and B, their gradients and what the optimizer keeps: two averages, which take one byte per number
    # with adamw8bit; Prodigy also keeps the first weights and a sum of gradients.
    each = 4 + 4 + {"adamw": 8, "adamw8bit": 2, "prodigy": 16}[config.optimizer] + (4 if config.ema else 0)
    kept = encoding_pictures if config.needs_vae else 0  # the VAE stays in memory
    # Trained text encoders do not leave memory before the VAE encodes, see `fill_cache`.
    encoding = (sum if config.train_text_encoder else max)((encoding_captions, encoding_pictures))
    return Memory(_held(base.device), encoding, weights, numbers * each, round(SLACK * step) + kept)


def _step(config: TrainConfig, base: Base, unet, encoders: list, side: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Simulate a step; return the bytes of the weights, the count of numbers in A and B, and the peak of the rest."""
    try:
        if not config.full:
            ranks, alphas = ranks_and_alphas(unet, config.targets, config.rank, config.alpha, **config.by_part())
            inject_lora(unet, ranks, alphas)
        for encoder in encoders:
            inject_lora(encoder, config.rank, config.alpha, config.text_encoder_targets)
    except ValueError as error:
        raise UserError(str(error)) from error
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    trained = [parameter for part in (unet, *encoders) for parameter in trained_parameters(part, config.full)]
    everything = [parameter for part in (unet, *encoders) for parameter in part.parameters()]

    batch, latents = config.micro_batch_size or config.batch_size, side // base.pixels_per_latent
    batch *= 2 if config.preserve else 1  # each picture goes through with two captions
    x = torch.empty(batch, unet.config.in_channels, latents, latents)
    length = base.parts.config(TEXT_ENCODER).get("max_position_embeddings", 77)
    timesteps, tokens = torch.zeros(batch, dtype=torch.long), torch.zeros(batch, length, dtype=torch.long)
    text = torch.empty(batch, length, unet.config.cross_attention_dim)
    more = {}
    if base.is_xl:
        pooled = torch.empty(batch, base.parts.config(TEXT_ENCODER_2)["projection_dim"])
        more = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": torch.empty(batch, 6)}}
    with Live(iter(everything)) as live, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        for encoder in encoders:  # so that gradients flow back into each
            text = text + encoder(tokens).last_hidden_state.mean()
        unet(x, timesteps, text, **more).sample.float().square().mean().backward()
    numbers = sum(parameter.numel() for parameter in trained)
    return _bytes(everything) - 4 * numbers, numbers, live.peak - 4 * numbers  # (the gradients of A and B are alive)


# --------------------------------------------------------------------------------------- what would fit


def ways_to_fit(config: TrainConfig, base: Base, free: int) -> list[str]:
    """Return settings that need less memory, largest effect first, until the run fits, each with the new total."""
    told, need = [], memory_of(config, base)
    for name, value in _smaller(config, base):
        if need.total - need.process <= free:
            break
        config = replace(config, **{name: value})
        base = Base.of(config, base.device, config.precision)
        need = memory_of(config, base)
        told.append(f"{option(name)}{'' if value is True else f' {as_typed(value)}'} (then about {_gb(need.total)} GB)")
    return told


def _smaller(config: TrainConfig, base: Base) -> Iterator[tuple[str, Any]]:
    """Yield settings that need less memory, by name and value; usually the first has the largest effect."""
    if base.precision == "fp32":
        yield "precision", "bf16"
    if not config.gradient_checkpointing:
        yield "gradient_checkpointing", True
    if (config.micro_batch_size or config.batch_size) > 1:
        yield "micro_batch_size", 1
    side = config.resolution or base.resolution
    if (smaller := side * 3 // 4 // 64 * 64) >= 256:
        yield "resolution", smaller
    if config.optimizer == "adamw" and is_installed("bitsandbytes"):
        yield "optimizer", "adamw8bit"


# ---------------------------------------------------------------------------------------- fake networks


def _faked(module: Any, dtype: torch.dtype) -> Any:
    """Give a part without numbers frozen fake tensors of a type."""
    for child in module.modules():
        for name, tensor in child.named_parameters(recurse=False):
            child._parameters[name] = nn.Parameter(torch.empty(tensor.shape, dtype=dtype), requires_grad=False)
        for name, tensor in child.named_buffers(recurse=False):
            child._buffers[name] = torch.zeros(tensor.shape, dtype=tensor.dtype)
    return module.eval()


def _bytes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _gb(number: int) -> str:
    return f"{number / 1e9:.1f}"


def _held(device: torch.device) -> int:
    """Return the memory that this process holds on a device; on a CPU, its resident memory, if the system tells."""
    if device.type != "cpu":
        return 0
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    except OSError:
        return 0


def _free_on(device: torch.device) -> int | None:
    """Return the free memory of a device, in bytes; None if unknown."""
    return (
        torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory() if device.type == "cpu" else None
    )
