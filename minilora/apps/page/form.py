"""Turn settings into forms, and forms into the words of a command line, so that a form does what a command does.

    settings -> a form -> words -> `read`, as on a command line -> settings, whose paths are checked

An empty field gives no word, so the defaults are the command's.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import wraps
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from ...data.kinds import is_picture
from ...files.read import FILE_NAME
from ...settings.command_line import kind_of, message_for, read
from ...settings.errors import UserError
from ...settings.setting import BUNDLED, Settings, as_typed, is_path, option
from ...settings.shared import hub_name, path_and_number

# Settings on which defaults of others depend, as the number of steps depends on the number of pictures.
WHICH_OTHERS_FOLLOW = ("data", "model", "recipe", "full", "class_prompt", "preserve", "compile", "optimizer")
LARGE = 1 << 30  # bytes; a .safetensors file of this size is taken for a base, a smaller one for a LoRA
DEEP, MOST = 4, 2000  # levels of folders, and number of folders, that are searched for choices


# ---------------------------------------------------------------------------------- settings -> form


def form(cls: type[Settings], without: Collection[str] = (), first: Collection[str] = ()) -> dict[str, Any]:
    """Make a field for each setting in the page that is being built, and return the fields by the settings' names.

    The basic settings, and those in `first`, are visible; the others are folded, by group.
    """
    made: dict[str, Any] = {}
    shown = [field for field in dataclasses.fields(cls) if field.name not in without]
    basic = [field for field in shown if field.metadata["basic"] or field.name in first]
    for start in range(0, len(basic), 2):
        with gr.Row():
            made |= {field.name: field_of(cls, field.name) for field in basic[start : start + 2]}
    others = [field for field in shown if field not in basic]
    for group in dict.fromkeys(field.metadata["group"] for field in others):
        with gr.Accordion(group, open=False):
            made |= {field.name: field_of(cls, field.name) for field in others if field.metadata["group"] == group}
    return made


def field_of(cls: type[Settings], name: str) -> Any:
    """Make the field of one setting, with its sentence of help above it and its default shown while it is empty."""
    about, (kind, is_tuple, _), default = _about(cls, name), kind_of(cls, name), defaults(cls, {})[name]
    words: dict[str, Any] = {"label": name.replace("_", " "), "info": about["help"], "elem_id": id_of(cls, name)}
    if kind is bool:
        return gr.Checkbox(default, **words)
    if about["choices"] and is_tuple:
        return gr.CheckboxGroup(list(about["choices"]), **words)
    if about["choices"]:
        empty = [] if default else [("", "")]
        return gr.Dropdown([*empty, *about["choices"]], value=default or "", **words)
    lines = 2 if about["repeat"] else 1
    return gr.Textbox("", placeholder=_typed(cls, name, default), lines=lines, max_lines=4, **words)


def _about(cls: type[Settings], name: str) -> Mapping[str, Any]:
    """Return the declaration of a setting."""
    return next(field.metadata for field in dataclasses.fields(cls) if field.name == name)


def _typed(cls: type[Settings], name: str, value: Any) -> str:
    return "" if value is None else as_typed(value, _about(cls, name)["separator"])


def defaults(cls: type[Settings], known: Mapping[str, Any]) -> dict[str, Any]:
    """Return the defaults of all settings; some depend on the settings `known`, named in WHICH_OTHERS_FOLLOW."""
    return {field.name: field.default for field in dataclasses.fields(cls)} | cls.following(dict(known))


def id_of(cls: type[Settings], name: str) -> str:
    """Return the id of a setting's field in the page's HTML: train-steps."""
    return f"{cls.__name__.removesuffix('Config').lower()}-{name}"


def chooser(label: str, choices: Iterable, value: str = "", **more) -> gr.Dropdown:
    """Make a field with the given choices; other text may be typed, too."""
    return gr.Dropdown([*choices], value=value, label=label, allow_custom_value=True, **more)


def base_chooser(found: Mapping[str, list], value: str, tab: str) -> gr.Dropdown:
    return chooser("base", found["bases"], value, info="or a hub id (OWNER/NAME), or a file", elem_id=f"{tab}-model")


# ------------------------------------------------------------------------------------ form -> words


def words_of(cls: type[Settings], values: Mapping[str, Any], known: Mapping[str, Any] | None = None) -> list[str]:
    """Return the words of the command line for a form; `values` are its fields' values by name.

    A switch or a choice at its default gives no word; the defaults depend on the settings `known`.
    """
    words, default = [], defaults(cls, known or {})
    for name, value in values.items():
        about, (kind, is_tuple, _) = _about(cls, name), kind_of(cls, name)
        if kind is bool:
            words += [] if value == default[name] else [option(name if value else f"no_{name}")]
        elif value and not (about["choices"] and value == default[name]):
            lines = value if isinstance(value, list) else str(value).split("\n")
            texts = [str(line).strip() for line in lines if str(line).strip()]
            if is_tuple and not about["repeat"] and texts:
                texts = [about["separator"].join(texts)]
            for text in texts:  # a text that begins with a minus would be taken for an option
                words += [f"{option(name)}={text}"] if text.startswith("-") else [option(name), text]
    return words


@dataclasses.dataclass(frozen=True)
class Folders:
    """The folders that the page may use, and their content."""

    named: tuple[Path, ...]

    @classmethod
    def of(cls, names: Iterable[str]) -> "Folders":
        paths = list(dict.fromkeys(Path(name).expanduser().resolve() for name in names))
        return cls(tuple(path for path in paths if not any(path.is_relative_to(p) for p in paths if p != path)))

    def read(self, cls: type[Settings], words: list[str]) -> Any:
        """Return the settings of a command line; UserError if the command refuses them, or for a path outside."""
        settings = read(cls, words, "")
        problems = []
        for field in dataclasses.fields(cls):
            value = getattr(settings, field.name)
            if is_path(field) and value != field.default:
                hub = bool(re.search("BASE|VAE|LORA", field.metadata["metavar"])) or "hub id" in field.metadata["help"]
                texts = list(value) if isinstance(value, tuple) else [value]
                texts = [] if field.name == "validation" and settings.validation_share else texts
                problems += [p for text in texts if (p := self.problem(text, option(field.name), hub))]
        if problems:
            raise UserError("; ".join(problems))
        return settings

    def words(self, cls: type[Settings], values: Mapping[str, Any]) -> list[str]:
        """Return the words of a form, as `words_of` does, with the defaults for its own data, base and so on."""
        return words_of(cls, values, self.known(values))

    def known(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return those of a form's settings on which other defaults depend; UserError for a path outside."""
        known = {name: values.get(name) or None for name in WHICH_OTHERS_FOLLOW if name in values}
        if known.get("data"):
            lines = (line.strip() for line in known["data"].split("\n"))
            known["data"] = tuple(os.path.expanduser(line) for line in lines if line)
        wrong = [self.problem(text, "data", hub=True) for text in known.get("data") or ()]
        wrong += [self.problem(known["model"], "base", hub=True)] if known.get("model") else []
        if any(wrong):
            raise UserError("; ".join(filter(None, wrong)))
        return known

    def follow(self, cls: type[Settings], fields: Mapping[str, Any]) -> None:
        """Show new defaults in the fields when a setting on which they depend changes."""
        deciding = {name: fields[name] for name in WHICH_OTHERS_FOLLOW if name in fields}
        following = [name for name in cls.following({}) if name in fields]

        def show(*values):
            try:
                now = defaults(cls, self.known(dict(zip(deciding, values, strict=True))))
            except UserError:  # using the form reports it
                return [gr.skip()] * len(following)
            switches = {name for name in following if kind_of(cls, name)[0] is bool}
            return [
                gr.update(value=now[name]) if name in switches else gr.update(placeholder=_typed(cls, name, now[name]))
                for name in following
            ]

        shown = [fields[name] for name in following]
        gr.on([field.change for field in deciding.values()], show, [*deciding.values()], shown, show_progress="hidden")

    def problem(self, text: str, what: str, hub: bool = False) -> str:
        """Return what is wrong with a path, with or without a number after a colon; "" if it may be used."""
        path = Path(path_and_number(text)[0])
        if hub and hub_name(path) and ".." not in path.parts:
            return ""
        meant = [each.expanduser().resolve() for each in (path, Path(text))]  # without the number, and unchanged
        if all(any(each.is_relative_to(folder) for folder in (*self.named, BUNDLED)) for each in meant):
            return ""
        named = ", ".join(map(str, self.named))
        return f"{what} {text}: it is outside the folders of this page ({named}); start the page with its folder, too"

    def use(self, text: str, what: str) -> Path:
        """Return a path that may be used; UserError if it may not."""
        if problem := self.problem(text, what):
            raise UserError(problem)
        return Path(text).expanduser()

    def found(self) -> dict[str, list]:
        """Return the choices in the folders, as paths: "pictures", "loras" and "bases"; a base may have a label."""
        result: dict[str, list] = {"pictures": [], "bases": [], "loras": []}
        waiting = [(folder, 0) for folder in self.named]
        for folder, depth in waiting:  # which grows on the way
            try:
                inside = sorted(folder.iterdir())
            except OSError:
                continue
            names = {path.name for path in inside}
            if "model_index.json" in names:
                result["bases"].append(as_shown(folder))
            elif FILE_NAME in names or "adapter_model.safetensors" in names:
                result["loras"].append(as_shown(folder))
            elif names & {"config.json", ".lock"}:  # a run: its pictures are samples; --full leaves a base there
                result["bases"] += [as_shown(path) for path in inside if (path / "model_index.json").exists()]
            else:
                if any(is_picture(path) for path in inside):
                    result["pictures"].append(as_shown(folder))
                for path in inside:
                    hidden = path.name.startswith((".", "__"))
                    if path.suffix == ".safetensors":
                        result["bases" if path.stat().st_size >= LARGE else "loras"].append(as_shown(path))
                    elif path.is_dir() and not hidden and depth < DEEP and len(waiting) < MOST:
                        waiting.append((path, depth + 1))
        result = {kind: list(dict.fromkeys(paths)) for kind, paths in result.items()}
        return result | {"bases": [("the bundled miniature", ""), *result["bases"]]}


def as_shown(path: Path) -> str:
    """Return a path relative to the current folder, if it is inside that."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def by_name(fields: Mapping[str, Any], values: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the values of fields by the fields' names; Gradio gives them by the fields themselves."""
    return {name: values[field] for name, field in fields.items()}


def shows_mistakes(work: Callable) -> Callable:
    """Make a user's mistake appear in the page, as the line that the command would print."""

    @wraps(work)
    def wrapped(*args, **more):
        try:
            return work(*args, **more)
        except Exception as error:
            line = message_for(error)
            if line is None:
                raise
            raise gr.Error(escape(line), duration=60, title="", print_exception=False) from error

    return wrapped
