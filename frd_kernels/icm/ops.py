"""The operators `frd::cluster` and `frd::icm` for autograd, autocast and torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .. import _library  # noqa: F401  registers the schemas
from .reference import compute_dtype

Tensor = torch.Tensor
_ops = torch.ops.frd


def _saved_size(tokens: int, centres: int, channels: int) -> int:
    """What a round keeps for an item, as `layout_saved` in csrc/icm/launch_cpu.h."""
    return 2 * tokens + 4 * centres * channels + 2 * centres


def _like_tokens(x: Tensor) -> Tensor:
    """Uninitialised, in the layout of x: a permuted image stays one."""
    batch, tokens, channels = x.shape
    if tokens > 1 and x.stride(1) == 1 and x.stride(2) >= tokens:
        return x.new_empty((batch, channels, tokens)).transpose(1, 2)
    return x.new_empty((batch, tokens, channels))


@torch.library.register_fake("frd::cluster")
def _(
    k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor, grid: Sequence[int], hw: Sequence[int], aggregate: int
) -> tuple[Tensor, ...]:
    torch._check(k.dim() == 3 and v.dim() == 3)
    batch, tokens, channels = k.shape
    centres, dtype = grid[0] * grid[1], compute_dtype(k.dtype)
    return (
        v.new_empty((batch, centres, channels)),
        k.new_empty((batch, tokens), dtype=torch.int32),
        k.new_empty((batch, tokens), dtype=dtype),
        k.new_empty((batch, centres), dtype=torch.int32),
        k.new_empty((batch, _saved_size(tokens, centres, channels)), dtype=dtype),
    )


@torch.library.register_fake("frd::cluster_backward")
def _(
    grad_centres: Tensor,
    grad_similarity: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    beta: Tensor,
    *_rest: Any,
) -> tuple[Tensor, ...]:
    return _like_tokens(k), _like_tokens(v), torch.empty_like(alpha), torch.empty_like(beta)


@torch.library.register_fake("frd::icm")
def _(
    x: Tensor,
    projections: Sequence[Tensor],
    alpha: Tensor,
    beta: Tensor,
    grids: Sequence[int],
    hw: Sequence[int],
    variant: int,
) -> tuple[Tensor, Tensor, Tensor]:
    torch._check(x.dim() == 3)
    batch, tokens, channels = x.shape
    columns = grids[-2] * grids[-1]
    labels = saved = 0
    for t in range(len(grids) // 2):
        centres = grids[2 * t] * grids[2 * t + 1]
        labels += tokens
        saved += _saved_size(tokens, centres, channels)
        if variant == 0:
            saved += columns * (2 * channels + 1) + (tokens * columns if t > 0 else 0)
        tokens = centres
    return (
        _like_tokens(x),
        x.new_empty((batch, labels), dtype=torch.int32),
        x.new_empty((batch, saved), dtype=compute_dtype(x.dtype)),
    )


@torch.library.register_fake("frd::icm_backward")
def _(
    grad: Tensor, x: Tensor, projections: Sequence[Tensor], alpha: Tensor, beta: Tensor, *_rest: Any
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    grads = [p.new_empty(p.shape) for p in projections]
    return _like_tokens(x), grads, torch.empty_like(alpha), torch.empty_like(beta)


def _cluster_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    k, v, alpha, beta, ctx.grid, ctx.hw, ctx.aggregate = inputs
    centres, labels, _similarity, counts, saved = output
    ctx.mark_non_differentiable(labels, counts, saved)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(k, v, alpha, beta, labels, saved)
    ctx.centres = centres.shape


def _cluster_backward(
    ctx: Any, grad_centres: Tensor | None, _labels: None, grad_similarity: Tensor | None, *_: None
) -> Any:
    if grad_centres is None and grad_similarity is None:
        return (None,) * 7
    k, v, alpha, beta, labels, saved = ctx.saved_tensors
    if grad_centres is None:
        grad_centres = v.new_zeros(ctx.centres)
    if grad_similarity is None:
        grad_similarity = saved.new_zeros(labels.shape)
    grads = _ops.cluster_backward(
        grad_centres, grad_similarity, k, v, alpha, beta, labels, saved, ctx.grid, ctx.hw, ctx.aggregate
    )
    return *grads, None, None, None


def _icm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, projections, alpha, beta, ctx.grids, ctx.hw, ctx.variant = inputs
    _out, labels, saved = output
    ctx.mark_non_differentiable(labels, saved)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, alpha, beta, labels, saved, *projections)


def _icm_backward(ctx: Any, grad: Tensor | None, *_: None) -> Any:
    x, alpha, beta, labels, saved, *projections = ctx.saved_tensors
    if grad is None:
        return None, [None] * len(projections), None, None, None, None, None
    grads = _ops.icm_backward(
        grad, x, projections, alpha, beta, labels, saved, ctx.grids, ctx.hw, ctx.variant
    )
    return *grads, None, None, None


def _refuse(op: str) -> Callable[..., Any]:
    def refuse(ctx: Any, *_grads: Any) -> Any:
        raise NotImplementedError(
            f"frd_kernels.{op}: double backward is not supported; "
            "frd_kernels.use_backend('reference') differentiates to any order"
        )

    return refuse


torch.library.register_autograd("frd::cluster", _cluster_backward, setup_context=_cluster_setup)
torch.library.register_autograd("frd::icm", _icm_backward, setup_context=_icm_setup)
torch.library.register_autograd("frd::cluster_backward", _refuse("cluster"))
torch.library.register_autograd("frd::icm_backward", _refuse("icm"))


def _autocast_rule(op: Any, floats: int, device: str) -> Callable[..., Any]:
    """Casts the first `floats` arguments; alpha and beta behind them stay in the dtype of the sums."""
    key = getattr(torch._C.DispatchKey, f"Autocast{torch._C._dispatch_key_for_device(device)}")

    def cast(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [cast(item) for item in value]
        return value if value.dtype == torch.float64 else value.to(torch.get_autocast_dtype(device))

    def rule(*args: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return op(*(cast(value) for value in args[:floats]), *args[floats:])

    return rule


_AUTOCAST = torch.library.Library("frd", "FRAGMENT")
for _device in ("cpu", "cuda"):
    _key = f"Autocast{torch._C._dispatch_key_for_device(_device)}"
    _AUTOCAST.impl("cluster", _autocast_rule(_ops.cluster.default, 2, _device), _key)
    _AUTOCAST.impl("icm", _autocast_rule(_ops.icm.default, 2, _device), _key)


def _gate(value: float | Tensor, like: Tensor, size: int) -> Tensor:
    """alpha or beta as the operators take it: [size] in the dtype of the sums."""
    dtype = compute_dtype(like.dtype)
    if not isinstance(value, Tensor):
        return torch.full((size,), value, dtype=dtype, device=like.device)
    return value.to(device=like.device, dtype=dtype).reshape(-1).expand(size)


def cluster(
    k: Tensor,
    v: Tensor,
    grid: Sequence[int],
    hw: Sequence[int],
    aggregate: int,
    alpha: float | Tensor,
    beta: float | Tensor,
) -> tuple[Tensor, ...]:
    """centres, labels (int32), similarity, counts of `frd::cluster`."""
    out: tuple[Tensor, ...] = _ops.cluster(
        k, v, _gate(alpha, k, 1), _gate(beta, k, 1), list(grid), list(hw), aggregate
    )
    return out[:4]


def icm(
    x: Tensor,
    projections: Sequence[Sequence[Tensor | None] | None],
    variant: int,
    alpha: float | Tensor,
    beta: float | Tensor,
    grids: Sequence[Sequence[int]],
    hw: Sequence[int],
) -> Tensor:
    """`frd::icm`; a projection that is None becomes empty tensors, a bias that is None zeros."""
    flat: list[Tensor] = []
    for projection in projections:
        if projection is None:
            flat += [x.new_empty(0)] * 4
        else:
            flat += [x.new_zeros(x.size(2)) if part is None else part for part in projection]
    size = 1 if variant == 0 else len(grids)
    sides = [side for grid in grids for side in grid]
    out: tuple[Tensor, ...] = _ops.icm(
        x, flat, _gate(alpha, x, size), _gate(beta, x, size), sides, list(hw), variant
    )
    return out[0]
