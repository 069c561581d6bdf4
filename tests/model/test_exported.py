"""Exported files as networks: what `load_exported` gives, and the commands on such a file."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from torch import nn

from frd_model import FRDNet, create_model, load_model, predict, save_model
from frd_model.cli import main
from frd_model.export_formats import to_openvino
from frd_model.exported import ExportedNet, load_exported
from frd_model.quantize import compare, quantize, split
from frd_model.score import ScoreRule

SMALL: dict[str, Any] = {
    "stages": (1,),
    "blocks": 1,
    "grids": ((2, 2), (2, 1)),
    "pyramid_width": 8,
    "trace_widths": (8, 8),
    "layer_scale": 1.0,
    "image_head": True,
}
NAMES = ("net.onnx", "net.xml")
RULE = ScoreRule("head", 3.0, 0.5, 0.4, {"0.01": 0.9, "0.05": 0.6, "0.10": 0.1}, {"untouched": 40})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small net with an image-level head and a rule that needs it, in files of three formats; a photo."""
    folder = tmp_path_factory.mktemp("exported")
    torch.manual_seed(0)
    model = create_model("frdnet_mit_b0", preset="lite", **SMALL).eval()
    model.score_rule = RULE
    save_model(model, folder / "net.safetensors", {"training": {"epochs": 3}})
    exported = folder / "net.onnx"
    assert main(["export", str(folder / "net.safetensors"), "--out", str(exported), "--size", "64"]) == 0
    # As `frd export --to openvino` goes on.
    to_openvino(exported, folder / "net.xml")
    pixels = np.random.default_rng(0).integers(0, 256, (70, 131, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "photo.png")
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> FRDNet:
    return load_model(folder / "net.safetensors")


@pytest.mark.parametrize("name", NAMES)
def test_a_file_holds_the_checkpoint_beside_the_weights(name: str, folder: Path, model: FRDNet) -> None:
    net = load_exported(folder / name)
    assert net.config == model.config and net.score_rule == RULE
    assert net.metadata["training"] == {"epochs": 3}
    assert not net.training
    with pytest.raises(NotImplementedError, match="train"):
        net.train()


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_image_level_logits(name: str, folder: Path, model: FRDNet) -> None:
    assert_same(load_exported(folder / name), model, [(1, 3, 64, 96), (3, 3, 33, 40), (2, 3, 1, 5)])


def assert_same(net: ExportedNet, model: FRDNet, shapes: list[tuple[int, ...]]) -> None:
    for shape in shapes:
        images = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            logits, scores = model.with_score(images)
        found, found_scores = net.with_score(images)
        torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found_scores, scores, rtol=1e-4, atol=1e-4)
        assert torch.equal(net(images.double()), found)


def test_a_file_serves_several_threads(folder: Path, model: FRDNet) -> None:
    images = torch.randn(8, 3, 64, 64)
    with torch.no_grad():
        logits = model(images)
    for name in NAMES:
        net = load_exported(folder / name)
        with ThreadPoolExecutor(4) as pool:
            found = torch.cat(list(pool.map(net, images.split(1))))
        torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-4)


def test_bf16_by_openvino(folder: Path, model: FRDNet) -> None:
    images = torch.randn(1, 3, 64, 96)
    found = load_exported(folder / "net.xml", "bf16")(images)
    with torch.no_grad():
        assert (found - model(images)).abs().max() < 0.1
    with pytest.raises(NotImplementedError, match=r"float32 for a \.onnx"):
        load_exported(folder / "net.onnx", "bf16")
    with pytest.raises(ValueError, match="precision"):
        load_exported(folder / "net.xml", "half")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Eight smooth photos with noise, of several sizes."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    files = [folder / f"{i}.png" for i in range(8)]
    for i, file in enumerate(files):
        coarse = Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)).resize(
            (80 + i, 70), Image.BICUBIC
        )
        noisy = np.asarray(coarse) + rng.normal(0, 3, (70, 80 + i, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file)
    return files


def test_8_bits(folder: Path, photos: list[Path], tmp_path: Path, model: FRDNet) -> None:
    """All but the first convolutions are 8 bit, and the error that is told is that of the file."""
    calibrating, compared = split(photos)
    assert [file.stem for file in calibrating] == list("012456") and [file.stem for file in compared] == list(
        "37"
    )
    quantize(folder / "net.onnx", tmp_path / "net.onnx", calibrating, 64)
    graph = onnx.load(tmp_path / "net.onnx").graph
    made_by = {output: node.op_type for node in graph.node for output in node.output}
    convolutions = [[made_by.get(name) for name in n.input] for n in graph.node if n.op_type == "Conv"]
    in_float = [inputs for inputs in convolutions if inputs[1] != "DequantizeLinear"]
    # The stem's two, the one that reads them beside the image, and the next.
    assert [inputs[0] for inputs in in_float] == ["Pad", "Pad", "Concat", "Gelu"] and len(convolutions) > 20
    net = load_exported(tmp_path / "net.onnx")
    assert net.score_rule == RULE
    found = compare(model, net, compared, 64)
    pixels = np.asarray(Image.open(compared[0]))[3:67, 9:73]
    a, b = (predict(pixels, n, raw=True) for n in (model, net))
    assert found.photos == 2 and found.error == max(found.map, found.score)
    assert 0 < np.abs(a.probability - b.probability).mean() <= found.map < 0.02
    assert abs(a.score - b.score) <= found.score < 0.02


@pytest.mark.build
@pytest.mark.parametrize("name", NAMES)
def test_frd_export_in_8_bits(
    name: str, folder: Path, photos: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / name
    command = ["export", str(folder / "net.safetensors"), "--out", str(out), "--size", "64"]
    assert main([*command, "--int8", str(photos[0].parent), "--max-error", "0"]) == 1
    assert "8 bits may change" in capsys.readouterr().err and not list(out.parent.iterdir())
    assert main([*command, "--int8", *map(str, photos)]) == 0
    assert "8 bits on 2 other photos" in capsys.readouterr().out
    assert load_exported(out).metadata["int8"] == {"photos": 6}


@pytest.mark.build
@pytest.mark.parametrize(
    ("to", "name", "least"),
    [
        ("openvino", "net.xml", 1),
        ("torch-export", "net.pt2", 1),
        pytest.param(
            *("aoti", "net.pt2", 97),
            marks=pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs g++"),
        ),
    ],
)
def test_frd_export_to_other_formats(
    to: str,
    name: str,
    least: int,
    folder: Path,
    model: FRDNet,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / name
    assert (
        main(["export", str(folder / "net.safetensors"), "--out", str(out), "--to", to, "--size", "128"]) == 0
    )
    assert "1x3x128x128" in capsys.readouterr().out
    net = load_exported(out)
    assert net.config == model.config and net.score_rule == RULE and net.metadata["training"] == {"epochs": 3}
    shapes = [(1, 3, 128, 160), (3, 3, 97, 130), (2, 3, 193, 97)]
    assert_same(net, model, shapes if least > 1 else [*shapes, (2, 3, 1, 5), (1, 3, 33, 320)])
    if least > 1:
        with pytest.raises(ValueError, match="from 97 pixels on, got 96 x 128"):
            net(torch.randn(1, 3, 96, 128))
    if to == "torch-export":
        operators = {str(node.target) for node in torch.export.load(out).graph.nodes}
        assert not any(name.startswith("frd") for name in operators)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    assert main(["export", str(folder / "net.safetensors"), "--out", str(out), "--to", to]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert before == {file: file.read_bytes() for file in tmp_path.iterdir()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "net.pt2"], "torch-export or aoti"),
        (["--out", "net.pt2", "--to", "aoti", "--int8", "PHOTOS"], "goes with onnx and openvino"),
        (["--out", "net.onnx", "--int8", "PHOTOS/0.png"], "at least 4 photos, got 1"),
        (["--out", "net.onnx", "--max-error", "0.1"], "goes with --int8"),
        (["--out", "net.pth"], "path: must end in .onnx, .xml, .pt2, got"),
        (["--out", "net.onnx", "--to", "openvino"], "must end in .xml"),
        (["--out", "net.xml", "--to", "onnx"], "must end in .onnx"),
        (["--out", "net.xml", "--opset", "18"], "opset: goes with ONNX"),
    ],
    ids=str,
)
def test_bad_arguments_of_frd_export(
    options: list[str],
    message: str,
    photos: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    options = [option.replace("PHOTOS", str(photos[0].parent)) for option in options]
    assert main(["export", "demo", *options]) != 0
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_predict_judges_as_the_checkpoint_does(folder: Path, model: FRDNet) -> None:
    net = load_exported(folder / "net.onnx")
    for options in ({}, {"size": "tiles", "tile": 64, "overlap": 16}, {"size": "resize"}):
        wanted = predict(folder / "photo.png", model, **options)
        found = predict(folder / "photo.png", net, device="cpu", **options)
        np.testing.assert_allclose(found.probability, wanted.probability, atol=1e-4)
        assert found.score == pytest.approx(wanted.score, abs=1e-4)
        assert (found.verdict, found.threshold, found.rule) == (wanted.verdict, 0.4, RULE)


def test_frd_predict_and_evaluate(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = []
    for name in ("net.safetensors", "net.onnx"):
        command = ["predict", str(folder / "photo.png"), "--out", str(tmp_path / name), "--json"]
        assert main([*command, "--checkpoint", str(folder / name)]) == 0
        records.append(json.loads(capsys.readouterr().out))
    assert records[1]["checkpoint"].endswith("net.onnx")
    assert records[1]["verdict"] == records[0]["verdict"]
    assert records[1]["score"] == pytest.approx(records[0]["score"], abs=1e-4)
    Image.fromarray(np.eye(70, 131, dtype=np.uint8) * 255).save(tmp_path / "photo.png")
    figures = []
    for name in ("net.safetensors", "net.onnx"):
        out = tmp_path / f"{name}.json"
        command = ["evaluate", "--images", str(folder), "--masks", str(tmp_path), "--json-out", str(out)]
        assert main([*command, "--checkpoint", str(folder / name), "--resamples", "10"]) == 0
        figures.append(json.loads(out.read_bytes())["forged"])
    assert figures[1]["auc"] == pytest.approx(figures[0]["auc"], abs=1e-3)


class Red(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2.0 * x[:, :1]


@pytest.fixture(scope="module")
def fixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A foreign file: batch 1, 64 x 64, other names, no metadata."""
    path = tmp_path_factory.mktemp("fixed") / "red.onnx"
    torch.onnx.export(
        Red(), (torch.randn(1, 3, 64, 64),), path, dynamo=True, input_names=["in"], verbose=False
    )
    return path


def test_a_foreign_file_of_one_size(fixed: Path, folder: Path) -> None:
    net = load_exported(fixed)
    images = torch.randn(3, 3, 64, 64)
    assert torch.equal(net(images), 2 * images[:, :1])
    assert net.score_rule is None and net.config is None
    with pytest.raises(ValueError, match="image_head"):
        net.with_score(images)
    with pytest.raises(ValueError, match=r"64 x 64 pixels only, got 70 x 131"):
        predict(folder / "photo.png", net)
    options = {"size": "tiles", "tile": 64, "overlap": 16}
    assert predict(folder / "photo.png", net, **options).probability.shape == (70, 131)


def test_bad_files_and_arguments(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(folder / "net.xml", tmp_path / "alone.xml")
    for name in ("none.onnx", "none.pt2", "alone.xml"):
        with pytest.raises(FileNotFoundError, match="no such file"):
            load_exported(tmp_path / name)
    for name in ("damaged.onnx", "alone.xml", "damaged.pt2"):
        (tmp_path / name).write_bytes((folder / "net.onnx").read_bytes()[:5000])
        (tmp_path / name).with_suffix(".bin").touch()
        with pytest.raises(ValueError, match="does not load it"):
            load_exported(tmp_path / name)
    torch.export.save(
        torch.export.export(Red().eval(), (torch.randn(1, 3, 64, 64),)), tmp_path / "foreign.pt2"
    )
    with pytest.raises(ValueError, match="no file of `frd export`"):
        load_exported(tmp_path / "foreign.pt2")
    with pytest.raises(ValueError, match="must be a local one"):
        load_exported("hf://owner/name/net.pt2")
    with pytest.raises(ValueError, match=r"must end in \.onnx, \.xml, \.pt2"):
        load_exported(folder / "net.safetensors")
    photo, exported = str(folder / "photo.png"), str(folder / "net.onnx")
    predict_it = ["predict", photo, "--out", str(tmp_path / "out"), "--checkpoint", exported]
    assert main([*predict_it, "--preset", "lite"]) != 0
    assert "holds its network" in capsys.readouterr().err
    calibrate = ["calibrate", "--images", "x", "--masks", "y", "--out", "z.safetensors"]
    assert main([*calibrate, "--checkpoint", exported]) != 0
    assert "calibrate, then export" in capsys.readouterr().err
    monkeypatch.setattr("frd_model.exported.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install frd-kernels\[onnxruntime\]"):
        load_exported(exported)
