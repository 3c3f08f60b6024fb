"""The room for training: a form of the settings of train.py, and what can be seen of a run while it goes on."""

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
from .form import Folders, as_shown, base_chooser, by_name, chooser, form, telling
from .pictures import caption_rows

EVERY = 1.5  # seconds between two looks at a run


def train_room(folders: Folders, found: dict, first: dict, on_start: Callable[[], None]) -> dict[str, gr.Dropdown]:
    """Build the room; return the fields whose choices are found in folders, by what they hold.

    `first` is what stands in the fields at first: data, model, and the folder of outputs.  `on_start` is called before
    a run is started.
    """
    with gr.Row():
        with gr.Column(scale=3):
            with gr.Row():
                about = {"info": "folder of pictures", "elem_id": "train-data"}
                data = chooser("data", found["pictures"], first["data"], **about)
                model = base_chooser(found, first["model"], "train")
            fields = form(TrainConfig, without=("data", "model", "preview"), first=("sample_prompt", "sample_every"))
            fields |= {"data": data, "model": model}
            with suppress(UserError):  # the folder may lack a caption, and is told of when it is used
                fields["output"].value = suggested_output(first["output"], first["data"])
                prompt, every = suggested_samples(first["data"], {"model": first["model"] or None})
                fields["sample_prompt"].value, fields["sample_every"].value = prompt, every
        with gr.Column(scale=4):
            with gr.Row():
                start = gr.Button("Start", variant="primary", elem_id="start", min_width=80)
                go_on = gr.Button("Go on", elem_id="go-on", min_width=80)
                now = gr.Button("Draw now", elem_id="now", min_width=80)
                stop = gr.Button("Stop", elem_id="stop", min_width=80)
            run = chooser("run", found["runs"], next(iter(found["runs"]), ""), elem_id="run")
            headline = gr.HTML(elem_id="headline")
            curve = gr.HTML(elem_id="curve")
            sheet = gr.Image(label="samples", interactive=False, format="png", buttons=["fullscreen"], elem_id="sheet")
            time = gr.Slider(1, 2, 1, step=1, label="over time", interactive=True, visible=False, buttons=[])
            with gr.Accordion("log", open=False):
                line = gr.Textbox(label="command line", lines=2, buttons=["copy"], elem_id="train-line")
                log = gr.Textbox(label="last lines", lines=12, elem_id="log")
    before, log_of_start = gr.State(("", 0, 0)), gr.State("")

    def begin(words: list[str]):
        config = folders.read(TrainConfig, words)
        on_start()
        written = runs.start(words, Path(config.output))
        here = as_shown(Path(config.output).resolve())
        others = [path for path in found_runs(first["output"]) if path != here]
        return gr.update(choices=[here, *others], value=here), shlex.join(["python", "train.py", *words]), str(written)

    @telling
    def start_new(values: dict):
        given = by_name(fields, values)
        given["output"] = given["output"] or suggested_output(first["output"], given["data"] or "")
        return begin(folders.words(TrainConfig, given))

    @telling
    def start_again(name: str):
        settings = _chosen(folders, name) / "config.json"
        if not settings.exists():
            raise UserError(f"{name}: the run has not begun yet, and cannot go on; press Start")
        return begin(["--config", str(settings), "--resume"])

    @telling
    def end(name: str):
        runs.tell(_chosen(folders, name), signal.SIGTERM)
        gr.Info("The run saves after its step, and stops.", duration=5)

    @telling
    def save_now(name: str):
        runs.tell(_chosen(folders, name), signal.SIGUSR1)
        gr.Info("The run saves and draws after its step.", duration=5)

    @telling
    def fill(data: str, model: str, recipe: str):
        known = folders.known({"data": data, "model": model, "recipe": recipe})
        prompt, every = suggested_samples(data, known)
        return prompt, every, suggested_output(first["output"], data)

    def watch(name: str, at: int, before: tuple[str, int, int], log_of_start: str):
        """Show what there is to see of a run; `before` is what was shown: the run, its last step, its sheets."""
        if not name or folders.problem(name, "run"):
            return [gr.skip()] * 6
        seen = runs.look(Path(name))
        shown = name, seen.step, len(seen.sheets)
        curves = {"training": seen.loss, "validation": seen.validation}
        lines = gr.skip() if shown[:2] == before[:2] else drawing(curves, seen.steps)
        picture = slider = gr.skip()
        if shown[::2] != before[::2]:
            last = max(1, len(seen.sheets))
            slider = gr.update(maximum=max(2, last), visible=last > 1)
            if name != before[0] or at >= before[2]:  # it follows the run, unless the slider was moved back
                picture = Image.open(seen.sheets[-1]) if seen.sheets else None
                slider = gr.update(maximum=max(2, last), visible=last > 1, value=last)
        return headline_of(seen, runs.refused(Path(name), log_of_start)), lines, picture, slider, seen.log, shown

    @telling
    def turn_to(name: str, at: int):
        sheets = runs.look(Path(_chosen(folders, name))).sheets
        return Image.open(sheets[min(at, len(sheets)) - 1]) if sheets else None

    folders.follow(TrainConfig, fields)
    started = [run, line, log_of_start]
    start.click(start_new, set(fields.values()), started)
    go_on.click(start_again, run, started)
    now.click(save_now, run)
    stop.click(end, run)
    suggested = [fields[name] for name in ("sample_prompt", "sample_every", "output")]
    deciding = [data, model, fields["recipe"]]
    gr.on([field.input for field in deciding], fill, deciding, suggested)
    shown = [headline, curve, sheet, time, log, before]
    quiet = {"show_progress": "hidden", "concurrency_limit": 4}
    gr.on([gr.Timer(EVERY).tick, run.change], watch, [run, time, before, log_of_start], shown, **quiet)
    time.input(turn_to, [run, time], sheet, trigger_mode="always_last", **quiet)
    return {"pictures": data, "bases": model, "runs": run}


def _chosen(folders: Folders, name: str) -> Path:
    if not name:
        raise UserError("no run is chosen")
    return folders.use(name, "run")


def found_runs(output: str) -> list[str]:
    return [as_shown(path.resolve()) for path in runs.all_in(Path(output))]


def suggested_output(output: str, data: str) -> str:
    return str(Path(output) / Path(TrainConfig.following({"data": (data,)})["output"]).name)


def suggested_samples(data: str, known: dict) -> tuple[str, str]:
    """Return what to draw during training, the first caption, and how often, so that it is eight times in all."""
    prompt = next((caption for _, caption in caption_rows(data) if caption), "")
    return prompt, str(TrainConfig.following(known)["steps"] // 8) if prompt else ""


def headline_of(seen: runs.Seen, refused: str) -> str:
    """Return in HTML how far a run is; `refused` is the line of a run that was started beside it."""
    told = [f"<p><b>{escape(str(seen))}</b></p>"] + ([f"<p><b>{escape(refused)}</b></p>"] if refused else [])
    share = f'<div style="width: {100 * seen.step / seen.steps:.1f}%"></div>' if seen.steps else ""
    return "".join(told) + f'<div class="bar">{share}</div>'
