"""What --precision auto chooses, and the warning for a precision that the machine does not compute in."""

import json
import subprocess
import sys

import pytest
import torch
from helpers import CPU, ROOT

from minilora.files.read import FILE_NAME
from minilora.models import precision
from minilora.models.base import Base
from minilora.settings.train import TrainConfig
from minilora.training import train

LARGE = 10 * precision.SMALL


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_a_small_base_stays_in_float32_everywhere(device):
    assert precision.choose(torch.device(device), precision.SMALL - 1)[0] == "fp32"


def test_what_nobody_tried_is_float32():
    assert precision.choose(torch.device("mps"), LARGE)[0] == "fp32"


def test_a_processor_gets_what_is_faster_and_a_warning_for_what_is_slower():
    chosen, why = precision.choose(CPU, LARGE)
    assert (chosen == "bf16") == (precision.speed_on_cpu("bf16") > 1)
    assert "measured" in why
    assert not precision.slow_precision("fp32", CPU, LARGE)
    assert not precision.slow_precision(chosen, CPU, LARGE)
    assert not precision.slow_precision("bf16", CPU, precision.SMALL - 1)


def test_a_processor_that_does_not_compute_bf16_gets_float32_and_a_warning():
    """oneDNN leaves out what ONEDNN_MAX_CPU_ISA excludes, as on a processor that has AVX2 only."""
    ask = (
        "import torch; from minilora.models import precision as p; cpu = torch.device('cpu'); "
        f"print(p.choose(cpu, {LARGE})[0], p.slow_precision('bf16', cpu, {LARGE}), sep='|')"
    )
    only = {"ONEDNN_MAX_CPU_ISA": "AVX2", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    told = subprocess.run([sys.executable, "-c", ask], env=only, capture_output=True, text=True, check=True).stdout
    chosen, warning = told.strip().split("|")
    assert chosen == "fp32"
    assert "--precision bf16" in warning
    assert "slower with it than with fp32" in warning


@pytest.mark.parametrize("small", [True, False])
def test_auto_learns_the_bytes_of_what_it_chose(tiny_base, pictures, tmp_path, monkeypatch, capsys, small):
    if not small:
        monkeypatch.setattr(precision, "SMALL", 0)  # so that the tiny base counts as a large one
    settings = {"data": (str(pictures),), "model": str(tiny_base), "steps": 2, "cache": str(tmp_path / "cache")}
    train(TrainConfig(**settings, output=str(tmp_path / "auto")))
    said = capsys.readouterr().out
    chosen = json.loads((tmp_path / "auto" / "config.json").read_text())["precision"]
    assert chosen == Base(str(tiny_base), CPU, "auto").precision
    assert f"{chosen} on cpu (" in said
    train(TrainConfig(**settings, output=str(tmp_path / "given"), precision=chosen))
    assert (tmp_path / "auto" / FILE_NAME).read_bytes() == (tmp_path / "given" / FILE_NAME).read_bytes()
