"""The commands: read the settings, do the work, and print a user's mistake in one line.

`read` makes the command line from a settings class.  `--config FILE` gives settings by the same names, see
config_file.py; the command line overrides it.  An unknown name is an error in both.
"""

import argparse
import dataclasses
import importlib
import os
import re
import shlex
import shutil
import sys
import typing
from collections.abc import Callable
from functools import partial
from pathlib import Path

from .config_file import kind_of, read_file, unknown_setting
from .errors import UserError, first_line, is_out_of_memory
from .setting import ByBase, Settings, as_typed, option, with_home


def run(settings: str | type, work: str | Callable, description: str) -> None:
    """Read the settings from the command line and call `work` with them; a user's mistake ends with exit code 2.

    Both may be given as "module:name".  `work` is then imported after the settings were read, because importing torch
    takes seconds, and --help and a misspelt setting do not need it.
    """
    try:
        config = read(_named(settings), sys.argv[1:], description)
        _named(work)(config)
    except KeyboardInterrupt:
        sys.exit(130)  # the exit code that shells use for Ctrl-C; everything is saved by now
    except Exception as error:
        line = message_for(error)
        if line is None:
            raise
        rank = int(os.environ.get("RANK", 0))
        print(f"error: {line}" if rank == 0 else f"error (process {rank}): {line}", file=sys.stderr)
        sys.exit(2)


def _named(what):
    """Import and return what "module:name" in minilora names; return anything but text unchanged."""
    if not isinstance(what, str):
        return what
    module, _, name = what.partition(":")
    return getattr(importlib.import_module(f"minilora.{module}"), name)


def _command(name: str, work: str | Callable, description: str) -> Callable[[], None]:
    return partial(run, f"settings.{name}:{name.title()}Config", work, description)


def _sample(config) -> None:
    """Draw pictures or clips."""
    _named("apps.motion:sample_clips" if config.motion else "sampling:sample")(config)


train = _command("train", "training:train", "Train a LoRA on a folder of pictures.")
sample = _command("sample", _sample, "Draw pictures with a base and any mix of LoRAs.")
merge = _command("merge", "merge:merge", "Fold LoRA files into a base; or merge, resize, convert and extract LoRAs.")
restore = _command(
    "restore",
    "apps.restore:restore",
    "Restore a picture from its own noise, with and without a LoRA of it, and edit it.",
)
morph = _command("morph", "apps.morph:morph", "Morph from picture to picture, with a LoRA of each.")
restyle = _command("restyle", "apps.restyle:restyle", "Redraw pictures in the style of a LoRA.")
distill = _command("distill", "apps.distill:distill", "Train a LoRA to draw in few steps, or smoothly.")
evaluate = _command("evaluate", "apps.evaluate:evaluate", "Compare drawn pictures with real ones.")
page = _command(
    "page", "apps.page.__main__:serve", "Open a page in the browser to train, draw and merge, on this machine only."
)


def message_for(error: Exception) -> str | None:
    """Return the message for a user's mistake or a machine that is too small; None for any other error."""
    if isinstance(error, (UserError, OSError)):  # OSError: a full disk, a folder without permission
        return str(error)
    if isinstance(error, (MemoryError, RuntimeError)) and is_out_of_memory(error):
        advice = "smaller pictures, fewer at a time and --precision bf16 need less; see docs/your_pictures.md"
        return f"not enough memory ({first_line(error)}); {advice}"
    return None


# --------------------------------------------------------------------------------------- command line


def read(cls: type[Settings], argv: list[str], description: str):
    """Return the settings of a command line and of the `--config` file that it may name.

    Raises UserError for an unknown setting, with the nearest name, and for a value that does not fit.
    --print-config prints the settings and exits.
    """
    if broken := [word for word in argv if word != word.encode(errors="replace").decode()]:
        raise UserError(f"{broken[0]!r} on the command line holds bytes that are not UTF-8; spell it in UTF-8")
    typed, unknown = _parser(cls, description).parse_known_intermixed_args(argv)
    if unknown:
        options = {option(field.name) for field in dataclasses.fields(cls)} | {"--config", "--print-config"}
        wrong = [unknown_setting(word, options) for word in unknown if word.startswith("-")]
        raise UserError("; ".join(wrong) or _loose_words(cls, unknown, argv))
    # A setting whose values are typed without an option is an empty list if there are none.
    given: dict[str, typing.Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in vars(typed).items() if value != []
    }
    show, path = given.pop("print_config", False), given.pop("config", None)
    values = read_file(cls, Path(path)) if path else {}
    # Defaults in the file are dropped, so that they follow the command line: with another --data there, the default
    # output folder must change, too.
    follows = cls.following(values)
    values = {name: value for name, value in values.items() if name not in follows or value != follows[name]}
    if given.keys() & cls.one_of:
        values = {name: value for name, value in values.items() if name not in cls.one_of}
    settings = cls(**with_home(cls, values | given))
    if show:
        print(settings.to_json(), end="")
        sys.exit(0)
    return settings


def _loose_words(cls: type[Settings], words: list[str], argv: list[str]) -> str:
    """Return the message for words that stand behind no setting."""
    main = option(cls.main)
    if not cls.main or main in argv:
        return f"{' '.join(words)}: there is no setting before it; a text of several words needs quotes around it"
    return f"{' '.join(words)}: there is no setting before it; did you mean {main} {shlex.quote(' '.join(words))}?"


def _parser(cls: type[Settings], description: str) -> argparse.ArgumentParser:
    """Make the command line of a settings class: the basic settings, then the advanced ones by group."""

    class Parser(argparse.ArgumentParser):
        def error(self, message):
            found = re.fullmatch(r"argument (--[\w-]+)\S*: (.*)", message, re.DOTALL)
            name, what = found.groups() if found else ("", message)
            if what == "expected one argument":
                what = f"a value is missing behind it (if it begins with a minus, write {name}=-…)"
            raise UserError(f"{name}: {what}" if found else what)

    examples = "".join(f"\n  {example}" for example in cls.examples)
    width = min(shutil.get_terminal_size().columns, 100)
    parser = Parser(
        prog=_program(),
        usage=" ".join(filter(None, ("%(prog)s", cls.usage, "[SETTING …]"))),
        description=description + (f"\n\nfor example:{examples}" if examples else ""),
        add_help=False,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,  # so that only what was typed overrides the file
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=28, width=width),
    )
    groups: dict[str, argparse._ArgumentGroup] = {}
    for field in sorted(dataclasses.fields(cls), key=lambda field: not field.metadata["basic"]):
        about = field.metadata
        title = "basic" if about["basic"] else f"advanced: {about['group']}"
        group = groups.get(title) or groups.setdefault(title, parser.add_argument_group(title))
        kind, is_tuple, _ = kind_of(cls, field.name)
        if kind is bool:  # help shows the switch that changes the default
            for value, name in ((True, field.name), (False, f"no_{field.name}")):
                text = argparse.SUPPRESS if value == about["default"] else about["help"]
                group.add_argument(option(name), action="store_const", const=value, dest=field.name, help=text)
            continue
        metavar = about["metavar"] or {int: "N", float: "X"}.get(kind, "TEXT")
        words = {"help": about["help"] + _default_words(field), "metavar": metavar}
        if about["bare"]:
            group.add_argument(field.name, nargs="*", **words)
            continue
        if about["repeat"]:
            words |= {"action": "append", "type": kind}
        else:
            words["type"] = _several(kind, about["separator"], metavar) if is_tuple else _one(kind)
            words["metavar"] = ("," if is_tuple else "|").join(about["choices"]) or metavar
        names = filter(None, (option(field.name), about["alias"]))
        group.add_argument(*names, dest=field.name, **words)
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
    if default in (None, (), ""):
        return ""
    text = as_typed(default, separator)
    return f" (default {text})" if len(text) < 80 else ""


def _one(kind: type) -> Callable[[str], typing.Any]:
    """Return a parser for one value of an option."""

    def parse(text: str):
        try:
            return kind(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' * (kind is int)}number") from error

    return parse


def _several(kind: type, separator: str, form: str) -> Callable[[str], tuple]:
    """Return a parser for several values of one option; `form` shows how they are written."""

    def parse(text: str) -> tuple:
        try:
            return tuple(kind(part.strip()) for part in text.split(separator))
        except ValueError as error:
            numbers = {int: ", in whole numbers", float: ", in numbers"}.get(kind, "")
            raise argparse.ArgumentTypeError(f"{text!r} is not {form}{numbers}") from error

    return parse
