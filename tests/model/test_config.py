"""The configuration: presets, JSON round trip, and one clear line for everything that cannot be."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from frd_model import PRESETS, FRDNetConfig


@pytest.mark.parametrize("preset", ["paper", "released", "lite"])
def test_survives_json(preset: str) -> None:
    config = PRESETS[preset]
    assert FRDNetConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_paper_and_released_differ_where_equations_and_code_do() -> None:
    differing = {line.split(":")[0] for line in PRESETS["paper"].differences(PRESETS["released"])}
    assert differing == {"variant", "decoder_kernel", "decoder_skip"}


def test_missing_fields_take_defaults() -> None:
    assert FRDNetConfig.from_dict({"blocks": 2}) == FRDNetConfig(blocks=2)


def test_replace_checks_again() -> None:
    assert PRESETS["paper"].replace(blocks=1).blocks == 1
    with pytest.raises(ValueError, match=r"blocks: must be an integer of at least 0, got -1"):
        PRESETS["paper"].replace(blocks=-1)


def test_configurations_are_frozen_and_hashable() -> None:
    assert len({PRESETS["paper"], FRDNetConfig()}) == 1
    with pytest.raises(AttributeError):
        FRDNetConfig().blocks = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"depth": 3}, "unknown field 'depth'"),
        ({"encoder": ""}, "encoder: the name of a backbone is needed, got ''"),
        ({"variant": "code"}, "variant: must be one of paper, released, got 'code'"),
        ({"norm": "layer"}, "norm: must be one of group, batch, none, got 'layer'"),
        ({"decoder": "unet"}, "decoder: must be one of deconv, pyramid, got 'unet'"),
        ({"stem": True}, "stem: must be one of none, pdc, got True"),
        ({"icm": 1}, "icm: must be true or false, got 1"),
        ({"blocks": True}, "blocks: must be an integer of at least 0, got True"),
        ({"stages": [4, 3]}, "stages: must be ascending integers from 1 on"),
        ({"stages": []}, "stages: must be ascending integers from 1 on"),
        ({"grids": []}, "grids: must be pairs (rows, columns)"),
        ({"grids": [[8, 8], [4, 4], [2, 0]]}, "grids: must be pairs (rows, columns)"),
        ({"grids": [[8, 8, 1]]}, "grids: must be pairs (rows, columns)"),
        ({"icm_centres": "two"}, "icm_centres: must be one of last, divergent, got 'two'"),
        (
            {"icm_centres": "divergent", "variant": "released"},
            'icm_centres: must be "last" in variant "released"',
        ),
        ({"icm_centres": "divergent", "grids": [[2, 1]]}, "a round of two or more centres before the last"),
        ({"decoder_widths": [256, 0]}, "decoder_widths: must be integers of at least 1"),
        ({"decoder_kernel": 5}, "decoder_kernel: must be 2, 3 or 4, got 5"),
        ({"drop_path": 1.0}, "drop_path: must lie in [0, 1), got 1.0"),
        ({"mlp_ratio": 0}, "mlp_ratio: must be above 0, got 0"),
        ({"layer_scale": "small"}, "layer_scale: must be a number or None, got 'small'"),
        ({"angular": False, "central": False}, "a DPM needs at least one of its two PDC blocks"),
        ({"stem": "pdc", "stem_central": 0, "stem_angular": 0}, "a pdc stem needs at least one channel"),
        ({"decoder": "pyramid", "decoder_skip": True}, "belongs to the deconv decoder only"),
    ],
)
def test_refuses_in_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        FRDNetConfig.from_dict(values)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_needs_a_mapping() -> None:
    with pytest.raises(TypeError, match="a mapping is needed, got list"):
        FRDNetConfig.from_dict([("blocks", 2)])  # type: ignore[arg-type]


def test_numbers_of_numpy_and_torch_become_pythons() -> None:
    given = FRDNetConfig(
        stages=np.array([1, 2]),  # type: ignore[arg-type]
        blocks=np.int64(2),  # type: ignore[arg-type]
        drop_path=np.float32(0.25),  # type: ignore[arg-type]
        icm=np.bool_(False),  # type: ignore[arg-type]
        grids=np.array([[8, 8], [4, 4], [2, 1]]),  # type: ignore[arg-type]
        decoder_widths=[np.int32(8), torch.tensor(4)],  # type: ignore[arg-type]
        mlp_ratio=np.array(2.0),  # type: ignore[arg-type]
        encoder=np.str_("mit_b0"),
    )
    plain = FRDNetConfig("mit_b0", (1, 2), 0.25, blocks=2, icm=False, decoder_widths=(8, 4), mlp_ratio=2.0)
    assert given == plain and hash(given) == hash(plain)
    assert FRDNetConfig.from_dict(json.loads(json.dumps(given.to_dict()))) == plain
    assert PRESETS["lite"].replace(blocks=np.uint8(1)).blocks == 1
    for values in (
        {"blocks": np.float64(2.0)},
        {"icm": np.int64(1)},
        {"drop_path": np.nan},
        {"layer_scale": np.inf},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(values))}: must"):
            FRDNetConfig(**values)
