"""Why a run cannot resume from a checkpoint, in the user's terms: the setting, the picture or the weights that differ.

Two runs are the same if their identities are equal.  An identity holds only hashes of the pictures and the base.  So a
checkpoint also lists its pictures by content and caption, and `config.json` in the output folder has the settings.
"""

import dataclasses
import json
from collections import Counter, defaultdict
from collections.abc import Iterable

from ..data.folder import Item
from ..settings.setting import ByBase, as_typed, option
from .setup import Run

SHOWN = 3  # pictures that are named; the others are counted
# The hashes in an identity: what each is a hash of, and the settings that name its source.
HASHES = {
    "unet": ("the U-Net", ("model", "base_lora")),
    "vae": ("the VAE", ("model", "model_config", "vae")),
    "text_encoder": ("the text encoder", ("model", "model_config", "base_lora")),
    "init_from": ("the LoRA", ("init_from",)),
}
# Settings that select pictures and captions; --data is left out, because the pictures themselves are named.
ABOUT_PICTURES = ("caption", "caption_column", "class_data", "class_pictures", "validation")
OTHERS = {"objective": "the objective", "schedule": "the noise schedule of the base"}  # identities that are no settings

Content = tuple[str, tuple[str, ...], str]  # of a picture: its digest, its captions, and its mask's digest or ""


def differences(run: Run, saved: dict) -> list[str]:
    """Return the differences between a run and the identity in a checkpoint, one line each."""
    there, here = _identity_of_defaults(run) | saved["fingerprint"], run.identity
    different = {key for key in there.keys() | here.keys() if there.get(key) != here.get(key)}
    before, now = _typed_before(run), json.loads(run.config.to_json())

    def changed(names: Iterable[str]) -> list[str]:
        found = [name for name in names if name in before and before[name] != now[name]]
        return [_changed(option(name), before[name], now[name]) for name in found]

    lines = []
    for key in sorted(different & HASHES.keys()):
        what, settings = HASHES[key]
        source = f"{option(settings[0])} {now[settings[0]]}" if now[settings[0]] else "the bundled base"
        lines += changed(settings) or [f"the weights of {what} of {source} have changed"]
    for key in sorted(different - HASHES.keys() - {"pictures"}):
        lines.append(_changed(OTHERS.get(key, option(key)), there.get(key), here.get(key)))
    if "pictures" in different:
        lines += changed(ABOUT_PICTURES)
        listed = [(digest, tuple(texts), "".join(mask)) for digest, texts, *mask in saved.get("pictures", [])]
        pictures = picture_differences(listed, (*run.examples.items, *run.examples.class_items))
        more = [f"and {len(pictures) - SHOWN} more pictures"] if len(pictures) > SHOWN else []
        lines += [*pictures[:SHOWN], *more] if listed else ["its pictures or captions are not those of --data"]
    return list(dict.fromkeys(lines))


def _identity_of_defaults(run: Run) -> dict:
    """Return the default settings, for settings that did not exist yet when a checkpoint was written."""
    fields, names = dataclasses.fields(run.config), run.config.identity()
    defaults = {field.name: field.metadata["default"] for field in fields if field.name in names}
    known = {name: value for name, value in defaults.items() if value is not None and not isinstance(value, ByBase)}
    return json.loads(json.dumps(known))


def picture_differences(there: Iterable[Content], items: Iterable[Item]) -> list[str]:
    """Return how pictures differ from the former ones, one line per picture."""
    old, new = Counter(there), Counter(map(_content, items))
    paths = {_content(item): item.path for item in items}
    gone = dict.fromkeys(content for content in old if content not in new)
    come = dict.fromkeys(content for content in new if content not in old)
    lines = []
    for place in (0, 1):  # first the same pictures with other captions, then other pictures with the same captions
        twins = defaultdict(list)
        for content in gone:
            twins[content[place]].append(content)
        for content in list(come):
            if twins[content[place]]:
                twin = twins[content[place]].pop(0)
                del gone[twin], come[content]
                if place:
                    told = f"other content; its caption is {_captions(content)}"
                elif twin[1] != content[1]:
                    told = f"another caption: it was {_captions(twin)} and is {_captions(content)}"
                elif twin[2] and content[2]:
                    told = "another mask"
                else:
                    told = f"{'a' if content[2] else 'no'} mask now"
                lines.append(f"{paths[content]} has {told}")
    lines += [f"{paths[content]} was not there" for content in come]
    lines += [f"a picture with the caption {_captions(content)} is no longer there" for content in gone]
    lines += [
        f"{paths[content]} came {old[content]} × per epoch and comes {new[content]} ×"
        for content in new
        if old[content] not in (0, new[content])
    ]
    return lines or ["the pictures have new names, which changes their order"]


def _typed_before(run: Run) -> dict:
    """Return the settings in the output folder, as JSON values; empty if there are none."""
    try:
        return json.loads((run.output / "config.json").read_text())
    except (OSError, ValueError):
        return {}


def _changed(name: str, before: object, now: object) -> str:
    return f"{name} was {_shown(before)} and is {_shown(now)}"


def _shown(value: object) -> str:
    if value in (None, "", []):
        return "not given"
    if isinstance(value, bool):
        return "on" if value else "off"
    return as_typed(tuple(value)) if isinstance(value, list) else as_typed(value)


def _content(item: Item) -> Content:
    return item.digest, item.captions, item.mask_digest


def _captions(content: Content) -> str:
    return " | ".join(map(repr, content[1]))
