import math
import types

import numpy as np
import pytest
from sklearn.metrics import f1_score, jaccard_score, roc_auc_score

from frd_model import metrics


@pytest.fixture(params=["numpy", "native"])
def implementation(request, monkeypatch):
    """Runs a test on the NumPy path and on the native module of the installed package."""
    if request.param == "numpy":
        monkeypatch.setattr(metrics, "_native", None)
    elif metrics._native is None:
        pytest.skip("frd_kernels._C is not built here")
    return request.param


def random_pair(shape, levels=None, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    scores = rng.random(shape)
    if levels is not None:
        scores = np.round(scores * levels) / levels
    return scores.astype(dtype), rng.random(shape) < 0.3 + 0.4 * scores


@pytest.mark.parametrize("levels", [None, 255, 2, 1])
@pytest.mark.parametrize("shape", [(64, 48), (1, 7), (33, 1)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_against_sklearn(implementation, levels, shape, dtype):
    scores, mask = random_pair(shape, levels, seed=3, dtype=dtype)
    flat, marked = mask.reshape(-1), scores.reshape(-1) > 0.5
    assert metrics.auc(scores, mask) == pytest.approx(roc_auc_score(flat, scores.reshape(-1)), abs=1e-12)
    assert metrics.f1(scores, mask) == pytest.approx(f1_score(flat, marked), abs=1e-12)
    assert metrics.iou(scores, mask) == pytest.approx(jaccard_score(flat, marked), abs=1e-12)
    want = max(f1_score(flat, marked), f1_score(flat, ~marked))
    assert metrics.permute_f1(scores, mask) == pytest.approx(want, abs=1e-12)


def test_native_is_identical_to_numpy(monkeypatch):
    if metrics._native is None:
        pytest.skip("frd_kernels._C is not built here")
    for seed, levels in enumerate([None, 255, 7, 1, 0]):
        scores, mask = random_pair((65, 31), levels or None, seed)
        scores = scores - 0.5 if levels != 0 else np.full_like(scores, -0.0)
        got = metrics.image_metrics(scores, mask, 0.1)
        with monkeypatch.context() as patch:
            patch.setattr(metrics, "_native", None)
            assert metrics.image_metrics(scores, mask, 0.1) == got


@pytest.mark.parametrize(
    ("scores", "mask", "want"),
    [
        ([0.5, 0.5, 0.5, 0.5], [1, 0, 1, 0], 0.5),
        ([0.0, -0.0, 1.0, -1.0], [1, 0, 1, 0], 0.875),
        ([3.0, np.inf, -np.inf, -2.5], [1, 1, 0, 0], 1.0),
        ([1.0, 1.0, 0.0, 0.0], [0, 0, 1, 1], 0.0),
    ],
)
def test_auc_by_hand(implementation, scores, mask, want):
    assert metrics.auc(np.float32(scores), np.array(mask)) == want


@pytest.mark.parametrize("value", [0, 1])
def test_one_class_masks(implementation, value):
    scores, _ = random_pair((8, 8))
    row = metrics.image_metrics(scores, np.full((8, 8), value))
    assert math.isnan(row["auc"])
    if value == 0:
        assert (row["f1"], row["permute_f1"], row["iou"]) == (0.0, 0.0, 0.0)
    else:
        assert row["permute_f1"] > 0


def test_threshold_is_strict(implementation):
    mask = np.array([[True, False]])
    assert metrics.f1(np.float32([[0.5, 0.5]]), mask) == 0
    assert metrics.confusion(np.float32([[0.5, 0.6]]), mask) == (0, 1, 1, 0)
    assert metrics.permute_f1(np.float32([[0.5, 0.6]]), mask) == 1
    assert metrics.f1(mask, mask) == 1


def test_image_score():
    probability = np.zeros((20, 20), np.float32)
    probability[0, :4] = [0.9, 0.8, 0.7, 0.6]
    assert metrics.image_score(probability) == pytest.approx(0.75)
    assert metrics.image_score(np.float32([[0.3]])) == pytest.approx(0.3)


def test_false_alarms():
    quiet, loud = np.zeros((10, 10)), np.zeros((10, 10))
    loud[:2] = 0.9
    got = metrics.false_alarms([quiet, loud])
    assert got == {"pixel_rate": pytest.approx(0.1), "photo_rate": 0.5, "photos": 2}
    assert metrics.false_alarms([quiet, loud], scores=[0.6, 0.7])["photo_rate"] == 1
    assert math.isnan(metrics.false_alarms([])["pixel_rate"])


def test_table_skips_nan():
    table = metrics.MetricTable()
    table.add("a", {"f1": 0.2, "auc": 0.8})
    table.add("b", {"f1": 0.4, "auc": math.nan})
    want = {"images": 2, "f1": pytest.approx(0.3), "auc": 0.8, "auc_skipped": 1}
    assert table.summary() == want
    assert metrics.aggregate([]) == {"images": 0}
    with pytest.raises(ValueError, match="name must be new to the table, got 'a' twice"):
        table.add("a", {"f1": 0.2, "auc": 0.8})
    with pytest.raises(ValueError, match="metrics must have the columns"):
        table.add("c", {"f1": 0.2})


@pytest.mark.parametrize(
    ("scores", "mask", "words"),
    [
        (
            np.zeros((2, 2)),
            np.zeros((2, 3)),
            r"mask must have the shape of probability \(2, 2\), got \(2, 3\)",
        ),
        (np.zeros((0, 2)), np.zeros((0, 2)), "at least one pixel"),
        (np.array([np.nan, 1.0]), np.array([0, 1]), "must not hold NaN, got 1 of them"),
        (np.zeros(2), np.array([0, 255]), "only 0 and 1, got values from 0 to 255"),
    ],
)
def test_errors(implementation, scores, mask, words):
    with pytest.raises(ValueError, match=words):
        metrics.image_metrics(scores, mask)


def test_incomplete_native_module_is_not_used(monkeypatch):
    monkeypatch.setattr(metrics.importlib, "import_module", lambda name: types.ModuleType(name))
    assert metrics._load_native() is None


def test_native_refuses_what_it_would_have_to_convert():
    if metrics._native is None:
        pytest.skip("frd_kernels._C is not built here")
    scores, truth = np.zeros(4, np.float32), np.zeros(4, np.uint8)
    with pytest.raises(TypeError):
        metrics._native.auc_counts(scores.astype(np.float64), truth)
    with pytest.raises(TypeError):
        metrics._native.confusion_counts(np.zeros(8, np.float32)[::2], truth, 0.5)
    with pytest.raises(ValueError, match="score's size 4, got 3"):
        metrics._native.auc_counts(scores, truth[:3])


@pytest.mark.parametrize("size", [1, 7, 128, 1000, 5000])
@pytest.mark.parametrize("share", [0.01, 0.3, 1.0])
def test_bands_change_no_figure(monkeypatch, size, share):
    monkeypatch.setattr(metrics, "BAND", 128)
    rng = np.random.default_rng(size)
    for scores in (rng.random(size).astype(np.float32), rng.integers(0, 4, size) / np.float32(3)):
        count = max(1, round(size * share))
        want = np.sort(scores)[-count:].mean(dtype=np.float64)
        assert metrics.image_score(scores, share) == pytest.approx(want, rel=1e-12)
        for frequency in (0.02, 0.5, 0.9):
            truth = (rng.random(size) < frequency).astype(np.uint8)
            higher = (scores[truth == 1][:, None] > scores[truth == 0]).sum(dtype=int)
            ties = (scores[truth == 1][:, None] == scores[truth == 0]).sum(dtype=int)
            positives = int(truth.sum())
            assert metrics._auc_counts_numpy(scores, truth) == (
                2 * higher + ties,
                positives,
                size - positives,
            )


def test_image_score_of_a_map_with_nan_is_nan(monkeypatch):
    monkeypatch.setattr(metrics, "BAND", 128)
    assert math.isnan(metrics.image_score(np.r_[np.ones(300), np.nan, np.ones(300)]))
