"""The settings of the optimizer: how long, how fast, and what state it keeps."""

from dataclasses import dataclass

from .setting import ABOVE_0, AT_LEAST_0, AT_LEAST_1, SEED, ByBase, Settings, Within, is_installed, option
from .shared import TEXT_ENCODERS, of_training


@dataclass(frozen=True)
class OptimizerSettings(Settings):
    """How the weights follow the gradient."""

    steps: int = of_training(ByBase(1000, 300), "total number of optimizer steps", "STEPS", AT_LEAST_1, basic=True)
    epochs: int | None = of_training(
        None, "instead of --steps: how often to use each picture", "N", AT_LEAST_1, in_identity=False
    )
    batch_size: int = of_training(
        ByBase(1, 8), "pictures per optimizer step, over all processes", "PICTURES", AT_LEAST_1, basic=True
    )
    learning_rate: float = of_training(
        ByBase(1e-4, 2e-3),
        "highest learning rate of AdamW; with prodigy a factor of the rate that it finds, 1 if not given",
        "RATE",
        ABOVE_0,
        basic=True,
    )
    text_encoder_learning_rate: float | None = of_training(
        None,
        "highest learning rate of the text encoders; if not given, --learning-rate",
        "RATE",
        ABOVE_0,
        needs=TEXT_ENCODERS,
    )
    lr_schedule: str = of_training(
        "constant",
        "learning rate after the warm-up, by diffusers' names",
        choices=("constant", "linear", "cosine", "cosine_with_restarts", "polynomial"),
    )
    lr_cycles: int = of_training(1, "number of cosines of cosine_with_restarts", "N", AT_LEAST_1)
    lr_power: float = of_training(1.0, "power of polynomial; 1 is linear", "POWER", ABOVE_0)
    warmup_steps: int = of_training(0, "optimizer steps over which the learning rate rises from 0", "STEPS", AT_LEAST_0)
    optimizer: str = of_training(
        "adamw",
        "adamw8bit stores its state in 8 bits, and needs the package bitsandbytes; prodigy is AdamW that finds its "
        "learning rate itself",
        choices=("adamw", "adamw8bit", "prodigy"),
    )
    weight_decay: float = of_training(0.01, "weight decay of AdamW", "DECAY", AT_LEAST_0)
    adam_betas: tuple[float, ...] = of_training(
        (0.9, 0.999), "decay rates of AdamW's two moving averages, each below 1", "BETA1,BETA2"
    )
    adam_epsilon: float = of_training(1e-8, "term that AdamW adds to its denominator", "EPSILON", ABOVE_0)
    max_grad_norm: float = of_training(1.0, "gradients are clipped to this norm", "NORM", ABOVE_0)
    dropout: float = of_training(
        0.0, "share of each adapter's inputs, below 1, that is set to 0 at random", "SHARE", Within(0, 0.99)
    )
    ema: float | None = of_training(
        None,
        "also write a moving average of the LoRA over the steps, with this decay; 0.999 is common",
        "DECAY",
        Within(0, 1, above=True),
    )
    ema_device: str | None = of_training(
        None,
        "device of the moving average: cpu saves GPU memory; if not given, the training device",
        choices=("cpu",),
        needs=("ema", "which computes the average"),
        in_identity=False,
    )
    seed: int = of_training(0, "seed of every random draw", "SEED", SEED)

    def problems(self, given: set[str]) -> list[str]:
        wrong = super().problems(given)
        if self.warmup_steps > self.steps:
            wrong.append(
                f"--warmup-steps is {self.warmup_steps} and --steps {self.steps}: the warm-up must not be longer than "
                "the run"
            )
        if self.epochs and "steps" in given:
            wrong.append("--epochs and --steps cannot be combined: both say how long the run is")
        if len(self.adam_betas) != 2 or not all(0 <= beta < 1 for beta in self.adam_betas):
            typed = ",".join(map(str, self.adam_betas))
            wrong.append(f"--adam-betas is {typed}; it takes two numbers, each at least 0 and below 1")
        for name, schedule in (("lr_cycles", "cosine_with_restarts"), ("lr_power", "polynomial")):
            if name in given and self.lr_schedule != schedule:
                wrong.append(f"{option(name)} needs --lr-schedule {schedule}")
        if self.optimizer == "adamw8bit" and not is_installed("bitsandbytes"):
            wrong.append("--optimizer adamw8bit needs the package bitsandbytes; run: pip install -e '.[8bit]'")
        if self.optimizer == "prodigy":
            for name in ("learning_rate", "text_encoder_learning_rate"):
                if (rate := getattr(self, name)) is not None and 0 < rate < 0.1:
                    why = "with --optimizer prodigy it is a factor on the rate that is found"
                    wrong.append(f"{option(name)} is {rate:g}; {why}: leave it out, or give at least 0.1")
        return wrong
