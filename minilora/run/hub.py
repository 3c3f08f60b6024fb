"""A finished run goes to the Hugging Face hub: `train.py --push-to-hub OWNER/NAME`.

What goes is what others can use; checkpoints and TensorBoard's files stay.  All of it is in the output folder
before anything is sent, so what goes wrong on the way costs a second try and nothing else.
"""

import glob
import shlex
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id

from ..settings.errors import UserError


def check_login(repo: str) -> None:
    """Raise UserError unless the hub knows who this is, and the token may write; asked before the first step.

    Whether it may write to this very repository, the hub tells only when it is done.
    """
    try:
        validate_repo_id(repo)
        token = HfApi().whoami().get("auth", {}).get("accessToken", {})
    except Exception as error:  # of whatever kind: no token, a wrong one, no network, a name that cannot be
        raise UserError(
            f"--push-to-hub {repo}: {_in_one_line(error)} (to log in, type `hf auth login` or set HF_TOKEN)"
        ) from error
    if token.get("role") == "read":
        raise UserError(
            f"--push-to-hub {repo}: the token may only read; make one that may write, and type `hf auth login --force`"
        )


def push(repo: str, folder: Path, names: Sequence[str]) -> str:
    """Upload files of a folder, and all within folders of it, by their names; return the address of the repository.

    Raises UserError, with what to type to try again, if the hub refuses or cannot be reached.
    """
    patterns = [glob.escape(name) + ("/*" if (folder / name).is_dir() else "") for name in names]
    try:
        url = HfApi().create_repo(repo, exist_ok=True)
        message = "LoRA trained with minilora"
        HfApi().upload_folder(repo_id=repo, folder_path=folder, allow_patterns=patterns, commit_message=message)
    except Exception as error:  # of whatever kind: the results are whole, and the user is to know where
        words = ["hf", "upload", repo, str(folder), ".", *(f"--include={pattern}" for pattern in patterns)]
        where = f"the results are in {folder}; to try again: {shlex.join(words)}"
        raise UserError(f"--push-to-hub {repo}: {_in_one_line(error)}; {where}") from error
    return str(url)


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
