"""Cosine clustering of tokens, and the ICM built on it: the user-facing functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar, cast

import torch
import torch.fx
from torch.fx import Proxy
from torch.overrides import handle_torch_function

from .. import backend
from .._autocast import autocast_dtype
from .._numbers import as_int, is_integer, is_number
from .._torch_internals import untraced
from . import ops, reference
from .reference import ClusterResult, Projection, Scalar

AGGREGATES = ("count", "similarity")
VARIANTS = ("paper", "released")
_TensorOrNone = TypeVar("_TensorOrNone", torch.Tensor, torch.Tensor | None)
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def cluster(
    k: torch.Tensor,
    v: torch.Tensor,
    grid: Sequence[int],
    hw: Sequence[int],
    *,
    aggregate: str = "count",
    alpha: Scalar = 1.0,
    beta: Scalar = 0.0,
    mask: torch.Tensor | None = None,
) -> ClusterResult:
    """One round of cosine clustering: pool centres, assign every token to the nearest, average each cluster.

    Centres start as the means of k and of v over `grid` bins of the image (the bins of `adaptive_avg_pool2d`:
    they overlap where the grid does not divide the image, and there may be more bins than pixels). A token
    belongs to the centre with the largest cosine of keys; a tie, and a token of norm zero, goes to the lowest
    index, a NaN likewise as in `torch.argmax`. The new centre is the mean of its tokens' values and its own
    pooled one.

    Args:
        k: keys [B, N, C], tokens of an image in row-major order.
        v: values [B, N, C], k's shape and dtype.
        grid: centres per axis (rows, columns); O is their product.
        hw: (H, W) of the image, H * W = N.
        aggregate: "count": each token weighs 1 (FEC; FRD-Net, Eq. 1 to 3). "similarity": each token weighs
            its similarity sigmoid(beta + alpha * cosine), over which the arg-max is taken as well (CoC;
            FRD-Net's code).
        alpha: slope of the similarity, a number or a tensor of one element. As the arg-max is over the
            similarity, a negative one makes a token join the least similar centre, and 0 ties all. For "count"
            only this sign counts.
        beta: offset of the similarity, a number or a tensor of one element; unused for "count".
        mask: bool [B, N], true for the tokens that take part; None: all. The others are in no mean, no count
            and no gradient, whatever they hold, a NaN too: label -1, similarity 0, gradients 0. A bin without
            tokens pools to zeros, and all cosines with it are 0.

    Returns:
        ClusterResult: centres [B, O, C] in v's dtype; labels [B, N] int64, -1 for a masked token; similarity
            [B, N] of each token with its own centre (the raw cosine for "count") in float32, float64 for
            float64; counts [B, O] int32. Centres and similarity are differentiable; labels are constants.

    Raises:
        ValueError: shapes, dtypes or names that do not fit.
    """
    if isinstance(k, Proxy):
        named: dict[str, Any] = {"aggregate": aggregate, "alpha": alpha, "beta": beta, "mask": mask}
        return handle_torch_function(cluster, (k,), k, v, grid, hw, **named)
    untraced(_check_keys_and_values, k, v)
    k, v = _autocast(k, k), _autocast(v, k)
    untraced(_check_cluster, k, v, grid, hw, aggregate, alpha, beta, mask)
    native = backend.select("cluster", k)
    if native is None:
        return reference.cluster(k, v, grid, hw, aggregate=aggregate, alpha=alpha, beta=beta, mask=mask)
    index = AGGREGATES.index(aggregate)
    centres, labels, similarity, counts = ops.cluster(native, k, v, mask, grid, hw, index, alpha, beta)
    return ClusterResult(centres, labels.long(), similarity, counts)


def _check_keys_and_values(k: torch.Tensor, v: torch.Tensor) -> None:
    _check_tokens(k, "k")
    _check_tokens(v, "v")


def _check_cluster(
    k: torch.Tensor,
    v: torch.Tensor,
    grid: Sequence[int],
    hw: Sequence[int],
    aggregate: str,
    alpha: Scalar,
    beta: Scalar,
    mask: torch.Tensor | None,
) -> None:
    if v.shape != k.shape or v.dtype != k.dtype or v.device != k.device:
        raise ValueError(f"v must have k's shape, dtype and device, got {_describe(v)} for k {_describe(k)}")
    check_grid(grid, "grid")
    _check_image(hw, k)
    if aggregate not in AGGREGATES:
        raise ValueError(f"aggregate must be 'count' or 'similarity', got {aggregate!r}")
    _check_scalar(alpha, "alpha", (1,))
    _check_scalar(beta, "beta", (1,))
    _check_mask(mask, k)


def dispatch(
    centres: torch.Tensor, labels: torch.Tensor, similarity: torch.Tensor, *, channels_first: bool = False
) -> torch.Tensor:
    """Gives every token its own centre, times its similarity: the way back from `cluster` to the tokens.

    Args:
        centres: [B, O, C]. Their dtype is that of the result, under autocast as well.
        labels: int64 or int32 [B, N], each token's own centre 0 .. O - 1, or -1 for a token that gets 0.
        similarity: [B, N] of a floating dtype, each token's factor. It is taken as float32, float64 where the
            centres are.
        channels_first: lays the result out as a permuted image: its memory is [B, C, N].

    Returns:
        [B, N, C]. Centres and similarity are differentiable; the sums over a cluster's tokens have a fixed
        order.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    if isinstance(centres, Proxy):
        inputs = centres, labels, similarity
        return handle_torch_function(dispatch, (centres,), *inputs, channels_first=channels_first)
    untraced(_check_dispatch, centres, labels, similarity)
    native = backend.select("cluster_dispatch", centres)
    if native is None:
        return reference.dispatch(centres, labels, similarity, channels_first=channels_first)
    return ops.dispatch(native, centres, labels, similarity, channels_first)


def _check_dispatch(centres: torch.Tensor, labels: torch.Tensor, similarity: torch.Tensor) -> None:
    _check_tokens(centres, "centres", "[B, O, C]", "centre")
    _check_per_token(labels, "labels", centres)
    _check_per_token(similarity, "similarity", centres)
    if labels.shape != similarity.shape:
        raise ValueError(
            f"labels and similarity must have one shape, got {list(labels.shape)} and {list(similarity.shape)}"
        )
    if labels.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"labels must be int64 or int32, got {_describe(labels)}")
    if not similarity.is_floating_point():
        raise ValueError(f"similarity must be of a floating dtype, got {_describe(similarity)}")


def icm(
    x: torch.Tensor,
    projections: Sequence[Projection | None] | None,
    *,
    variant: str = "paper",
    alpha: Scalar,
    beta: Scalar,
    grids: Sequence[Sequence[int]] = ((8, 8), (4, 4), (2, 1)),
    hw: Sequence[int],
) -> torch.Tensor:
    """FRD-Net's iterative clustering: T rounds of `cluster`, then the last centres dispatched back to the
    tokens.

    Round t clusters the tokens R_(t-1) (R_0 = x, R_t = the centres of round t, an image of grids[t-1]) with
    keys Wk R + bk and values Wv R + bv.

    Args:
        x: tokens [B, N, C] of an image in row-major order; any strides.
        projections: for each round (Wk [C, C], bk [C], Wv [C, C], bv [C]), a bias may be None, or None for
            keys = values = tokens; None alone: so in every round. Dtype as x.
        variant: "paper" (Eq. 1 to 4): raw cosines, means over counts, output sigmoid(alpha * (M1 M2 ... MT) +
            beta) R_T with the dense cosine matrices M. "released" (the authors' code): similarities
            sigmoid(beta_t + alpha_t * cosine), means weighted by them, output the product of the similarities
            along a token's chain of centres times its last centre.
        alpha: "paper": a number or a tensor of one element. "released": also a tensor [T], one per round.
        beta: likewise.
        grids: centres per axis (rows, columns) of each round.
        hw: (H, W) of x, H * W = N.

    Returns:
        [B, N, C] in x's dtype, strided as x where x is a permuted image [B, C, H, W].

    Raises:
        ValueError: shapes, dtypes or names that do not fit.
    """
    if isinstance(x, Proxy):
        named: dict[str, Any] = {"variant": variant, "alpha": alpha, "beta": beta, "grids": grids, "hw": hw}
        return handle_torch_function(icm, (x,), x, projections, **named)
    untraced(_check_icm, x, variant, alpha, beta, grids, hw)
    if projections is not None:
        projections = [p and cast(Projection, tuple(_autocast(t, x) for t in p)) for p in projections]
    x = _autocast(x, x)
    untraced(_check_projections, projections, len(grids), x)
    native = backend.select("icm", x)
    if native is None:
        return reference.icm(x, projections, variant=variant, alpha=alpha, beta=beta, grids=grids, hw=hw)
    given = [None] * len(grids) if projections is None else projections
    return ops.icm(native, x, given, VARIANTS.index(variant), alpha, beta, grids, hw)


def icm_of_image(
    x: torch.Tensor, channels: int, projections: Sequence[Projection | None] | None, **options: Any
) -> torch.Tensor:
    """`icm` of an image [B, channels, H, W], in one piece for torch.fx, which knows no sizes."""
    check_channels(x, channels)
    height, width = x.shape[2:]
    out = icm(x.flatten(2).transpose(1, 2), projections, hw=(height, width), **options)
    return torch.unflatten(out.transpose(1, 2), 2, (height, width))


def check_channels(x: torch.Tensor, channels: int) -> None:
    """x is [B, channels, H, W]; raises ValueError."""
    if x.dim() != 4 or untraced(x.size, 1) != channels:
        raise ValueError(f"x must be [B, {channels}, H, W], got {list(x.shape)}")


torch.fx.wrap("check_channels")
torch.fx.wrap("icm_of_image")


def _check_icm(
    x: torch.Tensor,
    variant: str,
    alpha: Scalar,
    beta: Scalar,
    grids: Sequence[Sequence[int]],
    hw: Sequence[int],
) -> None:
    _check_tokens(x, "x")
    if len(grids) == 0:
        raise ValueError("grids must hold at least one (rows, columns), got none")
    for grid in grids:
        check_grid(grid, "grids")
    _check_image(hw, x)
    if variant not in VARIANTS:
        raise ValueError(f"variant must be 'paper' or 'released', got {variant!r}")
    sizes = (1,) if variant == "paper" else (1, len(grids))
    _check_scalar(alpha, "alpha", sizes)
    _check_scalar(beta, "beta", sizes)


def _autocast(tensor: _TensorOrNone, like: torch.Tensor) -> _TensorOrNone:
    """The tensor as autocast wants it on the device of `like`: alpha, beta and the sums stay out of this."""
    dtype = autocast_dtype(like.device.type)
    if tensor is None or dtype is None or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(dtype)


def _describe(tensor: torch.Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


def _check_tokens(tensor: torch.Tensor, name: str, shape: str = "[B, N, C]", rows: str = "token") -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dim() != 3:
        raise ValueError(f"{name} must be {shape}, got {list(tensor.shape)}")
    if tensor.dtype not in _DTYPES:
        raise ValueError(f"{name} must be float32, float64, float16 or bfloat16, got {_describe(tensor)}")
    if tensor.size(1) == 0 or tensor.size(2) == 0:
        raise ValueError(f"{name} must have at least one {rows} and one channel, got {list(tensor.shape)}")


def _check_per_token(tensor: torch.Tensor, name: str, centres: torch.Tensor) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dim() != 2 or tensor.size(0) != centres.size(0) or tensor.size(1) == 0:
        raise ValueError(f"{name} must be [B, N] for centres {list(centres.shape)}, got {list(tensor.shape)}")
    if tensor.device != centres.device:
        raise ValueError(
            f"{name} must be on the device of centres, {centres.device}, got {_describe(tensor)}"
        )


def _check_mask(mask: torch.Tensor | None, tokens: torch.Tensor) -> None:
    if mask is None:
        return
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"mask must be a tensor or None, got {type(mask).__name__}")
    if mask.shape != tokens.shape[:2] or mask.dtype != torch.bool or mask.device != tokens.device:
        raise ValueError(
            f"mask must be bool {list(tokens.shape[:2])} on {tokens.device}, got {_describe(mask)}"
        )


def check_grid(grid: Sequence[int], name: str) -> None:
    if len(grid) != 2 or not all(is_integer(side) and side >= 1 for side in grid):
        raise ValueError(f"{name} must be (rows, columns) of at least 1, got {tuple(grid)}")


def _check_image(hw: Sequence[int], tokens: torch.Tensor) -> None:
    positive = len(hw) == 2 and all(is_integer(side) and side >= 1 for side in hw)
    if not positive or as_int(hw[0]) * as_int(hw[1]) != tokens.size(1):
        raise ValueError(f"hw must be (H, W) with H * W = {tokens.size(1)} tokens, got {tuple(hw)}")


def _check_scalar(value: Scalar, name: str, sizes: tuple[int, ...]) -> None:
    if not isinstance(value, torch.Tensor):
        if not is_number(value):
            raise TypeError(f"{name} must be a number or a tensor, got {type(value).__name__}")
        return
    if value.dim() > 1 or value.numel() not in sizes:
        wanted = " or ".join(str(size) for size in sizes)
        raise ValueError(
            f"{name} must be a number or a tensor of {wanted} elements, got shape {list(value.shape)}"
        )
    if not value.is_floating_point():
        raise ValueError(f"{name} must be of a floating dtype, got {value.dtype}")


def _check_projections(projections: Sequence[Projection | None] | None, rounds: int, x: torch.Tensor) -> None:
    if projections is None:
        return
    if len(projections) != rounds:
        raise ValueError(
            f"projections must have one entry for each of the {rounds} grids, got {len(projections)}"
        )
    channels = x.size(2)
    for t, projection in enumerate(projections):
        if projection is None:
            continue
        if len(projection) != 4:
            raise ValueError(
                f"projections[{t}] must be (Wk, bk, Wv, bv) or None, got {len(projection)} entries"
            )
        for name, tensor in zip(("Wk", "bk", "Wv", "bv"), projection, strict=True):
            if tensor is None and name[0] == "b":
                continue
            if not isinstance(tensor, torch.Tensor):
                raise TypeError(f"projections[{t}]: {name} must be a tensor, got {type(tensor).__name__}")
            shape = [channels, channels] if name[0] == "W" else [channels]
            if list(tensor.shape) != shape:
                raise ValueError(
                    f"projections[{t}]: {name} must be {shape} for x's channels, got {list(tensor.shape)}"
                )
            if tensor.dtype != x.dtype or tensor.device != x.device:
                raise ValueError(
                    f"projections[{t}]: {name} must have x's dtype and device, got {_describe(tensor)}"
                )
