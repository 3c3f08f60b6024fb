"""Time and memory of a training step: minilora, diffusers' official script, and the bare U-Net.

    python benchmarks/train_step.py --peer diffusers/examples/text_to_image/train_text_to_image_lora.py

It makes a base of Stable Diffusion 1.5's shapes with random weights, in bfloat16, and pictures.  The contenders run in
turn, as whole processes that end after a few steps, with the same settings: bfloat16, batch 1, rank 8 on the attention
projections.  A step is the time between two calls of AdamW's `step`, measured in the same way for both.  It is also
given in forward passes of the bare U-Net.  A frozen base needs a forward and a backward pass, about 2 of them.

Peak memory is the largest resident memory of the process itself; on a GPU the largest allocated memory there.  The peer
runs if --peer is given and accelerate, datasets and peft are installed.
"""

import argparse
import json
import os
import runpy
import shutil
import subprocess
import sys
import time
import types
from itertools import pairwise
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
BLOCKS = {"mid+up": "mid_block:attention,up_blocks:attention", "up": "up_blocks:attention"}  # of --blocks
WARM_UP = 2  # steps that are not counted
FORWARDS = 7
SWEEPS = {
    "batch": (1, 2, 4, 8),
    "resolution": (256, 512, 768),
    "rank": (4, 8, 16, 32, 64, 128),
    "pictures": (8, 100, 1000),
    "processes": (1, 2),
}


# Settings of some sweeps that differ from the others: 1,000 pictures of 512 pixels take hours to encode on a CPU.
SPECIAL = {"processes": {"batch-size": 2}, "pictures": {"resolution": 128}}


# --------------------------------------------------------------------------------- what a child does


def make_base(folder: Path) -> None:
    """Write a Stable Diffusion of 1.5's shapes with random weights, in bfloat16."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "minilora" / "base", subfolder="tokenizer", model_max_length=77)
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        sample_size=512,
    )
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    parts = {
        "unet": UNet2DConditionModel(sample_size=64, cross_attention_dim=768),
        "vae": vae,
        "text_encoder": CLIPTextModel(CLIPTextConfig(eos_token_id=tokenizer.eos_token_id, **text)),
        "scheduler": DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
        "tokenizer": tokenizer,
    }
    for name in ("unet", "vae", "text_encoder"):
        parts[name].to(torch.bfloat16)
    none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    StableDiffusionPipeline(**parts, **none).save_pretrained(folder)


def make_pictures(folder: Path, count: int) -> None:
    """Write a folder of pictures of 768 pixels, with captions."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True)
    lines = []
    for number in range(count):
        coarse = np.random.default_rng(number).integers(0, 256, (24, 24, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((768, 768), Image.Resampling.BICUBIC).save(folder / f"{number:04d}.jpg")
        lines.append(json.dumps({"file_name": f"{number:04d}.jpg", "text": f"picture number {number}"}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))


def forward(base: Path, side: int, batch: int) -> list[float]:
    """Return the seconds of forward passes of the U-Net, without gradients."""
    import torch
    from diffusers import UNet2DConditionModel

    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    unet = UNet2DConditionModel.from_pretrained(
        base, subfolder="unet", torch_dtype=torch.bfloat16, low_cpu_mem_usage=False
    )
    unet.to(device)
    shapes = {"x": (4, side // 8, side // 8), "text": (77, unet.config.cross_attention_dim)}
    shapes |= {"text_embeds": (1280,), "time_ids": (6,)} if unet.config.addition_embed_type == "text_time" else {}
    inputs = {name: torch.randn(batch, *shape, device=device, dtype=torch.bfloat16) for name, shape in shapes.items()}
    x, text, seconds = inputs.pop("x"), inputs.pop("text"), []
    with torch.no_grad():
        for _ in range(FORWARDS):
            started = time.perf_counter()
            unet(x, torch.tensor(500, device=device), text, added_cond_kwargs=inputs)
            if device.type != "cpu":
                torch.accelerator.synchronize()
            seconds.append(time.perf_counter() - started)
    return seconds


def watch(script: str, arguments: list[str], steps: int, report: Path) -> None:
    """Run a script as `python script arguments` does, for a number of AdamW's steps; write down their times."""
    import torch

    times, step = [], torch.optim.AdamW.step

    def watched(self, *args, **kwargs):
        result = step(self, *args, **kwargs)
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        times.append(time.time())
        if len(times) == steps:
            gpu = torch.accelerator.max_memory_allocated() / 2**20 if torch.accelerator.is_available() else None
            if os.environ.get("RANK", "0") == "0":
                report.write_text(json.dumps({"times": times, "gpu": gpu}))
            os._exit(0)  # what comes after the last step is not measured
        return result

    torch.optim.AdamW.step = watched
    if Path(script).parent != ROOT:
        stand_in_for_torchvision()
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def stand_in_for_torchvision() -> None:
    """Give the peer its five transforms if torchvision is not installed or does not fit the installed torch."""
    import accelerate  # noqa: F401  these four look for torchvision, and must not find the stand-in
    import datasets  # noqa: F401
    import diffusers  # noqa: F401
    import numpy as np
    import torch
    import transformers  # noqa: F401
    from PIL import Image

    try:
        from torchvision import transforms  # noqa: F401
    except (ImportError, RuntimeError):
        module, child = types.ModuleType("torchvision"), types.ModuleType("torchvision.transforms")
        child.InterpolationMode = types.SimpleNamespace(LANCZOS=Image.Resampling.LANCZOS)
        child.Compose = lambda steps: lambda x: [x := step(x) for step in steps][-1]
        child.Resize = lambda size, interpolation: lambda p: p.resize((size, size), interpolation)
        child.CenterCrop = child.RandomCrop = lambda size: lambda p: p.crop((0, 0, size, size))
        child.RandomHorizontalFlip = lambda: lambda p: p
        child.Lambda = lambda function: function
        child.ToTensor = lambda: lambda p: torch.from_numpy(np.array(p)).permute(2, 0, 1) / 255
        child.Normalize = lambda mean, std: lambda x: (x - mean[0]) / std[0]
        module.transforms = child
        sys.modules |= {"torchvision": module, "torchvision.transforms": child}


# ------------------------------------------------------------------------------------- what the parent does


def child(*arguments: str, processes: int = 1, **environment: str) -> float:
    """Run this file in a process of its own, or in several, and return its peak resident memory in MB."""
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command = [*start, __file__, "--child", *arguments]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, **environment}
    )
    output = process.stdout.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)}\n{output}")
    return usage.ru_maxrss / 1024


def run(work: Path, script: Path, arguments: list[str], steps: int, processes: int = 1) -> dict[str, float]:
    """Run a contender; return seconds per step, until the first step, and its peak memory in MB."""
    report = work / "report.json"
    report.unlink(missing_ok=True)
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(work / "hf"), "TOKENIZERS_PARALLELISM": "false"}
    started = time.time()
    peak = child("watch", str(script), str(steps), str(report), *arguments, processes=processes, **offline)
    seen = json.loads(report.read_text())
    ends = seen["times"]
    each = [later - earlier for earlier, later in pairwise(ends)]
    return {"step": median(each[WARM_UP - 1 :]), "first": ends[0] - started, "memory": seen["gpu"] or peak}


def minilora(work: Path, data: Path, **settings) -> list[str]:
    """Return the arguments of train.py for the settings that all contenders have, and others."""
    shared = {"data": data, "model": work / "base", "precision": "bf16", "resolution": 512, "batch-size": 1, "rank": 8}
    shared |= {"steps": 1000, "checkpoint-every": 1000, "cache": work / "cache", "output": work / "out"}
    return [word for name, value in (shared | settings).items() for word in (f"--{name}", str(value))]


def peer(work: Path, data: Path, **settings) -> list[str]:
    """Return the arguments of the official script for the same settings, and others."""
    shared = {"train_data_dir": data, "pretrained_model_name_or_path": work / "base", "mixed_precision": "bf16"}
    shared |= {"resolution": 512, "train_batch_size": 1, "rank": 8, "max_train_steps": 1000, "caption_column": "text"}
    shared |= {"output_dir": work / "out", "cache_dir": work / "hf", "checkpointing_steps": 1000, "learning_rate": 1e-4}
    return ["--center_crop", *(w for name, value in (shared | settings).items() for w in (f"--{name}", str(value)))]


def pictures(work: Path, count: int) -> Path:
    folder = work / f"pictures-{count}"
    if not folder.exists():
        make_pictures(folder, count)
    return folder


def compare(work: Path, script: Path | None, compiled: bool, blocks: bool, rounds: int, steps: int) -> None:
    """Print the table of minilora, its peer and the bare forward pass."""
    data, unit = pictures(work, 8), work / "forward.json"
    ours, train = minilora(work, data), ROOT / "train.py"
    contenders = {"minilora": (train, ours)}
    if compiled:
        contenders["minilora, compiled"] = train, [*ours, "--compile"]
    if blocks:
        contenders |= {f"minilora, {name}": (train, [*ours, "--targets", targets]) for name, targets in BLOCKS.items()}
    if script:
        contenders["official script"] = script, peer(work, data)
    for path, arguments in contenders.values():
        if path == train:
            run(work, path, arguments, WARM_UP + 1)  # fills the cache of pictures, and that of the compiler
    runs, forwards = {name: [] for name in contenders}, []
    for _ in range(rounds):
        child("forward", str(unit), str(work / "base"), "512", "1")
        forwards.append(median(json.loads(unit.read_text())[WARM_UP:]))
        for name, (path, arguments) in contenders.items():
            runs[name].append(run(work, path, arguments, steps))
            shutil.rmtree(work / "out", ignore_errors=True)
    print("| contender | seconds per step | in forward passes | until the first step | peak MB | ratios to the peer |")
    print("|---|---|---|---|---|---|")
    for name, results in runs.items():
        step, first, memory = (median(one[key] for one in results) for key in ("step", "first", "memory"))
        passes = median(one["step"] / unit for one, unit in zip(results, forwards, strict=True))
        ratios = ""
        if script:
            pairs = list(zip(results, runs["official script"], strict=True))
            each = [f"{median(a[key] / b[key] for a, b in pairs):.2f}" for key in ("step", "first", "memory")]
            ratios = "step {}, first step {}, memory {}".format(*each)
        print(f"| {name} | {step:.2f} | {passes:.2f} | {first:.1f} | {memory:.0f} | {ratios} |", flush=True)
    print(f"| bare U-Net, forward | {median(forwards):.2f} | 1.00 | | | |")


def title(what: str) -> str:
    """Return the name of a sweep, with its special settings."""
    return ", ".join([what, *(f"{name} {value}" for name, value in SPECIAL.get(what, {}).items())])


def sweep(work: Path, what: str, steps: int) -> None:
    """Print a table of minilora's step for several values of one setting, and save it for `plot`."""
    print(f"| {title(what)} | seconds per step | until the first step | peak MB | size of the cache, MB |")
    print("|---|---|---|---|---|")
    results = {}
    for value in SWEEPS[what]:
        data, cache = pictures(work, value if what == "pictures" else 8), work / f"cache-{what}"
        if not results or what in ("pictures", "resolution"):  # else it is the same one for all
            shutil.rmtree(cache, ignore_errors=True)
        settings = {"batch": {"batch-size": value}}.get(what, SPECIAL.get(what, {what: value})) | {"cache": cache}
        processes = value if what == "processes" else 1
        one = run(work, ROOT / "train.py", minilora(work, data, **settings), steps, processes)
        size = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file()) / 2**20
        row = f"{value} | {one['step']:.2f} | {one['first']:.1f} | {one['memory']:.0f} | {size:.1f}"
        print(f"| {row} |", flush=True)
        results[value] = one
    (work / f"sweep-{what}.json").write_text(json.dumps(results))


def plot(work: Path, picture: Path) -> None:
    """Draw the sweeps in `work`: time of a step and peak memory, by the values of each setting."""
    from matplotlib import pyplot

    there = [what for what in SWEEPS if (work / f"sweep-{what}.json").exists()]
    figure, axes = pyplot.subplots(2, len(there), figsize=(3 * len(there), 5), sharex="col", squeeze=False)
    for what, (above, below) in zip(there, axes.T, strict=True):
        results = json.loads((work / f"sweep-{what}.json").read_text())
        for axis, key, unit in ((above, "step", 1), (below, "memory", 1024)):
            axis.plot(list(results), [one[key] / unit for one in results.values()], "o-")
            axis.set_ylim(bottom=0)
        below.set_xlabel(title(what))
    axes[0, 0].set_ylabel("seconds per step")
    axes[1, 0].set_ylabel("peak memory, GB")
    figure.tight_layout()
    figure.savefig(picture, dpi=100)


def main() -> None:
    from minilora.models.device import (
        this_device,
    )  # not above: the children that are measured import only what they run
    from minilora.models.precision import SMALL, slow_precision

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--work", type=Path, default=Path(".cache/benchmark"), metavar="FOLDER", help="folder for 3 GB of files"
    )
    parser.add_argument("--peer", type=Path, metavar="SCRIPT", help="train_text_to_image_lora.py of diffusers")
    parser.add_argument("--compile", action="store_true", help="also minilora with torch.compile")
    parser.add_argument("--blocks", action="store_true", help="also minilora in the blocks mid+up, and up, alone")
    parser.add_argument(
        "--rounds", type=int, default=3, metavar="ROUNDS", help="runs of each contender; medians count (default 3)"
    )
    parser.add_argument(
        "--steps", type=int, default=8, metavar="STEPS", help=f"steps of a run; {WARM_UP} are not counted (default 8)"
    )
    parser.add_argument("--sweep", choices=SWEEPS, help="minilora alone, for several values of a setting")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the sweeps that ran; needs matplotlib")
    args = parser.parse_args()
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    if warning := slow_precision("bf16", this_device(), SMALL):
        print(f"warning: all contenders run with {warning}", file=sys.stderr)
    if not (work / "base").exists():
        child("make", str(work / "base"))
    if args.plot:
        plot(work, args.plot)
    elif args.sweep:
        sweep(work, args.sweep, args.steps)
    else:
        compare(work, args.peer and args.peer.resolve(), args.compile, args.blocks, args.rounds, args.steps)


if __name__ == "__main__":
    if sys.argv[1:2] != ["--child"]:
        main()
    else:  # a process of its own, so that its memory and its imports are its own
        job, *rest = sys.argv[2:]
        if job == "make":
            make_base(Path(rest[0]))
        elif job == "forward":
            Path(rest[0]).write_text(json.dumps(forward(Path(rest[1]), int(rest[2]), int(rest[3]))))
        else:
            watch(rest[0], rest[3:], int(rest[1]), Path(rest[2]))
