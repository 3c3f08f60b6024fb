"""The room for pictures: what training will see of a folder, and its captions, edited in place."""

import os
from pathlib import Path

import gradio as gr

from ...data.captions import edit_captions
from ...data.folder import read_folder
from ...run.preview import look_at
from ...settings.errors import UserError
from ...settings.train import TrainConfig
from .form import Folders, chooser, telling


def pictures_room(folders: Folders, found: dict, first: dict) -> dict[str, gr.Dropdown]:
    """Build the room; return the fields whose choices are found in folders, by what they hold."""
    with gr.Row(equal_height=True):
        folder = chooser("folder", found["pictures"], first["data"], scale=4, elem_id="pictures-folder")
        show = gr.Button("Show again", scale=1, elem_id="show")
    counts = gr.Textbox(label="in it", lines=4, visible=False, elem_id="counts")
    as_pages = {"preview": True, "selected_index": 0, "object_fit": "contain", "height": 560}
    pages = gr.Gallery(label="as training sees them", visible=False, buttons=["fullscreen"], **as_pages)
    table = gr.Dataframe(
        headers=["picture", "caption"],
        datatype=["str", "str"],
        type="array",
        column_count=2,
        static_columns=[0],
        column_widths=["25%", "75%"],
        wrap=True,
        interactive=True,
        visible=False,
        label="captions",
        elem_id="captions",
    )
    save = gr.Button("Save captions", visible=False, elem_id="save-captions")

    @telling
    def look(name: str):
        if not name:
            return [gr.skip()] * len(shown)
        path = folders.use(name, "folder")
        rows = caption_rows(str(path))
        if all(caption for _, caption in rows):
            base = ["--model", first["model"]] if first["model"] else []
            preview = look_at(folders.read(TrainConfig, ["--data", str(path), *base]))
            pictures, lines = preview.pages, preview.lines
        else:
            pictures, lines = [], ["a picture without a caption is not trained on: write one below, and save"]
        return (
            gr.update(value="\n".join(lines), visible=True),
            gr.update(value=pictures, visible=bool(pictures), selected_index=0 if pictures else None),
            gr.update(value=rows, visible=True),
            gr.update(visible=True),
        )

    @telling
    def write(name: str, rows: list[list[str]]):
        path = folders.use(name or "", "folder")
        captions: dict[str, list[str]] = {picture: [] for picture, _ in caption_rows(str(path))}
        for picture, caption in rows:
            if picture in captions:  # rows can be added in a table; there is no picture for those
                captions[picture].append(caption)
        gr.Info(edit_captions(path, captions))

    shown = [counts, pages, table, save]
    gr.on(None, look, folder, shown)  # when the page is opened, and when another folder is chosen
    show.click(look, folder, shown)
    save.click(write, [folder, table]).success(look, folder, shown)
    return {"pictures": folder}


def caption_rows(folder: str) -> list[list[str]]:
    """Return the name of each picture of a folder with each of its captions; "" where there is none."""
    if Path(folder).is_file():
        raise UserError(f"{folder}: it is a file; a folder of pictures is needed")
    items = read_folder(folder, TrainConfig(data=(folder,), caption=""), "folder", quiet=True)
    here = os.path.normpath(folder)
    return [[str(item.path.relative_to(here)), text] for item in items for text in item.captions]
