"""apps/restore and apps/morph: what is drawn in between is what it is said to be, and the ends are the ends."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_picture
from helpers import CPU, random_lora, write_single_file
from PIL import Image, ImageSequence

from minilora import inject_lora, lora_parameters, set_lora_strength
from minilora.apps import imagic, mixing
from minilora.apps import morph as morphing
from minilora.apps.ddim import Levels, ddim_draw, ddim_invert, guided
from minilora.apps.distill import DistillConfig, distill
from minilora.apps.evaluate import EvaluateConfig, evaluate
from minilora.apps.likeness import distances, psnr
from minilora.apps.mixing import between, loras_between, slerp
from minilora.apps.morph import MorphConfig, draw_frames, morph, save_frames, way
from minilora.apps.restore import RestoreConfig, learn, restore, see
from minilora.apps.restyle import RestyleConfig, restyle
from minilora.diffusion import Conditioning, denoising_loss
from minilora.files.layout import Checkpoint
from minilora.files.network import save_lora
from minilora.files.write import write_lora
from minilora.models.base import Base
from minilora.sampling import merged_at
from minilora.settings.command_line import read
from minilora.settings.errors import UserError


@pytest.fixture
def two_pictures(tmp_path) -> tuple[str, str]:
    """Two pictures with large shapes, which a VAE with random weights tells apart."""
    for seed, name in enumerate("ab"):
        make_picture(seed, 3, 3).resize((24, 24), Image.Resampling.NEAREST).save(tmp_path / f"{name}.png")
    return str(tmp_path / "a.png"), str(tmp_path / "b.png")


@pytest.fixture
def base(tiny_base) -> Base:
    """The tiny base with two LoRAs, a and b, that change much."""
    base = Base(str(tiny_base), CPU)
    for name in "ab":
        inject_lora(base.unet, rank=2, name=name)
    torch.manual_seed(0)
    for parameter in lora_parameters(base.unet):
        torch.nn.init.normal_(parameter, std=0.3)
    return base


@pytest.fixture
def config(tiny_base, two_pictures, tmp_path, monkeypatch) -> MorphConfig:
    monkeypatch.chdir(tmp_path)  # its results go to out/
    return MorphConfig(
        two_pictures, ("red apple", "a dog"), frames=5, steps=5, rank=2, train_steps=2, model=str(tiny_base)
    )


@pytest.fixture
def parts(base, config):
    """Return what `way` takes: levels, the pictures, their texts."""
    pictures = [see(Path(name), config) for name in config.pictures]
    texts = [base.encode_text(prompt) for prompt in config.prompt]
    return Levels.of(base.scheduler, config.steps, CPU), pictures, texts


# ------------------------------------------------------------------------------------------- restore


def test_restoring_prints_and_writes_its_figures(tiny_base, two_pictures, tmp_path, capsys, monkeypatch):
    output = tmp_path / "out"
    argv = [two_pictures[0], "--prompt", "red apple", "--edit", "a dog", "--output", str(output)]
    argv += ["--model", str(tiny_base), "--steps", "4", "--rank", "2", "--train-steps", "2"]
    monkeypatch.setattr("sys.argv", ["/anywhere/minilora/apps/restore.py", *argv])
    figures = restore(read(RestoreConfig, argv, ""))
    written = json.loads((output / "figures.json").read_text())
    assert written["figures"] == figures
    assert written["command"].startswith("python -m minilora.apps.restore ")
    assert "--prompt 'red apple'" in written["command"]
    printed = capsys.readouterr().out
    assert all(f"{name}: {value:.4g}" in printed for name, value in figures.items())
    assert all(math.isfinite(value) for value in figures.values())
    assert Image.open(output / "restored.png").width > 5 * 128  # picture, VAE, base, LoRA, edit


def test_restoring_with_a_lora_that_changes_nothing_is_restoring_by_the_base(tiny_base, two_pictures, tmp_path):
    base = Base(str(tiny_base), CPU)
    inject_lora(base.unet, rank=2)
    save_lora(base.unet, tmp_path / "nothing.safetensors")
    given = {"prompt": "red apple", "model": str(tiny_base), "steps": 4, "output": str(tmp_path / "out")}
    figures = restore(RestoreConfig((two_pictures[0],), **given, lora=str(tmp_path / "nothing.safetensors")))
    assert figures["PSNR restored by the base, dB"] == figures["PSNR restored with the LoRA, dB"]


def test_what_was_learnt_before_by_the_same_settings_is_not_learnt_again(config, two_pictures, tmp_path):
    path = Path(two_pictures[0])
    first = learn(path, "red apple", tmp_path / "lora", config).read_bytes()
    steps = []

    def count(*args):
        steps.append(args)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("minilora.training.optimizer_step", count)
        assert learn(path, "red apple", tmp_path / "lora", config).read_bytes() == first
    assert not steps
    assert learn(path, "a dog", tmp_path / "lora", config).read_bytes() != first


def test_the_optimized_text_describes_the_picture_better(config, two_pictures):
    base = Base(config.model, CPU)
    latents = base.encode_picture(see(Path(two_pictures[0]), config))[0][None]  # (1, channels, h, w)
    found, given = imagic.optimized_text(base, latents, "red apple", 100), base.encode_text("red apple")[None]
    noise = torch.randn(64, *latents.shape[1:], generator=torch.Generator().manual_seed(0))
    times = torch.arange(64) * 1000 // 64

    def loss(text: torch.Tensor) -> float:
        seen = latents.expand(64, -1, -1, -1), Conditioning(text.expand(64, -1, -1)), noise, times
        with torch.no_grad():
            return denoising_loss(base.unet, *seen, base.schedule).mean().item()

    assert loss(found) < loss(given)
    assert not any(parameter.requires_grad for parameter in base.unet.parameters())


def test_training_with_the_captions_own_embedding_is_ordinary_training(config, two_pictures, tmp_path):
    path, text = Path(two_pictures[0]), Base(config.model, CPU).encode_text("red apple")[None]
    given = learn(path, "red apple", tmp_path / "given", config, text)
    ordinary = learn(path, "red apple", tmp_path / "ordinary", config)
    assert given.read_bytes() == ordinary.read_bytes()
    other = learn(path, "red apple", tmp_path / "other", config, text + 1)
    assert other.read_bytes() != ordinary.read_bytes()


def test_pictures_on_the_way_from_the_optimized_text_to_the_edits(tiny_base, two_pictures, tmp_path):
    given = {"prompt": "red apple", "model": str(tiny_base), "steps": 2, "rank": 2, "train_steps": 2}
    given |= {"edit": ("a dog", "a cat"), "output": str(tmp_path / "out")}
    plain = restore(RestoreConfig((two_pictures[0],), **given))
    figures = restore(RestoreConfig((two_pictures[0],), **given, optimise_text=True, text_steps=2))
    assert set(plain) < set(figures)
    for edit in given["edit"]:
        for share in ("0%", "25%", "50%", "75%", "100%"):
            assert -1 <= figures[f"likeness to the picture; {share} of {edit!r}"] <= 1
    with Image.open(tmp_path / "out" / "between.png") as picture:
        assert json.loads(picture.info["sheet"])["rows"] == ["a dog", "a cat"]
    assert (tmp_path / "out" / "lora" / "config.json").exists()  # of the run before


def test_psnr_is_that_of_numbers_from_0_to_255():
    one, two = torch.full((3, 4, 4), -1.0), torch.full((3, 4, 4), -1.0 + 2 * 10 / 255)
    assert psnr(one, two) == pytest.approx(20 * math.log10(255 / 10), abs=1e-4)


# --------------------------------------------------------------------------------------------- morph


def test_every_frame_is_drawn_with_the_mixture_of_the_two_changes_of_weight(base, parts):
    levels, _, texts = parts
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    text, timestep, times = texts[0].expand(3, -1, -1), torch.tensor(500), (0.0, 0.3, 1.0)
    with torch.no_grad():
        live = between(base, times, text, levels, 0.0)(x, timestep)
        for number, t in enumerate(times):
            with merged_at(base, {"a": 1 - t, "b": t}):
                merged = base.unet(x[number : number + 1], timestep, text[:1]).sample
            # Merged and live differ by float32 rounding of the weights, and by the size of the batch.
            torch.testing.assert_close(live[number : number + 1], merged, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{"attention": 0.0, "adain": False, "even": False}, {}])
def test_the_first_and_the_last_frame_are_the_pictures_restored(base, config, parts, options):
    levels, pictures, texts = parts
    frames = way(base, levels, replace(config, **options), pictures, texts)
    assert frames.shape == (5, 3, 16, 16)
    for strengths, frame, picture, text in zip(
        ({"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 1.0}), (frames[0], frames[-1]), pictures, texts, strict=True
    ):
        with merged_at(base, strengths):
            predict = guided(base.unet, text[None])
            noise = ddim_invert(predict, base.encode_picture(picture)[0][None], levels)
            alone = base.decode_latents(ddim_draw(predict, noise, levels))[0]
        torch.testing.assert_close(frame, alone, rtol=0, atol=1e-3)  # ten steps of the above, in another batch


def test_frames_do_not_depend_on_how_many_are_drawn_together(base, config, parts, monkeypatch):
    at_once = way(base, *parts[:1], config, *parts[1:])
    monkeypatch.setattr(morphing, "TOGETHER", 3)
    torch.testing.assert_close(way(base, *parts[:1], config, *parts[1:]), at_once, rtol=0, atol=1e-3)


def test_mixed_self_attention_is_ordinary_where_both_ends_are_the_same(base, parts):
    levels, _, texts = parts
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).expand(3, -1, -1, -1)
    text, before = texts[0].expand(3, -1, -1), base.unet.attn_processors
    times = (0.4, 0.4, 0.4)  # the same weights, too
    with torch.no_grad():
        mixed = between(base, times, text, levels, 1.0)(x, torch.tensor(500))
        ordinary = between(base, times, text, levels, 0.0)(x, torch.tensor(500))
        torch.testing.assert_close(mixed, ordinary, rtol=1e-5, atol=1e-5)
        others = torch.cat([x[:1], x[:1] + 1, x[:1] + 2])
        mixed = between(base, times, text, levels, 1.0)(others, torch.tensor(500))
        ordinary = between(base, times, text, levels, 0.0)(others, torch.tensor(500))
        assert (mixed - ordinary).abs().max() > 1e-4
    assert base.unet.attn_processors == before


def test_attention_is_mixed_in_the_share_of_the_steps_that_is_asked_for(base, parts, monkeypatch):
    levels, _, texts = parts
    seen = []
    original = mixing.Between.__call__

    def spy(self, *args, **more):
        seen.append(True)
        return original(self, *args, **more)

    monkeypatch.setattr(mixing.Between, "__call__", spy)
    x, text = torch.zeros(2, 4, 8, 8), texts[0].expand(2, -1, -1)
    with torch.no_grad():
        counts = []
        for timestep in levels.timesteps:
            seen.clear()
            between(base, (0.0, 1.0), text, levels, 0.6)(x, timestep)
            counts.append(bool(seen))
    assert counts == [True, True, True, False, False]


def test_slerp_keeps_the_length_and_goes_at_an_even_pace():
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    for t in (0.0, 0.25, 0.5, 1.0):
        wanted = torch.tensor([math.cos(t * math.pi / 2), math.sin(t * math.pi / 2)])
        torch.testing.assert_close(slerp(a, b, t), wanted)
    torch.testing.assert_close(slerp(a, 3 * a, 0.5), 2 * a)  # no angle between them


def test_adain_gives_the_mean_and_spread_in_between():
    a, b, x = (torch.randn(4, 6, 6, generator=torch.Generator().manual_seed(s)) * (s + 1) + s for s in range(3))
    torch.testing.assert_close(mixing.adain(a, a, b, 0.0), a)
    found = mixing.adain(x, a, b, 0.25)
    torch.testing.assert_close(found.mean((1, 2)), 0.75 * a.mean((1, 2)) + 0.25 * b.mean((1, 2)))
    torch.testing.assert_close(found.std((1, 2)), 0.75 * a.std((1, 2)) + 0.25 * b.std((1, 2)))


def test_frames_that_are_spaced_anew_are_more_evenly_far_apart(base, config, parts):
    levels, pictures, texts = parts
    plain = replace(config, attention=0.0, adain=False, even=False, frames=9)
    spread = []
    for even in (False, True):
        steps = torch.tensor(distances(base, way(base, levels, replace(plain, even=even), pictures, texts)))
        spread.append((steps.std() / steps.mean()).item())
    assert spread[1] < spread[0]


def test_two_frames_are_the_ends(base, config, parts):
    levels, pictures, texts = parts
    ends = [morphing.End(p, torch.randn(4, 8, 8), text) for p, text in zip(pictures, texts, strict=True)]
    assert len(draw_frames(base, levels, config, ends, [0.0, 1.0])) == 2


@pytest.mark.parametrize("name", ["morph.gif", "morph.png", "morph.webp", "frames"])
def test_morphing_writes_the_animation_that_is_asked_for(config, tmp_path, name):
    morph(replace(config, output=str(tmp_path / name)))
    if name == "frames":
        assert len(list((tmp_path / name).glob("*.png"))) == 5
    else:
        assert Image.open(tmp_path / name).n_frames == 5
    assert (config.folder / "morph.png").exists()
    assert json.loads((config.folder / "figures.json").read_text())["figures"]


def test_three_pictures_are_two_morphs_joined_at_the_picture_in_the_middle(config, tmp_path):
    """Frame by frame the same as the pairs, also because a LoRA that was learnt for one is that of the other."""
    a, b = config.pictures
    three = replace(config, pictures=(a, b, a), prompt=("red apple", "a dog", "red apple"))
    figures = morph(replace(three, output=str(tmp_path / "three")))
    loras = [str(three.folder / f"lora-{letter}" / "pytorch_lora_weights.safetensors") for letter in "abc"]
    for name, pair in (("one", slice(0, 2)), ("two", slice(1, 3))):
        given = {"pictures": three.pictures[pair], "prompt": three.prompt[pair], "lora": tuple(loras[pair])}
        morph(replace(three, **given, output=str(tmp_path / name)))
    frames = {name: sorted((tmp_path / name).glob("*.png")) for name in ("three", "one", "two")}
    pixels = {name: [Image.open(path).tobytes() for path in paths] for name, paths in frames.items()}
    assert pixels["three"] == pixels["one"] + pixels["two"][1:]
    assert {"PSNR of frame 5 to picture B, dB; LoRA", "PSNR of the last frame to picture C, dB; LoRA"} <= set(figures)
    save_frames([Image.open(path) for path in frames["three"]], tmp_path / "three.gif", (0, 4, 8))
    with Image.open(tmp_path / "three.gif") as animation:
        shown = [frame.info["duration"] for frame in ImageSequence.Iterator(animation)]
    assert sum(shown) == 3 * 600 + 6 * 80  # (equal neighbours become one longer frame)


# ------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"output": "morph.mp4"}, r"--output morph\.mp4: its name needs a picture's extension"),
        ({"output": "morph.jpg"}, r"--output morph\.jpg: JPEG holds one picture; give a \.gif"),
        ({"pictures": ("a.png", "nowhere.png")}, r"nowhere\.png: it cannot be opened as a picture"),
        ({"lora": ("nowhere.safetensors", "nowhere.safetensors")}, r"LoRA nowhere\.safetensors"),
    ],
)
def test_mistakes_are_told_in_one_line(config, settings, message):
    with pytest.raises(UserError, match=message):
        morph(replace(config, **settings))


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="morph takes 2 to 26 pictures, not 1"):
        MorphConfig(("a.png",))
    with pytest.raises(UserError, match="--prompt is needed once for each picture; pictures: 3, prompts: 2"):
        MorphConfig(("a.png", "b.png", "c.png"), ("a", "b"))
    with pytest.raises(UserError, match="--lora is needed for each picture or none; pictures: 2, LoRAs: 1"):
        MorphConfig(("a.png", "b.png"), ("a", "b"), lora=("a.safetensors",))
    with pytest.raises(UserError, match="did you mean --prompt"):
        read(MorphConfig, ["a.png", "b.png", "--prompt-a", "a", "--prompt-b", "b"], "")
    with pytest.raises(UserError, match="--attention is 2; it must be at least 0 and at most 1"):
        MorphConfig(("a.png", "b.png"), ("a", "b"), attention=2)
    with pytest.raises(UserError, match="restore takes one picture, not 2; --prompt is needed"):
        RestoreConfig(("a.png", "b.png"))


def test_each_frame_of_a_batch_has_its_own_mixture_of_the_loras(tiny_unet):
    for name in "ab":
        inject_lora(tiny_unet, rank=2, targets=("to_q", "to_out.0", "conv1", "time_emb_proj"), name=name)
    for parameter in lora_parameters(tiny_unet):
        torch.nn.init.normal_(parameter, std=0.1)
    x, text, t = torch.randn(3, 4, 8, 8), torch.randn(3, 5, 16), torch.tensor(7)
    strengths = (0.0, 0.3, 1.0)
    with torch.no_grad():
        with loras_between(tiny_unet, torch.tensor(strengths)):
            together = tiny_unet(x, t, text).sample
        for number, strength in enumerate(strengths):
            set_lora_strength(tiny_unet, 1 - strength, "a")
            set_lora_strength(tiny_unet, strength, "b")
            alone = tiny_unet(x[number : number + 1], t, text[number : number + 1]).sample
            # A batch of three and one of one differ by the order of sums.
            torch.testing.assert_close(together[number : number + 1], alone, rtol=1e-4, atol=1e-5)


# -------------------------------------------------------------------------------------------- the base


@pytest.mark.parametrize("app", ["restore", "morph", "restyle", "evaluate", "distill"])
def test_each_takes_the_settings_of_a_base(app, family_base, two_pictures, pictures, tmp_path, monkeypatch):
    """The file has no VAE, and its settings predict what is not known: no part of an application does without them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("minilora.run.samples.before_after", lambda *_: Image.new("RGB", (8, 8)))  # only to save time
    monkeypatch.setattr("minilora.apps.smooth.FRAMES", 3)
    monkeypatch.setattr("minilora.apps.smooth.WAYS", 1)
    base, settings = write_single_file(family_base("sd1"), tmp_path / "base.safetensors", "first_stage_model.")
    scheduler = settings / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace('"epsilon"', '"x"'))
    words = ["--model", str(base), "--model-config", str(settings), "--output", str(tmp_path / "out")]
    one, other = two_pictures
    small = ["--rank", "2", "--train-steps", "1"]
    if app == "restyle":
        lora = random_lora(Checkpoint(base).modules, 0, share=0.1)
        write_lora(tmp_path / "l.safetensors", lora, "diffusers", Checkpoint(base).modules)
    words += {
        "restore": [one, "--prompt", "apple", "--steps", "2", *small],
        "morph": [one, other, "--prompt", "apple", "--prompt", "dog", "--frames", "2", "--steps", "2", *small],
        "restyle": [str(pictures), "--style", str(pictures), "--lora", str(tmp_path / "l.safetensors"), "--steps", "2"],
        "evaluate": [str(pictures), str(pictures), "--caption", "apple"],
        "distill": ["--data", str(pictures), "--objective", "smooth", "--batch-size", "2", *small],
    }[app]
    kind, run = {
        "restore": (RestoreConfig, restore),
        "morph": (MorphConfig, morph),
        "restyle": (RestyleConfig, restyle),
        "evaluate": (EvaluateConfig, evaluate),
        "distill": (DistillConfig, distill),
    }[app]
    given = ["--vae", str(family_base("sd1")), "--prediction-type", "v_prediction"]
    figures = run(read(kind, [*words, *given], ""))
    assert figures
    assert all(math.isfinite(figure) for figure in figures.values())
    without = Base.of(read(kind, words, ""), CPU)  # which is what the settings are needed for
    for part, said in (("vae", "it holds no VAE"), ("scheduler", "prediction_type is 'x'")):
        with pytest.raises(UserError, match=said):
            getattr(without, part)
