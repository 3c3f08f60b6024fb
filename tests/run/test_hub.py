"""run/hub.py: what arrives at a stand-in of the hub is what lies in the output folder, byte for byte."""

import base64
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, close_session, constants
from PIL import Image

from minilora.files.read import AVERAGE_NAME, FILE_NAME
from minilora.run.trained import BEST
from minilora.settings import command_line as commands
from minilora.settings.errors import UserError
from minilora.settings.train import TrainConfig

REPO = "someone/my-lora"
TOKEN = "hf_of_someone"


class Hub(ThreadingHTTPServer):
    """The part of the hub that an upload needs: its requests, and the files of its commits by their paths."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.role, self.refused = "write", None
        self.repos, self.files, self.objects = [], {}, {}


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def answer(self) -> None:
        hub: Hub = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))) if self.command != "GET" else b""
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while length := int(self.rfile.readline(), 16):
                body += self.rfile.read(length)
                self.rfile.readline()
            self.rfile.readline()
        path = self.path.split("?")[0]
        if self.command == "PUT":  # to the store of large files, which has addresses of its own and asks for no token
            hub.objects[path.removeprefix("/store/")] = body
            return self.send(200, {})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.send(401, {"error": "Invalid credentials in Authorization header"})
        if hub.refused and re.fullmatch(hub.refused, path):
            return self.send(403, {"error": "You don't have the rights to do this"})
        if path == f"/api/models/{REPO}" and not hub.repos:
            return self.send(404, {"error": "Repository not found"})
        exists = path == "/api/repos/create" and REPO in hub.repos
        self.send(409 if exists else 200, self.result(hub, path, body) | ({"error": "It exists"} if exists else {}))

    do_GET = do_POST = do_PUT = answer

    def result(self, hub: Hub, path: str, body: bytes) -> dict:
        if path == "/api/whoami-v2":
            return {"name": "someone", "auth": {"accessToken": {"role": hub.role}}}
        if path == "/api/repos/create":
            asked = json.loads(body)
            hub.repos.append(f"{asked['organization']}/{asked['name']}")
            return {"url": f"{hub.url}/{hub.repos[-1]}"}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if path == f"/api/models/{REPO}/preupload/main":
            modes = {True: "lfs", False: "regular"}
            names = [file["path"] for file in json.loads(body)["files"]]
            large = (".safetensors", ".png")
            return {
                "files": [{"path": n, "uploadMode": modes[n.endswith(large)], "shouldIgnore": False} for n in names]
            }
        if path == f"/{REPO}.git/info/lfs/objects/batch":
            objects = json.loads(body)["objects"]
            where = [{"upload": {"href": f"{hub.url}/store/{one['oid']}"}} for one in objects]
            return {"objects": [one | {"actions": actions} for one, actions in zip(objects, where, strict=True)]}
        if path == f"/api/models/{REPO}/commit/main":
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    stored = hub.objects[value["oid"]]
                    assert (hashlib.sha256(stored).hexdigest(), len(stored)) == (value["oid"], value["size"])
                    hub.files[value["path"]] = stored
            return {"commitUrl": f"{hub.url}/{REPO}/commit/{'0' * 40}", "commitOid": "0" * 40}
        raise AssertionError(f"the hub was asked for {self.command} {path}")

    def send(self, status: int, value: dict) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        if status >= 400:
            self.send_header("X-Error-Message", value["error"])
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def hub():
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def train(hub, pictures, tmp_path, tiny_base, monkeypatch, capsys):
    """Do what train.py does, with the hub's address and a token; return its exit code, and what it printed."""
    for name, value in {
        "ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": True,
        "HF_TOKEN_PATH": str(tmp_path / "none"),
    }.items():
        monkeypatch.setattr(constants, name, value)  # which are read from the environment only once
    monkeypatch.setattr("minilora.run.samples.before_after", lambda *_: Image.new("RGB", (8, 8)))  # slow
    monkeypatch.chdir(tmp_path)

    def train(*words: str, token: str | None = TOKEN) -> tuple[int, list[str], list[str]]:
        monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN", raising=False)
        settings = f"--data {pictures} --model {tiny_base} --steps 2 --batch-size 2 --rank 2 --cache {tmp_path / 'c'}"
        monkeypatch.setattr(sys, "argv", ["train.py", *settings.split(), "--push-to-hub", REPO, *words])
        code = 0
        try:
            commands.train()
        except SystemExit as stop:
            code = stop.code
        return code, *(text.splitlines() for text in capsys.readouterr())

    return train


def lying_in(folder: Path, *names: str) -> dict[str, bytes]:
    """Return files, and those of folders, by their paths."""
    paths = [path for name in names for path in (folder / name, *(folder / name).rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


RESULTS = (FILE_NAME, "README.md", "config.json", "samples/before_after.png")


def test_the_hub_has_the_results_byte_for_byte_and_nothing_else(hub, train, pictures, tmp_path):
    words = (
        f"--also kohya,peft --ema 0.9 --validation {pictures} --sample-prompt dog --sample-every 1 --output out/mine"
    )
    code, lines, _ = train(*words.split(), "--checkpoint-every=1")
    assert code == 0
    folder = tmp_path / "out" / "mine"
    assert hub.files == lying_in(folder, *RESULTS, AVERAGE_NAME, BEST, "mine.safetensors", "peft")
    assert list((folder / "checkpoints").iterdir())  # which, as TensorBoard's files, stay
    assert list((folder / "tensorboard").iterdir())
    assert set(hub.repos) == {REPO}
    assert lines[-2].split() == ["pushed", "to", f"{hub.url}/{REPO}"]
    card = ModelCard(hub.files["README.md"].decode())
    assert f"hf download {REPO} --local-dir out/my-lora\npython sample.py --prompt" in card.text
    assert "--lora out/my-lora --model" in card.text
    assert f"load_lora_weights('{REPO}', weight_name='{FILE_NAME}')" in card.text


@pytest.mark.parametrize("refused", ["/api/repos/create", f"/api/models/{REPO}/commit/main"])
def test_what_the_hub_refuses_is_one_line_and_can_be_tried_again(hub, train, tmp_path, refused):
    hub.refused = refused
    code, _, lines = train("--output", "out/mine")
    assert code == 2
    [line] = [line for line in lines if line.startswith("error: ")]
    assert "You don't have the rights to do this" in line
    assert "the results are in out/mine" in line
    assert hub.files == {}
    whole = lying_in(tmp_path / "out" / "mine", *RESULTS)
    hub.refused = None
    program, *words = shlex.split(line.split("to try again: ")[1])  # what it says to type
    here = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
    words = [Path(sys.executable).with_name(program), *words]
    again = subprocess.run(words, env=os.environ | here, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert hub.files == whole == lying_in(tmp_path / "out" / "mine", *RESULTS)


def test_who_is_not_known_or_may_not_write_is_told_before_the_first_step(hub, train, tmp_path):
    def refusal(token: str | None = TOKEN) -> str:
        code, printed, [line] = train(token=token)
        assert (code, printed) == (2, [])
        assert not (tmp_path / "out" / "pictures").exists()
        return line

    assert re.match(f"error: --push-to-hub {REPO}: Invalid user token", refusal("hf_of_nobody"))
    hub.role = "read"
    assert re.match(f"error: --push-to-hub {REPO}: the token may only read", refusal())
    hub.shutdown()
    hub.server_close()
    close_session()  # the connection that was open answers still
    assert "Connection refused" in refusal()


def test_the_name_of_a_repository_has_an_owner():
    with pytest.raises(UserError, match="--push-to-hub is 'my-lora'; it takes OWNER/NAME"):
        TrainConfig(data=("x",), push_to_hub="my-lora")
