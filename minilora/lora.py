"""LoRA: fine-tune a large network by training low-rank deltas of a few of its weights.

A linear layer computes y = W x with a weight W of shape (out, in).  Fine-tuning would change all of W.  LoRA freezes W
and learns a delta ΔW that is a product of two thin matrices,

    y = W x + (alpha / rank) · B A x            A: (rank, in)   B: (out, rank)

which has rank · (in + out) numbers instead of in · out: at rank 8 and in = out = 320, 5 120 instead of 102 400.

                x (in)
                │
         ┌──────┴──────┐
         │             │
    W (out, in)   A (rank, in)      trained, gaussian at first
     frozen            │
         │        B (out, rank)     trained, zero at first
         │             │
         │      × alpha / rank
         └─────( + )───┘
                │
                y (out)

B starts at zero, so training starts from exactly the base.  ΔW = (alpha / rank) · B A is itself a matrix, so it can be
added to W after training (`merge_lora`).  The network is then as fast as before.

    inject_lora(unet, rank=8)            # wrap the attention projections, freeze everything else
    train(lora_parameters(unet))
    merge_lora(unet); …; unmerge_lora(unet)
    remove_lora(unet)                    # the original layers are back, untouched

A layer can carry several adapters at once, each with a name and a strength s:  y = W x + Σ sᵢ · ΔWᵢ x.

Source: Hu et al., "LoRA: low-rank adaptation of large language models", 2021.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .settings.errors import refuse

Layer = nn.Linear | nn.Conv2d  # what can carry a LoRA
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")  # the attention projections of diffusers' U-Nets


class Adapter(nn.Module):
    """The low-rank delta of a linear layer: x -> strength · (alpha / rank) · B (A x).

    `lora_A` is (rank, in), gaussian with standard deviation 1 / rank; `lora_B` is (out, rank), zero.
    Both are float32 even if the base is not: half precision would round away the small steps of training.
    """

    def __init__(self, base: Layer, rank: int, alpha: float | None = None, generator: torch.Generator | None = None):
        super().__init__()
        self.rank, self.alpha = rank, (rank if alpha is None else alpha)
        self.scale, self.strength = self.alpha / rank, 1.0
        self.dropout_mask: torch.Tensor | None = None  # in training: (batch, in), of mean 1; None: no dropout
        weight = base.weight
        # Drawn on the CPU, so that a seed gives the same numbers on every device.
        gaussian = torch.randn(rank, *weight.shape[1:], generator=generator) / rank
        self.lora_A = nn.Parameter(gaussian.to(weight.device))  # (rank, in)
        self.lora_B = nn.Parameter(torch.zeros(len(weight), rank, device=weight.device))  # (out, rank)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return strength · ΔW x without ever forming ΔW; (…, in) -> (…, out)."""
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.lora_A.dtype)  # the base may be in half precision
        if self.training and self.dropout_mask is not None:
            x = self.drop(x, self.dropout_mask)
        return self.product(x, self.strength * self.scale)

    def drop(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return x * mask.view(len(x), *[1] * (x.ndim - 2), -1)  # (batch, …, in)

    def product(self, x: torch.Tensor, factor: float) -> torch.Tensor:
        down = factor * F.linear(x, self.lora_A)  # (…, rank); scaled here, where numbers are few
        return F.linear(down, self.lora_B)  # factor · B (A x): (…, out)

    def delta(self) -> torch.Tensor:
        """Return strength · ΔW in float32 and in the shape of the weight, (out, in)."""
        product = self.lora_B.detach() @ self.lora_A.detach().flatten(1)
        return (self.strength * self.scale * product).unflatten(1, self.lora_A.shape[1:])

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}, strength={self.strength}"


class ConvAdapter(Adapter):
    """The low-rank delta of a convolution: A is a convolution to `rank` channels, B one of 1 × 1.

    A, (rank, in, height, width), has the stride, padding and dilation of the base, so ΔW has the shape of the base's
    weight: ΔW[o, i, h, w] = (alpha / rank) · Σᵣ B[o, r] A[r, i, h, w].
    """

    def __init__(self, base: nn.Conv2d, *args):
        super().__init__(base, *args)
        self.convolve = base._conv_forward  # with the base's own padding and stride

    def drop(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return x * mask[..., None, None]  # (batch, in, h, w)

    def product(self, x: torch.Tensor, factor: float) -> torch.Tensor:
        down = factor * self.convolve(x, self.lora_A, None)  # (batch, rank, h, w)
        return F.conv2d(down, self.lora_B[..., None, None])  # (batch, out, h, w)


class LoRALinear(nn.Module):
    """A linear layer with adapters beside it: y = base(x) + Σ adapterᵢ(x).

    `base` is the original layer itself, not a copy.  `adapters` maps a name to an Adapter.  The adapters named in
    `merged` are already in the base's weight, so they are left out of the sum.
    """

    kind: type[Adapter] = Adapter
    adapters: dict[str, Adapter]

    def __init__(self, base: Layer, rank: int, alpha: float | None = None, name: str = "default", generator=None):
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict({name: self.kind(base, rank, alpha, generator)})  # type: ignore[assignment]
        self.enabled = True
        self.merged: set[str] = set()
        self.original_weight: torch.Tensor | None
        self.register_buffer("original_weight", None, persistent=False)  # kept while anything is merged

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)  # (…, out)
        if self.enabled:
            for name, adapter in self.adapters.items():
                if name not in self.merged:
                    y = y + adapter(x).to(y.dtype)
        return y

    @torch.no_grad()
    def set_merged(self, names: set[str]) -> None:
        """Set the base's weight to W + Σ sᵢ · ΔWᵢ over exactly these adapters; without any, to W, bit for bit."""
        if self.original_weight is None:
            self.original_weight = self.base.weight.detach().clone()
        weight = self.original_weight  # (out, in)
        if deltas := [adapter.delta() for name, adapter in self.adapters.items() if name in names]:
            weight = weight.float() + sum(deltas)  # in float32
        self.base.weight.copy_(weight)  # rounded once, to the base's own type
        self.merged = names
        if not names:
            self.original_weight = None


class LoRAConv2d(LoRALinear):
    """A convolution with adapters beside it."""

    kind = ConvAdapter


# ------------------------------------------------------------------------------- injecting and removing


def lora_layers(module: nn.Module) -> dict[str, LoRALinear]:
    """Return the layers that carry LoRA, by full name; empty if there are none."""
    return {path: layer for path, layer in module.named_modules() if isinstance(layer, LoRALinear)}


def original_layers(module: nn.Module) -> dict[str, Any]:
    """Return every layer of `module` by full name, as if it had no LoRA."""
    carrying = lora_layers(module)
    inside = {child for layer in carrying.values() for child in layer.children()}
    layers = dict(module.named_modules(memo=inside))  # those in `memo` are passed over
    return layers | {path: layer.base for path, layer in carrying.items()}


def matching(module: nn.Module, targets: Sequence[str]) -> list[str]:
    """Return the full names of the layers that match targets: "to_q" matches every …attn1.to_q, but no …foo_to_q.

    Raises ValueError for a target that is neither a layer's full name nor the end of one.
    """
    layers = original_layers(module)
    found = {target: [path for path in layers if f".{path}".endswith(f".{target}")] for target in targets}
    refuse("inject LoRA", [f"target {target!r} matches no module" for target, paths in found.items() if not paths])
    return list(dict.fromkeys(path for paths in found.values() for path in paths))


def inject_lora(
    module: nn.Module,
    rank: int | Mapping[str, int] = 8,
    alpha: float | Mapping[str, float] | None = None,
    targets: Sequence[str] = ATTENTION,
    name: str = "default",
    generator: torch.Generator | None = None,
    fitting: bool = True,
) -> dict[str, LoRALinear]:
    """Put a new LoRA into `module`, in place, and freeze everything else; return its layers by full name.

    `targets` are as `matching` takes them; `alpha` defaults to the rank, a scale of 1.  If layers differ, `rank` and
    `alpha` map full names to numbers, and the keys of `rank` replace `targets`.  Another `name` puts a second LoRA
    beside the first.  With `fitting` false a rank may exceed min(in, out), as in some files.
    Raises ValueError, which names every module concerned and leaves everything unchanged, for a target that matches
    nothing, a layer that is neither Linear nor Conv2d, a grouped convolution, a rank that does not fit, a name in use.
    """
    ranks = rank if isinstance(rank, Mapping) else dict.fromkeys(matching(module, targets), rank)
    alphas = alpha if isinstance(alpha, Mapping) else dict.fromkeys(ranks, alpha)
    layers, carrying = original_layers(module), lora_layers(module)
    refuse("inject LoRA", list(_misfits(layers, carrying, ranks, name, fitting)))

    module.requires_grad_(False)
    for path, r in ranks.items():
        if path in carrying:
            layer = carrying[path]
            layer.adapters[name] = layer.kind(layer.base, r, alphas.get(path), generator).train(layer.training)
        else:
            kind = LoRAConv2d if isinstance(layers[path], nn.Conv2d) else LoRALinear
            carrying[path] = kind(layers[path], r, alphas.get(path), name, generator).train(layers[path].training)
            module.set_submodule(path, carrying[path])
    return {path: carrying[path] for path in ranks}


def _misfits(layers, carrying, ranks: Mapping[str, int], name: str, fitting: bool) -> Iterator[str]:
    """Yield the reasons why layers cannot take a LoRA of that name and these ranks."""
    if not name or "." in name:
        yield f"name {name!r} is empty or has a dot in it"
    for path, rank in ranks.items():
        layer = layers[path]
        if path in carrying and name in carrying[path].adapters:
            yield f"{path} already has a LoRA {name!r}, of rank {carrying[path].adapters[name].rank}"
        elif not isinstance(layer, Layer):
            yield f"{path} is a {type(layer).__name__}; only Linear and Conv2d can take a LoRA"
        elif isinstance(layer, nn.Conv2d) and layer.groups != 1:
            yield f"{path} is a convolution in {layer.groups} groups; a LoRA needs one group"
        elif fitting and not 1 <= rank <= min(layer.weight[0].numel(), len(layer.weight)):
            features = f"{layer.weight[0].numel()} to {len(layer.weight)} features"
            yield f"{path} maps {features}; rank {rank} is not between 1 and the smaller number"


def adapters_of(module: nn.Module, name: str | None = None, live: bool = False) -> list[tuple[str, LoRALinear, str]]:
    """Return (path of the layer, layer, name of the adapter) for each adapter of the LoRA called `name`, or of all.

    Raises ValueError if there is none, and with `live` RuntimeError if one is merged.
    """
    layers = lora_layers(module).items()
    found = [(path, layer, each) for path, layer in layers for each in layer.adapters if name in (None, each)]
    if not found:
        which = "" if name is None else f" named {name!r}"
        raise ValueError(f"this {type(module).__name__} carries no LoRA{which}; inject_lora or load_lora first")
    if live and (merged := [path for path, layer, each in found if each in layer.merged]):
        raise RuntimeError(f"the LoRA in {', '.join(merged[:3])} … is merged; call unmerge_lora first")
    return found


def remove_lora(module: nn.Module, name: str | None = None) -> None:
    """Take the LoRA called `name` (all by default) out of `module`, in place.

    A layer without another LoRA is replaced by its original, still frozen.  Raises RuntimeError while merged, because
    ΔW would stay in the weight.
    """
    for path, layer, each in adapters_of(module, name, live=True):
        del layer.adapters[each]
        if not layer.adapters:
            module.set_submodule(path, layer.base)


def lora_parameters(module: nn.Module, name: str | None = None) -> list[nn.Parameter]:
    """Return the A and B of the LoRA called `name` (of all by default) as one list."""
    return [matrix for _, layer, each in adapters_of(module, name) for matrix in layer.adapters[each].parameters()]


# --------------------------------------------------------------------------------- strength and merging


def set_lora_strength(module: nn.Module, strength: float, name: str | None = None) -> None:
    """Set the strength of the LoRA called `name` (all by default): 0 is the base, 1 is as trained."""
    for _, layer, each in adapters_of(module, name, live=True):
        layer.adapters[each].strength = strength


@contextmanager
def lora_disabled(module: nn.Module) -> Iterator[None]:
    """Within the block the module computes what the base computes; afterwards its state is restored."""
    before = {layer: layer.enabled for _, layer, _ in adapters_of(module, live=True)}
    try:
        for layer in before:
            layer.enabled = False
        yield
    finally:
        for layer, enabled in before.items():
            layer.enabled = enabled


def merge_lora(module: nn.Module, name: str | None = None) -> None:
    """Fold the LoRA called `name` (all by default), at its strength, into the weights: W ← W + Σ sᵢ · ΔWᵢ.

    Each layer keeps its original weight.  Raises RuntimeError if already merged; ValueError, with nothing changed, if a
    merged weight would not be finite.
    """
    adapters = adapters_of(module, name, live=True)
    for _, layer, each in adapters:
        layer.set_merged(layer.merged | {each})
    if broken := {path: layer for path, layer, _ in adapters if not layer.base.weight.isfinite().all()}:
        unmerge_lora(module, name)
        raise ValueError(f"cannot merge: the merged weight is not finite in {', '.join(broken)}")


def unmerge_lora(module: nn.Module, name: str | None = None) -> None:
    """Take the LoRA called `name` (all by default) out of the weights, bit for bit; RuntimeError if not merged."""
    merged = [(layer, each) for _, layer, each in adapters_of(module, name) if each in layer.merged]
    if not merged:
        raise RuntimeError("the LoRA is not merged; call merge_lora first")
    for layer, each in merged:
        layer.set_merged(layer.merged - {each})
