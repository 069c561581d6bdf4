"""`frd report`: one page that shows what `frd predict` wrote, whatever the photos are called."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from frd_model import predict
from frd_model.cli import main
from frd_model.cli.arguments import Checkpoint
from frd_model.data.images import write_png
from frd_model.report import _level
from frd_model.score import ScoreRule

RULE = ScoreRule("max", 8.0, -6.0, 0.5, {"0.01": 0.9, "0.05": 0.6, "0.10": 0.5}, {"untouched": 300})
HOSTILE = (b"<script>alert(1)<", b"\"><img src=x onerror=alert(2)>'&amp;", b"\xff\n\xe2\x80\xaegpj")


class Net(nn.Module):
    """The logit of a pixel is its red plane: white 2.2, black -2.1."""

    def __init__(self, rule: ScoreRule | None) -> None:
        super().__init__()
        self.score_rule = rule

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :1]


class Page(HTMLParser):
    """The tags of a page, their attributes, and the text of each table row."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[str] = []
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append("")

    def handle_data(self, data: str) -> None:
        if self.rows:
            self.rows[-1] += data

    def images(self) -> list[np.ndarray]:
        sources = [attrs["src"] or "" for tag, attrs in self.tags if tag == "img"]
        assert all(source.startswith("data:image/") for source in sources)
        data = [base64.b64decode(source.split(",")[1]) for source in sources]
        return [cv2.imdecode(np.frombuffer(d, np.uint8), cv2.IMREAD_UNCHANGED) for d in data]


def photo(red: int, width: int = 50, height: int = 40) -> np.ndarray:
    """Black, with a rectangle of the red value."""
    image = np.zeros((height, width, 3), np.uint8)
    image[10:20, 5:30, 0] = red
    return image


def results(folder: Path, monkeypatch: pytest.MonkeyPatch, rule: ScoreRule | None, *arguments: str) -> Path:
    net = Net(rule).eval()
    monkeypatch.setattr("frd_model.cli.predict.open_checkpoint", lambda *_, **__: Checkpoint(net, "net"))
    given = ["predict", str(folder), "--out", str(folder.with_name("results")), *arguments]
    assert main(given) == 0
    return folder.with_name("results")


def test_page_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_png(tmp_path / "in" / "high.png", photo(255))
    write_png(tmp_path / "in" / "low.png", photo(140))
    write_png(tmp_path / "in" / "large.png", photo(230, 1000, 30))
    out = results(tmp_path / "in", monkeypatch, RULE, "--save", "map")
    record = json.loads((out / "high.json").read_text())
    record["provenance"]["remarks"] = ["<i>an editor: GIMP"]
    (out / "high.json").write_text(json.dumps(record))
    assert main(["report", str(out), "--out", str(tmp_path / "a.html")]) == 0
    page = Page(tmp_path / "a.html")
    names = [
        next(n for n in ("high", "low", "large") if n in row.split("edited")[0].split("no trace")[0])
        for row in page.rows[1:]
    ]
    assert names == ["high", "large", "low"], "by score"
    assert "edited" in page.rows[1] and "no trace found" in page.rows[3] and "10.0 %" not in page.rows[3]
    assert "12.5 %" in page.rows[1] and "in 100 untouched calibration photos" in page.rows[1]
    thumbnails, maps = page.images()[::2], page.images()[1::2]
    assert [t.shape for t in thumbnails] == [(40, 50, 3), (10, 320, 3), (40, 50, 3)]
    want = _level(predict(photo(255), Net(None)).probability)
    np.testing.assert_array_equal(maps[0], want)
    assert set(np.unique(maps[1] > _level(0.5))) == {False, True}
    assert [attrs.get("class") for tag, attrs in page.tags if tag == "tr"][1:] == [None, None, "emptied"]
    text = (tmp_path / "a.html").read_text()
    assert "<i>an editor: GIMP" in page.rows[1]
    assert "no proof that a photo is untouched" in text and "fixed" not in page.rows[1]
    assert not re.search(r"(src|href)=\"(?!data:)", text) and "http://" not in text and "https://" not in text
    assert main(["report", str(out), "--out", str(tmp_path / "a.html")]) == 1, "it exists"


def test_levels_keep_small_regions_and_high_thresholds_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = np.zeros((900, 1000, 3), np.uint8)
    image[501, 777] = 255
    write_png(tmp_path / "in" / "a.png", image)
    out = results(tmp_path / "in", monkeypatch, None, "--save", "npz")
    assert main(["report", str(out), "--out", str(tmp_path / "a.html")]) == 0
    _, levels = Page(tmp_path / "a.html").images()
    assert levels.shape == (288, 320) and np.argwhere(levels > _level(0.5)).tolist() == [[160, 248]]
    assert _level(0.9990) < _level(0.9995) and _level(0.5) == 128 and _level(0.0) == 0 and _level(1.0) == 255


def test_hostile_names_are_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in HOSTILE:
        write_png(tmp_path / "in" / os.fsdecode(name + b".png"), photo(255))
    out = results(tmp_path / "in", monkeypatch, None)
    assert main(["report", str(out), "--out", str(tmp_path / "a.html")]) == 0
    page = Page(tmp_path / "a.html")
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert [tag for tag, _ in page.tags].count("img") == 2 * len(HOSTILE)
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    for shown in ("<script>alert(1)<", "\"><img src=x onerror=alert(2)>'&amp;", r"\udcff\n\u202egpj"):
        assert any(shown in row for row in page.rows)
    assert all("threshold fixed: no map saved" in row for row in page.rows[1:])


def test_photos_that_moved_and_damaged_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b", "c"):
        write_png(tmp_path / "in" / f"{name}.png", photo(255))
    out = results(tmp_path / "in", monkeypatch, None)
    write_png(tmp_path / "in" / "a.png", photo(255, 60))
    (out / "b_mask.png").write_bytes(b"")
    (tmp_path / "in" / "c.png").unlink()
    (out / "c_overlay.png").unlink()
    (out / "other.json").write_text("[1]")
    capsys.readouterr()
    assert main(["report", str(out), "--out", str(tmp_path / "a.html")]) == 1
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and "b.json" in printed.err and "2 photos in" in printed.out
    a, c = Page(tmp_path / "a.html").rows[1:]
    assert "photo not found, overlay shown" in a and "photo not found;" in c
    (tmp_path / "empty").mkdir()
    assert main(["report", str(tmp_path / "empty"), "--out", str(tmp_path / "b.html")]) == 1
    assert "must hold results of `frd predict`" in capsys.readouterr().err
    assert not (tmp_path / "b.html").exists()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_slider_and_order_in_a_browser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, red in (("z", 255), ("y", 200), ("x", 140)):
        write_png(tmp_path / "in" / f"{name}.png", photo(red, 300, 200))
    out = results(tmp_path / "in", monkeypatch, RULE, "--save", "map")
    assert main(["report", str(out), "--out", str(tmp_path / "a.html")]) == 0
    text = (tmp_path / "a.html").read_text()
    marks, _ = browse(tmp_path / "a.html", tmp_path)
    assert len(marks) == 2, "z and y, in this order; x has no trace"

    # The page's own policy admits no other script.
    use = """<script>slider.value = 148; slider.dispatchEvent(new Event("input"));
document.querySelectorAll("th button")[0].click(); document.getElementById("all").click();</script></body>"""
    (tmp_path / "b.html").write_text(text.replace("</body>", use))
    assert browse(tmp_path / "b.html", tmp_path)[0] == marks
    policy_free = re.sub(r"<meta http-equiv.*?>", "", text, flags=re.DOTALL)
    (tmp_path / "c.html").write_text(policy_free.replace("</body>", use))
    marks_above, dom = browse(tmp_path / "c.html", tmp_path)
    assert re.findall(r"<b title[^>]*>(\w)</b>", dom) == ["x", "y", "z"] and ">0.8411</output>" in dom
    assert len(marks_above) == 1 and marks_above[0] > max(marks), "z alone, now below the others"


def browse(file: Path, folder: Path) -> tuple[list[int], str]:
    """Where on the screen photos have marked regions, from the top, and the page after its scripts ran."""
    chromium = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={folder / 'user'}",
    ]
    shot = folder / "shot.png"
    options = ["--window-size=1200,1400", f"--screenshot={shot}", file.as_uri()]
    subprocess.run([*chromium, *options], check=True, capture_output=True, timeout=120)
    done = subprocess.run(
        [*chromium, "--dump-dom", file.as_uri()], check=True, capture_output=True, text=True, timeout=120
    )
    pixels = cv2.imread(str(shot)).astype(int)
    # Yellow over red.
    marked = (pixels[:, :, 2] > 150) & (pixels[:, :, 1] > 100) & (pixels[:, :, 0] < 60)
    rows = np.flatnonzero(marked.any(axis=1))
    return rows[np.diff(rows, prepend=-100) > 20].tolist(), done.stdout
