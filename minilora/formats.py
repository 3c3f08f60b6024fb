"""LoRA files: read any dialect, write any.

In memory a LoRA is one thing, whatever it was read from: for each module, by its full name
(names.py), the two matrices of its change and their scale,

    ΔW = scale · B A

All else is a matter of naming, and of where the scale stands:

    diffusers      unet.….to_q.lora_A.weight, .lora_B.weight; or .lora.down, .lora.up, and older spellings;
                   no scale, or one in the header's lora_adapter_metadata
    kohya          lora_unet_…_to_q.lora_down.weight, .lora_up.weight and .alpha, the scale being alpha / rank
    PEFT           a folder with adapter_model.safetensors and the scale in adapter_config.json
    cloneofsimo    unet:7:down, unet:7:up, counted in the order of the modules; no scale

Only what is LoRA is read as LoRA; its relatives are refused by their names.  Sources: the writers of
these files in diffusers 0.42, PEFT 0.21, kohya's sd-scripts 48d368f and cloneofsimo's lora d84074b.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from .names import TEXT_ENCODER, TEXT_ENCODER_2, UNET, Modules, is_sdxl, known_by, kohya_names, numbered, split

FILE_NAME = "pytorch_lora_weights.safetensors"  # of diffusers
PEFT_CONFIG, PEFT_FILE = "adapter_config.json", "adapter_model.safetensors"

Tensors = dict[str, torch.Tensor]


class FormatError(ValueError):
    """A file that is not what it should be; the message names the file and the keys."""


@dataclass(frozen=True)
class Change:
    """The change of one module, ΔW = scale · B A.

    `A` is (rank, in), or (rank, in, height, width) for a convolution; `B` is (out, rank).
    """

    A: torch.Tensor
    B: torch.Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return len(self.A)

    def delta(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return ΔW in the shape of the weight, (out, in) or (out, in, height, width)."""
        product = self.B.to(dtype) @ self.A.flatten(1).to(dtype)  # (out, in · height · width)
        return (self.scale * product).unflatten(1, self.A.shape[1:])

    def norm(self) -> float:
        """Return the root of the sum of ΔW's squares, without forming it: with Aᵀ = Q R, ‖B A‖ = ‖B Rᵀ‖."""
        r = torch.linalg.qr(self.A.double().flatten(1).T, mode="r").R  # (rank, rank)
        return abs(self.scale) * (self.B.double() @ r.T).norm().item()


@dataclass
class LoRA:
    """A LoRA: its changes by the modules' full names, and what its file said about it.

    `homeless` names the file's keys that belong to no module of the base.
    """

    changes: dict[str, Change]
    metadata: dict[str, str] = field(default_factory=dict)
    homeless: list[str] = field(default_factory=list)


# ------------------------------------------------------------------------------------------- reading


_DOWN = (".lora_A.weight", ".lora_A.default.weight", ".lora.down.weight", ".lora_down.weight")
_DOWN += (".lora_linear_layer.down.weight", "_lora.down.weight", ".lora_A")
_UP = tuple(end.replace("lora_A", "lora_B").replace("down", "up") for end in _DOWN)
_ENDINGS = [*((e, "A") for e in _DOWN), *((e, "B") for e in _UP), (".alpha", "alpha")]
_ENDINGS.sort(key=lambda pair: -len(pair[0]))  # the longest first: they end alike
_COUNTED = re.compile(r"(unet|text_encoder):(\d+):(up|down)")
_RELATIVES = {  # what a key looks like of a kind that is not LoRA
    r"\.hada_": "LoHa",
    r"\.lokr_": "LoKr",
    r"\.oft_|\.oft_R|vera_lambda|boft": "OFT or VeRA",
    r"\.dora_scale|lora_magnitude_vector": "DoRA",
    r"\.lora_mid\.": "LoRA with a Tucker core",
    r"\.diff(_b)?$|\.w_norm$|\.b_norm$|\.set_weight$": "a full difference",
    r"lora_embedding_|^bundle_emb\.|\.on_input$": "an embedding or IA3",
    r"\.[ab][12]\.weight$": "GLoRA",
    r"\.lora_B\.bias$|\.lora_up\.bias$": "LoRA with a bias",
}


def read_lora(path: Path, modules: Modules | None = None) -> LoRA:
    """Read a LoRA file or folder of any dialect, for a base with the given modules.

    `path` is a .safetensors file; a folder with pytorch_lora_weights.safetensors; or a PEFT adapter
    folder, or one with PEFT folders `unet`, `text_encoder` and so on in it.  Without `modules` only
    dialects that spell names out can be read.  Raises FormatError, naming the file and every key,
    for what is no LoRA, is incomplete, or does not fit the base; keys that have no home in the base
    are left to the caller, in `homeless`.
    """
    if path.is_dir() and not (path / FILE_NAME).exists():
        return _read_peft(path, modules)
    path = path / FILE_NAME if path.is_dir() else path
    tensors, metadata = _read_tensors(path)
    configs = _configs_in(path, metadata)

    def scale_of(name: str, rank: int) -> float:
        component, module = split(name)
        if configs and component not in configs:
            raise FormatError(f"{path}: its lora_adapter_metadata says nothing of {component}, as of {name}")
        return _peft_scale(configs[component], module, rank) if configs else 1.0

    if any(_COUNTED.fullmatch(key) for key in tensors):
        tensors = _named_from_counted(path, tensors, metadata, modules)
    lora = _gather(path, tensors, modules, scale_of)
    lora.metadata.update(metadata)
    return lora


def _read_tensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    if path.suffix in (".pt", ".pth", ".ckpt", ".bin"):
        raise FormatError(
            f"{path}: a pickle, which can run code when it is opened, is not read; where you trust it, convert it "
            "with safetensors.torch.save_file(torch.load(file, weights_only=True), 'lora.safetensors')"
        )
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
    except (OSError, SafetensorError, ValueError) as error:
        raise FormatError(f"{path}: not a safetensors file that can be read ({error})") from error


def _gather(path: Path, tensors: Tensors, modules: Modules | None, scale_of: Callable[[str, int], float]) -> LoRA:
    """Put A, B and alpha of each module together; `scale_of(name, rank)` is for those without alpha."""
    known = known_by(modules) if modules is not None else None
    parts: dict[str, dict[str, tuple[str, torch.Tensor]]] = {}  # module -> "A", "B", "alpha" -> key, tensor
    homeless, problems = [], []
    for key, tensor in tensors.items():
        if kind := next((kind for look, kind in _RELATIVES.items() if re.search(look, key)), None):
            problems.append(f"{key} belongs to {kind}, which is not LoRA and is not read")
            continue
        name, part = next(((key.removesuffix(e), part) for e, part in _ENDINGS if key.endswith(e)), (key, None))
        if part is None:
            problems.append(f"{key} is no key of a LoRA")
            continue
        meant = _spelt_out(name) if known is None else known.get(name, set())
        if len(meant) > 1:
            problems.append(f"{key} may mean any of {', '.join(sorted(meant))}; put it under its component's name")
        elif not meant:
            homeless.append(key)
        else:
            [module] = meant
            if part in parts.setdefault(module, {}):
                problems.append(f"{key} and {parts[module][part][0]} are the same part of {module}")
            parts[module][part] = (key, tensor)
    changes = {}
    for module, found in parts.items():
        change = _change(
            found, modules[module] if modules else None, problems, lambda rank, m=module: scale_of(m, rank)
        )
        if change is not None:
            changes[module] = change
    if not tensors:
        problems.append("it holds no tensors")
    if problems:
        raise FormatError(f"{path}: {some(problems)}")
    order = {name: place for place, name in enumerate(modules or sorted(changes))}
    return LoRA(dict(sorted(changes.items(), key=lambda item: order[item[0]])), homeless=homeless)


def some(problems: Iterable[str], most: int = 5) -> str:
    """Return the first problems in one line, and how many more there are."""
    problems = list(problems)
    more = f"; and {len(problems) - most} more" if len(problems) > most else ""
    return "; ".join(problems[:most]) + more


def _change(found: dict, shape: tuple[int, ...] | None, problems: list[str], scale_of: Callable) -> Change | None:
    """Return the change that three tensors make, or add to `problems` why they make none."""
    for part in "AB":
        if part not in found:
            key = next(iter(found.values()))[0]
            problems.append(f"{key} is alone: {'A, the down' if part == 'A' else 'B, the up'} matrix is missing")
            return None
    (key, a), (key_b, b) = found["A"], found["B"]
    shapes = f"{key} and its partner are {tuple(a.shape)} and {tuple(b.shape)}"
    if (
        a.ndim not in (2, 4)
        or b.ndim not in (2, 4)
        or any(n != 1 for n in b.shape[2:])
        or a.shape[0] != b.shape[1]
        or not len(a)
    ):
        problems.append(f"{shapes}, which do not make a LoRA")
        return None
    if not (a.is_floating_point() and b.is_floating_point()):
        problems.append(f"{shapes}, of types {a.dtype} and {b.dtype}")
        return None
    b = b.flatten(1)  # (out, rank)
    if shape is not None:
        flat = a.ndim == 2 or a.shape[2:] == (1, 1)
        fitting = [(len(b), *a.shape[1:]), *([(len(b), a.shape[1]), (len(b), a.shape[1], 1, 1)] if flat else [])]
        if tuple(shape) not in fitting:
            problems.append(f"{shapes} but the base's weight is {tuple(shape)}")
            return None
        a = a.reshape(len(a), *shape[1:])  # a linear layer and a 1 × 1 convolution are the same
    if "alpha" in found:
        key_alpha, alpha = found["alpha"]
        if alpha.numel() != 1:
            problems.append(f"{key_alpha} is {tuple(alpha.shape)} and should be one number")
            return None
        scale = alpha.item() / len(a)
    else:
        scale = scale_of(len(a))
    if not (a.isfinite().all() and b.isfinite().all() and math.isfinite(scale)):
        problems.append(f"{key}, {key_b} or their scale {scale:g} holds numbers that are not finite")
        return None
    return Change(a, b, scale)


def _spelt_out(name: str) -> set[str]:
    """Return the full name that a key spells out, without a base to look it up in."""
    component, path = split(name)
    if component not in (UNET, TEXT_ENCODER, TEXT_ENCODER_2):
        return set()
    path = path.removeprefix("base_model.model.")
    path = re.sub(r"\.processor\.(to_[qkv])$", r".\1", re.sub(r"\.processor\.to_out$", ".to_out.0", path))
    if component != UNET and not path.startswith("text_model."):
        path = f"text_model.{path}"
    return {f"{component}.{path}"}


# ---------------------------------------------------------------------- scales that stand beside, and PEFT


def _configs_in(path: Path, metadata: dict[str, str]) -> dict[str, dict]:
    """Return PEFT's settings by component, as diffusers writes them into a header; empty if there are none."""
    if "lora_adapter_metadata" not in metadata:
        return {}
    try:
        flat = json.loads(metadata["lora_adapter_metadata"])
        configs: dict[str, dict] = {}
        for key, value in flat.items():
            component, name = split(key)
            configs.setdefault(component, {})[name] = value
    except (ValueError, AttributeError) as error:
        raise FormatError(f"{path}: its lora_adapter_metadata is no JSON object ({error})") from error
    for component, config in configs.items():
        _check_peft(f"{path}, {component}", config)
    return configs


def _check_peft(where: str, config: dict) -> None:
    """Refuse PEFT settings under which ΔW is not scale · B A."""
    problems = [
        f"{name} is {config[name]!r}"
        for name in ("use_dora", "lora_bias", "modules_to_save", "fan_in_fan_out", "layer_replication", "use_qalora")
        if config.get(name)
    ]
    if config.get("peft_type", "LORA") != "LORA":
        problems.append(f"peft_type is {config['peft_type']!r}")
    if config.get("bias", "none") != "none":
        problems.append(f"bias is {config['bias']!r}")
    if not isinstance(config.get("lora_alpha", 8), (int, float)):
        problems.append(f"lora_alpha is {config['lora_alpha']!r}")
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
        component = folder.name if folder.name in (UNET, TEXT_ENCODER, TEXT_ENCODER_2) else None
        folders = [(folder, component)]
    else:
        inside = [(folder / component, component) for component in (UNET, TEXT_ENCODER, TEXT_ENCODER_2)]
        folders = [(sub, component) for sub, component in inside if (sub / PEFT_CONFIG).exists()]
    if not folders:
        raise FormatError(f"{folder}: it holds neither {FILE_NAME} nor {PEFT_CONFIG}")
    whole = LoRA({})
    for sub, component in folders:
        try:
            config = json.loads((sub / PEFT_CONFIG).read_text())
        except (OSError, ValueError) as error:
            raise FormatError(f"{sub / PEFT_CONFIG}: {error}") from error
        _check_peft(str(sub), config)
        tensors, _ = _read_tensors(sub / PEFT_FILE)
        if component is not None:
            tensors = {f"{component}.{key}": tensor for key, tensor in tensors.items()}

        def scale_of(name: str, rank: int, config: dict = config) -> float:
            return _peft_scale(config, split(name)[1], rank)

        part = _gather(sub / PEFT_FILE, tensors, modules, scale_of)
        whole.changes.update(part.changes)
        whole.homeless.extend(part.homeless)
    return whole


# --------------------------------------------------------------------------------------- cloneofsimo


def _named_from_counted(path: Path, tensors: Tensors, metadata: dict[str, str], modules: Modules | None) -> Tensors:
    """Give the tensors of a file that only counts its modules the names of diffusers."""
    if modules is None:
        raise FormatError(f"{path}: its modules are only counted; give the base that it was trained for")
    named: Tensors = {}
    counted: dict[str, dict[tuple[int, str], torch.Tensor]] = {}
    for key, tensor in tensors.items():
        if match := _COUNTED.fullmatch(key):
            counted.setdefault(match[1], {})[int(match[2]), match[3]] = tensor
        elif metadata.get(key) != "<embed>":  # a learned word, which textual inversion would need
            raise FormatError(f"{path}: {key} is no key of a LoRA")
        else:
            raise FormatError(f"{path}: {key} is a learned word, not LoRA, and is not read")
    for component, parts in counted.items():
        try:
            classes = json.loads(metadata[component])
            orders = numbered(modules, component, classes)
        except (KeyError, ValueError) as error:
            raise FormatError(f"{path}: which modules of {component} it counts is not known ({error})") from error
        fitting = [order for order in orders if _fits(order, parts, modules)]
        if not fitting:
            raise FormatError(f"{path}: its {len(parts) // 2} modules of {component} are not those of this base")
        for (number, direction), tensor in parts.items():
            named[f"{fitting[0][number]}.lora.{direction}.weight"] = tensor
    return named


def _fits(order: list[str], parts: dict[tuple[int, str], torch.Tensor], modules: Modules) -> bool:
    """Whether the tensors have the shapes of the modules, counted in this order."""
    if {number for number, _ in parts} != set(range(len(order))):
        return False
    return all(
        tensor.shape[0 if direction == "up" else 1] == modules[order[number]][0 if direction == "up" else 1]
        for (number, direction), tensor in parts.items()
    )


# ------------------------------------------------------------------------------------------- writing


def tensor_bytes(tensors: Tensors, metadata: Mapping[str, str]) -> bytes:
    """Return a safetensors file; equal arguments give equal bytes, as safetensors' own order of metadata does not."""
    content = save({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, dict(metadata))
    first = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:first])
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(dict(sorted(header.items())), separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[first:]


def difference(one: LoRA, two: LoRA) -> float:
    """Return the largest ‖ΔW₁ − ΔW₂‖ of any module, relative to the largest that rounding B could make it.

    The unit is what rounding each number of B to the coarser of the two types can do; infinite if the
    modules are not the same.
    """
    if one.changes.keys() != two.changes.keys():
        return math.inf
    largest = 0.0
    for name, a in one.changes.items():
        b = two.changes[name]
        apart = Change(
            torch.cat([a.A.double(), b.A.double()]), torch.cat([a.scale * a.B.double(), -b.scale * b.B.double()], 1)
        )
        unit = max(torch.finfo(change.B.dtype).eps for change in (a, b))
        size = abs(a.scale) * a.B.double().norm().item() * a.A.double().norm().item()
        largest = max(largest, apart.norm() / (unit * size) if size else apart.norm())
    return largest


def as_diffusers(lora: LoRA) -> dict[str, tuple[Tensors, dict[str, str]]]:
    """Return the file of the diffusers dialect, as tensors and metadata by file name.

    The scale is folded into B: programs disagree on where else to look for it.
    """
    tensors = {}
    for name, change in lora.changes.items():
        tensors[f"{name}.lora_A.weight"] = change.A
        tensors[f"{name}.lora_B.weight"] = _like_weight(_folded(name, change), change)
    return {FILE_NAME: (tensors, {"format": "pt"})}


def as_kohya(lora: LoRA, modules: Modules) -> dict[str, tuple[Tensors, dict[str, str]]]:
    """Return the file of kohya's dialect, which A1111 and ComfyUI read, as tensors and metadata by file name.

    The scale is folded into B, and alpha says so by being the rank.
    """
    names, tensors = kohya_names(modules), {}
    for name, change in lora.changes.items():
        b = _like_weight(_folded(name, change), change)
        tensors[f"{names[name]}.lora_down.weight"] = change.A
        tensors[f"{names[name]}.lora_up.weight"] = b
        tensors[f"{names[name]}.alpha"] = torch.tensor(float(change.rank), dtype=b.dtype)
    ranks = sorted({change.rank for change in lora.changes.values()})
    rank = str(ranks[0]) if len(ranks) == 1 else "Dynamic"
    about = {"ss_v2": "False", "ss_network_module": "networks.lora", "ss_network_args": "{}"}
    about |= {"ss_network_dim": rank, "ss_network_alpha": rank, "modelspec.sai_model_spec": "1.0.1"}
    about |= {"modelspec.implementation": "diffusers", "modelspec.title": "LoRA"}
    if family := _family(modules):
        version, architecture, resolution, prediction = family
        about |= {"ss_base_model_version": version, "ss_v2": str(version.startswith("sd_v2"))}
        about |= {"modelspec.architecture": f"{architecture}/lora", "modelspec.resolution": resolution}
        about |= {"modelspec.prediction_type": prediction}
    # The two hashes that user interfaces know a file by: of the tensors' bytes, and of 64 kB at a fixed place.
    content = tensor_bytes(tensors, {key: value for key, value in about.items() if key.startswith("ss_")})
    first = 8 + int.from_bytes(content[:8], "little")
    about |= {"sshs_model_hash": hashlib.sha256(content[first:]).hexdigest()}
    about |= {"sshs_legacy_hash": hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]}
    return {"lora.safetensors": (tensors, about)}


def _family(modules: Modules) -> tuple[str, str, str, str] | None:
    """Return what kohya's tools call the base: version, architecture, resolution, prediction; None if unknown."""
    if is_sdxl(modules):
        return "sdxl_base_v1-0", "stable-diffusion-xl-v1-base", "1024x1024", "epsilon"
    widths = {shape[1] for name, shape in modules.items() if name.endswith("attn2.to_k")}
    if widths == {768}:
        return "sd_v1", "stable-diffusion-v1", "512x512", "epsilon"
    if widths == {1024}:
        return "sd_v2", "stable-diffusion-v2-512", "512x512", "epsilon"
    return None


def as_peft(lora: LoRA, flat_text_encoder: bool) -> dict[str, tuple[Tensors, dict]]:
    """Return PEFT's files, a folder for each component, as tensors and settings by file name.

    `flat_text_encoder` says that CLIPTextModel's own modules are named without "text_model.", as they
    are from transformers 5.6 on: PEFT reads the names of the live model only.
    """
    files: dict[str, tuple[Tensors, dict]] = {}
    for component in dict.fromkeys(split(name)[0] for name in lora.changes):
        tensors, ranks = {}, {}
        for name, change in lora.changes.items():
            owner, path = split(name)
            if owner != component:
                continue
            if owner == TEXT_ENCODER and flat_text_encoder:
                path = path.removeprefix("text_model.")
            tensors[f"base_model.model.{path}.lora_A.weight"] = change.A
            tensors[f"base_model.model.{path}.lora_B.weight"] = _like_weight(_folded(name, change), change)
            ranks[path] = change.rank
        most = max(ranks.values())
        pattern = {f"^{re.escape(path)}": rank for path, rank in ranks.items() if rank != most}
        config = {"peft_type": "LORA", "r": most, "lora_alpha": most, "target_modules": sorted(ranks), "bias": "none"}
        config |= {"rank_pattern": pattern, "alpha_pattern": pattern, "inference_mode": True, "use_rslora": False}
        files[f"{component}/{PEFT_FILE}"] = (tensors, config)
    return files


def _folded(name: str, change: Change) -> torch.Tensor:
    """Return scale · B in B's own type, (out, rank)."""
    if change.scale == 1:
        return change.B
    b = (change.B.double() * change.scale).to(change.B.dtype)
    if not b.isfinite().all():
        raise FormatError(f"{name}: its scale {change.scale:g} does not fit into {b.dtype}")
    return b


def _like_weight(b: torch.Tensor, change: Change) -> torch.Tensor:
    return b[..., None, None] if change.A.ndim == 4 else b
