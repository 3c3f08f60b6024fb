"""LoRA: fine-tune a large network by training a small change to a few of its weights.

A linear layer computes y = W x with a weight W of shape (out, in).  Fine-tuning would change all of
W.  LoRA freezes W and learns a change that is a product of two thin matrices,

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

B starts at zero, so training starts from exactly the base.  Since the change is itself a matrix,
ΔW = (alpha / rank) · B A, it can be added to W once training is done (`merge_lora`), and the
network is then as fast as before.

    inject_lora(unet, rank=8)            # wrap the attention projections, freeze everything else
    train(lora_parameters(unet))
    merge_lora(unet); …; unmerge_lora(unet)
    remove_lora(unet)                    # the original layers are back, untouched

A layer can carry several changes at once, each with a name and a strength s that can be set at any
time:  y = W x + Σ sᵢ · ΔWᵢ x.

Source: Hu et al., "LoRA: low-rank adaptation of large language models", 2021.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")  # the attention projections of diffusers' U-Nets


class Adapter(nn.Module):
    """One low-rank change, ΔW = (alpha / rank) · B A, and the strength it is applied with.

    `lora_A` is (rank, in), gaussian with standard deviation 1 / rank; `lora_B` is (out, rank), zero.
    Both are float32 whatever the base is: half precision would round the small steps of training away.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float = 0.0, generator=None):
        super().__init__()
        self.rank = rank
        self.alpha = alpha
        self.strength = 1.0
        self.dropout = nn.Dropout(dropout)
        # Drawn on the CPU, so that a seed means the same numbers on every device.
        gaussian = torch.randn(rank, base.in_features, generator=generator) / rank
        zeros = torch.zeros(base.out_features, rank)
        self.lora_A = nn.Parameter(gaussian.to(base.weight.device))  # (rank, in)
        self.lora_B = nn.Parameter(zeros.to(base.weight.device))  # (out, rank)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def delta(self) -> torch.Tensor:
        """Return strength · ΔW as one float32 matrix, (out, in)."""
        return (self.strength * self.scale) * (self.lora_B.detach() @ self.lora_A.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return strength · ΔW x without ever forming ΔW; (…, in) -> (…, out)."""
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.lora_A.dtype)
        down = F.linear(self.dropout(x), self.lora_A)  # (…, rank)
        return F.linear(down * (self.strength * self.scale), self.lora_B)  # (…, out)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}, strength={self.strength}"


class LoRALinear(nn.Module):
    """A linear layer with low-rank changes beside it: y = base(x) + Σ sᵢ · (alphaᵢ / rankᵢ) · Bᵢ (Aᵢ x).

    `base` is the original layer itself, not a copy.  `adapters` maps a name to an Adapter.  While
    merged, the changes are in the base's weight and the sum is skipped.

    The rank may be above min(in, out), as in some files, though nothing is gained by it.
    """

    def __init__(
        self,
        base: nn.Linear,
        rank: int,
        alpha: float | None = None,
        dropout: float = 0.0,
        name: str = "default",
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict()
        self.enabled = True
        self.register_buffer("original_weight", None, persistent=False)  # kept while merged
        self.add(rank, alpha, dropout, name, generator)

    def add(self, rank: int, alpha: float | None, dropout: float, name: str, generator=None) -> None:
        """Add one more change, under a new name; alpha defaults to the rank."""
        alpha = rank if alpha is None else alpha
        self.adapters[name] = Adapter(self.base, rank, alpha, dropout, generator).train(self.training)

    @property
    def merged(self) -> bool:
        return self.original_weight is not None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)  # (…, out)
        if self.enabled and not self.merged:
            for adapter in self.adapters.values():
                y = y + adapter(x).to(y.dtype)
        return y

    @torch.no_grad()
    def merged_weight(self) -> torch.Tensor:
        """Return W + Σ sᵢ · ΔWᵢ, summed in float32 and rounded once to W's own type; (out, in)."""
        weight = self.base.weight
        return (weight.float() + sum(adapter.delta() for adapter in self.adapters.values())).to(weight.dtype)

    @torch.no_grad()
    def merge(self) -> None:
        """Put the changes into the base's weight and keep the original."""
        self.original_weight = self.base.weight.detach().clone()
        self.base.weight.copy_(self.merged_weight())

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the original weight back, bit for bit."""
        self.base.weight.copy_(self.original_weight)
        self.original_weight = None


# ------------------------------------------------------------------------- putting it in, taking it out


def lora_layers(module: nn.Module) -> dict[str, LoRALinear]:
    """Return the layers that carry LoRA, by full name; empty if there are none."""
    return {name: child for name, child in module.named_modules() if isinstance(child, LoRALinear)}


def inject_lora(
    module: nn.Module,
    rank: int = 8,
    alpha: float | None = None,
    targets: Sequence[str] = ATTENTION,
    dropout: float = 0.0,
    name: str = "default",
    generator: torch.Generator | None = None,
) -> dict[str, LoRALinear]:
    """Put a new LoRA into `module`, in place, and freeze everything else; return its layers by full name.

    A linear layer is a target if its full name is one of `targets` or ends with "." and one of them:
    "to_q" means …attn1.to_q, not …foo_to_q.  `alpha` defaults to the rank, a scale of 1.  Another
    `name` puts a second LoRA beside the first.

    Raises ValueError, naming every module concerned, for a target that matches nothing or matches
    something that is not a linear layer, a rank that does not fit, a name that is in use.
    """
    layers = lora_layers(module)
    inside = {f"{path}.{inner}" for path, layer in layers.items() for inner, _ in layer.named_modules() if inner}
    paths = [path for path, _ in module.named_modules() if path not in inside]
    matches = {target: [path for path in paths if f".{path}".endswith(f".{target}")] for target in targets}
    problems = [f"target {target!r} matches no module" for target, found in matches.items() if not found]
    found = dict.fromkeys(path for found in matches.values() for path in found)
    for path in found:
        linear = layers[path].base if path in layers else module.get_submodule(path)
        if isinstance(linear, nn.Linear) and not 1 <= rank <= min(linear.in_features, linear.out_features):
            shape = f"{linear.in_features} to {linear.out_features}"
            problems.append(f"{path} maps {shape} features; rank {rank} is not between 1 and the smaller of them")
    return add_lora(module, dict.fromkeys(found, rank), alpha, dropout, name, generator, problems)


def add_lora(
    module: nn.Module,
    ranks: Mapping[str, int],
    alpha: float | None = None,
    dropout: float = 0.0,
    name: str = "default",
    generator: torch.Generator | None = None,
    problems: Sequence[str] = (),
) -> dict[str, LoRALinear]:
    """Do what `inject_lora` does at exactly the layers in `ranks`, by full name, each with a rank of its own.

    Raises ValueError, with nothing changed, for `problems` found before and all that are found here.
    """
    problems = list(problems)
    if "." in name or not name:
        problems.append(f"name {name!r} is empty or has a dot in it")
    found = {path: module.get_submodule(path) for path in ranks}
    for path, child in found.items():
        linear = child.base if isinstance(child, LoRALinear) else child
        if not isinstance(linear, nn.Linear):
            problems.append(f"{path} is a {type(linear).__name__}; only Linear layers can take a LoRA")
        elif isinstance(child, LoRALinear) and name in child.adapters:
            problems.append(f"{path} has a LoRA {name!r} already, of rank {child.adapters[name].rank}")
        elif isinstance(child, LoRALinear) and child.merged:
            problems.append(f"{path} is merged; unmerge_lora first")
    if problems:
        raise ValueError("cannot inject LoRA: " + "; ".join(problems))

    module.requires_grad_(False)
    for path, child in found.items():
        if isinstance(child, LoRALinear):
            child.add(ranks[path], alpha, dropout, name, generator)
        else:
            layer = LoRALinear(child, ranks[path], alpha, dropout, name, generator)
            module.set_submodule(path, layer.train(child.training))
    return {path: module.get_submodule(path) for path in found}


def remove_lora(module: nn.Module, name: str | None = None) -> None:
    """Take the LoRA called `name` (all by default) out of `module`, in place.

    A layer that carries no other gets its original nn.Linear object back, still frozen.  Raises
    RuntimeError while merged, since the change would stay behind unseen.
    """
    layers = _layers_with(module, name)
    _require(layers, merged=False, what="remove_lora")
    for path, layer in layers.items():
        if name is not None:
            del layer.adapters[name]
        if name is None or not layer.adapters:
            module.set_submodule(path, layer.base)


def lora_parameters(module: nn.Module, name: str | None = None) -> list[nn.Parameter]:
    """Return the A and B of the LoRA called `name` (of all by default) as one list."""
    layers = _layers_with(module, name).values()
    adapters = [layer.adapters[n] for layer in layers for n in layer.adapters if name in (None, n)]
    return [parameter for adapter in adapters for parameter in (adapter.lora_A, adapter.lora_B)]


# --------------------------------------------------------------------------------- strength and merging


def set_lora_scale(module: nn.Module, strength: float, name: str | None = None) -> None:
    """Set how strongly the LoRA called `name` (all by default) acts: 0 is the base, 1 is as trained."""
    layers = _layers_with(module, name)
    _require(layers, merged=False, what="set_lora_scale")
    for layer in layers.values():
        for adapter_name, adapter in layer.adapters.items():
            if name in (None, adapter_name):
                adapter.strength = strength


@contextmanager
def lora_disabled(module: nn.Module) -> Iterator[None]:
    """Within the block the module computes what the base computes; afterwards it is as it was found."""
    layers = _layers_with(module)
    _require(layers, merged=False, what="lora_disabled")
    found = {path: layer.enabled for path, layer in layers.items()}
    try:
        for layer in layers.values():
            layer.enabled = False
        yield
    finally:
        for path, layer in layers.items():
            layer.enabled = found[path]


def merge_lora(module: nn.Module) -> None:
    """Fold every LoRA, at its strength, into the base's weights, in place: W ← W + Σ sᵢ · ΔWᵢ.

    The sum is computed in float32 and rounded once to the weight's own type.  Each layer keeps its
    original weight until `unmerge_lora`.  Raises RuntimeError if merged already, ValueError, with
    nothing changed, if a merged weight would not be finite.
    """
    layers = _layers_with(module)
    _require(layers, merged=False, what="merge_lora")
    broken = [path for path, layer in layers.items() if not layer.merged_weight().isfinite().all()]
    if broken:
        raise ValueError(f"cannot merge: the merged weight is not finite in {', '.join(broken)}")
    for layer in layers.values():
        layer.merge()


def unmerge_lora(module: nn.Module) -> None:
    """Undo `merge_lora`, in place: the weights are what they were, bit for bit.

    Raises RuntimeError if not merged.
    """
    layers = _layers_with(module)
    _require(layers, merged=True, what="unmerge_lora")
    for layer in layers.values():
        layer.unmerge()


# --------------------------------------------------------------------------------------------- tensors


def lora_state_dict(module: nn.Module, name: str = "default") -> dict[str, torch.Tensor]:
    """Return the tensors of one LoRA: `<layer>.lora_A.weight`, (rank, in), and `<layer>.lora_B.weight`."""
    return {
        f"{path}.{matrix}.weight": getattr(layer.adapters[name], matrix).detach()
        for path, layer in _layers_with(module, name).items()
        for matrix in ("lora_A", "lora_B")
    }


@torch.no_grad()
def load_lora_state_dict(module: nn.Module, state: dict[str, torch.Tensor], name: str = "default") -> None:
    """Copy tensors named as by `lora_state_dict` into the LoRA called `name`, in place.

    Raises ValueError, with nothing changed, naming every missing key, unknown key and wrong shape.
    """
    own = lora_state_dict(module, name)
    problems = [f"{key} is missing" for key in own if key not in state]
    problems += [f"{key} has no layer here" for key in state if key not in own]
    problems += [
        f"{key} is {tuple(state[key].shape)} and should be {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if problems:
        raise ValueError("cannot load LoRA: " + "; ".join(problems))
    for key, tensor in own.items():
        tensor.copy_(state[key])


def _layers_with(module: nn.Module, name: str | None = None) -> dict[str, LoRALinear]:
    """Return the layers that carry the LoRA called `name` (any by default), or raise if none does."""
    layers = {p: layer for p, layer in lora_layers(module).items() if name is None or name in layer.adapters}
    if not layers:
        which = "" if name is None else f" named {name!r}"
        raise ValueError(f"this {type(module).__name__} carries no LoRA{which}; inject_lora or load_lora first")
    return layers


def _require(layers: dict[str, LoRALinear], merged: bool, what: str) -> None:
    """Raise RuntimeError unless every layer's merged state is as wanted."""
    wrong = [path for path, layer in layers.items() if layer.merged != merged]
    if wrong:
        state, remedy = ("not merged", "merge_lora") if merged else ("merged", "unmerge_lora")
        raise RuntimeError(f"{what}: {', '.join(wrong[:3])} … is {state}; call {remedy} first")
