"""The memory that a run will need, told before anything is loaded."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from helpers import CPU

from minilora import inject_lora, lora_parameters
from minilora.files.read import FILE_NAME
from minilora.models.base import Base
from minilora.run import setup
from minilora.run.memory import Live, memory_of, ways_to_fit
from minilora.settings.train import TrainConfig
from minilora.training import train


def settings(base, **more) -> TrainConfig:
    return TrainConfig(data=("photos",), model=str(base), precision="fp32", **{"batch_size": 1} | more)


def needed(base, **more):
    config = settings(base, **more)
    return memory_of(config, Base.of(config, CPU, config.precision))


def test_a_step_of_fake_tensors_holds_what_a_real_one_holds(tiny_base):
    """`Live` counts real tensors as well, so the same step is counted once on each."""
    counted = {}
    for checkpointing in (False, True):
        base = Base(str(tiny_base), CPU)
        unet = base.unet.train()
        inject_lora(unet, 4)
        if checkpointing:
            unet.enable_gradient_checkpointing()
        length = base.tokenizer.model_max_length
        x, timesteps, text = torch.zeros(2, 4, 8, 8), torch.zeros(2, dtype=torch.long), torch.zeros(2, length, 16)
        with Live(unet.parameters()) as live:
            unet(x, timesteps, text).sample.square().mean().backward()
        counted[checkpointing] = live.peak - 4 * sum(p.numel() for p in lora_parameters(unet))
        fake = needed(tiny_base, rank=4, batch_size=2, gradient_checkpointing=checkpointing).step
        # The fake step computes the same.  What it counts more is the slack, a fifth of a step without checkpointing,
        # and a few numbers that Python frees later.
        assert fake == pytest.approx(counted[checkpointing] + 0.2 * counted[False], rel=0.02)
    assert counted[True] < counted[False]


def test_live_counts_a_tensor_once_and_as_long_as_it_lives():
    known = torch.zeros(1000)
    with Live(iter([known])) as live:
        kept = torch.ones(10)
        view = kept[2:].view(2, 4)
        lost = known + 1
        assert live.now == 4 * (10 + 1000)
        del lost
        gc.collect()
        assert live.now == 4 * 10
        known.add_(view.sum())
    assert live.peak >= 4 * (10 + 1000)
    assert weakref.ref(kept)() is kept


def test_the_parts_are_those_of_the_base(family_base):
    for family in ("sd1", "sdxl"):
        base = Base(str(family_base(family)), CPU)
        need = needed(family_base(family), rank=2)
        frozen = sum(4 * parameter.numel() for parameter in base.unet.parameters())
        inject_lora(base.unet, 2)
        assert need.weights == frozen
        assert need.lora == 16 * sum(parameter.numel() for parameter in lora_parameters(base.unet))
        assert need.encoding > sum(4 * p.numel() for p in base.vae.parameters())  # beside it what it holds of a picture
        assert need.encoding >= sum(4 * p.numel() for encoder in base.text_encoders for p in encoder.parameters())


def test_what_takes_less_takes_less(tiny_base):
    plain = needed(tiny_base, batch_size=4)
    assert needed(tiny_base, batch_size=4, gradient_checkpointing=True).step < plain.step
    assert needed(tiny_base, batch_size=4, micro_batch_size=1).step < plain.step / 3
    assert needed(tiny_base, batch_size=4, optimizer="adamw8bit").lora < plain.lora
    assert (
        needed(tiny_base, batch_size=4, optimizer="prodigy").lora == 24 / 16 * plain.lora
    )  # two numbers more for each
    assert needed(tiny_base, batch_size=4, train_text_encoder=True).lora > plain.lora
    both = {"train_text_encoder": True, "gradient_checkpointing": True}
    assert needed(tiny_base, batch_size=4, **both).lora > plain.lora
    assert needed(tiny_base, batch_size=4, ema=0.9).lora > plain.lora
    full = needed(tiny_base, batch_size=4, full=True)
    assert (full.weights, full.lora) == (0, 4 * plain.weights)  # the weights, their gradients, two averages of Adam
    assert needed(tiny_base, batch_size=4, crop="random").step > plain.step


def test_advice_names_settings_until_the_run_fits(tiny_base):
    config = settings(tiny_base, batch_size=4)
    base = Base.of(config, CPU, "fp32")
    plain = memory_of(config, base)
    assert ways_to_fit(config, base, plain.total) == []
    half = plain.weights + plain.lora + plain.step // 3
    told = ways_to_fit(config, base, half)
    assert told[0].startswith("--precision bf16 (then about ")
    fits = replace(config, precision="bf16", gradient_checkpointing=len(told) > 1, micro_batch_size=1)
    assert memory_of(fits, Base.of(fits, CPU, "bf16")).step < plain.step
    everything = ways_to_fit(config, base, 0)
    assert [words.split()[0] for words in everything][:3] == [
        "--precision",
        "--gradient-checkpointing",
        "--micro-batch-size",
    ]


def test_a_large_base_is_told_of_before_the_first_step_and_nothing_else_changes(
    tiny_base, pictures, tmp_path, monkeypatch, capsys
):
    shared = {"data": (str(pictures),), "model": str(tiny_base), "steps": 1, "precision": "fp32"}
    shared["cache"] = str(tmp_path / "cache")
    train(TrainConfig(**shared, output=str(tmp_path / "small")))
    assert "memory " not in capsys.readouterr().out
    monkeypatch.setattr(setup, "SMALL", 0)
    monkeypatch.setattr("minilora.run.memory.free_memory", lambda: 1)
    train(TrainConfig(**shared, output=str(tmp_path / "large")))
    said = capsys.readouterr()
    assert "memory     about " in said.out
    assert "warning: this run may need more memory than is free; to need less: --precision bf16" in said.err
    assert (tmp_path / "small" / FILE_NAME).read_bytes() == (tmp_path / "large" / FILE_NAME).read_bytes()
