"""--full trains all weights of the U-Net in the same loop, and leaves a base."""

import os
from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from helpers import CPU, torchrun
from safetensors.torch import load_file

from minilora.data.examples import Examples
from minilora.data.folder import read_folders
from minilora.diffusion import denoising_loss
from minilora.files.read import FILE_NAME
from minilora.models.base import Base
from minilora.run.checkpoint import all_in
from minilora.run.trained import AVERAGE_NAME
from minilora.sampling import sample
from minilora.settings.errors import UserError
from minilora.settings.sample import SampleConfig
from minilora.settings.train import TrainConfig
from minilora.training import train

UNET_FILE = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def config(pictures, tiny_base, tmp_path) -> TrainConfig:
    return TrainConfig(
        data=(str(pictures),),
        model=str(tiny_base),
        full=True,
        steps=2,
        batch_size=2,
        learning_rate=1e-3,
        precision="fp32",
        output=str(tmp_path / "out"),
        cache=str(tmp_path / "cache"),
    )


def test_a_step_is_adamws_step_on_the_gradient_of_all_weights(config, tiny_base):
    """As by the plain loop that scripts for fine-tuning have: loss, backward, clip, AdamW."""
    model = train(replace(config, steps=1))
    ours = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    base, theirs = Base(str(tiny_base), CPU), UNet2DConditionModel.from_pretrained(tiny_base, subfolder="unet").train()
    examples = Examples(read_folders(config, quiet=True), config, 16, base, len(base.schedule))
    batch = examples.batch([0, 1], CPU)
    parts = batch.latents, batch.conditioning, batch.noise, batch.timesteps
    denoising_loss(theirs, *parts, base.schedule).mean().backward()
    torch.nn.utils.clip_grad_norm_(theirs.parameters(), config.max_grad_norm)
    torch.optim.AdamW(theirs.parameters(), lr=1e-3, weight_decay=1e-2).step()
    wanted = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        # Adam's first step is lr · g / |g|: where g is nearly zero, float32's rounding decides.
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-5, atol=1e-5)


def test_a_run_that_was_cut_in_two_is_the_whole(config, tmp_path):
    whole = train(replace(config, steps=4, ema=0.5, mirror=True)) / UNET_FILE
    cut = replace(config, ema=0.5, mirror=True, output=str(tmp_path / "cut"), checkpoint_every=2)
    train(replace(cut, steps=2))
    again = train(replace(cut, steps=4, resume=True)) / UNET_FILE
    assert whole.read_bytes() == again.read_bytes()
    averages = [path.parents[2] / "model_ema" / UNET_FILE for path in (whole, again)]
    assert averages[0].read_bytes() == averages[1].read_bytes() != whole.read_bytes()


def test_two_processes_give_what_one_gives(config, tmp_path, pictures, tiny_base):
    one = load_file(train(config) / UNET_FILE)
    words = ["--data", pictures, "--model", tiny_base, "--full", "--steps", 2, "--batch-size", 2, "--precision", "fp32"]
    words += ["--learning-rate", 1e-3, "--cache", tmp_path / "cache", "--output", tmp_path / "two"]
    done = torchrun(2, *map(str, words))
    assert done.returncode == 0, done.stderr
    two = load_file(tmp_path / "two" / "model" / UNET_FILE)
    for name, tensor in one.items():
        # The order of a sum of gradients, and Adam's division by a gradient that may be nearly zero.
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-4)


def test_the_result_is_a_base_whose_other_parts_are_those_of_the_old_one(config, tiny_base, tmp_path, capsys):
    model = train(config)
    said = capsys.readouterr().out
    assert f"--model {model}" in said.splitlines()[-1]
    assert "LoRA" not in said.replace(str(tmp_path), "")
    pipeline = StableDiffusionPipeline.from_pretrained(model)
    changed = pipeline.unet.state_dict()
    assert not any(
        torch.equal(changed[k], v) for k, v in Base(str(tiny_base), CPU).unet.state_dict().items() if v.any()
    )
    for part in ("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        assert os.path.samefile(model / part, tiny_base / part)  # linked, on the same disk
    drawn = sample(SampleConfig(prompt=("x",), model=str(model), steps=1, output=str(tmp_path / "x.png")))
    assert drawn.exists()
    assert (tmp_path / "out" / "samples" / "before_after.png").exists()


def test_with_a_lora_in_the_base_or_another_vae_all_parts_are_written(config, tiny_base, tmp_path):
    lora = train(replace(config, full=False, output=str(tmp_path / "lora")))
    model = train(replace(config, base_lora=(str(lora),), steps=1, vae=str(tiny_base)))
    assert not os.path.samefile(
        model / "text_encoder" / "model.safetensors", tiny_base / "text_encoder" / "model.safetensors"
    )
    assert StableDiffusionPipeline.from_pretrained(model).unet is not None


def test_a_full_run_replaces_a_lora_and_the_other_way_round(config, tmp_path):
    lora, out = replace(config, full=False), tmp_path / "out"
    train(replace(lora, ema=0.5))
    train(replace(config, validation="0.2"))
    assert not (out / FILE_NAME).exists()
    assert not (out / AVERAGE_NAME).exists()
    assert load_file(out / "unet_best.safetensors").keys() == load_file(out / "model" / UNET_FILE).keys()
    train(lora)
    assert not (out / "model").exists()
    assert not (out / "unet_best.safetensors").exists()


def test_the_average_may_be_kept_elsewhere(config, tmp_path):
    """Here elsewhere is the same place, so the bytes are the same."""
    one = train(replace(config, ema=0.9))
    two = train(replace(config, ema=0.9, ema_device="cpu", output=str(tmp_path / "two")))
    one, two = (folder.with_name("model_ema") / UNET_FILE for folder in (one, two))
    assert one.read_bytes() == two.read_bytes()


def test_half_precision_keeps_the_weights_in_float32(config):
    state = load_file(train(replace(config, precision="bf16")) / UNET_FILE)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    checkpoint = load_file(all_in(train(replace(config, checkpoint_every=1)).parent)[-1])
    assert all(tensor.dtype == torch.float32 for key, tensor in checkpoint.items() if key.startswith("lora."))


def test_settings_of_a_lora_are_refused(config):
    for more, name in (
        ({"rank": 4}, "--rank"),
        ({"alpha": 3.0}, "--alpha"),
        ({"targets": ("to_q",)}, "--targets"),
        ({"rank_for": ("attn2=4",)}, "--rank-for"),
        ({"dropout": 0.1}, "--dropout"),
        ({"train_text_encoder": True}, "--train-text-encoder"),
        ({"also": ("kohya",)}, "--also"),
        ({"init_from": "out/x"}, "--init-from"),
    ):
        with pytest.raises(UserError, match=f"{name} has no effect with --full, which trains no LoRA"):
            replace(config, **more)
    with pytest.raises(UserError, match="--ema-device needs --ema"):
        replace(config, ema_device="cpu")
