"""training.py: a run is a function of (base, pictures, settings), however it is cut up."""

import dataclasses
import gc
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_picture
from diffusers import AutoencoderKL
from diffusers.optimization import get_scheduler
from helpers import ROOT, deltas, relative_difference, torchrun, weights
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch._dynamo.utils import counters
from transformers import CLIPTextModel

from minilora import training
from minilora.data.folder import Item
from minilora.files.fold import fold
from minilora.files.layout import Checkpoint
from minilora.files.network import load_lora
from minilora.files.read import AVERAGE_NAME, FILE_NAME, read_lora
from minilora.files.tensors import read_checked, write_checked
from minilora.files.write import difference
from minilora.lora import lora_layers, lora_parameters
from minilora.models.base import Base
from minilora.models.precision import DTYPES
from minilora.run.differences import picture_differences
from minilora.run.objective import Denoising
from minilora.run.ranks import BatchPlan
from minilora.run.samples import draw_prompts
from minilora.run.trained import BEST
from minilora.run.validation import FIGURES
from minilora.settings.errors import UserError
from minilora.settings.sample import SampleConfig
from minilora.settings.train import TrainConfig
from minilora.training import learning_rate_at, train

EIGHT_BITS = {"optimizer": "adamw8bit", "targets": ("conv1",), "rank": 16}  # fewer than 256 numbers stay in 32 bits
needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason='needs the extra "8bit"')


@pytest.fixture
def run(pictures, tmp_path, tiny_base):
    """Train on five small pictures with the tiny base; return the output folder."""

    def run(name: str, loss=None, objective=None, **settings) -> Path:
        if loss:  # in the place of the ordinary objective's
            objective = type("Denoising", (Denoising,), {"loss": staticmethod(loss)})()
        defaults = {"steps": 6, "batch_size": 4, "rank": 2, "learning_rate": 0.01, "model": str(tiny_base)}
        places = {"data": (str(pictures),), "output": str(tmp_path / name), "cache": str(tmp_path / "cache")}
        train(TrainConfig(**(places | defaults | settings)), objective)
        return tmp_path / name

    return run


def losses(folder: Path) -> list[float]:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [event.value for event in events.Scalars("loss")]


# ---------------------------------------------------------------------------------------- one run


def test_a_run_leaves_what_it_promises(run):
    folder = run("a")
    config = json.loads((folder / "config.json").read_text())
    assert config["rank"] == 2
    assert len(losses(folder)) == 6
    assert Image.open(folder / "samples" / "before_after.png").width > 4 * 128
    assert {path.name for path in folder.iterdir()} == {
        *(FILE_NAME, "README.md", "config.json", "samples", "tensorboard")
    }


def test_the_card_is_one_that_the_hub_reads(run, tiny_base):
    folder = run("a", rank=3)
    card = ModelCard.load(folder / "README.md")
    assert {"lora", "stable-diffusion"} <= set(card.data.tags)
    [shown] = card.data.widget
    assert (folder / shown["output"]["url"]).exists()
    assert "| rank | 3 |" in card.text
    assert "LoRA for" in card.text
    assert card.data.base_model is None  # a folder of ours is no base on the hub


def test_other_dialects_are_written_too_and_hold_the_same_lora(run, tmp_path, tiny_base):
    folder = run("a", also=("kohya", "peft"))
    modules = Checkpoint(tiny_base).modules
    ours, *others = (read_lora(folder / name, modules) for name in (FILE_NAME, "a.safetensors", "peft"))
    for other in others:
        assert difference(ours, other) <= 1  # in units of the last place


def test_the_same_settings_give_the_same_bytes_and_another_seed_does_not(run):
    one, two, three = run("a"), run("b"), run("c", seed=1)
    assert (one / FILE_NAME).read_bytes() == (two / FILE_NAME).read_bytes()
    assert relative_difference(one, three) > 0.1


def test_nothing_of_the_machine_enters_the_file(run, tmp_path):
    assert str(tmp_path).encode() not in (run("a") / FILE_NAME).read_bytes()


def test_training_lowers_the_loss(run):
    values = losses(run("a", steps=60, batch_size=10, learning_rate=0.02))
    assert sum(values[-20:]) < 0.97 * sum(values[:20])  # a random base of 16 × 16 pixels learns little, but learns


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_nearly_the_same(run, precision):
    # bf16 keeps 8 bits of each number and fp16 11; Adam turns the sign of a gradient into a step, so
    # where a gradient is nearly zero the two may part. Directions must agree all the same.
    one, two = deltas(run("a")), deltas(run("b", precision=precision))
    assert torch.cosine_similarity(one, two, dim=0) > 0.9


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_precision_and_checkpointing_are_what_is_asked_for(run, precision, checkpointing):
    def objective(unet, batch, schedule, config):
        wanted = DTYPES[precision]
        assert unet.conv_in.weight.dtype == wanted
        assert all(parameter.dtype == torch.float32 for parameter in lora_parameters(unet))
        assert torch.is_autocast_enabled("cpu") == (precision != "fp32")
        assert precision == "fp32" or torch.get_autocast_dtype("cpu") == wanted
        assert unet.is_gradient_checkpointing == checkpointing
        return Denoising().loss(unet, batch, schedule, config)

    run("a", objective, steps=1, precision=precision, gradient_checkpointing=checkpointing)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_changes_nothing_that_is_learnt(run, dropout):
    one, two = run("a", dropout=dropout), run("b", dropout=dropout, gradient_checkpointing=True)
    assert (one / FILE_NAME).read_bytes() == (two / FILE_NAME).read_bytes()


@pytest.mark.parametrize(
    ("recipe", "graphs"),
    [({"dropout": 0.3, "gradient_checkpointing": True}, 1), ({"train_text_encoder": True, "dream": 1.0}, 2)],
    ids=str,
)
def test_what_is_traced_for_compiling_learns_the_same_bytes(run, recipe, graphs):
    """All but the compiler: what changes from step to step, as the dropout, must not be frozen into the code."""
    plain = run("plain", **recipe)
    torch.compiler.reset()
    counters.clear()
    with torch.compiler.set_stance(force_backend="eager"):
        traced = run("traced", compile=True, **recipe)
    assert (plain / FILE_NAME).read_bytes() == (traced / FILE_NAME).read_bytes()
    assert counters["stats"]["unique_graphs"] == 1 + graphs  # one is that of the check before the run
    assert not counters["graph_break"]


@pytest.mark.slow
def test_a_compiled_run_learns_nearly_the_same_and_goes_on_with_the_same_bytes(run, smallest_base, capsys):
    torch.compiler.reset()
    settings = {"model": str(smallest_base), "learning_rate": 0.001, "checkpoint_every": 3}
    plain, compiled = run("plain", **settings), run("compiled", compile=True, **settings)
    assert re.search(r"compiled {3}in the first step, which took \d+ s", capsys.readouterr().out)
    # Only the order and rounding of float32 sums differ; Adam magnifies that where a gradient is nearly zero.
    assert 0 < relative_difference(plain, compiled) < 1e-4
    run("cut", compile=True, **settings | {"steps": 4})
    assert (run("cut", compile=True, resume=True, **settings) / FILE_NAME).read_bytes() == (
        compiled / FILE_NAME
    ).read_bytes()
    # How it is computed is no part of what a run is a function of: it may go on the other way.
    run("mixed", compile=True, **settings | {"steps": 4})
    assert relative_difference(plain, run("mixed", resume=True, **settings)) < 1e-4


@pytest.mark.slow
def test_two_compiled_processes_learn_nearly_what_one_does_that_is_not(run, smallest_base, pictures, tmp_path):
    words = f"--data {pictures} --model {smallest_base} --output {tmp_path / 'two'} --cache {tmp_path / 'cache2'}"
    words += " --steps 6 --batch-size 4 --micro-batch-size 2 --rank 2 --learning-rate 0.001 --compile"
    result = torchrun(2, *words.split())
    assert result.returncode == 0, result.stderr
    one = run("one", model=str(smallest_base), steps=6, batch_size=4, learning_rate=0.001)
    assert relative_difference(one, tmp_path / "two") < 1e-4  # float32 sums, as above


def test_without_a_compiler_compile_is_one_line(pictures, tiny_base, tmp_path):
    words = ["train.py", "--data", pictures, "--model", tiny_base, "--output", tmp_path / "out", "--compile"]
    lacking = {"CXX": str(tmp_path / "no-compiler"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, *map(str, words)]
    result = subprocess.run(command, cwd=ROOT, env=os.environ | lacking, capture_output=True, text=True)
    assert result.returncode == 2
    [error] = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert error.startswith("error: --compile: torch.compile does not work here (InvalidCxxCompiler: ")
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------- the same, cut up


@pytest.mark.parametrize("recipe", [{}, {"dropout": 0.3}, pytest.param(EIGHT_BITS, marks=needs_bitsandbytes)], ids=str)
def test_a_run_that_was_cut_in_two_gives_the_same_bytes(run, recipe):
    whole = run("whole", checkpoint_every=2, **recipe)
    run("cut", steps=5, checkpoint_every=2, **recipe)
    assert [path.name for path in (whole.parent / "cut" / "checkpoints").iterdir()] == ["step-00000004.safetensors"]
    cut = run("cut", resume=True, **recipe)
    assert (cut / FILE_NAME).read_bytes() == (whole / FILE_NAME).read_bytes()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_told_to_stop_saves_and_goes_on_as_if_nothing_had_been(run, number, capsys):
    class Tap:
        calls = 0

        def __call__(self, *args):
            self.calls += 1
            if self.calls == 3:
                os.kill(os.getpid(), number)
            return Denoising().loss(*args)

    whole, handler = run("whole"), signal.getsignal(number)
    with pytest.raises(training.Stopped) as stopped:
        run("stopped", Tap())
    assert stopped.value.code == 128 + number
    assert re.search(r"stopped after step 3, saved .*; continue with --resume\n$", capsys.readouterr().out)
    resumed = run("stopped", resume=True)
    assert (resumed / FILE_NAME).read_bytes() == (whole / FILE_NAME).read_bytes()
    assert signal.getsignal(number) is handler


def test_a_run_that_is_told_to_saves_and_draws_now_and_goes_on_as_if_nothing_had_been(run):
    class Tap:
        calls = 0

        def __call__(self, *args):
            self.calls += 1
            if self.calls == 3:
                os.kill(os.getpid(), signal.SIGUSR1)
            return Denoising().loss(*args)

    samples, handler = {"sample_prompt": ("a dog",), "sample_every": 100}, signal.getsignal(signal.SIGUSR1)
    whole, told = run("whole"), run("told", Tap(), checkpoints_kept=9, **samples)
    assert (told / "checkpoints" / "step-00000003.safetensors").exists()
    assert [path.name for path in (told / "samples").glob("step-*")] == ["step-00000003.png"]
    assert (told / FILE_NAME).read_bytes() == (whole / FILE_NAME).read_bytes()
    assert signal.getsignal(signal.SIGUSR1) is handler


def test_a_killed_run_gives_the_same_bytes(run, pictures, tmp_path, tiny_base):
    settings = {"steps": 40, "checkpoint_every": 5}
    whole = run("whole", **settings)
    words = (
        f"train.py --data {pictures} --model {tiny_base} --output {tmp_path / 'killed'} --cache {tmp_path / 'cache'}"
    )
    words += " --steps 40 --checkpoint-every 5 --batch-size 4 --rank 2 --learning-rate 0.01"
    process = subprocess.Popen([sys.executable, *words.split()], cwd=ROOT, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list((tmp_path / "killed").glob("checkpoints/step-*")):
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL  # it was running, and
    assert not (tmp_path / "killed" / FILE_NAME).exists()  # it was not done
    resumed = run("killed", resume=True, **settings)
    assert (resumed / FILE_NAME).read_bytes() == (whole / FILE_NAME).read_bytes()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_micro_batches_give_the_lora_of_the_whole_batch(run, dropout):
    # Only the order of float32 sums differs; Adam magnifies that where a gradient is nearly zero.
    settings = {"batch_size": 6, "dropout": dropout}
    whole, seen = run("whole", **settings), []

    def watch(unet, batch, *more):
        seen.append(len(batch.positions))
        return Denoising().loss(unet, batch, *more)

    for micro in (1, 2, 3):
        assert relative_difference(whole, run(f"micro{micro}", watch, micro_batch_size=micro, **settings)) < 1e-4
    assert seen == [*[1] * 36, *[2] * 18, *[3] * 12]


def test_two_processes_give_the_lora_of_one(run, pictures, tmp_path, tiny_base):
    words = f"--data {pictures} --model {tiny_base} --output {tmp_path / 'two'} --cache {tmp_path / 'cache2'}"
    words += " --steps 60 --batch-size 8 --micro-batch-size 2 --rank 2 --learning-rate 0.001"
    result = torchrun(2, *words.split())
    assert result.returncode == 0, result.stderr
    one = run("one", steps=60, batch_size=8, learning_rate=0.001)
    # The order of a float32 sum, magnified by Adam where a gradient is nearly zero, over 60 steps.
    assert relative_difference(one, tmp_path / "two") < 1e-4


def test_processes_that_would_not_train_the_same_are_refused(pictures, tmp_path, tiny_base):
    """Nothing of base, pictures and settings travels between processes, so they must have the same."""
    other = tmp_path / "other"
    shutil.copytree(pictures, other)
    make_picture(99).save(other / "0.png")
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    command += ["--master-addr", "localhost", "--master-port", str(free_port())]
    machines = []
    for node, data in enumerate((pictures, other)):
        words = ["--data", data, "--model", tiny_base, "--output", tmp_path / "out", "--cache", tmp_path / "cache"]
        words = [*command, "--node-rank", str(node), "train.py", *map(str, words), "--batch-size", "2"]
        machines.append(subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    said = [machine.communicate()[0] for machine in machines]
    assert all("processes 0 and 1 do not train the same; what differs: pictures" in one for one in said), said
    assert not (tmp_path / "out" / "config.json").exists()


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


@pytest.fixture
def mixed(pictures) -> Path:
    """The five pictures, two of them wide, one of them high."""
    for number, size in {0: (40, 12), 3: (44, 11), 4: (10, 40)}.items():
        make_picture(number, *size).save(pictures / f"{number}.png")
    return pictures


def test_with_buckets_processes_micro_batches_and_stops_only_share_out_the_same_batches(
    run, mixed, tmp_path, tiny_base, capsys
):
    settings = {"buckets": True, "batch_size": 4, "checkpoint_every": 4, "learning_rate": 0.001}
    whole = run("whole", **settings)
    assert "pictures   5 of" in (said := capsys.readouterr().out)
    assert "at 32 × 8 (2) and 16 × 16 (2) and 8 × 32 (1) pixels" in said
    run("cut", **settings | {"steps": 4})
    assert (run("cut", resume=True, **settings) / FILE_NAME).read_bytes() == (whole / FILE_NAME).read_bytes()
    # Only the order of float32 sums differs; Adam magnifies that where a gradient is nearly zero.
    assert relative_difference(whole, run("micro", micro_batch_size=2, **settings)) < 1e-4
    words = f"--data {mixed} --model {tiny_base} --output {tmp_path / 'two'} --cache {tmp_path / 'cache2'} --buckets"
    result = torchrun(
        2, *words.split(), *["--steps", "6", "--batch-size", "4", "--rank", "2", "--learning-rate", "0.001"]
    )
    assert result.returncode == 0, result.stderr
    assert relative_difference(whole, tmp_path / "two") < 1e-4


def test_a_mistake_under_torchrun_is_one_line_from_us(tmp_path):
    result = torchrun(1, "--data", str(tmp_path / "gone"))
    assert result.returncode != 0
    assert f"error: --data {tmp_path / 'gone'}: there is no such folder" in result.stderr
    assert "minilora/" not in result.stderr  # no traceback of ours


# ------------------------------------------------------------------------------------- resuming


def test_resume_without_a_checkpoint_starts_and_says_so(run, capsys):
    folder = run("a", resume=True)
    assert "found no checkpoint" in capsys.readouterr().out
    assert (folder / FILE_NAME).read_bytes() == (run("b") / FILE_NAME).read_bytes()


def test_resume_refuses_another_run_and_names_the_difference(run, pictures):
    run("a", steps=3, checkpoint_every=2)

    def refused(**settings) -> str:
        with pytest.raises(UserError) as error:
            run("a", resume=True, **settings)
        [path, words] = str(error.value).split(" belongs to another run: ")
        assert path.endswith("step-00000002.safetensors")
        assert not re.search("[0-9a-f]{16}", words)  # no hash
        return words

    pixels = (pictures / "0.png").read_bytes()
    assert refused(learning_rate=0.02, seed=1) == "--learning-rate was 0.01 and is 0.02; --seed was 0 and is 1"
    assert refused(lr_schedule="cosine") == "--lr-schedule was constant and is cosine; --steps was not given and is 6"
    assert refused(mirror=True, targets=("to_q", "to_k")) == (
        "--mirror was off and is on; --targets was attention and is to_q,to_k"
    )
    caption = f"{pictures}/0.png has another caption: it was 'picture 0' and is 'sks, picture 0'"
    assert refused(trigger="sks").startswith(f"--trigger was not given and is sks; {caption}; ")
    assert refused(trigger="sks").endswith("; and 2 more pictures")
    assert f"{pictures}/0.png came 1 × per epoch and comes 3 ×" in refused(data=(f"{pictures}:3",))
    (pictures / "0.png").write_bytes((pictures / "1.png").read_bytes())
    assert refused() == f"{pictures}/0.png has other content; its caption is 'picture 0'"
    (pictures / "0.png").write_bytes(pixels)
    with (pictures / "metadata.jsonl").open("a") as table:
        table.write('{"file_name": "9.png", "text": "a new one"}\n')
    (pictures / "9.png").write_bytes(pixels + b"more")
    assert refused() == f"{pictures}/9.png was not there"
    run("b", steps=3, checkpoint_every=2)
    (pictures / "9.png").unlink()
    lines = (pictures / "metadata.jsonl").read_text().splitlines()
    (pictures / "metadata.jsonl").write_text("\n".join(lines[:-1]))
    with pytest.raises(UserError, match="a picture with the caption 'a new one' is no longer there"):
        run("b", resume=True)


def test_resume_names_the_part_of_a_base_that_has_changed(run, tiny_base, tmp_path):
    shutil.copytree(tiny_base, tmp_path / "base")
    run("a", steps=2, checkpoint_every=2, model=str(tmp_path / "base"))
    unet = tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({key: tensor * 2 for key, tensor in load_file(unet).items()}, unet)
    with pytest.raises(UserError, match=r"the weights of the U-Net of --model .*base have changed$"):
        run("a", resume=True, model=str(tmp_path / "base"))
    shutil.copytree(tmp_path / "base", tmp_path / "other")
    with pytest.raises(UserError, match=r"another run: --model was .*base and is .*other$"):
        run("a", resume=True, model=str(tmp_path / "other"))
    run("b", steps=2, checkpoint_every=2)
    vae = tmp_path / "other" / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({key: tensor * 2 for key, tensor in load_file(vae).items()}, vae)
    with pytest.raises(UserError, match=r"another run: --vae was not given and is .*other$"):
        run("b", resume=True, vae=str(tmp_path / "other"))


def test_pictures_that_differ_are_named_by_what_differs():
    one, two, three = (Item(Path(f"{n}.png"), n, (8, 8), (f"caption {n}",)) for n in "123")
    there = [(item.digest, item.captions, item.mask_digest) for item in (one, two)]
    assert picture_differences(there, [two, one]) == ["the pictures have new names, which changes their order"]
    assert picture_differences(there, [one]) == ["a picture with the caption 'caption 2' is no longer there"]
    assert picture_differences(there, [one, two, three]) == ["3.png was not there"]
    assert picture_differences(there, [one, two, two]) == ["2.png came 1 × per epoch and comes 2 ×"]
    other = dataclasses.replace(two, captions=("a", "b"))
    assert picture_differences(there, [one, other]) == [
        "2.png has another caption: it was 'caption 2' and is 'a' | 'b'"
    ]
    assert picture_differences(there, [one, dataclasses.replace(two, digest="4")]) == [
        "2.png has other content; its caption is 'caption 2'"
    ]
    masked = [dataclasses.replace(two, mask=Path("2.mask.png"), mask_digest=digest) for digest in "ab"]
    assert picture_differences(there, [one, masked[0]]) == ["2.png has a mask now"]
    before = [there[0], (two.digest, two.captions, "a")]
    assert picture_differences(before, [one, masked[1]]) == ["2.png has another mask"]
    assert picture_differences(before, [one, two]) == ["2.png has no mask now"]


def test_resume_refuses_a_checkpoint_beyond_the_end_and_a_broken_one(run):
    folder = run("a", checkpoint_every=4)
    with pytest.raises(UserError, match="has 4 steps done, more than --steps 2"):
        run("a", steps=2, resume=True)
    for path in (folder / "checkpoints").iterdir():
        path.write_text("broken")
    with pytest.raises(UserError, match=r"step-00000004\.safetensors is not a readable checkpoint"):
        run("a", resume=True)


def test_resume_passes_over_a_broken_checkpoint_to_the_whole_one_before(run, capsys):
    folder = run("a", checkpoint_every=2, checkpoints_kept=2)
    whole = (folder / FILE_NAME).read_bytes()
    (folder / "checkpoints" / "step-00000006.safetensors").write_text("broken")
    run("a", resume=True)
    captured = capsys.readouterr()
    assert "step-00000006.safetensors is not a readable checkpoint" in captured.err
    assert "resume     after step 4" in captured.out
    assert (folder / FILE_NAME).read_bytes() == whole


def test_a_new_run_clears_a_finished_one_away_and_refuses_an_unfinished_one(run):
    folder = run("a", checkpoint_every=2, checkpoints_kept=3)
    run("a", steps=2, checkpoint_every=1)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000002.safetensors"]
    (folder / FILE_NAME).unlink()
    with pytest.raises(UserError, match=r"an unfinished run, step-00000002\.safetensors; continue it with --resume"):
        run("a")


def test_what_a_finished_run_left_stays_until_the_next_is_finished(run, monkeypatch):
    more = {"checkpoint_every": 2, "ema": 0.9, "validation": "0.4", "validate_every": 2}
    folder = run("a", **more)
    results = (FILE_NAME, AVERAGE_NAME, BEST, FIGURES, "checkpoints/step-00000006.safetensors")
    before = {name: (folder / name).read_bytes() for name in results}
    real = training.optimizer_step

    def stop(at: int):
        def step(run, step, learning_rate):
            if step == at:
                raise KeyboardInterrupt
            return real(run, step, learning_rate)

        monkeypatch.setattr(training, "optimizer_step", step)
        with pytest.raises(KeyboardInterrupt):
            run("a", **more, seed=1)
        monkeypatch.setattr(training, "optimizer_step", real)

    stop(1)  # before its first checkpoint: the finished run can even be gone on with
    assert all((folder / name).read_bytes() == content for name, content in before.items() if "check" not in name)
    run("a", **more, resume=True)
    assert all((folder / name).read_bytes() == content for name, content in before.items())
    stop(3)
    assert all((folder / name).read_bytes() == content for name, content in before.items() if "check" not in name)
    with pytest.raises(UserError, match=r"an unfinished run, step-00000002"):
        run("a", **more)
    assert (run("a", **more, seed=1, resume=True) / FILE_NAME).read_bytes() != before[FILE_NAME]
    run("a", checkpoint_every=2)
    assert not any(
        (folder / name).exists() for name in (AVERAGE_NAME, BEST, FIGURES, "unfinished", "checkpoints.before")
    )


def test_without_room_to_draw_the_lora_and_all_else_is_there(run, monkeypatch, capsys):
    whole = run("whole")

    def draw(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("minilora.run.samples.before_after", draw)
    folder = run("a")
    said = capsys.readouterr()
    assert "warning: no pictures were drawn (CUDA out of memory" in said.err
    assert said.out.strip().splitlines()[-1].startswith("next ")
    assert (folder / FILE_NAME).read_bytes() == (whole / FILE_NAME).read_bytes()
    assert "![samples]" not in (folder / "README.md").read_text()
    assert "![samples]" in (whole / "README.md").read_text()


def test_only_the_newest_checkpoints_stay(run):
    folder = run("a", steps=9, checkpoint_every=2, checkpoints_kept=2)
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["step-00000006.safetensors", "step-00000008.safetensors"]  # of 2, 4, 6 and 8


# ------------------------------------------------------------------------- every setting has its effect


CHANGES = [  # test_config.py names the tests of the other settings
    {"steps": 7},
    {"learning_rate": 0.02},
    {"seed": 1},
    {"alpha": 8.0},
    {"rank": 4},
    {"targets": ("to_q",)},
    {"noise_offset": 0.5},
    {"snr_gamma": 5.0},
    {"caption_dropout": 1.0},
    {"mirror": True},
    {"crop": "random"},
    {"lr_schedule": "cosine"},
    {"lr_schedule": "linear"},
    {"lr_schedule": "polynomial", "lr_power": 3.0},
    {"lr_schedule": "cosine_with_restarts", "lr_cycles": 2},
    {"weight_decay": 1.0},
    {"adam_betas": (0.5, 0.9)},
    {"adam_epsilon": 0.1},
    {"warmup_steps": 3},
    {"max_grad_norm": 1e-9},
    {"resolution": 24},
    {"batch_size": 2},
    {"caption_column": "title"},
    {"trigger": "sks"},
    {"buckets": True},
]


def test_each_setting_changes_what_is_learnt(run, pictures):
    rows = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()]
    (pictures / "metadata.jsonl").write_text("\n".join(json.dumps(row | {"title": "a cat"}) for row in rows))
    plain = weights(run("plain"))

    def same(other: dict[str, torch.Tensor]) -> bool:
        return plain.keys() == other.keys() and all(
            plain[k].shape == other[k].shape and torch.allclose(plain[k], other[k], rtol=1e-3) for k in plain
        )

    assert not [change for change in CHANGES if same(weights(run(str(change), **change)))]


def test_clipping_really_clips(run):
    # Adam's first step has the size of the learning rate however small the gradient is, until the
    # gradient is as small as its eps (1e-8): clipped to 1e-12, nothing moves.
    moved = {norm: deltas(run(f"clip{norm}", max_grad_norm=norm, steps=2)).norm() for norm in (1.0, 1e-12)}
    assert moved[1e-12] < 1e-3 * moved[1.0]


def test_the_logged_gradient_norm_is_the_one_before_clipping(run):
    events = EventAccumulator(str(run("a", max_grad_norm=1e-6) / "tensorboard"))
    events.Reload()
    assert all(event.value > 1e-5 for event in events.Scalars("grad_norm"))


def test_samples_during_training_disturb_nothing(run):
    plain, drawn = run("a"), run("b", sample_prompt=("red apple", "a dog"), sample_every=3)
    assert (plain / FILE_NAME).read_bytes() == (drawn / FILE_NAME).read_bytes()
    names = sorted(path.name for path in (drawn / "samples").iterdir())
    assert names == ["before_after.png", "step-00000003.png", "step-00000006.png"]


def test_the_loop_takes_its_objective_as_an_argument(run):
    def nothing_to_learn(unet, batch, schedule, config):
        return 0 * Denoising().loss(unet, batch, schedule, config)

    assert not deltas(run("a", nothing_to_learn)).any()  # B stays zero


class Remembering(Denoising):
    """An objective whose loss depends on how many steps were taken, which it counts itself."""

    def begin(self, unet, config):
        assert lora_parameters(unet)
        self.count = torch.zeros(())

    def loss(self, *args):
        return super().loss(*args) * (1 + self.count)

    def after_step(self):
        self.count += 1

    def state(self):
        return {"count": self.count}


def test_what_an_objective_keeps_from_step_to_step_outlives_a_stop(run):
    whole = run("whole", objective=Remembering())
    run("cut", objective=Remembering(), steps=4, checkpoint_every=4)
    cut = run("cut", objective=Remembering(), resume=True)
    assert (cut / FILE_NAME).read_bytes() == (whole / FILE_NAME).read_bytes()
    with pytest.raises(UserError, match="belongs to another run: the objective was Remembering and is Denoising"):
        run("cut", resume=True)


# --------------------------------------------------------------------------------------- refusals


def test_a_loss_that_is_not_finite_stops_with_step_and_pictures(run, tmp_path):
    def breaks(unet, batch, schedule, config):
        breaks.calls = getattr(breaks, "calls", 0) + 1
        return Denoising().loss(unet, batch, schedule, config) / (0.0 if breaks.calls == 3 else 1.0)

    with pytest.raises(UserError, match=r"step 3: loss inf.* its pictures: .*\.png"):
        run("a", breaks)
    assert not (tmp_path / "a" / FILE_NAME).exists()


def broken_gradient(unet, batch, schedule, config):
    """A loss that is finite and whose derivative is not: 0 · ∞."""
    loss = Denoising().loss(unet, batch, schedule, config)
    return loss + (0 * loss).clamp(min=0).sqrt()


def test_a_gradient_that_is_not_finite_stops_though_the_loss_is(run):
    with pytest.raises(UserError, match=r"step 1: loss [0-9.]+, norm of the gradient nan; its pictures: .*\.png"):
        run("a", broken_gradient)


def test_fp16_that_overflows_for_ever_stops(run):
    with pytest.raises(UserError, match=r"step 17: loss .*, norm of the gradient nan"):
        run("a", broken_gradient, steps=30, precision="fp16")  # after 16 halvings of the scale of 65,536


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 5, "micro_batch_size": 2}, "--batch-size is 5; it cannot be divided into micro-batches of 2"),
        ({"resolution": 18}, "--resolution is 18; this base needs a multiple of 8"),
        ({"rank": 500}, "rank 500 is not between 1 and the smaller"),
        ({"targets": ("to_v", "to_w")}, "target 'to_w' matches no module"),
    ],
)
def test_what_cannot_be_is_refused_with_the_numbers(run, change, message):
    with pytest.raises(UserError, match=message):
        run("a", **change)


# ----------------------------------------------------------------------------------- pure pieces


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("micro", [1, 2, None])
def test_ranks_and_micro_batches_partition_the_positions(world, micro):
    plans = [BatchPlan(24, micro, rank, world) for rank in range(world)]
    for step in (0, 7):
        positions = sorted(p for share in plans for part in share.positions(step) for p in part)
        assert positions == list(range(step * 24, step * 24 + 24))
        assert len({len(share.positions(step)) for share in plans}) == 1


def test_the_learning_rate_is_a_function_of_the_step():
    config = TrainConfig(data=("x",), steps=100, learning_rate=1.0, warmup_steps=10)
    rates = {kind: dataclasses.replace(config, lr_schedule=kind) for kind in ("constant", "linear", "cosine")}
    for schedule in rates.values():
        warm_up = [learning_rate_at(step, schedule) for step in range(11)]
        assert warm_up == sorted(warm_up)
        assert warm_up[0] > 0
        assert warm_up[10] == 1.0
    assert learning_rate_at(99, rates["constant"]) == 1.0
    assert learning_rate_at(55, rates["linear"]) == pytest.approx(0.5)
    assert learning_rate_at(55, rates["cosine"]) == pytest.approx(0.5)
    for kind in ("linear", "cosine"):
        assert learning_rate_at(100, rates[kind]) == pytest.approx(0)
        assert 0 < learning_rate_at(99, rates[kind]) < 0.02


@pytest.mark.parametrize(
    ("name", "more"),
    [("linear", {}), ("cosine", {}), ("polynomial", {"lr_power": 2.0}), ("cosine_with_restarts", {"lr_cycles": 3})],
)
def test_schedules_are_those_that_diffusers_calls_so(name, more):
    config = TrainConfig(data=("x",), steps=30, learning_rate=1.0, lr_schedule=name, **more)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    options = {"num_cycles": config.lr_cycles} if "restarts" in name else {"power": config.lr_power}
    theirs = get_scheduler(name, optimizer, num_warmup_steps=0, num_training_steps=30, **options)
    for step in range(30):
        # diffusers' polynomial ends at 1e-7 of the learning rate, and not at 0.
        assert learning_rate_at(step, config) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-6)
        optimizer.step()
        theirs.step()


def test_epochs_are_steps_in_which_each_picture_is_seen_so_often(run):
    by_epochs = run("a", steps=None, epochs=2)  # of 5 pictures, 4 a step
    assert json.loads((by_epochs / "config.json").read_text())["steps"] == 3
    assert (by_epochs / FILE_NAME).read_bytes() == (run("b", steps=3) / FILE_NAME).read_bytes()


def test_a_checkpoint_from_before_a_setting_existed_had_its_default(run):
    folder = run("a", steps=3, checkpoint_every=3)
    [path] = (folder / "checkpoints").glob("*.safetensors")
    arrays, metadata = read_checked(path)
    about = json.loads(metadata["minilora"])
    for name in ("weight_decay", "adam_betas", "full", "lr_power"):
        del about["fingerprint"][name]
    write_checked(path, arrays, {"minilora": json.dumps(about)})
    again = run("a", resume=True)
    assert (again / FILE_NAME).read_bytes() == (run("b") / FILE_NAME).read_bytes()
    write_checked(path, arrays, {"minilora": json.dumps(about)})
    with pytest.raises(UserError, match=r"--weight-decay was 0\.01 and is 0\.5"):
        run("a", resume=True, weight_decay=0.5)


# ------------------------------------------------------------------------------------------- recipes


def test_timesteps_are_drawn_from_their_range(run, pictures, tmp_path, tiny_base):
    seen = []

    def watch(unet, batch, schedule, config):
        seen.extend(batch.timesteps.tolist())
        return Denoising().loss(unet, batch, schedule, config)

    run("a", loss=watch, timestep_range=(300, 310))
    assert len(seen) == 24
    assert set(seen) <= set(range(300, 310))
    assert len(set(seen)) > 5
    with pytest.raises(UserError, match="--timestep-range is 0,1001; this base has the timesteps 0 to 999"):
        run("b", timestep_range=(0, 1001))
    for wrong in [(5,), (5, 5), (-1, 5), (1, 2, 3)]:
        with pytest.raises(UserError, match="it takes two numbers, the lowest and one above the highest"):
            run("c", timestep_range=wrong)


def test_each_layer_and_position_does_without_other_features(run):
    seen = {}

    def watch(unet, batch, schedule, config):
        for path, layer in lora_layers(unet).items():
            adapter = layer.adapters["default"]
            assert adapter.dropout_mask.shape == (len(batch.positions), adapter.lora_A.shape[1])
            for position, keep in zip(batch.positions, adapter.dropout_mask, strict=True):
                seen[path, position] = tuple(keep.tolist())
        return Denoising().loss(unet, batch, schedule, config)

    run("a", watch, dropout=0.3, steps=2)
    wide = [keep for keep in seen.values() if len(keep) == 32]  # any two of these agree by chance 0.58 ** 32
    assert len(wide) > 8
    assert len({*wide}) == len(wide)


@pytest.mark.parametrize(
    "setting", [{"huber_c": 0.1}, {"dream": 1.0}, {"snr_gamma": 5.0}, {"noise_offset": 0.1}, {"dropout": 0.3}]
)
def test_each_recipe_changes_what_is_learnt(run, setting):
    assert relative_difference(run("plain"), run("other", **setting)) > 0.01


def test_the_average_follows_the_lora(run):
    """One step of rate 1 / 10 after another, up to the decay: written out over the LoRAs after 0, 1, … steps."""
    folder = run("average", ema=0.5, steps=12)
    loras = [weights(run(f"after {steps}", steps=steps)) for steps in range(1, 13)]
    average = {key: torch.zeros_like(tensor) for key, tensor in loras[0].items() if "lora_B" in key}
    for step, lora in enumerate(loras):
        decay = min(0.5, (1 + step) / (10 + step))
        average = {key: decay * tensor + (1 - decay) * lora[key] for key, tensor in average.items()}
    found = load_file(folder / AVERAGE_NAME)
    for key, tensor in average.items():
        torch.testing.assert_close(found[key], tensor)
    assert (folder / FILE_NAME).read_bytes() == (run("after 12", steps=12) / FILE_NAME).read_bytes()


def test_the_average_goes_on_after_a_stop(run):
    whole = run("whole", ema=0.9)
    run("stopped", ema=0.9, steps=3, checkpoint_every=3)
    resumed = run("stopped", ema=0.9, resume=True, checkpoint_every=3)
    for name in (FILE_NAME, AVERAGE_NAME):
        assert (resumed / name).read_bytes() == (whole / name).read_bytes()


def test_pictures_are_drawn_with_the_average(run, tiny_base):
    drawing = {"ema": 0.9, "sample_prompt": ("a dog",), "sample_every": 6, "learning_rate": 0.1}
    plain, average = run("plain", **drawing), run("average", sample_average=True, **drawing)
    assert (plain / FILE_NAME).read_bytes() == (average / FILE_NAME).read_bytes()
    for folder, name in ((plain, FILE_NAME), (average, AVERAGE_NAME)):
        base = Base(str(tiny_base), torch.device("cpu"))
        load_lora(base.unet, folder / name)
        expected = draw_prompts(base, ("a dog",), 16, SampleConfig(prompt=("a dog",), model=str(tiny_base)))
        found = np.array(Image.open(folder / "samples" / "step-00000006.png"))
        assert np.array_equal(found, np.array(expected))
    for name in ("step-00000006.png", "before_after.png"):
        one, other = (np.array(Image.open(folder / "samples" / name)) for folder in (plain, average))
        assert not np.array_equal(one, other), name
    with pytest.raises(UserError, match="--sample-average needs --ema, which"):
        run("b", sample_average=True)


@needs_bitsandbytes
def test_eight_bits_of_state_learn_nearly_the_same(run):
    folder, plain = run("a", checkpoint_every=6, **EIGHT_BITS), run("b", **EIGHT_BITS | {"optimizer": "adamw"})
    kept = load_file(folder / "checkpoints" / "step-00000006.safetensors")
    assert any(tensor.dtype == torch.uint8 for tensor in kept.values())
    assert relative_difference(plain, folder) > 1e-4
    assert torch.cosine_similarity(deltas(plain), deltas(folder), dim=0) > 0.9  # 8 bits: a few per cent of each step


def test_without_the_package_the_eight_bit_optimizer_says_what_to_install(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not there
    with pytest.raises(UserError, match=r"adamw8bit needs the package bitsandbytes; run: pip install -e '\.\[8bit\]'"):
        run("a", optimizer="adamw8bit")


def test_zero_terminal_snr_trains_and_draws_with_the_changed_schedule(family_base, pictures, tmp_path):
    places = {"data": (str(pictures),), "output": str(tmp_path / "run"), "cache": str(tmp_path / "cache")}
    settings = {"model": str(family_base("sd2")), "steps": 2, "checkpoint_every": 2}
    changed = train(TrainConfig(zero_terminal_snr=True, **settings, **places)).parent
    plain = train(TrainConfig(**settings, **places | {"output": str(tmp_path / "plain")})).parent
    assert relative_difference(plain, changed) > 1e-3
    drawn = [np.array(Image.open(folder / "samples" / "before_after.png")) for folder in (plain, changed)]
    assert not np.array_equal(*drawn)
    with pytest.raises(UserError, match="predicts epsilon"):
        train(TrainConfig(model=str(family_base("sd1")), steps=2, zero_terminal_snr=True, **places))


def test_ranks_and_sets_from_the_settings(run):
    folder = run("a", targets=("attention+ff",), rank_for=("attn2=1", "ff.net.2=3"), checkpoint_every=6)
    # (The file pads all layers with rows of zeros to the largest rank.)
    ranks = {key: int(tensor.any(1).sum()) for key, tensor in weights(folder).items() if "lora_A" in key}
    assert {rank for key, rank in ranks.items() if ".attn2." in key} == {1}
    assert {rank for key, rank in ranks.items() if ".ff.net.2." in key} == {3}
    assert {rank for key, rank in ranks.items() if ".attn1." in key or ".ff.net.0." in key} == {2}
    again = run("a", targets=("attention+ff",), rank_for=("attn2=1", "ff.net.2=3"), steps=8, resume=True)
    assert weights(again).keys() == weights(folder).keys()
    with pytest.raises(UserError, match="--rank-for attn2: it takes a part of a name and a rank, such as attn2=16"):
        run("b", rank_for=("attn2",))


def test_a_block_from_the_settings(run, monkeypatch):
    folder = run("a", targets=("up_blocks.1:attention", "mid_block:attention+ff"))
    there = {".".join(key.split(".")[1:3]) for key in weights(folder)}
    assert {name.split(".")[0] for name in there} == {"mid_block", "up_blocks"}
    assert not [key for key in weights(folder) if ".ff." in key and ".mid_block." not in key]
    assert all(tensor.any() for tensor in weights(folder).values())  # all of it has learnt
    for _ in range(2):  # also of a large base, whose memory is told of first
        with pytest.raises(UserError, match="target 'style' is a block that only Stable Diffusion XL"):
            run("b", targets=("style",))
        monkeypatch.setattr("minilora.run.setup.SMALL", 0)


def test_alphas_from_the_settings(run, capsys):
    # A's gradient is 0 while B is, and Adam takes a step of the learning rate whatever the scale: ΔW has the scale.
    plain, other = (
        weights(run("plain", steps=1)),
        weights(run("other", steps=1, alpha_for=("attn2=8", "mid_block=0.5"))),
    )
    assert "alpha 0.5 to 8," in capsys.readouterr().out
    for key, tensor in plain.items():
        if "lora_B" in key:
            factor = 0.25 if ".mid_block." in key else 4.0 if ".attn2." in key else 1.0
            # Adam's eps takes a little off where the gradient is small; the scale stands in the file's B.
            torch.testing.assert_close(other[key], factor * tensor, rtol=0.02, atol=1e-3 * factor)
    for wrong in ("attn2", "attn2=0", "attn2=-1", "attn2=x", "=1"):
        with pytest.raises(UserError, match=f"--alpha-for {wrong}: it takes a part of a name and an alpha above 0"):
            run("b", alpha_for=(wrong,))


def test_training_on_top_of_loras_is_training_on_the_base_they_are_merged_into(run, tiny_base, tmp_path, capsys):
    first, second = run("first", train_text_encoder=True, checkpoint_every=6), run("second", seed=1)
    strengths = {first: 0.5, second: -1.0}
    fold(tiny_base, [*strengths.items()], tmp_path / "merged")
    settings = {"learning_rate": 0.001, "checkpoint_every": 6}
    capsys.readouterr()
    one = run("one", base_lora=tuple(f"{path}:{s:g}" for path, s in strengths.items()), **settings)
    suggested = f"--prompt 'picture 0' --lora {one} --lora {first}:0.5 --lora {second}:-1 --model {tiny_base}"
    assert suggested in capsys.readouterr().out
    assert suggested in (card := (one / "README.md").read_text())
    assert f"{tiny_base}, with `{first}:0.5` and `{second}:-1` in it" in card
    other = run("other", model=str(tmp_path / "merged"), **settings)
    # Their sums may be rounded the other way; Adam magnifies that where a gradient is nearly zero.
    assert relative_difference(one, other) < 1e-4
    assert relative_difference(one, run("plain", **settings)) > 0.01
    ours, theirs = (np.array(Image.open(run / "samples" / "before_after.png"), int) for run in (one, other))
    assert abs(ours - theirs).max() <= 1  # "base" is the base with what is in it, too

    with pytest.raises(UserError, match=r"belongs to another run: --base-lora was .*:0.5.* and is .*:0.25"):
        run("one", resume=True, base_lora=(f"{first}:0.25", f"{second}:-1"), **settings)
    stray = {f"unet.nowhere.lora_{matrix}.weight": torch.zeros(2, 2) for matrix in "AB"}
    save_file(weights(first) | stray, tmp_path / "stray.safetensors")
    with pytest.raises(UserError, match=r"stray\.safetensors was not made for this base: .* for unet\.nowhere\.lora_A"):
        run("b", base_lora=(str(tmp_path / "stray.safetensors"),))


def test_what_encodes_has_left_memory_when_the_first_step_is_taken(run, monkeypatch):
    def encoders() -> int:
        gc.collect()
        return sum(isinstance(thing, (AutoencoderKL, CLIPTextModel)) for thing in gc.get_objects())

    seen, step, before = [], training.optimizer_step, encoders()
    monkeypatch.setattr(training, "optimizer_step", lambda *args: seen.append(encoders()) or step(*args))
    run("a", steps=1, validation="0.3")
    assert seen == [before]


def test_a_lora_is_trained_on(run):
    first = run("first", steps=6, targets=("to_q", "ff.net.2"), rank_for=("ff=3",), alpha=1.0)
    untouched = run("untouched", steps=1, rank=8, learning_rate=1e-12, init_from=str(first))
    assert relative_difference(first, untouched) < 1e-5  # of its own layers and ranks, with the scale in B
    on = run("on", steps=6, rank=8, init_from=str(first))
    assert weights(on).keys() == weights(first).keys()
    assert relative_difference(first, on) > 0.01
    run("stopped", steps=3, rank=8, init_from=str(first), checkpoint_every=3)
    resumed = run("stopped", steps=6, rank=8, init_from=str(first / FILE_NAME), resume=True)
    assert (resumed / FILE_NAME).read_bytes() == (on / FILE_NAME).read_bytes()
    run("other", steps=3, rank=8, init_from=str(first), checkpoint_every=3)
    with pytest.raises(UserError, match=r"belongs to another run: --init-from was .*first.* and is .*on"):
        run("other", rank=8, init_from=str(on), resume=True)
    with pytest.raises(UserError, match=r"--rank has no effect with --init-from.*; --alpha-for has no effect"):
        run("b", init_from=str(first), alpha_for=("attn2=1",))
    with pytest.raises(UserError, match=r"LoRA .*gone"):
        run("c", rank=8, init_from="gone")
    with pytest.raises(UserError, match="it changes nothing in the text encoders, which --train-text-encoder would"):
        run("d", rank=8, init_from=str(first), train_text_encoder=True)
    for key, said in (  # whatever is wrong, the message is about that
        ("bundle_emb.sks.clip_l", "brings learnt words .* leaves them out$"),
        ("text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight", r"needs --train-text-encoder\)$"),
    ):
        save_file(weights(first) | {key: torch.ones(2, 16)}, first.parent / "more.safetensors")
        with pytest.raises(UserError, match=said):
            run("e", rank=8, init_from=str(first.parent / "more.safetensors"))
