"""data/buckets.py: one size per batch, little cut off, and no picture favoured."""

from collections import Counter

import pytest
from conftest import make_picture
from helpers import CPU
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.data.buckets import bucket_sizes, nearest, picture_at, share_kept
from minilora.data.folder import read_folders
from minilora.data.pictures import as_tensor, crop, open_picture
from minilora.models.base import Base
from minilora.run.encode import encoded_examples
from minilora.run.ranks import Ranks
from minilora.settings.train import TrainConfig


@pytest.mark.parametrize(("resolution", "multiple"), [(64, 8), (512, 64), (768, 64), (1024, 64), (24, 8)])
def test_sizes_are_about_the_square_and_none_could_be_longer(resolution, multiple):
    sizes = bucket_sizes(resolution, multiple)
    assert (resolution, resolution) in sizes
    assert sorted(sizes) == sorted((h, w) for w, h in sizes)
    for w, h in sizes:
        assert w * h <= resolution**2
        assert w % multiple == h % multiple == 0
        assert resolution <= 2 * min(w, h)
        assert max(w, h) <= 2 * resolution
        longer = [(w + multiple, h), (w, h + multiple)]
        assert all(a * b > resolution**2 or max(a, b) > 2 * resolution for a, b in longer)
    assert bucket_sizes(40, 64) == []


@given(st.integers(10, 3000), st.integers(10, 3000))
def test_no_picture_loses_more_than_it_must(width, height):
    def kept(size):
        """Count what is cut off: the picture is enlarged or made smaller until it just fills the size."""
        scale = max(size[0] / width, size[1] / height)
        return size[0] * size[1] / (width * scale * height * scale)

    sizes = bucket_sizes(64, 8)
    chosen = nearest((width, height), sizes)
    assert kept(chosen) == pytest.approx(max(map(kept, sizes)))
    assert share_kept((width, height), chosen) == pytest.approx(kept(chosen))


COUNTS = st.lists(st.integers(1, 12), min_size=1, max_size=5).map(tuple)


@settings(max_examples=50, deadline=None)
@given(COUNTS, st.integers(1, 9), st.integers(0, 5))
def test_a_batch_has_one_size_and_after_each_epoch_all_were_seen_as_often(counts, batch_size, seed):
    seen: Counter = Counter()
    step = 0
    for epoch in range(1, 8):
        while step < sum(epoch * count // batch_size for count in counts):
            batch = [picture_at(seed, step * batch_size + place, counts, batch_size) for place in range(batch_size)]
            assert len({bucket for bucket, _ in batch}) == 1
            seen.update(batch)
            step += 1
        for bucket, count in enumerate(counts):
            times = [seen[bucket, number] for number in range(count)]
            assert 0 <= epoch * count - sum(times) < batch_size  # what waits fills no batch
            assert max(times) <= epoch
            assert max(times) - min(times) <= 1
    if all(count % batch_size == 0 for count in counts):
        assert set(seen.values()) == {7}


def test_the_same_position_is_the_same_picture_whoever_asks_and_a_seed_changes_the_order():
    counts = (7, 3, 1)
    forward = [picture_at(0, p, counts, 4) for p in range(400)]
    assert [picture_at(0, p, counts, 4) for p in reversed(range(400))] == forward[::-1]
    assert [picture_at(1, p, counts, 4) for p in range(400)] != forward


def test_training_sees_each_picture_in_its_own_size(tmp_path, tiny_base):
    for number, size in enumerate([(20, 20), (40, 12), (12, 50), (44, 11), (22, 20)]):
        make_picture(number, *size).save(tmp_path / f"{number}.png")
    settings = {"data": (str(tmp_path),), "caption": "x", "cache": str(tmp_path / "cache")}
    base, ranks = Base(str(tiny_base), CPU), Ranks(0, 1, CPU)
    for how in ("center", "random"):
        config = TrainConfig(**settings, buckets=True, batch_size=2, crop=how)
        examples = encoded_examples(read_folders(config), config, 16, base, 1000, ranks, bucket_sizes(16, 8))
        assert {size: len(items) for size, items in examples.buckets.items()} == {(16, 16): 2, (32, 8): 2, (8, 32): 1}
        shapes = set()
        for step in range(6):
            batch = examples.batch(range(2 * step, 2 * step + 2), CPU)
            width, height = examples.size_of(examples.picture_at(2 * step))
            assert batch.latents.shape[2:] == batch.noise.shape[2:] == (height // 2, width // 2)
            shapes.add(batch.latents.shape)
        assert len(shapes) == 3
    # The cache tells sizes apart: the same file as a square, and in its bucket.
    plain = TrainConfig(**settings)
    squares = encoded_examples(read_folders(plain), plain, 16, base, 1000, ranks)
    wide = squares.items[1]
    mean, _ = base.encode_picture(as_tensor(crop(open_picture(wide.path), (16, 16))))
    position = next(p for p in range(5) if squares.picture_at(p) == wide)
    assert squares.batch([position], CPU).latents.shape[1:] == mean.shape
