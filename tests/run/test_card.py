"""run/card.py: what the page of a LoRA says to type does what it says, and its table is of what was chosen."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from minilora.data.folder import Item
from minilora.run.card import model_card
from minilora.sampling import sample
from minilora.settings.command_line import read
from minilora.settings.sample import SampleConfig
from minilora.settings.train import TrainConfig
from minilora.training import train


def test_what_the_card_says_to_type_works_when_copied_and_draws_the_same(
    pictures, tmp_path, family_base, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    base = str(family_base("sd2"))  # which predicts v, as --zero-terminal-snr needs
    recipe = {"steps": 2, "batch_size": 1, "rank": 2, "learning_rate": 0.05, "zero_terminal_snr": True}
    train(TrainConfig(data=(str(pictures),), model=base, cache="cache", output="out/it's mine", **recipe))
    text = ModelCard.load("out/it's mine/README.md").text
    [command] = re.findall(r"```bash\n(.*)\n```", text)
    assert f"next       {command}" in capsys.readouterr().out
    words = shlex.split(command)
    assert words[:2] == ["python", "sample.py"]
    same = ["--steps", "50", "--guidance", "7.5"]  # diffusers' defaults, which are not ours
    sample(read(SampleConfig, [*words[2:], *same, "--output", "ours.png"], ""))
    sample(read(SampleConfig, [*words[2:], *same, "--output", "other.png", "--seed", "1"], ""))
    [code] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(code.replace("('picture 0')", "('picture 0', generator=seed)"), {"seed": torch.Generator().manual_seed(0)})
    ours, other, theirs = (np.array(Image.open(name), int) for name in ("ours.png", "other.png", "drawn.png"))
    assert abs(ours - theirs).max() <= 1  # of 255: ours is merged, theirs is added, and both are rounded
    assert abs(other - theirs).max() > 8


def test_the_table_is_of_what_was_chosen():
    def table(**settings) -> dict[str, str]:
        page = model_card(TrainConfig(data=("d",), **settings), [Item(Path("a"), "", (8, 8), ("a",))], False, "p.png")
        return dict(re.findall(r"^\| (\w+) \| (.*) \|$", page, re.MULTILINE)[1:])

    usual = {"steps": "300", "rank": "8", "alpha": "8.0", "targets": "linear,conv", "batch_size": "8"}
    usual |= {"learning_rate": "0.002", "caption_dropout": "0.1"}
    assert table() == usual
    assert table(snr_gamma=5.0, steps=7) == usual | {"snr_gamma": "5.0", "steps": "7"}
    from_file = {name: value for name, value in usual.items() if name not in ("rank", "alpha", "targets")}
    assert table(init_from="out/first") == from_file | {"init_from": "first"}  # whose ranks are the file's


@pytest.mark.parametrize("caption", ["a: 'b' \"c\" #d", "— “é”\u2028日本, 🍎", "- x\n---\ny: |", "yes", "word " * 50])
def test_the_hub_reads_the_head_whatever_the_captions_are(caption, tmp_path):
    item = Item(Path("a"), "", (8, 8), (caption,))
    head = ModelCard(model_card(TrainConfig(data=("d",), model="owner/base"), [item], True, "p.png")).data.to_dict()
    assert head == {
        "base_model": "owner/base",
        "library_name": "diffusers",
        "license": "other",
        "license_name": "that-of-base-and-pictures",
        "tags": ["text-to-image", "lora", "stable-diffusion-xl", "minilora"],
        "widget": [{"text": caption, "output": {"url": "p.png"}}],
    }
    here = TrainConfig(data=("d",), model=str(tmp_path))  # of a folder the hub knows nothing
    assert {"base_model", "widget"}.isdisjoint(ModelCard(model_card(here, [item], False, None)).data.to_dict())
