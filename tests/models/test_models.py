"""models/base.py and files/read.py: bases by name, LoRA files in and out, and diffusers as the other reader."""

import pytest
import torch
from conftest import make_tiny_text_encoder, make_tiny_unet
from diffusers import StableDiffusionPipeline
from helpers import CPU, MLP, randomize, write_a_lora
from helpers import MLP_TARGETS as TARGETS
from safetensors.torch import load_file, save_file

from minilora import inject_lora, load_lora, lora_state_dict, merge_lora, save_lora
from minilora.files.fold import fold
from minilora.lora import lora_layers
from minilora.models.base import Base
from minilora.models.fingerprint import fingerprint
from minilora.settings.errors import UserError
from minilora.settings.setting import BUNDLED


@pytest.fixture
def lora_file(tmp_path):
    path = tmp_path / "pytorch_lora_weights.safetensors"
    return write_a_lora(path), path


def outputs(unet):
    torch.manual_seed(3)
    with torch.no_grad():
        return unet(torch.randn(2, 4, 8, 8), torch.tensor([5, 800]), torch.randn(2, 5, 16)).sample


def test_a_saved_lora_loads_with_the_same_effect(lora_file):
    unet, path = lora_file
    other = make_tiny_unet()
    load_lora(other, path.parent, name="style", strength=1.0)
    # The scale 6 / 4 was folded into B: one more rounding.
    torch.testing.assert_close(outputs(other), outputs(unet), atol=1e-5, rtol=1e-4)
    weaker = make_tiny_unet()
    load_lora(weaker, path, strength=0.0)
    assert torch.equal(outputs(weaker), outputs(make_tiny_unet()))


def test_the_same_lora_gives_the_same_bytes(lora_file, tmp_path):
    unet, path = lora_file
    save_lora(unet, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_diffusers_loads_the_file_with_the_same_effect(lora_file, tiny_base):
    unet, path = lora_file
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_base)
    pipeline.load_lora_weights(path.parent)
    torch.testing.assert_close(outputs(pipeline.unet), outputs(unet), atol=1e-5, rtol=1e-4)


def test_a_file_that_diffusers_wrote_loads_with_the_same_effect(lora_file, tiny_base, tmp_path):
    _, path = lora_file
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_base)
    old = {k.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): v for k, v in load_file(path).items()}
    StableDiffusionPipeline.save_lora_weights(tmp_path / "theirs", unet_lora_layers={k[5:]: v for k, v in old.items()})
    pipeline.load_lora_weights(tmp_path / "theirs")
    ours = make_tiny_unet()
    load_lora(ours, tmp_path / "theirs")
    torch.testing.assert_close(outputs(ours), outputs(pipeline.unet), atol=1e-5, rtol=1e-4)


def test_a_text_encoder_keeps_the_names_that_every_tool_reads(tokenizer, tmp_path):
    encoder = make_tiny_text_encoder(tokenizer)
    inject_lora(encoder, rank=2, targets=("q_proj",))
    randomize(encoder)
    save_lora(encoder, tmp_path / "te.safetensors")
    assert all(k.startswith("text_encoder.text_model.encoder.layers.") for k in load_file(tmp_path / "te.safetensors"))
    other = make_tiny_text_encoder(tokenizer)
    load_lora(other, tmp_path / "te.safetensors")
    assert all(torch.equal(v, lora_state_dict(encoder)[k]) for k, v in lora_state_dict(other).items())


def test_any_module_can_be_saved_and_loaded(tmp_path):
    module, other = MLP(), MLP()
    inject_lora(module, rank=2, targets=TARGETS)
    randomize(module)
    save_lora(module, tmp_path / "mlp.safetensors")
    load_lora(other, tmp_path / "mlp.safetensors")
    merge_lora(module)
    merge_lora(other)
    assert torch.equal(module(torch.ones(1, 6)), other(torch.ones(1, 6)))


def change(tensors, kind):
    first = next(k for k in tensors if "lora_A" in k)
    stray = {"lora_A": torch.zeros(2, 4), "lora_B": torch.zeros(4, 2)}
    if kind == "another base":
        tensors[first] = torch.zeros(4, 99)
        return r"are \(4, 99\) and \(16, 4\) but the base's weight is \(16, 16\)"
    if kind == "unknown layer":
        tensors |= {f"unet.nowhere.{part}.weight": tensor for part, tensor in stray.items()}
        return r"was not made for this base: unet has no module for unet\.nowhere\.lora_A\.weight"
    if kind == "foreign component":
        tensors |= {f"text_encoder.x.{part}.weight": tensor for part, tensor in stray.items()}
        return r"unet has no module for text_encoder\.x\.lora_A\.weight"
    if kind == "no partner":
        del tensors[first]
        return "is alone: A, the down matrix is missing"
    if kind == "not a lora":
        tensors["unet.x.hada_w1_a"] = torch.zeros(2)
        return r"unet\.x\.hada_w1_a belongs to LoHa"
    if kind == "not finite":
        tensors[first][0, 0] = float("nan")
        return "not finite"
    tensors[first] = tensors[first][:2].clone()
    return "which do not make a LoRA"


@pytest.mark.parametrize(
    "kind",
    ["another base", "unknown layer", "foreign component", "no partner", "not a lora", "not finite", "ranks"],
)
def test_a_file_that_does_not_fit_is_refused_with_the_key(kind, lora_file, tmp_path):
    tensors = load_file(lora_file[1])
    message = change(tensors, kind)
    save_file(tensors, tmp_path / "broken.safetensors")
    unet = make_tiny_unet()
    with pytest.raises(UserError, match=message):
        load_lora(unet, tmp_path / "broken.safetensors")
    assert not [name for name, _ in unet.named_parameters() if "lora" in name]


def test_unmatched_keys_can_be_left_out_and_are_reported(lora_file, tmp_path):
    tensors = load_file(lora_file[1]) | {f"unet.x.lora_{m}.weight": torch.zeros(2, 2) for m in "AB"}
    save_file(tensors, tmp_path / "more.safetensors")
    report = load_lora(make_tiny_unet(), tmp_path / "more.safetensors", strength=0.5, allow_unmatched=True)
    assert report.unmatched == {str(tmp_path / "more.safetensors"): ["unet.x.lora_A.weight", "unet.x.lora_B.weight"]}
    [folded] = report.folded
    assert len(folded.sizes) == len(lora_layers(lora_file[0]))


@pytest.mark.parametrize("dialect", ["diffusers", "kohya", "peft"])
def test_a_pipeline_is_saved_and_loaded_in_any_dialect(dialect, tiny_base, tmp_path):
    one, two = (Base(str(tiny_base), CPU).pipeline for _ in range(2))
    for module, targets in ((one.unet, ("to_q", "conv1", "proj_in")), (one.text_encoder, ("q_proj", "fc1"))):
        inject_lora(module, rank=2, alpha=3, targets=targets)
        randomize(module)
    save_lora(one, tmp_path / "lora.safetensors", dialect=dialect)
    report = load_lora(two, tmp_path / "lora.safetensors")
    assert {folded.component for folded in report.folded} == {"unet", "text_encoder"}
    for component in ("unet", "text_encoder"):
        merge_lora(getattr(one, component))
        merge_lora(getattr(two, component))
        ours, theirs = (getattr(p, component).state_dict() for p in (one, two))
        for name in ours:
            if "lora" not in name:  # the scale 1.5 is folded into B: a rounding
                torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_base_with_loras_is_the_one_that_they_were_merged_into(family, family_base, tmp_path):
    folder, loras = family_base(family), [(tmp_path / "a.safetensors", 0.5), (tmp_path / "b.safetensors", -2.0)]
    encoders = [name for name in ("text_encoder", "text_encoder_2") if (folder / name).exists()]
    for (path, _), parts, dialect in zip(loras, (("unet",), ("unet", *encoders)), ("kohya", "diffusers"), strict=True):
        pipeline = Base(str(folder), CPU).pipeline
        for part in parts:
            module = getattr(pipeline, part)
            inject_lora(module, rank=2, alpha=3, targets=("to_q", "conv1") if part == "unet" else ("q_proj", "fc1"))
            randomize(module, seed=len(parts))
        save_lora(pipeline, path, dialect=dialect)
    fold(folder, loras, tmp_path / "merged")
    texts = [f"{path}:{strength:g}" for path, strength in loras]
    ours, merged, plain = (
        Base(str(folder), CPU, loras=texts),
        Base(str(tmp_path / "merged"), CPU),
        Base(str(folder), CPU),
    )
    for part in ("unet", "vae", *encoders):
        expected, original = (getattr(base, part).state_dict() for base in (merged, plain))
        for _ in range(2):
            for name, tensor in getattr(ours, part).state_dict().items():
                # The order of a float32 sum of 4 products, of numbers of about 1.
                torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)
            ours.release(part)  # the second time it is loaded anew, and the LoRAs are in it once
        assert part == "vae" or any(not torch.equal(tensor, original[name]) for name, tensor in expected.items())

    half, rounded = Base(str(folder), CPU, "bf16", loras=texts[:1]), Base(str(folder), CPU, "bf16")
    load_lora(rounded.unet, loras[0][0], strength=0.5)
    merge_lora(rounded.unet)  # which rounds once, too
    for path, layer in lora_layers(rounded.unet).items():
        torch.testing.assert_close(half.unet.get_submodule(path).weight, layer.base.weight, rtol=2**-7, atol=0)
    with pytest.raises(UserError, match=r"unet\..* is not finite after merging .*a\.safetensors:1e6"):
        _ = Base(str(folder), CPU, "fp16", loras=(f"{loras[0][0]}:1e6",)).unet


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "text.safetensors").write_text("no")
    wrong = {"text": "not a safetensors file", "gone": "there is no such file or folder"}
    for name, said in wrong.items():
        with pytest.raises(UserError, match=rf"{name}\.safetensors: {said}"):
            load_lora(make_tiny_unet(), tmp_path / f"{name}.safetensors")


def test_a_base_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="gone: neither a diffusers folder"):
        Base(str(tmp_path / "gone"), CPU)
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(UserError, match="it holds a FluxPipeline"):
        Base(str(tmp_path), CPU)


def test_a_base_with_a_part_missing_is_named(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(UserError, match="its unet does not load"):
        _ = Base(str(tmp_path), CPU).unet


def test_fingerprints_tell_modules_apart():
    unet, other = make_tiny_unet(), make_tiny_unet()
    assert fingerprint(unet) == fingerprint(other)
    with torch.no_grad():
        other.conv_out.bias[0] += 1e-6
    assert fingerprint(unet) != fingerprint(other)
    assert fingerprint(unet) != fingerprint(make_tiny_unet().half())


def test_the_bundled_base_is_an_ordinary_pipeline_of_less_than_45_megabytes():
    weights = sum(path.stat().st_size for path in BUNDLED.rglob("*") if path.is_file() and path.suffix != ".py")
    assert weights < 45e6
    pipeline = StableDiffusionPipeline.from_pretrained(BUNDLED)
    picture = pipeline("red apple", num_inference_steps=2, output_type="np").images[0]
    assert picture.shape == (128, 128, 3)
    base = Base(None, CPU)
    assert (base.resolution, base.pixels_per_latent, base.side_multiple) == (128, 8, 8)
