"""models/targets.py: which layers a LoRA goes into, and with which rank and alpha."""

import pytest
from conftest import make_unet
from torch import nn

from minilora import inject_lora
from minilora.lora import ATTENTION, matching
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


def test_the_blocks_together_are_the_whole(tiny_unet):
    for what in ("attention", "ff", "linear", "conv", "attention+ff", "linear+conv", "attention+conv1", "to_q"):
        whole = matching(tiny_unet, named_targets(tiny_unet, [what]))
        parts = [named_targets(tiny_unet, [f"{block}:{what}"]) for block in ("down_blocks", "mid_block", "up_blocks")]
        assert sorted(whole) == sorted(path for part in parts for path in part), what
        for part, start in zip(parts, ("down_blocks.", "mid_block.", "up_blocks."), strict=True):
            assert all(path.startswith(start) for path in part)
            assert part, what
    both = named_targets(tiny_unet, ["up_blocks.1:attention", "mid_block:attention+ff"])
    assert both == named_targets(tiny_unet, ["up_blocks.1:attention"]) + named_targets(
        tiny_unet, ["mid_block:attention", "mid_block:ff"]
    )
    assert list(ranks_and_alphas(tiny_unet, both, 2)[0]) == both
    inject_lora(tiny_unet, 2, targets=both)
    assert named_targets(tiny_unet, ["up_blocks.1:attention", "mid_block:attention+ff"]) == both


def test_a_block_without_such_layers_names_those_that_have_them(tiny_unet):
    with pytest.raises(ValueError, match=r"target 'up_blocks\.7:attention' matches no layer; ") as told:
        named_targets(tiny_unet, ["up_blocks.7:attention", "to_q", "down_blocks.1:attention", "mid_block:to_w"])
    every = "the blocks are down_blocks.0, down_blocks.1, mid_block, up_blocks.0, up_blocks.1"
    assert [problem.split("; ", 1)[1] for problem in str(told.value).split("target ")[1:]] == [
        f"{every}; ",
        "attention is in down_blocks.0, mid_block, up_blocks.1; ",
        every,
    ]
    with pytest.raises(ValueError, match="'up:ff' matches no layer"):  # a part of a part is none
        named_targets(tiny_unet, ["up:ff"])


def test_subject_and_style_are_the_blocks_of_b_lora_and_no_other_base_has_them(tiny_unet):
    """As in blora_utils.py of its authors: the attention processors in the block, with four matrices each."""
    unet = make_unet("sdxl")
    for name, block in (("subject", "up_blocks.0.attentions.0"), ("style", "up_blocks.0.attentions.1")):
        there = [key.removesuffix("processor") for key in unet.attn_processors if key.startswith(f"{block}.")]
        expected = {start + matrix for start in there for matrix in ATTENTION}
        assert set(named_targets(unet, [name])) == expected
        assert set(named_targets(unet, [f"{name}:attention+ff"])) > expected
    similar = make_unet("sd1", up_block_types=("CrossAttnUpBlock2D",) * 3)  # the bundled base has such names, too
    for other in (make_unet("sd1"), make_unet("sd2"), tiny_unet, similar):
        with pytest.raises(ValueError, match="'style' is a block that only Stable Diffusion XL and bases made of"):
            named_targets(other, ["style"])


def test_ranks_by_parts_of_names(tiny_unet):
    ranks, alphas = ranks_and_alphas(tiny_unet, ["attention+ff"], 4, 2.0, {"attn2": 2, "ff": 6, "mid_block": 3})
    layers = inject_lora(tiny_unet, ranks, alphas)
    for path, layer in layers.items():
        adapter = layer.adapters["default"]
        expected = 3 if path.startswith("mid_block") else 2 if ".attn2." in path else 6 if ".ff." in path else 4
        assert adapter.rank == expected, path
        assert adapter.scale == pytest.approx(0.5), path  # the same everywhere
    with pytest.raises(ValueError, match="rank for 'attn' matches none of the layers"):
        ranks_and_alphas(tiny_unet, ATTENTION, 4, rank_for={"attn": 2})  # a part of a part is none


def test_alphas_by_parts_of_names(tiny_unet):
    parts = {"rank_for": {"attn2": 2}, "alpha_for": {"attn2": 6, "mid_block": 1.5}}
    layers = inject_lora(tiny_unet, *ranks_and_alphas(tiny_unet, ATTENTION, 4, 2.0, **parts))
    inject_lora(tiny_unet, *ranks_and_alphas(tiny_unet, ATTENTION, 4, **parts), name="other")
    for path, layer in layers.items():
        expected = 1.5 if path.startswith("mid_block") else 6 if ".attn2." in path else 2.0
        assert layer.adapters["default"].alpha == expected, path
        assert layer.adapters["other"].alpha == (4 if expected == 2.0 else expected), path  # the rank, as ever
    with pytest.raises(ValueError, match="rank for 'ff' matches none of the layers; alpha for 'conv1' matches none"):
        ranks_and_alphas(tiny_unet, ATTENTION, 4, rank_for={"ff": 2}, alpha_for={"conv1": 1})
