"""The page: its tabs, and who may see it.

It listens on this machine only.  Other users of the machine can reach the port, too, so each request needs a random
token: the first in its address, the others in a cookie.  A site on the internet can point its own name to this machine
(DNS rebinding), so a request must name this machine and come from the page itself.  The browser is told to load nothing
from elsewhere.
"""

import os
import re
import secrets
import socket
import tempfile
from pathlib import Path

import gradio as gr
import uvicorn
from fastapi import FastAPI
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response

from ...settings.errors import UserError
from ...settings.page import PageConfig
from .draw import DrawTab, Easel
from .form import Folders
from .merge import MergeTab
from .pictures import PicturesTab
from .train import TrainTab, found_runs

HERE = r"(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"
HEADERS = {
    "Content-Security-Policy": "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}
CSS = """
footer {display: none !important}
main {width: 100%; max-width: 1400px !important; margin: auto}
#picture img {width: 100%; height: 100%; object-fit: contain}
#counts textarea, #log textarea {font-family: var(--font-mono)}
.bar {height: 8px; border-radius: 4px; overflow: hidden; background: var(--neutral-200)}
.bar div {height: 100%; background: var(--primary-500)}
#curve text {font-size: 12px; fill: currentColor}
#curve .grid {stroke: var(--neutral-300)}
"""


class Guard:
    """Let only those requests through that have the token and come from this page."""

    def __init__(self, app, token: str):
        self.app, self.token = app, token

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":  # a web socket, which the page does not use
            return await send({"type": "websocket.close", "code": 1008})
        request = Request(scope)
        answer = self.answer(request)
        if answer:
            return await answer(scope, receive, send)

        async def send_with_headers(message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        return await self.app(scope, receive, send_with_headers)

    def answer(self, request: Request) -> Response | None:
        """Return the answer to a refused request; None if it may pass."""
        hosts, cookie = request.headers.getlist("host"), f"minilora-{(request.scope.get('server') or ('', 0))[1]}"
        if len(hosts) != 1 or not re.fullmatch(HERE, hosts[0]):
            return PlainTextResponse("This page is for this machine only.", 403)
        origin = request.headers.get("origin")
        if origin is not None and origin.partition("://")[2] != hosts[0]:
            return PlainTextResponse("This request comes from another page.", 403)
        if self.is_token(request.query_params.get("token", "")):
            answer = RedirectResponse("/", 303)
            answer.set_cookie(cookie, self.token, httponly=True, samesite="strict")
            return answer
        if not self.is_token(request.cookies.get(cookie, "")):
            return PlainTextResponse("Open the address that minilora-page printed; it ends with a token.", 401)
        return None

    def is_token(self, text: str) -> bool:
        return secrets.compare_digest(text.encode(), self.token.encode())


def build(config: PageConfig) -> gr.Blocks:
    """Return the page, with choices from its folders."""
    if missing := [name for name in config.folders if not Path(name).expanduser().is_dir()]:
        raise UserError(f"{', '.join(missing)}: there is no such folder")
    folders = Folders.of((*config.folders, config.output))

    def find() -> dict[str, list[str]]:
        return folders.found() | {"runs": found_runs(config.output)}

    found, easel = find(), Easel()
    some = next((path for path in found["pictures"] if path.endswith("mountain")), next(iter(found["pictures"]), ""))
    first = {"data": some, "model": config.model or "", "output": config.output}
    with gr.Blocks(title="minilora", analytics_enabled=False, fill_width=True) as page:
        with gr.Tabs():
            tabs = {}
            with gr.Tab("Pictures") as tab:
                tabs[tab] = PicturesTab(folders, found, first).choices
            with gr.Tab("Train") as tab:
                tabs[tab] = TrainTab(folders, found, first, easel.free).choices
            with gr.Tab("Draw") as tab:
                tabs[tab] = DrawTab(folders, found, first, easel).choices
            with gr.Tab("Merge") as tab:
                tabs[tab] = MergeTab(folders, found, first).choices
        fields = [(kind, field) for choices in tabs.values() for kind, field in choices.items()]

        def refresh():
            """Update the choices of the fields."""
            now = find()
            return [gr.update(choices=now[kind]) for kind, _ in fields]

        def open_run():
            return next(iter(found_runs(config.output)), "")

        for when in (page.load, *(tab.select for tab in tabs)):
            when(refresh, outputs=[field for _, field in fields], show_progress="hidden")
        page.load(open_run, outputs=[field for kind, field in fields if kind == "runs"], show_progress="hidden")
    return page


def guarded(page: gr.Blocks, token: str) -> Guard:
    """Return the page as an application for a web server, behind its guard."""
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    theme = gr.themes.Default(primary_hue="teal", **fonts).set(block_info_text_color="*neutral_500")
    quiet = {"footer_links": [], "run_history": False, "ssr_mode": False, "mcp_server": False, "pwa": False}
    app = gr.mount_gradio_app(FastAPI(openapi_url=None), page, "", theme=theme, css=CSS, show_error=False, **quiet)
    return Guard(app, token)


def serve(config: PageConfig) -> None:
    """Serve the page and print its address, until Ctrl-C, which ends no run."""
    try:
        listening = socket.create_server(("127.0.0.1", config.port))
    except OSError as error:
        raise UserError(f"--port {config.port}: it cannot be used ({error.strerror}); give another") from error
    token, port = secrets.token_urlsafe(), listening.getsockname()[1]
    with listening, tempfile.TemporaryDirectory(prefix="minilora-page-") as scratch:
        os.environ["GRADIO_TEMP_DIR"] = scratch  # pictures on their way to the browser; other users cannot read it
        app = guarded(build(config), token)
        print(f"page       http://127.0.0.1:{port}/?token={token}", flush=True)
        print("to end it  Ctrl-C here; runs continue, and the page finds them again", flush=True)
        options = {"log_level": "warning", "timeout_graceful_shutdown": 1, "lifespan": "on"}
        uvicorn.Server(uvicorn.Config(app, **options)).run(sockets=[listening])
