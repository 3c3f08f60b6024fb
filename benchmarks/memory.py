"""Peak memory of whole runs on the true shapes of Stable Diffusion 1.5 and XL, beside what minilora says beforehand.

    python benchmarks/memory.py

The bases have random weights, in bfloat16.  Each run is a process of its own, `train.py` with rank 8, batch 1 and one
picture that it has to encode first; it ends after its second step.  Measured is its largest resident memory, or on a
GPU the largest allocated memory.  The sheet at the end of a run is not part of it: on a processor, 20 steps of XL
take a quarter of an hour, and no gradient needs their activations.
"""

import argparse
import json
import shutil
from pathlib import Path

from scaling import BASES
from train_step import ROOT, child, make_base, make_pictures, minilora

STEPS = 2  # of a run: from the second on, the optimizer has its averages
RUNS = [  # base, pixels, further settings
    ("SD 1.5", 512, ()),
    ("SD 1.5", 512, ("--gradient-checkpointing",)),
    ("SD 1.5", 768, ()),
    ("SDXL", 1024, ()),
    ("SDXL", 1024, ("--gradient-checkpointing",)),
]


def make_xl(folder: Path) -> None:
    """Write a Stable Diffusion XL of the true shapes with random weights, in bfloat16."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)  # made in float32 first, the U-Net alone would take 10 GB
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "minilora" / "base", subfolder="tokenizer", model_max_length=77)
    levels = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 1024}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    large = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    huge = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
    ends = {"eos_token_id": tokenizer.eos_token_id}
    StableDiffusionXLPipeline(
        vae=AutoencoderKL(**levels, **blocks, scaling_factor=0.13025),
        text_encoder=CLIPTextModel(CLIPTextConfig(**large, **ends)),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**huge, **ends, projection_dim=1280)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=UNet2DConditionModel(**BASES["SDXL"]),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    ).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)


def told(base: Path, side: int, settings: tuple[str, ...]) -> float:
    """Return the memory that minilora says such a run will need, in bytes."""
    from minilora.models.base import Base
    from minilora.models.device import this_device
    from minilora.run.memory import memory_of
    from minilora.settings.train import TrainConfig

    asked = {"gradient_checkpointing": "--gradient-checkpointing" in settings}
    config = TrainConfig(data=("",), model=str(base), precision="bf16", resolution=side, rank=8, **asked)
    return memory_of(config, Base.of(config, this_device(), "bf16")).total


def measured(work: Path, base: Path, side: int, settings: tuple[str, ...]) -> float:
    """Return the peak memory of such a run, in bytes."""
    report = work / "report.json"
    for folder in ("out", "cache"):  # so that it encodes
        shutil.rmtree(work / folder, ignore_errors=True)
    words = [*minilora(work, work / "one-picture", model=base, resolution=side), *settings]
    resident = child("watch", str(ROOT / "train.py"), str(STEPS), str(report), *words, HF_HUB_OFFLINE="1")
    return (json.loads(report.read_text())["gpu"] or resident) * 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--work", type=Path, default=Path(".cache/benchmark"), metavar="FOLDER", help="folder for 10 GB of files"
    )
    parser.add_argument("--base", choices=BASES, help="only this one")
    args = parser.parse_args()
    work = args.work.resolve()
    bases = {"SD 1.5": (work / "base", make_base), "SDXL": (work / "xl", make_xl)}
    if not (work / "one-picture").exists():
        make_pictures(work / "one-picture", 1)
    print(
        "| base | pixels | settings | predicted, GB | measured, GB | predicted / measured |\n|---|---|---|---|---|---|"
    )
    for name, side, settings in RUNS:
        if args.base in (None, name):
            base, make = bases[name]
            if not base.exists():
                make(base)
            said, seen = told(base, side, settings), measured(work, base, side, settings)
            numbers = f"{said / 1e9:.1f} | {seen / 1e9:.1f} | {said / seen:.2f}"
            print(f"| {name} | {side} | {' '.join(settings)} | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
