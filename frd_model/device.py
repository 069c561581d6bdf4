"""Which device a network runs on."""

from __future__ import annotations

import os

import torch


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
