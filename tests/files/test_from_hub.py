"""files/from_hub.py: what a stand-in of the hub has is read as if it lay here, and later without a network, too."""

import json
import re
from pathlib import Path

import pytest
import torch
from helpers import random_lora
from huggingface_hub import constants
from safetensors.torch import save_file
from stand_in import files_of

from minilora.files.fold import fold
from minilora.files.from_hub import base_path, lora_path
from minilora.files.layout import Checkpoint
from minilora.files.read import read_lora
from minilora.files.write import difference, write_lora
from minilora.settings.errors import UserError

MODULES = {f"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_{n}": (8, 8) for n in "qkv"}


@pytest.mark.parametrize(
    ("names", "asked"),
    [
        (["style.safetensors", "optimizer.safetensors", "README.md"], "someone/lora"),
        (["other.safetensors", "pytorch_lora_weights.safetensors"], "someone/lora"),
        (["a.safetensors", "deep/b.safetensors"], "someone/lora/deep/b.safetensors"),
    ],
)
def test_a_lora_is_chosen_as_by_diffusers_or_named_and_read_again_without_a_network(
    names, asked, hub, tmp_path, monkeypatch
):
    lora, other = (random_lora(MODULES, seed, share=1) for seed in (1, 2))
    meant = asked.partition("lora/")[2] or next((n for n in names if n.startswith("pytorch")), names[0])
    for name in names:
        write_lora(tmp_path / "hub" / name, lora if name == meant else other, "diffusers", MODULES)
    hub.repos["someone/lora"] = files_of(tmp_path / "hub")
    assert difference(lora, read_lora(Path(asked), MODULES)) <= 1
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.repos.clear()
    assert difference(lora, read_lora(Path(asked), MODULES)) <= 1


def test_a_peft_adapter_on_the_hub_has_its_scale(hub, tmp_path):
    lora = random_lora(MODULES, 3, share=1, ranks=(2, 3))
    write_lora(tmp_path / "hub", lora, "peft", MODULES)
    config = tmp_path / "hub" / "unet" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": 14}))
    hub.repos["someone/adapter"] = files_of(tmp_path / "hub")
    deltas = read_lora(Path("someone/adapter"), MODULES).deltas
    assert [delta.scale for delta in deltas.values()] == [7] * len(MODULES)


def test_a_base_on_the_hub_is_merged_into(hub, tmp_path):
    weights = {f"{name.removeprefix('unet.')}.weight": torch.randn(8, 8) for name in MODULES}
    base = tmp_path / "base"
    (base / "unet").mkdir(parents=True)
    save_file(weights, base / "unet" / "diffusion_pytorch_model.safetensors")
    (base / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    half = {key: tensor.half() for key, tensor in weights.items()}
    save_file(half, base / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    hub.repos["someone/base"] = files_of(base)
    write_lora(tmp_path / "l.safetensors", random_lora(MODULES, 3), "diffusers", MODULES)
    fold(Path("someone/base"), [(Path("l.safetensors"), 0.5)], tmp_path / "merged")
    (base / "unet" / "diffusion_pytorch_model.fp16.safetensors").unlink()
    fold(base, [(Path("l.safetensors"), 0.5)], tmp_path / "here")
    assert files_of(tmp_path / "merged") == files_of(tmp_path / "here")


def test_what_cannot_be_had_from_the_hub_is_said(hub, tmp_path):
    hub.repos |= {"someone/several": {"a.safetensors": b"x", "b.safetensors": b"y"}, "someone/none": {"a.ckpt": b"x"}}
    for name, said in {
        "someone/gone": "LoRA someone/gone: there is no such file or folder, and the hub has none",
        "someone/several": "it has 2 .safetensors files; name one, for example someone/several/a.safetensors",
        "someone/none": "LoRA someone/none: it has no .safetensors file of a LoRA",
        "someone/none/b.safetensors": "LoRA someone/none/b.safetensors: there is no such file or folder, and the hub",
        "here.safetensors": "here.safetensors: there is no such file or folder",
        "folder/here.bin": "folder/here.bin: a pickle, which can run code",
    }.items():
        with pytest.raises(UserError, match=re.escape(said)) as error:
            read_lora(Path(name), MODULES)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="someone/gone: there is no such file or folder, and the hub has none"):
        Checkpoint(Path("someone/gone"))
    assert not list(tmp_path.glob("someone*"))


def test_a_misspelt_name_in_a_folder_that_is_here_asks_no_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loras" / "mountain").mkdir(parents=True)
    for path in (Path("loras/mountian"), Path("loras/mountian/file.safetensors"), Path("out/before_any_training")):
        assert lora_path(path) == path
    assert base_path(Path("out/merged")) == Path("out/merged")
