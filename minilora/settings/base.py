"""The settings of every command that takes a base; if --model is not given, a LoRA may name its base.

The first of these that exists names it:

    config.json            of our training run: the base, and how it is read
    README.md              a model card, on disk or on the hub: its base_model
    adapter_config.json    PEFT's: base_model_name_or_path
    the file's metadata    kohya's ss_sd_model_name: a hub id, or a file's name without its folder
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from .setting import Settings
from .shared import FILE_NAME, hub_name, of_model, of_source, path_and_number
from .strict_json import parse_json


@dataclass(frozen=True, kw_only=True)
class VersionSettings(Settings):
    """Which version of a base to load."""

    revision: str | None = of_source(None, "branch, tag or commit of a base on the hub", "REVISION")
    variant: str | None = of_source(None, "variant of a base's weights: fp16 reads model.fp16.safetensors", "VARIANT")


@dataclass(frozen=True, kw_only=True)
class BaseSettings(VersionSettings):
    """The settings, besides --model, of the commands that load a base."""

    model_config: str | None = of_source(
        None, "diffusers folder or hub id with the config and tokenizer that a single-file --model lacks", "FOLDER"
    )
    vae: str | None = of_source(
        None,
        "VAE to use instead of the base's own: folder or hub id of a VAE or a base, or a .safetensors file of either",
        "VAE",
    )
    prediction_type: str | None = of_source(
        None,
        "what the U-Net predicts, if the base's own config or mark is missing or wrong",
        choices=("epsilon", "v_prediction"),
    )
    zero_terminal_snr: bool = of_model(
        False,
        "rescale the base's noise levels so that the last one is pure noise; for bases that predict v",
        by_recipe=True,
    )

    @classmethod
    def following(cls, values: dict) -> dict:
        named = named_base(values.get("lora")) if values.get("model") is None else None
        found = named.settings if named else {}
        return super().following(values | found) | found

    def base_settings(self) -> dict:
        """Return the settings that say which base it is, for use in other commands."""
        return {name: getattr(self, name) for name in HOW}


HOW = ("model", *(one.name for one in fields(BaseSettings)))


@dataclass(frozen=True)
class NamedBase:
    """A base that a LoRA names; without settings it is the bundled one."""

    by: str  # what names it: "config.json of out/mountain"
    settings: dict[str, Any]  # the settings in HOW that differ from their defaults


def named_base(loras: str | Sequence[str] | None) -> NamedBase | None:
    """Return the base of the first LoRA, "path" or "path:strength", that names one; None if none does.

    An unreadable file names nothing: the LoRA is read later, and that reports what is wrong.
    """
    for text in (loras,) if isinstance(loras, str) else loras or ():
        path, _ = path_and_number(text)
        sources = [("the card", _on_hub(repo[0]))] if (repo := hub_name(path)) else _beside(Path(path))
        for by, settings in sources:
            if settings is not None:
                return NamedBase(f"{by} of {path}", settings)
    return None


def _beside(path: Path) -> Iterator[tuple[str, dict | None]]:
    """Yield each source that may name the base of a local LoRA, and the settings that it gives, if any."""
    folder = path if path.is_dir() else path.parent
    run = _json(folder / "config.json")
    how = {name: run[name] for name in HOW if isinstance(run.get(name), str | bool) and run[name]}
    yield "config.json", (how if "model" in how else {}) if {"model", "base_lora"} <= run.keys() else None
    yield "README.md", _model(_card(folder / "README.md"))
    yield "adapter_config.json", _model(_json(folder / "adapter_config.json").get("base_model_name_or_path"))
    name = _metadata(folder / FILE_NAME if path.is_dir() else path).get("ss_sd_model_name")
    beside = folder / name if name else folder
    yield "ss_sd_model_name in the metadata", _model(str(beside) if beside.is_file() else name)


@cache  # the page asks at every move of a slider
def _on_hub(repo: str) -> dict | None:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    try:
        here = try_to_load_from_cache(repo, "README.md")
        return _model(_card(Path(here if isinstance(here, str) else hf_hub_download(repo, "README.md"))))
    except Exception:  # no network, no card, no such repository, …
        return None


def _model(name: Any) -> dict | None:
    return {"model": name} if isinstance(name, str) and name else None


def _json(path: Path) -> dict:
    try:
        values = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _card(path: Path) -> Any:
    """Return the base_model of a model card; the first, if there are several."""
    if not path.is_file():
        return None
    from huggingface_hub import metadata_load

    try:
        name = (metadata_load(path) or {}).get("base_model")
    except Exception:  # no metadata block, broken YAML, …
        return None
    return name[0] if isinstance(name, list) and name else name


def _metadata(path: Path) -> Mapping[str, str]:
    if path.suffix != ".safetensors" or not path.is_file():
        return {}
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):
        return {}
