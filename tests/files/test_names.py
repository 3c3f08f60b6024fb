"""files/names.py: every name of a module, with diffusers' own converter as the oracle for the original layout."""

import re

import pytest
import torch
from conftest import make_tiny_text_encoder, make_unet
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from minilora.files import names
from minilora.files.network import live_modules
from minilora.settings.errors import UserError


def with_weights(module: torch.nn.Module) -> list[str]:
    return [path for path, child in module.named_modules() if next(child.parameters(recurse=False), None) is not None]


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_original_names_are_those_that_diffusers_reads(family):
    unet = make_unet(family)
    paths = with_weights(unet)
    originals = names.original_unet_paths(paths)
    assert originals.keys() == set(paths)
    state = unet.state_dict()
    single = {}
    for key, tensor in state.items():
        path, leaf = key.rsplit(".", 1)
        single[f"model.diffusion_model.{originals[path]}.{leaf}"] = tensor
    config = {**unet.config, "class_embed_type": None}
    converted = convert_ldm_unet_checkpoint(single, config)
    assert converted.keys() == state.keys()
    assert all(torch.equal(converted[key], state[key]) for key in state)
    assert names.diffusers_unet_paths(originals.values()) == {theirs: ours for ours, theirs in originals.items()}


@pytest.mark.parametrize("kind", [CLIPTextModel, CLIPTextModelWithProjection])
def test_text_encoders_have_one_name_whatever_the_live_model_calls_its_modules(kind, tokenizer):
    live = live_modules(make_tiny_text_encoder(tokenizer, kind))
    component = "text_encoder" if kind is CLIPTextModel else "text_encoder_2"
    assert f"{component}.text_model.encoder.layers.1.self_attn.q_proj" in live
    assert f"{component}.text_model.encoder.layers.0.mlp.fc1" in live


def test_kohya_names_are_those_of_its_trainer():
    sd1 = names.kohya_names([*live_modules(make_unet("sd1")), "text_encoder.text_model.encoder.layers.0.mlp.fc1"])
    assert sd1["unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"] == (
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"
    )
    assert sd1["text_encoder.text_model.encoder.layers.0.mlp.fc1"] == "lora_te_text_model_encoder_layers_0_mlp_fc1"
    encoders = (
        "text_encoder.text_model.encoder.layers.0.mlp.fc1",
        "text_encoder_2.text_model.encoder.layers.0.mlp.fc1",
    )
    sdxl = names.kohya_names([*live_modules(make_unet("sdxl")), *encoders])
    assert sdxl["unet.down_blocks.1.attentions.0.proj_in"] == "lora_unet_input_blocks_4_1_proj_in"
    assert sdxl["unet.up_blocks.0.upsamplers.0.conv"] == "lora_unet_output_blocks_2_2_conv"
    assert sdxl["unet.down_blocks.0.resnets.0.conv1"] == "lora_unet_input_blocks_1_0_in_layers_2"
    assert [sdxl[name].split("_text_model")[0] for name in encoders] == ["lora_te1", "lora_te2"]


def test_each_module_has_the_factor_of_the_longest_block_around_it(tokenizer):
    encoders = make_tiny_text_encoder(tokenizer), make_tiny_text_encoder(tokenizer, CLIPTextModelWithProjection)
    modules = [name for part in (make_unet("sdxl"), *encoders) for name in live_modules(part)]
    assert set(names.block_factors(modules, {}).values()) == {1.0}
    given = {"up_blocks.1": 0.5, "up": -2.0, "down": 0.2, "down_blocks.1.attentions.0": 3.0, "conv_in": 0.0}
    expected = {
        "unet.up_blocks.1.": 0.5,
        "unet.up_blocks.": -2.0,
        "unet.down_blocks.1.attentions.0.": 3.0,
        "unet.down_blocks.": 0.2,
        "unet.conv_in": 0.0,
    }
    for name, factor in names.block_factors(modules, given).items():
        assert factor == next((f for start, f in expected.items() if name.startswith(start)), 1.0), name
    for given, of_both in (({"text": 0.5}, (0.5, 0.5)), ({"text": 0.5, "text_encoder_2": 4.0}, (0.5, 4.0))):
        for name, factor in names.block_factors(modules, given).items():
            assert factor == {"unet": 1.0, "text_encoder": of_both[0], "text_encoder_2": of_both[1]}[name.split(".")[0]]
    few = ["unet.up_blocks.1.x.to_q", "unet.mid_block.x.to_q", "unet.up_blocks.10.x.to_q", "unet.conv_in"]
    said = "--lora-blocks down, up_blocks.0, text: no layer of a LoRA is there; they are in mid_block, up_blocks.1, "
    with pytest.raises(UserError, match=re.escape(f"{said}up_blocks.10")):
        names.block_factors(few, {"down": 1.0, "mid": 1.0, "up_blocks.0": 1.0, "text": 1.0})


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_no_two_modules_share_a_name(family, tokenizer):
    modules = [*live_modules(make_unet(family)), *live_modules(make_tiny_text_encoder(tokenizer))]
    assert all(len(meant) == 1 for meant in names.known_by(modules).values())
