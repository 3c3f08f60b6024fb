"""What an application leaves beside its pictures: its figures, and the command that they are from."""

import json
import shlex
import sys
from pathlib import Path

from ..files import write_whole


def write_figures(folder: Path, figures: dict[str, float]) -> None:
    """Print figures by name, and write them with the command line to `figures.json` in a folder."""
    for name, value in figures.items():
        print(f"{name}: {value:.4g}")
    program = Path(sys.argv[0])
    words = ["python", "-m", f"minilora.apps.{program.stem}"] if program.suffix == ".py" else [program.name]
    command = shlex.join([*words, *sys.argv[1:]])
    write_whole(
        folder / "figures.json", (json.dumps({"command": command, "figures": figures}, indent=2) + "\n").encode()
    )
