"""Push a finished run to the Hugging Face hub: `train.py --push-to-hub OWNER/NAME`.

The results are pushed; checkpoints and TensorBoard's files are not.  Everything is in the output folder before the
upload starts, so a failed upload loses nothing and can be repeated.
"""

import glob
import shlex
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id

from ..settings.errors import UserError, in_one_line


def check_login(repo: str) -> None:
    """Raise UserError unless the user is logged in to the hub with a token that may write; called before training.

    Whether it may write to this repository is only known when pushing.
    """
    try:
        validate_repo_id(repo)
        token = HfApi().whoami().get("auth", {}).get("accessToken", {})
    except Exception as error:  # no token, a wrong one, no network, an invalid name, …
        raise UserError(
            f"--push-to-hub {repo}: {in_one_line(error)} (to log in, run `hf auth login` or set HF_TOKEN)"
        ) from error
    if token.get("role") == "read":
        raise UserError(
            f"--push-to-hub {repo}: the token may only read; create one that may write, and run `hf auth login --force`"
        )


def push(repo: str, folder: Path, names: Sequence[str]) -> str:
    """Upload files and sub-folders of a folder, by their names; return the address of the repository.

    Raises UserError, with the command to try again, if the hub refuses or cannot be reached.
    """
    patterns = [glob.escape(name) + ("/*" if (folder / name).is_dir() else "") for name in names]
    try:
        url = HfApi().create_repo(repo, exist_ok=True)
        message = "LoRA trained with minilora"
        HfApi().upload_folder(repo_id=repo, folder_path=folder, allow_patterns=patterns, commit_message=message)
    except Exception as error:  # any error: the results are complete, and the message says where they are
        words = ["hf", "upload", repo, str(folder), ".", *(f"--include={pattern}" for pattern in patterns)]
        where = f"the results are in {folder}; to try again: {shlex.join(words)}"
        raise UserError(f"--push-to-hub {repo}: {in_one_line(error)}; {where}") from error
    return str(url)
