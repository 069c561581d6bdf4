"""The page of `frd web`: Gradio's components, behind a guard that admits the page's own requests alone."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import socket
import traceback
from pathlib import Path
from typing import Annotated, Any

import fastapi
import gradio as gr
import uvicorn
from fastapi.responses import FileResponse, PlainTextResponse
from starlette.background import BackgroundTask
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from frd_model.data.files import ImageError
from frd_model.output import one_line, printable
from frd_model.predict import PredictionError
from frd_model.report import MEANING
from frd_model.web import LimitError, Result, Service

# Photos that may wait; the next one is told that the queue is full.
WAITING = 40
# Seconds after which Gradio's copies of uploads and of the page's images are deleted.
COPIES_AGE = 3600
# A form around a file, and any other request.
FORM_BYTES = 1 << 16
# Below it no upload is taken, so that the page cannot fill the disk.
FREE_BYTES = 1 << 30
LOCAL = ("127.0.0.1", "localhost", "::1")

_ROUTES = re.compile(
    r"(GET|HEAD) /(config|theme\.css|favicon\.ico|manifest\.json|(assets|static|svelte)/.*|result/[\w-]+\.zip|"
    r"gradio_api/(startup-events|queue/data|upload_progress|heartbeat/\w+|file=(?!(?i:https?):).*))?"
    r"|POST /gradio_api/(upload|queue/join|cancel|reset)",
    re.DOTALL,
)
_HEADERS = {
    "content-security-policy": "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
_STYLE = (
    ".facts h2{margin:0} .facts .wrong{color:#b00020} .facts ul{margin:.5rem 0 .5rem 1.2rem;list-style:disc}"
)


class Guard:
    """ASGI middleware: other routes than the page's, large bodies and other sites' requests are refused.

    Gradio has many more routes, and fetches files from addresses that requests name.
    """

    def __init__(self, app: ASGIApp, folder: Path, file_bytes: int) -> None:
        self.app, self.folder, self.file_bytes = app, folder, file_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refused = self._refused(scope["method"], scope["path"], Headers(scope=scope))
        if refused is None and scope["path"].endswith("/join"):
            body = await Request(scope, receive).body()
            receive = _replay(body, receive)
            if not _names_uploads_alone(body, self.folder):
                refused = 403, "Only uploaded files are taken."
        if refused is not None:
            await PlainTextResponse(refused[1], refused[0])(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        await self.app(scope, receive, send_with_headers)

    def _refused(self, method: str, path: str, headers: Headers) -> tuple[int, str] | None:
        """Status and reason where a request is not admitted."""
        if not _ROUTES.fullmatch(f"{method} {path}"):
            return 404, "Not found."
        if method != "POST":
            return None
        if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            return 403, "Requests of other sites are refused."
        upload = path.endswith("/upload")
        length = headers.get("content-length", "")
        if not length.isdecimal():
            return 411, "The length of a request must be stated."
        if int(length) > FORM_BYTES + (self.file_bytes if upload else 0):
            return 413, f"A photo may have at most {self.file_bytes / 1e6:g} MB."
        if upload and shutil.disk_usage(self.folder).free < FREE_BYTES:
            return 507, "The disk of the machine that runs this page is nearly full."
        return None


def _replay(body: bytes, receive: Receive) -> Receive:
    """`receive` as it was before the body was read."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return messages.pop() if messages else await receive()

    return again


def _names_uploads_alone(body: bytes, folder: Path) -> bool:
    """Whether all files that a call of the page's functions names lie in `folder`: none of the host, no address."""
    try:
        waiting = [json.loads(body)]
    except (ValueError, RecursionError):
        return False
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if "path" in value and folder not in Path(os.path.normpath(str(value["path"]))).parents:
                return False
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
    return True


def make_page(service: Service) -> gr.Blocks:
    """The components and what they do."""
    with gr.Blocks(analytics_enabled=False, title="frd web", delete_cache=(600, COPIES_AGE)) as page:
        gr.Markdown("# Find edits in a photo")
        key = gr.State(None)
        with gr.Row():
            with gr.Column():
                photo = gr.File(label="Photo", elem_id="photo")
                label = "Mark pixels with a probability above"
                slider = gr.Slider(0, 1, 0.5, step=0.001, label=label, buttons=[], elem_id="slider")
                raw = gr.Checkbox(label="also where no trace was found", elem_id="raw", visible=False)
            with gr.Column():
                facts = gr.HTML(_waiting(service), elem_id="facts")
                marked = gr.HTML(elem_id="marked")
        with gr.Row():
            small, heat, mask = (
                gr.Image(label=label, format=form, interactive=False, buttons=["fullscreen"], elem_id=name)
                for label, form, name in (
                    ("Photo", "webp", "small"),
                    ("Heat map", "webp", "heat"),
                    ("Mask", "png", "mask"),
                )
            )

        def examine(file: str | None) -> dict[Any, Any]:
            blank = dict.fromkeys((key, small, heat, mask)) | {
                marked: "",
                raw: gr.update(value=False, visible=False),
            }
            if file is None:
                return {**blank, facts: _waiting(service)}
            try:
                new = service.examine(Path(file))
            except Exception as error:
                return {**blank, facts: _complaint(error, Path(file))}
            result = service.result(new)
            found = result.found
            calibrated = found.rule is not None
            return {
                key: new,
                facts: _facts(service, result),
                slider: round(found.threshold, 3),
                raw: gr.update(value=False, visible=calibrated),
                small: result.small,
                **show(new, found.threshold, False),
            }

        def show(key: str | None, threshold: float, raw: bool) -> dict[Any, Any]:
            if key is None:
                return {marked: ""}
            try:
                result = service.result(key)
            except LimitError as error:
                return {marked: _complaint(error)}
            return {
                heat: result.heat_map(raw),
                mask: result.mask(threshold, raw),
                marked: _marked(result, key, threshold, raw),
            }

        shown = [heat, mask, marked]
        photo.change(
            examine,
            photo,
            [key, facts, slider, raw, small, *shown],
            show_progress_on=[facts, small, heat, mask],
            concurrency_limit=1,
            api_visibility="private",
        )
        for event in (slider.input, raw.input):
            event(
                show,
                [key, slider, raw],
                shown,
                trigger_mode="always_last",
                show_progress="hidden",
                concurrency_limit=2,
                api_visibility="private",
            )
    return page.queue(max_size=WAITING)


def _waiting(service: Service) -> str:
    limits = service.limits
    return (
        f"<p>Drop a photo: at most {limits.file_bytes / 1e6:g} MB and {limits.pixels / 1e6:g} megapixels. "
        f"It is examined on the machine that runs <code>frd web</code>, with the checkpoint {_text(service.label)}.</p>"
    )


def _complaint(error: Exception, photo: Path | None = None) -> str:
    """What went wrong, in words; an error of the program goes to the log alone."""
    if isinstance(error, (LimitError, ImageError, PredictionError, MemoryError)):
        text = one_line(error)
    else:
        traceback.print_exception(error)
        text = "This photo could not be examined: an error of the program, which its log shows."
    if photo is not None:
        # The folders of this machine are nobody's business.
        text = re.sub(r"\S*/" + re.escape(photo.name), lambda _: f"'{photo.name}", text)
    return f'<div class="facts"><p class="wrong" role="alert">{_text(text)}</p></div>'


def _facts(service: Service, result: Result) -> str:
    found = result.found
    height, width = found.size
    if found.rule is None:
        judged = f"<h2>score {found.score:.3f}</h2>"
    else:
        experience = found.rule.explain(found.score).removeprefix(str(found.verdict)).strip(" ()")
        judged = f"<h2>{_text(found.verdict)}</h2><p>{_text(experience)}</p>"
    remarks = "".join(f"<li>{_text(remark)}</li>" for remark in result.provenance.get("remarks", []))
    return f"""<div class="facts">{judged}
<p>{_text(result.photo.name)}, {width} x {height} pixels, checkpoint {_text(service.label)}, {found.seconds:.1f} s</p>
{f"<p>What the file says of itself:</p><ul>{remarks}</ul>" if remarks else ""}
<details><summary>What this means</summary><p>{MEANING[found.rule is not None]}</p></details></div>"""


def _marked(result: Result, key: str, threshold: float, raw: bool) -> str:
    share = result.at(threshold, raw).mask.mean()
    reason = ", since no trace was found" if result.emptied(raw) else ""
    address = f"result/{key}.zip?threshold={threshold}&amp;raw={int(raw)}"
    return f"""<p>{100 * share:.1f} % of the pixels are marked{reason}.
<a id="download" href="{address}" download="{_text(result.photo.stem)}.zip">Download (zip)</a></p>"""


def _text(value: object) -> str:
    return html.escape(printable(str(value)))


def make_app(service: Service, host: str) -> fastapi.FastAPI:
    """The page as an ASGI application, whose `host` decides which names it answers to."""
    # Gradio serves any file below the first, and of the second too if it is there.
    served = service.folder / "gradio"
    served.mkdir()
    os.environ.update(GRADIO_TEMP_DIR=str(served), GRADIO_EXAMPLES_CACHE=str(served / "examples"))
    app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/result/{key}.zip")
    def download(
        key: str, threshold: Annotated[float, fastapi.Query(ge=0, le=1)], raw: bool = False
    ) -> fastapi.Response:
        try:
            file = service.archive(key, threshold, raw)
        except LimitError as error:
            return PlainTextResponse(str(error), 404)
        return FileResponse(file, media_type="application/zip", background=BackgroundTask(file.unlink))

    gr.mount_gradio_app(
        app,
        make_page(service),
        "/",
        footer_links=[],
        run_history=False,
        max_file_size=service.limits.file_bytes,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        enable_monitoring=False,
        show_error=False,
        theme=gr.themes.Base(font="system-ui", font_mono="monospace"),
        css=_STYLE,
    )
    app.add_middleware(Guard, folder=served, file_bytes=service.limits.file_bytes)
    # Another site's name that leads to this address must not reach the page.
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOCAL, "[::1]"] if host in LOCAL else ["*"])
    return app


def serve(service: Service, sock: socket.socket, host: str) -> None:
    """Answer requests until the process is interrupted."""
    config = uvicorn.Config(make_app(service, host), log_level="warning", timeout_graceful_shutdown=2)
    uvicorn.Server(config).run(sockets=[sock])
