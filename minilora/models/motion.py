"""A base that draws clips: AnimateDiff's motion modules in its U-Net.

A motion adapter holds one motion module for each layer of each block of a U-Net.  A motion module is a small
transformer.  It sees one place of the latents at a time, in all frames, so it moves what the U-Net draws.

The U-Net is diffusers' UNetMotionModel.  It has the names of the ordinary U-Net and, in each block, `motion_modules`.
So a LoRA is put into it as into any network.

Source: Guo et al., "AnimateDiff: animate your personalized text-to-image diffusion models without specific tuning",
2023.
"""

from functools import cached_property
from typing import Any, Self

from .base import Base  # isort: skip (before diffusers is imported)

import torch
from diffusers import AnimateDiffPipeline, MotionAdapter, UNetMotionModel
from torch import nn

from ..files.names import UNET
from ..settings.errors import UserError, first_line
from .folder import loading, refuse_missing, warn_of_more

PART = "motion adapter"  # what messages call it


class MotionBase(Base):
    """A base with a motion adapter: its pipeline draws clips.

    Raises UserError for an adapter that does not load or fit, and for a base that cannot have one.
    """

    motion: str  # the adapter's name, a diffusers folder or a hub id

    @classmethod
    def of(cls, config, device: torch.device, *others, **more) -> Self:
        """Return the base with the adapter that a command's settings name, after checking the adapter's settings."""
        base = super().of(config, device, *others, **more)
        base.motion = config.motion
        base.refuse_inpainting()
        if base.is_xl:
            raise UserError(
                f"--motion {base.motion}: --model {base.source} is a Stable Diffusion XL; give a 1.x or 2.x"
            )
        base.check_adapter(config.frames)
        return base

    def check_adapter(self, frames: int) -> None:
        """Raise UserError if the adapter's settings do not fit the U-Net, or the number of frames is too large."""
        title = f"--motion {self.motion}"
        try:
            config: Any = MotionAdapter.load_config(self.motion)
            kind = config["_class_name"]
        except Exception as error:  # no such folder, no network, a broken file, …
            what = "neither a folder of a diffusers MotionAdapter nor a hub id that can be reached"
            raise UserError(f"{title}: {what} ({first_line(error)})") from error
        if kind != "MotionAdapter":
            raise UserError(f"{title}: it holds a {kind} and should hold a MotionAdapter")
        with torch.device("meta"), loading(title, PART):
            theirs = MotionAdapter.from_config(config).config
        ours: Any = self.empty(UNET).config
        if theirs.conv_in_channels:
            raise UserError(f"{title}: made for PIA, which also needs a picture; give one of AnimateDiff")
        for key, name in (
            ("block_out_channels", "block_out_channels"),
            ("motion_layers_per_block", "layers_per_block"),
            ("motion_norm_num_groups", "norm_num_groups"),
        ):
            wanted, found = ours[name], theirs[key]
            if _each(found, len(ours.block_out_channels)) != _each(wanted, len(ours.block_out_channels)):
                raise UserError(f"{title}: made for another base; its {key} is {found}, the base's {name} {wanted}")
        if frames > theirs.motion_max_seq_length:
            raise UserError(f"--frames is {frames}; {title} takes at most {theirs.motion_max_seq_length}")

    def _load(self, part: str) -> nn.Module:
        module: Any = super()._load(part)
        if part != UNET:
            return module
        title = f"--motion {self.motion}"
        options: dict = {"torch_dtype": self.dtype, "low_cpu_mem_usage": False, "output_loading_info": True}
        with loading(title, PART):
            adapter, about = MotionAdapter.from_pretrained(self.motion, use_safetensors=True, **options)
        # The position of each frame is computed, and some files lack it.
        refuse_missing(title, PART, {key for key in about["missing_keys"] if not key.endswith(".pos_embed.pe")})
        warn_of_more(title, PART, about["unexpected_keys"])
        with loading(title, PART):
            return UNetMotionModel.from_unet2d(module, adapter).requires_grad_(False).eval().to(self.device)

    @cached_property
    def scheduler_options(self) -> dict:
        """AnimateDiff's modules were trained with noise levels of their own."""
        return super().scheduler_options | {"beta_schedule": "linear", "trained_betas": None}

    @cached_property
    def pipeline(self) -> AnimateDiffPipeline:
        """A diffusers pipeline of these parts, not of copies."""
        names = (UNET, "vae", "scheduler", "text_encoder", "tokenizer")
        pipeline = AnimateDiffPipeline(**{name: getattr(self, name) for name in names}, motion_adapter=None)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


def _each(value: Any, blocks: int) -> list:
    """Return a setting as a list with a number for each block; it may be one number for all."""
    return list(value) if isinstance(value, list | tuple) else [value] * blocks
