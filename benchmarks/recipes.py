"""What does each recipe do?  Likeness, drift, held-out loss, time and memory of every recipe on three tasks.

    python benchmarks/recipes.py --plot docs/pictures/recipes.svg

The tasks are a subject (the robot), a style (Fluent 3D) and one photograph (the mountain), on the bundled base.  For
each task, recipe and seed, `train.py` trains a LoRA with the defaults and the recipe's settings, `sample.py` draws
eight pictures with it, and `evaluate` compares them with pictures that were held out:

- likeness: how alike the drawn and the held-out pictures are, by the VAE's features; 1 is the same
- drift: how far pictures of sixteen other things move; for a style this is what it should do
- loss: the denoising loss on the held-out pictures
- seconds and peak memory of the training process

One photograph has nothing to hold out, so likeness and loss are of the photograph itself.  All of it takes most of a
day on two cores.  Each figure is written to recipes.json at once, and what stands there is not measured again.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from train_step import ROOT

FIGURES = Path(__file__).with_suffix(".json")
HELD_OUT_EVERY = 3  # evaluate compares with no fewer than four
LIKENESS, DRIFT = "likeness by the VAE's features", "drift by the VAE's features"
LOSS = "denoising loss on the reference; with LoRA"


@dataclass(frozen=True)
class Task:
    """A data set, what is drawn with its LoRA, and its word for prior preservation."""

    data: str
    prompts: tuple[str, ...]  # eight pictures in all
    word: tuple[str, ...] = ()


TASKS = {
    "subject": Task("robot", ("sks robot",), ("--class-prompt", "robot")),
    "style": Task("fluent", (), ("--trigger", "sks")),  # it draws what the held-out pictures show
    "photograph": Task("mountain", ("mountain",)),
}
DRAWN = 8
# Settings by recipe.  WORD stands for the task's word; a task without one leaves such recipes out.
WORD = "WORD"
RECIPES = {
    "defaults": "",
    "rank 4": "--rank 4",
    "rank 32": "--rank 32",
    "attention": "--targets attention",
    "attention+ff": "--targets attention+ff",
    "linear": "--targets linear",
    "conv": "--targets conv",
    "only up blocks": "--targets up_blocks:linear+conv",
    "text encoder": "--train-text-encoder --text-encoder-learning-rate 5e-4",
    "min-SNR": "--snr-gamma 5",
    "offset noise": "--noise-offset 0.05",
    "Huber": "--huber-c 0.1",
    "DREAM": "--dream 1",
    "dropout": "--dropout 0.1",
    "EMA": "--ema 0.99",
    "no caption dropout": "--caption-dropout 0",
    "variants": "--crop random --variants 8 --colour-jitter 0.1",
    "Prodigy": "--optimizer prodigy",
    "cosine": "--lr-schedule cosine",
    "class pictures": WORD,
    "preserve": f"{WORD} --preserve 1",
    "masks": "",  # of the subject, the only task that has them; all other recipes train without
}


def settings_of(recipe: str, task: Task) -> list[str] | None:
    """Return a recipe's settings for a task, or None if it does not apply."""
    words = shlex.split(RECIPES[recipe])
    if (recipe == "masks" and task.data != "robot") or (recipe == "class pictures" and "--trigger" in task.word):
        return None
    if WORD not in words:
        return words
    return [*task.word, *words[1:]] if task.word else None


def copied(lines: Sequence[dict], source: Path, folder: Path, masks: bool = False) -> Path:
    """Copy pictures and their captions, with numbers before their names, into a folder unless it is there."""
    if not folder.exists():
        folder.mkdir(parents=True)
        numbered = [line | {"file_name": f"{i:02}_{line['file_name']}"} for i, line in enumerate(lines)]
        for line, new in zip(lines, numbered, strict=True):
            path = source / line["file_name"]
            shutil.copy(path, folder / new["file_name"])
            if masks:
                mask = path.with_suffix(".mask.png")
                shutil.copy(mask, (folder / new["file_name"]).with_suffix(".mask.png"))
        (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in numbered))
    return folder


def command(*words: str | Path) -> tuple[float, float]:
    """Run a command of minilora; return its seconds and the peak of its memory in MB."""
    started = time.monotonic()
    with subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"failed: {shlex.join(map(str, words))}")
    return time.monotonic() - started, usage.ru_maxrss / 1024


def measure(task: Task, recipe: str, seed: int, settings: Sequence[str], work: Path) -> dict[str, float]:
    """Train a LoRA, draw with it, compare; return the figures."""
    source = ROOT / "dataset" / task.data
    lines = [json.loads(line) for line in (source / "metadata.jsonl").read_text().splitlines()]
    alone = len(lines) == 1
    held_out = lines * 4 if alone else lines[::HELD_OUT_EVERY]
    learnt = lines if alone else [line for line in lines if line not in held_out]
    masks = recipe == "masks"
    data = copied(learnt, source, work / task.data / ("masked" if masks else "learnt"), masks)
    reference = copied(held_out, source, work / task.data / "held_out")
    run, drawn = work / "run", work / "drawn"
    for folder in (run, drawn):
        shutil.rmtree(folder, ignore_errors=True)
    seconds, megabytes = command(
        "train.py", "--data", data, "--output", run, "--seed", str(seed), "--cache", work / "cache", *settings
    )
    average = run / "pytorch_lora_weights_ema.safetensors"
    lora = average if average.exists() else run
    prompts = list(task.prompts) or [line["text"][0] for line in held_out[:DRAWN]]
    if "--trigger" in settings:
        prompts = [f"sks, {prompt}" for prompt in prompts]
    asked = [word for prompt in prompts for word in ("--prompt", prompt)]
    command("sample.py", *asked, "--count", str(DRAWN // len(prompts)), "--lora", lora, "--output", drawn)
    report = work / "report"
    command("-m", "minilora.apps.evaluate", drawn, reference, "--lora", lora, "--drift", "--output", report)
    figures = json.loads((report / "figures.json").read_text())["figures"]
    found = {"likeness": figures[LIKENESS], "drift": figures[DRIFT], "loss": figures[LOSS]}
    return found | {"seconds": seconds, "MB": megabytes}


def tables(found: dict[str, dict[str, float]]) -> str:
    """Return a table for each task: the mean over the seeds, recipe by recipe."""
    parts = []
    for name in TASKS:
        rows = [f"| {name} | likeness | drift | loss | seconds | MB | seeds |", "|---" * 7 + "|"]
        for recipe in RECIPES:
            runs = [figures for key, figures in found.items() if key.split("/")[:2] == [name, recipe]]
            if runs:
                mean = {what: fmean(run[what] for run in runs) for what in runs[0]}
                rows.append(
                    f"| {recipe} | {mean['likeness']:.2f} | {mean['drift']:.2f} | {mean['loss']:.4f} | "
                    f"{mean['seconds']:.0f} | {mean['MB']:.0f} | {len(runs)} |"
                )
        parts.append("\n".join(rows))
    return "\n\n".join(parts)


def plot(found: dict[str, dict[str, float]], path: Path) -> None:
    """Draw likeness against drift, one panel for each task; the top left corner is best."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(TASKS), figsize=(15, 5), layout="constrained")
    for panel, name in zip(panels, TASKS, strict=True):
        for recipe in RECIPES:
            runs = [figures for key, figures in found.items() if key.split("/")[:2] == [name, recipe]]
            if runs:
                x, y = (fmean(run[what] for run in runs) for what in ("drift", "likeness"))
                panel.plot([x], [y], "ks" if recipe == "defaults" else "bo")
                panel.annotate(recipe, (x, y), xytext=(3, 3), textcoords="offset points", fontsize=7)
        panel.set(title=name, xlabel="drift", ylabel="likeness")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--work", type=Path, default=Path(".cache/recipes"), metavar="FOLDER", help="folder for the runs' files"
    )
    parser.add_argument("--seeds", type=int, default=2, metavar="N", help="runs of each recipe (default 2)")
    parser.add_argument(
        "--steps", type=int, metavar="STEPS", help="of each run, to try the script; else train.py's own"
    )
    parser.add_argument("--only", nargs="+", choices=RECIPES, metavar="RECIPE", help="measure only these recipes")
    parser.add_argument("--plot", type=Path, metavar="SVG", help="draw likeness against drift; needs matplotlib")
    args = parser.parse_args()
    found = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    for seed in range(args.seeds):
        for recipe in args.only or RECIPES:
            for name, task in TASKS.items():
                key, settings = f"{name}/{recipe}/{seed}", settings_of(recipe, task)
                if settings is not None and key not in found:
                    settings += ["--steps", str(args.steps)] if args.steps else []
                    found[key] = measure(task, recipe, seed, settings, args.work.resolve())
                    FIGURES.write_text(json.dumps(found, indent=1) + "\n")
                    print(key, found[key], flush=True)
    print(tables(found))
    if args.plot:
        plot(found, args.plot)


if __name__ == "__main__":
    main()
