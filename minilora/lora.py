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

    feature_dim = -1  # the dimension of x that A maps from

    def __init__(self, base: Layer, rank: int, alpha: float, generator: torch.Generator | None = None):
        super().__init__()
        self.rank, self.alpha, self.scale = rank, alpha, alpha / rank
        self.strength = 1.0
        self.dropout_mask: torch.Tensor | None = None  # in training: (batch, in), of mean 1; None: no dropout
        weight = base.weight
        # Drawn on the CPU, so that a seed gives the same numbers on every device.
        gaussian = torch.randn(rank, *weight.shape[1:], generator=generator) / rank
        self.lora_A = nn.Parameter(gaussian.to(weight.device))  # (rank, in)
        self.lora_B = nn.Parameter(torch.zeros(len(weight), rank, device=weight.device))  # (out, rank)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return strength · ΔW x without ever forming ΔW; (…, in) -> (…, out)."""
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.lora_A.dtype)
        if self.training and self.dropout_mask is not None:
            shape = [len(x), *[1] * (x.ndim - 1)]
            shape[self.feature_dim] = -1
            x = x * self.dropout_mask.view(shape)  # (batch, …, in)
        return self.up(self.down(x) * (self.strength * self.scale))  # scaled at (…, rank), where numbers are few

    def down(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.lora_A)  # (…, rank)

    def up(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.lora_B)  # (…, out)

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

    feature_dim = 1

    def __init__(self, base: nn.Conv2d, rank: int, alpha: float, generator: torch.Generator | None = None):
        super().__init__(base, rank, alpha, generator)
        self.convolve = base._conv_forward  # with the base's own padding and stride

    def down(self, x: torch.Tensor) -> torch.Tensor:
        return self.convolve(x, self.lora_A, None)  # (batch, rank, h, w)

    def up(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.lora_B[..., None, None])  # (batch, out, h, w)


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
        self.adapters = nn.ModuleDict()  # type: ignore[assignment]
        self.enabled = True
        self.merged: set[str] = set()
        self.original_weight: torch.Tensor | None
        self.register_buffer("original_weight", None, persistent=False)  # kept while anything is merged
        self.add(rank, alpha, name, generator)

    def add(self, rank: int, alpha: float | None = None, name: str = "default", generator=None) -> None:
        """Add an adapter under a new name; alpha defaults to the rank, a scale of 1."""
        alpha = rank if alpha is None else alpha
        self.adapters[name] = self.kind(self.base, rank, alpha, generator).train(self.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)  # (…, out)
        if self.enabled:
            for name, adapter in self.adapters.items():
                if name not in self.merged:
                    y = y + adapter(x).to(y.dtype)
        return y

    def named(self, name: str | None = None) -> list[str]:
        """Return the names of the adapters that `name` selects: all of them if it is None."""
        return [each for each in self.adapters if name in (None, each)]

    @torch.no_grad()
    def weight_with(self, names: set[str]) -> torch.Tensor:
        """Return W + Σ sᵢ · ΔWᵢ over the names, summed in float32 and rounded once to W's own type; (out, in)."""
        weight = self.base.weight if self.original_weight is None else self.original_weight
        deltas = [adapter.delta() for name, adapter in self.adapters.items() if name in names]
        return (weight.float() + sum(deltas)).to(weight.dtype) if deltas else weight

    @torch.no_grad()
    def set_merged(self, names: set[str]) -> None:
        """Set the base's weight to W + Σ sᵢ · ΔWᵢ over exactly these adapters; without any, to W, bit for bit."""
        if self.original_weight is None:
            self.original_weight = self.base.weight.detach().clone()
        self.base.weight.copy_(self.weight_with(names))
        self.merged = names
        if not names:
            self.original_weight = None


class LoRAConv2d(LoRALinear):
    """A convolution with adapters beside it."""

    kind = ConvAdapter


# ------------------------------------------------------------------------------- injecting and removing


def lora_layers(module: nn.Module) -> dict[str, LoRALinear]:
    """Return the layers that carry LoRA, by full name; empty if there are none."""
    return {name: child for name, child in module.named_modules() if isinstance(child, LoRALinear)}


def original_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Return every layer of `module` by full name, as if it had no LoRA."""
    layers = lora_layers(module)
    inside = tuple(f"{path}." for path in layers)
    others = {path: child for path, child in module.named_modules() if not path.startswith(inside)}
    return others | {path: layer.base for path, layer in layers.items()}


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
    layers: dict[str, Any] = original_layers(module) | lora_layers(module)
    problems = [] if name and "." not in name else [f"name {name!r} is empty or has a dot in it"]
    problems += [p for path, r in ranks.items() if (p := _misfit(layers[path], path, name, r, fitting))]
    refuse("inject LoRA", problems)

    module.requires_grad_(False)
    for path, r in ranks.items():
        layer = layers[path]
        if isinstance(layer, LoRALinear):
            layer.add(r, alphas.get(path), name, generator)
        else:
            kind = LoRAConv2d if isinstance(layer, nn.Conv2d) else LoRALinear
            layers[path] = kind(layer, r, alphas.get(path), name, generator).train(layer.training)
            module.set_submodule(path, layers[path])
    return {path: layers[path] for path in ranks}


def _misfit(layer: Any, path: str, name: str, rank: int, fitting: bool) -> str:
    """Return why a layer cannot take a LoRA of that name and rank; "" if it can."""
    if isinstance(layer, LoRALinear):
        if name in layer.adapters:
            return f"{path} already has a LoRA {name!r}, of rank {layer.adapters[name].rank}"
        layer = layer.base
    if not isinstance(layer, Layer):
        return f"{path} is a {type(layer).__name__}; only Linear and Conv2d can take a LoRA"
    if getattr(layer, "groups", 1) != 1:
        return f"{path} is a convolution in {layer.groups} groups; a LoRA needs one group"
    inputs, outputs = layer.weight[0].numel(), len(layer.weight)
    if fitting and not 1 <= rank <= min(inputs, outputs):
        sizes = f"{inputs} to {outputs} features"
        return f"{path} maps {sizes}; rank {rank} is not between 1 and the smaller number"
    return ""


def layers_with(module: nn.Module, name: str | None = None, require_unmerged: bool = False) -> dict[str, LoRALinear]:
    """Return the layers that carry the LoRA called `name` (any by default).

    Raises ValueError if none does, and with `require_unmerged` RuntimeError if one is merged.
    """
    layers = {path: layer for path, layer in lora_layers(module).items() if layer.named(name)}
    if not layers:
        which = "" if name is None else f" named {name!r}"
        raise ValueError(f"this {type(module).__name__} carries no LoRA{which}; inject_lora or load_lora first")
    merged = [path for path, layer in layers.items() if layer.merged.intersection(layer.named(name))]
    if require_unmerged and merged:
        raise RuntimeError(f"the LoRA in {', '.join(merged[:3])} … is merged; call unmerge_lora first")
    return layers


def adapters_with(module: nn.Module, name: str | None = None, require_unmerged: bool = False) -> list[Adapter]:
    """Return the adapters of the LoRA called `name` (of all by default); raises as `layers_with` does."""
    layers = layers_with(module, name, require_unmerged).values()
    return [layer.adapters[each] for layer in layers for each in layer.named(name)]


def remove_lora(module: nn.Module, name: str | None = None) -> None:
    """Take the LoRA called `name` (all by default) out of `module`, in place.

    A layer without another LoRA is replaced by its original, still frozen.  Raises RuntimeError while merged, because
    ΔW would stay in the weight.
    """
    for path, layer in layers_with(module, name, require_unmerged=True).items():
        for each in layer.named(name):
            del layer.adapters[each]
        if not layer.adapters:
            module.set_submodule(path, layer.base)


def lora_parameters(module: nn.Module, name: str | None = None) -> list[nn.Parameter]:
    """Return the A and B of the LoRA called `name` (of all by default) as one list."""
    return [matrix for adapter in adapters_with(module, name) for matrix in (adapter.lora_A, adapter.lora_B)]


# --------------------------------------------------------------------------------- strength and merging


def set_lora_strength(module: nn.Module, strength: float, name: str | None = None) -> None:
    """Set the strength of the LoRA called `name` (all by default): 0 is the base, 1 is as trained."""
    for adapter in adapters_with(module, name, require_unmerged=True):
        adapter.strength = strength


@contextmanager
def lora_disabled(module: nn.Module) -> Iterator[None]:
    """Within the block the module computes what the base computes; afterwards its state is restored."""
    found = [(layer, layer.enabled) for layer in layers_with(module, require_unmerged=True).values()]
    try:
        for layer, _ in found:
            layer.enabled = False
        yield
    finally:
        for layer, enabled in found:
            layer.enabled = enabled


def merge_lora(module: nn.Module, name: str | None = None) -> None:
    """Fold the LoRA called `name` (all by default), at its strength, into the weights: W ← W + Σ sᵢ · ΔWᵢ.

    The sum is computed in float32 and rounded once to the weight's own type.  Each layer keeps its original weight.
    Raises RuntimeError if already merged; ValueError, with nothing changed, if a merged weight would not be finite.
    """
    layers = layers_with(module, name, require_unmerged=True)
    names = {path: layer.merged.union(layer.named(name)) for path, layer in layers.items()}
    broken = [path for path, layer in layers.items() if not layer.weight_with(names[path]).isfinite().all()]
    if broken:
        raise ValueError(f"cannot merge: the merged weight is not finite in {', '.join(broken)}")
    for path, layer in layers.items():
        layer.set_merged(names[path])


def unmerge_lora(module: nn.Module, name: str | None = None) -> None:
    """Undo `merge_lora`, in place, for one LoRA or for all; without any merged, the weights are the original bits.

    Raises RuntimeError if it is not merged.
    """
    merged = [layer for layer in layers_with(module, name).values() if layer.merged.intersection(layer.named(name))]
    if not merged:
        raise RuntimeError("the LoRA is not merged; call merge_lora first")
    for layer in merged:
        layer.set_merged(layer.merged.difference(layer.named(name)))
