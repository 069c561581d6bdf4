"""Statistics of a map by hand, the rule fitted to data with a known answer, thresholds and verdicts at their edges."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from frd_model.map_statistics import STATISTICS, measure, statistic
from frd_model.metrics import confusion
from frd_model.score import (
    PIXEL_THRESHOLDS,
    TARGETS,
    ScoreRule,
    choose_pixel_threshold,
    fit_rule,
    pixel_curve,
)

THRESHOLDS = {"0.01": 0.9, "0.05": 0.7, "0.10": 0.6}


def rule(**changes: Any) -> ScoreRule:
    fields = {"statistic": "max", "scale": 1.0, "offset": 0.0, "pixel_threshold": 0.5}
    return ScoreRule(**{**fields, "thresholds": THRESHOLDS, **changes})


def peaked(height: int, width: int, side: int, level: float = 4.0, base: float = -2.0) -> np.ndarray:
    """A map at `base` with a square at `level` in its lower right corner."""
    logits = np.full((height, width), base, np.float32)
    logits[height - side :, width - side :] = level
    return logits


def test_every_statistic_by_hand() -> None:
    found = measure(peaked(200, 100, 32), head=1.25)
    edited = 32 * 32
    in_64 = (edited * 4.0 - (64 * 64 - edited) * 2.0) / 64**2
    # 128 is wider than the photo: the window is 128 high and 100 wide
    in_128 = (edited * 4.0 - (128 * 100 - edited) * 2.0) / (128 * 100)
    want = {
        "max": 4.0,
        "top_0.1_percent": 4.0,
        "top_1_percent": 4.0,
        "top_1_percent_contrast": 6.0,
        "window_32": 4.0,
        "window_64": in_64,
        "window_128": in_128,
        "window_32_contrast": 6.0,
        "window_64_contrast": in_64 + 2.0,
        "window_128_contrast": in_128 + 2.0,
        "area": edited / 20_000,
        "component": math.log(1 + edited),
        "mean_marked": 4.0,
        "head": 1.25,
    }
    assert found == pytest.approx(want, rel=1e-6)
    assert found.keys() == {*STATISTICS, "head"}


def test_the_top_is_a_mean_of_the_highest() -> None:
    logits = np.arange(2000, dtype=np.float32).reshape(40, 50)
    assert statistic("top_1_percent", logits) == pytest.approx(np.mean(np.arange(1980, 2000)))
    assert statistic("top_0.1_percent", logits) == pytest.approx(1998.5)
    assert statistic("top_1_percent_contrast", logits) == pytest.approx(1989.5 - 999.5)


@pytest.mark.parametrize("side", [32, 64, 128])
def test_windows_lie_inside_the_photo(side: int) -> None:
    logits = np.random.default_rng(0).normal(size=(150, 70)).astype(np.float32)
    height, width = min(side, 150), min(side, 70)
    views = np.lib.stride_tricks.sliding_window_view(logits.astype(np.float64), (height, width))
    assert statistic(f"window_{side}", logits) == pytest.approx(views.mean(axis=(2, 3)).max(), rel=1e-5)
    # the highest pixel at a corner weighs as any other: nothing is reflected
    logits[0, 0] = 1000.0
    assert statistic(f"window_{side}", logits) == pytest.approx(
        float(logits[:height, :width].astype(np.float64).mean()), rel=1e-5
    )


def test_components_join_at_corners_and_without_any_it_is_zero() -> None:
    logits = np.full((6, 8), -1.0, np.float32)
    assert statistic("component", logits) == 0.0
    logits[0, 0] = logits[1, 1] = logits[2, 2] = logits[5, 7] = 0.5
    assert statistic("component", logits) == pytest.approx(math.log(4))
    logits[logits < 0] = 0.0
    assert statistic("component", logits) == pytest.approx(math.log(4)), (
        "a probability of 0.5 is not above it"
    )


def test_mean_marked_without_a_marked_pixel_is_the_highest_logit() -> None:
    assert statistic("mean_marked", np.float32([[-3.0, -0.5]])) == -0.5
    assert statistic("mean_marked", np.float32([[-3.0, 1.0, 2.0]])) == 1.5


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (200, 1), (31, 33)])
@pytest.mark.parametrize("value", [-30.0, 0.0, 18.5])
def test_small_and_flat_maps_have_every_statistic(shape: tuple[int, int], value: float) -> None:
    found = measure(np.full(shape, value, np.float32))
    assert all(math.isfinite(each) for each in found.values())
    assert found["window_64"] == pytest.approx(value) and found["window_64_contrast"] == pytest.approx(
        0, abs=1e-5
    )
    assert found["area"] == (value > 0)


def test_high_probabilities_are_told_apart() -> None:
    """1 - 1e-8 and 1 - 1e-12 are the same float32."""
    low, high = (measure(np.full((70, 70), math.log(1 / p), np.float32)) for p in (1e-8, 1e-12))
    assert all(high[name] > low[name] + 9 for name in ("max", "top_1_percent", "window_64", "mean_marked"))


def test_a_constant_moves_no_contrast() -> None:
    logits = np.random.default_rng(1).normal(size=(90, 140)).astype(np.float32)
    before, after = measure(logits), measure(logits + np.float32(3.0))
    for name in STATISTICS:
        if name.endswith("contrast"):
            assert after[name] == pytest.approx(before[name], abs=1e-5)
        elif name.startswith(("max", "top", "window")):
            assert after[name] == pytest.approx(before[name] + 3.0, abs=1e-5)


@pytest.mark.parametrize("shape", [(0, 4), (4,), (1, 4, 4)])
def test_what_is_no_map(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"logits must be \[H, W\] with at least one pixel, got shape"):
        measure(np.zeros(shape, np.float32))


def test_head_needs_a_head() -> None:
    with pytest.raises(ValueError, match=r"needs a network with config\.image_head"):
        statistic("head", np.zeros((2, 2), np.float32))


def normal_photos(
    count: int, share: float = 0.5, gap: float = 2.0, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    forged = np.arange(count) < round(share * count)
    return rng.normal(np.where(forged, gap, 0.0), 1.0), forged


@pytest.mark.parametrize("share", [0.5, 0.2])
def test_two_normal_distributions_give_their_posterior(share: float) -> None:
    """At equal priors the log odds of N(2, 1) against N(0, 1) are 2 x - 2, whatever the photos' shares."""
    values, forged = normal_photos(20_000, share)
    fitted = fit_rule({"max": values}, forged, resamples=0)
    assert fitted.scale == pytest.approx(2.0, abs=0.06)
    assert fitted.offset == pytest.approx(-2.0, abs=0.06)
    scores = np.array([fitted.score(v) for v in values])
    balance = np.where(forged, 1 / share, 1 / (1 - share))
    high = (scores > 0.7) & (scores < 0.8)
    assert np.average(forged[high], weights=balance[high]) == pytest.approx(0.75, abs=0.03)


def test_newton_finds_the_minimum_of_platts_loss() -> None:
    values, forged = normal_photos(60, 0.3, seed=3)
    fitted = fit_rule({"max": values * 1e3 + 1e5}, forged, resamples=0)
    z = fitted.scale * (values * 1e3 + 1e5) + fitted.offset
    targets = np.where(forged, 19 / 20, 1 / 44)
    slope = (1 / (1 + np.exp(-z)) - targets) * np.where(forged, 1 / 18, 1 / 42)
    assert abs(slope.sum()) < 1e-9 and abs((slope * values).sum()) < 1e-9


def test_separable_photos_stay_finite() -> None:
    values = np.array([-2.0, -1.0, 1.0, 2.0, 3.0])
    fitted = fit_rule({"max": values}, values > 0)
    assert 0 < fitted.scale < 10 and math.isfinite(fitted.offset)
    assert fitted.validation["auc"] == 1.0 and fitted.validation["found"]["0.01"] == 1.0
    scores = [fitted.score(v) for v in values]
    assert 0 < scores[0] < 0.5 < scores[-1] < 1


def test_far_outliers_do_not_break_the_fit() -> None:
    values, forged = normal_photos(100, seed=5)
    values[0] = 1e6
    fitted = fit_rule({"max": values}, forged, resamples=0)
    assert math.isfinite(fitted.scale) and fitted.scale >= 0 and fitted.score(1e6) <= 1.0


@pytest.mark.parametrize("flat", [True, False])
def test_a_useless_statistic_gives_one_score_to_all(flat: bool) -> None:
    """Constant, or lower for forged photos: nothing is above any threshold."""
    forged = np.arange(40) % 2 == 0
    values = np.full(40, 7.0) if flat else np.where(forged, -1.0, 1.0)
    fitted = fit_rule({"max": values}, forged)
    assert fitted.scale == 0.0 and fitted.score(5.0) == pytest.approx(0.5)
    assert set(fitted.thresholds.values()) == {fitted.score(0.0)}
    assert fitted.judge(fitted.score(100.0)).text == "no trace found"


@pytest.mark.parametrize("forged", [[True] * 5, [False] * 5])
def test_one_class_is_an_error(forged: list[bool]) -> None:
    with pytest.raises(ValueError, match=r"photos must be forged and untouched ones, got [05] forged"):
        fit_rule({"max": np.arange(5.0)}, np.array(forged))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"statistics": {}}, "statistics must be at least one"),
        ({"statistics": {"max": [1.0, 2.0]}}, "'max' must have 4 values, got"),
        ({"statistics": {"max": [1.0, 2.0, math.nan, 0.0]}}, "'max' must be finite"),
        ({"forged": np.array([0, 1, 0, 1])}, "forged must be booleans"),
        ({"name": "window_64"}, "statistic must be auto or one of max, got 'window_64'"),
        ({"hosts": ["a"]}, r"hosts must be as many as photos \(4\), got 1"),
    ],
)
def test_arguments_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    given = {"statistics": {"max": np.arange(4.0)}, "forged": np.arange(4) % 2 == 0}
    with pytest.raises(ValueError, match=message):
        fit_rule(**{**given, **change})


def thresholds_of(untouched: list[float]) -> dict[str, float]:
    """In terms of the statistic: the values of the untouched that lie at the thresholds."""
    values = np.array([*untouched, 1e3, 1e3])
    forged = np.arange(len(values)) >= len(untouched)
    fitted = fit_rule({"max": values}, forged, resamples=0)
    lowest = {
        rate: min(v for v in untouched if fitted.score(v) >= t) for rate, t in fitted.thresholds.items()
    }
    assert all(fitted.score(lowest[rate]) == t for rate, t in fitted.thresholds.items())
    return lowest


def test_thresholds_are_the_smallest_that_keep_the_rate() -> None:
    hundred = [float(v) for v in np.random.default_rng(0).permutation(100)]
    assert thresholds_of(hundred) == {"0.01": 98.0, "0.05": 94.0, "0.10": 89.0}
    # 0.1 * 30 is above 3 in binary, 0.05 * 60 and 0.01 * 300 must be 3 too
    assert thresholds_of([float(v) for v in range(30)])["0.10"] == 26.0
    assert thresholds_of([float(v) for v in range(300)])["0.01"] == 296.0


def test_with_few_photos_a_threshold_lies_above_all_of_them() -> None:
    assert thresholds_of([float(v) for v in range(99)])["0.01"] == 98.0
    assert set(thresholds_of([1.0, 2.0, 3.0]).values()) == {3.0}
    assert thresholds_of([float(v) for v in range(20)]) == {"0.01": 19.0, "0.05": 18.0, "0.10": 17.0}


def test_equal_scores_pass_a_threshold_together() -> None:
    """Three of twenty share the second place: one above 5 % is allowed, four are above any lower value."""
    untouched = [float(v) for v in range(16)] + [50.0, 50.0, 50.0, 60.0]
    assert thresholds_of(untouched) == {"0.01": 60.0, "0.05": 50.0, "0.10": 50.0}
    values, forged = np.array([*untouched, 50.0, 55.0]), np.arange(22) >= 20
    fitted = fit_rule({"max": values}, forged, resamples=0)
    assert fitted.validation["false_alarms"] == {"0.01": 0.0, "0.05": 0.05, "0.10": 0.05}
    assert fitted.validation["found"] == {"0.01": 0.0, "0.05": 0.5, "0.10": 0.5}


def test_rates_hold_on_the_photos_they_are_made_of() -> None:
    values, forged = normal_photos(400, seed=2)
    fitted = fit_rule({"max": np.round(values, 1)}, forged, resamples=0)
    scores = np.array([fitted.score(v) for v in np.round(values, 1)])
    for rate, target in TARGETS.items():
        limit = fitted.thresholds[rate]
        assert (scores[~forged] > limit).mean() <= target
        assert (scores[~forged] >= limit).mean() > target, "a smaller one would do"
        assert fitted.validation["found"][rate] == (scores[forged] > limit).mean()


def test_the_best_statistic_is_chosen_unless_one_is_named() -> None:
    values, forged = normal_photos(200, seed=4)
    noise = np.random.default_rng(9).normal(size=200)
    table = {"max": noise, "window_64": values, "area": values}
    assert fit_rule(table, forged, resamples=0).statistic == "window_64"
    named = fit_rule(table, forged, name="max", resamples=0)
    assert named.statistic == "max"
    assert named.validation["auc"] == named.validation["statistics"]["max"]["auc"]
    assert set(named.validation["statistics"]) == set(table)


def test_figures_are_json_and_come_back() -> None:
    values, forged = normal_photos(80)
    fitted = fit_rule({"max": values}, forged, hosts=[f"photo {i % 8}" for i in range(80)], resamples=50)
    again = ScoreRule.from_dict(json.loads(json.dumps(fitted.to_dict(), allow_nan=False)))
    assert again == fitted
    assert (fitted.validation["photos"], fitted.validation["untouched"], fitted.validation["hosts"]) == (
        80,
        40,
        8,
    )
    low, high = fitted.validation["auc_interval"]
    assert low <= fitted.validation["auc"] <= high
    for rate in TARGETS:
        low, high = fitted.validation["found_interval"][rate]
        assert low <= fitted.validation["found"][rate] <= high


def test_hosts_widen_the_intervals_of_photos_that_are_alike() -> None:
    """Forty copies of four hosts, of which each is one observation."""
    values, forged = normal_photos(8, gap=1.0, seed=1)
    values, forged = np.repeat(values, 20), np.repeat(forged, 20)
    hosts = [f"{i // 20}" for i in range(160)]
    widths = [
        np.diff(fit_rule({"max": values}, forged, hosts=each, resamples=300).validation["auc_interval"])[0]
        for each in (None, hosts)
    ]
    assert widths[1] > 2 * widths[0]


def test_false_alarms_of_hosts_that_took_no_part() -> None:
    """Host b is above everything of host a, and nothing of a is above b: half of the photos, whatever the rate."""
    values = np.array([1.0, 2.0, 3.0, 4.0, 9.0, 9.0, 9.0, 9.0, 20.0])
    forged = np.arange(9) == 8
    hosts = ["a"] * 4 + ["b"] * 4 + ["a"]
    fitted = fit_rule({"max": values}, forged, hosts=hosts, resamples=0)
    assert fitted.validation["false_alarms_left_out"] == dict.fromkeys(TARGETS, 0.5)
    assert set(fitted.validation["false_alarms"].values()) == {0.0}
    assert fit_rule({"max": values}, forged, resamples=0).validation["false_alarms_left_out"] is None
    alone = fit_rule({"max": values}, forged, hosts=["a"] * 9, resamples=0)
    assert alone.validation["false_alarms_left_out"] is None


@pytest.mark.parametrize(
    ("score", "verdict", "rate"),
    [
        (1.0, "edited", 0.01),
        (np.nextafter(0.9, 1), "edited", 0.01),
        (0.9, "unclear", 0.05),
        (np.nextafter(0.7, 1), "unclear", 0.05),
        (0.7, "unclear", 0.10),
        (np.nextafter(0.6, 1), "unclear", 0.10),
        (0.6, "no trace found", 0.10),
        (0.0, "no trace found", 0.10),
    ],
)
def test_verdicts_at_their_edges(score: float, verdict: str, rate: float) -> None:
    assert rule().judge(score) == (verdict, rate)


def test_verdicts_in_words() -> None:
    validation = {"untouched": 240, "false_alarms": {"0.10": 0.1}, "found": {"0.10": 0.62}}
    told = rule(validation=validation)
    assert told.explain(0.97) == "edited (score 0.97; 1 in 100 untouched calibration photos scores as high)"
    assert told.explain(0.8) == "unclear (score 0.80; 1 in 20 untouched calibration photos scores as high)"
    assert told.explain(0.65) == "unclear (score 0.65; 1 in 10 untouched calibration photos scores as high)"
    assert told.explain(0.2) == (
        "no trace found (score 0.20; 90 in 100 untouched and 38 in 100 edited calibration photos score as low)"
    )
    few = rule(validation={"untouched": 40})
    assert (
        few.explain(0.97) == "edited (score 0.97; none of the 40 untouched calibration photos scores as high)"
    )
    assert few.explain(0.8) == told.explain(0.8)
    assert (
        rule().explain(0.1)
        == "no trace found (score 0.10; 90 in 100 untouched calibration photos score as low)"
    )


def test_extreme_values_have_scores() -> None:
    assert rule().score(1e300) == 1.0 and rule().score(-1e300) == 0.0
    assert rule(scale=2.0, offset=-1.0).score(0.5) == 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"statistic": "mode"}, "statistic must be one of max, .*head, got 'mode'"),
        ({"scale": -1.0}, "scale must be at least 0"),
        ({"offset": math.nan}, "must be finite numbers"),
        ({"scale": "2"}, "must be finite numbers"),
        ({"pixel_threshold": 1.5}, r"pixel_threshold must lie in \[0, 1\]"),
        ({"thresholds": {"0.01": 0.9}}, "thresholds must be a mapping with the keys"),
        ({"thresholds": [0.9, 0.8, 0.7]}, "thresholds must be a mapping"),
        ({"thresholds": {"0.01": 0.5, "0.05": 0.7, "0.10": 0.1}}, "fall as the rate rises"),
        ({"validation": None}, "validation must be a mapping"),
    ],
)
def test_rules_that_cannot_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScoreRule.from_dict({**rule().to_dict(), **change})


def test_fields_that_are_missing_or_unknown() -> None:
    values = rule().to_dict()
    with pytest.raises(ValueError, match="got unknown \\['bias'\\]"):
        ScoreRule.from_dict({**values, "bias": 1.0})
    del values["scale"]
    with pytest.raises(ValueError, match="got missing \\['scale'\\]"):
        ScoreRule.from_dict(values)


def test_pixel_curves_count_as_confusion_does() -> None:
    rng = np.random.default_rng(0)
    probability = rng.choice(np.float32([0.0, 0.3, 0.5, 0.98, 0.9995, 1.0]), (50, 70))
    mask = rng.random((50, 70)) < 0.3
    assert (np.diff(PIXEL_THRESHOLDS) > 0).all() and PIXEL_THRESHOLDS[-1] == 1.0
    counts = [confusion(probability, mask, t) for t in PIXEL_THRESHOLDS]
    np.testing.assert_allclose(pixel_curve(probability, mask), [c.f1() for c in counts], rtol=1e-12)
    clean = np.zeros_like(mask)
    shares = [float((probability > np.float32(t)).mean()) for t in PIXEL_THRESHOLDS]
    np.testing.assert_allclose(pixel_curve(probability, clean), shares, rtol=1e-12)


def test_the_pixel_threshold_keeps_untouched_photos_quiet() -> None:
    """Every threshold from 0.3 to 0.8 finds the square, but one untouched pixel in fifty lies at 0.6."""
    mask = np.zeros((100, 100), np.bool_)
    mask[:30, :30] = True
    forged = np.where(mask, 0.8, 0.25).astype(np.float32)
    untouched = np.full((100, 100), 0.1, np.float32)
    untouched[:2] = 0.6
    curves = [pixel_curve(forged, mask)], [pixel_curve(untouched, np.zeros_like(mask))]
    threshold, f1, alarm = choose_pixel_threshold(*curves)
    assert (threshold, f1, alarm) == (0.79, 1.0, 0.0)
    untouched[1:] = 0.1
    untouched[0] = 0.9
    curves = curves[0], [pixel_curve(untouched, np.zeros_like(mask))]
    assert choose_pixel_threshold(*curves) == (0.79, 1.0, pytest.approx(0.01))
    loud = [pixel_curve(np.ones((4, 4), np.float32), np.zeros((4, 4), np.bool_))]
    assert choose_pixel_threshold(curves[0], loud) == (1.0, 0.0, 0.0)
