"""Which implementation an operation runs on, and why.

By default the tensor's device decides: the C++ kernels on the CPU, the CUDA kernels on a GPU where they have
been proven there. `use_backend` overrides; an explicit request that cannot be met raises, it never falls
back.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import torch

from . import _library

NAMES = ("reference", "cpu", "triton", "cuda")

# Ops whose CUDA kernel exists. Nothing here has run on a GPU yet, so none is an automatic choice there.
_CUDA_OPS = frozenset({"pdc_weight"})

_requested: contextvars.ContextVar[str | None] = contextvars.ContextVar("frd_backend", default=None)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs every operation inside the `with` block on the named backend.

    Args:
        name: "reference" (plain PyTorch, any device), "cpu" (C++ kernels), "triton" or "cuda".

    Raises:
        ValueError: the name is none of these.
        NotImplementedError: at the call of an operation that the backend cannot run.
    """
    if name not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(NAMES)}, got {name!r}")
    token = _requested.set(name)
    try:
        yield
    finally:
        _requested.reset(token)


def backends() -> dict[str, tuple[bool, str]]:
    """Name -> (available, reason), for every backend."""
    if _library.CUDA_PROBLEM:
        cuda = (False, _library.CUDA_PROBLEM)
    elif not torch.cuda.is_available():
        cuda = (False, "libfrd_cuda.so is loaded, but torch sees no GPU")
    else:
        cuda = (True, f"kernels for: {', '.join(sorted(_CUDA_OPS))}; none has been proven on a GPU yet")
    return {
        "reference": (True, "plain PyTorch, any device"),
        "cpu": (True, "C++ kernels"),
        "triton": (False, "no Triton kernel exists in this version"),
        "cuda": cuda,
    }


def select(op: str, tensor: torch.Tensor) -> str:
    """The backend that runs `op` on the device of `tensor`: "reference", or "native" for torch.ops.frd.<op>.

    Raises:
        NotImplementedError: a backend was requested with `use_backend` that cannot run the op on this device.
    """
    requested = _requested.get()
    device = tensor.device.type
    if requested is None:
        # meta tensors have no data to compute: the registered fakes answer for them.
        return "native" if device in ("cpu", "meta") else "reference"
    if requested == "reference":
        return "reference"
    if requested == "cpu" and device == "cpu":
        return "native"
    if requested == "cuda" and device == "cuda" and op in _CUDA_OPS and not _library.CUDA_PROBLEM:
        return "native"
    raise NotImplementedError(
        f"{op}: backend {requested!r} was requested and {_refusal(op, requested, device)}"
    )


def _refusal(op: str, requested: str, device: str) -> str:
    if requested in ("cpu", "cuda") and device != requested:
        return f"runs on {requested} tensors only, got a tensor on {device}"
    if requested == "cuda" and op not in _CUDA_OPS:
        return f"has no kernel for it (it has: {', '.join(sorted(_CUDA_OPS))})"
    return backends()[requested][1]
