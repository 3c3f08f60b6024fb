"""Fetch LoRAs and bases named by a hub id, OWNER/NAME, into the Hugging Face hub's own cache.

From a repository, the LoRA file is chosen as diffusers does: the only .safetensors file, or
pytorch_lora_weights.safetensors.  Another file is named with its path: OWNER/NAME/FILE.safetensors.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from ..settings.errors import UserError, first_line
from ..settings.shared import FILE_NAME, hub_name

PEFT_CONFIG, PEFT_FILE = "adapter_config.json", "adapter_model.safetensors"
NO_WEIGHTS = ("scheduler", "optimizer", "checkpoint")  # in the names of files that are not LoRAs, as in diffusers
BASE_FILES = ["*.json", "*/*.json", "*/*.txt", "*/*.safetensors"]
VARIANTS = ["*.fp16.*", "*.non_ema.*"]


def lora_path(path: Path) -> Path:
    """Return a local path unchanged; for a LoRA on the hub, the path of the fetched file.  UserError if none exists."""
    if not (found := hub_name(path)):
        return path
    from huggingface_hub import hf_hub_download

    repo, name = found
    name = name or _chosen(repo, _names_in(repo))
    with _reaching(f"LoRA {path}"):
        if PurePosixPath(name).name == PEFT_FILE:  # its scale is in the config
            hf_hub_download(repo, str(PurePosixPath(name).with_name(PEFT_CONFIG)))
        return Path(hf_hub_download(repo, name))


def base_path(path: Path, revision: str | None = None, variant: str | None = None) -> Path:
    """Return a local path unchanged; for a base on the hub, the path of the fetched folder.  UserError if none exists.

    Fetches the newest revision unless one is named, and one variant of the weights.
    """
    if not (found := hub_name(path)) or found[1]:
        if revision:
            raise UserError(f"--revision {revision}: {path} is a local file; only a base on the hub has revisions")
        return path
    from huggingface_hub import snapshot_download

    wanted, others = BASE_FILES, VARIANTS
    if variant:
        wanted, others = [*wanted[:-1], f"*/*.{variant}.safetensors", f"*/*.{variant}-*.safetensors"], []
    with _reaching(str(path)):
        return Path(snapshot_download(str(path), revision=revision, allow_patterns=wanted, ignore_patterns=others))


def variant_of(path: Path) -> str:
    """Return "fp16" for model.fp16.safetensors and its shards, model.fp16-00001-of-00002.safetensors; else ""."""
    return re.sub(r"-\d+-of-\d+", "", ".".join(path.name.split(".")[1:-1]))


@contextmanager
def _reaching(what: str) -> Iterator[None]:
    """Within the block, turn any error of the hub (no network, no such file, no permission, …) into a UserError."""
    try:
        yield
    except Exception as error:
        reason = "there is no such file or folder, and the hub has none that can be reached"
        raise UserError(f"{what}: {reason} ({first_line(error)})") from error


def _names_in(repo: str) -> list[str]:
    """Return the names of a repository's files; without a network, those fetched before."""
    from huggingface_hub import HfApi, snapshot_download

    with _reaching(f"LoRA {repo}"):
        try:
            return HfApi().list_repo_files(repo)
        except Exception:
            with suppress(Exception):
                folder = Path(snapshot_download(repo, local_files_only=True))
                return [file.relative_to(folder).as_posix() for file in folder.rglob("*")]
            raise


def _chosen(repo: str, names: list[str]) -> str:
    """Return the name of a repository's LoRA file; UserError if there is none, or no obvious one."""
    weights = [n for n in names if n.endswith(".safetensors") and not any(word in n for word in NO_WEIGHTS)]
    chosen = weights if len(weights) == 1 else [name for name in weights if name.endswith(FILE_NAME)]
    if len(chosen) != 1:
        if not weights:
            raise UserError(f"LoRA {repo}: it has no .safetensors file of a LoRA")
        example = f"{repo}/{sorted(weights)[0]}"
        raise UserError(f"LoRA {repo}: it has {len(weights)} .safetensors files; name one, for example {example}")
    return chosen[0]
