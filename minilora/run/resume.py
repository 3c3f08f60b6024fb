"""What a run saves, and how it resumes from there as if it had never stopped."""

from functools import partial
from pathlib import Path

from ..files.tensors import write_whole
from ..settings.errors import UserError
from . import checkpoint
from .differences import differences
from .ranks import decided_by_main
from .setup import Run
from .trained import load_trained_state, trained_state


def save_state(run: Run, step: int) -> Path:
    """Write a checkpoint after `step` steps and return its path."""
    trained, optimizer = trained_state(run.network), checkpoint.optimizer_tensors(run.optimizer)
    kept = run.average, run.objective.state(), run.scaler.state_dict()
    state = checkpoint.State(step, trained, optimizer, *kept, *(run.validation.state() if run.validation else ({}, {})))
    if run.ranks.is_main:
        about = {"fingerprint": run.identity, "pictures": run.examples.contents()}
        checkpoint.save_checkpoint(run.output, state, about, run.config.checkpoints_kept)
    return checkpoint.path_of(run.output, step)


def begin(run: Run) -> int:
    """Prepare the output folder and, with --resume, load the newest checkpoint; return the number of finished steps."""
    newest = partial(checkpoint.load_newest_checkpoint, run.output, partial(differences, run))
    state = decided_by_main(newest) if run.config.resume else None
    if state:
        _load(run, state)
    elif run.config.resume:
        run.ranks.say(f"note: --resume found no checkpoint in {run.output}; starting from the beginning")
    if run.ranks.is_main:
        if not state:
            checkpoint.begin(run.output)
        write_whole(run.output / "config.json", run.config.to_json().encode())
    return state.step if state else 0


def _load(run: Run, state: checkpoint.State) -> None:
    if state.step > run.config.steps:
        raise UserError(f"--resume: the checkpoint has {state.step} steps done, more than --steps {run.config.steps}")
    load_trained_state(run.network, state.trained)
    checkpoint.load_optimizer_tensors(run.optimizer, state.optimizer)
    for tensors, saved in ((run.average, state.average), (run.objective.state(), state.objective)):
        for key, tensor in tensors.items():
            tensor.copy_(saved[key])
    run.scaler.load_state_dict(state.scaler)
    if run.ranks.is_main:
        (run.output / checkpoint.UNFINISHED).mkdir(exist_ok=True)
    if run.validation:
        run.validation.load(state.validation, state.lowest)
    run.ranks.say(f"resume     after step {state.step}")
