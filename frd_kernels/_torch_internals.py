"""What the package asks torch through names that torch does not document. Verified on torch 2.14."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.autograd import forward_ad
from torch.utils import _pytree

_Result = TypeVar("_Result")
_functorch_is_active = torch._C._are_functorch_transforms_active
_tracing_state = torch._C._get_tracing_state


def is_transforming() -> bool:
    """Whether torch is doing what only plain PyTorch goes through: one of the four below. Asked at every call."""
    return (
        _functorch_is_active()
        or forward_ad._current_level >= 0
        or _tracing_state() is not None
        or (torch.compiler._is_exporting_flag and torch.onnx.is_in_onnx_export())
    )


def is_transformed() -> bool:
    """Whether a torch.func transform (grad, vmap, jvp, ...) is running."""
    return _functorch_is_active()


def has_dual_level() -> bool:
    """Whether forward-mode differentiation may be going on: tensors may carry tangents."""
    return forward_ad._current_level >= 0


def is_tracing() -> bool:
    """Whether torch.jit.trace records: sizes are then tensors. As torch.jit.is_tracing, in half the time."""
    return _tracing_state() is not None


def untraced(function: Callable[..., _Result], *args: Any) -> _Result:
    """function(*args), unseen by torch.jit.trace: sizes, those among the arguments too, are plain ints, and what is
    asked of them is no part of the trace."""
    state = _tracing_state()
    if state is None:
        return function(*args)
    tracer: Any = torch._C
    tracer._set_tracing_state(None)
    try:
        return function(*_pytree.tree_map(_as_size, args))
    finally:
        tracer._set_tracing_state(state)


def _as_size(value: Any) -> Any:
    """A size that torch.jit.trace follows, a tensor of one integer, as an int."""
    is_size = isinstance(value, torch.Tensor) and value.dim() == 0 and value.dtype == torch.int64
    return int(value) if is_size else value


def is_batched_grad(tensor: torch.Tensor) -> bool:
    """Whether a gradient is one of many that `torch.autograd.grad(..., is_grads_batched=True)` takes at once."""
    return torch._C._functorch.is_legacy_batchedtensor(tensor)


def over_batched_grad(function: Callable[[torch.Tensor], _Result], grad: torch.Tensor) -> _Result:
    """function(grad), whose tensors come in one structure, once for each gradient of the batch."""
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    grads = torch._remove_batch_dim(grad, level, 1, 0)
    found = [function(g) for g in grads]
    return _pytree.tree_map(lambda *parts: torch._add_batch_dim(torch.stack(parts), 0, level), *found)
