"""The readers of strangers' files under atheris, which looks for inputs that reach new lines of them; by hand.

    pip install atheris
    python tests/files/fuzz.py safetensors -max_total_time=600
    python tests/files/fuzz.py metadata -max_total_time=600

The tests have the same properties under hypothesis (test_fuzz.py); this looks longer, and at what it has seen.
Anything but a UserError that comes out of a reader ends it, and libFuzzer writes the input to a file crash-….
"""

import struct
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["minilora"]):
    from minilora.data.folder import read_folder
    from minilora.files.read import FormatError, read_lora
    from minilora.files.tensors import TensorFile
    from minilora.settings.errors import UserError
    from minilora.settings.train import TrainConfig

from PIL import Image

HEADER = b'{"a.lora_A.weight":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]},"__metadata__":{"format":"pt"}}'
ROW = b'{"file_name": "a.png", "text": ["a dog", "a cat"]}\n'


def safetensors(content: bytes) -> None:
    """Read a file of any bytes, and one whose header they are, with so many bytes of tensors as it asks for."""
    whole = struct.pack("<Q", len(content)) + content
    for given in (content, whole, whole + bytes(8)):
        path = FOLDER / "a.safetensors"
        path.write_bytes(given)
        with suppress(UserError):
            file = TensorFile(path)
            assert sum(file.read(key).nbytes for key in file.entries) == file.size - file.first
        with suppress(UserError, FormatError):
            read_lora(path)


def metadata(content: bytes) -> None:
    """Read a folder with these bytes as its metadata, in either form."""
    for name in ("metadata.jsonl", "metadata.csv"):
        (FOLDER / name).write_bytes(content)
        try:
            with suppress(UserError):
                assert all(item.captions for item in read_folder(str(FOLDER), TrainConfig(data=(str(FOLDER),))))
        finally:
            (FOLDER / name).unlink()


if __name__ == "__main__":
    which, *options = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as seeds:
        FOLDER = Path(folder)
        Image.new("RGB", (8, 8)).save(FOLDER / "a.png")
        for number, content in enumerate((HEADER, ROW, b"file_name,text\na.png,a dog\n")):
            (Path(seeds) / str(number)).write_bytes(content)
        atheris.Setup([sys.argv[0], *options, seeds], {"safetensors": safetensors, "metadata": metadata}[which])
        atheris.Fuzz()
