"""tools/fetch_photos.py with packages made here, and its list against the packages and the documentation."""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from types import ModuleType

import pytest

from frd_model.data.photos import SPLITS

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "fetch_photos.py"
MEMBERS = {"train/a.jpg": "usr/share/a.jpg", "val/b.jpg": "usr/share/deep/000.jpg"}
needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb to make a package")


def load_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fetch_photos", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def make_deb(folder: Path, version: str = "1:2.0-1") -> Path:
    """A package `wall` whose photos hold their own paths."""
    tree = folder / "build"
    for member in MEMBERS.values():
        (tree / member).parent.mkdir(parents=True, exist_ok=True)
        (tree / member).write_bytes(member.encode())
    (tree / "DEBIAN").mkdir(exist_ok=True)
    (tree / "DEBIAN" / "control").write_text(
        f"Package: wall\nVersion: {version}\nArchitecture: all\nMaintainer: nobody <a@b.c>\nDescription: photos\n"
    )
    deb = folder / f"wall_{version.replace(':', '%3a')}_all.deb"
    subprocess.run(
        ["dpkg-deb", "-Znone", "--build", "--root-owner-group", tree, deb], check=True, capture_output=True
    )
    return deb


def write_list(folder: Path, rows: Sequence[dict[str, str]]) -> None:
    with (folder / "photos.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, load_tool().Photo._fields, restval="")
        writer.writeheader()
        writer.writerows(rows)


def row(place: str, member: str, content: bytes, package: dict[str, str]) -> dict[str, str]:
    split, name = place.split("/")
    return package | {"split": split, "name": name, "member": member, "sha256": sha256(content)}


Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def tool(tmp_path: Path) -> Run:
    """The tool beside a list of its own: two photos of `wall` and one of the Python package `pictures`."""
    shutil.copy(TOOL, tmp_path)
    (tmp_path / "site" / "pictures").mkdir(parents=True)
    (tmp_path / "site" / "pictures" / "c.png").write_bytes(b"c")
    (tmp_path / "debs").mkdir()
    deb = make_deb(tmp_path / "debs")
    wall = {"package": "wall", "version": "1:2.0-1", "package_sha256": sha256(deb.read_bytes())}
    pictures = {"package": "py-pictures", "version": "3.1"}
    write_list(
        tmp_path,
        [
            *(row(p, m, m.encode(), wall) for p, m in MEMBERS.items()),
            row("heldout/c.png", "pictures/c.png", b"c", pictures),
        ],
    )

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, tmp_path / "fetch_photos.py", *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(tmp_path / "site"), **environment},
            capture_output=True,
            text=True,
        )

    return run


def fake_apt(folder: Path, script: str) -> str:
    """A PATH whose apt-get runs a shell script."""
    folder.mkdir()
    (folder / "apt-get").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "apt-get").chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def content(folder: Path) -> dict[str, bytes]:
    return {
        file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()
    }


WHOLE = {place: member.encode() for place, member in MEMBERS.items()} | {"heldout/c.png": b"c"}


@needs_dpkg
def test_the_set_is_made_completed_and_left(tool: Run, tmp_path: Path) -> None:
    first = tool("out", "--debs", "debs")
    assert first.returncode == 0, first.stderr
    assert first.stdout == "3 photos (1 train, 1 val, 1 heldout) in out, 3 new\n"
    assert content(tmp_path / "out") == WHOLE
    (tmp_path / "out" / "val" / "b.jpg").unlink()
    assert tool("out", "--debs", "debs").stdout.endswith("in out, 1 new\n")
    assert content(tmp_path / "out") == WHOLE
    # A whole set needs neither packages nor tools.
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*")}
    shutil.rmtree(tmp_path / "debs")
    assert tool("out", PATH="", PYTHONPATH="").stdout.endswith("in out, all were there\n")
    assert times == {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*")}


@needs_dpkg
def test_packages_come_from_apt(tool: Run, tmp_path: Path) -> None:
    path = fake_apt(tmp_path / "bin", f'[ "$1 $2" = "download wall=1:2.0-1" ] && cp {tmp_path}/debs/*.deb .')
    done = tool("out", PATH=path)
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / "out") == WHOLE


@needs_dpkg
@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo E: Version was not found >&2; echo W: more >&2; exit 100", "got: E: Version was not found; run `apt"),
        ("echo E: Unable to locate >&2; exit 100", "or name the folder of the downloaded packages by --debs"),
        ("exit 3", "wall 1:2.0-1 must be available to apt-get, got: status 3"),
        ("touch wall_1%3a2.1-1_all.deb", "must hold wall_1%3a2.0-1_all.deb, got wall_1%3a2.1-1_all.deb"),
        ("echo broken > wall_1%3a2.0-1_all.deb", f"must have SHA-256 {{deb}}, got {sha256(b'broken' + bytes([10]))}"),
    ],
)  # fmt: skip
def test_errors_of_apt(tool: Run, tmp_path: Path, script: str, words: str) -> None:
    deb = sha256(next((tmp_path / "debs").glob("*.deb")).read_bytes())
    check_error(tool("out", PATH=fake_apt(tmp_path / "bin", script)), words.format(deb=deb))
    assert content(tmp_path / "out") == {"heldout/c.png": b"c"}


def check_error(done: subprocess.CompletedProcess[str], words: str) -> None:
    assert done.returncode == 1
    assert words in done.stderr and done.stderr.startswith("fetch_photos: ") and done.stderr.count("\n") == 1


@needs_dpkg
def test_errors_of_the_machine(tool: Run, tmp_path: Path) -> None:
    check_error(
        tool("out", PYTHONPATH=""),
        "package py-pictures must be installed, got none: run `pip install py-pictures==3.1`",
    )
    check_error(
        tool("out", PATH=""), "command dpkg-deb must be installed, got none: install the package dpkg"
    )
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "dpkg-deb").symlink_to(str(shutil.which("dpkg-deb")))
    check_error(
        tool("out", PATH=str(tools)), "command apt-get must be installed, got none: run this on Debian, or"
    )
    check_error(
        tool("out", "--debs", "nowhere"), "'nowhere' must hold wall_1%3a2.0-1_all.deb, got none: download"
    )
    check_error(tool("fetch_photos.py", "--debs", "debs"), "Not a directory")
    assert tool("").returncode == 2


@needs_dpkg
def test_errors_of_photos(tool: Run, tmp_path: Path) -> None:
    (tmp_path / "site" / "pictures" / "c.png").write_bytes(b"other")
    words = f"c.png of py-pictures must have SHA-256 {sha256(b'c')}, got SHA-256 {sha256(b'other')}: run `pip"
    check_error(tool("out", "--debs", "debs"), words)
    assert not (tmp_path / "out").exists()
    (tmp_path / "site" / "pictures" / "c.png").write_bytes(b"c")
    assert tool("out", "--debs", "debs").returncode == 0
    (tmp_path / "out" / "train" / "a.jpg").write_bytes(b"edited")
    check_error(
        tool("out", "--debs", "debs"), "'out/train/a.jpg' must have the checksum of the list, got another"
    )
    (tmp_path / "out" / "train" / "a.jpg").unlink()
    (tmp_path / "out" / "val" / "holiday.jpg").write_bytes(b"")
    check_error(
        tool("out", "--debs", "debs"), "'out/val/holiday.jpg' must be a photo of the list, got another file"
    )
    (tmp_path / "out" / "val" / "holiday.jpg").rename(tmp_path / "out" / "val" / ".DS_Store")
    assert tool("out", "--debs", "debs").returncode == 0


@needs_dpkg
def test_a_package_with_other_photos_than_its_list(tool: Run, tmp_path: Path) -> None:
    text = (tmp_path / "photos.csv").read_text()
    (tmp_path / "photos.csv").write_text(text.replace(sha256(MEMBERS["val/b.jpg"].encode()), "0" * 64))
    check_error(
        tool("out", "--debs", "debs"),
        f"usr/share/deep/000.jpg of wall must have SHA-256 {'0' * 64}, got SHA-256",
    )
    (tmp_path / "photos.csv").write_text(text.replace("usr/share/deep/000.jpg", "usr/share/none.jpg"))
    check_error(tool("out", "--debs", "debs"), "usr/share/none.jpg of wall must have SHA-256")


def test_the_list() -> None:
    photos = load_tool().read_list()
    for key in ("name", "sha256"):
        values = [getattr(photo, key) for photo in photos]
        assert len(set(values)) == len(values)
    for package, rows in groupby(sorted(photos, key=lambda p: p.package), key=lambda p: p.package):
        assert len({(p.version, p.package_sha256) for p in rows}) == 1, package
    for photo in photos:
        assert photo.licence and photo.author and int(photo.bytes) > 0, photo
        assert Path(photo.name).suffix == Path(photo.member).suffix
    counts = {split: sum(p.split == split for p in photos) for split in SPLITS}
    assert sum(counts.values()) == len(photos) and counts["val"] >= 8 and counts["heldout"] >= 8


def test_photos_of_one_scene_are_in_one_split() -> None:
    split_of = {Path(photo.name).stem: photo.split for photo in load_tool().read_list()}
    for one, other in (("aero1", "aero3"), ("graf1", "graf3"), ("motorcycle_left", "motorcycle_right")):
        assert split_of[one] == split_of[other]
    # A photo of the packages that the library takes by itself is in the same split here.
    for split, names in SPLITS.items():
        own = {Path(name).stem for name in names}
        assert {split_of[name] for name in own & set(split_of)} == {split}
        assert split == "train" or own <= set(split_of)


def test_the_photos_of_the_installed_packages_are_those_of_the_list(tmp_path: Path) -> None:
    tool = load_tool()
    photos = [photo for photo in tool.read_list() if not photo.package_sha256]
    assert {photo.package for photo in photos} == {"scikit-image", "scikit-learn"}
    assert tool.fetch(photos, tmp_path) == photos
    for photo in photos:
        file = tmp_path / photo.place
        assert file.stat().st_size == int(photo.bytes) and sha256(file.read_bytes()) == photo.sha256


def test_the_documented_table() -> None:
    """The table of docs/photos.md; after a change of the list copy what this prints."""
    page = (ROOT / "docs" / "photos.md").read_text(encoding="utf-8")
    kinds = lambda photo: (photo.package, photo.version, photo.licence)  # noqa: E731
    lines = ["| package | licence | train | val | heldout |", "| --- | --- | --- | --- | --- |"]
    for (package, version, licence), group in groupby(sorted(load_tool().read_list(), key=kinds), key=kinds):
        rows = list(group)
        cells = (
            ", ".join(Path(p.name).stem for p in rows if p.split == split)
            for split in ("train", "val", "heldout")
        )
        lines.append(f"| {' | '.join((f'{package} {version}', licence, *(cell or '-' for cell in cells)))} |")
    table = "\n".join(lines)
    assert table in page, table
