"""The package that `python -m build` makes: installed in a fresh environment, its commands work from any folder."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from helpers import ROOT

from minilora.files.read import FILE_NAME

COMMANDS = ("train", "sample", "merge", "evaluate", "restore", "morph", "restyle", "distill", "page")


def run(*words, folder: Path) -> str:
    """Run a command in a folder, without what this environment knows of the project, and return what it prints."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*map(str, words)], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The folder of the wheel and the sdist."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "minilora", source / "minilora", ignore=shutil.ignore_patterns("__pycache__"))
    # Without isolation nothing is downloaded: setuptools is that of this environment.
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", output, source, folder=source)
    return output


@pytest.fixture(scope="module")
def programs(built, tmp_path_factory) -> Path:
    """The folder of the commands in an environment that has the wheel, and beside it only what it depends on."""
    environment = tmp_path_factory.mktemp("fresh")
    venv.create(environment)  # without pip
    [wheel] = built.glob("*.whl")
    python = environment / "bin" / "python"
    run(
        sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, folder=environment
    )
    packages = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=environment).strip()
    Path(packages, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return environment / "bin"


def test_both_packages_are_made_and_have_the_base_in_less_than_45_megabytes(built):
    assert sorted(path.suffix for path in built.iterdir()) == [".gz", ".whl"]
    assert all(path.stat().st_size < 45e6 for path in built.iterdir())


def test_the_commands_are_the_scripts_and_need_nothing_but_the_package(programs, tmp_path):
    """Trained and drawn by the installed commands, from an empty folder, everything has the scripts' bytes."""
    where = run(programs / "python", "-c", "import minilora; print(minilora.__file__)", folder=tmp_path)
    assert Path(where.strip()).is_relative_to(programs.parent)
    for command in COMMANDS:
        assert f"usage: minilora-{command}" in run(programs / f"minilora-{command}", "--help", folder=tmp_path)
    few = ["--data", ROOT / "dataset" / "mountain", "--steps", 1, "--batch-size", 1, "--resolution", 32]
    few += ["--cache", tmp_path / "cache"]
    drawing = ["--prompt", "apple", "--steps", 1, "--size", 32]
    results = []
    for name, train, sample in (
        ("package", [programs / "minilora-train"], [programs / "minilora-sample"]),
        ("scripts", [sys.executable, ROOT / "train.py"], [sys.executable, ROOT / "sample.py"]),
    ):
        folder = tmp_path / name
        folder.mkdir()
        run(*train, *few, "--output", "out", folder=folder)
        run(*sample, *drawing, "--lora", "out", "--output", "apple.png", folder=folder)
        results.append([(folder / path).read_bytes() for path in (f"out/{FILE_NAME}", "apple.png")])
    assert results[0] == results[1]
