"""The settings of each command: one frozen dataclass, its checks, its command line, its JSON.

A setting is written once, below, with its unit and its allowed values.  `read` makes the command
line from the dataclass, reads `--config file.json` with the same names, and lets the command line
win.  A name that is not a setting is an error wherever it is found.
"""

import argparse
import dataclasses
import difflib
import json
import types
import typing
from dataclasses import dataclass
from pathlib import Path

from .lora import ATTENTION


class UserError(Exception):
    """A mistake of the user's, told in one line; the commands print it and exit with 2."""


@dataclass(frozen=True)
class ByBase:
    """A default that depends on the base: `bundled` for the bundled one, `usual` for all others."""

    usual: object
    bundled: object


def setting(default, text: str, *, group: str, choices: tuple = (), repeat: bool = False):
    """Declare one setting; `repeat` means that its option may be given several times."""
    metadata = {"help": text, "group": group, "choices": choices, "repeat": repeat, "default": default}
    by_base = isinstance(default, ByBase)
    return dataclasses.field(default=None if by_base else default, metadata=metadata)


DATA, MODEL, TRAINING, OUTPUT, PICTURES = "data", "base and LoRA", "training", "output", "pictures"
_MODEL_HELP = "diffusers folder or hub id of the base; the bundled miniature if not given"
_PRECISION_HELP = "number format of the frozen base and of the computation"
PRECISIONS = ("fp32", "bf16", "fp16")


class Settings:
    """What the settings of every command share: defaults that follow the base, and checks."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            default = field.metadata["default"]
            if getattr(self, field.name) is None and isinstance(default, ByBase):
                value = default.bundled if self.model is None else default.usual
                object.__setattr__(self, field.name, value)
        problems = [
            f"{option(field.name)} is {getattr(self, field.name)!r}; it can be {', '.join(field.metadata['choices'])}"
            for field in dataclasses.fields(self)
            if field.metadata["choices"] and getattr(self, field.name) not in field.metadata["choices"]
        ]
        problems += self.problems()
        if problems:
            raise UserError("; ".join(problems))

    def problems(self) -> list[str]:
        raise NotImplementedError

    def out_of_range(self, low: float, names: str, high: float = float("inf"), strict: bool = False) -> list[str]:
        """Return a complaint for each of the named settings that is given and not between low and high."""
        wrong = []
        for name in names.split():
            value = getattr(self, name)
            if value is not None and not (low < value <= high if strict else low <= value <= high):
                limit = f"greater than {low}" if strict else f"at least {low}"
                limit += "" if high == float("inf") else f" and at most {high}"
                wrong.append(f"{option(name)} is {value}; it must be {limit}")
        return wrong

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


@dataclass(frozen=True)
class TrainConfig(Settings):
    """Every setting of train.py."""

    data: str = setting(None, "folder of pictures, with metadata.jsonl or a .txt beside each", group=DATA)
    caption: str | None = setting(None, "caption of every picture, where the folder has none", group=DATA)
    caption_column: str = setting("text", "key of the caption in metadata.jsonl", group=DATA)
    resolution: int | None = setting(
        None, "side of the training pictures, in pixels; the base's own if not given", group=DATA
    )
    crop: str = setting(
        "center",
        "which square of a picture is seen; random turns the latent cache off",
        choices=("center", "random"),
        group=DATA,
    )
    mirror: bool = setting(False, "show each picture mirrored half of the time", group=DATA)
    caption_dropout: float = setting(0.0, "share of draws whose caption is left empty, 0 to 1", group=DATA)
    cache: str = setting(
        "~/.cache/minilora", "folder of the encoded pictures and captions, shared by all runs", group=DATA
    )

    model: str | None = setting(None, _MODEL_HELP, group=MODEL)
    rank: int = setting(8, "rank of the change of each weight", group=MODEL)
    alpha: float | None = setting(None, "the change is scaled by alpha / rank; the rank if not given", group=MODEL)
    targets: tuple[str, ...] = setting(
        ATTENTION, "ends of the names of the layers to adapt, with commas between", group=MODEL
    )

    steps: int = setting(ByBase(1000, 400), "optimizer steps in all", group=TRAINING)
    batch_size: int = setting(ByBase(1, 8), "pictures per optimizer step, over all processes", group=TRAINING)
    micro_batch_size: int | None = setting(
        None, "pictures per forward pass and process; gradients are accumulated over the rest", group=TRAINING
    )
    learning_rate: float = setting(ByBase(1e-4, 2e-3), "highest learning rate of AdamW", group=TRAINING)
    lr_schedule: str = setting(
        "constant", "learning rate after the warm-up", choices=("constant", "linear", "cosine"), group=TRAINING
    )
    warmup_steps: int = setting(0, "steps over which the learning rate rises from 0", group=TRAINING)
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this norm", group=TRAINING)
    noise_offset: float = setting(
        0.0, "strength of a constant added to the noise per picture and channel; 0.05 is common", group=TRAINING
    )
    snr_gamma: float | None = setting(
        None, "cap of the signal-to-noise ratio in the loss's weight (min-SNR); 5 is common", group=TRAINING
    )
    precision: str = setting("fp32", _PRECISION_HELP, choices=PRECISIONS, group=TRAINING)
    gradient_checkpointing: bool = setting(False, "compute activations twice to need less memory", group=TRAINING)
    seed: int = setting(0, "seed of every random draw", group=TRAINING)

    output: str | None = setting(
        None, "folder of the results; out/<name of the data folder> if not given", group=OUTPUT
    )
    checkpoint_every: int = setting(ByBase(500, 100), "steps between checkpoints", group=OUTPUT)
    checkpoints_kept: int = setting(1, "how many of the newest checkpoints stay", group=OUTPUT)
    resume: bool = setting(False, "go on from the newest checkpoint in the output folder", group=OUTPUT)
    sample_prompt: tuple[str, ...] = setting(
        (), "prompt to draw during training; may be repeated", repeat=True, group=OUTPUT
    )
    sample_every: int | None = setting(None, "steps between the drawings of --sample-prompt", group=OUTPUT)

    def __post_init__(self):
        if self.data and self.output is None:
            object.__setattr__(self, "output", str(Path("out") / Path(self.data).resolve().name))
        if self.alpha is None and self.rank is not None:
            object.__setattr__(self, "alpha", float(self.rank))
        super().__post_init__()

    def problems(self) -> list[str]:
        wrong = [] if self.data else ["--data is needed: a folder of pictures, for example dataset/mountain"]
        wrong += self.out_of_range(1, "rank steps batch_size micro_batch_size resolution checkpoints_kept")
        wrong += self.out_of_range(1, "checkpoint_every sample_every")
        wrong += self.out_of_range(0, "learning_rate alpha max_grad_norm snr_gamma", strict=True)
        wrong += self.out_of_range(0, "warmup_steps noise_offset seed")
        wrong += self.out_of_range(0, "caption_dropout", high=1)
        if not self.targets:
            wrong.append("--targets is empty")
        if self.sample_every is not None and not self.sample_prompt:
            wrong.append("--sample-every needs a --sample-prompt")
        if self.sample_prompt and self.sample_every is None:
            wrong.append("--sample-prompt needs --sample-every")
        return wrong


@dataclass(frozen=True)
class SampleConfig(Settings):
    """Every setting of sample.py."""

    prompt: tuple[str, ...] = setting((), "what to draw; may be repeated", repeat=True, group=PICTURES)
    negative: str = setting("", "what to keep away from", group=PICTURES)
    seed: int = setting(0, "seed of the first picture; the next ones count up", group=PICTURES)
    count: int = setting(1, "pictures per prompt", group=PICTURES)
    steps: int = setting(30, "denoising steps", group=PICTURES)
    guidance: float = setting(
        ByBase(7.5, 3.0), "how strongly the prompt is followed; 1 is without guidance", group=PICTURES
    )
    size: int | None = setting(None, "side of the pictures, in pixels; the base's own if not given", group=PICTURES)
    scheduler: str = setting("ddim", "sampler", choices=("ddim", "euler", "euler_a", "dpm++", "lcm"), group=PICTURES)

    model: str | None = setting(None, _MODEL_HELP, group=MODEL)
    lora: tuple[str, ...] = setting(
        (),
        "LoRA file or training output, optionally with a strength: out/fluent:0.8; may be repeated",
        repeat=True,
        group=MODEL,
    )
    scales: tuple[float, ...] = setting(
        (), "strengths to compare, with commas between: one row per seed, one column each", group=MODEL
    )
    precision: str = setting("fp32", _PRECISION_HELP, choices=PRECISIONS, group=MODEL)

    output: str = setting("out/sample.png", "picture to write; several go on one sheet", group=OUTPUT)

    def problems(self) -> list[str]:
        wrong = [] if self.prompt else ["--prompt is needed: what to draw, for example --prompt 'red apple'"]
        wrong += self.out_of_range(1, "count steps size guidance")
        wrong += self.out_of_range(0, "seed")
        if self.scales and not self.lora:
            wrong.append("--scales needs a --lora whose strength it sets")
        return wrong


# ------------------------------------------------------------------------------ command line and file


def option(name: str) -> str:
    return "--" + name.replace("_", "-")


def read(cls: type, argv: list[str], description: str):
    """Return the settings given on a command line, and in the `--config` file that it may name.

    Raises UserError for an unknown setting, with the nearest name, and for a value that does not fit.
    """
    parser = _parser(cls, description)
    given, unknown = parser.parse_known_args(argv)
    names = {field.name for field in dataclasses.fields(cls)}
    if unknown:
        options = {option(name) for name in names} | {"--config"}
        wrong = [word for word in unknown if word.startswith("-")] or unknown
        raise UserError("; ".join(_unknown(word, options) for word in wrong))
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in vars(given).items()}
    path = given.pop("config", None)
    values = _read_file(cls, Path(path)) if path else {}
    return cls(**values | given)


def _parser(cls: type, description: str) -> argparse.ArgumentParser:
    """Make the command line of a settings class: an option per field, grouped."""

    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise UserError(message)

    parser = Parser(
        description=description,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,  # so that only what was typed wins over the file
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=110),
    )
    parser.add_argument("--config", metavar="FILE", help="JSON file of settings; the command line wins over it")
    groups: dict[str, argparse._ArgumentGroup] = {}
    for field in dataclasses.fields(cls):
        title = field.metadata["group"]
        group = groups.get(title) or groups.setdefault(title, parser.add_argument_group(title))
        kind, is_tuple = _kind(cls, field.name)
        words = {"help": field.metadata["help"] + _default_words(field)}
        if kind is bool:
            words["action"] = argparse.BooleanOptionalAction
        elif field.metadata["repeat"]:
            words |= {"action": "append", "type": kind, "metavar": "TEXT"}
        else:
            metavar = "|".join(field.metadata["choices"]) or {int: "N", float: "X", str: "TEXT"}[kind]
            words |= {"type": _comma_list(kind) if is_tuple else kind, "metavar": metavar}
        group.add_argument(option(field.name), **words)
    return parser


def _default_words(field) -> str:
    default = field.metadata["default"]
    if isinstance(default, ByBase):
        return f" (default {default.usual}; {default.bundled} on the bundled base)"
    if default is None or default is False or default in ((), ""):
        return ""
    return f" (default {','.join(default) if isinstance(default, tuple) else default})"


def _comma_list(kind: type):
    def parse(text: str) -> tuple:
        return tuple(kind(part.strip()) for part in text.split(","))

    parse.__name__ = f"comma-separated {kind.__name__}"  # what argparse names in its error
    return parse


def _kind(cls: type, name: str) -> tuple[type, bool]:
    """Return the type of one value of a setting, and whether the setting holds several."""
    hint = typing.get_type_hints(cls)[name]
    if isinstance(hint, types.UnionType):
        hint = next(arm for arm in typing.get_args(hint) if arm is not type(None))
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True
    return hint, False


def _read_file(cls: type, path: Path) -> dict:
    """Read settings from a JSON file, checking every name and type."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--config {path}: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: it holds a {type(values).__name__} and should hold one object of settings")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    problems, result = [], {}
    for name, value in values.items():
        if name not in fields:
            problems.append(_unknown(name, set(fields)))
            continue
        kind, is_tuple = _kind(cls, name)
        parts = value if is_tuple and isinstance(value, list) else [value]
        right = all(type(part) is kind or (kind is float and type(part) is int) for part in parts)
        if value is None or (right and is_tuple == isinstance(value, list)):
            result[name] = tuple(kind(part) for part in parts) if is_tuple else value if value is None else kind(value)
        else:
            wanted = f"a list of {kind.__name__}" if is_tuple else kind.__name__
            problems.append(f"{name} is {json.dumps(value)} and should be {wanted}")
    if problems:
        raise UserError(f"--config {path}: " + "; ".join(problems))
    return result


def _unknown(word: str, known: set[str]) -> str:
    nearest = difflib.get_close_matches(word.split("=")[0], known, n=1)
    return f"unknown setting {word}" + (f"; did you mean {nearest[0]}?" if nearest else "")
