import json

import numpy as np
import pytest

from frd_model.cli import main
from frd_model.data.dataset import FolderDataset
from frd_model.data.forge import Forger
from frd_model.data.forge_options import ALL_METHODS, KINDS, METHODS, SHAPES, UNSEEN, ForgeOptions
from frd_model.data.forged_folder import forge_folder
from frd_model.data.handoff import finish, shrink_mask, view_side
from frd_model.data.images import read_image, read_mask, write_png
from frd_model.data.retouch import FILTERS, blend_gradients, fill_with_patches, warp
from frd_model.data.shapes import follow_content, random_shape
from frd_model.data.traces import add_noise, jpeg, random_history, resample, webp

# Shares of what happens to a photo before and after the edit.
STEPS = (
    "filter_history",
    "jpeg_history",
    "final_filter",
    "handoff",
    "handoff_resize",
    "handoff_crop",
    "final_jpeg",
)
PLAIN = dict.fromkeys(STEPS, 0.0)


def photo(seed=0, height=96, width=128):
    """Smooth colour fields with fine texture, so that every edit can be told from its surroundings."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(30, 220, (height // 16, width // 16, 3)).repeat(16, axis=0).repeat(16, axis=1)
    return np.clip(coarse + rng.normal(0, 6, coarse.shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_region_changes(kind):
    """Without history and feather the pixels outside the mask are the photo's own."""
    forger = Forger(3, ForgeOptions(**PLAIN, hard_border=1.0))
    for seed in range(8):
        host = photo(seed)
        result = forger.forge(host, photo(seed + 50), kind)
        changed = (result.image != host).any(axis=2)
        assert result.kind == kind and result.mask.any()
        assert not changed[~result.mask].any()
        assert changed[result.mask].mean() > 0.5
        assert host.shape == result.image.shape and result.image.dtype == np.uint8


@pytest.mark.parametrize("kind", KINDS)
def test_feather_stays_near_the_mask(kind):
    forger = Forger(4, ForgeOptions(**PLAIN, hard_border=0.0, feather=(1.0, 1.0)))
    host = photo(1)
    result = forger.forge(host, photo(2), kind)
    rows, columns = np.nonzero((result.image != host).any(axis=2) & ~result.mask)
    inside = np.argwhere(result.mask)
    for y, x in zip(rows, columns, strict=True):
        assert np.abs(inside - (y, x)).max(axis=1).min() <= 6


def test_same_seed_same_bytes():
    def run(seed):
        forger = Forger(seed)
        made = [forger.forge(photo(i), photo(i + 9)) for i in range(6)] + [forger.authentic(photo(7))]
        return [(m.image.tobytes(), m.mask.tobytes(), json.dumps(m.parameters), m.kind) for m in made]

    assert run(5) == run(5)
    assert run(5) != run(6)


def test_authentic_has_no_mask_but_the_same_processing():
    forger = Forger(0)
    results = [forger.authentic(photo(i)) for i in range(20)]
    assert not any(r.mask.any() for r in results)
    assert {r.kind for r in results} == {"authentic"}
    assert any("jpeg" in r.parameters["final"] for r in results)
    assert any(r.parameters["history"] for r in results)
    same = [r.image.shape == photo(i).shape and (r.image == photo(i)).all() for i, r in enumerate(results)]
    assert any(same), "some photos stay as they are"
    assert any(r.image.shape != photo().shape for r in results), "some are smaller"


def test_flat_photos_still_give_a_forgery():
    flat = np.full((64, 64, 3), 90, np.uint8)
    for kind in KINDS:
        assert Forger(1).forge(flat, flat, kind).mask.any()


@pytest.mark.parametrize("kind", ["copy_move", "removal"])
def test_edits_that_change_nothing_are_drawn_again(kind):
    """Half of the photo is clear sky, where a removal or a copy of more sky leaves nothing to find."""
    host = photo(3)
    host[:, :64] = 120
    options = ForgeOptions(**PLAIN, hard_border=1.0, local_trace=0.0, colour=0.0, follow_content=0.0)
    changes = []
    for seed in range(30):
        result = Forger(seed, options).forge(host, None, kind)
        changes.append(np.abs(result.image.astype(int) - host)[result.mask].mean())
    assert sum(change < 4 for change in changes) <= 2


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_cover_the_asked_area(shape):
    rng = np.random.default_rng(2)
    shares = [random_shape(rng, (120, 160), (0.02, 0.30), shape).mean() for _ in range(60)]
    assert min(shares) > 0.008 and max(shares) < 0.33
    assert max(shares) > 0.15 and len(set(shares)) > 40


def test_regions_lie_anywhere():
    """A pixel at the frame is edited as often as one in the middle; without `cut_by_frame` it almost never is."""
    rng = np.random.default_rng(0)
    for cut, low, high in ((True, 0.8, 1.25), (False, 0.0, 0.3)):
        masks = [random_shape(rng, (64, 64), (0.02, 0.30), None, cut) for _ in range(4000)]
        share = np.mean(masks, axis=0)
        rim = np.mean([share[0], share[-1], share[:, 0], share[:, -1]])
        assert low < rim / share[24:40, 24:40].mean() < high
        assert min(mask.mean() for mask in masks) > 0.01


def test_follow_content_finds_an_object():
    """A bright disc on a dark ground, in a region with room around it, by both methods."""
    image = np.full((96, 96, 3), 40, np.uint8)
    rows, columns = np.indices((96, 96)) - 48
    disc, region = np.hypot(rows, columns) < 26, np.hypot(rows, columns) < 34
    image[disc] = (220, 200, 60)
    image = add_noise(np.random.default_rng(0), image, 3.0)
    found = [follow_content(np.random.default_rng(seed), image, region) for seed in range(24)]
    found = [part for part in found if part is not None]
    overlap = [(part & disc).sum() / (part | disc).sum() for part in found]
    assert len(found) >= 12 and np.mean(np.array(overlap) > 0.85) > 0.6


@pytest.mark.parametrize("method", ALL_METHODS)
def test_methods(method):
    """Each operation is made when it alone is asked for, and is named in the record."""
    kind = next(k for k in KINDS if method in METHODS[k])
    options = ForgeOptions(methods=(method,), kinds={kind: 1.0})
    made = Forger(2, options).forge(photo(1), photo(2), kind)
    assert (made.kind, made.parameters["method"]) == (kind, method) and made.mask.any()


def test_unseen_methods_are_drawn_on_request_only():
    drawn = {Forger(i).forge(photo(i), photo(i + 1), "retouch").parameters["method"] for i in range(60)}
    assert drawn == set(METHODS["retouch"]) - set(UNSEEN)


def test_retouches():
    image, rng = photo(1), np.random.default_rng(0)
    for name, filter_ in FILTERS.items():
        done, record = filter_(rng, image)
        assert done.shape == image.shape and done.dtype == np.uint8 and (done != image).any() and record, name
    region = np.zeros(image.shape[:2], np.bool_)
    region[20:70, 30:90] = True
    done, _ = warp(rng, image, region)
    assert (done[~region] == image[~region]).all() and (done != image).any()


def test_gradients_are_blended_in_place():
    """A source that is the photo itself plus a constant gives the photo back: its gradients are the same."""
    under = photo(4)
    region = np.zeros(under.shape[:2], np.bool_)
    region[:40, 50:100] = True
    source = np.clip(under.astype(int) + 25, 0, 255).astype(np.uint8)
    done = blend_gradients(source, under, region)
    inner = np.zeros_like(region)
    inner[8:32, 58:92] = True
    assert (
        np.abs(done.astype(int) - under)[inner].mean() < 6 < np.abs(source.astype(int) - under)[inner].mean()
    )


@pytest.mark.parametrize("extent", [(1, 1), (2, 30), (30, 2), (3, 3), (96, 128)])
def test_gradients_of_thin_and_full_regions(extent):
    region = np.zeros((96, 128), np.bool_)
    region[: extent[0], : extent[1]] = True
    assert blend_gradients(photo(5), photo(4), region).shape == (96, 128, 3)


def test_patches_continue_a_pattern():
    """Stripes: a hole is filled by whole patches of stripes, not by a smooth mean."""
    image = np.where(np.indices((96, 96))[1][..., None] % 8 < 4, 30, 220).astype(np.uint8).repeat(3, axis=2)
    hole = np.zeros((96, 96), np.bool_)
    hole[40:64, 30:60] = True
    done = fill_with_patches(np.random.default_rng(0), image, hole, candidates=64)
    assert (done[~hole] == image[~hole]).all()
    assert done[hole].std() > 60


def test_handoff_sizes():
    """The result has the size that is asked for, its mask too, and an edit stays in sight."""
    rng = np.random.default_rng(0)
    options = ForgeOptions(handoff=1.0, handoff_resize=1.0, handoff_crop=1.0, webp=0.5)
    records = []
    for _ in range(30):
        side = view_side(rng, 64, options)
        mask = np.zeros((side, side), np.bool_)
        mask[0, :] = True
        image, cut, record = finish(
            rng, photo(1, 16 * -(-side // 16), 160)[:side, :side], mask, options, (64, 64)
        )
        assert image.shape == (64, 64, 3) and cut.shape == (64, 64) and cut.any()
        records.append(record)
    encoders = {next(k for k in ("webp", "jpeg") if k in r["handoff"]) for r in records}
    assert encoders == {"webp", "jpeg"} and any("resize" in r for r in records)
    smaller = finish(rng, photo(1), np.zeros((96, 128), np.bool_), options)[0]
    assert smaller.shape[0] < 96 and smaller.shape[1] < 128


def test_a_thin_edit_survives_a_smaller_size():
    mask = np.zeros((80, 80), np.bool_)
    mask[:, 41] = True
    small = shrink_mask(mask, (20, 20))
    assert small.sum() == 20 and small[:, 10].all()
    assert not shrink_mask(np.zeros((80, 80), np.bool_), (20, 20)).any()


def test_webp():
    errors = [np.abs(webp(photo(1), q).astype(int) - photo(1)).mean() for q in (30, 95)]
    assert errors[0] > errors[1] > 0


def test_kinds_follow_their_weights():
    options = ForgeOptions(kinds={"copy_move": 1.0, "removal": 3.0})
    kinds = [Forger(i, options).forge(photo(1)).kind for i in range(60)]
    assert 8 <= kinds.count("copy_move") <= 25 and set(kinds) == {"copy_move", "removal"}


def test_traces():
    image, rng = np.full((64, 64, 3), 128, np.uint8), np.random.default_rng(0)
    assert add_noise(rng, image, 4.0).std() == pytest.approx(4, rel=0.05)
    mono = add_noise(rng, image, 4.0, mono=True)
    assert (mono[:, :, 0] == mono[:, :, 2]).all() and mono.std() == pytest.approx(4, rel=0.1)
    textured = photo(0)
    assert resample(textured, 0.5).shape == textured.shape
    steps = np.abs(np.diff(jpeg(textured, 10, "444", (0, 3)).astype(float), axis=1)).mean(axis=(0, 2))
    assert (steps[4::8].mean() > 1.2 * steps).mean() > 0.5, "block borders lie where the grid was shifted to"
    record = random_history(rng, textured, 1.0, 1.0, (70, 70))[1]
    assert record["jpeg"] == 70 and len(record) > 3


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: Forger().forge(photo()[:, :, 0]), ValueError, r"photo must be uint8 \[H,W,3\]"),
        (lambda: Forger().forge(photo()[:31]), ValueError, "sides of at least 32, got uint8"),
        (lambda: Forger().forge([[1]]), TypeError, "photo must be a NumPy array, got list"),
        (lambda: Forger().forge(photo(), kind="splicing"), ValueError, "donor must be given"),
        (lambda: Forger().forge(photo(), kind="paint"), ValueError, "kind must be one of .*, got 'paint'"),
        (lambda: ForgeOptions(kinds={"paint": 1}), ValueError, "kinds must give weights"),
        (lambda: ForgeOptions(area=(0.3, 0.1)), ValueError, "area must be .* 0 < low <= high <= 0.9, got"),
        (lambda: ForgeOptions(final_quality=(0, 50)), ValueError, "final_quality must be .* 1 <= low"),
        (
            lambda: ForgeOptions(handoff_scale=(0.5, 1.5)),
            ValueError,
            "handoff_scale must be .* high <= 1, got",
        ),
        (lambda: ForgeOptions(handoff_scale=(0.0, 0.5)), ValueError, "handoff_scale must be .* 0 < low"),
        (lambda: ForgeOptions(feather=(0.0, 0.0)), ValueError, "feather must be"),
        (lambda: ForgeOptions(scale=(1.0, float("inf"))), ValueError, "scale must be"),
        (lambda: ForgeOptions(webp=2.0), ValueError, r"webp must be in \[0, 1\], got 2.0"),
        (lambda: ForgeOptions(methods=("paint",)), ValueError, "methods must be some of"),
        (
            lambda: ForgeOptions(methods=("warp",)),
            ValueError,
            "methods must hold one of paste, poisson for splicing",
        ),
        (lambda: ForgeOptions(shapes=("star",)), ValueError, "shapes must be some of"),
    ],
)
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call()


def content(root):
    return {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.mark.parametrize("extension", ["png", "jpg"])
def test_folder(tmp_path, extension):
    photos = {"a b": photo(1), "c": photo(2), "d": photo(3)}
    options = {"seed": 4, "size": 64, "authentic": 0.3, "extension": extension}
    items = forge_folder(photos, tmp_path / "one", 8, **options)
    forge_folder(photos, tmp_path / "two", 8, **options)
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert json.loads((tmp_path / "one" / "manifest.json").read_text())["items"] == items
    assert {item["host"] for item in items} == set(photos)
    for item in items:
        image = read_image(tmp_path / "one" / item["image"])
        mask = read_mask(tmp_path / "one" / item["mask"], image.shape[:2])
        assert image.shape == (64, 64, 3) and mask.any() == (item["kind"] != "authentic")
        assert (item["donor"] is not None) == (item["kind"] == "splicing") and item["donor"] != item["host"]


def command(*flags):
    return main(["forge", *flags])


def test_command(tmp_path, capsys):
    write_png(tmp_path / "in" / "a.png", photo(1))
    write_png(tmp_path / "in" / "b.png", photo(2))
    out = str(tmp_path / "out")
    assert command(str(tmp_path / "in"), "--out", out, "--count", "3", "--kinds", "removal") == 0
    assert len(list((tmp_path / "out" / "masks").iterdir())) == 3
    flags = ("--out", out + "5", "--count", "4", "--methods", "warp", "smooth")
    assert command(str(tmp_path / "in"), *flags) == 0
    assert command(str(tmp_path / "in"), "--out", out + "6", "--count", "4", "--max-side", "64") == 0
    sizes = [read_image(file).shape for file in (tmp_path / "out6" / "images").iterdir()]
    assert max(max(size) for size in sizes) <= 64
    items = json.loads((tmp_path / "out5" / "manifest.json").read_text())["items"]
    assert {item["kind"] for item in items} == {"retouch"}
    assert {item["parameters"]["method"] for item in items} <= {"warp", "smooth"}
    (tmp_path / "in" / "c.png").write_text("no image")
    assert command(str(tmp_path / "in"), "--out", out + "2", "--count", "3") == 1
    assert "c.png' must be an image file" in capsys.readouterr().err
    assert command("--out", out) == 2
    assert (
        command("--sample", "val", "--out", out + "3", "--count", "2", "--size", "64", "--format", "jpg") == 0
    )
    assert "2 images from 2 photos" in capsys.readouterr().out
    assert command(str(tmp_path / "none.png"), "--out", out + "4") == 1


def test_a_second_run_is_refused_or_replaces_the_first(tmp_path, capsys):
    source, out = tmp_path / "in" / "a.png", tmp_path / "out"
    write_png(source, photo(1))
    flags = (str(source), "--out", str(out), "--size", "32")
    assert command(*flags, "--count", "4") == 0
    first = content(out)
    capsys.readouterr()
    assert command(*flags, "--count", "2", "--seed", "1") == 1
    assert "must hold no forgeries yet, got 9 files of an earlier run" in capsys.readouterr().err
    with pytest.raises(ValueError, match="must hold no forgeries yet"):
        forge_folder({"a": photo(1)}, out, 1)
    (out / "manifest.json").unlink()  # as after an interrupted run
    assert command(*flags, "--count", "2") == 1
    assert content(out).keys() == first.keys() - {(out / "manifest.json").relative_to(out)}
    (out / "images" / "mine.png").write_bytes(b"x")
    assert command(*flags, "--count", "2", "--format", "jpg", "--overwrite") == 0
    names = sorted(str(name) for name in content(out))
    assert (
        len(names) == 6
        and "images/mine.png" in names
        and not any(n.startswith("images/0") and n.endswith("png") for n in names)
    )
    (out / "images" / "mine.png").unlink()
    assert command(*flags, "--count", "5", "--overwrite") == 0
    again = content(out)
    assert all(again[name] == data for name, data in first.items() if name.suffix == ".png")


def test_old_forgeries_stay_until_the_photos_are_read(tmp_path):
    write_png(tmp_path / "a.png", photo(1))
    out = tmp_path / "out"
    assert command(str(tmp_path / "a.png"), "--out", str(out), "--count", "2") == 0
    before = content(out)
    assert command(str(tmp_path / "none.png"), "--out", str(out), "--overwrite") == 1
    assert command(str(out), "--recursive", "--out", str(out), "--overwrite") == 1
    assert content(out) == before


def test_output_that_cannot_be_written(tmp_path, capsys):
    write_png(tmp_path / "a.png", photo(1))
    assert command(str(tmp_path / "a.png"), "--out", str(tmp_path / "a.png")) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--seed", "-1"), "argument --seed: must be a whole number of at least 0, got '-1'"),
        (("--seed", "1.5"), "argument --seed: must be a whole number of at least 0, got '1.5'"),
        (("--count", "0"), "argument --count: must be a whole number of at least 1, got '0'"),
        (("--size", "8"), "argument --size: must be a whole number of at least 32, got '8'"),
        (("--authentic", "nan"), r"argument --authentic: must be a number in [0, 1], got 'nan'"),
        (("--authentic", "half"), r"argument --authentic: must be a number in [0, 1], got 'half'"),
    ],
)
def test_bad_flags(tmp_path, capsys, flags, words):
    with pytest.raises(SystemExit) as stopped:
        command("--sample", "val", "--out", str(tmp_path / "out"), *flags)
    assert stopped.value.code == 2 and words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_negative_seed_is_named(tmp_path):
    with pytest.raises(ValueError, match="seed must be at least 0, got -3"):
        forge_folder({"a": photo(1)}, tmp_path, 1, seed=-3)


def test_photos_in_folders_and_under_the_home_directory(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    long = "n" * 240
    write_png(tmp_path / "in" / "deep" / "a.png", photo(1)).rename(tmp_path / "in" / "deep" / f"{long}.png")
    (tmp_path / "in" / "notes.txt").write_text("x")
    assert command("~/in", "--out=~/out", "--count", "1") == 1
    assert "must hold at least one image, got 1 x directory" in capsys.readouterr().err
    assert command("~/in", "--out=~/out", "--count", "2", "--recursive") == 0
    assert "skipped 1 x file of no image format" in capsys.readouterr().err
    assert len(list((tmp_path / "out" / "images").iterdir())) == 2
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["photos"] == [long]


@pytest.mark.parametrize("extension", ["png", "jpg"])
@pytest.mark.parametrize("size", [None, 32])
@pytest.mark.parametrize("authentic", [0.0, 0.5, 1.0])
def test_data_check_finds_no_fault(tmp_path, capsys, extension, size, authentic):
    photos = {"a": photo(1), "b": photo(2)}
    options = {"size": size, "authentic": authentic, "extension": extension}
    forge_folder(photos, tmp_path / "out", 30, **options)
    folders = [str(tmp_path / "out" / name) for name in ("images", "masks")]
    assert main(["data", "check", "--images", folders[0], "--masks", folders[1]]) == 0
    out = capsys.readouterr().out
    black = sum(not mask.any() for _, mask in map(FolderDataset(*folders).load, range(30)))
    assert f"30 photos, {black} of them untouched, 0 findings" in out
    assert ("black masks" in out) == (authentic > 0)
