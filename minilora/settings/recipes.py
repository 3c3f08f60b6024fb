"""--recipe: settings for what is to be learnt, for the number of pictures and the family of the base.

They are starting points, found by comparing what other trainers recommend (docs/your_pictures.md says where they
disagree).  A recipe never overrides a setting of the user.
"""

import json
import struct
from pathlib import Path

from PIL import Image

from .setting import is_miniature
from .shared import WEIGHT, hub_name, is_mask, path_and_number

RECIPES = ("subject", "face", "style")
_STEPS = {"subject": (100, 800, 2000), "face": (100, 1000, 3000), "style": (60, 1500, 4000)}  # per picture, min, max


def recipe_settings(recipe: str, values: dict) -> dict:
    """Return the settings that a recipe stands for, by name; `values` are the known settings."""
    model, style = values.get("model"), recipe == "style"
    class_pictures = values.get("class_prompt") and not values.get("preserve")
    if is_miniature(model):  # it has its own defaults, but its styles are in the convolutions
        return {"targets": ("conv",)} if style and not values.get("full") else {}
    each, least, most = _STEPS[recipe]
    rate = 1.0 if values.get("optimizer") == "prodigy" else 1e-4  # Prodigy finds the rate; this is a factor of it
    steps = min(max(each * _count(values.get("data") or (), values.get("max_pictures") or 1), least), most)
    settings = {
        "mirror": recipe != "face",  # a mirrored face is another face
        "rank": 32 if recipe == "face" else 16,
        "steps": steps * (2 if class_pictures else 1),  # half of the examples are class pictures
        "learning_rate": rate,
        "caption_dropout": 0.1 if style else 0.0,
        # A batch of subject and class pictures has a single size.
        "buckets": not class_pictures and not values.get("compile"),
    }
    if values.get("full"):  # no LoRA, and the text encoder stays frozen
        del settings["rank"], settings["learning_rate"]
    if _is_xl(model):
        settings["gradient_checkpointing"] = True
    elif not style and not values.get("full"):
        # The subject's word gets a new meaning.  XL's encoders are large and already know enough.
        settings |= {"train_text_encoder": True, "text_encoder_learning_rate": rate / 2}
    return settings


def _count(data, on_hub: int) -> int:
    """Count the pictures by their names, times their folder's weight; a data set on the hub counts as `on_hub`."""
    known, count = Image.registered_extensions(), 0
    for text in data:
        folder, weight = path_and_number(text, WEIGHT)
        pictures = [path for path in Path(folder).rglob("*") if path.suffix.lower() in known and not is_mask(path)]
        names = [path.relative_to(folder) for path in pictures]
        shown = [name for name in names if not any(part.startswith(".") for part in name.parts)]
        count += max(1, on_hub if hub_name(folder) else len(shown)) * int(weight)
    return count


def _is_xl(model: str) -> bool:
    """Whether a base is Stable Diffusion XL: by a folder's settings, a file's names, or the name of a hub id."""
    path = Path(model)
    try:
        if path.is_dir():
            return "XL" in json.loads((path / "model_index.json").read_text())["_class_name"]
        with path.open("rb") as file:
            [length] = struct.unpack("<Q", file.read(8))
            return b'"conditioner.embedders.1.' in file.read(min(length, 100_000_000))
    except (OSError, ValueError, KeyError, TypeError, struct.error):
        # It is on the hub, or broken, which loading will report.
        return "xl" in path.name.lower()
