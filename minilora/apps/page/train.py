"""The tab for training: a form with the settings of train.py, and a view of a running training."""

import shlex
import signal
from collections.abc import Callable
from contextlib import suppress
from html import escape
from pathlib import Path

import gradio as gr
from PIL import Image

from ...settings.errors import UserError
from ...settings.train import TrainConfig
from . import runs
from .curve import drawing
from .form import Folders, as_shown, base_chooser, by_name, chooser, form, shows_mistakes
from .pictures import caption_rows

EVERY = 1.5  # seconds between two looks at a run


class TrainTab:
    """The tab for training.

    `first` holds the fields' first values: data, model, and the folder for outputs.  `on_start` is called before a run
    is started.  `choices` are the fields whose choices come from folders, by kind.
    """

    def __init__(self, folders: Folders, found: dict, first: dict, on_start: Callable[[], None]):
        self.folders, self.output, self.on_start = folders, first["output"], on_start
        with gr.Row():
            with gr.Column(scale=3):
                self._make_settings(found, first)
            with gr.Column(scale=4):
                self._make_buttons()
                self._make_view(found)
        self.choices = {"pictures": self.data, "bases": self.model, "runs": self.run}
        self._connect()

    # The layout.

    def _make_settings(self, found: dict, first: dict) -> None:
        with gr.Row():
            about = {"info": "folder of pictures", "elem_id": "train-data"}
            self.data = chooser("data", found["pictures"], first["data"], **about)
            self.model = base_chooser(found, first["model"], "train")
        self.fields = form(TrainConfig, without=("data", "model", "preview"), first=("sample_prompt", "sample_every"))
        self.fields |= {"data": self.data, "model": self.model}
        self.suggested = [self.fields[name] for name in ("sample_prompt", "sample_every", "output")]
        with suppress(gr.Error):  # using an unreadable folder reports it
            for field, value in zip(self.suggested, self.suggest(first["data"], first["model"], ""), strict=True):
                field.value = value

    def _make_buttons(self) -> None:
        with gr.Row():
            self.start = gr.Button("Start", variant="primary", elem_id="start", min_width=80)
            self.go_on = gr.Button("Go on", elem_id="go-on", min_width=80)
            self.now = gr.Button("Draw now", elem_id="now", min_width=80)
            self.stop = gr.Button("Stop", elem_id="stop", min_width=80)

    def _make_view(self, found: dict) -> None:
        self.run = chooser("run", found["runs"], next(iter(found["runs"]), ""), elem_id="run")
        self.headline = gr.HTML(elem_id="headline")
        self.curve = gr.HTML(elem_id="curve")
        self.sheet = gr.Image(label="samples", interactive=False, format="png", buttons=["fullscreen"], elem_id="sheet")
        self.time = gr.Slider(1, 2, 1, step=1, label="over time", interactive=True, visible=False, buttons=[])
        with gr.Accordion("log", open=False):
            self.line = gr.Textbox(label="command line", lines=2, buttons=["copy"], elem_id="train-line")
            self.log = gr.Textbox(label="last lines", lines=12, elem_id="log")
        self.shown, self.log_of_start = gr.State(("", 0, 0)), gr.State("")

    def _connect(self) -> None:
        self.folders.follow(TrainConfig, self.fields)
        deciding = [self.data, self.model, self.fields["recipe"]]
        gr.on([field.input for field in deciding], self.suggest, deciding, self.suggested)
        started = [self.run, self.line, self.log_of_start]
        self.start.click(self.start_new, set(self.fields.values()), started)
        self.go_on.click(self.start_again, self.run, started)
        self.now.click(self.save_now, self.run)
        self.stop.click(self.end, self.run)
        quiet = {"show_progress": "hidden", "concurrency_limit": 4}
        told = [self.run, self.time, self.shown, self.log_of_start]
        view = [self.headline, self.curve, self.sheet, self.time, self.log, self.shown]
        gr.on([gr.Timer(EVERY).tick, self.run.change], self.watch, told, view, **quiet)
        self.time.input(self.turn_to, [self.run, self.time], self.sheet, trigger_mode="always_last", **quiet)

    # The actions.

    @shows_mistakes
    def suggest(self, data: str, model: str, recipe: str) -> tuple[str, str, str]:
        """Suggest a prompt to draw during training (the first caption), how often (8 times), and an output folder."""
        known = self.folders.known({"data": data, "model": model, "recipe": recipe})
        prompt = next((caption for _, caption in caption_rows(data) if caption), "")
        every = str(TrainConfig.following(known)["steps"] // 8) if prompt else ""
        return prompt, every, suggested_output(self.output, data)

    @shows_mistakes
    def start_new(self, values: dict):
        given = by_name(self.fields, values)
        given["output"] = given["output"] or suggested_output(self.output, given["data"] or "")
        return self._begin(self.folders.words(TrainConfig, given))

    @shows_mistakes
    def start_again(self, name: str):
        settings = self._chosen(name) / "config.json"
        if not settings.exists():
            raise UserError(f"{name}: the run has not begun yet, so it cannot continue; press Start")
        return self._begin(["--config", str(settings), "--resume"])

    @shows_mistakes
    def save_now(self, name: str):
        runs.tell(self._chosen(name), signal.SIGUSR1)
        gr.Info("The run saves and draws after its step.", duration=5)

    @shows_mistakes
    def end(self, name: str):
        runs.tell(self._chosen(name), signal.SIGTERM)
        gr.Info("The run saves after its step, and stops.", duration=5)

    def watch(self, name: str, at: int, before: tuple[str, int, int], log_of_start: str):
        """Show the state of a run; `before` says what was shown last: the run, its step, the number of its sheets."""
        if not name or self.folders.problem(name, "run"):
            return [gr.skip()] * 6
        seen = runs.look(Path(name))
        shown = name, seen.step, len(seen.sheets)
        curves = {"training": seen.loss, "validation": seen.validation}
        lines = gr.skip() if shown[:2] == before[:2] else drawing(curves, seen.steps)
        picture = slider = gr.skip()
        if shown[::2] != before[::2]:
            last = max(1, len(seen.sheets))
            slider = gr.update(maximum=max(2, last), visible=last > 1)
            if name != before[0] or at >= before[2]:  # follow the run, unless the slider was moved back
                picture = Image.open(seen.sheets[-1]) if seen.sheets else None
                slider = gr.update(maximum=max(2, last), visible=last > 1, value=last)
        return headline_of(seen, runs.refused(Path(name), log_of_start)), lines, picture, slider, seen.log, shown

    @shows_mistakes
    def turn_to(self, name: str, at: int):
        sheets = runs.look(self._chosen(name)).sheets
        return Image.open(sheets[min(at, len(sheets)) - 1]) if sheets else None

    def _begin(self, words: list[str]):
        config = self.folders.read(TrainConfig, words)
        self.on_start()
        written = runs.start(words, Path(config.output))
        here = as_shown(Path(config.output).resolve())
        others = [path for path in found_runs(self.output) if path != here]
        return gr.update(choices=[here, *others], value=here), shlex.join(["python", "train.py", *words]), str(written)

    def _chosen(self, name: str) -> Path:
        if not name:
            raise UserError('no run is chosen: press Start, or choose one in the field "run"')
        return self.folders.use(name, "run")


def found_runs(output: str) -> list[str]:
    return [as_shown(path.resolve()) for path in runs.all_in(Path(output))]


def suggested_output(output: str, data: str) -> str:
    return str(Path(output) / Path(TrainConfig.following({"data": (data,)})["output"]).name)


def headline_of(seen: runs.Seen, refused: str) -> str:
    """Return a run's progress as HTML; `refused` is the error of a start in the folder of a running one."""
    told = [f"<p><b>{escape(str(seen))}</b></p>"] + ([f"<p><b>{escape(refused)}</b></p>"] if refused else [])
    share = f'<div style="width: {100 * seen.step / seen.steps:.1f}%"></div>' if seen.steps else ""
    return "".join(told) + f'<div class="bar">{share}</div>'
