"""models/families.py: a single file says by its shapes what base it is, and needs no network and no folder."""

import json
import struct

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from helpers import CPU
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from minilora.files.names import TEXT_ENCODER, TEXT_ENCODER_2, UNET, original_unet_paths
from minilora.models.base import Base
from minilora.models.folder import KINDS, VAE
from minilora.models.single_file import ways
from minilora.settings.errors import UserError

# What the published bases have in their unet/config.json, as far as it is no default of diffusers.
SD_1 = {"attention_head_dim": 8, "cross_attention_dim": 768, "sample_size": 64}
SD_2 = {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True}
XL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "use_linear_projection": True,
}
NINE = {"in_channels": 9}
BASES = {  # what is published, the option that it takes, the pipeline, the side in pixels
    "1": (SD_1, None, "StableDiffusionPipeline", 512),
    "1 inpainting": (SD_1 | NINE, None, "StableDiffusionInpaintPipeline", 512),
    "2 at 512": (SD_2 | {"sample_size": 64}, "epsilon", "StableDiffusionPipeline", 512),
    "2 at 768": (SD_2 | {"sample_size": 96, "upcast_attention": True}, "v_prediction", "StableDiffusionPipeline", 768),
    "2 inpainting": (SD_2 | NINE | {"sample_size": 64}, None, "StableDiffusionInpaintPipeline", 512),
    "XL": (XL, None, "StableDiffusionXLPipeline", 1024),
    "XL inpainting": (XL | NINE, None, "StableDiffusionXLInpaintPipeline", 1024),
}
ABOUT_HALF_PRECISION = ("upcast_attention",)  # 2.1 at 768 pixels overflows without; the others do as well with


def sparse_file(path, shapes):
    """Write a safetensors file of fp16 zeros of which only the header takes room on the disk."""
    header, end = {}, 0
    for key, shape in shapes.items():
        header[key] = {"dtype": "F16", "shape": list(shape), "data_offsets": [end, end + 2 * shape.numel()]}
        end += 2 * shape.numel()
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path


def published(base: str) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(BASES[base][0])


@pytest.fixture
def file_of(tmp_path):
    """What makes the file of a base of full size, of its U-Net alone or with more tensors."""

    def make(base: str, more=()):
        unet = {key: tensor.shape for key, tensor in published(base).state_dict().items()}
        paths = original_unet_paths(dict.fromkeys(key.rpartition(".")[0] for key in unet))
        shapes = {}
        for key, shape in unet.items():
            path, _, leaf = key.rpartition(".")
            shapes[f"model.diffusion_model.{paths[path]}.{leaf}"] = shape
        return str(sparse_file(tmp_path / "base.safetensors", shapes | dict.fromkeys(more, torch.Size([0]))))

    return make


@pytest.mark.parametrize("base", BASES)
def test_the_settings_of_the_unet_are_those_that_are_published(base, file_of):
    _, prediction_type, pipeline, side = BASES[base]
    ours = Base(file_of(base), CPU, prediction_type=prediction_type)
    assert (ours.kind, ours.resolution, ours.pixels_per_latent) == (pipeline, side, 8)
    assert ours.schedule.prediction_type == (prediction_type or "epsilon")
    with torch.device("meta"):
        config = UNet2DConditionModel.from_config(ours.parts.config(UNET)).config
    for key, value in published(base).config.items():
        if key not in ABOUT_HALF_PRECISION and not key.startswith("_"):
            mine = (
                [config[key]] * len(value)
                if isinstance(value, (list, tuple)) and type(config[key]) is int
                else config[key]
            )
            each = [value] * len(mine) if isinstance(mine, (list, tuple)) and type(value) is int else value
            assert mine == each or list(mine) == list(each), key


@pytest.mark.parametrize("base", BASES)
def test_each_part_finds_its_tensors(base, file_of):
    """That the settings make the parts that are published is seen by how many numbers they have."""
    ours = Base(file_of(base), CPU, prediction_type=BASES[base][1])
    millions = {VAE: 83.65, TEXT_ENCODER: 340.39 if base.startswith("2") else 123.06}  # as their model cards say
    millions |= {TEXT_ENCODER_2: 694.66} if base.startswith("XL") else {}
    for part, expected in millions.items():
        with torch.device("meta"):
            config, kind = ours.parts.config(part), KINDS[part]
            made = kind.from_config(config) if part == VAE else kind(CLIPTextConfig(**config))
        assert isinstance(made, (AutoencoderKL, CLIPTextModel, CLIPTextModelWithProjection))
        assert round(sum(p.numel() for p in made.parameters()) / 1e6, 2) == expected
        assert all(len(places) == len(made.state_dict()) for _, places in ways(part, made.state_dict()))


def test_a_stable_diffusion_2_is_asked_for_what_it_predicts(file_of):
    file = file_of("2 at 512")
    with pytest.raises(UserError, match="do not tell what it predicts; give --prediction-type epsilon"):
        Base(file, CPU)
    marked = Base(file_of("2 at 768", ("v_pred",)), CPU)
    assert (marked.resolution, marked.predicts) == (768, "v_prediction (marked in the file)")


def test_other_shapes_are_refused(tmp_path, file_of):
    wide = sparse_file(tmp_path / "wide.safetensors", {"double_blocks.0.img_attn.norm.scale": torch.Size([128])})
    with pytest.raises(UserError, match=r"wide\.safetensors: it holds no U-Net"):
        Base(str(wide), CPU)


def test_the_words_have_the_numbers_that_openai_gives_them(file_of):
    """By "Interacting with CLIP", OpenAI's notebook, "Hello World!" is 3306, 1002, 256."""
    base = Base(file_of("XL"), CPU)
    one, two = (tokenizer for tokenizer in base.tokenizers)
    assert one("Hello World!").input_ids == [49406, 3306, 1002, 256, 49407]
    assert two("Hello World").input_ids == [49406, 3306, 1002, 49407]
    clip, openclip = base.tokens("Hello World").tolist()
    assert len(clip) == len(openclip) == 77
    assert (set(clip[4:]), set(openclip[4:])) == ({49407}, {0})  # what each is filled up with
    assert one.vocab_size == two.vocab_size == 49408
    assert one.decode(one("naïve café, 日本").input_ids, skip_special_tokens=True) == "naïve café , 日本"
