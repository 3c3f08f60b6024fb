"""LoRA files: read any dialect; write.py writes them.

The dialects differ in names, and in where the scale is:

    diffusers      unet.….to_q.lora_A.weight, .lora_B.weight; or .lora.down, .lora.up, and older spellings;
                   no scale, or one in the header's lora_adapter_metadata (peft_config.py)
    kohya          lora_unet_…_to_q.lora_down.weight, .lora_up.weight and .alpha; the scale is alpha / rank
    ComfyUI        diffusion_model.input_blocks.….to_q and kohya's or PEFT's endings; the same for OneTrainer
    LyCORIS        lycoris_…_to_q and kohya's endings
    PEFT           adapter_model.safetensors, and the scale in adapter_config.json beside it
    AnimateDiff    ….motion_modules.0.temporal_transformer.….attention_blocks.0.processor.to_q_lora.down.weight
    cloneofsimo    unet:7:down, unet:7:up, counted in the order of the modules; no scale (counted.py)

Only LoRA is read; its relatives (LoHa, DoRA, …) are refused by name.  Sources: the code that writes these files in
diffusers 0.42, PEFT 0.21 and kohya's sd-scripts 48d368f.
"""

import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from ..settings.errors import UserError, some
from .counted import COUNTED, with_names
from .deltas import Delta, FormatError, LoRA, Word
from .from_hub import FILE_NAME, PEFT_CONFIG, PEFT_FILE, lora_path
from .names import (
    COMPONENTS,
    PEFT_PREFIX,
    TEXT_ENCODER,
    TEXT_ENCODER_2,
    UNET,
    Modules,
    full_name,
    full_name_of_dotted,
    known_by,
    motion_name,
    split,
)
from .number_types import NAMES, WEIGHTS, widen
from .peft_config import config_in, configs_in_header, peft_scale
from .tensors import PICKLE_HELP, PICKLES, TensorFile, Tensors, refuse_more_than_memory

AVERAGE_NAME = "pytorch_lora_weights_ema.safetensors"  # of --ema, beside it

_DOWN = [".lora_A.weight", ".lora_A.default.weight", ".lora.down.weight", ".lora_down.weight"]
_DOWN += [".lora_linear_layer.down.weight", "_lora.down.weight", ".lora_A"]
_UP = [end.replace("lora_A", "lora_B").replace("down", "up") for end in _DOWN]
_ENDINGS = [*((e, "A") for e in _DOWN), *((e, "B") for e in _UP), (".alpha", "alpha")]
_ENDINGS.sort(key=lambda pair: -len(pair[0]))  # the longest first: some are the end of others
_RELATIVES = {  # patterns in the keys of files that are not plain LoRA
    r"\.hada_": "LoHa",
    r"\.lokr_": "LoKr",
    r"\.oft_|\.oft_R|vera_lambda|boft": "OFT or VeRA",
    r"\.dora_scale|lora_magnitude_vector": "DoRA",
    r"\.lora_mid\.": "LoRA with a Tucker core",
    r"\.diff(_b)?$|\.w_norm$|\.b_norm$|\.set_weight$": "a full difference",
    r"lora_embedding_|\.on_input$": "an embedding's LoRA or IA3",
    r"\.[ab][12]\.weight$": "GLoRA",
    r"\.bias$|\.bias_(indices|values|size)$": "LoRA with a bias",
}


def read_lora(path: Path, modules: Modules | None = None) -> LoRA:
    """Read a LoRA file or folder of any dialect, for a base with the given modules.

    `path` is a .safetensors file, a folder with pytorch_lora_weights.safetensors, a PEFT adapter folder or its file, a
    folder with PEFT folders `unet`, `text_encoder` and so on, or a hub id (from_hub.py).  Without `modules`, only
    dialects that spell names out can be read.  Raises FormatError, naming the file and every key, for a file that is
    not a LoRA, is incomplete, or does not fit the base.  Unmatched keys are returned in `unmatched`.
    """
    path = lora_path(path)
    if not path.is_dir():
        files = [path]
    elif (path / FILE_NAME).exists():
        files = [path / FILE_NAME]
    else:
        folders = [path] if (path / PEFT_CONFIG).exists() else [path / component for component in COMPONENTS]
        files = [folder / PEFT_FILE for folder in folders if (folder / PEFT_CONFIG).exists()]
    if not files:
        stopped = (path / "checkpoints").is_dir()
        hint = "; its run has not finished: train.py --resume finishes it, sooner with fewer --steps" * stopped
        raise FormatError(f"{path}: it holds neither {FILE_NAME} nor {PEFT_CONFIG}{hint}")
    lora = LoRA({})
    for file in files:
        _read_file(file, modules, lora)
    return lora


def _read_file(path: Path, modules: Modules | None, lora: LoRA) -> None:
    """Add what a file holds to a LoRA."""
    tensors, metadata = _read_tensors(path)
    words = _words_in(path, tensors, metadata)
    tensors = {key: tensor for key, tensor in tensors.items() if key not in words}
    counted: list[str] = []  # the unmatched keys among those that number modules
    is_peft = path.name == PEFT_FILE or any(key.startswith(PEFT_PREFIX) for key in tensors)
    if is_peft and path.with_name(PEFT_CONFIG).exists():
        configs = {"": config_in(path.with_name(PEFT_CONFIG))}
        component = path.absolute().parent.name  # its keys do not name the component, but its folder may
        if component in COMPONENTS:
            tensors = {f"{component}.{key}": tensor for key, tensor in tensors.items()}
    elif path.name == PEFT_FILE:
        raise FormatError(f"{path}: its scale is in {PEFT_CONFIG}, which is missing beside it")
    else:
        configs = configs_in_header(path, metadata)
        if any(COUNTED.fullmatch(key) for key in tensors):
            tensors, counted = with_names(path, tensors, metadata, modules)

    def scale_of(name: str, rank: int) -> float:
        component, module = split(name)
        config = configs.get(component, configs.get(""))
        if configs and config is None:
            raise FormatError(f"{path}: its lora_adapter_metadata lacks {component}, which {name} needs")
        return peft_scale(config, module, rank) if configs else 1.0

    deltas, unmatched = _gather(path, tensors, modules, scale_of)
    lora.deltas |= deltas
    lora.metadata |= metadata
    lora.unmatched += [*unmatched, *words, *counted]
    lora.words |= words


def _read_tensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    pickle = path if path.suffix in PICKLES else path.with_suffix(".bin")
    if pickle == path or (pickle.exists() and not path.exists()):
        raise FormatError(f"{pickle}: {PICKLE_HELP}")
    try:
        file = TensorFile(path)
        refuse_more_than_memory(file.numbers, 8)  # bytes: as stored, and in float32
        return {key: file.read(key) for key in sorted(file.entries)}, file.metadata
    except FileNotFoundError as error:
        raise FormatError(f"{path}: there is no such file or folder") from error
    except (OSError, UserError) as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise FormatError(f"{path}: not a safetensors file that can be read ({reason})") from error


def _words_in(path: Path, tensors: Tensors, metadata: dict[str, str]) -> dict[str, Word]:
    """Return the learnt words of a file by their keys: `bundle_emb.WORD.…` of A1111, or cloneofsimo's WORD itself."""
    words, problems = {}, []
    for key, tensor in tensors.items():
        bundled = key.startswith("bundle_emb.")
        if not bundled and metadata.get(key) != "<embed>":
            continue
        text, _, part = key.removeprefix("bundle_emb.").partition(".") if bundled else (key, "", "")
        kind = NAMES[tensor.dtype]
        if kind in WEIGHTS and tensor.ndim in (1, 2) and tensor.size and np.isfinite(widen(tensor)).all():
            component = TEXT_ENCODER_2 if part == "clip_g" else TEXT_ENCODER
            words[key] = Word(text, component, widen(tensor).reshape(-1, tensor.shape[-1]))
        else:
            problems.append(f"{key}, {kind} {tensor.shape}, holds no embedding vectors")
    if problems:
        raise FormatError(f"{path}: {some(problems)}")
    return words


def _gather(
    path: Path, tensors: Tensors, modules: Modules | None, scale_of: Callable[[str, int], float]
) -> tuple[dict[str, Delta], list[str]]:
    """Return the ΔW of each module, and the unmatched keys; `scale_of(name, rank)` is the scale if alpha is missing."""
    known = known_by(modules) if modules is not None else None
    parts: dict[str, dict[str, tuple[str, np.ndarray]]] = {}  # module -> "A", "B", "alpha" -> key, tensor
    unmatched, problems = [], []
    for key, tensor in tensors.items():
        if kind := next((kind for look, kind in _RELATIVES.items() if re.search(look, key)), None):
            problems.append(f"{key} belongs to {kind}, which is not LoRA and is not read")
            continue
        name, part = next(((key.removesuffix(e), part) for e, part in _ENDINGS if key.endswith(e)), (key, None))
        if part is None:
            problems.append(f"{key} is not a key of a LoRA")
            continue
        name = motion_name(name)
        meant = _spelt_out(name) if known is None else known.get(name, set())
        if len(meant) > 1:
            problems.append(f"{key} may mean any of {', '.join(sorted(meant))}; put its component before its name")
        elif not meant:
            unmatched.append(key)
        else:
            [module] = meant
            if part in parts.setdefault(module, {}):
                problems.append(f"{key} and {parts[module][part][0]} mean the same matrix of {module}")
            parts[module][part] = (key, tensor)
    deltas = {}
    for module, found in parts.items():
        try:
            deltas[module] = _delta(found, modules[module] if modules else None, partial(scale_of, module))
        except ValueError as error:
            problems.append(str(error))
    if not tensors:
        problems.append("it holds no tensors")
    if problems:
        raise FormatError(f"{path}: {some(problems)}")
    return {name: deltas[name] for name in modules or sorted(deltas) if name in deltas}, unmatched


def _delta(found: dict, shape: tuple[int, ...] | None, scale_of: Callable[[int], float]) -> Delta:
    """Return the ΔW of A, B and alpha; ValueError says what is wrong with them."""
    for part, what in (("A", "A, the down"), ("B", "B, the up")):
        if part not in found:
            raise ValueError(f"{next(iter(found.values()))[0]} is alone: {what} matrix is missing")
    (key, a), (key_b, b) = found["A"], found["B"]
    shapes = f"{key} and its partner are {a.shape} and {b.shape}"
    if a.ndim not in (2, 4) or not len(a) or b.shape[1:] not in ((len(a),), (len(a), 1, 1)):
        raise ValueError(f"{shapes}, which do not make a LoRA")
    types: tuple[str, ...] = NAMES[a.dtype], NAMES[b.dtype]
    if not all(name in WEIGHTS for name in types):
        raise ValueError(f"{shapes}, of types {' and '.join(types)}")
    a, b = widen(a), widen(b.reshape(b.shape[:2]))  # b: (out, rank)
    if shape is not None:
        # A linear layer and a 1 × 1 convolution are the same.
        given, wanted = (s[:2] if s[2:] == (1, 1) else s for s in ((len(b), *a.shape[1:]), tuple(shape)))
        if given != wanted:
            raise ValueError(f"{shapes} but the base's weight is {tuple(shape)}")
        a = a.reshape(len(a), *shape[1:])
    if "alpha" in found:
        key_alpha, alpha = found["alpha"]
        if alpha.size != 1:
            raise ValueError(f"{key_alpha} is {alpha.shape} and should be one number")
        scale = (widen(alpha) if NAMES[alpha.dtype] in WEIGHTS else alpha).item() / len(a)
    else:
        scale = scale_of(len(a))
    if not (np.isfinite(a).all() and np.isfinite(b).all() and math.isfinite(scale)):
        raise ValueError(f"{key}, {key_b} or their scale {scale:g} holds numbers that are not finite")
    # Zeros at the end have no effect; they pad all ranks of a file to the same (write.py).
    used = np.flatnonzero(a.reshape(len(a), -1).any(1) | b.any(0))
    rank = used[-1] + 1 if len(used) else 1
    return Delta(a[:rank], b[:, :rank], scale, tuple("F32" if name.startswith("F8") else name for name in types))


def _spelt_out(name: str) -> set[str]:
    """Return the full name that a key contains, for reading without a base to look it up in."""
    component, path = split(name)
    if component in ("down_blocks", "mid_block", "up_blocks"):  # without a component, but only a U-Net has these
        component, path = UNET, name
    if original := full_name_of_dotted(name):
        return {original}
    if component not in COMPONENTS:
        return set()
    path = re.sub(r"\.to_out$", ".to_out.0", path.removeprefix(PEFT_PREFIX).replace(".processor.", "."))
    path = re.sub(r"\.self_attn\.to_(q|k|v|out)(\.0)?$", r".self_attn.\1_proj", path)
    return {full_name(component, path)}
