"""What the tests share: a tiny Stable Diffusion with random weights, and folders of small pictures."""

import json
import os
from functools import cache
from pathlib import Path

# The identities hold to the bit on a CPU; test_gpu.py asks for another device in this way.
if os.environ.setdefault("MINILORA_DEVICE", "cpu") == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side, and so small a model is no faster on more

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, MotionAdapter, UNet2DConditionModel
from PIL import Image
from stand_in import hub  # noqa: F401 (a fixture)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from minilora.settings.setting import BUNDLED


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the README's commands run first: one long test that came last would be waited for alone."""
    items.sort(key=lambda item: item.path.name != "test_readme.py")


def make_tiny_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=16,
        attention_head_dim=2,
    )


def make_unet(family: str, **more) -> UNet2DConditionModel:
    """Make a U-Net of a family's topology, in small, with random weights."""
    torch.manual_seed(1)
    shape = {
        "block_out_channels": (8, 16, 16),
        "layers_per_block": 2,
        "norm_num_groups": 4,
        "sample_size": 8,
        "cross_attention_dim": 12,
        "attention_head_dim": 2,
    }
    cross = {"down": "CrossAttnDownBlock2D", "up": "CrossAttnUpBlock2D"}
    plain = {"down": "DownBlock2D", "up": "UpBlock2D"}
    blocks = [plain, cross, cross] if family == "sdxl" else [cross, cross, plain]
    shape["down_block_types"] = tuple(block["down"] for block in blocks)
    shape["up_block_types"] = tuple(block["up"] for block in reversed(blocks))
    if family != "sd1":
        shape["use_linear_projection"] = True
    if family == "sdxl":
        shape |= {"transformer_layers_per_block": (1, 2, 3), "addition_embed_type": "text_time"}
        shape |= {"addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 6 * 4 + 16}
    return UNet2DConditionModel(**shape | more).requires_grad_(False)


def make_tiny_text_encoder(tokenizer: CLIPTokenizer, kind: type = CLIPTextModel):
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return kind(config)


@pytest.fixture
def tiny_unet() -> UNet2DConditionModel:
    return make_tiny_unet().requires_grad_(False)


@pytest.fixture(scope="session")
def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(BUNDLED, subfolder="tokenizer")


def save_base(folder: Path, tokenizer: CLIPTokenizer, unet: UNet2DConditionModel, kind: str, **schedule) -> Path:
    """Write a tiny Stable Diffusion of random weights, for 16 × 16 pixels, around a U-Net."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
    )
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1, **schedule)
    parts = {"vae": vae, "unet": unet, "scheduler": scheduler, "tokenizer": tokenizer}
    parts["text_encoder"] = make_tiny_text_encoder(tokenizer)
    if "XL" in kind:
        second = make_tiny_text_encoder(tokenizer, CLIPTextModelWithProjection)
        parts |= {"tokenizer_2": tokenizer, "text_encoder_2": second}
    else:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    getattr(diffusers, kind)(**parts).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory, tokenizer) -> Path:
    """A folder with a tiny Stable Diffusion of random weights, for 16 × 16 pixels."""
    return save_base(tmp_path_factory.mktemp("base"), tokenizer, make_tiny_unet(), "StableDiffusionPipeline")


@pytest.fixture(scope="session")
def smallest_base(tmp_path_factory, tokenizer) -> Path:
    """A base whose U-Net is one block down and one up: even that takes a minute to compile."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8,),
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D",),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=2,
    )
    return save_base(tmp_path_factory.mktemp("base"), tokenizer, unet, "StableDiffusionPipeline")


FAMILIES = {  # kind of pipeline, what its U-Net predicts, and what else is particular about the U-Net
    "sd1": ("StableDiffusionPipeline", "epsilon", {}),
    "sd2": ("StableDiffusionPipeline", "v_prediction", {}),
    "sdxl": ("StableDiffusionXLPipeline", "epsilon", {}),
    "sd1 inpainting": ("StableDiffusionInpaintPipeline", "epsilon", {"in_channels": 9}),
    "sdxl inpainting": ("StableDiffusionXLInpaintPipeline", "epsilon", {"in_channels": 9}),
}


@pytest.fixture(scope="session")
def family_base(tmp_path_factory, tokenizer):
    """What makes, once each, the folder of a tiny base of a family."""

    @cache
    def make(family: str) -> Path:
        kind, prediction_type, more = FAMILIES[family]
        width = 32 if family.startswith("sdxl") else 16  # of what the text encoders give
        unet = make_unet(family.split()[0], cross_attention_dim=width, **more)
        return save_base(tmp_path_factory.mktemp("base"), tokenizer, unet, kind, prediction_type=prediction_type)

    return make


def make_adapter(base: Path, **more) -> MotionAdapter:
    """Make a motion adapter of random weights that fits a base."""
    unet = json.loads((base / "unet" / "config.json").read_text())
    torch.manual_seed(0)
    shape = {
        "block_out_channels": unet["block_out_channels"],
        "motion_layers_per_block": unet["layers_per_block"],
        "motion_norm_num_groups": unet["norm_num_groups"],
        "motion_num_attention_heads": 2,
        "motion_max_seq_length": 8,
    }
    return MotionAdapter(**shape | more)


@pytest.fixture(scope="session")
def motion_adapter(tmp_path_factory, tiny_base) -> Path:
    """A folder with a motion adapter for the tiny base."""
    folder = tmp_path_factory.mktemp("adapter")
    make_adapter(tiny_base).save_pretrained(folder)
    return folder


def make_picture(seed: int, width: int = 24, height: int = 20) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def pictures(tmp_path) -> Path:
    """A folder of five pictures with captions in metadata.jsonl; one has two captions."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rows = []
    for number in range(5):
        make_picture(number).save(folder / f"{number}.png")
        rows.append({"file_name": f"{number}.png", "text": f"picture {number}"})
    rows[2]["text"] = ["a dog", "a red apple"]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
