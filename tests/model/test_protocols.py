"""Training on data sets by name: protocols, the balanced sampler, and `frd train` with them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from frd_model import load_model
from frd_model.cli import main
from frd_model.data.augment import Augmentation, MvssAugmentation
from frd_model.data.balanced_sampler import BalancedSampler
from frd_model.data.dataset import JoinedDataset
from frd_model.data.layouts import LAYOUTS
from frd_model.data.pairing import DatasetError
from frd_model.data.protocols import PROTOCOLS, select_lists
from frd_model.data.sets import open_sets
from frd_model.train import Trainer
from frd_model.train.config import ConfigError, from_dict, load_config
from frd_model.train.data import BalancedPairs, TrainingPairs, collate, split_sets
from frd_model.train.sampler import StepSampler

TINY = {"stages": [1, 2], "blocks": 1, "pyramid_width": 8, "trace_widths": [8, 8]}
SMALL = [
    *("--set", f"model.options={json.dumps(TINY)}", "--set", "optim.warmup_epochs=0"),
    *("--crop", "32", "--batch-size", "4", "--epochs", "1"),
]
SIZE = 36


def photo(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(list(path.name.encode()))
    Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8)).save(path)


def mask(path: Path, white: int = 255) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.zeros((SIZE, SIZE), np.uint8)
    values[: SIZE // 3] = white
    Image.fromarray(values).save(path)


def casia2(root: Path, forged: int = 6, untouched: int = 4) -> str:
    for i in range(forged):
        photo(root / f"Tp/Tp_{i}.png")
        mask(root / f"Gt/Tp_{i}_gt.png")
    for i in range(untouched):
        photo(root / f"Au/Au_{i}.png")
    return f"casia2:{root}"


def fantasticreality(root: Path) -> str:
    """Masks that only the layout's own reader can read."""
    (root / "SegmentationFake").mkdir(parents=True)
    for i in range(5):
        photo(root / f"ColorFakeImages/f{i}.png")
        classes = np.zeros((SIZE, SIZE), np.int16)
        classes[:9] = 7
        np.savez(root / f"SegmentationFake/f{i}.npz", classes)
        photo(root / f"ColorRealImages/r{i}.png")
    return f"fantasticreality:{root}"


def tampcoco(root: Path) -> str:
    for i in range(3):
        for kind in ("cm", "sp", "bcm", "bcmc"):
            photo(root / f"{kind}_images/{kind}{i}.png")
        for kind in ("cm", "sp", "bcm"):
            mask(root / f"{kind}_masks/{kind}{i}.png", 1)
        mask(root / f"bcm_masks/bcmc{i}.png", 1)
    return f"tampcoco:{root}"


def imd2020(root: Path) -> str:
    for i in range(4):
        photo(root / f"{i}/{i}_orig.png")
        photo(root / f"{i}/e{i}.png")
        mask(root / f"{i}/e{i}_mask.png")
    return f"imd2020:{root}"


def all_sets(root: Path) -> list[str]:
    for i in range(5):
        photo(root / f"raise/c{i}.png")
    specs = [make(root / make.__name__) for make in (casia2, fantasticreality, imd2020, tampcoco)]
    return [*specs, f"compraise=untouched:{root / 'raise'}"]


def as_flags(specs: list[str], flag: str = "--data") -> list[str]:
    return [part for spec in specs for part in (flag, spec)]


def train(output: Path, *flags: str) -> int:
    return main(["train", *SMALL, "--output", str(output), *flags])


def configuration(root: Path, **data: object) -> Trainer:
    return Trainer(
        from_dict(
            {
                "output": str(root / "run"),
                "epochs": 1,
                "batch_size": 3,
                "model": {"options": TINY},
                "data": {"source": "sets", "crop": 32, **data},
            }
        )
    )


def test_lists_of_the_protocols() -> None:
    figures = {name: (len(p.lists), p.per_set, p.replacement) for name, p in PROTOCOLS.items()}
    assert figures == {
        "cat": (10, 1869, False),
        "benco": (7, 1840, True),
        "frdnet": (10, 1840, True),
        "mvss": (1, None, False),
    }
    assert [sum(not part.forged for part in p.lists) for p in PROTOCOLS.values()] == [3, 0, 3, 0]
    sources = {part.source for p in PROTOCOLS.values() for part in p.lists}
    assert sources - {"compraise"} <= set(LAYOUTS)


def test_a_protocol_takes_its_photos_alone(tmp_path: Path) -> None:
    sets = open_sets(all_sets(tmp_path))
    lists = select_lists("cat", sets)
    sizes = {
        "casia2-forged": 6,
        "casia2-untouched": 4,
        "fantasticreality-forged": 5,
        "fantasticreality-untouched": 5,
        "imd2020-forged": 4,
        "compraise-untouched": 5,
        **{f"tampcoco-{kind}": 3 for kind in ("cm", "sp", "bcm", "bcmc")},
    }
    assert {name: len(data) for name, data in lists.items()} == sizes
    for name, data in lists.items():
        marked = [bool(data.load(i)[1].any()) for i in range(len(data))]
        assert marked == [not name.endswith("untouched")] * len(data)
    assert {pair.image.parent.name for pair in lists["tampcoco-bcm"].pairs} == {"bcm_images"}
    del sets["compraise"]
    assert len(select_lists("benco", sets)) == 7


def test_a_list_of_its_own(tmp_path: Path) -> None:
    spec = casia2(tmp_path / "casia2")
    (tmp_path / "list.txt").write_text("casia2/Tp/Tp_0.png casia2/Gt/Tp_0_gt.png\n")
    sets = open_sets([f"casia2-forged=txt:{tmp_path / 'list.txt'}"])
    assert len(select_lists("mvss", sets)["casia2-forged"]) == 1
    assert len(select_lists("mvss", open_sets([f"CASIA2={spec}"]))["casia2-forged"]) == 6


def test_lists_of_a_cache(tmp_path: Path) -> None:
    spec = tampcoco(tmp_path / "tampcoco")
    cache = tmp_path / "cache"
    assert main(["data", "convert", "--data", spec, "--to", "cache", "--out", str(cache)]) == 0
    specs = [spec for spec in all_sets(tmp_path / "all") if not spec.startswith(("tampcoco", "compraise"))]
    lists = select_lists("benco", open_sets([*specs, f"tampcoco=cache:{cache}"]))
    assert [len(lists[f"tampcoco-{kind}"]) for kind in ("cm", "sp", "bcm", "bcmc")] == [3, 3, 3, 3]


def test_sets_that_do_not_fit_a_protocol(tmp_path: Path) -> None:
    spec = casia2(tmp_path / "casia2", untouched=0)
    sets = open_sets([spec, imd2020(tmp_path / "imd2020")])
    with pytest.raises(DatasetError, match="got none named fantasticreality, compraise, tampcoco; name each"):
        select_lists("cat", sets)
    with pytest.raises(DatasetError, match="takes the data sets casia2 alone, got imd2020 too"):
        select_lists("mvss", sets)
    full = open_sets([spec, *all_sets(tmp_path / "all")[1:]])
    with pytest.raises(DatasetError, match="casia2 must hold untouched photos for protocol cat, got none"):
        select_lists("cat", full)


SETS = [range(5), range(5, 40), [40, 42, 44]]


@pytest.mark.parametrize("replacement", [False, True])
def test_as_many_of_each_set(replacement: bool) -> None:
    sampler = BalancedSampler(SETS, 12, seed=3, replacement=replacement)
    total: Counter[int] = Counter()
    for epoch in range(200):
        order = sampler.order(epoch)
        assert [sum(i in part for i in order) for part in SETS] == [12, 12, 12]
        counts = Counter(order)
        total += counts
        if not replacement:
            for part in SETS:
                times = [counts[i] for i in part]
                assert max(times) - min(times) <= 1
    for part in SETS:
        # Every photo of a set is as likely; five standard deviations.
        mean = 200 * 12 / len(part)
        assert all(abs(total[i] - mean) < 5 * mean**0.5 for i in part)
    assert sampler.order(0) == BalancedSampler(SETS, 12, seed=3, replacement=replacement).order(0)
    assert sampler.order(0) != sampler.order(1)
    assert sampler.order(0) != BalancedSampler(SETS, 12, seed=4, replacement=replacement).order(0)


def test_sets_are_mixed() -> None:
    halves = [BalancedSampler(SETS, 12).order(epoch)[:18] for epoch in range(100)]
    shares = [sum(i in part for half in halves for i in half) / 1800 for part in SETS]
    assert all(abs(share - 1 / 3) < 0.04 for share in shares)


@pytest.mark.parametrize("start", [0, 1, 17, 35, 36])
def test_starts_in_mid_epoch(start: int) -> None:
    sampler = BalancedSampler(SETS, 12, seed=3)
    sampler.set_epoch(2)
    whole = list(sampler)
    sampler.set_epoch(2, start)
    assert list(sampler) == whole[start:]
    assert len(sampler) == 36 - start


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("start", [0, 7])
def test_processes_share_an_epoch(world: int, start: int) -> None:
    samplers = [BalancedSampler(SETS, 12, seed=3, rank=rank, world=world) for rank in range(world)]
    for sampler in samplers:
        sampler.set_epoch(4, start)
    parts = [list(sampler) for sampler in samplers]
    assert {len(part) for part in parts} == {(36 - start) // world}
    assert [len(sampler) for sampler in samplers] == [len(part) for part in parts]
    together = [index for step in zip(*parts, strict=True) for index in step]
    assert together == samplers[0].order(4)[start : start + len(together)]


def test_bad_arguments_of_the_sampler() -> None:
    with pytest.raises(ValueError, match=r"sets must hold indices, got sizes \[0\]"):
        BalancedSampler([[]], 1)
    with pytest.raises(ValueError, match="per_set must be at least 1, got 0"):
        BalancedSampler(SETS, 0)
    with pytest.raises(ValueError, match=r"rank must be in \[0, 2\)"):
        BalancedSampler(SETS, 1, rank=2, world=2)
    with pytest.raises(ValueError, match=r"start must be in \[0, 36\]"):
        BalancedSampler(SETS, 12).set_epoch(0, 37)


def test_epochs_are_the_same_for_any_number_of_workers(tmp_path: Path) -> None:
    pairs = JoinedDataset(open_sets([casia2(tmp_path / "casia2"), tampcoco(tmp_path / "tampcoco")]))
    found = []
    for workers in (0, 2):
        data = BalancedPairs(pairs, MvssAugmentation(32), seed=5, per_set=12, replacement=True)
        data.set_epoch(3)
        loader = DataLoader(
            data, batch_size=6, sampler=data.order(3), num_workers=workers, collate_fn=collate
        )
        found.append(list(loader))
    assert len(found[0]) == 4
    for one, other in zip(*found, strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])
    # A photo that comes twice is augmented anew.
    order = data.order(3)
    again = next(index for index in order if index >= len(pairs))
    first, second = data[again % len(pairs)], data[again]
    assert first.image is not None
    assert second.image is not None
    assert not torch.equal(first.image, second.image)
    assert len(set(order)) == len(order) == len(data)


def test_a_bad_photo_is_replaced_from_its_own_set(tmp_path: Path) -> None:
    casia2(tmp_path / "b", 0, 8)
    sets = open_sets([casia2(tmp_path / "a", untouched=0), f"untouched:{tmp_path / 'b/Au'}"])
    pairs = JoinedDataset(sets)
    pairs.pairs[6].image.write_bytes(b"")
    data = BalancedPairs(pairs, Augmentation(32), seed=1, per_set=4)
    for epoch in range(8):
        data.set_epoch(epoch)
        sample = data[6]
        assert [failed.name for failed in sample.failures] == [str(pairs.pairs[6].image)]
        # By another untouched photo, not by one of the forged ones.
        assert sample.mask is not None
        assert not sample.mask.any()


def test_held_out_photos_of_each_set(tmp_path: Path) -> None:
    casia2(tmp_path / "a", 20, 10)
    lists = [[f"a/Tp/Tp_{i}.png", f"a/Gt/Tp_{i}_gt.png"] for i in (0, 1, 1, 2, 2, 3)]
    (tmp_path / "twice.json").write_text(json.dumps(lists))
    sets = open_sets([f"casia2:{tmp_path / 'a'}", f"json:{tmp_path / 'twice.json'}"])
    training, validation = split_sets(sets, 0.2, seed=1)
    assert isinstance(validation, JoinedDataset)
    assert list(validation.parts) == ["casia2", "twice"]
    assert sum(pair.mask is None for pair in validation.pairs) == 2
    held = {pair.image for pair in validation.pairs}
    assert not any(pair.image in held for data in training.values() for pair in data.pairs)
    assert len(training["casia2"]) >= 30 - len(held)
    # A fifth of the five photos of an epoch: one in each kind.
    training, validation = split_sets({"casia2": sets["casia2"]}, 0.2, seed=1, per_set=5)
    assert (len(training["casia2"]), len(validation)) == (29, 1)


def test_photos_of_two_sets_are_held_out_of_both(tmp_path: Path) -> None:
    spec = casia2(tmp_path / "a", 10, 0)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "list.txt").write_text(
        "".join(f"link/Tp/Tp_{i}.png link/Gt/Tp_{i}_gt.png\n" for i in range(10))
    )
    training, validation = split_sets(open_sets([spec, f"txt:{tmp_path / 'list.txt'}"]), 0.3, seed=1)
    held = {pair.image.name for pair in validation.pairs}
    assert 3 <= len(held) <= 6
    for data in training.values():
        assert {pair.image.name for pair in data.pairs} == {f"Tp_{i}.png" for i in range(10)} - held


def test_masks_keep_their_reader(tmp_path: Path) -> None:
    trainer = configuration(tmp_path, train=[fantasticreality(tmp_path / "fr")])
    assert isinstance(trainer.train_data, TrainingPairs)
    marked = [trainer.train_data.pairs.load(i)[1].any() for i in range(len(trainer.train_data))]
    assert sum(marked) == 4
    figures = trainer.fit()
    assert figures["val/images"] == 1
    assert not any(trainer.bad.values())


def test_training_by_a_protocol_in_two_layouts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    specs = all_sets(tmp_path)
    flags = [*as_flags(specs), "--protocol", "cat", "--per-set", "2", "--augment", "mvss"]
    assert train(tmp_path / "run", *flags, "--epochs", "2") == 0
    out = capsys.readouterr().out
    assert "(2 in an epoch of each of casia2-forged 5, fantasticreality-forged 4, " in out
    assert "epoch 2/2" in out
    assert train(tmp_path / "half", *flags, "--epochs", "2", "--stop-after", "1") == 0
    assert train(tmp_path / "half", *flags, "--epochs", "2", "--resume", "--workers", "2") == 0
    one, other = (load_model(tmp_path / run / "last.safetensors").state_dict() for run in ("run", "half"))
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    photo(tmp_path / "casia2/Au/Au_9.png")
    capsys.readouterr()
    assert train(tmp_path / "half", *flags, "--epochs", "3", "--resume") == 1
    assert "the training set must hold the files of the saved run" in capsys.readouterr().err


def test_resumes_in_mid_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    specs = [casia2(tmp_path / "a"), fantasticreality(tmp_path / "b")]
    flags = [*as_flags(specs), "--per-set", "8", "--set", "data.replacement=true", "--augment", "mvss"]
    flags += ["--save-every", "1", "--epochs", "2"]
    assert train(tmp_path / "whole", *flags) == 0
    step = Trainer._step

    def stop(self: Trainer, image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if (self.epoch, self.step) == (1, 2):
            raise OSError("stopped")
        return step(self, image, mask)

    monkeypatch.setattr(Trainer, "_step", stop)
    assert train(tmp_path / "half", *flags) == 1
    monkeypatch.undo()
    state = torch.load(tmp_path / "half" / "last.pt", weights_only=True)
    assert (state["epoch"], state["step"]) == (1, 2)
    assert train(tmp_path / "half", *flags, "--resume") == 0
    one, other = (load_model(tmp_path / run / "last.safetensors").state_dict() for run in ("whole", "half"))
    assert all(torch.equal(value, other[key]) for key, value in one.items())


def test_two_processes_divide_the_batches_of_one(tmp_path: Path) -> None:
    pairs = JoinedDataset(open_sets([casia2(tmp_path / "a"), tampcoco(tmp_path / "b")]))
    data = BalancedPairs(pairs, Augmentation(32), seed=5, per_set=10)
    samplers = [StepSampler(data, 6, seed=5, rank=rank, world=2) for rank in range(2)]
    for sampler in samplers:
        sampler.set_position(epoch=3, step=1)
    steps = list(zip(*samplers, strict=True))
    assert [len(first) + len(second) for first, second in steps] == [6, 6, 2]
    assert [i for first, second in steps for i in (*first, *second)] == data.order(3)[6:]


def test_bad_files_of_a_set_are_named_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = casia2(tmp_path / "train", 12, 0)
    broken = tmp_path / "train/Tp/Tp_3.png"
    broken.write_bytes(b"no photo")
    held = as_flags([f"held={casia2(tmp_path / 'val')}"], "--val-data")
    flags = [*as_flags([spec]), *held, "--per-set", "24"]
    assert train(tmp_path / "run", *flags) == 0
    err = capsys.readouterr().err
    assert err.count(str(broken)) == 1
    assert "(1 of 12 training photos)" in err
    assert train(tmp_path / "strict", *flags, "--set", "data.max_bad=0") == 1


def test_whole_photos_in_training_and_validation(tmp_path: Path) -> None:
    trainer = configuration(tmp_path, train=[casia2(tmp_path / "a")], resize=48, augment="mvss")
    sample = trainer.train_data[0]
    assert sample.image is not None
    assert sample.image.shape == (3, 48, 48)
    image, marked = trainer.val_data.load(0)
    assert image.shape == (48, 48, 3)
    assert marked.shape == (48, 48)
    assert "val/auc" in trainer.fit()


def test_old_ways_to_name_data_are_the_same_sets(tmp_path: Path) -> None:
    casia2(tmp_path / "a", untouched=0)
    (tmp_path / "list.json").write_text(
        json.dumps([[f"a/Tp/Tp_{i}.png", f"a/Gt/Tp_{i}_gt.png"] for i in range(6)])
    )
    named = {
        "sets": {"train": [f"json:{tmp_path / 'list.json'}"]},
        "json": {"train_json": str(tmp_path / "list.json")},
        "folder": {"train_images": str(tmp_path / "a/Tp"), "train_masks": str(tmp_path / "a/Gt")},
    }
    made = [
        configuration(tmp_path, **{"source": source, **keys})._digests() for source, keys in named.items()
    ]
    assert made[0] == made[1] == made[2]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "casia2:x", "--images", "y"], "--images and --masks and --data exclude each other"),
        (["--val-data", "x:y", "--val-json", "y"], "--val-json and --val-data exclude each other"),
        (["--crop", "64", "--resize", "64"], "--crop and --resize exclude each other, got both"),
        (["--data", "casia9:x"], "must be [NAME=]LAYOUT:PATH with a layout of"),
        (["--data", "casia2:missing"], "must be a folder, got none there"),
        (["--protocol", "cat"], "data.source must be sets where data.protocol is given"),
        (
            ["--protocol", "dog", "--data", "casia2:x"],
            "data.protocol must be one of cat, benco, frdnet, mvss",
        ),
        (["--per-set", "0", "--data", "casia2:x"], "data.per_set must be at least 1, got 0"),
        (["--per-set", "3"], "data.per_set must be left out for data.source sample"),
        (["--augment", "mvs", "--data", "casia2:x"], "data.augment.preset must be one of own, mvss"),
        (["--set", "data.resize=8", "--data", "casia2:x"], "data.resize must be between 32 and 8192, got 8"),
        (["--set", "data.train=casia2:x", "--set", "data.source=sets"], "data.train must be a list"),
        (["--set", "data.train=[casia2:x]"], "data.source must be sets where data.train is given"),
        (["--set", "data.source=sets"], "data.train must be given for data.source sets"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path / "run", *flags) == 1
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_mistakes_in_the_configuration(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("data:\n  augment:\n    preset: mvss\n    flip: 0.2\n")
    with pytest.raises(ConfigError, match=r"data\.augment\.flip must be left out"):
        load_config(file)
    file.write_text("data:\n  source: sets\n  train: [casia2:x]\n  augment: mvss\n")
    config = load_config(file)
    assert config.data.augment.preset == "mvss"
    assert from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match=r"data\.replacement goes with data\.per_set"):
        configuration(tmp_path, train=[casia2(tmp_path / "a")], replacement=True)
