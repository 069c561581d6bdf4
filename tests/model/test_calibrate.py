"""The score rule on its way: `frd calibrate`, the checkpoint, the network, `predict`, `frd predict` and its files."""

from __future__ import annotations

import copy
import errno
import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save as serialize
from torch import nn

from frd_model import FRDNet, create_model, load_model, predict, save_model
from frd_model.calibrate import calibrate
from frd_model.cli import main
from frd_model.cli.calibrate import describe
from frd_model.data import forge_folder
from frd_model.data.images import read_image, write_json, write_png
from frd_model.data.transforms import to_tensor
from frd_model.engines import prepare
from frd_model.eval_view import eval_view
from frd_model.evaluate import evaluate
from frd_model.evaluate_output import format_summary
from frd_model.labelled import Labelled, Unusable
from frd_model.map_statistics import measure
from frd_model.metrics import auc, f1, image_score
from frd_model.predict import logit_map
from frd_model.score import ScoreRule
from frd_model.state_files import read_safetensors
from frd_model.train.config import from_dict
from frd_model.train.trainer import Trainer
from frd_model.weights import load_weights, read_metadata

TINY = {"stages": (1, 2), "blocks": 1, "pyramid_width": 8, "trace_widths": (8, 8)}
THRESHOLDS = {"0.01": 0.9, "0.05": 0.7, "0.10": 0.6}


def rule(**changes: Any) -> ScoreRule:
    fields = {
        "statistic": "max",
        "scale": 1.0,
        "offset": 0.0,
        "pixel_threshold": 0.8,
        "thresholds": THRESHOLDS,
    }
    return ScoreRule(**{**fields, **changes})


class Brightness(nn.Module):
    """The logit of a pixel is its red plane, times a gain; the image-level logit is the largest green value."""

    def __init__(self, score_rule: ScoreRule | None = None, gain: float = 1.0, head: bool = False) -> None:
        super().__init__()
        self.gain = gain
        self.score_rule = score_rule
        self.config = SimpleNamespace(image_head=head)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gain * x[:, :1]

    def with_score(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self(x), x[:, 1].amax(dim=(1, 2))


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def tiny(**overrides: Any) -> FRDNet:
    torch.manual_seed(0)
    return create_model("frdnet_mit_b0", preset="lite", **{**TINY, **overrides}).eval()


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a rule."""
    file = tmp_path_factory.mktemp("rule") / "net.safetensors"
    net = tiny()
    net.score_rule = rule()
    save_model(net, file, {"note": "a test"})
    return file


# From the network to the score


def test_without_a_rule_all_is_as_before() -> None:
    image = photo(60, 70)
    result = predict(image, Brightness())
    np.testing.assert_array_equal(result.mask, result.probability > 0.5)
    assert result.score == image_score(result.probability) and result.threshold == 0.5
    assert (result.verdict, result.false_alarm_rate, result.statistic, result.rule) == (None,) * 4


def test_the_score_is_the_rules() -> None:
    image = photo(60, 70)
    own = rule(statistic="window_32_contrast", scale=1.5, offset=-0.2)
    result = predict(image, Brightness(own))
    value = measure(logit_map(image, Brightness()).logits)["window_32_contrast"]
    assert result.statistic == value and result.score == own.score(value) and result.rule is own
    assert (result.verdict, result.false_alarm_rate) == own.judge(result.score)
    np.testing.assert_array_equal(result.probability, predict(image, Brightness()).probability)
    assert result.threshold == 0.8 and predict(image, Brightness(own), threshold=0.3).threshold == 0.3


@pytest.mark.parametrize(
    ("offset", "verdict", "rate"),
    [(5.0, "edited", 0.01), (1.2, "unclear", 0.05), (0.6, "unclear", 0.1), (-1.0, "no trace found", 0.1)],
)
def test_the_mask_is_empty_where_no_trace_is_found(offset: float, verdict: str, rate: float) -> None:
    image, net = photo(60, 70), Brightness(rule(scale=0.0, offset=offset))
    result, raw = predict(image, net), predict(image, net, raw=True)
    assert (result.verdict, result.false_alarm_rate) == (raw.verdict, raw.false_alarm_rate) == (verdict, rate)
    marked = result.probability > np.float32(0.8)
    assert marked.any()
    np.testing.assert_array_equal(raw.mask, marked)
    np.testing.assert_array_equal(
        result.mask, marked if verdict != "no trace found" else np.zeros_like(marked)
    )
    np.testing.assert_array_equal(raw.probability, result.probability)
    lower = predict(image, net, threshold=0.1)
    assert lower.mask.any() == (verdict != "no trace found")


@pytest.mark.parametrize("name", [*measure(np.zeros((2, 2), np.float32)), "head"])
def test_a_photo_in_one_tile_scores_as_a_whole(name: str) -> None:
    net = Brightness(rule(statistic=name), head=True)
    for shape in ((60, 64), (20, 7)):
        whole = predict(photo(*shape), net, size="whole")
        tiles = predict(photo(*shape), net, size="tiles", tile=64, overlap=16)
        assert tiles.statistic == pytest.approx(whole.statistic, rel=1e-6)
        assert tiles.verdict == whole.verdict


@pytest.mark.parametrize("name", ["max", "window_64", "top_1_percent", "component", "head"])
def test_tiles_of_a_network_without_context_score_as_a_whole(name: str) -> None:
    net = Brightness(rule(statistic=name), head=True)
    whole, tiles = (
        predict(photo(150, 190), net, size=size, tile=64, overlap=16) for size in ("whole", "tiles")
    )
    assert tiles.statistic == pytest.approx(whole.statistic, rel=1e-5)


@pytest.mark.parametrize("size", ["whole", "tiles", "resize"])
def test_probabilities_of_one_are_still_told_apart(size: str) -> None:
    """Both maps are 1.0 in float32, the logits are about 40 and 80."""
    white = np.full((150, 100, 3), 255, np.uint8)
    low, high = (
        predict(white, Brightness(rule(scale=0.01), gain), size=size, tile=64, overlap=16)
        for gain in (18.0, 36.0)
    )
    assert low.probability.min() == high.probability.min() == 1.0
    assert high.statistic == pytest.approx(2 * low.statistic, rel=1e-5) and high.score > low.score


def test_the_head_of_a_tiled_photo_is_the_largest_of_its_tiles() -> None:
    image = photo(200, 90)
    image[..., 1] = 0
    image[170, 80, 1] = 255
    net = Brightness(rule(statistic="head"), head=True)
    want = (1 - 0.456) / 0.224
    for size in ("whole", "tiles"):
        assert predict(image, net, size=size, tile=64, overlap=8).statistic == pytest.approx(want, rel=1e-5)
    assert logit_map(image, net).head is None


def test_the_head_of_a_net(forged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a net with an image head to a verdict by it, in one tile, in several and in training mode."""
    net, image = tiny(image_head=True), photo(100, 130)
    batch = torch.stack([to_tensor(image)])
    with torch.no_grad():
        logits, scores = net.with_score(batch)
    found = logit_map(image, net, head=True)
    np.testing.assert_allclose(found.logits, logits[0, 0].numpy(), rtol=1e-5, atol=1e-5)
    assert found.head == pytest.approx(float(scores[0]), rel=1e-5)
    tiled = logit_map(image, net, size="tiles", tile=64, overlap=16, head=True).head
    crops = [image[y : y + 64, x : x + 64] for y in (0, 36) for x in (0, 33, 66)]
    assert tiled == pytest.approx(max(logit_map(crop, net, head=True).head for crop in crops), rel=1e-4)

    save_model(net, tmp_path / "head.safetensors")
    data = ["--images", forged / "images", "--masks", forged / "masks", "--resamples", 0]
    given = ["--checkpoint", tmp_path / "head.safetensors", "--out", tmp_path / "made.safetensors"]
    assert run("calibrate", *data, *given, "--statistic", "head") == 0
    assert any(
        line.split()[0] == "head" for line in capsys.readouterr().out.splitlines() if "<- the score" in line
    )
    made = load_model(tmp_path / "made.safetensors")
    assert made.score_rule is not None and made.score_rule.statistic == "head"
    assert predict(image, made).statistic == pytest.approx(float(scores[0]), rel=1e-5)
    wrapped = create_model(
        "frdnet_mit_b0", preset="lite", image_head=True, pretrained=tmp_path / "made.safetensors", **TINY
    )
    assert wrapped.training and predict(image, wrapped).statistic == predict(image, made).statistic
    assert predict(image, made.half()).statistic == pytest.approx(float(scores[0]), abs=0.05)
    headless = create_model("frdnet_mit_b0", preset="lite", pretrained=tmp_path / "made.safetensors", **TINY)
    assert predict(image, headless).verdict is None


def test_a_rule_for_a_head_that_is_not_there() -> None:
    with pytest.raises(ValueError, match=r"head: must be the logit of a network with config\.image_head"):
        predict(photo(40, 40), Brightness(rule(statistic="head")))


def test_evaluate_takes_the_rules_score() -> None:
    image = photo(60, 70)
    sample = Labelled("a", "", image, np.zeros((60, 70), np.bool_))
    for net in (Brightness(rule(scale=0.1)), Brightness()):
        report = evaluate([sample], net)
        assert report.failed == [] and report.rows[0]["score"] == predict(image, net).score
        assert report.rows[0]["alarm"] == pytest.approx(float((predict(image, net).probability > 0.5).mean()))


def test_evaluate_counts_verdicts_and_what_predict_marks() -> None:
    net = Brightness(calibrate(bright_squares(40), Brightness(), statistic="max", resamples=0).rule)
    others = bright_squares(10, seed=1)
    # Untouched, with a bright dot: above every threshold.
    dotted = others[0].image.copy()
    dotted[:2, :2] = 255
    others.append(Labelled("dotted", "", dotted, np.zeros((64, 96), np.bool_)))
    report = evaluate(others, net)
    summary = report.summary(resamples=0)
    assert summary["image_level"]["verdicts"]["edited"] == {"forged": 1.0, "untouched": pytest.approx(1 / 6)}
    shares = summary["image_level"]["verdicts"].values()
    assert sum(v["untouched"] for v in shares) == pytest.approx(1) == sum(v["forged"] for v in shares)
    assert summary["authentic"]["shown"] == pytest.approx(
        np.mean([predict(s.image, net).mask.mean() for s in others if not s.mask.any()])
    )
    assert summary["authentic"]["shown"] > 0
    assert summary["image_level"]["found"] == {"0.01": 0.0, "0.05": 0.0, "0.10": 0.0}
    text = format_summary(summary)
    assert "verdict edited: 100.0 % of the forged, 16.7 % of the untouched photos" in text
    assert "pixels that predict marks in untouched photos: " in text
    plain = evaluate(others[:-1], Brightness()).summary(resamples=0)
    assert plain["image_level"]["verdicts"] == {} and "shown" not in plain["authentic"]
    assert plain["image_level"]["found"] == {"0.01": 1.0, "0.05": 1.0, "0.10": 1.0}
    assert "verdict" not in format_summary(plain)
    assert (
        evaluate(others[1:2], net).summary(resamples=0)["image_level"]["verdicts"]["edited"]["forged"] == 1.0
    )


# The network and its file


def test_a_checkpoint_keeps_the_rule(calibrated: Path, tmp_path: Path) -> None:
    net = load_model(calibrated)
    assert net.score_rule == rule() and read_metadata(calibrated)["metadata"]["note"] == "a test"
    save_model(net, tmp_path / "again.safetensors", read_metadata(calibrated)["metadata"], half=True)
    assert load_model(tmp_path / "again.safetensors").score_rule == rule()
    assert predict(photo(40, 40), net).rule == rule()


@pytest.mark.parametrize(
    "change",
    [
        copy.deepcopy,
        lambda net: pickle.loads(pickle.dumps(net)),
        lambda net: net.to(torch.float64),
        lambda net: net.half(),
        lambda net: net.to(memory_format=torch.channels_last),
        lambda net: net.eval(),
        eval_view,
    ],
)
def test_the_rule_stays_with_the_net(calibrated: Path, change: Any) -> None:
    assert change(load_model(calibrated)).score_rule == rule()


def test_a_net_made_from_a_checkpoint_has_its_rule(calibrated: Path) -> None:
    """create_model gives a net in training mode, which `predict` shows in eval mode."""
    net = create_model("frdnet_mit_b0", preset="lite", pretrained=calibrated, **TINY)
    assert net.training and predict(photo(40, 40), net).rule == rule()
    assert eval_view(net).score_rule == rule() and net.score_rule == rule()
    compiled = torch.compile(net, backend="eager")
    assert predict(photo(40, 40), compiled).rule == rule()


def test_other_weights_have_no_rule(calibrated: Path, tmp_path: Path) -> None:
    save_model(tiny(), tmp_path / "plain.safetensors")
    net = load_model(calibrated)
    load_weights(net, tmp_path / "plain.safetensors")
    assert net.score_rule is None
    load_weights(nn.Sequential(net), calibrated)
    assert net.score_rule == rule()
    nn.Sequential(net).load_state_dict(nn.Sequential(tiny()).state_dict())
    assert net.score_rule is None


def test_training_removes_the_rule(calibrated: Path, tmp_path: Path) -> None:
    """Its scores change; the metadata of the file that it came from does not bring the rule back."""
    net = load_model(calibrated)
    nn.Sequential(net).train()
    assert net.score_rule is None
    save_model(net.eval(), tmp_path / "tuned.safetensors", read_metadata(calibrated)["metadata"])
    assert load_model(tmp_path / "tuned.safetensors").score_rule is None
    assert read_metadata(tmp_path / "tuned.safetensors")["metadata"] == {"note": "a test"}


def test_frd_train_from_a_calibrated_checkpoint(calibrated: Path, forged: Path, tmp_path: Path) -> None:
    config = from_dict(
        {
            "model": {"pretrained": str(calibrated), "options": TINY},
            "data": {
                "source": "folder",
                "crop": 32,
                "train_images": str(forged / "images"),
                "train_masks": str(forged / "masks"),
            },
            "output": str(tmp_path / "run"),
            "epochs": 1,
            "batch_size": 8,
            "workers": 0,
        }
    )
    trainer = Trainer(config)
    assert trainer.model.score_rule == rule()
    trainer.fit()
    for file in (tmp_path / "run").glob("*.safetensors"):
        assert load_model(file).score_rule is None and "score" not in read_metadata(file)["metadata"]
    assert load_model(tmp_path / "run" / "last.pt").score_rule is None


def test_metadata_called_score_that_is_no_rule(tmp_path: Path) -> None:
    file = tmp_path / "net.safetensors"
    for value in (0.93, {"auc": 0.9}, None, [1]):
        save_model(tiny(), file, {"score": value})
        assert load_model(file).score_rule is None and read_metadata(file)["metadata"] == {"score": value}


@pytest.mark.parametrize("metadata", ["[1]", "{", "3"])
def test_metadata_of_another_kind_is_named(metadata: str, tmp_path: Path) -> None:
    file = tmp_path / "net.safetensors"
    save_model(tiny(), file)
    state, header = read_safetensors(file)
    file.write_bytes(serialize(state, metadata=header | {"metadata": metadata}))
    for call in (load_model, read_metadata):
        with pytest.raises(ValueError, match=r"net\.safetensors: its metadata must be a JSON object"):
            call(file)


def test_a_rule_that_is_not_valid_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, net = tmp_path / "net.safetensors", tiny()
    net.score_rule = rule()
    broken = {**rule().to_dict(), "scale": -1.0}
    with monkeypatch.context() as patch:
        patch.setattr(ScoreRule, "to_dict", lambda _: broken)
        save_model(net, file)
    with pytest.raises(
        ValueError, match=r"net\.safetensors: its score rule is not valid: scale must be at least 0"
    ):
        load_model(file)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(ValueError, match="score rule"):
        load_weights(net, file)
    assert net.score_rule == rule() and all(torch.equal(before[n], v) for n, v in net.state_dict().items())


# Calibration


def bright_squares(count: int, seed: int = 0) -> list[Labelled]:
    """Grey photos of 64 x 96, every second one with a brighter square that is its mask."""
    samples = []
    for number in range(count):
        image = np.random.default_rng([seed, number]).integers(90, 130, (64, 96, 3), dtype=np.uint8)
        mask = np.zeros((64, 96), np.bool_)
        if number % 2:
            mask[10:42, 20:52] = True
            image[mask] = 220
        samples.append(Labelled(f"{number:03d}", "square" if number % 2 else "", image, mask))
    return samples


def test_calibration_on_photos_with_a_known_answer() -> None:
    found = calibrate(bright_squares(40), Brightness(), resamples=20)
    assert found.failed == [] and len(found.rows) == 40
    assert found.rule.validation["auc"] == 1.0 and found.rule.validation["found"]["0.01"] == 1.0
    assert found.rule.validation["pixel_f1"] == 1.0 and found.rule.validation["pixel_false_alarm"] == 0.0
    for sample, row in zip(bright_squares(40), found.rows, strict=True):
        result = predict(sample.image, Brightness(found.rule))
        assert result.statistic == row["statistics"][found.rule.statistic]
        assert (result.verdict == "edited") == sample.mask.any()
        np.testing.assert_array_equal(result.mask, sample.mask)


def test_the_threshold_of_a_calibration_is_met_exactly() -> None:
    """The untouched photo with the highest score is not above the threshold that its own score is."""
    samples = [s for s in bright_squares(30) if not s.mask.any()] + bright_squares(2, seed=1)[1:]
    found = calibrate(samples, Brightness(), statistic="max", resamples=0)
    scores = [predict(s.image, Brightness(found.rule)).score for s in samples]
    assert max(scores[:-1]) == found.rule.thresholds["0.01"] < scores[-1]


def test_a_head_is_compared_where_the_net_has_one() -> None:
    samples = bright_squares(12)
    assert "head" not in calibrate(samples, Brightness(), resamples=0).rule.validation["statistics"]
    found = calibrate(samples, Brightness(head=True), statistic="head", resamples=0)
    assert found.rule.statistic == "head" and found.rule.validation["statistics"]["head"]["auc"] == 1.0
    with pytest.raises(ValueError, match=r"statistic 'head' needs a network with config\.image_head"):
        calibrate(samples, Brightness(), statistic="head")


def test_photos_that_fail_are_left_out() -> None:
    samples: list[Labelled | Unusable] = [*bright_squares(6), Unusable("gone", "no such file")]
    samples.append(Labelled("other", "", photo(40, 40), np.zeros((20, 40), np.bool_)))
    found = calibrate(samples, Brightness(), resamples=0)
    assert [f["name"] for f in found.failed] == ["gone", "other"]
    assert "mask must have the photo's size (40, 40), got (20, 40)" in found.failed[1]["error"]
    assert found.rule.validation["photos"] == 6


@pytest.mark.parametrize("kept", [0, 1])
def test_one_class_cannot_be_calibrated(kept: int) -> None:
    with pytest.raises(ValueError, match="photos must be forged and untouched ones, got"):
        calibrate(bright_squares(10)[kept::2], Brightness())
    with pytest.raises(ValueError, match=r"got none \(1 could not be used, the first: gone: no such file\)"):
        calibrate([Unusable("gone", "no such file")], Brightness())


def test_a_statistic_that_does_not_tell_is_said_to() -> None:
    forged, untouched = bright_squares(10)[::2], bright_squares(10)[1::2]
    if not forged[0].mask.any():
        forged, untouched = untouched, forged
    swapped = [Labelled(s.name, "", s.image, ~s.mask & False) for s in forged]
    swapped += [Labelled(s.name, "", s.image, s.mask | True) for s in untouched]
    rule = calibrate(swapped, Brightness(), statistic="max", resamples=0).rule
    assert rule.scale == 0
    assert "note: max does not rank forged images higher: all photos get one score" in describe(rule)


# The commands


@pytest.fixture(scope="module")
def forged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("forged")
    photos = {f"host{i}": photo(96, 96, seed=i) for i in range(3)}
    forge_folder(photos, folder, 18, size=64, authentic=0.5)
    return folder


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    save_model(tiny(), tmp_path / "plain.safetensors", {"note": "kept"}, half=True)
    return tmp_path / "plain.safetensors"


def run(*arguments: object) -> int:
    return main([*map(str, arguments)])


def test_from_a_forged_folder_to_a_verdict(
    forged: Path, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--images", forged / "images", "--masks", forged / "masks"]
    made, report = tmp_path / "made.safetensors", tmp_path / "report.json"
    assert run("calibrate", *data, "--checkpoint", plain, "--out", made, "--json-out", report) == 0
    printed = capsys.readouterr().out
    content = json.loads(report.read_text())
    own = ScoreRule.from_dict(content["rule"])
    chosen = next(line for line in printed.splitlines() if "<- the score" in line)
    assert chosen.split()[0] == own.statistic and f"{own.validation['auc']:.4f}" in chosen
    manifest = json.loads((forged / "manifest.json").read_text())["items"]
    authentic = sum(item["kind"] == "authentic" for item in manifest)
    assert (own.validation["photos"], own.validation["untouched"], own.validation["hosts"]) == (
        18,
        authentic,
        3,
    )
    assert "made from 3 photos" in printed and f"{authentic} untouched images are fewer than 100" in printed
    assert {row["name"].split(".")[0]: row["host"] for row in content["photos"]} == {
        item["name"]: item["host"] for item in manifest
    }
    # the file: as it was, and the rule
    metadata = read_metadata(made)["metadata"]
    assert metadata.pop("score") == content["rule"] and metadata == {"note": "kept"}
    assert abs(made.stat().st_size - plain.stat().st_size) < 10_000, "half precision must stay"
    net, before = load_model(made), load_model(plain).state_dict()
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())

    images = sorted((forged / "images").iterdir())
    assert run("predict", *images, "--checkpoint", made, "--out", tmp_path / "out", "--json") == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(records) == 18
    ready = prepare(net)
    for image, record in zip(images, records, strict=True):
        result = predict(image, ready)
        assert record == json.loads((tmp_path / "out" / f"{record['name']}.json").read_text())
        assert record["verdict"] == result.verdict and record["score"] == pytest.approx(
            result.score, abs=1e-6
        )
        assert record["false_alarm_rate"] == result.false_alarm_rate
        assert record["statistic"] == {"name": own.statistic, "value": result.statistic}
        assert record["score_thresholds"] == own.thresholds and record["threshold"] == own.pixel_threshold
        assert record["edited_fraction"] == pytest.approx(float(result.mask.mean()), abs=1e-6)
        raw = float((result.probability > np.float32(result.threshold)).mean())
        assert record["raw_edited_fraction"] == pytest.approx(raw, abs=1e-6)
        assert record["validation"]["untouched"] == authentic
    by_name = {item["name"]: item["kind"] for item in manifest}
    verdicts = [r["verdict"] for r in records if by_name[r["name"]] == "authentic"]
    assert sum(v == "edited" for v in verdicts) == 0, "a threshold of so few photos lies above all of them"


def test_what_bfloat16_changes_is_stated_and_lets_auto_use_it(
    forged: Path,
    plain: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = ["--images", forged / "images", "--masks", forged / "masks"]
    made = tmp_path / "made.safetensors"
    assert run("calibrate", *data, "--checkpoint", plain, "--out", made, "--bf16") == 0
    printed = capsys.readouterr().out
    net = load_model(made)
    assert net.score_rule is not None
    stated = net.score_rule.validation["bf16"]
    assert f"in bfloat16: AUC of the score {stated['auc']:.4f}" in printed
    half = prepare(net, "torch", "bf16")
    scores, truth, verdicts, pixels, f1s, alarms = [], [], [], [], [], []
    for image in sorted((forged / "images").iterdir()):
        mask = read_image(forged / "masks" / f"{image.stem}.png")[..., 0] > 127
        one, other = predict(image, net, raw=True), predict(image, half, raw=True)
        scores.append((one.score, other.score))
        truth.append(bool(mask.any()))
        verdicts.append(one.verdict != other.verdict)
        pixels.append((one.mask != other.mask).mean())
        (f1s if mask.any() else alarms).append(
            f1(other.mask.astype(float), mask) if mask.any() else other.mask.mean()
        )
    wanted = {
        "auc": auc(np.array(scores)[:, 1], np.array(truth)),
        "pixel_f1": np.mean(f1s),
        "pixel_false_alarm": np.mean(alarms),
        "score_difference": np.abs(np.diff(scores, axis=1)).mean(),
        "pixel_difference": np.mean(pixels),
        "verdict_difference": np.mean(verdicts),
    }
    assert stated == pytest.approx(wanted, abs=1e-6)
    assert 0 < stated["score_difference"] < 0.05
    monkeypatch.setattr("frd_model.engines.has_bf16", lambda device: True)
    assert prepare(net).precision == "bf16" and prepare(load_model(plain)).precision == "float32"


def test_more_untouched_photos_move_the_thresholds(forged: Path, plain: Path, tmp_path: Path) -> None:
    data = ["--images", forged / "images", "--masks", forged / "masks"]
    one, other, more = (tmp_path / name for name in ("one.safetensors", "other.safetensors", "more"))
    assert run("calibrate", *data, "--checkpoint", plain, "--out", one, "--statistic", "max") == 0
    forge_folder({"host9": photo(96, 96, seed=9), "host8": photo(96, 96, seed=8)}, more, 6, authentic=1.0)
    untouched = ["--untouched", more / "images", "--statistic", "max", "--json-out", tmp_path / "found.json"]
    assert run("calibrate", *data, *untouched, "--checkpoint", plain, "--out", other) == 0
    rows = json.loads((tmp_path / "found.json").read_text())["photos"]
    assert [row["host"] for row in rows[-6:]] == [
        item["host"] for item in json.loads((more / "manifest.json").read_text())["items"]
    ]
    assert all(row["edited"] == 0 for row in rows[-6:])
    before, after = load_model(one).score_rule, load_model(other).score_rule
    assert before is not None and after is not None
    assert after.validation["untouched"] == before.validation["untouched"] + 6
    highest = max(row["statistics"]["max"] for row in rows if row["edited"] == 0)
    assert after.thresholds["0.01"] == after.score(highest)
    assert run("calibrate", *data, "--untouched", tmp_path / "none", "--out", tmp_path / "x.safetensors") == 1


def test_calibrate_a_state_dict(forged: Path, tmp_path: Path) -> None:
    """A file of another kind is written as save_model writes it."""
    net = tiny()
    torch.save(net.state_dict(), tmp_path / "net.pth")
    write_json(tmp_path / "config.json", {"config": net.config.to_dict()})
    data = ["--images", forged / "images", "--masks", forged / "masks", "--resamples", 0]
    made = tmp_path / "made.safetensors"
    assert (
        run("calibrate", *data, "--checkpoint", tmp_path / "net.pth", "--statistic", "area", "--out", made)
        == 0
    )
    again = load_model(made)
    assert again.score_rule is not None and again.score_rule.statistic == "area"
    assert again.score_rule.validation["auc_interval"] is None
    assert torch.equal(again.state_dict()["decoder.head.bias"], net.state_dict()["decoder.head.bias"])


@pytest.mark.parametrize(
    ("change", "message", "status"),
    [
        (["--statistic", "mode"], "--statistic must be auto or one of max", 2),
        (
            ["--statistic", "head"],
            "statistic 'head' needs a network with config.image_head, got one without",
            1,
        ),
        (["--out", "net.pth"], "--out must end in .safetensors, got", 2),
        (["--json-out", "made.safetensors"], "--out and --json-out must be two files", 2),
        (["--out", "plain.safetensors"], "--out must be a new file", 1),
        (["--json-out", "there.json"], "--json-out must be a new file", 1),
    ],
)
def test_wrong_usage_writes_nothing(
    change: list[str],
    message: str,
    status: int,
    forged: Path,
    plain: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(plain.parent)
    Path("there.json").write_text("{}")
    before = {file.name: file.read_bytes() for file in Path().iterdir()}
    data = ["--images", forged / "images", "--masks", forged / "masks", "--resamples", 0]
    given = ["calibrate", *data, "--checkpoint", plain, "--out", "made.safetensors", *change]
    assert run(*given) == status
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("frd calibrate: ") and message in error
    assert {file.name: file.read_bytes() for file in Path().iterdir()} == before


def test_a_full_disk_loses_one_file_only(
    forged: Path,
    plain: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("frd_model.weights._write_atomically", full)
    data = [
        "--images",
        forged / "images",
        "--masks",
        forged / "masks",
        "--resamples",
        0,
        "--checkpoint",
        plain,
    ]
    out, report = tmp_path / "made.safetensors", tmp_path / "made.json"
    assert run("calibrate", *data, "--out", out, "--json-out", report) == 1
    error = capsys.readouterr().err
    assert f"frd calibrate: {str(out)!r} cannot be written: " in error and "No space left on device" in error
    assert not out.exists() and ScoreRule.from_dict(json.loads(report.read_text())["rule"]).scale >= 0


def test_calibrate_in_place_and_bad_photos(
    forged: Path, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, masks = tmp_path / "images", tmp_path / "masks"
    for number, image in enumerate(sorted((forged / "images").iterdir())[:12]):
        write_png(images / f"{number}.png", read_image(image))
        write_png(masks / f"{number}.png", read_image(forged / "masks" / image.name)[:, :, 0] > 0)
    (images / "bad.png").write_text("no image")
    write_png(masks / "bad.png", np.zeros((4, 4), np.bool_))
    data = ["--images", images, "--masks", masks, "--resamples", 0]
    assert run("calibrate", *data, "--checkpoint", plain, "--out", plain, "--overwrite") == 1
    printed = capsys.readouterr()
    assert sum("bad.png" in line for line in printed.err.splitlines()) == 1
    own = load_model(plain).score_rule
    assert own is not None and own.validation["photos"] == 12 and own.validation["hosts"] is None
    assert (
        run("calibrate", *data, "--checkpoint", plain, "--out", plain, "--overwrite", "--statistic", "max")
        == 1
    )
    assert load_model(plain).score_rule.statistic == "max", "a second calibration replaces the first"


def test_predict_prints_a_verdict_and_obeys_raw(
    calibrated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net = load_model(calibrated)
    quiet = rule(scale=0.0, offset=-2.0, pixel_threshold=0.0, validation={"untouched": 300})
    net.score_rule = quiet
    save_model(net, tmp_path / "quiet.safetensors")
    image = write_png(tmp_path / "photo.png", photo(40, 50))
    given = ["predict", image, "--checkpoint", tmp_path / "quiet.safetensors", "--out", tmp_path / "out"]
    assert run(*given) == 0
    line = capsys.readouterr().out.splitlines()[0]
    assert line.split()[:2] == ["photo", "50x40"] and quiet.explain(quiet.score(0.0)) in line
    assert (
        "no trace found (score 0.12; 90 in 100 untouched calibration photos score as low)  marked   0.0 %"
        in line
    )
    record = json.loads((tmp_path / "out" / "photo.json").read_text())
    assert record["edited_fraction"] == 0.0 and record["raw_edited_fraction"] == 1.0
    assert not read_image(tmp_path / "out" / "photo_mask.png").any()
    plain_overlay = read_image(tmp_path / "out" / "photo_overlay.png")

    assert run(*given, "--resume") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "0 done, 0 failed, 1 done before"
    assert run(*given, "--resume", "--raw") == 1
    assert "raw was None in" in capsys.readouterr().err
    assert run(*given, "--overwrite", "--raw") == 0
    assert (read_image(tmp_path / "out" / "photo_mask.png") == 255).all()
    assert (read_image(tmp_path / "out" / "photo_overlay.png") != plain_overlay).any()
    assert run(*given, "--resume") == 1
    assert "raw was True in" in capsys.readouterr().err


def test_resume_sees_that_the_checkpoint_was_calibrated(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = write_png(tmp_path / "photo.png", photo(40, 50))
    given = ["predict", image, "--checkpoint", plain, "--out", tmp_path / "out"]
    assert run(*given) == 0
    assert run(*given, "--resume") == 0
    net = load_model(plain)
    net.score_rule = rule(pixel_threshold=0.5)
    save_model(net, plain, half=True)
    capsys.readouterr()
    assert run(*given, "--resume") == 1
    assert "score_thresholds was None in" in capsys.readouterr().err
    net.score_rule = rule(pixel_threshold=0.25)
    save_model(net, plain, half=True)
    assert run(*given, "--resume") == 1
    assert "threshold was 0.5 in" in capsys.readouterr().err
    assert run(*given, "--overwrite") == 0
    assert run(*given, "--resume", "--threshold", "0.25") == 0, "the same, said aloud"
