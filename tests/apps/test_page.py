"""The page: who may see it, what its forms say, and all of it in a real browser."""

import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from conftest import make_picture
from helpers import ROOT, write_a_lora
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

gr = pytest.importorskip("gradio")

from starlette.testclient import TestClient  # noqa: E402
from starlette.websockets import WebSocketDisconnect  # noqa: E402

from minilora.apps.page import runs  # noqa: E402
from minilora.apps.page.curve import drawing, means  # noqa: E402
from minilora.apps.page.draw import Easel, with_strengths  # noqa: E402
from minilora.apps.page.form import Folders, form, shows_mistakes, words_of  # noqa: E402
from minilora.apps.page.merge import Merging  # noqa: E402
from minilora.apps.page.pictures import caption_rows  # noqa: E402
from minilora.apps.page.server import build, guarded  # noqa: E402
from minilora.merge import merge  # noqa: E402
from minilora.sampling import sample  # noqa: E402
from minilora.settings.command_line import kind_of, read  # noqa: E402
from minilora.settings.errors import UserError  # noqa: E402
from minilora.settings.merge import MergeConfig  # noqa: E402
from minilora.settings.page import PageConfig  # noqa: E402
from minilora.settings.sample import SampleConfig  # noqa: E402
from minilora.settings.setting import option  # noqa: E402
from minilora.settings.train import TrainConfig  # noqa: E402
from minilora.training import train  # noqa: E402

TOKEN = "a-token"
PATHS = ["/", "/config", "/gradio_api/info", "/gradio_api/file=/etc/passwd", "/static/img/logo.svg", "/no/such/path"]


# --------------------------------------------------------------------------------------- who may see it


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    return guarded(build(PageConfig(folders=(str(folder),), output=str(folder / "out"))), TOKEN)


def visitor(app, host="localhost:7860", **cookies):
    return TestClient(app, base_url=f"http://{host}", follow_redirects=False, cookies=cookies)


def test_the_address_with_the_token_opens_the_page_once_and_for_all(app):
    client = visitor(app)
    answer = client.get(f"/?token={TOKEN}")
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    [cookie] = answer.headers.get_list("set-cookie")
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    page = client.get("/")
    assert page.status_code == 200
    assert "minilora" in page.text
    assert client.get("/config").json()["title"] == "minilora"


@pytest.mark.parametrize("path", PATHS)
def test_without_the_token_nothing_is_answered(app, path):
    for client in (visitor(app), visitor(app, **{"minilora-7860": "another", "minilora-80": "another"})):
        for answer in (client.get(path), client.post(path, json={}), client.get(f"{path}?token={TOKEN}x")):
            assert answer.status_code == 401
            assert "token" in answer.text


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:7860", "localhost.evil.example", "127.0.0.1.nip.io", "0"]
)
def test_a_foreign_name_is_refused_with_the_token_too(app, host):
    for path in ("/", f"/?token={TOKEN}"):
        answer = visitor(app).get(path, headers={"host": host})
        assert answer.status_code == 403
        assert "set-cookie" not in answer.headers


def test_another_pages_requests_are_refused_and_the_browser_is_told_to_load_nothing_from_elsewhere(app):
    client = visitor(app)
    client.get(f"/?token={TOKEN}")
    call = {"url": "/gradio_api/queue/join", "json": {"data": [], "fn_index": 0, "session_hash": "a"}}
    assert client.post(**call, headers={"origin": "http://localhost:9999"}).status_code == 403
    assert client.post(**call, headers={"origin": "null"}).status_code == 403
    assert client.post(**call, headers={"origin": "http://localhost:7860"}).status_code != 403
    policy = client.get("/").headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "http" not in policy


def test_the_pages_own_html_names_no_address_that_is_fetched_elsewhere(app):
    client = visitor(app)
    client.get(f"/?token={TOKEN}")
    html = client.get("/").text
    assert not re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=.?https?://[^>]+>", html)
    assert "fonts.googleapis.com" not in html
    assert '"analytics_enabled":false' in html.replace(" ", "").lower()


def test_web_sockets_are_closed(app):
    client = visitor(app)
    client.get(f"/?token={TOKEN}")
    with pytest.raises(WebSocketDisconnect), client.websocket_connect("/"):
        pass


def test_files_of_the_machine_are_not_served(app, tmp_path):
    client = visitor(app)
    client.get(f"/?token={TOKEN}")
    (tmp_path / "secret.txt").write_text("secret")
    for path in ("/etc/passwd", tmp_path / "secret.txt", ROOT / "README.md"):
        assert client.get(f"/gradio_api/file={path}").status_code in (403, 404)


# ------------------------------------------------------------------------------------------- its forms


@pytest.mark.parametrize("settings", [TrainConfig, SampleConfig, MergeConfig])
def test_a_form_has_a_field_for_each_setting_with_its_sentence_of_help(settings):
    bare = [field.name for field in dataclasses.fields(settings) if field.metadata["bare"]]
    with gr.Blocks(analytics_enabled=False):
        fields = form(settings, without=bare)
    assert fields.keys() | {*bare} == {field.name for field in dataclasses.fields(settings)}
    for field in dataclasses.fields(settings):
        assert field.name in bare or fields[field.name].info == field.metadata["help"]
    for name, field in fields.items():  # nothing that is left as it is, is a word of the command line
        assert words_of(settings, {name: field.value}) == []


@pytest.mark.parametrize(
    "given",
    [
        {
            "data": "a\nb:2",
            "mirror": True,
            "rank": " 4 ",
            "learning_rate": "1e-3",
            "targets": "to_q, to_k",
            "ema": ".9",
        },
        {"data": "-a", "caption": "--help", "also": ["kohya", "peft"], "optimizer": "adamw", "output": "None"},
        {"data": "a", "rank": "16", "alpha": "8", "precision": "auto", "lr_schedule": "cosine"},
        {"data": "a", "sample_prompt": "x, y\nz", "sample_every": "5", "timestep_range": "0,500", "resume": True},
    ],
)
def test_what_a_form_says_is_what_the_command_line_says(given):
    config = read(TrainConfig, words_of(TrainConfig, given), "")
    for name, value in given.items():
        kept = getattr(config, name)
        typed = value if isinstance(value, (bool, list)) else [p.strip() for p in re.split("[\n,]", value)]
        if name == "sample_prompt":
            typed = ["x, y", "z"]
        told = list(kept) if isinstance(kept, tuple) else kept if isinstance(kept, bool) else [kept]
        if isinstance(kept, bool):
            assert told == typed
        else:
            assert [type(part)(text) for part, text in zip(told, typed, strict=True)] == told
    assert config == read(TrainConfig, shlex.split(shlex.join(words_of(TrainConfig, given))), "")


def test_a_mistake_is_shown_as_the_commands_line_and_another_error_is_not_hidden():
    @shows_mistakes
    def work(error):
        raise error

    with pytest.raises(gr.Error) as shown:
        work(UserError("--prompt: <lora:a:1> is not read"))
    assert shown.value.message == "--prompt: &lt;lora:a:1&gt; is not read"
    with pytest.raises(gr.Error, match="not enough memory"):
        work(MemoryError("no more"))
    with pytest.raises(ZeroDivisionError):
        work(ZeroDivisionError())


# ------------------------------------------------------------------------------------------- its folders


@pytest.fixture
def folders(tmp_path, monkeypatch):
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "way_out").symlink_to("/etc")
    monkeypatch.chdir(inside)
    return Folders.of((".", "out"))


# Settings that hold a text and no path; of each other setting with a text, it is shown that it leads nowhere else.
NO_PATHS = {"caption", "caption_column", "trigger", "class_prompt", "sample_prompt", "prompt", "negative"}
NO_PATHS |= {"image_column", "data_revision", "revision", "variant"}
NO_PATHS |= {"targets", "lora_blocks", "rank_for", "alpha_for", "text_encoder_targets", "push_to_hub", "wandb"}
PLACES = [
    (settings, field.name)
    for settings in (TrainConfig, SampleConfig, MergeConfig)
    for field in dataclasses.fields(settings)
    if kind_of(settings, field.name)[0] is str and not field.metadata["choices"] and field.name not in NO_PATHS
]


@pytest.mark.parametrize(("settings", "name"), PLACES)
@pytest.mark.parametrize("place", ["/etc/x", "../x", "way_out/x", "~/x", "/etc/x:0.5"])
def test_no_setting_leads_out_of_the_folders(folders, settings, name, place):
    field = next(field for field in dataclasses.fields(settings) if field.name == name)
    if ":" in place and "[" not in field.metadata["metavar"]:
        pytest.skip("it takes no number")
    words = [place, "a"] if field.metadata["bare"] else [option(name), place]
    for other, value in (("data", "a"), ("prompt", "a"), ("files", ("a", "b")), ("output", "o.png")):
        if other != name and hasattr(settings, other):
            words += [*value] if other == "files" else [option(other), value]
    words += {"class_data": ["--class-prompt", "a"], "image": ["--mask", "a"], "mask": ["--image", "a"]}.get(name, [])
    words += ["--loras-only", "--dialect", "kohya"] if name == "base" else []
    with pytest.raises(UserError, match="outside the folders"):
        folders.read(settings, words)


def test_what_is_inside_and_names_on_the_hub_are_let_through(folders):
    config = folders.read(TrainConfig, ["--data", "a/b:2", "--model", "owner/name", "--validation", "0.1"])
    assert (config.data, config.model, config.validation_share) == (("a/b:2",), "owner/name", 0.1)
    folders.read(SampleConfig, ["--prompt", "a", "--lora", "owner/name/file.safetensors:0.5", "--lora", "out/x"])
    for name in ("way_out/passwd", "owner/../../etc", "owner/x/../../../../etc/y.safetensors"):
        with pytest.raises(UserError, match="outside the folders"):
            folders.read(SampleConfig, ["--prompt", "a", "--lora", name])


def test_a_name_on_the_hub_is_let_through_wherever_the_page_was_started(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # which is none of the folders
    names = {"data": "owner/pictures", "model": "owner/name"}
    assert folders.known(names) == names | {"data": ("owner/pictures",)}
    with pytest.raises(UserError, match="outside the folders"):
        folders.known({"data": "pictures"})


def test_what_there_is_to_choose_from_is_found(folders, pictures, tiny_base):
    here = Path.cwd()
    shutil.copytree(pictures, here / "photos" / "dog")
    shutil.copytree(tiny_base, here / "models" / "tiny")
    write_a_lora(here / "out" / "a" / "pytorch_lora_weights.safetensors")
    write_a_lora(here / "models" / "b.safetensors")
    shutil.copytree(tiny_base, here / "out" / "all" / "base")  # as --full leaves one
    (here / "out" / "all" / "config.json").write_text("{}")
    (here / "out" / "a" / "samples").mkdir()
    shutil.copy(pictures / "0.png", here / "out" / "a" / "samples")
    assert folders.found() == {
        "pictures": ["photos/dog"],
        "bases": [("the bundled miniature", ""), "models/tiny", "out/all/base"],
        "loras": ["models/b.safetensors", "out/a"],
    }


def test_captions_are_shown_one_in_a_row(pictures):
    (pictures / "metadata.jsonl").write_text('{"file_name": "2.png", "text": ["a dog", "a red apple"]}\n')
    rows = [["0.png", ""], ["1.png", ""], ["2.png", "a dog"], ["2.png", "a red apple"], ["3.png", ""], ["4.png", ""]]
    assert caption_rows(str(pictures)) == rows


def handlers(folder) -> dict:
    """Return the functions behind the buttons and fields of a page, by their names."""
    page = build(PageConfig(folders=(str(folder),), output=str(folder / "out")))
    return {about.fn.__name__: about.fn for about in page.fns.values() if about.fn}


def test_captions_are_written_as_they_were_edited_and_a_wrong_folder_is_told(pictures):
    (pictures / "metadata.jsonl").write_text('{"file_name": "2.png", "text": ["a dog", "a red apple"], "id": 7}\n')
    write = handlers(pictures)["write"]
    rows = [["0.png", "zero"], ["1.png", ""], ["2.png", "a dog"], ["2.png", "an apple"], ["", "added below"]]
    write(str(pictures), rows)
    assert [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()] == [
        {"file_name": "2.png", "text": ["a dog", "an apple"], "id": 7},
        {"file_name": "0.png", "text": "zero"},
    ]
    for folder, said in (("/etc", "outside the folders"), (str(pictures / "none"), "there is no such folder")):
        with pytest.raises(gr.Error) as shown:
            write(folder, rows)
        assert said in shown.value.message


def test_pictures_without_captions_are_shown_too_and_the_missing_captions_counted(pictures, monkeypatch):
    monkeypatch.setenv("HOME", str(pictures.parent))
    (pictures / "metadata.jsonl").unlink()
    look = handlers(pictures)["look"]
    counts, pages, table, _ = look(f"~/{pictures.name}")
    hint, *lines = counts["value"].splitlines()
    assert hint.startswith("5 captions are missing: write them below")
    assert lines[0].startswith("pictures   5 of ")
    assert len(pages["value"]) == 1
    assert table["value"] == [[f"{number}.png", ""] for number in range(5)]
    for number in range(5):
        (pictures / f"{number}.txt").write_text(f"picture {number}")
    counts = look(f"~/{pictures.name}")[0]
    assert "missing" not in counts["value"]


def test_merging_writes_what_the_command_writes_and_leaves_nothing_when_it_is_cancelled(tiny_base, tmp_path):
    write_a_lora(tmp_path / "a" / "pytorch_lora_weights.safetensors")
    merging, told = Merging(), []
    words = [str(tiny_base), f"{tmp_path / 'a'}:0.5", "--output", str(tmp_path / "by_page")]
    report = merging.run(words, read(MergeConfig, words, ""), lambda share, desc: told.append(share))
    assert report.endswith(f"wrote {tmp_path / 'by_page'}")
    assert all(0 <= share < 1 for share in told)
    merge(read(MergeConfig, [*words[:-1], str(tmp_path / "by_command")], ""))
    files = [path.relative_to(tmp_path / "by_page") for path in (tmp_path / "by_page").rglob("*") if path.is_file()]
    assert files
    for file in files:
        assert (tmp_path / "by_page" / file).read_bytes() == (tmp_path / "by_command" / file).read_bytes()
    with pytest.raises(UserError, match="by_page: it already exists"):
        merging.run(words, read(MergeConfig, words, ""), lambda share, desc: None)
    words[-1] = str(tmp_path / "cancelled")
    with pytest.raises(UserError, match="cancelled"):
        merging.run(words, read(MergeConfig, words, ""), lambda share, desc: merging.cancel())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "by_command", "by_page"]


def test_a_merge_without_a_lora_says_what_to_choose(tmp_path):
    page = build(PageConfig(folders=(str(tmp_path),), output=str(tmp_path / "out")))
    [merging] = [about for about in page.fns.values() if about.fn and about.fn.__name__ == "merge"]
    with pytest.raises(gr.Error, match="no LoRA is chosen"):
        merging.fn({field: [] if field.label == "LoRAs" else field.value for field in merging.inputs})


# ------------------------------------------------------------------------------------------------ runs


def test_of_a_run_is_seen_what_it_has_written(tmp_path):
    def write(first, last, loss):
        with SummaryWriter(str(tmp_path / "tensorboard"), purge_step=first) as writer:
            for step in range(first, last + 1):
                writer.add_scalar("loss", loss, step)
                writer.add_scalar("grad_norm", 9, step)
            writer.add_scalar("validation", loss / 2, last)

    assert str(runs.look(tmp_path)) == "not started from the page"
    (tmp_path / "page.json").write_text('{"pid": 1, "born": "never", "log": "train-1.log"}')
    assert str(runs.look(tmp_path)) == "ended before its first step"
    (tmp_path / "page.json").unlink()
    (tmp_path / "config.json").write_text('{"steps": 500}')
    assert runs.look(tmp_path).step == 0
    write(1, 300, 1.0)
    seen = runs.look(tmp_path)
    assert (seen.step, seen.steps, seen.loss, seen.validation) == (
        300,
        500,
        dict.fromkeys(range(1, 301), 1.0),
        {300: 0.5},
    )
    write(201, 400, 3.0)  # it went on from the checkpoint of step 200
    seen = runs.look(tmp_path)
    assert (seen.step, seen.loss[200], seen.loss[201], seen.validation) == (400, 1.0, 3.0, {400: 1.5})
    (tmp_path / "samples").mkdir()
    for name in ("step-00000200.png", "step-00000100.png", "before_after.png"):
        make_picture(0).save(tmp_path / "samples" / name)
    assert [path.name for path in runs.look(tmp_path).sheets] == ["step-00000100.png", "step-00000200.png"]
    points = means(seen.loss)
    assert len(points) == 200
    assert np.mean([loss for _, loss in points]) == 2.0  # two steps a point, half of them with each loss
    lines = re.findall(
        r'<polyline id="(\w+)" points="([^"]*)"', drawing({"training": seen.loss, "validation": {}}, 500)
    )
    assert [(name, len(points.split())) for name, points in lines] == [("training", 200)]
    assert drawing({"training": {}, "validation": {}}, 500) == ""
    assert "nan" not in drawing({"training": {1: 0.5, 2: float("nan"), 3: 0.5}}, 3)


def test_a_progress_bar_in_a_log_is_shown_as_it_is_now(tmp_path):
    log = tmp_path / "train-1.log"
    log.write_bytes("base\n\n  0%|  | 0/9\r 50%|█ | 4/9\r\rsaved\n".encode() + b"\xff\n")
    assert runs.tail(log) == "base\nsaved\n\ufffd"
    assert runs.tail(log, 1) == "\ufffd"
    assert runs.tail(tmp_path / "none") == ""


def test_only_a_run_of_the_page_gets_signals(tmp_path):
    with pytest.raises(UserError, match="no run that was started from the page"):
        runs.tell(tmp_path, signal.SIGTERM)
    (tmp_path / runs.RECORD).write_text(
        json.dumps({"pid": os.getpid(), "born": "0"})
    )  # a number that another one has now
    with pytest.raises(UserError, match="no run that was started from the page"):
        runs.tell(tmp_path, signal.SIGTERM)


# --------------------------------------------------------------------------------------------- drawing


def test_the_command_line_that_is_shown_draws_the_same_pixels(tiny_base, tmp_path):
    """Also of a picture that is drawn with a base that is there, at other strengths than before."""
    for name in "ab":
        write_a_lora(tmp_path / name / "pytorch_lora_weights.safetensors")
    easel = Easel()
    given = {
        "prompt": "it's red",
        "steps": "2",
        "seed": "3",
        "model": str(tiny_base),
        "output": str(tmp_path / "o.png"),
    }
    pictures = []
    for strengths in ([1, 0.25], [0.5, -1], [1, 0.25]):
        loras = with_strengths([str(tmp_path / name) for name in "ab"], strengths)
        line = shlex.join(["python", "sample.py", *words_of(SampleConfig, given | {"lora": loras})])
        config = read(SampleConfig, shlex.split(line)[2:], "")
        pictures.append(np.array(easel.draw(config)))
        sample(config)
        assert np.array_equal(np.array(Image.open(config.output)), pictures[-1])
    assert np.array_equal(pictures[0], pictures[2])
    assert not np.array_equal(pictures[0], pictures[1])


def test_a_lora_that_was_trained_again_is_loaded_again_and_a_drawing_can_be_cancelled(tiny_base, tmp_path):
    file = tmp_path / "pytorch_lora_weights.safetensors"
    write_a_lora(file)
    easel, told = Easel(), []
    config = SampleConfig(prompt=("a",), steps=2, model=str(tiny_base), lora=(str(tmp_path),))
    first = np.array(easel.draw(config, lambda done, unit: told.append(done)))
    assert told == [(1, 2), (2, 2)]
    with pytest.raises(UserError, match="cancelled"):
        easel.draw(config, lambda done, unit: easel.cancel())
    assert np.array_equal(np.array(easel.draw(config)), first)  # nothing of the cancelled one is left
    file.unlink()
    with pytest.raises(UserError, match=str(tmp_path)):
        easel.draw(config)


# ------------------------------------------------------------------------------------ in a real browser


def test_train_stop_go_on_and_draw_in_a_browser(tmp_path, monkeypatch):
    pytest.importorskip("selenium")
    from browser import LACKING, Browser, page, wait

    if LACKING:
        pytest.skip(f"there is no {' and no '.join(LACKING)}; on Debian: apt-get install chromium chromium-driver")
    shutil.copytree(ROOT / "dataset" / "mountain", tmp_path / "dataset" / "mountain")
    monkeypatch.chdir(tmp_path)
    small = {"steps": "80", "batch_size": "1", "resolution": "32", "sample_every": "2"}
    with page(tmp_path) as address, Browser(address) as browser:
        port = int(re.search(r":(\d+)", address)[1])
        listening = [line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines() if " 0A " in line]
        assert [place for place in listening if place.endswith(f":{port:04X}")] == [f"0100007F:{port:04X}"]

        # A wrong folder shows its line.
        browser.choose("pictures-folder", "/etc")
        assert "outside the folders" in wait(lambda: browser.text(".toast-body"))
        browser.open(address)

        # The curve grows, and the samples come.
        browser.tab("Train")
        for name, value in small.items():
            browser.type(f"train-{name}", value)
        browser.click("start")
        wait(lambda: re.search(r"step \d+ of 80", browser.text("#headline")))
        first = wait(lambda: browser.one("#sheet img").get_attribute("src"))
        # Another window finds the run, and cannot start a second one in its folder.
        browser.open(address)
        browser.tab("Train")
        wait(lambda: re.search(r"step \d+ of 80", browser.text("#headline")))
        wait(lambda: browser.one("#sheet img").get_attribute("src") != first)
        points = [len(browser.one("#curve #training").get_attribute("points").split())]
        wait(lambda: len(browser.one("#curve #training").get_attribute("points").split()) > points[0])
        browser.click("start")
        wait(lambda: "another run writes there" in browser.text("#headline"))

        # Stopped, and gone on with, it gives the bytes of a run that was not stopped.
        browser.click("stop")
        stopped = wait(lambda: re.search(r"stopped after step (\d+)", browser.text("#headline")))
        assert 0 < int(stopped[1]) < 80
        browser.click("go-on")
        wait(lambda: browser.text("#headline").startswith("finished"))
        lora = tmp_path / "out" / "mountain" / "pytorch_lora_weights.safetensors"
        settings = ["--steps", "80", "--batch-size", "1", "--resolution", "32", "--output", "alone"]
        train(read(TrainConfig, ["--data", "dataset/mountain", *settings], ""))
        assert lora.read_bytes() == (tmp_path / "alone" / lora.name).read_bytes()

        # A slider draws anew, and the line that is shown draws the same.
        browser.open(address)
        browser.tab("Draw")
        browser.choose("draw-loras", "out/mountain")
        browser.type("sample-steps", "2")
        browser.click("draw")
        before = wait(lambda: browser.one("#picture img").get_attribute("src"))
        browser.slide("draw-strength-0", 0.3)
        wait(lambda: browser.one("#picture img").get_attribute("src") != before)
        line = wait(lambda: re.search(".*mountain:0.3.*", browser.text("#draw-line textarea")))[0]
        browser.click("save")
        saved = tmp_path / read(SampleConfig, shlex.split(line)[2:], "").output
        shown = np.array(Image.open(wait(lambda: saved.exists() and saved)))
        assert json.loads(Image.open(saved).text["minilora"])["lora"] == ["out/mountain:0.3"]
        saved.unlink()
        assert shlex.split(line)[:2] == ["python", "sample.py"]
        sample(read(SampleConfig, shlex.split(line)[2:], ""))
        assert np.array_equal(np.array(Image.open(saved)), shown)
