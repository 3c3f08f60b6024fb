"""data/examples.py: what a folder may look like, what is said when it is wrong, and what training sees of it."""

import dataclasses
import json
import struct
import zlib

import numpy as np
import pytest
import torch
from conftest import make_picture
from PIL import Image

from minilora.data import draws
from minilora.data import encoded as data
from minilora.data.captions import edit_captions
from minilora.data.examples import Batch
from minilora.data.folder import read_folders
from minilora.data.pictures import as_tensor, crop, crop_square, open_picture
from minilora.models.base import Base
from minilora.models.text import cut_off
from minilora.run.encode import encoded_examples
from minilora.run.ranks import BatchPlan, Ranks
from minilora.run.validation import read_pictures
from minilora.settings.errors import UserError
from minilora.settings.train import TrainConfig

ONE = Ranks(0, 1, torch.device("cpu"))


def config_for(folder, tmp_path, **settings):
    return TrainConfig(data=(str(folder),), output=str(tmp_path / "out"), cache=str(tmp_path / "cache"), **settings)


def examples_for(folder, tmp_path, tiny_base, ranks=ONE, **settings):
    config = config_for(folder, tmp_path, **settings)
    return encoded_examples(read_folders(config), config, 16, Base(str(tiny_base), ranks.device), 1000, ranks)


# ----------------------------------------------------------------------------------------- pictures


def test_a_turned_photograph_is_turned_upright(tmp_path):
    picture = make_picture(0, 20, 10)
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn me by 90 degrees clockwise"
    picture.save(tmp_path / "a.png", exif=exif)
    upright = open_picture(tmp_path / "a.png")
    assert upright.size == (10, 20)
    assert np.array_equal(np.array(upright), np.rot90(np.array(picture), -1))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_white(mode, tmp_path):
    picture = Image.new("RGBA", (4, 4), (200, 200, 200, 0))
    picture.putpixel((0, 0), (0, 0, 0, 255))
    picture.convert(mode).save(tmp_path / "a.png")
    pixels = np.array(open_picture(tmp_path / "a.png"))
    assert tuple(pixels[0, 0]) == (0, 0, 0)
    assert (pixels.reshape(-1, 3)[1:] == 255).all()


@pytest.mark.parametrize("mode", ["L", "1", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(mode, tmp_path):
    name = "a.tif" if mode == "CMYK" else "a.png"
    middle = {"L": 128, "1": 1, "CMYK": (0, 0, 0, 127), "I;16": 128 * 256}[mode]
    Image.new(mode, (5, 5), middle).save(tmp_path / name)
    picture = open_picture(tmp_path / name)
    assert picture.mode == "RGB"
    assert picture.getpixel((2, 2)) == ((255,) * 3 if mode == "1" else (128,) * 3)


def test_a_square_is_cut_out_at_its_place():
    picture = Image.fromarray(np.arange(40, dtype=np.uint8)[None].repeat(20, 0)).convert("RGB")  # 40 wide, 20 high
    columns = {p: as_tensor(crop(picture, (20, 20), (p, 0.5)))[0, 0] for p in (0.0, 0.5, 1.0)}
    for place, first in [(0.0, 0), (0.5, 10), (1.0, 20)]:
        torch.testing.assert_close(columns[place], torch.arange(first, first + 20) / 127.5 - 1)
    assert crop_square(make_picture(0, 31, 17), 8).size == (8, 8)
    assert crop_square(make_picture(0, 5, 9), 16).size == (16, 16)  # enlarged


# ------------------------------------------------------------------------------------------- folder


def test_captions_come_from_metadata(pictures, tmp_path):
    items = read_folders(config_for(pictures, tmp_path))
    assert [item.captions for item in items][:3] == [("picture 0",), ("picture 1",), ("a dog", "a red apple")]


def test_captions_come_from_another_column(tmp_path):
    make_picture(0).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "no", "title": "yes"}\n\n')
    assert read_folders(config_for(tmp_path, tmp_path, caption_column="title"))[0].captions == ("yes",)


def test_captions_come_from_text_files_and_the_option_fills_the_gaps(tmp_path):
    for name in "ab":
        make_picture(0).save(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_text(" a red apple\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"b\.png has no caption"):
        read_folders(config_for(tmp_path, tmp_path))
    items = read_folders(config_for(tmp_path, tmp_path, caption="a thing"))
    assert [item.captions for item in items] == [("a red apple",), ("a thing",)]
    read_pictures(config_for(tmp_path, tmp_path, caption="a thing", trigger="sks"), ONE)
    (tmp_path / "b.txt").write_text("a banana")
    with pytest.raises(UserError, match=r"is 'a thing', and has no effect: all pictures have their own captions"):
        read_pictures(config_for(tmp_path, tmp_path, caption="a thing", trigger="sks"), ONE)


def as_csv(folder, text: str) -> None:
    (folder / "metadata.jsonl").unlink(missing_ok=True)
    (folder / "metadata.csv").write_text(text, encoding="utf-8-sig")  # as a spreadsheet writes it


def test_a_csv_says_what_a_jsonl_says(pictures, tmp_path):
    config = config_for(pictures, tmp_path, caption_column="title")
    lines = [f'{{"file_name": "{n}.png", "title": "a {n}, \\"so\\"\\ncalled"}}\n' for n in range(5)]
    (pictures / "metadata.jsonl").write_text("".join(lines))
    items = read_folders(config)
    as_csv(pictures, "file_name,title\n\n" + "".join(f'{n}.png,"a {n}, ""so""\ncalled"\n' for n in range(5)))
    assert read_folders(config) == items


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("file,text\n0.png,a\n", ["metadata.csv line 1: the header has no file_name, only file, text"]),
        (
            'file_name,text\n0.png,"a\nb"\n1.png,a dog, running\ngone.png,x\n2.png,x\n2.png,x\n../o.png,x\n',
            [
                "metadata.csv line 4 has 3 cells and the header 2; put a text with a comma in quotation marks",
                "line 5: there is no file gone.png",
                "line 7: 2.png occurs twice",
                "line 8: ../o.png points outside the folder",
                "3 pictures (1.png, 3.png, 4.png) have no caption in metadata.csv; add it there",
            ],
        ),
        ("file_name,title\n0.png,a\n", ["line 2: 'text' holds no text; the line has title (see --caption-column)"]),
        ('file_name,text\n0.png,a\n1.png,"open\n', ["metadata.csv line 3 is not CSV"]),
    ],
)
def test_what_is_wrong_with_a_csv_is_said_with_its_line(text, parts, pictures, tmp_path):
    as_csv(pictures, text)
    with pytest.raises(UserError) as error:
        read_folders(config_for(pictures, tmp_path))
    assert not [part for part in parts if part not in str(error.value)]


def test_two_tables_of_captions_are_one_too_many(pictures, tmp_path):
    (pictures / "metadata.csv").write_text("file_name,text\n")
    with pytest.raises(UserError, match=r"holds metadata\.jsonl and metadata\.csv; keep one"):
        read_folders(config_for(pictures, tmp_path))


def test_the_trigger_stands_before_every_caption_but_the_empty_one_of_dropout(pictures, tmp_path, tiny_base):
    rows = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()]
    rows[1]["text"] = ""
    (pictures / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    examples = examples_for(pictures, tmp_path, tiny_base, trigger="sks", caption_dropout=0.5)
    captions = [item.captions for item in examples.items]
    assert captions[:3] == [("sks, picture 0",), ("sks",), ("sks, a dog", "sks, a red apple")]
    assert {examples.caption_at(p) for p in range(100)} == {"", *(text for texts in captions for text in texts)}


def test_each_folder_comes_as_often_as_its_weight_says(pictures, tmp_path, tiny_base):
    other = tmp_path / "with:colon"
    other.mkdir()
    for n in range(3):
        make_picture(10 + n).save(other / f"b{n}.png")
    config = TrainConfig(data=(str(pictures), f"{other}:2"), caption="x", cache=str(tmp_path / "cache"))
    assert config.output == "out/pictures"
    assert TrainConfig(data=(f"{other}:2",)).output == "out/with:colon"
    items = read_folders(config)
    examples = encoded_examples(items, config, 16, Base(str(tiny_base), ONE.device), 1000, ONE)
    for epoch in range(3):
        names = [examples.picture_at(p).path.name for p in range(epoch * 11, epoch * 11 + 11)]
        assert sorted(names) == sorted([f"{n}.png" for n in range(5)] + [f"b{n}.png" for n in range(3)] * 2)
    (other / "b0.png").write_text("broken")
    with pytest.raises(UserError, match=r"b0\.png cannot be opened.*gone: there is no such folder"):
        read_folders(dataclasses.replace(config, data=(*config.data, "gone")))


def test_everything_wrong_is_said_at_once(pictures, tmp_path):
    whole = (pictures / "0.png").read_bytes()
    (pictures / "0.png").write_bytes(whole[: len(whole) // 2])
    (pictures / "1.png").write_text("not a picture")
    make_picture(9).save(pictures / "extra.png")
    lines = (pictures / "metadata.jsonl").read_text().splitlines()
    lines[3] = "{no json"
    lines[4] = '{"file_name": "4.png", "caption": "in the wrong column"}'
    lines += [
        '{"file_name": "gone.png", "text": "x"}',
        '{"file_name": "../out.png", "text": "x"}',
        '{"text": "x"}',
        lines[2],
    ]
    (pictures / "metadata.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError) as error:
        read_folders(config_for(pictures, tmp_path))
    message = str(error.value)
    for part in [
        "0.png cannot be opened",
        "1.png cannot be opened",
        "3 pictures (3.png, 4.png, extra.png) have no caption in metadata.jsonl",
        "line 4 is not JSON",
        "line 5: 'text' holds no text; the line has caption",
        "line 6: there is no file gone.png",
        "line 7: ../out.png points outside the folder",
        "line 8 has no file_name",
        "line 9: 2.png occurs twice",
    ]:
        assert part in message
    assert "\n" not in message


def test_metadata_names_a_picture_however_it_is_written(tmp_path):
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.png", "b.png", "c.png"):
        make_picture(0).save(folder / name)
    (folder / "b.png").rename(folder / "b")  # what it is, its first bytes say
    (folder / "c.png").rename(tmp_path / "c.png")
    (folder / "c.png").symlink_to(tmp_path / "c.png")
    names = ("sub/../a.png", "b", "./c.png")
    (folder / "metadata.jsonl").write_text("".join(json.dumps({"file_name": n, "text": n}) + "\n" for n in names))
    items = read_folders(config_for(folder, tmp_path))
    assert [(item.path.name, item.captions[0]) for item in items] == [
        ("a.png", "sub/../a.png"),
        ("b", "b"),
        ("c.png", "./c.png"),
    ]


def test_a_link_to_a_folder_is_not_left_out_silently(pictures, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (pictures / "more").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="more is a link to a folder, which is not followed"):
        read_folders(config_for(pictures, tmp_path))


def test_text_that_is_not_utf8_is_named(tmp_path):
    make_picture(0).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes("rosé".encode("latin-1"))
    with pytest.raises(UserError, match=r"a\.txt cannot be read as UTF-8"):
        read_folders(config_for(tmp_path, tmp_path))


def test_a_missing_and_an_empty_folder_are_named(tmp_path):
    with pytest.raises(UserError, match="there is no such folder"):
        read_folders(config_for(tmp_path / "gone", tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="there is no picture in it"):
        read_folders(config_for(tmp_path / "empty", tmp_path))


def test_a_decompression_bomb_is_refused(tmp_path):
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(bomb)
    with pytest.raises(UserError, match=r"bomb\.png has 900,000,000 pixels, more than the 89,478,485"):
        read_folders(config_for(tmp_path, tmp_path, caption="x"))


def test_a_small_picture_is_a_warning(pictures, tmp_path, tiny_base, capsys):
    make_picture(0, 40, 12).save(pictures / "3.png")
    examples_for(pictures, tmp_path, tiny_base)
    assert capsys.readouterr().err.count("3.png has 40 × 12 pixels; it is enlarged to fill 16 × 16") == 1


# --------------------------------------------------------------------------------------- positions


def test_a_batch_is_the_draws_put_together(pictures, tmp_path, tiny_base):
    examples = examples_for(pictures, tmp_path, tiny_base, seed=3)
    base = Base(str(tiny_base), ONE.device)
    batch = examples.batch(range(10, 14), ONE.device)
    for row, position in enumerate(range(10, 14)):
        item = examples.items[draws.picture_at(3, position, 5)]
        mean, std = base.encode_picture(as_tensor(crop_square(open_picture(item.path), 16)))
        assert torch.equal(batch.latents[row], mean + std * draws.gaussian(3, "posterior", position, mean.shape))
        assert torch.equal(batch.noise[row], draws.gaussian(3, "noise", position, mean.shape))
        assert batch.timesteps[row] == draws.integer(3, "timestep", position, 0, 1000)
        caption = item.captions[draws.integer(3, "caption", position, 0, len(item.captions))]
        assert torch.equal(batch.conditioning.text[row], base.encode_text(caption))


def columns(batch: Batch) -> dict:
    """Return the columns of a batch by name, each with one row per position."""
    told = batch.conditioning
    filled = {name: column for name, column in vars(batch).items() if column is not None}
    return {**filled, "conditioning": told.text} | ({} if told.pooled is None else vars(told))


def test_however_the_positions_are_shared_out_the_draws_are_the_same(pictures, tmp_path, tiny_base):
    examples = examples_for(pictures, tmp_path, tiny_base, mirror=True, caption_dropout=0.2)
    whole = examples.batch(range(12, 24), ONE.device)
    for world, micro in [(1, 1), (1, 4), (2, 3), (3, 2), (4, 1), (4, 3)]:
        seen = 0
        for rank in range(world):
            for positions in BatchPlan(12, micro, rank, world).positions(step=1):
                part = examples.batch(positions, ONE.device)
                for name in columns(part):
                    rows = columns(whole)[name][positions.start - 12 : positions.stop - 12]
                    assert torch.equal(torch.as_tensor(columns(part)[name]), torch.as_tensor(rows))
                seen += len(positions)
        assert seen == 12


def test_each_of_several_captions_is_used(pictures, tmp_path, tiny_base):
    examples = examples_for(pictures, tmp_path, tiny_base, caption_dropout=0.0)
    seen = {examples.caption_at(p) for p in range(100) if examples.picture_at(p).path.name == "2.png"}
    assert seen == {"a dog", "a red apple"}


def test_mirror_shows_the_mirror_image_half_of_the_time(pictures, tmp_path, tiny_base):
    plain = examples_for(pictures, tmp_path, tiny_base)
    mirrored = examples_for(pictures, tmp_path, tiny_base, mirror=True)
    same = [torch.equal(plain._row(p)[0], mirrored._row(p)[0]) for p in range(200)]
    assert 70 < sum(same) < 130  # 200 fair coins: four deviations are 28
    base = Base(str(tiny_base), ONE.device)
    position = same.index(False)
    flipped = as_tensor(crop_square(open_picture(plain.picture_at(position).path), 16)).flip(-1)
    mean, std = base.encode_picture(flipped)
    assert torch.equal(mirrored._row(position)[0], mean + std * draws.gaussian(0, "posterior", position, mean.shape))


def test_caption_dropout_leaves_out_its_share(pictures, tmp_path, tiny_base):
    examples = examples_for(pictures, tmp_path, tiny_base, caption_dropout=0.3)
    empty = sum(examples.caption_at(p) == "" for p in range(1000))
    assert 240 < empty < 360  # 1000 draws of 0.3: four deviations are 58


def test_random_crops_cover_the_picture_and_are_not_cached(pictures, tmp_path, tiny_base):
    examples = examples_for(pictures, tmp_path, tiny_base, crop="random")
    first, second = (
        next(p for p in range(e * 5, e * 5 + 5) if examples.picture_at(p).path.name == "0.png") for e in (0, 1)
    )
    assert not torch.allclose(examples._row(first)[0], examples._row(second)[0], atol=0.1)
    assert torch.equal(examples._row(first)[0], examples._row(first)[0])


def test_the_cache_is_filled_once_and_follows_the_content(pictures, tmp_path, tiny_base):
    def files():
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")}

    examples_for(pictures, tmp_path, tiny_base)
    first = files()
    assert len(first) == 5 + 7  # pictures; six captions and the empty one
    examples_for(pictures, tmp_path, tiny_base)
    assert files() == first
    make_picture(77).save(pictures / "0.png")
    data._load.cache_clear()
    examples = examples_for(pictures, tmp_path, tiny_base)
    assert len(files()) == len(first) + 1
    position = next(p for p in range(5) if examples.picture_at(p).path.name == "0.png")
    mean, std = Base(str(tiny_base), ONE.device).encode_picture(as_tensor(crop_square(make_picture(77), 16)))
    assert torch.equal(examples._row(position)[0], mean + std * draws.gaussian(0, "posterior", position, mean.shape))


def test_a_damaged_file_of_the_cache_is_made_again_and_said(pictures, tmp_path, tiny_base, capsys):
    one = examples_for(pictures, tmp_path, tiny_base).batch(range(8), ONE.device)
    files = sorted((tmp_path / "cache").rglob("*.safetensors"))
    whole = {path: path.read_bytes() for path in files}
    damages = [lambda b: b[:-8], lambda b: b"", lambda b: b"text", lambda b: b[:-1] + bytes([b[-1] ^ 1])]
    for path, damage in zip(files, damages, strict=False):
        path.write_bytes(damage(whole[path]))
    data._load.cache_clear()
    capsys.readouterr()
    two = examples_for(pictures, tmp_path, tiny_base).batch(range(8), ONE.device)
    said = capsys.readouterr().err
    assert said.count("; it will be written again") == len(damages)
    assert all(str(path) in said for path in files[: len(damages)])
    assert {path: path.read_bytes() for path in files} == whole
    assert torch.equal(one.latents, two.latents)


def test_machines_need_not_share_the_cache(pictures, tmp_path, tiny_base):
    one = examples_for(pictures, tmp_path, tiny_base).batch(range(8), ONE.device)
    (tmp_path / "other machine").mkdir()
    second = Ranks(1, 2, torch.device("cpu"), local_rank=0, local_world=1)
    two = examples_for(pictures, tmp_path / "other machine", tiny_base, second).batch(range(8), ONE.device)
    assert torch.equal(one.latents, two.latents)
    assert torch.equal(one.conditioning.text, two.conditioning.text)


def test_a_caption_longer_than_the_text_encoder_reads_is_said(pictures, tmp_path, tiny_base, capsys):
    rows = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()]
    rows[0]["text"] = "apple " * 100
    (pictures / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    examples_for(pictures, tmp_path, tiny_base)
    assert "a caption is too long for the text encoder, which ignores the end: “…" in capsys.readouterr().err


@pytest.mark.parametrize("words", [30, 40, 100])
def test_what_is_cut_off_a_caption_is_what_the_tokenizer_leaves_out(words, tiny_base):
    base = Base(str(tiny_base), ONE.device)
    caption = " ".join(["apple"] * words)
    end = cut_off(base.tokenizers, caption)
    seen = caption.removesuffix(end)
    assert caption == seen + end
    assert torch.equal(base.tokens(seen), base.tokens(caption))  # nothing of the end is seen
    assert cut_off(base.tokenizers, seen) == ""  # and all that is before it
    assert not end or not torch.equal(base.tokens(seen.removesuffix("apple ")), base.tokens(caption))


def test_one_picture_can_be_given_instead_of_a_folder(pictures, tmp_path):
    path = pictures / "3.png"
    config = TrainConfig(data=(str(path),), caption="a dog")
    assert config.output == "out/3"
    [item] = read_folders(config)
    assert (item.path, item.captions, item.size) == (path, ("a dog",), (24, 20))
    with pytest.raises(UserError, match=r"3\.png: one picture needs its --caption"):
        read_folders(TrainConfig(data=(str(path),)))
    with pytest.raises(UserError, match=r"metadata\.jsonl: it cannot be opened as a picture"):
        read_folders(TrainConfig(data=(str(pictures / "metadata.jsonl"),), caption="a dog"))


def test_edited_captions_keep_the_other_keys_and_the_bytes_of_all_other_lines(pictures, tmp_path):
    table = pictures / "metadata.jsonl"
    lines = [
        '{"width": 3,  "text": "zero", "file_name": "0.png", "é": [1]}',
        '{"file_name":"1.png","text":"ein\\u0065s"}',
        '{"file_name": "2.png", "text": ["a dog", "a red apple"]}',
    ]
    table.write_text("\n".join(lines))
    same = {"0.png": ["zero"], "1.png": ["eines"], "2.png": ["a dog", "a red apple"], "3.png": [""], "4.png": [""]}
    assert edit_captions(pictures, same) == f"no caption changed in {table}"
    assert table.read_text() == "\n".join(lines)
    edit_captions(pictures, same | {"0.png": ["größer"], "2.png": ["a dog", "an apple"], "3.png": ["three"]})
    now = table.read_text().splitlines()
    assert now[0] == '{"width": 3, "text": "größer", "file_name": "0.png", "é": [1]}'
    assert now[1] == lines[1]
    assert [json.loads(line) for line in now[2:]] == [
        {"file_name": "2.png", "text": ["a dog", "an apple"]},
        {"file_name": "3.png", "text": "three"},
    ]
    read = {item.path.name: item.captions for item in read_folders(config_for(pictures, tmp_path, caption="-"))}
    assert read["0.png"] == ("größer",)
    assert read["4.png"] == ("-",)


def test_captions_in_a_table_that_cannot_be_written_are_refused(pictures):
    table = pictures / "metadata.jsonl"
    for text, said in (("{", "line 1 is not JSON"), ("[1]", "each line should be a JSON object")):
        table.write_text(text)
        with pytest.raises(UserError, match=said):
            edit_captions(pictures, {"0.png": ["a"]})
        assert table.read_text() == text
    table.rename(pictures / "metadata.csv")
    with pytest.raises(UserError, match=r"the captions are in metadata\.csv"):
        edit_captions(pictures, {"0.png": ["a"]})
