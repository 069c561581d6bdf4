"""A view of a network in eval mode that leaves the network unchanged, so that other threads may train or use it."""

from __future__ import annotations

import copy
import itertools
from collections import OrderedDict
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule

_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel)


def eval_view(model: nn.Module, device: str | torch.device | None = None) -> nn.Module:
    """`model` in eval mode on `device` (None: where it is); the model keeps its own mode, device and caches.

    A model that is already in eval mode there is returned unchanged. Otherwise the view has new module objects that
    share its parameters, buffers and hooks; on another device they hold copies, made at each call. DataParallel and
    DistributedDataParallel are unwrapped, since a prediction is not a collective operation. A compiled model is kept
    in eval mode and unwrapped in training mode. TorchScript modules are copied.
    """
    model = unwrap(model)
    here = device_of(model)
    # An empty tensor's device has an index where the argument may have none.
    target = here if device is None else torch.empty(0, device=device).device
    members = {id(module) for module in model.modules()}
    if target == here and not any(module.training for module in model.modules()):
        return model
    view: nn.Module = _Copier(members, target if target != here else None)(model)
    return view


def unwrap(model: nn.Module) -> nn.Module:
    """The network below DataParallel and DistributedDataParallel, compiled or not."""
    inner = model._orig_mod if isinstance(model, OptimizedModule) else model
    return unwrap(inner.module) if isinstance(inner, _WRAPPERS) else model


def device_of(model: nn.Module) -> torch.device:
    """Device of the first parameter or buffer; the CPU for a model without any."""
    tensor = next(itertools.chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device


def dtype_of(model: nn.Module) -> torch.dtype:
    """Dtype of the first floating-point parameter; float32 for a model without any."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


class _Copier:
    """Copies the module objects `members` and the containers they hold, and shares everything else."""

    def __init__(self, members: set[int], device: torch.device | None) -> None:
        self.members = members
        self.device = device
        self.done: dict[int, Any] = {}

    def __call__(self, value: Any) -> Any:
        make = self._maker(value)
        if make is None:
            return value
        if id(value) not in self.done:
            self.done[id(value)] = make(value)
        return self.done[id(value)]

    def _maker(self, value: Any) -> Callable[[Any], Any] | None:
        if isinstance(value, nn.Module):
            return self._module if id(value) in self.members else None
        if isinstance(value, Tensor):
            return self._tensor if self.device is not None else None
        if isinstance(value, MethodType):
            # For example a forward that was replaced on the instance: it must run on the copy.
            return self._method if id(value.__self__) in self.members else None
        # Not for subclasses, whose constructors are unknown.
        makers: dict[type, Callable[[Any], Any]] = {
            dict: self._dict,
            OrderedDict: self._dict,
            list: self._list,
            tuple: self._tuple,
        }
        return makers.get(type(value))

    def _module(self, module: nn.Module) -> Any:
        if isinstance(module, OptimizedModule):
            return self(module._orig_mod)
        if isinstance(module, torch.jit.ScriptModule):
            script = copy.deepcopy(module).eval()
            return script if self.device is None else script.to(self.device)
        new = object.__new__(type(module))
        self.done[id(module)] = new
        new.__dict__.update({name: self(value) for name, value in vars(module).items()})
        # Module.compile() has bound the original.
        new.__dict__.update(training=False, _compiled_call_impl=None)
        return new

    def _tensor(self, tensor: Tensor) -> Tensor:
        moved = tensor.detach().to(self.device)
        return nn.Parameter(moved, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved

    def _method(self, method: MethodType) -> MethodType:
        return MethodType(method.__func__, self(method.__self__))

    def _dict(self, values: dict[Any, Any]) -> dict[Any, Any]:
        new = self.done[id(values)] = type(values)()
        new.update((key, self(value)) for key, value in values.items())
        return new

    def _list(self, values: list[Any]) -> list[Any]:
        new: list[Any] = []
        self.done[id(values)] = new
        new.extend(self(value) for value in values)
        return new

    def _tuple(self, values: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(self(value) for value in values)
