"""Variants: each picture encoded so many times, with crops, colours and captions that are drawn once for all."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_picture
from helpers import CPU

from minilora.data import draws
from minilora.data.folder import read_folders
from minilora.files.read import FILE_NAME
from minilora.models.base import Base
from minilora.run.encode import encoded_examples
from minilora.run.preview import look_at
from minilora.run.ranks import Ranks
from minilora.settings.errors import UserError
from minilora.settings.train import TrainConfig
from minilora.training import train

TAGS = "a house, red roof, garden, evening sun, two people"


@pytest.fixture
def config(tmp_path, tiny_base) -> TrainConfig:
    """Four variants of each of two wide pictures, one of which has tags."""
    folder = tmp_path / "data"
    folder.mkdir()
    for number, caption in enumerate([TAGS, "plain"]):
        make_picture(number, 60, 20).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption)
    places = {"data": (str(folder),), "cache": str(tmp_path / "cache"), "output": str(tmp_path / "out")}
    recipe = {"crop": "random", "variants": 4, "steps": 4, "batch_size": 4, "rank": 2, "learning_rate": 0.01}
    return TrainConfig(model=str(tiny_base), **places, **recipe)


def examples_of(config: TrainConfig):
    base = Base.of(config, CPU)
    return encoded_examples(read_folders(config), config, 16, base, len(base.schedule), Ranks(0, 1, CPU))


def test_each_variant_is_encoded_once_and_the_vae_leaves_memory(config, tmp_path, monkeypatch):
    encode, seen = Base.encode_picture, []
    monkeypatch.setattr(Base, "encode_picture", lambda self, pixels: seen.append(pixels) or encode(self, pixels))
    base = Base.of(config, CPU)
    examples = examples_of(replace(config, mirror=True))
    assert len(seen) == 2 * 2 * 4  # pictures, mirrored or not, variants
    assert examples.encoders is None
    encoded = {pixels.numpy().tobytes(): encode(base, pixels) for pixels in seen}
    counted = Counter()
    for position in range(200):
        view = examples.view_at(position)
        mean, std = encoded[examples.pixels(view).numpy().tobytes()]  # one of those, and
        latents = examples.batch([position], CPU).latents[0]
        assert torch.equal(latents, mean + std * draws.gaussian(0, "posterior", position, mean.shape))
        counted[view] += 1
    assert len(counted) == 16  # of fair draws, one is left out in 16 · (15 / 16)^200 of all seeds, 0.004 %
    seen.clear()
    path = train(replace(config, mirror=True))
    assert not seen  # they were in the cache
    train(replace(config, mirror=True, output=str(tmp_path / "again"), micro_batch_size=4))
    assert path.read_bytes() == (tmp_path / "again" / FILE_NAME).read_bytes()


def test_crops_and_colours_vary_within_their_limits(config):
    examples = examples_of(replace(config, variants=40, colour_jitter=0.2, crop="center"))
    views = {examples.view_at(position) for position in range(400)}
    factors = np.array([view.colours for view in views])  # (views, 3)
    assert factors.min() >= 0.8
    assert factors.max() <= 1.2
    assert factors.std(0).min() > 0.05  # of uniform numbers that wide it is 0.115
    assert {view.place for view in views} == {(0.5, 0.5)}
    brighter, darker = (max(views, key=lambda view: sign * view.colours[0]) for sign in (1, -1))
    plain = replace(brighter, colours=())
    for view, more in ((brighter, True), (darker, False)):
        pixels = examples.pixels(replace(view, item=plain.item, mirrored=False, colours=(view.colours[0], 1.0, 1.0)))
        assert (pixels.mean() > examples.pixels(plain).mean()) == more
    assert len({view.place for view in map(examples_of(config).view_at, range(100))}) == 2 * 4


def test_tags_are_shuffled_and_left_out_but_for_the_first(config):
    def captions(**more) -> set[str]:
        examples = examples_of(replace(config, caption_dropout=0.0, **more))
        seen = {examples.caption_at(p) for p in range(200) if examples.picture_at(p).path.name == "0.png"}
        assert seen <= {*examples.captions}  # which are encoded
        return seen

    assert captions() == {TAGS}
    for trigger in (None, "sks"):
        first = f"{trigger}, a house, red roof" if trigger else "a house, red roof"
        shuffled = captions(shuffle_tags=True, keep_tags=2, trigger=trigger)
        assert 1 < len(shuffled) <= 4
        assert all(text.startswith(f"{first}, ") for text in shuffled)
        assert {tuple(sorted(text.removeprefix("sks, ").split(", "))) for text in shuffled} == {
            tuple(sorted(TAGS.split(", ")))
        }
        some = captions(tag_dropout=0.5, keep_tags=2, trigger=trigger)
        assert all(text.startswith(first) for text in some)
        assert len({text.count(",") for text in some}) > 1
        left = [text.removeprefix("sks, ").split(", ") for text in some]
        assert all(tags == [tag for tag in TAGS.split(", ") if tag in tags] for tags in left)  # in their order
    assert captions(tag_dropout=1.0) == {""}


def test_the_text_encoder_too_sees_versions_of_captions_and_the_base_is_kept_at_them(config):
    examples = examples_of(replace(config, shuffle_tags=True, trigger="sks", preserve=1.0))
    kept = {examples.kept_caption(text) for text in examples.captions if text.startswith("sks")}
    assert kept < {*examples.captions}
    train(replace(config, shuffle_tags=True, train_text_encoder=True, steps=1))


def test_the_preview_shows_a_variant(config):
    lines = "\n".join(look_at(replace(config, variants=3, shuffle_tags=True)).lines)
    assert "captions   4 different" in lines  # three orders of tags, and "plain"


def test_what_has_no_effect_is_refused(config):
    for more, words in (
        ({"variants": None, "colour_jitter": 0.1}, "--colour-jitter needs --variants, how many there are"),
        ({"variants": None, "shuffle_tags": True}, "--shuffle-tags needs --variants"),
        (
            {"crop": "center"},
            "--variants has no effect without --crop random or one of --colour-jitter, --shuffle-tags",
        ),
        ({"keep_tags": 1}, "--keep-tags has no effect without --shuffle-tags or --tag-dropout"),
        ({"colour_jitter": 1.5}, r"--colour-jitter is 1\.5; it must be at least 0 and at most 1"),
    ):
        with pytest.raises(UserError, match=words):
            replace(config, **more)
