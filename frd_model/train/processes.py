"""The processes of one run, as torchrun starts them. A process that is alone needs no group, and nothing is sent."""

from __future__ import annotations

import os
import re
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from frd_model.device import parse_device
from frd_model.output import one_line

from .config import ConfigError

# How gloo says that a peer is gone.
BROKEN = re.compile(r"Connection (closed|reset|refused)|Broken pipe|gloo/transport", re.IGNORECASE)


def join(device: str) -> None:
    """Join the group that torchrun's environment describes; NCCL for tensors on GPUs, gloo for everything else."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        target = parse_device(device)
        # The strides of a depthwise weight [C, 1, k, k] are ambiguous; the gradient is right either way.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        dist.init_process_group("cpu:gloo,cuda:nccl" if target.type == "cuda" else "gloo")


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def own_device(name: str) -> torch.device:
    """The device of this process: of "cuda", the GPU of its local rank."""
    if world() > 1 and name.startswith("cuda"):
        if name != "cuda":
            raise ConfigError(
                f"device must be cpu or cuda where torchrun starts several processes, got {name}"
            )
        name = f"cuda:{os.environ.get('LOCAL_RANK', rank())}"
    device = parse_device(name)
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


class ProcessError(RuntimeError):
    """A process of several has failed."""


def describe(error: Exception) -> str:
    """An error with the process it is from; a broken connection is told as what it is, another process's end."""
    text = one_line(error)
    if isinstance(error, dist.DistError) or BROKEN.search(text):
        text = "another process has ended, its own message says why; the run goes on with --resume"
    return f"process {rank()} of {world()}: {text}"


def total(value: Tensor) -> Tensor:
    """The sum of a tensor over the processes, without a gradient."""
    value = value.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def gather(value: Any) -> list[Any]:
    """The values of all processes, by rank, in every process."""
    values = [value]
    if dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def agree(value: Any) -> Any:
    """The value of the first process, in every process."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, 0)
    return values[0]
