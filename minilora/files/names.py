"""One weight, many names.

    diffusers         unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q     the name used in minilora
    kohya             lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q
    original          model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q
    kohya for SDXL    lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q
    ComfyUI           diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q

A full name is a component ("unet", "text_encoder" or "text_encoder_2") and the path of a module in it, as in diffusers
and CLIP.  (transformers 5.6 dropped "text_model." from the paths in CLIP; files still have it.)  Names are not parsed,
because an underscore may stand for a dot or for itself.  Instead, all names of each module of a base are listed, and a
name from a file is looked up.

"Original" is the layout of the single files in which Stable Diffusion was published.
"""

import re
from collections.abc import Collection, Iterable, Mapping

from ..settings.errors import UserError

COMPONENTS = UNET, TEXT_ENCODER, TEXT_ENCODER_2 = "unet", "text_encoder", "text_encoder_2"
PEFT_PREFIX = "base_model.model."  # of names in PEFT's files

Modules = Mapping[str, tuple[int, ...]]  # full name -> shape of the weight, (out, in) or (out, in, height, width)


def full_name(component: str, path: str) -> str:
    """Return the full name of a module, given its path in a live model or a file of weights."""
    if component.startswith(TEXT_ENCODER) and path.startswith(("encoder.", "embeddings.", "final_layer_norm")):
        path = f"text_model.{path}"
    return f"{component}.{path}"


def split(name: str) -> tuple[str, str]:
    """Split a full name into component and path."""
    component, _, path = name.partition(".")
    return component, path


# ------------------------------------------------------------------------------------------------ blocks


def blocks_of(names: Iterable[str]) -> list[str]:
    """Return the blocks that modules, by paths in a U-Net or full names, are in: down_blocks.0, mid_block, …"""
    found = (re.match(r"(?:unet\.)?((?:down|up)_blocks\.\d+|mid_block|text_encoder(?:_2)?)\b", name) for name in names)
    return sorted({match[1] for match in found if match})


def block_factors(modules: Iterable[str], blocks: Mapping[str, float]) -> dict[str, float]:
    """Return the factor on the strength of each module, by full name, that `blocks` gives by block.

    A block is down, mid, up or text (the text encoders), or the beginning of modules' paths, as up_blocks.1.  The
    longest counts; a module in none has the factor 1.  Raises UserError for a block without a module.
    """
    short = {"down": "down_blocks.", "mid": "mid_block.", "up": "up_blocks.", "text": "text_encoder"}
    starts = {block: short.get(block, f"{block}.") for block in blocks}
    around = {
        name: [block for block, start in starts.items() if f"{name.removeprefix('unet.')}.".startswith(start)]
        for name in modules
    }
    if empty := [block for block in blocks if not any(block in each for each in around.values())]:
        there = ", ".join(blocks_of(around)) or "no block"
        raise UserError(f"--lora-blocks {', '.join(empty)}: no layer of a LoRA is there; they are in {there}")
    return {name: blocks[max(each, key=len)] if each else 1.0 for name, each in around.items()}


# ----------------------------------------------------------------------------- U-Net: diffusers <-> original


_RESNET = {
    **{"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1"},
    **{"norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"},
}
_ENDS = {
    **{"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"},
    **{"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"},
    **{"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"},
}


def _unet_pairs(blocks: int, layers: int) -> list[tuple[str, str]]:
    """Return (diffusers, original) for every part of a U-Net with `blocks` blocks of `layers` layers each.

    In diffusers, a U-Net is a list of blocks with resnets, attentions and samplers in each.  In the original layout it
    is one flat list down and one up, and each item has a resnet, its attention and a sampler.
    """
    pairs = [*_ENDS.items(), ("mid_block.attentions.0", "middle_block.1")]
    resnets = [("mid_block.resnets.0", "middle_block.0"), ("mid_block.resnets.1", "middle_block.2")]
    for i in range(blocks):
        for j in range(layers):
            place = f"input_blocks.{1 + i * (layers + 1) + j}"
            resnets.append((f"down_blocks.{i}.resnets.{j}", f"{place}.0"))
            pairs.append((f"down_blocks.{i}.attentions.{j}", f"{place}.1"))
        pairs.append((f"down_blocks.{i}.downsamplers.0.conv", f"input_blocks.{(i + 1) * (layers + 1)}.0.op"))
        for j in range(layers + 1):
            place = f"output_blocks.{i * (layers + 1) + j}"
            resnets.append((f"up_blocks.{i}.resnets.{j}", f"{place}.0"))
            pairs.append((f"up_blocks.{i}.attentions.{j}", f"{place}.1"))
        for k in (1, 2):  # after an attention, if the block has one
            sampler = f"output_blocks.{i * (layers + 1) + layers}.{k}.conv"
            pairs.append((f"up_blocks.{i}.upsamplers.0.conv", sampler))
    return pairs + [(f"{ours}.{a}", f"{theirs}.{b}") for ours, theirs in resnets for a, b in _RESNET.items()]


def _renamed(path: str, renaming: Mapping[str, str]) -> str | None:
    """Return a path with its longest known prefix renamed; None if none is known."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        if found := renaming.get(".".join(parts[:length])):
            return ".".join([found, *parts[length:]])
    return None


def original_unet_paths(paths: Iterable[str]) -> dict[str, str]:
    """Return the original path of each module of a U-Net, by its path in diffusers."""
    paths = list(paths)
    blocks = len({p.split(".")[1] for p in paths if p.startswith("down_blocks.")})
    layers = len({p.split(".")[3] for p in paths if p.startswith("down_blocks.0.resnets.")})
    with_attention = {p.split(".attentions.")[0] for p in paths if ".attentions." in p}
    renaming = {}
    for ours, theirs in _unet_pairs(blocks, layers):
        if "upsamplers" in ours and (ours.split(".upsamplers")[0] in with_attention) != theirs.endswith(".2.conv"):
            continue
        renaming[ours] = theirs
    return {path: theirs for path in paths if (theirs := _renamed(path, renaming))}


def diffusers_unet_paths(originals: Iterable[str]) -> dict[str, str]:
    """Return the diffusers path of each module of a U-Net, by its original path."""
    originals = list(originals)
    places = {p.split(".")[1] for p in originals if p.startswith("input_blocks.")}
    samplers = sorted(int(p.split(".")[1]) for p in originals if re.fullmatch(r"input_blocks\.\d+\.0\.op", p))
    layers = samplers[0] - 1 if samplers else len(places) - 1
    renaming = {theirs: ours for ours, theirs in _unet_pairs(len(samplers) + 1, layers)}
    return {path: ours for path in originals if (ours := _renamed(path, renaming))}


# The renaming for Stable Diffusion 1, 2 and XL, which have two layers per block.  (XL has one block less.)
_USUAL = {theirs: ours for ours, theirs in _unet_pairs(4, 2)}


def full_name_of_dotted(name: str) -> str | None:
    """Return the full name for a dotted name of ComfyUI or OneTrainer; None if it is not one.

    No base is needed, because all bases that these programs support have blocks of two layers.
    """
    for component, clips in _COMFY.items():
        for clip in clips:
            if name.startswith(start := f"text_encoders.{clip}.transformer."):
                return full_name(component, name.removeprefix(start))
    path = _renamed(re.sub(r"^(model\.)?diffusion_model\.|^unet\.", "", name), _USUAL)
    return f"{UNET}.{path}" if path else None


# ------------------------------------------------------------------------- text encoders: original -> diffusers


# Where a single file keeps a text encoder, and whether in CLIP's layout or in OpenCLIP's.
ORIGINAL_TEXT_ENCODERS = [
    ("cond_stage_model.transformer.", TEXT_ENCODER, "clip"),  # Stable Diffusion 1
    ("cond_stage_model.model.", TEXT_ENCODER, "openclip"),  # 2
    ("conditioner.embedders.0.transformer.", TEXT_ENCODER, "clip"),  # XL
    ("conditioner.embedders.1.model.", TEXT_ENCODER_2, "openclip"),
]
_OPENCLIP = {
    "attn.in_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),  # one weight, three modules
    "attn.out_proj": ("self_attn.out_proj",),
    "mlp.c_fc": ("mlp.fc1",),
    "mlp.c_proj": ("mlp.fc2",),
}


def modules_of_original(key: str) -> list[str]:
    """Return the full names of the text-encoder modules whose weights a single file holds under a key.

    Several modules are stacked, with an equal number of rows each; OpenCLIP's "text_projection" is transposed.  The
    list is empty if the key is not a text encoder's weight.
    """
    for prefix, component, layout in ORIGINAL_TEXT_ENCODERS:
        if not key.startswith(prefix):
            continue
        path = key.removeprefix(prefix)
        if layout == "clip":
            return [full_name(component, path.removesuffix(".weight"))] if path.endswith(".weight") else []
        if path == "text_projection" and component == TEXT_ENCODER_2:  # Stable Diffusion 2's encoder does not use it
            return [f"{component}.text_projection"]
        match = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+?)[._]weight", path)
        leaves = _OPENCLIP.get(match[2], ()) if match else ()
        return [f"{component}.text_model.encoder.layers.{match[1]}.{leaf}" for leaf in leaves]
    return []


# ---------------------------------------------------------------------------------- every name of a module


_KOHYA = {UNET: ("lora_unet",), TEXT_ENCODER: ("lora_te", "lora_te1"), TEXT_ENCODER_2: ("lora_te2",)}
# ComfyUI's and OneTrainer's names for text encoders: OpenCLIP's H is in Stable Diffusion 2, CLIP's L and OpenCLIP's G
# are in XL.
_COMFY = {TEXT_ENCODER: ("clip_l", "clip_h"), TEXT_ENCODER_2: ("clip_g",)}


def is_sdxl(modules: Iterable[str]) -> bool:
    return any(split(name)[0] == TEXT_ENCODER_2 or ".add_embedding." in name for name in modules)


def _originals(modules: Iterable[str]) -> dict[str, str]:
    """Return the original path of each module that is a U-Net's, by its full name."""
    paths = original_unet_paths(path for component, path in map(split, modules) if component == UNET)
    return {f"{UNET}.{path}": original for path, original in paths.items()}


def kohya_names(modules: Collection[str]) -> dict[str, str]:
    """Return the name that kohya's trainer gives each module; for SDXL's U-Net it is the original one."""
    sdxl = is_sdxl(modules)
    originals = _originals(modules) if sdxl else {}
    result = {}
    for name in modules:
        component, path = split(name)
        prefix = "lora_te1" if sdxl and component == TEXT_ENCODER else _KOHYA.get(component, ("",))[0]
        result[name] = f"{prefix}_{originals.get(name, path).replace('.', '_')}"
    return result


def older_paths(path: str) -> list[str]:
    """Return the paths that an attention layer had in LoRA files of diffusers before 0.22."""
    if found := re.fullmatch(r"(.+\.attn\d)\.(to_[qkv]|to_out)(?:\.0)?", path):
        return [f"{found[1]}.processor.{found[2]}", f"{found[1]}.{found[2]}"]
    if found := re.fullmatch(r"(.+\.self_attn)\.(q|k|v|out)_proj", path):
        return [f"{found[1]}.to_{found[2]}"]
    return []


def motion_name(name: str) -> str:
    """Return diffusers' name for AnimateDiff's own name of a motion module's layer; any other name unchanged."""
    if ".temporal_transformer." not in name:
        return name
    name = name.replace(".temporal_transformer.", ".")
    return name.replace(".attention_blocks.0.", ".attn1.").replace(".attention_blocks.1.", ".attn2.")


def known_by(modules: Collection[str]) -> dict[str, set[str]]:
    """Return every name that LoRA files use for the modules, each with the full names it may mean."""
    originals = _originals(modules)
    result: dict[str, set[str]] = {}
    for name in modules:
        component, path = split(name)
        paths = {path, path.removeprefix("text_model.")}
        names = {*paths, *(f"{PEFT_PREFIX}{p}" for p in paths), *older_paths(path)}  # bare, PEFT's, older ones
        names |= {f"{component}.{n}" for n in names}
        names |= {f"text_encoders.{clip}.transformer.{path}" for clip in _COMFY.get(component, ())}
        if original := originals.get(name):
            paths.add(original)
            names |= {f"{prefix}{original}" for prefix in ("", "unet.", "diffusion_model.", "model.diffusion_model.")}
        for prefix in (*_KOHYA.get(component, ()), "lycoris"):  # LyCORIS' own does not name the component
            names |= {f"{prefix}_{p.replace('.', '_')}" for p in paths}
        for each in names:
            result.setdefault(each, set()).add(name)
    return result


def last_layer(modules: Iterable[str]) -> str:
    """Return the common prefix of the modules in the text encoder's last layer."""
    layers = f"{TEXT_ENCODER}.text_model.encoder.layers."
    numbers = (name.removeprefix(layers).split(".")[0] for name in modules if name.startswith(layers))
    return f"{layers}{max(map(int, numbers), default=0)}."
