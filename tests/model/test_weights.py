"""Weights on disk: own files, the authors' naming, and files that must be refused."""

from __future__ import annotations

import argparse
import copy
import io
import json
import os
import pickle
import stat
import subprocess
import sys
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from frd_model import FRDNet, create_model, load_model, save_model
from frd_model.config import PRESETS
from frd_model.train.config import ModelSection, TrainConfig
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


State = dict[str, torch.Tensor]


def states_equal(model: nn.Module, state: State) -> bool:
    own = model.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[name], value) for name, value in state.items())


class Task(nn.Module):
    """As a LightningModule holds a net: under a name of the user's choice, beside parameters of its own."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.localizer = net
        self.criterion = nn.Linear(2, 2)


def wrap_parts(net: nn.Module) -> nn.Module:
    net = copy.deepcopy(net)
    net.encoder = torch.compile(net.encoder)
    net.blocks[0] = nn.DataParallel(net.blocks[0])
    return net


WRAPPINGS = {
    "plain": lambda net: net,
    "data parallel": nn.DataParallel,
    "compiled": torch.compile,
    "averaged": AveragedModel,
    "task": Task,
    "stacked": lambda net: nn.DataParallel(torch.compile(AveragedModel(net))),
    "stacked in a task": lambda net: Task(nn.Sequential(torch.compile(nn.DataParallel(net)))),
    "parts": wrap_parts,
}
CONTAINERS = {
    "bare": lambda state: state,
    "model": lambda state: {"model": state, "epoch": 3},
    "net": lambda state: {"net": state, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}},
    "weights": lambda state: {"weights": state, "ema": None, "best": np.float64(0.5)},
    "nested": lambda state: {"checkpoint": {"ema": {"params": state}}, "step": torch.tensor(7)},
    "namespace": lambda state: {"model": state, "args": argparse.Namespace(lr=1e-4, out=Path("runs"))},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_every_wrapper_saves_and_loads(tmp_path: Path, wrapping: str) -> None:
    net = tiny()
    wrapped = WRAPPINGS[wrapping](net)
    save_model(wrapped, tmp_path / "net.safetensors")
    assert states_equal(load_model(tmp_path / "net.safetensors"), net.state_dict())
    for container, make in CONTAINERS.items():
        torch.save(make(wrapped.state_dict()), tmp_path / "net.pth")
        other = FRDNet(net.config)
        load_weights(other, tmp_path / "net.pth")
        assert states_equal(other, net.state_dict()), container
    other = FRDNet(net.config)
    load_weights(
        WRAPPINGS[wrapping](other) if wrapping != "averaged" else other, tmp_path / "net.safetensors"
    )
    if wrapping not in ("parts", "stacked"):  # these copy the net
        assert states_equal(other, net.state_dict())


SHARDED = """
import sys, torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from frd_model import create_model, save_model
from frd_model.weights import load_weights

out, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=2)
def net():
    return create_model("frdnet_mit_b0", "lite", stages=(1,), blocks=1)
def shard(model):
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    return model
def flat(model):
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"))
for name, wrap in {"ddp": DistributedDataParallel, "fsdp2": shard, "fsdp1": flat}.items():
    model = wrap(net())
    load_weights(model, f"{out}/source.safetensors")
    save_model(model, f"{out}/{name}.safetensors")
    if name == "fsdp2":
        torch.save(model.state_dict(), f"{out}/part{rank}.pth")
        whole = net()
        load_weights(whole, f"{out}/part{rank}.pth")
        save_model(whole, f"{out}/gathered{rank}.safetensors")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_sharded_nets_save_and_load(tmp_path: Path) -> None:
    net = create_model("frdnet_mit_b0", "lite", stages=(1,), blocks=1)
    save_model(net, tmp_path / "source.safetensors")
    root = str(Path(sys.modules["frd_model"].__file__ or "").parents[1])
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", SHARDED, str(tmp_path), str(rank)],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    for name in ("ddp", "fsdp2", "fsdp1", "gathered0", "gathered1"):
        assert states_equal(load_model(tmp_path / f"{name}.safetensors"), net.state_dict()), name
    with pytest.raises(
        ValueError, match="holds one process's part of a sharded net: save the full state dict"
    ):
        load_model(tmp_path / "part0.pth", preset="lite")


def test_averaged_weights_are_preferred(tmp_path: Path) -> None:
    net, other = tiny(), tiny(blocks=1)
    with torch.no_grad():
        for value in other.parameters():
            value.add_(1)
    raw, averaged = other.state_dict(), net.state_dict()
    for key in ("state_dict_ema", "model_ema", "ema", "ema_model"):
        torch.save({"state_dict": raw, key: averaged}, tmp_path / "net.pth")
        model = FRDNet(net.config)
        load_weights(model, tmp_path / "net.pth")
        assert states_equal(model, averaged), key


def test_several_nets_in_a_file(tmp_path: Path) -> None:
    net, other = tiny(), tiny()
    with torch.no_grad():
        other.decoder.head.bias.add_(1)
    pair = nn.ModuleDict({"student": net, "teacher": other})
    torch.save({"state_dict": pair.state_dict()}, tmp_path / "pair.pth")
    with pytest.raises(
        ValueError, match=r"holds several nets, 'state_dict\.student\.' and 'state_dict\.teacher\.'"
    ):
        load_weights(tiny(), tmp_path / "pair.pth")
    with pytest.raises(ValueError, match="model: this ModuleDict holds 2 FRD-Nets; give one of them"):
        save_model(pair, tmp_path / "pair.safetensors")
    torch.save({"model": net.state_dict(), "best_model": other.state_dict()}, tmp_path / "pair.pth")
    model = tiny()
    load_weights(model, tmp_path / "pair.pth")
    assert states_equal(model, net.state_dict())


@pytest.mark.parametrize("averaged", [True, False])
def test_the_state_of_a_training_run(tmp_path: Path, averaged: bool) -> None:
    """last.pt tells its configuration; its averaged weights count, as in last.safetensors."""
    net, other = tiny(), tiny()
    with torch.no_grad():
        other.decoder.head.bias.add_(1)
    config = TrainConfig(model=ModelSection("frdnet_mit_b0", "lite", None, dict(TINY)))
    ema = {"values": net.state_dict(), "updates": 4} if averaged else None
    state = {
        "config": config.to_dict(),
        "model": (other if averaged else net).state_dict(),
        "ema": ema,
        "epoch": 1,
    }
    torch.save(state | {"optimizer": torch.optim.AdamW(net.parameters()).state_dict()}, tmp_path / "last.pt")
    model = load_model(tmp_path / "last.pt")
    assert model.config == net.config and states_equal(model, net.state_dict())
    with pytest.raises(
        ValueError, match="holds another configuration; model against file: pyramid_width: 16 against 8"
    ):
        load_weights(tiny(pyramid_width=16), tmp_path / "last.pt")


def test_a_foreign_checkpoint_takes_name_and_preset(tmp_path: Path) -> None:
    net = create_model("frdnet_mit_b0", "lite")
    torch.save(net.state_dict(), tmp_path / "net.pth")
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    for name in ("net.pth", "net.safetensors"):
        assert states_equal(load_model(tmp_path / name, preset="lite"), net.state_dict())
        model = load_model(tmp_path / name, model="frdnet_mit_b0", preset="lite")
        assert states_equal(model, net.state_dict())
    with pytest.raises(
        ValueError,
        match=r"missing parameters \(.*assumed was preset 'released' with frdnet_mit_b2: give model and preset",
    ):
        load_model(tmp_path / "net.pth")
    with pytest.raises(ValueError, match="assumed was preset 'released' with frdnet_mit_b0"):
        load_model(tmp_path / "net.pth", model="frdnet_mit_b0")
    with pytest.raises(ValueError, match=r"does not fit this FRDNet: .* shape .* is needed") as caught:
        load_model(tmp_path / "net.pth", model="frdnet_mit_b1", preset="lite")
    assert "assumed" not in str(caught.value)
    assert "given was preset 'lite' with frdnet_mit_b1: give model and preset" in str(caught.value)
    with pytest.raises(ValueError, match="holds no FRD-Net configuration: give model and preset"):
        load_model(tmp_path / "net.safetensors")
    with pytest.raises(ValueError, match="preset: must be one of paper, released, lite, got 'large'"):
        load_model(tmp_path / "net.pth", preset="large")


def test_a_configuration_inside_stays(saved: Path) -> None:
    assert load_model(saved, model="frdnet_mit_b0").config == tiny().config
    with pytest.raises(
        ValueError, match=r"holds its own configuration, leave out .* encoder: 'mit_b1' against 'mit_b0'"
    ):
        load_model(saved, model="frdnet_mit_b1")
    with pytest.raises(ValueError, match=r"holds its own configuration, leave out .* stages: "):
        load_model(saved, preset="paper")


def test_a_configuration_beside_the_file(tmp_path: Path) -> None:
    net = tiny()
    torch.save({"state_dict": net.state_dict()}, tmp_path / "net.pth")
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    for values in (net.config.to_dict(), {"config": net.config.to_dict()}):
        (tmp_path / "config.json").write_text(json.dumps(values))
        for name in ("net.pth", "net.safetensors"):
            assert states_equal(load_model(tmp_path / name), net.state_dict())
    (tmp_path / "config.json").write_text(json.dumps({"encoder": "mit_b0", "colour": "red"}))
    with pytest.raises(
        ValueError, match=r"config\.json: its configuration is not valid: .* unknown field 'colour'"
    ):
        load_model(tmp_path / "net.pth")
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Segformer"]}))
    with pytest.raises(ValueError, match="holds no FRD-Net configuration"):
        load_model(tmp_path / "net.safetensors")


@pytest.mark.parametrize("extension", ["safetensors", "bin"])
def test_shards(tmp_path: Path, extension: str) -> None:
    net = tiny()
    (tmp_path / "config.json").write_text(json.dumps(net.config.to_dict()))
    places, parts = {}, {}
    for i, (name, value) in enumerate(net.state_dict().items()):
        places[name] = f"model-{1 + i % 2:05d}-of-00002.{extension}"
        parts.setdefault(places[name], {})[name] = value
    for name, part in parts.items():
        (save_file if extension == "safetensors" else torch.save)(part, tmp_path / name)
    index = tmp_path / f"model.{extension}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert states_equal(load_model(index), net.state_dict())
    with pytest.raises(ValueError, match="one shard of several; give the index beside them"):
        load_model(tmp_path / f"model-00001-of-00002.{extension}")
    index.write_text("[]")
    with pytest.raises(ValueError, match="no index of shards"):
        load_model(index)


class Settings:
    """A class that the reader of a checkpoint need not have."""

    def __init__(self) -> None:
        self.values = defaultdict(list, {"lr": [1.0]})


@pytest.mark.parametrize("zipped", [True, False])
def test_objects_of_other_classes_are_passed_over(tmp_path: Path, zipped: bool) -> None:
    net = tiny()
    extra = {"hyper_parameters": Settings(), "loss": nn.BCELoss(), "path": tmp_path} if zipped else {}
    state = {"state_dict": net.state_dict(), "args": argparse.Namespace(lr=1), **extra}
    torch.save(state, tmp_path / "net.pth", _use_new_zipfile_serialization=zipped)
    model = FRDNet(net.config)
    load_weights(model, tmp_path / "net.pth")
    assert states_equal(model, net.state_dict())
    torch.save(
        {"model": net.state_dict(), "path": tmp_path},
        tmp_path / "net.pth",
        _use_new_zipfile_serialization=False,
    )
    with pytest.raises(
        ValueError, match=r"it holds pathlib\.\w+; if you trust it, save its state dict alone"
    ):
        load_weights(model, tmp_path / "net.pth")


def test_functions_in_a_checkpoint_are_named(tmp_path: Path) -> None:
    torch.save({"model": tiny().state_dict(), "args": Payload(tmp_path / "x")}, tmp_path / "net.pth")
    with pytest.raises(ValueError, match=r"tensors alone: it would call builtins\.getattr; if you trust it"):
        load_weights(tiny(), tmp_path / "net.pth")
    torch.save(tiny(), tmp_path / "net.pth")
    with pytest.raises(ValueError, match="a whole pickled net: save its state dict instead"):
        load_model(tmp_path / "net.pth")


def zip_of(*names: str) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
    return data.getvalue()


def torchscript() -> bytes:
    data = io.BytesIO()
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), data)
    return data.getvalue()


def half_a_checkpoint() -> bytes:
    data = io.BytesIO()
    torch.save(tiny().state_dict(), data)
    return data.getvalue()[: len(data.getvalue()) // 2]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: b"", "the file is empty"),
        (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "a Git LFS pointer"),
        (lambda: b"\n<!DOCTYPE html><html><body>404", "an HTML page"),
        (lambda: b"\x08\x0a\x12\x07pytorch\x1a\x05", "an ONNX graph"),
        (lambda: b"\x89HDF\r\n\x1a\n", "an HDF5"),
        (lambda: b"\x1f\x8b\x08\x00" * 30, "neither a file of safetensors nor of torch.save"),
        (lambda: b"\x80\x02garbage", "no checkpoint of tensors alone"),
        (torchscript, "a TorchScript archive"),
        (half_a_checkpoint, "a truncated or damaged zip archive"),
        (lambda: zip_of("a.txt"), "a zip archive, but none of torch.save"),
        (lambda: zip_of("net/archive_format", "net/data.pkl"), "an archive of torch.export"),
    ],
)
def test_what_else_a_file_may_be(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "net.pth"
    path.write_bytes(content())
    with pytest.raises(ValueError, match=message) as caught:
        load_model(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_a_pipe_is_no_checkpoint(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "net.pth")
    with pytest.raises(ValueError, match="a device, pipe or socket; a file is needed"):
        load_model(tmp_path / "net.pth")


def test_a_directory_is_no_checkpoint(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"a directory; a file is needed, such as tiny\.safetensors in it"):
        load_model(saved.parent)
    (saved.parent / ".metadata").touch()
    with pytest.raises(ValueError, match="dcp_to_torch"):
        load_model(saved.parent)
    with pytest.raises(IsADirectoryError, match="a directory; the name of a file is needed"):
        save_model(tiny(), saved.parent)
    with pytest.raises(FileNotFoundError, match="nowhere: no such directory"):
        save_model(tiny(), saved.parent / "nowhere" / "net.safetensors")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    """A file keeps the model's dtype; load_model gives float32, load_weights the dtype of what is filled."""
    net = tiny().to(dtype)
    save_model(net, tmp_path / "net.safetensors")
    model = load_model(tmp_path / "net.safetensors")
    assert states_equal(model, {name: value.float() for name, value in net.state_dict().items()})
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
    own = FRDNet(net.config).to(dtype)
    load_weights(own, tmp_path / "net.safetensors")
    assert states_equal(own, net.state_dict())


def test_memory_of_every_kind(tmp_path: Path) -> None:
    net = tiny()
    head = net.decoder.head
    state = {name: value.clone() for name, value in net.state_dict().items()}
    net.decoder.narrow.weight.data = (
        state["decoder.narrow.weight"].transpose(0, 1).contiguous().transpose(0, 1)
    )
    net.to(memory_format=torch.channels_last)
    with torch.no_grad():
        net.decoder.fuse[0].weight.zero_()
        net.decoder.join[1].bias = net.decoder.join[1].weight
        head.bias.data = head.weight.data.view(-1)[:1]
    save_model(net, tmp_path / "net.safetensors")
    assert states_equal(load_model(tmp_path / "net.safetensors"), net.state_dict())
    torch.save(net.state_dict(), tmp_path / "net.pth")
    with torch.device("meta"):
        meta = FRDNet(net.config)
    with pytest.raises(ValueError, match=r"stem\.gain: has no data \(meta device\)"):
        save_model(meta, tmp_path / "meta.safetensors")
    torch.save(meta.state_dict(), tmp_path / "meta.pth")
    with pytest.raises(ValueError, match=r"stem\.gain: has no data \(meta device\)"):
        load_weights(tiny(), tmp_path / "meta.pth")
    load_weights(meta, tmp_path / "net.pth")
    assert states_equal(meta, net.state_dict())


def test_what_is_no_net_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="model: an FRDNet or a module around one is needed, got Linear"):
        save_model(nn.Linear(1, 1), tmp_path / "x.safetensors")
    net = tiny()
    nn.utils.parametrizations.weight_norm(net.decoder.head)
    with pytest.raises(
        ValueError, match=r"not those of its configuration: 1 missing .*decoder\.head\.weight.*remove"
    ):
        save_model(net, tmp_path / "x.safetensors")


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("the mask of the process is not for a library to change")

    monkeypatch.setattr(os, "umask", fail)
    monkeypatch.setenv("HOME", str(tmp_path))
    name = "n" * 243 + ".safetensors"  # as long as file systems allow
    save_model(tiny(), f"~/{name}")
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert states_equal(load_model(f"~/{name}"), tiny().state_dict())
    assert read_metadata(f"~/{name}")["config"] == tiny().config
    model = create_model("frdnet_mit_b0", "lite", pretrained=f"~/{name}", **TINY)
    assert states_equal(model, tiny().state_dict())
