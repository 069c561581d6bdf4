"""The photos of a folder in the place of the packaged ones: the library, and every command that takes a sample."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from frd_model import data
from frd_model.cli import main
from frd_model.data.photos import SPLITS
from frd_model.labelled import forged_samples
from frd_model.train import Trainer, TrainingError
from frd_model.train.config import ConfigError, from_dict

TINY = {"options": {"stages": [1, 2], "blocks": 1, "pyramid_width": 8, "trace_widths": [8, 8]}}


def save(path: Path, seed: int, size: tuple[int, int] = (72, 96)) -> np.ndarray:
    """A lossless photo of coloured noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    photo = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(photo).save(path)
    return photo


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two training photos and one of each other split."""
    for seed, name in enumerate(("train/sea.png", "train/Hill.png", "val/tree.png", "heldout/boat.png")):
        save(tmp_path / "set" / name, seed)
    return tmp_path / "set"


def config(output: Path, photos: Path | None) -> dict[str, object]:
    return {
        "output": str(output),
        "epochs": 1,
        "batch_size": 2,
        "model": TINY,
        "data": {
            "photos": None if photos is None else str(photos),
            "crop": 32,
            "samples": 4,
            "val_samples": 2,
        },
    }


def test_a_folder_takes_the_place_of_the_packages(folder: Path) -> None:
    sea = save(folder / "train" / "sea.png", 7)
    found = data.sample_photos("train", folder)
    assert list(found) == ["Hill", "sea"] and np.array_equal(found["sea"], sea)
    assert list(data.sample_photos("heldout", str(folder))) == ["boat"]
    assert list(data.sample_photos("all", folder)) == ["Hill", "boat", "sea", "tree"]


def test_photos_of_one_name_stay_apart(folder: Path) -> None:
    other = save(folder / "val" / "sea.png", 8)
    found = data.sample_photos("all", folder)
    assert list(found) == ["Hill", "boat", "train/sea.png", "val/sea.png", "tree"]
    assert np.array_equal(found["val/sea.png"], other)
    assert list(data.sample_photos("val", folder)) == ["sea", "tree"]


def test_a_folder_that_cannot_be_used(folder: Path) -> None:
    (folder / "val" / "tree.png").rename(folder / "val" / "tree.txt")
    with pytest.raises(
        data.ImageError, match="must hold at least one image, got 1 x file of no image format"
    ):
        data.sample_photos("val", folder)
    with pytest.raises(data.ImageError, match="must be readable, got: No such file"):
        data.sample_photos("train", folder / "train")
    with pytest.raises(data.ImageError, match="path must name a file or directory, got an empty text"):
        data.sample_photos("train", "")
    save(folder / "heldout" / "dot.png", 1, (8, 96))
    with pytest.raises(data.ImageError, match=r"dot\.png' must have sides of at least 32, got 96 x 8"):
        data.sample_photos("heldout", folder)


def test_forgeries_of_a_folder_say_what_they_are_made_of(folder: Path) -> None:
    (folder / "heldout" / "notes.txt").write_text("")
    source = forged_samples("heldout", 1, 0, folder)
    assert f"sample photos heldout of {folder} (boat)" in source.label
    assert "notes.txt" in source.skipped
    assert {sample.name.split("-")[0] for sample in source.samples} == {"boat"}
    save(folder / "heldout" / "boat.png", 3, (64, 64))
    assert source.files != forged_samples("heldout", 1, 0, folder).files != ""
    assert forged_samples("val", 1, 0).files == ""


def test_evaluate_and_forge(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "heldout" / "notes.txt").write_text("")
    out, forged = tmp_path / "figures.json", tmp_path / "forged"
    given = ["--sample", "heldout", "--photos-dir", str(folder)]
    assert main(["evaluate", *given, "--repeats", "1", "--json-out", str(out)]) == 0
    assert f"of {folder} (boat)" in json.loads(out.read_text())["data"]
    assert "notes.txt" in capsys.readouterr().err
    assert main(["forge", *given, "--count", "3", "--out", str(forged)]) == 0
    made = json.loads((forged / "manifest.json").read_text())
    assert {item["host"] for item in made["items"]} == {"boat"}
    assert "notes.txt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "status", "message"),
    [
        (["evaluate", "--images", "x", "--masks", "y"], 2, "--photos-dir goes with --sample, got none"),
        (["forge", "x.png", "--out", "out"], 2, "--photos-dir goes with --sample, got none"),
        (
            ["forge", "--sample", "all", "--out", "out"],
            1,
            "nowhere/heldout' must be readable, got: No such file",
        ),
        (["evaluate", "--sample", "val"], 1, "nowhere/val' must be readable, got: No such file"),
        (["train", "--output", "run"], 1, "nowhere/train' must be readable, got: No such file"),
        (
            ["train", "--data", "casia2:x", "--output", "run"],
            1,
            "data.source must be sample where data.photos is given, got sets",
        ),
    ],
)
def test_errors_are_one_line(
    command: list[str],
    status: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*command, "--photos-dir", "nowhere"]) == status
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0]


def test_train_from_a_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder.rename("elsewhere")
    (tmp_path / "set").symlink_to("elsewhere")
    (tmp_path / "run.yaml").write_text(json.dumps(config(Path("run"), Path("elsewhere"))))
    assert main(["train", "--config", "run.yaml", "--photos-dir", "set"]) == 0
    assert (tmp_path / "run" / "last.safetensors").exists()
    capsys.readouterr()
    # A run goes on by the same path only, as with every other source.
    again = ["train", "--config", "run.yaml", "--epochs", "2", "--resume"]
    assert main(again) == 1
    assert "data.photos was 'set' in the saved run, now 'elsewhere'" in capsys.readouterr().err
    assert main([*again, "--photos-dir", "set"]) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["loss.image=0.2"],
            "loss.image must be above 0 where model.options.image_head is true, and only there",
        ),
        (["model.options={image_head: true}"], "and only there, got 0 and true"),
        (["loss.focal=2"], "loss.bce must be above 0 where loss.focal is, its exponent, got 0 and 2"),
        (
            ["data.forge.kinds={splicing: 1}"],
            "photos must be at least two where splicing is the only kind, got 1",
        ),
        (["data.forge.handoff_scale=[0.5, 1.5]"], "data.forge: handoff_scale must be (low, high), 0 < low"),
    ],
)
def test_train_names_what_cannot_work_before_the_earlier_run_is_removed(
    changes: list[str], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(json.dumps(config(tmp_path / "run", folder)))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last.pt").write_text("an earlier run")
    flags = [part for change in changes for part in ("--set", change)]
    assert main(["train", "--config", str(tmp_path / "run.yaml"), "--overwrite", *flags]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0]
    assert (tmp_path / "run" / "last.pt").read_text() == "an earlier run"


def test_splicing_from_one_photo_removes_no_earlier_forgeries(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [
        "forge",
        str(folder / "val"),
        "--out",
        str(tmp_path / "out"),
        "--count",
        "2",
        "--kinds",
        "splicing",
    ]
    assert main([*given, "--authentic", "1"]) == 0
    before = sorted(file.name for file in (tmp_path / "out" / "images").iterdir())
    assert main([*given, "--overwrite"]) == 1
    assert "photos must be at least two where splicing is the only kind, got 1" in capsys.readouterr().err
    assert sorted(file.name for file in (tmp_path / "out" / "images").iterdir()) == before


def test_training_and_validation_take_their_own_splits(folder: Path, tmp_path: Path) -> None:
    trainer = Trainer(from_dict(config(tmp_path / "run", folder)))
    assert [photo.shape for photo in trainer.train_data.photos] == [(72, 96, 3)] * 2
    assert np.array_equal(trainer.val_data.source.photos[0], data.sample_photos("val", folder)["tree"])
    packaged = Trainer(from_dict(config(tmp_path / "other", None)))
    assert len(packaged.train_data.photos) == len(SPLITS["train"])


def test_flags_that_name_data_replace_the_folder_of_a_configuration(folder: Path, tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        save(tmp_path / "own" / name, 1, (40, 40))
        (tmp_path / "masks").mkdir(exist_ok=True)
        Image.new("L", (40, 40), 255).save(tmp_path / "masks" / name)
    (tmp_path / "run.yaml").write_text(json.dumps(config(tmp_path / "run", folder)))
    own = ["--images", str(tmp_path / "own"), "--masks", str(tmp_path / "masks")]
    assert main(["train", "--config", str(tmp_path / "run.yaml"), *own]) == 0


def test_a_run_does_not_go_on_with_other_photos(folder: Path, tmp_path: Path) -> None:
    values = config(tmp_path / "run", folder)
    Trainer(from_dict(values)).fit()
    save(folder / "train" / "new.png", 9)
    trainer = Trainer(from_dict(values | {"epochs": 2}))
    with pytest.raises(
        TrainingError, match="the training set must hold the files of the saved run, 2 photos"
    ):
        trainer.resume()


def test_a_photo_is_not_in_two_splits(folder: Path, tmp_path: Path) -> None:
    (folder / "val" / "link.png").symlink_to(folder / "train" / "sea.png")
    with pytest.raises(ConfigError, match=r"must not share photos, got 1 in both, the first '.*sea.png'"):
        Trainer(from_dict(config(tmp_path / "run", folder)))
