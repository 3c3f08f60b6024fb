"""The settings of train.py: those of train_*.py together, and what connects them."""

import dataclasses
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

from .recipes import RECIPES, recipe_settings
from .setting import as_words, is_miniature
from .shared import WEIGHT, path_and_number
from .train_data import DataSettings
from .train_lora import LoraSettings
from .train_loss import LossSettings
from .train_optimizer import OptimizerSettings
from .train_output import OutputSettings


@dataclass(frozen=True)
class TrainConfig(OutputSettings, LossSettings, OptimizerSettings, LoraSettings, DataSettings):
    """Every setting of train.py; a dataclass lists those of its last base class first."""

    main, usage = "data", "--data FOLDER"
    one_of = ("steps", "epochs")
    reads_others = True
    examples = (
        "python train.py --data dataset/mountain --output out/mountain",
        "torchrun --nproc-per-node 2 train.py --data photos --caption 'sks dog' \\\n"
        "      --model stable-diffusion-v1-5/stable-diffusion-v1-5 --precision bf16",
    )

    @classmethod
    def following(cls, values: dict) -> dict:
        follows = super().following(values)
        if values.get("recipe") in RECIPES:
            follows |= recipe_settings(values["recipe"], values)
        if values.get("full"):  # training all weights needs a smaller rate
            follows |= {"learning_rate": 2e-4 if is_miniature(values.get("model")) else 1e-5}
        if values.get("optimizer") == "prodigy":  # which finds the rate; this is a factor of it
            follows |= {"learning_rate": 1.0}
        data, rank = values.get("data"), values.get("rank") or follows["rank"]
        path = Path(os.path.abspath(path_and_number(data[0], WEIGHT)[0] if data else ""))
        output = str(Path("out") / (path.stem if path.is_file() else path.name)) if data else None
        follows |= {"output": output, "alpha": float(max(rank, 1))}
        if words := re.findall(r"\w+", values.get("class_prompt") or ""):
            follows["class_data"] = str(Path("out") / "-".join(["class", *words]))
        return follows

    def recipe_as_typed(self) -> str:
        """Return the settings that --recipe has set here, as they are typed on the command line."""
        meant = recipe_settings(self.recipe, vars(self)) if self.recipe else {}
        return as_words({name: value for name, value in meant.items() if getattr(self, name) == value})

    def with_steps(self, pictures: int) -> "TrainConfig":
        """Return the settings with --epochs converted to steps, if it was given."""
        if not self.epochs:
            return self
        positions = self.epochs * pictures * (2 if self.has_class_pictures else 1)  # every other one is a class picture
        return dataclasses.replace(self, steps=math.ceil(positions / self.batch_size), epochs=None)

    def identity(self) -> dict:
        """Return the settings that the result of training depends on, as JSON values.

        The others say where files are, or how the processes divide the work.  Pictures and base are compared by their
        content, not by the names given here.
        """
        names = [field.name for field in dataclasses.fields(self) if field.metadata["in_identity"]]
        if self.lr_schedule == "constant":
            names.remove("steps")  # a longer run begins exactly like a shorter one
        settings = {name: getattr(self, name) for name in names}
        return json.loads(json.dumps(settings))  # tuples become lists, as in a checkpoint

    def problems(self, given: set[str]) -> list[str]:
        wrong = super().problems(given)
        if self.compile and self.buckets:
            wrong.append("--compile and --buckets cannot be combined: compiling takes minutes for each size")
        return wrong
