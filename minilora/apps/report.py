"""The report that an application writes beside its pictures: its figures, and the command that made them."""

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..files.tensors import write_whole


def write_figures(
    folder: Path, figures: Mapping[str, float], curves: Mapping[str, tuple[Sequence[float], Sequence[float]]] = {}
) -> None:
    """Print figures, and write them with curves (xs and ys) and the command line to `figures.json` in a folder."""
    for name, value in figures.items():
        print(f"{name}: {value:.4g}")
    program = Path(sys.argv[0])
    module = f"minilora.apps.{program.stem}" if program.parent.name == "apps" else f"minilora.{program.stem}"
    words = ["python", "-m", module] if program.suffix == ".py" else [program.name]
    command = shlex.join([*words, *sys.argv[1:]])
    content = {"command": command, "figures": figures, "curves": curves}
    write_whole(folder / "figures.json", (json.dumps(content, indent=2) + "\n").encode())
