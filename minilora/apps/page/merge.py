"""The tab for merging: a base, LoRAs with strengths, the report and the file.

The command runs in a separate process.  Cancelling sends it Ctrl-C, which leaves nothing half-written.
"""

import shlex
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import gradio as gr

from ...settings.errors import UserError
from ...settings.merge import MergeConfig
from ...settings.setting import BUNDLED
from . import runs
from .draw import sliders, with_strengths
from .form import Folders, as_shown, base_chooser, by_name, form, shows_mistakes, words_of

# Settings that the tab leaves out: those of the command's other uses.
OTHER_WORK = ("loras_only", "extract", "restore", "rank", "energy", "base", "dialect")


class Merging:
    """The running merge; there is one at a time."""

    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None

    def run(self, words: list[str], config: MergeConfig, progress) -> str:
        """Merge, and return the report; UserError with the command's line if it fails or was cancelled."""
        output, base = Path(config.output), Path(config.files[0])
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
        self.process = subprocess.Popen(runs.command("merge", words), text=True, start_new_session=True, **pipes)
        part, whole = output.with_name(f".{output.name}.{self.process.pid}.part"), _bytes(base)
        said = None
        while said is None:
            progress(min(0.99, _bytes(part) / whole) if whole else 0, desc="merging")
            with suppress(subprocess.TimeoutExpired):
                said, wrong = self.process.communicate(timeout=0.1)
        if self.process.returncode in (130, -signal.SIGINT):
            raise UserError("the merge was cancelled; nothing was written")
        if self.process.returncode:
            raise UserError((wrong.strip().splitlines() or ["the merge failed"])[-1].removeprefix("error: "))
        return said.strip()

    def cancel(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)


def _bytes(path: Path) -> int:
    """Return the size of a file, or of the files that a merge writes into a folder; 0 if there is none."""
    try:
        files = path.rglob("*.safetensors") if path.is_dir() else [path]
        return sum(file.stat().st_size for file in files)
    except OSError:
        return 0


class MergeTab:
    """The tab for merging; `choices` are the fields whose choices come from folders, by kind."""

    def __init__(self, folders: Folders, found: dict, first: dict):
        self.folders, self.merging = folders, Merging()
        with gr.Row():
            with gr.Column(scale=3):
                self.base = base_chooser(found, first["model"], "merge")
                self.loras, self.strengths = sliders(found["loras"], "merge")
                self.fields = form(MergeConfig, without=("files", *OTHER_WORK))
            with gr.Column(scale=4):
                with gr.Row():
                    start = gr.Button("Merge", variant="primary", elem_id="merge", min_width=80)
                    cancel = gr.Button("Cancel", min_width=80)
                report = gr.Textbox(label="report", lines=12, elem_id="report")
                line = gr.Textbox(label="the same from a terminal", lines=2, buttons=["copy"])
        self.fields["output"].value = str(Path(first["output"]) / "merged")
        self.choices = {"bases": self.base, "loras": self.loras}
        given = {self.base, self.loras, *self.strengths, *self.fields.values()}
        start.click(self.merge, given, [report, line], show_progress_on=report, concurrency_limit=1)
        cancel.click(self.merging.cancel, queue=False)

    @shows_mistakes
    def merge(self, values: dict, progress=gr.Progress()):  # noqa: B008
        loras = with_strengths(values[self.loras], [values[slider] for slider in self.strengths])
        if not loras:
            raise UserError("no LoRA is chosen: choose one or more to fold into the base")
        files = [values[self.base] or as_shown(BUNDLED), *loras]
        words = [*files, *words_of(MergeConfig, by_name(self.fields, values))]
        config = self.folders.read(MergeConfig, words)
        return self.merging.run(words, config, progress), shlex.join(["python", "-m", "minilora.merge", *words])
