"""Metrics beyond a fixed threshold: by hand, against independent implementations, and in the field's edge cases."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage
from sklearn.metrics import average_precision_score, balanced_accuracy_score, f1_score, matthews_corrcoef
from torchmetrics.functional.classification import (
    binary_auroc,
    binary_average_precision,
    binary_f1_score,
    binary_jaccard_index,
    binary_matthews_corrcoef,
)

from frd_model import metrics
from frd_model.data.images import write_png
from frd_model.evaluate import Report, evaluate_saved
from frd_model.labelled import Labelled
from frd_model.saved_maps import SavedMaps


def random_pair(seed, levels=None, shape=(40, 30), share=0.3, dtype=np.float32):
    rng = np.random.default_rng(seed)
    scores = rng.random(shape)
    if levels:
        scores = np.round(scores * levels) / levels
    return scores.astype(dtype), rng.random(shape) < share * (0.5 + scores)


@pytest.mark.parametrize("levels", [None, 255, 5, 1])
@pytest.mark.parametrize("share", [0.02, 0.4, 0.9])
def test_against_scikit_learn_and_torchmetrics(levels, share):
    scores, mask = random_pair(1, levels, share=share)
    row = metrics.localization_metrics(scores, mask)
    flat, truth = scores.reshape(-1), mask.reshape(-1)
    preds, target = torch.from_numpy(flat), torch.from_numpy(truth.astype(np.int64))
    assert row["ap"] == pytest.approx(average_precision_score(truth, flat), abs=1e-12)
    assert row["mcc"] == pytest.approx(matthews_corrcoef(truth, flat > 0.5), abs=1e-12)
    assert row["permute_f1"] == pytest.approx(max(f1_score(truth, flat > 0.5), f1_score(truth, flat <= 0.5)))
    # torchmetrics computes in float32
    for name, oracle in (
        ("ap", binary_average_precision),
        ("auc", binary_auroc),
        ("f1", binary_f1_score),
        ("iou", binary_jaccard_index),
        ("mcc", binary_matthews_corrcoef),
    ):
        assert row[name] == pytest.approx(float(oracle(preds, target)), abs=2e-5), name


@pytest.mark.parametrize("levels", [None, 4, 1])
@pytest.mark.parametrize("share", [0.03, 0.5, 0.95])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("permute", [True, False])
def test_the_optimum_is_the_best_of_every_cut(levels, share, dtype, permute, monkeypatch):
    monkeypatch.setattr(metrics, "BAND", 100)
    scores, mask = random_pair(2, levels, (12, 11), share, dtype)
    cuts = [-1.0, *np.unique(scores).tolist()]
    direct = {t: f1_score(mask.reshape(-1), (scores > t).reshape(-1)) for t in cuts}
    turned = {t: f1_score(mask.reshape(-1), (scores <= t).reshape(-1)) for t in cuts}
    got = metrics.optimal_f1(scores, mask, permute)
    assert got.f1 == pytest.approx(max(*direct.values(), *(turned.values() if permute else ())), abs=1e-12)
    # the threshold that comes back reaches it
    counts = metrics.confusion(scores, mask, got.threshold)
    assert (counts.complement() if got.inverted else counts).f1() == pytest.approx(got.f1, abs=1e-12)


def test_the_optimum_by_hand():
    mask = np.array([[1, 1, 0, 0]], bool)
    # marking 0.9, 0.6 and 0.6: 2 found, 1 false: 4 / 5
    best = metrics.optimal_f1(np.float32([[0.9, 0.6, 0.6, 0.1]]), mask)
    assert best.f1 == pytest.approx(0.8) and 0.1 < best.threshold < 0.6 and not best.inverted
    best = metrics.optimal_f1(np.float32([[0.1, 0.2, 0.7, 0.7]]), mask)
    assert best == (1.0, pytest.approx(0.2), True)
    # without the inversion all four are marked: 4 / 6
    assert metrics.optimal_f1(np.float32([[0.1, 0.2, 0.7, 0.7]]), mask, permute=False).f1 == pytest.approx(
        2 / 3
    )
    none = metrics.optimal_f1(np.float32([[0.1, 0.2, 0.7, 0.7]]), np.zeros((1, 4), bool))
    assert none.f1 == 0 and math.isnan(none.threshold)


def test_average_precision_and_mcc_by_hand():
    # cuts at 0.9 (1 of 1), 0.6 (2 of 3): 1/2 * 1 + 1/2 * 2/3
    assert metrics.average_precision(
        np.float32([0.9, 0.6, 0.6, 0.1]), np.array([1, 1, 0, 0])
    ) == pytest.approx(5 / 6)
    assert metrics.Confusion(2, 1, 0, 1).mcc() == pytest.approx(2 / math.sqrt(3 * 2 * 2 * 1))
    assert metrics.Confusion(0, 0, 3, 5).mcc() == 0
    assert metrics.Confusion(3, 1, 1, 3).balanced_accuracy() == 0.75
    assert math.isnan(metrics.Confusion(3, 0, 1, 0).balanced_accuracy())


@pytest.mark.parametrize("permute", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_curve_is_f1_at_each_threshold(permute, dtype, monkeypatch):
    monkeypatch.setattr(metrics, "BAND", 100)
    scores, mask = random_pair(3, 50, dtype=dtype)
    function = metrics.permute_f1 if permute else metrics.f1
    want = [function(scores, mask, t) for t in metrics.THRESHOLDS]
    np.testing.assert_allclose(metrics.f1_curve(scores, mask, permute), want, rtol=1e-12)


@pytest.mark.parametrize("shape", [(60, 80), (9, 40), (5, 4), (1, 1)])
def test_the_border_band_is_scipys(shape):
    rng = np.random.default_rng(4)
    for _ in range(5):
        mask = np.zeros(shape, bool)
        y, x = rng.integers(shape[0]), rng.integers(shape[1])
        mask[y : y + rng.integers(1, 40), x : x + rng.integers(1, 60)] = True
        edited, scored = metrics.border_band(mask)
        want = ndimage.minimum_filter(mask, 15, mode="reflect")
        untouched = ~ndimage.maximum_filter(mask, 11, mode="reflect")
        assert np.array_equal(edited, want) and np.array_equal(scored, want | untouched)


def test_banded_metrics_are_those_of_the_scored_pixels():
    scores, _ = random_pair(5, shape=(60, 60))
    mask = np.zeros((60, 60), bool)
    mask[10:40, 15:50] = True
    scores[mask] = np.sqrt(scores[mask])
    row = metrics.localization_metrics(scores, mask, 0.4)
    edited, scored = metrics.border_band(mask)
    assert row["permute_f1_band"] == metrics.permute_f1(scores[scored], edited[scored], 0.4)
    best = metrics.optimal_f1(scores[scored], edited[scored])
    assert (row["permute_f1_opt_band"], row["threshold_opt_band"]) == best[:2]


# The edge cases of which the field's evaluators differ (frd's column): mask, map, metric, value.
BLOCK = np.zeros((40, 40), bool)
BLOCK[10:30, 10:30] = True
THIN = np.zeros((40, 40), bool)
THIN[10:20, :] = True
ALL, NONE = np.ones((40, 40), bool), np.zeros((40, 40), bool)
ONE_PIXEL = np.zeros((40, 40), np.float32)
ONE_PIXEL[3, 3] = 1
CONSTANT = np.full((40, 40), 0.3, np.float32)
HALF = np.where(BLOCK, np.float32(0.5), np.float32(0))


@pytest.mark.parametrize(
    ("mask", "probability", "metric", "value"),
    [
        (BLOCK, HALF, "f1", 0.0),  # the threshold is strict
        (NONE, ONE_PIXEL * 0, "f1", 0.0),
        (NONE, ONE_PIXEL, "f1", 0.0),
        (NONE, ONE_PIXEL, "auc", math.nan),
        (NONE, ONE_PIXEL, "ap", math.nan),
        (ALL, ONE_PIXEL, "auc", math.nan),
        (BLOCK, CONSTANT, "auc", 0.5),
        (BLOCK, CONSTANT, "ap", 0.25),
        (ALL, ONE_PIXEL * 0, "permute_f1", 1.0),
        (ALL, ONE_PIXEL * 0, "permute_f1_opt", 1.0),
        (THIN, THIN.astype(np.float32), "f1", 1.0),
        (THIN, THIN.astype(np.float32), "permute_f1_opt", 1.0),
        # TruFor's own rules, under TruFor's names alone: erosion leaves nothing of a thin region
        (THIN, THIN.astype(np.float32) * 0, "permute_f1_band", math.nan),
        (THIN, ONE_PIXEL, "permute_f1_band", 0.0),
        (THIN, ONE_PIXEL * 0 + 1, "permute_f1_band", 0.0),
        (ALL, ONE_PIXEL * 0 + 1, "permute_f1_band", math.nan),
        (ALL, ONE_PIXEL * 0, "permute_f1_band", 1.0),
        (THIN[8:22], THIN[8:22].astype(np.float32), "permute_f1_opt_band", math.nan),
        (THIN, THIN.astype(np.float32), "permute_f1_opt_band", 0.0),
        (BLOCK, CONSTANT, "mcc", 0.0),
        (BLOCK, BLOCK.astype(np.float32), "mcc", 1.0),
    ],
)
def test_edge_cases_of_an_image(mask, probability, metric, value):
    np.testing.assert_equal(metrics.localization_metrics(probability, mask)[metric], value)


@pytest.mark.parametrize(
    ("mask", "probability", "means", "skipped"),
    [
        # an untouched photo is in no mean of a pixel metric, marked or not; its alarm counts
        (NONE, ONE_PIXEL * 0, {"f1": 1.0, "auc": 1.0}, {"untouched photo: no pixel metric": 1}),
        (NONE, ONE_PIXEL, {"f1": 1.0, "auc": 1.0}, {"untouched photo: no pixel metric": 1}),
        # one class: no AUC, and no NaN in the mean
        (ALL, ONE_PIXEL * 0, {"f1": 0.5, "permute_f1": 1.0, "auc": 1.0}, {"every pixel edited: no auc": 1}),
        (BLOCK, CONSTANT, {"f1": 0.5, "auc": 0.75}, {}),
        (THIN, THIN.astype(np.float32), {"f1": 1.0, "permute_f1_opt_band": 0.5}, {}),
    ],
)
def test_edge_cases_in_the_means(mask, probability, means, skipped, tmp_path: Path):
    """Beside one photo found exactly, each case in the place that frd gives it."""
    np.save(tmp_path / "a.npy", BLOCK.astype(np.float32))
    np.save(tmp_path / "b.npy", probability)
    image = np.zeros((40, 40, 3), np.uint8)
    samples = [Labelled("a.png", "", image, BLOCK), Labelled("b.png", "", image, mask)]
    summary = evaluate_saved(samples, SavedMaps(tmp_path)).summary(resamples=20)
    for name, value in means.items():
        assert summary["means"][name]["mean"] == pytest.approx(value), name
    assert {k: v for k, v in summary["skipped"].items() if "band" not in k} == skipped
    if not mask.any():
        assert summary["authentic"]["pixel_false_alarm"] == pytest.approx(float(probability.mean()))


def test_the_best_threshold_of_a_set(tmp_path: Path):
    samples, maps = [], {}
    for name, seed in (("a", 6), ("b", 7)):
        maps[name], mask = random_pair(seed, share=0.4)
        np.save(tmp_path / f"{name}.npy", maps[name])
        samples.append(Labelled(f"{name}.png", "", np.zeros((40, 30, 3), np.uint8), mask))
    best = evaluate_saved(samples, SavedMaps(tmp_path)).summary()["best_threshold"]["permute_f1"]
    means = [
        np.mean([metrics.permute_f1(maps[s.name[0]], s.mask, t) for s in samples]) for t in metrics.THRESHOLDS
    ]
    assert (
        best["mean"] == pytest.approx(max(means))
        and best["threshold"] == metrics.THRESHOLDS[np.argmax(means)]
    )


def test_figures_of_whole_photos_follow_the_threshold():
    edited = [1, 1, 1, 0, 0]
    scores = [0.9, 0.35, 0.2, 0.3, 0.05]
    rows = [{"edited": e, "score": s, "alarm": 0.0, "kind": ""} for e, s in zip(edited, scores, strict=True)]
    for threshold, alarms in ((0.5, 0.0), (0.25, 0.5)):
        level = Report(threshold, rows).summary(0)["image_level"]
        marked = np.array(scores) > threshold
        assert level["f1"] == pytest.approx(f1_score(edited, marked))
        assert level["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(edited, marked))
        assert Report(threshold, rows).summary(0)["authentic"]["photo_false_alarm"] == alarms
    assert level["auc"] == pytest.approx(5 / 6)


def test_false_alarms_take_the_one_threshold_given():
    photo = np.full((10, 10), 0.4)
    assert metrics.false_alarms([photo], 0.3) == {"pixel_rate": 1.0, "photo_rate": 1.0, "photos": 1}
    assert metrics.false_alarms([photo], 0.3, 0.5)["photo_rate"] == 0


def test_bootstrap_intervals(monkeypatch):
    rng = np.random.default_rng(0)
    values = rng.normal(0.5, 0.1, 400)
    columns = {
        "a": values,
        "gaps": np.where(np.arange(400) % 4, values, np.nan),
        "one": np.ones(400),
        "none": [math.nan] * 400,
    }
    got = metrics.bootstrap_means(columns)
    # the standard error of a mean, times 1.96
    for name, n in (("a", 400), ("gaps", 300)):
        mean, half = np.nanmean(columns[name]), 1.96 * np.nanstd(columns[name]) / math.sqrt(n)
        assert got[name][0] == pytest.approx(mean - half, abs=0.1 * half)
        assert got[name][1] == pytest.approx(mean + half, abs=0.1 * half)
    assert got["one"] == (1.0, 1.0) and all(map(math.isnan, got["none"]))
    assert metrics.bootstrap_means(columns)["a"] == got["a"] != metrics.bootstrap_means(columns, seed=1)["a"]
    assert all(map(math.isnan, metrics.bootstrap_means({"a": [1.0]}, resamples=0)["a"]))
    assert all(map(math.isnan, metrics.bootstrap_means({"a": []})["a"]))


def test_intervals_of_whole_photos_are_those_of_drawn_sets():
    rng = np.random.default_rng(1)
    forged = rng.random(60) < 0.6
    scores = np.round(rng.random(60) * 0.7 + 0.3 * forged, 1)
    # the same photos are drawn by the same seed where they stand in the order of their scores
    order = np.argsort(scores, kind="stable")
    scores, forged = scores[order], forged[order]
    draws = []
    for weights in metrics._resampled(60, 300, 5):
        for row in weights:
            index = np.repeat(np.arange(60), row.astype(int))
            draws.append(list(metrics.detection_metrics(scores[index], forged[index], 0.4).values()))
    got = metrics.bootstrap_detection(scores, forged, 0.4, 300, 5)
    for name, column in zip(("f1", "balanced_accuracy", "auc"), np.transpose(draws), strict=True):
        assert got[name] == pytest.approx(np.quantile(column, (0.025, 0.975)), rel=1e-12), name
    # one class alone: F1 is defined, the others are not
    only = metrics.bootstrap_detection(scores[forged], forged[forged])
    assert only["f1"][0] > 0 and math.isnan(only["auc"][0]) and math.isnan(only["balanced_accuracy"][0])


def test_every_image_of_four_pixels_and_three_levels():
    for truth in itertools.product([0, 1], repeat=4):
        mask = np.array(truth)
        for levels in itertools.product([0.0, 0.5, 1.0], repeat=4):
            scores = np.float32(levels)
            cuts = [cut for t in (-1, 0, 0.5, 1) for cut in (scores > t, scores <= t)]
            best = max(2 * (cut & mask).sum() / max(1, cut.sum() + mask.sum()) for cut in cuts)
            assert metrics.optimal_f1(scores, mask).f1 == pytest.approx(best)


def test_a_photo_of_white_is_a_png_map(tmp_path: Path):
    write_png(tmp_path / "a.png", ALL)
    (row,) = evaluate_saved(
        [Labelled("a", "", np.zeros((40, 40, 3), np.uint8), ALL)], SavedMaps(tmp_path)
    ).rows
    assert row["f1"] == row["permute_f1_opt"] == row["permute_f1_opt_band"] == 1


def test_clusters_are_drawn_as_wholes() -> None:
    """Two groups, of three and one images: a draw has the mean of one of them, or of both."""
    columns, groups = {"a": [1.0, 1.0, 1.0, 0.0]}, ["x", "x", "x", "y"]
    assert metrics.bootstrap_means(columns, 200, clusters=groups)["a"] == (0.0, 1.0)
    each = metrics.bootstrap_means(columns, 200, clusters=["0", "1", "2", "3"])
    assert each == metrics.bootstrap_means(columns, 200)
    scores, forged = np.array([0.1, 0.2, 0.3, 0.9]), np.array([False, False, True, True])
    assert metrics.bootstrap_detection(scores, forged, 0.25, 50, clusters=["one"] * 4)["f1"] == (1.0, 1.0)
    assert metrics.bootstrap_detection(scores, forged, 0.25, 50, clusters=list("abcd")) == (
        metrics.bootstrap_detection(scores, forged, 0.25, 50)
    )
