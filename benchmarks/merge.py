"""Time and memory of merging a LoRA into a base: minilora, diffusers, and a plain copy, in one run and in turn.

    python benchmarks/merge.py --work /a/disk/with/room

It makes U-Nets with random weights, of Stable Diffusion 1.5's shape and smaller, in float32 and float16, as folders
and as single files; and two LoRAs, rank 8 on the attention layers and rank 32 on all linear layers.  Each contender is
a process of its own, timed from its start until its data are on the disk (`sync`).  Peak memory is the largest resident
memory of the process itself.  Diffusers runs if --peer is given and peft is installed.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

LORAS = {8: (".to_q", ".to_k", ".to_v", ".to_out.0"), 32: ("",)}  # rank -> the ends of its modules' names
PEER = """
import sys, torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin as Loader
base, lora, out, dtype = sys.argv[1:]
unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet", torch_dtype=getattr(torch, dtype))
state, alphas = Loader.lora_state_dict(lora)
Loader.load_lora_into_unet(state, alphas, unet)
unet.fuse_lora(0.7)
unet.unload_lora()
unet.save_pretrained(out + "/unet")
"""


def make(work: Path, dtype: str, blocks: int) -> None:
    """Write a U-Net of Stable Diffusion 1.5's shape with the first `blocks` of its widths, twice, and two LoRAs."""
    import torch
    from diffusers import UNet2DConditionModel
    from safetensors.torch import load_file, save_file

    from minilora.files.layout import Checkpoint
    from minilora.files.names import original_unet_paths
    from minilora.files.read import Delta, LoRA
    from minilora.files.write import write_lora

    folder = work / f"{dtype}-{blocks}"
    cross = ["CrossAttnDownBlock2D"] * (blocks - 1)
    unet = UNet2DConditionModel(
        sample_size=64,
        cross_attention_dim=768,
        attention_head_dim=8,
        block_out_channels=(320, 640, 1280, 1280)[:blocks],
        down_block_types=(*cross, "DownBlock2D"),
        up_block_types=("UpBlock2D", *(name.replace("Down", "Up") for name in cross)),
    )
    unet.to(getattr(torch, dtype)).save_pretrained(folder / "unet", max_shard_size="100GB")
    single = {}
    state = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    originals = original_unet_paths(dict.fromkeys(key.rsplit(".", 1)[0] for key in state))
    for key, tensor in state.items():
        path, leaf = key.rsplit(".", 1)
        single[f"model.diffusion_model.{originals[path]}.{leaf}"] = tensor
    save_file(single, work / f"{dtype}-{blocks}.safetensors")
    modules = Checkpoint(folder).modules
    for rank, ends in LORAS.items():
        deltas = {
            name: Delta((torch.randn(rank, shape[1]) / rank).numpy(), (torch.randn(shape[0], rank) * 0.01).numpy())
            for name, shape in modules.items()
            if len(shape) == 2 and name.endswith(ends)
        }
        write_lora(work / f"lora-{rank}-{blocks}.safetensors", LoRA(deltas), "diffusers", modules)


def measure(command: list[str], out: Path) -> tuple[float, float]:
    """Run a process and `sync`; return seconds and the process's peak resident memory in MB."""
    for path in (out, out.with_suffix(".safetensors")):
        shutil.rmtree(path, ignore_errors=True)
        path.unlink(missing_ok=True)
    os.sync()
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    errors = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    os.sync()
    if status:
        sys.exit(f"{' '.join(command)}\n{errors}")
    return time.perf_counter() - started, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--work", type=Path, default=Path(".cache/benchmark"), metavar="FOLDER", help="folder for 15 GB of files"
    )
    parser.add_argument(
        "--rounds", type=int, default=3, metavar="ROUNDS", help="runs of each contender; medians count (default 3)"
    )
    parser.add_argument("--peer", action="store_true", help="also run diffusers")
    parser.add_argument("--make", nargs=2, metavar=("DTYPE", "BLOCKS"), help="only make the files of one base")
    args = parser.parse_args()
    if args.make:  # in a process of its own: a child never reports less memory than its parent had
        return make(args.work, args.make[0], int(args.make[1]))
    args.work.mkdir(parents=True, exist_ok=True)
    print("| base | LoRA | contender | seconds | relative to a copy | peak MB |\n|---|---|---|---|---|---|", flush=True)
    for dtype, blocks in [("float32", 4), ("float16", 4), ("float16", 3), ("float16", 2)]:
        folder = args.work / f"{dtype}-{blocks}"
        single = args.work / f"{dtype}-{blocks}.safetensors"
        if not single.exists():
            command = [sys.executable, __file__, "--work", str(args.work), "--make", dtype, str(blocks)]
            subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        for rank, ends in LORAS.items():
            lora = args.work / f"lora-{rank}-{blocks}.safetensors"
            out = args.work / "out"
            merge = [sys.executable, "-m", "minilora.merge"]
            contenders = {
                "cp -r": ["cp", "-r", str(folder), str(out)],
                "minilora, folder": [*merge, str(folder), f"{lora}:0.7", "--output", str(out)],
                "minilora, single file": [*merge, str(single), f"{lora}:0.7", "--output", f"{out}.safetensors"],
            }
            if args.peer:
                contenders["diffusers"] = [sys.executable, "-c", PEER, *map(str, (folder, lora, out)), dtype]
            runs = {name: [] for name in contenders}
            for _ in range(args.rounds):
                for name, command in contenders.items():
                    runs[name].append(measure(command, out))
            size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 1e9
            for name, results in runs.items():
                seconds = median(seconds for seconds, _ in results)
                # Round by round, because the speed of the disk changes from round to round.
                ratio = median(mine / copy for (mine, _), (copy, _) in zip(results, runs["cp -r"], strict=True))
                peak = max(memory for _, memory in results)
                which = f"rank {rank}, {'attention' if len(ends) > 1 else 'all linear'}"
                row = f"{dtype}, {size:.2f} GB | {which} | {name} | {seconds:.1f} | {ratio:.2f} | {peak:.0f}"
                print(f"| {row} |", flush=True)


if __name__ == "__main__":
    main()
