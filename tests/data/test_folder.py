"""data/folder.py: whatever lies in a folder is learnt from or named, and a picture is read once."""

import hashlib
import json
import os
import unicodedata

import pytest
import torch
from conftest import make_picture
from PIL import Image

from minilora.data import looks as looking
from minilora.data.folder import ChangedError, read_folders
from minilora.models.base import Base
from minilora.run.encode import encoded_examples
from minilora.run.ranks import Ranks
from minilora.settings.errors import UserError
from minilora.settings.train import TrainConfig

HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
CR3 = b"\0\0\0\x18ftypcrx \0\0\0\0crx isom"
AVIF = b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf"
JXL = b"\xff\x0a"


@pytest.fixture
def data(tmp_path):
    """A folder with one good picture, a.jpg, and its caption."""
    folder = tmp_path / "data"
    folder.mkdir()
    make_picture(0).save(folder / "a.jpg")
    (folder / "a.txt").write_text("an a")
    return folder


def config_for(folder, **settings) -> TrainConfig:
    return TrainConfig(data=(str(folder),), cache=str(folder.parent / "cache"), **settings)


def refused(folder, **settings) -> str:
    with pytest.raises(UserError) as error:
        read_folders(config_for(folder, **settings))
    assert "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------------------------- what is not read


def test_pictures_of_kinds_that_are_not_read_are_counted_and_named(data):
    for name, content in {"b.CR3": CR3, "sub/c.jxl": JXL, "d.dng": b"", "e.NEF": b"", "f.svg": b"<svg/>"}.items():
        (data / name).parent.mkdir(exist_ok=True)
        (data / name).write_bytes(content)
        (data / name).with_suffix(".txt").write_text("a caption")
    said = refused(data)
    assert "5 pictures (b.CR3, d.dng, e.NEF, f.svg, sub/c.jxl) cannot be read" in said
    assert "(camera raw, SVG, JPEG XL); save them as .png or .jpg, or move them out" in said
    assert "a.jpg" not in said
    assert ".txt" not in said  # their texts are not without a picture


def test_what_reads_heic_is_said_where_it_is_lacking(data, monkeypatch):
    assert (data / "a.jpg").suffix in Image.registered_extensions()  # which asks all of Pillow's parts
    monkeypatch.delitem(Image.EXTENSION, ".heic", raising=False)  # as if pillow-heif were not installed
    (data / "b.HEIC").write_bytes(HEIC)
    (data / "b.txt").write_text("a caption")
    assert "b.HEIC cannot be read (HEIC); HEIC needs pillow-heif: pip install -e '.[heic]'" in refused(data)
    (data / "c.jpg").write_bytes(HEIC)  # as some programs rename it
    (data / "c.txt").write_text("a caption")
    assert "2 pictures (b.HEIC, c.jpg) cannot be read (HEIC);" in refused(data)


@pytest.mark.parametrize(
    ("content", "kind"), [(CR3, "camera raw"), (JXL, "JPEG XL"), (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL")]
)
def test_a_kind_is_known_by_its_first_bytes_too(content, kind, data):
    (data / "a.jpg").write_bytes(content)
    assert f"a.jpg cannot be read ({kind}); save it as" in refused(data)


def test_the_kinds_of_one_container_are_told_apart(monkeypatch):
    assert ".avif" in Image.registered_extensions()
    assert looking.kind_of_bytes(AVIF) == ""  # it is read, so that one that cannot be opened is damaged
    for suffix in (".avif", ".heic"):
        monkeypatch.delitem(Image.EXTENSION, suffix, raising=False)
    assert [looking.kind_of_bytes(content) for content in (HEIC, AVIF, CR3, b"", bytes(12))] == [
        "HEIC",
        "AVIF",
        "camera raw",
        "",
        "",
    ]


def test_a_raw_file_is_not_taken_for_its_thumbnail_where_a_table_names_it(data):
    make_picture(1).save(data / "b.tif")
    (data / "b.tif").rename(data / "b.dng")  # that is how such a file begins
    rows = [{"file_name": name, "text": "x"} for name in ("a.jpg", "b.dng")]
    (data / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "b.dng cannot be read (camera raw)" in refused(data)


def test_very_many_names_are_cut_short_and_counted(data):
    for number in range(1200):
        (data / f"{number:04d}.arw").write_bytes(b"")
    said = refused(data)
    assert "1,200 pictures (0000.arw, " in said
    assert "0019.arw, and 1,180 more) cannot be read" in said
    assert len(said) < 1000


def test_copies_and_hidden_pictures_are_left_out_and_that_is_said(data, capsys):
    places = (
        ".ipynb_checkpoints/a-checkpoint.jpg",
        "sub/@eaDir/a.jpg/THUMB.jpg",
        "sub/@eaDir/b.jpg",
        "__MACOSX/._a.jpg",
    )
    for number, name in enumerate((*places, "._a.jpg", ".thumbnails/large/x.png", ".hidden.heic")):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        make_picture(number).save(data / name, "PNG")
    (data / ".git").mkdir()
    (data / ".git" / "config").write_text("no picture")
    (data / ".elsewhere").symlink_to(data / ".git")
    items = read_folders(config_for(data))
    assert [item.path.name for item in items] == ["a.jpg"]
    said = capsys.readouterr().err
    for part in [
        ".ipynb_checkpoints (holding 1)",
        "sub/@eaDir (holding 2)",
        "__MACOSX (holding 1)",
        ".thumbnails (holding 1)",
        "._a.jpg",
        ".hidden.heic",
        "6 places",
        "left out",
    ]:
        assert part in said
    assert ".git" not in said
    assert len(said.splitlines()) == 1
    (data / "a.jpg").rename(data / ".a.jpg")
    assert "there is no picture in it; 7 places (" in refused(data)


def test_a_folder_that_is_hidden_itself_can_be_learnt_from(data):
    data.rename(data.parent / ".hidden")
    assert len(read_folders(config_for(data.parent / ".hidden"))) == 1


def test_a_table_can_name_what_else_would_be_left_out(data, capsys):
    (data / "a.jpg").rename(data / ".a.jpg")
    (data / "metadata.jsonl").write_text('{"file_name": ".a.jpg", "text": "x"}\n')
    assert [item.path.name for item in read_folders(config_for(data))] == [".a.jpg"]
    assert "left out" not in capsys.readouterr().err


@pytest.mark.parametrize(("output", "results"), [(None, "out"), ("out/x", "out"), ("lora/a", "lora/a")])
def test_results_inside_the_folder_are_left_out_and_that_is_said(output, results, data, capsys, monkeypatch):
    monkeypatch.chdir(data)
    for name in ("preview.png", "samples/before_after.png", "inside.json"):
        path = data / results / name
        path.parent.mkdir(parents=True, exist_ok=True)
        make_picture(1).save(path) if path.suffix == ".png" else path.write_text("{}")
    for where in (data, "."):
        [item] = read_folders(TrainConfig(data=(str(where),), cache=str(data.parent / "cache"), output=output))
        assert item.path.name == "a.jpg"
        said = f"note: --data {where}: {results}: left out, because results are written there\n"
        assert capsys.readouterr().err == said
    (data / results / "samples" / "before_after.txt").write_text("a")
    [item] = read_folders(config_for(data / results / "samples", output=output))  # if asked for, they are learnt from
    (data / "metadata.jsonl").write_text('{"file_name": "a.jpg", "text": "a"}\n')
    with open(data / "metadata.jsonl", "a") as table:
        table.write(json.dumps({"file_name": f"{results}/preview.png", "text": "b"}))
    assert len(read_folders(config_for(data, output=output))) == 2


def test_files_that_are_not_used_are_named(data, capsys):
    for name in ("b.txt", "notes.json", "clip.mov", "a.npz", "LICENSE", "README.md", ".DS_Store", "Thumbs.db"):
        (data / name).write_bytes(b"")
    read_folders(config_for(data))
    lines = capsys.readouterr().err.splitlines()
    assert [line.removeprefix(f"note: --data {data}: ") for line in lines] == [
        "b.txt: not read, because there is no picture of that name",
        "3 files (a.npz, clip.mov, notes.json): not read: neither picture nor caption",
    ]
    read_folders(config_for(data), quiet=True)
    assert capsys.readouterr().err == ""


# -------------------------------------------------------------------------------------- captions


@pytest.mark.parametrize("table", ["metadata.jsonl", "metadata.csv"])
def test_a_text_beside_a_picture_that_a_table_leaves_out_is_not_said_to_be_missing(table, data, capsys):
    make_picture(1).save(data / "b.png")
    (data / "b.txt").write_text("there I am")
    row = '{"file_name": "a.jpg", "text": "x"}\n' if table.endswith("l") else "file_name,text\na.jpg,x\n"
    (data / table).write_text(row)
    said = refused(data)
    assert f"b.png has no caption in {table}; b.txt beside: not read, because there is a table; add it there" in said
    assert [item.captions for item in read_folders(config_for(data, caption="y"))] == [("x",), ("y",)]
    said = capsys.readouterr().err
    assert f"2 texts beside pictures (a.txt, b.txt): not read, because the captions are in {table}" in said


def test_a_picture_in_a_folder_below_is_called_by_its_path(data):
    (data / "masks").mkdir()
    make_picture(1).save(data / "masks" / "a.jpg")
    (data / "masks" / "b.png").write_bytes(b"no picture")
    said = refused(data)
    assert "2 pictures (masks/a.jpg, masks/b.png) have no caption: there is no metadata.jsonl" in said
    assert "masks/b.png cannot be opened" in said
    (data / "masks" / "a.txt").write_bytes(b"\xff")
    assert "masks/a.txt cannot be read as UTF-8" in refused(data)


@pytest.mark.parametrize("table", ["metadata.jsonl", "metadata.csv"])
def test_a_table_below_the_folder_is_named_with_what_to_give(table, tmp_path, capsys):
    data = tmp_path / "hub"
    (data / "train").mkdir(parents=True)
    make_picture(0).save(data / "train" / "a.png")
    row = '{"file_name": "a.png", "text": "x"}\n' if table.endswith("l") else "file_name,text\na.png,x\n"
    (data / "train" / table).write_text(row)
    told = f"train/{table}: not read, because it is in a sub-folder; give {data / 'train'} itself"
    assert told in refused(data)
    assert read_folders(config_for(data, caption="y"))[0].captions == ("y",)
    assert told in capsys.readouterr().err
    assert read_folders(config_for(data / "train"))[0].captions == ("x",)


def test_captions_of_other_programs_are_named_and_not_overridden_in_silence(data, capsys):
    (data / "a.txt").unlink()
    for name in ("a.caption", "metadata.json", "train.parquet"):
        (data / name).write_bytes(b"")
    told = ["a.caption: not read; name captions .txt", "2 files (metadata.json, train.parquet): not read"]
    said = refused(data)
    assert all(part in said for part in told)
    read_folders(config_for(data, caption="x"))
    said = capsys.readouterr().err
    assert all(part in said for part in told)


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_are_compared_in_one_unicode_form(forms, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    of_file, elsewhere = (unicodedata.normalize(form, "Café über é") for form in forms)
    make_picture(0).save(data / f"{of_file}.png")
    (data / f"{elsewhere}.TXT").write_text("beside")
    assert [item.captions for item in read_folders(config_for(data))] == [("beside",)]
    (data / f"{of_file}.txt").write_text("of the same name to the byte")
    assert [item.captions for item in read_folders(config_for(data))] == [("of the same name to the byte",)]
    row = json.dumps({"file_name": f"{elsewhere}.png", "text": "in the table"}) + "\n"
    (data / "metadata.jsonl").write_text(row)
    assert [item.captions for item in read_folders(config_for(data))] == [("in the table",)]
    (data / "metadata.jsonl").write_text(row + row.replace(elsewhere, of_file))
    assert "line 2: " in (said := refused(data))
    assert "occurs twice" in said


def test_the_order_of_pictures_is_that_of_one_unicode_form(tmp_path):
    orders = []
    for form in ("NFC", "NFD"):
        data = tmp_path / form
        data.mkdir()
        for number, name in enumerate(("eb", "é", "f")):
            make_picture(number).save(data / f"{unicodedata.normalize(form, name)}.png")
        orders.append([item.digest for item in read_folders(config_for(data, caption="x"))])
    assert orders[0] == orders[1]


# ------------------------------------------------------------------------------- pixels, and reading once


def test_a_larger_picture_is_read_where_max_pixels_says_so(data, tiny_base, monkeypatch):
    make_picture(0, 40, 30).save(data / "a.jpg")
    said = refused(data, max_pixels=1199)
    assert "a.jpg has 1,200 pixels, more than the 1,199 of --max-pixels; make it smaller or" in said
    assert "--max-pixels 1200" in said
    assert "a.jpg has 1,200 pixels" in refused(data, max_pixels=300)  # Pillow tells of twice as many in another way
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)  # as if it were of a hundred million
    config = config_for(data, max_pixels=1200)
    items, one = read_folders(config), Ranks(0, 1, torch.device("cpu"))
    examples = encoded_examples(items, config, 16, Base(str(tiny_base), one.device), 1000, one)
    assert examples.batch([0], one.device).latents.isfinite().all()
    assert Image.MAX_IMAGE_PIXELS == 300


def test_the_default_of_max_pixels_is_pillows():
    assert TrainConfig(data=("x",)).max_pixels == Image.MAX_IMAGE_PIXELS


@pytest.fixture
def settled(monkeypatch):
    """Let files count as settled as soon as they are written."""
    monkeypatch.setattr(looking, "SETTLED", -1.0)


def looks(monkeypatch) -> list:
    """Return a list that grows by the size of every picture that is decoded."""
    sizes, look_at = [], looking.look_at

    def look(source):
        sizes.append(look_at(source)[0])
        return look_at(source)

    monkeypatch.setattr(looking, "look_at", look)
    return sizes


def test_a_picture_is_decoded_once_until_its_file_changes(data, settled, monkeypatch):
    make_picture(1).save(data / "b.png")
    decoded, config = looks(monkeypatch), config_for(data, caption="x")
    items = read_folders(config)
    assert len(decoded) == 2
    assert read_folders(config) == items
    assert len(decoded) == 2
    # As many bytes, and a time of change that is set back: its file is looked at again all the same.
    before = (data / "b.png").stat()
    (data / "b.png").write_bytes((data / "b.png").read_bytes())
    os.utime(data / "b.png", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (data / "b.png").stat().st_size == before.st_size
    assert read_folders(config) == items
    assert len(decoded) == 3
    (data / "b.png").write_bytes(b"no longer a picture")
    assert "b.png cannot be opened" in refused(data, caption="x")
    (data / "b.png").unlink()
    assert [item.path.name for item in read_folders(config)] == ["a.jpg"]
    assert len(decoded) == 3
    assert "has 480 pixels" in refused(data, caption="x", max_pixels=10)  # known, and too large all the same


def test_what_was_written_just_now_is_not_taken_for_known(data, monkeypatch):
    decoded = looks(monkeypatch)
    read_folders(config_for(data))
    read_folders(config_for(data))
    assert len(decoded) == 2


def test_what_is_known_may_be_damaged_or_of_another_version(data, settled):
    items = read_folders(config_for(data))
    [index] = (data.parent / "cache" / "read").iterdir()
    whole = json.loads(index.read_text())
    for content in (
        b"",
        b"[]",
        b"{}",
        b"\xff",
        b'{"version": 0, "pictures": 1}',
        b'{"version": 1, "pictures": {"a.jpg": 1}}',
    ):
        index.write_bytes(content)
        assert read_folders(config_for(data)) == items
    assert json.loads(index.read_text()) == whole


def test_another_content_than_that_which_was_read_is_not_encoded(data, settled, tiny_base):
    config, one = config_for(data, mirror=True), Ranks(0, 1, torch.device("cpu"))

    def encode(items):
        return encoded_examples(items, config, 16, Base(str(tiny_base), one.device), 1000, one)

    items = read_folders(config)
    make_picture(7).save(data / "a.jpg")
    with pytest.raises(ChangedError, match=r"a\.jpg has changed since its folder was read; start again"):
        encode(items)
    (data / "a.jpg").rename(data / "b.jpg")
    with pytest.raises(ChangedError, match=r"a\.jpg can no longer be read \(No such file"):
        items[0].open()
    (data / "b.jpg").rename(data / "a.jpg")
    # Even if a file changed in a way that its times do not show, the next run is right.
    items = read_folders(config)
    [index] = (data.parent / "cache" / "read").iterdir()
    index.write_text(index.read_text().replace(items[0].digest, hashlib.sha256(b"other").hexdigest()))
    with pytest.raises(ChangedError):
        encode(read_folders(config))
    encode(read_folders(config))
    assert read_folders(config) == items
