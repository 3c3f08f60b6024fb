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
    """Return the command and the figures of a run as Markdown; those called "what; of which" side by side."""
    content = json.loads((OUT / name / "figures.json").read_text())
    figures = {tuple(what.partition("; ")[::2]): f"{value:.4g}" for what, value in content["figures"].items()}
    lines = [f"Printed by `{content['command']}`:"]
    single = [f"| {what} | {value} |" for (what, which), value in figures.items() if not which]
    if single:
        lines += ["", "| | |", "|---|---|", *single]
    whats = list(dict.fromkeys(what for what, which in figures if which))
    if whats:
        lines += ["", f"| | {' | '.join(whats)} |", f"|---|{'---|' * len(whats)}"]
    for which in dict.fromkeys(which for _, which in figures if which):
        lines.append(f"| {which} | {' | '.join(figures.get((what, which), '') for what in whats)} |")
    return "\n".join(lines)


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
