"""The settings of train.py, and their checks."""

import dataclasses
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .recipes import RECIPES, recipe_settings
from .setting import (
    ABOVE_0,
    AT_LEAST_0,
    AT_LEAST_1,
    SEED,
    SHARE,
    ByBase,
    Settings,
    Within,
    as_typed,
    is_installed,
    is_miniature,
    option,
    setting,
)
from .shared import (
    CLASS,
    CLASS_PICTURES,
    COMPILE_HELP,
    DATA,
    MODEL,
    MODEL_CONFIG_HELP,
    MODEL_HELP,
    NOISE,
    OUTPUT,
    PRECISION_HELP,
    PRECISIONS,
    PREDICTION_HELP,
    PREDICTIONS,
    SPEED,
    TEXT_ATTENTION,
    TEXT_ENCODERS,
    TIMEOUT,
    TRAINING,
    VAE_HELP,
    VALIDATION,
    WEIGHT,
    ZERO_SNR_HELP,
    path_and_number,
)


@dataclass(frozen=True)
class TrainConfig(Settings):
    """Every setting of train.py."""

    usage = "--data FOLDER"
    examples = (
        "python train.py --data dataset/mountain --output out/mountain",
        "torchrun --nproc-per-node 2 train.py --data photos --caption 'sks dog' \\\n"
        "      --model stable-diffusion-v1-5/stable-diffusion-v1-5 --precision bf16",
    )

    data: tuple[str, ...] = setting(
        (),
        "folder of pictures, with captions in metadata.jsonl, metadata.csv or a .txt beside each; or one picture; may "
        "be repeated; with a weight, folder:2, each picture comes twice per epoch",
        repeat=True,
        group=DATA,
        metavar="FOLDER",
        basic=True,
        in_identity=False,
    )
    caption: str | None = setting(
        None,
        "caption of every picture that has none in the folder",
        group=DATA,
        alias="--instance-prompt",
        basic=True,
        in_identity=False,
    )
    caption_column: str = setting(
        "text", "key of the caption in metadata.jsonl or metadata.csv", group=DATA, metavar="KEY", in_identity=False
    )
    trigger: str | None = setting(
        None, "word to put before every caption: sks makes 'sks, a dog'", group=DATA, metavar="WORD", basic=True
    )
    recipe: str | None = setting(
        None,
        "what to learn: sets steps by the number of pictures, rank, learning rate and more, where they are not given",
        group=TRAINING,
        choices=RECIPES,
        basic=True,
        in_identity=False,
    )
    resolution: int | None = setting(
        None,
        "side of the training pictures in pixels; if not given, the base's own",
        group=DATA,
        metavar="PIXELS",
        basic=True,
        within=AT_LEAST_1,
    )
    crop: str = setting(
        "center",
        "which square of a picture is seen; random takes another each time, and encodes it anew, without the cache",
        choices=("center", "random"),
        group=DATA,
    )
    buckets: bool = setting(
        False,
        "train on several sizes of about equal area, not on squares, so that less is cropped away",
        group=DATA,
        by_recipe=True,
    )
    mirror: bool = setting(False, "show each picture mirrored half of the time", group=DATA, by_recipe=True)
    caption_dropout: float = setting(
        ByBase(0.0, 0.1),
        "share of draws, 0 to 1, whose caption is left empty",
        group=DATA,
        metavar="SHARE",
        within=SHARE,
    )
    max_pixels: int = setting(
        89_478_485,
        "most pixels that a picture may have; a small file can claim more than memory holds",
        group=DATA,
        metavar="PIXELS",
        within=AT_LEAST_1,
        in_identity=False,
    )
    cache: str = setting(
        "~/.cache/minilora",
        "folder of the encoded pictures and captions; all runs share it",
        group=DATA,
        metavar="FOLDER",
        in_identity=False,
    )

    validation: str | None = setting(
        None,
        "held-out pictures to measure the loss on: a folder, or a share of --data, as 0.1; the LoRA with the lowest "
        "loss is kept",
        group=VALIDATION,
        metavar="FOLDER|SHARE",
        in_identity=False,
    )
    validate_every: int | None = setting(
        None,
        "steps between two measurements; the first and the last step always have one",
        group=VALIDATION,
        metavar="STEPS",
        needs=("validation", "the pictures to look at"),
        within=AT_LEAST_1,
        in_identity=False,
    )

    class_prompt: str | None = setting(
        None, "prompt of the subject's class, for prior preservation: 'a dog'", group=CLASS_PICTURES
    )
    class_data: str | None = setting(
        None,
        "folder of class pictures; missing ones are generated; if not given, out/class-<prompt>",
        group=CLASS_PICTURES,
        metavar="FOLDER",
        needs=CLASS,
        in_identity=False,
    )
    class_pictures: int = setting(
        ByBase(200, 16),
        "number of class pictures in all",
        group=CLASS_PICTURES,
        metavar="PICTURES",
        within=AT_LEAST_1,
        needs=CLASS,
        in_identity=False,
    )
    prior_weight: float = setting(
        1.0,
        "weight of the class pictures in the loss",
        group=CLASS_PICTURES,
        metavar="WEIGHT",
        within=ABOVE_0,
        needs=CLASS,
    )

    model: str | None = setting(None, MODEL_HELP, group=MODEL, metavar="BASE", basic=True, in_identity=False)
    model_config: str | None = setting(None, MODEL_CONFIG_HELP, group=MODEL, metavar="FOLDER", in_identity=False)
    vae: str | None = setting(None, VAE_HELP, group=MODEL, metavar="VAE", in_identity=False)
    prediction_type: str | None = setting(None, PREDICTION_HELP, choices=PREDICTIONS, group=MODEL, in_identity=False)
    base_lora: tuple[str, ...] = setting(
        (),
        "LoRA to merge into the base before training; with a strength: out/fluent:0.8; may be repeated",
        repeat=True,
        group=MODEL,
        metavar="LORA[:STRENGTH]",
        in_identity=False,
    )
    init_from: str | None = setting(
        None,
        "LoRA to train further, with its own layers and ranks, instead of a new one",
        group=MODEL,
        metavar="LORA",
        in_identity=False,
    )
    full: bool = setting(
        False, "train all weights of the U-Net, not a LoRA; it takes much more memory, and leaves a base", group=MODEL
    )
    rank: int = setting(
        8,
        "rank of the LoRA; a higher one can learn more, and makes a larger file",
        group=MODEL,
        metavar="RANK",
        basic=True,
        by_recipe=True,
        within=AT_LEAST_1,
    )
    alpha: float | None = setting(
        None, "ΔW is multiplied by alpha / rank; if not given, the rank", group=MODEL, metavar="ALPHA", within=ABOVE_0
    )
    targets: tuple[str, ...] = setting(
        ("attention",),
        "layers of the U-Net to adapt: attention, attention+ff, linear, linear+conv, or ends of names with commas",
        group=MODEL,
        metavar="LAYERS",
    )
    rank_for: tuple[str, ...] = setting(
        (),
        "ranks of some layers, by a part of their name, at the same scale: attn2=16,ff=4; the last match wins",
        group=MODEL,
        metavar="PART=RANK,…",
    )
    alpha_for: tuple[str, ...] = setting(
        (), "alphas of some layers, by a part of their name: attn2=8,ff=4", group=MODEL, metavar="PART=ALPHA,…"
    )
    train_text_encoder: bool = setting(False, "also train a LoRA in the text encoders", group=MODEL, by_recipe=True)
    text_encoder_targets: tuple[str, ...] = setting(
        TEXT_ATTENTION,
        "layers of the text encoders to adapt, by the ends of their names; fc1 and fc2 are the others",
        group=MODEL,
        metavar="LAYERS",
        needs=TEXT_ENCODERS,
    )

    steps: int = setting(
        ByBase(1000, 400),
        "optimizer steps in all",
        group=TRAINING,
        metavar="STEPS",
        basic=True,
        within=AT_LEAST_1,
    )
    epochs: int | None = setting(
        None,
        "instead of --steps: how often each picture is seen",
        group=TRAINING,
        metavar="N",
        within=AT_LEAST_1,
        in_identity=False,
    )
    batch_size: int = setting(
        ByBase(1, 8),
        "pictures per optimizer step, over all processes",
        group=TRAINING,
        metavar="PICTURES",
        basic=True,
        within=AT_LEAST_1,
    )
    learning_rate: float = setting(
        ByBase(1e-4, 2e-3),
        "highest learning rate of AdamW",
        group=TRAINING,
        metavar="RATE",
        basic=True,
        within=ABOVE_0,
    )
    text_encoder_learning_rate: float | None = setting(
        None,
        "highest learning rate of the text encoders; if not given, the same",
        group=TRAINING,
        metavar="RATE",
        needs=TEXT_ENCODERS,
        within=ABOVE_0,
    )
    lr_schedule: str = setting(
        "constant",
        "learning rate after the warm-up, by diffusers' names",
        choices=("constant", "linear", "cosine", "cosine_with_restarts", "polynomial"),
        group=TRAINING,
    )
    lr_cycles: int = setting(
        1, "number of cosines of cosine_with_restarts", group=TRAINING, metavar="N", within=AT_LEAST_1
    )
    lr_power: float = setting(1.0, "power of polynomial; 1 is linear", group=TRAINING, metavar="POWER", within=ABOVE_0)
    warmup_steps: int = setting(
        0,
        "optimizer steps over which the learning rate rises from 0",
        group=TRAINING,
        metavar="STEPS",
        within=AT_LEAST_0,
    )
    optimizer: str = setting(
        "adamw",
        "adamw8bit keeps its state in 8 bits, and needs the package bitsandbytes",
        choices=("adamw", "adamw8bit"),
        group=TRAINING,
    )
    weight_decay: float = setting(0.01, "weight decay of AdamW", group=TRAINING, metavar="DECAY", within=AT_LEAST_0)
    adam_betas: tuple[float, ...] = setting(
        (0.9, 0.999), "decays of AdamW's two averages, each below 1", group=TRAINING, metavar="BETA1,BETA2"
    )
    adam_epsilon: float = setting(
        1e-8, "what AdamW adds to its denominator", group=TRAINING, metavar="EPSILON", within=ABOVE_0
    )
    max_grad_norm: float = setting(
        1.0, "gradients are clipped to this norm", group=TRAINING, metavar="NORM", within=ABOVE_0
    )
    dropout: float = setting(
        0.0,
        "share of each adapter's inputs, below 1, that is set to 0 at random",
        group=TRAINING,
        metavar="SHARE",
        within=Within(0, 0.99),
    )
    ema: float | None = setting(
        None,
        "also write a moving average of the LoRA over the steps, with this decay; 0.999 is common",
        group=TRAINING,
        metavar="DECAY",
        within=Within(0, 1, above=True),
    )
    ema_device: str | None = setting(
        None,
        "where the average is kept: cpu spares a GPU's memory; if not given, where the training is",
        choices=("cpu",),
        group=TRAINING,
        needs=("ema", "which keeps the average"),
        in_identity=False,
    )
    seed: int = setting(0, "seed of every random draw", group=TRAINING, metavar="SEED", within=SEED)

    snr_gamma: float | None = setting(
        None,
        "min-SNR: cap of the signal-to-noise ratio in the loss's weight; 5 is common",
        group=NOISE,
        metavar="GAMMA",
        within=ABOVE_0,
    )
    huber_c: float | None = setting(
        None,
        "Huber loss: errors above this count linearly, not squared; 0.1 is common",
        group=NOISE,
        metavar="ERROR",
        within=ABOVE_0,
    )
    dream: float | None = setting(
        None,
        "DREAM: also train on the U-Net's own errors, with this power for details; 1 is common",
        group=NOISE,
        metavar="POWER",
        within=AT_LEAST_0,
    )
    noise_offset: float = setting(
        0.0,
        "strength of a constant that is added to the noise of each picture and channel; 0.05 is common",
        group=NOISE,
        metavar="STRENGTH",
        within=AT_LEAST_0,
    )
    timestep_range: tuple[int, ...] | None = setting(
        None,
        "timesteps to train on, the first and one above the last: 0,500; if not given, all",
        group=NOISE,
        metavar="FROM,TO",
    )
    zero_terminal_snr: bool = setting(False, ZERO_SNR_HELP, group=NOISE)

    precision: str = setting("auto", PRECISION_HELP, choices=PRECISIONS, group=SPEED)
    micro_batch_size: int | None = setting(
        None,
        "pictures per forward pass and process; gradients accumulate over the batch; if not given, all at once",
        group=SPEED,
        metavar="PICTURES",
        within=AT_LEAST_1,
        in_identity=False,
    )
    gradient_checkpointing: bool = setting(
        False,
        "compute activations twice instead of keeping them: less memory, slower",
        group=SPEED,
        by_recipe=True,
        in_identity=False,
    )
    compile: bool = setting(False, COMPILE_HELP, group=SPEED, in_identity=False)
    timeout: float = setting(
        TIMEOUT,
        "minutes to wait for another process, before the run ends with a message that names it",
        group=SPEED,
        metavar="MINUTES",
        within=ABOVE_0,
        in_identity=False,
    )

    output: str | None = setting(
        None,
        "folder of the results; if not given, out/<name of the data folder>",
        group=OUTPUT,
        metavar="FOLDER",
        basic=True,
        in_identity=False,
    )
    preview: bool = setting(
        False,
        "write preview.png into the output folder, the pictures and captions as training will see them, and stop",
        group=OUTPUT,
        basic=True,
        in_identity=False,
    )
    resume: bool = setting(
        False,
        "go on from the newest checkpoint in the output folder",
        group=OUTPUT,
        basic=True,
        in_identity=False,
    )
    also: tuple[str, ...] = setting(
        (),
        "also write the LoRA in these dialects: kohya (for A1111 and ComfyUI), peft",
        group=OUTPUT,
        choices=("kohya", "peft"),
        in_identity=False,
    )
    checkpoint_every: int = setting(
        ByBase(500, 100),
        "steps between two checkpoints",
        group=OUTPUT,
        metavar="STEPS",
        within=AT_LEAST_1,
        in_identity=False,
    )
    checkpoints_kept: int = setting(
        1,
        "number of checkpoints to keep, the newest ones",
        group=OUTPUT,
        metavar="N",
        within=AT_LEAST_1,
        in_identity=False,
    )
    sample_prompt: tuple[str, ...] = setting(
        (),
        "prompt to draw during training; may be repeated",
        repeat=True,
        group=OUTPUT,
        needs=("sample_every", "how often it is drawn"),
        in_identity=False,
    )
    sample_every: int | None = setting(
        None,
        "steps between two drawings of --sample-prompt",
        group=OUTPUT,
        metavar="STEPS",
        needs=("sample_prompt", "what to draw"),
        within=AT_LEAST_1,
        in_identity=False,
    )
    sample_average: bool = setting(
        False,
        "draw with the average of --ema, not with the LoRA as it is",
        group=OUTPUT,
        needs=("ema", "which keeps the average"),
        in_identity=False,
    )
    push_to_hub: str | None = setting(
        None,
        "repository of the Hugging Face hub to push the results to",
        group=OUTPUT,
        metavar="OWNER/NAME",
        in_identity=False,
    )
    wandb: str | None = setting(
        None, "project of Weights & Biases to log to as well", group=OUTPUT, metavar="PROJECT", in_identity=False
    )

    @classmethod
    def following(cls, values: dict) -> dict:
        follows = super().following(values)
        if values.get("recipe") in RECIPES:
            follows |= recipe_settings(values["recipe"], values)
        if values.get("full"):  # all weights together need a smaller rate
            follows |= {"learning_rate": 2e-4 if is_miniature(values.get("model")) else 1e-5}
        data, rank = values.get("data"), values.get("rank") or follows["rank"]
        path = Path(os.path.abspath(path_and_number(data[0], WEIGHT)[0] if data else ""))
        output = str(Path("out") / (path.stem if path.is_file() else path.name)) if data else None
        follows |= {"output": output, "alpha": float(max(rank, 1))}
        if words := re.findall(r"\w+", values.get("class_prompt") or ""):
            follows["class_data"] = str(Path("out") / "-".join(["class", *words]))
        return follows

    def recipe_as_typed(self) -> str:
        """Return the settings that --recipe stands for, but for those that were given, as one would type them."""
        words = []
        for name, value in recipe_settings(self.recipe, vars(self)).items() if self.recipe else ():
            if getattr(self, name) == value:
                switch = option(name if value else f"no_{name}")
                words.append(switch if isinstance(value, bool) else f"{option(name)} {as_typed(value)}")
        return " ".join(words)

    def with_steps(self, pictures: int) -> "TrainConfig":
        """Return the settings with the steps that --epochs asks for, if it is given."""
        if not self.epochs:
            return self
        positions = self.epochs * pictures * (2 if self.class_prompt else 1)  # every other one is a class picture
        return dataclasses.replace(self, steps=math.ceil(positions / self.batch_size), epochs=None)

    def by_part(self) -> dict[str, Any]:
        """Return --rank-for and --alpha-for as mappings, as `inject_lora` takes them."""
        pairs = {"rank_for": int, "alpha_for": float}
        return {
            name: {part: kind(value) for part, value in (text.split("=") for text in getattr(self, name))}
            for name, kind in pairs.items()
        }

    @property
    def validation_share(self) -> float | None:
        """The share of --data that --validation holds out; None if it names a folder or is not given."""
        try:
            return float(self.validation) if self.validation and not os.path.exists(self.validation) else None
        except ValueError:
            return None

    def identity(self) -> dict:
        """Return the settings that what is learnt depends on, as JSON values.

        The others say where things are, or how the processes divide the work.  Of the pictures and the base that they
        name, the content counts.
        """
        names = [field.name for field in dataclasses.fields(self) if field.metadata["in_identity"]]
        if self.lr_schedule == "constant":
            names.remove("steps")  # a longer run begins as a shorter one
        settings = {name: getattr(self, name) for name in names}
        return json.loads(json.dumps(settings))  # tuples become lists, as in a checkpoint

    def problems(self) -> list[str]:
        wrong = [] if self.data else ["--data is needed: a folder of pictures, for example dataset/mountain"]
        wrong += [
            f"--data {path}: the weight {weight:g} is not a whole number of at least 1"
            for path, weight in (path_and_number(text, WEIGHT) for text in self.data)
            if weight < 1 or weight % 1
        ]
        if self.warmup_steps > self.steps:
            wrong.append(
                f"--warmup-steps is {self.warmup_steps} and --steps {self.steps}: the warm-up must not be longer than "
                "the run"
            )
        if self.epochs and self.steps != self.following(vars(self))["steps"]:
            wrong.append("--epochs and --steps cannot be given at once: both say how long the run is")
        if len(self.adam_betas) != 2 or not all(0 <= beta < 1 for beta in self.adam_betas):
            given = ",".join(map(str, self.adam_betas))
            wrong.append(f"--adam-betas is {given}; it takes two numbers, each at least 0 and below 1")
        for name, schedule, none in (("lr_cycles", "cosine_with_restarts", 1), ("lr_power", "polynomial", 1.0)):
            if getattr(self, name) != none and self.lr_schedule != schedule:
                wrong.append(f"{option(name)} needs --lr-schedule {schedule}")
        low_high = self.timestep_range
        if low_high is not None and not (len(low_high) == 2 and 0 <= low_high[0] < low_high[1]):
            given = ",".join(map(str, low_high))
            wrong.append(f"--timestep-range is {given}; it takes two numbers, the lowest and one above the highest")
        share = self.validation_share
        if share is not None and not 0 < share < 1:
            wrong.append(f"--validation {self.validation}: there is no such folder, and a share is between 0 and 1")
        if self.class_prompt and self.buckets:
            wrong.append("--class-prompt and --buckets cannot be given at once: a batch holds both kinds, of one size")
        if self.class_prompt and self.class_data is None:
            wrong.append(f"--class-prompt {self.class_prompt!r} has no word to call a folder by; give a --class-data")
        if self.compile and self.buckets:
            wrong.append("--compile and --buckets cannot be given at once: each size would be compiled for minutes")
        if self.push_to_hub is not None and not re.fullmatch("[^/]+/[^/]+", self.push_to_hub):
            wrong.append(f"--push-to-hub is {self.push_to_hub!r}; it takes OWNER/NAME, as the hub calls a repository")
        for package, extra, what, asked in (
            ("bitsandbytes", "8bit", "--optimizer adamw8bit", self.optimizer == "adamw8bit"),
            ("wandb", "wandb", "--wandb", self.wandb is not None),
        ):
            if asked and not is_installed(package):
                wrong.append(f"{what} needs the package {package}; type: pip install -e '.[{extra}]'")
        return wrong + self._problems_of_layers()

    def _problems_of_layers(self) -> list[str]:
        """Return what is wrong with the layers and the ranks of the LoRA."""
        wrong = [f"{option(name)} is empty" for name in ("targets", "text_encoder_targets") if not getattr(self, name)]
        for name, number, example in (
            ("rank_for", r"[1-9]\d*", "a rank, as attn2=16"),
            ("alpha_for", r"(?=.*[1-9])\d*\.?\d+", "an alpha above 0, as attn2=8"),
        ):
            wrong += [
                f"{option(name)} {text}: it takes a part of names and {example}"
                for text in getattr(self, name)
                if not re.fullmatch(rf"[\w.]+={number}", text)
            ]
        follows = self.following(vars(self) | {"rank": None})
        defaults = {"rank": follows["rank"], "alpha": follows["alpha"]}
        defaults |= {"targets": ("attention",), "rank_for": (), "alpha_for": ()}
        given = [name for name, default in defaults.items() if getattr(self, name) != default]
        if self.init_from:
            why = "has no effect with --init-from, whose layers and ranks are the file's"
            wrong += [f"{option(name)} {why}" for name in given]
        if self.full:
            given += [name for name in ("init_from", "dropout", "train_text_encoder", "also") if getattr(self, name)]
            wrong += [f"{option(name)} has no effect with --full, which trains no LoRA" for name in given]
        return wrong
