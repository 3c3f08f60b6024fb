"""What several commands share: groups of settings, settings, and how the text of a setting is understood."""

import math
import os
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .errors import UserError
from .setting import AT_LEAST_1, SEED, setting

TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")  # the attention projections of CLIP's text encoders
TEXT_ENCODERS = ("train_text_encoder", "which puts a LoRA there")  # for `needs` of `setting`
WEIGHT = "the weight"  # what error messages call the number behind a folder of pictures
FILE_NAME = "pytorch_lora_weights.safetensors"  # of a LoRA, as diffusers calls it
WEIGHT_FILES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")  # endings; all but the first are pickles
TIMEOUT = 30.0  # minutes that a process waits for another one

# The groups of settings: a command declares one with `rank: int = of_lora(16, "rank of the LoRA")`.
of_data = partial(setting, group="data")
of_pictures = partial(setting, group="pictures")
of_model = partial(setting, group="base and LoRA")
of_source = partial(of_model, in_identity=False)  # the base's content counts, not its name
of_lora = partial(setting, group="LoRA")
of_training = partial(setting, group="optimization")
of_speed = partial(setting, group="memory and speed", in_identity=False)
of_output = partial(setting, group="output", in_identity=False)

# Settings of several commands: a command declares one with `model: str | None = shared.model()`.
_BASE = "base: diffusers folder, hub id (OWNER/NAME) or .safetensors file; if not given, the bundled miniature"
_BASE_OF_LORA = _BASE.replace("the bundled", "the one that a LoRA names, or the bundled")
model = partial(of_source, None, _BASE, "BASE", basic=True)
model_of_lora = partial(of_source, None, _BASE_OF_LORA, "BASE", basic=True)
lora = partial(
    of_model,
    (),
    "LoRA: file, output folder of a run or hub id (OWNER/NAME); with a strength: out/fluent:0.8; may be repeated",
    "LORA[:STRENGTH]",
    repeat=True,
    basic=True,
)
lora_blocks = partial(
    of_model,
    (),
    "factors on the strength of the LoRAs by block: down=0.2,mid=1,up=1; a block is down, mid, up, text (the text "
    "encoders) or the beginning of layers' names (up_blocks.1); the longest match counts; the other layers keep 1",
    "BLOCK=FACTOR,…",
)
guidance = partial(
    of_pictures,
    text="classifier-free guidance: how closely pictures follow the prompt; at least 1, which turns it off",
    metavar="FACTOR",
    within=AT_LEAST_1,
)
seed = partial(of_pictures, 0, "seed of the first picture; each further picture takes the next number", "SEED", SEED)
precision = partial(
    of_speed,
    "auto",
    "number format of the base and the computation; bf16 and fp16 need half the memory; auto suits the machine",
    choices=("auto", "fp32", "bf16", "fp16"),
    in_identity=True,
)
compile_unet = partial(of_speed, False, "compile the U-Net: the first step takes minutes, later ones are faster")


def path_and_number(text: str, what: str = "the strength") -> tuple[str, float]:
    """Split "out/fluent:0.8" into path and number.

    Without a number it is 1.  A text that is an existing path is not split.  Raises UserError, which calls the number
    `what`, if it is not finite.
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


def by_name(texts: Sequence[str], kind: type = float) -> dict[str, Any]:
    """Return settings such as up=0.5 or attn2=16 as a mapping from name to number."""
    return {name: kind(number) for name, number in (text.split("=") for text in texts)}


def wrong_blocks(texts: Sequence[str]) -> list[str]:
    """Return what is wrong with --lora-blocks."""
    names = [text.partition("=")[0] for text in texts]
    bad = [text for text in texts if not re.fullmatch(r"[\w.]+=-?\d*\.?\d+", text)]
    wrong = [f"--lora-blocks {text}: it takes a block and a factor, as up=0.5" for text in bad]
    return wrong + [f"--lora-blocks names {name} twice" for name in dict.fromkeys(names) if names.count(name) > 1]


def is_mask(path: Path) -> bool:
    """Whether a picture is the mask of another one, by its name: a.mask.png is that of a.jpg."""
    return path.stem.lower().endswith(".mask")


def hub_name(path: str | Path) -> tuple[str, str | None] | None:
    """Return the repository OWNER/NAME, and the file in it, that a name may mean on the Hugging Face hub.

    Return None for local names: existing paths, paths in an existing folder (so that a misspelt dataset/mountian stays
    local) or in out/, where results are written, and weight files.
    """
    path = Path(path)
    if not path.parts or path.exists() or Path(path.parts[0]).is_dir() or path.parts[0] == "out":
        return None
    found = re.fullmatch(r"(\w[\w.-]*/[\w.-]+?)(?:/(.+\.safetensors))?", path.as_posix())
    return None if not found or (not found[2] and path.suffix in WEIGHT_FILES) else (found[1], found[2])


def folder_for(application: str, names: Sequence[str]) -> Path:
    """Return the default output folder of an application for some pictures: out/morph-a-b."""
    return Path("out") / "-".join([application, *(Path(name).stem for name in names)])
