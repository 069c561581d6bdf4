"""Many photos at one time: order, memory, batches, shards and processes that are killed."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from frd_model import pipeline
from frd_model.cli import main
from frd_model.cli.arguments import Checkpoint
from frd_model.cli.predict_jobs import Shard, name_jobs, shard
from frd_model.data import images
from frd_model.data.images import read_image, write_jpeg, write_png
from frd_model.device import to_first_device
from frd_model.eval_view import device_of
from frd_model.predict import Prediction
from frd_model.results import Job


class Net(nn.Module):
    """The logit of a pixel is its red plane. Notes the shapes of its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[tuple[int, ...]] = []
        self.engine, self.precision = "torch", "float32"
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.batches.append(tuple(x.shape))
        return x[:, :1]


def photo(width: int = 50, height: int = 40, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def jobs_of(folder: Path, sizes: list[int]) -> list[Job]:
    files = [write_png(folder / f"{n:03d}.png", photo(size, seed=n)) for n, size in enumerate(sizes)]
    return name_jobs(files)


def process(jobs: list[Job], net: nn.Module, finish: Callable[..., Any], **options: Any) -> Iterator[Any]:
    return pipeline.process(jobs, net, finish, **{"size": "auto", "tile": 64, "overlap": 8, **options})


def score(job: Job, content: Any, result: Prediction | BaseException) -> tuple[str, Any]:
    return job.name, result.score if isinstance(result, Prediction) else str(result)


def test_order_is_kept_and_errors_are_their_photos(tmp_path: Path) -> None:
    """With more photos than are ahead, and writers that finish the later ones first."""
    jobs = jobs_of(tmp_path, [30 + n % 7 for n in range(60)])
    jobs[7].path.write_bytes(b"no image")
    jobs[50].path.unlink()

    def slow_first(job: Job, content: Any, result: Any) -> tuple[str, Any]:
        time.sleep(0.02 if int(job.name) % 2 == 0 else 0)
        return score(job, content, result)

    found = list(process(jobs, Net(), slow_first))
    assert [name for name, _ in found] == [job.name for job in jobs]
    assert "Pillow can read" in found[7][1] and "No such file" in found[50][1]
    assert sum(isinstance(value, float) for _, value in found) == 58


def test_photos_of_one_size_share_a_batch(tmp_path: Path) -> None:
    jobs = jobs_of(tmp_path, [50, 50, 50, 60, 50, 50])
    jobs[1].path.write_bytes(b"no image")
    net = Net()
    found = dict(process(jobs, net, score, batch_size=3))
    assert net.batches == [(2, 3, 40, 50), (1, 3, 40, 60), (2, 3, 40, 50)]
    for job in (jobs[0], jobs[2], jobs[5]):
        ((_, alone),) = process([job], Net(), score)
        assert found[job.name] == pytest.approx(alone, abs=1e-6)


def test_the_error_of_a_batch_is_one_photos(tmp_path: Path) -> None:
    class Refusing(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits = super().forward(x)
            logits[x[:, 0, 0, 0] < -2] = float("nan")
            return logits

    jobs = jobs_of(tmp_path, [50] * 4)
    write_png(jobs[2].path, np.zeros((40, 50, 3), np.uint8))
    found = dict(process(jobs, Refusing(), score, batch_size=4))
    assert "must be finite" in found["002"]
    assert all(isinstance(found[name], float) for name in ("000", "001", "003"))


@pytest.mark.parametrize("batch", [1, 4])
def test_memory_of_photos_under_way_is_bounded(
    batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with photos that need more than there is, which are under way alone, and in batches."""
    sizes = [40, 40, 400, 40, 90, 400, 400, 40, 40, 40]
    jobs = jobs_of(tmp_path, sizes)
    limit = 4 * 40 * 90 * pipeline.BYTES_PER_PIXEL
    monkeypatch.setattr(pipeline, "MEMORY", limit)
    under_way: dict[str, int] = {}
    most: list[int] = []
    lock = threading.Lock()

    def reading(path: Path, **options: Any) -> np.ndarray:
        with lock:
            under_way[path.stem] = sizes[int(path.stem)] * 40 * pipeline.BYTES_PER_PIXEL
            most.append(0 if len(under_way) == 1 else sum(under_way.values()))
        return read_image(path, **options)

    def done(job: Job, content: Any, result: Any) -> str:
        time.sleep(0.01)
        with lock:
            del under_way[job.name]
        return job.name

    monkeypatch.setattr(pipeline, "read_image", reading)
    assert list(process(jobs, Net(), done, batch_size=batch)) == [job.name for job in jobs]
    assert 0 < max(most) <= limit, "two at one time, and never too many"


def test_a_run_that_is_stopped_ends(tmp_path: Path) -> None:
    class Stopping(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if len(self.batches) == 3:
                raise KeyboardInterrupt
            return super().forward(x)

    jobs = jobs_of(tmp_path, [50] * 40)
    done: list[str] = []
    threads = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        list(process(jobs, Stopping(), lambda job, *_: done.append(job.name)))
    assert done == ["000", "001", "002"] and threading.active_count() == threads


def run(*arguments: object) -> int:
    return main(["predict", *map(str, arguments)])


@pytest.fixture
def net(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("open_checkpoint", "prepared"):
        monkeypatch.setattr(f"frd_model.cli.predict.{name}", lambda *_, **__: Checkpoint(Net(), "net"))


@pytest.mark.usefixtures("net")
def test_a_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record's facts and the map are of the same bytes, also of a file that changes after it was read."""
    write_jpeg(tmp_path / "a.jpg", photo())
    reads: list[int] = []

    def reading(file: Any, name: Any) -> bytes:
        data = images.read_stream(file, name)
        reads.append(len(data))
        write_jpeg(tmp_path / "a.jpg", photo(90))
        return data

    monkeypatch.setattr(pipeline, "read_stream", reading)
    want = (tmp_path / "a.jpg").stat().st_size
    assert run(tmp_path / "a.jpg", "--out", tmp_path / "out") == 0
    record = json.loads((tmp_path / "out" / "a.json").read_text())
    assert reads == [want] and record["provenance"]["bytes"] == want
    assert record["size"] == record["provenance"]["size"] == {"width": 50, "height": 40}


@pytest.mark.usefixtures("net")
def test_standard_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_png(tmp_path / "stdin.png", photo(60))
    write_jpeg(tmp_path / "b.jpg", photo())
    data = (tmp_path / "b.jpg").read_bytes()

    def give(data: bytes) -> None:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))

    give(data)
    assert run("-", "--out", tmp_path / "out", "--report", tmp_path / "page.html") == 0
    assert run(tmp_path / "b.jpg", "--out", tmp_path / "file") == 0
    record, file = (json.loads((tmp_path / p).read_text()) for p in ("out/stdin.json", "file/b.json"))
    assert record["path"] == "-" and record["score"] == file["score"]
    assert record["provenance"]["sha256"] == file["provenance"]["sha256"]
    assert "photo not found, overlay shown" in (tmp_path / "page.html").read_text()
    assert main(["inspect", "-", "--json"]) == 1, "nothing is left there"
    give(data)
    capsys.readouterr()
    assert main(["inspect", "-", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sha256"] == record["provenance"]["sha256"]

    give(data)
    assert run(tmp_path / "stdin.png", "-", "--out", tmp_path / "two") == 0
    assert len(list((tmp_path / "two").glob("*.json"))) == 2, "a file of that name keeps its results"
    for bad, words in (
        (data[:100], "must be a complete image"),
        (b"no image", "got 8 bytes that start with"),
    ):
        give(bad)
        assert run("-", "--out", tmp_path / "out", "--overwrite") == 1
        error = capsys.readouterr().err
        assert "image '-' must be" in error and words in error
    (tmp_path / "list").write_text("-\n")
    assert run("--from-file", tmp_path / "list", "--out", tmp_path / "out", "--overwrite") == 1
    assert "No such file" in capsys.readouterr().err, "in a list it is the name of a file"
    for given in (["--from-file", "-"], ["--shard", "1/2"], ["--skip-existing"]):
        assert run("-", "--out", tmp_path / "out", *given) == 2
        error = capsys.readouterr().err
        assert given[0] in error and error.count("\n") == 1


@pytest.mark.usefixtures("net")
def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of this run's photos, those done before included, with maps for the slider."""
    for name in "abc":
        write_png(tmp_path / "in" / f"{name}.png", photo())
    out, page = tmp_path / "out", tmp_path / "page.html"
    assert run(tmp_path / "in" / "c.png", "--out", out) == 0
    assert run(tmp_path / "in" / "a.png", "--out", out, "--report", page) == 0
    assert (out / "a_map.png").exists() and "1 photos" in capsys.readouterr().out.splitlines()[-1]
    assert page.read_text().count('<td data-v="a"') == 1 and "threshold fixed" not in page.read_text()
    assert run(tmp_path / "in", "--out", tmp_path / "all", "--report", page) == 1
    assert "--report must be a new file" in capsys.readouterr().err
    (tmp_path / "in" / "b.png").write_bytes(b"no image")
    assert run(tmp_path / "in", "--out", out, "--report", page, "--skip-existing") == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == ["0 done, 1 failed, 2 done before", f"2 photos in {page}"], "not repeated for a map"
    assert run(tmp_path / "in" / "b.png", "--out", tmp_path / "none", "--report", tmp_path / "none.html") == 1
    assert "no report" in capsys.readouterr().err and not (tmp_path / "none.html").exists()


def test_shards_are_parts() -> None:
    jobs = [Job(Path(f"{n}.jpg"), f"IMG_{n:04d}") for n in range(2000)]
    parts = [[job.name for job in jobs if Shard(number, 3).has(job)] for number in (1, 2, 3)]
    assert sorted(name for part in parts for name in part) == [job.name for job in jobs]
    assert all(600 < len(part) < 740 for part in parts)
    # Which part a photo is in does not depend on the others.
    assert [job.name for job in jobs[::7] if Shard(2, 3).has(job)] == [
        n for n in parts[1] if int(n[4:]) % 7 == 0
    ]
    for text in ("0/2", "3/2", "1", "1/0", "-1/2", "a/b"):
        with pytest.raises(Exception, match="must be I/N with I from 1 to N"):
            shard(text)


@pytest.mark.usefixtures("net")
def test_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    for n in range(9):
        write_png(folder / f"{n}.png", photo(seed=n))
    assert run(folder, "--out", out, "--shard", "1/2") == 0
    first = {file.name for file in out.glob("*.json")}
    assert 0 < len(first) < 9 and f"shard 1/2: {len(first)} done" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(folder, "--out", out) == 0, "the results of the other shard are no obstacle"
    assert f"shard 2/2: {9 - len(first)} done" in capsys.readouterr().out
    assert len(list(out.glob("*.json"))) == 9
    assert run(folder, "--out", tmp_path / "other", "--csv", tmp_path / "a.csv") == 2
    assert "after the last shard" in capsys.readouterr().err
    monkeypatch.delenv("WORLD_SIZE")
    table = tmp_path / "a.csv"
    assert run(folder, "--out", out, "--skip-existing", "--csv", table) == 0
    assert len(table.read_text().splitlines()) == 10


@pytest.mark.usefixtures("net")
def test_what_a_stopped_run_leaves_is_no_photo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the results lie beside the photos."""
    for name in "ab":
        write_png(tmp_path / f"{name}.png", photo())

    with monkeypatch.context() as stopped:
        stopped.setattr(images, "overlay_bands", lambda *_, **__: 1 / 0)
        stopped.setattr("frd_model.cli.predict.remove", lambda *_: None)
        assert run(tmp_path, "--out", tmp_path) == 1
    assert (tmp_path / "a_mask.png").exists() and not (tmp_path / "a_overlay.png").exists()
    assert run(tmp_path, "--out", tmp_path, "--skip-existing") == 0
    assert {file.stem for file in tmp_path.glob("*.json")} == {"a", "b"}


def test_a_device_that_does_not_work_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Lacking(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not self.batches:
                self.batches.append(tuple(x.shape))
                raise NotImplementedError("the operator is not implemented for this device")
            return super().forward(x)

    two = [torch.device("cpu", 0), torch.device("cpu")]
    monkeypatch.setattr("frd_model.device.available_devices", lambda: two)
    assert str(device_of(to_first_device(Lacking()))) == "cpu"
    assert "the network does not work on cpu:0, the next device is taken" in capsys.readouterr().err
    monkeypatch.setattr("frd_model.device.available_devices", lambda: two[1:])
    to_first_device(net := Lacking())
    assert not net.batches, "nothing is tried where there is no choice"


def command(folder: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "frd_model", "predict", str(folder), "--out", str(out), *more]


def photos_in(folder: Path, count: int, side: int = 400) -> None:
    folder.mkdir()
    for n in range(count):
        Image.fromarray(photo(side, side, seed=n)).save(folder / f"{n:02d}.jpg")


def times(out: Path) -> dict[str, int]:
    """When the results of each photo that is done were written."""
    return {
        file.stem: file.stat().st_mtime_ns
        for file in out.glob("*.json")
        if "unfinished" not in json.loads(file.read_bytes())
    }


@pytest.mark.slow
def test_a_killed_worker_loses_and_repeats_nothing(tmp_path: Path) -> None:
    """Two shards on one folder of results; one is killed amid its work and started again."""
    photos_in(tmp_path / "in", 24)
    out = tmp_path / "out"

    def start(number: int) -> subprocess.Popen[bytes]:
        given = command(tmp_path / "in", out, "--shard", f"{number}/2", "--skip-existing", "--json")
        return subprocess.Popen(given, stdout=subprocess.PIPE)

    first, second = start(1), start(2)
    mine = {f"{n:02d}" for n in range(24) if Shard(1, 2).has(Job(Path(), f"{n:02d}"))}
    while len(mine & times(out).keys()) < 2:
        assert first.poll() is None
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    before = {name: when for name, when in times(out).items() if name in mine}
    assert 2 <= len(before) < len(mine)
    printed, _ = start(1).communicate()
    again = {Path(json.loads(line)["path"]).stem for line in printed.splitlines()}
    assert again == mine - before.keys()
    second.communicate()
    after = times(out)
    assert len(after) == 24 and {name: after[name] for name in before} == before
    pictures = [file for file in out.iterdir() if not file.name.startswith(".")]
    assert len(pictures) == 3 * 24


@pytest.mark.slow
def test_torchrun_shares_the_photos(tmp_path: Path) -> None:
    """A photo that fails makes the status 1 and stops neither process before its work is done."""
    photos_in(tmp_path / "in", 10, side=64)
    (tmp_path / "in" / "bad.jpg").write_bytes(b"no image")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m"]
    given = command(tmp_path / "in", tmp_path / "out", "--skip-existing", "--json")[2:]
    done = subprocess.run([*torchrun, *given], capture_output=True, text=True)
    assert done.returncode == 1
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert sorted(Path(record["path"]).stem for record in records) == [
        *(f"{n:02d}" for n in range(10)),
        "bad",
    ]
    assert done.stderr.count("shard 1/2: ") == done.stderr.count("shard 2/2: ") == 1
    assert len(times(tmp_path / "out")) == 10


@pytest.mark.slow
def test_100_megapixels_take_less_than_2_gb(tmp_path: Path) -> None:
    """Besides libraries and weights, from a progressive JPEG, whose coefficients libjpeg holds too."""
    image = Image.fromarray(photo(500, 500)).resize((10_000, 10_000), Image.Resampling.NEAREST)
    image.save(tmp_path / "a.jpg", progressive=True)
    write_png(tmp_path / "small.png", photo())
    del image
    code = """
import re, sys
from pathlib import Path
from frd_model.cli import main

def kilobytes(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1))

def run(name):
    save = "--save=mask,overlay,map"
    assert main(["predict", name, "--out", str(Path(name).parent / "out"), save, "--json", "--size=resize"]) == 0

run(sys.argv[2])
before = kilobytes("VmRSS")
run(sys.argv[1])
print("peak", (kilobytes("VmHWM") - before) * 1024)
"""
    given = [sys.executable, "-c", code, tmp_path / "a.jpg", tmp_path / "small.png"]
    done = subprocess.run(given, capture_output=True, text=True, check=True)
    assert int(done.stdout.split("peak")[1]) < 2e9
