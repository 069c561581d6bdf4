"""`prepare`: every engine and precision gives the network's maps, and a command uses the one that it is asked for."""

from __future__ import annotations

import copy
import importlib.util
import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from frd_model import create_model, engine_cache, engines, predict, save_model
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
# What a checkpoint says of bf16.
LITTLE = {"auc": 0.899, "pixel_difference": 0.001}


def rule(**validation: Any) -> ScoreRule:
    thresholds = dict(zip(TARGETS, (0.9, 0.8, 0.7), strict=True))
    return ScoreRule("head", 1.0, 0.0, 0.5, thresholds, {"auc": 0.9} | validation)


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
    assert prepare(small_net(bf16=LITTLE), "torch").precision == ("bf16" if wanted else "float32")
    # A checkpoint that does not say what bf16 changes, or that it changes much.
    for rest in (
        {},
        {"bf16": LITTLE | {"auc": 0.89}},
        {"bf16": LITTLE | {"pixel_difference": 0.01}},
        {"bf16": 1},
    ):
        assert prepare(small_net(**rest), "torch").precision == "float32"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder for this test."""
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setattr(engine_cache, "cached_assets_path", lambda *_: folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("engine", engine_cache.ENDINGS)
def test_an_exported_copy_is_made_once_and_gives_the_maps(cache: Path, engine: str) -> None:
    model, said = small_net(bf16=LITTLE), []
    ready = prepare(model, engine, "float32", notify=said.append)
    assert (ready.engine, ready.precision) == (engine, "float32") and len(said) == 1
    want, got = predict(photo(), model), predict(photo(), ready)
    np.testing.assert_allclose(got.probability, want.probability, atol=1e-4)
    assert got.score == pytest.approx(want.score, abs=1e-4) and got.verdict == want.verdict
    made = sorted(cache.rglob("net.*"))
    times = [file.stat().st_mtime_ns for file in made]

    assert prepare(model, engine, "float32", notify=said.append).engine == engine
    assert prepare(model).engine == "torch"
    assert len(said) == 1 and [file.stat().st_mtime_ns for file in made] == times
    if engine == "openvino":
        bf16 = prepare(model, engine, "bf16")
        assert bf16.precision == "bf16"
        assert 0 < np.abs(predict(photo(), bf16).probability - want.probability).max() < 0.02

    # Other weights have a copy of their own.
    with torch.no_grad():
        model.decoder.head.bias.add_(1)
    assert engine_cache._folder(model, engine) != made[0].parent


def write_slowly(model: nn.Module, path: Path, **_: object) -> None:
    """In the place of `export_model`: counts its calls beside the cache."""
    path.parent.mkdir()
    path.write_text("first half")
    time.sleep(0.1)
    path.write_text("whole")
    with (path.parents[2] / "calls").open("a") as calls:
        calls.write("x")


def ask(folder: Path) -> str:
    """In a process of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_cache, "cached_assets_path", lambda *_: folder)
        patch.setattr(engine_cache, "export_model", write_slowly)
        return engine_cache.export_once(small_net(), "onnxruntime").read_text()


def test_a_broken_copy_is_made_anew(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_cache, "export_model", write_slowly)
    model, said = small_net(), []
    file = engine_cache.export_once(model, "openvino", said.append)
    assert file == engine_cache.export_once(model, "openvino", said.append) and len(said) == 1
    for damage in (
        lambda: file.write_text("whol"),
        file.unlink,
        lambda: (file.parent / "sha256.json").unlink(),
    ):
        damage()
        assert engine_cache.export_once(model, "openvino", said.append).read_text() == "whole"
    assert (cache / "calls").read_text() == "xxxx" and len(said) == 4


def test_two_processes_make_one_copy(cache: Path) -> None:
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(ask, [cache, cache]) == ["whole", "whole"]
    assert (cache / "calls").read_text() == "x"


def test_a_copy_that_could_not_be_written_leaves_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(model: nn.Module, path: Path, **_: object) -> None:
        path.parent.mkdir()
        path.write_text("half")
        raise RuntimeError("the file computes something else")

    monkeypatch.setattr(engine_cache, "export_model", fail)
    with pytest.raises(RuntimeError, match="something else"):
        prepare(small_net(), "openvino", notify=lambda _: None)
    assert not [file for file in cache.iterdir() if file.suffix != ".lock"]


@pytest.mark.slow
def test_compile_gives_the_maps_of_every_size() -> None:
    torch.compiler.reset()
    model = small_net()
    ready = prepare(model, "compile", "float32")
    for size in ((64, 64), (70, 90)):
        want, got = predict(photo(*size), model), predict(photo(*size), ready)
        np.testing.assert_allclose(got.probability, want.probability, atol=1e-4)
        assert got.score == pytest.approx(want.score, abs=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert ready.net._compiled_call_impl is not None and model._compiled_call_impl is None


def test_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotImplementedError, match=r"^engine onnxruntime has no bf16 on CPUs"):
        prepare(small_net(), "onnxruntime", "bf16")
    with pytest.raises(ValueError, match=r"^engine openvino runs an FRDNet on the CPU, got Conv2d on cpu"):
        prepare(nn.Conv2d(3, 1, 1), "openvino")
    find = importlib.util.find_spec
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None if name == "openvino" else find(name))
        with pytest.raises(ModuleNotFoundError, match=r"pip install frd-kernels\[openvino\]"):
            prepare(small_net(), "openvino", notify=lambda _: None)
    ready = prepare(small_net(), "torch", "float32")
    assert prepare(ready) is ready and prepare(ready, "torch", "float32") is ready
    with pytest.raises(ValueError, match=r"^precision must be auto or 'float32', .* got 'bf16'"):
        prepare(ready, precision="bf16")
    with pytest.raises(ValueError, match=r"^engine must be one of auto, torch.*, got 'tensorrt'"):
        prepare(small_net(), "tensorrt")
    with pytest.raises(ValueError, match=r"^precision must be one of auto, float32, bf16, got 'fp8'"):
        prepare(small_net(), precision="fp8")
    with pytest.raises(TypeError, match=r"^model must be a torch module, got str"):
        prepare("demo")  # type: ignore[arg-type]


def test_the_benchmark_checks_then_times_in_turns(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(small_net(bf16=LITTLE), tmp_path / "net.safetensors")

    def bench(*more: str) -> int:
        common = ["bench", "predict", "--checkpoint", str(tmp_path / "net.safetensors"), "--size", "64"]
        file = ["--json-out", str(tmp_path / "bench.json"), "--overwrite"]
        return main([*common, "--repeats", "2", "--engines", "torch", *file, *more])

    def rows() -> dict[tuple[str, str], Any]:
        found = json.loads((tmp_path / "bench.json").read_text())["rows"]
        return {(row["engine"], row["precision"]): row for row in found}

    assert main(["bench", "predict", "--checkpoint", "net.onnx"]) == 1
    assert "--checkpoint must be a network, got the exported file 'net.onnx'" in capsys.readouterr().err
    assert bench() == 0
    found = rows()
    assert list(found) == [("as loaded", "float32"), ("torch", "float32"), ("torch", "bf16")]
    assert min(row["ratio"] for row in found.values()) == 1 and all(row["ms"] > 0 for row in found.values())
    assert 1e-4 < found["torch", "bf16"]["error"] < 5e-2 and found["torch", "float32"]["error"] < 1e-4
    assert "auto takes torch" in capsys.readouterr().out

    # One that computes something else fails and is not timed.
    monkeypatch.setattr(engines.Prepared, "forward", lambda self, images: images[:, :1])
    assert bench() == 1
    assert "ms" not in rows()["torch", "float32"] and "differs from PyTorch" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        bench("--engines", "tensorrt")


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
