"""The commands: read the settings, do the work, and print a user's mistake in one line.

`read` makes the command line from a settings class.  `--config file.json` gives settings by the same names; the
command line overrides it.  An unknown name is an error in both.
"""

import argparse
import dataclasses
import difflib
import importlib
import json
import os
import shutil
import sys
import tomllib
import types
import typing
from collections.abc import Callable
from functools import partial
from pathlib import Path

from .errors import UserError, first_line, is_out_of_memory
from .others import translated
from .setting import ByBase, Settings, as_typed, as_words, option
from .strict_json import parse_json


def run(settings: str | type, work: str | Callable, description: str) -> None:
    """Read the settings from the command line and call `work` with them; a user's mistake ends with exit code 2.

    Both may be given as "module:name".  `work` is then imported after the settings were read, because importing torch
    takes seconds, and --help and a misspelt setting do not need it.
    """
    rank = int(os.environ.get("RANK", 0))

    def fail(text: str) -> None:
        print(f"error: {text}" if rank == 0 else f"error (process {rank}): {text}", file=sys.stderr)
        sys.exit(2)

    try:
        config = read(_named(settings), sys.argv[1:], description)
        _named(work)(config)
    except KeyboardInterrupt:
        sys.exit(130)  # the exit code that shells use for Ctrl-C; everything is saved by now
    except Exception as error:
        line = told(error)
        if line is None:
            raise
        fail(line)


def _command(settings: str, work: str, description: str) -> Callable[[], None]:
    return partial(run, f"minilora.settings.{settings}", f"minilora.{work}", description)


train = _command("train:TrainConfig", "training:train", "Train a LoRA on a folder of pictures.")
sample = _command("sample:SampleConfig", "sampling:sample", "Draw pictures with a base and any mix of LoRAs.")
merge = _command(
    "merge:MergeConfig", "merge:merge", "Fold LoRA files into a base; or merge, resize, convert and extract LoRAs."
)
restore = _command(
    "restore:RestoreConfig",
    "apps.restore:restore",
    "Restore a picture from its own noise, with and without a LoRA of it, and edit it.",
)
morph = _command("morph:MorphConfig", "apps.morph:morph", "Morph between two pictures, with a LoRA of each.")
restyle = _command("restyle:RestyleConfig", "apps.restyle:restyle", "Redraw pictures in the style of a LoRA.")
distill = _command("distill:DistillConfig", "apps.distill:distill", "Train a LoRA to draw in few steps, or smoothly.")
evaluate = _command("evaluate:EvaluateConfig", "apps.evaluate:evaluate", "Compare drawn pictures with real ones.")
page = _command(
    "page:PageConfig",
    "apps.page.__main__:serve",
    "Open a page in the browser to train, draw and merge, on this machine only.",
)


def told(error: Exception) -> str | None:
    """Return the message for a user's mistake or a machine that is too small; None for any other error."""
    if isinstance(error, (UserError, OSError)):  # OSError: a full disk, a folder without permission
        return str(error)
    if isinstance(error, (MemoryError, RuntimeError)) and is_out_of_memory(error):
        advice = "smaller pictures, fewer at a time and --precision bf16 need less; see docs/your_pictures.md"
        return f"not enough memory ({first_line(error)}); {advice}"
    return None


def _named(what):
    """Import and return what "module:name" names; return anything but text unchanged."""
    if not isinstance(what, str):
        return what
    module, _, name = what.partition(":")
    return getattr(importlib.import_module(module), name)


# ------------------------------------------------------------------------------ command line and file


def read(cls: type[Settings], argv: list[str], description: str):
    """Return the settings of a command line and of the `--config` file that it may name.

    Raises UserError for an unknown setting, with the nearest name, and for a value that does not fit.
    --print-config prints the settings and exits.
    """
    if broken := [word for word in argv if word != word.encode(errors="replace").decode()]:
        raise UserError(f"{broken[0]!r} on the command line holds bytes that are not UTF-8; spell it in UTF-8")
    parser = _parser(cls, description)
    bare = any(field.metadata["bare"] for field in dataclasses.fields(cls))
    typed, unknown = (parser.parse_known_intermixed_args if bare else parser.parse_known_args)(argv)
    names = {field.name for field in dataclasses.fields(cls)}
    if unknown:
        options = {option(name) for name in names} | {"--config", "--print-config"}
        wrong = [word for word in unknown if word.startswith("-")] or unknown
        raise UserError("; ".join(_unknown(word, options) for word in wrong))
    # (Without any values, a setting without an option is an empty list.)
    given: dict[str, typing.Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in vars(typed).items() if v != []
    }
    show, path = given.pop("print_config", False), given.pop("config", None)
    values = _read_file(cls, Path(path)) if path else {}
    # Defaults in the file are dropped, so that they follow the command line: with another --data there, the default
    # output folder must change, too.
    follows = cls.following(values)
    values = {name: value for name, value in values.items() if name not in follows or value != follows[name]}
    if given.keys() & cls.one_of:
        values = {name: value for name, value in values.items() if name not in cls.one_of}
    settings = cls(**values | given)
    if show:
        print(settings.to_json(), end="")
        sys.exit(0)
    return settings


def _parser(cls: type[Settings], description: str) -> argparse.ArgumentParser:
    """Make the command line of a settings class: the basic settings, then the advanced ones by group."""

    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise UserError(message)

    examples = "".join(f"\n  {example}" for example in cls.examples)
    switches: dict[str, str] = {}
    parser = Parser(
        prog=_program(),
        usage=" ".join(filter(None, ("%(prog)s", cls.usage, "[SETTING …]"))),
        description=description + (f"\n\nfor example:{examples}" if examples else ""),
        add_help=False,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,  # so that only what was typed overrides the file
        formatter_class=lambda prog: _Help(prog, switches),
    )
    groups: dict[str, argparse._ArgumentGroup] = {}
    for field in sorted(dataclasses.fields(cls), key=lambda field: not field.metadata["basic"]):
        about = field.metadata
        title = "basic" if about["basic"] else f"advanced: {about['group']}"
        group = groups.get(title) or groups.setdefault(title, parser.add_argument_group(title))
        kind, is_tuple, _ = kind_of(cls, field.name)
        words = {"help": about["help"] + _default_words(field)}
        metavar = about["metavar"] or {int: "N", float: "X"}.get(kind, "TEXT")
        if about["bare"]:
            group.add_argument(field.name, nargs="*", metavar=metavar, **words)
            continue
        if kind is bool:
            words["action"] = argparse.BooleanOptionalAction
            switches[field.name] = option(f"no_{field.name}" if about["default"] else field.name)
        elif about["repeat"]:
            words |= {"action": "append", "type": kind, "metavar": metavar}
        else:
            choices = ("," if is_tuple else "|").join(about["choices"])
            reads = _several(kind, about["separator"], metavar) if is_tuple else kind
            words |= {"type": reads, "metavar": choices or metavar}
        names = [option(field.name), about["alias"]]
        group.add_argument(*filter(None, names), dest=field.name, **words)
    others = parser.add_argument_group("other")
    others.add_argument(
        "--config",
        metavar="FILE",
        help="read settings from a JSON or TOML file, ours or (for training) of diffusers or kohya; the command line "
        "overrides it, --no-… a switch that it turns on",
    )
    others.add_argument("--print-config", action="store_true", help="print all settings as such a file, and exit")
    others.add_argument("-h", "--help", action="help", help="print this, and exit")
    return parser


class _Help(argparse.RawDescriptionHelpFormatter):
    """Help as wide as the terminal, up to 100 columns; `switches` are shown in the form that changes the default."""

    def __init__(self, prog: str, switches: dict[str, str]):
        super().__init__(prog, max_help_position=28, width=min(shutil.get_terminal_size().columns, 100))
        self.switches = switches

    def _format_action_invocation(self, action: argparse.Action) -> str:
        return self.switches.get(action.dest) or super()._format_action_invocation(action)


def _program() -> str:
    """Return the text that starts this command."""
    spec = sys.modules["__main__"].__spec__  # of `python -m`
    return f"python -m {spec.name.removesuffix('.__main__')}" if spec else Path(sys.argv[0]).name


def _default_words(field) -> str:
    """Return the default of a setting in the words of its help, or "" if there is nothing to tell."""
    default, separator = field.metadata["default"], field.metadata["separator"]
    if isinstance(default, ByBase):
        usual, bundled = as_typed(default.usual, separator), as_typed(default.bundled, separator)
        return f" (default {usual}; {bundled} on the bundled base)"
    if default is None or isinstance(default, bool) or default in ((), ""):
        return ""
    text = as_typed(default, separator)
    return f" (default {text})" if len(text) < 80 else ""


def _several(kind: type, separator: str, form: str) -> Callable[[str], tuple]:
    """Return a parser for several values of one option; `form` shows how they are written."""

    def parse(text: str) -> tuple:
        try:
            return tuple(kind(part.strip()) for part in text.split(separator))
        except ValueError as error:
            numbers = {int: ", in whole numbers", float: ", in numbers"}.get(kind, "")
            raise argparse.ArgumentTypeError(f"{text!r} is not {form}{numbers}") from error

    return parse


def kind_of(cls: type, name: str) -> tuple[type, bool, bool]:
    """Return the type of one value of a setting, whether the setting holds several, and whether it may be None."""
    hint = typing.get_type_hints(cls)[name]
    optional = isinstance(hint, types.UnionType)
    if optional:
        hint = next(arm for arm in typing.get_args(hint) if arm is not type(None))
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True, optional
    return hint, False, optional


def _read_file(cls: type[Settings], path: Path) -> dict:
    """Read settings from a JSON file, checking every name and type."""
    reads = tomllib.loads if path.suffix == ".toml" else parse_json
    try:
        values = reads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"--config {path}: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: it holds a {type(values).__name__} and should hold one object of settings")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    result, said = {}, values
    nothing: list[str] = []
    problems: list[str] = []
    if cls.reads_others:
        values, nothing, problems = translated(said, fields.keys())
    for name, value in values.items():
        if name not in fields:
            problems.append(_unknown(name, set(fields)))
            continue
        kind, is_tuple, optional = kind_of(cls, name)
        parts = value if is_tuple and isinstance(value, list) else [value]
        # (JSON's whole numbers have no end, but floats have.)
        right = all(type(part) is kind or (kind is float and type(part) is int and abs(part) < 1e300) for part in parts)
        # A repeatable setting may be a single value without a list, and a size the side of a square.
        once = fields[name].metadata["repeat"] or fields[name].metadata["separator"] == "x"
        if right and (once or is_tuple == isinstance(value, list)):
            result[name] = tuple(kind(part) for part in parts) if is_tuple else kind(value)
        elif not (value is None and optional):  # null means: not given
            wanted = f"a list of {kind.__name__}" if is_tuple else kind.__name__
            problems.append(f"{name} is {json.dumps(value)} and should be {wanted}")
    if problems:
        raise UserError(f"--config {path}: " + "; ".join(problems))
    if said != values and int(os.environ.get("RANK", "0")) == 0:
        more = f"; without effect here: {', '.join(nothing)}" if nothing else ""
        print(f"note: --config {path} says: {as_words(values)}{more}", file=sys.stderr)
    return result


def _unknown(word: str, known: set[str]) -> str:
    nearest = difflib.get_close_matches(word.split("=")[0], known, n=1)
    return f"unknown setting {word}" + (f"; did you mean {nearest[0]}?" if nearest else "")
