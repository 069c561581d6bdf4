"""`frd web`: the page's requests, its limits, what it refuses, and the whole of it in a browser."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from frd_model import load_model, predict
from frd_model.cli import main
from frd_model.data.images import overlay
from frd_model.score import ScoreRule
from frd_model.web import Limits, Service


def photo(red: int, height: int = 40, width: int = 50) -> np.ndarray:
    """Black, with a rectangle of the red value and one pixel of a lower one."""
    image = np.zeros((height, width, 3), np.uint8)
    image[10:20, 5:30, 0] = red
    image[height - 3, width - 7, 0] = red // 3
    return image


def png(image: np.ndarray, **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG", **options)
    return stream.getvalue()


RULE = ScoreRule("max", 8.0, -6.0, 0.5, {"0.01": 0.9, "0.05": 0.6, "0.10": 0.5}, {"untouched": 300})
# Of a photo of 40 x 50 pixels: the file, the reduced photo, three maps and the heads of their files.
RESULT_BYTES = len(png(photo(255))) + 40 * 50 * (3 + 4 + 4 + 4) + 4 * 128
LIMITS = Limits(file_bytes=100_000, pixels=1_000_000, seconds=60)


class Net(nn.Module):
    """The logit of a pixel is its red plane: white 2.2, black -2.1."""

    def __init__(self, rule: ScoreRule | None = RULE) -> None:
        super().__init__()
        self.score_rule = rule
        self.open = threading.Event()
        self.open.set()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.open.wait(60)
        return x[:, :1]


class Page:
    """A visitor: what the browser sends for it, and what it gets back."""

    def __init__(self, client: httpx.Client) -> None:
        self.client, self.session = client, os.urandom(6).hex()

    def upload(self, data: bytes, name: str = "photo.png") -> httpx.Response:
        return self.client.post("/gradio_api/upload", files={"files": (name, data)})

    def call(self, number: int, data: list[Any]) -> dict[str, Any]:
        """Call a function of the page; its outputs, or {"error": ...}."""
        body = {"data": data, "fn_index": number, "session_hash": self.session}
        joined = self.client.post("/gradio_api/queue/join", json=body)
        if joined.status_code != 200:
            return {"error": joined.text}
        with self.client.stream(
            "GET", "/gradio_api/queue/data", params={"session_hash": self.session}
        ) as lines:
            for line in lines.iter_lines():
                message = json.loads(line.removeprefix("data: ") or "{}")
                if message.get("msg") == "process_completed":
                    return dict(message["output"])
        raise AssertionError("no answer")

    def examine(self, data: bytes, name: str = "photo.png") -> dict[str, Any]:
        """The values of a photo's outputs by name."""
        uploaded = self.upload(data, name)
        assert uploaded.status_code == 200, uploaded.text
        return self.examine_path(uploaded.json()[0])

    def examine_path(self, path: str) -> dict[str, Any]:
        output = self.call(0, [{"path": path, "meta": {"_type": "gradio.FileData"}}])
        if "data" not in output:
            return output
        names = ("key", "facts", "slider", "raw", "small", "heat", "mask", "marked")
        return dict(zip(names, output["data"], strict=True))

    def show(self, threshold: Any, raw: Any = False) -> dict[str, Any]:
        output = self.call(1, [None, threshold, raw])
        return (
            dict(zip(("heat", "mask", "marked"), output["data"], strict=True)) if "data" in output else output
        )

    def image(self, value: dict[str, Any]) -> np.ndarray:
        data = self.client.get("/gradio_api/file=" + value["path"])
        assert data.status_code == 200
        return np.asarray(Image.open(io.BytesIO(data.content)).convert("RGB"))

    def download(self, marked: str) -> zipfile.ZipFile:
        address = re.findall(r'href="(.*?)"', marked)[0].replace("&amp;", "&")
        answer = self.client.get("/" + address)
        assert answer.status_code == 200
        return zipfile.ZipFile(io.BytesIO(answer.content))


@contextmanager
def serving(folder: Path, net: nn.Module, limits: Limits = LIMITS) -> Iterator[httpx.Client]:
    # Not when tests are collected: it takes seconds.
    import uvicorn

    from frd_model import web_page

    service = Service(net, "net", folder, limits, {"engine": "torch"})
    with socket.create_server(("127.0.0.1", 0)) as sock:
        server = uvicorn.Server(uvicorn.Config(web_page.make_app(service, "127.0.0.1"), log_level="critical"))
        thread = threading.Thread(target=server.run, args=([sock],))
        thread.start()
        address = f"http://127.0.0.1:{sock.getsockname()[1]}"
        try:
            with httpx.Client(
                base_url=address, timeout=60, limits=httpx.Limits(max_connections=100)
            ) as client:
                yield client
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with serving(tmp_path_factory.mktemp("web"), Net()) as client:
        yield client


@pytest.fixture
def page(client: httpx.Client) -> Page:
    return Page(client)


def test_a_photo_is_shown_and_downloaded_as_predicted(page: Page) -> None:
    image = photo(255)
    found = predict(image, Net())
    shown = page.examine(png(image), "holiday.png")
    assert "<h2>edited</h2>" in shown["facts"] and "holiday.png, 50 x 40 pixels" in shown["facts"]
    assert f"score {found.score:.2f}" in shown["facts"] and shown["slider"] == 0.5
    assert "12.5 % of the pixels" in shown["marked"]
    np.testing.assert_array_equal(page.image(shown["mask"])[:, :, 0] > 0, found.mask)
    heat = page.image(shown["heat"]).astype(int) - overlay(image, found.probability)
    assert np.abs(heat).mean() < 4, "the browser gets it with losses"

    moved = page.show(0.1)
    low = predict(image, Net(), threshold=0.2)
    assert page.show(0.2)["marked"] != moved["marked"]
    moved = page.show(0.2)
    np.testing.assert_array_equal(page.image(moved["mask"])[:, :, 0] > 0, low.mask)
    assert low.mask.sum() == found.mask.sum() + 1

    files = page.download(moved["marked"])
    assert sorted(files.namelist()) == [
        "holiday.json", "holiday_map.png", "holiday_mask.png", "holiday_overlay.png"
    ]  # fmt: skip
    record = json.loads(files.read("holiday.json"))
    assert record["threshold"] == 0.2 and record["path"] == "holiday.png" and record["checkpoint"] == "net"
    assert record["score"] == round(found.score, 6) and record["edited_fraction"] == low.mask.mean()
    assert record["provenance"]["format"] == "PNG"
    assert (record["engine"], record["size_policy"], record["tile"]) == ("torch", "auto", 512)
    mask = cv2.imdecode(np.frombuffer(files.read("holiday_mask.png"), np.uint8), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(mask > 0, low.mask)
    values = cv2.imdecode(np.frombuffer(files.read("holiday_map.png"), np.uint8), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(values, np.rint(found.probability * 65535))


def test_nothing_is_marked_where_no_trace_was_found_unless_asked_for(page: Page) -> None:
    shown = page.examine(png(photo(140)))
    assert (
        "<h2>no trace found</h2>" in shown["facts"] and "no proof that a photo is untouched" in shown["facts"]
    )
    assert "0.0 % of the pixels are marked, since" in shown["marked"]
    assert not page.image(shown["mask"]).any() and not page.image(page.show(0.2)["mask"]).any()
    raw = page.show(0.5, True)
    assert "12.5 %" in raw["marked"] and page.image(raw["mask"]).any()
    assert json.loads(page.download(raw["marked"]).read("photo.json"))["raw"] is True


def test_a_small_region_of_a_large_photo_is_seen(tmp_path: Path) -> None:
    with serving(tmp_path, Net(None)) as client:
        image = np.zeros((300, 3000, 3), np.uint8)
        image[250, 1717] = 255
        page = Page(client)
        shown = page.examine(png(image))
        assert "score" in shown["facts"] and "not calibrated" in shown["facts"]
        mask = page.image(shown["mask"])[:, :, 0]
        assert mask.shape == (102, 1024) and np.argwhere(mask > 128).tolist() == [[85, 586]]


def test_twenty_uploads_at_once(client: httpx.Client) -> None:
    reds = range(155, 255, 5)
    with ThreadPoolExecutor(20) as pool:
        shown = list(pool.map(lambda red: Page(client).examine(png(photo(red)), f"{red}.png"), reds))
    for red, values in zip(reds, shown, strict=True):
        found = predict(photo(red), Net())
        assert f"{red}.png" in values["facts"] and f"score {found.score:.2f}" in values["facts"]
        record = json.loads(Page(client).download(values["marked"]).read(f"{red}.json"))
        assert record["score"] == round(found.score, 6)
    # Gradio stores equal uploads as one file.
    with ThreadPoolExecutor(20) as pool:
        same = list(pool.map(lambda _: Page(client).examine(png(photo(255))), range(20)))
    assert all("<h2>edited</h2>" in values["facts"] for values in same)


def test_a_full_queue_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("frd_model.web_page.WAITING", 2)
    net = Net()
    with serving(tmp_path, net) as client, ThreadPoolExecutor(8) as pool:
        net.open.clear()
        waiting = [pool.submit(Page(client).examine, png(photo(250))) for _ in range(8)]
        full = [done for done in waiting if "error" in (done.result() if done.done() else {})]
        while len(full) < 5:
            full = [done for done in waiting if done.done()]
        net.open.set()
        answers = [done.result() for done in waiting]
    assert 5 <= sum("full" in answer.get("error", "") for answer in answers) < 8
    assert sum("<h2>edited</h2>" in answer.get("facts", "") for answer in answers) >= 2


def test_bad_files_are_explained(page: Page) -> None:
    whole = png(np.random.default_rng(0).integers(0, 255, (90, 90, 3), np.uint8))
    big = png(np.zeros((1001, 1000, 3), np.uint8))
    cases = {
        "notes.txt": (b"no picture", "must be an image file"),
        "a.png": (whole[:5000], "must be a complete image"),
        "empty.png": (b"", "must not be empty"),
        "big.png": (big, "at most 1000000 pixels"),
        "x <b>y.png": (b"no picture", "must be an image file"),
    }
    for name, (data, words) in cases.items():
        shown = page.examine(data, name)
        assert words in shown["facts"] and 'role="alert"' in shown["facts"], shown
        assert "/" not in re.sub(r"</\w+>", "", shown["facts"]) and "<b>" not in shown["facts"]
        assert not shown["key"] and not shown["mask"] and not shown["marked"]
    assert page.show(0.3)["marked"] == ""
    assert "<h2>edited</h2>" in page.examine(png(photo(255)))["facts"]
    large = page.upload(os.urandom(100_001 + (1 << 16)))
    assert large.status_code == 413 and "at most 0.1 MB" in large.text
    assert page.upload(os.urandom(100_001)).status_code == 413


def test_a_photo_that_takes_too_long_is_given_up(tmp_path: Path) -> None:
    limits = Limits(file_bytes=10**6, pixels=10**7, seconds=0.05)
    with serving(tmp_path, Net(), limits) as client:
        shown = Page(client).examine(png(np.zeros((1500, 1500, 3), np.uint8)))
        assert "takes longer than 0.05 s" in shown["facts"]
        assert not [entry for entry in tmp_path.iterdir() if entry.name != "gradio"], "nothing is left of it"


def test_old_results_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("frd_model.web.KEPT_BYTES", 2 * RESULT_BYTES + RESULT_BYTES // 2)
    with serving(tmp_path, Net()) as client:
        first, *others = (Page(client) for _ in range(3))
        marked = first.examine(png(photo(255)))["marked"]
        for other in others:
            other.examine(png(photo(255)))
        assert "no longer kept" in first.show(0.5)["marked"]
        address = re.findall(r'href="(.*?)\?', marked)[0]
        answer = client.get(f"/{address}", params={"threshold": 0.5})
        assert answer.status_code == 404 and "no longer kept" in answer.text
        assert len([entry for entry in tmp_path.iterdir() if entry.name != "gradio"]) == 2
        # A result that goes while its download is made.
        last = re.findall(r'href="(.*?)\?', others[-1].show(0.5)["marked"])[0]
        for entry in tmp_path.iterdir():
            if entry.name != "gradio":
                shutil.rmtree(entry)
        answer = client.get(f"/{last}", params={"threshold": 0.5})
        assert answer.status_code == 404 and "no longer kept" in answer.text


@pytest.mark.parametrize(
    "route",
    [
        *("file=/etc/passwd", "file=//etc/passwd", "file=%2Fetc%2Fpasswd", "file=../../../../etc/passwd"),
        *(
            "file=http://127.0.0.1:1/",
            "file=HTTP://127.0.0.1:1/",
            "file=file:///etc/passwd",
            "file=.",
            "file=/",
        ),
        *("proxy=http://127.0.0.1:1/", "file/etc/passwd", "runs", "vibe-code", "info", "openapi.json"),
    ],
)
def test_no_file_of_the_host_is_served(client: httpx.Client, route: str) -> None:
    answer = client.get(f"/gradio_api/{route}")
    assert answer.status_code in (403, 404) and "root:" not in answer.text


def test_only_files_that_were_uploaded_are_examined(page: Page, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png(photo(255)))
    uploaded = page.upload(png(photo(255)), "../../../../../../../../etc/x.png")
    path = Path(uploaded.json()[0] if uploaded.status_code == 200 else "/nothing")
    assert uploaded.status_code == 400 or (path.name == "x.png" and not Path("/etc/x.png").exists())
    good = page.upload(png(photo(255))).json()[0]
    served = Path(good).parent.parent
    bad = [
        str(tmp_path / "secret.png"),
        f"{served}/../../{tmp_path.name}/secret.png",
        str(served),
        "http://127.0.0.1:1/x.png",
        "https://example.com/x.png",
        "",
    ]
    for name in bad:
        assert "Only uploaded files" in page.examine_path(name)["error"]
        assert (
            "Only uploaded files" in page.show({"path": name, "meta": {"_type": "gradio.FileData"}})["error"]
        )
    for result in served.parent.glob("*/photo.png"):
        assert page.client.get(f"/gradio_api/file={result}").status_code == 403
    assert "error" in page.show("0.5x") and "error" in page.show(7)
    assert "<h2>edited</h2>" in page.examine_path(good)["facts"]


def test_requests_of_other_sites_are_refused(client: httpx.Client) -> None:
    files = {"files": ("a.png", png(photo(255)))}
    crossing = client.post("/gradio_api/upload", files=files, headers={"Sec-Fetch-Site": "cross-site"})
    assert crossing.status_code == 403
    assert client.get("/", headers={"Host": "evil.example"}).status_code == 400
    assert client.post("/gradio_api/upload", content=iter([b"x"])).status_code == 411
    answer = client.get("/")
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
    links = re.findall(r"<(?:script|link)[^>]*(?:src|href)=\"(.*?)\"", answer.text)
    assert links and not [link for link in links if link.startswith(("http", "//"))]


def test_no_other_machine_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    look_up = socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *a, **k: asked.append(host) or look_up(host, *a, **k)
    )
    monkeypatch.delenv("GRADIO_ANALYTICS_ENABLED", raising=False)
    with serving(tmp_path, Net()) as client:
        assert "<h2>edited</h2>" in Page(client).examine(png(photo(255)))["facts"]
    assert set(asked) == {"127.0.0.1"}, "the client's own"


def test_a_port_in_use_and_a_missing_gradio(
    client: httpx.Client, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["web", "--port", str(client.base_url.port)]) == 1
    assert "must be free to listen at, got 127.0.0.1" in capsys.readouterr().err
    monkeypatch.setattr("frd_model.cli.web.find_spec", lambda _: None)
    assert main(["web"]) == 1
    assert "pip install 'frd-kernels[web]'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_in_a_browser(tmp_path: Path) -> None:
    from playwright.sync_api import expect, sync_playwright

    image = np.random.default_rng(0).integers(0, 255, (96, 128, 3), np.uint8)
    software = "${document.title='owned'} {{1+1}} <img src=x onerror=alert(1)> GIMP"
    exif = Image.Exif()
    exif[0x0131] = software
    (tmp_path / "photo.png").write_bytes(png(image, exif=exif))
    (tmp_path / "notes.txt").write_text("no picture")
    command = [sys.executable, "-m", "frd_model", "web", "--port", "0", "--precision", "float32"]
    (tmp_path / "temporary").mkdir()
    environment = os.environ | {"TMPDIR": str(tmp_path / "temporary")}
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process,
        sync_playwright() as driver,
    ):
        try:
            assert process.stdout is not None
            address = process.stdout.readline().split()[0]
            browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1300, "height": 1000})
            page.set_default_timeout(60_000)
            expect.set_options(timeout=60_000)
            asked: list[str] = []
            page.on("request", lambda request: asked.append(request.url))
            page.goto(address)
            choose = page.locator("#photo input[type=file]")
            choose.set_input_files(tmp_path / "notes.txt")
            expect(page.get_by_role("alert")).to_contain_text("must be an image file")
            page.locator("#photo").get_by_label("Clear").click()
            expect(page.locator("#facts")).to_contain_text("Drop a photo")
            choose.set_input_files(tmp_path / "photo.png")
            expect(page.locator("#facts h2")).to_be_visible(timeout=60_000)
            assert software in page.locator("#facts").inner_text() and page.title() == "frd web"
            page.locator("#raw input").check()
            found = predict(image, load_model("demo"), raw=True, threshold=0.25)
            number = page.locator("#slider input[type=number]")
            number.fill("0.25")
            number.press("Enter")
            share = f"{100 * found.mask.mean():.1f} % of the pixels are marked."
            expect(page.locator("#marked")).to_contain_text(share)
            expect(page.locator("#mask img")).to_be_visible()
            with page.expect_download() as download:
                page.locator("#download").click()
            with zipfile.ZipFile(download.value.path()) as files:
                mask = cv2.imdecode(
                    np.frombuffer(files.read("photo_mask.png"), np.uint8), cv2.IMREAD_UNCHANGED
                )
            np.testing.assert_array_equal(mask > 0, found.mask)
            assert {url for url in asked if not url.startswith((address, "data:", "blob:"))} == set()
            browser.close()
        finally:
            process.terminate()
    assert process.returncode == 143 and not list((tmp_path / "temporary").glob("frd-web-*"))
