"""base/: the bundled base can be built from nothing. (That it is an ordinary pipeline, test_models.py says.)"""

import json
import shutil

import diffusers
import pytest
import torch
from conftest import make_picture
from diffusers import DDPMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from minilora.base import build, decoder, fit, parts, pictures
from minilora.settings.sample import SAMPLERS
from minilora.settings.train import TrainConfig
from minilora.training import train

COLOURS = {"noto": "red", "twemoji": "green", "openmoji": "blue"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data folder with four of the base's things and a flag in three styles, and two photographs."""
    folder = tmp_path_factory.mktemp("base-data")
    for style, colour in COLOURS.items():
        bodies = [f'<circle cx="18" cy="18" r="{4 + 3 * number}" fill="{colour}"/>' for number in range(5)]
        names = [thing.icon for thing in pictures.read_things(4)] + ["flag-france"]
        icons = {name: {"body": body} for name, body in zip(names, bodies, strict=True)}
        icons |= {f"other-{number}": {"body": bodies[number % 5]} for number in range(20)}
        (folder / style).mkdir()
        (folder / style / "icons.json").write_text(json.dumps({"width": 36, "height": 36, "icons": icons}))
    photographs = folder / "lomiri" / "usr" / "share" / "backgrounds"
    photographs.mkdir(parents=True)
    for number in range(2):
        make_picture(number, 300, 200).save(photographs / f"{number}_by_hand.jpg")
    return folder


def build_base(data, folder, *more):
    words = ["--data", data, "--work", folder / "work", "--output", folder / "base", "--things", 4]
    words += ["--vae-steps", 3, "--steps", 3, "--decoder-steps", 2, "--no-compile", "--no-bf16", *more]
    build.main([str(word) for word in words])
    return folder / "base"


@pytest.fixture(scope="module")
def base(data, tmp_path_factory):
    return build_base(data, tmp_path_factory.mktemp("built"))


def test_what_is_built_is_an_ordinary_pipeline_that_draws(base):
    pipeline = StableDiffusionPipeline.from_pretrained(base)
    assert pipeline.vae_scale_factor == 8
    [picture] = pipeline("apple, noto style", num_inference_steps=2, output_type="pt").images
    assert picture.shape == (3, pictures.SIZE, pictures.SIZE)
    assert picture.isfinite().all()


@pytest.mark.parametrize("schedule", parts.SCHEDULES)
def test_the_noise_levels_are_diffusers_and_every_sampler_draws_by_them(schedule, tmp_path):
    parts.make_scheduler(schedule).save_pretrained(tmp_path)
    wanted = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule=parts.SCHEDULES[schedule])
    for kind in SAMPLERS.values():
        read = getattr(diffusers, kind).from_pretrained(tmp_path)
        assert torch.equal(read.alphas_cumprod, wanted.alphas_cumprod)


def test_a_lora_is_trained_on_what_is_built(base, tmp_path):
    make_picture(0, 64, 64).save(tmp_path / "a.png")
    words = {"model": str(base), "resolution": 64, "steps": 1, "caption": "apple", "output": str(tmp_path / "out")}
    assert train(TrainConfig(data=(str(tmp_path),), **words)).is_file()


def test_a_build_that_is_stopped_anywhere_goes_on_to_the_same_bytes(data, base, tmp_path, monkeypatch):
    monkeypatch.setattr(fit, "SAVE_EVERY", 1)
    shutil.copytree(base.parent / "work" / "tokenizer", tmp_path / "work" / "tokenizer")  # see build.py: it may vary
    real, steps = torch.optim.AdamW.step, []

    def step(optimizer):
        steps.append(optimizer)
        if len(steps) in (2, 6, 10):  # in the VAE's training, in the U-Net's, and in the decoder's
            raise KeyboardInterrupt
        return real(optimizer)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            build_base(data, tmp_path)
    again = build_base(data, tmp_path)
    weights = [path.relative_to(base) for path in base.rglob("*.safetensors")]
    assert len(weights) == 3
    changed = [str(path) for path in weights if (again / path).read_bytes() != (base / path).read_bytes()]
    assert not changed


def test_a_base_is_trained_further_with_the_vae_that_it_has(data, base, tmp_path):
    further = build_base(data, tmp_path, "--start", base, "--vae-steps", 0, "--steps", 1, "--decoder-steps", 0)
    vae, unet = (f"{part}/diffusion_pytorch_model.safetensors" for part in ("vae", "unet"))
    assert (further / vae).read_bytes() == (base / vae).read_bytes()
    assert (further / "vae" / "config.json").read_bytes() == (base / "vae" / "config.json").read_bytes()  # no path
    assert (further / unet).read_bytes() != (base / unet).read_bytes()
    assert (further / "tokenizer" / "tokenizer.json").read_bytes() == (
        base / "tokenizer" / "tokenizer.json"
    ).read_bytes()


def test_a_vae_is_trained_further_and_its_latents_keep_their_scale(data, base, tmp_path):
    further = build_base(data, tmp_path, "--start", base, "--vae-steps", 2, "--steps", 1)
    old, new = (parts.load_vae(folder) for folder in (base, further))
    assert old.config.scaling_factor == new.config.scaling_factor
    pixels = torch.rand(1, 3, pictures.SIZE, pictures.SIZE) * 2 - 1
    latents, moved = (fit.encode(vae, pixels) for vae in (old, new))
    assert not torch.equal(latents, moved)
    # Two steps of at most 0.02 of the highest rate: near the old latents, and not those of another first VAE.
    assert (moved - latents).std() < 0.1 * latents.std()


def test_the_decoder_is_trained_alone_and_nothing_that_knows_the_latents_changes(data, base, tmp_path):
    further = build_base(data, tmp_path, "--start", base, "--vae-steps", 0, "--steps", 0)
    for part in ("unet/diffusion_pytorch_model", "text_encoder/model"):
        assert (further / f"{part}.safetensors").read_bytes() == (base / f"{part}.safetensors").read_bytes()
    old, new = (load_file(folder / "vae" / "diffusion_pytorch_model.safetensors") for folder in (base, further))
    changed = {name.split(".")[0] for name in old if not torch.equal(old[name], new[name])}
    assert "decoder" in changed <= {"decoder", "post_quant_conv"}  # the second so little that half precision hides it


def test_a_critic_judges_patches_and_an_edge_in_its_place_costs_nothing():
    judged, seen = decoder.Critic()(torch.rand(2, 3, 64, 64))
    assert judged.shape == (2, 1, 16, 16)
    assert [layer.shape[-1] for layer in seen] == [32, 16, 16]
    assert decoder.edges(torch.full((1, 3, 8, 8), 0.3)) == 0  # a wrong colour, but no wrong edge
    assert decoder.edges(torch.eye(8).expand(1, 3, 8, 8)) > 0


def test_a_state_is_refused_by_a_build_that_begins_elsewhere(data, base, tmp_path, capsys, monkeypatch):
    def refusal(work, *more):
        with pytest.raises(SystemExit) as end:
            build.main(["--data", str(data), "--work", str(work), *map(str, more)])
        assert end.value.code == 2
        return capsys.readouterr().err

    start, last = ("--start", base), ("--vae-steps", 0, "--steps", 1, "--decoder-steps", 0)
    state = base.parent / "work" / "vae.safetensors"
    assert f"{state} holds a build that did not begin from --start {base}; choose another" in refusal(
        state.parent, *start
    )
    further = build_base(data, tmp_path, *start, *last)
    state, unet = tmp_path / "work" / "unet.safetensors", further / "unet" / "diffusion_pytorch_model.safetensors"
    assert f"{state} holds a build that did not begin from random weights" in refusal(state.parent)
    said = refusal(state.parent, "--start", further, *last)
    assert f"{state} holds a build that did not begin from --start {further}" in said
    trained = unet.read_bytes()
    monkeypatch.setattr(fit, "learning_rate_at", None)
    build_base(data, tmp_path, *start, *last)  # its own state is taken up: no step is left
    assert unet.read_bytes() == trained
    save_file(load_file(state), state)  # of a build that did not record where it began
    assert f"{state} holds a build that did not begin from --start {base}" in refusal(state.parent, *start, *last)


def test_the_build_says_which_data_it_lacks(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        build.main(["--data", str(tmp_path)])
    assert end.value.code == 2
    assert "lacks noto/icons.json, twemoji/icons.json, openmoji/icons.json, lomiri" in capsys.readouterr().err


def test_every_thing_has_names_of_its_own():
    things = pictures.read_things()
    names = [name for thing in things for name in thing.names]
    assert len({thing.icon for thing in things}) == len(things)
    assert len(set(names)) == len(names)


def test_flags_are_no_drawings_and_what_is_held_out_is_not_learnt(data, tmp_path):
    drawn = pictures.read_style(data, "noto", tmp_path)
    assert "flag-france" not in drawn
    assert "red-apple" in drawn
    assert drawn["red-apple"].shape == (pictures.SIZE, pictures.SIZE, 3)
    assert 0 < sum(map(pictures.is_held_out, (f"thing-{n}" for n in range(4000)))) < 200  # 100 in the mean


def test_drawings_come_thing_by_thing_in_every_style(data, tmp_path):
    styles = {style: pictures.read_style(data, style, tmp_path) for style in pictures.STYLES}
    drawings = pictures.read_drawings(styles, pictures.read_things(4))
    assert [(d.thing.names[0], d.style) for d in drawings[:3]] == [("apple", style) for style in pictures.STYLES]


def test_captions_are_names_with_or_without_article_and_style_or_empty(data, tmp_path):
    thing = pictures.read_things(1)[0]
    drawing = pictures.Drawing(None, thing, "noto")
    captions = [pictures.caption_at(drawing, position) for position in range(1000)]
    known = [
        f"{article}{name}{style}" for name in thing.names for article in ("", "an ") for style in ("", ", noto style")
    ]
    assert set(captions) <= {"", *known, *(c.replace("an r", "a r") for c in known)}
    assert 60 < captions.count("") < 140  # 1000 draws of 0.1: four deviations are 38
    second = [pictures.caption_at(pictures.Drawing(None, thing, "twemoji"), position) for position in range(1000)]
    assert all(caption.endswith(", twemoji style") for caption in second if caption)


def test_the_tokenizer_learns_the_names_and_their_styles():
    tokenizer = parts.train_tokenizer(pictures.read_things(20))
    tokens = tokenizer("apple, noto style").input_ids
    assert tokenizer.decode(tokens, skip_special_tokens=True).replace(" ", "") == "apple,notostyle"
    assert (tokens[0], tokens[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)


def test_the_learning_rate_rises_holds_and_falls():
    rates = [fit.learning_rate_at(step, 3000, 1.0) for step in range(3000)]
    assert rates[:100] == sorted(rates[:100])
    assert set(rates[100:2001]) == {1.0}
    assert rates[2000:] == sorted(rates[2000:], reverse=True)
    assert rates[-1] == pytest.approx(0.02)
