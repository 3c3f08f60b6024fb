"""Fingerprints of a base: hashes of its parts in memory, and of its files."""

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

from ..files.tensors import TensorFile

_ABOUT_THE_FILE = ("transformers_version", "dtype", "torch_dtype", "architectures")
_BEGINNING = 4096  # bytes of each tensor


def fingerprint(module: nn.Module, *more: str) -> str:
    """Return a hash of a module's config, of its state (names, types, shapes, numbers), and of `more`."""
    config: Any = module.config
    config = config if isinstance(config, dict) else config.to_dict()
    # Its folder, version and number type are left out, because they do not change the results.
    computing = {key: value for key, value in config.items() if not key.startswith("_") and key not in _ABOUT_THE_FILE}
    digest = hashlib.sha256("\0".join((json.dumps(computing, sort_keys=True, default=str), *more)).encode())

    def hashed(named: tuple[str, torch.Tensor]) -> bytes:
        name, tensor = named
        digest = hashlib.sha256(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        numbers: Any = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        digest.update(numbers)
        return digest.digest()

    with ThreadPoolExecutor() as pool:  # a base has gigabytes, and one thread hashes about one GB/s
        for one in pool.map(hashed, sorted(module.state_dict().items())):
            digest.update(one)
    return digest.hexdigest()


def hash_of_files(files: Iterable[TensorFile], *more: str) -> str:
    """Return a hash of the names, types, shapes and first bytes of all tensors of some files, and of more text.

    This is fast for files of any size, and enough: training and merging change a tensor from its first bytes on.
    """
    digest = hashlib.sha256("\0".join(more).encode())
    for file in files:
        with open(file.path, "rb", buffering=0) as source:
            for key, entry in sorted(file.entries.items()):
                source.seek(entry.begin)
                beginning = source.read(min(_BEGINNING, entry.end - entry.begin))
                digest.update(json.dumps([key, entry.dtype, list(entry.shape)]).encode() + beginning)
    return digest.hexdigest()
