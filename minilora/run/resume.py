"""What a run saves, and how it resumes from there as if it had never stopped.

Random draws depend on the position, so no generator state is needed.
"""

from functools import partial
from pathlib import Path

from ..files.tensors import write_whole
from ..settings.errors import UserError
from . import checkpoint
from .checkpoint import UNFINISHED, Tensors, under
from .differences import differences
from .ranks import decided_by_main
from .setup import Run
from .trained import load_trained_state, trained_state


def save_state(run: Run, step: int) -> Path:
    """Write a checkpoint after `step` steps and return its path."""
    losses, lowest = run.validation.state() if run.validation else ({}, {})
    parts = {
        "lora": trained_state(run.network),  # with --full it is the U-Net
        "optimizer": checkpoint.optimizer_tensors(run.optimizer),
        "average": run.average,
        "objective": run.objective.state(),
        "lowest": lowest,  # what was trained where the validation loss is lowest
    }
    about = {"step": step, "scaler": run.scaler.state_dict(), "validation": losses}
    about |= {"fingerprint": run.identity, "pictures": run.examples.contents()}
    if run.ranks.is_main:
        checkpoint.save_checkpoint(run.output, parts, about, run.config.checkpoints_kept)
    return checkpoint.path_of(run.output, step)


def begin(run: Run) -> int:
    """Prepare the output folder and, with --resume, load the newest checkpoint; return the number of finished steps."""
    newest = partial(checkpoint.load_newest_checkpoint, run.output, partial(differences, run))
    found = decided_by_main(newest) if run.config.resume else None
    if found:
        _load(run, *found)
    elif run.config.resume:
        run.ranks.say(f"note: --resume found no checkpoint in {run.output}; starting from the beginning")
    if run.ranks.is_main:
        if not found:
            checkpoint.make_room(run.output)
        write_whole(run.output / "config.json", run.config.to_json().encode())
    return found[0]["step"] if found else 0


def _load(run: Run, about: dict, tensors: Tensors) -> None:
    step = about["step"]
    if step > run.config.steps:
        raise UserError(f"--resume: the checkpoint has {step} steps done, more than --steps {run.config.steps}")
    load_trained_state(run.network, under(tensors, "lora."))
    checkpoint.load_optimizer_tensors(run.optimizer, under(tensors, "optimizer."))
    for part, own in (("average", run.average), ("objective", run.objective.state())):
        for name, tensor in own.items():
            tensor.copy_(tensors[f"{part}.{name}"])
    run.scaler.load_state_dict(about["scaler"])
    if run.ranks.is_main:
        (run.output / UNFINISHED).mkdir(exist_ok=True)
    if run.validation:
        run.validation.load(about.get("validation", {}), under(tensors, "lowest."))  # older checkpoints have none
    run.ranks.say(f"resume     after step {step}")
