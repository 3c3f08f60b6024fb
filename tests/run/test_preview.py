"""The preview shows what training sees, without loading a network."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from helpers import CPU
from PIL import Image

from minilora.data.examples import Examples
from minilora.data.folder import read_folders
from minilora.data.pictures import as_picture
from minilora.models.base import Base
from minilora.run.encode import encoded_examples
from minilora.run.preview import COLUMNS, GAP, ROWS, TILE, look_at, write_preview
from minilora.run.ranks import Ranks
from minilora.settings.train import TrainConfig
from minilora.training import train


@pytest.fixture
def photos(tmp_path):
    """A folder of pictures of noise, of several shapes, some with long or several captions."""
    folder, random = tmp_path / "photos", np.random.default_rng(0)
    folder.mkdir()
    lines = []
    for number, (width, height) in enumerate([(300, 200), (200, 300), (250, 250), (200, 200)]):
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        caption = ["a dog", "two words " * 40] if number == 1 else f"dog {number}"
        lines.append(json.dumps({"file_name": f"{number}.png", "text": caption}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    return folder


def settings(photos, tiny_base, tmp_path, **more) -> TrainConfig:
    given = {"data": (str(photos),), "model": str(tiny_base), "output": str(tmp_path / "out"), "resolution": TILE}
    return TrainConfig(**given | {"cache": str(tmp_path / "cache"), "steps": 6, "batch_size": 2} | more)


VARIED = {"variants": 3, "crop": "random", "colour_jitter": 0.3, "shuffle_tags": True}


@pytest.mark.parametrize("more", [{}, {"mirror": True}, {"crop": "random", "mirror": True}, {"trigger": "sks"}, VARIED])
def test_each_picture_is_shown_as_training_sees_it_first(photos, tiny_base, tmp_path, more):
    config = settings(photos, tiny_base, tmp_path, **more)
    [page] = look_at(config).pages
    examples = Examples(*_parts(config))
    for column, item in enumerate(examples.items):
        position = next(p for p in range(100) if examples.picture_at(p) == item)
        wanted = as_picture(examples.pixels(examples.view_at(position)))
        left = GAP + column * (TILE + GAP)
        shown = page.crop((left, GAP, left + TILE, GAP + TILE))
        assert np.array_equal(shown, wanted)  # a picture of the side of a tile is not resized


def _parts(config):
    base = Base.of(config, CPU)
    return read_folders(config), config, config.resolution, base, len(base.schedule)


def test_the_pixels_that_training_encodes_are_those_of_the_preview(photos, tiny_base, tmp_path):
    """With --crop random, the latents' mean at a position is that of the pixels that `view_at` names."""
    config = settings(photos, tiny_base, tmp_path, crop="random", resolution=16)
    items, config, resolution, base, length = _parts(config)
    examples = Examples(items, config, resolution, base, length)
    other = Examples(items, dataclasses.replace(config, crop="center"), resolution, base, length)
    for jobs in (*examples.to_encode(base), *other.to_encode(base)):
        for job in jobs.values():
            job()
    mean, std = base.encode_picture(examples.pixels(examples.view_at(3)))
    noise = (examples.batch([3], CPU).latents[0] - mean) / std
    again = other.batch([3], CPU).latents[0]
    centred = base.encode_picture(other.pixels(other.view_at(3)))
    # The same draw from the posterior; what is left is float32's rounding of (mean + std · noise − mean) / std.
    assert np.allclose(noise, (again - centred[0]) / centred[1], atol=1e-3)


def test_text_encoders_have_left_memory_when_pictures_are_encoded(photos, tiny_base, tmp_path, monkeypatch):
    items, config, resolution, base, length = _parts(settings(photos, tiny_base, tmp_path, resolution=16))
    loaded, encode = [], Base.encode_picture

    def watched(self, pixels):
        loaded.extend(part for part in self.text_parts if part in vars(self))
        return encode(self, pixels)

    monkeypatch.setattr(Base, "encode_picture", watched)
    examples = encoded_examples(items, config, resolution, base, length, Ranks(0, 1, CPU))
    assert examples.batch([0], CPU).latents.isfinite().all()  # the pictures were encoded
    assert loaded == []


def test_no_network_is_loaded(photos, tiny_base, tmp_path):
    bare = shutil.copytree(tiny_base, tmp_path / "bare")
    for weights in bare.rglob("*.safetensors"):
        weights.unlink()
    whole, without = (look_at(settings(photos, base, tmp_path)) for base in (tiny_base, bare))
    assert [np.array_equal(a, b) for a, b in zip(whole.pages, without.pages, strict=True)] == [True]


def test_the_counts(photos, tiny_base, tmp_path):
    config = settings(photos, tiny_base, tmp_path, data=(f"{photos}:3",), buckets=True)
    lines = "\n".join(look_at(config).lines)
    assert "12 of" in lines  # each picture three times
    assert "4 different ones" in lines
    assert "5 different; the end of 1" in lines
    assert f"each is seen {6 * 2 / 12:.1f} times" in lines
    examples = Examples(*_parts(config))
    assert sum(map(len, examples.buckets.values())) == 12


def test_what_is_cut_off_is_struck_out_in_red(photos, tiny_base, tmp_path):
    def red(more) -> int:
        [page] = look_at(settings(photos, tiny_base, tmp_path, **more)).pages
        texts = np.asarray(page)[GAP + TILE :]  # below the pictures
        return int(((texts[..., 0] > 150) & (texts[..., 1] < 60)).sum())

    assert red({}) > 0
    (photos / "metadata.jsonl").unlink()
    assert red({"caption": "a dog"}) == 0


def test_many_pictures_fill_several_pages(tiny_base, tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    count = COLUMNS * ROWS + 1
    for number in range(count):
        Image.new("RGB", (20, 20), (number, 0, 0)).save(folder / f"{number:02d}.png")
    config = settings(folder, tiny_base, tmp_path, caption="dog")
    assert len(look_at(config).pages) == 2
    assert write_preview(config) == tmp_path / "out" / "preview.png"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"preview.png", "preview_2.png"}
    (folder / "00.png").unlink()
    write_preview(config)  # of one page now: the old second one is gone
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"preview.png"}


def test_the_command_writes_nothing_else_and_leaves_a_finished_run_alone(photos, tiny_base, tmp_path):
    config = settings(photos, tiny_base, tmp_path, resolution=16, steps=1)
    train(config)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    page = train(dataclasses.replace(config, preview=True))
    after = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert after.keys() - before.keys() == {page}
    assert before.items() <= after.items()
