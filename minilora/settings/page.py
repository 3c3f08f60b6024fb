"""The settings of minilora.apps.page."""

from dataclasses import dataclass

from . import shared
from .setting import Settings, Within
from .shared import of_data, of_output


@dataclass(frozen=True)
class PageConfig(Settings):
    """Every setting of minilora.apps.page."""

    usage = "[FOLDER …]"
    examples = ("python -m minilora.apps.page", "python -m minilora.apps.page photos /data/models --port 8000")

    folders: tuple[str, ...] = of_data(
        (".",), "folders whose pictures, LoRAs and bases the page may read and write", "FOLDER …", basic=True, bare=True
    )
    output: str = of_output("out", "folder for results, with a folder for each run", "FOLDER", basic=True)
    model: str | None = shared.model()
    port: int = of_output(
        7860, "port of the page, on this machine only; 0 takes any free port", "PORT", Within(0, 65535), basic=True
    )
