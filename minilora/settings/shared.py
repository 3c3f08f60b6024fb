"""What the settings of several commands have in common: their groups and their help."""

import math
import os
from collections.abc import Sequence
from pathlib import Path

from .errors import UserError

TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")  # those of CLIP's text encoders
DATA, VALIDATION, CLASS_PICTURES = "data", "validation", "class pictures (DreamBooth)"
MODEL, LORA, PICTURES, OUTPUT = "base and LoRA", "LoRA", "pictures", "output"
TRAINING, NOISE, SPEED = "optimization", "noise and loss", "memory and speed"
MERGING, OTHER = "merging into a base", "instead of merging into a base"
MODEL_HELP = "base: diffusers folder, hub id (OWNER/NAME) or .safetensors file; if not given, the bundled miniature"
MODEL_CONFIG_HELP = "diffusers folder or hub id with the settings and the tokenizer that a --model in one file lacks"
VAE_HELP = "VAE to use instead of the base's own: folder or hub id of a VAE or a base, or a .safetensors file of either"
PREDICTION_HELP = "what the U-Net predicts, where neither the base's settings nor a mark in its file say it right"
PREDICTIONS = ("epsilon", "v_prediction")
ZERO_SNR_HELP = "change the base's noise levels so that the last one is pure noise; for bases that predict v"
PRECISION_HELP = (
    "number format of the base and of the computation; bf16 and fp16 take half the memory; auto suits the machine"
)
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
COMPILE_HELP = "compile the U-Net: the first step takes minutes, each later one is faster"
LORA_HELP = "LoRA file, folder of a training or hub id (OWNER/NAME); with a strength: out/fluent:0.8; may be repeated"
GUIDANCE_HELP = "classifier-free guidance: how closely pictures follow the prompt, at least 1; 1 is without"
SEED_HELP = "seed of the first picture; each next one has the next number"
CLASS = ("class_prompt", "what the pictures of the class show")  # what other settings need, as `setting` takes it
TEXT_ENCODERS = ("train_text_encoder", "which puts a LoRA there")
WEIGHT = "the weight"  # what the number behind a folder of pictures is called
TIMEOUT = 30.0  # minutes that a process waits for another


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
