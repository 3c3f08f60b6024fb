"""A stand-in of the Hugging Face hub: a server on this machine, and the fixture `hub` for tests that ask it."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import close_session, constants

COMMIT = "0" * 39 + "1"


class Answer(BaseHTTPRequestHandler):
    """Answer for the repositories in `server.repos`, each a dictionary of files by their paths.

    Those of another revision than main are under "OWNER/NAME@REVISION".  A data set is under "datasets/OWNER/NAME".
    """

    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        path, self.commit = self.path.split("?")[0].removeprefix("/api/models"), COMMIT
        path = path.replace("/api/datasets/", "/datasets/")
        if found := re.fullmatch(r"/((?:datasets/)?\w+/\w+)/(resolve|tree|revision)/(\w+)(?:/(.+))?", path):
            repo, what, revision, file = found.groups()
        elif found := re.fullmatch(r"/((?:datasets/)?\w+/\w+)", path):
            repo, what, revision, file = found[1], "revision", "main", None
        else:  # as for what the client asks about itself
            return self.send(None)
        files = self.of(repo, revision)
        if what == "resolve":
            self.send((files or {}).get(file), missing="EntryNotFound" if files else "RepoNotFound")
        elif what == "tree":
            self.send(files and inside(files, file, "recursive=true" in self.path.lower()))
        else:
            named = [{"rfilename": name} for name in files or ()]
            self.send(files and {"id": repo.removeprefix("datasets/"), "sha": self.commit, "siblings": named})

    def of(self, repo: str, revision: str) -> dict[str, bytes] | None:
        """Return the files of a revision, given by its name or by its commit, which is noted."""
        for name, files in self.server.repos.items():
            owner, _, other = name.partition("@")
            commit = f"{int.from_bytes(other.encode()):040x}" if other else COMMIT
            if owner == repo and revision in (other or "main", commit):
                self.commit = commit
                return files
        return None

    do_HEAD = do_GET

    def send(self, content: bytes | list | dict | None, missing: str = "RepoNotFound") -> None:
        told = {"error": "Not found"} if content is None else content
        body = told if isinstance(told, bytes) else json.dumps(told).encode()
        part = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        body = body[int(part[1]) : int(part[2]) + 1] if part else body
        self.send_response(404 if content is None else 206 if part else 200)
        for name, value in {
            "ETag": f'"{hash(body)}"',
            "X-Repo-Commit": self.commit,
            "Content-Length": len(body),
        }.items():
            self.send_header(name, str(value))
        if content is None:
            self.send_header("X-Error-Code", missing)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def inside(files: dict[str, bytes], folder: str | None, deep: bool) -> list[dict]:
    """Return what the hub tells of the files in a folder, and of those in its sub-folders or of these themselves."""
    below = {path: path.removeprefix(f"{folder}/") for path in files if not folder or path.startswith(f"{folder}/")}
    told = {}
    for path, name in below.items():
        if deep or "/" not in name:
            told[path] = {"type": "file", "path": path, "size": len(files[path]), "oid": "0"}
        else:
            path = path.removesuffix(name) + name.split("/")[0]
            told[path] = {"type": "directory", "path": path, "size": 0, "oid": "0"}
    return [*told.values()]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    server.repos = {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    cache = str(tmp_path / "cache")
    for name, value in {"ENDPOINT": address, "HF_HUB_CACHE": cache, "HF_HUB_DISABLE_XET": True}.items():
        monkeypatch.setattr(constants, name, value)  # which are read from the environment only once
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    close_session()
    yield server
    server.shutdown()
    server.server_close()
    close_session()


def files_of(folder) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
