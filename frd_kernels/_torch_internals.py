"""Everything that the package asks torch through names that torch does not document, in one place.

Checked on torch 2.11.0 and 2.14.1: `tests/test_torch_internals.py` resolves each private name below, and keeps the
rest of the package from using others. `torch._check`, which the documentation of custom operators uses, is not one.
Callables are re-exported as they are, since a Python function around one would slow down every eager call.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module
from torch.utils import _pytree

_Result = TypeVar("_Result")
_C: Any = torch._C

# The types of a plain weight, also while torch.export traces.
PLAIN_TENSORS = frozenset({torch.Tensor, nn.Parameter, FakeTensor, FunctionalTensor})
# The attributes in which a module has its own hooks.
HOOK_ATTRIBUTES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# A tensor's count of the in-place changes that autograd knows of.
version_of = operator.attrgetter("_version")

try:
    # In `with below_autograd():` an operator goes straight to its kernel.
    below_autograd = torch._C._AutoDispatchBelowAutograd
    dispatch_mode_count = torch._C._len_torch_dispatch_stack
    # Whether an autocast region of any device type is open: a tenth of the time of asking for one type.
    has_any_autocast = torch._C._is_any_autocast_enabled
    # Whether a torch.func transform (grad, vmap, jvp, ...) is running.
    is_transformed = torch._C._are_functorch_transforms_active
    _tracing_state = torch._C._get_tracing_state
    tree_map = _pytree.tree_map
    # The tables of the hooks that run at the calls of all modules.
    GLOBAL_HOOKS = (
        nn_module._global_forward_hooks,
        nn_module._global_forward_pre_hooks,
        nn_module._global_backward_hooks,
        nn_module._global_backward_pre_hooks,
    )
except AttributeError as error:
    raise ImportError(
        f"frd_kernels: torch {torch.__version__} lacks a name that torch 2.11 to 2.14 have: {error}"
    ) from error


def is_plain_conv2d(cls: type[nn.Module]) -> bool:
    """Whether a class computes what `nn.Conv2d` does: it has the forward of it, and what that calls."""
    conv_forward = getattr(cls, "_conv_forward", None)
    return cls.forward is nn.Conv2d.forward and conv_forward is nn.Conv2d._conv_forward


def is_transforming() -> bool:
    """Whether torch runs something that only plain PyTorch supports: torch.func, forward mode, torch.jit.trace, or
    the ONNX export of torch.export's graphs. Asked at every call."""
    return (
        is_transformed()
        or forward_ad._current_level >= 0
        or _tracing_state() is not None
        or (torch.compiler._is_exporting_flag and torch.onnx.is_in_onnx_export())
    )


def has_dual_level() -> bool:
    """Whether a forward-mode level is open, so that tensors may carry tangents."""
    return forward_ad._current_level >= 0


def is_tracing() -> bool:
    """Whether torch.jit.trace records: sizes are then tensors. As torch.jit.is_tracing, in half the time."""
    return _tracing_state() is not None


def untraced(function: Callable[..., _Result], *args: Any) -> _Result:
    """function(*args), hidden from torch.jit.trace: sizes, also those among the arguments, are plain ints, and what
    the function computes from them is not recorded."""
    state = _tracing_state()
    if state is None:
        return function(*args)
    _C._set_tracing_state(None)
    try:
        return function(*tree_map(_as_size, args))
    finally:
        _C._set_tracing_state(state)


def _as_size(value: Any) -> Any:
    """A size as an int: torch.jit.trace makes it a tensor of one integer."""
    is_size = isinstance(value, torch.Tensor) and value.dim() == 0 and value.dtype == torch.int64
    return int(value) if is_size else value


def is_batched_grad(tensor: torch.Tensor) -> bool:
    """Whether a gradient is one of many that `torch.autograd.grad(..., is_grads_batched=True)` takes at once."""
    return _C._functorch.is_legacy_batchedtensor(tensor)


def over_batched_grad(function: Callable[[torch.Tensor], _Result], grad: torch.Tensor) -> _Result:
    """Stacks function(g) over the gradients g of a batched gradient. The results must share one tree structure."""
    level = _C._vmapmode_increment_nesting() - 1
    _C._vmapmode_decrement_nesting()
    grads = torch._remove_batch_dim(grad, level, 1, 0)
    found = [function(g) for g in grads]
    return tree_map(lambda *parts: torch._add_batch_dim(torch.stack(parts), 0, level), *found)


def schema_of(overload: Any) -> str:
    """The schema of an operator overload such as `torch.ops.frd.pdc2d_depthwise.default`."""
    return str(overload._schema)


def autocast_key(device: str) -> str:
    """The dispatch key of autocast on a device type, as `torch.library.Library.impl` takes it."""
    return f"Autocast{torch._C._dispatch_key_for_device(device)}"


def without_keys(*names: str) -> Callable[[], AbstractContextManager[None]]:
    """Makes contexts in which operators skip what is registered for these dispatch keys."""
    sets = [torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)) for name in names]
    return functools.partial(torch._C._ExcludeDispatchKeyGuard, functools.reduce(operator.or_, sets))


# In `with outside_autocast():` an operator casts nothing.
outside_autocast = without_keys(*map(autocast_key, ("cpu", "cuda")))


def config_entry(config: Any, name: str) -> Any:
    """The entry behind a setting of a config module (`torch.compiler.config`). Its `env_value_default` is the value
    that every thread starts with; torch 2.11 has no such attribute, and one value for all threads."""
    return getattr(config, "_config", {}).get(name)
