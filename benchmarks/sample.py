"""Time of drawing: the base, the base with a merged LoRA, and with a live one; compiled or not.

    python benchmarks/sample.py --compile
    python benchmarks/sample.py --model .cache/benchmark/base --precision bf16 --steps 2 --count 1

The contenders are U-Nets in one process.  In each round they draw the same pictures, in another order.  Machines drift,
so only the ratios within a round count, and many short rounds are better than a few long ones; the median is printed.
The LoRA is merged once and stays merged, as in sample.py.  A second, equal base shows how far apart equals are.  The
first pass, which compiles, is not counted; its time is printed.  The second line is for the base of Stable Diffusion
1.5's shapes that train_step.py makes.
"""

import argparse
import random
import time
from contextlib import ExitStack
from statistics import median

import torch

from minilora import inject_lora, lora_parameters
from minilora.models.base import Base
from minilora.models.compiling import compile_options
from minilora.models.device import this_device
from minilora.models.precision import DTYPES
from minilora.sampling import draw, merged_at
from minilora.settings.sample import SampleConfig


def contender(args: argparse.Namespace, lora: bool, compiled: bool) -> Base:
    """Load a base, with a LoRA and compiled if asked for."""
    base = Base(args.model, this_device(), args.precision)
    if lora:
        inject_lora(base.unet, args.rank, generator=torch.Generator().manual_seed(0))
        for parameter in lora_parameters(base.unet):
            torch.nn.init.normal_(parameter, std=0.01)  # with B = 0, as at first, ΔW would be 0
    if compiled:
        base.unet.compile(**compile_options(base.device))
    return base


def seconds(base: Base, args: argparse.Namespace) -> float:
    """Return how long drawing takes."""
    settings = SampleConfig(prompt=("apple",), steps=args.steps)
    started = time.perf_counter()
    draw(base, "apple", range(args.count), base.resolution, settings)  # the pictures are on the CPU, so it is finished
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", metavar="BASE", help="as for sample.py; if not given, the bundled base")
    parser.add_argument("--precision", choices=("auto", *DTYPES), default="fp32")
    parser.add_argument("--rank", type=int, default=8, metavar="RANK", help="rank of the LoRA (default 8)")
    parser.add_argument(
        "--steps", type=int, default=2, metavar="STEPS", help="denoising steps, each with guidance (default 2)"
    )
    parser.add_argument("--count", type=int, default=4, metavar="PICTURES", help="pictures per round (default 4)")
    parser.add_argument("--rounds", type=int, default=60, metavar="ROUNDS", help="rounds (default 60)")
    parser.add_argument("--compile", action="store_true", help="also the base and the merged LoRA, compiled")
    args = parser.parse_args()
    kinds = {"base": (False, False), "base again": (False, False), "merged": (True, False), "live": (True, False)}
    if args.compile:
        kinds |= {"base, compiled": (False, True), "merged, compiled": (True, True)}
    bases = {name: contender(args, *kind) for name, kind in kinds.items()}
    runs, shuffle = {name: [] for name in bases}, random.Random(0).shuffle
    with ExitStack() as merging:
        for name, base in bases.items():
            if "merged" in name:
                merging.enter_context(merged_at(base, {"default": 1.0}))
        first = {name: seconds(base, args) for name, base in bases.items()}
        for _ in range(args.rounds):
            order = list(bases)
            shuffle(order)
            for name in order:
                runs[name].append(seconds(bases[name], args))
    print("| contender | seconds | to the base | the first time, seconds |\n|---|---|---|---|")
    for name, each in runs.items():
        ratio = median(one / unit for one, unit in zip(each, runs["base"], strict=True))
        print(f"| {name} | {median(each):.2f} | {ratio:.3f} | {first[name]:.1f} |")


if __name__ == "__main__":
    main()
