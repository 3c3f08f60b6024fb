"""Do minilora and diffusers' official script learn alike?  Their losses over the same steps.

    python benchmarks/loss_curve.py --peer diffusers/examples/text_to_image/train_text_to_image_lora.py

Both train on the same pictures with the same settings, in float32, on the bundled base, and write the loss of each step
to TensorBoard, from where it is read.  They draw different noise, timesteps and orders of the pictures, so only the
means of their losses can agree, and each contender runs with several seeds.  The losses of a run vary mostly by the
timesteps, which are drawn anew at each step.  So the mean of n losses with standard deviation s has a standard error
of about s / √n.  The difference of two means is given in standard errors of the difference, √(e² + e'²).  If they
learn alike, it is below 2 in 19 of 20 cases.

The peer needs accelerate, datasets and peft.
"""

import argparse
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import fmean, stdev

from train_step import ROOT, stand_in_for_torchvision

RESOLUTION = 128  # pixels, of the bundled base


def make_pictures(folder: Path, data: Path) -> None:
    """Write the pictures of a folder in the training size, so that neither contender has to crop or resize them."""
    from minilora.data.pictures import crop, open_picture

    folder.mkdir(parents=True)
    shutil.copy(data / "metadata.jsonl", folder)
    for path in data.glob("*.png"):
        crop(open_picture(path), (RESOLUTION, RESOLUTION)).save(folder / path.name)


def losses(output: Path, name: str) -> list[float]:
    """Return the losses of a run, one for each step, from its TensorBoard files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for path in output.rglob("events.out.tfevents.*"):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0})  # 0: all of them
        events.Reload()
        if name in events.Tags()["scalars"]:
            return [event.value for event in events.Scalars(name)]
    sys.exit(f"{output} has no {name} for TensorBoard")


def train(work: Path, script: Path, name: str, settings: dict, flags: list[str]) -> list[float]:
    """Run a contender in a process of its own and return its losses."""
    output = work / "out"
    shutil.rmtree(output, ignore_errors=True)
    words = [word for key, value in (settings | {"output": output}).items() for word in (f"--{key}", str(value))]
    if script.parent != ROOT:
        words[words.index("--output")] = "--output_dir"
    command = [sys.executable, __file__, "--child", str(script), *words, *flags]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(work / "hf"), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env={**os.environ, **offline}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout.decode()}")
    return losses(output, name)


def mean_and_error(values: list[float]) -> tuple[float, float]:
    return fmean(values), stdev(values) / len(values) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--work", type=Path, default=Path(".cache/benchmark"), metavar="FOLDER", help="folder for the runs' files"
    )
    parser.add_argument("--peer", type=Path, metavar="SCRIPT", required=True, help="train_text_to_image_lora.py")
    parser.add_argument(
        "--data",
        type=Path,
        default=ROOT / "dataset" / "fluent",
        metavar="FOLDER",
        help="folder of square .png pictures (default dataset/fluent)",
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each contender (default 3)")
    parser.add_argument("--steps", type=int, default=200, metavar="STEPS", help="steps of a run (default 200)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="PICTURES", help="pictures per step (default 8)")
    parser.add_argument("--learning-rate", type=float, default=2e-3, metavar="RATE", help="(default 0.002)")
    args = parser.parse_args()
    work = args.work.resolve()
    data = work / f"pictures-{args.data.name}-{RESOLUTION}"
    if not data.exists():
        make_pictures(data, args.data)
    base, every, rate = ROOT / "minilora" / "base", args.steps + 1, args.learning_rate
    ours = {"data": data, "steps": args.steps, "batch-size": args.batch_size, "learning-rate": rate, "rank": 8}
    ours |= {"resolution": RESOLUTION, "cache": work / "cache", "checkpoint-every": every}
    theirs = {"train_data_dir": data, "pretrained_model_name_or_path": base, "resolution": RESOLUTION, "rank": 8}
    theirs |= {"train_batch_size": args.batch_size, "max_train_steps": args.steps, "learning_rate": rate}
    theirs |= {"caption_column": "text", "cache_dir": work / "hf", "checkpointing_steps": every}
    seen = {"minilora": [], "official script": []}
    for seed in range(args.seeds):
        seen["minilora"].append(train(work, ROOT / "train.py", "loss", ours | {"seed": seed}, []))
        flags = ["--center_crop", "--mixed_precision=no"]
        seen["official script"].append(train(work, args.peer.resolve(), "train_loss", theirs | {"seed": seed}, flags))
        shutil.rmtree(work / "out")
    for name, runs in seen.items():
        assert all(len(run) == args.steps for run in runs), f"{name}: {[len(run) for run in runs]} steps"

    half = args.steps // 2
    parts = {
        f"1 to {args.steps}": slice(None),
        f"1 to {half}": slice(half),
        f"{half + 1} to {args.steps}": slice(half, None),
    }
    print("| steps | minilora | official script | difference | in standard errors |\n|---|---|---|---|---|")
    for what, part in parts.items():
        pooled = {name: [loss for run in runs for loss in run[part]] for name, runs in seen.items()}
        (m, e), (m2, e2) = (mean_and_error(values) for values in pooled.values())
        apart, error = m - m2, (e**2 + e2**2) ** 0.5
        print(f"| {what} | {m:.4f} ± {e:.4f} | {m2:.4f} ± {e2:.4f} | {apart:+.4f} | {apart / error:+.1f} |")
    for name, runs in seen.items():
        print(f"{name}: mean of each run {', '.join(f'{fmean(run):.4f}' for run in runs)}")


if __name__ == "__main__":
    if sys.argv[1:2] != ["--child"]:
        main()
    else:  # a process of its own, in which the script runs as `python script arguments` does
        script = sys.argv[2]
        if Path(script).parent != ROOT:
            stand_in_for_torchvision()
        sys.argv = sys.argv[2:]
        runpy.run_path(script, run_name="__main__")
