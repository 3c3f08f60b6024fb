"""The file of --config: JSON or TOML, with the names of the settings, or with those of other programs (others.py)."""

import dataclasses
import difflib
import json
import os
import sys
import tomllib
import types
import typing
from pathlib import Path

from .errors import UserError
from .others import translated
from .setting import Settings, as_words
from .strict_json import parse_json


def read_file(cls: type[Settings], path: Path) -> dict:
    """Read settings from a file, checking every name and type; UserError names all that is wrong."""
    reads = tomllib.loads if path.suffix == ".toml" else parse_json
    try:
        values = reads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise UserError(f"--config {path}: there is no such file") from error
    except (OSError, ValueError) as error:
        raise UserError(f"--config {path}: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: it holds a {type(values).__name__} and should hold one object of settings")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    ours, nothing, problems = translated(values, fields.keys()) if cls.reads_others else (values, [], [])
    result = {}
    for name, value in ours.items():
        if name not in fields:
            problems.append(unknown_setting(name, set(fields)))
            continue
        kind, is_tuple, optional = kind_of(cls, name)
        parts = value if is_tuple and isinstance(value, list) else [value]
        # A whole number in JSON may be too large for a float.
        right = all(type(part) is kind or (kind is float and type(part) is int and abs(part) < 1e300) for part in parts)
        # A single value needs no list if the setting may be repeated, or is a size: the side of a square.
        once = fields[name].metadata["repeat"] or fields[name].metadata["separator"] == "x"
        if right and (once or is_tuple == isinstance(value, list)):
            result[name] = tuple(kind(part) for part in parts) if is_tuple else kind(value)
        elif not (value is None and optional):  # null means: not given
            wanted = f"a list of {kind.__name__}" if is_tuple else kind.__name__
            problems.append(f"{name} is {json.dumps(value)} and should be {wanted}")
    if problems:
        raise UserError(f"--config {path}: " + "; ".join(problems))
    if ours != values and int(os.environ.get("RANK", "0")) == 0:
        more = f"; without effect here: {', '.join(nothing)}" if nothing else ""
        print(f"note: --config {path} says: {as_words(ours)}{more}", file=sys.stderr)
    return result


def kind_of(cls: type, name: str) -> tuple[type, bool, bool]:
    """Return the type of one value of a setting, whether the setting holds several, and whether it may be None."""
    hint = typing.get_type_hints(cls)[name]
    optional = isinstance(hint, types.UnionType)  # X | None
    if optional:
        hint = typing.get_args(hint)[0]
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True, optional
    return hint, False, optional


def unknown_setting(word: str, known: set[str]) -> str:
    """Return the message for a name that is not in `known`, with the nearest one that is."""
    nearest = difflib.get_close_matches(word.split("=")[0], known, n=1)
    return f"unknown setting {word}" + (f"; did you mean {nearest[0]}?" if nearest else "")
