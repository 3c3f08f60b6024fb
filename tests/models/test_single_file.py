"""models/single_file.py: a base in one file is the base that it is a file of, and what it lacks is named."""

import numpy as np
import pytest
import torch
from conftest import FAMILIES
from diffusers.loaders import single_file_utils as theirs
from helpers import (
    CPU,
    original_vae_name,
    randomize,
    relative_difference,
    write_single_file,
)
from PIL import Image
from safetensors.torch import load_file, save_file

from minilora import inject_lora, save_lora
from minilora.models.base import Base
from minilora.sampling import sample
from minilora.settings.errors import UserError
from minilora.settings.sample import SampleConfig
from minilora.settings.train import TrainConfig
from minilora.training import train


@pytest.fixture
def single_file(family_base, tmp_path):
    """What writes a base of a family as a single file, and gives it and the folder of its settings."""
    return lambda family="sd1", *without, **more: write_single_file(
        family_base(family), tmp_path / f"base{len(without)}{len(more)}.safetensors", *without, **more
    )


def base_of(file, settings, **more) -> Base:
    return Base(str(file), CPU, config=str(settings), **more)


def parts_of(base: Base) -> list[str]:
    return ["unet", "vae", "text_encoder", *(["text_encoder_2"] if base.is_xl else [])]


def equal(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_part_is_that_of_the_folder_and_that_of_diffusers_own_conversion(family, family_base, single_file):
    file, settings = single_file(family)
    base, folder = base_of(file, settings), Base(str(family_base(family)), CPU)
    for part in parts_of(base):
        module = getattr(base, part)
        ours, tensors = module.state_dict(), load_file(file)
        assert equal(ours, getattr(folder, part).state_dict())
        if part == "unet":
            converted = theirs.convert_ldm_unet_checkpoint(tensors, module.config)
        elif part == "vae":
            converted = theirs.convert_ldm_vae_checkpoint(tensors, module.config)
        elif any(key.startswith("cond_stage_model.model.") for key in tensors) or part == "text_encoder_2":
            prefix = "conditioner.embedders.1.model." if part == "text_encoder_2" else "cond_stage_model.model."
            converted = theirs.convert_open_clip_checkpoint(module, tensors, prefix)
        else:
            converted = theirs.convert_ldm_clip_checkpoint(tensors)
        if part == "text_encoder":  # whose names transformers has shortened
            converted = {key.removeprefix("text_model."): tensor for key, tensor in converted.items()}
        assert equal(ours, {key: converted[key] for key in ours})
    assert base.encoder_fingerprints == folder.encoder_fingerprints  # so what was encoded by one serves the other
    assert base.tokens("a dog").tolist() == folder.tokens("a dog").tolist()


def test_a_single_file_is_the_same_base(single_file, family_base, pictures, tmp_path):
    file, settings = single_file()
    common = {"data": (str(pictures),), "steps": 2, "learning_rate": 0.01, "cache": str(tmp_path / "cache")}
    train(TrainConfig(model=str(family_base("sd1")), output=str(tmp_path / "one"), **common))
    train(TrainConfig(model=str(file), model_config=str(settings), output=str(tmp_path / "other"), **common))
    # Numbers that lie elsewhere in memory are summed in another order; Adam magnifies that where a gradient is near 0.
    assert relative_difference(tmp_path / "one", tmp_path / "other") < 1e-4


def test_loras_are_folded_into_a_single_file_as_into_a_folder(single_file, family_base, tmp_path):
    file, settings = single_file()
    unet = base_of(file, settings).unet
    before = {key: tensor.clone() for key, tensor in unet.state_dict().items()}
    inject_lora(unet, rank=2)
    randomize(unet)
    save_lora(unet, tmp_path / "lora.safetensors")
    bases = {str(family_base("sd1")): None, str(file): str(settings)}
    loras = (f"{tmp_path / 'lora.safetensors'}:0.5",)
    one, other = (Base(n, CPU, config=c, loras=loras).unet.state_dict() for n, c in bases.items())
    assert equal(one, other)
    assert not equal(one, before)
    drawing = {"prompt": ("a dog",), "lora": loras, "steps": 2}
    ours, those = (
        sample(SampleConfig(model=n, model_config=c, output=str(tmp_path / f"{bool(c)}.png"), **drawing))
        for n, c in bases.items()
    )
    assert abs(np.array(Image.open(ours), int) - np.array(Image.open(those), int)).max() <= 1  # a level is rounded


def test_a_part_is_loaded_without_the_others_and_in_its_own_type(single_file):
    """The VAE and the text encoder encode pictures and captions; nothing of the U-Net is asked for."""
    file, settings = single_file("sd1", "model.diffusion_model.")
    base = base_of(file, settings, precision="fp16")
    assert base.vae.dtype == base.text_encoder.dtype == torch.float16
    with pytest.raises(UserError, match=r"base10\.safetensors: it holds no U-Net"):
        _ = base.unet


# ------------------------------------------------------------------------------------------- what is missing


LACKING = [  # a family, a part, and what one of its tensors is called in the file
    ("sd1", "unet", "model.diffusion_model.input_blocks.4.0.skip_connection.bias"),
    ("sd2", "unet", "model.diffusion_model.output_blocks.5.2.conv.weight"),
    ("sdxl", "unet", "model.diffusion_model.label_emb.0.2.weight"),
    ("sd1", "vae", "first_stage_model.encoder.mid.attn_1.k.bias"),
    ("sdxl", "vae", "first_stage_model.decoder.up.0.block.1.norm2.weight"),
    ("sd1", "text_encoder", "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight"),
    ("sd2", "text_encoder", "cond_stage_model.model.transformer.resblocks.1.ln_2.bias"),
    ("sdxl", "text_encoder", "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias"),
    ("sdxl", "text_encoder_2", "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_bias"),
    ("sdxl", "text_encoder_2", "conditioner.embedders.1.model.text_projection"),
]


@pytest.mark.parametrize(("family", "part", "key"), LACKING)
def test_a_tensor_that_is_missing_is_named(family, part, key, single_file):
    file, settings = single_file(family, key)
    base = base_of(file, settings)
    with pytest.raises(UserError, match=rf"base10\.safetensors: the weights of its {part} lack {key}$"):
        getattr(base, part)
    for other in parts_of(base):
        if other != part:
            getattr(base, other)


def test_a_tensor_of_another_shape_is_named(single_file):
    key = "model.diffusion_model.input_blocks.1.0.in_layers.0.weight"
    file, settings = single_file("sd1", **{key: torch.ones(3)})
    with pytest.raises(
        UserError, match=rf"its unet does not load \({key} is \(3,\) and should be \(8,\) by its settings\)"
    ):
        _ = base_of(file, settings).unet


def test_what_nobody_asks_for_is_told_but_for_what_all_files_have(single_file, capsys):
    more = {
        "model.diffusion_model.more": torch.ones(2),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(32)[None],
        "first_stage_model.loss.logvar": torch.zeros(()),
        "model_ema.decay": torch.zeros(()),
    }
    base = base_of(*single_file("sd1", **more))
    for part in parts_of(base) * 2:
        getattr(base, part)
        base.release(part)
    told = capsys.readouterr().err
    assert told.count("its unet does not use more") == 1  # however often it is loaded
    assert told.count("does not use") == 1


@pytest.mark.parametrize(
    ("prefix", "part", "name"),
    [
        ("first_stage_model.", "vae", "VAE; give one with --vae"),
        ("cond_stage_model.", "text_encoder", "text encoder$"),
    ],
)
def test_a_part_that_is_missing_is_named(prefix, part, name, single_file):
    base = base_of(*single_file("sd1", prefix))
    with pytest.raises(UserError, match=f"it holds no {name}"):
        getattr(base, part)


def test_what_is_wrong_with_a_single_file_is_said(single_file, tmp_path):
    file, settings = single_file()
    with pytest.raises(UserError, match="name a folder with the settings by --model-config"):
        Base(str(file), CPU)  # which is too small to be of any family
    (tmp_path / "base.ckpt").write_bytes(b"x")
    with pytest.raises(UserError, match=r"base\.ckpt: a pickle, which can run code"):
        Base(str(tmp_path / "base.ckpt"), CPU)
    with pytest.raises(UserError, match=r"gone\.safetensors: there is no such file"):
        Base(str(tmp_path / "gone.safetensors"), CPU)
    with pytest.raises(UserError, match="is not a single file, and has its own settings"):
        Base(str(settings), CPU, config=str(settings))
    with pytest.raises(UserError, match=r"--model-config .*nowhere: neither a diffusers folder"):
        base_of(file, tmp_path / "nowhere")


# ------------------------------------------------------------------------------------------- names and marks


def test_the_oldest_names_of_the_text_encoder_are_read(single_file, family_base, tmp_path):
    """As NovelAI's file has them: without "text_model."."""
    file, settings = single_file()
    tensors = {key.replace(".text_model.", "."): tensor for key, tensor in load_file(file).items()}
    assert "cond_stage_model.transformer.encoder.layers.0.mlp.fc1.weight" in tensors
    save_file(tensors, tmp_path / "old.safetensors")
    ours, folder = base_of(tmp_path / "old.safetensors", settings), Base(str(family_base("sd1")), CPU)
    assert equal(ours.text_encoder.state_dict(), folder.text_encoder.state_dict())
    key = "cond_stage_model.transformer.encoder.layers.0.mlp.fc1.weight"
    save_file({k: t for k, t in tensors.items() if k != key}, tmp_path / "less.safetensors")
    with pytest.raises(UserError, match=f"the weights of its text_encoder lack {key}$"):  # by the name it would have
        _ = base_of(tmp_path / "less.safetensors", settings).text_encoder


def test_a_file_is_followed_in_what_it_is_marked_with(single_file, family_base, tmp_path, capsys):
    empty = torch.tensor([])
    for family, marks, metadata, expected in [
        ("sdxl", {}, None, ("epsilon", False)),
        ("sdxl", {"v_pred": empty}, None, ("v_prediction", False)),
        ("sdxl", {"v_pred": empty, "ztsnr": empty}, None, ("v_prediction", True)),
        ("sdxl", {"ztsnr": empty}, None, ("epsilon", False)),  # from which no picture would follow
        ("sd1", {}, {"modelspec.prediction_type": "v"}, ("v_prediction", False)),
        ("sd2", {}, {"modelspec.prediction_type": "epsilon"}, ("epsilon", False)),
        ("sd2", {}, {"modelspec.title": "x"}, ("v_prediction", False)),  # its settings say so
    ]:
        path = tmp_path / family / "marked.safetensors"
        path.parent.mkdir(exist_ok=True)
        base = base_of(*write_single_file(family_base(family), path, metadata=metadata, **marks))
        ends_at_0 = base.schedule.alphas_cumprod[-1] == 0
        assert (base.schedule.prediction_type, ends_at_0) == expected
        assert base.scheduler.config.timestep_spacing == ("trailing" if ends_at_0 else "leading")
        assert base.pipeline.scheduler is base.scheduler
        assert ("(marked in the file)" in base.predicts) == (
            "v_pred" in marks or "modelspec.prediction_type" in str(metadata)
        )


def test_the_option_overrules_a_mark_and_what_is_used_is_printed(family_base, pictures, tmp_path, capsys):
    marks = {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}
    file, settings = write_single_file(family_base("sdxl"), tmp_path / "marked.safetensors", **marks)
    common = {"model": str(file), "model_config": str(settings)}
    training = common | {"data": (str(pictures),), "steps": 2, "cache": str(tmp_path / "cache")}
    drawing = common | {"prompt": ("a dog",), "steps": 2}
    for kind, told in (
        (None, "v_prediction with zero terminal SNR (marked in the file), fp32"),
        ("epsilon", "epsilon (--prediction-type), fp32"),
        ("v_prediction", "v_prediction with zero terminal SNR (--prediction-type), fp32"),
    ):
        train(TrainConfig(**training, prediction_type=kind, output=str(tmp_path / f"run-{kind}")))
        sample(SampleConfig(**drawing, prediction_type=kind, output=str(tmp_path / f"{kind}.png")))
        assert capsys.readouterr().out.count(f"{file}, {told}") == 2
    in_diffusers = "from_config(pipeline.scheduler.config, prediction_type='v_prediction', rescale_betas_zero_snr=True"
    assert in_diffusers in (tmp_path / "run-None" / "README.md").read_text()
    assert relative_difference(tmp_path / "run-None", tmp_path / "run-v_prediction") == 0
    assert relative_difference(tmp_path / "run-None", tmp_path / "run-epsilon") > 0.1
    # (The files also hold the settings, which differ.)
    names = [tmp_path / f"{kind}.png" for kind in (None, "epsilon", "v_prediction")]
    marked, epsilon, v = (Image.open(name).tobytes() for name in names)
    assert marked == v != epsilon


def test_a_folder_takes_the_option_too(family_base):
    base = Base(str(family_base("sd2")), CPU, prediction_type="epsilon")
    assert (base.schedule.prediction_type, base.predicts) == ("epsilon", "epsilon (--prediction-type)")


@pytest.mark.parametrize("mark", ["edm_mean", "edm_vpred.sigma_max"])
def test_noise_levels_that_are_not_known_are_refused(mark, single_file):
    with pytest.raises(UserError, match=f"{mark} marks a base with the noise levels of EDM"):
        base_of(*single_file("sdxl", **{mark: torch.ones(4)}))


# ------------------------------------------------------------------------------------------- another VAE


def test_the_vae_is_taken_from_a_folder_or_a_file_of_a_base_or_of_its_own(single_file, family_base, pictures, tmp_path):
    file, settings = single_file("sd1", "first_stage_model.")
    other = family_base("sdxl")  # whose VAE is the same in all tests; make it another
    weights = load_file(other / "vae" / "diffusion_pytorch_model.safetensors")
    weights = {key: tensor + 0.01 for key, tensor in weights.items()}
    own = tmp_path / "own"
    own.mkdir()
    (own / "config.json").write_bytes((other / "vae" / "config.json").read_bytes())
    save_file(weights, own / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    of_base = tmp_path / "of_base"
    (of_base / "vae").mkdir(parents=True)
    for path in own.iterdir():
        (of_base / "vae" / path.name).write_bytes(path.read_bytes())
    original = {original_vae_name(key): tensor for key, tensor in weights.items()}
    older = {}
    for key, tensor in weights.items():
        for ours, name in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            key = key.replace(f".{ours}.", f".{name}.")
        older[key] = tensor
    for name, tensors in {
        "bare": original,
        "base": {f"first_stage_model.{key}": tensor for key, tensor in original.items()},
        "vae": {f"vae.{key}": tensor for key, tensor in original.items()},
        "older": older,
    }.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
    files = [tmp_path / f"{name}.safetensors" for name in ("bare", "base", "vae", "older")]
    for vae in (own, of_base, own / "diffusion_pytorch_model.safetensors", *files):
        base = base_of(file, settings, vae=str(vae))
        assert equal(base.vae.state_dict(), weights), vae
        assert (base.resolution, base.pixels_per_latent) == (16, 2)

    common = {"model": str(file), "model_config": str(settings)}
    drawing = common | {"prompt": ("a dog",), "steps": 2}
    drawn = [
        Image.open(sample(SampleConfig(**drawing, vae=str(vae), output=str(tmp_path / f"{vae.stem}.png")))).tobytes()
        for vae in (own, files[0], family_base("sd1"))
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    training = common | {"data": (str(pictures),), "steps": 2, "cache": str(tmp_path / "cache")}
    for vae in (own, files[0], family_base("sd1")):
        train(TrainConfig(**training, vae=str(vae), output=str(tmp_path / f"run-{vae.stem}")))
    runs = [tmp_path / f"run-{vae.stem}" for vae in (own, files[0], family_base("sd1"))]
    assert relative_difference(*runs[:2]) == 0
    assert relative_difference(runs[0], runs[2]) > 0.01
    with pytest.raises(UserError, match="it holds no VAE; give one with --vae"):
        train(TrainConfig(**training, output=str(tmp_path / "none")))


def test_a_vae_that_does_not_fit_or_lacks_a_tensor_is_named(single_file, family_base, tmp_path):
    file, settings = single_file()
    weights = load_file(family_base("sd1") / "vae" / "diffusion_pytorch_model.safetensors")
    original = {original_vae_name(key): tensor for key, tensor in weights.items()}
    save_file(original | {"decoder.conv_in.weight": torch.ones(8, 16, 3, 3)}, tmp_path / "wide.safetensors")
    del original["encoder.conv_out.bias"]
    save_file(original, tmp_path / "less.safetensors")
    for vae, message in {
        tmp_path / "wide.safetensors": r"decoder\.conv_in\.weight is \(8, 16, 3, 3\) and should be \(8, 4, 3, 3\)",
        tmp_path
        / "less.safetensors": r"--vae .*less\.safetensors: the weights of its vae lack encoder\.conv_out\.bias",
        tmp_path / "gone.safetensors": r"--vae .*gone\.safetensors: there is no such file",
        tmp_path / "nowhere": r"--vae .*nowhere: its vae does not load",
    }.items():
        with pytest.raises(UserError, match=message):
            _ = base_of(file, settings, vae=str(vae)).vae
