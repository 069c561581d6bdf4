"""`cluster`, `icm`, `cluster_dispatch` and their backwards as operators: fakes, autograd, autocast.

The public functions of this module take the namespace of the operators as `ops`: torch.ops.frd.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from .. import _autograd, _flops, _library, _triton
from .._numbers import as_ints
from .._torch_internals import autocast_key, is_batched_grad, over_batched_grad, without_keys
from . import chain_saved, saved
from .saved import compute_dtype
from .triton import layout as triton_layout

Tensor = torch.Tensor


class Layout(Protocol):
    """What the operators of a namespace keep for their backward: the size of a sample's row of `saved`."""

    def saved_size(self, dtype: torch.dtype, tokens: int, centres: int, channels: int, /) -> int:
        """Elements of `saved` of `cluster` for keys of `dtype`."""

    def saved_layout(
        self, dtype: torch.dtype, hw: Sequence[int], grids: Sequence[int], channels: int, variant: int, /
    ) -> tuple[int, int]:
        """(labels, elements of `saved`) of `icm` for tokens of `dtype`."""


def strided_tokens(like: Tensor, shape: Sequence[int], channels_first: bool) -> Tensor:
    """Uninitialized tokens [B, N, C]; with channels_first the memory is [B, C, N]."""
    batch, tokens, channels = shape
    if channels_first:
        return like.new_empty_strided((batch, tokens, channels), (channels * tokens, 1, tokens))
    return like.new_empty((batch, tokens, channels))


def like_tokens(x: Tensor) -> Tensor:
    """Uninitialized tokens in the layout of x, also if that is a permuted image."""
    tokens = x.shape[1]
    several = tokens > 1 if isinstance(tokens, int) else _may_be_several(tokens)
    return strided_tokens(x, x.shape, several and x.stride(1) == 1 and x.stride(2) >= tokens)


def _may_be_several(tokens: torch.SymInt) -> bool:
    """Whether a symbolic count is above 1, or unknown: the stride of a single token has no effect."""
    # The import takes half a second.
    from torch.fx.experimental.symbolic_shapes import guard_or_true

    return guard_or_true(tokens > 1)


def _fake_cluster(
    layout: Layout,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    alpha: Tensor,
    beta: Tensor,
    grid: Sequence[int],
    hw: Sequence[int],
    aggregate: int,
) -> tuple[Tensor, ...]:
    torch._check(k.dim() == 3 and v.dim() == 3)
    batch, tokens, channels = k.shape
    centres, dtype = grid[0] * grid[1], compute_dtype(k.dtype)
    return (
        v.new_empty((batch, centres, channels)),
        k.new_empty((batch, tokens), dtype=torch.int32),
        k.new_empty((batch, tokens), dtype=dtype),
        k.new_empty((batch, centres), dtype=torch.int32),
        k.new_empty((batch, layout.saved_size(k.dtype, tokens, centres, channels)), dtype=dtype),
    )


def _fake_cluster_backward(
    grad_centres: Tensor,
    grad_similarity: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    beta: Tensor,
    *_rest: Any,
) -> tuple[Tensor, ...]:
    return like_tokens(k), like_tokens(v), torch.empty_like(alpha), torch.empty_like(beta)


def _fake_dispatch(centres: Tensor, labels: Tensor, similarity: Tensor, channels_first: bool) -> Tensor:
    torch._check(centres.dim() == 3 and labels.dim() == 2)
    return strided_tokens(centres, (*labels.shape, centres.shape[2]), channels_first)


def _fake_dispatch_backward(
    grad: Tensor, centres: Tensor, labels: Tensor, similarity: Tensor
) -> tuple[Tensor, Tensor]:
    return centres.new_empty(centres.shape), similarity.new_empty(similarity.shape)


def _fake_icm(
    layout: Layout,
    x: Tensor,
    projections: Sequence[Tensor],
    alpha: Tensor,
    beta: Tensor,
    grids: Sequence[int],
    hw: Sequence[int],
    variant: int,
) -> tuple[Tensor, Tensor, Tensor]:
    torch._check(x.dim() == 3)
    labels, elements = layout.saved_layout(x.dtype, (1, x.shape[1]), grids, x.shape[2], variant)
    return (
        like_tokens(x),
        x.new_empty((x.shape[0], labels), dtype=torch.int32),
        x.new_empty((x.shape[0], elements), dtype=compute_dtype(x.dtype)),
    )


def _fake_icm_backward(
    grad: Tensor, x: Tensor, projections: Sequence[Tensor], alpha: Tensor, beta: Tensor, *_rest: Any
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    grads = [p.new_empty(p.shape) for p in projections]
    return like_tokens(x), grads, torch.empty_like(alpha), torch.empty_like(beta)


def _cluster_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    k, v, _mask, alpha, beta, ctx.grid, ctx.hw, ctx.aggregate = inputs
    centres, labels, _similarity, counts, saved = output
    ctx.mark_non_differentiable(labels, counts, saved)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(k, v, alpha, beta, labels, saved)
    ctx.centres = centres.shape


def _dispatch_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


def _icm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, projections, alpha, beta, ctx.grids, ctx.hw, ctx.variant = inputs
    _out, labels, saved = output
    ctx.mark_non_differentiable(labels, saved)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, alpha, beta, labels, saved, *projections)


class _Rules:
    """The backwards of the operators of a namespace, which call operators of the same namespace."""

    def __init__(self, namespace: str) -> None:
        self.ops = getattr(torch.ops, namespace)

    def cluster(
        self, ctx: Any, grad_centres: Tensor | None, _labels: None, grad_similarity: Tensor | None, *_: None
    ) -> Any:
        if grad_centres is None and grad_similarity is None:
            return (None,) * 8
        k, v, alpha, beta, labels, saved = ctx.saved_tensors
        if grad_centres is None:
            grad_centres = v.new_zeros(ctx.centres)
        if grad_similarity is None:
            grad_similarity = saved.new_zeros(labels.shape)
        saved_for = k, v, alpha, beta, labels, saved, ctx.grid, ctx.hw, ctx.aggregate
        grad_k, grad_v, *gates = _autograd.call(
            self.ops.cluster_backward.default, grad_centres, grad_similarity, *saved_for
        )
        return grad_k, grad_v, None, *gates, None, None, None

    def dispatch(self, ctx: Any, grad: Tensor) -> Any:
        centres, labels, similarity = ctx.saved_tensors
        backward = self.ops.cluster_dispatch_backward.default
        grad_centres, grad_similarity = _autograd.call(backward, grad, centres, labels, similarity)
        return grad_centres, None, grad_similarity, None

    def icm(self, ctx: Any, grad: Tensor | None, *_: None) -> Any:
        x, alpha, beta, labels, saved, *projections = ctx.saved_tensors
        if grad is None:
            return None, [None] * len(projections), None, None, None, None, None
        saved_for = x, projections, alpha, beta, labels, saved, ctx.grids, ctx.hw, ctx.variant

        def backward(grad: Tensor) -> Any:
            return _autograd.call(self.ops.icm_backward.default, grad, *saved_for)

        # Over an operator without lists of tensors torch loops on its own.
        grads = over_batched_grad(backward, grad) if is_batched_grad(grad) else backward(grad)
        return *grads, None, None, None


def _refuse(op: str) -> Callable[..., Any]:
    def refuse(ctx: Any, *_grads: Any) -> Any:
        raise NotImplementedError(
            f"frd_kernels.{op}: double backward is not supported; torch.func and "
            "frd_kernels.use_backend('reference') differentiate to any order"
        )

    return refuse


def _autocast_rule(op: Any, floats: int, device: str) -> Callable[..., Any]:
    """Casts the first `floats` arguments. alpha and beta, which follow, keep the dtype of the sums."""
    outside_autocast = without_keys(autocast_key(device))

    def cast(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [cast(tensor) for tensor in value]
        return value if value.dtype == torch.float64 else value.to(torch.get_autocast_dtype(device))

    def rule(*args: Any) -> Any:
        with outside_autocast():
            return op(*(cast(value) for value in args[:floats]), *args[floats:])

    return rule


def _cluster_flops(
    k: Sequence[int], v: Any, mask: Any, alpha: Any, beta: Any, grid: Sequence[int], *_: Any, **__: Any
) -> int:
    return _flops.clustering(k, grid[0] * grid[1])


def _cluster_backward_flops(
    grad_centres: Sequence[int], grad_similarity: Any, k: Sequence[int], *_: Any, **__: Any
) -> int:
    return 2 * _flops.clustering(k, grad_centres[1])


def _icm_flops(
    x: Any, projections: Any, alpha: Any, beta: Any, grids: Any, hw: Any, variant: int, **_: Any
) -> int:
    return _flops.icm(x, projections, grids, variant)


def _icm_backward_flops(
    grad: Any,
    x: Any,
    projections: Any,
    alpha: Any,
    beta: Any,
    labels: Any,
    saved: Any,
    *options: Any,
    **_: Any,
) -> int:
    grids, _hw, variant = options
    return 2 * _flops.icm(x, projections, grids, variant)


_FLOPS: dict[str, Callable[..., int]] = {
    "cluster": _cluster_flops,
    "cluster_backward": _cluster_backward_flops,
    "cluster_dispatch": _flops.nothing,
    "cluster_dispatch_backward": _flops.nothing,
    "icm": _icm_flops,
    "icm_backward": _icm_backward_flops,
}

# A library's registrations end with it.
_libraries: list[torch.library.Library] = []


def register(namespace: str, layout: Layout = saved) -> None:
    """Registers fakes, autograd, autocast and FLOP formulas of the operators in `namespace`, whose `saved` has this
    layout."""
    fakes: dict[str, Callable[..., Any]] = {
        "cluster": functools.partial(_fake_cluster, layout),
        "cluster_backward": _fake_cluster_backward,
        "cluster_dispatch": _fake_dispatch,
        "cluster_dispatch_backward": _fake_dispatch_backward,
        "icm": functools.partial(_fake_icm, layout),
        "icm_backward": _fake_icm_backward,
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"{namespace}::{name}", fake)
    rules = _Rules(namespace)
    for name, backward, setup in (
        ("cluster", rules.cluster, _cluster_setup),
        ("cluster_dispatch", rules.dispatch, _dispatch_setup),
        ("icm", rules.icm, _icm_setup),
    ):
        _autograd.register(f"{namespace}::{name}", backward, setup)
        torch.library.register_autograd(f"{namespace}::{name}_backward", _refuse(name))
        _autograd.register_vmap(f"{namespace}::{name}_backward")
    _flops.register(namespace, _FLOPS)
    library = torch.library.Library(namespace, "FRAGMENT")
    _libraries.append(library)
    for device in ("cpu", "cuda"):
        for name in ("cluster", "icm"):
            library.impl(
                name, _autocast_rule(getattr(rules.ops, name).default, 2, device), autocast_key(device)
            )


register("frd")
register(_triton.NAMESPACE, triton_layout)
register(_library.CHAIN, chain_saved)


def _gate(value: float | Tensor, like: Tensor, size: int) -> Tensor:
    """alpha or beta as an argument of the operators: [size] in the dtype of the sums."""
    dtype = compute_dtype(like.dtype)
    if not isinstance(value, Tensor):
        return torch.full((size,), value, dtype=dtype, device=like.device)
    if value.dtype != dtype or value.device != like.device:
        value = value.to(device=like.device, dtype=dtype)
    # No view where none is needed: it takes longer than the rest.
    return value if value.shape == (size,) else value.expand(size)


def cluster(
    ops: Any,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    grid: Sequence[int],
    hw: Sequence[int],
    aggregate: int,
    alpha: float | Tensor,
    beta: float | Tensor,
) -> tuple[Tensor, ...]:
    """(centres, labels int32, similarity, counts) of `frd_kernels.cluster`, for checked arguments."""
    gates = _gate(alpha, k, 1), _gate(beta, k, 1)
    out: tuple[Tensor, ...] = _autograd.call(
        ops.cluster.default, k, v, mask, *gates, as_ints(grid), as_ints(hw), aggregate
    )
    return out[:4]


def dispatch(ops: Any, centres: Tensor, labels: Tensor, similarity: Tensor, channels_first: bool) -> Tensor:
    """`frd_kernels.dispatch` for checked arguments."""
    dtype = compute_dtype(centres.dtype)
    inputs = centres, labels.to(torch.int32), similarity.to(dtype), channels_first
    out: Tensor = _autograd.call(ops.cluster_dispatch.default, *inputs)
    return out


def icm(
    ops: Any,
    x: Tensor,
    projections: Sequence[Sequence[Tensor | None] | None],
    variant: int,
    alpha: float | Tensor,
    beta: float | Tensor,
    grids: Sequence[Sequence[int]],
    hw: Sequence[int],
) -> Tensor:
    """`frd_kernels.icm` for checked arguments. For the operator, no projection is empty tensors, no bias is zeros."""
    flat: list[Tensor] = []
    for projection in projections:
        if projection is None:
            flat += [x.new_empty(0)] * 4
        else:
            flat += [x.new_zeros(x.size(2)) if part is None else part for part in projection]
    size = 1 if variant == 0 else len(grids)
    flat_grids = [n for grid in grids for n in as_ints(grid)]
    gates = _gate(alpha, x, size), _gate(beta, x, size)
    out: tuple[Tensor, ...] = _autograd.call(
        ops.icm.default, x, flat, *gates, flat_grids, as_ints(hw), variant
    )
    return out[0]
