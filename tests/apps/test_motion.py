"""motion.py: clips equal diffusers' own, with LoRAs of pictures and of motion; what does not fit is refused."""

import json

import numpy as np
import pytest
import torch
from conftest import make_adapter
from diffusers import AnimateDiffPipeline, DDIMScheduler, MotionAdapter
from helpers import CPU, random_lora, write_motion_lora
from PIL import Image
from safetensors.torch import load_file, save_file

from minilora import load_lora, save_lora
from minilora.apps.motion import draw_clip, draw_clips, sample_clips
from minilora.files.counted import _orders
from minilora.files.layout import Checkpoint
from minilora.files.network import live_modules
from minilora.files.read import read_lora
from minilora.files.write import write_lora
from minilora.models.motion import MotionBase
from minilora.sampling import prepare
from minilora.settings import command_line as commands
from minilora.settings.errors import UserError
from minilora.settings.sample import SampleConfig


@pytest.fixture
def loras(tiny_base, motion_adapter, tmp_path):
    """The files of a LoRA of pictures and of a motion LoRA."""
    return write_loras(tmp_path, tiny_base, motion_adapter)


def write_loras(folder, base, adapter):
    modules = {n: s for n, s in Checkpoint(base).modules.items() if n.startswith("unet.") and ".attn" in n}
    write_lora(folder / "style.safetensors", random_lora(modules, 1, share=1.0, ranks=(3, 4)), "diffusers", modules)
    write_motion_lora(folder / "zoom.safetensors", adapter)
    return folder / "style.safetensors", folder / "zoom.safetensors"


@pytest.fixture
def settings(tiny_base, motion_adapter, tmp_path):
    """Return settings of sample.py for a clip of the tiny base."""

    def settings(**changes) -> SampleConfig:
        usual = {"model": str(tiny_base), "motion": str(motion_adapter), "prompt": ("red apple",), "steps": 3}
        usual |= {"frames": 4, "guidance": 4.0, "seed": 5, "output": str(tmp_path / "clip.png")}
        return SampleConfig(**usual | changes)

    return settings


def drawn(config: SampleConfig) -> np.ndarray:
    """Return the frames of the clip that sample.py draws, from the file."""
    sample_clips(config)
    with Image.open(config.output) as clip:
        frames = []
        for number in range(clip.n_frames):
            clip.seek(number)
            frames.append(np.array(clip.convert("RGB")))
    return np.stack(frames)


# AnimateDiff 2 has a motion module in the middle block; 1 and 3 have none.
@pytest.mark.parametrize(("family", "with_mid_block"), [("sd1", True), ("sd2", False)])
def test_the_clip_is_the_one_diffusers_draws(family, with_mid_block, family_base, settings, tmp_path):
    folder = family_base(family)
    make_adapter(folder, use_motion_mid_block=with_mid_block).save_pretrained(tmp_path / "adapter")
    style, zoom = write_loras(tmp_path, folder, tmp_path / "adapter")

    theirs = AnimateDiffPipeline.from_pretrained(
        folder, motion_adapter=MotionAdapter.from_pretrained(tmp_path / "adapter")
    )
    theirs.scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler", beta_schedule="linear")
    options = {"num_inference_steps": 3, "num_frames": 4, "guidance_scale": 4.0, "output_type": "np"}

    def draw_theirs() -> np.ndarray:
        return theirs("red apple", generator=torch.Generator().manual_seed(5), **options).frames[0]

    plain = draw_theirs()
    theirs.load_lora_weights(style, adapter_name="style")
    theirs.load_lora_weights(zoom, adapter_name="zoom")
    theirs.set_adapters(["style", "zoom"], [0.05, 0.1])
    wanted = draw_theirs()
    assert np.abs(wanted - plain).max() > 1 / 255

    config = settings(model=str(folder), motion=str(tmp_path / "adapter"), lora=(f"{style}:0.05", f"{zoom}:0.1"))
    base = MotionBase.of(config, CPU)
    strengths = prepare(base, config)
    options |= {"generator": torch.Generator().manual_seed(5)}
    base.pipeline.scheduler = base.scheduler
    live = base.pipeline("red apple", **options).frames[0]
    assert np.abs(live - wanted).max() <= 1e-4  # the order of float32 sums
    frames, _ = draw_clips(base, strengths, config)  # merged
    assert np.abs(np.stack([np.array(frame) for frame in frames]) / 255 - wanted).max() <= 0.5 / 255 + 1e-4
    assert np.array_equal(drawn(config), np.stack([np.array(frame) for frame in frames]))


def test_an_adapter_moves_and_a_motion_lora_moves_otherwise(settings, loras):
    clip = drawn(settings())
    assert len(clip) == 4
    assert all(np.abs(frame.astype(int) - clip[0]).max() > 1 for frame in clip[1:])
    assert not np.array_equal(clip, drawn(settings(lora=(f"{loras[1]}:0.1",))))
    assert np.array_equal(clip, drawn(settings(lora=(f"{loras[1]}:0",))))
    assert not np.array_equal(clip, drawn(settings(seed=6)))


def test_clips_stand_on_a_sheet_that_moves(settings, loras):
    single = drawn(settings())
    sheet = drawn(settings(lora=(str(loras[1]),), strengths=(0.0, 0.1), prompt=("red apple", "a dog")))
    assert sheet.shape[:2] == (4, 28 + 2 * 132)
    enlarged = [Image.fromarray(frame).resize((128, 128), Image.Resampling.BICUBIC) for frame in single]
    for frame, cell in zip(sheet, enlarged, strict=True):
        assert np.array_equal(frame[28 : 28 + 128, -264 : -264 + 128], np.array(cell))
    assert drawn(settings(lora=tuple(map(str, loras)), grid=(0.0, 0.1))).shape[:2] == (4, 28 + 2 * 132)
    assert drawn(settings(count=2)).shape[:2] == (4, 28 + 132)


def test_a_clip_is_written_as_an_animation_that_tells_its_settings_or_as_frames(settings, tmp_path, capsys):
    clip = drawn(settings())
    for name in ("clip.gif", "clip.webp"):
        config = settings(output=str(tmp_path / name))
        assert drawn(config).shape == clip.shape
        with Image.open(tmp_path / name) as file:
            assert file.info["loop"] == 0
            if name == "clip.gif":
                assert file.info["duration"] == 120  # a GIF counts hundredths of a second
                assert json.loads(file.info["comment"]) == json.loads(config.to_json())
    assert json.loads(Image.open(tmp_path / "clip.png").text["minilora"])["frames"] == 4
    config = settings(output=str(tmp_path / "frames"), count=2)
    sample_clips(config)
    files = sorted((tmp_path / "frames").rglob("*.png"))
    assert [file.relative_to(tmp_path / "frames").as_posix() for file in files] == [
        f"{clip:04d}/{frame:04d}.png" for clip in (1, 2) for frame in (1, 2, 3, 4)
    ]
    assert np.array_equal(np.stack([np.array(Image.open(file)) for file in files[:4]]), clip)
    assert Image.open(files[0]).text["minilora"] == config.to_json()
    sample_clips(config)  # over itself
    with pytest.raises(UserError, match=r"frames: 0001/0003\.png already exists there; choose another folder"):
        sample_clips(settings(output=str(tmp_path / "frames"), frames=2))


def test_the_command_draws_a_clip(settings, tmp_path, monkeypatch, capsys):
    config = settings(output=str(tmp_path / "clip.gif"))
    words = ["--model", config.model, "--motion", config.motion, "--prompt", "red apple", "--steps", "2"]
    monkeypatch.setattr("sys.argv", ["sample.py", *words, "--frames", "3", "--output", config.output])
    commands.sample()
    assert Image.open(config.output).n_frames == 3
    assert f"wrote {config.output}" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------- LoRAs


def test_every_layer_of_a_motion_module_keeps_its_change_through_every_dialect(settings, motion_adapter, tmp_path):
    base = MotionBase.of(settings(), CPU)
    modules = live_modules(base.unet)
    motion = {name: shape for name, shape in modules.items() if ".motion_modules." in name}
    assert motion == Checkpoint(motion_adapter).modules
    assert len(motion) == 7 * 12  # 7 motion modules; two attentions of 4, two feed-forward layers, and in and out
    lora = random_lora(motion, 3, share=1.0)
    for dialect in ("kohya", "peft", "diffusers"):
        write_lora(tmp_path / dialect, lora, dialect, modules)
        again = read_lora(tmp_path / dialect, modules)
        assert again.deltas.keys() == motion.keys()
        assert not again.unmatched
        for name, delta in again.deltas.items():
            np.testing.assert_allclose(delta.matrix(), lora.deltas[name].matrix(), rtol=1e-5, atol=1e-5)
    load_lora(base.unet, tmp_path / "diffusers", "zoom")
    save_lora(base.unet, tmp_path / "again", "zoom")
    assert load_file(tmp_path / "again").keys() == load_file(tmp_path / "diffusers").keys()


def test_a_motion_lora_is_read_by_its_published_and_its_original_names(loras, motion_adapter, tmp_path):
    modules = Checkpoint(motion_adapter).modules
    known = read_lora(loras[1], modules)
    assert known.deltas.keys() == {name for name in modules if ".attn" in name}
    original = {
        key.removeprefix("unet.")
        .replace(".transformer_blocks.", ".temporal_transformer.transformer_blocks.")
        .replace(".attn1.", ".attention_blocks.0.")
        .replace(".attn2.", ".attention_blocks.1."): tensor
        for key, tensor in load_file(loras[1]).items()
    }
    save_file(original, tmp_path / "original.safetensors")
    for again in (
        read_lora(loras[1]),
        read_lora(tmp_path / "original.safetensors", modules),
        read_lora(tmp_path / "original.safetensors"),
    ):
        assert again.deltas.keys() == known.deltas.keys()
        assert all(np.array_equal(delta.matrix(), known.deltas[n].matrix()) for n, delta in again.deltas.items())


def test_a_motion_lora_is_merged_with_others_and_into_an_adapter(
    settings, loras, motion_adapter, tmp_path, monkeypatch
):
    def merge(*words) -> None:
        monkeypatch.setattr("sys.argv", ["merge", *map(str, words)])
        commands.merge()

    live = drawn(settings(lora=(f"{loras[0]}:0.05", f"{loras[1]}:0.1"))).astype(int)
    merge("--loras-only", f"{loras[0]}:0.05", f"{loras[1]}:0.1", "--output", tmp_path / "both.safetensors")
    # One level of 255: the order of float32 sums.
    assert np.abs(live - drawn(settings(lora=(str(tmp_path / "both.safetensors"),)))).max() <= 1
    merge(motion_adapter, f"{loras[1]}:0.1", "--output", tmp_path / "adapter", "--undo", tmp_path / "undo.safetensors")
    merged = drawn(settings(motion=str(tmp_path / "adapter"), lora=(f"{loras[0]}:0.05",)))
    assert np.abs(live - merged).max() <= 1
    merge("--restore", tmp_path / "adapter", tmp_path / "undo.safetensors", "--output", tmp_path / "again")
    for file in motion_adapter.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
    # A block of --lora-blocks has the motion modules in it, too.
    blocks = {"lora_blocks": ("down=0", "up=0", "mid=0")}
    assert np.array_equal(drawn(settings()), drawn(settings(lora=tuple(map(str, loras)), **blocks)))


def test_modules_that_are_only_counted_are_those_of_pictures(tiny_base, motion_adapter):
    pictures = Checkpoint(tiny_base).modules
    classes = ["CrossAttention", "Attention", "GEGLU"]
    both = _orders([*Checkpoint(motion_adapter).modules, *pictures], classes)
    assert both == _orders(pictures, classes)


# -------------------------------------------------------------------------------------------- mistakes


def test_a_key_without_a_place_is_an_error(settings, loras, tiny_base, tmp_path, monkeypatch, capsys):
    tensors = load_file(loras[1])
    wrong = {key.replace("down_blocks.0", "down_blocks.7"): tensor for key, tensor in tensors.items()}
    save_file(wrong, tmp_path / "wrong.safetensors")
    with pytest.raises(UserError, match=r"wrong\.safetensors was not made for this base: .* unet\.down_blocks\.7"):
        sample_clips(settings(lora=(str(tmp_path / "wrong.safetensors"),)))
    sample_clips(settings(lora=(str(tmp_path / "wrong.safetensors"),), allow_unmatched=True))
    # Without --motion there are no motion modules.
    monkeypatch.setattr("sys.argv", ["s", "--model", str(tiny_base), "--prompt", "a", "--lora", str(loras[1])])
    with pytest.raises(SystemExit):
        commands.sample()
    assert "no module for unet.down_blocks.0.motion_modules.0" in capsys.readouterr().err


def test_an_adapter_that_does_not_fit_is_refused(
    settings, tiny_base, family_base, motion_adapter, tmp_path, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # else the hub is asked, and again

    def refuse(said: str, **changes) -> None:
        with pytest.raises(UserError, match=said) as error:
            sample_clips(settings(**changes))
        assert "\n" not in str(error.value)

    def other(name: str, **more) -> str:
        make_adapter(tiny_base, **more).save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    refuse("--motion .*nowhere: neither a folder of a diffusers MotionAdapter nor", motion=str(tmp_path / "nowhere"))
    refuse("it holds a UNet2DConditionModel and should hold a MotionAdapter", motion=str(tiny_base / "unet"))
    refuse(
        r"made for another base; its block_out_channels is \[16, 48\], the base's .*\[16, 32\]",
        motion=other("wide", block_out_channels=(16, 48)),
    )
    refuse(
        "its motion_layers_per_block is 2, the base's layers_per_block 1", motion=other("m", motion_layers_per_block=2)
    )
    refuse("made for PIA, which also needs a picture", motion=other("pia", conv_in_channels=9))
    refuse("--frames is 9; --motion .* takes at most 8", frames=9)
    refuse("is a Stable Diffusion XL; give a 1.x or 2.x", model=str(family_base("sdxl")))
    refuse("it is an inpainting base", model=str(family_base("sd1 inpainting")))
    weights = load_file(motion_adapter / "diffusion_pytorch_model.safetensors")
    folder = tmp_path / "lacks"
    make_adapter(tiny_base).save_pretrained(folder)
    lacking = {k: v for k, v in weights.items() if k != "mid_block.motion_modules.0.proj_in.bias"}
    save_file(lacking, folder / "diffusion_pytorch_model.safetensors")
    refuse(r"the weights of its motion adapter lack mid_block\.motion_modules\.0\.proj_in\.bias", motion=str(folder))
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(b"broken")
    refuse("its motion adapter does not load", motion=str(folder))
    (folder / "config.json").write_text("{")
    refuse("neither a folder of a diffusers MotionAdapter", motion=str(folder))


def test_positions_that_a_file_lacks_are_computed(settings, tiny_base, motion_adapter, tmp_path):
    make_adapter(tiny_base).save_pretrained(tmp_path / "adapter")
    weights = load_file(motion_adapter / "diffusion_pytorch_model.safetensors")
    file = tmp_path / "adapter" / "diffusion_pytorch_model.safetensors"
    save_file({key: tensor for key, tensor in weights.items() if not key.endswith(".pe")}, file)
    assert np.array_equal(drawn(settings()), drawn(settings(motion=str(tmp_path / "adapter"))))


def test_what_draws_no_numbers_is_said(settings):
    base = MotionBase.of(settings(), CPU)
    torch.nn.init.constant_(base.unet.conv_out.bias, float("nan"))
    with pytest.raises(UserError, match=r"--motion .*: what it draws for 'a dog' is not finite"):
        draw_clip(base, "a dog", 1, settings())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output": "clip.jpg"}, r"--output clip\.jpg: JPEG holds one picture; give a \.gif"),
        ({"compile": True}, "--motion and --compile cannot be combined"),
        ({"image": "a.png", "mask": "b.png"}, "--motion and --image cannot be combined"),
        ({"motion": None}, "--frames needs --motion, which draws clips"),
        ({"frames": 0}, "--frames is 0; it must be at least 1"),
    ],
)
def test_mistakes_are_named(settings, change, message):
    with pytest.raises(UserError, match=message):
        sample_clips(settings(**change))
