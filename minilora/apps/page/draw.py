"""The tab for drawing: one slider for each LoRA; moving it redraws the picture.

The base and the LoRAs stay in memory.  A slider changes only the strengths at which the LoRAs are merged.
"""

import gc
import math
import shlex
import threading
from contextlib import suppress
from pathlib import Path

import gradio as gr
import torch
from PIL import Image

from ...data.sheet import save_picture
from ...models.base import Base
from ...sampling import TOGETHER, draw_all, load
from ...settings.base import HOW
from ...settings.errors import UserError
from ...settings.sample import SampleConfig
from ...settings.shared import path_and_number
from .form import Folders, base_chooser, by_name, form, shows_mistakes
from .pictures import caption_rows

LORAS = 6  # number of sliders
GRID = "0,0.25,0.5,0.75,1"
LOADED = (*HOW, "precision", "allow_unmatched")


class Easel:
    """A base with LoRAs that stays in memory from one picture to the next; one picture is drawn at a time."""

    def __init__(self) -> None:
        self.lock, self.cancelled = threading.Lock(), False
        self.loaded: tuple | None = None
        self.base: Base | None = None

    def draw(self, config: SampleConfig, progress=None) -> Image.Image:
        """Return the picture or sheet that sample.py draws with these settings; UserError if it was cancelled."""
        with self.lock:
            self.cancelled, done = False, 0
            loras = [path_and_number(text) for text in config.lora]
            wanted = [getattr(config, name) for name in LOADED], [(path, _written(Path(path))) for path, _ in loras]
            if wanted != self.loaded:
                self.free()
                self.base, _ = load(config)
                self.loaded = wanted
            passes = max(1, len(config.strengths)) * math.ceil(len(config.prompt) * config.count / TOGETHER)
            passes = len(config.grid) ** 2 or passes

            def on_step() -> None:
                nonlocal done
                done += 1
                if self.cancelled:
                    raise UserError("the drawing was cancelled")
                if progress:
                    progress((done, config.steps * passes), unit="steps")

            return draw_all(self.base, {f"lora{n}": s for n, (_, s) in enumerate(loras)}, config, on_step)[0]

    def free(self) -> None:
        """Free the memory, also that of a GPU."""
        self.base = self.loaded = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def cancel(self) -> None:
        self.cancelled = True


def _written(path: Path) -> float:
    """Return when a LoRA was last written, so that a retrained one is loaded again."""
    files = [path, *path.glob("*.safetensors")] if path.exists() else []
    return max((file.stat().st_mtime for file in files), default=0.0)


def sliders(found: list[str], tab: str) -> tuple[gr.Dropdown, list[gr.Slider]]:
    """Make a field to choose LoRAs, and a slider for the strength of each chosen one."""
    several = {"multiselect": True, "allow_custom_value": True, "max_choices": LORAS}
    loras = gr.Dropdown(found, value=[], label="LoRAs", elem_id=f"{tab}-loras", **several)
    strengths = [
        gr.Slider(-1, 2, 1, step=0.01, label="strength", visible=False, buttons=[], elem_id=f"{tab}-strength-{number}")
        for number in range(LORAS)
    ]

    before = gr.State([])

    def show(chosen: list[str], before: list[str], *values: float):
        """Show a slider for each chosen LoRA; each keeps its strength when another one is removed."""
        kept = dict(zip(before, values, strict=False))
        shown = [gr.update(visible=True, label=name, value=kept.get(name, 1)) for name in chosen[:LORAS]]
        return [chosen, *shown, *[gr.update(visible=False)] * (LORAS - len(shown))]

    loras.change(show, [loras, before, *strengths], [before, *strengths], show_progress="hidden")
    return loras, strengths


def with_strengths(chosen: list[str] | None, strengths: list[float]) -> list[str]:
    """Return LoRAs as the commands take them, with a colon and the strength if that is not 1."""
    pairs = zip(chosen or [], strengths, strict=False)
    return [path if strength == 1 else f"{path}:{strength:g}" for path, strength in pairs]


class DrawTab:
    """The tab for drawing; `choices` are the fields whose choices come from folders, by kind."""

    def __init__(self, folders: Folders, found: dict, first: dict, easel: Easel):
        self.folders, self.drawn, self.easel = folders, Path(first["output"]) / "drawn", easel
        with gr.Row():
            with gr.Column(scale=3):
                self.loras, self.strengths = sliders(found["loras"], "draw")
                self.model = base_chooser(found, first["model"], "draw")
                without = ("prompt", "model", "lora", "strengths", "grid", "output", "compile", "motion", "frames")
                self.fields = form(SampleConfig, without=without)
            with gr.Column(scale=4):
                self._make_view()
        with suppress(UserError):  # using an unreadable folder reports it
            self.prompt.value = caption_rows(first["data"])[0][1]
        self.fields |= {"model": self.model, "prompt": self.prompt}
        self.choices = {"bases": self.model, "loras": self.loras}
        self._connect()

    def _make_view(self) -> None:
        with gr.Row(equal_height=True):
            self.prompt = gr.Textbox(label="prompt", lines=1, scale=4, elem_id="draw-prompt")
            self.draw = gr.Button("Draw", variant="primary", elem_id="draw", min_width=80)
        large = {"height": 520, "buttons": ["fullscreen"]}
        self.picture = gr.Image(label="picture", interactive=False, format="png", elem_id="picture", **large)
        with gr.Row():
            self.save = gr.Button("Save", elem_id="save", min_width=80)
            self.grid = gr.Button("Grid of two LoRAs", elem_id="grid", min_width=80)
            self.cancel = gr.Button("Cancel", min_width=80)
        self.line = gr.Textbox(label="the same from a terminal", lines=2, buttons=["copy"], elem_id="draw-line")
        self.last = gr.State(None)

    def _connect(self) -> None:
        self.folders.follow(SampleConfig, self.fields)
        given, shown = {*self.fields.values(), self.loras, *self.strengths}, [self.picture, self.line, self.last]
        one_at_a_time = {"concurrency_id": "draw", "concurrency_limit": 1}
        self.draw.click(self.draw_one, given, shown, show_progress_on=self.picture, **one_at_a_time)
        self.grid.click(self.draw_grid, given, shown, show_progress_on=self.picture, **one_at_a_time)
        moved = {"show_progress": "hidden", "trigger_mode": "always_last"}
        for slider in self.strengths:
            slider.input(self.draw_one, given, shown, **moved, **one_at_a_time)
        self.save.click(self.keep, self.last)
        self.cancel.click(self.easel.cancel, queue=False)

    @shows_mistakes
    def draw_one(self, values: dict, progress=gr.Progress()):  # noqa: B008
        return self._draw(values, progress)

    @shows_mistakes
    def draw_grid(self, values: dict, progress=gr.Progress()):  # noqa: B008
        return self._draw(values, progress, "--grid", GRID)

    @shows_mistakes
    def keep(self, last: tuple[Image.Image, str] | None):
        if last is None:
            raise UserError("nothing has been drawn yet")
        picture, path = last
        save_picture(picture, Path(path))
        gr.Info(f"wrote {path}", duration=5)

    def _draw(self, values: dict, progress, *more: str):
        given = by_name(self.fields, values)
        given["lora"] = with_strengths(values[self.loras], [values[slider] for slider in self.strengths])
        words = [*self.folders.words(SampleConfig, given), "--output", str(_next(self.drawn)), *more]
        config = self.folders.read(SampleConfig, words)
        picture = self.easel.draw(config, progress)
        return picture, shlex.join(["python", "sample.py", *words]), (picture, config.output)


def _next(folder: Path) -> Path:
    """Return a name for the next picture in a folder."""
    numbers = [int(path.stem) for path in folder.glob("*.png") if path.stem.isdecimal()]
    return folder / f"{max(numbers, default=0) + 1:04d}.png"
