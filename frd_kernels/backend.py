"""Which implementation an operation runs on, and why.

By default the tensor's device decides: an op runs on the first backend whose kernel is verified on such a device (the
test suite has passed there) and preferred (measured faster than plain PyTorch there, in wall time), else as plain
PyTorch. `use_backend` overrides; an explicit request that cannot be met raises, it never falls back.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

from . import _library, _triton
from ._torch_internals import is_tracing, is_transformed, is_transforming

NAMES = ("reference", "cpu", "triton", "cuda")

_ALL = frozenset({"pdc_weight", "pdc2d", "pdc_block", "cluster", "cluster_dispatch", "icm"})
_INT32 = 2**31 - 1
_H100 = "benchmarks/results/nvidia-h100-80gb-hbm3"


class Evidence(NamedTuple):
    """The result files that a default rests on; "": there is none."""

    verified: str = ""  # the suite has passed
    preferred: str = ""  # faster than the PyTorch form, in wall time


# Verified wherever the tests run. Of dense PDC the weight transform is ours, the convolution the library's.
_ON_CPU = dict.fromkeys(_ALL, Evidence("tests", "benchmarks/results/cpu/kernels.json"))
_SUITE, _TIMES = f"{_H100}/suite.json", f"{_H100}/kernels.json"
_CUDA_ON_H100 = {
    "pdc2d": Evidence(_SUITE, _TIMES),
    "pdc_block": Evidence(_SUITE, _TIMES),
    "icm": Evidence(_SUITE, _TIMES),
    "pdc_weight": Evidence(_SUITE),  # 0.9x
    "cluster": Evidence(_SUITE),  # not timed
    "cluster_dispatch": Evidence(_SUITE),  # not timed
}
# One case in five has passed; slower than plain PyTorch in 14 of 17 cases.
_TRITON_ON_H100 = dict.fromkeys(_ALL, Evidence(_SUITE))


class Provider(NamedTuple):
    """The kernels of a backend: torch.ops.<namespace>, for tensors on devices of one type."""

    namespace: str
    device: str
    ops: frozenset[str]
    evidence: Mapping[str, Evidence]  # by op, on such a device
    problem: str = ""  # why none of them can run
    most_elements: int | None = None  # of an image: what its kernels can index
    without_float64: frozenset[str] = frozenset()  # ops that are put together from others in float64
    capabilities: frozenset[tuple[int, int]] = frozenset()  # of the GPUs that the evidence is of

    def refusal(self, op: str, tensor: torch.Tensor) -> str | None:
        """Why it cannot run `op` on this tensor; None if it can."""
        if tensor.device.type != self.device:
            return f"runs on {self.device} tensors only, got a tensor on {tensor.device.type}"
        if self.problem:
            return self.problem
        if op not in self.ops:
            return f"has no kernel for it (it has: {', '.join(sorted(self.ops))})"
        image = math.prod(tensor.shape[1:]) if tensor.dim() == 4 else 0
        if self.most_elements is not None and image > self.most_elements:
            return f"indexes images of at most {self.most_elements} elements, got {image}"
        return _device_refusal(self.namespace, tensor.device) if self.device == "cuda" else None

    def is_default(self, op: str, tensor: torch.Tensor) -> bool:
        """Whether the kernels of `op` are verified and preferred on a device like that of the tensor."""
        evidence = self.evidence.get(op, Evidence())
        if self.device != tensor.device.type or not (evidence.verified and evidence.preferred):
            return False
        return self.device != "cuda" or _capability(tensor.device) in self.capabilities


def _cuda_problem() -> str:
    if not _library.CUDA_PROBLEM and not torch.cuda.is_available():
        return "libfrd_cuda.so is loaded, but torch sees no GPU"
    return _library.CUDA_PROBLEM


_H100_CAPABILITY = frozenset({(9, 0)})
PROVIDERS = {
    "cpu": Provider("frd", "cpu", _ALL, _ON_CPU),
    "triton": Provider(
        _triton.NAMESPACE,
        _triton.DEVICE,
        _ALL,
        _TRITON_ON_H100,
        _triton.problem(),
        _INT32,
        capabilities=_H100_CAPABILITY,
    ),
    "cuda": Provider(
        "frd",
        "cuda",
        _ALL,
        _CUDA_ON_H100,
        _cuda_problem(),
        _INT32,
        frozenset({"pdc_block"}),
        _H100_CAPABILITY,
    ),
}

_requested: contextvars.ContextVar[str | None] = contextvars.ContextVar("frd_backend", default=None)
# The same for the whole process, which is what torch.compile traces: torch 2.11 has no guard for a ContextVar.
_traced: str | None = None


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs every operation inside the `with` block on the named backend.

    A graph of `torch.fx` holds the functions, which choose when the graph runs: set the backend there.

    Args:
        name: "reference" (plain PyTorch, any device), "cpu" (C++ kernels), "triton" or "cuda".

    Raises:
        ValueError: the name is none of these.
        NotImplementedError: at the call of an operation that the backend cannot run.
    """
    if name not in NAMES and name not in PROVIDERS:
        raise ValueError(f"backend must be one of {', '.join(NAMES)}, got {name!r}")
    global _traced
    token, traced = _requested.set(name), _traced
    _traced = name
    try:
        yield
    finally:
        _requested.reset(token)
        _traced = traced


def backends() -> dict[str, tuple[bool, str]]:
    """Name -> (available, reason), for every backend."""
    found = {"reference": (True, "plain PyTorch, any device")}
    for name, provider in PROVIDERS.items():
        parts = [part for part in (provider.problem, _describe(name, provider)) if part]
        found[name] = (not provider.problem, "; ".join(parts))
    return found


def _describe(name: str, provider: Provider) -> str:
    if name == "cpu":
        return "C++ kernels"
    text = f"kernels for: {', '.join(sorted(provider.ops))}"
    if provider.device != "cuda":
        return f"{text}; in an interpreter on the CPU, to check them"
    gpus = ", ".join(f"{major}.{minor}" for major, minor in sorted(provider.capabilities)) or "none"
    parts = [text, f"on GPUs of compute capability {gpus}"]
    for what in ("verified", "preferred"):
        ops = sorted(op for op, evidence in provider.evidence.items() if getattr(evidence, what))
        files = sorted({getattr(provider.evidence[op], what) for op in ops})
        parts.append(f"{what}: {', '.join(ops) or 'none'}" + (f" ({', '.join(files)})" if files else ""))
    return "; ".join([*parts, "the default is what is both"])


def requested() -> str | None:
    """The backend of the enclosing `use_backend`; None outside one."""
    return _traced if torch.compiler.is_compiling() else _requested.get()


def select(op: str, tensor: torch.Tensor) -> Any | None:
    """The namespace (torch.ops.frd, ...) whose operators run `op` on this tensor; None: plain PyTorch.

    That is the reference, or the composed form where `is_composed()`.

    Raises:
        NotImplementedError: a backend was requested with `use_backend` that cannot run the op on this tensor, or under
            this transform.
    """
    name = requested()
    if name == "reference":
        return None
    if name is None:
        if is_transforming():
            return None
        if tensor.device.type in ("cpu", "meta"):
            return torch.ops.frd  # meta tensors have no data to compute: the registered fakes answer for them
        for provider in (PROVIDERS["cuda"], PROVIDERS["triton"]):
            if provider.is_default(op, tensor) and provider.refusal(op, tensor) is None:
                return getattr(torch.ops, provider.namespace)
        return None
    provider = PROVIDERS[name]
    refusal = _transform_refusal() or provider.refusal(op, tensor)
    if refusal is not None:
        raise NotImplementedError(f"{op}: backend {name!r} was requested and {refusal}")
    return getattr(torch.ops, provider.namespace)


def is_composed() -> bool:
    """Whether `select` gives None for the sake of a transform, and not because the reference was asked for."""
    return is_transforming() and requested() is None


def _transform_refusal() -> str | None:
    """Why no kernel can run under what torch is doing. Forward mode is left to the operators, which see tangents."""
    if is_transformed():
        found = "torch.func (vmap, grad, jvp, ...) does not go through operators (pytorch/pytorch#168393)"
    elif is_tracing():
        found = "torch.jit.trace does not record its operators"
    else:
        return None
    return f"{found}; leave use_backend out, or ask for frd_kernels.use_backend('reference')"


def is_fused(op: str, tensor: torch.Tensor, native: Any) -> bool:
    """Whether `op` of the namespace that `select` gave takes the tensor's dtype; else its parts have to."""
    if tensor.dtype != torch.float64:
        return True
    here = [p for p in PROVIDERS.values() if p.device == tensor.device.type and p.namespace == native.name]
    return all(op not in provider.without_float64 for provider in here)


# Asked at every call, so the answers are kept.
_CAPABILITIES: dict[torch.device, tuple[int, int]] = {}
_REFUSALS: dict[tuple[str, torch.device], str | None] = {}


def _capability(device: torch.device) -> tuple[int, int]:
    if torch.compiler.is_compiling():
        return torch.cuda.get_device_capability(device)
    if device not in _CAPABILITIES:
        _CAPABILITIES[device] = torch.cuda.get_device_capability(device)
    return _CAPABILITIES[device]


def _device_refusal(namespace: str, device: torch.device) -> str | None:
    """`_architecture_refusal` of a GPU."""
    if torch.compiler.is_compiling():
        return _architecture_refusal(namespace, _capability(device))
    key = (namespace, device)
    if key not in _REFUSALS:
        _REFUSALS[key] = _architecture_refusal(namespace, _capability(device))
    return _REFUSALS[key]


def _architecture_refusal(namespace: str, capability: tuple[int, int]) -> str | None:
    """Why the kernels of a namespace do not run on a GPU of this compute capability."""
    name = f"sm_{capability[0]}{capability[1]}"
    if namespace == _triton.NAMESPACE:
        return None if capability >= (8, 0) else f"needs a GPU of compute capability 8.0 or later, got {name}"
    archs = _library.cuda_architectures()
    if any(_runs_on(arch, capability) for arch in archs):
        return None
    return f"libfrd_cuda.so was built for {', '.join(archs)}, which this GPU ({name}) does not run"


def _runs_on(arch: str, capability: tuple[int, int]) -> bool:
    """Whether code built for a CMake architecture ("80", "90a-real", "80-virtual") runs there.

    Machine code runs on later minors of its major, PTX on everything later; the "a" in both on that one only.
    """
    number, _, form = arch.partition("-")
    built = divmod(int(number.rstrip("af")), 10)
    if number.endswith("a"):
        return built == capability
    same_major = built[0] == capability[0] and built <= capability
    return same_major or (form != "real" and not number.endswith("f") and built <= capability)
