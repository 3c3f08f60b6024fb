"""models/targets.py: which layers a LoRA goes into, and with which rank and alpha."""

import pytest
from torch import nn

from minilora import inject_lora
from minilora.lora import ATTENTION
from minilora.models.targets import named_targets, ranks_and_alphas


def test_sets_stand_for_what_is_said(tiny_unet):
    sets = {name: set(named_targets(tiny_unet, [name])) for name in ("linear", "linear+conv")}
    inside = {path: child for path, child in tiny_unet.named_modules() if path.startswith(("down", "mid", "up"))}
    linear = {path for path, child in inside.items() if isinstance(child, nn.Linear)}
    assert sets["linear"] == linear
    assert sets["linear+conv"] == linear | {path for path, child in inside.items() if isinstance(child, nn.Conv2d)}
    assert named_targets(tiny_unet, ["attention"]) == list(ATTENTION)
    assert named_targets(tiny_unet, ["attention+ff", "to_q", "conv1"]) == [
        *ATTENTION,
        *("ff.net.0.proj", "ff.net.2", "conv1"),
    ]
    for name in ("attention", "attention+ff", "linear", "linear+conv"):
        chosen = named_targets(tiny_unet, [name])
        count = len(inject_lora(tiny_unet, 2, targets=chosen, name=name))
        assert chosen == named_targets(tiny_unet, [name])  # with a LoRA in the layers, too
        assert count == len(inject_lora(tiny_unet, 2, targets=chosen, name=f"{name} again"))  # beside the first
    with pytest.raises(ValueError, match="target 'linear' matches no module"):
        ranks_and_alphas(nn.Sequential(nn.Linear(2, 2)), ["linear"], 1)


def test_ranks_by_parts_of_names(tiny_unet):
    ranks, alphas = ranks_and_alphas(tiny_unet, ["attention+ff"], 4, 2.0, {"attn2": 2, "ff": 6, "mid_block": 3})
    layers = inject_lora(tiny_unet, ranks, alphas)
    for path, layer in layers.items():
        adapter = layer.adapters["default"]
        expected = 3 if path.startswith("mid_block") else 2 if ".attn2." in path else 6 if ".ff." in path else 4
        assert adapter.rank == expected, path
        assert adapter.scale == pytest.approx(0.5), path  # the same everywhere
    with pytest.raises(ValueError, match="rank for 'attn' fits none of the layers"):
        ranks_and_alphas(tiny_unet, ATTENTION, 4, rank_for={"attn": 2})  # a part of a part is none


def test_alphas_by_parts_of_names(tiny_unet):
    parts = {"rank_for": {"attn2": 2}, "alpha_for": {"attn2": 6, "mid_block": 1.5}}
    layers = inject_lora(tiny_unet, *ranks_and_alphas(tiny_unet, ATTENTION, 4, 2.0, **parts))
    inject_lora(tiny_unet, *ranks_and_alphas(tiny_unet, ATTENTION, 4, **parts), name="other")
    for path, layer in layers.items():
        expected = 1.5 if path.startswith("mid_block") else 6 if ".attn2." in path else 2.0
        assert layer.adapters["default"].alpha == expected, path
        assert layer.adapters["other"].alpha == (4 if expected == 2.0 else expected), path  # the rank, as ever
    with pytest.raises(ValueError, match="rank for 'ff' fits none of the layers; alpha for 'conv1' fits none"):
        ranks_and_alphas(tiny_unet, ATTENTION, 4, rank_for={"ff": 2}, alpha_for={"conv1": 1})
