"""`benchmarks.place`: what each variant changes, and that it changes nothing else."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.place import (
    CONTEXT,
    PARTS,
    VIEW,
    WholeNorms,
    in_the_view,
    measure,
    mirrored,
    padded_by,
    padding_of,
)
from frd_model import create_model
from frd_model.labelled import Labelled
from frd_model.predict import probability_map
from frd_model.shift_test import Window, look_with


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    options = {"stages": (1, 2), "blocks": 1, "pyramid_width": 8, "trace_widths": (8, 8), "drop_path": 0.0}
    model = create_model("frdnet_mit_b0", preset="lite", **options).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


NOISE = np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)


def test_padding_hides_the_border(net: nn.Module) -> None:
    """Without zeros at its border a flat image is the same everywhere."""
    flat = np.full((128, 128, 3), 90, np.uint8)
    spread = {
        mode: np.ptp(probability_map(flat, padded_by(net, mode)))
        for mode in ("zeros", "replicate", "reflect")
    }
    # norms divide what rounding leaves of a flat plane by its small deviation
    assert spread["zeros"] > 0.1 and max(spread["replicate"], spread["reflect"]) < 1e-3


def test_parts(net: nn.Module) -> None:
    before, zeros = copy.deepcopy(net), padded_by(net, "zeros")
    changed = {part: _changed(padded_by(zeros, "replicate", (part,)), zeros) for part in PARTS}
    assert all(changed.values()) and sum(map(len, changed.values())) == len(set().union(*changed.values()))
    assert set().union(*changed.values()) == _changed(padded_by(zeros, "replicate"), zeros)
    assert all("dwconv" in name for name in changed["dwconv"])
    assert padding_of(zeros) == {"zeros"} and padding_of(padded_by(net, "reflect")) == {"reflect"}
    assert not _changed(net, before)


def _changed(model: nn.Module, original: nn.Module) -> set[str]:
    pairs = zip(model.named_modules(), original.modules(), strict=True)
    return {name for (name, m), o in pairs if getattr(m, "padding_mode", 0) != getattr(o, "padding_mode", 0)}


def test_norms_of_the_whole_view(net: nn.Module) -> None:
    norms, crop = WholeNorms(net), Window(32, 32, 96, 96)
    norms.see(NOISE)
    whole = Window(0, 0, 128, 128)
    plain = look_with(net)
    assert np.allclose(look_with(norms.model)(NOISE, whole), plain(NOISE, whole), atol=1e-5)
    assert not np.allclose(look_with(norms.model)(NOISE, crop), plain(NOISE, crop), atol=1e-4)
    norms.see(NOISE // 4)
    assert not np.allclose(look_with(norms.model)(NOISE, whole), plain(NOISE, whole), atol=1e-4)


class Redness(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :1]


@pytest.mark.parametrize("margin", [0, 32, CONTEXT])
def test_surroundings_are_cut_off_again(margin: int) -> None:
    view = np.random.default_rng(1).integers(0, 256, (VIEW, VIEW, 3), np.uint8)
    sizes = []

    def looked(photo: np.ndarray, window: Window) -> np.ndarray:
        sizes.append((window.bottom - window.top, window.right - window.left))
        return look_with(Redness().eval())(photo, window)

    look, begin = in_the_view(looked, margin)
    begin(view)
    expected = look_with(Redness().eval())(view, Window(CONTEXT, CONTEXT + 32, CONTEXT + 256, CONTEXT + 288))
    assert np.array_equal(look(view[CONTEXT:-CONTEXT], Window(0, 32, 256, 288)), expected)
    assert sizes == [(256 + 2 * margin,) * 2]
    mask = np.zeros((VIEW, VIEW), np.bool_)
    mask[300:340, 300:350] = True
    samples = [Labelled("edit", "removal", view, mask), Labelled("quiet", "authentic", view, mask & False)]
    found = measure(samples, look, begin)
    assert found["forged"]["auc"]["difference"]["mean"] == 0 and found["untouched"]["images"] == 1


def test_mirrored_borders_are_cut_off_again() -> None:
    plain, window = look_with(Redness().eval()), Window(16, 0, 112, 96)
    assert np.array_equal(mirrored(plain)(NOISE, window), plain(NOISE, window))
    seen = []
    mirrored(lambda photo, whole: seen.append(photo) or np.zeros(photo.shape[:2], np.float32))(NOISE, window)
    assert np.array_equal(seen[0][CONTEXT - 1, CONTEXT:-CONTEXT], NOISE[17, :96])
