"""Waiting for a device, and what the machine was doing while times were taken."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import Any

import torch

from frd_kernels.info import collect

from .revision import revision

# nvidia-smi's name of a figure -> ours, units included.
_GPU_FIGURES = {
    "clocks.sm": "sm_clock_mhz",
    "clocks.mem": "memory_clock_mhz",
    "clocks.max.sm": "sm_clock_max_mhz",
    "temperature.gpu": "temperature_c",
    "power.draw": "power_w",
    "power.limit": "power_limit_w",
    "utilization.gpu": "utilization_percent",
    "driver_version": "driver",
}


def synchronize(device: torch.device | str) -> None:
    """Waits until what was launched on `device` has been computed; CPU calls return when they are done."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def gpu_state(device: torch.device | str = "cuda") -> dict[str, Any]:
    """Name, memory, clocks, temperature and power of a GPU as its driver reads them; changes no setting."""
    device = torch.device(device)
    properties = torch.cuda.get_device_properties(device)
    state: dict[str, Any] = {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }
    return state | (_nvidia_smi(str(properties.uuid)) or _nvml(device))


def _nvidia_smi(uuid: str) -> dict[str, Any]:
    """Empty where the program is missing or does not answer."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    query = [f"--query-gpu={','.join(_GPU_FIGURES)}", "--format=csv,noheader,nounits", f"--id=GPU-{uuid}"]
    try:
        answer = subprocess.run([program, *query], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = [value.strip() for value in answer.stdout.strip().split(",")]
    if answer.returncode or len(values) != len(_GPU_FIGURES):
        return {}
    return dict(zip(_GPU_FIGURES.values(), map(_number, values), strict=True))


def _nvml(device: torch.device) -> dict[str, Any]:
    """What torch reads by way of pynvml, where that is installed."""
    try:
        return {
            "sm_clock_mhz": torch.cuda.clock_rate(device),
            "temperature_c": torch.cuda.temperature(device),
            "power_w": torch.cuda.power_draw(device) / 1e3,
        }
    except Exception as error:  # pynvml's own kinds, and torch's where it is missing
        return {"unread": f"clocks, temperature and power: {error}"}


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def machine_state(device: torch.device | str = "cpu") -> dict[str, Any]:
    """CPU model, load, versions and git revision; on CUDA also the GPU's clocks, temperature and power."""
    facts = collect()
    state = {
        "cpu": facts["machine"]["cpu"],
        "cores": facts["machine"]["cores"],
        "threads": torch.get_num_threads(),
        "load": list(os.getloadavg()),
        "versions": facts["versions"],
        "build": facts["build"],
        "revision": revision(),
    }
    return state | {"gpu": gpu_state(device)} if torch.device(device).type == "cuda" else state
