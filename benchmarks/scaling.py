"""Scaling on paper: the time to exchange a LoRA's gradients, by number of GPUs and network.

    python benchmarks/scaling.py

A ring all-reduce of b bytes over N processes takes

    t = 2 (N − 1) / N · b / bandwidth + 2 (N − 1) · latency

because each process sends and receives N − 1 pieces of b / N bytes twice.  The bytes are counted on U-Nets of the true
shapes, without memory for their weights.  Bandwidth and latency are the assumptions below.  A step that takes 20 t
spends 5 % of its time on it, if nothing of it overlaps with the backward pass.
"""

import torch
from diffusers import UNet2DConditionModel

from minilora import inject_lora, lora_parameters

BASES = {
    "SD 1.5": {"sample_size": 64, "cross_attention_dim": 768},
    "SDXL": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
# Assumed, not measured: bytes per second over each process's link, and seconds per message.
NETWORKS = {
    "NVLink": (200e9, 5e-6),
    "PCIe 4": (20e9, 10e-6),
    "InfiniBand, 200 Gbit/s": (22e9, 5e-6),
    "Ethernet, 100 Gbit/s": (10e9, 20e-6),
    "Ethernet, 10 Gbit/s": (1e9, 30e-6),
    "Ethernet, 1 Gbit/s": (0.11e9, 50e-6),
}
INSIDE = ("NVLink", "PCIe 4")  # networks within a machine of 8 GPUs
GPUS = (8, 64, 512)


def count(shape: dict) -> tuple[int, int]:
    """Return how many numbers a U-Net of this shape has, and how many a LoRA of rank 8 on it has."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**shape)
        total = sum(parameter.numel() for parameter in unet.parameters())
        inject_lora(unet, rank=8)
    return total, sum(parameter.numel() for parameter in lora_parameters(unet))


def seconds(sent: float, processes: int, bandwidth: float, latency: float) -> float:
    """Return the time of a ring all-reduce of `sent` bytes, in seconds."""
    return 2 * (processes - 1) / processes * sent / bandwidth + 2 * (processes - 1) * latency


def main() -> None:
    counts = {name: count(shape) for name, shape in BASES.items()}
    print("| base | numbers in the U-Net | trained at rank 8 | bytes per step | the base, in bfloat16 |")
    print("|---|---|---|---|---|")
    for name, (total, trained) in counts.items():
        print(f"| {name} | {total:,} | {trained:,} | {4 * trained / 1e6:.1f} MB | {2 * total / 1e9:.1f} GB |")
    print("\n| base | network | assumed GB/s, µs | " + " | ".join(f"{n} GPUs" for n in GPUS) + " |")
    print("|---|---|---|" + "---|" * len(GPUS))
    for name, (_, trained) in counts.items():
        for network, (bandwidth, latency) in NETWORKS.items():
            cells = []
            for gpus in GPUS:
                t = seconds(4 * trained, gpus, bandwidth, latency)
                cell = f"{1e3 * t:.2f} ms; {20 * t:.2g} s" if t < 0.1 else f"{1e3 * t:.0f} ms; {20 * t:.2g} s"
                cells.append("" if network in INSIDE and gpus > 8 else cell)
            print(f"| {name} | {network} | {bandwidth / 1e9:g}, {latency * 1e6:g} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
