"""Make docs/index.html, the gallery: the sheets of the pages as pictures with sliders, and curves of what was measured.

    python docs/gallery.py          (after docs/make.sh, whose outputs it reads; needs the extra "docs")

A sheet is a PNG file that says itself where its pictures lie and what they are called (minilora/data/sheet.py).
The page shows some of its places as windows onto it, and a slider moves what is seen through them: by the
columns, by the rows, or by both.
"""

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

import matplotlib
import matplotlib.figure
import numpy as np
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

DOCS = Path(__file__).parent
OUT = DOCS.parent / "out"
matplotlib.use("svg")
matplotlib.rcParams |= {"svg.hashsalt": "minilora", "figure.figsize": (6, 3), "axes.grid": True, "grid.alpha": 0.3}


@dataclass(frozen=True)
class Show:
    """One part of the gallery: a sheet, what its sliders are called, by "--x" for columns and "--y" for rows."""

    title: str
    text: str
    page: str
    sheet: str
    sliders: Mapping[str, str]


SHOWS = [
    Show(
        "One photograph",
        "The bundled base draws any mountain; a LoRA trained on one photograph draws that one.",
        "../README.md",
        "mountain.png",
        {"--x": "drawn by"},
    ),
    Show(
        "A style that the base has never seen",
        "Trained on 48 drawings, none of them of these things.",
        "../README.md",
        "cyanotype.png",
        {"--x": "strength of the LoRA"},
    ),
    Show(
        "Restore one picture, and edit it",
        "From a picture to its noise and back, and from the same noise with another prompt.",
        "restore.md",
        "restore.png",
        {"--x": "what is shown"},
    ),
    Show(
        "An edit, step by step",
        "The text goes from the one that describes the picture best to that of the edit.",
        "restore.md",
        "between.png",
        {"--x": "how much of the edit"},
    ),
    Show(
        "Morph between two pictures",
        "Noise, text and ΔW are mixed; three ways of doing it.",
        "morph.md",
        "morph.png",
        {"--x": "place on the way"},
    ),
    Show(
        "Pictures redrawn in a style",
        "More of the LoRA gives more of the style.",
        "restyle.md",
        "restyle.png",
        {"--y": "how much of it"},
    ),
    Show(
        "A photograph and a style",
        "The ΔW of two LoRAs, each at its own strength.",
        "restyle.md",
        "grid.png",
        {"--y": "the one", "--x": "the other"},
    ),
    Show(
        "Four steps instead of fifty",
        "Another objective in the same loop: consistency along the path from noise to picture.",
        "distill.md",
        "lcm.png",
        {"--y": "drawn by"},
    ),
]


def figure(show: Show) -> str:
    """Return the HTML of one sheet with its sliders."""
    with Image.open(DOCS / "pictures" / show.sheet) as picture:
        place = json.loads(picture.text["sheet"])
    names = {"--x": place["columns"], "--y": place["rows"]}
    # A window for every place that the sliders do not choose.
    columns = ["var(--x)"] if "--x" in show.sliders else range(len(names["--x"]))
    rows = ["var(--y)"] if "--y" in show.sliders else range(len(names["--y"]))
    windows = []
    for y in rows:
        for x in columns:
            caption = names["--y"][y] if isinstance(y, int) else names["--x"][x] if isinstance(x, int) else ""
            at = "; ".join(f"{name}: {n}" for name, n in (("--x", x), ("--y", y)) if isinstance(n, int))
            windows.append(f'<div style="{at}"><div class="window"></div>{html.escape(caption)}</div>')
    sliders = [
        f'<label>{html.escape(label)} <input type="range" name="{name}" min="0" max="{len(names[name]) - 1}" '
        f'value="0" data-names="{html.escape(json.dumps(names[name]))}"><output></output></label>'
        for name, label in show.sliders.items()
    ]
    style = [f"--sheet: url(pictures/{show.sheet})"]
    style += [f"--{name}: {place[name]}" for name in ("left", "top", "cell", "gap")]
    return "\n".join(
        [
            f"<section><h2>{html.escape(show.title)}</h2>",
            f'<p>{html.escape(show.text)} <a href="{show.page}">How it is done</a></p>',
            f'<figure style="{"; ".join(style)}"><div class="windows">{"".join(windows)}</div>',
            f"{''.join(sliders)}</figure></section>",
        ]
    )


# ------------------------------------------------------------------------------------------------ curves


def curve(name: str, lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], x: str, y: str) -> str:
    """Draw lines, each (xs, ys) by its name, into an SVG file, and return the HTML that shows it."""
    drawing = matplotlib.figure.Figure(layout="constrained")
    axes = drawing.subplots()
    for label, (xs, ys) in lines.items():
        axes.plot(xs, ys, label=label)
    axes.set(xlabel=x, ylabel=y)
    axes.legend()
    drawing.savefig(DOCS / "pictures" / f"{name}.svg", metadata={"Date": None, "Creator": None})
    return f'<img class="curve" src="pictures/{name}.svg" alt="{html.escape(f"{y} by {x}")}">'


def losses(runs: Sequence[str], window: int = 20) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return the mean loss of the last `window` steps, by step, of training runs in out/."""
    lines = {}
    for run in runs:
        events = EventAccumulator(str(OUT / run / "tensorboard"), size_guidance={"scalars": 0})
        scalars = events.Reload().Scalars("loss")
        smooth = np.convolve([s.value for s in scalars], np.full(window, 1 / window), "valid")
        lines[f"dataset/{run}"] = (np.array([s.step for s in scalars][window - 1 :]), smooth)
    return lines


def measured(run: str) -> dict[str, tuple[Sequence[float], Sequence[float]]]:
    """Return the curves that an application wrote beside its figures."""
    return json.loads((OUT / run / "figures.json").read_text())["curves"]


PAGE = Template("""\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>minilora: a gallery</title>
<style>
  body { font: 16px/1.5 system-ui, sans-serif; max-width: 56rem; margin: 2rem auto; padding: 0 1rem; }
  figure { margin: 0; }
  .windows { display: flex; flex-wrap: wrap; gap: 0.5rem; text-align: center; font-size: 0.85rem; }
  .window {
    --step: (var(--cell) + var(--gap));
    width: calc(1px * var(--cell)); height: calc(1px * var(--cell)); background-image: var(--sheet);
    background-position: calc(-1px * (var(--left) + var(--x) * var(--step)))
                         calc(-1px * (var(--top) + var(--y) * var(--step)));
  }
  label { display: flex; gap: 0.75rem; align-items: center; margin-top: 0.5rem; }
  input { flex: 0 1 20rem; }
  .curve { max-width: 100%; }
</style>
<h1>minilora: a gallery</h1>
<p>Everything here was drawn by the miniature Stable Diffusion that comes with
<a href="../README.md">minilora</a>, on two
processor cores, by the commands of the pages that are linked.</p>
$shows
$curves
<script>
  for (const slider of document.querySelectorAll("input")) {
    const names = JSON.parse(slider.dataset.names);
    const show = () => {
      slider.closest("figure").style.setProperty(slider.name, slider.value);
      slider.nextElementSibling.textContent = names[slider.value];
    };
    slider.addEventListener("input", show);
    show();
  }
</script>
</html>
""")


def main() -> None:
    restyled = measured("restyle-things")
    of_style, far = ({name: restyled[name]} for name in ("probability of the style", "distance to the pictures"))
    curves = [
        "<h2>Curves</h2>",
        curve("loss", losses(["mountain", "cyanotype"]), "step", "loss, mean of 20 steps"),
        curve("morph_jumps", measured("morph-mountain-mountain_autumn"), "frame", "distance to the next frame"),
        curve("style", of_style, "strength of the LoRA", "probability"),
        curve("style_distance", far, "strength of the LoRA", "levels of 255"),
    ]
    page = PAGE.substitute(shows="\n".join(figure(show) for show in SHOWS), curves="\n".join(curves))
    (DOCS / "index.html").write_text(page)
    print(f"wrote {DOCS / 'index.html'}")


if __name__ == "__main__":
    main()
