"""Functions that several test files use."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from conftest import make_tiny_unet
from safetensors.torch import load_file
from torch import nn

from minilora import inject_lora, lora_parameters, save_lora
from minilora.files.low_rank import Change
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
    changes = {}
    for name, shape in modules.items():
        if random.random() < share:
            rank = int(random.integers(*ranks))
            a, b = random.standard_normal((rank, *shape[1:])), random.standard_normal((shape[0], rank))
            a, b = (widen(narrow(matrix, stored)) for matrix in (a, b))
            changes[name] = Change(a, b, float(random.choice([1.0, 0.5, 2.0, 0.3])), (stored, stored))
    return LoRA(changes)


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
