"""The house: a wing imports only what lies below it, and no two files import each other, however far around."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import minilora

ROOT = Path(minilora.__file__).parent
# From the bottom up; what stands in one line is on one floor, and a floor may import those below it.
FLOORS = (
    ("settings.errors",),
    ("settings", "lora", "diffusion"),
    ("files",),
    ("models",),
    ("data", "merge"),
    ("sampling",),
    ("run",),
    ("training",),
    ("apps",),
    ("base",),
)
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in ROOT.rglob("*.py")}
ROOMS = [module for module in MODULES if not module.endswith("__init__")]


def imported(module: str) -> set[str]:
    """Return the modules of ours that a module imports, also within its functions."""
    package, found = module.split(".")[:-1], set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            above = package[: len(package) + 1 - node.level]
            name = ".".join([*above, *([node.module] if node.module else [])])
        elif node.module == "minilora" or (node.module or "").startswith("minilora."):
            name = node.module.removeprefix("minilora").removeprefix(".")
        else:
            continue
        found |= {name} | {f"{name}.{alias.name}".removeprefix(".") for alias in node.names}
    return found & set(ROOMS) - {module}


def floor(module: str) -> int:
    names = [module, module.split(".")[0]]
    return next(number for name in names for number, rooms in enumerate(FLOORS) if name in rooms)


@pytest.mark.parametrize("module", ROOMS)
def test_no_arrow_goes_up(module):
    wing = module.split(".")[0]
    up = [
        other
        for other in imported(module)
        if floor(other) > floor(module) or (floor(other) == floor(module) and other.split(".")[0] != wing)
    ]
    assert not up


def test_there_is_no_circle():
    TopologicalSorter({module: imported(module) for module in ROOMS}).prepare()  # raises CycleError


def test_there_are_thirteen_entries_and_every_wing_says_what_it_is_for():
    entries = [path for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
    assert len(entries) == 13
    for path in entries:
        if path.is_dir():
            assert ast.get_docstring(ast.parse((path / "__init__.py").read_text()))


def test_contributing_lists_every_file_with_the_first_sentence_of_its_docstring():
    listed = {row for row in (ROOT.parent / "CONTRIBUTING.md").read_text().splitlines() if row.startswith("| `")}
    sentences = {path: ast.get_docstring(ast.parse(path.read_text())) for path in map(MODULES.get, ROOMS)}
    rows = {f"| `{path.relative_to(ROOT).as_posix()}` | {text.splitlines()[0]} |" for path, text in sentences.items()}
    assert rows == listed
