"""settings/base.py: the base that a LoRA names is found, in all ways in which it can be named."""

import pytest
import torch
from safetensors.torch import save_file

from minilora.settings.base import named_base
from minilora.settings.sample import SampleConfig
from minilora.settings.train import TrainConfig

FILE = "pytorch_lora_weights.safetensors"
CARD = b"---\nbase_model:\n- owner/base\n- other/base\nlicense: other\n---\n# A LoRA\n"


@pytest.fixture
def lora(tmp_path):
    """What writes a LoRA's folder with some more files, and returns the folder."""

    def write(metadata: dict | None = None, **files: bytes | str):
        (tmp_path / "lora").mkdir()
        save_file({"x": torch.zeros(1)}, tmp_path / "lora" / FILE, metadata)
        for name, content in files.items():
            path = tmp_path / "lora" / name.replace("_dot_", ".")
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return tmp_path / "lora"

    return write


@pytest.mark.parametrize(
    ("metadata", "files"),
    [
        (None, {"README_dot_md": CARD}),
        (None, {"README_dot_md": b"---\nbase_model: owner/base\n---\n"}),
        (None, {"adapter_config_dot_json": '{"peft_type": "LORA", "base_model_name_or_path": "owner/base"}'}),
        ({"ss_sd_model_name": "owner/base"}, {}),
        ({"ss_sd_model_name": "owner/base"}, {"README_dot_md": b"# no head", "config_dot_json": "{"}),
        (None, {"config_dot_json": TrainConfig(data=("x",), model="owner/base").to_json(), "README_dot_md": b"---\n:"}),
    ],
)
def test_a_lora_of_this_machine_names_its_base_and_settings_follow(metadata, files, lora):
    folder = lora(metadata, **files)
    for text in (str(folder), f"{folder}:0.5", str(folder / FILE)):
        config = SampleConfig(prompt=("a dog",), lora=("nothing.safetensors", text))
        assert (config.model, config.steps, config.guidance) == ("owner/base", 30, 7.5)
        assert str(folder) in named_base(config.lora).by
    given = SampleConfig(prompt=("a dog",), lora=(str(folder),), model="another/base", steps=3)
    assert (given.model, given.steps) == ("another/base", 3)


def test_a_name_without_its_folder_is_looked_for_beside_the_lora(lora):
    folder = lora({"ss_sd_model_name": "base.safetensors"})
    assert named_base(str(folder)).settings == {"model": "base.safetensors"}
    (folder / "base.safetensors").write_bytes(b"")
    assert named_base(str(folder)).settings == {"model": str(folder / "base.safetensors")}


def test_how_the_base_was_read_in_training_is_how_it_is_read_in_drawing(lora):
    how = {"model": "a/b", "vae": "v", "prediction_type": "v_prediction", "revision": "old", "variant": "fp16"}
    trained = TrainConfig(data=("x",), zero_terminal_snr=True, **how)
    drawn = SampleConfig(prompt=("a dog",), lora=(str(lora(config_dot_json=trained.to_json())),))
    assert {name: getattr(drawn, name) for name in how} == how
    assert drawn.zero_terminal_snr is True


def test_a_lora_of_the_bundled_base_is_drawn_on_it(lora):
    bundled = TrainConfig(data=("x",), vae="v").to_json()
    for files in ({}, {"README_dot_md": b"no card"}, {"config_dot_json": bundled, "README_dot_md": CARD}):
        folder = lora(**files)
        config = SampleConfig(prompt=("a dog",), lora=(str(folder),))
        assert (config.model, config.vae, config.steps, config.zero_terminal_snr) == (None, None, 20, False)
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


def test_a_lora_on_the_hub_names_its_base_by_its_card(hub):
    hub.repos |= {"someone/carded": {"README.md": CARD}, "someone/cardless": {"a.safetensors": b""}}
    assert named_base(("someone/cardless", "someone/carded:0.5")).settings == {"model": "owner/base"}
    assert named_base("someone/carded/deep/b.safetensors").by == "the card of someone/carded/deep/b.safetensors"
    assert named_base(("someone/cardless", "someone/gone")) is None
    hub.repos.clear()  # later the card in the cache is enough
    named_base.__globals__["_on_hub"].cache_clear()
    assert named_base("someone/carded").settings == {"model": "owner/base"}
