"""run/validation.py: the same figures however a run is cut up, and the LoRA of the lowest."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import make_picture
from helpers import torchrun
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from minilora.data.folder import read_folders
from minilora.data.held_out import keep_apart
from minilora.data.sheet import write_captions
from minilora.files.read import FILE_NAME
from minilora.run.trained import BEST
from minilora.run.validation import FIGURES
from minilora.settings.errors import UserError
from minilora.settings.train import TrainConfig
from minilora.training import train


@pytest.fixture
def held_out(tmp_path) -> Path:
    """Three pictures, one of them wide."""
    folder = tmp_path / "held_out"
    folder.mkdir()
    for number, size in enumerate([(24, 20), (20, 20), (44, 11)]):
        make_picture(50 + number, *size).save(folder / f"v{number}.png")
        (folder / f"v{number}.txt").write_text("a dog")
    return folder


@pytest.fixture
def settings(pictures, held_out, tmp_path, tiny_base) -> dict:
    recipe = {"steps": 8, "batch_size": 4, "rank": 2, "learning_rate": 0.03, "model": str(tiny_base), "buckets": True}
    places = {"data": (str(pictures),), "validation": str(held_out), "cache": str(tmp_path / "cache")}
    return recipe | places | {"validate_every": 2, "checkpoint_every": 4}


@pytest.fixture
def run(settings, tmp_path, monkeypatch):
    monkeypatch.setattr("minilora.run.samples.before_after", lambda *_: Image.new("RGB", (8, 8)))  # slow

    def run(name: str, **changes) -> Path:
        train(TrainConfig(**(settings | {"output": str(tmp_path / name)} | changes)))
        return tmp_path / name

    return run


def figures(folder: Path) -> dict:
    return json.loads((folder / FIGURES).read_text())


def test_figures_are_logged_printed_and_kept_and_disturb_nothing(run, capsys):
    folder = run("a", validate_every=3)
    losses = figures(folder)["losses"]
    assert list(losses) == ["0", "3", "6", "8"]
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    logged = {str(event.step): event.value for event in events.Scalars("validation")}
    assert logged == pytest.approx(losses)
    best = min(losses, key=losses.get)
    line = f"{losses['0']:.4f} at step 0 → {losses[best]:.4f} lowest at step {best} → {losses['8']:.4f} at step 8"
    assert f"validation {line}" in capsys.readouterr().out
    plain = run("plain", validation=None, validate_every=None)
    assert (plain / FILE_NAME).read_bytes() == (folder / FILE_NAME).read_bytes()
    assert not (plain / FIGURES).exists()


def test_the_lora_of_the_lowest_is_kept(run):
    folder = run("a", learning_rate=0.1, steps=10)  # so fast that the loss falls and rises
    about = figures(folder)
    assert about["losses"][str(about["best"])] == min(about["losses"].values())
    assert 0 < about["best"] < 10
    shorter = run("b", learning_rate=0.1, steps=about["best"])  # whose LoRA is that of this step
    assert (folder / BEST).read_bytes() == (shorter / FILE_NAME).read_bytes()


def test_a_run_cut_in_two_has_the_figures_of_the_whole(run):
    whole = run("whole")
    run("cut", steps=4)
    cut = run("cut", resume=True)
    for name in (FIGURES, BEST, FILE_NAME):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()


def test_patience_ends_the_run_and_leaves_the_best_however_it_is_cut_up(run, settings, tmp_path, capsys):
    fast = {"learning_rate": 0.1, "steps": 40, "patience": 3}  # so fast that the loss falls and rises
    whole = run("whole", **fast)
    about = figures(whole)
    last = max(map(int, about["losses"]))
    assert last == about["best"] + 3 * 2 < 40
    assert (whole / FILE_NAME).read_bytes() == (whole / BEST).read_bytes()
    told = f"patience   the loss has not fallen for 3 measurements; the result is that of step {about['best']}\n"
    assert told in capsys.readouterr().out
    shorter = run("shorter", **fast | {"steps": about["best"], "patience": None})
    assert (whole / FILE_NAME).read_bytes() == (shorter / FILE_NAME).read_bytes()

    def same(folder: Path) -> bool:
        return all((folder / name).read_bytes() == (whole / name).read_bytes() for name in (FIGURES, BEST, FILE_NAME))

    assert same(run("whole", resume=True, **fast))  # a run that has ended so ends there again
    # Stopped before and after the best, with nothing left but its checkpoints.
    for step in (about["best"] - 2, last - 2, last):
        cut = run(f"cut{step}", checkpoint_every=2, **fast | {"steps": step, "patience": None})
        for path in cut.iterdir():
            if path.is_file():
                path.unlink()
        assert same(run(f"cut{step}", checkpoint_every=2, resume=True, **fast))
    longer = run("whole", resume=True, **fast | {"steps": last + 4, "patience": 9})
    assert max(map(int, figures(longer)["losses"])) == last + 4
    assert (longer / FILE_NAME).read_bytes() == (longer / BEST).read_bytes()


def test_patience_is_that_of_all_processes_and_needs_measurements(run, settings, tmp_path):
    fast = {"learning_rate": 0.1, "steps": 20, "patience": 2, "output": str(tmp_path / "two")}
    file = tmp_path / "config.json"
    file.write_text(TrainConfig(**settings | fast).to_json())
    done = torchrun(2, "--config", str(file))
    assert done.returncode == 0, done.stderr
    losses = figures(tmp_path / "two")["losses"]
    assert len(losses) == list(losses.values()).index(min(losses.values())) + 1 + 2 < 11
    assert (tmp_path / "two" / FILE_NAME).read_bytes() == (tmp_path / "two" / BEST).read_bytes()
    with pytest.raises(UserError, match="--patience needs --validate-every, how often the loss is measured"):
        run("a", patience=3, validate_every=None)


def test_going_on_with_other_pictures_measures_anew_and_a_new_run_clears_the_old_away(run, held_out):
    folder = run("a", steps=4)
    (held_out / "v0.png").unlink()
    run("a", resume=True)
    assert list(figures(folder)["losses"]) == ["4", "6", "8"]
    run("a", validation=None, validate_every=None)
    assert not (folder / FIGURES).exists()
    assert not (folder / BEST).exists()


def test_micro_batches_and_processes_measure_the_same(run, settings, tmp_path):
    # Dropout acts in training only, so that the figures do not depend on what was dropped last.
    whole = figures(run("whole", learning_rate=0.001, dropout=0.2))["losses"]
    micro = figures(run("micro", learning_rate=0.001, dropout=0.2, micro_batch_size=1))["losses"]
    assert micro == pytest.approx(whole, rel=1e-5)  # the order of float32 sums
    words = f"--data {settings['data'][0]} --model {settings['model']} --validation {settings['validation']} --buckets"
    words += f" --output {tmp_path / 'two'} --cache {tmp_path / 'cache2'} --validate-every 2 --steps 8 --batch-size 4"
    result = torchrun(2, *words.split(), "--rank=2", "--learning-rate=0.001", "--dropout=0.2")
    assert result.returncode == 0, result.stderr
    assert figures(tmp_path / "two")["losses"] == pytest.approx(whole, rel=1e-5)


def test_a_share_of_the_pictures_is_kept_from_training(run, settings, tmp_path, capsys):
    """The same as if these pictures lay in a folder of their own."""
    whole, parts = Path(settings["data"][0]), {"train": tmp_path / "train", "kept": tmp_path / "kept"}
    items = read_folders(TrainConfig(data=(str(whole),)))
    trained, kept = keep_apart(items, 0.4, seed=0)
    assert len(kept) == 2
    assert sorted([*trained, *kept], key=items.index) == items
    assert keep_apart([*reversed(items), *items], 0.4, seed=0)[1] == kept  # neither order nor weight matters
    assert len({tuple(keep_apart(items, 0.4, seed)[1]) for seed in range(10)}) > 3
    for folder, some in zip(parts.values(), (trained, kept), strict=True):
        folder.mkdir()
        names = [f"{number}.png" for number in range(len(some))]
        for name, item in zip(names, some, strict=True):
            shutil.copy(item.path, folder / name)
        write_captions(folder, names, [item.captions for item in some])
    one = run("one", validation="0.4")
    said = capsys.readouterr().out
    assert "pictures   3 of" in said
    assert "validation 2 held-out pictures of them" in said
    other = run("other", data=(str(parts["train"]),), validation=str(parts["kept"]))
    for name in (FIGURES, FILE_NAME):
        assert (one / name).read_bytes() == (other / name).read_bytes()
    with pytest.raises(UserError, match=r"--validation was 0\.4 and is 0\.2; .*/pictures/\d\.png was not there$"):
        run("one", validation="0.2", resume=True)


def test_what_a_share_can_be(run, settings, tmp_path, monkeypatch):
    for wrong in ("0", "1.0", "-0.1", "2", "nan"):
        with pytest.raises(UserError, match=f"--validation {wrong}: there is no such folder, and a share is between"):
            run("a", validation=wrong)
    with pytest.raises(UserError, match=r"--validation 0\.5: of 1 different pictures that leaves none to train on"):
        run("a", validation="0.5", data=(f"{settings['data'][0]}/0.png",), caption="a dog")
    assert len(keep_apart(read_folders(TrainConfig(data=settings["data"])), 0.01, 0)[1]) == 1  # at least
    monkeypatch.chdir(tmp_path)
    Path("held_out").rename("0.1")  # a folder of that name is a folder
    assert TrainConfig(data=("a",), validation="0.1").validation_share is None


def test_the_noise_is_the_same_whatever_the_seed(run):
    one, two = (figures(run(f"seed{seed}", seed=seed))["losses"] for seed in (0, 1))
    assert one["0"] == two["0"]  # the LoRA changes nothing yet
    assert one["8"] != two["8"]


def test_what_is_wrong_with_the_folder_is_said_by_its_option(run, held_out, pictures, capsys):
    with pytest.raises(UserError, match="--validation nowhere: there is no such folder"):
        run("a", validation="nowhere")
    with pytest.raises(UserError, match="--validate-every needs --validation, the held-out pictures"):
        run("a", validation=None)
    (held_out / "v0.png").write_bytes((pictures / "0.png").read_bytes())
    run("a", steps=1)
    assert "warning: 1 pictures of --validation" in capsys.readouterr().err
