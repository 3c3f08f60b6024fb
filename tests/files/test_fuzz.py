"""Whatever stands in a file or on the command line: it is read, or the one thing that comes out is a UserError."""

import io
import json
import string
import struct
from contextlib import suppress
from functools import cache

import numpy as np
import pytest
import safetensors.numpy
from conftest import make_picture, make_unet
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minilora.data.folder import read_folder
from minilora.data.pictures import NO_PICTURE, open_picture
from minilora.files import names
from minilora.files.network import live_modules
from minilora.files.read import LoRA, read_lora
from minilora.files.tensors import TensorFile, read_checked, tensor_bytes, write_checked
from minilora.settings.command_line import read
from minilora.settings.errors import UserError
from minilora.settings.sample import SampleConfig
from minilora.settings.shared import path_and_number
from minilora.settings.train import TrainConfig

# A fresh folder for each example is not needed: each writes its file anew.
many = settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
values = st.recursive(leaves, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=8), v, max_size=3))


def mutated(whole: bytes, end: int | None = None) -> st.SearchStrategy[bytes]:
    """Return a file with a few of the bytes up to `end` changed, left out or put in, or cut off."""
    end = len(whole) if end is None else end
    place = st.integers(0, end - 1)
    edits = st.lists(st.tuples(place, st.integers(0, 1), st.binary(max_size=2)), min_size=1, max_size=4)

    def apply(edits: list[tuple[int, int, bytes]], keep: int) -> bytes:
        content = bytearray(whole)
        for at, gone, new in edits:
            content[at : at + gone] = new
        return bytes(content[:keep])

    return st.builds(apply, edits, st.just(len(whole) + 8) | st.integers(0, len(whole)))


# ---------------------------------------------------------------------------------- metadata and settings


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    make_picture(0).save(folder / "a.png")
    return folder


ROW = '{"file_name": "a.png", "text": ["a dog", "a \\u00e4pfel"]}\n'
rows = st.fixed_dictionaries({}, optional={"file_name": st.just("a.png") | values, "text": st.text() | values})
jsonl = st.lists(rows | values).map(lambda lines: "\n".join(map(json.dumps, lines)).encode())


@many
@given(content=st.binary() | st.text().map(str.encode) | mutated(ROW.encode()) | jsonl)
def test_any_metadata_jsonl(folder, content):
    read_metadata(folder, "metadata.jsonl", content)


@many
@given(content=st.binary() | st.text().map(str.encode) | mutated(b'file_name,text\na.png,"a dog, a cat"\n'))
def test_any_metadata_csv(folder, content):
    read_metadata(folder, "metadata.csv", content)


def read_metadata(folder, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    try:
        with suppress(UserError):
            [item] = read_folder(str(folder), TrainConfig(data=(str(folder),)))
            assert item.captions
            assert all(caption.encode() is not None for caption in item.captions)
    finally:
        (folder / name).unlink()


SETTINGS = [*TrainConfig(data=("x",)).identity(), "data", "model", "output", "sample_prompt", "checkpoint_every"]
objects = st.dictionaries(st.sampled_from(SETTINGS) | st.text(max_size=8), values, max_size=4)


@many
@given(
    content=st.binary() | mutated(b'{"data": ["a"], "rank": 8, "alpha": 1.5}') | objects.map(json.dumps).map(str.encode)
)
def test_any_file_of_settings(tmp_path, content):
    (tmp_path / "c.json").write_bytes(content)
    with suppress(UserError):
        config = read(TrainConfig, ["--data", "x", "--config", str(tmp_path / "c.json")], "")
        json.loads(config.to_json())


numbers = (
    st.floats().map(str) | st.text(string.printable) | st.sampled_from(["", ":", "1e999", "nan", "٣", "1_0", "0x1"])
)


@many
@given(path=st.text(max_size=8), number=numbers)
def test_any_strength_weight_and_scales(path, number):
    with suppress(UserError):
        start, value = path_and_number(f"{path}:{number}")
        assert np.isfinite(value)
        assert start in (path, f"{path}:{number}")
    for word in (f"--strengths={number}", f"--strengths=0,{number}", f"--grid={number}", f"--seed={number}"):
        with suppress(UserError):
            config = read(SampleConfig, ["--prompt=x", "--lora=a", "--lora=b", word], "")
            assert np.isfinite([*config.strengths, *config.grid, config.seed]).all()


# ------------------------------------------------------------------------------------ safetensors


TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.ones((), np.int64),
    "c": np.zeros((0, 2), np.uint8),
}
WHOLE = tensor_bytes(TENSORS, {"format": "pt"})
HEADER_END = 8 + struct.unpack("<Q", WHOLE[:8])[0]
entries = st.fixed_dictionaries({}, optional={"dtype": values, "shape": values, "data_offsets": values})
headers = st.dictionaries(st.text(max_size=8), values | entries, max_size=3).map(json.dumps).map(str.encode)


@many
@given(
    content=st.binary() | mutated(WHOLE, HEADER_END) | headers.map(lambda h: struct.pack("<Q", len(h)) + h + bytes(8))
)
def test_any_safetensors_file_is_refused_or_read_as_safetensors_itself_reads_it(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    try:
        file = TensorFile(tmp_path / "x.safetensors")
    except UserError:
        return
    ours = {key: file.read(key) for key in file.entries}
    with suppress(safetensors.SafetensorError, KeyError):  # theirs may refuse more; its numpy lacks some types
        theirs = safetensors.numpy.load(content)
        assert ours.keys() == theirs.keys()
        for key, array in theirs.items():
            assert (ours[key].shape, ours[key].tobytes()) == (array.shape, array.tobytes())


@many
@given(data=st.data())
def test_a_file_with_a_checksum_is_refused_or_the_same(tmp_path, data):
    path = tmp_path / "x.safetensors"
    write_checked(path, TENSORS, {"about": "this"})
    path.write_bytes(data.draw(mutated(path.read_bytes())))
    with suppress(UserError):
        tensors, metadata = read_checked(path)
        assert metadata == {"about": "this"}
        assert {key: array.tobytes() for key, array in tensors.items()} == {k: a.tobytes() for k, a in TENSORS.items()}


# ------------------------------------------------------------------------------------- LoRA names


@cache
def modules(family: str) -> dict[str, tuple[int, ...]]:
    return live_modules(make_unet(family))


FAMILIES = st.sampled_from(["sd1", "sd2", "sdxl"])


@many
@given(family=FAMILIES, data=st.data())
def test_what_a_module_is_called_leads_back_to_it(family, data):
    every = list(modules(family))
    name = data.draw(st.sampled_from(every))
    known, path = names.known_by(every), names.split(name)[1]
    kohya = names.kohya_names(every)[name]
    original = names.original_unet_paths(names.split(each)[1] for each in every)[path]
    for called in (name, path, f"base_model.model.{path}", kohya, *names.older_paths(path)):
        assert known[called] == {name}
    assert (
        names.diffusers_unet_paths(names.original_unet_paths(names.split(e)[1] for e in every).values())[original]
        == path
    )


pieces = [
    "input_blocks",
    "down_blocks",
    "attentions",
    "resnets",
    "transformer",
    "0",
    "1",
    "10",
    "op",
    "to_q",
    "weight",
    "",
]
paths = st.lists(st.sampled_from(pieces) | st.text(max_size=4), max_size=6).map(".".join)


@many
@given(family=FAMILIES, some=st.lists(paths, max_size=5))
def test_names_of_another_world_mean_nothing_or_something_but_break_nothing(family, some):
    names.original_unet_paths(some)
    names.diffusers_unet_paths(some)
    names.known_by(some)
    names.kohya_names(some)
    for path in some:
        names.modules_of_original(f"cond_stage_model.model.{path}")
        assert path in modules(family) or names.known_by(modules(family)).get(path, set()) <= modules(family).keys()


ENDS = [
    ".lora_A.weight",
    ".lora_B.weight",
    ".lora_down.weight",
    ".lora_up.weight",
    ".alpha",
    ".lora.down.weight",
    ".diff",
    "",
]
shapes = st.sampled_from([(2, 8), (8, 2), (2, 12), (16, 2), (), (1,), (2, 8, 1, 1), (0, 8)])


@many
@given(family=FAMILIES, data=st.data())
def test_any_keys_of_a_lora_file(tmp_path, family, data):
    called = [*modules(family), *names.kohya_names(modules(family)).values(), "unet:0:up", "unet:0:down", "x"]
    keys = st.tuples(st.sampled_from(called) | paths, st.sampled_from(ENDS)).map("".join)
    tensors = data.draw(st.dictionaries(keys, shapes.map(lambda s: np.ones(s, np.float32)), max_size=6))
    about = st.dictionaries(st.sampled_from(["unet", "lora_adapter_metadata", "x"]), values.map(json.dumps), max_size=2)
    (tmp_path / "x.safetensors").write_bytes(tensor_bytes(tensors, data.draw(about)))
    for base in (modules(family), None):
        with suppress(UserError):
            assert isinstance(read_lora(tmp_path / "x.safetensors", base), LoRA)


@many
@given(config=values | st.dictionaries(st.sampled_from(["r", "lora_alpha", "alpha_pattern", "bias"]), values))
def test_any_settings_of_peft(tmp_path, config):
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {
        f"{name}.lora_A.weight": np.ones((2, 8), np.float32),
        f"{name}.lora_B.weight": np.ones((8, 2), np.float32),
    }
    (tmp_path / "adapter_model.safetensors").write_bytes(tensor_bytes(tensors, {}))
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with suppress(UserError):
        assert read_lora(tmp_path, modules("sd1")).deltas


# ---------------------------------------------------------------------------------------- pictures


def saved(kind: str) -> bytes:
    content = io.BytesIO()
    make_picture(0).save(content, kind, exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0")
    return content.getvalue()


@settings(many, max_examples=150)
@given(
    content=st.sampled_from(["PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP"]).flatmap(
        lambda kind: mutated(saved(kind), 200)
    )
)
def test_any_picture_is_rgb_or_none(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with suppress(*NO_PICTURE):
        assert open_picture(tmp_path / "a.png").mode == "RGB"
