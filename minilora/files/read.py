"""LoRA files: read any dialect; write.py writes them.

In memory a LoRA is the same for all dialects: for each module, by its full name (names.py), two matrices and a scale,

    ΔW = scale · B A

The dialects differ in names, and in where the scale is:

    diffusers      unet.….to_q.lora_A.weight, .lora_B.weight; or .lora.down, .lora.up, and older spellings;
                   no scale, or one in the header's lora_adapter_metadata
    kohya          lora_unet_…_to_q.lora_down.weight, .lora_up.weight and .alpha; the scale is alpha / rank
    ComfyUI        diffusion_model.input_blocks.….to_q and kohya's or PEFT's endings; the same for OneTrainer
    LyCORIS        lycoris_…_to_q and kohya's endings
    PEFT           adapter_model.safetensors, and the scale in adapter_config.json beside it
    cloneofsimo    unet:7:down, unet:7:up, counted in the order of the modules; no scale

Only LoRA is read; its relatives (LoHa, DoRA, …) are refused by name.  Sources: the code that writes these files in
diffusers 0.42, PEFT 0.21, kohya's sd-scripts 48d368f and cloneofsimo's lora d84074b.
"""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..settings.errors import UserError
from ..settings.strict_json import parse_json
from .from_hub import FILE_NAME, PEFT_CONFIG, PEFT_FILE, lora_path
from .names import (
    COMPONENTS,
    TEXT_ENCODER,
    TEXT_ENCODER_2,
    UNET,
    Modules,
    full_name,
    full_name_of_dotted,
    known_by,
    last_layer,
    numbered,
    split,
)
from .number_types import NAMES, WEIGHTS, widen
from .tensors import PICKLE_HELP, PICKLES, TensorFile, refuse_more_than_memory

AVERAGE_NAME = "pytorch_lora_weights_ema.safetensors"  # of --ema, beside it
PEFT_PREFIX = "base_model.model."

Tensors = dict[str, np.ndarray]  # as they are stored (number_types.py)


class FormatError(UserError):
    """A file that is not what it should be; the message names the file and the keys."""


@dataclass(frozen=True)
class Delta:
    """The ΔW of one module, scale · B A.

    `A` is (rank, in), or (rank, in, height, width) for a convolution; `B` is (out, rank).  Both are float32 or float64;
    `stored` holds their types in the file.
    """

    A: np.ndarray
    B: np.ndarray
    scale: float = 1.0
    stored: tuple[str, ...] = ("F32", "F32")

    @property
    def rank(self) -> int:
        return len(self.A)

    def matrix(self, dtype: type = np.float32) -> np.ndarray:
        """Return ΔW in the shape of the weight, (out, in) or (out, in, height, width)."""
        a: np.ndarray = self.A.reshape(self.rank, -1).astype(dtype)  # (rank, in · height · width)
        product: np.ndarray = self.B.astype(dtype) @ a  # (out, in · height · width)
        return (self.scale * product).reshape(len(self.B), *self.A.shape[1:])

    def norm(self) -> float:
        """Return ‖ΔW‖, the Frobenius norm, without forming ΔW: with Aᵀ = Q R, ‖B A‖ = ‖B Rᵀ‖."""
        r: Any = np.linalg.qr(self.A.reshape(self.rank, -1).T.astype(np.float64), mode="r")  # (rank, rank)
        return abs(self.scale) * float(np.linalg.norm(self.B.astype(np.float64) @ r.T))


@dataclass(frozen=True)
class Word:
    """A word that was learnt with a LoRA (textual inversion): its embedding vectors for a text encoder."""

    text: str
    component: str
    vectors: np.ndarray  # (one or more, width)


@dataclass
class LoRA:
    """A LoRA: its ΔW by the modules' full names, and its file's metadata.

    `unmatched` are the file's keys without a module in the base; those of `words` are among them.
    """

    deltas: dict[str, Delta]
    metadata: dict[str, str] = field(default_factory=dict)
    unmatched: list[str] = field(default_factory=list)
    words: dict[str, Word] = field(default_factory=dict)


# ------------------------------------------------------------------------------------------- reading


_DOWN = [".lora_A.weight", ".lora_A.default.weight", ".lora.down.weight", ".lora_down.weight"]
_DOWN += [".lora_linear_layer.down.weight", "_lora.down.weight", ".lora_A"]
_UP = tuple(end.replace("lora_A", "lora_B").replace("down", "up") for end in _DOWN)
_ENDINGS = [*((e, "A") for e in _DOWN), *((e, "B") for e in _UP), (".alpha", "alpha")]
_ENDINGS.sort(key=lambda pair: -len(pair[0]))  # the longest first: some are the end of others
_COUNTED = re.compile(r"(unet|text_encoder):(\d+):(up|down)")
# Nested or many repetitions: such a pattern in a stranger's file could take forever to match.
_SLOW = re.compile(r"\)[*+?{]|([*+{].*){4}", re.DOTALL)
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
_BEFORE = r"(base_model\.model\.|transformer\.|(model\.)?diffusion_model\.|unet\.|lora_(unet|transformer)_|lycoris_)*"
_OTHERS = {  # prefixes of names in networks other than Stable Diffusion 1, 2 and XL
    _BEFORE + r"(single_transformer_blocks|double_blocks|single_blocks)[._]\d": "Flux",
    _BEFORE + r"joint_blocks[._]\d": "Stable Diffusion 3",
    _BEFORE + r"(transformer_blocks|blocks|layers)[._]\d": "a diffusion transformer such as Stable Diffusion 3",
    r"transformer\.|lora_transformer_": "a diffusion transformer such as Stable Diffusion 3",
    r"lora_te3_|text_encoder_3\.|text_encoders\.(t5|llama|qwen|gemma)": "a text encoder of Stable Diffusion 3 or Flux",
}


def read_lora(path: Path, modules: Modules | None = None) -> LoRA:
    """Read a LoRA file or folder of any dialect, for a base with the given modules.

    `path` is a .safetensors file, a folder with pytorch_lora_weights.safetensors, a PEFT adapter folder or its file, a
    folder with PEFT folders `unet`, `text_encoder` and so on, or a hub id (from_hub.py).  Without `modules`, only
    dialects that spell names out can be read.  Raises FormatError, naming the file and every key, for a file that is
    not a LoRA, is incomplete, or does not fit the base.  Unmatched keys are returned in `unmatched`.
    """
    path = lora_path(path)
    if path.is_dir() and not (path / FILE_NAME).exists():
        return _read_peft(path, modules)
    path = path / FILE_NAME if path.is_dir() else path
    tensors, metadata = _read_tensors(path)
    is_peft = path.name == PEFT_FILE or any(key.startswith(PEFT_PREFIX) for key in tensors)
    if is_peft and path.with_name(PEFT_CONFIG).exists():
        return _read_peft_file(path, tensors, _component_of(path.absolute().parent), modules)
    if path.name == PEFT_FILE:
        raise FormatError(f"{path}: its scale is in {PEFT_CONFIG}, which is missing beside it")
    configs = _configs_in(path, metadata)

    def scale_of(name: str, rank: int) -> float:
        component, module = split(name)
        config = configs.get(component, configs.get(""))
        if configs and config is None:
            raise FormatError(f"{path}: its lora_adapter_metadata lacks {component}, which {name} needs")
        return _peft_scale(config, module, rank) if configs else 1.0

    words = _words_in(path, tensors, metadata)
    tensors = {key: tensor for key, tensor in tensors.items() if key not in words}
    nowhere: list[str] = []
    if any(_COUNTED.fullmatch(key) for key in tensors):
        tensors, nowhere = _named_from_counted(path, tensors, metadata, modules)
    lora = _gather(path, tensors, modules, scale_of)
    lora.unmatched.extend([*words, *nowhere])
    lora.words.update(words)
    lora.metadata.update(metadata)
    return lora


def _read_tensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    pickle = path if path.suffix in PICKLES else path.with_suffix(".bin")
    if pickle == path or (pickle.exists() and not path.exists()):
        raise FormatError(f"{pickle}: {PICKLE_HELP}")
    try:
        file = TensorFile(path)
        refuse_more_than_memory(file.numbers, 8)  # bytes: as stored, and in float32
        return {key: file.read(key) for key in sorted(file.entries)}, file.metadata
    except (OSError, UserError) as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise FormatError(f"{path}: not a safetensors file that can be read ({reason})") from error


def _words_in(path: Path, tensors: Tensors, metadata: dict[str, str]) -> dict[str, Word]:
    """Return the learnt words of a file by their keys: `bundle_emb.WORD.…` of A1111, or cloneofsimo's WORD itself."""
    words, problems = {}, []
    for key, tensor in tensors.items():
        if key.startswith("bundle_emb."):
            text, _, part = key.removeprefix("bundle_emb.").partition(".")
        elif metadata.get(key) == "<embed>":
            text, part = key, ""
        else:
            continue
        if (
            NAMES[tensor.dtype] in WEIGHTS
            and tensor.ndim in (1, 2)
            and tensor.size
            and np.isfinite(widen(tensor)).all()
        ):
            component = TEXT_ENCODER_2 if part == "clip_g" else TEXT_ENCODER
            words[key] = Word(text, component, widen(tensor).reshape(-1, tensor.shape[-1]))
        else:
            problems.append(f"{key}, {NAMES[tensor.dtype]} {tensor.shape}, holds no embedding vectors")
    if problems:
        raise FormatError(f"{path}: {some(problems)}")
    return words


def _gather(path: Path, tensors: Tensors, modules: Modules | None, scale_of: Callable[[str, int], float]) -> LoRA:
    """Collect A, B and alpha of each module; `scale_of(name, rank)` gives the scale if alpha is missing."""
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
        delta = _delta(found, modules[module] if modules else None, problems, lambda rank, m=module: scale_of(m, rank))
        if delta is not None:
            deltas[module] = delta
    if not tensors:
        problems.append("it holds no tensors")
    if problems:
        raise FormatError(f"{path}: {some(problems)}")
    order = {name: place for place, name in enumerate(modules or sorted(deltas))}
    return LoRA(dict(sorted(deltas.items(), key=lambda item: order[item[0]])), unmatched=unmatched)


def other_network(keys: Iterable[str]) -> tuple[str, str] | None:
    """Return the network that keys belong to if it is not Stable Diffusion 1, 2 or XL, and one such key; else None."""
    keys = list(keys)
    for look, network in _OTHERS.items():  # in this order: the most specific ones come first
        if key := next((key for key in keys if re.match(look, key)), None):
            return network, key
    return None


def some(problems: Iterable[str], most: int = 5) -> str:
    """Return the first problems in one line, and the number of the others."""
    problems = list(problems)
    more = f"; and {len(problems) - most} more" if len(problems) > most else ""
    return "; ".join(problems[:most]) + more


def _delta(found: dict, shape: tuple[int, ...] | None, problems: list[str], scale_of: Callable) -> Delta | None:
    """Return the ΔW of A, B and alpha, or None after adding what is wrong with them to `problems`."""
    for part in "AB":
        if part not in found:
            key = next(iter(found.values()))[0]
            problems.append(f"{key} is alone: {'A, the down' if part == 'A' else 'B, the up'} matrix is missing")
            return None
    (key, a), (key_b, b) = found["A"], found["B"]
    shapes = f"{key} and its partner are {a.shape} and {b.shape}"
    if (
        a.ndim not in (2, 4)
        or b.ndim not in (2, 4)
        or any(n != 1 for n in b.shape[2:])
        or a.shape[0] != b.shape[1]
        or not len(a)
    ):
        problems.append(f"{shapes}, which do not make a LoRA")
        return None
    types: tuple[str, ...] = NAMES[a.dtype], NAMES[b.dtype]
    if not all(name in WEIGHTS for name in types):
        problems.append(f"{shapes}, of types {' and '.join(types)}")
        return None
    a, b = widen(a), widen(b.reshape(b.shape[:2]))  # b: (out, rank)
    types = tuple("F32" if name.startswith("F8") else name for name in types)
    if shape is not None:
        flat = a.ndim == 2 or a.shape[2:] == (1, 1)
        fitting = [(len(b), *a.shape[1:]), *([(len(b), a.shape[1]), (len(b), a.shape[1], 1, 1)] if flat else [])]
        if tuple(shape) not in fitting:
            problems.append(f"{shapes} but the base's weight is {tuple(shape)}")
            return None
        a = a.reshape(len(a), *shape[1:])  # a linear layer and a 1 × 1 convolution are the same
    if "alpha" in found:
        key_alpha, alpha = found["alpha"]
        if alpha.size != 1:
            problems.append(f"{key_alpha} is {alpha.shape} and should be one number")
            return None
        scale = (widen(alpha) if NAMES[alpha.dtype] in WEIGHTS else alpha).item() / len(a)
    else:
        scale = scale_of(len(a))
    if not (np.isfinite(a).all() and np.isfinite(b).all() and math.isfinite(scale)):
        problems.append(f"{key}, {key_b} or their scale {scale:g} holds numbers that are not finite")
        return None
    # Zeros at the end have no effect; they pad all ranks of a file to the same (write.py).
    used = np.flatnonzero(a.reshape(len(a), -1).any(1) | b.any(0))
    rank = used[-1] + 1 if len(used) else 1
    return Delta(a[:rank], b[:, :rank], scale, types)


def _spelt_out(name: str) -> set[str]:
    """Return the full name that a key contains, for reading without a base to look it up in."""
    component, path = split(name)
    if component in ("down_blocks", "mid_block", "up_blocks"):  # without a component, but only a U-Net has these
        component, path = UNET, name
    if original := full_name_of_dotted(name):
        return {original}
    if component not in COMPONENTS:
        return set()
    path = re.sub(r"\.to_out$", ".to_out.0", path.removeprefix("base_model.model.").replace(".processor.", "."))
    path = re.sub(r"\.self_attn\.to_(q|k|v|out)(\.0)?$", r".self_attn.\1_proj", path)
    return {full_name(component, path)}


# ------------------------------------------------------------------------ scales in other places, and PEFT


def _configs_in(path: Path, metadata: dict[str, str]) -> dict[str, dict]:
    """Return PEFT's settings by component, as diffusers writes them into a header; empty if there are none.

    Those of `save_lora_adapter` name no component; their key is "".
    """
    if "lora_adapter_metadata" not in metadata:
        return {}
    try:
        flat = parse_json(metadata["lora_adapter_metadata"])
        configs: dict[str, dict] = {}
        for key, value in flat.items():
            component, name = split(key) if "." in key else ("", key)
            configs.setdefault(component, {})[name] = value
    except (ValueError, AttributeError) as error:
        raise FormatError(f"{path}: its lora_adapter_metadata is not a JSON object ({error})") from error
    for component, config in configs.items():
        _check_peft(f"{path}, {component}", config)
    return configs


def _check_peft(where: str, config: dict) -> None:
    """Refuse PEFT settings under which ΔW is not scale · B A."""
    if not isinstance(config, dict):
        raise FormatError(f"{where}: its settings are not a JSON object")
    problems = [
        f"{name} is {config[name]!r}"
        for name in ("use_dora", "lora_bias", "modules_to_save", "fan_in_fan_out", "layer_replication", "use_qalora")
        if config.get(name)
    ]
    if config.get("peft_type", "LORA") != "LORA":
        problems.append(f"peft_type is {config['peft_type']!r}")
    if config.get("bias", "none") != "none":
        problems.append(f"bias is {config['bias']!r}")
    if str(config.get("init_lora_weights")).startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        problems.append(f"init_lora_weights is {config['init_lora_weights']!r}, which changes the base too")
    alphas = config.get("alpha_pattern") or {}
    if not isinstance(alphas, dict):
        problems.append(f"alpha_pattern is {alphas!r}")
        alphas = {}
    for name, alpha in {"lora_alpha": config.get("lora_alpha", 8), **alphas}.items():
        if not isinstance(alpha, (int, float)) or not abs(alpha) < 1e30:
            problems.append(f"the alpha of {name} is {alpha!r}")
    for pattern in alphas:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            problems.append(f"a pattern in alpha_pattern cannot be read ({error})")
        if _SLOW.search(pattern):
            problems.append(f"alpha_pattern has {pattern!r}, which could take forever to match")
    if problems:
        raise FormatError(f"{where}: {some(problems)}; only plain LoRA is read")


def _peft_scale(config: dict, path: str, rank: int) -> float:
    """Return the scale of a module under PEFT's settings: alpha / rank, or alpha / √rank for rsLoRA."""
    alpha = config.get("lora_alpha", 8)  # PEFT's default
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if any(re.match(rf"(.*\.)?({pattern})$", p) for p in (path, path.removeprefix("text_model."))):
            alpha = value
            break
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _read_peft(folder: Path, modules: Modules | None) -> LoRA:
    """Read a PEFT adapter folder, or one PEFT folder for each component."""
    if (folder / PEFT_CONFIG).exists():
        folders = [(folder, _component_of(folder))]
    else:
        inside = [(folder / component, component) for component in COMPONENTS]
        folders = [(sub, component) for sub, component in inside if (sub / PEFT_CONFIG).exists()]
    if not folders:
        raise FormatError(f"{folder}: it holds neither {FILE_NAME} nor {PEFT_CONFIG}")
    whole = LoRA({})
    for sub, component in folders:
        tensors, metadata = _read_tensors(sub / PEFT_FILE)
        part = _read_peft_file(sub / PEFT_FILE, tensors, component, modules)
        whole.deltas.update(part.deltas)
        whole.metadata.update(metadata)
        whole.unmatched.extend(part.unmatched)
    return whole


def _component_of(folder: Path) -> str | None:
    """Return the component that a PEFT folder is named after, if any."""
    return folder.name if folder.name in COMPONENTS else None


def _read_peft_file(path: Path, tensors: Tensors, component: str | None, modules: Modules | None) -> LoRA:
    """Read the tensors of a PEFT file, whose scale is in the config beside it."""
    config_file = path.with_name(PEFT_CONFIG)
    try:
        config = parse_json(config_file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FormatError(f"{config_file}: {error}") from error
    _check_peft(str(path.parent), config)
    if component is not None:
        tensors = {f"{component}.{key}": tensor for key, tensor in tensors.items()}
    return _gather(path, tensors, modules, lambda name, rank: _peft_scale(config, split(name)[1], rank))


# --------------------------------------------------------------------------------------- cloneofsimo


def _named_from_counted(
    path: Path, tensors: Tensors, metadata: dict[str, str], modules: Modules | None
) -> tuple[Tensors, list[str]]:
    """Give the tensors of a file that numbers its modules diffusers' names; return the unmatched keys, too."""
    if modules is None:
        raise FormatError(f"{path}: it numbers its modules without naming them; give the base it was trained for")
    named: Tensors = {}
    unmatched: list[str] = []
    counted: dict[str, dict[tuple[int, str], np.ndarray]] = {}
    for key, tensor in tensors.items():
        if match := _COUNTED.fullmatch(key):
            counted.setdefault(match[1], {})[int(match[2]), match[3]] = tensor
        else:
            raise FormatError(f"{path}: {key} is not a key of a LoRA")
    for component, parts in counted.items():
        if not any(name.startswith(f"{component}.") for name in modules):
            unmatched += [f"{component}:{number}:{direction}" for number, direction in parts]
            continue
        try:
            classes = parse_json(metadata[component])
            orders = numbered(modules, component, classes)
            if component == TEXT_ENCODER:  # Stable Diffusion 2's has a layer more in a single file than in a folder
                last = last_layer(modules)
                orders += numbered([name for name in modules if not name.startswith(last)], component, classes)
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"{path}: it numbers unknown modules of {component} ({error})") from error
        fitting = [order for order in orders if _fits(order, parts, modules)]
        if not fitting:
            raise FormatError(f"{path}: its {len(parts) // 2} modules of {component} are not those of this base")
        for (number, direction), tensor in parts.items():
            named[f"{fitting[0][number]}.lora.{direction}.weight"] = tensor
    return named, unmatched


def _fits(order: list[str], parts: dict[tuple[int, str], np.ndarray], modules: Modules) -> bool:
    """Whether the tensors have the shapes of the modules, numbered in this order."""
    if {number for number, _ in parts} != set(range(len(order))):
        return False
    return all(
        tensor.ndim > 1
        and tensor.shape[0 if direction == "up" else 1] == modules[order[number]][0 if direction == "up" else 1]
        for (number, direction), tensor in parts.items()
    )
