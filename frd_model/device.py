"""Which device a network runs on."""

from __future__ import annotations

import os
import sys

import numpy as np
import torch
from torch import nn

from frd_model.output import one_line, say


def parse_device(name: str | torch.device) -> torch.device:
    """A torch device; "auto" is the first of `available_devices`.

    ValueError for an unknown name or a device that cannot be used here.
    """
    if name == "auto":
        return available_devices()[0]
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device must be auto, cpu, mps, cuda or cuda:N, got {name!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name} was asked for, but torch finds no usable GPU")
    try:
        torch.zeros((), device=device).item()
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device must be one that torch can use here, got {name!r}: {reason}") from None
    return device


def available_devices() -> list[torch.device]:
    """The devices that torch finds, the fastest first: a GPU, Apple's GPU, the CPU.

    Of several GPUs each of torchrun's processes on a machine gets its own.
    """
    found = []
    if torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK", "0"))
        found.append(torch.device("cuda", local % torch.cuda.device_count()))
    if torch.backends.mps.is_available():
        found.append(torch.device("mps"))
    return [*found, torch.device("cpu")]


def to_first_device(model: nn.Module) -> nn.Module:
    """Move a network to the first of `available_devices` that it works on; stderr names those that it does not."""
    from frd_model.logits import logit_map

    *found, cpu = available_devices()
    for device in found:
        try:
            logit_map(np.zeros((64, 64, 3), np.uint8), model.to(device))
        # A GPU that this build of torch has no code for, or a backend that lacks an operator.
        except (RuntimeError, NotImplementedError) as error:
            say(
                f"frd: the network does not work on {device}, the next device is taken: {one_line(error)}",
                sys.stderr,
            )
        else:
            return model
    return model.to(cpu)
