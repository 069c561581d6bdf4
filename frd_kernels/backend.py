"""Selects the backend that runs an operation.

By default an op runs on the first backend whose kernel is verified on the tensor's device (the test suite has passed
there) and preferred (measured faster than plain PyTorch there, in wall time), else as plain PyTorch. `use_backend`
overrides this. An explicit request that cannot be met raises; it never falls back.
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

NAMES = ("reference", "cpu", "triton", "cuda", "cuda_chain")

_ALL = frozenset({"pdc_weight", "pdc2d", "pdc_block", "cluster", "cluster_dispatch", "icm"})
_INT32 = 2**31 - 1
_H100 = "benchmarks/results/nvidia-h100-80gb-hbm3"


class Evidence(NamedTuple):
    """The result files behind a default, "" for none.

    verified: the test suite has passed on such a device.
    preferred: the kernel is faster than plain PyTorch there, in wall time.
    """

    verified: str = ""
    preferred: str = ""


# Verified wherever the tests run. For dense PDC only the weight transform is a kernel of this package; the convolution
# is the library's.
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
# One case in five has passed there, before these kernels were rewritten; they were slower than plain PyTorch in 14 of
# 17 cases.
_TRITON_ON_H100: dict[str, Evidence] = {}


class Provider(NamedTuple):
    """The kernels of a backend, the operators torch.ops.<namespace>, for tensors on one type of device.

    ops: the names that have a kernel.
    evidence: by op.
    problem: why none of the kernels can run here, "" if they can.
    max_elements: the largest image [C, H, W] that the kernels can index.
    without_float64: ops that are composed of others for float64.
    capabilities: compute capabilities of the GPUs that the evidence was measured on.
    elsewhere: ops whose operators are in another namespace.
    """

    namespace: str
    device: str
    ops: frozenset[str]
    evidence: Mapping[str, Evidence]
    problem: str = ""
    max_elements: int | None = None
    without_float64: frozenset[str] = frozenset()
    capabilities: frozenset[tuple[int, int]] = frozenset()
    elsewhere: Mapping[str, str] = {}

    def operators(self, op: str) -> Any:
        """torch.ops.<namespace> with the operators of `op`."""
        return getattr(torch.ops, self.elsewhere.get(op, self.namespace))

    def refusal(self, op: str, tensor: torch.Tensor) -> str | None:
        """Why it cannot run `op` on this tensor; None if it can."""
        if tensor.device.type != self.device:
            return f"runs on {self.device} tensors only, got a tensor on {tensor.device.type}"
        if self.problem:
            return self.problem
        if op not in self.ops:
            return f"has no kernel for it (it has: {', '.join(sorted(self.ops))})"
        image = math.prod(tensor.shape[1:]) if tensor.dim() == 4 else 0
        if self.max_elements is not None and image > self.max_elements:
            return f"indexes images of at most {self.max_elements} elements, got {image}"
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
        frozenset({"cluster", "cluster_dispatch", "icm"}),
        _H100_CAPABILITY,
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
    "cuda_chain": Provider(
        _library.CHAIN,
        "cuda",
        _ALL,
        {},
        _cuda_problem(),
        _INT32,
        frozenset({"pdc_block", "cluster", "icm"}),
        elsewhere=dict.fromkeys(_ALL - {"cluster", "cluster_dispatch", "icm", "pdc_block"}, "frd"),
    ),
}

_requested: contextvars.ContextVar[str | None] = contextvars.ContextVar("frd_backend", default=None)
# A global copy for torch.compile, since torch 2.11 has no guards for a ContextVar.
_traced: str | None = None


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs every operation inside the `with` block on the named backend.

    A `torch.fx` graph calls the public functions, which select a backend when the graph runs, not when it is traced.

    Args:
        name: "reference" (plain PyTorch, any device), "cpu" (C++ kernels), "triton", "cuda", or "cuda_chain": "cuda"
            with the clustering as a chain of launches and newer kernels of the PDC block, which no GPU has run yet.

    Raises:
        ValueError: another name.
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
    """The namespace (torch.ops.frd, ...) whose operators run `op` on this tensor; None for plain PyTorch.

    Plain PyTorch is the reference, or where `is_composed()` a form of it that every transform of torch supports.

    Raises:
        NotImplementedError: the backend of `use_backend` cannot run the op on this tensor or under this transform.
    """
    name = requested()
    if name == "reference":
        return None
    if name is None:
        if is_transforming():
            return None
        if tensor.device.type in ("cpu", "meta"):
            # Meta tensors have no data: the registered fakes give their shapes.
            return torch.ops.frd
        for provider in (PROVIDERS["cuda"], PROVIDERS["triton"]):
            if provider.is_default(op, tensor) and provider.refusal(op, tensor) is None:
                return provider.operators(op)
        return None
    provider = PROVIDERS[name]
    refusal = _transform_refusal() or provider.refusal(op, tensor)
    if refusal is not None:
        raise NotImplementedError(f"{op}: backend {name!r} was requested and {refusal}")
    return provider.operators(op)


def is_composed() -> bool:
    """Whether `select` gives None because of a transform, and not because the reference was requested."""
    return is_transforming() and requested() is None


def _transform_refusal() -> str | None:
    """Why no kernel can run under the current transform. Forward mode is refused later, for inputs with tangents."""
    if is_transformed():
        found = "torch.func (vmap, grad, jvp, ...) does not go through operators (pytorch/pytorch#168393)"
    elif is_tracing():
        found = "torch.jit.trace does not record its operators"
    else:
        return None
    return f"{found}; leave use_backend out, or ask for frd_kernels.use_backend('reference')"


def is_fused(op: str, tensor: torch.Tensor, native: Any) -> bool:
    """Whether the namespace that `select` gave has a kernel of `op` for the tensor's dtype; else it is composed."""
    if tensor.dtype != torch.float64:
        return True
    here = [p for p in PROVIDERS.values() if p.device == tensor.device.type and p.namespace == native.name]
    return all(op not in provider.without_float64 for provider in here)


# Caches: both are needed at every call.
_CAPABILITIES: dict[torch.device, tuple[int, int]] = {}
_REFUSALS: dict[tuple[str, torch.device], str | None] = {}


def _capability(device: torch.device) -> tuple[int, int]:
    if torch.compiler.is_compiling():
        return torch.cuda.get_device_capability(device)
    if device not in _CAPABILITIES:
        _CAPABILITIES[device] = torch.cuda.get_device_capability(device)
    return _CAPABILITIES[device]


def _device_refusal(namespace: str, device: torch.device) -> str | None:
    """`_architecture_refusal` for a GPU, cached."""
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
    """Whether code built for a CMake architecture ("80", "90a-real", "80-virtual") runs on this compute capability.

    Machine code runs on later minor versions of the same major version, PTX on every later one. With the suffix "a",
    both run on exactly the capability named.
    """
    number, _, form = arch.partition("-")
    built = divmod(int(number.rstrip("af")), 10)
    if number.endswith("a"):
        return built == capability
    same_major = built[0] == capability[0] and built <= capability
    return same_major or (form != "real" and not number.endswith("f") and built <= capability)
