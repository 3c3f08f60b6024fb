"""What the settings of several commands have in common: their groups, and those settings that several have."""

import dataclasses
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from .errors import UserError
from .setting import AT_LEAST_1, SEED, Settings, setting

TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")  # those of CLIP's text encoders
DATA, VALIDATION, CLASS_PICTURES = "data", "validation", "class pictures (DreamBooth)"
MODEL, LORA, PICTURES, OUTPUT = "base and LoRA", "LoRA", "pictures", "output"
TRAINING, NOISE, SPEED = "optimization", "noise and loss", "memory and speed"
MERGING, OTHER = "merging into a base", "instead of merging into a base"
CLASS = ("class_prompt", "what the pictures of the class show")  # what other settings need, as `setting` takes it
TEXT_ENCODERS = ("train_text_encoder", "which puts a LoRA there")
WEIGHT = "the weight"  # what the number behind a folder of pictures is called
TIMEOUT = 30.0  # minutes that a process waits for another

# Settings of several commands; a command declares one as `model: str | None = shared.model()`.
model = partial(
    setting,
    None,
    "base: diffusers folder, hub id (OWNER/NAME) or .safetensors file; if not given, the bundled miniature",
    group=MODEL,
    metavar="BASE",
    basic=True,
)
lora = partial(
    setting,
    (),
    "LoRA file, folder of a training or hub id (OWNER/NAME); with a strength: out/fluent:0.8; may be repeated",
    repeat=True,
    group=MODEL,
    metavar="LORA[:STRENGTH]",
    basic=True,
)
guidance = partial(
    setting,
    text="classifier-free guidance: how closely pictures follow the prompt, at least 1; 1 is without",
    group=PICTURES,
    metavar="FACTOR",
    within=AT_LEAST_1,
)
seed = partial(
    setting,
    0,
    "seed of the first picture; each next one has the next number",
    group=PICTURES,
    metavar="SEED",
    within=SEED,
)
precision = partial(
    setting,
    "auto",
    "number format of the base and of the computation; bf16 and fp16 take half the memory; auto suits the machine",
    choices=("auto", "fp32", "bf16", "fp16"),
    group=SPEED,
)
compile_unet = partial(
    setting, False, "compile the U-Net: the first step takes minutes, each later one is faster", group=SPEED
)


@dataclass(frozen=True, kw_only=True)
class BaseSettings(Settings):
    """What the commands that load a base have in common, besides its name, --model."""

    model_config: str | None = setting(
        None,
        "diffusers folder or hub id with the settings and the tokenizer that a --model in one file lacks",
        group=MODEL,
        metavar="FOLDER",
        in_identity=False,
    )
    vae: str | None = setting(
        None,
        "VAE to use instead of the base's own: folder or hub id of a VAE or a base, or a .safetensors file of either",
        group=MODEL,
        metavar="VAE",
        in_identity=False,
    )
    prediction_type: str | None = setting(
        None,
        "what the U-Net predicts, where neither the base's settings nor a mark in its file say it right",
        choices=("epsilon", "v_prediction"),
        group=MODEL,
        in_identity=False,
    )
    zero_terminal_snr: bool = setting(
        False,
        "change the base's noise levels so that the last one is pure noise; for bases that predict v",
        group=MODEL,
    )

    def base_settings(self) -> dict:
        """Return the settings that say which base it is, as other commands take them."""
        return {name: getattr(self, name) for name in ("model", *(f.name for f in dataclasses.fields(BaseSettings)))}


def path_and_number(text: str, what: str = "the strength") -> tuple[str, float]:
    """Split "out/fluent:0.8" into path and number.

    Without a number the number is 1, and a text that is an existing path is a path as a whole.  Raises UserError,
    which calls the number `what`, if it is not finite.
    """
    path, _, last = text.rpartition(":")
    try:
        number = float(last) if path and not os.path.exists(text) else None
    except ValueError:
        number = None  # the colon belongs to the path
    if number is None:
        return text, 1.0
    if not math.isfinite(number):
        raise UserError(f"{text}: {what} {last} is not a finite number")
    return path, number


def is_mask(path: Path) -> bool:
    """Whether a picture is, by its name, the mask of another one: a.mask.png of a.jpg."""
    return path.stem.lower().endswith(".mask")


def folder_for(application: str, names: Sequence[str]) -> Path:
    """Return the default folder for an application's results on some pictures: out/morph-a-b."""
    return Path("out") / "-".join([application, *(Path(name).stem for name in names)])
