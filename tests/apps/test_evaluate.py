"""apps/evaluate.py: distances that are 0 where they must be, copies that are found, a loss that training lowers."""

import json
import shutil

import pytest
import torch
from conftest import make_picture
from diffusers import UNet2DConditionModel
from helpers import randomize
from PIL import Image

from minilora import inject_lora, save_lora
from minilora.apps.evaluate import PROMPTS, EvaluateConfig, evaluate
from minilora.apps.likeness import kernel_distance
from minilora.run.validation import FIGURES
from minilora.settings.command_line import read
from minilora.settings.errors import UserError
from minilora.settings.setting import BUNDLED
from minilora.settings.train import TrainConfig
from minilora.training import train


def test_the_kernel_distance_is_the_sum_written_out():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (4, 5))

    def k(a, b):
        return ((a @ b).item() / 3 + 1) ** 3

    same = sum(k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j) / 12
    other = sum(k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j) / 20
    across = sum(k(a, b) for a in x for b in y) / 20
    assert kernel_distance(x, y) == pytest.approx(same + other - 2 * across)


def test_the_kernel_distance_is_0_on_average_within_one_distribution_and_grows_with_the_shift():
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randn(2, 16, 4, generator=generator) for _ in range(400)]
    mean = sum(kernel_distance(*pair) for pair in draws) / len(draws)
    spread = torch.tensor([kernel_distance(*pair) for pair in draws]).std().item()
    assert abs(mean) < 4 * spread / len(draws) ** 0.5  # four standard errors
    shifts = [kernel_distance(draws[0][0], draws[0][1] + shift) for shift in (0.0, 1.0, 2.0)]
    assert shifts == sorted(shifts)


@pytest.fixture
def config(pictures, tmp_path, tiny_base):
    """Three new pictures and one that is of the reference, given again."""
    drawn = tmp_path / "drawn"
    drawn.mkdir()
    for number in range(3):
        make_picture(100 + number).save(drawn / f"new{number}.png")
    shutil.copy(pictures / "3.png", drawn / "copy.png")
    return EvaluateConfig(folders=(str(drawn), str(pictures)), model=str(tiny_base), output=str(tmp_path / "out"))


def test_a_copy_is_found(config, tmp_path, capsys):
    figures = evaluate(config)
    printed = capsys.readouterr().out
    assert "copy.png is 0.000 from 3.png" in printed.splitlines()[1]  # the most alike first
    assert figures["share of copies"] == 0.25
    assert json.loads((tmp_path / "out" / "figures.json").read_text())["figures"] == figures
    assert Image.open(tmp_path / "out" / "nearest.png").width > 4 * 128


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_the_losses_are_those_of_training_on_the_same_pictures(config, pictures, tmp_path, family_base, family):
    """Also of a LoRA in the text encoders, which changes what the captions mean."""
    settings = {"steps": 10, "batch_size": 10, "learning_rate": 0.02, "cache": str(tmp_path / "cache")}
    settings |= {"validation": str(pictures), "train_text_encoder": True, "model": str(family_base(family))}
    path = train(TrainConfig(data=(str(pictures),), output=str(tmp_path / "run"), **settings))
    losses = json.loads((path.parent / FIGURES).read_text())["losses"]
    given = {"lora": (str(path),), "model": settings["model"]}
    figures = evaluate(EvaluateConfig(**vars(config) | given))
    without, learnt = (figures[f"denoising loss on the reference; {name}"] for name in ("base", "with LoRA"))
    assert learnt < without
    assert without == pytest.approx(losses["0"], rel=1e-5)  # of float32 sums in another order
    assert learnt == pytest.approx(losses["10"], rel=1e-4)  # merged in the one, beside the weights in the other


def test_drift_is_0_without_a_change_and_grows_with_it(config, tmp_path, monkeypatch, capsys):
    assert {*PROMPTS} <= {*(BUNDLED / "captions.txt").read_text().splitlines()}
    monkeypatch.setattr("minilora.apps.evaluate.PROMPTS", PROMPTS[:3])
    unet = UNet2DConditionModel.from_pretrained(config.model, subfolder="unet")
    inject_lora(unet, rank=2)
    save_lora(unet, tmp_path / "nothing")
    randomize(unet)
    save_lora(unet, tmp_path / "lora")

    def drift(lora: str) -> float:
        given = {"folders": (), "lora": (lora,), "drift": True, "output": str(tmp_path / "drift")}
        figures = evaluate(EvaluateConfig(**vars(config) | given))
        return figures["drift by the VAE's features"]

    lora = str(tmp_path / "lora")
    assert drift(str(tmp_path / "nothing")) == pytest.approx(0, abs=1e-6)  # of a cosine in float32
    assert 0 < drift(f"{lora}:0.1") < drift(lora)
    assert f"drift on {', '.join(PROMPTS[:3])}\n" in capsys.readouterr().out
    assert Image.open(tmp_path / "drift" / "drift.png").height > 3 * 128
    with pytest.raises(UserError, match="--drift needs --lora, whose drift is measured"):
        EvaluateConfig(drift=True)


def test_likeness_is_highest_of_a_set_with_itself(config, tmp_path, monkeypatch):
    monkeypatch.setattr("minilora.apps.evaluate.PROMPTS", PROMPTS[:3])
    unet = UNet2DConditionModel.from_pretrained(config.model, subfolder="unet")
    inject_lora(unet, rank=2)
    save_lora(unet, tmp_path / "lora")
    same, other = tmp_path / "same", tmp_path / "other"
    for number, folder in enumerate((same, other)):
        folder.mkdir()
        for name in "abcd":
            make_picture(number).save(folder / f"{name}.png")

    def likeness(folder) -> float:
        given = {"folders": (str(folder), str(same)), "caption": "a", "lora": (str(tmp_path / "lora"),), "drift": True}
        return evaluate(EvaluateConfig(**vars(config) | given))["likeness by the VAE's features"]

    assert likeness(same) == pytest.approx(1)  # of four equal pictures
    assert likeness(other) < likeness(same)


def test_mistakes_are_said(config, tmp_path):
    with pytest.raises(UserError, match="takes two folders, PICTURES REFERENCE, not a"):
        read(EvaluateConfig, ["a"], "")
    (tmp_path / "few").mkdir()
    make_picture(1).save(tmp_path / "few" / "a.png")
    few = EvaluateConfig(**vars(config) | {"folders": (str(tmp_path / "few"),) * 2, "caption": "a"})
    with pytest.raises(UserError, match="few: 1 pictures are too few to compare; it needs at least 2"):
        evaluate(few)
