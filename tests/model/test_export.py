"""Nets out of Python: ONNX run by onnxruntime, and torch.export, at other batches and sizes than those traced."""

from __future__ import annotations

import copy
import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import frd_kernels as fk
from frd_kernels.convert import fold
from frd_model import create_model, save_model
from frd_model.cli import main
from frd_model.export import export_onnx

pytest.importorskip("onnx", reason="ONNX export needs onnx")
pytest.importorskip("onnxscript", reason="ONNX export needs onnxscript")
ort = pytest.importorskip("onnxruntime", reason="ONNX files are run by onnxruntime")

BUILD = pytest.mark.build
AUTO = torch.export.Dim.AUTO
ANY_SIZE = [{0: AUTO, 2: AUTO, 3: AUTO}]
# Few stages and blocks; layer_scale 1, so that the clustering counts. No map here has fewer rows or columns than a
# grid: bins would repeat, centres tie exactly, and rounding choose between them.
SMALL: dict[str, Any] = {"layer_scale": 1.0, "stages": (1,), "blocks": 1, "grids": ((4, 3), (2, 2), (2, 1))}
NETS: dict[str, dict[str, Any]] = {
    "paper": {"decoder_widths": (8,), "icm_alpha": 0.5},
    "released": {"decoder_widths": (8,)},
    "lite": {"pyramid_width": 8, "trace_widths": (8, 8), "icm_alpha": 0.5},
}
SIZES = [(1, 32, 32), (4, 64, 64), (2, 97, 130), (1, 33, 320), (3, 1, 5), (1, 224, 96)]


def small_net(preset: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = create_model("frdnet_mit_b0", preset=preset, **{**SMALL, **NETS[preset], **options})
    return model.eval().requires_grad_(False)


def session(path: Path | str) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def assert_same(opened: Any, model: nn.Module, *shape: int) -> None:
    """onnxruntime gives PyTorch's result up to float32's rounding, for one of three inputs: of thousands of pixels
    some are as near to two centres as rounding can tell, and fall to either. A wrong graph fails for all."""
    for attempt in range(3):
        x = torch.randn(shape)
        out = torch.from_numpy(opened.run(None, {opened.get_inputs()[0].name: x.numpy()})[0])
        if attempt == 2 or torch.allclose(out, model(x), rtol=1e-4, atol=1e-5):
            break
    torch.testing.assert_close(out, model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.build
@pytest.mark.parametrize("preset", NETS)
def test_a_net_at_every_batch_and_size(preset: str, tmp_path: Path) -> None:
    model = small_net(preset)
    before = copy.deepcopy(model.state_dict())
    done = export_onnx(model.train(), tmp_path / "net.onnx", size=64)
    assert model.training and all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    assert list(done.checks) == [(1, 3, 64, 64), (3, 3, 33, 65)]
    assert max(done.checks.values()) < 1e-4
    opened = session(done.path)
    assert opened.get_inputs()[0].shape == ["batch", 3, "height", "width"]
    assert opened.get_outputs()[0].shape == ["batch", 1, "height", "width"]
    model.eval()
    for batch, height, width in SIZES:
        assert_same(opened, model, batch, 3, height, width)


def test_the_clustering_counts_in_these_nets() -> None:
    """Else the test above would not see it."""
    for preset in NETS:
        model = small_net(preset)
        x = torch.randn(1, 3, 64, 96)
        y = model(x)
        for block in model.blocks:  # type: ignore[union-attr]
            block.mixer.icm = nn.Identity()
        assert (model(x) - y).abs().max() > 1e-2


@BUILD
def test_a_timm_backbone_and_the_grids_of_the_paper(tmp_path: Path) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"stages": (1, 2), "blocks": 1, "decoder_widths": (8,), "layer_scale": 1.0}
    model = create_model("frdnet_resnet10t", preset="paper", **options).eval().requires_grad_(False)
    opened = session(export_onnx(model, tmp_path / "net.onnx", size=64).path)
    for shape in ((1, 3, 64, 64), (2, 3, 97, 130), (1, 3, 7, 40)):
        assert_same(opened, model, *shape)


@BUILD
def test_a_fixed_file_takes_its_size_alone(tmp_path: Path) -> None:
    model = small_net("released").half()
    done = export_onnx(
        nn.DataParallel(model), tmp_path / "a" / "net.onnx", dynamic=False, size=(33, 64), opset=19
    )
    assert list(done.checks) == [(1, 3, 33, 64)] and next(model.parameters()).dtype == torch.float16
    opened = session(done.path)
    assert opened.get_inputs()[0].shape == [1, 3, 33, 64]
    assert_same(opened, model.float(), 1, 3, 33, 64)
    import onnx

    proto = onnx.load(done.path)
    assert [entry.version for entry in proto.opset_import if entry.domain == ""] == [19]
    assert not [node.op_type for node in proto.graph.node if node.domain]


@pytest.mark.build
def test_what_a_wrong_graph_does(tmp_path: Path) -> None:
    """One that computes something else at other sizes, one that fails there: nothing is written."""

    class Frozen(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            factor = 2.0 if torch.compiler.is_exporting() and x.shape[2] > 0 else 1.0
            return factor * x[:, :1]

    class Fails(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[:, :1].reshape(-1, 1, 96, 160) if torch.compiler.is_exporting() else x[:, :1]

    path = tmp_path / "net.onnx"
    for net, message in ((Frozen(), "PyTorch's logits"), (Fails(), "the exported file fails")):
        with pytest.raises(RuntimeError, match=message):
            export_onnx(net, path, size=64)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"size": 0}, ValueError, "size"),
        ({"size": (64,)}, ValueError, "size"),
        ({"size": True}, ValueError, "size"),
        ({"opset": 19.0}, ValueError, "opset"),
        ({"opset": 5}, ValueError, "opset"),
        ({"opset": 999}, ValueError, "opset"),
        ({"model": "net"}, TypeError, "model"),
        ({"path": "."}, IsADirectoryError, "directory"),
    ],
    ids=str,
)
def test_bad_arguments(
    arguments: dict[str, Any],
    error: type[Exception],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        export_onnx(**{"model": nn.Identity(), "path": "net.onnx", **arguments})
    assert not list(tmp_path.iterdir())


LAYERS: dict[str, Any] = {
    "depthwise": lambda: fk.PDC2d(8, 8, padding=1, groups=8, kind="angular"),
    "dense": lambda: fk.PDC2d(
        8, 6, padding=2, dilation=2, stride=2, kind="radial", theta=0.7, padding_mode="reflect"
    ),
    "block": lambda: fk.PDCBlock2d(8, 6, kind="radial", residual=True, stride=2),
    "dpm": lambda: fk.DPM(8),
    "icm paper": lambda: fk.ICM(8, grids=((4, 4), (2, 2), (2, 1))),
    "icm released": lambda: fk.ICM(8, grids=((4, 3), (2, 2)), variant="released"),
    "coc": lambda: fk.ContextCluster(8, 8, heads=2, head_dim=4),
    "coc dense": lambda: fk.ContextCluster(8, 8, fold_w=1, fold_h=1, heads=2, head_dim=4, dispatch="dense"),
    "fec": lambda: fk.FECCluster(8, 8, heads=2, head_dim=4),
    "pool": lambda: fk.ClusterPool(2, 8, 6),
}


QUICK = ("depthwise",)


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(name, marks=BUILD) for name in LAYERS if name not in QUICK)]
)
def test_a_layer_by_torch_onnx_export(name: str, tmp_path: Path) -> None:
    """As it is: no fold, no use_backend."""
    torch.manual_seed(0)
    layer = LAYERS[name]().eval().requires_grad_(False)
    path = tmp_path / "layer.onnx"
    shapes = {"input" if isinstance(layer, fk.PDC2d) else "x": ANY_SIZE[0]}
    torch.onnx.export(
        layer, (torch.randn(2, 8, 16, 24),), path, dynamo=True, dynamic_shapes=shapes, verbose=False
    )
    opened = session(path)
    for shape in ((1, 8, 16, 24), (3, 8, 12, 20), (2, 8, 22, 18)):
        assert_same(opened, layer, *shape)


@pytest.mark.build
def test_the_older_exporter_says_that_it_fixes_the_clustering(tmp_path: Path) -> None:
    layer, x = LAYERS["icm paper"]().eval(), torch.randn(2, 8, 16, 24)
    with pytest.warns(UserWarning, match="dynamo=True"):
        torch.onnx.export(layer, (x,), tmp_path / "layer.onnx", dynamo=False)
    assert_same(session(tmp_path / "layer.onnx"), layer.requires_grad_(False), *x.shape)


def exported(model: nn.Module, least: int) -> torch.export.ExportedProgram:
    """For every batch, and all sides from `least` on."""
    sides = {
        axis: torch.export.Dim(name, min=least, max=2048) for axis, name in ((2, "height"), (3, "width"))
    }
    return torch.export.export(
        model,
        (torch.randn(2, 3, 160, 200),),
        dynamic_shapes=[{0: torch.export.Dim("batch", min=1, max=64), **sides}],
        prefer_deferred_runtime_asserts_over_guards=True,
    )


@pytest.mark.build
@pytest.mark.parametrize(("preset", "least"), [("paper", 33), ("released", 33), ("lite", 97)])
def test_torch_export_at_every_batch_and_size(preset: str, least: int, tmp_path: Path) -> None:
    """With sides that the strides divide and that they do not; loaded from a file; refused below what was asked."""
    model = small_net(preset)
    program = exported(model, least)
    assert "frd.icm.default" in {str(node.target) for node in program.graph.nodes}
    torch.export.save(program, tmp_path / "net.pt2")
    loaded = torch.export.load(tmp_path / "net.pt2").module()
    automatic = torch.export.export(model, (torch.randn(2, 3, 160, 200),), dynamic_shapes=ANY_SIZE).module()
    for batch, height, width in (
        (2, 160, 200),
        (1, 128, 192),
        (3, 97, 130),
        (1, least, 320),
        (2, 257, least),
    ):
        x = torch.randn(batch, 3, height, width)
        torch.testing.assert_close(loaded(x), model(x))
        torch.testing.assert_close(automatic(x), model(x))
    with pytest.raises(AssertionError, match=str(least)):
        loaded(torch.randn(1, 3, least - 1, 160))


@BUILD
@pytest.mark.build
def test_torch_export_of_the_plain_form_and_of_a_timm_backbone() -> None:
    """Folded, in plain PyTorch and decomposed, the pooling still follows the size."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"stages": (4,), "blocks": 1, "decoder_widths": (8,), "layer_scale": 1.0}
    model = create_model("frdnet_resnet10t", "released", grids=((4, 3), (2, 2), (2, 1)), **options)
    model = model.eval().requires_grad_(False)
    with fk.use_backend("reference"):
        program = exported(fold(model), 64).run_decompositions()
    targets = {str(node.target) for node in program.graph.nodes}
    assert not any("frd" in name or "adaptive" in name for name in targets)
    for batch, height, width in ((1, 64, 64), (2, 97, 130), (3, 224, 96)):
        x = torch.randn(batch, 3, height, width)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


@BUILD
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs g++")
def test_aot_inductor_at_other_sizes(tmp_path: Path) -> None:
    model = small_net("paper")
    path = torch._inductor.aoti_compile_and_package(
        exported(model, 33), package_path=str(tmp_path / "net.pt2")
    )
    compiled = torch._inductor.aoti_load_package(path)
    for batch, height, width in ((2, 160, 200), (1, 128, 192), (3, 97, 130), (1, 33, 320)):
        x = torch.randn(batch, 3, height, width)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = small_net("released")
    save_model(model, tmp_path / "net.safetensors")
    out = tmp_path / "net.onnx"
    out.write_bytes(b"of an earlier run")
    command = ["export", str(tmp_path / "net.safetensors"), "--out", str(out), "--size", "64", "--fixed"]
    assert main(command) == 1
    error = capsys.readouterr().err
    assert "--overwrite" in error and error.count("\n") == 1 and out.read_bytes() == b"of an earlier run"
    assert main([*command, "--overwrite"]) == 0
    assert "1x3x64x64" in capsys.readouterr().out
    assert_same(session(out), model, 1, 3, 64, 64)


def test_the_errors_of_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = ["--out", str(tmp_path / "net.onnx")]
    assert main(["export", str(tmp_path / "none.pt"), *out]) == 1
    assert "none.pt" in capsys.readouterr().err
    for argv in (["demo"], ["demo", *out, "--size", "0"], ["demo", *out, "--size", "many"]):
        with pytest.raises(SystemExit) as stop:
            main(["export", *argv])
        assert stop.value.code == 2
    capsys.readouterr()
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *a: None if name == "onnxruntime" else find(name, *a),
    )
    assert main(["export", "demo", *out]) == 1
    error = capsys.readouterr().err
    assert "onnxruntime" in error and "pip install frd-kernels[export]" in error and error.count("\n") == 1
    with pytest.warns(UserWarning, match="not checked"):
        done = export_onnx(Red(), tmp_path / "red.onnx")
    assert done.path.exists() and done.checks == {}


class Red(nn.Module):
    """A network without any context: the logit of a pixel is its red plane."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :1]
