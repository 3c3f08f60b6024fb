"""State on disk: written whole or not at all, and never unpickled.

A file first goes under a temporary name, is flushed to the disk, and only then takes its final name
by a rename, which the file system does at once.  So a file that is there is whole, whenever the
program or the machine stopped.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it is found under its name only when all of it is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write tensors as a safetensors file, whole or not at all; equal arguments give equal bytes."""
    write_whole(path, save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, metadata))


def under(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Return the tensors whose names begin with `prefix`, by the rest of their names."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


# ------------------------------------------------------------------------------- training checkpoints


def path_of(folder: Path, step: int) -> Path:
    """Return the name of the checkpoint after `step` steps."""
    return folder / f"step-{step:08d}.safetensors"


@dataclass(frozen=True)
class State:
    """All that a run needs to go on: its random draws are functions of the step, so they need nothing."""

    step: int  # optimizer steps done
    lora: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    scaler: dict[str, float]  # of the gradient scaler; empty without one


def save_checkpoint(folder: Path, state: State, fingerprint: dict, kept: int) -> None:
    """Write a checkpoint and delete all but the newest `kept`.

    `fingerprint` says what the run is a function of, as JSON values; only a run with an equal one
    may go on from here.
    """
    tensors = {f"lora.{key}": value for key, value in state.lora.items()}
    tensors |= {f"optimizer.{key}": value for key, value in state.optimizer.items()}
    about = {"step": state.step, "scaler": state.scaler, "fingerprint": fingerprint}
    write_tensors(path_of(folder, state.step), tensors, {"minilora": json.dumps(about, sort_keys=True)})
    for old in all_in(folder)[:-kept]:
        old.unlink()


def load_newest_checkpoint(folder: Path, fingerprint: dict) -> State | None:
    """Return the newest checkpoint of a folder, or None if there is none.

    Raises ValueError, naming what differs, if it belongs to another run, or if it cannot be read.
    """
    paths = all_in(folder)
    if not paths:
        return None
    try:
        with safe_open(paths[-1], framework="pt") as file:
            about = json.loads(file.metadata()["minilora"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{paths[-1]} is not a checkpoint that can be read ({error}); delete it to go on without it"
        ) from error
    there = about["fingerprint"]
    different = [
        f"{key} was {there.get(key)!r} and is {fingerprint.get(key)!r}"
        for key in sorted(there.keys() | fingerprint.keys())
        if there.get(key) != fingerprint.get(key)
    ]
    if different:
        raise ValueError(f"{paths[-1]} belongs to another run: " + "; ".join(different))

    return State(about["step"], under(tensors, "lora."), under(tensors, "optimizer."), about["scaler"])


def all_in(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder, the newest last."""
    return sorted(folder.glob("step-*.safetensors"))


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Flatten an optimizer's state into named tensors: `0.exp_avg`, `0.exp_avg_sq`, `0.step`, …"""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{name}": value for i, entry in state.items() for name, value in entry.items()}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Put back what `optimizer_tensors` gave, into an optimizer over the same parameters."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
