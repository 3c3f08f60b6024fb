"""Measure the bundled base, and what LoRA does on it; write the model card.

    python -m minilora.base.measure --data base-data

Reconstruction: PSNR of the VAE on pictures it has not seen.  Denoising: the mean loss at fixed
positions (fixed timesteps and noise) on pictures the U-Net has not seen.  LoRA: the same loss on
unseen Fluent pictures with and without a LoRA trained on dataset/fluent by train.py's defaults, and
what a small style classifier says of pictures drawn with and without it.  A contact sheet shows
fifty everyday prompts, four seeds each.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image

from minilora import draws
from minilora.apps.classifier import share_right, train_classifier
from minilora.config import SampleConfig, TrainConfig
from minilora.diffusion import Conditioning, denoising_loss
from minilora.files import write_whole
from minilora.live import load_lora
from minilora.lora import lora_disabled
from minilora.models import BUNDLED, Base
from minilora.pictures import as_tensor, cut_square, open_picture
from minilora.sampling import draw, merged_at, sheet
from minilora.training import train

from .pictures import SEED, SIZE, Drawing, Named, fluent_pictures, read_drawings

PROMPTS = """apple, banana, strawberry, lemon, watermelon, tomato, carrot, pizza, hamburger, ice cream,
doughnut, birthday cake, dog, cat, rabbit, bear, pig, frog, penguin, octopus, butterfly, bee, tulip,
sunflower, cactus, mushroom, evergreen tree, house, car, bus, bicycle, rocket, airplane, sailboat,
umbrella, rainbow, snowman, star, key, balloon, book, pencil, guitar, soccer ball, trophy, crown,
heart, ghost, smile, mountain"""
PROMPTS = [prompt.strip() for prompt in PROMPTS.replace("\n", " ").split(",")]
DRAWING = SampleConfig(prompt=tuple(PROMPTS))  # steps and guidance are those of sample.py
STYLES = ("noto", "twemoji", "fluent")
SHEET = "contact_sheet.jpg"

Note = Callable[[str, str], None]  # what takes down a figure: its name and its value


def pixels_of(paths: Sequence[Path]) -> torch.Tensor:
    """Return pictures as one tensor, (n, 3, 64, 64)."""
    return torch.stack([as_tensor(cut_square(open_picture(path), SIZE)) for path in paths])


@torch.no_grad()
def through_vae(base: Base, pixels: torch.Tensor) -> torch.Tensor:
    """Return what the VAE makes of pictures, (n, 3, 64, 64)."""
    parts = [base.vae.decode(base.vae.encode(part).latent_dist.mean).sample for part in pixels.split(64)]
    return torch.cat(parts).clamp(-1, 1)


def psnr(base: Base, pixels: torch.Tensor) -> float:
    """Return the mean peak signal-to-noise ratio of the VAE's reconstructions, in dB."""
    error = (through_vae(base, pixels) - pixels).square().mean(dim=(1, 2, 3))  # of a range of 2
    return (10 * torch.log10(4 / error)).mean().item()


@torch.no_grad()
def held_out_loss(base: Base, pictures: Sequence[tuple[Path, str]]) -> float:
    """Return the mean denoising loss, over four fixed timesteps and noises for each picture."""
    pixels = pixels_of([path for path, _ in pictures])
    latents = torch.stack([base.encode_picture(picture)[0] for picture in pixels])  # (n, 4, 16, 16)
    text = torch.stack([base.encode_text(caption) for _, caption in pictures])  # (n, 32, 192)
    losses = []
    for start in range(0, 4 * len(pictures), 64):
        positions = range(start, min(start + 64, 4 * len(pictures)))
        which = [p % len(pictures) for p in positions]
        noise = torch.stack([draws.gaussian(SEED, "held-out noise", p, latents.shape[1:]) for p in positions])
        times = [draws.integer(SEED, "held-out timestep", p, 0, len(base.schedule)) for p in positions]
        told = Conditioning(text[which])
        losses.append(denoising_loss(base.unet, latents[which], told, noise, torch.tensor(times), base.schedule))
    return torch.cat(losses).mean().item()


def measure_base(base: Base, drawings: list[Drawing], unseen: list[Named], photographs: list[Path], note: Note) -> None:
    """Measure the VAE and the U-Net, and draw the contact sheet."""
    held_out = [d for d in drawings if d.held_out]
    for name, paths in [
        ("held-out drawn pictures", [d.path for d in held_out]),
        ("Fluent pictures", [path for path, _ in unseen[:256]]),
        ("photographs of mountains", photographs),
    ]:
        note(f"VAE reconstruction, {len(paths)} {name}", f"{psnr(base, pixels_of(paths)):.1f} dB")
    for name, chosen in [("held-out", held_out), ("training", [d for d in drawings if not d.held_out][::16])]:
        pictures = [(d.path, f"{d.names[0]}, {d.style} style") for d in chosen]
        note(f"denoising loss, {len(pictures)} {name} pictures", f"{held_out_loss(base, pictures):.4f}")
    started = time.time()
    rows = [draw(base, prompt, range(4), SIZE, DRAWING) for prompt in PROMPTS]
    note(f"time to draw 200 pictures, {DRAWING.steps} steps each", f"{time.time() - started:.0f} s")
    pairs = [left + right for left, right in zip(rows[:25], rows[25:], strict=True)]
    labels = [f"{left} | {right}" for left, right in zip(PROMPTS[:25], PROMPTS[25:], strict=True)]
    contact = sheet(pairs, [f"seed {seed}" for seed in (*range(4), *range(4))], labels)
    contact.resize((contact.width // 2, contact.height // 2), Image.Resampling.LANCZOS).save(
        BUNDLED / SHEET, quality=88
    )


def measure_lora(
    base: Base, drawings: list[Drawing], unseen: list[Named], fluent: Path, work: Path, note: Note
) -> None:
    """Train a LoRA on dataset/fluent and measure it on pictures and prompts that are not in there."""
    started = time.time()
    lora_file = train(TrainConfig(data=(str(fluent),), output=str(work), caption_dropout=0.0))
    note(
        "time to train a LoRA on dataset/fluent by train.py's defaults, without caption dropout",
        f"{time.time() - started:.0f} s",
    )
    load_lora(base.unet, lora_file)
    pictures = [(path, names[0]) for path, names in unseen[:256]]
    with lora_disabled(base.unet):
        note(f"denoising loss, {len(pictures)} unseen Fluent pictures, base", f"{held_out_loss(base, pictures):.4f}")
    note(f"denoising loss, {len(pictures)} unseen Fluent pictures, with LoRA", f"{held_out_loss(base, pictures):.4f}")

    # Decoded by the VAE, as drawn pictures are: what it blurs must not give the style away.
    known = [(d.path, STYLES.index(d.style)) for d in drawings] + [(path, STYLES.index("fluent")) for path, _ in unseen]
    pixels = through_vae(base, pixels_of([path for path, _ in known]))
    styles = torch.tensor([style for _, style in known])
    test = torch.arange(len(known)) % 5 == 0
    classifier = train_classifier(pixels[~test], styles[~test], SEED)
    right = share_right(classifier, pixels[test], styles[test])
    note(f"style classifier, right on {int(test.sum())} pictures kept from it", f"{right:.1%}")
    learnt = {name for line in (fluent / "metadata.jsonl").open() for name in json.loads(line)["text"]}
    prompts = [prompt for prompt in PROMPTS if prompt not in learnt]
    for strength in (0.0, 0.5, 1.0):
        with merged_at(base, {"default": strength}):
            drawn = [picture for prompt in prompts for picture in draw(base, prompt, range(2), SIZE, DRAWING)]
        pixels = torch.stack([as_tensor(picture) for picture in drawn])
        share = share_right(classifier, pixels, torch.full((len(drawn),), STYLES.index("fluent")))
        note(
            f"called Fluent, {len(drawn)} pictures of {len(prompts)} prompts not learnt, LoRA at {strength:g}",
            f"{share:.1%}",
        )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m minilora.base.measure", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("base-data"), help="folder of the unpacked data packages")
    parser.add_argument("--dataset", type=Path, default=Path("dataset"), help="folder of the example datasets")
    parser.add_argument("--work", type=Path, default=Path(".cache/measure"), help="folder for the LoRA it trains")
    args = parser.parse_args()
    figures: list[str] = []

    def note(name: str, value: str) -> None:
        figures.append(f"| {name} | {value} |\n")
        print(f"{name}: {value}", flush=True)

    base = Base(None, torch.device("cpu"))
    drawings, (_, unseen) = read_drawings(args.data), fluent_pictures(args.data)
    measure_base(base, drawings, unseen, sorted(args.dataset.glob("mountain*/*.jpg")), note)
    measure_lora(base, drawings, unseen, args.dataset / "fluent", args.work, note)

    before, rest = (BUNDLED / "README.md").read_text().split("<!-- figures -->")
    after = rest.split("<!-- end of figures -->")[1]
    card = f"{before}<!-- figures -->\n| | |\n|---|---|\n{''.join(figures)}<!-- end of figures -->{after}"
    write_whole(BUNDLED / "README.md", card.encode())
    print(f"wrote the figures into {BUNDLED / 'README.md'}")


if __name__ == "__main__":
    main()
