"""What a setting is, and what the settings of every command share.

A setting is declared once, in its command's dataclass, with its unit and its allowed values.  command_line.py makes
the command line from it and reads the same names from a JSON file.
"""

import dataclasses
import json
import math
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from .errors import UserError

BUNDLED = Path(__file__).parent.parent / "base"


def is_installed(package: str) -> bool:
    """Whether a package can be imported; a folder without code, such as wandb's logs, does not count."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None


@dataclass(frozen=True)
class ByBase:
    """A default that depends on the base: `bundled` for the bundled one, `usual` for all others."""

    usual: object
    bundled: object


def is_miniature(model: str | None) -> bool:
    """Whether a base is the bundled one or has its U-Net config, for example the bundled one with merged LoRAs."""
    ours, theirs = (Path(base, "unet", "config.json") for base in (BUNDLED, model or BUNDLED))
    try:
        return ours.read_bytes() == theirs.read_bytes()
    except (OSError, ValueError):  # no such folder, or not a valid path
        return False


@dataclass(frozen=True)
class Within:
    """The range of a setting's numbers: from `low` to `high`; if `above`, `low` itself is not allowed."""

    low: float
    high: float = math.inf
    above: bool = False

    def complaint(self, value: float) -> str:
        """Return the range in words if a value is outside it, else ""."""
        if (self.low < value if self.above else self.low <= value) and value <= self.high and value != math.inf:
            return ""
        limit = f"greater than {self.low}" if self.above else f"at least {self.low}"
        limit += "" if self.high == math.inf else f" and at most {self.high}"
        return limit + (", and finite" if value == math.inf else "")


AT_LEAST_0, AT_LEAST_1, ABOVE_0, SHARE = Within(0), Within(1), Within(0, above=True), Within(0, 1)
SEED = Within(0, 2**63 - 1)  # what torch takes, with room to count up


def setting(
    default,
    text: str,
    metavar: str = "",
    within: Within | None = None,
    *,
    group: str,
    basic: bool = False,
    choices: tuple = (),
    needs: tuple[str, str] | None = None,
    repeat: bool = False,
    bare: bool = False,
    separator: str = ",",
    alias: str = "",
    by_recipe: bool = False,
    in_identity: bool = True,
):
    """Declare one setting.

    `text` is its sentence of help, and `metavar` stands for its value there.  `within` is the range of its numbers.
    --help lists `basic` settings first, and the others under their `group`.  `choices` are the allowed values.
    `needs` names another setting, without which this one has no effect, and says what that one is.  `repeat`: its
    option may be given several times.  `bare`: its values are typed without an option.  `separator` separates several
    values of one option.  `alias` is a second option for it.  `by_recipe`: its default may come from --recipe, or from
    the run that made a --lora.  `in_identity`: the result of training depends on it.
    """
    metadata = {"help": text, "group": group, "metavar": metavar, "basic": basic, "default": default}
    metadata |= {"choices": choices, "within": within, "needs": needs, "separator": separator}
    metadata |= {"repeat": repeat, "bare": bare, "alias": alias, "in_identity": in_identity}
    follows = metadata["follows"] = by_recipe or isinstance(default, ByBase)
    return dataclasses.field(default=None if follows else default, metadata=metadata)  # None means: not given


def is_path(field: dataclasses.Field) -> bool:
    """Whether a setting names files or folders."""
    return bool(re.search(r"\b(FOLDER|FILE|PICTURE|BASE|VAE|LORA|ADAPTER|OUT)\b", field.metadata["metavar"]))


def with_home(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with ~ replaced in paths; a shell leaves it in --data=~/dog, and in a file nobody replaces it."""
    paths = {field.name: field.default for field in dataclasses.fields(cls) if is_path(field)}

    def path(value):
        if isinstance(value, tuple):
            return tuple(map(path, value))
        return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~") else value

    # (A default stays as it is, so that it is still seen to be the default.)
    return {n: path(value) if n in paths and value != paths[n] else value for n, value in values.items()}


def option(name: str) -> str:
    return "--" + name.replace("_", "-")


def as_typed(value, separator: str = ",") -> str:
    """Return a value as it is typed on the command line."""
    if isinstance(value, tuple):
        return separator.join(map(as_typed, value))
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def as_words(settings: Mapping[str, Any]) -> str:
    """Return settings as they are typed on the command line: --rank 8 --no-mirror."""
    words = []
    for name, value in settings.items():
        repeated = isinstance(value, list) and all(isinstance(one, str) for one in value)
        for one in value if repeated else [value]:
            text = as_typed(tuple(one) if isinstance(one, list) else one)
            words += [option(name if one else f"no_{name}")] if isinstance(one, bool) else [option(name), text]
    return shlex.join(words)


@dataclass(frozen=True)
class Settings:
    """What the settings of every command share: defaults that depend on other settings, and checks."""

    main: ClassVar[str] = ""  # the setting that a word without an option is probably meant for
    usage: ClassVar[str] = ""  # the required arguments, for the first line of its help
    examples: ClassVar[tuple[str, ...]] = ()  # whole commands, for its help
    one_of: ClassVar[tuple[str, ...]] = ()  # one of these on the command line overrides all of them in the file
    reads_others: ClassVar[bool] = False  # whether --config reads the settings of other programs

    def __post_init__(self):
        follows = self.following(vars(self))
        for name, value in follows.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        defaults = {field.name: follows.get(field.name, field.default) for field in dataclasses.fields(self)}
        given = {name for name, default in defaults.items() if getattr(self, name) != default}
        problems = [problem for field in dataclasses.fields(self) for problem in self._problems_of(field, given)]
        problems += self.problems(given)
        if problems:
            raise UserError("; ".join(problems))

    def _problems_of(self, field: dataclasses.Field, given: set[str]) -> list[str]:
        """Check one setting against its declaration."""
        value, about, name = getattr(self, field.name), field.metadata, option(field.name)
        values = () if value is None else value if isinstance(value, tuple) else (value,)
        wrong = []
        if about["choices"]:
            can_be = ", ".join(about["choices"])
            wrong += [f"{name} is {one!r}; it can be {can_be}" for one in values if one not in about["choices"]]
        if about["within"]:
            limits = dict.fromkeys(filter(None, map(about["within"].complaint, values)))
            wrong += [f"{name} is {as_typed(value, about['separator'])}; it must be {limit}" for limit in limits]
        if field.name == "negative" or "prompt" in field.name.split("_"):
            wrong += [f"{name}: {problem}" for prompt in values for problem in self._tags_in(prompt)]
        if about["needs"] and field.name in given:
            other, what = about["needs"]
            wrong += [] if getattr(self, other) else [f"{name} needs {option(other)}, {what}"]
        return wrong

    def _tags_in(self, prompt: str) -> list[str]:
        """Return a complaint about each `<lora:NAME:STRENGTH>` in a prompt: A1111 reads it, minilora does not."""
        other = next((f" and give {option(name)} " for name in ("lora", "base_lora") if hasattr(self, name)), "")
        return [
            f"{tag[0]} is not read in a prompt; take it out"
            + (f"{other}{tag[1]}.safetensors{tag[2] or ''}" if other else "")
            for tag in re.finditer(r"<(?:lora|lyco|locon):([^:<>]+)(:[-+\d.]+)?[^<>]*>", prompt)
        ]

    @classmethod
    def following(cls, values: dict) -> dict:
        """Return the defaults that depend on other settings, by name; `values` are the known settings."""
        bundled = is_miniature(values.get("model"))
        fields = [field for field in dataclasses.fields(cls) if field.metadata["follows"]]
        defaults = {field.name: field.metadata["default"] for field in fields}
        return {
            name: (default.bundled if bundled else default.usual) if isinstance(default, ByBase) else default
            for name, default in defaults.items()
        }

    def problems(self, given: set[str]) -> list[str]:
        """Return the problems that no declaration finds; `given` are the settings that are not at their default."""
        return []

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"
