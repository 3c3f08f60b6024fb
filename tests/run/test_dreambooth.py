"""run/dreambooth.py: class pictures drawn once, counted, and seen at every other position."""

import re
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_picture
from helpers import ROOT, randomize, relative_difference
from PIL import Image
from safetensors.torch import load_file, save_file

from minilora import inject_lora, save_lora, training
from minilora.data.folder import read_folders
from minilora.models.base import Base
from minilora.models.device import this_device
from minilora.run.dreambooth import class_pictures
from minilora.run.encode import encoded_examples
from minilora.run.ranks import Ranks
from minilora.run.setup import load_base
from minilora.sampling import sample
from minilora.settings.errors import UserError
from minilora.settings.sample import SampleConfig
from minilora.settings.train import TrainConfig

ONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture
def config(pictures, tmp_path, tiny_base) -> TrainConfig:
    settings = {"steps": 4, "batch_size": 4, "learning_rate": 0.01, "class_pictures": 4}
    places = {"cache": str(tmp_path / "cache"), "output": str(tmp_path / "run"), "class_data": str(tmp_path / "dogs")}
    return TrainConfig(data=(str(pictures),), model=str(tiny_base), class_prompt="a dog", **settings, **places)


def drawn_for(config: TrainConfig) -> list:
    return class_pictures(config, load_base(config, ONE.device), ONE)


def test_missing_pictures_are_drawn_and_those_that_are_there_are_counted(config, tmp_path, monkeypatch):
    folder = tmp_path / "dogs"
    folder.mkdir()
    make_picture(7).save(folder / "mine.png")
    items = drawn_for(config)
    names = ["class-00000.png", "class-00001.png", "class-00002.png", "mine.png"]
    assert [item.path.name for item in items] == names
    assert {item.captions for item in items} == {("a dog",)}
    # Each is what sample.py draws with its number as the seed.
    drawing = SampleConfig(prompt=("a dog",), model=config.model, seed=2, output=str(tmp_path / "seed2.png"))
    assert np.array_equal(np.array(Image.open(sample(drawing))), np.array(Image.open(folder / "class-00002.png")))
    # Stopped on the way: only the missing one is drawn.
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    (folder / "class-00001.png").unlink()
    drawn_for(config)
    after = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert {name for name in names if before[name] != after[name]} == {"class-00001.png"}
    monkeypatch.setattr("minilora.run.dreambooth.draw", None)  # would fail, but there is nothing left to draw
    assert len(drawn_for(config)) == 4


def test_the_class_stands_at_every_other_position_with_its_weight(config):
    config = replace(config, prior_weight=0.25)
    subject, dogs = read_folders(config), drawn_for(config)
    examples = encoded_examples(subject, config, 16, Base(config.model, this_device()), 1000, ONE, (), dogs)
    batch = examples.batch(range(2, 8), ONE.device)
    assert batch.weights.tolist() == [1, 0.25] * 3
    seen = [examples.picture_at(position) for position in range(2 * len(subject) * len(dogs))]
    assert {item.path for item in seen[::2]} == {item.path for item in subject}
    assert {item.path for item in seen[1::2]} == {item.path for item in dogs}
    assert len({item.path for item in seen[: 2 * len(subject) : 2]}) == len(subject)  # an epoch of each
    assert len({item.path for item in seen[1 : 2 * len(dogs) : 2]}) == len(dogs)


def test_the_loss_is_that_of_the_subject_and_the_weighted_one_of_the_class(config, monkeypatch):
    """The first step's loss for weights 1 and 3: the class's part counts three times as much."""

    def first_loss(weight: float, **more) -> float:
        seen = []
        keep = training.optimizer_step
        monkeypatch.setattr(training, "optimizer_step", lambda *args: seen.append(keep(*args)) or seen[-1])
        training.train(replace(config, steps=1, prior_weight=weight, **more))
        monkeypatch.setattr(training, "optimizer_step", keep)
        return seen[0][0]

    one, two, three = (first_loss(weight) for weight in (1.0, 2.0, 3.0))
    assert two - one == pytest.approx(three - two, rel=1e-4)  # of float32 sums
    assert two > one


def test_what_is_learnt_depends_on_the_class(config, tmp_path):
    training.train(replace(config, output=str(tmp_path / "one")))
    training.train(
        replace(config, output=str(tmp_path / "plain"), class_prompt=None, class_data=None, class_pictures=None)
    )
    assert relative_difference(tmp_path / "one", tmp_path / "plain") > 0.1


def test_two_processes_share_the_drawing_and_learn_what_one_does(config, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(config.to_json())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*command, "train.py", "--config", str(file)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"class +0 of 4 pictures of 'a dog'", done.stdout)
    assert len(list((tmp_path / "dogs").iterdir())) == 4
    training.train(replace(config, output=str(tmp_path / "one")))
    # The order of a float32 sum, magnified by Adam where a gradient is nearly zero.
    assert relative_difference(tmp_path / "one", tmp_path / "run") < 1e-4


def test_a_class_folder_needs_its_prompt(config):
    with pytest.raises(UserError, match="--class-data needs --class-prompt, what"):
        replace(config, class_prompt=None)


def test_pictures_of_another_base_or_prompt_are_refused(config, tmp_path, family_base):
    make_picture(7).save(tmp_path / "mine.png")
    drawn_for(config)
    moved = shutil.copytree(config.model, tmp_path / "moved")
    drawn_for(replace(config, model=str(moved)))  # the same base
    drawn_for(replace(config, precision="bf16"))  # for which nobody draws them anew
    (tmp_path / "mine.png").rename(tmp_path / "dogs" / "mine.png")
    drawn_for(replace(config, class_pictures=5))

    unet = Base(config.model, ONE.device).unet
    inject_lora(unet, rank=2)
    randomize(unet)
    save_lora(unet, tmp_path / "lora.safetensors")
    refused = r"--class-data .*dogs: 4 of its 5 pictures .*class-00000\.png was drawn for 'a dog' by the base"
    for other in (
        {"class_prompt": "a cat"},
        {"model": str(family_base("sd1"))},
        {"base_lora": (str(tmp_path / "lora.safetensors"),)},
        {"prediction_type": "v_prediction"},
        {"vae": str(other_vae(moved))},
    ):
        with pytest.raises(UserError, match=refused):
            training.train(replace(config, **other))
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").glob("*.safetensors"))


def other_vae(folder):
    """Change one number of a base's VAE, and return the base."""
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["decoder.conv_out.bias"][0] += 1
    save_file(tensors, path, {"format": "pt"})
    return folder
