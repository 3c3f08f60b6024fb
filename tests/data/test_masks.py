"""Masks: what is black is not learnt, small masks weigh as much as large ones, and no file is taken for another."""

import dataclasses
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_picture
from helpers import CPU
from PIL import Image

from minilora.data.encoded import View
from minilora.data.folder import read_folders
from minilora.data.held_out import held_out_loss
from minilora.diffusion import Conditioning, Schedule, denoising_loss
from minilora.files.read import FILE_NAME
from minilora.models.base import Base
from minilora.run.encode import encoded_examples
from minilora.run.preview import GAP, TILE, look_at
from minilora.run.ranks import Ranks
from minilora.settings.errors import UserError
from minilora.settings.recipes import recipe_settings
from minilora.settings.train import TrainConfig
from minilora.training import train


@pytest.fixture
def data(tmp_path):
    """Four photographs of noise, of several shapes, with captions; the first two have a mask."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name, size in {"a.png": (48, 32), "b.jpg": (32, 48), "c.png": (40, 40), "d.png": (64, 32)}.items():
        make_picture(ord(name[0]), *size).save(folder / name)
        (folder / f"{name[0]}.txt").write_text("a dog")
    left_half(48, 32).save(folder / "a.mask.png")
    left_half(16, 24).save(folder / "b.mask.png")  # half as large as its picture
    return folder


def left_half(width: int, height: int, colour: int = 255) -> Image.Image:
    mask = Image.new("L", (width, height), 0)
    mask.paste(colour, (0, 0, width // 2, height))
    return mask


def settings(folder, tmp_path, tiny_base, **more) -> TrainConfig:
    places = {"data": (str(folder),), "cache": str(tmp_path / "cache"), "output": str(tmp_path / "out")}
    recipe = {"model": str(tiny_base), "steps": 3, "batch_size": 4, "rank": 2, "learning_rate": 0.01}
    return TrainConfig(**places | recipe | more)


def examples_of(config: TrainConfig, resolution: int = 16):
    base = Base.of(config, CPU)
    return encoded_examples(read_folders(config), config, resolution, base, len(base.schedule), Ranks(0, 1, CPU))


def by_name(examples) -> dict:
    return {item.path.name: item for item in examples.items}


# ---------------------------------------------------------------------------------- what is learnt


@pytest.fixture
def seen():
    """Latents, noise and timesteps of two pictures, a schedule, and a mask whose left half counts."""
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
    where = torch.zeros(2, 1, 8, 8)
    where[..., :4] = 2.0
    return latents, noise, torch.tensor([100, 700]), Schedule(torch.linspace(0.99, 0.01, 1000), "v_prediction"), where


@pytest.mark.parametrize("huber_c", [None, 0.1])
def test_a_black_region_has_no_gradient(seen, tiny_unet, huber_c):
    latents, noise, timesteps, schedule, where = seen
    text = Conditioning(torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1)))
    weight = torch.randn(4, 4, 1, 1, generator=torch.Generator().manual_seed(2))

    def at_each_place(x, *_, **__):  # a network that sees no other place than that it predicts
        return SimpleNamespace(sample=F.conv2d(x, weight).tanh())

    latents = latents.clone().requires_grad_()
    denoising_loss(
        at_each_place, latents, text, noise, timesteps, schedule, None, huber_c, where=where
    ).sum().backward()
    assert not latents.grad[..., 4:].any()
    assert latents.grad[..., :4].all()

    predicted = []

    def watched(*args, **more):
        predicted.append(tiny_unet(*args, **more).sample)
        predicted[0].retain_grad()
        return SimpleNamespace(sample=predicted[0])

    tiny_unet.requires_grad_(True)
    denoising_loss(watched, latents, text, noise, timesteps, schedule, None, huber_c, where=where).sum().backward()
    assert not predicted[0].grad[..., 4:].any()
    assert predicted[0].grad[..., :4].all()


def test_the_loss_is_the_mean_over_what_counts(data, tmp_path, tiny_base, seen):
    """So it is the same for a small region as for a large one, where the errors are the same."""
    latents, noise, _, schedule, _ = seen
    errors = torch.full((1, 4, 8, 8), 5.0)
    for width, corner in ((48, 24), (48, 12)):  # the left half, and a quarter of it
        left_half(width, 32).crop((24 - corner, 0, 72 - corner, 32)).save(data / "a.mask.png")
        examples = examples_of(settings(data, tmp_path, tiny_base, trigger=f"t{corner}"))
        where = examples.fixed_batch(0, {0: 0}, CPU).where
        assert 0 < (where > 0).float().mean() < 0.6
        errors[:] = torch.where(where > 0, 2.0, 5.0)

        wanted = schedule.alphas_cumprod[0].sqrt() * noise[:1] - (1 - schedule.alphas_cumprod[0]).sqrt() * latents[:1]
        text, first = Conditioning(torch.zeros(1, 1, 1)), torch.tensor([0])
        predicted = SimpleNamespace(sample=wanted + errors)
        loss = denoising_loss(
            lambda *_, p=predicted, **__: p, latents[:1], text, noise[:1], first, schedule, where=where
        )
        assert loss.item() == pytest.approx(4.0, rel=1e-5)  # float32 sums


def test_a_white_mask_changes_no_byte_and_another_one_does(data, tmp_path, tiny_base):
    def lora(name: str, **more) -> bytes:
        folder = tmp_path / name
        train(settings(data, tmp_path, tiny_base, output=str(folder), mirror=True, **more))
        return (folder / FILE_NAME).read_bytes()

    half, counted = lora("half"), lora("counted", outside=1.0)
    assert half != lora("outside", outside=0.5)
    Image.new("L", (48, 32), 255).save(data / "a.mask.png")
    Image.new("1", (32, 48), 1).save(data / "b.mask.png")
    white = lora("white")
    for mask in data.glob("*.mask.png"):
        mask.unlink()
    assert lora("none") == white == counted != half


@pytest.mark.parametrize("more", [{}, {"mirror": True}, {"crop": "random", "mirror": True}], ids=str)
def test_a_mask_is_cropped_and_mirrored_as_its_picture(data, tmp_path, tiny_base, more):
    blocks = np.random.default_rng(0).integers(0, 2, (6, 9), dtype=np.uint8).repeat(32, 0).repeat(32, 1) * 255
    for path in data.iterdir():
        path.unlink()
    Image.fromarray(blocks).save(data / "a.png")  # a picture that is its own mask, 288 × 192
    Image.fromarray(blocks[::2, ::2]).save(data / "a.mask.png")
    examples = examples_of(settings(data, tmp_path, tiny_base, caption="x", **more), 64)
    ways = set()
    for position in range(12):
        view = examples.view_at(position)
        ways.add((view.mirrored, view.place))
        pixels = (examples.pixels(view).mean(0) + 1) / 2  # (64, 64)
        wanted = F.avg_pool2d(pixels[None], 2)  # (1, 32, 32)
        mask = examples.mask(view)
        # The picture is resized by another filter, which blurs a few places at edges and lets them overshoot.
        assert (mask - wanted).abs().mean() < 0.03
        assert (mask - wanted.flip(-1)).abs().mean() > 0.1
        where = examples.batch([position], CPU).where[0]
        assert torch.allclose(where, mask / mask.mean())
    assert len(ways) == (1 if not more else 2 if len(more) == 1 else 12)


def test_masks_lie_in_the_cache_beside_latents_that_stay_valid(data, tmp_path, tiny_base, monkeypatch):
    masks = {path: path.read_bytes() for path in data.glob("*.mask.png")}
    for path in masks:
        path.unlink()
    config = settings(data, tmp_path, tiny_base)
    cache, plain = tmp_path / "cache", examples_of(config)
    before = {path: path.read_bytes() for path in cache.rglob("*.safetensors")}
    for path, content in masks.items():
        path.write_bytes(content)
    monkeypatch.setattr(Base, "encode_picture", None)  # nothing is encoded again
    masked = examples_of(config)
    after = {path: path.read_bytes() for path in cache.rglob("*.safetensors")}
    assert before.items() <= after.items()
    assert len(after) == len(before) + 2
    monkeypatch.setattr(Image.Image, "resize", None)  # and no mask is opened again
    assert torch.equal(examples_of(config).batch(range(4), CPU).where, masked.batch(range(4), CPU).where)
    assert plain.content() != masked.content()
    assert plain.contents() == [entry[:2] for entry in masked.contents()]  # as of the checkpoints of before


def test_a_random_crop_that_sees_nothing_that_counts_learns_nothing(data, tmp_path, tiny_base):
    mask = Image.new("L", (64, 32))
    mask.paste(255, (0, 0, 16, 32))  # beside the square in the middle
    mask.save(data / "d.mask.png")
    with pytest.raises(UserError, match=r"the mask of .*d\.png is all black within the crop of 16 × 16 pixels"):
        examples_of(settings(data, tmp_path, tiny_base))
    examples = examples_of(settings(data, tmp_path, tiny_base, crop="random"))
    positions = [p for p in range(40) if examples.picture_at(p).path.name == "d.png"]
    means = [examples.batch([position], CPU).where.mean().item() for position in positions]
    assert {round(mean, 4) for mean in means} == {0.0, 1.0}


def test_held_out_pictures_are_measured_where_their_masks_are_white(data, tmp_path, tiny_base):
    config = settings(data, tmp_path, tiny_base)
    examples, base = examples_of(config), Base.of(config, CPU)
    masked = held_out_loss(base.unet, examples, base.schedule, range(4))
    for path in data.glob("*.mask.png"):
        path.unlink()
    whole = held_out_loss(base.unet, examples_of(config), base.schedule, range(4))
    assert [a == b for a, b in zip(masked, whole, strict=True)] == [False, False, True, True]


# ---------------------------------------------------------------------------------- files and words


def test_masks_are_neither_pictures_nor_unused_and_are_counted(data, tmp_path, tiny_base, capsys):
    (data / "below").mkdir()
    make_picture(9).save(data / "below" / "e.f.png")
    Image.new("RGB", (24, 20), "white").save(data / "below" / "e.f.MASK.png")
    config = settings(data, tmp_path, tiny_base, caption="x", steps=1)
    assert [item.path.name for item in read_folders(config)] == ["a.png", "b.jpg", "e.f.png", "c.png", "d.png"]
    assert capsys.readouterr().err == ""
    steps = {"model": "some/base", "data": (str(data), str(data / "below"))}
    assert recipe_settings("style", steps)["steps"] == 1500  # at least
    (tmp_path / "many").mkdir()
    for number in range(30):
        for name in (f"{number}.png", f"{number}.mask.png"):
            Image.new("L", (8, 8), 255).save(tmp_path / "many" / name)
    assert recipe_settings("style", steps | {"data": (str(tmp_path / "many"),)})["steps"] == 30 * 60
    train(config)
    assert re.search(r"^masks {6}3 of 5 pictures$", capsys.readouterr().out, re.MULTILINE)


def test_one_picture_has_the_mask_beside_it(data, tmp_path, tiny_base):
    [item] = read_folders(settings(data / "b.jpg", tmp_path, tiny_base, caption="x"))
    assert item.mask == data / "b.mask.png"
    left_half(24, 24).save(data / "b.mask.png")
    with pytest.raises(UserError, match=r"b\.mask\.png has 24 × 24 pixels, another shape than b\.jpg with 32 × 48"):
        read_folders(settings(data / "b.jpg", tmp_path, tiny_base, caption="x"))


def test_a_table_may_name_as_a_picture_what_is_called_like_a_mask(data, tmp_path, tiny_base):
    rows = "".join(f"{name},x\n" for name in ("a.png", "a.mask.png", "b.jpg", "c.png", "d.png"))
    (data / "metadata.csv").write_text("file_name,text\n" + rows)
    items = read_folders(settings(data, tmp_path, tiny_base))
    assert [(item.path.name, bool(item.mask)) for item in items if item.path.name[0] in "ab"] == [
        ("a.mask.png", False),
        ("a.png", False),
        ("b.jpg", True),
    ]


def test_everything_wrong_with_masks_is_said_at_once(data, tmp_path, tiny_base):
    left_half(48, 32, colour=0).save(data / "a.mask.png")
    left_half(32, 32).save(data / "b.mask.png")
    (data / "c.mask.png").write_text("no picture")
    left_half(8, 8).save(data / "z.mask.png")
    config = settings(data, tmp_path, tiny_base)
    for _ in range(2):  # nothing of it is forgotten by the second reading
        with pytest.raises(UserError) as error:
            read_folders(config)
        for words in (
            "a.mask.png is all black",
            "b.mask.png has 32 × 32 pixels, another shape than b.jpg with 32 × 48",
            "c.mask.png cannot be opened as a picture",
            "z.mask.png: there is no picture of that name",
        ):
            assert words in str(error.value)


def test_a_mask_that_has_changed_is_not_used(data, tmp_path, tiny_base):
    config = settings(data, tmp_path, tiny_base)
    items = read_folders(config)
    left_half(48, 32, colour=128).save(data / "a.mask.png")
    with pytest.raises(UserError, match=r"a\.mask\.png has changed since its folder was read; start again"):
        items[0].open_mask()


def test_what_can_be_seen_through_is_left_out_of_either_kind_of_mask(data, tmp_path, tiny_base):
    painted = make_picture(0, 40, 40)
    painted.putalpha(left_half(40, 40))
    painted.save(data / "c.png")
    shape = Image.new("LA", (64, 32), (255, 0))  # white, and to be seen through but for the left
    shape.paste((255, 255), (0, 0, 32, 32))
    shape.save(data / "d.mask.png")
    config = settings(data, tmp_path, tiny_base, alpha_mask=True)
    examples = examples_of(config)
    items = by_name(examples)
    assert {name for name, item in items.items() if item.mask} == {"a.png", "b.jpg", "c.png", "d.png"}
    for name in ("c.png", "d.png"):
        assert torch.equal(
            examples.mask(View(items[name])) > 0.5, torch.tensor([True] * 4 + [False] * 4).expand(1, 8, 8)
        )
    assert not by_name(examples_of(dataclasses.replace(config, alpha_mask=False)))["c.png"].mask
    painted.putalpha(0)
    painted.save(data / "c.png")
    with pytest.raises(UserError, match=r"c\.png has an alpha channel that is all black, so nothing"):
        read_folders(config)
    painted.putalpha(255)  # a picture through which nothing is seen has no mask
    painted.save(data / "c.png")
    with pytest.raises(UserError, match="--alpha-mask has no effect: no picture has transparent parts"):
        train(config)
    for path in data.glob("*.mask.png"):
        path.unlink()
    with pytest.raises(UserError, match="--outside has no effect: no picture has a mask"):
        train(dataclasses.replace(config, alpha_mask=False, outside=0.5))


def test_the_preview_fades_what_does_not_count(data, tmp_path, tiny_base):
    config = settings(data, tmp_path, tiny_base, resolution=TILE, steps=1)
    seen = look_at(config)
    assert "masks      2 of 4 pictures" in seen.lines
    [page] = seen.pages
    examples = examples_of(config, TILE)
    for column, item in enumerate(examples.items):
        left = GAP + column * (TILE + GAP)
        shown = np.array(page.crop((left, GAP, left + TILE, GAP + TILE)), dtype=float) / 127.5 - 1
        pixels = examples.pixels(View(item)).permute(1, 2, 0).numpy()
        half = TILE // 2
        assert np.allclose(shown[:, :half], pixels[:, :half], atol=0.01)
        assert np.allclose(shown[:, half:], pixels[:, half:] * (0.15 if item.mask else 1), atol=0.01)
