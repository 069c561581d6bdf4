"""Which backends the suite runs on here: the library's own, and the CUDA kernels in the block emulator."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch

from frd_kernels import _triton, backend
from frd_kernels.cluster import chain_saved
from frd_kernels.cluster import ops as icm_ops
from frd_kernels.pdc import ops as pdc_ops
from frd_kernels.pdc_block import ops as pdc_block_ops

from .emulator import emulated

EMULATED = "cuda (emulated)"
EMULATED_CHAIN = "cuda_chain (emulated)"
Case = TypeVar("Case")


def _declare_emulated() -> None:
    """The emulated kernels as one more backend: operators of their own namespace on CPU tensors."""
    global _libraries  # keeps the declarations alive
    declare = backend._library.declare
    _libraries = (
        declare(emulated.NAMESPACE, emulated.OPS),
        declare(emulated.CHAIN, backend._library.CHAIN_OPS),
    )
    for family in (pdc_ops, pdc_block_ops, icm_ops):
        family.register(emulated.NAMESPACE)
    icm_ops.register(emulated.CHAIN, chain_saved)
    pdc_block_ops.register(emulated.CHAIN, emulated.NAMESPACE)
    providers = backend.PROVIDERS
    providers[EMULATED] = providers["cuda"]._replace(namespace=emulated.NAMESPACE, device="cpu", problem="")
    elsewhere = dict.fromkeys(providers["cuda_chain"].elsewhere, emulated.NAMESPACE)
    providers[EMULATED_CHAIN] = providers["cuda_chain"]._replace(
        namespace=emulated.CHAIN, device="cpu", problem="", elsewhere=elsewhere
    )


if not torch.cuda.is_available() and not emulated.problem():
    _declare_emulated()


def running(op: str) -> list[str]:
    """Every backend that has an `op` of its own here, the reference first."""
    names = ["reference"]
    for name, provider in backend.PROVIDERS.items():
        if op in provider.ops and op not in provider.elsewhere and not provider.problem:
            names.append(name)
    return names


def prepare(name: str) -> None:
    """Builds what a backend of the tests still needs."""
    if name in (EMULATED, EMULATED_CHAIN):
        emulated.load()


def is_slow(name: str, op: str = "") -> bool:
    """Whether a backend takes tenths of a second for the smallest call: Triton's interpreter, and emulated kernels of
    many threads."""
    emulated_clustering = name in (EMULATED, EMULATED_CHAIN) and op in ("cluster", "icm")
    return (name == "triton" and _triton.INTERPRETED) or emulated_clustering


def assert_same_bits(name: str, found: Iterable[torch.Tensor], wanted: Iterable[torch.Tensor]) -> None:
    """Of one computation with and without a part that changes nothing. Triton compiles two kernels for that, whose
    multiplications it may fuse with other additions."""
    compiled = name == "triton" and not _triton.INTERPRETED
    for a, b in zip(found, wanted, strict=True):
        if compiled and a.is_floating_point():
            ulp = torch.finfo(a.dtype).eps
            torch.testing.assert_close(a, b, rtol=16 * ulp, atol=16 * ulp * max(1.0, float(b.abs().max())))
        else:
            assert torch.equal(a, b)


def is_superseded(name: str, op: str) -> bool:
    """Whether the kernels are in a folder to_be_deleted: the tier slow has test_across_backends.py alone of them."""
    return name == EMULATED and op in ("cluster", "icm")


def tier(name: str) -> str:
    """The marker of what runs on a backend; none for those that are quick everywhere."""
    if name in (EMULATED, EMULATED_CHAIN) or (name == "triton" and _triton.INTERPRETED):
        return "slow"
    return "gpu" if name in ("cuda", "cuda_chain", "triton") else ""


def subset(name: str, cases: Sequence[Case]) -> Sequence[Case]:
    """What a test that loops over cases takes of them: all, in the slow interpreter four."""
    return cases[:: -(-len(cases) // 4)] if is_slow(name) else cases


def device_of(name: str) -> torch.device:
    """Where a backend computes."""
    if name == "reference":
        return torch.device("cpu")
    return torch.device(backend.PROVIDERS[name].device)
