"""The demonstration checkpoint in the package: that it is there, small, and better than chance."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path

import numpy as np

from frd_model import create_model, load_model
from frd_model.config import PRESETS
from frd_model.data.forge_options import KINDS
from frd_model.data.photos import SPLITS
from frd_model.evaluate import evaluate
from frd_model.labelled import Labelled, forged_samples
from frd_model.predict import Prediction
from frd_model.weights import demo_path, read_metadata


def test_the_demo_is_in_the_package() -> None:
    assert demo_path().stat().st_size <= 12_000_000
    model = create_model("frdnet_mit_b0", preset="lite", pretrained="demo")
    assert model.config == PRESETS["lite"]
    training = read_metadata(demo_path())["metadata"]["training"]
    assert training["data"]["source"] == "sample"


def test_the_demo_finds_edits_in_held_out_photos() -> None:
    # Far below what the model card reports: this guards against a broken file, not against a worse one.
    samples = itertools.islice(forged_samples("heldout", 1, 100).samples, 4)
    report = evaluate(samples, load_model("demo"))
    assert np.mean([row["auc"] for row in report.rows if "auc" in row]) > 0.6


def test_the_readmes_picture_shows_photos_of_the_demo() -> None:
    spec = importlib.util.spec_from_file_location("demo", Path(__file__).parents[2] / "examples" / "demo.py")
    assert spec is not None and spec.loader is not None
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    names = {
        f"{photo}-{kind}-0"
        for photo in [Path(name).stem for name in SPLITS["heldout"]]
        for kind in (*KINDS, "authentic")
    }
    assert set(demo.PICTURE) < names
    assert next(forged_samples("heldout", 1, 0).samples).name in names
    image = np.full((300, 640, 3), 100, np.uint8)
    mask = np.zeros((300, 640), np.bool_)
    mask[:, :320] = True
    result = Prediction(mask.astype(np.float32), mask, 0.9, (300, 640), 0.5, 1.0, "edited")
    panel = demo.panel(Labelled("x", "splicing", image, mask), image, result)
    assert panel.shape == (150, 3 * demo.PANEL_WIDTH, 3)
    photo, truth, heat = np.split(panel, 3, axis=1)
    assert (photo == 100).all() and (truth[:, :150] == 255).all() and not truth[:, 170:].any()
    # the verdict stands at the bottom
    assert (heat[:120] == 100).all() and heat[130:].max() == 255
