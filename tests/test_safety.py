"""Files of strangers: nothing in them is run, no pickle is opened, nothing is allocated on their word."""

import ast
import struct
import tracemalloc

import pytest
import torch
from helpers import ROOT

from minilora.files.tensors import PICKLES, TensorFile
from minilora.models.base import Base
from minilora.settings.errors import UserError

SOURCES = sorted((ROOT / "minilora").rglob("*.py"))
RUNS_CODE = {"eval", "exec", "compile", "__import__"}  # called by name
UNPICKLES = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml"}  # as modules
NO_WEIGHTS = {"AutoImageProcessor", "CLIPTokenizer", "DDIMScheduler", "kind.config_class"}  # they read JSON and text


def complaints(source: str) -> list[str]:
    """Return what in a source file could run what a file says."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            found += [f"import of {name}" for name in names if name.split(".")[0] in UNPICKLES]
        if not isinstance(node, ast.Call):
            continue
        words = {keyword.arg: keyword.value for keyword in node.keywords}
        name = ast.unparse(node.func)
        if name in RUNS_CODE or name in ("torch.load", "np.load", "numpy.load", "torch.jit.load"):
            found.append(f"call of {name}")
        trusted = words.get("trust_remote_code")  # not said at all, transformers asks on the terminal
        if trusted and not (isinstance(trusted, ast.Constant) and trusted.value is False):
            found.append("trust_remote_code")
        receiver, _, method = name.rpartition(".")
        safe = isinstance(words.get("use_safetensors"), ast.Constant) and words["use_safetensors"].value is True
        if method == "from_pretrained" and receiver not in NO_WEIGHTS and not safe:
            found.append(f"{name} without use_safetensors=True")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_source_file_could_run_what_a_file_says(path):
    assert complaints(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from yaml import safe_load",
        "torch.load(path, weights_only=True)",
        "eval(text)",
        "Model.from_pretrained(path)",
        "Model.from_pretrained(path, use_safetensors=False)",
        "CLIPTokenizer.from_pretrained(path, trust_remote_code=True)",
    ],
)
def test_the_search_finds_what_it_looks_for(source):
    assert len(complaints(source)) == 1


@pytest.mark.parametrize("ending", PICKLES)
def test_a_pickle_is_never_opened(ending, tmp_path):
    path = tmp_path / f"file{ending}"
    torch.save({"x": torch.ones(1)}, path)
    for read in (TensorFile, lambda p: Base(str(p), torch.device("cpu"))):
        with pytest.raises(UserError, match="a pickle, which can run code when it is opened, is not read"):
            read(path)


@pytest.mark.parametrize("claimed", [10**9, 2**63, 2**64 - 1])
def test_a_header_that_claims_more_than_there_is_takes_no_memory(claimed, tmp_path):
    header = b'{"x":{"dtype":"F32","shape":[%d],"data_offsets":[0,%d]}}' % (claimed // 4, claimed)
    (tmp_path / "shape.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    (tmp_path / "length.safetensors").write_bytes(struct.pack("<Q", claimed) + header)
    tracemalloc.start()
    for path in tmp_path.iterdir():
        with pytest.raises(UserError, match="safetensors"):
            TensorFile(path)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 1_000_000  # of a billion bytes and more that were claimed
