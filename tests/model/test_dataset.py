import argparse
import json

import numpy as np
import pytest
import torch

from frd_model.cli import data as check_command
from frd_model.data import photos
from frd_model.data.dataset import DatasetError, FolderDataset, ForgeryDataset, JsonDataset, ManiDataset
from frd_model.data.images import ImageError, write_jpeg, write_png
from frd_model.data.transforms import (
    MEAN,
    STD,
    random_focus,
    random_look,
    random_view,
    resize,
    to_image,
    to_tensor,
)


def photo(seed=0, height=80, width=100):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def square_mask(height=80, width=100):
    mask = np.zeros((height, width), bool)
    mask[10:30, 20:50] = True
    return mask


def test_normalisation():
    image = photo()
    tensor = to_tensor(image)
    assert tensor.dtype == torch.float32 and tensor.shape == (3, 80, 100)
    for channel in range(3):
        want = (image[:, :, channel] / 255 - MEAN[channel]) / STD[channel]
        np.testing.assert_allclose(tensor[channel].numpy(), want, atol=1e-5)
    np.testing.assert_array_equal(to_image(tensor), image)
    with pytest.raises(ValueError, match=r"image must be uint8 \[H,W,3\], got float64"):
        to_tensor(image.astype(float))


def test_views():
    rng = np.random.default_rng(0)
    for height, width in ((300, 400), (40, 50), (64, 64)):
        for _ in range(6):
            assert random_view(rng, photo(1, height, width), 64).shape == (64, 64, 3)
    assert random_look(rng, photo(), 1.0).shape in ((80, 100, 3), (100, 80, 3))
    image, mask = resize(photo(), square_mask(), (40, 50))
    assert image.shape == (40, 50, 3)
    np.testing.assert_array_equal(mask, square_mask()[::2, ::2])


def test_shallow_depth_of_field_blurs_the_scene_and_keeps_the_noise():
    rng = np.random.default_rng(0)
    height = width = 160
    stripes = np.where(np.arange(width) // 8 % 2 == 0, 80.0, 160.0)
    noise = rng.normal(0, 4, (height, width, 3))
    scene = np.clip(np.rint(stripes[:, None] + noise), 0, 255).astype(np.uint8)
    flat = np.clip(np.rint(120 + noise), 0, 255).astype(np.uint8)
    contrasts = []
    for seed in range(20):
        shown = random_focus(np.random.default_rng(seed), scene)
        assert shown.dtype == np.uint8 and shown.shape == scene.shape
        np.testing.assert_array_equal(shown, random_focus(np.random.default_rng(seed), scene))
        # The mean over the columns of the stripes has next to no noise: contrast in four bands of rows.
        bands = shown.reshape(4, height // 4, width, 3).mean(axis=(1, 3))
        contrasts.append(np.ptp(bands, axis=1) / 80)
        levels = random_focus(np.random.default_rng(seed), flat).reshape(8, 20, 8, 20, 3).std(axis=(1, 3))
        assert levels.min() > 2.5 and levels.max() < 7
    assert np.max(contrasts) > 0.95 and np.min(contrasts) < 0.7


def test_the_share_of_views_with_a_shallow_depth_of_field():
    images = {"a": photo(1, 120, 120), "b": photo(2, 200, 150)}
    plain, never, always = (
        ForgeryDataset(images, size=64, length=8, authentic=1.0, **focus)
        for focus in ({}, {"focus": 0.0}, {"focus": 1.0})
    )
    sharpness = np.array(
        [
            [np.abs(np.diff(s.forgery(i).image.astype(int), axis=1)).mean() for i in range(8)]
            for s in (plain, never, always)
        ]
    )
    assert (sharpness[0] == sharpness[1]).all() and (sharpness[0] != sharpness[2]).all()


def test_forgery_dataset_depends_on_seed_epoch_and_index():
    images = {"a": photo(1, 120, 120), "b": photo(2, 200, 150)}
    first, second = (ForgeryDataset(images, size=64, length=6, seed=3) for _ in range(2))
    backwards = [second[i] for i in reversed(range(6))][::-1]
    for index in range(6):
        image, mask = first[index]
        assert image.shape == (3, 64, 64) and mask.shape == (1, 64, 64)
        assert image.dtype == mask.dtype == torch.float32 and set(mask.unique().tolist()) <= {0.0, 1.0}
        assert torch.equal(image, backwards[index][0]) and torch.equal(mask, backwards[index][1])
    before = first[0][0]
    first.set_epoch(1)
    assert not torch.equal(before, first[0][0])
    first.set_epoch(0)
    assert torch.equal(before, first[0][0])
    assert not torch.equal(before, ForgeryDataset(images, size=64, length=6, seed=4)[0][0])


def test_forgery_dataset_share_of_authentic():
    images = [photo(1, 120, 120)]
    for share, low, high in ((0.0, 0, 0), (0.5, 3, 17), (1.0, 20, 20)):
        data = ForgeryDataset(images, size=32, length=20, authentic=share)
        assert low <= sum(not data[i][1].any() for i in range(20)) <= high


def test_forgery_dataset_prefers_colour():
    grey = [photo(i, 64, 64)[:, :, :1].repeat(3, axis=2) for i in range(2)]
    data = ForgeryDataset([*grey, photo(3), photo(4)], size=32, length=1, colour_weight=3.0)
    assert data._coloured.tolist() == [False, False, True, True]
    assert data._host_weights.tolist() == [1 / 8, 1 / 8, 3 / 8, 3 / 8]
    rng = np.random.default_rng(0)
    donors = [data._donor(rng, 0) for _ in range(200)]
    assert 0 not in donors and donors.count(1) > 130 and {2, 3} < set(donors)
    assert ForgeryDataset([photo(1)], size=32)._donor(rng, 0) is None


def test_forgery_dataset_in_workers():
    data = ForgeryDataset([photo(1, 90, 90), photo(2, 90, 90)], size=32, length=6)
    alone = [data[i][0] for i in range(6)]
    loader = torch.utils.data.DataLoader(data, batch_size=3, num_workers=2, multiprocessing_context="fork")
    assert torch.equal(torch.cat([batch[0] for batch in loader]), torch.stack(alone))


@pytest.fixture
def folders(tmp_path):
    for index, name in enumerate(("b", "a")):
        write_jpeg(tmp_path / "Tp" / f"{name}.jpg", photo(index))
        write_png(tmp_path / "Gt" / f"{name}_gt.png", np.roll(square_mask(), 10 * index, axis=0))
    return tmp_path


def test_folder_pairs_by_name(folders):
    data = ManiDataset(folders)
    assert data.names == ["a.jpg", "b.jpg"] and len(data) == 2
    image, mask = data[0]
    assert image.shape == (3, 80, 100)
    np.testing.assert_array_equal(mask[0].numpy(), np.roll(square_mask(), 10, axis=0))
    np.testing.assert_array_equal(data.load(1)[1], square_mask())
    assert data.check() == []
    assert ManiDataset(folders, size=(32, 48))[0][1].shape == (1, 32, 48)
    inverted = ManiDataset(folders, invert_masks=True)
    assert inverted[1][1].mean() > 0.5
    assert "(inverted?)" in inverted.check()[0]


def test_folder_missing_mask(folders):
    write_jpeg(folders / "Tp" / "c.jpg", photo(3))
    with pytest.raises(DatasetError, match=r"c\.jpg' must have a mask of its name"):
        ManiDataset(folders)
    data = FolderDataset(folders / "Tp", folders / "Gt", allow_authentic=True)
    assert not data[2][1].any()


def test_folder_stray_mask_and_wrong_size(folders):
    write_png(folders / "Gt" / "b_gt.png", square_mask(40, 60))
    data = ManiDataset(folders)
    with pytest.raises(ImageError, match=r"b_gt\.png' must have its photo's size 100 x 80, got 60 x 40"):
        data[1]
    assert len(data.check()) == 1
    write_png(folders / "Gt" / "z.png", square_mask())
    with pytest.raises(DatasetError, match=r"z\.png' must belong to a photo"):
        ManiDataset(folders)
    with pytest.raises(DatasetError, match="must be a directory"):
        ManiDataset(folders / "nowhere")


def test_a_black_mask_is_a_note(folders):
    write_png(folders / "Gt" / "b_gt.png", np.zeros((80, 100), bool))
    report = ManiDataset(folders).inspect()
    assert report.faults == [] and report.untouched == 1
    assert "1 black masks, whose photos count as untouched, the first" in report.notes[0]


def test_twins(folders):
    """The same photo twice is a fault if it was edited; untouched it is a note."""
    entries = [["Tp/a.jpg", "Gt/a_gt.png"], ["Tp/b.jpg", "Negative"], ["Tp/b.jpg", "Negative"]]
    report = JsonDataset(write_list(folders / "list.json", entries)).inspect()
    assert report.faults == [] and "1 untouched photos that occur more than once" in report.notes[0]
    data = JsonDataset(write_list(folders / "list.json", [*entries, entries[0], ["Tp/b.jpg", "Gt/b_gt.png"]]))
    assert [text.split("must")[1] for text in data.check()] == [
        f" occur once, got the same file as {str(folders / 'Tp' / name)!r}" for name in ("a.jpg", "b.jpg")
    ]


def test_inverted_masks(folders):
    assert ManiDataset(folders).inverted_masks() == ""
    write_png(folders / "Gt" / "a_gt.png", ~square_mask())
    line = ManiDataset(folders).inverted_masks()
    assert line.startswith("1 of 2 masks read mark more than half of their photo") and "a_gt.png" in line
    assert ManiDataset(folders, invert_masks=True).inverted_masks().startswith("1 of 2 masks")
    (folders / "Gt" / "b_gt.png").write_bytes(b"no image")
    assert ManiDataset(folders).inverted_masks().startswith("1 of 1 masks")
    assert ManiDataset(folders).inverted_masks(sample=1).startswith("1 of 1 masks")


def check(*flags):
    parser = argparse.ArgumentParser()
    check_command.add_arguments(parser)
    return check_command.run(parser.parse_args(["check", *map(str, flags)]))


def test_check_command(folders, capsys):
    assert check("--mani", folders) == 0
    assert "2 photos, 0 of them untouched, 0 findings" in capsys.readouterr().out
    assert check("--images", folders / "Tp", "--masks", folders / "Gt", "--invert-masks") == 1
    assert capsys.readouterr().out.count("(inverted?)") == 2
    (folders / "Tp" / "c.jpg").write_bytes((folders / "Tp" / "a.jpg").read_bytes())
    flags = ("--images", folders / "Tp", "--masks", folders / "Gt")
    assert check(*flags) == 1
    assert "must have a mask of its name" in capsys.readouterr().err
    assert check(*flags, "--allow-authentic") == 1
    assert "c.jpg' must occur once, got the same file as" in capsys.readouterr().out
    assert check("--images", folders / "Tp") == 2


def write_list(path, value):
    path.write_text(json.dumps(value))
    return path


def test_json(folders):
    entries = [["Tp/b.jpg", "Gt/b_gt.png"], ["Tp/a.jpg", "Negative"]]
    data = JsonDataset(write_list(folders / "list.json", entries))
    assert data.names == ["b.jpg", "a.jpg"]
    assert data[0][1].sum() == 600 and data[1][1].sum() == 0


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({}, "must hold a JSON list of pairs, got dict"),
        ([], "must hold a JSON list of pairs"),
        ([["Tp/a.jpg"]], "entry 0 must be"),
        ([["Tp/a.jpg", "Gt/x.png"]], "entry 0 must name files, got .*x.png"),
    ],
)
def test_json_errors(folders, value, words):
    with pytest.raises(DatasetError, match=words):
        JsonDataset(write_list(folders / "list.json", value))


def test_json_syntax(folders):
    (folders / "list.json").write_text("[ // comment")
    with pytest.raises(DatasetError, match="must be JSON, got"):
        JsonDataset(folders / "list.json")
    with pytest.raises(DatasetError, match="must be a readable file, got: No such file"):
        JsonDataset(folders / "none.json")


def test_sample_photos():
    splits = {name: photos.sample_photos(name) for name in ("train", "val", "heldout")}
    names = [name for split in splits.values() for name in split]
    assert len(set(names)) == len(names) and sorted(names) == list(photos.sample_photos("all"))
    for split in splits.values():
        assert all(p.dtype == np.uint8 and p.shape[2] == 3 and min(p.shape[:2]) > 100 for p in split.values())
    assert {"motorcycle_left", "motorcycle_right"} <= set(splits["train"])
    for name in ("val", "heldout"):
        assert all((p[:, :, 0] != p[:, :, 2]).any() for p in splits[name].values()), "real colour photographs"
    with pytest.raises(ValueError, match="split must be one of train, val, heldout, all, got 'test'"):
        photos.sample_photos("test")


def test_sample_photos_without_the_packages(monkeypatch):
    monkeypatch.setattr(photos.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="pip install scikit-image scikit-learn"):
        photos.sample_photos("val")
