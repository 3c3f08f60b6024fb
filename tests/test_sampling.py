"""sampling.py: merged pictures equal live ones, strengths are restored, sheets hold what they say."""

import json
import re

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from helpers import CPU, random_lora, write_a_lora
from PIL import Image
from safetensors.torch import load_file, save_file
from torch._dynamo.utils import counters

from minilora import load_lora, lora_layers, set_lora_strength
from minilora.data.sheet import sheet
from minilora.files.fold import fold
from minilora.files.layout import Checkpoint
from minilora.files.write import write_lora
from minilora.models.base import Base
from minilora.sampling import TOGETHER, draw, draw_each, evaluating, merged_at, sample
from minilora.settings.errors import UserError
from minilora.settings.sample import SAMPLERS, SampleConfig
from minilora.settings.shared import by_name
from minilora.settings.train import TrainConfig


@pytest.fixture
def lora(tmp_path):
    write_a_lora(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    return tmp_path / "lora"


@pytest.fixture
def command(tiny_base, tmp_path):
    """Run sample.py's work with settings for the tiny base; return the picture as an array."""

    def command(**settings) -> np.ndarray:
        output = tmp_path / "picture.png"
        places = {"model": str(tiny_base), "output": str(output), "prompt": ("red apple",), "steps": 3}
        sample(SampleConfig(**(places | settings)))
        return np.array(Image.open(output))

    return command


def test_the_picture_is_the_one_diffusers_draws(command, lora, tiny_base):
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_base)
    pipeline.load_lora_weights(lora, adapter_name="a")
    pipeline.set_adapters("a", 0.7)
    options = {"num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "np"}
    theirs = pipeline("red apple", generator=torch.Generator().manual_seed(5), **options).images[0]
    base = Base(str(tiny_base), CPU)
    load_lora(base.unet, lora, "a")
    with merged_at(base, {"a": 0.7}):
        ours = base.pipeline("red apple", generator=torch.Generator().manual_seed(5), **options).images[0]
    assert np.abs(ours - theirs).max() <= 1e-4  # ours is merged and theirs is not: float32 rounding
    file = command(lora=(f"{lora}:0.7",), seed=5, guidance=4.0)
    assert np.abs(theirs * 255 - file).max() <= 0.5 + 255e-4  # the file holds whole numbers


def test_drawn_with_blocks_is_drawn_on_the_base_merged_with_blocks(command, lora, tiny_base, tmp_path):
    blocks = {"lora_blocks": ("down=0.2", "mid=0.5", "up_blocks.1=-1")}
    plain, drawn = command(lora=(f"{lora}:0.7",)), command(lora=(f"{lora}:0.7",), **blocks)
    fold(tiny_base, [(lora, 0.7)], tmp_path / "merged", blocks=by_name(blocks["lora_blocks"]))
    assert np.abs(drawn.astype(int) - command(model=str(tmp_path / "merged"))).max() <= 1  # the order of float32 sums
    assert np.abs(drawn.astype(int) - plain).max() > 1
    assert np.array_equal(plain, command(lora=(f"{lora}:0.7",), lora_blocks=("down=1", "mid=1", "up=1")))
    assert np.array_equal(command(), command(lora=(str(lora),), lora_blocks=("down=0", "mid=0", "up=0")))
    with pytest.raises(UserError, match=r"--lora-blocks up_blocks\.0, text: no layer of a LoRA is there; they are in"):
        command(lora=(str(lora),), lora_blocks=("up_blocks.0=1", "text=1", "mid=1"))


def test_weights_with_blocks_are_those_of_the_merged_base(tiny_base, tmp_path):
    """Of all parts, and all kinds of layers; afterwards the weights are the base's, and the strengths as before."""
    modules = Checkpoint(tiny_base).modules
    write_lora(tmp_path / "l.safetensors", random_lora(modules, 0, share=1.0), "diffusers", modules)
    blocks = {"down": 0.2, "up_blocks.0": -1.5, "conv_in": 0.0, "text": 0.5}
    fold(tiny_base, [(tmp_path / "l.safetensors", 0.7)], tmp_path / "merged", blocks=blocks)
    base, merged = Base(str(tiny_base), CPU), Base(str(tmp_path / "merged"), CPU)
    pairs = [(base.unet, merged.unet), (base.text_encoder, merged.text_encoder)]
    before = [{name: tensor.clone() for name, tensor in part.state_dict().items()} for part, _ in pairs]
    load_lora(base.pipeline, tmp_path / "l.safetensors", "a")
    with merged_at(base, {"a": 0.7}, blocks):
        for part, other in pairs:
            wanted = other.state_dict()
            for path, layer in lora_layers(part).items():
                # Sums of a few float32 products, in another order.
                torch.testing.assert_close(layer.base.weight, wanted[f"{path}.weight"], rtol=1e-5, atol=1e-5)
    for (part, _), weights in zip(pairs, before, strict=True):
        assert len(lora_layers(part)) > 10
        for path, layer in lora_layers(part).items():
            assert torch.equal(layer.base.weight, weights[f"{path}.weight"])
            assert layer.adapters["a"].strength == 1.0


def test_without_a_base_the_one_is_taken_that_the_lora_names_and_it_is_said(command, lora, tiny_base, tmp_path, capsys):
    drawn = command(lora=(str(lora),))
    (lora / "config.json").write_text(TrainConfig(data=("x",), model=str(tiny_base)).to_json())
    assert np.array_equal(command(lora=(str(lora),), model=None), drawn)
    assert f"note: the base is {tiny_base}, by config.json of {lora}" in capsys.readouterr().err
    (lora / "config.json").write_text(TrainConfig(data=("x",), model=str(tmp_path / "gone")).to_json())
    with pytest.raises(UserError, match=rf"--model .*gone: .*; config.json of {lora} names this base"):
        command(lora=(str(lora),), model=None)


def test_a_picture_tells_the_settings_that_draw_it_again(command, lora, tmp_path):
    drawn = command(lora=(f"{lora}:0.7",), seed=5, negative="blue")
    told = json.loads(Image.open(tmp_path / "picture.png").text["minilora"])
    again = SampleConfig(**{name: tuple(value) if isinstance(value, list) else value for name, value in told.items()})
    sample(again)
    assert np.array_equal(np.array(Image.open(tmp_path / "picture.png")), drawn)
    assert (again.seed, again.lora, again.negative) == (5, (f"{lora}:0.7",), "blue")
    command(count=2)
    assert json.loads(Image.open(tmp_path / "picture.png").text["minilora"])["count"] == 2  # a sheet tells it, too
    command(output=str(tmp_path / "several"), count=2)
    assert all("minilora" in Image.open(path).text for path in (tmp_path / "several").glob("*.png"))


def test_after_each_step_of_a_drawing_the_caller_is_told(tiny_base):
    steps, base = [], Base(str(tiny_base), CPU)
    three_steps = SampleConfig(prompt=("a dog",), steps=3)
    draw(base, "a dog", [1, 2], 16, three_steps, lambda: steps.append("drawn"))  # two pictures at once
    assert len(steps) == 3


def test_merged_equals_live(tiny_base, lora):
    base = Base(str(tiny_base), CPU)
    load_lora(base.unet, lora, "a")
    set_lora_strength(base.unet, 0.5, "a")
    three_steps = SampleConfig(prompt=("a dog",), steps=3)
    live = draw(base, "a dog", [1, 2], 16, three_steps)
    with merged_at(base, {"a": 0.5}):
        merged = draw(base, "a dog", [1, 2], 16, three_steps)
    for one, two in zip(live, merged, strict=True):
        assert np.abs(np.array(one).astype(int) - np.array(two)).max() <= 1  # as above


def test_merged_at_puts_everything_back_even_after_an_error(tiny_base, lora):
    base = Base(str(tiny_base), CPU)
    load_lora(base.unet, lora, "a", 0.3)
    with pytest.raises(ZeroDivisionError), merged_at(base, {"a": 0.9}):
        raise ZeroDivisionError
    layers = lora_layers(base.unet).values()
    assert {layer.adapters["a"].strength for layer in layers} == {0.3}
    assert not any(layer.merged for layer in layers)


def test_a_strength_that_gives_no_numbers_is_refused(command, lora):
    with pytest.raises(UserError, match="the strength nan is not a finite number"):
        command(lora=(f"{lora}:nan",))
    with pytest.raises(UserError, match=r"LoRA at 1e\+39: cannot merge: .* not finite in down_blocks"):
        command(lora=(f"{lora}:1e39",))


def with_word(lora, tiny_base, word: str, prompt: str, key: str):
    """Write a LoRA file anew with a word whose vectors are those of a prompt's own words."""
    base = Base(str(tiny_base), CPU)
    ids = base.tokenizer(prompt).input_ids[1:-1]
    vectors = base.text_encoder.get_input_embeddings().weight[ids].detach().clone()
    file = lora / "pytorch_lora_weights.safetensors"
    save_file(load_file(file) | {key.format(word): vectors}, lora / f"{word}.safetensors")
    return lora / f"{word}.safetensors"


@pytest.mark.parametrize("key", ["bundle_emb.{}.string_to_param.*", "bundle_emb.{}.clip_l", "bundle_emb.{}.emb_params"])
def test_a_word_that_a_lora_brings_is_drawn_by_its_vectors(key, command, lora, tiny_base, capsys):
    file = with_word(lora, tiny_base, "qzx", "red apple", key)
    assert np.array_equal(command(lora=(str(file),), prompt=("qzx",)), command(lora=(str(lora),)))
    assert "brings the word 'qzx'" in capsys.readouterr().out
    assert not np.array_equal(command(lora=(str(lora),), prompt=("qzx",)), command(lora=(str(lora),)))


def test_a_word_that_does_not_fit_is_said_and_can_be_left_out(command, lora, capsys):
    file = lora / "w.safetensors"
    tensors = load_file(lora / "pytorch_lora_weights.safetensors")
    for key, vectors, said in (
        (
            "bundle_emb.qzx.clip_l",
            torch.ones(2, 768),
            "its word 'qzx' has vectors of 768 numbers, and text_encoder of 16",
        ),
        ("bundle_emb.qzx.clip_g", torch.ones(1280), "its word 'qzx' is for a text_encoder_2, which this base lacks"),
        ("bundle_emb.!.clip_l", torch.ones(1, 16), "its word '!' is already in the vocabulary of text_encoder"),
        (
            "bundle_emb.qzx.clip_l",
            torch.ones(1, 16, dtype=torch.int32),
            r"clip_l, I32 \(1, 16\), holds no embedding vectors",
        ),
    ):
        save_file(tensors | {key: vectors}, file)
        with pytest.raises(UserError, match=said):
            command(lora=(str(file),))
        if vectors.is_floating_point():
            left_out = command(lora=(str(file),), allow_unmatched=True)
            assert f"left out: {key} of {file}" in capsys.readouterr().out
            assert np.array_equal(left_out, command(lora=(str(lora),)))


def test_evaluating_restores_each_part():
    module = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout())
    module[1].eval()
    with evaluating(module):
        assert not any(child.training for child in module.modules())
    assert [child.training for child in module.modules()] == [True, True, False]


def test_a_picture_depends_on_its_seed_and_nothing_else(command):
    alone = command(seed=7)
    assert np.array_equal(alone, command(seed=7))
    assert not np.array_equal(alone, command(seed=8))
    assert not np.array_equal(alone, command(seed=7, guidance=9.0))
    assert not np.array_equal(alone, command(seed=7, negative="a dog"))
    assert not np.array_equal(alone, command(seed=7, steps=4))
    assert not np.array_equal(alone, command(seed=7, prompt=("a dog",)))


def test_a_size_is_width_and_height_or_the_side_of_a_square(command):
    square = command(size=(24,))
    assert square.shape == (24, 24, 3)
    assert np.array_equal(square, command(size=(24, 24)))
    assert command(size=(32, 16)).shape == (16, 32, 3)


def test_several_loras_add_up(command, lora):
    both = command(lora=(f"{lora}:0.3", f"{lora}:0.4"))
    assert np.abs(both.astype(int) - command(lora=(f"{lora}:0.7",))).max() <= 1  # the order of a float32 sum
    assert not np.array_equal(both, command())


def test_strengths_make_one_row_per_seed_and_one_column_per_strength(command, lora):
    picture = command(lora=(str(lora),), strengths=(0.0, 0.5, 1.0), count=2)
    assert picture.shape[0] == 28 + 2 * 132
    cells = [picture[28 : 28 + 128, -132 * (3 - i) : -132 * (3 - i) + 128] for i in range(3)]
    plain = Image.fromarray(command()).resize((128, 128), Image.Resampling.BICUBIC)
    assert np.array_equal(cells[0], np.array(plain))
    assert not np.array_equal(cells[0], cells[2])


def test_count_and_prompts_make_a_sheet(command):
    picture = command(prompt=("red apple", "a dog"), count=3)
    assert picture.shape[0] == 28 + 2 * 132
    assert picture.shape[1] > 3 * 132


def test_prompts_seeds_and_guidance_go_through_the_unet_together(tiny_base):
    base, batches = Base(str(tiny_base), CPU), []
    base.unet.register_forward_pre_hook(lambda unet, inputs: batches.append(len(inputs[0])))
    config = SampleConfig(prompt=("red apple", "a dog"), steps=3)
    rows = draw_each(base, config.prompt, [1, 2, 3], 16, config)
    assert batches == [2 * TOGETHER] * 3 + [2 * (6 - TOGETHER)] * 3  # with guidance each picture is there twice
    for prompt, row in zip(config.prompt, rows, strict=True):
        for seed, picture in zip([1, 2, 3], row, strict=True):
            [alone] = draw(base, prompt, [seed], 16, config)
            assert np.abs(np.array(alone).astype(int) - np.array(picture)).max() <= 1  # the order of a float32 sum


def test_what_is_traced_for_compiling_draws_the_same(command, lora):
    settings = {"lora": (str(lora),), "strengths": (0.5, 1.0), "prompt": ("red apple", "a dog"), "count": 3}
    plain = command(**settings)
    torch.compiler.reset()
    counters.clear()
    with torch.compiler.set_stance(force_backend="eager"):  # all but the compiler
        traced = command(compile=True, **settings)
    assert np.array_equal(plain, traced)
    assert counters["stats"]["unique_graphs"] == 3  # the check before; a pass of four pictures, and one of two
    assert not counters["graph_break"]


@pytest.mark.slow
def test_compiled_draws_nearly_the_same_and_says_how_long_the_first_step_took(command, smallest_base, capsys):
    torch.compiler.reset()
    one, two = command(model=str(smallest_base)), command(model=str(smallest_base), compile=True)
    assert np.abs(one.astype(int) - two).max() <= 1  # the order and rounding of float32 sums
    assert re.search(r"the first step took \d+\.\d s, compiling included", capsys.readouterr().out)


def test_every_scheduler_draws_in_its_own_way(command):
    pictures = {name: command(scheduler=name) for name in SAMPLERS}
    assert {picture.shape for picture in pictures.values()} == {(16, 16, 3)}
    euler = pictures.pop("euler").astype(int)
    assert abs(euler - pictures["ddim"]).max() <= 1  # of 255: the same steps in other units
    assert len({picture.tobytes() for picture in pictures.values()}) == len(pictures)


def test_zero_terminal_snr_draws_from_pure_noise(command, family_base):
    model = str(family_base("sd2"))
    assert not np.array_equal(command(model=model), command(model=model, zero_terminal_snr=True))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_draws_nearly_the_same(command, lora, precision):
    # bf16 has 8 bits of mantissa, so three steps move pixels by a few per cent of their range.
    one, two = command(lora=(str(lora),)), command(lora=(str(lora),), precision=precision)
    assert 0 < np.abs(one.astype(int) - two).mean() < 10


def test_a_lora_for_another_base_is_refused_with_keys_and_shapes(command, lora, tmp_path):
    tensors = load_file(lora / "pytorch_lora_weights.safetensors")
    wider = {k: torch.nn.functional.pad(v, (0, 16)) if "attn2.to_k.lora_A" in k else v for k, v in tensors.items()}
    save_file(wider, tmp_path / "wide.safetensors")
    with pytest.raises(
        UserError, match=r"wide\.safetensors: unet\..*attn2\.to_k\.lora_A.* are \(4, 32\) and \(16, 4\) but"
    ):
        command(lora=(str(tmp_path / "wide.safetensors"),))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": (20,)}, "--size is 20x20; this base needs multiples of 8"),
        ({"size": (24, 20)}, "--size is 24x20; this base needs multiples of 8"),
        ({"lora": ("nowhere",)}, "nowhere: there is no such file or folder"),
        ({"lora": ("x.pt",)}, "a pickle, which can run code"),
        ({"output": "out/picture.xyz"}, "needs a picture's extension"),
        ({"model": "nowhere"}, "nowhere: neither a diffusers folder"),
    ],
)
def test_mistakes_are_named(command, change, message, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # else the hub is asked, and again
    with pytest.raises(UserError, match=message):
        command(**change)


def test_a_sheet_holds_its_pictures():
    red, blue = (Image.new("RGB", (8, 8), color) for color in ("red", "blue"))
    pixels = np.array(sheet([[red, blue], [blue, red]], ["one", "two"], ["a", "b"]))
    assert tuple(pixels[28 + 90, -100]) == (0, 0, 255)
    assert tuple(pixels[28 + 132 + 90, -100]) == (255, 0, 0)


def test_pictures_that_are_no_squares_are_drawn_in_their_size_and_keep_their_shape_on_a_sheet(tiny_base):
    base = Base(str(tiny_base), torch.device("cpu"))
    [wide] = draw(base, "a dog", [1], (32, 8), SampleConfig(prompt=("a dog",), steps=2))
    assert wide.size == (32, 8)
    result = sheet([[Image.new("RGB", (32, 8), "red")]], ["column"], ["row"])
    red = (np.array(result) == (255, 0, 0)).all(axis=2)
    assert (red.any(axis=0).sum(), red.any(axis=1).sum()) == (128, 32)
