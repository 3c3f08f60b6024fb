"""Clips: pictures that move, drawn with AnimateDiff's motion modules and any mix of LoRAs.

    python sample.py --motion ADAPTER --prompt TEXT [--frames 16] [--lora zoom-in.safetensors] --output cat.gif

A LoRA of pictures changes the layers that the U-Net has without the adapter; a motion LoRA changes the motion modules.
Both are read, mixed and merged like any LoRA: the names are those of the U-Net's modules (models/motion.py).

Every clip has its own seed, used as in diffusers.  One clip is drawn at a time: its frames are one batch.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..data.animation import animation_format, save_animation
from ..data.sheet import SETTINGS, refuse_others, save_picture
from ..models.device import this_device
from ..models.motion import MotionBase
from ..sampling import arrange, draw_rows, prepare, size_of
from ..settings.errors import UserError
from ..settings.sample import SampleConfig

MILLISECONDS = 125  # of a frame: the adapters learnt from 8 frames per second

Clip = list[Image.Image]


def sample_clips(config: SampleConfig) -> Path:
    """Draw the clips that `config` asks for and return the path of the animation, or of the folder.

    Several clips are on one sheet, which moves; in a folder, each is a folder of its frames.
    """
    path = Path(config.output)
    count = len(config.prompt) * config.count
    names = [f"{clip:04d}/{frame:04d}.png" for clip in range(1, count + 1) for frame in range(1, config.frames + 1)]
    if path.suffix:
        animation_format(path)  # both before the work, not after it
    else:
        refuse_others(
            path, {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()} - {*names}
        )
    base = MotionBase.of(config, this_device(), config.precision)
    frames, clips = draw_clips(base, prepare(base, config), config)
    if path.suffix:
        save_animation(frames, path, MILLISECONDS)
    else:
        for picture, name in zip((frame for clip in clips for frame in clip), names, strict=True):
            save_picture(picture, path / name)
    print(f"wrote {path}")
    return path


def draw_clips(base: MotionBase, strengths: dict[str, float], config: SampleConfig) -> tuple[Clip, list[Clip]]:
    """Draw all that `config` asks for; return the frames of the animation, and the single clips.

    `strengths` are those of the LoRAs, by adapter name.
    """

    def draw_prompts(seeds: Sequence[int]) -> list[list[Clip]]:
        return [[draw_clip(base, prompt, seed, config) for seed in seeds] for prompt in config.prompt]

    rows, columns, labels = draw_rows(base, strengths, config, draw_prompts)
    frames = [
        arrange(config, [[clip[number] for clip in row] for row in rows], columns, labels)
        for number in range(config.frames)
    ]
    clips = [clip for row in rows for clip in row]
    for picture in (*frames, *(frame for clip in clips for frame in clip)):
        picture.info[SETTINGS] = config.to_json()
    return frames, clips


@torch.no_grad()
def draw_clip(base: MotionBase, prompt: str, seed: int, config: SampleConfig) -> Clip:
    """Draw one clip and return its frames.  Raises UserError if they are not finite."""
    width, height = size_of(base, config)
    [drawn] = base.pipeline(
        prompt,
        negative_prompt=config.negative or None,
        num_frames=config.frames,
        height=height,
        width=width,
        num_inference_steps=config.steps,
        guidance_scale=config.guidance,
        generator=torch.Generator("cpu").manual_seed(seed),
        output_type="np",
    ).frames  # (frames, h, w, 3)
    if not np.isfinite(drawn).all():
        raise UserError(
            f"--motion {base.motion}: what it draws for {prompt!r} is not finite; with --precision fp16 try bf16 or "
            "fp32, else the adapter, the base or a LoRA is damaged"
        )
    return base.pipeline.video_processor.numpy_to_pil(drawn)
