"""Fill the figures of a page in docs/ from the files that the commands wrote.

    python docs/figures.py docs/distill.md lcm=out/lcm/figures.json smooth=out/smooth/figures.json

Between `<!-- figures: NAME -->` and `<!-- end of figures -->` comes the command, and a table of what it printed.
"""

import json
import re
import sys
from pathlib import Path


def block(name: str, file: Path) -> str:
    """Return what stands between the two marks of a name."""
    told = json.loads(file.read_text())
    rows = [f"| {figure} | {value:.4g} |" for figure, value in told["figures"].items()]
    lines = ["", "```bash", told["command"], "```", "", "| | |", "|---|---|", *rows, ""]
    return "\n".join([f"<!-- figures: {name} -->", *lines, "<!-- end of figures -->"])


def main(page: Path, *named: str) -> None:
    text = page.read_text()
    for name, file in (words.split("=", 1) for words in named):
        filled = block(name, Path(file))
        pattern = rf"<!-- figures: {re.escape(name)} -->.*?<!-- end of figures -->"
        text, found = re.subn(pattern, lambda _, filled=filled: filled, text, flags=re.DOTALL)
        if found != 1:
            sys.exit(f"error: {page} has {found} blocks `<!-- figures: {name} -->`, and should have one")
    page.write_text(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
