"""Training state on disk: a checkpoint every few steps, from which a run resumes as if it had never stopped.

A new run does not touch the results of a finished run in the same folder until it has finished itself:

    make_room  checkpoints/ -> checkpoints.before/, unfinished/ is made        the old LoRA is still in its place
    running    checkpoints/ grows; results go into unfinished/
    publish    unfinished/ -> its place, over the old results; checkpoints.before/ is deleted

`--resume` loads the newest checkpoint; if the new run has none yet, `take_up` puts checkpoints.before/ back.
"""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from ..files.tensors import delete, read_checked, write_checked
from ..settings.errors import UserError
from .ranks import decided_by_main
from .trained import FULL_RESULTS, LORA_RESULTS

RESULTS = LORA_RESULTS[0], FULL_RESULTS[0]  # one of them is there if a run is finished
Tensors = dict[str, torch.Tensor]  # by name
UNFINISHED = "unfinished"  # folder of the results so far; while it exists, the run is not finished


def path_of(output: Path, step: int) -> Path:
    """Return the path of the checkpoint after `step` steps, in a run's output folder."""
    return output / "checkpoints" / f"step-{step:08d}.safetensors"


def all_in(output: Path) -> list[Path]:
    """Return the checkpoints of a run, the newest last."""
    return sorted((output / "checkpoints").glob("step-*.safetensors"))


class OutputLock:
    """Within a block, reserve an output folder for this run.

    The system locks a file in the folder, and releases it whenever and however the process ends.  Raises UserError, on
    all processes, if another run has the lock or if nothing can be written there.
    """

    def __init__(self, output: Path):
        self.output, self.file = output, output / ".lock"
        self.lock = FileLock(self.file, blocking=False)
        self.taken: os.stat_result | None = None  # the locked file; on the main process

    def __enter__(self) -> "OutputLock":
        decided_by_main(self._take)
        return self

    def _take(self) -> None:
        try:
            self.output.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.output).close()
        except OSError as error:
            raise UserError(f"--output {self.output}: nothing can be written there ({error.strerror})") from error
        try:
            self.lock.acquire()
        except Timeout as error:
            what = "another run writes there; wait for it, or choose another folder"
            raise UserError(f"--output {self.output}: {what}") from error
        except OSError as error:
            why = f"its file system has no locks ({error.strerror})"
            warning = f"warning: --output {self.output}: {why}; make sure that no other run writes there"
            print(warning, file=sys.stderr)
            self.file.touch()
        self.taken = self.file.stat()
        # Partial files of a killed run: while the folder is locked, no other run writes them.
        for inside in ("", "checkpoints", "samples", UNFINISHED):
            for left in (self.output / inside).glob(".*.[0-9]*.part"):
                if left.is_file():
                    left.unlink()

    def _is_there(self) -> bool:
        return self.file.exists() and os.path.samestat(self.file.stat(), self.taken)

    def refuse_if_gone(self) -> None:
        """Raise UserError if the folder was deleted or moved: a new one would hold half a run."""
        if self.taken and not self._is_there():
            raise UserError(f"--output {self.output}: the folder was deleted or moved while the run wrote to it")

    def __exit__(self, *error) -> None:
        if self.taken:
            with suppress(OSError):  # on Windows the lock itself removes its file
                if self._is_there():
                    self.file.unlink()
            self.lock.release()
            with suppress(OSError):
                self.output.rmdir()  # only if empty: a run that never began leaves nothing


def refuse_unfinished(output: Path) -> None:
    """Raise UserError if a run there was not finished: its checkpoints may be hours of work."""
    old = all_in(output)
    if old and ((output / UNFINISHED).exists() or not any((output / name).exists() for name in RESULTS)):
        raise UserError(
            f"{output} holds an unfinished run, {old[-1].name}; continue it with --resume, "
            "choose another --output, or delete its checkpoints"
        )


def make_room(output: Path) -> None:
    """Prepare for a new run: move a finished one's checkpoints aside; its results stay until `publish`."""
    shutil.rmtree(output / UNFINISHED, ignore_errors=True)
    if all_in(output):
        shutil.rmtree(_aside(output), ignore_errors=True)
        (output / "checkpoints").rename(_aside(output))
    (output / UNFINISHED).mkdir()


def take_up(output: Path) -> None:
    """Prepare to resume a run; if it has no checkpoint yet, the finished run before it."""
    if not all_in(output) and _aside(output).exists():
        for folder in ("checkpoints", UNFINISHED):  # an empty folder, and the results of the stopped run
            shutil.rmtree(output / folder, ignore_errors=True)
        _aside(output).rename(output / "checkpoints")


def publish(output: Path, names: Collection[str], others: Collection[str]) -> None:
    """End a run: move its results `names` into place, and delete those of the finished run before it.

    `others` are results that this run did not make.
    """
    for name in names:
        if (output / UNFINISHED / name).exists():
            if (output / name).is_dir():  # a file is replaced at once, without a moment between
                delete(output / name)
            (output / UNFINISHED / name).replace(output / name)
    for name in others:
        delete(output / name)
    for folder in (_aside(output), output / UNFINISHED):
        shutil.rmtree(folder, ignore_errors=True)


def _aside(output: Path) -> Path:
    return output / "checkpoints.before"


def save_checkpoint(output: Path, parts: dict[str, Tensors], about: dict, kept: int) -> None:
    """Write a checkpoint, with the tensors of each part and JSON values, and delete all but the newest `kept`."""
    tensors = {f"{part}.{name}": tensor.cpu() for part, some in parts.items() for name, tensor in some.items()}
    write_checked(path_of(output, about["step"]), tensors, {"minilora": json.dumps(about, sort_keys=True)})
    for old in all_in(output)[:-kept]:
        old.unlink()


def under(tensors: Tensors, prefix: str) -> Tensors:
    """Return the tensors whose names begin with `prefix`, by the rest of their names."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def load_newest_checkpoint(output: Path, differences: Callable[[dict], list[str]]) -> tuple[dict, Tensors] | None:
    """Return the JSON values and all tensors of a run's newest intact checkpoint, or None if there is none at all.

    An unreadable checkpoint is skipped with a warning.  Raises UserError if that leaves none, or if the checkpoint
    belongs to another run: `differences` lists what differs, given the run that the checkpoint names.
    """
    take_up(output)
    broken = []
    for path in reversed(all_in(output)):
        try:
            arrays, metadata = read_checked(path)
            about = json.loads(metadata["minilora"])
            break
        except (OSError, UserError, KeyError) as error:
            reason = str(error).removeprefix(f"{path}: ")
            broken.append(f"{path} is not a readable checkpoint ({reason})")
    else:
        if broken:
            raise UserError(f"--resume: {'; '.join(broken)}; delete it to start over")
        return None
    for complaint in broken:
        print(f"warning: {complaint}; resuming from {path.name}", file=sys.stderr)
    if different := differences(about):
        raise UserError(f"--resume: {path} belongs to another run: {'; '.join(different)}")
    return about, {key: torch.from_numpy(array) for key, array in arrays.items()}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> Tensors:
    """Flatten an optimizer's state into named tensors: `0.exp_avg`, `0.exp_avg_sq`, `0.step`, …

    (`state_dict` would do, but that of the 8-bit optimizer is nested for compatibility with other programs.)
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states = {i: optimizer.state[parameter] for i, parameter in enumerate(parameters) if parameter in optimizer.state}
    return {f"{i}.{name}": torch.as_tensor(value) for i, state in states.items() for name, value in state.items()}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    """Load the result of `optimizer_tensors` into an optimizer over the same parameters."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        # An integer is the step count of 8-bit AdamW, which must be a Python number; torch's AdamW has a float tensor.
        state.setdefault(int(index), {})[name] = value.item() if value.dtype == torch.int64 else value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
