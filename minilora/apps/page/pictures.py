"""The tab for pictures: a folder as training will see it, with captions to edit."""

import os
from pathlib import Path
from typing import Any

import gradio as gr

from ...data.captions import edit_captions
from ...data.folder import read_folder
from ...run.preview import look_at
from ...settings.errors import UserError
from ...settings.train import TrainConfig
from .form import Folders, chooser, shows_mistakes


class PicturesTab:
    """The tab for pictures; `choices` are the fields whose choices come from folders, by kind."""

    def __init__(self, folders: Folders, found: dict, first: dict):
        self.folders, self.base = folders, ["--model", first["model"]] if first["model"] else []
        with gr.Row(equal_height=True):
            self.folder = chooser("folder", found["pictures"], first["data"], scale=4, elem_id="pictures-folder")
            self.show = gr.Button("Show again", scale=1, elem_id="show")
        self._make_view()
        self.choices = {"pictures": self.folder}
        shown = [self.counts, self.pages, self.table, self.save]
        gr.on(None, self.look, self.folder, shown)  # when the page is opened, and when another folder is chosen
        self.show.click(self.look, self.folder, shown)
        self.save.click(self.write, [self.folder, self.table]).success(self.look, self.folder, shown)

    def _make_view(self) -> None:
        self.counts = gr.Textbox(label="in it", lines=4, visible=False, elem_id="counts")
        as_pages = {"preview": True, "selected_index": 0, "object_fit": "contain", "height": 560}
        self.pages = gr.Gallery(label="as training sees them", visible=False, buttons=["fullscreen"], **as_pages)
        columns: dict[str, Any] = {"headers": ["picture", "caption"], "datatype": ["str", "str"]}
        columns |= {"column_widths": ["25%", "75%"], "column_count": 2, "static_columns": [0]}
        columns |= {"type": "array", "wrap": True, "interactive": True, "visible": False}
        self.table = gr.Dataframe(label="captions", elem_id="captions", **columns)
        self.save = gr.Button("Save captions", visible=False, elem_id="save-captions")

    @shows_mistakes
    def look(self, name: str):
        if not name:
            return [gr.skip()] * 4
        path = self.folders.use(name, "folder")
        rows = caption_rows(str(path))
        lacking = sum(not caption for _, caption in rows)
        # Nothing is written, but the default output folder may be outside the folders of the page.
        words = ["--data", str(path), "--output", str(path), *self.base, *(["--caption="] if lacking else [])]
        preview = look_at(self.folders.read(TrainConfig, words))
        hint = f"{lacking} captions are missing: write them below and save, or give one for all in the tab Train"
        return (
            gr.update(value="\n".join([hint] * (lacking > 0) + preview.lines), visible=True),
            gr.update(value=preview.pages, visible=True, selected_index=0),
            gr.update(value=rows, visible=True),
            gr.update(visible=True),
        )

    @shows_mistakes
    def write(self, name: str, rows: list[list[str]]):
        path = self.folders.use(name or "", "folder")
        captions: dict[str, list[str]] = {picture: [] for picture, _ in caption_rows(str(path))}
        for picture, caption in rows:
            if picture in captions:  # rows added in the table have no picture
                captions[picture].append(caption)
        gr.Info(edit_captions(path, captions))


def caption_rows(folder: str) -> list[list[str]]:
    """Return the name of each picture in a folder with each of its captions; "" if it has none."""
    folder = os.path.expanduser(folder)
    if Path(folder).is_file():
        raise UserError(f"{folder}: it is a file; give a folder of pictures")
    items = read_folder(folder, TrainConfig(data=(folder,), caption=""), "folder", quiet=True)
    here = os.path.normpath(folder)
    return [[str(item.path.relative_to(here)), text] for item in items for text in item.captions]
