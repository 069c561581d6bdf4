"""`frd predict` on what a user's folder may hold: each photo for itself, and nothing overwritten unasked."""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from frd_model import predict as predict_function
from frd_model.cli import main
from frd_model.cli.arguments import Checkpoint, path
from frd_model.cli.predict_jobs import listed_names, name_jobs
from frd_model.data.images import read_image, write_png
from frd_model.output import check_output_file, say

WIDTH_OF_NAN, WIDTH_OF_MEMORY = 77, 78


class Net(nn.Module):
    """The logit of a pixel is its red plane; some widths bring it down."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[3] == WIDTH_OF_NAN:
            return x[:, :1] * float("nan")
        if x.shape[3] == WIDTH_OF_MEMORY:
            raise RuntimeError("DefaultCPUAllocator: not enough memory:\nyou tried to allocate 1 byte")
        return x[:, :1]


@pytest.fixture(autouse=True)
def net(monkeypatch: pytest.MonkeyPatch) -> None:
    def open_checkpoint(name: str | None, device: str, **_: object) -> Checkpoint:
        return Checkpoint(Net().eval(), str(name or "demo"))

    monkeypatch.setattr("frd_model.cli.predict.open_checkpoint", open_checkpoint)


def photo(width: int = 50, height: int = 40, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def run(*arguments: object) -> int:
    return main(["predict", *map(str, arguments)])


def test_what_is_written_is_what_predict_gives(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", photo())
    assert run(tmp_path / "a.png", "--out", tmp_path / "out") == 0
    want = predict_function(photo(), Net())
    np.testing.assert_array_equal(read_image(tmp_path / "out" / "a_mask.png")[:, :, 0] == 255, want.mask)
    record = json.loads((tmp_path / "out" / "a.json").read_text())
    assert record["score"] == round(want.score, 6) and record["size_policy"] == "auto"
    assert read_image(tmp_path / "out" / "a_overlay.png").shape == (40, 50, 3)


def test_bad_photos_do_not_stop_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    write_png(folder / "a_nan.png", photo(WIDTH_OF_NAN))
    write_png(folder / "b_memory.png", photo(WIDTH_OF_MEMORY))
    write_png(folder / "c_good.png", photo())
    (folder / "d_folder.png").mkdir()
    (folder / "e_broken.png").symlink_to(folder / "nothing")
    (folder / "f_loop.png").symlink_to(folder / "f_loop.png")
    os.mkfifo(folder / "g_pipe.png")
    write_png(folder / ("h" * 251 + ".png"), photo())
    (folder / os.fsdecode(b"i_\xff\n.png")).write_bytes((folder / "c_good.png").read_bytes())
    (folder / "notes.txt").write_text("x")
    given = [folder, folder / "g_pipe.png", folder / "f_loop.png", "/dev/zero", tmp_path / "no" / "where.png"]

    assert run(*given, "--out", out, "--json") == 1

    printed = capsys.readouterr()
    records = [json.loads(line) for line in printed.out.splitlines()]
    failed = {Path(r["path"]).name: r["error"] for r in records if "error" in r}
    assert set(failed) == {
        "a_nan.png",
        "b_memory.png",
        "e_broken.png",
        "f_loop.png",
        "g_pipe.png",
        "zero",
        "where.png",
    }
    assert "logits must be finite" in failed["a_nan.png"] and "not enough memory" in failed["b_memory.png"]
    good = [r["name"] for r in records if "error" not in r]
    assert len(good) == 3 and good[0] == "c_good"
    assert len(list(out.iterdir())) == 9  # nothing of a failed photo stays
    assert all(len(os.fsencode(p.name)) <= 255 for p in out.iterdir())
    assert (out / os.fsdecode(b"i_\xff\n.json")).exists()
    assert "notes.txt" in printed.err and "d_folder.png" in printed.err
    assert printed.err.splitlines()[-1] == "3 done, 7 failed"
    assert all(line.isprintable() for line in printed.err.splitlines())


def test_any_exception_of_one_photo_is_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    errors: list[BaseException] = [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), KeyError("x")]
    monkeypatch.setattr(
        sys.modules["frd_model.predict"],
        "as_pixels",
        lambda image: image if not errors else (_ for _ in ()).throw(errors.pop()),
    )
    for name in "abcd":
        write_png(tmp_path / "in" / f"{name}.png", photo())
    assert run(tmp_path / "in", "--out", tmp_path / "out") == 1
    printed = capsys.readouterr()
    assert [line.split("in/")[-1] for line in printed.err.splitlines()[-3:]] == [
        "a.png: KeyError: 'x'",
        "b.png: OutOfMemoryError: CUDA out of memory",
        "c.png: out of memory",
    ]
    assert printed.out.splitlines()[-1] == "1 done, 3 failed"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["d.json", "d_mask.png", "d_overlay.png"]


def test_results_of_another_folder_are_no_photos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Unless one is named itself."""
    folder = tmp_path / "in"
    write_png(folder / "a.png", photo())
    write_png(folder / "b_mask.png", photo())  # a photo of that name, without a record
    assert run(folder / "a.png", "--out", folder) == 0
    assert run(folder, "--out", tmp_path / "out") == 0
    assert {p.name for p in (tmp_path / "out").glob("*.json")} == {"a.json", "b_mask.json"}
    assert "result of an earlier run" in capsys.readouterr().err
    assert run(folder / "a_mask.png", "--out", tmp_path / "named") == 0


def test_an_address_gets_a_hint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("https://example.org/a.jpg", "--out", tmp_path) == 1
    assert "got an address: download it first" in capsys.readouterr().err


def test_a_second_run_needs_a_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    write_png(folder / "a.png", photo())
    assert run(folder, "--out", out) == 0
    old = (out / "a.json").stat().st_mtime_ns
    capsys.readouterr()

    assert run(folder, "--out", out) == 1
    error = capsys.readouterr().err
    assert (
        error.count("\n") == 1
        and "--skip-existing" in error
        and "--overwrite" in error
        and "a_mask.png" in error
    )

    write_png(folder / "b.png", photo(60))
    (out / "b_mask.png").write_bytes(b"half of a run that was killed")
    assert run(folder, "--out", out, "--skip-existing") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "1 done, 0 failed, 1 done before"
    assert (out / "a.json").stat().st_mtime_ns == old
    assert read_image(out / "b_mask.png").shape == (40, 60, 3)

    (out / "b_overlay.png").unlink()
    assert run(folder, "--out", out, "--skip-existing") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "1 done, 0 failed, 1 done before"
    assert (out / "b_overlay.png").is_file()

    assert run(folder, "--out", out, "--resume", "--threshold", 0.4) == 1
    assert "threshold was 0.5 in" in capsys.readouterr().err
    assert run(folder, "--out", out, "--resume", "--preset", "lite") == 1
    assert "preset was None in" in capsys.readouterr().err
    assert run(folder, "--out", out, "--overwrite", "--threshold", 0.4) == 0
    assert json.loads((out / "a.json").read_text())["threshold"] == 0.4


def test_resume_does_not_take_another_photos_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_png(tmp_path / "one" / "a.png", photo())
    write_png(tmp_path / "two" / "a.png", photo())
    assert run(tmp_path / "one", "--out", tmp_path / "out") == 0
    assert run(tmp_path / "two", "--out", tmp_path / "out", "--resume") == 1
    assert "is of the photo" in capsys.readouterr().err


def test_a_failure_leaves_no_old_result(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", photo())
    assert run(tmp_path / "a.png", "--out", tmp_path / "out") == 0
    write_png(tmp_path / "a.png", photo(WIDTH_OF_NAN))
    assert run(tmp_path / "a.png", "--out", tmp_path / "out", "--overwrite") == 1
    assert list((tmp_path / "out").iterdir()) == []


def test_a_result_never_replaces_a_photo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.png", "a_mask.png"):
        write_png(tmp_path / name, photo())
    assert run(tmp_path, "--out", tmp_path, "--overwrite") == 1
    assert "would replace the photo" in capsys.readouterr().err
    np.testing.assert_array_equal(read_image(tmp_path / "a_mask.png"), photo())


@pytest.mark.parametrize("kind", ["file", "below a file", "/proc", "nul"])
def test_an_output_that_cannot_be_written_is_found_first(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "frd_model.cli.predict.open_checkpoint", lambda *_, **__: pytest.fail("work was begun")
    )
    write_png(tmp_path / "a.png", photo())
    out = {
        "file": tmp_path / "a.png",
        "below a file": tmp_path / "a.png" / "out",
        "/proc": "/proc/out",
        "nul": "a\0b",
    }[kind]
    assert run(tmp_path / "a.png", "--out", out) == 1
    error = capsys.readouterr().err
    assert "--out must be a directory that can be written" in error and error.count("\n") == 1


def test_the_home_directory_is_expanded_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_png(tmp_path / "in" / "a.png", photo())
    assert run("~/in/*.png", "--out=~/out") == 0
    assert (tmp_path / "out" / "a.json").exists()


def test_recursive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_png(tmp_path / "in" / "a.png", photo())
    write_png(tmp_path / "in" / "sub" / "a.png", photo(60))
    write_png(tmp_path / "in" / "sub" / "deep" / "b.png", photo(70))
    assert run(tmp_path / "in", "--out", tmp_path / "flat") == 0
    assert "sub" in capsys.readouterr().err
    assert run(tmp_path / "in", "--out", tmp_path / "out", "--recursive") == 0
    assert {p.stem for p in (tmp_path / "out").glob("*.json")} == {"in_a_png", "sub_a_png", "b"}


def test_names_differ_where_file_systems_see_one() -> None:
    files = [Path("1/Straße.png"), Path("2/STRASSE.png"), Path("3/e\u0301.png"), Path("4/\u00e9.png")]
    names = [job.name for job in name_jobs(files)]
    assert len(set(names)) == 4 and names[0] != "Straße" and names[3] != "\u00e9"
    long = [Path(f"{d}/{'é' * 120}{end}.png") for d, end in ((1, "a"), (1, "b"), (2, "a"))]
    names = [job.name for job in name_jobs(long)]
    assert len(set(names)) == 3 and all(len(f"{n}_overlay.png".encode()) <= 255 for n in names)


def test_lines_print_in_any_encoding() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, "ascii")
    say("grün \udcff\n\x1b[0m", stream)
    assert raw.getvalue() == b"gr\\xfcn \\udcff\\n\\x1b[0m\n"


def test_a_name_that_stdout_cannot_show(tmp_path: Path) -> None:
    """In a process of its own, with an ASCII stdout, the demo checkpoint and the real network."""
    write_png(tmp_path / "in" / "grün.png", photo())
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "error",
            "-m",
            "frd_model.cli",
            "predict",
            tmp_path / "in",
            "--out",
            tmp_path / "out",
        ],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"gr\\xfcn ") and (tmp_path / "out" / "grün.json").exists()


def test_long_names_in_another_locale(tmp_path: Path) -> None:
    """The file system's encoding is then ASCII, and the bytes of a name go through it unchanged."""
    name = "ü" * 125
    write_png(tmp_path / f"{name}.png", photo())
    done = subprocess.run(
        [sys.executable, "-m", "frd_model", "predict", tmp_path / f"{name}.png", "--out", tmp_path / "out"],
        env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0"},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    written = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert len(written) == 3 and all(file.startswith("ü" * 100) for file in written)


def test_an_unset_variable_is_no_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("", "--out", tmp_path / "out") == 1
    assert "path must name a file or directory, got an empty text" in capsys.readouterr().err


def test_path_flags(tmp_path: Path) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="got an empty text"):
        path("")
    (tmp_path / "a.csv").write_text("")
    with pytest.raises(ValueError, match="--csv must be a new file"):
        check_output_file("--csv", tmp_path / "a.csv", overwrite=False)
    check_output_file("--csv", tmp_path / "a.csv", overwrite=True)
    with pytest.raises(ValueError, match="--csv must be a regular file"):
        check_output_file("--csv", tmp_path, overwrite=True)


@pytest.mark.slow
def test_large_photo_in_bounded_memory(tmp_path: Path) -> None:
    """From file to files at most 9 bytes a pixel beyond the decoded image: 1 GB for 12000 x 9000."""
    canvas = Image.fromarray(photo(600, 400)).resize((6000, 4000), Image.Resampling.NEAREST)
    canvas.save(tmp_path / "big.png", compress_level=1)
    write_png(tmp_path / "small.png", photo(1200, 1000))
    del canvas
    code = """
import re, sys
from pathlib import Path
from torch import nn
import frd_model.cli.predict
from frd_model.cli import main
from frd_model.cli.arguments import Checkpoint

class Net(nn.Module):
    def forward(self, x):
        return x[:, :1]

def kilobytes(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1))

def run(name):
    save = "--save=mask,overlay,map,npz,contour,sheet"
    assert main(["predict", name, "--out", f"{sys.argv[1]}/{Path(name).stem}", save, "--json"]) == 0

sys.modules["frd_model.cli.predict"].open_checkpoint = lambda *_, **__: Checkpoint(Net(), "")
run(f"{sys.argv[1]}/small.png")  # loads libraries and takes what stays
before = kilobytes("VmRSS")
run(f"{sys.argv[1]}/big.png")
print("peak", (kilobytes("VmHWM") - before) * 1024 - 6000 * 4000 * 3)
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert int(done.stdout.split("peak")[1]) < 9 * 6000 * 4000
    assert "tiles:" in done.stderr  # a log of a large photo shows how far the work is
    with Image.open(tmp_path / "big" / "big_overlay.png") as overlay:
        assert overlay.size == (6000, 4000)


@pytest.mark.parametrize("ends", [b"\n", b"\r\n", b"\0"], ids=["lines", "windows", "nul"])
def test_list_of_photos(
    ends: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With names that are no patterns, no UTF-8 and no option, a folder, an empty line, and one that is given twice."""
    (tmp_path / "in").mkdir()
    for name in (b"a[1].png", b"b\xff.png", b"-c.png", b"d e.png"):
        write_png(tmp_path / "in" / os.fsdecode(name), photo())
    write_png(tmp_path / "more" / "f.png", photo())
    monkeypatch.chdir(tmp_path / "in")
    names = [b"a[1].png", b"", b"b\xff.png", b"-c.png", b"missing.png", b"../more", b"d e.png"]
    (tmp_path / "list").write_bytes(ends.join(names) + ends)
    assert run("d e.png", "--from-file", tmp_path / "list", "--out", tmp_path / "out") == 1
    done = {os.fsencode(file.stem) for file in (tmp_path / "out").glob("*.json")}
    assert done == {b"a[1]", b"b\xff", b"-c", b"d e", b"f"}
    printed = capsys.readouterr()
    assert "missing.png" in printed.err and printed.out.splitlines()[-1] == "5 done, 1 failed"

    monkeypatch.setattr("sys.stdin", argparse.Namespace(buffer=io.BytesIO((tmp_path / "list").read_bytes())))
    assert run("--from-file", "-", "--out", tmp_path / "again") == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "5 done, 1 failed"
    assert all("(not calibrated: no verdict)  marked " in line for line in lines[:-1])


def test_no_photos_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--out", tmp_path / "out") == 2
    (tmp_path / "list").write_text("\n")
    assert run("--out", tmp_path / "out", "--from-file", tmp_path / "list") == 1
    assert run("--out", tmp_path / "out", "--from-file", tmp_path / "none") == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and "got neither" in lines[0] and "no images in" in lines[1]
    assert "--from-file must be a readable list" in lines[2] and "No such file" in lines[2]


def test_csv_has_every_photo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, table = tmp_path / "in", tmp_path / "table.csv"
    for width, name in ((50, b'a,"b\n\xff.png'), (WIDTH_OF_NAN, b"bad.png"), (60, "gr\u00fcn.png".encode())):
        write_png(folder / os.fsdecode(name), photo(width))
    assert run(folder, tmp_path / "no*", "--out", tmp_path / "out", "--csv", table) == 1
    rows = list(csv.DictReader(table.open(encoding="utf-8", newline="")))
    assert [row["path"].split("/")[-1] for row in rows] == [
        "no*",
        'a,"b\n\\udcff.png',
        "bad.png",
        "gr\u00fcn.png",
    ]
    assert [bool(row["error"]) for row in rows] == [True, False, True, False]
    record = json.loads((tmp_path / "out" / "gr\u00fcn.json").read_text())
    assert (
        float(rows[3]["score"]) == record["score"] and rows[3]["width"] == "60" and rows[3]["verdict"] == ""
    )

    assert run(folder, "--out", tmp_path / "other", "--csv", table) == 1
    assert "--csv must be a new file" in capsys.readouterr().err
    (folder / "bad.png").unlink()
    assert run(folder, "--out", tmp_path / "out", "--csv", table, "--skip-existing") == 0
    again = list(csv.DictReader(table.open(encoding="utf-8", newline="")))
    assert again == [rows[1], rows[3]], "also the photos that were done before"


@pytest.mark.parametrize(
    ("given", "said", "status"),
    [
        (["--csv", "in/a.png"], "--csv must be a file of its own, got the photo 'in/a.png'", 1),
        (["--csv", "out/../out/a.json"], "--csv must be a file of its own, got 'out/a.json'", 1),
        (["--report", "out/a_mask.png"], "--report must be a file of its own, got 'out/a_mask.png'", 1),
        (
            ["--csv", "one", "--report", "in/../one"],
            "--csv and --report must be two files, got 'in/../one'",
            2,
        ),
    ],
)
def test_no_output_replaces_another(
    given: list[str],
    said: str,
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_png(Path("in/a.png"), photo())
    before = Path("in/a.png").read_bytes()
    assert run("in", "--out", "out", "--overwrite", *given) == status
    assert said in capsys.readouterr().err
    assert Path("in/a.png").read_bytes() == before and not list(Path("out").glob("*"))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16-le", "utf-16-be"])
def test_lists_of_windows_programs(encoding: str, tmp_path: Path) -> None:
    order = "\ufeff" if encoding.startswith("utf-16") else ""
    (tmp_path / "list").write_bytes(f"{order}gr\u00fcn.png\r\nb c.png\r\n".encode(encoding))
    assert listed_names(str(tmp_path / "list")) == ["gr\u00fcn.png", "b c.png"]


def test_progress_is_for_terminals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "abc":
        write_png(tmp_path / "in" / f"{name}.png", photo())
    assert run(tmp_path / "in", "--out", tmp_path / "log") == 0
    assert "photo" not in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert run(tmp_path / "in", "--out", tmp_path / "json", "--json") == 0
    assert "photo/s" not in capsys.readouterr().err
    assert run(tmp_path / "in", "--out", tmp_path / "shown") == 0
    printed = capsys.readouterr()
    assert "3/3" in printed.err and "photo/s" in printed.err
    assert len(printed.out.splitlines()) == 4
