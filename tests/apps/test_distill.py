"""apps/distill: the base draws what it learns from, what was stopped goes on, and the figures are what they say."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionPipeline
from helpers import CPU, ROOT, relative_difference
from PIL import Image
from safetensors.torch import load_file

from minilora import inject_lora, lora_parameters, save_lora
from minilora.apps import drawing, fewsteps, smooth
from minilora.apps.distill import DistillConfig, distill
from minilora.apps.drawing import draw_pictures, read_captions
from minilora.apps.fewsteps import called_right, crossed, wasserstein
from minilora.data.pictures import as_picture
from minilora.data.sheet import save_picture
from minilora.files.read import FILE_NAME
from minilora.lora import ATTENTION
from minilora.models.base import Base
from minilora.run.ranks import Ranks
from minilora.sampling import sample
from minilora.settings.command_line import read
from minilora.settings.errors import UserError
from minilora.settings.sample import SampleConfig

ONE = Ranks(0, 1, CPU)


@pytest.fixture
def config(tiny_base, tmp_path, monkeypatch) -> DistillConfig:
    monkeypatch.setattr(fewsteps, "MANY", 4)
    monkeypatch.setattr(smooth, "FRAMES", 5)
    monkeypatch.setattr("minilora.run.samples.before_after", lambda *_: Image.new("RGB", (8, 8)))
    (tmp_path / "captions.txt").write_text("".join(f"thing {number}\n" for number in range(34)))
    words = {"captions": str(tmp_path / "captions.txt"), "output": str(tmp_path / "out"), "model": str(tiny_base)}
    return DistillConfig(**words, pictures=5, train_steps=2, batch_size=4, rank=2)


# ------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize("objective", ["lcm", "smooth"])
def test_it_leaves_a_lora_its_figures_and_its_sheet(config, objective, capsys):
    figures = distill(replace(config, objective=objective))
    output = Path(config.output)
    assert load_file(output / FILE_NAME)
    assert json.loads((output / "figures.json").read_text())["figures"] == figures
    assert all(math.isfinite(value) for value in figures.values())
    assert Image.open(output / f"{objective}.png").width > 2 * 128
    assert all(f"{name}: {value:.4g}" in capsys.readouterr().out for name, value in list(figures.items())[:1])


def test_the_same_command_again_neither_draws_nor_trains_again(config, monkeypatch):
    distill(config)
    lora = (Path(config.output) / FILE_NAME).read_bytes()
    monkeypatch.setattr(drawing, "draw_from", None)
    with monkeypatch.context() as patched:
        patched.setattr("minilora.training.optimizer_step", None)
        distill(config)
    assert (Path(config.output) / FILE_NAME).read_bytes() == lora
    distill(replace(config, learning_rate=0.1))  # other settings train anew, on the same pictures
    assert (Path(config.output) / FILE_NAME).read_bytes() != lora


def test_what_was_stopped_goes_on_when_the_command_is_given_again(config, tmp_path, monkeypatch):
    distill(config)
    stopped = replace(config, output=str(tmp_path / "stopped"))
    with monkeypatch.context() as patched:
        patched.setattr("minilora.apps.distill.train", stop)
        with pytest.raises(KeyboardInterrupt):
            distill(stopped)
    distill(stopped)
    assert (tmp_path / "stopped" / FILE_NAME).read_bytes() == (Path(config.output) / FILE_NAME).read_bytes()


def stop(*args):
    raise KeyboardInterrupt


def test_two_processes_give_the_lora_of_one(config, tmp_path):
    settings = replace(config, objective="smooth", train_steps=10, learning_rate=1e-3, targets=ATTENTION)
    path = tmp_path / "settings.json"
    path.write_text(replace(settings, output=str(tmp_path / "two")).to_json())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "minilora.apps.distill", "--config", str(path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    distill(replace(settings, output=str(tmp_path / "one")))
    # The order of a float32 sum, magnified by Adam where a gradient is nearly zero.
    assert relative_difference(tmp_path / "one", tmp_path / "two") < 1e-3


# ------------------------------------------------------------------------------- captions, pictures


def test_held_out_captions_are_not_drawn(config, tmp_path):
    learnt, held_out = read_captions(config)
    assert held_out == ["thing 0", "thing 32"]
    draw_pictures(replace(config, pictures=40), learnt, tmp_path / "drawn", ONE)
    rows = [json.loads(line) for line in (tmp_path / "drawn" / "metadata.jsonl").read_text().splitlines()]
    assert len(rows) == 40
    assert {row["text"] for row in rows} == set(learnt)


def test_the_bundled_base_is_asked_for_its_styles():
    learnt, held_out = read_captions(DistillConfig())
    assert {"apple", "apple, noto style", "apple, twemoji style"} & {*learnt} or "apple, noto style" in held_out
    assert all(caption.endswith(drawing.STYLES[1:]) for caption in held_out)
    assert not {*learnt} & {caption.split(",")[0] for caption in held_out}


def test_pictures_do_not_depend_on_who_draws_them_and_are_drawn_once(config, tmp_path, monkeypatch):
    learnt, _ = read_captions(config)
    one = draw_pictures(config, learnt, tmp_path / "one", ONE)
    for rank in (0, 1):
        two = draw_pictures(config, learnt, tmp_path / "two", Ranks(rank, 2, CPU))
    for path in one.glob("*.png"):
        ours, theirs = (np.asarray(Image.open(folder / path.name)).astype(int) for folder in (one, two))
        assert abs(ours - theirs).max() <= 1  # another size of batch rounds otherwise

    before = {path: path.read_bytes() for path in one.iterdir()}
    (one / "00003.png").unlink()
    calls = []

    def count(base, noise, *rest):
        calls.append(len(noise))
        return drawn(base, noise, *rest)

    drawn = drawing.draw_from
    monkeypatch.setattr(drawing, "draw_from", count)
    draw_pictures(config, learnt, one, ONE)
    assert calls == [1]
    assert before.keys() == {*one.iterdir()}
    draw_pictures(replace(config, seed=1), learnt, one, ONE)
    assert calls == [1, 5]


# ------------------------------------------------------------------------------------------ drawing


def test_diffusers_own_pipeline_draws_the_same_with_the_lora(tiny_base, tmp_path):
    base = Base(str(tiny_base), CPU)
    inject_lora(base.unet, rank=2)
    torch.manual_seed(0)
    for parameter in lora_parameters(base.unet):
        torch.nn.init.normal_(parameter, std=0.2)
    save_lora(base.unet, tmp_path / FILE_NAME)

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_base)
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    pipeline.load_lora_weights(tmp_path)
    few = {"num_inference_steps": 4, "guidance_scale": 1.0, "generator": torch.Generator().manual_seed(3)}
    theirs = pipeline("red apple", height=16, width=16, **few).images[0]

    drawing = {"steps": 4, "guidance": 1.0, "scheduler": "lcm", "seed": 3, "model": str(tiny_base)}
    output = str(tmp_path / "ours.png")
    ours = Image.open(sample(SampleConfig(prompt=("red apple",), lora=(str(tmp_path),), output=output, **drawing)))
    # Ours is merged and theirs is beside the weights: float32 rounding over four steps, seen at 8 bits.
    assert np.abs(np.asarray(ours).astype(int) - np.asarray(theirs).astype(int)).max() <= 1


# ------------------------------------------------------------------------------------------ figures


def test_the_distance_of_distributions_is_how_far_they_are_moved_and_does_not_see_the_order():
    a = torch.randn(50, 20, generator=torch.Generator().manual_seed(0))
    a = (a - a.mean(0)) / a.std(0)
    assert wasserstein(a.flip(0), a, a) == 0
    assert wasserstein(a + 0.3, a, a) == pytest.approx(0.3, rel=1e-5)
    assert wasserstein(2 * (a + 0.3), 2 * a, 2 * a) == pytest.approx(0.3, rel=1e-5)  # in standard deviations


def test_each_seed_is_compared_with_another_one():
    one, two = torch.zeros(3, 1), torch.tensor([[0.0], [1.0], [2.0]])
    both = torch.stack([one, two], dim=1).flatten(0, 1)  # caption by caption, the seeds one after the other
    swapped = torch.stack([two, one], dim=1).flatten(0, 1)
    assert crossed(swapped, both) == 0
    assert crossed(both, both) > 0


def test_the_style_classifier_tells_styles_that_are_there_and_not_those_that_are_not(tmp_path):
    rows, captions = [], []
    generator = torch.Generator().manual_seed(0)
    pixels = 0.3 * torch.randn(40, 3, 16, 16, generator=generator)
    for number, picture in enumerate(pixels):
        captions.append(f"a thing{drawing.STYLES[1 + number % 2]}")
        picture[0] += 0.5 if number % 2 else -0.5  # one style is red
        save_picture(as_picture(picture), tmp_path / f"{number}.png")
        rows.append(json.dumps({"file_name": f"{number}.png", "text": captions[-1]}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    figures = called_right({"there": pixels, "swapped": pixels.roll(1, 0)}, captions, tmp_path)
    assert figures["style called as asked for; there"] > 0.95
    assert figures["style called as asked for; swapped"] < 0.05


# ----------------------------------------------------------------------------------------- mistakes


def test_settings_that_do_not_fit_are_refused(config):
    with pytest.raises(UserError, match="--objective is 'lmc'; it can be lcm, smooth"):
        DistillConfig(objective="lmc")
    with pytest.raises(UserError, match="--guidance is 4,2; it takes the lowest, at least 1, and the highest number"):
        DistillConfig(guidance=(4, 2))
    with pytest.raises(UserError, match="--weight has no effect on --objective lcm"):
        DistillConfig(weight=2.0)
    with pytest.raises(UserError, match=r"nowhere\.txt: it cannot be read as text"):
        distill(replace(config, captions="nowhere.txt"))
    Path(config.captions).write_text("one\n")
    with pytest.raises(UserError, match="it has 1 captions; it needs two"):
        distill(config)


def test_defaults_follow_the_objective():
    assert read(DistillConfig, ["--objective", "smooth"], "").output == "out/smooth"
    assert DistillConfig().train_steps > DistillConfig(objective="smooth").train_steps
