"""Whether a composite layer may read the parameters of an inner module instead of calling it.

A fused kernel takes the weights of several modules and calls none of them. It would therefore miss whatever is
attached to a module or replaces it: hooks, adapters, weight and spectral norm, pruning, quantization, sharding. Where
`is_plain` finds something of the kind, the layer calls its modules one after the other instead.
"""

from __future__ import annotations

from typing import TypeGuard, TypeVar

from torch import nn
from torch.nn.modules.conv import Conv2d
from torch.nn.modules.linear import Linear
from torch.utils.module_tracker import ModuleTracker

from ._torch_internals import GLOBAL_HOOKS, HOOK_ATTRIBUTES, PLAIN_TENSORS

_Module = TypeVar("_Module", bound=nn.Module)

# Some tools replace these, to change every layer at once.
_FORWARDS = Linear.forward, Conv2d.forward


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module runs, or its backward will run, anything besides its class's `forward`."""
    own = module.__dict__
    for name in HOOK_ATTRIBUTES:
        if own.get(name):
            return True
    # Seamless tiling replaces `_conv_forward` on the instance; `module.compile()` sets `_compiled_call_impl`.
    return "forward" in own or "_conv_forward" in own or own.get("_compiled_call_impl") is not None


def has_global_hooks() -> bool:
    """Whether hooks run at the calls of all modules, or the forward of all linear layers or convolutions is replaced.

    The hooks of a FLOP counter only record names, and do not count: it should see the fused operators.
    """
    if Linear.forward is not _FORWARDS[0] or Conv2d.forward is not _FORWARDS[1]:
        return True
    # One by one: torch.compile guards each of these tables, but not what `any` finds in them.
    forward, forward_pre, backward, backward_pre = GLOBAL_HOOKS
    if not (forward or forward_pre or backward or backward_pre):
        return False
    hooks = [hook for table in GLOBAL_HOOKS for hook in table.values()]
    return not all(isinstance(getattr(hook, "__self__", None), ModuleTracker) for hook in hooks)


def is_plain(module: nn.Module | None, cls: type[_Module]) -> TypeGuard[_Module]:
    """Whether a call of the module computes what the forward of `cls` does with its parameters, and nothing else.

    A parametrized or sharded module has another class. Takes less than a microsecond.
    """
    return type(module) is cls and not has_hooks(module) and _has_plain_weight(module)


def _has_plain_weight(module: nn.Module) -> bool:
    """Whether `weight`, if there is one, is an ordinary tensor: a quantized or sharded one has operators of its own."""
    own = module.__dict__
    weight = own["_parameters"].get("weight")
    if weight is None:
        # In replicas of nn.DataParallel and with flattened parameters it is a plain attribute.
        weight = own.get("weight")
    return weight is None or type(weight) in PLAIN_TENSORS
