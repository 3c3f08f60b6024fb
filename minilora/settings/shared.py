"""What the settings of several commands have in common: their groups and their help."""

import math
import os

from .errors import UserError

TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")  # those of CLIP's text encoders
DATA, MODEL, TRAINING, OUTPUT, PICTURES = "data", "base and LoRA", "training", "output", "pictures"
OTHER = "instead of merging into a base"
MODEL_HELP = "diffusers folder, hub id or single .safetensors file of the base; the bundled miniature if not given"
MODEL_CONFIG_HELP = "diffusers folder or hub id with the settings and tokenizer that a single file of --model lacks"
ZERO_SNR_HELP = "change the base's noise levels so that the last is pure noise; for bases that predict v"
PRECISION_HELP = "number format of the frozen base and of the computation"
PRECISIONS = ("fp32", "bf16", "fp16")
COMPILE_HELP = "let torch.compile make the U-Net's code: the first step takes minutes, the others less than without"
CLASS = ("class_prompt", "what the pictures of the class show")  # that others need, as `setting` takes it
TEXT_ENCODERS = ("train_text_encoder", "which puts a LoRA there")
WEIGHT = "the weight"  # what the number behind a folder of pictures is called
TIMEOUT = 30.0  # minutes that a process waits for another


def path_and_number(text: str, what: str = "the strength") -> tuple[str, float]:
    """Split "out/fluent:0.8" into path and number; without a number it is 1, and what exists is a path.

    Raises UserError for a number that is not finite; `what` is what it is called.
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
