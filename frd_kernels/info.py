"""`python -m frd_kernels.info`, `frd info`: versions, backends with reasons, build.

Needs the standard library only and always prints a report, in which what is missing or broken is named.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable
from typing import Any, NoReturn

_PACKAGES = [
    *("frd-kernels", "torch", "torchvision", "triton", "timm"),
    *("numpy", "opencv-python-headless", "pillow"),
]
_ENVIRONMENT = [
    *("FRD_CPU_ISA", "FRD_CUDA", "FRD_TORCH_DIR"),
    *("TORCH_CUDA_ARCH_LIST", "CUDACXX", "OMP_NUM_THREADS", "TRITON_INTERPRET"),
]


def _guarded(probe: Callable[[], Any]) -> Any:
    try:
        return probe()
    except Exception as error:
        # A report about a broken installation must not fail itself.
        return f"unknown ({type(error).__name__}: {error})"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_model() -> str:
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _torch_facts() -> dict[str, Any]:
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cuda_build": torch.version.cuda or "none", "threads": torch.get_num_threads(), "gpus": gpus}


def _backends() -> dict[str, list[Any]]:
    from . import backends

    return {name: list(state) for name, state in backends().items()}


def _build() -> dict[str, Any]:
    module = importlib.import_module("frd_kernels._C")
    return dict(module.build_info(), cpu_isa=module.cpu_isa())


def collect() -> dict[str, Any]:
    """Everything that `frd info` prints, as a dictionary that can be written as JSON."""
    return {
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES},
        "machine": {
            "platform": platform.platform(),
            "cpu": _guarded(_cpu_model),
            "cores": os.cpu_count(),
        },
        "torch": _guarded(_torch_facts),
        "backends": _guarded(_backends),
        "build": _guarded(_build),
        "environment": {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
    }


def _lines(facts: dict[str, Any]) -> list[str]:
    lines = []
    for section, values in facts.items():
        lines.append(section)
        if not isinstance(values, dict):
            lines.append(f"  {values}")
            continue
        for key, value in values.items():
            if section == "backends":
                value = f"{'yes' if value[0] else 'no':4}{value[1]}"
            elif isinstance(value, list):
                value = ", ".join(map(str, value)) or "none"
            lines.append(f"  {key:24}{value}")
        if not values:
            lines.append("  none set")
    return lines


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv: list[str] | None = None) -> int:
    """Prints the report, with `--json` as JSON. Returns the exit status, always 0."""
    parser = _Parser(
        prog="frd info",
        description="Print versions, backends with the reason where one is missing, and build facts.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    facts = collect()
    print(json.dumps(facts, indent=2) if options.json else "\n".join(_lines(facts)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
