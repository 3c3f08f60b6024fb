"""The tables of a GPU, in one command that takes at most nine minutes on a fast one.

    python benchmarks/gpu.py --peer train_text_to_image_lora.py --peer-xl train_text_to_image_lora_sdxl.py

First the tests on the GPU; then a training step of bases of the true shapes with random weights, in bfloat16: minilora,
minilora compiled, diffusers' official scripts (where given) and the bare U-Net's forward pass; then merging and
drawing.  What matters most comes first.  What would begin after --minutes is printed as not measured.

On a machine without a GPU, `--base minilora/base` goes through most of it on a small base, to see that nothing fails.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

from memory import make_xl
from train_step import ROOT, WARM_UP, child, make_base, make_pictures, minilora, peer, run

BATCHES = {"SD 1.5": (512, (1, 4, 16)), "SDXL": (1024, (1, 4))}  # pixels and batches


def measured(work: Path, base: Path, side: int, batch: int, script: Path | None, compiled: bool, steps: int) -> dict:
    """Return the step of one contender: its median in seconds, and the peak of its memory in MB."""
    ours = {"model": base, "resolution": side, "batch-size": batch, "output": work / "out"}
    theirs = {"pretrained_model_name_or_path": base, "resolution": side, "train_batch_size": batch}
    if script:
        return run(work, script, peer(work, work / "pictures", **theirs), steps)
    words = minilora(work, work / "pictures", **ours) + ["--micro-batch-size", str(batch)] + ["--compile"] * compiled
    return run(work, ROOT / "train.py", words, steps)


def forward(work: Path, base: Path, side: int, batch: int) -> dict:
    """Return the bare U-Net's forward pass, as `measured` does."""
    child("forward", str(work / "forward.json"), str(base), str(side), str(batch))
    return {"step": median(json.loads((work / "forward.json").read_text())[WARM_UP:]), "memory": float("nan")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--work", type=Path, default=Path(".cache/benchmark"), metavar="FOLDER", help="folder for 25 GB of files"
    )
    parser.add_argument("--peer", type=Path, metavar="SCRIPT", help="train_text_to_image_lora.py of diffusers")
    parser.add_argument("--peer-xl", type=Path, metavar="SCRIPT", help="train_text_to_image_lora_sdxl.py of diffusers")
    parser.add_argument("--base", type=Path, metavar="FOLDER", help="only this base, at 128 pixels and batch 1")
    parser.add_argument("--steps", type=int, default=12, metavar="STEPS", help="steps of a run (default 12)")
    parser.add_argument("--minutes", type=float, default=9, metavar="MINUTES", help="nothing begins later (default 9)")
    args = parser.parse_args()
    started, work = time.monotonic(), args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "pictures").exists():
        make_pictures(work / "pictures", 16)

    def in_time(what: str, measure: Callable):
        """Return what `measure()` returns, or None after printing why there is nothing."""
        if time.monotonic() - started > 60 * args.minutes:
            print(f"not measured: {what}", flush=True)
            return None
        try:
            return measure()
        except SystemExit as error:  # a contender that fails, for want of memory for example, must not end the others
            print(f"failed: {what}: {str(error)[-2000:]}", file=sys.stderr, flush=True)
            return None

    def script(*words: object, **environment: str) -> None:
        print(f"\n$ python {' '.join(map(str, words))}", flush=True)
        if subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, env=os.environ | environment).returncode:
            sys.exit("it failed, as printed above")

    if not args.base:
        tests = ("-m", "pytest", "-q", "-n", "0", "tests/test_gpu.py")
        in_time("the tests", partial(script, *tests, MINILORA_DEVICE="cuda"))
    bases = {"SD 1.5": (work / "base", make_base, args.peer), "SDXL": (work / "xl", make_xl, args.peer_xl)}
    plan = [(name, *bases[name], side, batch) for name, (side, batches) in BATCHES.items() for batch in batches]
    plan.sort(key=lambda row: row[-1])  # batch 1 of both bases first
    if args.base:
        plan = [(args.base.name, args.base.resolve(), None, args.peer, 128, 1)]
    columns = "base | pixels | batch | contender | seconds per step | in forward passes | ratio to the peer | peak MB"
    print(f"\n| {columns} |\n|{'---|' * 8}", flush=True)
    for name, base, make, official, side, batch in plan:
        if not base.exists():
            make(base)
        where = work, base, side, batch
        contenders = {"minilora": (None, False)}
        contenders |= {} if args.base else {"minilora, compiled": (None, True)}
        contenders |= {"official script": (official.resolve(), False)} if official else {}
        results = {"bare forward": in_time(f"{name}, batch {batch}, forward", partial(forward, *where))}
        for who, how in contenders.items():
            results[who] = in_time(f"{name}, batch {batch}, {who}", partial(measured, *where, *how, args.steps))
        unit, other = results["bare forward"], results.get("official script")
        for who, result in results.items():
            if result:
                passes = f"{result['step'] / unit['step']:.2f}" if unit else ""
                ratio = f"{result['step'] / other['step']:.2f}" if other else ""
                numbers = f"{result['step']:.4f} | {passes} | {ratio} | {result['memory']:.0f}"
                print(f"| {name} | {side} | {batch} | {who} | {numbers} |", flush=True)
    _, base, *_ = plan[0]
    drawing = ["--model", base, "--precision", "bf16", "--rounds", "2" if args.base else "20"]
    in_time("drawing", partial(script, "benchmarks/sample.py", *drawing))
    if not args.base:
        in_time("merging", partial(script, "benchmarks/merge.py", "--work", work / "merge", "--rounds", "1"))


if __name__ == "__main__":
    main()
