"""`prepare`: every engine and precision gives the network's maps, and a command uses the one that it is asked for."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from frd_model import create_model, predict, save_model
from frd_model.cli import main
from frd_model.data.images import write_png
from frd_model.engines import has_bf16, prepare
from frd_model.exported import ExportedNet, Opened
from frd_model.score import TARGETS, ScoreRule

SMALL: dict[str, Any] = {
    "stages": (1,),
    "blocks": 1,
    "grids": ((4, 3), (2, 2), (2, 1)),
    "pyramid_width": 8,
    "trace_widths": (8, 8),
    "image_head": True,
}


def rule(**validation: Any) -> ScoreRule:
    return ScoreRule("head", 1.0, 0.0, 0.5, dict(zip(TARGETS, (0.9, 0.8, 0.7), strict=True)), validation)


def small_net(**validation: Any) -> Any:
    torch.manual_seed(0)
    model = create_model("frdnet_mit_b0", preset="lite", **SMALL).eval()
    model.score_rule = rule(**validation)
    return model


def photo(height: int = 70, width: int = 90) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_torch_gives_the_networks_maps_and_scores_and_leaves_it_alone() -> None:
    model = small_net()
    before = copy.deepcopy(model.state_dict())
    ready = prepare(model, "torch", "float32")
    assert ready.engine == "torch" and ready.precision == "float32"
    want, got = predict(photo(), model), predict(photo(), ready)
    np.testing.assert_allclose(got.probability, want.probability, atol=1e-5)
    assert got.score == pytest.approx(want.score, abs=1e-6) and got.verdict == want.verdict
    assert got.rule == model.score_rule
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert next(model.parameters()).requires_grad and not model.encoder.training
    weight = ready.net.decoder.fuse[0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_bf16_is_near_and_no_float32() -> None:
    model = small_net()
    ready = prepare(model, "torch", "bf16")
    assert {p.dtype for p in ready.parameters()} == {torch.bfloat16}
    want, got = predict(photo(), model), predict(photo(), ready)
    difference = np.abs(got.probability - want.probability)
    assert got.probability.dtype == np.float32 and 0 < difference.max() < 0.02
    assert got.score == pytest.approx(want.score, abs=0.02)


def test_other_networks_and_prepared_ones() -> None:
    class Red(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images[:, :1]

    ready = prepare(Red())
    assert ready.score_rule is None and prepare(ready) is ready
    np.testing.assert_array_equal(predict(photo(), ready).probability, predict(photo(), Red()).probability)
    with pytest.raises(ValueError, match="image_head"):
        ready.with_score(torch.zeros(1, 3, 32, 32))
    with pytest.raises(NotImplementedError, match="train"):
        ready.train()


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True, "avx512_bf16": False}, True),
        ({"avx512_f": True, "avx512_bf16": False, "amx_int8": True}, False),
        ({}, False),
    ],
)
def test_auto_takes_bf16_where_hardware_and_checkpoint_allow_it(
    monkeypatch: pytest.MonkeyPatch, flags: dict[str, bool], wanted: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
    assert has_bf16("cpu") is wanted
    assert prepare(small_net(bf16={"auc": 0.9}), "torch").precision == ("bf16" if wanted else "float32")
    # A checkpoint that does not say what bf16 changes.
    assert prepare(small_net(), "torch").precision == "float32"


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"^engine must be one of auto, torch.*, got 'tensorrt'"):
        prepare(small_net(), "tensorrt")
    with pytest.raises(ValueError, match=r"^precision must be one of auto, float32, bf16, got 'fp8'"):
        prepare(small_net(), precision="fp8")
    with pytest.raises(TypeError, match=r"^model must be a torch module, got str"):
        prepare("demo")  # type: ignore[arg-type]


def test_the_command_records_what_ran(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(small_net(), tmp_path / "net.safetensors")
    write_png(tmp_path / "a.png", photo())
    photo_file, out = tmp_path / "a.png", tmp_path / "out"
    common = ["predict", photo_file, "--out", out, "--checkpoint", tmp_path / "net.safetensors"]

    def run(*more: str) -> int:
        return main([*map(str, common), *more])

    def record() -> Any:
        return json.loads((tmp_path / "out" / "a.json").read_text())

    assert run("--engine", "torch") == 0
    assert record()["engine"] == "torch" and "precision" not in record()
    assert run("--skip-existing") == 0 and "1 done before" in capsys.readouterr().out
    assert run("--skip-existing", "--precision", "bf16") == 1
    assert "precision was None" in capsys.readouterr().err
    assert run("--overwrite", "--precision", "bf16") == 0
    assert record()["precision"] == "bf16"
    assert run("--skip-existing") == 1
    assert "precision was 'bf16'" in capsys.readouterr().err


def test_an_exported_file_stays_in_its_engine() -> None:
    net = ExportedNet(Opened(lambda images: [images[:, :1]], (None, 3, None, None), 1, {}), None, None, {})
    ready = prepare(net)
    assert ready.engine == "exported" and ready.precision == "float32"
    x = torch.randn(2, 3, 32, 40)
    torch.testing.assert_close(ready(x), x[:, :1])
    with pytest.raises(ValueError, match=r"^engine must be auto for an exported file"):
        prepare(net, "torch")
    with pytest.raises(ValueError, match=r"^precision must be float32 or auto"):
        prepare(net, precision="bf16")
