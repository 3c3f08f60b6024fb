"""Morph from picture to picture: every frame in between is drawn by the model.

    python -m minilora.apps.morph A B [C …] --prompt TEXT --prompt TEXT [--prompt TEXT …] [--output morph.gif]

A LoRA is trained on each picture, and each picture's noise is found with its own LoRA (restore.py).  Frame t, from 0 to
1, is then drawn with a mixture of noise, text and weights:

    noise      slerp(noise_a, noise_b, t), which keeps the length of gaussian noise
    text       (1 − t) · text_a + t · text_b
    weights    W + (1 − t) · ΔW_a + t · ΔW_b

The two ΔW are mixed, exactly as by two LoRAs side by side at strengths 1 − t and t.  A mixture of the factors,
((1 − t) B_a + t B_b) ((1 − t) A_a + t A_b), would contain products of one LoRA's B and the other's A.

Of more than two pictures, each is morphed into the next; the frame of a picture between two others comes once.

Three options make the sequence smoother:

    --attention   in the first steps, where the layout is decided, the self-attention of the U-Net's upper half
                  takes keys and values from a mixture of the two end frames
    AdaIN         each channel of the noise gets a mean and a standard deviation between those of the ends
    even spacing  t is chosen so that neighbouring frames look equally different

Source: Zhang et al., "DiffMorpher: unleashing the capability of diffusion models for image
morphing", 2023, which mixes the factors.
"""

if __name__ == "__main__":  # before torch is imported, which takes seconds: --help answers at once
    from minilora.settings.command_line import morph as command

    command()
    raise SystemExit

from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase

import numpy as np
import torch
from PIL import Image

from ..data.animation import animation_format, save_animation
from ..data.pictures import as_picture
from ..data.sheet import save_picture, sheet
from ..files.network import load_lora
from ..lora import lora_disabled, remove_lora
from ..models.base import Base
from ..models.device import this_device
from ..settings.morph import MorphConfig
from .ddim import Levels, ddim_draw, ddim_invert
from .likeness import distances, psnr, through_vae
from .mixing import adain, between, slerp
from .report import write_figures
from .restore import learn, see

EVEN_ROUNDS = 2  # rounds of spacing the frames; the first is rough, because distances are only known at few times
TOGETHER = 8  # frames drawn in one pass, including the two ends


@dataclass(frozen=True)
class End:
    """One end of the morph: its picture, (3, h, w); its noise, (channels, h', w'); its text, (tokens, width)."""

    picture: torch.Tensor
    noise: torch.Tensor
    text: torch.Tensor


def morph(config: MorphConfig) -> dict[str, float]:
    """Morph from picture to picture with and without LoRA, write the animation, and return the figures."""
    output = Path(config.output) if config.output else config.folder / "morph.gif"
    if output.suffix:
        animation_format(output)  # before the work, not after it
    paths = [Path(name) for name in config.pictures]
    pictures = [see(path, config) for path in paths]
    loras: Sequence[str | Path] = config.lora or [
        learn(path, prompt, config.folder / f"lora-{letter}", config)
        for path, prompt, letter in zip(paths, config.prompt, ascii_lowercase, strict=False)
    ]
    base = Base.of(config, this_device(), config.precision)
    base.refuse_inpainting()
    levels = Levels.of(base.scheduler, config.steps, base.device)

    plain = replace(config, attention=0.0, adain=False, even=False)
    texts = [base.encode_text(prompt).to(base.device) for prompt in config.prompt]
    parts: dict[str, list[torch.Tensor]] = {"base": [], "LoRA": []}  # the frames of each pair, by the way of drawing
    for start in range(len(pictures) - 1):
        pair = slice(start, start + 2)
        for name, lora in zip("ab", loras[pair], strict=True):
            load_lora(base.unet, lora, name)
        with base.autocast():
            with lora_disabled(base.unet):
                parts["base"].append(way(base, levels, plain, pictures[pair], texts[pair]))
            parts["LoRA"].append(way(base, levels, plain, pictures[pair], texts[pair]))
            if config != plain:
                both = way(base, levels, config, pictures[pair], texts[pair])
                parts.setdefault("LoRA and options", []).append(both)
        remove_lora(base.unet)  # the next pair has its own two
    ways = {name: joined(of_pairs) for name, of_pairs in parts.items()}

    figures: dict[str, float] = {}
    jumps = {}
    last = (len(pictures) - 1) * (config.frames - 1)
    at = range(0, last + 1, config.frames - 1)  # the frames of the pictures themselves
    for name, frames in ways.items():
        for letter, number, picture in zip(ascii_uppercase, at, pictures, strict=False):
            frame = {0: "the first frame", last: "the last frame"}.get(number, f"frame {number + 1}")
            figures[f"PSNR of {frame} to picture {letter}, dB; {name}"] = psnr(frames[number], picture)
        steps = distances(base, frames)
        jumps[name] = list(range(1, last + 1)), steps
        figures |= {
            f"perceptual path length (VAE encoder's features); {name}": sum(steps),
            f"largest jump between frames over the mean one; {name}": max(steps) * len(steps) / sum(steps),
        }
    for letter, picture in zip(ascii_uppercase, pictures, strict=False):
        figures[f"PSNR through the VAE alone, picture {letter}, dB"] = psnr(through_vae(base, picture[None]), picture)
    write_figures(config.folder, figures, jumps)

    *_, best = ways.values()
    save_frames([as_picture(frame) for frame in best], output, at)
    columns = np.linspace(0, last, min(last + 1, 9)).round().astype(int)
    rows = [[as_picture(frames[i]) for i in columns] for frames in ways.values()]
    save_picture(sheet(rows, [f"frame {i + 1}" for i in columns], list(ways)), config.folder / "morph.png")
    print(f"wrote {output} and {config.folder / 'morph.png'}")
    return figures


def joined(pairs: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the frames of all pairs, (frames, 3, h, w) each, as one sequence; each pair starts where one ended."""
    return torch.cat([pairs[0], *(frames[1:] for frames in pairs[1:])])


def way(
    base: Base, levels: Levels, config: MorphConfig, pictures: Sequence[torch.Tensor], texts: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Return the frames from one picture to the other, (frames, 3, h, w) in [-1, 1]."""
    ends = []
    for t, picture, text in zip((0.0, 1.0), pictures, texts, strict=True):
        latents = base.encode_picture(picture)[0][None].to(base.device)  # (1, channels, h, w)
        noise = ddim_invert(between(base, [t], text[None], levels, 0.0), latents, levels)
        ends.append(End(picture, noise[0], text))
    times = np.linspace(0, 1, config.frames)
    frames = draw_frames(base, levels, config, ends, times)
    for _ in range(EVEN_ROUNDS if config.even else 0):
        far = np.cumsum([0.0, *distances(base, frames)])
        # The times at which 0, 1/n, 2/n, … of the whole distance is covered.
        times = np.interp(np.linspace(0, far[-1], config.frames), far, times)
        frames = draw_frames(base, levels, config, ends, times)
    return frames


def draw_frames(
    base: Base, levels: Levels, config: MorphConfig, ends: Sequence[End], times: np.ndarray
) -> torch.Tensor:
    """Draw the frames at the given times, the first 0 and the last 1; (frames, 3, h, w)."""
    a, b = ends
    inner, drawn = list(times[1:-1]), []
    step = TOGETHER - 2
    for start in range(0, max(len(inner), 1), step):
        part = [0.0, *inner[start : start + step], 1.0]  # the two ends, because self-attention mixes theirs
        noise = torch.stack([slerp(a.noise, b.noise, t) for t in part])  # (batch, channels, h, w)
        if config.adain:
            noise = torch.stack([adain(x, a.noise, b.noise, t) for x, t in zip(noise, part, strict=True)])
        text = torch.stack([torch.lerp(a.text, b.text, t) for t in part])  # (batch, tokens, width)
        drawn.append(ddim_draw(between(base, part, text, levels, config.attention), noise, levels))
    latents = torch.cat([drawn[0][:1], *(part[1:-1] for part in drawn), drawn[0][-1:]])
    return torch.cat([base.decode_latents(part) for part in latents.split(TOGETHER)])


# ------------------------------------------------------------------------------------------- output


def save_frames(frames: list[Image.Image], path: Path, pauses: Container[int]) -> None:
    """Write an animation that pauses at the frames of these numbers, or, in a folder, one picture for each frame."""
    if not path.suffix:
        for number, frame in enumerate(frames, start=1):
            save_picture(frame, path / f"{number:03d}.png")
        return
    times = max(1, 256 // frames[0].width)  # small ones are enlarged
    large = [frame.resize([n * times for n in frame.size], Image.Resampling.BICUBIC) for frame in frames]
    save_animation(large, path, [600 if number in pauses else 80 for number in range(len(frames))])
