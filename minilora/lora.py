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

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

# The attention projections of diffusers' U-Nets; files/names.py has them too, but this file needs nothing but torch.
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
SETS = {"attention": ATTENTION, "attention+ff": (*ATTENTION, "ff.net.0.proj", "ff.net.2")}
KIND_SETS = {"linear": (nn.Linear,), "linear+conv": (nn.Linear, nn.Conv2d)}  # all of a kind inside a U-Net's blocks
BLOCKS = ("down_blocks.", "mid_block.", "up_blocks.")


class Adapter(nn.Module):
    """One low-rank change, ΔW = (alpha / rank) · B A, and the strength it is applied with.

    `lora_A` is (rank, in), for a convolution (rank, in, height, width), gaussian with standard deviation
    1 / rank; `lora_B` is (out, rank), zero.  Both are float32 whatever the base is: half precision would
    round the small steps of training away.
    """

    def __init__(self, weight: torch.Tensor, rank: int, alpha: float, generator=None):
        super().__init__()
        self.rank = rank
        self.alpha = alpha
        self.strength: float | torch.Tensor = 1.0  # a tensor: one for each picture of a batch, (batch,)
        # In training, what each picture's input features are multiplied with, (batch, in); None: all stay.  Dropout
        # is 0 for some of them and 1 / (1 − p) for the others.
        self.keep: torch.Tensor | None = None
        # Drawn on the CPU, so that a seed means the same numbers on every device.
        gaussian = torch.randn(rank, *weight.shape[1:], generator=generator) / rank
        zeros = torch.zeros(len(weight), rank)
        self.lora_A = nn.Parameter(gaussian.to(weight.device))  # (rank, in)
        self.lora_B = nn.Parameter(zeros.to(weight.device))  # (out, rank)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def delta(self) -> torch.Tensor:
        """Return strength · ΔW in float32 and in the shape of the weight, (out, in).

        Raises ValueError where each picture has a strength of its own: there is no one ΔW then.
        """
        if isinstance(self.strength, torch.Tensor):
            raise ValueError("each picture of the batch has a strength of its own; merging needs one number")
        product = self.lora_B.detach() @ self.lora_A.detach().flatten(1)
        return (self.strength * self.scale * product).unflatten(1, self.lora_A.shape[1:])

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}, strength={self.strength}"


class LoRALayer(nn.Module):
    """A layer with low-rank changes beside it: y = base(x) + Σ sᵢ · (alphaᵢ / rankᵢ) · Bᵢ (Aᵢ x).

    `base` is the original layer itself, not a copy.  `adapters` maps a name to an Adapter.  Those whose
    names are in `merged` are in the base's weight and not in the sum.  The rank may be above min(in, out),
    as in some files, though nothing is gained by it.
    """

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

    def add(self, rank: int, alpha: float | None, name: str, generator=None) -> None:
        """Add one more change, under a new name; alpha defaults to the rank."""
        alpha = rank if alpha is None else alpha
        self.adapters[name] = Adapter(self.base.weight, rank, alpha, generator).train(self.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)  # (…, out)
        if self.enabled:
            for name, adapter in self.adapters.items():
                if name not in self.merged:
                    y = y + self.branch(x, adapter).to(y.dtype)
        return y

    def branch(self, x: torch.Tensor, adapter: Adapter) -> torch.Tensor:
        """Return strength · ΔW x without ever forming ΔW; (…, in) -> (…, out)."""
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(adapter.lora_A.dtype)
        if self.training and adapter.keep is not None:
            shape = [len(x), *[1] * (x.ndim - 1)]
            shape[self.features] = -1
            x = x * adapter.keep.view(shape)  # (batch, …, in)
        down = self.down(x, adapter.lora_A)  # (…, rank)
        strength = adapter.strength
        if isinstance(strength, torch.Tensor):
            strength = strength.to(down).view(-1, *[1] * (down.ndim - 1))  # (batch, 1, …)
        return self.up(down * (strength * adapter.scale), adapter.lora_B)  # (…, out)

    @torch.no_grad()
    def merged_weight(self, names: Iterable[str]) -> torch.Tensor:
        """Return W + Σ sᵢ · ΔWᵢ over the names, summed in float32 and rounded once to W's own type; (out, in)."""
        weight = self.base.weight if self.original_weight is None else self.original_weight
        chosen = [adapter.delta() for name, adapter in self.adapters.items() if name in names]
        return (weight.float() + sum(chosen)).to(weight.dtype)

    @torch.no_grad()
    def merge(self, names: Iterable[str]) -> None:
        """Put these changes into the base's weight too, and keep the original."""
        if self.original_weight is None:
            self.original_weight = self.base.weight.detach().clone()
        self.merged.update(names)
        self.base.weight.copy_(self.merged_weight(self.merged))

    @torch.no_grad()
    def unmerge(self, names: Iterable[str]) -> None:
        """Take these changes out of the base's weight; without any it is the original, bit for bit."""
        self.merged.difference_update(names)
        self.base.weight.copy_(self.merged_weight(self.merged) if self.merged else self.original_weight)
        if not self.merged:
            self.original_weight = None


class LoRALinear(LoRALayer):
    """A linear layer with low-rank changes beside it; A is (rank, in), B is (out, rank)."""

    features = -1  # the dimension of x that W and A map from
    down = staticmethod(F.linear)
    up = staticmethod(F.linear)


class LoRAConv2d(LoRALayer):
    """A convolution with low-rank changes beside it: A is a convolution to `rank` channels, B one of 1 × 1.

    A, (rank, in, height, width), has the stride, padding and dilation of the base, so B A is a change
    of the base's weight: ΔW[o, i, h, w] = (alpha / rank) · Σᵣ B[o, r] A[r, i, h, w].
    """

    features = 1

    def down(self, x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return self.base._conv_forward(x, a, None)  # (batch, rank, h, w); with the base's own padding and stride

    @staticmethod
    def up(x: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, b[..., None, None])  # (batch, out, h, w)


KINDS = {nn.Linear: LoRALinear, nn.Conv2d: LoRAConv2d}


# ------------------------------------------------------------------------- putting it in, taking it out


def lora_layers(module: nn.Module) -> dict[str, LoRALayer]:
    """Return the layers that carry LoRA, by full name; empty if there are none."""
    return {name: child for name, child in module.named_modules() if isinstance(child, LoRALayer)}


def inject_lora(
    module: nn.Module,
    rank: int = 8,
    alpha: float | None = None,
    targets: Sequence[str] = ATTENTION,
    name: str = "default",
    generator: torch.Generator | None = None,
    rank_for: Mapping[str, int] | None = None,
    alpha_for: Mapping[str, float] | None = None,
) -> dict[str, LoRALayer]:
    """Put a new LoRA into `module`, in place, and freeze everything else; return its layers by full name.

    A linear layer or convolution is a target if its full name is one of `targets` or ends with "." and
    one of them: "to_q" means …attn1.to_q, not …foo_to_q.  Some names stand for many: see `named_targets`.
    `alpha` defaults to the rank, a scale of 1.  `rank_for` gives layers with a part of their name, as
    "attn2" or "ff.net.2", another rank, at the same scale; of several that fit the last counts.  `alpha_for`
    gives such layers another alpha.  Another `name` puts a second LoRA beside the first.

    Raises ValueError, naming every module concerned, for a target that matches nothing or matches
    something else, a convolution in groups, a rank that does not fit, a name that is in use.
    """
    targets = named_targets(module, targets)
    layers = lora_layers(module)
    inside = {f"{path}.{inner}" for path, layer in layers.items() for inner, _ in layer.named_modules() if inner}
    paths = [path for path, _ in module.named_modules() if path not in inside]
    matches = {target: [path for path in paths if f".{path}".endswith(f".{target}")] for target in targets}
    problems = [f"target {target!r} matches no module" for target, found in matches.items() if not found]
    found = list(dict.fromkeys(path for found in matches.values() for path in found))

    def for_parts(what: str, given: Mapping[str, float] | None) -> dict[str, float]:
        result = {}
        for part, value in (given or {}).items():
            mine = [path for path in found if f".{part}." in f".{path}."]
            problems.extend([] if mine else [f"{what} for {part!r} fits none of the layers"])
            result |= dict.fromkeys(mine, value)
        return result

    ranks = dict.fromkeys(found, rank) | for_parts("rank", rank_for)
    alphas = {} if alpha is None else {path: alpha * there / rank for path, there in ranks.items()}
    alphas |= for_parts("alpha", alpha_for)
    for path, rank_there in ranks.items():
        layer = layers[path].base if path in layers else module.get_submodule(path)
        if isinstance(layer, tuple(KINDS)):
            inputs, outputs = layer.weight[0].numel(), len(layer.weight)
            if not 1 <= rank_there <= min(inputs, outputs):
                wrong = f"rank {rank_there} is not between 1 and the smaller of them"
                problems.append(f"{path} maps {inputs} to {outputs} features; {wrong}")
    return add_lora(module, ranks, alphas, name, generator, problems)


def named_targets(module: nn.Module, targets: Sequence[str]) -> list[str]:
    """Return targets with those that stand for many replaced by what they stand for.

    attention      the projections of the attention layers: to_q, to_k, to_v, to_out.0
    attention+ff   and the two layers behind each: ff.net.0.proj, ff.net.2
    linear         every linear layer inside the blocks of a U-Net
    linear+conv    and every convolution there, but those in groups

    The layers before and behind the blocks, which all bases of a family nearly share, are in none.
    """
    layers, result = lora_layers(module), []
    inside = tuple(f"{path}." for path in layers)
    there = {p: layers[p].base if p in layers else c for p, c in module.named_modules() if not p.startswith(inside)}
    for target in targets:
        kinds = KIND_SETS.get(target, ())
        found = [
            path
            for path, child in there.items()
            if path.startswith(BLOCKS) and isinstance(child, kinds) and getattr(child, "groups", 1) == 1
        ]
        result += found or SETS.get(target, (target,))
    return list(dict.fromkeys(result))


def add_lora(
    module: nn.Module,
    ranks: Mapping[str, int],
    alphas: Mapping[str, float] | None = None,
    name: str = "default",
    generator: torch.Generator | None = None,
    problems: Sequence[str] = (),
) -> dict[str, LoRALayer]:
    """Do what `inject_lora` does at exactly the layers in `ranks`, by full name, each with its own rank and alpha.

    Raises ValueError, with nothing changed, for `problems` found before and all that are found here.
    """
    problems = list(problems)
    if "." in name or not name:
        problems.append(f"name {name!r} is empty or has a dot in it")
    found = {path: module.get_submodule(path) for path in ranks}
    for path, child in found.items():
        layer = child.base if isinstance(child, LoRALayer) else child
        if not isinstance(layer, tuple(KINDS)):
            problems.append(f"{path} is a {type(layer).__name__}; only Linear and Conv2d can take a LoRA")
        elif getattr(layer, "groups", 1) != 1:
            problems.append(f"{path} is a convolution in {layer.groups} groups, of which A B is no change")
        elif isinstance(child, LoRALayer) and name in child.adapters:
            problems.append(f"{path} has a LoRA {name!r} already, of rank {child.adapters[name].rank}")
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError("cannot inject LoRA: " + "; ".join(problems[:5]) + more)

    module.requires_grad_(False)
    for path, child in found.items():
        if isinstance(child, LoRALayer):
            child.add(ranks[path], (alphas or {}).get(path), name, generator)
        else:
            kind = next(kind for layer, kind in KINDS.items() if isinstance(child, layer))
            layer = kind(child, ranks[path], (alphas or {}).get(path), name, generator)
            module.set_submodule(path, layer.train(child.training))
    return {path: module.get_submodule(path) for path in found}


def remove_lora(module: nn.Module, name: str | None = None) -> None:
    """Take the LoRA called `name` (all by default) out of `module`, in place.

    A layer that carries no other gets its original object back, still frozen.  Raises
    RuntimeError while merged, since the change would stay behind unseen.
    """
    layers = _layers_with(module, name)
    _require(layers, merged=False, what="remove_lora", name=name)
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


def set_lora_scale(module: nn.Module, strength: float | torch.Tensor, name: str | None = None) -> None:
    """Set how strongly the LoRA called `name` (all by default) acts: 0 is the base, 1 is as trained.

    A tensor, (batch,), gives each picture of a batch a strength of its own.
    """
    layers = _layers_with(module, name)
    _require(layers, merged=False, what="set_lora_scale", name=name)
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


def merge_lora(module: nn.Module, name: str | None = None) -> None:
    """Fold the LoRA called `name` (all by default), at its strength, into the weights: W ← W + Σ sᵢ · ΔWᵢ.

    The sum is computed in float32 and rounded once to the weight's own type.  Each layer keeps its
    original weight until `unmerge_lora`.  Raises RuntimeError if merged already, ValueError, with
    nothing changed, if a merged weight would not be finite.
    """
    layers = _layers_with(module, name)
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
    layers = _layers_with(module, name)
    if name is None and any(layer.merged for layer in layers.values()):
        layers = {path: layer for path, layer in layers.items() if layer.merged}
    _require(layers, merged=True, what="unmerge_lora", name=name)
    for layer in layers.values():
        layer.unmerge([name] if name else list(layer.merged))


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


def _layers_with(module: nn.Module, name: str | None = None) -> dict[str, LoRALayer]:
    """Return the layers that carry the LoRA called `name` (any by default), or raise if none does."""
    layers = {p: layer for p, layer in lora_layers(module).items() if name is None or name in layer.adapters}
    if not layers:
        which = "" if name is None else f" named {name!r}"
        raise ValueError(f"this {type(module).__name__} carries no LoRA{which}; inject_lora or load_lora first")
    return layers


def _require(layers: dict[str, LoRALayer], merged: bool, what: str, name: str | None = None) -> None:
    """Raise RuntimeError unless in every layer the LoRA called `name` (any by default) is merged, or is not."""
    there = {path: name in layer.merged if name else bool(layer.merged) for path, layer in layers.items()}
    wrong = [path for path in layers if there[path] != merged]
    if wrong:
        state, remedy = ("not merged", "merge_lora") if merged else ("merged", "unmerge_lora")
        raise RuntimeError(f"{what}: {', '.join(wrong[:3])} … is {state}; call {remedy} first")
