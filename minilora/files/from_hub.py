"""What is named as on the Hugging Face hub, OWNER/NAME, is fetched from there, into the hub's own cache.

Of a repository with several LoRA files the one is taken that diffusers takes: the only .safetensors file, or
pytorch_lora_weights.safetensors.  Any other is named with its path there, OWNER/NAME/FILE.safetensors.
"""

import re
from pathlib import Path, PurePosixPath

from ..settings.errors import UserError, first_line
from .tensors import PICKLES

FILE_NAME = "pytorch_lora_weights.safetensors"  # of diffusers
PEFT_CONFIG, PEFT_FILE = "adapter_config.json", "adapter_model.safetensors"
WEIGHTS = (".safetensors", *PICKLES)  # what the names of files end with
NO_WEIGHTS = ("scheduler", "optimizer", "checkpoint")  # in the name of what is no LoRA, as diffusers has it
BASE_FILES = ["*.json", "*/*.json", "*/*.txt", "*/*.safetensors"]
VARIANTS = ["*.fp16.*", "*.non_ema.*"]


def lora_path(path: Path) -> Path:
    """Return a path as it is, or where the LoRA of the hub that it names was put; UserError if there is none."""
    found = re.fullmatch(r"(\w[\w.-]*/[\w.-]+?)(?:/(.+\.safetensors))?", path.as_posix())
    if path.exists() or not found or (not found[2] and path.suffix in WEIGHTS):
        return path
    from huggingface_hub import hf_hub_download

    repo, name = found.groups()
    name = name or _chosen(repo, _names_in(repo))
    try:
        if PurePosixPath(name).name == PEFT_FILE:  # whose scale stands beside it
            hf_hub_download(repo, str(PurePosixPath(name).with_name(PEFT_CONFIG)))
        return Path(hf_hub_download(repo, name))
    except Exception as error:  # of whatever kind: no network, no such file, no right to read it
        raise UserError(f"LoRA {path}: {_nothing(first_line(error))}") from error


def base_path(path: Path) -> Path:
    """Return a path as it is, or where the base of the hub that it names was put; UserError if there is none."""
    named = re.fullmatch(r"\w[\w.-]*/[\w.-]+", path.as_posix())
    if path.exists() or not named or path.suffix in WEIGHTS:
        return path
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(str(path), allow_patterns=BASE_FILES, ignore_patterns=VARIANTS))
    except Exception as error:  # as above
        raise UserError(f"{path}: {_nothing(first_line(error))}") from error
    return folder


def _nothing(reason: str) -> str:
    return f"there is no such file or folder, and none of that name on the hub that can be reached ({reason})"


def _names_in(repo: str) -> list[str]:
    """Return the names of the files of a repository; without a network those that were fetched before."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        return HfApi().list_repo_files(repo)
    except Exception as error:  # as above
        try:
            folder = Path(snapshot_download(repo, local_files_only=True))
        except Exception:
            raise UserError(f"LoRA {repo}: {_nothing(first_line(error))}") from error
        return [file.relative_to(folder).as_posix() for file in folder.rglob("*")]


def _chosen(repo: str, names: list[str]) -> str:
    """Return which of the files of a repository is its LoRA."""
    weights = [n for n in names if n.endswith(".safetensors") and not any(word in n for word in NO_WEIGHTS)]
    chosen = weights if len(weights) == 1 else [name for name in weights if name.endswith(FILE_NAME)]
    if len(chosen) != 1:
        which = f"{repo}/{sorted(weights)[0]}, or another of {len(weights)}" if weights else "but it has none"
        raise UserError(f"LoRA {repo}: give the .safetensors file that is meant: {which}")
    return chosen[0]
