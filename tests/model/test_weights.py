"""Weights on disk: own files, the authors' naming, and files that must be refused."""

from __future__ import annotations

import json
import os
import pickle
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from frd_model import FRDNet, create_model, load_model, save_model
from frd_model.config import PRESETS
from frd_model.weights import export_released, load_weights, read_metadata

TINY = {"stages": (1, 2), "blocks": 1, "pyramid_width": 8, "trace_widths": (8, 8)}
RELEASED = Path(__file__).parent / "data" / "released_state_dict.txt"


def tiny(**overrides: Any) -> FRDNet:
    torch.manual_seed(0)
    return create_model("frdnet_mit_b0", preset="lite", **{**TINY, **overrides}).eval()


def released_shapes() -> dict[str, list[int]]:
    """Names and shapes of the authors' checkpoint."""
    rows = (line.split() for line in RELEASED.read_text().splitlines())
    return {name: [int(side) for side in shape.split("x")] for name, shape in rows}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.safetensors"
    save_model(tiny(), path, {"note": "a test"})
    return path


def test_a_file_describes_itself(saved: Path) -> None:
    model, again = tiny(), load_model(saved)
    assert again.config == model.config and not again.training
    assert read_metadata(saved)["metadata"] == {"note": "a test"}
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)


def test_half_storage(tmp_path: Path, saved: Path) -> None:
    model, path = tiny(), tmp_path / "half.safetensors"
    save_model(model, path, half=True)
    assert path.stat().st_size < 0.6 * saved.stat().st_size
    for name, value in load_model(path).state_dict().items():
        assert value.dtype == model.state_dict()[name].dtype
        torch.testing.assert_close(value, model.state_dict()[name], rtol=2**-10, atol=1e-6)


def test_half_storage_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    model = tiny()
    with torch.no_grad():
        model.decoder.head.bias.fill_(1e6)
    with pytest.raises(ValueError, match=r"decoder\.head\.bias: half storage needs finite values"):
        save_model(model, tmp_path / "x.safetensors", half=True)
    assert not list(tmp_path.iterdir())


def test_saving_is_atomic_and_readable(tmp_path: Path, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(saved.stat().st_mode) == 0o666 & ~umask

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_model(tiny(), saved)
    assert saved.read_bytes() == before and list(tmp_path.iterdir()) == [saved]


def test_metadata_must_be_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="metadata: must be what JSON can hold"):
        save_model(tiny(), tmp_path / "x.safetensors", {"model": object()})


def test_another_configuration_is_named(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"another configuration; .*pyramid_width: 16 against 8"):
        load_weights(tiny(pyramid_width=16), saved)


def truncate(path: Path, saved: Path) -> None:
    path.write_bytes(saved.read_bytes()[:-1000])


def without_configuration(path: Path, saved: Path) -> None:
    save_file({"a": torch.zeros(1)}, path)


def with_unknown_field(path: Path, saved: Path) -> None:
    config = json.dumps({"colour": "red"})
    save_file({"a": torch.zeros(1)}, path, {"format": "frd_model", "config": config})


def with_missing_parameter(path: Path, saved: Path) -> None:
    state = tiny().state_dict()
    state.pop("decoder.head.bias")
    config = json.dumps(tiny().config.to_dict())
    save_file(state, path, {"format": "frd_model", "config": config})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (truncate, "no valid safetensors file"),
        (without_configuration, "holds no FRD-Net configuration"),
        (with_unknown_field, "its configuration is not valid: configuration: unknown field 'colour'"),
        (with_missing_parameter, r"does not fit this FRDNet: 1 missing parameters \(decoder.head.bias\)"),
    ],
)
def test_bad_safetensors_are_refused(tmp_path: Path, saved: Path, spoil: Any, message: str) -> None:
    path = tmp_path / "bad.safetensors"
    spoil(path, saved)
    with pytest.raises(ValueError, match=message) as caught:
        load_model(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


class Payload:
    """Unpickling this would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    path, trace = tmp_path / "evil.pth", tmp_path / "executed"
    torch.save({"model": {"weight": torch.zeros(1)}, "args": Payload(trace)}, path)
    with pytest.raises(ValueError, match="no checkpoint of tensors alone"):
        load_model(path)
    path.write_bytes(pickle.dumps(Payload(trace), protocol=2))
    with pytest.raises(ValueError, match="no checkpoint of tensors alone"):
        load_model(path)
    assert not trace.exists()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors: no such file"):
        load_model(tmp_path / "nothing.safetensors")


def test_released_names_and_shapes() -> None:
    with torch.device("meta"):
        model = FRDNet(PRESETS["released"])
    exported = {name: list(value.shape) for name, value in export_released(model).items()}
    assert exported == released_shapes()


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("wrapped", [True, False])
def test_the_authors_checkpoint_loads(tmp_path: Path, prefix: str, wrapped: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    state = {
        prefix + name: torch.rand(shape, generator=generator) for name, shape in released_shapes().items()
    }
    path = tmp_path / "released.pth"
    torch.save({"model": state, "epoch": 3} if wrapped else state, path)
    model = load_model(path)
    assert model.config == PRESETS["released"]
    own = model.state_dict()
    # One parameter of each kind that is renamed, reshaped or joined.
    angular = state[prefix + "fecblock2.0.token_mixer.convDC2.conv1.weight"]
    assert torch.equal(own["blocks.1.mixer.dpm.angular.pdc.weight"], angular)
    hidden = state[prefix + "fecblock1.0.mlp.fc1.weight"]
    assert torch.equal(own["blocks.0.mlp.fc1.weight"].flatten(1), hidden)
    alphas = [
        state[f"{prefix}fecblock1.0.token_mixer.{c}.sim_alpha"] for c in ("cluster16", "cluster4", "cluster2")
    ]
    assert torch.equal(own["blocks.0.mixer.icm.alpha"], torch.cat(alphas))
    back = export_released(model)
    assert all(torch.equal(back[name.removeprefix(prefix)], value) for name, value in state.items())


def test_a_checkpoint_that_lacks_a_name(tmp_path: Path) -> None:
    state = {name: torch.zeros(shape) for name, shape in released_shapes().items()}
    state.pop("norm_fec4.bias")
    torch.save(state, tmp_path / "short.pth")
    with pytest.raises(
        ValueError, match=r"1 missing parameters \(norm_fec4\.bias\), 0 unexpected parameters"
    ):
        load_model(tmp_path / "short.pth")


def test_a_state_dict_that_is_none(tmp_path: Path) -> None:
    torch.save([1, 2, 3], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="a state dict of tensors is needed, got list"):
        load_model(tmp_path / "list.pth")
