"""models/device.py: the CPU where there is nothing else or where it is asked for; what is asked for is there."""

import pytest
from torch import accelerator

from minilora.models.device import CPU, this_device
from minilora.settings.errors import UserError


def test_the_cpu_is_taken_where_it_is_asked_for(monkeypatch):
    monkeypatch.setenv("MINILORA_DEVICE", "cpu")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")  # of which no machine has as many GPUs
    assert this_device() == CPU


def test_what_is_not_there_is_named(monkeypatch):
    monkeypatch.setenv("MINILORA_DEVICE", "tpu")
    with pytest.raises(UserError, match=r"MINILORA_DEVICE is tpu; this machine has (only cpu|cpu and )"):
        this_device()


@pytest.mark.skipif(accelerator.is_available(), reason="there is a GPU")
def test_the_cpu_is_taken_where_there_is_nothing_else(monkeypatch):
    monkeypatch.delenv("MINILORA_DEVICE")
    assert this_device() == CPU
