"""On a GPU, up to rounding, what the other tests hold to on a processor.

    MINILORA_DEVICE=cuda pytest tests/test_gpu.py -n 0

There sums have no fixed order, and matrices are multiplied in TF32 while training, of which 10 bits count.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_tiny_unet
from helpers import randomize, relative_difference, torchrun
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from minilora import inject_lora, load_lora, merge_lora, unmerge_lora
from minilora.data.folder import read_folders
from minilora.files.read import FILE_NAME
from minilora.models.base import Base
from minilora.models.device import CPU, this_device
from minilora.run.samples import before_after
from minilora.sampling import draw, merged_at
from minilora.settings.sample import SampleConfig
from minilora.settings.train import TrainConfig
from minilora.training import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(this_device() == CPU, reason="wants a GPU, and MINILORA_DEVICE=cuda"),
]


@pytest.fixture
def run(pictures, tmp_path, tiny_base, monkeypatch):
    """Train on five small pictures with the tiny base, on the GPU or on another device; return the output folder."""

    def run(name: str, device: str | None = None, **settings) -> Path:
        defaults = {"steps": 6, "batch_size": 4, "rank": 2, "learning_rate": 0.001, "model": str(tiny_base)}
        places = {"data": (str(pictures),), "output": str(tmp_path / name), "cache": str(tmp_path / "cache")}
        with monkeypatch.context() as patch:
            if device:
                patch.setenv("MINILORA_DEVICE", device)
            return train(TrainConfig(**(places | defaults | settings))).parent

    return run


def losses(folder: Path) -> list[float]:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [event.value for event in events.Scalars("loss")]


@pytest.fixture
def exact():
    """What makes float32 as exact as it is: training lets TF32 in."""

    def exact(tf32: bool = False) -> None:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32

    yield exact
    exact(True)


@pytest.mark.parametrize("recipe", [{}, {"train_text_encoder": True}, {"dropout": 0.3}, {"mirror": True}], ids=str)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_losses_are_those_on_a_processor_and_the_sheet_is_drawn(run, precision, recipe, capsys):
    gpu = run("gpu", precision=precision, **recipe)
    assert f"{precision} on {this_device().type}" in capsys.readouterr().out
    assert (gpu / "samples" / "before_after.png").exists()
    # Of bf16 8 bits count: 0.4 % of each number, and less of a mean of thousands.
    assert losses(gpu) == pytest.approx(losses(run("cpu", "cpu", **recipe)), rel=0.02)


# Where a gradient is nearly zero Adam magnifies how a sum was rounded, and half precision rounds more.
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 0.01), ("bf16", 0.1), ("fp16", 0.1)])
def test_a_run_that_was_cut_in_two_is_the_whole(run, precision, tolerance):
    whole = run("whole", precision=precision)
    run("cut", precision=precision, steps=3, checkpoint_every=3)
    assert relative_difference(whole, run("cut", precision=precision, resume=True)) < tolerance


def test_a_run_may_go_on_on_another_device(run):
    whole = run("whole")
    run("cut", "cpu", steps=3, checkpoint_every=3)
    assert relative_difference(whole, run("cut", resume=True)) < 0.1  # TF32 in the one half of it


def test_a_compiled_run_learns_nearly_the_same(run, smallest_base):
    settings = {"model": str(smallest_base), "steps": 3}
    plain, compiled = run("plain", **settings), run("compiled", compile=True, **settings)
    assert relative_difference(plain, compiled) < 0.01  # as of a resumed run


@pytest.mark.skipif(this_device() == CPU or torch.accelerator.device_count() < 2, reason="wants two GPUs")
def test_two_gpus_are_one(run, pictures, tiny_base, tmp_path):
    words = f"--data {pictures} --model {tiny_base} --output {tmp_path / 'two'} --cache {tmp_path / 'cache'}"
    words += f" --steps 6 --batch-size 4 --rank 2 --learning-rate 0.001 --validation {pictures}"
    result = torchrun(2, *words.split())
    assert result.returncode == 0, result.stderr
    assert relative_difference(run("one"), tmp_path / "two") < 0.01  # as of a resumed run


def test_drawing_is_that_on_a_processor(run, tiny_base, exact):
    lora, drawn = run("a", learning_rate=0.03), []
    exact()
    for device in (CPU, this_device()):
        base = Base(str(tiny_base), device)
        load_lora(base.pipeline, lora / FILE_NAME)
        with merged_at(base, {"default": 1.0}):
            drawn.append(draw(base, "a dog", (0, 1), (16, 24), SampleConfig(prompt=("a dog",), steps=3)))
    for cpu, gpu in zip(*drawn, strict=True):
        assert abs(np.array(cpu, int) - np.array(gpu, int)).max() <= 1  # of 255, by rounding


def test_sheets_are_drawn_in_slices_and_tiles(run, tiny_base, pictures):
    base = Base(str(tiny_base), this_device())
    load_lora(base.pipeline, run("a") / FILE_NAME)
    [item, *_] = read_folders(TrainConfig(data=(str(pictures),)))
    large = before_after(base, item, (32, 32), SampleConfig(prompt=item.captions, steps=2))  # a tile has 16 pixels
    assert base.vae.use_slicing
    assert base.vae.use_tiling
    assert large.width > 4 * 32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merged_is_live_and_unmerging_gives_every_bit_back(dtype, exact):
    exact()
    torch.manual_seed(0)
    unet = make_tiny_unet().to(dtype)
    inject_lora(unet, rank=4)
    randomize(unet)
    unet.to(this_device())
    before = {name: weight.clone() for name, weight in unet.state_dict().items()}
    x, text = (torch.randn(shape, device=this_device(), dtype=dtype) for shape in ((2, 4, 8, 8), (2, 5, 16)))
    with torch.no_grad(), torch.autocast(this_device().type, dtype, enabled=dtype != torch.float32):
        live = unet(x, 500, text).sample
        merge_lora(unet)
        merged = unet(x, 500, text).sample
    unmerge_lora(unet)
    assert all(torch.equal(weight, before[name]) for name, weight in unet.state_dict().items())
    # Float32 rounds sums in another order.  In half precision the weights are rounded, to 8 or 11 bits.
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
    assert (live - merged).float().norm() < tolerance * live.float().norm()
