"""The model card of a LoRA: README.md in its folder, which the Hugging Face hub shows.

It begins with YAML for the hub: the base, the kind of model, a picture.  Then come the training captions, commands to
draw with the LoRA, and the settings.  The same run gives the same card.
"""

import dataclasses
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import ModelCardData

from ..data.folder import Item
from ..files.read import FILE_NAME
from ..settings.setting import option
from ..settings.shared import WEIGHT, path_and_number
from ..settings.train import TrainConfig
from .trained import FULL_RESULTS

SHOWN = 5  # captions
LISTED = ("rank", "alpha", "targets", "steps", "batch_size", "learning_rate")  # always; others if not at default


def drawing_command(config: TrainConfig, prompt: str, lora: str) -> str:
    """Return the command that draws a prompt with the LoRA of a run, on the base that it was trained on."""
    words = ["python", "sample.py", "--prompt", prompt]
    if config.full:
        return shlex.join([*words, "--model", f"{lora}/{FULL_RESULTS[0]}"])
    words += [word for each in (lora, *config.base_lora) for word in ("--lora", each)]
    for name in ("model", "revision", "variant", "model_config", "vae", "prediction_type"):
        words += [option(name), getattr(config, name)] if getattr(config, name) else []
    return shlex.join(words + (["--zero-terminal-snr"] if config.zero_terminal_snr else []))


def model_card(
    config: TrainConfig,
    items: Sequence[Item],
    is_xl: bool,
    picture: str | None,
    scheduler_options: Mapping | None = None,
) -> str:
    """Return the card of a finished run, in Markdown.

    `picture` is the path of a picture to show, if there is one; `scheduler_options` are those of `Base`.
    """
    captions = list(dict.fromkeys(caption for item in items for caption in item.captions))[:SHOWN]
    head = ModelCardData(  # it leaves out what is None
        base_model=config.model if config.model and not os.path.exists(config.model) else None,
        library_name="diffusers",
        tags=[
            "text-to-image",
            *([] if config.full else ["lora"]),
            "stable-diffusion-xl" if is_xl else "stable-diffusion",
            "minilora",
        ],
        license="other",
        license_name="that-of-base-and-pictures",
        widget=[{"text": captions[0], "output": {"url": picture}}] if picture else None,
    )
    repo = config.push_to_hub
    name = repo.split("/")[1] if repo else Path(config.output).resolve().name
    folder = f"out/{name}" if repo else config.output
    fetch = shlex.join(["hf", "download", repo, "--local-dir", folder]) + "\n" if repo else ""
    base = config.model or "the miniature Stable Diffusion that is bundled with minilora"
    base += f", with {' and '.join(f'`{text}`' for text in config.base_lora)} in it" if config.base_lora else ""
    folders = ", ".join(f"`{Path(path_and_number(text, WEIGHT)[0]).name}`" for text in config.data)
    what = "The U-Net, all of its weights, of" if config.full else "A LoRA for"
    rows = "\n".join(f"| {key} | {_cell(value)} |" for key, value in _settings(config).items())
    paragraphs = [
        f"---\n{head.to_yaml()}\n---",
        f"# {name}",
        f"{what} {base}, trained on {len(items)} picture{'s' if len(items) > 1 else ''} of {folders}. "
        "The licences of the base and of the pictures apply to it.",
        *([f"![samples]({picture})"] if picture else []),
        "Training captions: " + "; ".join(f"“{caption}”" for caption in captions) + ".",
        f"To draw with minilora:\n\n```bash\n{fetch}{drawing_command(config, captions[0], folder)}\n```",
        f"To draw with diffusers{'' if config.full else ' (and peft, which it needs for LoRA)'}:\n\n"
        f"```python\n{_in_diffusers(config, is_xl, repo or folder, captions[0], scheduler_options or {})}\n```",
        f"Training settings; the others are minilora's defaults:\n\n| setting | value |\n|---|---|\n{rows}",
    ]
    return "\n\n".join(paragraphs) + "\n"


def _in_diffusers(config: TrainConfig, is_xl: bool, lora: str, prompt: str, scheduler_options: Mapping) -> str:
    kind = "StableDiffusionXLPipeline" if is_xl else "StableDiffusionPipeline"
    draw = f"pipeline({prompt!r}).images[0].save('drawn.png')"
    if config.full:
        model = f"{lora}/{FULL_RESULTS[0]}"
        return f"from diffusers import {kind}\n\npipeline = {kind}.from_pretrained({model!r})\n{draw}"
    model = config.model or "minilora/base"
    more = "".join(f", {name}={value!r}" for name in ("revision", "variant") if (value := getattr(config, name)))
    load = f"from_pretrained({model!r}{more})"
    if os.path.isfile(model):
        load = f"from_single_file({model!r}" + (f", config={config.model_config!r})" if config.model_config else ")")
    lines = [f"from diffusers import {kind}", "", f"pipeline = {kind}.{load}"]
    if scheduler_options:
        lines[0] = f"from diffusers import DDIMScheduler, {kind}"
        changed = ", ".join(f"{name}={value!r}" for name, value in scheduler_options.items())
        lines.append(f"pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, {changed})")
    if config.vae:
        lines.append(f"# It was trained with the VAE of {config.vae}: put that into pipeline.vae.")
    for path, strength in map(path_and_number, config.base_lora):
        lines += [f"pipeline.load_lora_weights({str(path)!r})", f"pipeline.fuse_lora(lora_scale={strength:g})"]
        lines.append("pipeline.unload_lora_weights()")
    return "\n".join([*lines, f"pipeline.load_lora_weights({lora!r}, weight_name={FILE_NAME!r})", draw])


def _settings(config: TrainConfig) -> dict:
    """Return the settings that the card lists, by name, as JSON values: the main ones, and those not at default."""
    defaults = {field.name: field.metadata["default"] for field in dataclasses.fields(config)}
    defaults = json.loads(json.dumps(defaults, default=str))
    settings = {"steps": config.steps} | config.identity()
    listed = {name: value for name, value in settings.items() if name in LISTED or value != defaults.get(name, value)}
    if config.full or config.init_from:  # no LoRA, or one with its own rank, alpha and targets
        listed = {name: value for name, value in listed.items() if name not in ("rank", "alpha", "targets")}
    if config.init_from:
        listed["init_from"] = Path(config.init_from).name
    return listed


def _cell(value) -> str:
    words = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return words.replace("|", "\\|")
