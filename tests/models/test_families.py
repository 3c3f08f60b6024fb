"""Every family of Stable Diffusion, in tiny models of its shape: trained, drawn and loaded as by diffusers."""

from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from conftest import FAMILIES, make_picture
from diffusers import DDPMScheduler
from helpers import relative_difference, torchrun
from PIL import Image
from safetensors.torch import load_file

from minilora.data import draws
from minilora.data.folder import read_folders
from minilora.data.pictures import as_tensor, crop_square, open_picture
from minilora.models.base import Base
from minilora.models.text import UNetWithText
from minilora.run.encode import encoded_examples
from minilora.run.objective import Denoising
from minilora.run.ranks import Ranks
from minilora.sampling import sample
from minilora.settings.errors import UserError
from minilora.settings.sample import SampleConfig
from minilora.settings.train import TrainConfig
from minilora.training import train

ONE = Ranks(0, 1, torch.device("cpu"))
ORDINARY = [family for family in FAMILIES if "inpainting" not in family]
INPAINTING = [family for family in FAMILIES if "inpainting" in family]


def pipeline_of(folder):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("family", ORDINARY)
def test_the_loss_is_that_of_diffusers_own_scripts(family, family_base, pictures, tmp_path):
    """As in examples/text_to_image/train_text_to_image_lora.py, and …_lora_sdxl.py for XL, step by step."""
    config = TrainConfig(data=(str(pictures),), model=str(family_base(family)), cache=str(tmp_path), mirror=True)
    base = Base(config.model, ONE.device)
    examples = encoded_examples(read_folders(config), config, 16, Base(config.model, ONE.device), 1000, ONE)
    positions = range(6)
    batch = examples.batch(positions, ONE.device)
    with torch.no_grad():
        ours = Denoising().loss(base.unet, batch, base.schedule, config)

    pipeline = pipeline_of(config.model)
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    mirrored = [draws.uniform(0, "mirror", p) < 0.5 for p in positions]
    assert len(set(mirrored)) == 2
    for row, position in enumerate(positions):
        item = examples.picture_at(position)
        picture = open_picture(item.path)  # 24 × 20
        # 1. the latents
        pixels = as_tensor(crop_square(picture, 16))[None]
        pixels = pixels.flip(-1) if mirrored[row] else pixels
        with torch.no_grad():
            posterior = pipeline.vae.encode(pixels).latent_dist
        drawn = draws.gaussian(0, "posterior", position, (4, 8, 8))
        latents = (posterior.mean + posterior.std * drawn) * pipeline.vae.config.scaling_factor
        noise, t = batch.noise[[row]], batch.timesteps[[row]]
        noisy = scheduler.add_noise(latents, noise, t)
        # 2. what the U-Net is told
        caption, more = examples.caption_at(position), {}
        with torch.no_grad():
            told = pipeline.encode_prompt(
                caption, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
            )
        if family == "sdxl":
            # 24 × 20 becomes 19 × 16, and 1.5, rounded to even, is cut off on the left: 2, in the mirror 1.
            sizes = torch.tensor([[20.0, 24, 0, 1 if mirrored[row] else 2, 16, 16]])
            more = {"added_cond_kwargs": {"text_embeds": told[2], "time_ids": sizes}}
        # 3. the loss
        kind = pipeline.scheduler.config.prediction_type
        wanted = noise if kind == "epsilon" else scheduler.get_velocity(latents, noise, t)
        with torch.no_grad():
            prediction = pipeline.unet(noisy, t, told[0], **more).sample
        expected = torch.nn.functional.mse_loss(prediction, wanted)
        torch.testing.assert_close(ours[row], expected, rtol=1e-6, atol=1e-6)  # a batch is summed in another order


@pytest.mark.parametrize("family", ORDINARY)
def test_a_lora_trained_here_draws_the_same_in_diffusers(family, family_base, pictures, tmp_path):
    model = str(family_base(family))
    settings = {"steps": 2, "learning_rate": 0.1, "cache": str(tmp_path / "cache"), "output": str(tmp_path / "run")}
    path = train(TrainConfig(data=(str(pictures),), model=model, **settings))
    for strength, output in ((1.0, "with.png"), (0.0, "without.png")):
        sample(
            SampleConfig(
                prompt=("a dog",), model=model, lora=(f"{path}:{strength}",), steps=3, output=str(tmp_path / output)
            )
        )
    ours, without = (np.array(Image.open(tmp_path / name), int) for name in ("with.png", "without.png"))
    pipeline = pipeline_of(model)
    pipeline.load_lora_weights(path)
    options = {"num_inference_steps": 3, "guidance_scale": 7.5, "height": 16, "width": 16}
    [theirs] = pipeline("a dog", generator=torch.Generator().manual_seed(0), **options).images
    # Merged or beside the weights: a level may be rounded the other way.
    assert abs(ours - np.array(theirs, int)).max() <= 1
    assert abs(ours - without).max() > 1


@pytest.mark.parametrize("family", INPAINTING)
def test_an_inpainting_base_draws_as_in_diffusers_and_is_not_trained(family, family_base, pictures, tmp_path):
    model = str(family_base(family))
    make_picture(1, 24, 24).save(tmp_path / "picture.png")
    Image.fromarray(np.repeat([0, 255], 12 * 24).astype(np.uint8).reshape(24, 24)).save(tmp_path / "mask.png")
    where = {"image": str(tmp_path / "picture.png"), "mask": str(tmp_path / "mask.png")}
    config = SampleConfig(prompt=("a dog",), model=model, steps=3, output=str(tmp_path / "ours.png"), **where)
    ours = np.array(Image.open(sample(config)), int)
    picture, mask = (crop_square(open_picture(tmp_path / f"{name}.png"), 16) for name in ("picture", "mask"))
    options = {"num_inference_steps": 3, "guidance_scale": 7.5, "height": 16, "width": 16, "strength": 1.0}
    generator = torch.Generator().manual_seed(0)
    [theirs] = pipeline_of(model)("a dog", image=picture, mask_image=mask, generator=generator, **options).images
    assert abs(ours - np.array(theirs, int)).max() <= 1  # of 255: rounding
    with pytest.raises(UserError, match="it is an inpainting base; use the ordinary base"):
        train(TrainConfig(data=(str(pictures),), model=model, output=str(tmp_path / "run"), cache=str(tmp_path)))
    with pytest.raises(UserError, match="an inpainting base needs --image and --mask"):
        sample(SampleConfig(prompt=("a dog",), model=model, output=str(tmp_path / "no.png")))


def test_an_ordinary_base_takes_no_picture(tiny_base, tmp_path):
    make_picture(1).save(tmp_path / "a.png")
    path = str(tmp_path / "a.png")
    with pytest.raises(UserError, match="only inpainting takes --image"):
        sample(SampleConfig(prompt=("a",), model=str(tiny_base), image=path, mask=path, output=str(tmp_path / "b.png")))


# --------------------------------------------------------------------------------------- text encoders


def with_text(family_base, pictures, tmp_path, family="sd1", **more) -> TrainConfig:
    settings = {"steps": 2, "batch_size": 4, "learning_rate": 0.02, "cache": str(tmp_path / "cache")}
    settings |= {"data": (str(pictures),), "model": str(family_base(family)), "output": str(tmp_path / "run")}
    return TrainConfig(**settings | {"train_text_encoder": True} | more)


@pytest.mark.parametrize("family", ORDINARY)
def test_text_encoders_are_trained_too_and_load_in_diffusers(family, family_base, pictures, tmp_path):
    config = with_text(family_base, pictures, tmp_path, family, text_encoder_targets=("q_proj", "out_proj", "fc1"))
    path = train(config)
    tensors = load_file(path)
    encoders = {key.split(".")[0] for key in tensors} - {"unet"}
    assert {key.split(".")[-3] for key in tensors if not key.startswith("unet")} == {"q_proj", "out_proj", "fc1"}
    assert encoders == {"text_encoder", *(["text_encoder_2"] if family == "sdxl" else [])}
    assert all(".text_model.encoder.layers." in key for key in tensors if not key.startswith("unet"))
    assert all(tensor.any() for key, tensor in tensors.items() if "lora_B" in key)  # each of them has learnt
    options = {"num_inference_steps": 3, "guidance_scale": 7.5, "height": 16, "width": 16}
    output = str(tmp_path / "ours.png")
    sample(SampleConfig(prompt=("a dog",), model=config.model, lora=(str(path),), steps=3, output=output))
    pipeline = pipeline_of(config.model)
    pipeline.load_lora_weights(path)
    [theirs] = pipeline("a dog", generator=torch.Generator().manual_seed(0), **options).images
    difference = np.array(Image.open(output), int) - np.array(theirs, int)
    assert abs(difference).max() <= 1  # merged or beside the weights: a level may be rounded the other way


def test_before_they_have_learnt_it_is_the_ordinary_loss(family_base, pictures, tmp_path):
    config = with_text(family_base, pictures, tmp_path, "sdxl")
    plain = replace(config, train_text_encoder=False)
    losses = []
    for each in (config, plain):
        base = Base(each.model, ONE.device)
        examples = encoded_examples(read_folders(each), each, 16, Base(each.model, ONE.device), 1000, ONE)
        network = UNetWithText(base.unet, base.text_encoders) if each.train_text_encoder else base.unet
        with torch.no_grad():
            losses.append(Denoising().loss(network, examples.batch(range(4), ONE.device), base.schedule, each))
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)  # captions are encoded one by one, or four at once


def test_a_learning_rate_of_their_own(family_base, pictures, tmp_path):
    """AdamW's first step is as long as the learning rate, for each number that has a gradient."""
    config = with_text(family_base, pictures, tmp_path, steps=1, text_encoder_learning_rate=0.005)
    for key, tensor in load_file(train(config)).items():
        if "lora_B" in key:
            expected = 0.02 if key.startswith("unet") else 0.005
            assert tensor.abs().max().item() == pytest.approx(expected, rel=0.02), key  # eps takes a little off


def test_resumed_equals_uninterrupted(family_base, pictures, tmp_path):
    config = with_text(family_base, pictures, tmp_path, "sdxl", steps=4, micro_batch_size=2, dropout=0.2)
    whole = train(replace(config, output=str(tmp_path / "whole"))).read_bytes()
    train(replace(config, steps=2, checkpoint_every=2))
    assert train(replace(config, resume=True)).read_bytes() == whole


def test_two_processes_equal_one(family_base, pictures, tmp_path):
    config = with_text(family_base, pictures, tmp_path, "sdxl", steps=20, learning_rate=0.001, dropout=0.2)
    train(replace(config, output=str(tmp_path / "one")))
    (tmp_path / "config.json").write_text(config.to_json())
    result = torchrun(2, "--config", str(tmp_path / "config.json"))
    assert result.returncode == 0, result.stderr
    # The order of a float32 sum, magnified by Adam where a gradient is nearly zero.
    assert relative_difference(tmp_path / "one", tmp_path / "run") < 1e-4
