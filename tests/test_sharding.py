"""Every layer and a small FRD-Net under FSDP: sharded as a whole and inner module by inner module, they train as
without."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch import nn

import frd_kernels as fk
from frd_model import create_model

pytestmark = pytest.mark.slow

GRIDS = ((3, 3), (2, 2), (2, 1))
CLUSTER = {"heads": 2, "head_dim": 3}
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "PDC2d": lambda: fk.PDC2d(6, 4, padding=1),
    "PDCBlock2d": lambda: fk.PDCBlock2d(6, 4, kind="rd", stride=2, residual=True, bias=True),
    "DPM": lambda: fk.DPM(6),
    "ICM": lambda: fk.ICM(6, GRIDS),
    "ICM released": lambda: fk.ICM(6, GRIDS, "released"),
    "ContextCluster": lambda: fk.ContextCluster(6, 4, **CLUSTER),
    "FECCluster": lambda: fk.FECCluster(6, 4, **CLUSTER),
    "ClusterPool": lambda: fk.ClusterPool(2, 6, 4),
    "FRDNet": lambda: create_model("frdnet_mit_b0", "lite", stages=(1,), blocks=1),
}


def fully_sharded(net: nn.Module, inner: list[nn.Module]) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (*inner, net):
        fully_shard(module, mesh=mesh)
    return net


def flattened(net: nn.Module, inner: list[nn.Module]) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import CustomPolicy

    policy = CustomPolicy(lambda module: module in inner)
    return FullyShardedDataParallel(net, auto_wrap_policy=policy, device_id=torch.device("cpu"))


def gathered(net: nn.Module) -> Iterator[torch.Tensor]:
    from torch.distributed.fsdp import FullyShardedDataParallel

    if isinstance(net, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(net):
            yield from [p.detach().clone().flatten() for p in net.parameters()]
        return
    for p in net.parameters():
        value: Any = p.detach()
        yield (value.full_tensor() if hasattr(value, "full_tensor") else value).flatten()


def train(net: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The outputs of three steps, the parameters behind them."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    outputs = []
    for _ in range(3):
        out = net(x)
        outputs.append(out.detach())
        out.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [*outputs, torch.cat(list(gathered(net)))]


def work(rank: int, world: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    for name, make in LAYERS.items():
        torch.manual_seed(0)
        original = make().double()
        channels, side = (3, 64) if name == "FRDNet" else (6, 8)
        x = torch.randn(2, channels, side, side, dtype=torch.float64)
        wanted = train(copy.deepcopy(original), x)
        for shard in (fully_sharded, flattened)[:world]:
            for by_parts in (False, True):
                net = copy.deepcopy(original)
                parts = [m for m in net.modules() if isinstance(m, (nn.Linear, nn.Conv2d)) and m is not net]
                found = train(shard(net, parts if by_parts else []), x)
                assert all(map(torch.allclose, found, wanted)), (name, shard, by_parts)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [1, 2])
def test_sharded_layers_train_as_whole_ones(tmp_path: Path, world: int) -> None:
    root = Path(sys.modules["frd_kernels"].__file__ or "").parents[1]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", __file__]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(tmp_path)],
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(world)
    ]
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * world, errors


def test_gates_of_no_dimension_load() -> None:
    """The state dicts of FRD-Net's ICM from when alpha and beta of "paper" were scalars of no dimension."""
    for net in (nn.Sequential(fk.ICM(4)), nn.Sequential(nn.Sequential(fk.ICM(4, variant="paper")))):
        state = {
            k: v.reshape(()) if k.endswith(("alpha", "beta")) else v for k, v in net.state_dict().items()
        }
        kept = dict(state)
        for key in kept:
            if key.endswith("alpha"):
                state[key] = torch.tensor(0.75)
        for assign in (False, True):
            other = copy.deepcopy(net)
            other.load_state_dict(state, strict=True, assign=assign)
            alpha = next(p for n, p in other.named_parameters() if n.endswith("alpha"))
            assert isinstance(alpha, nn.Parameter) and alpha.shape == (1,) and alpha.item() == 0.75
        assert all(
            v.dim() == 0 for k, v in state.items() if k.endswith(("alpha", "beta"))
        )  # the caller's stays
    with pytest.raises(RuntimeError, match="size mismatch for alpha"):
        fk.ICM(4, variant="released").load_state_dict(fk.ICM(4).state_dict())


if __name__ == "__main__":
    work(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
