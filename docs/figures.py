"""Fill the tables of figures in the pages of docs/ from what the applications wrote.

    python docs/figures.py          (after docs/make.sh's runs)

What stands between `<!-- figures: NAME -->` and `<!-- end of figures -->` becomes the command and the figures
of out/NAME/figures.json, so that no figure is typed by hand.
"""

import json
import re
from pathlib import Path

DOCS = Path(__file__).parent
OUT = DOCS.parent / "out"


def table(name: str) -> str:
    """Return the command and the figures of a run as Markdown."""
    content = json.loads((OUT / name / "figures.json").read_text())
    rows = [f"| {what} | {value:.4g} |" for what, value in content["figures"].items()]
    return "\n".join([f"Printed by `{content['command']}`:", "", "| | |", "|---|---|", *rows])


def main() -> None:
    block = re.compile(r"(<!-- figures: (\S+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)
    for page in sorted(DOCS.glob("*.md")):
        before = page.read_text()
        after = block.sub(lambda found: f"{found[1]}{table(found[2])}\n{found[3]}", before)
        if after != before:
            page.write_text(after)
            print(f"wrote the figures into {page}")


if __name__ == "__main__":
    main()
