"""Runs that are killed, and output folders that are taken, read-only, gone or full: nothing is lost, and it is said."""

import os
import pty
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from helpers import ROOT

from minilora.files.read import FILE_NAME
from minilora.run.checkpoint import OutputLock
from minilora.run.objective import Denoising
from minilora.settings import command_line as commands
from minilora.settings.errors import UserError
from minilora.settings.train import TrainConfig
from minilora.training import train

# train.py, but it waits before the given checkpoint is flushed to the disk, and says that it does.
PAUSING = """
import os, time
from minilora.settings.command_line import train
fsync = os.fsync
def pausing(descriptor):
    if {name!r} in os.readlink(f"/proc/self/fd/{{descriptor}}"):
        print("writing", flush=True)
        time.sleep(600)
    fsync(descriptor)
os.fsync = pausing
train()
"""


@pytest.fixture
def words(pictures, tmp_path, tiny_base):
    """What gives the words of a run of 30 steps into a folder, with a checkpoint after every third."""

    def words(output: Path, *more: str) -> list[str]:
        text = f"--data {pictures} --model {tiny_base} --output {output} --cache {tmp_path / 'cache'}"
        text += " --steps 30 --checkpoint-every 3 --batch-size 2 --rank 2"
        return [*text.split(), *more]

    return words


@pytest.fixture
def train_here(monkeypatch):
    """What runs train.py's command in this process and returns its exit code."""

    def train_here(words: list[str], objective=None) -> int:
        monkeypatch.setattr("sys.argv", ["train.py", *words])
        try:
            commands.run(TrainConfig, partial(train, objective=objective), "")
        except SystemExit as end:
            return end.code
        return 0

    return train_here


def begin(words: list[str], *program: str) -> subprocess.Popen:
    """Start a run in a process of its own and wait until it trains; its standard output stays open."""
    command = [sys.executable, *(program or ["train.py"]), *words]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    wait_for(process, "batch")
    return process


def wait_for(process: subprocess.Popen, beginning: str) -> None:
    assert any(line.startswith(beginning) for line in process.stdout)


def kill(process: subprocess.Popen) -> None:
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def checkpoints(output: Path) -> list[str]:
    return sorted(path.name for path in (output / "checkpoints").iterdir())


def kill_at_a_random_moment(words: list[str], draw: random.Random) -> bool:
    """Go on with a run and kill it somewhere in the second that it takes; return whether it was done before that."""
    process = begin(words)
    time.sleep(draw.uniform(0, 1))
    process.kill()
    process.communicate()
    return process.returncode == 0


def test_a_run_that_is_killed_in_a_write_and_anywhere_else_gives_the_same_bytes(words, tmp_path, train_here, capfd):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert train_here(words(whole)) == 0
    process = begin(words(killed), "-c", PAUSING.format(name="step-00000009"))
    wait_for(process, "writing")
    assert [name.split(".")[1] for name in checkpoints(killed)] == ["step-00000009", "safetensors"]  # .part and whole

    # While it lives, no other run may write there; once it is dead, nothing is in the way.
    capfd.readouterr()
    assert train_here(words(killed, "--resume")) == 2
    assert (
        capfd.readouterr().err
        == f"error: --output {killed}: another run writes there; wait for it, or choose another folder\n"
    )
    kill(process)
    assert not (killed / FILE_NAME).exists()
    assert train_here(words(killed)) == 2
    assert "step-00000006.safetensors; continue it with --resume" in capfd.readouterr().err

    kill_at_a_random_moment(words(killed, "--resume"), random.Random(0))
    assert train_here(words(killed, "--resume")) == 0
    assert (killed / FILE_NAME).read_bytes() == (whole / FILE_NAME).read_bytes()
    assert not list(killed.rglob("*.part"))  # what was cut off in the middle of a write is cleared away


def test_a_terminal_that_is_closed_saves_and_loses_nothing(words, tmp_path, train_here):
    whole, closed = tmp_path / "whole", tmp_path / "closed"
    assert train_here(words(whole, "--steps", "100", "--checkpoint-every", "100")) == 0
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whatever the tests run in
        os.chdir(ROOT)
        more = ["--steps", "100", "--checkpoint-every", "100"]
        os.execv(sys.executable, [sys.executable, "train.py", *words(closed, *more)])
    said = b""
    while b"batch   " not in said:
        said += os.read(terminal, 1000)
    time.sleep(0.3)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 128 + signal.SIGHUP
    [saved] = checkpoints(closed)
    assert saved < "step-00000100"
    assert train_here(words(closed, "--steps", "100", "--checkpoint-every", "100", "--resume")) == 0
    assert (closed / FILE_NAME).read_bytes() == (whole / FILE_NAME).read_bytes()


def test_two_runs_may_fill_the_cache_at_once(words, tmp_path):
    outputs = [tmp_path / "one", tmp_path / "two"]
    command = [sys.executable, "train.py"]
    both = [subprocess.Popen([*command, *words(output)], cwd=ROOT, stderr=subprocess.DEVNULL) for output in outputs]
    assert [process.wait() for process in both] == [0, 0]
    one, two = ((output / FILE_NAME).read_bytes() for output in outputs)
    assert one == two
    assert not list((tmp_path / "cache").rglob("*.part"))


@pytest.mark.slow
def test_twenty_kills_change_nothing(words, tmp_path, train_here):
    whole, killed, draw = tmp_path / "whole", tmp_path / "killed", random.Random(1)
    assert train_here(words(whole)) == 0
    kills = 0
    while kills < 20:
        if kill_at_a_random_moment(words(killed, "--resume"), draw):
            assert (killed / FILE_NAME).read_bytes() == (whole / FILE_NAME).read_bytes()
            shutil.rmtree(killed)
        else:
            kills += 1
    assert train_here(words(killed, "--resume")) == 0
    assert (killed / FILE_NAME).read_bytes() == (whole / FILE_NAME).read_bytes()


# ------------------------------------------------------------------------------- the output folder


class Doing(Denoising):
    """The ordinary objective, which at its seventh step does something to the world."""

    def __init__(self, work):
        self.work, self.steps = work, 0

    def name(self) -> str:
        return "Denoising"

    def loss(self, *args):
        self.steps += 1
        if self.steps == 7:
            self.work()
        return super().loss(*args)


@pytest.mark.parametrize("how", ["deleted", "moved"])
def test_an_output_folder_that_vanishes_is_one_line_and_does_not_come_back(words, tmp_path, train_here, capfd, how):
    output = tmp_path / "out"
    away = partial(shutil.rmtree, output) if how == "deleted" else partial(output.rename, tmp_path / "moved")
    assert train_here(words(output), Doing(away)) == 2
    [_, message] = capfd.readouterr().err.split("error: ")
    assert message == f"--output {output}: the folder was deleted or moved while the run wrote to it\n"
    assert not output.exists()


def test_a_folder_has_one_holder_and_nothing_of_the_lock_stays(tmp_path):
    output, first, second = tmp_path / "out", OutputLock(tmp_path / "out"), OutputLock(tmp_path / "out")
    with first:
        with pytest.raises(UserError, match=f"--output {output}: another run writes there"):
            second.__enter__()
        first.refuse_if_gone()
    assert not output.exists()  # of a run that never began
    first.__enter__()
    output.rename(tmp_path / "moved")
    with second:  # in a new folder of that name
        with pytest.raises(UserError, match="the folder was deleted or moved"):
            first.refuse_if_gone()
        first.__exit__()
        second.refuse_if_gone()
        with pytest.raises(UserError, match="another run writes there"):
            OutputLock(output).__enter__()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, of a megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a file system cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(disk: Path) -> None:
    with open(disk / "filler", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free)


def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(words, small_disk, tmp_path, train_here, capfd):
    whole, output = tmp_path / "whole", small_disk / "out"
    assert train_here(words(whole)) == 0
    capfd.readouterr()
    assert train_here(words(output), Doing(partial(fill, small_disk))) == 2
    err = capfd.readouterr().err
    assert "Traceback" not in err
    [_, message] = err.split("error: ")
    assert message.count("\n") == 1
    assert "No space left on device" in message
    assert checkpoints(output) == ["step-00000006.safetensors"]
    assert train_here(words(output, "--resume")) == 2  # still
    assert "No space left on device" in capfd.readouterr().err
    (small_disk / "filler").unlink()
    assert train_here(words(output, "--resume")) == 0
    assert (output / FILE_NAME).read_bytes() == (whole / FILE_NAME).read_bytes()


def test_a_full_cache_is_one_line_and_leaves_no_half_file(words, small_disk, tmp_path, train_here, capfd):
    whole, output, cache = tmp_path / "whole", tmp_path / "out", small_disk / "cache"
    fill(small_disk)
    assert train_here(words(output, "--cache", str(cache))) == 2
    err = capfd.readouterr().err
    assert "Traceback" not in err
    [_, message] = err.split("error: ")
    assert message.count("\n") == 1
    assert "No space left on device" in message
    assert not [path for path in cache.rglob("*") if path.is_file()]
    assert not output.exists()
    (small_disk / "filler").unlink()
    assert train_here(words(output, "--cache", str(cache))) == 0
    assert train_here(words(whole)) == 0
    assert (output / FILE_NAME).read_bytes() == (whole / FILE_NAME).read_bytes()


def test_a_disk_that_is_full_at_the_end_leaves_no_half_file(words, small_disk, tmp_path, train_here, capfd):
    output = small_disk / "out"
    last = Doing(partial(fill, small_disk))
    last.steps = -23  # the seventh is then the last
    assert train_here(words(output, "--checkpoint-every", "29"), last) == 2
    assert "No space left on device" in capfd.readouterr().err
    assert not (output / FILE_NAME).exists()
    assert checkpoints(output) == ["step-00000029.safetensors"]


def test_a_read_only_folder_is_one_line(words, small_disk, train_here, capfd):
    output = small_disk / "out"
    output.mkdir()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert train_here(words(output)) == 2
    assert capfd.readouterr().err == f"error: --output {output}: nothing can be written there (Read-only file system)\n"
