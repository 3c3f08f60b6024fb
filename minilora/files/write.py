"""Write a LoRA in the dialect of diffusers, kohya or PEFT, and read it back before the file gets its name.

No time, path or random value enters a file: the same LoRA gives the same bytes.
"""

import hashlib
import json
import math
import re
from pathlib import Path

import numpy as np

from .deltas import Delta, FormatError, LoRA
from .from_hub import PEFT_CONFIG, PEFT_FILE
from .names import PEFT_PREFIX, TEXT_ENCODER, Modules, is_sdxl, kohya_names, split
from .number_types import DTYPES, EPSILON, NAMES, narrow, widen
from .read import read_lora
from .tensors import Tensors, staging, tensor_bytes, write_tensors, write_whole

DIALECTS = ("diffusers", "kohya", "peft")


def write_lora(path: Path, lora: LoRA, dialect: str, modules: Modules | None) -> int:
    """Write a LoRA in a dialect, completely or not at all: a file, or for PEFT a folder with one for each component.

    It is read back before it gets its name; FormatError is raised unless every ΔW is the same up to the rounding of A
    and B.  Returns the number of bytes that pad ranks with zeros.
    """
    folder = as_peft(lora) if dialect == "peft" else {}
    with staging(path, 0, overwrite=True, content=[*map(Path, folder)]) as new:
        if dialect == "peft":
            for name, content in folder.items():
                write_whole(new / name, content)
        else:
            write_tensors(new, *(as_kohya(lora, modules) if dialect == "kohya" else as_diffusers(lora)))
        if (apart := difference(lora, read_lora(new, modules))) > 1:
            raise FormatError(f"{path}: read back, it differs by {apart:.2g} times the rounding error")
    if dialect == "peft":
        return 0
    padding = 0
    for delta, rank in _with_file_ranks(lora).values():
        a, b = (DTYPES[name].itemsize for name in delta.stored)
        padding += (rank - delta.rank) * (a * delta.A[0].size + b * len(delta.B))
    return padding


def difference(one: LoRA, two: LoRA) -> float:
    """Return the largest ‖ΔW₁ − ΔW₂‖ of any module, in units of the largest error from rounding B.

    The rounding is that to the coarser of the two types.  Infinite if the modules differ.
    """
    if one.deltas.keys() != two.deltas.keys():
        return math.inf
    largest = 0.0
    for name, a in one.deltas.items():
        b = two.deltas[name]
        up = [delta.B.astype(np.float64) * sign * delta.scale for delta, sign in ((a, 1), (b, -1))]
        apart = Delta(np.concatenate([a.A, b.A]), np.concatenate(up, axis=1))
        unit = max(EPSILON[delta.stored[1]] for delta in (a, b))
        size = abs(a.scale) * float(np.linalg.norm(a.B) * np.linalg.norm(a.A))
        largest = max(largest, apart.norm() / (unit * size) if size else apart.norm())
    return largest


def as_diffusers(lora: LoRA) -> tuple[Tensors, dict[str, str]]:
    """Return the tensors and the metadata of the diffusers dialect's file.

    The scale is folded into B, because programs disagree on where else to store it.  The metadata of a file from
    kohya's trainer are kept, for converting it back.
    """
    tensors = {}
    for name, (delta, rank) in _with_file_ranks(lora).items():
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = _stored(name, delta, rank)
    return tensors, _kept_words(lora) | {"format": "pt"}


def _kept_words(lora: LoRA) -> dict[str, str]:
    """Return the metadata of a file in kohya's dialect, without hashes, ranks and alphas, which change."""
    words = {key: value for key, value in lora.metadata.items() if key.startswith(("ss_", "modelspec."))}
    return {key: value for key, value in words.items() if key not in ("ss_network_dim", "ss_network_alpha")}


def _with_file_ranks(lora: LoRA) -> dict[str, tuple[Delta, int]]:
    """Return each ΔW and its rank in a file, which is the largest rank in the component.

    Programs disagree on the scale if ranks differ: diffusers before 0.40 takes the most frequent rank as the alpha of
    all modules, and up to 0.42 it finds only some of kohya's alphas.  Rows and columns of zeros change no ΔW.
    """
    most: dict[str, int] = {}
    for name, delta in lora.deltas.items():
        component = split(name)[0]
        most[component] = max(most.get(component, 0), delta.rank)
    return {name: (delta, most[split(name)[0]]) for name, delta in lora.deltas.items()}


def as_kohya(lora: LoRA, modules: Modules) -> tuple[Tensors, dict[str, str]]:
    """Return the tensors and the metadata of the file of kohya's dialect, which A1111 and ComfyUI read.

    The scale is folded into B, so alpha equals the rank, a scale of 1.
    """
    names, tensors = kohya_names(modules), {}
    ranks = set()
    for name, (delta, rank) in _with_file_ranks(lora).items():
        a, b = _stored(name, delta, rank)
        tensors[f"{names[name]}.lora_down.weight"] = a
        tensors[f"{names[name]}.lora_up.weight"] = b
        tensors[f"{names[name]}.alpha"] = narrow(np.array(float(rank)), NAMES[b.dtype])
        ranks.add(rank)
    dim = str(*ranks) if len(ranks) == 1 else "Dynamic"
    about = {"ss_v2": "False"}
    if family := _family(modules):
        known, architecture, resolution = family
        about |= {"ss_base_model_version": known, "ss_v2": str(known.startswith("sd_v2"))}
        about |= {"modelspec.architecture": f"{architecture}/lora", "modelspec.resolution": resolution}
    about |= {"ss_network_args": "{}", "modelspec.implementation": "diffusers", "modelspec.title": "LoRA"}
    # Metadata from kohya's trainer override these; the lines below hold for any LoRA that is written here.
    about |= _kept_words(lora)
    about |= {"ss_network_module": "networks.lora", "ss_network_dim": dim, "ss_network_alpha": dim}
    about |= {"modelspec.sai_model_spec": "1.0.1"}
    # User interfaces identify a file by two hashes: of the tensors' bytes, and of 64 kB at a fixed place.
    content = tensor_bytes(tensors, {key: value for key, value in about.items() if key.startswith("ss_")})
    first = 8 + int.from_bytes(content[:8], "little")
    about |= {"sshs_model_hash": hashlib.sha256(content[first:]).hexdigest()}
    about |= {"sshs_legacy_hash": hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]}
    return tensors, about


def _family(modules: Modules) -> tuple[str, str, str] | None:
    """Return kohya's names for a base's version, architecture and resolution; None if unknown.

    The Stable Diffusion 2 of 512 and that of 768 pixels have the same modules; 512 is assumed unless the LoRA's own
    metadata says otherwise.
    """
    if is_sdxl(modules):
        return "sdxl_base_v1-0", "stable-diffusion-xl-v1-base", "1024x1024"
    widths = {shape[1] for name, shape in modules.items() if name.endswith("attn2.to_k")}
    if widths == {768}:
        return "sd_v1", "stable-diffusion-v1", "512x512"
    if widths == {1024}:
        return "sd_v2", "stable-diffusion-v2-512", "512x512"
    return None


def as_peft(lora: LoRA) -> dict[str, bytes]:
    """Return PEFT's files, which are a folder for each component, by name.

    PEFT uses the modules' names in the live model.  From transformers 5.6 on, those of CLIPTextModel lack
    "text_model.", so the folder fits the installed version of transformers.
    """
    from importlib.metadata import version  # here: it takes as long to import as half of numpy

    flat_text_encoder = tuple(map(int, version("transformers").split(".")[:2])) >= (5, 6)
    parts: dict[str, tuple[Tensors, dict[str, int]]] = {}  # component -> tensors, and ranks by path
    for name, delta in lora.deltas.items():
        component, path = split(name)
        if component == TEXT_ENCODER and flat_text_encoder:
            path = path.removeprefix("text_model.")
        tensors, ranks = parts.setdefault(component, ({}, {}))
        ours = f"{PEFT_PREFIX}{path}"
        tensors[f"{ours}.lora_A.weight"], tensors[f"{ours}.lora_B.weight"] = _stored(name, delta, delta.rank)
        ranks[path] = delta.rank
    files: dict[str, bytes] = {}
    for component, (tensors, ranks) in parts.items():
        most = max(ranks.values())
        pattern = {f"^{re.escape(path)}": rank for path, rank in ranks.items() if rank != most}
        config = {"peft_type": "LORA", "r": most, "lora_alpha": most, "target_modules": sorted(ranks), "bias": "none"}
        config |= {"rank_pattern": pattern, "alpha_pattern": pattern, "inference_mode": True, "use_rslora": False}
        files[f"{component}/{PEFT_FILE}"] = tensor_bytes(tensors, _kept_words(lora) | {"format": "pt"})
        files[f"{component}/{PEFT_CONFIG}"] = json.dumps(config, indent=2, sort_keys=True).encode()
    return files


def _stored(name: str, delta: Delta, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Return A and scale · B in their own types, padded with zeros to a rank; in the weight's number of dimensions."""
    more = rank - delta.rank
    a = np.pad(delta.A, [(0, more), *[(0, 0)] * (delta.A.ndim - 1)])
    b = np.pad(delta.B * np.float64(delta.scale), [(0, 0), (0, more)])  # (out, rank)
    a, b = _rounded(a, delta.stored[0]), _rounded(b, delta.stored[1])
    if not np.isfinite(widen(b)).all():
        raise FormatError(f"{name}: its scale {delta.scale:g} does not fit into {NAMES[b.dtype]}")
    return a, b.reshape(*b.shape, *(1 for _ in delta.A.shape[2:]))


def _rounded(exact: np.ndarray, name: str) -> np.ndarray:
    """Return numbers rounded to the type of that name, or to float32 if the type is too small for them.

    It is too small if any number loses more than a number of the root-mean-square size may lose.  Smaller numbers may
    lose all their digits, because that hardly changes the product B A.
    """
    rounded = narrow(exact, name)
    usual = math.sqrt(float(np.square(exact, dtype=np.float64).mean())) if exact.size else 0.0
    with np.errstate(invalid="ignore"):  # infinite, which is too large
        fits = np.abs(widen(rounded) - exact) <= EPSILON[name] * np.maximum(np.abs(exact), usual)
    return rounded if fits.all() else narrow(exact, "F32")
