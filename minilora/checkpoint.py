"""Training state on disk: a checkpoint after every so many steps, from which a run goes on as if never stopped."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .config import UserError
from .files import write_tensors
from .formats import FILE_NAME


def under(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Return the tensors whose names begin with `prefix`, by the rest of their names."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def path_of(output: Path, step: int) -> Path:
    """Return where the checkpoint after `step` steps of a run is, given the run's output folder."""
    return output / "checkpoints" / f"step-{step:08d}.safetensors"


def all_in(output: Path) -> list[Path]:
    """Return the checkpoints of a run, the newest last."""
    return sorted((output / "checkpoints").glob("step-*.safetensors"))


def refuse_unfinished(output: Path) -> None:
    """Raise UserError if a run there was not finished: its checkpoints may be hours of work."""
    old = all_in(output)
    if old and not (output / FILE_NAME).exists():
        raise UserError(
            f"{output} holds a run that was not finished, {old[-1].name}; go on with --resume, "
            "choose another --output, or delete its checkpoints"
        )


@dataclass(frozen=True)
class State:
    """All that a run needs to go on: its random draws are functions of the step, so they need nothing."""

    step: int  # optimizer steps done
    lora: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    average: dict[str, torch.Tensor]  # of the LoRA, for --ema; mostly nothing
    objective: dict[str, torch.Tensor]  # what the objective keeps from step to step; mostly nothing
    scaler: dict[str, float]  # of the gradient scaler; empty without one


def save_checkpoint(output: Path, state: State, fingerprint: dict, kept: int) -> None:
    """Write a checkpoint and delete all but the newest `kept`.

    `fingerprint` says what the run is a function of, as JSON values; only a run with an equal one
    may go on from here.
    """
    tensors = {f"lora.{key}": value for key, value in state.lora.items()}
    tensors |= {f"optimizer.{key}": value for key, value in state.optimizer.items()}
    tensors |= {f"average.{key}": value for key, value in state.average.items()}
    tensors |= {f"objective.{key}": value for key, value in state.objective.items()}
    about = {"step": state.step, "scaler": state.scaler, "fingerprint": fingerprint}
    tensors = {key: value.cpu() for key, value in tensors.items()}
    write_tensors(path_of(output, state.step), tensors, {"minilora": json.dumps(about, sort_keys=True)})
    for old in all_in(output)[:-kept]:
        old.unlink()


def load_newest_checkpoint(output: Path, fingerprint: dict) -> State | None:
    """Return the newest whole checkpoint of a run, or None if there is none at all.

    One that cannot be read is passed over with a warning.  Raises ValueError if that leaves none, or,
    naming what differs, if the checkpoint belongs to another run.
    """
    broken = []
    for path in reversed(all_in(output)):
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads(file.metadata()["minilora"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}
            break
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            broken.append(f"{path} is not a checkpoint that can be read ({error})")
    else:
        if broken:
            raise ValueError("; ".join(broken) + "; delete it to begin anew")
        return None
    for complaint in broken:
        print(f"warning: {complaint}; going on from {path.name}", file=sys.stderr)
    there = about["fingerprint"]
    different = [
        f"{key} was {there.get(key)!r} and is {fingerprint.get(key)!r}"
        for key in sorted(there.keys() | fingerprint.keys())
        if there.get(key) != fingerprint.get(key)
    ]
    if different:
        raise ValueError(f"{path} belongs to another run: " + "; ".join(different))

    parts = [under(tensors, prefix) for prefix in ("lora.", "optimizer.", "average.", "objective.")]
    return State(about["step"], *parts, about["scaler"])


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Flatten an optimizer's state into named tensors: `0.exp_avg`, `0.exp_avg_sq`, `0.step`, …

    (`state_dict` would do, but that of the 8-bit optimizer is nested, for the sake of other programs.)
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states = {i: optimizer.state[parameter] for i, parameter in enumerate(parameters) if parameter in optimizer.state}
    return {f"{i}.{name}": torch.as_tensor(value) for i, state in states.items() for name, value in state.items()}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Put back what `optimizer_tensors` gave, into an optimizer over the same parameters."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        # A whole number is one that the optimizer counts with: 8-bit AdamW's step, where torch's is a float.
        state.setdefault(int(index), {})[name] = value.item() if value.dtype == torch.int64 else value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
