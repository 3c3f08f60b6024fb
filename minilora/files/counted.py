"""LoRA files of cloneofsimo's trainer, which number their modules without naming them: unet:7:down, unet:7:up.

The metadata name classes, and what is counted are the layers in modules of these classes, in the order of the model.
Source: cloneofsimo's lora d84074b.
"""

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ..settings.strict_json import parse_json
from .deltas import FormatError
from .names import TEXT_ENCODER, Modules, last_layer
from .tensors import Tensors

COUNTED = re.compile(r"(unet|text_encoder):(\d+):(up|down)")
_IN_ATTENTION = [f"attn{n}.to_{leaf}" for n in (1, 2) for leaf in ("q", "k", "v", "out.0")]
# The layers in a module of each class, in the order in which a model lists its modules.
_LEAVES = {
    "CrossAttention": _IN_ATTENTION,
    "Attention": _IN_ATTENTION,
    "GEGLU": ["ff.net.0.proj"],
    "CLIPAttention": [f"self_attn.{leaf}_proj" for leaf in ("k", "v", "q", "out")],
}
# The order of the parts of a block in diffusers today, and that before 0.12.
_ORDERS = [("self_attn", "attn1", "attn2", "ff"), ("self_attn", "attn1", "ff", "attn2")]

Parts = dict[tuple[int, str], np.ndarray]  # by a module's number, and "up" or "down"


def with_names(
    path: Path, tensors: Tensors, metadata: dict[str, str], modules: Modules | None
) -> tuple[Tensors, list[str]]:
    """Return the tensors of a file under diffusers' names, and the unmatched keys."""
    if modules is None:
        raise FormatError(f"{path}: it numbers its modules without naming them; give the base it was trained for")
    result: Tensors = {}
    unmatched: list[str] = []
    counted: dict[str, Parts] = {}
    for key, tensor in tensors.items():
        match = COUNTED.fullmatch(key)
        if not match:
            raise FormatError(f"{path}: {key} is not a key of a LoRA")
        counted.setdefault(match[1], {})[int(match[2]), match[3]] = tensor
    for component, parts in counted.items():
        mine = [name for name in modules if name.startswith(f"{component}.")]
        if not mine:
            unmatched += [f"{component}:{number}:{direction}" for number, direction in parts]
            continue
        try:
            classes = parse_json(metadata[component])
            orders = _orders(mine, classes)
            if component == TEXT_ENCODER:  # Stable Diffusion 2's has a layer more in a single file than in a folder
                last = last_layer(mine)
                orders += _orders([name for name in mine if not name.startswith(last)], classes)
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"{path}: it numbers unknown modules of {component} ({error})") from error
        order = next((order for order in orders if _fits(order, parts, modules)), None)
        if order is None:
            raise FormatError(f"{path}: its {len(parts) // 2} modules of {component} are not those of this base")
        for (number, direction), tensor in parts.items():
            result[f"{order[number]}.lora.{direction}.weight"] = tensor
    return result, unmatched


def _orders(modules: Iterable[str], classes: Iterable[str]) -> list[list[str]]:
    """Return the modules in the given classes, once in each possible order of counting.

    Raises KeyError for a class whose modules are not known.
    """
    leaves = dict.fromkeys(leaf for name in sorted(classes) for leaf in _LEAVES[name])

    def place(owner: str) -> tuple:
        # Down, up, then the middle block, which is created last; within these by number.
        block = re.search(r"\.(down|up|mid)_block", owner)
        numbers = [int(n) for n in re.findall(r"(?<=\.)\d+(?=\.)", owner)]
        return ("down", "up", "mid").index(block[1]) if block else 0, numbers

    owners: dict[str, dict[str, str]] = {}
    for name in modules:
        for leaf in leaves:
            if name.endswith(f".{leaf}") and ".motion_modules." not in name:
                owners.setdefault(name.removesuffix(leaf), {})[leaf] = name
    orders = []
    for parts in _ORDERS:
        order = [leaf for part in parts for leaf in leaves if leaf.startswith(part)]
        orders.append([owners[o][leaf] for o in sorted(owners, key=place) for leaf in order if leaf in owners[o]])
    return orders


def _fits(order: list[str], parts: Parts, modules: Modules) -> bool:
    """Whether the tensors have the shapes of the modules, numbered in this order."""
    if {number for number, _ in parts} != set(range(len(order))):
        return False
    for (number, direction), tensor in parts.items():
        axis = 0 if direction == "up" else 1
        if tensor.ndim < 2 or tensor.shape[axis] != modules[order[number]][axis]:
            return False
    return True
