"""Training runs as separate processes: started, stopped, and observed through the files that they write.

A run belongs to its output folder, not to the page.  It continues when the page is closed, and a page that is opened
later finds it there.  page.json in that folder identifies its process.  The run's own lock decides whether it may write
there.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tensorboard.backend.event_processing.directory_watcher import DirectoryDeletedError
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

from ...files.tensors import write_whole
from ...run.checkpoint import RESULTS, UNFINISHED
from ...settings.errors import UserError

RECORD = "page.json"
ONE_AT_A_TIME = threading.Lock()  # of the page's threads


def command(name: str, words: Sequence[str]) -> list[str]:
    """Return the command line that starts one of our commands with this Python, from any folder.

    SIGUSR1 is ignored before the first step and after the last, where it would end the process.  SIGINT works as
    Ctrl-C, even if the page was started in the background of a shell, which ignores SIGINT there.
    """
    signals = "from signal import *; signal(SIGUSR1, SIG_IGN); signal(SIGINT, default_int_handler)"
    return [sys.executable, "-c", f"{signals}; from minilora.settings.command_line import {name}; {name}()", *words]


def start(words: Sequence[str], output: Path) -> Path:
    """Start a training in a session of its own and return its log; if a run is going there, its record stays."""
    with ONE_AT_A_TIME:
        output.mkdir(parents=True, exist_ok=True)
        if not (going := is_going(output)):
            for old in output.glob("train-*.log"):
                old.unlink()
        handle, name = tempfile.mkstemp(".log", "train-", output)
        began = time.time()
        process = subprocess.Popen(
            command("train", words),
            stdin=subprocess.DEVNULL,
            stdout=handle,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that Ctrl-C in the page's terminal does not reach it
            env=os.environ | {"TQDM_MININTERVAL": "1", "PYTHONUNBUFFERED": "1"},
        )
        os.close(handle)
        if not going:
            since = 0.0 if "--resume" in words else began
            about = {"pid": process.pid, "born": _born(process.pid), "log": Path(name).name}
            write_whole(output / RECORD, json.dumps(about | {"began": began, "since": since}).encode())
    return Path(name)


def tell(output: Path, number: int) -> None:
    """Send a signal to a run: SIGTERM to save and stop, SIGUSR1 to save and draw now.

    Raises UserError if there is no run that was started from a page.
    """
    if not is_going(output):
        raise UserError(f"{output}: no run that was started from the page is running there")
    os.kill(_record(output)["pid"], number)


def is_going(output: Path) -> bool:
    about = _record(output)
    return bool(about) and about["born"] is not None and _born(about["pid"]) == about["born"]


def refused(output: Path, log: str) -> str:
    """Return the last line of the log of a start that another run in the folder refused; else ""."""
    mine = log and Path(log).resolve().parent == output.resolve() and Path(log).name != _record(output).get("log")
    return tail(Path(log), 1) if mine else ""


def _record(output: Path) -> dict:
    try:
        return json.loads((output / RECORD).read_text())
    except (OSError, ValueError):
        return {}


def _born(pid: int) -> str | None:
    """Return when a process started, to tell it from a later one with the same number; None if it has ended."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state == "Z" else rest[18]  # clock ticks; see proc(5)


def all_in(folder: Path) -> list[Path]:
    """Return the output folders of runs in a folder: those still running first, then the newest first."""
    runs = [path.parent for name in (RECORD, "config.json") for path in folder.glob(f"*/{name}")]
    return sorted(dict.fromkeys(runs), key=lambda run: (is_going(run), run.stat().st_mtime), reverse=True)


# --------------------------------------------------------------------------------- observing a run


@dataclass
class Seen:
    """The visible state of a run."""

    going: bool = False
    finished: bool = False
    from_page: bool = False
    step: int = 0
    steps: int = 0
    seconds: float | None = None  # per step
    loss: dict[int, float] = field(default_factory=dict)  # by step
    validation: dict[int, float] = field(default_factory=dict)
    sheets: list[Path] = field(default_factory=list)  # of samples, the newest last
    log: str = ""

    def __str__(self) -> str:
        last = self.log.rpartition("\n")[2]
        if not self.going:
            if "%|" in last:  # the progress bar has stopped
                last = f"ended after step {self.step}, without saving"
            nothing = "ended before its first step" if self.from_page else "not started from the page"
            return "finished" if self.finished else last or nothing
        if not self.step:
            return "starting"
        told = f"step {self.step} of {self.steps} · loss {self.loss[self.step]:.4f}"
        if self.step == self.steps:
            return f"{told} · drawing the last samples"
        if self.seconds is None:
            return told
        left = tqdm.format_interval(round(self.seconds * (self.steps - self.step))).removeprefix("0")
        return f"{told} · {self.seconds:.2g} s per step · {left} left"


_events: dict[tuple[Path, float], EventAccumulator] = {}


def look(output: Path) -> Seen:
    """Return the visible state of a run, from its output folder."""
    about = _record(output)
    seen = Seen(going=is_going(output), from_page=bool(about), log=tail(output / about.get("log", "none")))
    seen.finished = any((output / name).exists() for name in RESULTS) and not (output / UNFINISHED).exists()
    try:
        seen.steps = json.loads((output / "config.json").read_text())["steps"]
    except (OSError, ValueError, KeyError):
        return seen
    if not (output / "tensorboard").is_dir():
        return seen
    began, since = about.get("began", 0.0), about.get("since", 0.0)
    with ONE_AT_A_TIME:
        key = output.resolve(), began
        events = _events.setdefault(key, EventAccumulator(str(output / "tensorboard"), {"scalars": 0, "images": 1}))
        with suppress(DirectoryDeletedError):
            events.Reload()
        scalars = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"] if tag in ("loss", "validation")}
    seen.loss, seen.validation = (
        {event.step: event.value for event in scalars.get(tag, ()) if event.wall_time >= since}
        for tag in ("loss", "validation")
    )
    now = [event for event in scalars.get("loss", ()) if event.wall_time >= began]
    seen.step = now[-1].step if now else 0
    recent = now[-50:]
    if len(recent) > 1:
        seen.seconds = (recent[-1].wall_time - recent[0].wall_time) / (len(recent) - 1)
    samples = output / "samples"
    seen.sheets = [path for path in sorted(samples.glob("step-*.png")) if path.stat().st_mtime >= since]
    if seen.finished and not seen.going:
        seen.sheets += samples.glob("before_after.png")
    return seen


def tail(log: Path, lines: int = 20) -> str:
    """Return the last lines of a log; of a line that was overwritten, as a progress bar is, its last state."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - 16384))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    last = [re.split("\r+", line.rstrip("\r"))[-1] for line in text.split("\n")]
    return "\n".join([line for line in last if line.strip()][-lines:])
