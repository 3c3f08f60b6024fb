"""Every command of the README and of the pages in docs/ runs, with small settings, in the order it stands there."""

import multiprocessing
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from helpers import ROOT, write_motion_lora

from minilora import remove_lora

README = (ROOT / "README.md").read_text()
PAGES = {page.stem: page.read_text() for page in sorted((ROOT / "docs").glob("*.md"))}
NOT_RUN = ("pip ", "pytest", "tensorboard ", "minilora-page")  # .ci/run does the first two; the others do not end
HUB_ID_XL = "stabilityai/stable-diffusion-xl-base-1.0"
MOTION = {  # on the hub: their stand-ins in the folder of a test
    "guoyww/animatediff-motion-adapter-v1-5-2": "adapter",
    "guoyww/animatediff-motion-lora-zoom-in": "zoom.safetensors",
}
HUB_ID = "stable-diffusion-v1-5/stable-diffusion-v1-5"


def commands(text: str) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [part.strip() for line in lines for part in line.split("&&") if part.strip()]


def small(command: str, tiny_base: Path, tiny_xl: str = "") -> str:
    """Make a command small: few steps, two processes, tiny bases on disk for those on the hub."""
    command = command.replace(HUB_ID, str(tiny_base)).replace(HUB_ID_XL, str(tiny_xl))
    for name, stand_in in MOTION.items():
        command = command.replace(name, stand_in)
    command += " --frames 2" if "--motion" in command else ""
    command = command.replace("--nproc-per-node 8", "--nproc-per-node 2")
    command = re.sub(r"--(checkpoint|sample)-every \d+", r"--\1-every 1", command)
    if "train.py" in command:
        command += " --steps 2 --cache cache"
        command += "" if "--batch-size" in command or "--config" in command else " --batch-size 1"
        command += " --class-pictures 2" if "--class-prompt" in command and "--preserve" not in command else ""
    if "sample.py" in command:
        command += " --steps 2"
    if "apps.distill" in command:
        command += " --captions prompts.txt --pictures 4 --train-steps 2 --rank 2"
    elif "minilora.apps" in command and "evaluate" not in command:
        command = re.sub(r" --frames \d+", "", command).replace("--style dataset/fluent", "--style out/things")
        command += " --steps 2"
        command += " --frames 3" if "morph" in command else ""
        command += "" if "restyle" in command else " --train-steps 2 --rank 2"
        command += " --text-steps 2" if "--optimise-text" in command else ""
    return command


# Processes that python starts are forked from one that has imported already what takes seconds to import.
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(
    ["minilora.training", "minilora.apps.evaluate", "minilora.apps.distill", "minilora.apps.morph"]
)


def become(words: list[str], folder: Path, log: Path) -> None:
    """Do in this new process what `python words` does in a folder, writing down what it prints."""
    os.chdir(folder)
    with open(log, "wb") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    sys.path.insert(0, str(folder))
    if "--compile" in words:  # all but the compiler, which would take minutes
        torch.compiler.set_stance(force_backend="eager")
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def call(command: str, folder: Path) -> tuple[str, Path, object]:
    """Start a command in a folder; `finish` waits for it."""
    program, *words = shlex.split(command)
    log = folder / f"{uuid.uuid4().hex}.log"
    if program == "python":
        process = FORKED.Process(target=become, args=(words, folder, log))
        process.start()
    else:
        words = [sys.executable, "-m", {"torchrun": "torch.distributed.run"}[program], *words]
        with open(log, "wb") as out:
            process = subprocess.Popen(words, cwd=folder, stdout=out, stderr=subprocess.STDOUT)
    return command, log, process


def finish(started: tuple[str, Path, object]) -> str:
    """Wait for a command, which must succeed, and return what it printed."""
    command, log, process = started
    if isinstance(process, subprocess.Popen):
        code = process.wait()
    else:
        process.join()
        code = process.exitcode
    output = log.read_text()
    log.unlink()
    assert code == 0, f"{command}\n{output}"
    return output


def test_the_first_screen_has_exactly_the_two_commands():
    first = re.search(r"```bash\n(.*?)```", README, re.DOTALL)[1].splitlines()
    assert [line.split("#")[0].strip() for line in first] == [
        "pip install -e . && torchrun train.py --data dataset/mountain",
        'pip install -e ".[test]" && pytest',
    ]


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder that has what a command needs of the project's, and nothing else."""
    for name in ("train.py", "sample.py", "dataset", "minilora"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def on_small_pictures(command: str) -> str:
    """Let a command for the bundled base see and draw pictures of a quarter of its size, in a quarter of the time."""
    option = "--resolution" if "train.py" in command else "--size" if "sample.py" in command else None
    return f"{command} {option} 32" if option and "--model" not in command else command


def run(command: str, folder: Path) -> None:
    """Run a command; a training run ends with a line `next`, which is itself a command, and that runs too."""
    if "--nnodes 2" in command:  # two machines: two torchruns on this one
        command = command.replace("first.machine", "localhost")
        for machine in [call(each, folder) for each in (command, command.replace("--node-rank 0", "--node-rank 1"))]:
            finish(machine)
        return
    output = finish(call(command, folder))
    if "train.py" in command and "--preview" not in command:
        suggested = output.strip().splitlines()[-1].removeprefix("next").strip()
        finish(call(on_small_pictures(small(suggested, Path())), folder))


def test_every_command_of_the_readme_runs(folder, tiny_base, family_base):
    found = [command for command in commands(README) if not command.startswith(NOT_RUN)]
    for command in found:
        run(on_small_pictures(small(command, tiny_base, family_base("sdxl"))), folder)
    assert len(found) >= 7
    assert (folder / "out" / "mountain" / "samples" / "before_after.png").exists()


@pytest.mark.parametrize("command", re.findall(r"^\|.*\| `(python .*)` \|$", PAGES["recipes"], re.MULTILINE))
def test_every_recipe_runs(command, folder, family_base):
    model = f" --model {family_base('sd2')}"  # which predicts v, as the bundled base does
    if "adamw8bit" in command:
        pytest.importorskip("bitsandbytes")
    if "out/fluent" in command:  # a LoRA that there must be
        first = small("python train.py --data dataset/fluent", "") + model
        finish(call(first, folder))
    command = small(command, "").replace("=16", "=2").replace("=4", "=3") + model  # it is only 8 wide
    output = finish(call(command, folder))
    # The line that it ends with draws with what was learnt.
    suggested = small(output.strip().splitlines()[-1].removeprefix("next").strip(), "")
    finish(call(suggested, folder))


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_runs(page, folder, tiny_base, family_base, motion_adapter):
    for name in "ab":
        shutil.copy(ROOT / "dataset" / "mountain" / "mountain.jpg", folder / f"{name}.jpg")
    (folder / "prompts.txt").write_text("apple\nbanana\n")
    shutil.copytree(motion_adapter, folder / "adapter")
    write_motion_lora(folder / "zoom.safetensors", motion_adapter)
    for command in commands(PAGES[page].replace("minilora/base", str(tiny_base))):
        if not command.startswith(NOT_RUN):
            command = small(command, tiny_base, family_base("sdxl"))
            has_base = "--model" in command or "--config" in command or "minilora.merge" in command
            run(command if has_base else f"{command} --model {tiny_base}", folder)


def test_the_command_beside_the_figures_of_a_page_is_one_of_its_commands():
    for page, text in PAGES.items():
        found = re.findall(r"<!-- figures: \S+ -->\nPrinted by `(.*?)`", text)
        assert len(found) == text.count("<!-- figures: "), f"{page}: run docs/make.sh"
        there = [shlex.split(command) for command in commands(text)]
        for command in found:
            assert shlex.split(command) in there, f"{page}: {command}"


def test_every_file_and_picture_that_they_name_exists():
    for folder, text in [(ROOT, README), *((ROOT / "docs", text) for text in PAGES.values())]:
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            assert target.startswith("http") or (folder / target).exists(), target


def test_every_test_that_the_promises_name_exists():
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", PAGES["promises"])
    assert len(named) > 10
    for file, test in named:
        assert f"def {test}(" in next((ROOT / "tests").rglob(file)).read_text(), test


def test_its_python_runs(folder, monkeypatch):
    monkeypatch.chdir(folder)
    [block] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)

    def your_loop(parameters):
        for parameter in parameters:
            torch.nn.init.normal_(parameter)

    names = {"your_loop": your_loop}
    exec(block, names)
    remove_lora(names["unet"])
    before = UNet2DConditionModel.from_pretrained("minilora/base", subfolder="unet").state_dict()
    assert all(torch.equal(value, before[name]) for name, value in names["unet"].state_dict().items())


@pytest.mark.parametrize("command", ["train.py", "sample.py"])
def test_help_works_from_anywhere(command, tmp_path):
    output = finish(call(f"python {ROOT / command} --help", tmp_path))
    assert "--seed" in output
    assert "bundled" in output
