"""Parameters and multiply-accumulates against the published tables."""

from __future__ import annotations

import pytest

from frd_model import create_model
from frd_model.complexity import count_macs, count_parameters, summary


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
    assert macs["total"] == sum(macs[part] for part in ("stem", "encoder", "blocks", "decoder"))


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
        "encoder",
        "blocks",
        "decoder",
        "total",
    ]
