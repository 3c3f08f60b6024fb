"""LoRA: fine-tune a large network by training a low-rank change of a few of its weights.

A linear layer computes y = W x with a weight W of shape (out, in).  Fine-tuning would change all of
W.  LoRA freezes W and learns a change ΔW that is a product of two thin matrices,

    y = W x + (alpha / rank) · B A x            A: (rank, in)   B: (out, rank)

which has rank · (in + out) numbers instead of in · out.  At rank 8 and in = out = 320 that is
5 120 instead of 102 400.

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

B starts at zero, so training starts from exactly the base.  ΔW = (alpha / rank) · B A is itself a
matrix, so it can be added to W once training is done (`merge_lora`).  The network is then as fast
as before.

    inject_lora(unet, rank=8)            # wrap the attention projections, freeze everything else
    train(lora_parameters(unet))
    merge_lora(unet); …; unmerge_lora(unet)
    remove_lora(unet)                    # the original layers are back, untouched

A layer can carry several adapters at once, each with a name and a strength s that can be set at any
time:  y = W x + Σ sᵢ · ΔWᵢ x.

Source: Hu et al., "LoRA: low-rank adaptation of large language models", 2021.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")  # the attention projections of diffusers' U-Nets


class Adapter(nn.Module):
    """One low-rank change of a linear layer: x -> strength · (alpha / rank) · B (A x).

    `lora_A` is (rank, in), gaussian with standard deviation 1 / rank; `lora_B` is (out, rank), zero.
    Both are float32 whatever the base is: half precision would round the small steps of training away.
    """

    features = -1  # the dimension of x that A maps from

    def __init__(self, base: nn.Module, rank: int, alpha: float, generator: torch.Generator | None = None):
        super().__init__()
        self.rank = rank
        self.alpha = alpha
        self.strength = 1.0
        self.dropout_mask: torch.Tensor | None = None  # in training: (batch, in), of mean 1; None: no dropout
        weight = base.weight
        # Drawn on the CPU, so that a seed means the same numbers on every device.
        gaussian = torch.randn(rank, *weight.shape[1:], generator=generator) / rank
        self.lora_A = nn.Parameter(gaussian.to(weight.device))  # (rank, in)
        self.lora_B = nn.Parameter(torch.zeros(len(weight), rank, device=weight.device))  # (out, rank)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return strength · ΔW x without ever forming ΔW; (…, in) -> (…, out)."""
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.lora_A.dtype)
        if self.training and self.dropout_mask is not None:
            shape = [len(x), *[1] * (x.ndim - 1)]
            shape[self.features] = -1
            x = x * self.dropout_mask.view(shape)  # (batch, …, in)
        return self.up(self.down(x) * (self.strength * self.scale))  # scaled where it is small: (…, rank)

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
    """One low-rank change of a convolution: A is a convolution to `rank` channels, B one of 1 × 1.

    A, (rank, in, height, width), has the stride, padding and dilation of the base, so B A is a change
    of the base's weight: ΔW[o, i, h, w] = (alpha / rank) · Σᵣ B[o, r] A[r, i, h, w].
    """

    features = 1

    def __init__(self, base: nn.Conv2d, rank: int, alpha: float, generator: torch.Generator | None = None):
        super().__init__(base, rank, alpha, generator)
        self.convolve = base._conv_forward  # with the base's own padding and stride

    def down(self, x: torch.Tensor) -> torch.Tensor:
        return self.convolve(x, self.lora_A, None)  # (batch, rank, h, w)

    def up(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.lora_B[..., None, None])  # (batch, out, h, w)


class LoRALinear(nn.Module):
    """A linear layer with adapters beside it: y = base(x) + Σ adapterᵢ(x).

    `base` is the original layer itself, not a copy.  `adapters` maps a name to an Adapter.  Those whose
    names are in `merged` are in the base's weight and not in the sum.  The rank may be above min(in, out),
    as in some files, though nothing is gained by it.
    """

    kind = Adapter

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        alpha: float | None = None,
        name: str = "default",
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict()
        self.enabled = True
        self.merged: set[str] = set()
        self.register_buffer("original_weight", None, persistent=False)  # kept while anything is merged
        self.add(rank, alpha, name, generator)

    def add(
        self, rank: int, alpha: float | None = None, name: str = "default", generator: torch.Generator | None = None
    ) -> None:
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

    @torch.no_grad()
    def merged_weight(self, names: Iterable[str]) -> torch.Tensor:
        """Return W + Σ sᵢ · ΔWᵢ over the names, summed in float32 and rounded once to W's own type; (out, in)."""
        weight = self.base.weight if self.original_weight is None else self.original_weight
        deltas = [adapter.delta() for name, adapter in self.adapters.items() if name in names]
        return (weight.float() + sum(deltas)).to(weight.dtype)

    @torch.no_grad()
    def merge(self, names: Iterable[str]) -> None:
        """Put these adapters into the base's weight too, and keep the original."""
        if self.original_weight is None:
            self.original_weight = self.base.weight.detach().clone()
        self.merged.update(names)
        self.base.weight.copy_(self.merged_weight(self.merged))

    @torch.no_grad()
    def unmerge(self, names: Iterable[str]) -> None:
        """Take these adapters out of the base's weight; without any it is the original, bit for bit."""
        self.merged.difference_update(names)
        self.base.weight.copy_(self.merged_weight(self.merged) if self.merged else self.original_weight)
        if not self.merged:
            self.original_weight = None


class LoRAConv2d(LoRALinear):
    """A convolution with adapters beside it."""

    kind = ConvAdapter


KINDS = {nn.Linear: LoRALinear, nn.Conv2d: LoRAConv2d}


# ------------------------------------------------------------------------- putting it in, taking it out


def lora_layers(module: nn.Module) -> dict[str, LoRALinear]:
    """Return the layers that carry LoRA, by full name; empty if there are none."""
    return {name: child for name, child in module.named_modules() if isinstance(child, LoRALinear)}


def original_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Return every layer of `module` by full name, as if there were no LoRA in it."""
    layers = lora_layers(module)
    inside = tuple(f"{path}." for path in layers)
    named = [(path, child) for path, child in module.named_modules() if not path.startswith(inside)]
    return {path: layers[path].base if path in layers else child for path, child in named}


def matching(module: nn.Module, targets: Sequence[str]) -> dict[str, nn.Module]:
    """Return the layers whose full name is a target, or ends with "." and a target; the first target's come first.

    "to_q" means …attn1.to_q, not …foo_to_q.  Raises ValueError for a target that matches nothing.
    """
    layers, found = original_layers(module), {}
    missing = []
    for target in targets:
        fitting = {path: layer for path, layer in layers.items() if f".{path}".endswith(f".{target}")}
        missing += [] if fitting else [f"target {target!r} matches no module"]
        found |= {path: layer for path, layer in fitting.items() if path not in found}
    refuse("inject", missing)
    return found


def inject_lora(
    module: nn.Module,
    rank: int = 8,
    alpha: float | None = None,
    targets: Sequence[str] = ATTENTION,
    name: str = "default",
    generator: torch.Generator | None = None,
) -> dict[str, LoRALinear]:
    """Put a new LoRA into `module`, in place, and freeze everything else; return its layers by full name.

    `targets` are as `matching` takes them; `alpha` defaults to the rank, a scale of 1.  Another `name` puts a
    second LoRA beside the first.  (Targets that stand for many, and other ranks for some: models/targets.py.)

    Raises ValueError, naming every module concerned, for a target that matches nothing or matches
    something else, a convolution in groups, a rank that does not fit, a name that is in use.
    """
    found = matching(module, targets)
    return add_lora(module, dict.fromkeys(found, rank), dict.fromkeys(found, alpha), name, generator, fitting=True)


def add_lora(
    module: nn.Module,
    ranks: Mapping[str, int],
    alphas: Mapping[str, float | None] | None = None,
    name: str = "default",
    generator: torch.Generator | None = None,
    fitting: bool = False,
) -> dict[str, LoRALinear]:
    """Do what `inject_lora` does at exactly the layers in `ranks`, by full name, each with its own rank and alpha.

    With `fitting` a rank above min(in, out) is refused; files may hold such.  Raises ValueError, with nothing changed.
    """
    layers, carrying, problems = original_layers(module), lora_layers(module), []
    if "." in name or not name:
        problems.append(f"name {name!r} is empty or has a dot in it")
    for path, rank in ranks.items():
        layer = layers[path]
        if not isinstance(layer, tuple(KINDS)):
            problems.append(f"{path} is a {type(layer).__name__}; only Linear and Conv2d can take a LoRA")
        elif getattr(layer, "groups", 1) != 1:
            problems.append(f"{path} is a convolution in {layer.groups} groups, of which B A is no change")
        elif path in carrying and name in carrying[path].adapters:
            problems.append(f"{path} has a LoRA {name!r} already, of rank {carrying[path].adapters[name].rank}")
        elif fitting and not 1 <= rank <= min(layer.weight[0].numel(), len(layer.weight)):
            sizes = f"{layer.weight[0].numel()} to {len(layer.weight)} features"
            problems.append(f"{path} maps {sizes}; rank {rank} is not between 1 and the smaller of them")
    refuse("inject", problems)

    module.requires_grad_(False)
    for path, rank in ranks.items():
        layer, alpha = layers[path], (alphas or {}).get(path)
        if path in carrying:
            carrying[path].add(rank, alpha, name, generator)
        else:
            wrapper = next(kind for base, kind in KINDS.items() if isinstance(layer, base))
            module.set_submodule(path, wrapper(layer, rank, alpha, name, generator).train(layer.training))
    return {path: module.get_submodule(path) for path in ranks}


def remove_lora(module: nn.Module, name: str | None = None) -> None:
    """Take the LoRA called `name` (all by default) out of `module`, in place.

    A layer that carries no other gets its original object back, still frozen.  Raises
    RuntimeError while merged, since the change would stay behind unseen.
    """
    layers = layers_with(module, name)
    _require(layers, merged=False, what="remove_lora", name=name)
    for path, layer in layers.items():
        if name is not None:
            del layer.adapters[name]
        if name is None or not layer.adapters:
            module.set_submodule(path, layer.base)


def lora_parameters(module: nn.Module, name: str | None = None) -> list[nn.Parameter]:
    """Return the A and B of the LoRA called `name` (of all by default) as one list."""
    layers = layers_with(module, name).values()
    adapters = [layer.adapters[n] for layer in layers for n in layer.adapters if name in (None, n)]
    return [parameter for adapter in adapters for parameter in (adapter.lora_A, adapter.lora_B)]


# --------------------------------------------------------------------------------- strength and merging


def set_lora_strength(module: nn.Module, strength: float, name: str | None = None) -> None:
    """Set how strongly the LoRA called `name` (all by default) acts: 0 is the base, 1 is as trained."""
    layers = layers_with(module, name)
    _require(layers, merged=False, what="set_lora_strength", name=name)
    for layer in layers.values():
        for adapter_name, adapter in layer.adapters.items():
            if name in (None, adapter_name):
                adapter.strength = strength


@contextmanager
def lora_disabled(module: nn.Module) -> Iterator[None]:
    """Within the block the module computes what the base computes; afterwards it is as it was found."""
    layers = layers_with(module)
    _require(layers, merged=False, what="lora_disabled")
    found = {path: layer.enabled for path, layer in layers.items()}
    try:
        for layer in layers.values():
            layer.enabled = False
        yield
    finally:
        for path, layer in layers.items():
            layer.enabled = found[path]


def merge_lora(module: nn.Module, name: str | None = None) -> None:
    """Fold the LoRA called `name` (all by default), at its strength, into the weights: W ← W + Σ sᵢ · ΔWᵢ.

    The sum is computed in float32 and rounded once to the weight's own type.  Each layer keeps its
    original weight until `unmerge_lora`.  Raises RuntimeError if merged already, ValueError, with
    nothing changed, if a merged weight would not be finite.
    """
    layers = layers_with(module, name)
    _require(layers, merged=False, what="merge_lora", name=name)
    names = {path: [name] if name else list(layer.adapters) for path, layer in layers.items()}
    broken = [p for p, layer in layers.items() if not layer.merged_weight(layer.merged | {*names[p]}).isfinite().all()]
    if broken:
        raise ValueError(f"cannot merge: the merged weight is not finite in {', '.join(broken)}")
    for path, layer in layers.items():
        layer.merge(names[path])


def unmerge_lora(module: nn.Module, name: str | None = None) -> None:
    """Undo `merge_lora`, in place, for one LoRA or for all: without any the weights are the original bits.

    Raises RuntimeError if not merged.
    """
    layers = layers_with(module, name)
    if name is None and any(layer.merged for layer in layers.values()):
        layers = {path: layer for path, layer in layers.items() if layer.merged}
    _require(layers, merged=True, what="unmerge_lora", name=name)
    for layer in layers.values():
        layer.unmerge([name] if name else list(layer.merged))


def layers_with(module: nn.Module, name: str | None = None) -> dict[str, LoRALinear]:
    """Return the layers that carry the LoRA called `name` (any by default), or raise if none does."""
    layers = {p: layer for p, layer in lora_layers(module).items() if name is None or name in layer.adapters}
    if not layers:
        which = "" if name is None else f" named {name!r}"
        raise ValueError(f"this {type(module).__name__} carries no LoRA{which}; inject_lora or load_lora first")
    return layers


def _require(layers: dict[str, LoRALinear], merged: bool, what: str, name: str | None = None) -> None:
    """Raise RuntimeError unless in every layer the LoRA called `name` (any by default) is merged, or is not."""
    there = {path: name in layer.merged if name else bool(layer.merged) for path, layer in layers.items()}
    wrong = [path for path in layers if there[path] != merged]
    if wrong:
        state, remedy = ("not merged", "merge_lora") if merged else ("merged", "unmerge_lora")
        raise RuntimeError(f"{what}: {', '.join(wrong[:3])} … is {state}; call {remedy} first")


def refuse(what: str, problems: Sequence[str]) -> None:
    """Raise ValueError for problems, the first five of them, if there are any."""
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"cannot {what} LoRA: " + "; ".join(problems[:5]) + more)
