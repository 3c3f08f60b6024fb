"""Which layers a LoRA goes into, and with which rank: names for groups of layers, and parts of names.

    attention      the projections of the attention layers: to_q, to_k, to_v, to_out.0
    attention+ff   and the two layers behind each: ff.net.0.proj, ff.net.2
    linear         every linear layer inside the blocks of a U-Net
    linear+conv    and every convolution there, but those in groups

No group contains the layers before and behind the blocks, which are nearly the same in all bases of a family.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..lora import ATTENTION, matching, original_layers
from ..settings.errors import refuse

SETS = {"attention": ATTENTION, "attention+ff": (*ATTENTION, "ff.net.0.proj", "ff.net.2")}
KIND_SETS = {"linear": (nn.Linear,), "linear+conv": (nn.Linear, nn.Conv2d)}
BLOCKS = ("down_blocks.", "mid_block.", "up_blocks.")


def named_targets(module: nn.Module, targets: Sequence[str]) -> list[str]:
    """Return targets with the names of groups replaced by the layers that they stand for."""
    result: list[str] = []
    for target in targets:
        kinds = KIND_SETS.get(target, ())
        found = [
            path
            for path, layer in original_layers(module).items()
            if path.startswith(BLOCKS) and isinstance(layer, kinds) and getattr(layer, "groups", 1) == 1
        ]
        result += found or SETS.get(target, (target,))
    return list(dict.fromkeys(result))


def ranks_and_alphas(
    module: nn.Module,
    targets: Sequence[str],
    rank: int,
    alpha: float | None = None,
    rank_for: Mapping[str, int] | None = None,
    alpha_for: Mapping[str, float] | None = None,
) -> tuple[dict[str, int], dict[str, float]]:
    """Return the rank and the alpha of each layer that a LoRA goes into, by full name, as `inject_lora` takes them.

    `rank_for` maps a part of a layer's name, as "attn2" or "ff.net.2", to a rank at the same scale; `alpha_for`
    maps it to an alpha.  The last match wins.  Raises ValueError, naming every target and part that matches nothing.
    """
    found = matching(module, named_targets(module, targets))
    problems: list[str] = []

    def by_part(what: str, given: Mapping[str, Any] | None) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for part, value in (given or {}).items():
            fitting = [path for path in found if f".{part}." in f".{path}."]
            problems.extend([] if fitting else [f"{what} for {part!r} fits none of the layers"])
            result |= dict.fromkeys(fitting, value)
        return result

    ranks = dict.fromkeys(found, rank) | by_part("rank", rank_for)
    alphas = {} if alpha is None else {path: alpha * there / rank for path, there in ranks.items()}
    alphas |= by_part("alpha", alpha_for)
    refuse("inject LoRA", problems)
    return ranks, alphas
