"""Which layers a LoRA adapts, and with which rank: names for groups of layers, and parts of names.

    attention         the projections of the attention layers: to_q, to_k, to_v, to_out.0
    ff                the two feed-forward layers after each: ff.net.0.proj, ff.net.2
    linear            every linear layer inside the blocks of a U-Net
    conv              every convolution there, except grouped ones
    attention+ff      several of these, and name endings: attention+proj_in
    up_blocks.1:ff    those in one block, which is the beginning of their names
    subject, style    the attention in one block of Stable Diffusion XL each

No group contains the layers before and after the blocks, which hardly differ between the bases of a family.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..files.names import blocks_of
from ..lora import ATTENTION, matching, original_layers
from ..settings.errors import refuse

SETS = {"attention": ATTENTION, "ff": ("ff.net.0.proj", "ff.net.2")}
KINDS = {"linear": nn.Linear, "conv": nn.Conv2d}
BLOCKS = ("down_blocks.", "mid_block.", "up_blocks.")
# What is in a picture, and how it is drawn, in Stable Diffusion XL.
# Source: Frenkel et al., "Implicit style-content separation using B-LoRA", 2024.
XL_BLOCKS = {"subject": "up_blocks.0.attentions.0", "style": "up_blocks.0.attentions.1"}


def named_targets(module: nn.Module, targets: Sequence[str]) -> list[str]:
    """Return targets with the names of groups and blocks replaced by their layers.

    Raises ValueError, which names every target whose block has no such layers.
    """
    layers, result = original_layers(module), list[str]()
    problems: list[str] = []
    for target in targets:
        block, _, what = (f"{target}:attention" if target in XL_BLOCKS else target).rpartition(":")
        names = _names(layers, what)
        if block:
            anywhere = [path for path in layers if any(f".{path}".endswith(f".{name}") for name in names)]
            start = XL_BLOCKS.get(block, block)
            names = [path for path in anywhere if f"{path}.".startswith(f"{start}.")]
            if block in XL_BLOCKS and not {start, "add_embedding"} <= layers.keys():
                problems.append(f"target {target!r} is a block that only Stable Diffusion XL and bases made of it have")
            elif not names:
                known = anywhere if start in layers else []
                there = f"{what} is in" if known else "the blocks are"
                problems.append(f"target {target!r} matches no layer; {there} {', '.join(blocks_of(known or layers))}")
        result += names
    refuse("inject LoRA", problems)
    return list(dict.fromkeys(result))


def _names(layers: Mapping[str, nn.Module], what: str) -> list[str]:
    """Return the name endings that groups, joined by +, stand for; for a kind of layers, their full names."""
    parts = what.split("+")
    kinds = tuple(KINDS[part] for part in parts if part in KINDS)
    found = [
        path
        for path, layer in layers.items()
        if path.startswith(BLOCKS) and isinstance(layer, kinds) and getattr(layer, "groups", 1) == 1
    ]
    ends = [end for part in parts if not (found and part in KINDS) for end in SETS.get(part, (part,))]
    return found + ends


def ranks_and_alphas(
    module: nn.Module,
    targets: Sequence[str],
    rank: int,
    alpha: float | None = None,
    rank_for: Mapping[str, int] | None = None,
    alpha_for: Mapping[str, float] | None = None,
) -> tuple[dict[str, int], dict[str, float]]:
    """Return the rank and the alpha of each layer that a LoRA adapts, by full name, as `inject_lora` takes them.

    `rank_for` maps a part of a layer's name, such as "attn2" or "ff.net.2", to a rank at the same scale; `alpha_for`
    maps it to an alpha.  The last match wins.  Raises ValueError, naming every target and part that matches nothing.
    """
    found = matching(module, named_targets(module, targets))
    problems: list[str] = []

    def by_part(what: str, given: Mapping[str, Any] | None) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for part, value in (given or {}).items():
            fitting = [path for path in found if f".{part}." in f".{path}."]
            problems.extend([] if fitting else [f"{what} for {part!r} matches none of the layers"])
            result |= dict.fromkeys(fitting, value)
        return result

    ranks = dict.fromkeys(found, rank) | by_part("rank", rank_for)
    alphas = {} if alpha is None else {path: alpha * there / rank for path, there in ranks.items()}
    alphas |= by_part("alpha", alpha_for)
    refuse("inject LoRA", problems)
    return ranks, alphas
