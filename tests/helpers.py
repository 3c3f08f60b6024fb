"""Functions that several test files use."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from conftest import make_tiny_unet
from safetensors.torch import load_file, save_file
from torch import nn

from minilora import inject_lora, lora_parameters, save_lora
from minilora.files import names
from minilora.files.layout import Checkpoint
from minilora.files.low_rank import Delta
from minilora.files.number_types import narrow, widen
from minilora.files.read import FILE_NAME, LoRA

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 10)
        self.layers = nn.ModuleList([nn.Linear(10, 10), nn.Linear(10, 4)])

    def forward(self, x):
        x = self.first(x).relu()
        return self.layers[1](self.layers[0](x).relu())


MLP_TARGETS = ("first", "layers.0", "layers.1")


def randomize(module: nn.Module, seed: int = 1) -> None:
    """Give every A and B values as training would, so that the LoRA does something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lora_parameters(module):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def write_a_lora(path):
    """Write the file of a LoRA that does something, and return the U-Net that carries it."""
    unet = make_tiny_unet()
    inject_lora(unet, rank=4, alpha=6)
    randomize(unet)
    save_lora(unet, path)
    return unet


def random_lora(modules, seed: int, share: float = 0.5, stored="F32", ranks=(1, 6)) -> LoRA:
    """Return a LoRA of some of the modules, each with a rank and a scale of its own."""
    random = np.random.default_rng(seed)
    deltas = {}
    for name, shape in modules.items():
        if random.random() < share:
            rank = int(random.integers(*ranks))
            a, b = random.standard_normal((rank, *shape[1:])), random.standard_normal((shape[0], rank))
            a, b = (widen(narrow(matrix, stored)) for matrix in (a, b))
            deltas[name] = Delta(a, b, float(random.choice([1.0, 0.5, 2.0, 0.3])), (stored, stored))
    return LoRA(deltas)


def write_motion_lora(path: Path, adapter: Path) -> None:
    """Write a LoRA of an adapter's attention by the names in guoyww/animatediff-motion-lora-… on the hub."""
    attention = {name: shape for name, shape in Checkpoint(adapter).modules.items() if ".attn" in name}
    tensors = {}
    for name, delta in random_lora(attention, 2, share=1.0, ranks=(4, 5)).deltas.items():
        start, _, leaf = name.removesuffix(".0").rpartition(".")
        tensors[f"{start}.processor.{leaf}_lora.down.weight"] = torch.from_numpy(delta.A)
        tensors[f"{start}.processor.{leaf}_lora.up.weight"] = torch.from_numpy(delta.B * np.float32(delta.scale))
    save_file(tensors, path)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / FILE_NAME)


def deltas(folder: Path) -> torch.Tensor:
    """Return all ΔW of a LoRA file as one long vector."""
    state = weights(folder)
    pairs = [(state[k], state[k.replace("lora_A", "lora_B")]) for k in sorted(state) if "lora_A" in k]
    return torch.cat([(b.flatten(1) @ a.flatten(1)).flatten() for a, b in pairs])


def relative_difference(one: Path, two: Path) -> float:
    return ((deltas(one) - deltas(two)).norm() / deltas(one).norm()).item()


def torchrun(processes: int, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.run([*command, "train.py", *words], cwd=ROOT, capture_output=True, text=True)


# ------------------------------------------------------------------------------------------ single files


def original_vae_name(key: str) -> str:
    """Return what a tensor of the tests' VAEs, of two blocks, is called in the original layout."""
    for ours, theirs in [
        ("mid_block.resnets.0", "mid.block_1"),
        ("mid_block.resnets.1", "mid.block_2"),
        ("mid_block.attentions.0", "mid.attn_1"),
        *((f"down_blocks.{i}", f"down.{i}") for i in range(2)),
        *((f"up_blocks.{i}", f"up.{1 - i}") for i in range(2)),
        *((f".{a}samplers.0", f".{a}sample") for a in ("down", "up")),
        *((".resnets.", ".block."), ("conv_norm_out", "norm_out"), ("conv_shortcut", "nin_shortcut")),
        *(
            (".group_norm.", ".norm."),
            (".to_q.", ".q."),
            (".to_k.", ".k."),
            (".to_v.", ".v."),
            (".to_out.0.", ".proj_out."),
        ),
    ]:
        key = key.replace(ours, theirs)
    return key


def in_openclip(clip: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors of a text encoder in OpenCLIP's layout, as 2.x and XL have it, with a layer too many."""
    text, tensors = "text_model", {"logit_scale": torch.tensor(4.6)}
    layers = 1 + max(int(key.split(".")[3]) for key in clip if ".layers." in key)
    for number in range(layers):
        ours, theirs = f"{text}.encoder.layers.{number}", f"transformer.resblocks.{number}"
        for leaf in ("weight", "bias"):
            three = [clip[f"{ours}.self_attn.{each}_proj.{leaf}"] for each in "qkv"]
            tensors[f"{theirs}.attn.in_proj_{leaf}"] = torch.cat(three)
            for a, b in (
                ("self_attn.out_proj", "attn.out_proj"),
                ("mlp.fc1", "mlp.c_fc"),
                ("mlp.fc2", "mlp.c_proj"),
                ("layer_norm1", "ln_1"),
                ("layer_norm2", "ln_2"),
            ):
                tensors[f"{theirs}.{b}.{leaf}"] = clip[f"{ours}.{a}.{leaf}"]
    for leaf in ("weight", "bias"):
        tensors[f"ln_final.{leaf}"] = clip[f"{text}.final_layer_norm.{leaf}"]
    tensors["positional_embedding"] = clip[f"{text}.embeddings.position_embedding.weight"]
    tensors["token_embedding.weight"] = clip[f"{text}.embeddings.token_embedding.weight"]
    if "text_projection.weight" in clip:
        tensors["text_projection"] = clip["text_projection.weight"].T
    else:  # 2.x: the last of 24 layers is in the file, and not used
        last = {key: tensor for key, tensor in tensors.items() if f"resblocks.{layers - 1}." in key}
        tensors |= {key.replace(f".{layers - 1}.", f".{layers}."): tensor for key, tensor in last.items()}
    return tensors


def original_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a tiny base of any family as its single file has them."""
    unet = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    paths = names.original_unet_paths(dict.fromkeys(key.rsplit(".", 1)[0] for key in unet))
    result = {}
    for key, tensor in unet.items():
        path, leaf = key.rsplit(".", 1)
        result[f"model.diffusion_model.{paths[path]}.{leaf}"] = tensor
    for key, tensor in load_file(folder / "vae" / "diffusion_pytorch_model.safetensors").items():
        linear = ".attentions." in key and ".to_" in key and tensor.ndim == 2
        result[f"first_stage_model.{original_vae_name(key)}"] = tensor[..., None, None] if linear else tensor
    encoders = [load_file(path) for path in sorted(folder.glob("text_encoder*/model.safetensors"))]
    clips = [
        {names.full_name("text_encoder", key).removeprefix("text_encoder."): tensor for key, tensor in clip.items()}
        for clip in encoders
    ]
    if len(clips) == 2:
        result |= {f"conditioner.embedders.0.transformer.{key}": tensor for key, tensor in clips[0].items()}
        result |= {f"conditioner.embedders.1.model.{key}": tensor for key, tensor in in_openclip(clips[1]).items()}
    elif any("proj_in.weight" in key and tensor.ndim == 2 for key, tensor in unet.items()):  # 2.x
        result |= {f"cond_stage_model.model.{key}": tensor for key, tensor in in_openclip(clips[0]).items()}
    else:
        result |= {f"cond_stage_model.transformer.{key}": tensor for key, tensor in clips[0].items()}
    return {key: tensor.contiguous().clone() for key, tensor in result.items()}


def write_single_file(
    folder: Path, path: Path, *without: str, metadata=None, **more: torch.Tensor
) -> tuple[Path, Path]:
    """Write a tiny base as a single file, without the tensors whose names have a part in `without`, with some more.

    Return it and a folder with the settings that are not in it.
    """
    tensors = {k: t for k, t in original_tensors(folder).items() if not any(part in k for part in without)} | more
    save_file(tensors, path, metadata)
    settings = path.with_name("settings")
    if not settings.exists():
        shutil.copytree(folder, settings, ignore=shutil.ignore_patterns("*.safetensors"))
    return path, settings
