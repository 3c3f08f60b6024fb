"""Are the default learning rate, and Prodigy's, as good as the best of a sweep?  The validation loss of each.

    python benchmarks/learning_rates.py --plot benchmarks/learning_rates.png

Each rate is one run of `train.py` on the bundled base with all other settings at their defaults.  The loss is measured
on held-out pictures, a quarter of the set, eight times; for the one photograph it is measured on the photograph
itself, with noise that it was not trained with.  Runs that are finished in --work are not repeated, so the script can
be stopped and started again.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from train_step import ROOT

DEFAULT = 2e-3
RATES = [DEFAULT * 2**power for power in range(-3, 4)]
SETS = {"fluent": "0.25", "cyanotype": "0.25", "mountain": str(ROOT / "dataset" / "mountain")}  # --validation


def losses(output: Path, data: str, flags: list[str], steps: int) -> dict[int, float]:
    """Return the validation losses of a run by step; train unless it is finished."""
    file = output / "validation.json"
    if not file.exists():
        words = ["--data", str(ROOT / "dataset" / data), "--validation", SETS[data], "--steps", str(steps)]
        words += ["--validate-every", str(steps // 8), "--output", str(output)]
        done = subprocess.run([sys.executable, str(ROOT / "train.py"), *words, *flags], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{output}: {done.stderr}")
    return {int(step): loss for step, loss in json.loads(file.read_text())["losses"].items()}


def draw_curves(found: dict[str, dict[str, float]], path: Path) -> None:
    """Draw the last loss of each run against its rate, relative to the lowest of the sweep, one panel per set."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (4 * len(found), 3.2)
    figure, [panels] = pyplot.subplots(1, len(found), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for panel, (data, last) in zip(panels, found.items(), strict=True):
        lowest = min(last[f"{rate:g}"] for rate in RATES)
        panel.plot(RATES, [last[f"{rate:g}"] / lowest for rate in RATES], "o-", label="sweep")
        panel.plot([DEFAULT], [last[f"{DEFAULT:g}"] / lowest], "s", color="black", label="the default")
        panel.axhline(last["Prodigy"] / lowest, linestyle="--", color="tab:orange", label="Prodigy")
        panel.axhspan(0, 1.02, alpha=0.1, color="tab:green", label="within 2 % of the best")
        panel.set(title=data, xscale="log", xlabel="learning rate", ylim=(0.95, 1.6))
    panels[0].set_ylabel("validation loss / the best")
    panels[-1].legend()
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--work", type=Path, default=Path(".cache/learning_rates"), metavar="FOLDER", help="folder of the runs"
    )
    parser.add_argument("--steps", type=int, default=300, metavar="STEPS", help="of each run (default 300)")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS), help="which data sets (default all)")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the sweeps; needs matplotlib")
    args = parser.parse_args()
    found: dict[str, dict[str, float]] = {}
    print("| set | " + " | ".join(f"{rate:g}" for rate in RATES) + " | Prodigy |")
    print("|---" * (len(RATES) + 2) + "|")
    for data in args.sets:
        ways = {f"{rate:g}": ["--learning-rate", f"{rate:g}"] for rate in RATES}
        ways["Prodigy"] = ["--optimizer", "prodigy"]
        last = {}
        for name, flags in ways.items():
            by_step = losses(args.work / data / name, data, flags, args.steps)
            last[name] = by_step[max(by_step)]
        found[data] = last
        print(f"| {data} | " + " | ".join(f"{loss:.4f}" for loss in last.values()) + " |", flush=True)
    if args.plot:
        draw_curves(found, args.plot)


if __name__ == "__main__":
    main()
