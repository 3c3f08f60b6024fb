"""What a run saves, and how it resumes from there as if it had never stopped."""

from functools import partial
from pathlib import Path

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


def start(run: Run) -> int:
    """Prepare the output folder for a new run; return the number of finished steps, 0."""
    if run.ranks.is_main:
        checkpoint.begin(run.output)
    return 0


def resume(run: Run) -> int:
    """Load the newest checkpoint, if there is one; return the number of finished steps."""

    def load() -> checkpoint.State | None:
        checkpoint.take_up(run.output)
        try:
            return checkpoint.load_newest_checkpoint(run.output, partial(differences, run))
        except ValueError as error:
            raise UserError(f"--resume: {error}") from error

    state = decided_by_main(load)
    if state is None:
        run.ranks.say(f"note: --resume found no checkpoint in {run.output}; starting from the beginning")
        return start(run)
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
    return state.step
