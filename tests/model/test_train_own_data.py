"""`frd train` on a user's own files: folders and lists of mixed photos, bad files, one-class sets, outputs."""

from __future__ import annotations

import contextlib
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from frd_model import load_model
from frd_model.cli import main
from frd_model.data import images
from frd_model.data.augment import Augmentation
from frd_model.data.dataset import FolderDataset
from frd_model.losses import FORMS, FRDLoss
from frd_model.train import Trainer, TrainingError
from frd_model.train.config import from_dict
from frd_model.train.data import TrainingPairs, collate, split

TINY = {"stages": [1, 2], "blocks": 1, "pyramid_width": 8, "trace_widths": [8, 8]}
SMALL = [
    *("--set", f"model.options={json.dumps(TINY)}"),
    *("--crop", "32", "--batch-size", "2", "--epochs", "1", "--set", "optim.warmup_epochs=0"),
]
# name, mode, width and height: below, at and above a crop of 32, portrait and landscape
MIXED = [
    ("a.jpg", "RGB", 70, 40),
    ("b.png", "L", 33, 57),
    ("c.webp", "RGBA", 20, 32),
    ("d.tif", "I;16", 48, 31),
    ("e.gif", "P", 64, 64),
    ("f.bmp", "1", 9, 45),
]


def write_photo(path: Path, mode: str, width: int, height: int, seed: int = 0) -> None:
    rng = np.random.default_rng([seed, width, height])
    if mode == "I;16":
        image = Image.fromarray(rng.integers(0, 65536, (height, width), np.uint16))
    else:
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).convert(mode)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def write_mask(path: Path, width: int, height: int, kind: str = "both") -> None:
    mask = np.zeros((height, width), np.uint8)
    mask[: math.ceil(height / 2) if kind == "both" else height, : width if kind != "black" else 0] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask).save(path)


def make_set(root: Path, kind: str = "both", photos: Any = MIXED) -> list[str]:
    """Photos and masks below root ("none": no masks, an empty folder); the flags that name them."""
    (root / "masks").mkdir(parents=True)
    for name, mode, width, height in photos:
        write_photo(root / "images" / name, mode, width, height, seed=ord(name[0]))
        if kind != "none":
            write_mask(root / "masks" / f"{name[0]}.png", width, height, kind)
    return ["--images", str(root / "images"), "--masks", str(root / "masks")]


def make_plain(root: Path, count: int, size: int = 40) -> list[str]:
    return make_set(root, photos=[(f"{chr(97 + i)}.png", "RGB", size, size) for i in range(count)])


def as_validation(flags: list[str]) -> list[str]:
    return [flag.replace("--", "--val-") for flag in flags]


def train(output: Path, *flags: str) -> int:
    return main(["train", *SMALL, "--output", str(output), *flags])


def weights(output: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return load_model(output / f"{name}.safetensors").state_dict()


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, second[key]) for key, value in first.items())


def test_mixed_folder_trains_alike_with_and_without_workers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = make_set(tmp_path)
    for workers in ("0", "2"):
        assert train(tmp_path / workers, *flags, "--epochs", "2", "--workers", workers) == 0
        out = capsys.readouterr().out
        assert "training on 5 photos, 5 of them with a mask; validation on 1 photos" in out
        assert "epoch 2/2" in out
        assert f"{tmp_path / workers / 'best.safetensors'}" in out
        assert (tmp_path / workers / "best.safetensors").is_file()
    assert same(weights(tmp_path / "0"), weights(tmp_path / "2"))


@pytest.mark.parametrize("name", ["train_json", "val_json"])
def test_lists(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    make_plain(tmp_path, 4)
    folder = make_plain(tmp_path / "folder", 4)
    entries = [["images/a.png", "masks/a.png"], ["images/b.png", "Negative"], ["images/c.png", "masks/c.png"]]
    (tmp_path / "list.json").write_text(json.dumps(entries))
    flags = ["--json", str(tmp_path / "list.json"), *as_validation(folder)]
    if name == "val_json":
        flags = [*folder, "--val-json", str(tmp_path / "list.json")]
    assert train(tmp_path / "run", *flags) == 0
    out = capsys.readouterr().out
    assert "on 3 photos, 2 of them with a mask" in out
    assert "on 4 photos, 4 of them with a mask" in out
    assert ("false_alarm" in out) == (name == "val_json")


def test_sub_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part in ("x", "y"):
        write_photo(tmp_path / "images" / part / "a.png", "RGB", 40, 40)
        write_mask(tmp_path / "masks" / part / "a.png", 40, 40)
    flags = ["--images", str(tmp_path / "images"), "--masks", str(tmp_path / "masks")]
    assert train(tmp_path / "run", *flags) == 1
    assert "must hold at least one photo" in capsys.readouterr().err
    assert train(tmp_path / "run", *flags, "--recursive") == 0


@pytest.mark.parametrize("kind", ["none", "black", "white"])
def test_a_set_that_cannot_choose_is_said_before_training(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags, held = make_set(tmp_path / "data", kind), make_set(tmp_path / "val", kind)
    said: list[str] = []
    epoch = Trainer._train_epoch

    def note(self: Trainer, board: Any) -> dict[str, float]:
        said.append(capsys.readouterr().err)
        return epoch(self, board)

    monkeypatch.setattr(Trainer, "_train_epoch", note)
    run = tmp_path / "run"
    assert train(run, *flags, *as_validation(held), "--epochs", "2") == 0
    assert "no best checkpoint can be chosen" in said[0]
    assert ("no training photo has a mask" in said[0]) == (kind == "none")
    out = capsys.readouterr().out
    assert not (run / "best.safetensors").exists()
    assert "best.safetensors" not in out
    assert str(run / "last.safetensors") in out
    assert all(torch.isfinite(value).all() for value in weights(run).values())


def test_inverted_masks_are_warned_of_and_can_be_turned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = make_plain(tmp_path, 3)
    for path in (tmp_path / "masks").iterdir():
        mask = np.full((40, 40), 255, np.uint8)
        mask[:8, :8] = 0
        Image.fromarray(mask).save(path)
    assert train(tmp_path / "run", *flags) == 0
    assert "training set: 2 of 2 masks read mark more than half" in capsys.readouterr().err
    turned = ["--set", "data.invert_masks=true", "--overwrite"]
    assert train(tmp_path / "run", *flags, *turned) == 0
    assert "more than half" not in capsys.readouterr().err


def test_undefined_figures_never_choose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = iter(
        [
            {"val/auc": math.nan, "val/permute_f1": 0.5},
            {},
            {"val/auc": math.nan},
            {"val/auc": 0.2, "val/permute_f1": 0.4},
            {"val/auc": 0.9, "val/permute_f1": math.inf},
        ]
    )
    flags = make_plain(tmp_path, 2)
    trainer = Trainer(configuration(tmp_path / "run", flags, epochs=5))
    monkeypatch.setattr(trainer, "validate", lambda board=None: next(figures))
    bests = []
    for _ in range(5):
        trainer.fit(stop_after=1)
        bests.append(trainer.best)
    assert bests == [0.5, 0.5, 0.5, 0.5, 0.9]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("marked", [0.0, 1.0])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_one_class_batches_have_finite_losses(form: str, marked: float, scale: float) -> None:
    for sign in (-1.0, 1.0):
        logits = (sign * scale * torch.rand(2, 1, 32, 32)).requires_grad_()
        loss = FRDLoss(form, bce_weight=1.0)(logits, torch.full((2, 1, 32, 32), marked))["total"]
        loss.backward()
        assert torch.isfinite(loss)
        assert logits.grad is not None
        assert torch.isfinite(logits.grad).all()


def configuration(output: Path, flags: list[str], **changes: Any) -> Any:
    values: dict[str, Any] = {
        "output": str(output),
        "epochs": 1,
        "batch_size": 2,
        "model": {"options": TINY},
        "data": {"source": "folder", "crop": 32, "train_images": flags[1], "train_masks": flags[3]},
    }
    values["data"] |= changes.pop("data", {})
    return from_dict(values | changes)


STILL: dict[str, Any] = dict.fromkeys(("flip", "turn", "colour", "blur", "jpeg"), 0.0)


def traced(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """A photo whose first channel is its mask and whose others number the pixels, so that every pixel is known."""
    mask = np.random.default_rng(0).random((height, width)) > 0.5
    rows, columns = np.mgrid[:height, :width].astype(np.uint8)
    return np.stack([np.where(mask, 255, 0).astype(np.uint8), rows, columns], axis=2), mask


def test_crops_are_cut_at_the_photos_own_scale() -> None:
    image, mask = traced(60, 90)
    places = set()
    for seed in range(20):
        crop, marked = Augmentation(32, **STILL)(image, mask, seed)
        top, left = (int(value) for value in crop[0, 0, 1:])
        assert np.array_equal(crop, image[top : top + 32, left : left + 32])
        assert np.array_equal(marked, mask[top : top + 32, left : left + 32])
        places.add((top, left))
    assert len(places) > 15


@pytest.mark.parametrize("size", [(1, 1), (7, 90), (31, 5), (20, 31)])
def test_small_photos_are_continued_by_reflection(size: tuple[int, int]) -> None:
    image, mask = traced(*size)
    crop, marked = Augmentation(32, **STILL)(image, mask, 3)
    assert crop.shape == (32, 32, 3)
    assert np.array_equal(marked, crop[..., 0] > 127)
    # Neighbours in the crop are neighbours in the photo: nothing was resized, and no edge was made.
    for channel, axis in ((1, 0), (2, 1)):
        steps = np.abs(np.diff(crop[..., channel].astype(int), axis=axis))
        assert (steps == (1 if size[axis] > 1 else 0)).all()


@pytest.mark.parametrize("change", ["flip", "turn"])
def test_mask_and_photo_move_together(change: str) -> None:
    image, mask = traced(32, 32)
    made = [Augmentation(32, **(STILL | {change: 1.0}))(image, mask, seed) for seed in range(12)]
    assert all(np.array_equal(marked, crop[..., 0] > 127) for crop, marked in made)
    found = {crop.tobytes() for crop, _ in made}
    wanted = {"flip": [image[:, ::-1]], "turn": [np.rot90(image, k) for k in (1, 2, 3)]}[change]
    assert found == {np.ascontiguousarray(one).tobytes() for one in wanted}


@pytest.mark.parametrize("change", ["colour", "blur", "jpeg"])
def test_changes_of_the_look_leave_the_mask(change: str) -> None:
    image, mask = traced(32, 32)
    state = torch.get_rng_state()
    augmentation = Augmentation(32, **(STILL | {change: 1.0}))
    crop, marked = augmentation(image, mask, 5)
    assert np.array_equal(marked, mask)
    assert crop.dtype == np.uint8
    assert not np.array_equal(crop, image)
    assert np.array_equal(crop, augmentation(image, mask, 5)[0])
    assert not np.array_equal(crop, augmentation(image, mask, 6)[0])
    assert torch.equal(state, torch.get_rng_state())


def test_a_sample_depends_on_seed_epoch_and_index_alone(tmp_path: Path) -> None:
    flags = make_plain(tmp_path, 2)

    def samples(seed: int, epoch: int, workers: int = 0) -> list[torch.Tensor]:
        data = TrainingPairs(FolderDataset(flags[1], flags[3]), Augmentation(32, jpeg=1.0, blur=1.0), seed)
        data.set_epoch(epoch)
        torch.manual_seed(workers)
        loader = DataLoader(
            data,
            num_workers=workers,
            collate_fn=collate,
            multiprocessing_context="spawn" if workers else None,
        )
        return [image for image, _, _ in loader]

    first = torch.cat(samples(1, 1))
    assert torch.equal(first, torch.cat(samples(1, 1, workers=1)))
    assert not torch.equal(first, torch.cat(samples(1, 2)))
    assert not torch.equal(first, torch.cat(samples(2, 1)))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_breaks_is_named_counted_and_replaced(
    tmp_path: Path, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = make_plain(tmp_path, 6)
    settings = {"epochs": 2, "workers": workers, "data": {"val_share": 0.2}}
    trainer = Trainer(configuration(tmp_path / "run", flags, **settings))
    broken = trainer.train_data.pairs.pairs[0]
    broken.image.write_bytes(broken.image.read_bytes()[:60])
    sizes = []
    step = trainer._step
    trainer._step = lambda image, mask: (sizes.append(len(image)), step(image, mask))[1]  # type: ignore[method-assign]
    trainer.fit()
    err = capsys.readouterr().err
    assert err.count(str(broken.image)) == 1
    assert "(1 of 5 training photos)" in err
    assert sizes == [2, 2, 1, 2, 2, 1]
    assert trainer.bad["training"] == {str(broken.image)}

    wrong = trainer.train_data.pairs.pairs[1]
    assert wrong.mask is not None
    write_mask(wrong.mask, 11, 40)
    trainer = Trainer(configuration(tmp_path / "more", flags, **settings))
    with pytest.raises(
        TrainingError, match=r"2 of 5 training photos cannot be used, more than data\.max_bad"
    ):
        trainer.fit()
    assert str(wrong.mask) in capsys.readouterr().err
    Trainer(configuration(tmp_path / "half", flags, data={"max_bad": 0.5, "val_share": 0.2})).fit()
    with pytest.raises(TrainingError, match="1 of 5 training photos"):
        Trainer(configuration(tmp_path / "none", flags, data={"max_bad": 0.0, "val_share": 0.2})).fit()


def test_names_that_are_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Photos, one of them damaged, and folders whose names are not UTF-8, with resuming."""
    root = tmp_path / os.fsdecode(b"set\xff")
    flags = make_plain(root, 5)
    for file in [*root.glob("images/*"), *root.glob("masks/*")]:
        file.rename(file.with_name(os.fsdecode(b"\xff" + os.fsencode(file.name))))
    assert train(tmp_path / "run", *flags) == 0
    broken = next(iter(Trainer(configuration(tmp_path / "x", flags)).train_data.pairs.pairs)).image
    broken.write_bytes(b"broken")
    assert train(tmp_path / "run", *flags, "--resume", "--epochs", "2") == 0
    err = capsys.readouterr().err
    assert "\\udcff" in err and "(1 of 4 training photos)" in err


def test_a_photo_too_large_for_the_memory_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = make_plain(tmp_path, 5)
    large = Trainer(configuration(tmp_path / "x", flags)).train_data.pairs.pairs[0].image

    @contextlib.contextmanager
    def opened(path: Path, *args: Any, opener: Any = images.open_image) -> Any:
        with opener(path, *args) as image:
            if str(path) == str(large):
                raise MemoryError
            yield image

    monkeypatch.setattr(images, "open_image", opened)
    assert train(tmp_path / "run", *flags) == 0
    reason = f"image {str(large)!r} must fit into memory, got out of memory"
    assert f"skipped {reason} (1 of 4 training photos)" in capsys.readouterr().err
    assert FolderDataset(flags[1], flags[3]).check() == [reason]


def test_missing_files_of_a_list_are_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_plain(tmp_path, 5)
    entries = [[f"images/{name}.png", f"masks/{name}.png"] for name in "abcd"]
    (tmp_path / "train.json").write_text(json.dumps([*entries, ["images/gone.png", "Negative"]]))
    (tmp_path / "val.json").write_text(json.dumps([["images/e.png", "masks/e.png"]]))
    lists = ["--json", str(tmp_path / "train.json"), "--val-json", str(tmp_path / "val.json")]
    assert train(tmp_path / "run", *lists) == 0
    err = capsys.readouterr().err
    assert "entry 4 must name files" in err and "(1 of 5 training photos)" in err


def test_bad_validation_files_are_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = make_plain(tmp_path / "train", 2)
    other = make_plain(tmp_path / "val", 2)
    (tmp_path / "val" / "images" / "a.png").write_bytes(b"broken")
    assert train(tmp_path / "run", *flags, *as_validation(other), "--epochs", "2") == 0
    assert "(1 of 2 validation photos)" in capsys.readouterr().err
    (tmp_path / "val" / "masks" / "b.png").unlink()
    (tmp_path / "val" / "images" / "b.png").write_bytes(b"broken")
    assert train(tmp_path / "run", *flags, *as_validation(other), "--overwrite") == 1
    assert "2 of 2 validation photos cannot be used" in capsys.readouterr().err


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    flags = make_set(tmp_path / "data")
    assert train(tmp_path / "whole", *flags, "--epochs", "3", "--ema", "0.9") == 0
    assert train(tmp_path / "parts", *flags, "--epochs", "3", "--ema", "0.9", "--stop-after", "1") == 0
    # Without --config the run's own configuration holds.
    assert main(["train", "--output", str(tmp_path / "parts"), "--resume", "--workers", "1"]) == 0
    for name in ("last", "best"):
        assert same(weights(tmp_path / "whole", name), weights(tmp_path / "parts", name))


def test_a_second_run_needs_resume_or_overwrite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags, run = make_plain(tmp_path / "data", 3), tmp_path / "run"
    assert train(run, *flags) == 0
    before = weights(run)
    assert train(run, *flags, "--seed", "1") == 1
    err = capsys.readouterr().err
    assert "--resume" in err
    assert "--overwrite" in err
    assert same(before, weights(run))
    assert train(run, *flags, "--resume") == 0
    assert "all 1 epochs are done" in capsys.readouterr().out
    assert same(before, weights(run))
    (run / "notes.txt").write_text("mine")
    assert train(run, *flags, "--seed", "1", "--overwrite") == 0
    assert not same(before, weights(run))
    assert (run / "notes.txt").exists()
    assert len(list((run / "tensorboard").iterdir())) == 1


def test_a_finished_run_can_be_extended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags, run = make_plain(tmp_path / "data", 3), tmp_path / "run"
    assert train(run, *flags, "--epochs", "2") == 0
    assert train(run, *flags, "--epochs", "4", "--resume") == 0
    out = capsys.readouterr().out
    assert "4 epochs instead of 2" in out
    assert "epoch 3/4" in out
    assert "epoch 4/4" in out
    assert train(run, *flags, "--epochs", "3", "--resume") == 1
    assert "epochs must be at least the 4 that are done, got 3" in capsys.readouterr().err


def test_a_changed_setting_is_named_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags, run = make_plain(tmp_path / "data", 3), tmp_path / "run"
    assert train(run, *flags) == 0
    capsys.readouterr()
    assert train(run, *flags, "--resume", "--set", "data.augment.flip=0.25", "--epochs", "2") == 1
    assert (
        capsys.readouterr().err
        == "frd train: cannot resume: data.augment.flip was 0.5 in the saved run, now 0.25\n"
    )
    write_photo(tmp_path / "data" / "images" / "new.png", "RGB", 40, 40)
    assert train(run, *flags, "--resume", "--epochs", "2") == 1
    assert "the training set must hold the files of the saved run, 2 photos" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["file", "file/below"])
def test_outputs_that_cannot_be_written(
    tmp_path: Path, where: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = make_plain(tmp_path / "data", 2)
    (tmp_path / "file").write_text("here")
    monkeypatch.setattr(
        Trainer, "_train_epoch", lambda *_: pytest.fail("trained before the output was tried")
    )
    assert train(tmp_path / where, *flags) == 1
    err = capsys.readouterr().err
    assert f"output {str(tmp_path / where)!r} must be a directory to write to" in err
    assert err.count("\n") == 1
    assert (tmp_path / "file").read_text() == "here"


def test_validation_predicts_large_photos_in_tiles(tmp_path: Path) -> None:
    flags = make_plain(tmp_path / "train", 2)
    large = make_set(tmp_path / "val", photos=[("a.png", "RGB", 1200, 900)])
    trainer = Trainer(
        configuration(tmp_path, flags, data={"val_images": large[1], "val_masks": large[3]}, images_logged=1)
    )
    sides: list[int] = []
    trainer.model.register_forward_pre_hook(lambda _, inputs: sides.append(max(inputs[0].shape[2:])))
    figures = trainer.validate()
    assert max(sides) == 512
    assert trainer.model.training
    assert figures["val/images"] == 1
    assert 0 < figures["val/auc"] < 1


def test_held_out_photos(tmp_path: Path) -> None:
    flags = make_plain(tmp_path, 20)
    for name in "abcdefghij":
        (tmp_path / "masks" / f"{name}.png").unlink()
    pairs = FolderDataset(flags[1], flags[3], allow_authentic=True)
    training, validation = split(pairs, 0.2, seed=1)
    assert sorted([*training.pairs, *validation.pairs]) == sorted(pairs.pairs)
    assert [sum(pair.mask is None for pair in part.pairs) for part in (training, validation)] == [8, 2]
    assert [len(training), len(validation)] == [16, 4]
    assert split(pairs, 0.2, seed=1)[1].pairs == validation.pairs
    assert split(pairs, 0.2, seed=2)[1].pairs != validation.pairs


def test_one_photo_cannot_be_divided(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = make_plain(tmp_path / "data", 1)
    assert train(tmp_path / "run", *flags) == 1
    assert "give data.val_images and data.val_masks" in capsys.readouterr().err
    assert train(tmp_path / "run", *flags, *as_validation(flags)) == 1
    shared = str(tmp_path / "data" / "images" / "a.png")
    assert f"must not share photos, got 1 in both, the first {shared!r}" in capsys.readouterr().err
    assert train(tmp_path / "run", *flags, *as_validation(make_plain(tmp_path / "val", 1))) == 0


def test_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    make_plain(tmp_path / "data", 2)
    (tmp_path / "c.yaml").write_text(
        "data: {train_images: ~/data/images, train_masks: ~/data/masks, source: folder}"
    )
    assert main(["train", *SMALL, "--config", "~/c.yaml", "--output", "~/run"]) == 0
    assert (tmp_path / "run" / "last.safetensors").is_file()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lr", "abc"], "--lr"),
        (["--epochs", "1.5"], "--epochs"),
        (["--bogus"], "--bogus"),
        (["--resume", "--overwrite"], "--overwrite"),
        (["--set", "optim.betas=["], "optim.betas is not valid YAML"),
        (["--set", "seed=2020-13-45"], "seed is not valid YAML"),
        (["--set", "optim.betas=0.9"], "optim.betas must be a list of 2"),
        (["--set", "optim.betas=[0.9, 1.0]"], "optim.betas must be two values in [0, 1), got [0.9, 1.0]"),
        (["--set", "crop=3"], "unknown key crop"),
        (["--set", "optim"], "must look like name=value"),
        (["--config", "missing.yaml"], "missing.yaml must be a readable file"),
        (["--seed", "-1"], "seed must be between 0 and 4294967295, got -1"),
        (["--seed", "4294967296"], "seed must be between"),
        (["--set", "data.val_seed=-3"], "data.val_seed must be between"),
        (["--lr", "nan"], "optim.lr must be positive"),
        (["--lr", "inf"], "optim.lr must be positive"),
        (["--lr", "1e-9"], "optim.min_lr must be at most optim.lr (1e-09)"),
        (["--set", "optim.min_lr=-1"], "optim.min_lr must be"),
        (["--set", "optim.warmup_epochs=-1"], "optim.warmup_epochs must be"),
        (["--set", "optim.clip_norm=-1"], "optim.clip_norm must be"),
        (["--set", "optim.weight_decay=.nan"], "optim.weight_decay must be"),
        (["--ema", "1"], "optim.ema must be"),
        (["--set", "loss.form=dice"], "loss.form must be one of paper, released"),
        (["--set", "loss.bce=.inf"], "loss.bce must be"),
        (["--set", "images_logged=-1"], "images_logged must be"),
        (["--workers", "-1"], "workers must be"),
        (["--crop", "31"], "data.crop must be between 32 and 8192, got 31"),
        (["--set", "data.samples=0"], "data.samples must be"),
        (["--set", "data.val_samples=0"], "data.val_samples must be"),
        (["--set", "data.zoom=[2, 1]"], "data.zoom must be two rising values"),
        (["--set", "data.zoom=[0, .inf]"], "data.zoom must be two rising values"),
        (["--set", "data.colour=1.5"], "data.colour must be"),
        (["--set", "data.focus=-0.1"], "data.focus must be"),
        (["--set", "data.max_bad=1"], "data.max_bad must be"),
        (["--set", "data.val_share=0"], "data.val_share must be"),
        (["--set", "data.augment.jpeg=2"], "data.augment.jpeg must be"),
        (["--set", "data.augment.jpeg_quality=[0, 90]"], "data.augment.jpeg_quality must be"),
        (["--set", "data.forge.jpeg_history=7"], "data.forge: jpeg_history must be in [0, 1], got 7"),
        (["--set", "data.forge.area=3"], "data.forge.area must be a list of 2"),
        (["--stop-after", "0"], "--stop-after must be at least 1"),
        (["--max-minutes", "nan"], "--max-minutes must be positive"),
        (["--output", " "], "output must be the name of a directory"),
        (["--output", os.fsdecode(b"run\xff")], "output must be the name of a directory, in UTF-8, got"),
        (
            ["--images", "x", "--masks", "y", "--set", "data.forge={nosuch: 1}"],
            "unknown key data.forge.nosuch",
        ),
        (["--images", "", "--masks", ""], "path must name a file or directory, got an empty text"),
        (["--device", "meta"], "device must be one that torch can use here, got 'meta'"),
        (["--images", "x"], "data.train_masks must be given"),
        (["--val-masks", "x"], "data.val_images and data.val_masks must be given together"),
        (["--json", "x", "--images", "y"], "exclude"),
        (["--set", "data.train_json=x"], "data.source must be json where data.train_json is given"),
        (["--set", "data=3"], "data must be a section"),
        (["--set", "model.options={1: 2}"], "model.options must have names as keys, got {1: 2}"),
    ],
)
def test_wrong_settings_are_one_line(
    tmp_path: Path,
    flags: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        status = main(["train", *flags])
    except SystemExit as error:
        status = int(error.code or 0)
    err = capsys.readouterr().err
    assert status == (2 if "--help" in err else 1)
    assert message in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())
