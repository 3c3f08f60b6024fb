"""A single file: all parts of a base in the layout that Stable Diffusion was published in.

    U-Net              model.diffusion_model.…            blocks in one flat list down and one up (files/names.py)
    VAE                first_stage_model.…                its own names; up-blocks counted from the other end
    text encoders      cond_stage_model.transformer.…     CLIP's names, in the oldest files without "text_model."
                       cond_stage_model.model.…           2.x: OpenCLIP's names; query, key and value in one matrix
                       conditioner.embedders.0 and 1      XL: one of each

A part is first made empty from its settings.  Then each of its tensors is looked up under its name in the file.  So
missing tensors are known before anything is read, and tensors of other parts are never read.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors import safe_open
from torch import nn
from transformers import CLIPTokenizer

from ..files.names import ORIGINAL_TEXT_ENCODERS, TEXT_ENCODER, TEXT_ENCODER_2, UNET, full_name, original_unet_paths
from ..files.tensors import PICKLE_HELP, PICKLES, TensorFile, refuse_more_than_memory
from ..settings.errors import UserError
from .families import Family
from .folder import KINDS, VAE, Folder, empty_module, loading, refuse_missing, warn_of_more

CALLED = {UNET: "U-Net", VAE: "VAE", TEXT_ENCODER: "text encoder", TEXT_ENCODER_2: "second text encoder"}
EDM = {"edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min"}
# Tensors in files that no part needs: position numbers, CLIP's temperature, a VAE's training loss, and the last layer
# and projection of the text encoder of 2.x, whose outputs the U-Net does not get.
IDLE = re.compile(r"position_ids$|logit_scale$|attn_mask$|^loss\.|resblocks\.\d+\.|text_projection$|^model_ema\.")


@dataclass(frozen=True)
class Place:
    """The place of a part's tensor in a file: its key and, if three tensors share it, which `third` of its rows."""

    key: str
    third: int | None = None
    transposed: bool = False

    def read(self, source, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """Return a copy of the tensor in a shape and type.  Raises ValueError if it has another size."""
        tensor = source.get_tensor(self.key)
        if self.transposed:
            tensor = tensor.T
        if self.third is not None:
            tensor = tensor.chunk(3)[self.third]
        plain, wanted = ([n for n in each if n != 1] for each in (tensor.shape, shape))
        if plain != wanted:  # a linear layer and a convolution of 1 × 1 are the same
            raise ValueError(f"{self.key} is {tuple(tensor.shape)} and should be {tuple(shape)} by its settings")
        return tensor.reshape(shape).to(dtype, copy=True)


def is_file(name: str) -> bool:
    """Whether a name of a base or VAE means a single file, existing or not."""
    path = Path(name)
    return path.is_file() or (path.suffix in (".safetensors", *PICKLES) and not path.is_dir())


def vae_parts(name: str, of_base: "Folder | SingleFile") -> "Folder | SingleFile":
    """Return the source of --vae: the folder or hub id of a base or of a VAE, or a file of either.

    A file uses the settings of the base's VAE.
    """
    title = f"--vae {name}"
    if is_file(name):
        return SingleFile(name, title, of_base)
    if Path(name).is_dir():
        own = not Path(name, VAE).is_dir()
    else:
        try:
            own = AutoencoderKL.load_config(name).get("_class_name") == "AutoencoderKL"
        except Exception:  # no config, or not reachable: loading the VAE will report it
            own = False
    return Folder(name, title, {VAE: ""} if own else {})


class SingleFile:
    """The parts of a base in one file; it lacks their settings, which come from `configs`.

    `title` is its name in messages.  Without `configs`, the settings follow from the file's shapes (families.py) and
    from `prediction_type`.  Raises UserError for an invalid safetensors file.
    """

    commit = ""  # a file is identified by its content

    def __init__(
        self, name: str, title: str, configs: "Folder | SingleFile | Family | None", prediction_type: str | None = None
    ):
        path = Path(name)
        if path.suffix in PICKLES:
            raise UserError(f"{title}: {PICKLE_HELP}")
        if not path.is_file():
            raise UserError(f"{title}: there is no such file")
        if path.suffix != ".safetensors":
            raise UserError(f"{title}: a single file must be a .safetensors file")
        self.file = TensorFile(path)
        self.title = title
        if marked := sorted(self.file.entries.keys() & EDM):
            raise UserError(f"{title}: {marked[0]} marks a base with the noise levels of EDM, which are not supported")
        # Marks are empty tensors, as in ComfyUI and Forge, or kohya's metadata.
        said = {"v": "v_prediction", "epsilon": "epsilon"}.get(self.file.metadata.get("modelspec.prediction_type"))
        self.marked_prediction_type = "v_prediction" if "v_pred" in self.file.entries else said
        self.marked_zero_terminal_snr = "ztsnr" in self.file.entries
        shapes = {key: entry.shape for key, entry in self.file.entries.items()}
        self.configs = configs or Family(shapes, title, prediction_type or self.marked_prediction_type)

    def index(self) -> dict:
        return self.configs.index()

    def config(self, part: str) -> dict:
        return self.configs.config(part)

    def tokenizer(self, part: str) -> CLIPTokenizer:
        return self.configs.tokenizer(part)

    def module(self, part: str, dtype: torch.dtype) -> nn.Module:
        """Load a part, with its numbers in `dtype`.  Raises UserError if the file lacks it, or a tensor of it."""
        empty = empty_module(part, self.config(part), self.title)
        shapes = {key: tensor.shape for key, tensor in empty.state_dict().items()}
        there = self.file.entries
        # Of all ways to name the tensors, the one that the file uses.
        prefix, found = max(ways(part, shapes), key=lambda way: sum(place.key in there for place in way[1].values()))
        used = {place.key for place in found.values()}
        missing = used - there.keys()
        if missing == used:
            hint = "; give one with --vae (folder, hub id or file)" if part == VAE else ""
            raise UserError(f"{self.title}: it holds no {CALLED[part]}{hint}")
        refuse_missing(self.title, part, missing)
        beside = (key.removeprefix(prefix) for key in there if prefix and key.startswith(prefix) and key not in used)
        warn_of_more(self.title, part, [key for key in beside if not IDLE.search(key)])
        with loading(self.title, part):
            refuse_more_than_memory(sum(shape.numel() for shape in shapes.values()), dtype.itemsize)
            with safe_open(self.file.path, framework="pt") as source:
                state = {key: place.read(source, shapes[key], dtype) for key, place in found.items()}
            if part in (UNET, VAE):
                empty.load_state_dict(state, assign=True)
                return empty
            # A text encoder also has its positions, which are not in its state: transformers fills them in.
            about = {"config": empty.config, "state_dict": state, "torch_dtype": dtype}
            return KINDS[part].from_pretrained(None, use_safetensors=True, **about)

    def files(self, part: str) -> list[TensorFile]:
        return [self.file]


# ------------------------------------------------------------------------------------------- the names


def ways(part: str, keys: Iterable[str]) -> Iterator[tuple[str, dict[str, Place]]]:
    """Yield each way in which a file may name a part's tensors: their common prefix, and the place of each key."""
    if part == UNET:
        paths = original_unet_paths(dict.fromkeys(key.rpartition(".")[0] for key in keys))
        names = {key: f"{paths.get(path, path)}.{leaf}" for key in keys for path, _, leaf in [key.rpartition(".")]}
        yield _at("model.diffusion_model.", names)
    elif part == VAE:
        blocks = len({key.split(".")[2] for key in keys if key.startswith("encoder.down_blocks.")})
        original = {key: _original_vae(key, blocks) for key in keys}
        for prefix in ("first_stage_model.", "vae.", ""):
            yield _at(prefix, original)
        yield _at("", {key: key for key in keys})  # a VAE's own file, of diffusers, and of diffusers before 0.12
        yield _at("", {key: _renamed(key, _OLDER_VAE) for key in keys})
    else:
        clip = {key: full_name(part, key).removeprefix(f"{part}.") for key in keys}
        for prefix, component, layout in ORIGINAL_TEXT_ENCODERS:
            if component == part and layout == "clip":
                yield _at(prefix, clip)
                yield _at(prefix, {key: name.removeprefix("text_model.") for key, name in clip.items()})
            elif component == part:
                yield prefix, {key: _in_openclip(prefix, name) for key, name in clip.items()}


def _at(prefix: str, names: Mapping[str, str]) -> tuple[str, dict[str, Place]]:
    return prefix, {key: Place(prefix + name) for key, name in names.items()}


_VAE = {
    **{"down_blocks.": "down.", ".resnets.": ".block.", "samplers.0": "sample", "conv_norm_out": "norm_out"},
    **{"conv_shortcut": "nin_shortcut", "mid_block.block.0": "mid.block_1", "mid_block.block.1": "mid.block_2"},
    **{"mid_block.attentions.0": "mid.attn_1", ".group_norm.": ".norm.", ".to_out.0.": ".proj_out."},
    **{f".to_{each}.": f".{each}." for each in "qkv"},
}
_OLDER_VAE = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}


def _renamed(name: str, renaming: Mapping[str, str]) -> str:
    for ours, theirs in renaming.items():
        name = name.replace(ours, theirs)
    return name


def _original_vae(key: str, blocks: int) -> str:
    """Return the name of a VAE's tensor in the original layout, which counts the up-blocks from the last."""
    return _renamed(re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{blocks - 1 - int(match[1])}", key), _VAE)


_OPENCLIP = {
    **{"text_model.encoder.layers.": "transformer.resblocks.", "layer_norm1": "ln_1", "layer_norm2": "ln_2"},
    **{"self_attn.": "attn.", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"},
    **{"text_model.embeddings.token_embedding": "token_embedding", "text_model.final_layer_norm": "ln_final"},
    **{"text_model.embeddings.position_embedding.weight": "positional_embedding"},
    **{"text_projection.weight": "text_projection"},
}


def _in_openclip(prefix: str, name: str) -> Place:
    """Return the place of CLIP's tensor `name` in a file in OpenCLIP's layout."""
    found = re.search(r"\.([qkv])_proj\.(weight|bias)$", name)
    third = "qkv".index(found[1]) if found else None
    name = _renamed(name[: found.start()] + f".in_proj_{found[2]}" if found else name, _OPENCLIP)
    return Place(prefix + name, third, transposed=name == "text_projection")
