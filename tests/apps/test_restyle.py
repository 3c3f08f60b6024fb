"""apps/restyle, its edges and its classifier; grids and folders of sample.py, which it draws with."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_picture
from diffusers import ControlNetModel, StableDiffusionImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline
from helpers import CPU, write_a_lora
from PIL import Image
from safetensors.torch import load_file, save_file

from minilora import inject_lora, save_lora
from minilora.apps.canny import canny, link
from minilora.apps.classifier import probability, share_right, train_classifier
from minilora.apps.restyle import RestyleConfig, restyle
from minilora.data.folder import read_folders
from minilora.data.pictures import crop_square, open_picture
from minilora.models.base import Base
from minilora.sampling import sample
from minilora.settings.errors import UserError
from minilora.settings.sample import SampleConfig
from minilora.settings.train import TrainConfig

STRENGTHS = (0.0, 0.5, 1.0)


@pytest.fixture
def lora(tmp_path) -> str:
    write_a_lora(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    return str(tmp_path / "lora")


@pytest.fixture
def command(tiny_base, pictures, lora, tmp_path):
    """Run restyle with settings for the tiny base; return the pictures that it drew, one array for each strength."""

    def command(**settings) -> list[np.ndarray]:
        output = tmp_path / "out"
        given = {"model": str(tiny_base), "lora": (lora,), "strengths": STRENGTHS, "steps": 4, "output": str(output)}
        restyle(RestyleConfig(**({"data": (str(pictures),)} | given | settings)))
        folders = [output / f"strength-{factor:g}" for factor in (given | settings)["strengths"]]
        return [np.stack([np.array(Image.open(p)) for p in sorted(folder.glob("*.png"))]) for folder in folders]

    return command


def test_at_strength_0_it_is_the_base_as_diffusers_has_it(command, tiny_base, pictures, tmp_path):
    ours = command()[0]
    pipeline = StableDiffusionImg2ImgPipeline.from_pretrained(tiny_base)
    for number, item in enumerate(read_folders(TrainConfig(data=(str(pictures),)))):
        [theirs] = pipeline(
            item.captions[0],
            image=crop_square(open_picture(item.path), 16),
            strength=0.5,
            num_inference_steps=4,
            guidance_scale=7.5,
            generator=torch.Generator().manual_seed(number),
        ).images
        # Drawn four at once there, one by one here: float32 rounding, at most one level of 255.
        assert np.abs(ours[number].astype(int) - np.array(theirs)).max() <= 1


def test_xl_draws_again_as_in_diffusers_and_an_inpainting_base_is_refused(command, family_base, pictures, tmp_path):
    base = Base(str(family_base("sdxl")), CPU)
    inject_lora(base.unet, rank=2)
    save_lora(base.unet, tmp_path / "xl" / "pytorch_lora_weights.safetensors")
    ours = command(model=str(family_base("sdxl")), lora=(str(tmp_path / "xl"),))[0]
    pipeline = StableDiffusionXLImg2ImgPipeline.from_pretrained(family_base("sdxl"))
    options = {"strength": 0.5, "num_inference_steps": 4, "guidance_scale": 7.5}
    for number, item in enumerate(read_folders(TrainConfig(data=(str(pictures),)))):
        picture, generator = (
            crop_square(open_picture(item.path), base.resolution),
            torch.Generator().manual_seed(number),
        )
        [theirs] = pipeline(item.captions[0], image=picture, generator=generator, **options).images
        # One level of 255: ours are drawn together, and a batch's float32 sums are rounded otherwise.
        assert np.abs(np.array(theirs).astype(int) - ours[number]).max() <= 1
    with pytest.raises(UserError, match="it is an inpainting base"):
        command(model=str(family_base("sd1 inpainting")))


def test_the_figures_are_those_of_the_pictures_that_are_written(command, pictures, tmp_path):
    drawn = command(style=str(pictures))
    content = json.loads((tmp_path / "out" / "figures.json").read_text())
    inputs = np.stack([np.array(crop_square(open_picture(p), 16)) for p in sorted(pictures.glob("*.png"))])
    for factor, there in zip(STRENGTHS, drawn, strict=True):
        far = np.sqrt(((there.astype(float) - inputs) ** 2).mean((1, 2, 3))).mean()
        assert content["figures"][f"distance to the pictures, in levels of 255; strength {factor:g}"] == pytest.approx(
            far
        )
        assert 0 <= content["figures"][f"probability of the style; strength {factor:g}"] <= 1
    assert content["curves"].keys() == {"distance to the pictures", "probability of the style"}
    assert len({there.tobytes() for there in drawn}) == len(STRENGTHS)


def test_less_strength_leaves_more_of_the_picture(command, pictures):
    inputs = np.stack([np.array(crop_square(open_picture(p), 16)) for p in sorted(pictures.glob("*.png"))])
    little, much = (
        np.abs(command(strengths=(1.0,), strength=s, steps=20)[0].astype(float) - inputs).mean() for s in (0.1, 1.0)
    )
    assert little < much


def test_one_picture_takes_its_prompt(command, pictures):
    [one] = command(data=(str(pictures / "0.png"),), prompt="picture 0", strengths=(1.0,))
    assert np.abs(one[0].astype(int) - command(strengths=(1.0,))[0][0]).max() <= 1  # alone and among others
    with pytest.raises(UserError, match=r"0\.png: one picture needs its --prompt"):
        command(data=(str(pictures / "0.png"),))


# ---------------------------------------------------------------------------------------- ControlNet


def make_controlnet(tiny_base: Path, folder: Path, random: bool) -> str:
    """Write a ControlNet for the tiny base; as it is made, it ends in zeros and changes nothing."""
    torch.manual_seed(0)
    unet = Base(str(tiny_base), CPU).unet
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8))
    if random:
        for block in [*net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding.conv_out]:
            torch.nn.init.normal_(block.weight, std=0.3)
    net.save_pretrained(folder)
    return str(folder)


def test_a_controlnet_of_zeros_changes_nothing_and_another_does(command, tiny_base, tmp_path):
    plain = command(strengths=(1.0,))[0].astype(int)
    zeros = make_controlnet(tiny_base, tmp_path / "zeros", random=False)
    # The two pipelines add and resize in another order: one level of 255.
    assert np.abs(command(strengths=(1.0,), controlnet=zeros)[0] - plain).max() <= 1
    net = make_controlnet(tiny_base, tmp_path / "net", random=True)
    assert np.abs(command(strengths=(1.0,), controlnet=net)[0] - plain).max() > 1


def test_a_controlnet_that_does_not_fit_is_refused(command, tiny_base, tmp_path):
    with pytest.raises(UserError, match="--controlnet nowhere: there is no such folder"):
        command(controlnet="nowhere")
    with pytest.raises(UserError, match=r"it holds a UNet2DConditionModel and should hold a ControlNetModel"):
        command(controlnet=str(tiny_base / "unet"))
    config = json.loads(Path(make_controlnet(tiny_base, tmp_path / "net", random=False), "config.json").read_text())
    ControlNetModel.from_config(config | {"cross_attention_dim": 8}).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"its cross_attention_dim is 8, the base's 16"):
        command(controlnet=str(tmp_path / "other"))
    weights = tmp_path / "net" / "diffusion_pytorch_model.safetensors"
    save_file({k: v for k, v in load_file(weights).items() if k != "conv_in.bias"}, weights)
    with pytest.raises(UserError, match=r"the weights of its ControlNet lack conv_in\.bias"):
        command(controlnet=str(tmp_path / "net"))
    longer = {"conditioning_embedding_out_channels": (4, 8, 8)}
    ControlNetModel.from_config(config | longer).save_pretrained(tmp_path / "longer")
    with pytest.raises(UserError, match="it has 4 pixels per latent, the base has 2"):
        command(controlnet=str(tmp_path / "longer"))


# --------------------------------------------------------------------------------------------- edges


def edges_of(grey: np.ndarray) -> np.ndarray:
    return np.array(canny(Image.fromarray(grey.astype(np.uint8))))[..., 0] > 0


def test_a_step_has_one_line_one_pixel_wide():
    grey = np.zeros((12, 12))
    grey[:, 6:] = 255
    found = edges_of(grey)
    assert (found.sum(1) == 1).all()
    assert found[:, 5:7].any(1).all()


def test_a_blank_picture_and_a_gentle_slope_have_none():
    assert not edges_of(np.full((9, 9), 128)).any()
    assert not edges_of(np.tile(np.arange(12) * 4, (12, 1))).any()


def test_edges_of_a_disc_lie_on_its_rim_all_around():
    y, x = np.mgrid[-20:21, -20:21]
    found = edges_of(255.0 * (np.hypot(x, y) < 12))
    radius = np.hypot(x, y)[found]
    assert radius.min() > 10.5
    assert radius.max() < 13.5
    angles = np.sort(np.arctan2(y, x)[found])
    assert np.diff(angles).max() < 0.3  # radians: no gap
    assert found.sum() < 2.5 * np.pi * 12  # a line, not a band


def test_a_weak_line_stays_where_it_is_joined_to_a_strong_one():
    weak, strong = np.zeros((7, 20), dtype=bool), np.zeros((7, 20), dtype=bool)
    weak[1], weak[5] = True, True
    strong[1, 0] = weak[1, 0]
    found = link(strong, weak)
    assert found[1].all()
    assert not found[2:].any()


# ---------------------------------------------------------------------------------------- classifier


def test_the_classifier_tells_kinds_it_has_not_seen_apart_and_leaves_the_generator_alone():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(60, 3, 16, 16, generator=generator) * 0.3
    kinds = torch.arange(60) % 2
    pixels[kinds == 1, 0] += 0.5  # more red
    before = torch.get_rng_state()
    model = train_classifier(pixels[:40], kinds[:40])
    assert torch.equal(torch.get_rng_state(), before)
    assert share_right(model, pixels[40:], kinds[40:]) == 1
    likely = probability(model, pixels[40:], kind=1)
    assert (likely > 0.5).equal(kinds[40:] == 1)
    assert torch.equal(likely, probability(train_classifier(pixels[:40], kinds[:40]), pixels[40:], kind=1))


# ------------------------------------------------------------------------------- sample.py for styles


@pytest.fixture
def drawing(tiny_base, tmp_path):
    def drawing(**settings) -> Path:
        places = {"model": str(tiny_base), "output": str(tmp_path / "picture.png"), "prompt": ("red apple",)}
        return sample(SampleConfig(**(places | {"steps": 3} | settings)))

    return drawing


def test_a_grid_mixes_two_loras(drawing, tmp_path):
    for name in ("one", "other"):
        write_a_lora(tmp_path / name / "pytorch_lora_weights.safetensors")
    loras = (str(tmp_path / "one"), f"{tmp_path / 'other'}:0.5")
    grid = drawing(lora=loras, grid=(0.0, 1.0))
    place = json.loads(Image.open(grid).text["sheet"])
    assert place["rows"] == ["one 0", "one 1"]
    assert place["columns"] == ["other 0", "other 1"]
    sheet = np.array(Image.open(grid)).astype(int)
    for row, first in enumerate((0.0, 1.0)):
        for column, second in enumerate((0.0, 1.0)):
            left, top = place["left"] + column * 132, place["top"] + row * 132
            alone = Image.open(drawing(lora=(f"{loras[0]}:{first}", f"{tmp_path / 'other'}:{second * 0.5}")))
            large = np.array(alone.resize((128, 128), Image.Resampling.BICUBIC))
            assert np.abs(sheet[top : top + 128, left : left + 128] - large).max() == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora": ("a",), "grid": (0.0, 1.0)}, "--grid mixes two --lora, not 1"),
        ({"lora": ("a", "b"), "grid": (0.0,), "count": 2}, "--grid takes one --prompt and a --count of 1"),
        ({"lora": ("a", "b"), "grid": (0.0,), "strengths": (0.0,)}, "--grid and --strengths cannot be combined"),
        ({"lora": ("a", "b"), "grid": (float("nan"),)}, "--grid is nan; each must be a finite number"),
        ({"lora": ("a", "b"), "grid": (0.0,), "output": "folder"}, "--output folder: --strengths and --grid write one"),
    ],
)
def test_grids_that_cannot_be_are_refused(drawing, settings, message):
    with pytest.raises(UserError, match=message):
        drawing(**settings)


def test_a_folder_of_drawn_pictures_can_be_trained_on(drawing, tmp_path):
    folder = drawing(output=str(tmp_path / "things"), prompt=("red apple", "a dog"), count=2)
    items = read_folders(TrainConfig(data=(str(folder),)))
    assert [item.captions for item in items] == [("red apple",), ("red apple",), ("a dog",), ("a dog",)]
    alone = np.array(Image.open(drawing(prompt=("a dog",), seed=1))).astype(int)
    assert np.abs(alone - np.array(Image.open(folder / "0004.png"))).max() <= 1  # alone and among others
    make_picture(0).save(folder / "mine.png")
    with pytest.raises(UserError, match=r"things: mine\.png already exists there; choose another folder"):
        drawing(output=str(folder), prompt=("red apple", "a dog"), count=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": ("a.png", "b.png")}, "restyle takes one picture or folder, not 2"),
        ({"lora": ()}, "--lora is needed"),
        ({"strength": 0.0}, "--strength is 0; it must be greater than 0 and at most 1"),
        ({"strength": 0.1, "steps": 4}, "--strength 0.1 of --steps 4 is less than one step"),
        ({"data": ("nowhere",)}, "nowhere: there is no such folder or picture"),
        ({"style": "nowhere"}, "--style nowhere: there is no such folder or picture"),
    ],
)
def test_mistakes_are_told_in_one_line(command, settings, message):
    with pytest.raises(UserError, match=message):
        command(**settings)
