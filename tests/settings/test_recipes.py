"""A recipe is other settings: what it sets, for how many pictures and which base, and that everything else wins."""

import json

import pytest
from helpers import write_single_file
from PIL import Image

from minilora.files.read import FILE_NAME
from minilora.settings.command_line import read
from minilora.settings.recipes import RECIPES
from minilora.settings.setting import BUNDLED
from minilora.settings.train import TrainConfig
from minilora.training import train


def parse(*words: str) -> TrainConfig:
    return read(TrainConfig, list(words), "")


def photos(folder, count: int):
    folder.mkdir()
    for number in range(count):
        Image.new("RGB", (20, 20), (10 * number, 0, 0)).save(folder / f"{number}.jpg")
    return str(folder)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_nothing_but_the_settings_that_it_stands_for(tmp_path, recipe):
    """Typed in full, its words give the same settings, on each family."""
    data = photos(tmp_path / "photos", 15)
    hub = ("stable-diffusion-v1-5/stable-diffusion-v1-5", "stabilityai/stable-diffusion-xl-base-1.0")
    for model in (*hub, str(BUNDLED)):
        for more in ([], ["--class-prompt", "a dog"]):
            by_recipe = parse("--data", data, "--model", model, "--recipe", recipe, *more)
            typed = parse("--data", data, "--model", model, *by_recipe.recipe_as_typed().split(), *more)
            assert by_recipe.identity() == typed.identity()
            assert by_recipe.gradient_checkpointing == typed.gradient_checkpointing == ("xl" in model)


def test_steps_follow_the_number_of_pictures_within_limits(tmp_path):
    few, some, many = (photos(tmp_path / str(count), count) for count in (1, 15, 40))
    steps = [parse("--data", data, "--model", "a/b", "--recipe", "subject").steps for data in (few, some, many)]
    assert steps[0] < steps[1] < steps[2]
    assert steps[1] == 15 * 100
    assert parse("--data", f"{some}:2", "--model", "a/b", "--recipe", "face").steps == 30 * 100
    (tmp_path / "15" / ".hidden.jpg").write_bytes(b"")
    assert parse("--data", some, "--model", "a/b", "--recipe", "subject").steps == steps[1]
    doubled = parse("--data", some, "--model", "a/b", "--recipe", "subject", "--class-prompt", "dog")
    assert doubled.steps == 2 * steps[1]


def test_the_command_line_and_the_file_win_also_with_the_values_of_no_recipe(tmp_path):
    data, file = photos(tmp_path / "photos", 15), tmp_path / "config.json"
    words = ["--data", data, "--model", "a/b", "--recipe", "face"]
    plain, by_recipe = parse(*words[:4]), parse(*words)
    typed = parse(*words, "--rank", str(plain.rank), "--steps", "7", "--no-train-text-encoder")
    assert (typed.rank, typed.steps, typed.train_text_encoder) == (plain.rank, 7, False)
    assert typed.alpha == plain.rank
    assert "--rank" not in typed.recipe_as_typed()
    file.write_text(json.dumps({"steps": 9}))
    assert parse(*words, "--config", str(file)).steps == 9
    file.write_text(by_recipe.to_json())
    assert parse("--config", str(file)) == by_recipe


def test_a_folder_and_a_file_say_their_family(tmp_path, family_base):
    data = photos(tmp_path / "photos", 3)
    for family in ("sd1", "sdxl"):
        folder = family_base(family)
        file, _ = write_single_file(folder, tmp_path / f"{family}.safetensors")
        for model in (folder, file):
            config = parse("--data", data, "--model", str(model), "--recipe", "subject")
            assert config.train_text_encoder == (family == "sd1")
            assert config.gradient_checkpointing == (family == "sdxl")


def test_a_run_prints_what_its_recipe_stands_for(tiny_base, tmp_path, capsys):
    data = photos(tmp_path / "photos", 3)
    settings = {"data": (data,), "caption": "sks", "model": str(tiny_base), "cache": str(tmp_path / "cache")}
    config = TrainConfig(**settings, recipe="style", steps=1, output=str(tmp_path / "out"))
    train(config)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("recipe"))
    assert line.endswith(f"style: {config.recipe_as_typed()}")
    typed = parse("--data", data, "--model", str(tiny_base), *config.recipe_as_typed().split())
    again = TrainConfig(
        **settings,
        steps=1,
        output=str(tmp_path / "again"),
        **{name: getattr(typed, name) for name in ("rank", "learning_rate", "caption_dropout", "mirror", "buckets")},
    )
    train(again)
    assert (tmp_path / "out" / FILE_NAME).read_bytes() == (tmp_path / "again" / FILE_NAME).read_bytes()


def test_a_recipe_that_there_is_not_is_named(tmp_path):
    with pytest.raises(Exception, match="--recipe is 'pet'; it can be subject, face, style"):
        parse("--data", photos(tmp_path / "photos", 1), "--recipe", "pet")
