"""A run's numbers and pictures in Weights & Biases, beside TensorBoard: `train.py --wandb PROJECT`."""

import dataclasses
import hashlib
import json

from .config import TrainConfig, UserError


def join_wandb(config: TrainConfig, identity: dict, resumed: bool):
    """Return the wandb run of a run; one that is resumed goes on in the same, whose id is a hash of the identity.

    Raises UserError if wandb refuses or cannot be reached.
    """
    import wandb

    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    try:
        return wandb.init(
            project=config.wandb,
            id=name,
            resume="allow" if resumed else None,  # None: what there is under this id is written anew
            config=dataclasses.asdict(config),
            dir=config.output,
            settings=wandb.Settings(console="off"),  # the terminal stays ours
        )
    except wandb.Error as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--wandb {config.wandb}: {reason} (type `wandb login`, or set WANDB_MODE=offline)") from error
