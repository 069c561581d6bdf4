"""The demonstration checkpoint in the package: that it is there, small, and better than chance."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from frd_model import create_model, load_model
from frd_model.config import PRESETS
from frd_model.evaluate import evaluate, forged_samples
from frd_model.weights import demo_path, read_metadata


def test_the_demo_is_in_the_package() -> None:
    assert demo_path().stat().st_size <= 12_000_000
    model = create_model("frdnet_mit_b0", preset="lite", pretrained="demo")
    assert model.config == PRESETS["lite"]
    training = read_metadata(demo_path())["metadata"]["training"]
    assert training["data"]["source"] == "sample"


@pytest.mark.xfail(reason="the checkpoint trained on these forgeries is not in the package yet", strict=False)
def test_the_demo_finds_edits_in_held_out_photos() -> None:
    # Far below what the model card reports: this guards against a broken file, not against a worse one.
    samples = itertools.islice(forged_samples("heldout", 1, 100).samples, 4)
    report = evaluate(samples, load_model("demo"))
    assert np.mean([row["auc"] for row in report.rows if "auc" in row]) > 0.6
