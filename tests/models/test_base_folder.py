"""models/folder.py: a base in a folder, its weights in whatever variant there is."""

import shutil
from pathlib import Path

import pytest
import torch
from helpers import CPU
from safetensors.torch import load_file, save_file
from stand_in import files_of

from minilora.files.fold import fold
from minilora.files.layout import Checkpoint
from minilora.models.base import Base
from minilora.models.folder import KINDS, Folder
from minilora.settings.errors import UserError


@pytest.fixture
def copy(family_base, tmp_path):
    """A folder of a tiny base of XL that a test may change."""
    return shutil.copytree(family_base("sdxl"), tmp_path / "base")


def only_variant(path, variant: str) -> None:
    """Write a file of weights in half precision, as a variant, and no longer as it was."""
    half = {key: tensor.half() for key, tensor in load_file(path).items()}
    save_file(half, path.with_suffix(f".{variant}.safetensors"), {"format": "pt"})
    path.unlink()


@pytest.mark.parametrize("variant", ["fp16", "half"])
def test_a_variant_is_used_where_there_is_no_other(variant, copy, family_base, capsys):
    for path in list(copy.glob("*/*.safetensors")):
        only_variant(path, variant)
    ours, whole = Base(str(copy), CPU), Base(str(family_base("sdxl")), CPU)
    for part in KINDS:
        one, other = (getattr(base, part).state_dict() for base in (ours, whole))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key].half().float()) for key in one)
    told = capsys.readouterr().err
    assert all(f"its {part} has only the variant {variant}, which is used" in told for part in KINDS)


def test_the_plain_weights_come_before_a_variant_and_a_variant_before_one_of_before_the_average(copy, capsys):
    unet = copy / "unet" / "diffusion_pytorch_model.safetensors"
    plain = load_file(unet)
    one, two = ({key: tensor + more for key, tensor in plain.items()} for more in (1, 2))
    save_file(one, unet.with_suffix(".fp16.safetensors"), {"format": "pt"})
    ours = Base(str(copy), CPU).unet.state_dict()
    assert all(torch.equal(ours[key], plain[key]) for key in plain)
    assert "variant" not in capsys.readouterr().err
    save_file(two, unet.with_suffix(".a_non_ema.safetensors"), {"format": "pt"})
    unet.unlink()
    ours = Base(str(copy), CPU).unet.state_dict()
    assert all(torch.equal(ours[key], one[key]) for key in plain)


def test_a_variant_in_parts_is_used_too(copy, family_base):
    for part in ("unet", "text_encoder_2"):
        module = Folder(str(copy), "--model x").module(part, torch.float32)
        for path in (copy / part).glob("*.safetensors"):
            path.unlink()
        module.save_pretrained(copy / part, variant="fp16", max_shard_size="40KB")
        assert len(list((copy / part).glob("*.safetensors"))) > 1
        ours = getattr(Base(str(copy), CPU), part).state_dict()
        whole = getattr(Base(str(family_base("sdxl")), CPU), part).state_dict()
        assert all(torch.equal(ours[key], whole[key]) for key in whole)


@pytest.mark.parametrize("part", KINDS)
def test_a_tensor_that_a_part_lacks_is_named_in_a_variant_too(part, copy):
    [path] = (copy / part).glob("*.safetensors")
    tensors = load_file(path)
    key = sorted(tensors)[3]
    save_file({k: t for k, t in tensors.items() if k != key}, path, {"format": "pt"})
    only_variant(path, "fp16")
    lacking = key if part != "text_encoder" else key.removeprefix("text_model.")
    with pytest.raises(UserError, match=f"the weights of its {part} lack (text_model.)?{lacking}$"):
        getattr(Base(str(copy), CPU), part)


def test_a_folder_without_vae_takes_one(copy, family_base):
    shutil.rmtree(copy / "vae")
    with pytest.raises(UserError, match=r"its vae does not load \(.*\); --vae takes another"):
        _ = Base(str(copy), CPU).vae
    base = Base(str(copy), CPU, vae=str(family_base("sd1")))
    assert base.resolution == 16
    assert base.vae.config.latent_channels == 4


def test_the_variant_that_is_asked_for_is_the_one_that_is_used_and_merged_into(copy, family_base, tmp_path, capsys):
    for path in list(copy.glob("*/*.safetensors")):
        plain = path.read_bytes()
        only_variant(path, "half")
        path.write_bytes(plain)
    asked, found, whole = (
        Base(name, CPU, variant=v).unet.state_dict()
        for name, v in ((str(copy), "half"), (str(copy), None), (str(family_base("sdxl")), None))
    )
    assert all(torch.equal(asked[key], whole[key].half().float()) for key in whole)
    assert all(torch.equal(found[key], whole[key]) for key in whole)
    assert "variant" not in capsys.readouterr().err
    fold(copy, [], tmp_path / "merged", variant="half")
    assert all(".half." in path.name for path in (tmp_path / "merged").glob("*/*.safetensors"))
    for refused in (lambda: Base(str(copy), CPU, variant="fp8").unet, lambda: Checkpoint(copy, variant="fp8")):
        with pytest.raises(UserError, match="fp8"):
            refused()


def test_a_revision_and_a_variant_of_a_base_on_the_hub(tiny_base, hub, tmp_path, monkeypatch):
    """Its weights in the older revision are others, and its variant has others again."""
    old = shutil.copytree(tiny_base, tmp_path / "old")
    unet = old / "unet" / "diffusion_pytorch_model.safetensors"
    for path, factor in ((unet, 2), (unet.with_suffix(".fp16.safetensors"), 3)):
        save_file(
            {key: factor * tensor for key, tensor in load_file(tiny_base / "unet" / unet.name).items()},
            path,
            {"format": "pt"},
        )
    hub.repos |= {"someone/base": files_of(tiny_base), "someone/base@old": files_of(old)}
    monkeypatch.chdir(tmp_path)
    newest = Base("someone/base", CPU)
    for variant, factor in ((None, 2), ("fp16", 3)):
        base = Base("someone/base", CPU, revision="old", variant=variant)
        ours = base.unet.state_dict()
        assert all(torch.equal(ours[key], factor * tensor) for key, tensor in newest.unet.state_dict().items())
        assert base.parts.commit != newest.parts.commit
        [file] = [
            file
            for path, file in Checkpoint(Path("someone/base"), "old", variant).files.items()
            if path.parts[0] == "unet"
        ]
        assert all(
            (file.read(key) == factor * tensor.numpy()).all() for key, tensor in newest.unet.state_dict().items()
        )
    for refused in (lambda: Base(str(tiny_base), CPU, revision="old"), lambda: Checkpoint(tiny_base, "old")):
        with pytest.raises(UserError, match=r"--revision old: .* only a base on the hub has revisions"):
            refused()
    with pytest.raises(UserError, match="someone/base: neither a diffusers folder"):
        Base("someone/base", CPU, revision="never")
