"""The page that goes with a LoRA: README.md in its folder, as the Hugging Face hub shows it.

Its head is YAML that the hub reads: the base, what kind of model it is, a picture.  Below stand what
was trained on, with which settings, and what to type.  The same run gives the same page.
"""

import dataclasses
import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from .config import TrainConfig, split_weight
from .folder import Item
from .formats import FILE_NAME
from .names import ATTENTION

SHOWN = 5  # captions


def model_card(config: TrainConfig, items: Sequence[Item], is_xl: bool, picture: str) -> str:
    """Return the page of a finished run, in Markdown; `picture` is the path of one that it shows, from the page."""
    captions = list(dict.fromkeys(caption for item in items for caption in item.captions))[:SHOWN]
    head = {
        "base_model": config.model if config.model and not os.path.exists(config.model) else None,
        "library_name": "diffusers",
        "tags": ["text-to-image", "lora", "stable-diffusion-xl" if is_xl else "stable-diffusion", "minilora"],
        "license": "other",
        "license_name": "that-of-base-and-pictures",
        "widget": [{"text": captions[0], "output": {"url": picture}}],
    }
    defaults = {field.name: field.metadata["default"] for field in dataclasses.fields(config)}
    settings = {name: value for name, value in config.identity().items() if name in defaults}
    name = Path(config.output).resolve().name
    # JSON is YAML, and needs no rules of its own for what is to be quoted.
    yaml = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items() if value is not None]
    base = config.model or "the miniature Stable Diffusion that is bundled with minilora"
    base += f", with {' and '.join(f'`{text}`' for text in config.base_lora)} in it" if config.base_lora else ""
    folders = ", ".join(f"`{Path(split_weight(text)[0]).name}`" for text in config.data)
    rows = "\n".join(f"| {key} | {_told(value)} |" for key, value in settings.items())
    paragraphs = [
        "\n".join(["---", *yaml, "---"]),
        f"# {name}",
        f"A LoRA for {base}, trained on {len(items)} picture{'s' if len(items) > 1 else ''} of "
        f"{folders}. The licences of the base and of the pictures apply to it.",
        f"![samples]({picture})",
        "Words that it was trained with: " + "; ".join(f"“{caption}”" for caption in captions) + ".",
        f"```bash\n{sample_command(config, captions[0])}\n```",
        f"```python\npipeline.load_lora_weights({name!r}, weight_name={FILE_NAME!r})  # diffusers\n```",
        f"| setting | value |\n|---|---|\n{rows}",
    ]
    return "\n\n".join(paragraphs) + "\n"


def sample_command(config: TrainConfig, prompt: str) -> str:
    """Return what to type to draw with the LoRA of a finished run."""
    words = ["python", "sample.py", "--prompt", prompt]
    words += [word for lora in (config.output, *config.base_lora) for word in ("--lora", lora)]
    words += ["--model", config.model] if config.model else []
    words += ["--model-config", config.model_config] if config.model_config else []
    words += ["--zero-terminal-snr"] if config.zero_terminal_snr else []
    return shlex.join(words)


def _told(value) -> str:
    words = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return "attention" if words == ",".join(ATTENTION) else words.replace("|", "\\|")
