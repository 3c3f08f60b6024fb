"""merge.py and files/: W + s·ΔW, exactly; nothing else changes, nothing is left half-written."""

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_tiny_text_encoder, make_unet
from helpers import ROOT, random_lora
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from minilora.files import names
from minilora.files.fold import fold
from minilora.files.layout import Checkpoint
from minilora.files.low_rank import combine, extract, reduce
from minilora.files.network import live_modules
from minilora.files.read import Delta, LoRA, read_lora
from minilora.files.tensors import TensorFile
from minilora.files.undo import restore
from minilora.files.write import difference, write_lora
from minilora.settings.command_line import merge as command
from minilora.settings.errors import UserError
from minilora.settings.merge import DTYPES
from minilora.settings.shared import path_and_number

FAMILIES = ("sd1", "sd2", "sdxl")
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}  # this tree's minilora, from any folder


def parts_of(family: str, tokenizer) -> dict[str, torch.nn.Module]:
    kinds = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    if family != "sdxl":
        del kinds["text_encoder_2"]
    encoders = {component: make_tiny_text_encoder(tokenizer, kind) for component, kind in kinds.items()}
    return {"unet": make_unet(family), **encoders}


@pytest.fixture
def folder(tmp_path, tokenizer, request):
    """A diffusers folder: float32 and fp16 variants, a sharded text encoder, a VAE, files that are no weights."""
    base = tmp_path / "base"
    parts = parts_of(getattr(request, "param", "sd1"), tokenizer)
    for component, module in parts.items():
        if component == "unet":
            module.save_pretrained(base / component)
            module.half().save_pretrained(base / component, variant="fp16")
        else:
            module.save_pretrained(base / component, max_shard_size="20KB")
    (base / "vae").mkdir()
    save_file({"decoder.weight": torch.ones(3, 3)}, base / "vae" / "diffusion_pytorch_model.safetensors")
    (base / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    (base / "tokenizer").mkdir()
    (base / "tokenizer" / "vocab.json").write_text("{}")
    return base


def original_file(path, family: str, tokenizer, dtype=torch.float32):
    """Write a single file in the original layout, with an integer tensor and a moving average in it."""
    parts = parts_of(family, tokenizer)
    tensors = {"alphas_cumprod": torch.rand(1000), "model_ema.decay": torch.tensor(0.99), "steps": torch.tensor([7])}
    unet = parts["unet"]
    paths = [p for p, child in unet.named_modules() if next(child.parameters(recurse=False), None) is not None]
    originals = names.original_unet_paths(paths)
    for key, tensor in unet.state_dict().items():
        module, leaf = key.rsplit(".", 1)
        tensors[f"model.diffusion_model.{originals[module]}.{leaf}"] = tensor
    clip = {"sd1": "cond_stage_model.transformer.", "sdxl": "conditioner.embedders.0.transformer."}.get(family)
    openclip = {"sd2": "cond_stage_model.model.", "sdxl": "conditioner.embedders.1.model."}.get(family)
    for component, module in parts.items():
        if component == "unet":
            continue
        state = {names.full_name("x", k): v for k, v in module.state_dict().items()}
        state = {names.full_name(component, k.removeprefix("x.")).split(".", 1)[1]: v for k, v in state.items()}
        if clip and component == "text_encoder":
            tensors |= {f"{clip}{key}": value for key, value in state.items()}
            continue
        if component == "text_encoder_2":
            tensors[f"{openclip}text_projection"] = state["text_projection.weight"].T
        for layer in range(2):
            ours, theirs = f"text_model.encoder.layers.{layer}.", f"{openclip}transformer.resblocks.{layer}."
            qkv = [state[f"{ours}self_attn.{n}_proj.weight"] for n in "qkv"]
            tensors[f"{theirs}attn.in_proj_weight"] = torch.cat(qkv)
            tensors[f"{theirs}attn.out_proj.weight"] = state[f"{ours}self_attn.out_proj.weight"]
            tensors[f"{theirs}mlp.c_fc.weight"] = state[f"{ours}mlp.fc1.weight"]
            tensors[f"{theirs}mlp.c_proj.weight"] = state[f"{ours}mlp.fc2.weight"]
    half = {k: v.to(dtype).contiguous() if v.is_floating_point() else v for k, v in tensors.items()}
    save_file(half, path, {"format": "pt"})
    return path


def lora_for(base, path, seed=0, dialect="kohya", **options) -> LoRA:
    modules = Checkpoint(base).modules
    lora = random_lora(modules, seed, **options)
    write_lora(path, lora, dialect, modules)
    return read_lora(path, modules)


def bytes_of(path):
    if path.is_file():
        return {".": path.read_bytes()}
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def check_merged(base, merged, lora: LoRA, strength: float):
    """Every weight is W + s·ΔW or the very same bytes, and all other files are the same."""
    checkpoint = Checkpoint(base)
    before, after = ({path: load_file(place / path) for path in checkpoint.files} for place in (base, merged))
    changed = set()
    for name in lora.deltas:
        for place in checkpoint.places[name]:
            rows = slice(place.first_row, place.first_row + place.shape[0])
            new, old = (tensors[place.file][place.key] for tensors in (after, before))
            new, old = (new.T, old.T.double()) if place.transposed else (new[rows], old[rows].double())
            delta = lora.deltas[name]
            target = old + strength * torch.from_numpy(delta.matrix(np.float64))
            # A float32 sum of W and `rank` products, each as large as the size of its terms, rounded to W's type.
            terms = Delta(np.abs(delta.A), np.abs(delta.B), abs(strength * delta.scale)).matrix(np.float64)
            error = (delta.rank + 2) * torch.finfo(torch.float32).eps * (old.abs() + torch.from_numpy(terms))
            kind = torch.finfo(new.dtype)
            error += kind.eps * target.abs().clamp(min=kind.tiny)
            assert ((new.double() - target).abs() <= error).all(), name
            changed.add((place.file, place.key))
    for path, file in checkpoint.files.items():
        one, two = before[path], after[path]
        assert list(one) == list(two)
        assert all(torch.equal(one[key], two[key]) for key in file.entries if (path, key) not in changed)
    for path in checkpoint.others:
        assert (base / path).read_bytes() == (merged / path).read_bytes()


# -------------------------------------------------------------------------------------------- folding


@pytest.mark.parametrize("folder", FAMILIES, indirect=True)
def test_a_folder_with_variants_and_shards(folder, tmp_path):
    lora = lora_for(folder, tmp_path / "l.safetensors")
    assert {name.split(".")[0] for name in lora.deltas} >= {"unet", "text_encoder"}
    report = fold(folder, [(tmp_path / "l.safetensors", 0.7)], tmp_path / "out")
    check_merged(folder, tmp_path / "out", lora, 0.7)
    assert bytes_of(folder).keys() == bytes_of(tmp_path / "out").keys()
    assert sum(len(f.sizes) for f in report.folded) == len(lora.deltas)
    checkpoint = Checkpoint(folder)
    for folded in report.folded:
        for name, relative in folded.sizes.items():
            weight = checkpoint.weight(name)
            assert relative == pytest.approx(0.7 * lora.deltas[name].norm() / np.linalg.norm(weight), rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_single_file(family, dtype, tmp_path, tokenizer):
    base = original_file(tmp_path / "base.safetensors", family, tokenizer, dtype)
    lora = lora_for(base, tmp_path / "l.safetensors", share=0.9)
    kinds = {name.split(".")[0] for name in lora.deltas}
    assert kinds == {"unet", "text_encoder", *(["text_encoder_2"] if family == "sdxl" else [])}
    assert family != "sdxl" or "text_encoder_2.text_projection" in lora.deltas
    report = fold(base, [(tmp_path / "l.safetensors", -1.3)], tmp_path / "out.safetensors")
    check_merged(base, tmp_path / "out.safetensors", lora, -1.3)
    assert any("moving average" in note for note in report.notes)


def bare_lora(base, path, size: float, ends: str) -> LoRA:
    """Write the LoRA of some modules that changes their weights by about `size` of their own size."""
    checkpoint, random = Checkpoint(base), np.random.default_rng(0)
    deltas = {}
    for name, shape in checkpoint.modules.items():
        if name.endswith(ends):
            a, b = random.standard_normal((2, *shape[1:])), random.standard_normal((shape[0], 2))
            delta = Delta(a.astype(np.float32), b.astype(np.float32))
            scale = size * np.linalg.norm(checkpoint.weight(name)) / delta.norm()
            deltas[name] = Delta(delta.A, (delta.B * scale).astype(np.float32))
    write_lora(path, LoRA(deltas), "diffusers", checkpoint.modules)
    return LoRA(deltas)


@pytest.mark.parametrize(
    ("stored", "dtype", "size"),
    [
        (torch.bfloat16, None, 0.002),
        (torch.float16, None, 0.002),
        (torch.float32, "bfloat16", 0.02),
        (torch.bfloat16, "float32", 0.0005),
        (torch.float16, "float16", 0.0005),
    ],
)
def test_the_report_says_how_much_of_the_change_rounding_left(stored, dtype, size, tmp_path, tokenizer):
    base = original_file(tmp_path / "base.safetensors", "sd2", tokenizer, stored)
    out, lora = (
        tmp_path / "out.safetensors",
        bare_lora(base, tmp_path / "l.safetensors", size, ("q_proj", "to_v", "conv2")),
    )
    report = fold(base, [(tmp_path / "l.safetensors", 1.0)], out, written=DTYPES.get(dtype))
    lost, whole = ({"unet": 0.0, "text_encoder": 0.0} for _ in range(2))
    before, after = Checkpoint(base), Checkpoint(out)
    for name, delta in lora.deltas.items():
        wanted = delta.matrix(np.float64)
        error = after.weight(name) - before.weight(name).astype(np.float64) - wanted
        lost[name.split(".")[0]] += np.square(error).sum()
        whole[name.split(".")[0]] += np.square(wanted).sum()
    for component in lost:
        [line] = [note for note in report.notes if f"{component}:" in note]
        share = 1 - np.sqrt(lost[component] / whole[component])
        said = float(re.search(r"([\d.]+)% of ΔW survived rounding to", line)[1])
        assert said == pytest.approx(100 * max(0, share), abs=0.06)  # it is rounded to a tenth, of a float32 sum
        assert line.startswith("warning: ") == (share < 0.95)
        assert line.endswith("; see --dtype") == (share < 0.95)


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.float8_e5m2])
def test_all_weights_are_written_in_the_type_that_is_asked_for(stored, dtype, tmp_path, tokenizer):
    base = original_file(tmp_path / "base.safetensors", "sdxl", tokenizer, stored)
    lora = lora_for(base, tmp_path / "l.safetensors", share=0.2)
    fold(base, [(tmp_path / "l.safetensors", 0.5)], tmp_path / "out.safetensors", written=DTYPES[dtype])
    before, after = load_file(base), load_file(tmp_path / "out.safetensors")
    assert before.keys() == after.keys()
    places = {place.key for name in lora.deltas for place in Checkpoint(base).places[name]}
    kind = getattr(torch, dtype)
    for key, old in before.items():
        is_weight = "." in key and old.is_floating_point()
        assert after[key].dtype == (kind if is_weight else old.dtype)  # the tables of noise stay what they are
        if key not in places:
            assert torch.equal(after[key], old.to(after[key].dtype))
    merged = Checkpoint(tmp_path / "out.safetensors")
    for name, delta in lora.deltas.items():
        target = Checkpoint(base).weight(name) + 0.5 * delta.matrix(np.float64)
        terms = Delta(np.abs(delta.A), np.abs(delta.B), abs(0.5 * delta.scale)).matrix(np.float64)
        error = torch.finfo(kind).eps * np.abs(target) + 1e-6 * terms + 1e-7  # rounded once, a sum in float32
        assert (np.abs(merged.weight(name) - target) <= error).all()


def test_a_folder_is_written_in_the_type_that_is_asked_for_and_what_is_too_large_is_said(folder, tmp_path):
    lora_for(folder, tmp_path / "l.safetensors", share=0.1)
    loras = [(tmp_path / "l.safetensors", 1.0)]
    fold(folder, loras, tmp_path / "out", written="BF16")
    for path, file in Checkpoint(tmp_path / "out").files.items():
        assert {entry.dtype for entry in file.entries.values()} == {"BF16"}, path
    assert bytes_of(folder).keys() == bytes_of(tmp_path / "out").keys()
    save_file({"decoder.weight": torch.full((3, 3), 1e6)}, folder / "vae" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match=r"vae.*decoder\.weight would not be finite numbers of type F16"):
        fold(folder, loras, tmp_path / "half", written="F16")
    assert not (tmp_path / "half").exists()


def test_several_loras_add_up(folder, tmp_path):
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    a, b = (lora_for(folder, path, seed) for seed, path in enumerate(paths))
    fold(folder, [(paths[0], 0.5), (paths[1], -2.0)], tmp_path / "out", dtype=np.float64)
    check_merged(folder, tmp_path / "out", combine([(a, 0.5), (b, -2.0)]), 1.0)


def test_the_merged_folder_is_the_live_module_merged(tmp_path):
    from minilora import load_lora, merge_lora

    make_unet("sd1").save_pretrained(tmp_path / "base" / "unet")
    lora_for(tmp_path / "base", tmp_path / "l.safetensors")
    fold(tmp_path / "base", [(tmp_path / "l.safetensors", 0.7)], tmp_path / "out")
    live = make_unet("sd1")
    load_lora(live, tmp_path / "l.safetensors", strength=0.7)
    merge_lora(live)
    merged = type(live).from_pretrained(tmp_path / "out" / "unet").state_dict()
    for name, tensor in live.state_dict().items():
        if "lora" not in name:
            torch.testing.assert_close(merged[name.replace(".base.", ".")], tensor, rtol=1e-6, atol=1e-6)


def test_a_layers_strength_is_the_loras_times_its_blocks_factor(folder, tmp_path):
    lora = lora_for(folder, tmp_path / "l.safetensors", share=1.0)
    blocks = {"down": 0.2, "mid": 0.0, "up": 1.5, "up_blocks.1": -0.5}
    fold(folder, [(tmp_path / "l.safetensors", 0.7)], tmp_path / "out", blocks=blocks)
    factors = names.block_factors(lora.deltas, blocks)
    assert {*factors.values()} == {0.2, 0.0, 1.5, -0.5, 1.0}
    scaled = {name: replace(delta, scale=delta.scale * factors[name]) for name, delta in lora.deltas.items()}
    check_merged(folder, tmp_path / "out", LoRA(scaled), 0.7)


def test_blocks_of_factor_1_are_none_and_undo_knows_of_none(folder, tmp_path, monkeypatch):
    lora_for(folder, tmp_path / "l.safetensors", dialect="diffusers", share=1.0)
    base, lora, ones = str(folder), f"{tmp_path / 'l.safetensors'}:0.7", "down=1,mid=1,up=1,text=1"
    paths = {name: str(tmp_path / name) for name in ("plain", "ones", "some", "undo", "back")}
    for name, words in (("plain", []), ("ones", ["--lora-blocks", ones])):
        assert run(monkeypatch, base, lora, "--output", paths[name], *words) == 0
        assert run(monkeypatch, "--loras-only", lora, "--output", f"{paths[name]}.safetensors", *words) == 0
    assert bytes_of(tmp_path / "ones") == bytes_of(tmp_path / "plain")
    assert bytes_of(tmp_path / "ones.safetensors") == bytes_of(tmp_path / "plain.safetensors")
    some = ["--lora-blocks", "down=0.2,up=0.5", "--undo", paths["undo"]]
    assert run(monkeypatch, base, lora, "--output", paths["some"], *some) == 0
    assert bytes_of(tmp_path / "some") != bytes_of(tmp_path / "plain")
    assert run(monkeypatch, "--restore", paths["some"], paths["undo"], "--output", paths["back"]) == 0
    assert bytes_of(tmp_path / "back") == bytes_of(folder)


def test_a_lora_written_with_blocks_is_the_lora_merged_with_blocks(folder, tmp_path, monkeypatch, capsys):
    a, b, both, few, out = (tmp_path / f"{name}.safetensors" for name in ("a", "b", "both", "few", "out"))
    one, two = (lora_for(folder, path, seed, "diffusers", share=1.0) for seed, path in enumerate((a, b)))
    factors = names.block_factors(one.deltas, {"mid": 0.25, "up": -1.0, "text": 2.0})
    words = ["--lora-blocks", "mid=0.25,up=-1,text=2", "--output", both]
    assert run(monkeypatch, "--loras-only", f"{a}:0.5", b, *words) == 0
    for name, delta in read_lora(both, Checkpoint(folder).modules).deltas.items():
        expected = factors[name] * (0.5 * one.deltas[name].matrix(np.float64) + two.deltas[name].matrix(np.float64))
        np.testing.assert_allclose(delta.matrix(np.float64), expected, rtol=0, atol=1e-5)  # B is rounded to float32
    write_lora(few, LoRA(dict([*one.deltas.items()][:1])), "diffusers", Checkpoint(folder).modules)
    for start in ([folder], ["--loras-only"]):
        assert run(monkeypatch, *start, few, "--lora-blocks", "up_blocks.9=1", "--output", out) == 2
        assert "--lora-blocks up_blocks.9: no layer of a LoRA is there; they are in " in capsys.readouterr().err
        assert not out.exists()


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_undo_gives_the_base_back_byte_for_byte(kind, folder, tmp_path, tokenizer):
    base = folder if kind == "folder" else original_file(tmp_path / "base.safetensors", "sd2", tokenizer, torch.float16)
    lora_for(base, tmp_path / "l.safetensors")
    merged, undo, back = (tmp_path / name for name in ("merged", "undo.safetensors", "back"))
    fold(base, [(tmp_path / "l.safetensors", 0.7)], merged, undo=undo)
    assert bytes_of(merged) != bytes_of(base)
    restore(merged, undo, back)
    assert bytes_of(back) == bytes_of(base)
    with pytest.raises(UserError, match="was changed after the merge"):
        restore(base, undo, tmp_path / "wrong")
    with pytest.raises(UserError, match="is not the undo file of a merge"):
        restore(merged, tmp_path / "l.safetensors", tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()
    assert not list(tmp_path.glob(".*"))


def test_taking_it_off_again_returns_to_within_one_unit(tmp_path, tokenizer):
    base = original_file(tmp_path / "base.safetensors", "sd1", tokenizer)
    lora_for(base, tmp_path / "l.safetensors")
    fold(base, [(tmp_path / "l.safetensors", 0.7)], tmp_path / "merged.safetensors")
    fold(tmp_path / "merged.safetensors", [(tmp_path / "l.safetensors", -0.7)], tmp_path / "back.safetensors")
    before, merged, after = (load_file(tmp_path / f"{n}.safetensors") for n in ("base", "merged", "back"))
    for key in before:
        # A unit in the last place of the larger of W and W + ΔW: that is where the sum was rounded.
        unit = np.spacing(torch.maximum(before[key].abs(), merged[key].abs()).numpy())
        assert (np.abs(before[key].double().numpy() - after[key].double().numpy()) <= unit).all()


def test_an_undo_file_is_never_lost(folder, tmp_path):
    lora_for(folder, tmp_path / "l.safetensors")
    loras, out = [(tmp_path / "l.safetensors", 1.0)], tmp_path / "out"
    for inside in (out, out / "undo"):
        with pytest.raises(UserError, match="it is inside --output"):
            fold(folder, loras, out, undo=inside)
    (tmp_path / "undo").write_text("of another merge")
    with pytest.raises(UserError, match="undo: it already exists"):
        fold(folder, loras, out, undo=tmp_path / "undo", overwrite=True)
    assert not out.exists()


def test_a_link_is_replaced_and_not_what_it_points_to(folder, tmp_path):
    lora_for(folder, tmp_path / "l.safetensors")
    shutil.copytree(folder, tmp_path / "old")
    (tmp_path / "out").symlink_to(tmp_path / "old")
    fold(folder, [(tmp_path / "l.safetensors", 1.0)], tmp_path / "out", overwrite=True)
    assert bytes_of(tmp_path / "old") == bytes_of(folder) != bytes_of(tmp_path / "out")


def test_weights_of_other_kinds_are_left_out_and_said(folder, tmp_path):
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"x")
    (folder / "everything.safetensors").write_bytes(
        (folder / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()
    )
    lora_for(folder, tmp_path / "l.safetensors")
    report = fold(folder, [(tmp_path / "l.safetensors", 1.0)], tmp_path / "out")
    assert sum("left out" in note for note in report.notes) == 2
    assert not (tmp_path / "out" / "unet" / "diffusion_pytorch_model.bin").exists()


# ----------------------------------------------------------------------------------------- refusals


def test_what_cannot_be_merged_leaves_nothing(folder, tmp_path):
    out, lora = tmp_path / "out", tmp_path / "l.safetensors"
    lora_for(folder, lora)
    tensors = load_file(lora)

    def refused(match: str, base=folder, **options):
        with pytest.raises(UserError, match=match):
            fold(base, [(lora, 1.0)], out, undo=tmp_path / "undo", **options)
        assert not out.exists()
        assert not (tmp_path / "undo").exists()
        assert not list(tmp_path.glob(".*"))

    stray = {
        "lora_unet_nowhere.lora_down.weight": torch.ones(2, 3),
        "lora_unet_nowhere.lora_up.weight": torch.ones(3, 2),
    }
    save_file(tensors | stray, lora)
    refused("was not made for this base: .*base has no module for lora_unet_nowhere.lora_down.weight")
    report = fold(folder, [(lora, 1.0)], out, allow_unmatched=True)
    assert report.unmatched == {str(lora): sorted(stray)}
    shutil.rmtree(out)
    save_file(stray, lora)
    refused("was not made for this base", allow_unmatched=True)
    key = next(key for key in tensors if key.startswith("lora_unet") and key.endswith("lora_up.weight"))
    save_file(tensors | {key: torch.full_like(tensors[key], 1e38)}, lora)
    refused("would not be finite numbers of type F")
    save_file(tensors | {key: torch.full_like(tensors[key], torch.nan)}, lora)
    refused("not finite")
    save_file(tensors, lora)
    refused("neither a diffusers folder", base=folder / "tokenizer")
    refused("no such file or folder", base=tmp_path / "gone")
    out.mkdir()
    with pytest.raises(UserError, match="it already exists; choose another name, or give --overwrite"):
        fold(folder, [(lora, 1.0)], out)
    fold(folder, [(lora, 1.0)], out, overwrite=True)
    assert Checkpoint(out).modules == Checkpoint(folder).modules


def test_a_folder_with_other_things_in_it_is_not_overwritten(folder, tmp_path, tokenizer):
    lora_for(folder, tmp_path / "l.safetensors")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "work.txt").write_text("a year's work")
    single = original_file(tmp_path / "base.safetensors", "sd1", tokenizer)
    for base in (folder, single):
        with pytest.raises(UserError, match=r"the folder holds work\.txt, so it is not overwritten"):
            fold(base, [(tmp_path / "l.safetensors", 1.0)], tmp_path / "out", overwrite=True)
    with pytest.raises(UserError, match=r"the folder holds work\.txt, so it is not overwritten"):
        write_lora(tmp_path / "out", LoRA({}), "diffusers", {})
    assert (tmp_path / "out" / "work.txt").exists()


def damaged_headers():
    entry = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
    yield "overlap", {"a": entry, "b": entry}, 16
    yield "hole", {"a": entry, "b": entry | {"data_offsets": [20, 36]}}, 36
    yield "shape", {"a": entry | {"shape": [1 << 40, 1 << 40]}}, 16
    yield "negative", {"a": entry | {"shape": [-2, -2]}}, 16
    yield "type", {"a": entry | {"dtype": "F99"}}, 16
    yield "short", {"a": entry}, 12
    yield "long", {"a": entry}, 20
    yield "offsets", {"a": entry | {"data_offsets": [0]}}, 16
    yield "list", [1], 16
    yield "fraction", {"a": entry | {"data_offsets": [0, 16.0]}}, 16
    yield "unhashable", {"a": entry | {"dtype": []}}, 16


@pytest.mark.parametrize(("header", "size"), [h[1:] for h in damaged_headers()], ids=[h[0] for h in damaged_headers()])
def test_a_damaged_checkpoint_is_refused(header, size, tmp_path):
    text = json.dumps(header).encode()
    (tmp_path / "base.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))
    with pytest.raises(UserError, match=r"base\.safetensors: "):
        Checkpoint(tmp_path / "base.safetensors")


@pytest.mark.parametrize("content", [b"", b"1234567", struct.pack("<Q", 1 << 60) + b"{}", struct.pack("<Q", 2) + b"{,"])
def test_what_is_no_safetensors_file_is_refused(content, tmp_path):
    (tmp_path / "base.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"base\.safetensors: "):
        Checkpoint(tmp_path / "base.safetensors")


def test_an_empty_tensor_is_no_damage(tmp_path):
    save_file({"a": torch.zeros(0), "b": torch.ones(2, 2), "c": torch.tensor(1.0)}, tmp_path / "x.safetensors")
    assert TensorFile(tmp_path / "x.safetensors").entries.keys() == {"a", "b", "c"}
    entry = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
    text = json.dumps({"a": entry, "b": entry | {"shape": [0], "data_offsets": [0, 0]}}).encode()
    (tmp_path / "y.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    assert TensorFile(tmp_path / "y.safetensors").entries.keys() == {"a", "b"}


def test_pickles_are_refused_with_a_word_on_how_to_convert_them(tmp_path):
    (tmp_path / "base.ckpt").write_bytes(b"x" * 100)
    with pytest.raises(UserError, match="a pickle, which can run code"):
        Checkpoint(tmp_path / "base.ckpt")


def test_memory_does_not_grow_with_the_base(tmp_path):
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    peaks = []
    for rows in (1000, 16000):
        base, lora = tmp_path / f"{rows}", tmp_path / f"{rows}-lora.safetensors"
        (base / "unet").mkdir(parents=True)
        weights = {name: torch.zeros(rows, 1000), "other": torch.zeros(rows, 1000)}
        save_file(weights, base / "unet" / "diffusion_pytorch_model.safetensors")
        lora_for(base, lora, share=1.0)
        tracemalloc.start()
        fold(base, [(lora, 1.0)], tmp_path / f"{rows}-out", undo=tmp_path / f"{rows}-undo")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]  # of files of 8 and 128 MB


def test_a_disk_without_room_is_said(folder, tmp_path, monkeypatch):
    lora_for(folder, tmp_path / "l.safetensors")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(UserError, match=r"it needs [\d,]+ bytes and the disk has 10 left"):
        fold(folder, [(tmp_path / "l.safetensors", 1.0)], tmp_path / "out")


# ------------------------------------------------------------------------------------- LoRA with LoRA


def test_combining_is_exact(folder):
    modules = Checkpoint(folder).modules
    a, b = (random_lora(modules, seed) for seed in (1, 2))
    both = combine([(a, 0.7), (b, -0.4)])
    for name, delta in both.deltas.items():
        parts = [s * lora.deltas[name].matrix(np.float64) for lora, s in ((a, 0.7), (b, -0.4)) if name in lora.deltas]
        np.testing.assert_allclose(delta.matrix(np.float64), sum(parts), rtol=1e-6, atol=1e-5)
    assert both.deltas.keys() == a.deltas.keys() | b.deltas.keys()


def flat(delta: Delta) -> np.ndarray:
    return delta.matrix(np.float64).reshape(len(delta.B), -1)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_reducing_is_what_the_singular_values_say(folder, rank):
    lora = random_lora(Checkpoint(folder).modules, 1)
    reduced, report = reduce(lora, rank, None)
    for name, delta in lora.deltas.items():
        whole, smaller = flat(delta), flat(reduced.deltas[name])
        values = np.linalg.svdvals(whole)
        lost = np.linalg.norm(whole - smaller)
        assert lost == pytest.approx(np.linalg.norm(values[rank:]), rel=1e-5, abs=1e-5 * values[0])
        assert report.lost[name] == pytest.approx(lost, abs=1e-5 * values[0])
        assert reduced.deltas[name].rank == min(rank, delta.rank)


def test_reducing_to_a_share_of_the_energy(folder):
    lora = random_lora(Checkpoint(folder).modules, 1)
    reduced, _ = reduce(lora, None, 0.8)
    for name, delta in reduced.deltas.items():
        values = np.linalg.svdvals(flat(lora.deltas[name])) ** 2
        assert values[: delta.rank].sum() / values.sum() >= 0.8 - 1e-6
        assert delta.rank == 1 or values[: delta.rank - 1].sum() / values.sum() < 0.8


def test_the_table_tells_what_each_rank_would_lose(folder, tmp_path):
    lora_for(folder, tmp_path / "l.safetensors", dialect="diffusers")
    fold(folder, [(tmp_path / "l.safetensors", 1.0)], tmp_path / "tuned")
    checkpoints = Checkpoint(folder), Checkpoint(tmp_path / "tuned")
    for rank in (1, 2, 4):
        _, told, _ = extract(*checkpoints, rank, None)
        *_, head, errors, overall = str(told).splitlines()
        [(_, error)] = [pair for pair in zip(head.split(), errors.split(), strict=True) if pair[0] == str(rank)]
        assert overall == f"overall: error {error}"
    assert errors.split()[1] > errors.split()[3]  # of rank 1 and of rank 4, both of two digits before the point


def test_extracting_finds_what_was_folded_in(folder, tmp_path):
    lora = lora_for(folder, tmp_path / "l.safetensors")
    fold(folder, [(tmp_path / "l.safetensors", 1.0)], tmp_path / "tuned")
    found, report, notes = extract(Checkpoint(folder), Checkpoint(tmp_path / "tuned"), 6, None)
    assert found.deltas.keys() == lora.deltas.keys()
    for name, delta in lora.deltas.items():
        np.testing.assert_allclose(found.deltas[name].matrix(), delta.matrix(), rtol=1e-3, atol=1e-4)
    assert max(report.lost[n] / report.size[n] for n in report.lost) < 1e-5  # the weights' own rounding
    assert any("are the same in both" in note for note in notes)
    with pytest.raises(UserError, match="have the same weights"):
        extract(Checkpoint(folder), Checkpoint(folder), 6, None)


def rounded_apart(base, tuned, kind: torch.dtype, ends: str) -> None:
    """Write a base again in another type, a few of its weights tuned."""
    tensors = load_file(base)
    for key, tensor in tensors.items():
        if key.endswith(ends):
            tensors[key] = tensor.float() + 0.05 * torch.randn(len(tensor), 1) @ torch.randn(1, tensor.shape[1])
    save_file({k: t.to(kind) if t.is_floating_point() else t for k, t in tensors.items()}, tuned)


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
@pytest.mark.parametrize(
    ("one", "two"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)],
)
def test_what_rounding_explains_is_left_out_of_what_is_extracted(one, two, family, tmp_path, tokenizer):
    true = original_file(tmp_path / "true.safetensors", family, tokenizer)
    base, tuned = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
    rounded_apart(true, base, one, "nothing")
    rounded_apart(true, tuned, two, "attn2.to_k.weight")
    found, _, notes = extract(Checkpoint(base), Checkpoint(tuned), 2, None)
    assert {name.rsplit(".", 2)[1] for name in found.deltas} == {"attn2"}
    assert found.deltas.keys() == {name for name in Checkpoint(true).modules if name.endswith("attn2.to_k")}
    apart = len(Checkpoint(true).modules) - len(found.deltas)
    assert any(note.startswith(f"left out {apart} modules") and "rounding" in note for note in notes)
    assert not any("other tensors differ" in note for note in notes)  # the norms and biases are rounded, too
    half = half_of(true, tmp_path / "half.safetensors")
    with pytest.raises(UserError, match="have the same weights up to rounding"):
        extract(Checkpoint(true), Checkpoint(half), 2, None)


def half_of(path, half):
    rounded_apart(path, half, torch.float16, "nothing")
    return half


def test_a_change_of_the_last_place_in_one_type_is_a_change(tmp_path, tokenizer):
    base = half_of(original_file(tmp_path / "true.safetensors", "sd1", tokenizer), tmp_path / "base.safetensors")
    tensors = load_file(base)
    key = next(key for key in tensors if key.endswith("attn1.to_q.weight"))
    tensors[key] = (tensors[key].view(torch.int16) + 1).view(torch.float16)
    save_file(tensors, tmp_path / "tuned.safetensors")
    found, _, _ = extract(Checkpoint(base), Checkpoint(tmp_path / "tuned.safetensors"), 2, None)
    assert len(found.deltas) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_extracting_between_a_folder_and_a_single_file(family, tmp_path, tokenizer):
    base = original_file(tmp_path / "base.safetensors", family, tokenizer)
    for component, module in parts_of(family, tokenizer).items():
        module.save_pretrained(tmp_path / "folder" / component)
    lora = lora_for(tmp_path / "folder", tmp_path / "l.safetensors", dialect="diffusers", share=1.0)
    assert family != "sdxl" or "text_encoder_2.text_projection" in lora.deltas
    fold(tmp_path / "folder", [(tmp_path / "l.safetensors", 1.0)], tmp_path / "tuned")
    if family == "sd2":  # whose single files have a layer more, which a folder does without
        tensors = load_file(base)
        layer = "cond_stage_model.model.transformer.resblocks."
        save_file(
            tensors | {k.replace(f"{layer}1.", f"{layer}2."): t.clone() for k, t in tensors.items() if layer in k}, base
        )
    found, _, notes = extract(Checkpoint(base), Checkpoint(tmp_path / "tuned"), 6, None)
    assert found.deltas.keys() == lora.deltas.keys()
    for name, delta in lora.deltas.items():
        np.testing.assert_allclose(found.deltas[name].matrix(), delta.matrix(), rtol=1e-3, atol=1e-4)
    assert any("layers.2 is in only one of the two" in note for note in notes) == (family == "sd2")


# -------------------------------------------------------------------------------------- command line


def run(monkeypatch, *argv) -> int:
    monkeypatch.setattr("sys.argv", ["merge", *map(str, argv)])
    try:
        command()
    except SystemExit as end:
        return end.code
    return 0


def test_the_command_does_each_of_its_things(folder, tmp_path, monkeypatch, capsys):
    lora = lora_for(folder, tmp_path / "l.safetensors", dialect="diffusers")
    loras, out = tmp_path / "l.safetensors", tmp_path / "out"
    assert run(monkeypatch, folder, f"{loras}:0.7", "--output", out, "--undo", tmp_path / "undo") == 0
    assert "of the weight on average" in capsys.readouterr().out
    check_merged(folder, out, lora, 0.7)
    assert run(monkeypatch, "--restore", out, tmp_path / "undo", "--output", tmp_path / "back") == 0
    assert bytes_of(tmp_path / "back") == bytes_of(folder)
    both = tmp_path / "both.safetensors"
    assert run(monkeypatch, "--loras-only", f"{loras}:0.5", f"{loras}:0.5", "--output", both, "--rank", 5) == 0
    assert "overall: error 0.000%" in capsys.readouterr().out
    assert difference(lora, read_lora(both)) < 100  # through float32 and a decomposition, against one rounding
    kohya = tmp_path / "k.safetensors"
    words = ("--loras-only", loras, "--dialect", "kohya", "--base", folder, "--output", kohya)
    assert run(monkeypatch, *words) == 0
    assert difference(lora, read_lora(kohya, Checkpoint(folder).modules)) <= 1
    assert run(monkeypatch, "--extract", folder, "--rank", 2, "--output", tmp_path / "e.safetensors", out) == 0
    assert run(monkeypatch, "--loras-only", f"{loras}:1e39", "--output", tmp_path / "x.safetensors") == 2
    assert "it is not finite" in capsys.readouterr().err
    assert run(monkeypatch, "--loras-only", kohya, "--output", tmp_path / "x.safetensors") == 2
    assert "does not spell out its module's name; --base is needed" in capsys.readouterr().err
    assert run(monkeypatch, folder, loras, "--output", out) == 2
    assert "out: it already exists; choose another name" in capsys.readouterr().err


def test_dtype_is_that_of_what_is_written(folder, tmp_path, monkeypatch, capsys):
    lora_for(folder, tmp_path / "l.safetensors", dialect="diffusers")
    loras, out = tmp_path / "l.safetensors", tmp_path / "x.safetensors"
    assert run(monkeypatch, "--loras-only", loras, "--dtype", "float16", "--output", out) == 0
    assert "bytes of the file are zeros that make the ranks equal" in capsys.readouterr().out
    assert {entry.dtype for entry in TensorFile(out).entries.values()} == {"F16"}
    mixed = ("--loras-only", out, f"{out}:0.3", "--rank", "3", "--output", tmp_path / "y.safetensors")
    assert run(monkeypatch, *mixed) == 0  # and without, that of what is read
    assert {entry.dtype for entry in TensorFile(tmp_path / "y.safetensors").entries.values()} == {"F16"}
    assert run(monkeypatch, folder, loras, "--dtype", "bfloat16", "--output", tmp_path / "merged") == 0
    assert "of ΔW survived rounding to BF16" in capsys.readouterr().out
    extracted = ("--extract", folder, tmp_path / "merged", "--rank", "2", "--dtype", "bfloat16", "--output")
    assert run(monkeypatch, *extracted, tmp_path / "z.safetensors") == 0
    assert {entry.dtype for entry in TensorFile(tmp_path / "z.safetensors").entries.values()} == {"BF16"}


def test_no_command_imports_torch(folder, tmp_path):
    """It takes longer to import than a checkpoint to copy; each command runs in a process of its own."""
    lora_for(folder, tmp_path / "l.safetensors", dialect="diffusers")
    code = """
import runpy, sys
try:
    runpy.run_module("minilora.merge", run_name="__main__")
finally:
    print(*{"torch", "diffusers", "transformers"} & sys.modules.keys(), file=sys.stderr)
"""
    for argv in (
        "--help",
        "base l.safetensors --output out --undo undo",
        "--restore out undo --output back",
        "--loras-only l.safetensors --output k.safetensors --dialect kohya --base base --rank 2",
        "--extract base out --output e --dialect peft --rank 2",
    ):
        command = [sys.executable, "-c", code, *argv.split()]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=ENVIRONMENT)
        assert (done.returncode, done.stderr) == (0, "\n"), argv


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["base"], "a merge takes BASE LORA[:STRENGTH] …, not base; --output is needed"),
        (["base", "l", "--output", "o", "--rank", "4"], "--rank has no effect on a merge"),
        (["--extract", "a", "b", "--output", "o"], "--extract needs a --rank or an --energy"),
        (["--extract", "a", "b", "--output", "o", "--rank", "2", "--undo", "u"], "--undo has no effect on --extract"),
        (["--restore", "a", "--output", "o"], "--restore takes MERGED UNDO, not a"),
        (["--restore", "--extract", "a", "b", "--output", "o", "--rank", "1"], "cannot be combined"),
        (
            ["b", "l", "--output", "o", "--undo", "u", "--dtype", "float16"],
            "--undo and --dtype cannot be combined",
        ),
        (["--restore", "m", "u", "--output", "o", "--lora-blocks", "up=1"], "--lora-blocks has no effect on --restore"),
        (
            ["b", "l", "--output", "o", "--lora-blocks", "up=1,up=2,mid"],
            "--lora-blocks mid: it takes a block and a factor",
        ),
        (["b", "l", "--output", "o", "--lora-blocks", "up=1,up=2"], "--lora-blocks names up twice"),
        (["--restore", "m", "u", "--output", "o", "--dtype", "float16"], "--dtype has no effect on --restore"),
        (["b", "l", "--output", "o", "--dtype", "fp16"], "--dtype is 'fp16'; it can be float32, float16, bfloat16"),
        (["b", "l:nan", "--output", "o"], "the strength nan is not a finite number"),
        (["gone", "l", "--output", "o"], "gone: there is no such file or folder"),
    ],
)
def test_mistakes_are_one_line(argv, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *argv) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_strength_is_split_off_the_path():
    assert [(str(p), s) for p, s in map(path_and_number, ("out/x:0.8", "c:/x", "x", "x:-1"))] == [
        ("out/x", 0.8),
        ("c:/x", 1.0),
        ("x", 1.0),
        ("x", -1.0),
    ]


def test_live_modules_and_checkpoints_name_the_same_modules(folder, tokenizer):
    live = {n: s for part in parts_of("sd1", tokenizer).values() for n, s in live_modules(part).items()}
    assert Checkpoint(folder).modules == live
    assert np.prod(next(iter(live.values()))) > 0
