"""data/from_hub.py: a data set on the hub becomes a folder of pictures with captions, which needs no network later."""

import io
import json
import os
import subprocess
import sys

import pytest
from conftest import make_picture
from helpers import ROOT
from stand_in import files_of

from minilora.data.folder import read_folders
from minilora.data.from_hub import write_pictures
from minilora.settings.errors import UserError
from minilora.settings.setting import is_installed
from minilora.settings.train import TrainConfig

needs_datasets = pytest.mark.skipif(not is_installed("datasets"), reason="the package datasets is not installed")


def file_of(number: int, kind: str = "PNG") -> bytes:
    content = io.BytesIO()
    make_picture(number).save(content, kind)
    return content.getvalue()


ROWS = [
    {"image": {"bytes": file_of(0), "path": "0.png"}, "text": "a dog", "other": 0},
    {"image": {"bytes": file_of(1, "JPEG"), "path": None}, "text": ["a cat", "ein Kätzchen"], "other": 1},
    {"image": {"bytes": file_of(2, "WEBP"), "path": "2"}, "text": "", "other": 2},
]


def config_for(name: str = "owner/set", **settings) -> TrainConfig:
    return TrainConfig(data=(name,), **settings)


def test_rows_become_files_as_they_are_and_a_table(tmp_path):
    assert write_pictures(ROWS, tmp_path, "--data x", config_for()) == 3
    assert {path.name for path in tmp_path.iterdir()} == {"000000.png", "000001.jpeg", "000002.webp", "metadata.jsonl"}
    items = read_folders(config_for(str(tmp_path)))
    assert [item.captions for item in items] == [("a dog",), ("a cat", "ein Kätzchen"), ("",)]
    assert [item.path.read_bytes() for item in items] == [row["image"]["bytes"] for row in ROWS]


def test_columns_have_other_names_and_captions_may_come_from_the_option(tmp_path):
    rows = [{"picture": row["image"], "words": row["text"]} for row in ROWS]
    for name, settings in (("a", {"caption_column": "words"}), ("b", {"caption": "sks"})):
        (tmp_path / name).mkdir()
        config = config_for(str(tmp_path / name), image_column="picture", **settings)
        write_pictures(rows, tmp_path / name, "--data x", config)
        assert read_folders(config)[0].captions == (("a dog",) if name == "a" else ("sks",))


@pytest.mark.parametrize(
    ("rows", "settings", "said"),
    [
        (
            ROWS,
            {"image_column": "picture"},
            "--data x: it has no column picture, but image, text, other; --image-column",
        ),
        (ROWS, {"caption_column": "words"}, "--data x: it has no column words, but image, text, other; --image-column"),
        ([*ROWS, {"image": {"bytes": b"GIF89", "path": ""}, "text": "x"}], {}, "row 3 have no picture that can be"),
        (
            [*ROWS, {"image": {"bytes": file_of(0)}, "text": None}],
            {},
            "row 3 have no picture that can be opened, or no",
        ),
        ([*ROWS, {"image": 5, "text": "x"}], {}, "row 3 have no picture"),
        ([*ROWS, {"image": {"path": __file__, "bytes": None}, "text": "x"}], {}, "row 3 have no picture"),
        ([], {}, "--data x: it is empty"),
    ],
)
def test_what_is_wrong_with_rows_is_said(rows, settings, said, tmp_path):
    with pytest.raises(UserError) as error:
        write_pictures(rows, tmp_path, "--data x", config_for(**settings))
    assert said in str(error.value)


def test_without_the_package_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setattr("minilora.data.from_hub.is_installed", lambda package: False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"--data owner/set: there is no such folder; to take it from the hub, pip"):
        read_folders(config_for(cache=str(tmp_path / "cache")))


READ = """
import json, sys
from minilora.data.folder import read_folders
from minilora.settings.errors import UserError
from minilora.settings.train import TrainConfig
for settings in json.loads(sys.argv[1]):
    try:
        items = read_folders(TrainConfig(**settings))
        print(json.dumps([[item.captions, item.digest] for item in items]))
    except UserError as error:
        print(json.dumps(str(error)))
"""


@needs_datasets
def test_a_data_set_on_the_hub_is_the_folder_of_its_pictures_and_later_without_a_network(hub, tmp_path):
    """In processes of their own, as the packages read the hub's address when they are imported."""
    from datasets import Dataset, Features, Image, Value

    rows = [row for row in ROWS if row["other"] != 1]  # in a table on the hub, each has one caption
    features = Features({"image": Image(), "text": Value("string"), "other": Value("int64")})
    made = Dataset.from_dict({name: [row[name] for row in rows] for name in rows[0]}, features)
    for name, written in (("set", made), ("old", made.select([1]))):
        (tmp_path / name / "data").mkdir(parents=True)
        written.to_parquet(tmp_path / name / "data" / "train-00000-of-00001.parquet")
        hub.repos["datasets/owner/set" + ("@old" if name == "old" else "")] = files_of(tmp_path / name)
    (tmp_path / "plain").mkdir()
    write_pictures(rows, tmp_path / "plain", "", config_for())
    hub.repos["datasets/owner/files"] = files_of(tmp_path / "plain")

    def run(*asked: dict) -> tuple[list, str]:
        """Return what is read, or the error, for each of some settings; and what is printed."""
        asked = [{"data": ["owner/set"], "cache": str(tmp_path / "kept")} | settings for settings in asked]
        environment = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "PYTHONPATH": str(ROOT)}
        environment |= {"HF_HOME": str(tmp_path / "home")}
        command = [sys.executable, "-c", READ, json.dumps(asked)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        return [json.loads(line) for line in done.stdout.splitlines()], done.stderr

    plain = {"data": [str(tmp_path / "plain")]}
    others = {"data": ["owner/files"]}, {"max_pictures": 1}, {"data_revision": "old"}
    (wanted, *found, first, old), told = run(plain, {}, *others)
    assert found == [wanted, wanted]
    assert (first, old) == (wanted[:1], wanted[1:])
    assert told.count("note: --data owner/set: fetched 2 pictures into") == 1
    hub.repos.clear()
    (again, error), _ = run({}, {"max_pictures": 2})
    assert again == wanted
    assert "no such data set on the hub that can be read" in error
