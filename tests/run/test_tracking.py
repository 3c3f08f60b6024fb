"""run/tracking.py: wandb's files hold the numbers that TensorBoard's hold; by the real package, offline."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from minilora.files.read import FILE_NAME
from minilora.settings.errors import UserError
from minilora.settings.train import TrainConfig
from minilora.training import train


@pytest.fixture
def settings(pictures, tmp_path, tiny_base, monkeypatch) -> dict:
    wandb = pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    wandb.teardown()  # the process may have read the environment before
    recipe = {"steps": 4, "batch_size": 2, "rank": 2, "model": str(tiny_base), "checkpoint_every": 2}
    return recipe | {"data": (str(pictures),), "output": str(tmp_path / "out"), "cache": str(tmp_path / "cache")}


def records(path: Path) -> list:
    """Return what a file of wandb's holds: a head of 7 bytes, then messages in LevelDB's log format.

    A piece of a message has a sum of 4 bytes, its length in 2, and whether it is whole (1), the first (2), one
    in the middle (3), or the last (4); none crosses a multiple of 32768 bytes.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, message, result = path.read_bytes(), 7, b"", []
    while place < len(content):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        message += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            result.append(Record.FromString(message))
            message = b""
    return result


def logged(folder: Path, name: str) -> dict[int, float]:
    """Return by step what was logged under a name, over all the files of a run."""
    found = {}
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for record in records(path):
            row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            found |= {row["_step"]: row[name]} if name in row else {}
    return found


def in_tensorboard(folder: Path, name: str) -> dict[int, float]:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(name)}


def test_wandb_has_the_numbers_and_pictures_and_a_resumed_run_goes_on_in_the_same(settings, tmp_path):
    folder = tmp_path / "out"
    more = {"wandb": "things", "sample_prompt": ("dog",), "sample_every": 4, "validation": settings["data"][0]}
    train(TrainConfig(**settings | more | {"steps": 2}))
    ids = {path.name.split("-")[-1] for path in folder.glob("wandb/offline-run-*")}
    time.sleep(1)  # wandb names its folders by the second
    train(TrainConfig(**settings | more | {"resume": True}))
    assert {path.name.split("-")[-1] for path in folder.glob("wandb/offline-run-*")} == ids
    assert len(ids) == 1
    for name in ("loss", "learning_rate", "grad_norm", "validation"):
        ours = in_tensorboard(folder, name)
        assert logged(folder, name) == pytest.approx(ours, rel=1e-6)  # TensorBoard keeps float32
    assert set(logged(folder, "loss")) == {1, 2, 3, 4}
    [picture] = folder.glob("wandb/offline-run-*/files/media/images/samples_4_*.png")
    assert np.array_equal(Image.open(picture), Image.open(folder / "samples" / "step-00000004.png"))


def test_it_changes_nothing_that_is_learnt(settings, tmp_path):
    train(TrainConfig(**settings | {"wandb": "things"}))
    train(TrainConfig(**settings | {"output": str(tmp_path / "plain")}))
    assert (tmp_path / "out" / FILE_NAME).read_bytes() == (tmp_path / "plain" / FILE_NAME).read_bytes()


def test_a_run_that_is_told_to_stop_ends_and_leaves_what_was_logged(settings, tmp_path):
    words = f"--data {settings['data'][0]} --model {settings['model']} --output {tmp_path / 'out'} --wandb things"
    words += f" --cache {tmp_path / 'cache'} --steps 100000 --batch-size 2 --rank 2 --checkpoint-every 2"
    process = subprocess.Popen([sys.executable, "train.py", *words.split()], cwd=ROOT, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list((tmp_path / "out").glob("checkpoints/step-*")):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM
    steps = logged(tmp_path / "out", "loss")
    [checkpoint] = (tmp_path / "out" / "checkpoints").iterdir()
    assert list(steps) == list(range(1, int(checkpoint.stem.split("-")[1]) + 1))


def test_without_the_package_it_is_said_before_any_work(settings, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(UserError, match=r"--wandb needs the package wandb; run: pip install -e '\.\[wandb\]'"):
        train(TrainConfig(**settings | {"wandb": "things"}))
    assert not os.path.exists(tmp_path / "out")


def test_what_wandb_refuses_is_one_line(settings, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "no key")  # which it sees by itself, without asking a server
    wandb.teardown()  # it reads the environment anew
    with pytest.raises(UserError, match=r"--wandb things: .*\(run `wandb login`, or set WANDB_MODE=offline\)"):
        train(TrainConfig(**settings | {"wandb": "things"}))
