"""`cluster`, `dispatch` and `icm`: cosine clustering of the tokens of an image."""

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
    """One round of cosine clustering: pool centres, assign each token to the most similar one, average each cluster.

    The initial centres are the means of k and of v over `grid` bins of the image (those of `adaptive_avg_pool2d`: they
    overlap if the grid does not divide the image, and there may be more bins than pixels). A token is assigned to the
    centre with the largest cosine between keys. Ties go to the lowest index, and so do tokens of norm zero; a NaN is
    the largest, as in `torch.argmax`. The new centre is (pooled + sum_i w_i v_i) / (1 + sum_i w_i) over the tokens i
    assigned to it, with weights w_i = 1 or, for "similarity", the similarities.

    Args:
        k: keys [B, N, C], tokens of an image in row-major order.
        v: values [B, N, C], of k's dtype.
        grid: centres per axis (rows, columns); O is their product.
        hw: (H, W) of the image, H * W = N.
        aggregate: "count": every weight is 1 (FEC; FRD-Net, Eq. 1 to 3). "similarity": the weight of a token is its
            similarity sigmoid(beta + alpha * cosine), and the arg-max is over the similarities (CoC; FRD-Net's code).
        alpha: slope of the similarity, a number or a tensor of one element. A negative alpha assigns each token to the
            least similar centre; alpha = 0 ties all of them. For "count" only the sign has an effect.
        beta: offset of the similarity, a number or a tensor of one element; unused for "count".
        mask: bool [B, N], true for the tokens to cluster; None: all. Masked tokens, even NaNs, enter no mean, count or
            gradient: their label is -1, their similarity and their gradients are 0. A bin without tokens pools to
            zeros, and all cosines with it are 0.

    Returns:
        ClusterResult: centres [B, O, C] in v's dtype; labels [B, N] int64, -1 for masked tokens; similarity [B, N] of
            each token with its assigned centre (for "count" the raw cosine), float64 for float64, else float32;
            counts [B, O] int32. Centres and similarity are differentiable, labels and counts are not.

    Raises:
        ValueError: an argument has an invalid value, shape, dtype or device; the message names it and the rule.
        TypeError: an argument that must be a tensor or a number is not one.
    """
    if isinstance(k, Proxy):
        named: dict[str, Any] = {"aggregate": aggregate, "alpha": alpha, "beta": beta, "mask": mask}
        return handle_torch_function(cluster, (k,), k, v, grid, hw, **named)
    untraced(_check_keys_and_values, k, v)
    dtype = autocast_dtype(k.device.type)
    if dtype is not None:
        k, v = _cast(k, dtype), _cast(v, dtype)
    untraced(_check_cluster, k, v, grid, hw, aggregate, alpha, beta, mask)
    native = backend.select("cluster", k)
    if native is None or not backend.is_fused("cluster", k, native):
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
    """Dispatches the centres of `cluster` to the tokens: out[b, n] = similarity[b, n] * centres[b, labels[b, n]].

    Args:
        centres: [B, O, C]. The result has their dtype, under autocast too.
        labels: int64 or int32 [B, N], the assigned centre 0 .. O - 1 of each token, or -1 for a token whose result
            is 0.
        similarity: floating point [B, N], the factor of each token. It is converted to float64 for float64 centres,
            else to float32.
        channels_first: stores the result as an image: the memory is [B, C, N].

    Returns:
        [B, N, C]. Centres and similarity are differentiable; the gradients are deterministic.

    Raises:
        ValueError: an argument has an invalid shape, dtype or device; the message names it and the rule.
        TypeError: an argument is not a tensor.
    """
    if isinstance(centres, Proxy):
        inputs = centres, labels, similarity
        return handle_torch_function(dispatch, (centres,), *inputs, channels_first=channels_first)
    untraced(_check_dispatch, centres, labels, similarity)
    native = backend.select("cluster_dispatch", centres)
    if native is None or not backend.is_fused("cluster_dispatch", centres, native):
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
    """FRD-Net's iterative clustering: T rounds of `cluster`, then the last centres are dispatched to the tokens.

    Round t clusters the tokens R_(t-1), where R_0 = x and R_t are the centres of round t, an image of grids[t-1]. Its
    keys are Wk R_(t-1) + bk, its values Wv R_(t-1) + bv.

    Args:
        x: tokens [B, N, C] of an image in row-major order; any strides.
        projections: for each round (Wk [C, C], bk [C], Wv [C, C], bv [C]) in x's dtype, where a bias may be None, or
            None for keys = values = tokens. None instead of the sequence: no round has projections.
        variant: "paper" (Eq. 1 to 4): cosines, means over counts; the output is sigmoid(alpha * (M1 M2 ... MT) +
            beta) R_T with the dense cosine matrices M_t [N_(t-1), O_t]. "released" (the authors' code): similarities
            sigmoid(beta_t + alpha_t * cosine), means weighted by them; the output of a token is the centre of round T
            at the end of its chain of assigned centres, times the product of the similarities along the chain.
        alpha: a number or a tensor of one element; for "released" also a tensor [T], one value per round.
        beta: as alpha.
        grids: centres per axis (rows, columns) of each round.
        hw: (H, W) of x, H * W = N.

    Returns:
        [B, N, C] in x's dtype, with x's strides if x is a permuted image [B, C, H, W].

    Raises:
        ValueError: an argument has an invalid value, shape, dtype or device; the message names it and the rule.
        TypeError: an argument that must be a tensor or a number is not one.
    """
    if isinstance(x, Proxy):
        named: dict[str, Any] = {"variant": variant, "alpha": alpha, "beta": beta, "grids": grids, "hw": hw}
        return handle_torch_function(icm, (x,), x, projections, **named)
    untraced(_check_icm, x, variant, alpha, beta, grids, hw)
    dtype = autocast_dtype(x.device.type)
    if dtype is not None:
        x = _cast(x, dtype)
        if projections is not None:
            projections = [p and cast(Projection, tuple(_cast(t, dtype) for t in p)) for p in projections]
    untraced(_check_projections, projections, len(grids), x)
    native = backend.select("icm", x)
    if native is None or not backend.is_fused("icm", x, native):
        return reference.icm(x, projections, variant=variant, alpha=alpha, beta=beta, grids=grids, hw=hw)
    given = [None] * len(grids) if projections is None else projections
    return ops.icm(native, x, given, VARIANTS.index(variant), alpha, beta, grids, hw)


def icm_of_image(
    x: torch.Tensor, channels: int, projections: Sequence[Projection | None] | None, **options: Any
) -> torch.Tensor:
    """`icm` of an image [B, channels, H, W]: one node of a `torch.fx` graph, which knows no sizes."""
    check_channels(x, channels)
    height, width = x.shape[2:]
    out = icm(x.flatten(2).transpose(1, 2), projections, hw=(height, width), **options)
    return torch.unflatten(out.transpose(1, 2), 2, (height, width))


def check_channels(x: torch.Tensor, channels: int) -> None:
    """Raises ValueError unless x is [B, channels, H, W]."""
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


def _cast(tensor: _TensorOrNone, dtype: torch.dtype) -> _TensorOrNone:
    """The tensor in the dtype of autocast. Not for alpha, beta and sums, which keep theirs."""
    if tensor is None or tensor.dtype == torch.float64:
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
    """Raises ValueError unless grid is a pair of positive integers."""
    if len(grid) != 2 or not all(is_integer(n) and n >= 1 for n in grid):
        raise ValueError(f"{name} must be (rows, columns) of at least 1, got {tuple(grid)}")


def _check_image(hw: Sequence[int], tokens: torch.Tensor) -> None:
    positive = len(hw) == 2 and all(is_integer(n) and n >= 1 for n in hw)
    if not positive or as_int(hw[0]) * as_int(hw[1]) != tokens.size(1):
        raise ValueError(f"hw must be (H, W) with H * W = {tokens.size(1)} tokens, got {tuple(hw)}")


def _check_scalar(value: Scalar, name: str, sizes: tuple[int, ...]) -> None:
    if not isinstance(value, torch.Tensor):
        if not is_number(value):
            raise TypeError(f"{name} must be a number or a tensor, got {type(value).__name__}")
        return
    if value.dim() > 1 or value.numel() not in sizes:
        allowed = " or ".join(str(size) for size in sizes)
        raise ValueError(
            f"{name} must be a number or a tensor of {allowed} elements, got shape {list(value.shape)}"
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
    channels, dtype, device = x.size(2), x.dtype, x.device
    shapes = {"Wk": (channels, channels), "bk": (channels,), "Wv": (channels, channels), "bv": (channels,)}
    for t, projection in enumerate(projections):
        if projection is None:
            continue
        if len(projection) != 4:
            raise ValueError(
                f"projections[{t}] must be (Wk, bk, Wv, bv) or None, got {len(projection)} entries"
            )
        for tensor, (name, shape) in zip(projection, shapes.items(), strict=True):
            if tensor is None and name[0] == "b":
                continue
            if not isinstance(tensor, torch.Tensor):
                raise TypeError(f"projections[{t}]: {name} must be a tensor, got {type(tensor).__name__}")
            if tensor.shape != shape:
                raise ValueError(
                    f"projections[{t}]: {name} must be {list(shape)} for x's channels, got {list(tensor.shape)}"
                )
            if tensor.dtype != dtype or tensor.device != device:
                raise ValueError(
                    f"projections[{t}]: {name} must have x's dtype and device, got {_describe(tensor)}"
                )
