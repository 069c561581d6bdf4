"""`frd data check` and `frd data convert` on tiny data sets, as their user runs them."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from frd_model.cli import main
from frd_model.data.sets import open_set


def scene(seed: int) -> np.ndarray:
    """A photo [96,128,3] of soft shapes: a perceptual hash is made for such, not for noise."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (6, 8, 3), np.uint8)
    return np.asarray(cv2.resize(small, (128, 96), interpolation=cv2.INTER_CUBIC))


def save(path: Path, values: np.ndarray, **options: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path, **options)
    return path


def make_set(root: Path, seeds: list[int]) -> Path:
    """Tp and Gt with a forged photo for each seed."""
    mask = np.zeros((96, 128), np.uint8)
    mask[20:50, 30:70] = 255
    for seed in seeds:
        save(root / f"Tp/{seed}.png", scene(seed))
        save(root / f"Gt/{seed}.png", mask)
    return root


def test_every_kind_of_fault_is_named_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_set(tmp_path / "set", [1, 2, 3, 4, 5, 6, 7])
    (root / "Tp/1.png").write_bytes((root / "Tp/1.png").read_bytes()[:200])
    save(root / "Gt/2.png", np.zeros((9, 9), np.uint8))
    save(root / "Gt/3.png", np.full((96, 128), 100, np.uint8))
    save(root / "Gt/4.png", np.full((96, 128), 255, np.uint8))
    (root / "Tp/6.png").write_bytes((root / "Tp/5.png").read_bytes())
    save(root / "Gt/7.png", np.zeros((96, 128), np.uint8))
    (tmp_path / "list.txt").write_text(
        "".join(f"set/Tp/{i}.png set/Gt/{i}.png\n" for i in range(1, 8)) + "set/Tp/8.png set/Gt/8.png\n"
    )
    out = tmp_path / "audit.json"
    argv = ["data", "check", "--data", f"mine=txt:{tmp_path / 'list.txt'}", "--json-out", str(out)]
    assert main(argv) == 1
    report = json.loads(out.read_text())["mine"]
    assert report["counts"] == {
        "unreadable": 1, "size": 1, "mask": 1, "inverted": 1, "duplicate": 1, "missing": 1, "black mask": 1,
    }  # fmt: skip
    assert (report["photos"], report["untouched"]) == (8, 1)
    kinds = {Path(found["file"]).name + " " + found["kind"] for found in report["findings"]}
    assert kinds == {
        "1.png unreadable", "2.png size", "3.png mask", "4.png inverted", "6.png duplicate", "8.png missing",
        "7.png black mask",
    }  # fmt: skip
    shown = capsys.readouterr().out
    assert all(found["text"] in shown for found in report["findings"]) and "6 findings" in shown
    assert main(argv) == 1 and "--overwrite" in capsys.readouterr().err


def test_photos_shared_with_a_test_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, test = make_set(tmp_path / "train", [1, 2, 3, 4, 5]), make_set(tmp_path / "test", [10, 11])
    # the same file, a smaller JPEG of it, a brighter one; seeds 4 and 5 are other photos
    (test / "Tp/11.png").write_bytes((train / "Tp/1.png").read_bytes())
    (test / "Tp/10.png").unlink()
    save(test / "Tp/10.jpg", cv2.resize(scene(2), (90, 70)), quality=60)
    save(test / "Tp/12.png", np.clip(scene(3).astype(int) + 12, 0, 255).astype(np.uint8))
    save(test / "Gt/10.png", np.zeros((70, 90), np.uint8))
    save(test / "Gt/12.png", np.zeros((96, 128), np.uint8))
    argv = ["data", "check", "--data", f"mani:{train}"]
    assert main(argv) == 0
    capsys.readouterr()
    assert main([*argv, "--against", f"mani:{test}"]) == 1
    shown = capsys.readouterr().out
    assert "1.png' must not be in test, got the same file as" in shown
    assert "2.png' must not be in test, got one that looks like" in shown
    assert "3.png' must not be in test, got one that looks like" in shown
    assert "4.png" not in shown and "5.png" not in shown
    table = shown[shown.index("photos untouched") :].split("\n")
    assert table[0].split() == ["photos", "untouched", "shared", "near"]
    assert table[2].split() == ["train", "5", "0", "1", "2"]


def test_known_numbers_of_photos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("normal-01", "splicing-01"):
        save(tmp_path / f"DSO-1/{name}.png", scene(len(name)))
    mask = np.full((96, 128), 255, np.uint8)
    mask[:9, :9] = 0
    save(tmp_path / "DSO-1-Fake-Images-Masks/splicing-01.png", mask)
    assert main(["data", "check", "--data", f"dso1:{tmp_path}"]) == 0
    assert (
        "1 forged and 1 untouched photos; known versions have 100 forged and 100" in capsys.readouterr().out
    )


def test_without_imagehash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "imagehash", None)
    root = make_set(tmp_path / "train", [1])
    assert main(["data", "check", "--mani", str(root)]) == 0
    assert main(["data", "check", "--mani", str(root), "--against", f"other=mani:{root}"]) == 1
    error = capsys.readouterr().err
    assert "pip install frd-kernels[audit]" in error


@pytest.mark.parametrize("kind", ["mani", "json", "cache"])
def test_a_converted_set_is_the_same(kind: str, tmp_path: Path) -> None:
    root = make_set(tmp_path / "set", [1, 2])
    save(root / "Gt/2.png", np.zeros((96, 128), np.uint8))
    out = tmp_path / ("out.json" if kind == "json" else "out")
    assert main(["data", "convert", "--mani", str(root), "--to", kind, "--out", str(out)]) == 0
    before, after = open_set(f"mani:{root}"), open_set(f"{kind}:{out}")
    for index in range(2):
        for old, new in zip(before.load(index), after.load(index), strict=True):
            np.testing.assert_array_equal(old, new)
    assert main(["data", "check", "--data", f"{kind}:{out}"]) == 0


def test_converting_resizes_and_leaves_bad_files_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_set(tmp_path / "set", [1, 2, 3])
    (root / "Tp/2.png").write_bytes(b"no photo")
    flags = ["data", "convert", "--mani", str(root), "--to", "cache"]
    assert main([*flags, "--out", str(tmp_path / "a"), "--longest", "64"]) == 1
    assert "2.png" in capsys.readouterr().err
    image, mask = open_set(f"cache:{tmp_path / 'a'}").load(1)
    assert image.shape == (48, 64, 3) and mask.shape == (48, 64) and mask.sum() == 15 * 20
    assert main([*flags, "--out", str(tmp_path / "b"), "--resize", "32"]) == 1
    assert open_set(f"cache:{tmp_path / 'b'}").load(0)[0].shape == (32, 32, 3)
    # a folder that exists is kept, one that was cut is told
    assert main([*flags, "--out", str(tmp_path / "b")]) == 1 and "--overwrite" in capsys.readouterr().err
    (tmp_path / "a/000000.npy").write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"000000\.npy' must be readable"):
        open_set(f"cache:{tmp_path / 'a'}").load(0)
    (tmp_path / "a/index.json").write_text("[{}]")
    with pytest.raises(ValueError, match=r"index\.json' must be as"):
        open_set(f"cache:{tmp_path / 'a'}")
    with pytest.raises(ValueError, match=r"must hold index\.json"):
        open_set(f"cache:{tmp_path}")


def test_masks_that_a_list_cannot_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_set(tmp_path / "set", [1])
    flags = ["data", "convert", "--mani", str(root), "--invert-masks", "--out"]
    assert main([*flags, str(tmp_path / "l.json"), "--to", "json"]) == 1
    assert "must be white where edited to be listed" in capsys.readouterr().err
    assert main([*flags, str(tmp_path / "out")]) == 0
    assert open_set(f"mani:{tmp_path / 'out'}").load(0)[1].mean() > 0.5


@pytest.mark.parametrize("kind", ["mani", "cache"])
def test_overwriting_replaces_an_earlier_conversion_and_no_other_photos(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = make_set(tmp_path / "set", [1, 2]), tmp_path / "out"
    flags = ["data", "convert", "--to", kind, "--overwrite", "--out"]
    assert main([*flags, str(out), "--mani", str(root)]) == 0
    # Again, after one photo has gone bad: the earlier copy of it does not stay.
    (root / "Tp/1.png").write_bytes(b"no photo")
    assert main([*flags, str(out), "--mani", str(root)]) == 1
    assert len(open_set(f"{kind}:{out}")) == 1
    # Its own photos, which would be read while they are replaced.
    before = {path: path.read_bytes() for path in out.rglob("*.*")}
    capsys.readouterr()
    assert main([*flags, str(out), "--data", f"{kind}:{out}", "--resize", "32"]) == 1
    assert "out must hold no photos but those of an earlier conversion" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.rglob("*.*")} == before


def test_photos_of_another_conversion_are_not_mixed_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = make_set(tmp_path / "first", [1, 2]), make_set(tmp_path / "second", [3])
    mani, cache = str(tmp_path / "mani"), tmp_path / "cache"
    assert main(["data", "convert", "--mani", str(first), "--out", mani]) == 0
    assert main(["data", "convert", "--mani", str(second), "--out", mani, "--overwrite"]) == 1
    assert (
        "000000_1.png'; choose a new folder" in capsys.readouterr().err and len(open_set(f"mani:{mani}")) == 2
    )
    # A conversion that is stopped leaves no index, which would name the earlier photos.
    flags = ["data", "convert", "--to", "cache", "--out", str(cache)]
    assert main([*flags, "--mani", str(first)]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(
            "frd_model.data.convert._write_array", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        main([*flags, "--mani", str(second), "--overwrite"])
    with pytest.raises(ValueError, match=r"must hold index\.json"):
        open_set(f"cache:{cache}")
    assert main([*flags, "--mani", str(second), "--overwrite"]) == 0 and len(open_set(f"cache:{cache}")) == 1


def test_names_that_no_file_can_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are the errors of their pairs in the audit and in training; `frd evaluate` has a test of its own."""
    make_set(tmp_path, [1, 2, 3, 4])
    bad = ["gone.png", "\ud800.png", "x" * 300 + ".png", "n\0l.png"]
    entries = [[f"Tp/{name}", f"Gt/{name}"] for name in ("1.png", "2.png", "3.png", "4.png", *bad)]
    (tmp_path / "list.json").write_text(json.dumps(entries))
    out = tmp_path / "audit.json"
    assert main(["data", "check", "--json", str(tmp_path / "list.json"), "--json-out", str(out)]) == 1
    assert json.loads(out.read_text())["list"]["counts"] == {"missing": 4}
    argv = ["train", "--json", str(tmp_path / "list.json"), "--output", str(tmp_path / "run"), "--crop", "32"]
    argv += ["--val-data", f"mani:{make_set(tmp_path / 'val', [5])}"]
    argv += ["--batch-size", "4", "--set", "data.max_bad=0.9", "--set", "model.options.stages=[1]"]
    capsys.readouterr()
    assert main([*argv, "--epochs", "1"]) == 0
    assert main([*argv, "--epochs", "2", "--resume"]) == 0
    shown = capsys.readouterr()
    assert all(f"entry {number} must name files" in shown.out + shown.err for number in (4, 5, 6, 7))
