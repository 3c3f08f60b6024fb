"""Predict the memory that a run will need, before anything is loaded.

Fake tensors have a shape and a type but no numbers.  A U-Net of fake tensors, with its LoRA, goes through one step in
seconds and without memory, while `Live` counts what a real one would hold at each moment.  VAE and text encoders are
counted in the same way.  They leave memory one after the other before the first step, so the largest counts:

    encoding    text encoders in float32; then the VAE in float32 + its activations for one picture
    training    U-Net + LoRA with gradients and Adam's averages + activations for the backward pass
"""

import sys
import weakref
from collections.abc import Iterable
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
from ..models.base import Base
from ..models.folder import VAE
from ..models.text import UNetWithText
from ..settings.setting import as_typed, is_installed, option
from ..settings.train import TrainConfig
from .trained import put_new_lora, trained_parameters

SLACK = 0.2  # for kernels' buffers and gaps between tensors, which are not counted: a share of what is counted


class Live(TorchDispatchMode):
    """Within the block, count the bytes of all living tensors, except those in `known`; record the peak."""

    def __init__(self, known: Iterable[torch.Tensor]):
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
        parts = {"base": self.weights, "LoRA": self.lora, "a step": self.step, "encoding": self.encoding}
        return f"about {_gb(self.total)} GB ({', '.join(f'{name} {_gb(size)}' for name, size in parts.items())})"


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
    empty = {part: base.empty(part) for part in (VAE, *base.text_parts)}
    encoding_captions = sum(4 * tensor.numel() for part in base.text_parts for tensor in empty[part].parameters())
    with FakeTensorMode():
        vae = _faked(empty[VAE], torch.float32)
        with Live(vae.parameters()) as live, torch.no_grad():
            vae.encode(torch.empty(1, 3, side, side))
        encoding_pictures = _bytes(vae.parameters()) + round((1 + SLACK) * live.peak)
        weights, numbers, step = _step(config, base, side, dtype, autocast)
        # Checkpointing computes all that an ordinary step does, in pieces; the buffers and gaps are as large as there.
        plain = replace(config, gradient_checkpointing=False)
        most = _step(plain, base, side, dtype, autocast)[2] if config.gradient_checkpointing else step
    # A and B, their gradients and what the optimizer keeps: two averages, which take one byte per number
    # with adamw8bit; Prodigy also keeps the first weights and a sum of gradients.
    each = 4 + 4 + {"adamw": 8, "adamw8bit": 2, "prodigy": 16}[config.optimizer] + (4 if config.ema else 0)
    kept = encoding_pictures if config.needs_vae else 0  # the VAE stays in memory
    # Trained text encoders do not leave memory before the VAE encodes, see `fill_cache`.
    encoding = (sum if config.train_text_encoder else max)((encoding_captions, encoding_pictures))
    return Memory(_held(base.device), encoding, weights, numbers * each, round(step + SLACK * most) + kept)


def _step(
    config: TrainConfig, base: Base, side: int, dtype: torch.dtype, autocast: torch.dtype
) -> tuple[int, int, int]:
    """Simulate a step; return the bytes of the weights, the count of numbers in A and B, and the peak of the rest."""
    unet = _faked(base.empty(UNET), dtype).train()
    encoders = [_faked(base.empty(part), dtype) for part in base.text_parts] if config.train_text_encoder else []
    network = UNetWithText(unet, encoders) if encoders else unet
    if not config.full:
        put_new_lora(network, unet, config)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    trained, everything = trained_parameters(network, config.full), list(network.parameters())

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
    with Live(everything) as live, torch.autocast("cpu", autocast, enabled=autocast != torch.float32):
        for encoder in encoders:  # so that gradients flow back into each
            text = text + encoder(tokens).last_hidden_state.mean()
        unet(x, timesteps, text, **more).sample.float().square().mean().backward()
    numbers = sum(parameter.numel() for parameter in trained)
    return _bytes(everything) - 4 * numbers, numbers, live.peak - 4 * numbers  # (the gradients of A and B are alive)


# --------------------------------------------------------------------------------------- what would fit


def ways_to_fit(config: TrainConfig, base: Base, free: int) -> list[str]:
    """Return settings that need less memory, largest effect first, until the run fits, each with the new total."""
    told, need, smaller = [], memory_of(config, base), (config.resolution or base.resolution) * 3 // 4 // 64 * 64
    ways: list[tuple[str, Any, bool]] = [
        ("precision", "bf16", base.precision == "fp32"),
        ("gradient_checkpointing", True, not config.gradient_checkpointing),
        ("micro_batch_size", 1, (config.micro_batch_size or config.batch_size) > 1),
        ("resolution", smaller, smaller >= 256),
        ("optimizer", "adamw8bit", config.optimizer == "adamw" and is_installed("bitsandbytes")),
    ]
    for name, value, helps in ways:
        if helps and need.total - need.process > free:
            config = replace(config, **{name: value})
            need = memory_of(config, Base.of(config, base.device, config.precision))
            typed = option(name) if value is True else f"{option(name)} {as_typed(value)}"
            told.append(f"{typed} (then about {_gb(need.total)} GB)")
    return told


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
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_memory() if device.type == "cpu" else None
