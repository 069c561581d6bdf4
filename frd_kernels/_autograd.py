"""Autograd of the operators: registered with torch, and a shorter way to the same rules for eager calls.

The wrappers of torch.library take longer than many a kernel. So an eager call gets the rules from an
`autograd.Function` of ours, and where nothing needs a gradient it goes to the kernel at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

from ._torch_internals import (
    below_autograd,
    dispatch_mode_count,
    has_dual_level,
    is_transformed,
    schema_of,
    tree_map,
)

_FUNCTIONS: dict[Any, type[torch.autograd.Function]] = {}


def register(name: str, backward: Callable[..., Any], setup: Callable[..., None]) -> None:
    """The derivative of the operator "namespace::op"; its arguments are as for torch.library.register_autograd."""
    torch.library.register_autograd(name, backward, setup_context=setup)
    overload = register_vmap(name)
    if "Tensor[]" not in schema_of(overload):  # an autograd.Function does not look into lists
        _FUNCTIONS[overload] = _function(overload, backward, setup)


def register_vmap(name: str) -> Any:
    """vmap of the operator "namespace::op" as a loop, for gradients that come in batches
    (`torch.autograd.grad(..., is_grads_batched=True)`, `jacobian(..., vectorize=True)`). Returns its overload."""
    namespace, _, op = name.partition("::")
    overload = getattr(getattr(torch.ops, namespace), op).default

    def loop(info: Any, in_dims: Any, *inputs: Any) -> tuple[Any, Any]:
        samples = [overload(*_sample(inputs, in_dims, i)) for i in range(info.batch_size)]
        out = tree_map(lambda *tensors: torch.stack(tensors), *samples)
        return out, tree_map(lambda _: 0, out)

    torch.library.register_vmap(name, loop)
    return overload


def _sample(values: Any, dims: Any, index: int) -> list[Any]:
    """Number `index` of the values that are batched along `dims`; the others as they are."""

    def pick(value: Any, dim: Any) -> Any:
        if isinstance(dim, (list, tuple)):
            return _sample(value, dim, index)
        return value if dim is None else value.select(dim, index)

    return [pick(value, dim) for value, dim in zip(values, dims, strict=True)]


def call(op: Any, *inputs: Any) -> Any:
    """op(*inputs) of an operator overload. Under autocast the caller has cast the inputs already, in a way that
    autograd sees."""
    if has_dual_level() and any(map(_has_tangent, inputs)):  # torch.library would drop it in silence
        raise NotImplementedError(
            f"{op.name()}: forward-mode differentiation does not go through the kernels; leave use_backend "
            "out, or ask for frd_kernels.use_backend('reference')"
        )
    if has_observers():
        return op(*inputs)
    if torch.is_grad_enabled() and _any_requires_grad(inputs):
        return _FUNCTIONS[op].apply(*inputs) if op in _FUNCTIONS else op(*inputs)
    with below_autograd():
        return op(*inputs)


def has_observers() -> bool:
    """Whether something has to see the operator itself: a compiler, a dispatch mode, functorch."""
    return torch.compiler.is_compiling() or dispatch_mode_count() > 0 or is_transformed()


def _has_tangent(value: Any) -> bool:
    if isinstance(value, list):
        return any(map(_has_tangent, value))
    return isinstance(value, torch.Tensor) and forward_ad.unpack_dual(value).tangent is not None


def _any_requires_grad(values: Any) -> bool:
    for value in values:
        if isinstance(value, torch.Tensor):
            if value.requires_grad:
                return True
        elif isinstance(value, list) and _any_requires_grad(value):
            return True
    return False


def _function(
    op: Any, backward: Callable[..., Any], setup: Callable[..., None]
) -> type[torch.autograd.Function]:
    def forward(ctx: Any, *inputs: Any) -> Any:
        with below_autograd():
            output = op(*inputs)
        setup(ctx, inputs, output)
        return output

    rules = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(op.name().partition("::")[2], (torch.autograd.Function,), rules)
