"""PEFT's settings: in adapter_config.json beside a file, or in the header of a file of diffusers; they hold the scale.

Source: PEFT 0.21.
"""

import math
import re
from pathlib import Path

from ..settings.errors import some
from ..settings.strict_json import parse_json
from .deltas import FormatError
from .names import split

# Nested or many repetitions: such a pattern in a stranger's file could take forever to match.
_SLOW = re.compile(r"\)[*+?{]|([*+{].*){4}", re.DOTALL)
_OTHER = ("use_dora", "lora_bias", "modules_to_save", "fan_in_fan_out", "layer_replication", "use_qalora")


def config_in(path: Path) -> dict:
    """Return the settings in a file adapter_config.json."""
    try:
        config = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FormatError(f"{path}: {error}") from error
    _check(str(path.parent), config)
    return config


def configs_in_header(path: Path, metadata: dict[str, str]) -> dict[str, dict]:
    """Return the settings by component, as diffusers writes them into a file's header; empty if there are none.

    Those of `save_lora_adapter` name no component; their key is "".
    """
    if "lora_adapter_metadata" not in metadata:
        return {}
    try:
        configs: dict[str, dict] = {}
        for key, value in parse_json(metadata["lora_adapter_metadata"]).items():
            component, name = split(key) if "." in key else ("", key)
            configs.setdefault(component, {})[name] = value
    except (ValueError, AttributeError) as error:
        raise FormatError(f"{path}: its lora_adapter_metadata is not a JSON object ({error})") from error
    for component, config in configs.items():
        _check(f"{path}, {component}", config)
    return configs


def _check(where: str, config: dict) -> None:
    """Refuse settings under which ΔW is not scale · B A."""
    if not isinstance(config, dict):
        raise FormatError(f"{where}: its settings are not a JSON object")
    problems = [f"{name} is {config[name]!r}" for name in _OTHER if config.get(name)]
    for name, usual in (("peft_type", "LORA"), ("bias", "none")):
        if config.get(name, usual) != usual:
            problems.append(f"{name} is {config[name]!r}")
    if str(config.get("init_lora_weights")).startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        problems.append(f"init_lora_weights is {config['init_lora_weights']!r}, which changes the base too")
    alphas = config.get("alpha_pattern") or {}
    if not isinstance(alphas, dict):
        problems.append(f"alpha_pattern is {alphas!r}")
        alphas = {}
    for name, alpha in {"lora_alpha": config.get("lora_alpha", 8), **alphas}.items():
        if not isinstance(alpha, (int, float)) or not abs(alpha) < 1e30:
            problems.append(f"the alpha of {name} is {alpha!r}")
    for pattern in alphas:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            problems.append(f"a pattern in alpha_pattern cannot be read ({error})")
        if _SLOW.search(pattern):
            problems.append(f"alpha_pattern has {pattern!r}, which could take forever to match")
    if problems:
        raise FormatError(f"{where}: {some(problems)}; only plain LoRA is read")


def peft_scale(config: dict, path: str, rank: int) -> float:
    """Return the scale of the module at a path: alpha / rank, or alpha / √rank for rsLoRA."""
    alpha = config.get("lora_alpha", 8)  # PEFT's default
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if any(re.match(rf"(.*\.)?({pattern})$", p) for p in (path, path.removeprefix("text_model."))):
            alpha = value
            break
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
