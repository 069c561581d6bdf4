"""Autograd of the operators: registered with torch.library, and a faster path to the same formulas for eager calls.

The wrappers of torch.library take longer than many of the kernels. An eager call therefore runs an `autograd.Function`
made of the same formulas, and goes straight to the kernel where nothing requires a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

from ._torch_internals import (
    below_autograd,
    dispatch_mode_count,
    has_any_autocast,
    has_dual_level,
    is_transformed,
    outside_autocast,
    schema_of,
    tree_map,
)

_FUNCTIONS: dict[Any, type[torch.autograd.Function]] = {}


def register(name: str, backward: Callable[..., Any], setup: Callable[..., None]) -> None:
    """Registers the backward of the operator "namespace::op"; arguments as for torch.library.register_autograd."""
    torch.library.register_autograd(name, backward, setup_context=setup)
    overload = register_vmap(name)
    # An autograd.Function does not track tensors in lists.
    if "Tensor[]" not in schema_of(overload):
        _FUNCTIONS[overload] = _function(overload, backward, setup)


def register_vmap(name: str) -> Any:
    """Registers vmap of the operator "namespace::op" as a loop over the samples, for batched gradients
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
    """Selects sample `index` of the values that are batched along `dims`; passes the others on."""

    def pick(value: Any, dim: Any) -> Any:
        if isinstance(dim, (list, tuple)):
            return _sample(value, dim, index)
        return value if dim is None else value.select(dim, index)

    return [pick(value, dim) for value, dim in zip(values, dims, strict=True)]


def call(op: Any, *inputs: Any) -> Any:
    """op(*inputs) of an operator overload. Under autocast the caller has already cast the inputs, by operations that
    autograd records.

    Raises:
        NotImplementedError: an input carries a forward-mode tangent, which torch.library would drop silently.
    """
    if has_dual_level() and any(map(_has_tangent, inputs)):
        raise NotImplementedError(
            f"{op.name()}: forward-mode differentiation does not go through the kernels; leave use_backend "
            "out, or ask for frd_kernels.use_backend('reference')"
        )
    if has_observers():
        return op(*inputs)
    if has_any_autocast():
        # Past the operator's rule for autocast, which takes longer than a small kernel to find nothing to cast.
        with outside_autocast():
            return _call(op, inputs)
    return _call(op, inputs)


def _call(op: Any, inputs: tuple[Any, ...]) -> Any:
    """`call` where no observer is active."""
    if torch.is_grad_enabled() and _any_requires_grad(inputs):
        return _FUNCTIONS[op].apply(*inputs) if op in _FUNCTIONS else op(*inputs)
    with below_autograd():
        return op(*inputs)


def has_observers() -> bool:
    """Whether a compiler, a dispatch mode or functorch is active, which have to see the operator itself."""
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
