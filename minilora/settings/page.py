"""The settings of minilora.apps.page, declared once."""

from dataclasses import dataclass

from . import shared
from .setting import Settings, Within, setting
from .shared import DATA, OUTPUT


@dataclass(frozen=True)
class PageConfig(Settings):
    """Every setting of minilora.apps.page."""

    usage = "[FOLDER …]"
    examples = ("python -m minilora.apps.page", "python -m minilora.apps.page photos /data/models --port 8000")

    folders: tuple[str, ...] = setting(
        (".",),
        "folders whose pictures, LoRAs and bases the page may read and write; if not given, the current one",
        group=DATA,
        metavar="FOLDER …",
        basic=True,
        bare=True,
    )
    output: str = setting(
        "out", "folder for results, with a folder for each run", group=OUTPUT, metavar="FOLDER", basic=True
    )
    model: str | None = shared.model()
    port: int = setting(
        7860,
        "port of the page, on this machine only; 0 takes any free port",
        group=OUTPUT,
        metavar="PORT",
        basic=True,
        within=Within(0, 65535),
    )

    def problems(self) -> list[str]:
        return []
