"""Parameters and multiply-accumulates against the published tables."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from frd_model import create_model
from frd_model.cli import main
from frd_model.complexity import count_macs, count_parameters, measure, summary
from frd_model.config import PRESETS, model_config


@pytest.mark.parametrize(
    ("preset", "parameters", "gmac"), [("paper", "39.88", 25.64), ("released", "39.84", 24.99)]
)
def test_counts_at_512(preset: str, parameters: str, gmac: float) -> None:
    model = create_model("frdnet_mit_b2", preset=preset)
    macs = count_macs(model, 512, 512)
    assert f"{count_parameters(model) / 1e6:.2f}" == parameters
    assert f"{count_parameters(model.encoder) / 1e6:.2f}" == "24.20"
    assert macs["total"] / 1e9 == pytest.approx(gmac, rel=0.005)
    assert f"{macs['encoder'] / 1e9:.2f}" == "20.34"
    assert macs["total"] == sum(macs[part] for part in ("stem", "trace", "encoder", "blocks", "decoder"))


def test_the_baseline_is_a_segformer_with_a_deconv_decoder() -> None:
    """Against fvcore on the whole net, apart from what tables do not count."""
    fvcore = pytest.importorskip("fvcore.nn")
    model = create_model("segformer_mit_b2")
    macs = count_macs(model, 512, 512)
    assert f"{count_parameters(model) / 1e6:.2f}" == "25.76"
    assert f"{macs['total'] / 1e9:.2f}" == "21.56" and macs["blocks"] == 0
    small = create_model("segformer_mit_b0").eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        analysis = fvcore.FlopCountAnalysis(small, torch.rand(1, 3, 64, 96)).unsupported_ops_warnings(False)
        counted = analysis.by_operator()
    assert sum(counted.values()) - counted["upsample_bilinear2d"] == count_macs(small, 64, 96)["total"]


@pytest.mark.parametrize("preset", ["paper", "released", "lite"])
def test_the_baseline_has_no_blocks(preset: str) -> None:
    config = model_config("segformer_mit_b0", preset)
    assert (config.encoder, config.blocks) == ("mit_b0", 0)
    assert config.decoder == PRESETS[preset].decoder and not config.decoder_skip


def test_the_small_net_fits_the_package() -> None:
    model = create_model("frdnet_mit_b0", preset="lite")
    assert count_parameters(model) <= 5_500_000


def test_counting_leaves_the_model_alone() -> None:
    model = create_model("frdnet_mit_b0", preset="lite")
    table = summary(model, 64, 64)
    assert next(model.parameters()).device.type == "cpu" and model.training
    assert [line.split()[0] for line in table.splitlines()] == [
        "part",
        "stem",
        "trace",
        "encoder",
        "blocks",
        "decoder",
        "total",
    ]


class Doubles(nn.Module):
    """Holds its product and twice as much at once."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product = x * self.factor
        return torch.cat((product, product)).sum()


def test_measures_any_net() -> None:
    net = Doubles()
    found = measure(net, 64, 128, repeats=3)
    size = 4 * 3 * 64 * 128
    assert 3 * size <= found["peak_bytes"] < 3 * size + 4096
    assert (found["parameters"], found["weight_bytes"], found["macs"]["total"]) == (1, 4, 0)
    low, high = found["seconds_range"]
    assert 0 < low <= found["seconds"] <= high and net.training
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        measure(net, 64, 64, repeats=0)
    with pytest.raises(ValueError, match="model must have parameters, got ReLU without any"):
        measure(nn.ReLU(), 64, 64)


def test_complexity_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    markdown, figures = tmp_path / "table.md", tmp_path / "figures.json"
    arguments = ["complexity", "--model", "segformer_mit_b0", "--size", "32x64", "--repeats", "1"]
    assert main([*arguments, "--markdown", str(markdown), "--json-out", str(figures)]) == 0
    found, printed = json.loads(figures.read_text()), capsys.readouterr().out
    model = create_model("segformer_mit_b0")
    assert found["parameters"] == count_parameters(model)
    assert found["macs"] == count_macs(model, 32, 64) and found["flops"] == 2 * found["macs"]["total"]
    assert (found["height"], found["width"]) == (32, 64)
    assert markdown.read_text() == printed
    assert "| FRD-Net (quoted) | 512x512 | 39 M | 25.6 G | - | - | - |" in printed
    assert "| UnionFormer (quoted) | 512x512 | 210 M | - | - | - | - |" in printed
    assert (
        printed.count("(quoted) |") == 6
        and f"| segformer_mit_b0, paper | 32x64 | {found['parameters'] / 1e6:.2f} M |" in printed
    )
    assert main([*arguments, "--markdown", str(markdown)]) == 1
    assert "exists; give --overwrite" in capsys.readouterr().err


def test_complexity_of_another_module(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["complexity", "--module", "torchvision.models:resnet18", "--size", "224", "--repeats", "1"])
        == 0
    )
    assert "| torchvision.models:resnet18 | 224x224 | 11.69 M | 1.81 G | 3.63 G |" in capsys.readouterr().out
    for module, error, status in (
        ("torchvision.models", "--module must be MODULE:CALLABLE", 2),
        ("torchvision.models:none", "has no attribute 'none'", 1),
        ("no_such_module:net", "No module named 'no_such_module'", 1),
        ("builtins:dict", "--module must return a torch.nn.Module, got dict", 1),
    ):
        assert main(["complexity", "--module", module]) == status
        captured = capsys.readouterr().err
        assert error in captured and captured.count("\n") == 1
